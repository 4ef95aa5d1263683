//! A received snapshot takes the database's place, so that a crash at any moment leaves the old one or the new one.
//!
//! A record says durably what is to be done; every step after it may be done again, and a start does so before
//! anything is opened. Nobody has the database open meanwhile: see [`super::Users`].

use std::{
    fs::{self, File},
    io,
    path::Path,
};

use super::{beside, incoming::Incoming};
use crate::{page_sums, verify};

/// Where a snapshot is received.
pub(super) const INCOMING: &str = ".incoming";

/// Where the sums of its pages are kept.
pub(super) const INCOMING_SUMS: &str = ".incoming-sums";

/// Where a copy is made for sending; a number follows.
pub(super) const OUTGOING: &str = ".outgoing-";

/// If it is there, the incoming file is whole, or has already taken the database's place.
const RECORD: &str = ".installing";

impl Incoming {
    /// Takes the database's place, durably. After an error the record may stand: then only [`finish`] may follow,
    /// and the database must not be opened before.
    pub fn install(self) -> io::Result<()> {
        let record = beside(self.database(), RECORD);
        File::create(&record)?.sync_all()?;
        sync_directory_of(self.database())?;
        carry_out(self.database())
    }
}

/// Finishes what was recorded before a crash, and removes what a crash left behind. Call it before the database is
/// opened. Returns whether a snapshot has taken its place.
pub fn finish(database: &Path) -> io::Result<bool> {
    let recorded = beside(database, RECORD).try_exists()?;
    if recorded {
        carry_out(database)?;
    }
    remove_if_there(&beside(database, INCOMING))?;
    remove_if_there(&beside(database, INCOMING_SUMS))?;
    remove_outgoing(database)?;
    Ok(recorded)
}

/// What is to be done once it is recorded, in this order. Each step may be done again.
const STEPS: [fn(&Path) -> io::Result<()>; 7] = [
    remove_what_is_about_the_old,
    sync_directory_of,
    |database| take_the_place(&beside(database, INCOMING), database),
    |database| take_the_place(&beside(database, INCOMING_SUMS), &beside(database, page_sums::FILE_SUFFIX)),
    sync_directory_of,
    |database| remove_if_there(&beside(database, RECORD)),
    sync_directory_of,
];

fn carry_out(database: &Path) -> io::Result<()> {
    STEPS.iter().try_for_each(|step| step(database))
}

/// First of all: a write-ahead log of the old database would be taken for the new one's, and undo it page by page.
/// What was said of the old content goes with it.
fn remove_what_is_about_the_old(database: &Path) -> io::Result<()> {
    let suffixes = ["-wal", "-shm", "-journal", page_sums::TRUSTED_SUFFIX, verify::FILE_SUFFIX];
    for suffix in suffixes {
        remove_if_there(&beside(database, suffix))?;
    }
    Ok(())
}

fn take_the_place(new: &Path, old: &Path) -> io::Result<()> {
    match fs::rename(new, old) {
        // A crash came after the rename.
        Err(error) if error.kind() == io::ErrorKind::NotFound && old.try_exists()? => Ok(()),
        renamed => renamed,
    }
}

fn remove_if_there(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        removed => removed,
    }
}

fn remove_outgoing(database: &Path) -> io::Result<()> {
    let prefix = beside(database, OUTGOING);
    let Some(prefix) = prefix.file_name() else { return Ok(()) };
    for file in fs::read_dir(directory_of(database))? {
        let file = file?;
        if file.file_name().as_encoded_bytes().starts_with(prefix.as_encoded_bytes()) {
            fs::remove_file(file.path())?;
        }
    }
    Ok(())
}

fn directory_of(database: &Path) -> &Path {
    database.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Makes what was created, renamed or removed beside the database durable.
pub(crate) fn sync_directory_of(database: &Path) -> io::Result<()> {
    File::open(directory_of(database))?.sync_all()
}

#[cfg(test)]
mod tests {
    use rusqlite::Connection;

    use super::*;

    /// A database with this content, also in a write-ahead log if it is left open.
    fn make(path: &Path, content: &str) -> Connection {
        let connection = Connection::open(path).unwrap();
        let sql = format!("PRAGMA journal_mode = WAL; CREATE TABLE t(a); INSERT INTO t VALUES('{content}')");
        connection.execute_batch(&sql).unwrap();
        connection
    }

    fn content(path: &Path) -> String {
        Connection::open(path).unwrap().query_row("SELECT a FROM t", [], |row| row.get(0)).unwrap()
    }

    /// The state of a directory in which a process was killed: an old database with its write-ahead log, and a whole
    /// snapshot beside it.
    fn killed(directory: &Path) -> std::path::PathBuf {
        let (living, killed) = (directory.join("living"), directory.join("killed"));
        fs::create_dir(&living).unwrap();
        fs::create_dir(&killed).unwrap();
        let old = make(&living.join("resqlite.db"), "old");
        drop(make(&living.join("resqlite.db.incoming"), "new"));
        fs::write(living.join("resqlite.db-sums"), "old").unwrap();
        fs::write(living.join("resqlite.db.incoming-sums"), "new").unwrap();
        for file in fs::read_dir(&living).unwrap() {
            let file = file.unwrap();
            fs::copy(file.path(), killed.join(file.file_name())).unwrap();
        }
        assert!(killed.join("resqlite.db-wal").exists());
        drop(old);
        killed.join("resqlite.db")
    }

    fn names(database: &Path) -> Vec<String> {
        let files = fs::read_dir(directory_of(database)).unwrap();
        let mut names: Vec<String> =
            files.map(|file| file.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn killed_after_any_step_a_start_finishes_the_install() {
        for done in 0..=STEPS.len() {
            let directory = tempfile::tempdir().unwrap();
            let database = killed(directory.path());
            File::create(beside(&database, RECORD)).unwrap();
            STEPS[..done].iter().for_each(|step| step(&database).unwrap());
            // Once the record is gone there is nothing left to finish.
            assert_eq!(finish(&database).unwrap(), done < 6, "after {done} steps");
            assert_eq!(names(&database), ["resqlite.db", "resqlite.db-sums"], "after {done} steps");
            assert_eq!(content(&database), "new", "after {done} steps");
            assert_eq!(fs::read(beside(&database, "-sums")).unwrap(), b"new", "after {done} steps");
        }
    }

    #[test]
    fn killed_before_the_record_a_start_drops_the_snapshot() {
        let directory = tempfile::tempdir().unwrap();
        let database = killed(directory.path());
        fs::write(beside(&database, ".outgoing-7"), "half a copy").unwrap();
        assert!(!finish(&database).unwrap());
        assert_eq!(content(&database), "old");
        assert!(names(&database).iter().all(|name| !name.contains("incoming") && !name.contains("outgoing")));
    }
}
