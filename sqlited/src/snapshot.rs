//! Snapshots: the database file itself, on its way to a node that was left behind.
//!
//! ```text
//! resqlite.db                 the database
//! resqlite.db.outgoing-<n>    a copy of one consistent view, until it is open for sending (see `copy`)
//! resqlite.db.outgoing-backup a copy that becomes a backup, until it is open for sending (see `crate::backup`)
//! resqlite.db.incoming        a snapshot that is being received and checked (see `incoming`)
//! resqlite.db.incoming-sums   the checksums of its pages
//! resqlite.db.installing      says that the incoming file is whole and is to take the database's place (see `install`)
//! ```
//!
//! Sessions, settings and the applied index are tables of the file, so they travel with it. It knows files and
//! SQLite; how the parts travel is the link's business.

mod copy;
mod incoming;
mod install;
mod part;

use std::{
    ffi::OsString,
    path::{Path, PathBuf},
    sync::Arc,
};

use tokio::sync::{OwnedRwLockReadGuard, OwnedRwLockWriteGuard, RwLock};

pub use copy::{CopyError, DatabaseCopy, copy, copy_pages};
pub use incoming::{Announced, Incoming, ReceiveError, receive};
pub use install::finish;
pub(crate) use install::sync_directory_of;
pub use part::{PART_BYTES, PartError, PartReader, PartTaker};

use crate::reads::{Closed, Readers};

/// A file beside the database.
pub(crate) fn beside(database: &Path, suffix: &str) -> PathBuf {
    let mut name = OsString::from(database);
    name.push(suffix);
    name.into()
}

/// Where a copy for sending is made.
pub fn outgoing(database: &Path, transfer_id: u64) -> PathBuf {
    beside(database, &format!("{}{transfer_id}", install::OUTGOING))
}

/// Where a copy for a backup is made.
pub fn outgoing_backup(database: &Path) -> PathBuf {
    beside(database, &format!("{}backup", install::OUTGOING))
}

/// All who have the database open beside the writer. Clones share them.
#[derive(Clone, Debug)]
pub struct Users {
    readers: Arc<Readers>,
    copies: Arc<RwLock<()>>,
}

/// The right to have a connection of one's own for a while.
pub type Shared = OwnedRwLockReadGuard<()>;

/// Nobody beside the writer has the database open for as long as this lives.
#[derive(Debug)]
pub struct Exclusive {
    _readers: Closed,
    _copies: OwnedRwLockWriteGuard<()>,
}

impl Users {
    /// The pool of readers, and whoever asks with [`Users::share`].
    pub fn new(readers: Arc<Readers>) -> Self {
        Self { readers, copies: Arc::default() }
    }

    /// Waits while the database is being replaced. Open no connection before, and keep none after.
    pub async fn share(&self) -> Shared {
        Arc::clone(&self.copies).read_owned().await
    }

    /// Ends the reads and waits for the copies.
    pub async fn exclude(&self) -> Exclusive {
        let copies = Arc::clone(&self.copies).write_owned().await;
        Exclusive { _readers: self.readers.close().await, _copies: copies }
    }
}
