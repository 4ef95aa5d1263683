//! A copy of the database, for a snapshot or a backup: the pages of one consistent view, as they are.
//!
//! The view is given up as soon as the pages are copied, because no checkpoint gets past a reader's view while it
//! lasts. `VACUUM INTO` would be shorter, and wrong: it gives new rowids to the rows of a table without an INTEGER
//! PRIMARY KEY, and the nodes would differ (<https://sqlite.org/lang_vacuum.html>).

use std::{
    fs::{self, File},
    io,
    path::Path,
};

use rusqlite::{
    Connection,
    backup::{Backup, StepResult},
};

use crate::{
    apply::{self, Position},
    connection,
    database::DatabaseFile,
};

/// How many pages are copied between two looks at whether anybody still wants them.
const PAGES_PER_STEP: i32 = 1_024;

/// A copy, open for reading. It has no name any more, so that it goes away with its reader whatever happens.
#[derive(Debug)]
pub struct DatabaseCopy {
    /// Where it stands in the log.
    pub position: Position,
    /// At its beginning.
    pub file: File,
    /// Its size.
    pub size_bytes: u64,
}

/// Why there is no copy.
#[derive(Debug, thiserror::Error)]
pub enum CopyError {
    /// SQLite's reason.
    #[error("the database cannot be copied: {0}")]
    Sqlite(#[from] rusqlite::Error),
    /// The file system's reason.
    #[error("the copy of the database cannot be read: {0}")]
    Io(#[from] io::Error),
    /// The database itself cannot be used by this version.
    #[error("the database cannot be copied: {0}")]
    Unusable(String),
    /// Nobody wants it any more.
    #[error("nobody waits for the copy any more")]
    Unwanted,
}

/// Copies the database that this process has open to a file beside it. Blocks.
pub fn copy(
    database: &DatabaseFile,
    to: &Path,
    is_wanted: impl Fn() -> bool,
) -> Result<DatabaseCopy, CopyError> {
    let copied = copy_pages(database, to, is_wanted);
    let opened = copied.and_then(|position| {
        let file = File::open(to)?;
        let size_bytes = file.metadata()?.len();
        Ok(DatabaseCopy { position, file, size_bytes })
    });
    match fs::remove_file(to) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error.into()),
        _ => opened,
    }
}

/// Copies the pages of one view that is current now, and says where that stands in the log. What is at `to` after an
/// error is of no use. Blocks.
pub fn copy_pages(
    database: &DatabaseFile,
    to: &Path,
    is_wanted: impl Fn() -> bool,
) -> Result<Position, CopyError> {
    let source = database.open_to_read()?;
    connection::harden(&source)?;
    let mut target = Connection::open(to)?;
    // Nobody reads a copy that a crash has left behind.
    target.execute_batch("PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF")?;
    // Only now: a defensive connection keeps its journal.
    connection::harden(&target)?;
    // Inside a transaction every step sees the same view, so no write makes the copy begin anew.
    let view = source.unchecked_transaction()?;
    let position = apply::stored_position(&view)?.map_err(CopyError::Unusable)?;
    let backup = Backup::new(&view, &mut target)?;
    loop {
        match backup.step(PAGES_PER_STEP)? {
            StepResult::Done => break,
            _ if !is_wanted() => return Err(CopyError::Unwanted),
            _ => {}
        }
    }
    drop(backup);
    Ok(position)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::apply::{Applier, ApplySettings};

    #[test]
    fn a_copy_keeps_the_rowids_of_tables_without_a_key_of_their_own() {
        let directory = tempfile::tempdir().unwrap();
        let (database, to) = (directory.path().join("resqlite.db"), directory.path().join("copy"));
        let applier = Applier::open(&database, ApplySettings::default()).unwrap();
        let writer = Connection::open(&database).unwrap();
        writer
            .execute_batch("CREATE TABLE t(a); INSERT INTO t VALUES (1), (2), (3); DELETE FROM t WHERE a < 3")
            .unwrap();
        copy_pages(&applier.file(), &to, || true).unwrap();
        let rowid = |path: &Path| -> i64 {
            Connection::open(path).unwrap().query_row("SELECT rowid FROM t", [], |row| row.get(0)).unwrap()
        };
        assert_eq!((rowid(&database), rowid(&to)), (3, 3));
        drop((applier, writer));
    }
}
