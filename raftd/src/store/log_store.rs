//! What the log needs of whatever keeps its records: a small ordered store with an explicit sync.
//!
//! The trait has three implementations: sled, a journal before another log store, and one in memory that tests and
//! simulations can crash.
//! It knows keys and values; what a record means, and in which order operations come, is decided
//! above it.

use std::{fmt, io};

use bytes::Bytes;

use super::record::Key;

/// An ordered store of records that one thread writes and several may read.
///
/// After a write or a sync has failed nothing that the store says may be trusted, and nothing may be
/// tried again: after a failed fsync the kernel may have dropped the dirty pages and call them clean.
pub trait LogStore: Send + Sync {
    /// Puts a record, replacing one under the same key. Durable after the next [`LogStore::sync`].
    fn insert(&self, key: Key, value: Vec<u8>) -> Result<(), LogStoreError>;

    /// Removes a record if there is one. Durable after the next [`LogStore::sync`].
    fn remove(&self, key: Key) -> Result<(), LogStoreError>;

    /// Removes the first record, which is no longer needed. After a crash it may be there again, and all that were
    /// discarded after it.
    fn discard(&self, key: Key) -> Result<(), LogStoreError> {
        self.remove(key)
    }

    /// Hands what gathered to the operating system. Bounds memory; makes nothing durable.
    fn flush(&self) -> Result<(), LogStoreError>;

    /// Returns once every change so far would survive a power cut.
    ///
    /// If power fails earlier, a prefix of the changes since the last sync survives, in their order.
    fn sync(&self) -> Result<(), LogStoreError>;

    /// The lowest key.
    fn first_key(&self) -> Result<Option<Key>, LogStoreError>;

    /// The highest key.
    fn last_key(&self) -> Result<Option<Key>, LogStoreError>;

    /// The record with the highest key that is not above this one.
    fn at_or_before(&self, key: Key) -> Result<Option<(Key, Bytes)>, LogStoreError>;

    /// The records from this key on, ascending.
    fn scan(&self, from: Key) -> Scan<'_>;

    /// What the store takes on disk, in bytes.
    fn size_bytes(&self) -> Result<u64, LogStoreError>;
}

/// Records in ascending order of their keys.
pub type Scan<'a> = Box<dyn Iterator<Item = Result<(Key, Bytes), LogStoreError>> + 'a>;

/// Why a log store failed.
#[derive(Debug)]
pub enum LogStoreError {
    /// The operating system refused.
    Io(io::Error),
    /// What is stored is not what was written.
    Damaged(String),
    /// A later version of this software wrote it.
    NewerFormat {
        /// Its format.
        found: u32,
        /// The newest format that this version reads.
        known: u32,
    },
}

impl fmt::Display for LogStoreError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Io(error) => error.fmt(f),
            Self::Damaged(reason) => f.write_str(reason),
            Self::NewerFormat { found, known } => {
                write!(f, "written in format {found}, but this version knows formats up to {known}")
            }
        }
    }
}

impl std::error::Error for LogStoreError {}

impl From<io::Error> for LogStoreError {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}
