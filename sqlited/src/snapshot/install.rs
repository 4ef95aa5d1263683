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
use crate::verify;

/// Where a snapshot is received.
pub(super) const INCOMING: &str = ".incoming";

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
    remove_outgoing(database)?;
    Ok(recorded)
}

fn carry_out(database: &Path) -> io::Result<()> {
    // First of all: a write-ahead log of the old database would be taken for the new one's, and undo it page by page.
    // What was said of the old content goes with it.
    for suffix in ["-wal", "-shm", "-journal", verify::FILE_SUFFIX] {
        remove_if_there(&beside(database, suffix))?;
    }
    sync_directory_of(database)?;
    match fs::rename(beside(database, INCOMING), database) {
        // A crash came after the rename.
        Err(error) if error.kind() == io::ErrorKind::NotFound && database.try_exists()? => {}
        renamed => renamed?,
    }
    sync_directory_of(database)?;
    fs::remove_file(beside(database, RECORD))?;
    sync_directory_of(database)
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
