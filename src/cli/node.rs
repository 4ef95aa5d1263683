//! `resqlite node`: what is done to one node while its daemons are stopped.
//!
//! It moves files and looks into none of them.

use std::{
    ffi::OsString,
    fs, io,
    os::unix::fs::chown,
    path::{Path, PathBuf},
    process::ExitCode,
    time::{SystemTime, UNIX_EPOCH},
};

use super::fail;
use crate::{
    config::{Config, DEFAULT_PATH},
    directory_lock::{DirectoryLock, LOCK_FILE, owner_for_root},
};

/// How the directories begin into which `replace` moves what it finds; they stay where they are.
const KEPT_PREFIX: &str = "replaced-";

/// What stays in place: the lock that this program holds, and the reserve for a full disk.
const STAYS: [&str; 2] = [LOCK_FILE, "ballast"];

#[derive(Debug, clap::Subcommand)]
pub enum Command {
    /// Give a node whose data is damaged an empty start: its peers fill it
    Replace(ReplaceArguments),
}

#[derive(Debug, clap::Args)]
pub struct ReplaceArguments {
    /// The configuration file of both daemons
    #[arg(long, value_name = "FILE", default_value = DEFAULT_PATH)]
    config: PathBuf,
}

/// Why nothing was done, or not everything.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    /// A daemon, or another such command, is at work.
    #[error("{} is in use: stop raftd and sqlited first", .0.display())]
    InUse(PathBuf),
    /// A directory cannot be used.
    #[error("{}: {source}", path.display())]
    Io {
        /// The directory.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    #[error(
        "this node is its cluster's only member, so nobody could fill it again: if the data cannot be saved, empty {} \
         and {} and restore a backup",
        .0.display(),
        .1.display()
    )]
    OnlyMember(PathBuf, PathBuf),
    #[error("there is nothing to replace: {} and {} hold no data", .0.display(), .1.display())]
    Nothing(PathBuf, PathBuf),
}

/// Runs the command.
pub fn run(command: Command) -> ExitCode {
    let Command::Replace(arguments) = command;
    let config = match Config::load(&arguments.config) {
        Ok(config) => config,
        Err(error) => return fail(&error.to_string()),
    };
    match replace(&config) {
        Ok(kept) => {
            for path in kept {
                println!("What was there is kept in {}", path.display());
            }
            println!(
                "Start raftd and sqlited: the node is filled by its peers, and does not count before it holds \
                 everything\n(`resqlite status` shows it as a learner until then). Replace no other node meanwhile, \
                 and never put back\nwhat was kept: it has forgotten nothing, but its peers go on without it."
            );
            ExitCode::SUCCESS
        }
        Err(error) => fail(&error.to_string()),
    }
}

/// Moves the data of both daemons aside. Returns where it is kept.
///
/// A crash in between leaves a directory that its daemon refuses, or an empty one: the command can be run again.
fn replace(config: &Config) -> Result<Vec<PathBuf>, NodeError> {
    let directories = [&config.raftd.data_dir, &config.sqlited.data_dir];
    let nothing = || NodeError::Nothing(directories[0].clone(), directories[1].clone());
    if config.cluster.members.len() == 1 {
        return Err(NodeError::OnlyMember(directories[0].clone(), directories[1].clone()));
    }
    let there: Vec<&PathBuf> = directories.into_iter().filter(|directory| directory.is_dir()).collect();
    let _locks = there.iter().map(|directory| lock(directory)).collect::<Result<Vec<_>, _>>()?;
    let seconds = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let name = format!("{KEPT_PREFIX}{}", utc(seconds));
    let mut kept = Vec::new();
    for directory in there {
        let moved = move_aside(directory, &name)
            .map_err(|error| NodeError::Io { path: directory.clone(), source: error })?;
        kept.extend(moved);
    }
    if kept.is_empty() { Err(nothing()) } else { Ok(kept) }
}

/// Makes sure that no daemon works on a data directory as long as the result lives.
fn lock(directory: &Path) -> Result<DirectoryLock, NodeError> {
    let locked = DirectoryLock::acquire(directory)
        .map_err(|error| NodeError::Io { path: directory.into(), source: error })?;
    locked.ok_or_else(|| NodeError::InUse(directory.into()))
}

/// Moves everything in a directory into a new one within: that keeps its owner and works on a mount point.
fn move_aside(directory: &Path, name: &str) -> io::Result<Option<PathBuf>> {
    let mut names: Vec<OsString> = fs::read_dir(directory)?
        .map(|entry| entry.map(|entry| entry.file_name()))
        .collect::<Result<_, _>>()?;
    names.retain(|name| {
        let name = name.to_string_lossy();
        !STAYS.contains(&name.as_ref()) && !name.starts_with(KEPT_PREFIX)
    });
    if names.is_empty() {
        return Ok(None);
    }
    let kept = directory.join(name);
    fs::create_dir(&kept)?;
    if let Some((user, group)) = owner_for_root(directory)? {
        chown(&kept, Some(user), Some(group))?;
    }
    for name in names {
        fs::rename(directory.join(&name), kept.join(&name))?;
    }
    fs::File::open(&kept)?.sync_all()?;
    fs::File::open(directory)?.sync_all()?;
    Ok(Some(kept))
}

/// A moment as `20260131T235959Z`: Howard Hinnant's `civil_from_days`
/// (<https://howardhinnant.github.io/date_algorithms.html>).
fn utc(seconds: u64) -> String {
    let (days, of_day) = (seconds / 86_400 + 719_468, seconds % 86_400);
    let (era, of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (of_era - of_era / 1_460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let from_march = (5 * of_year + 2) / 153;
    let day = of_year - (153 * from_march + 2) / 5 + 1;
    let month = if from_march < 10 { from_march + 3 } else { from_march - 9 };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    let (hour, minute, second) = (of_day / 3_600, of_day / 60 % 60, of_day % 60);
    format!("{year:04}{month:02}{day:02}T{hour:02}{minute:02}{second:02}Z")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_moment_is_named_in_utc() {
        assert_eq!(utc(0), "19700101T000000Z");
        assert_eq!(utc(951_826_309), "20000229T121149Z");
        assert_eq!(utc(1_798_761_599), "20261231T235959Z");
    }

    #[test]
    fn everything_but_the_lock_and_the_reserve_is_kept_elsewhere() {
        let directory = tempfile::tempdir().unwrap();
        for name in ["lock", "ballast", "hard_state"] {
            fs::write(directory.path().join(name), name).unwrap();
        }
        fs::create_dir(directory.path().join("log")).unwrap();
        let kept = move_aside(directory.path(), "replaced-1").unwrap().unwrap();
        assert!(kept.join("hard_state").is_file() && kept.join("log").is_dir());
        assert!(directory.path().join("lock").is_file() && directory.path().join("ballast").is_file());
        assert!(!directory.path().join("hard_state").exists());
        // What was kept before stays as it is.
        assert_eq!(move_aside(directory.path(), "replaced-2").unwrap(), None);
        assert!(kept.join("hard_state").is_file());
    }

    #[test]
    fn a_directory_in_use_is_left_alone() {
        let directory = tempfile::tempdir().unwrap();
        let held = lock(directory.path()).unwrap();
        assert!(matches!(lock(directory.path()), Err(NodeError::InUse(_))));
        drop(held);
        lock(directory.path()).unwrap();
    }
}
