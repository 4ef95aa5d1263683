//! Why applying can stop, and what an operator can do about it.
//!
//! It knows result codes and indexes, nothing of how entries are applied.

use std::path::PathBuf;

use rusqlite::ffi;

use crate::{classify, soundness::Damage};

/// Why applying stopped. Never a request's result: this node cannot go on, the entry is not applied.
#[derive(Debug, thiserror::Error)]
pub enum ApplyError {
    /// The database cannot be opened.
    #[error("cannot open the database {path}: {reason}")]
    Open {
        /// The file.
        path: PathBuf,
        /// SQLite's words, or ours.
        reason: String,
    },
    /// What the database's file holds is not what was written.
    #[error(transparent)]
    Damaged(#[from] Damage),
    /// The database belongs to another cluster.
    #[error(
        "the database belongs to the cluster {stored:016x} and not to {offered:016x}: give this node the data \
         directory that is its own, or start it with an empty one"
    )]
    ForeignCluster {
        /// The cluster of the database.
        stored: u64,
        /// The one that was to be bound.
        offered: u64,
    },
    /// The database could not be given to another cluster.
    #[error("the database cannot be given to the cluster {cluster_id:016x}: {reason}")]
    Adopt {
        /// The cluster.
        cluster_id: u64,
        /// Why not.
        reason: String,
    },
    /// The entries do not follow the applied index.
    #[error("entry {got} does not follow the applied index: entry {expected} should be next")]
    Gap {
        /// The entry that should come next.
        expected: u64,
        /// The one that came.
        got: u64,
    },
    /// An entry of a format that this version does not know.
    #[error(
        "entry {index} has format {format}, which this version does not know: upgrade this node to the version \
         of the node that wrote it"
    )]
    UnknownFormat {
        /// The entry.
        index: u64,
        /// Its format.
        format: u32,
    },
    /// An entry for another SQLite, or for another kind of processor.
    #[error(
        "entry {index} was made for the execution version {entry:016x}, this node's is {own:016x}: \
         install the same version of sqlited on every node"
    )]
    ForeignExecutionVersion {
        /// The entry.
        index: u64,
        /// Its version.
        entry: u64,
        /// This binary's version.
        own: u64,
    },
    /// An entry that is not a request.
    #[error(
        "entry {index} cannot be read ({reason}): if it is so on this node only, its log is damaged, run \
         `resqlite node replace` there; if on every node, restore a backup"
    )]
    CorruptPayload {
        /// The entry.
        index: u64,
        /// What is wrong with it.
        reason: String,
    },
    /// This node's disk, memory or file.
    #[error("entry {index} cannot be applied here: {message} ({}): {}", classify::code_name(*.code), way_past(*.code))]
    Environment {
        /// The entry, or the last of the transaction that could not be committed.
        index: u64,
        /// SQLite's extended result code.
        code: i32,
        /// SQLite's words.
        message: String,
    },
}

impl ApplyError {
    /// Whether the same attempt may succeed later without a restart: the disk, memory or a lock may be free
    /// again. After an I/O error nothing that this process holds in memory may be trusted.
    pub fn is_retryable(&self) -> bool {
        let Self::Environment { code, .. } = self else { return false };
        matches!(code & 0xff, ffi::SQLITE_FULL | ffi::SQLITE_NOMEM | ffi::SQLITE_BUSY | ffi::SQLITE_INTERRUPT)
    }
}

/// What an operator can do about an environmental error.
fn way_past(code: i32) -> &'static str {
    match code & 0xff {
        ffi::SQLITE_FULL => "free space on the disk; the entry is then applied again",
        ffi::SQLITE_NOMEM => "free memory or raise the limit of the process, then restart sqlited",
        ffi::SQLITE_BUSY | ffi::SQLITE_LOCKED => "another process holds the database: end it",
        ffi::SQLITE_CORRUPT | ffi::SQLITE_NOTADB => {
            "the database file is damaged: stop both daemons of this node and run `resqlite node replace`, which \
             lets its peers fill it again"
        }
        ffi::SQLITE_IOERR | ffi::SQLITE_CANTOPEN | ffi::SQLITE_READONLY | ffi::SQLITE_PERM => {
            "check the disk, its mount and the file's permissions, then restart sqlited"
        }
        ffi::SQLITE_INTERRUPT => "it was interrupted; it is applied again after a restart",
        _ => "restart sqlited; if it happens on every node, restore a backup from before this entry",
    }
}

/// What SQLite's error comes to at this entry.
pub(super) fn environment(index: u64, error: &rusqlite::Error) -> ApplyError {
    let code = classify::extended_code(error);
    ApplyError::Environment { index, code, message: classify::sql_error(error, 0).message }
}
