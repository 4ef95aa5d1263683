//! The receiving side: a snapshot is written beside the database and checked in every way before it counts.
//!
//! It never touches the database itself.

use std::{
    fs::{self, File},
    io::{self, Write},
    path::{Path, PathBuf},
};

use bytes::Bytes;
use rusqlite::{Connection, OpenFlags};

use super::{
    beside,
    install::{INCOMING, INCOMING_SUMS, sync_directory_of},
    part::{PartError, PartTaker},
};
use crate::{
    apply::{self, Position},
    connection,
    page_sums::Builder,
    soundness,
};

/// What is said of a snapshot before it comes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Announced {
    /// This node's cluster.
    pub cluster_id: u64,
    /// The last entry that it covers, with its term and its timestamp.
    pub index: u64,
    /// Its term.
    pub term: u64,
    /// Its timestamp.
    pub timestamp_ms: u64,
}

/// A whole, checked and durable snapshot beside the database, ready to take its place.
#[derive(Debug)]
pub struct Incoming {
    database: PathBuf,
    position: Position,
}

/// Why a snapshot is not taken. What came of it is removed.
#[derive(Debug, thiserror::Error)]
pub enum ReceiveError {
    /// A part was refused.
    #[error(transparent)]
    Part(#[from] PartError),
    /// The stream ended early.
    #[error("the snapshot was cut off after {0} bytes")]
    CutOff(u64),
    /// It cannot be written here.
    #[error("the snapshot cannot be written: {0}")]
    Io(#[from] io::Error),
    /// SQLite cannot read it.
    #[error("the snapshot cannot be read: {0}")]
    Sqlite(#[from] rusqlite::Error),
    /// It is not what was announced, or it is damaged.
    #[error("the snapshot cannot be used: {0}")]
    Unusable(String),
}

/// Takes part after part from `next`, which gives None when no more will come, until the snapshot is whole. Blocks.
pub fn receive(
    database: &Path,
    announced: Announced,
    next: impl FnMut() -> Option<Bytes>,
) -> Result<Incoming, ReceiveError> {
    let path = beside(database, INCOMING);
    let received = write_parts(database, next).and_then(|()| {
        let position = check(&path, announced)?;
        sync_directory_of(database)?;
        Ok(Incoming { database: database.to_owned(), position })
    });
    if received.is_err() {
        remove(database);
    }
    received
}

/// Writes the file and the sums of its pages, those of what came: should the disk make something else of it, the
/// database is found damaged.
fn write_parts(database: &Path, mut next: impl FnMut() -> Option<Bytes>) -> Result<(), ReceiveError> {
    let mut file = File::create(beside(database, INCOMING))?;
    let (mut taker, mut sums) = (PartTaker::default(), Builder::default());
    loop {
        let part = next().ok_or_else(|| ReceiveError::CutOff(taker.received_bytes()))?;
        let (data, whole) = taker.take(part)?;
        file.write_all(&data)?;
        sums.add(&data);
        if whole {
            file.sync_all()?;
            return Ok(sums.save(&beside(database, INCOMING_SUMS))?);
        }
    }
}

/// Whether the file is a sound database of this cluster, and as far as was announced.
fn check(path: &Path, announced: Announced) -> Result<Position, ReceiveError> {
    let flags =
        OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX | OpenFlags::SQLITE_OPEN_URI;
    let connection = Connection::open_with_flags(immutable_uri(path), flags)?;
    connection::harden(&connection)?;
    if let Some(wrong) = soundness::verdict(&connection)? {
        return Err(ReceiveError::Unusable(wrong));
    }
    let position = apply::stored_position(&connection)?.map_err(ReceiveError::Unusable)?;
    let Announced { cluster_id, index, term, timestamp_ms } = announced;
    if position.cluster_id != cluster_id {
        let found = position.cluster_id;
        return Err(ReceiveError::Unusable(format!(
            "it belongs to cluster {found:016x}, not to {cluster_id:016x}"
        )));
    }
    let expected =
        Position { cluster_id, applied_index: index, applied_term: term, applied_timestamp_ms: timestamp_ms };
    if position != expected {
        return Err(ReceiveError::Unusable(format!("it is at {position:?}, announced was {expected:?}")));
    }
    Ok(position)
}

/// Opened so, SQLite takes no locks and makes no files beside it, although the file says that it has a write-ahead
/// log (<https://sqlite.org/uri.html>, section 3.3).
fn immutable_uri(path: &Path) -> String {
    use std::{fmt::Write, os::unix::ffi::OsStrExt};
    let mut uri = String::from("file:");
    for &byte in path.as_os_str().as_bytes() {
        if byte.is_ascii_alphanumeric() || b"/._-".contains(&byte) {
            uri.push(byte as char);
        } else {
            // Writing into a String cannot fail.
            let _ = write!(uri, "%{byte:02x}");
        }
    }
    uri + "?immutable=1"
}

impl Incoming {
    /// The database whose place it is to take.
    pub fn database(&self) -> &Path {
        &self.database
    }

    /// Where it stands in the log.
    pub fn position(&self) -> Position {
        self.position
    }

    /// Removes it.
    pub fn discard(self) {
        remove(&self.database);
    }
}

/// If that fails, the next start or the next snapshot removes it.
fn remove(database: &Path) {
    for suffix in [INCOMING, INCOMING_SUMS] {
        let _ = fs::remove_file(beside(database, suffix));
    }
}
