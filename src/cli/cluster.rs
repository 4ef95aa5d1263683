//! `resqlite cluster recover`: a new cluster from a survivor of one whose majority is gone for good.
//!
//! It decides and asks; what changes the data are the daemons' own programs, run with `--recover`.

use std::{
    io::{self, BufRead, Write},
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Command as Program, ExitCode},
};

use serde::de::DeserializeOwned;

use super::{fail, playground::daemon_path};
use crate::{
    config::{Config, DEFAULT_PATH},
    directory_lock::owner_for_root,
    recovery::{self, SurvivingDatabase, SurvivingLog},
};

#[derive(Debug, clap::Subcommand)]
pub enum Command {
    /// Make a survivor the beginning of a new cluster, when a majority is gone for good
    Recover(RecoverArguments),
}

#[derive(Debug, clap::Args)]
pub struct RecoverArguments {
    /// The configuration of the new cluster: another name, and the members that it will have
    #[arg(long, value_name = "FILE", default_value = DEFAULT_PATH)]
    config: PathBuf,
    /// Only show what this node holds, to compare survivors
    #[arg(long)]
    show: bool,
    /// Do not ask
    #[arg(long)]
    yes: bool,
}

/// Why there is no new cluster.
#[derive(Debug, thiserror::Error)]
enum RecoverError {
    #[error("{0}")]
    Config(#[from] crate::config::ConfigError),
    #[error("{program} --recover: {reason}")]
    Program { program: &'static str, reason: String },
    #[error(
        "the configuration still describes the cluster that is lost: give the new one another cluster.name (and its \
         members), so that a lost member that comes back cannot be taken for one of its own"
    )]
    SameCluster,
    #[error(
        "this node holds nothing to begin with: it is new, or a learner that was not filled. Recover from another \
         survivor"
    )]
    NotFilled,
    #[error(
        "the database has applied up to index {applied_index}, but the log holds {first_index} to {last_index}: they \
         do not belong together. Recover from another survivor, or restore the database ({database}) as a backup into \
         a cluster with empty directories"
    )]
    DoNotMeet { applied_index: u64, first_index: u64, last_index: u64, database: String },
    #[error("nothing was changed")]
    Declined,
    #[error("cannot ask: {0}; --yes does not ask")]
    Terminal(#[from] io::Error),
}

/// What a survivor holds.
struct Survivor {
    log: SurvivingLog,
    database: SurvivingDatabase,
}

/// Runs the command.
pub fn run(command: Command) -> ExitCode {
    let Command::Recover(arguments) = command;
    match recover(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(&error.to_string()),
    }
}

fn recover(arguments: &RecoverArguments) -> Result<(), RecoverError> {
    let config = Config::load(&arguments.config)?;
    let survivor = Survivor {
        log: run_program("raftd", &config.raftd.data_dir, &arguments.config, "show")?,
        database: run_program("sqlited", &config.sqlited.data_dir, &arguments.config, "show")?,
    };
    survivor.print(config.node_id);
    if arguments.show {
        return Ok(());
    }
    survivor.check(&config)?;
    explain(&survivor, &config);
    if !arguments.yes && !confirmed(&config.cluster.name)? {
        return Err(RecoverError::Declined);
    }
    // Both steps can be repeated. A crash in between leaves daemons that refuse to start, until this is run again.
    run_program::<SurvivingLog>("raftd", &config.raftd.data_dir, &arguments.config, "found")?;
    run_program::<SurvivingDatabase>("sqlited", &config.sqlited.data_dir, &arguments.config, "found")?;
    println!("\nDone. {}", what_next(&config));
    Ok(())
}

/// Runs a daemon's program on its data directory. From root, as the user whose the directory is, so that the daemon can
/// open afterwards what it makes there.
fn run_program<T: DeserializeOwned>(
    program: &'static str,
    data_dir: &Path,
    config: &Path,
    step: &str,
) -> Result<T, RecoverError> {
    let failed = |reason| RecoverError::Program { program, reason };
    let path = daemon_path(program).map_err(failed)?;
    let mut command = Program::new(path);
    command.arg("--config").arg(config).args(["--recover", step]);
    let owner =
        owner_for_root(data_dir).map_err(|error| failed(format!("{}: {error}", data_dir.display())))?;
    if let Some((user, group)) = owner {
        command.uid(user).gid(group);
    }
    let output = command.output().map_err(|error| failed(error.to_string()))?;
    if !output.status.success() {
        return Err(failed(String::from_utf8_lossy(&output.stderr).trim().to_owned()));
    }
    recovery::from_text(&String::from_utf8_lossy(&output.stdout)).map_err(failed)
}

impl Survivor {
    fn print(&self, node_id: u64) {
        let Self { log, database } = self;
        println!("node {node_id}");
        println!("  applied index   {}", database.applied_index);
        println!("  log             {} to {}", log.first_index, log.last_index);
        println!("  last term       {}", log.last_term);
        println!("  cluster id      {:016x}", log.cluster_id);
    }

    fn check(&self, config: &Config) -> Result<(), RecoverError> {
        let Self { log, database } = self;
        let new = config.cluster_id();
        if log.cluster_id == new && (database.cluster_id == new || database.cluster_id == 0) {
            return Err(RecoverError::SameCluster);
        }
        if !log.counts || log.last_index == 0 {
            return Err(RecoverError::NotFilled);
        }
        let applied_index = database.applied_index;
        if applied_index + 1 < log.first_index || applied_index > log.last_index {
            let (first_index, last_index) = (log.first_index, log.last_index);
            let database = config.sqlited.data_dir.display().to_string();
            return Err(RecoverError::DoNotMeet { applied_index, first_index, last_index, database });
        }
        Ok(())
    }
}

fn explain(survivor: &Survivor, config: &Config) {
    let Survivor { log, database } = survivor;
    let beyond = log.last_index - database.applied_index;
    println!(
        "\nA new cluster, \"{}\" (id {:016x}), begins with this node's log.\n\
         - Lost: whatever the old cluster acknowledged after index {} of term {}, the end of this log. Only the lost \
         nodes know whether there was any.\n\
         - Kept: everything up to there. {beyond} entries after the applied index are applied when the new cluster \
         starts; those that were never acknowledged are among them.\n\
         Of several survivors, the one with the highest last term has most; of equal terms, the one with the higher \
         last index (--show compares).",
        config.cluster.name,
        config.cluster_id(),
        log.last_index,
        log.last_term,
    );
}

fn what_next(config: &Config) -> String {
    if config.cluster.members.len() == 1 {
        return "Start raftd and sqlited: this node serves alone.".into();
    }
    "Start raftd and sqlited here, and on every other member of the new configuration with empty\n\
     data directories. The first start waits until all of them are there; no node that is empty can be elected."
        .into()
}

fn confirmed(name: &str) -> io::Result<bool> {
    print!("\nType the name of the new cluster to go on: ");
    io::stdout().flush()?;
    let mut answer = String::new();
    io::stdin().lock().read_line(&mut answer)?;
    Ok(answer.trim() == name)
}
