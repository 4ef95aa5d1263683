//! Whether the database's file is sound: asked at every start that no clean stop came before.
//!
//! A file beside the database says that a process has it open, and only a clean stop removes it. Without a clean stop
//! the disk may have lost its power, too, so the file is checked. Small databases are checked before anybody is
//! served; the check of a large one goes on beside the service, so that a start does not take longer the more data
//! there is. It finds broken pages, cells and structure; that a page is the one which was written is checked whenever
//! one is read, see [`crate::page_sums`].

use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use rusqlite::{Connection, config::DbConfig};
use tokio::{sync::oneshot, time::timeout};

use crate::{
    connection,
    database::DatabaseFile,
    snapshot::{self, Shared},
};

/// The file's name is the database's with this at its end.
const MARK_SUFFIX: &str = ".running";

/// How long a start waits for the check before it serves beside it.
const WAIT_MAX: Duration = Duration::from_secs(1);

/// What a check found. The node must not serve from this file.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{}: damaged{}: {reason}. The file is kept as it is; `resqlite node replace` rebuilds this node from its peers",
    file.display(),
    applied_index.map(|index| format!(", at applied index {index}")).unwrap_or_default()
)]
pub struct Damage {
    /// The database.
    pub file: PathBuf,
    /// Where it stands in the log, as far as that can be read.
    pub applied_index: Option<u64>,
    /// SQLite's words.
    pub reason: String,
}

/// Says that a process has the database open, until it is cleared.
#[derive(Debug)]
pub struct RunningMark {
    path: PathBuf,
}

impl RunningMark {
    /// Sets it, durably. Returns whether the last process that had the database open stopped cleanly.
    pub fn set(database: &Path) -> io::Result<(Self, bool)> {
        let path = snapshot::beside(database, MARK_SUFFIX);
        let stopped_cleanly = !path.try_exists()?;
        if stopped_cleanly {
            File::create(&path)?.sync_all()?;
            snapshot::sync_directory_of(database)?;
        }
        Ok((Self { path }, stopped_cleanly))
    }

    /// The database is closed, and nothing is wrong with it. If this does not last, the next start only checks more.
    pub fn clear(self) -> io::Result<()> {
        fs::remove_file(self.path)
    }
}

/// A check that may be under way.
#[derive(Debug)]
pub struct Check {
    finished: Option<oneshot::Receiver<Result<(), Damage>>>,
    /// Nobody replaces the database under it.
    right: Option<Shared>,
}

impl Check {
    /// There is nothing to check.
    pub fn needless() -> Self {
        Self { finished: None, right: None }
    }

    /// Begins to check a database that this process has open. It has a connection of its own until it is done.
    pub fn start(database: &DatabaseFile, applied_index: u64, right: Shared) -> io::Result<Self> {
        let (done, finished) = oneshot::channel();
        let database = database.clone();
        let check = move || drop(done.send(check(&database, Some(applied_index))));
        thread::Builder::new().name("check".into()).spawn(check)?;
        Ok(Self { finished: Some(finished), right: Some(right) })
    }

    /// Waits for the result, but not for long.
    pub async fn wait_a_little(&mut self) -> Result<(), Damage> {
        timeout(WAIT_MAX, self.result()).await.unwrap_or(Ok(()))
    }

    /// Returns what is wrong, or never.
    pub async fn damage(&mut self) -> Damage {
        match self.result().await {
            Err(damage) => damage,
            Ok(()) => std::future::pending().await,
        }
    }

    /// Whether nothing is left to be found.
    pub fn is_done(&self) -> bool {
        self.finished.is_none()
    }

    async fn result(&mut self) -> Result<(), Damage> {
        let Some(finished) = &mut self.finished else { return Ok(()) };
        let result = finished.await;
        (self.finished, self.right) = (None, None);
        // A thread that panicked has said why, and found nothing.
        result.unwrap_or(Ok(()))
    }
}

/// Checks a database that this process has open. Blocks; reads the whole file.
pub fn check(database: &DatabaseFile, applied_index: Option<u64>) -> Result<(), Damage> {
    let damage = |reason| Damage { file: database.path().to_owned(), applied_index, reason };
    let verdict = verdict_of(database);
    if let Some(damage) = database.damage(applied_index) {
        return Err(damage);
    }
    match verdict {
        Ok(None) => Ok(()),
        Ok(Some(reason)) => Err(damage(reason)),
        Err(error) if is_damage(&error) => Err(damage(error.to_string())),
        Err(error) => {
            tracing::warn!(%error, "the database could not be checked");
            Ok(())
        }
    }
}

fn verdict_of(database: &DatabaseFile) -> rusqlite::Result<Option<String>> {
    let connection = database.open_to_read()?;
    connection::harden(&connection)?;
    // Evidence is not to be written over by whoever looks at it.
    connection.set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, true)?;
    verdict(&connection)
}

/// What is wrong with a database, in SQLite's words; None if nothing is.
pub(crate) fn verdict(connection: &Connection) -> rusqlite::Result<Option<String>> {
    // A row that a constraint no longer admits is the same on every node, and no damage.
    connection.execute_batch("PRAGMA cell_size_check = ON; PRAGMA ignore_check_constraints = ON")?;
    let verdict: String = connection.query_row("PRAGMA quick_check(1)", [], |row| row.get(0))?;
    Ok((verdict != "ok").then_some(verdict))
}

/// Whether SQLite's error says that the file is not what it was.
pub(crate) fn is_damage(error: &rusqlite::Error) -> bool {
    matches!(
        error.sqlite_error_code(),
        Some(rusqlite::ErrorCode::DatabaseCorrupt | rusqlite::ErrorCode::NotADatabase)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_cleared_mark_means_a_clean_stop() {
        let directory = tempfile::tempdir().unwrap();
        let database = directory.path().join("resqlite.db");
        let (mark, clean) = RunningMark::set(&database).unwrap();
        assert!(clean, "a new database");
        drop(mark);
        let (mark, clean) = RunningMark::set(&database).unwrap();
        assert!(!clean, "nobody has cleared it");
        mark.clear().unwrap();
        assert!(RunningMark::set(&database).unwrap().1);
    }

    #[test]
    fn the_damage_names_file_index_and_the_way_on() {
        let damage =
            Damage { file: "/srv/sql/resqlite.db".into(), applied_index: Some(7), reason: "broken".into() };
        assert_eq!(
            damage.to_string(),
            "/srv/sql/resqlite.db: damaged, at applied index 7: broken. The file is kept as it is; \
             `resqlite node replace` rebuilds this node from its peers"
        );
    }
}
