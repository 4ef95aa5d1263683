//! Everything that can keep the store from opening or going on, in words for the operator.

use std::{
    error::Error,
    io,
    path::{Path, PathBuf},
};

use raft::{Index, NodeId};

use super::{cache::ReadError, log_store::LogStoreError};

/// Why the store cannot be opened, or cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// Another process has the data directory open.
    #[error("{}: another raftd is using this data directory", dir.display())]
    Locked {
        /// The data directory.
        dir: PathBuf,
    },
    /// The data directory belongs to another cluster than the configuration describes.
    #[error(
        "{}: this data directory belongs to cluster {stored:016x}, but the configuration describes cluster \
         {configured:016x} (its name and its member ids make a cluster). The logs of different clusters hold different \
         entries under equal indexes and terms. To move the data: take a backup under the old configuration, start \
         every node of the new one with empty data directories, restore the backup",
        dir.display()
    )]
    OtherCluster {
        /// The data directory.
        dir: PathBuf,
        /// What the directory says.
        stored: u64,
        /// What the configuration says.
        configured: u64,
    },
    /// The data directory belongs to another member.
    #[error(
        "{}: this data directory belongs to node {stored}, but the configuration says that this is node {configured}; \
         a node id is never given to another data directory",
        dir.display()
    )]
    OtherNode {
        /// The data directory.
        dir: PathBuf,
        /// What the directory says.
        stored: NodeId,
        /// What the configuration says.
        configured: NodeId,
    },
    /// A later version of this software wrote the file.
    #[error(
        "{}: written in format {found}, but this version knows formats up to {known}; install the newer version again",
        file.display()
    )]
    NewerFormat {
        /// The file.
        file: PathBuf,
        /// Its format.
        found: u32,
        /// The newest format that this version reads.
        known: u32,
    },
    /// What is stored is not what was made durable. The node must neither vote nor serve.
    #[error(
        "{}: damaged{}: {reason}. The files are kept as they are; `resqlite node replace` rebuilds this node from its \
         peers",
        file.display(),
        index.map(|index| format!(" at index {index}")).unwrap_or_default()
    )]
    Damaged {
        /// The file.
        file: PathBuf,
        /// The first entry that is missing or wrong, where it is known.
        index: Option<Index>,
        /// What was found.
        reason: String,
    },
    /// The operating system refused.
    #[error("{}: cannot {action}: {source}", path.display())]
    Io {
        /// What it was about.
        path: PathBuf,
        /// What was attempted.
        action: &'static str,
        /// The system's words.
        source: io::Error,
    },
    /// The log writer ended earlier, for this reason; it takes nothing more.
    #[error("the log writer has stopped: {0}")]
    WriterStopped(String),
}

impl StoreError {
    /// The data directory is not one that this configuration and this version can go on from: only a person can
    /// decide, and starting again helps nobody. The process should end with `EXIT_CONFIG`, so that the service manager
    /// leaves it at that.
    pub fn needs_operator(&self) -> bool {
        match self {
            Self::OtherCluster { .. }
            | Self::OtherNode { .. }
            | Self::NewerFormat { .. }
            | Self::Damaged { .. } => true,
            Self::Locked { .. } | Self::Io { .. } | Self::WriterStopped(_) => false,
        }
    }

    /// The store's error among the causes of another one.
    pub fn among_the_causes<'e>(error: &'e (dyn Error + 'static)) -> Option<&'e Self> {
        let mut cause = Some(error);
        while let Some(error) = cause {
            // A transparent wrapper does not name what it wraps as its source.
            if let Some(ReadError::Store(error)) = error.downcast_ref() {
                return Some(error);
            }
            if let Some(error) = error.downcast_ref() {
                return Some(error);
            }
            cause = error.source();
        }
        None
    }

    /// The disk has no room left.
    pub fn is_full(&self) -> bool {
        matches!(self, Self::Io { source, .. } if is_full(source))
    }

    pub(super) fn io(path: &Path, action: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io { path: path.to_owned(), action, source }
    }

    pub(super) fn log(path: &Path, action: &'static str) -> impl FnOnce(LogStoreError) -> Self {
        move |error| match error {
            LogStoreError::Io(source) => Self::Io { path: path.to_owned(), action, source },
            LogStoreError::Damaged(reason) => Self::Damaged { file: path.to_owned(), index: None, reason },
            LogStoreError::NewerFormat { found, known } => {
                Self::NewerFormat { file: path.to_owned(), found, known }
            }
        }
    }
}

/// Whether an error says that the disk is full, or the user's share of it.
pub(super) fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}
