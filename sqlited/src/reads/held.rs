//! Snapshots that outlive one read: each is an open read transaction on a connection of its own, which the
//! pool's threads use in turn.
//!
//! It also notes what was read through it. How long it is held is its owner's business; the pool takes it
//! away when the database is replaced.

use std::{
    collections::BTreeSet,
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Instant,
};

use resqlite::api::ReadSet;
use tokio::sync::OwnedMutexGuard;

use super::reader::OpenReader;
use crate::{apply, determinism::authorizer::StatementFacts, versions::SCHEMA_NAME};

/// A snapshot, for as long as this lives.
pub struct Held {
    log_index: u64,
    until: Instant,
    turn: Arc<tokio::sync::Mutex<()>>,
    inside: Mutex<Inside>,
}

/// The right to read through a [`Held`]; its holder is the only one.
pub type Turn = OwnedMutexGuard<()>;

#[derive(Default)]
struct Inside {
    /// None while a thread reads with it, and once it was taken away.
    reader: Option<OpenReader>,
    tables: BTreeSet<String>,
    everything: bool,
}

impl fmt::Debug for Held {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Held").field("log_index", &self.log_index).finish_non_exhaustive()
    }
}

impl Held {
    /// Opens a read transaction, which is what it holds from now on.
    pub(super) fn open(reader: OpenReader, until: Instant) -> rusqlite::Result<Arc<Self>> {
        let connection = reader.connection.connection();
        connection.execute_batch("BEGIN")?;
        // A transaction's snapshot is that of its first read.
        let log_index = apply::applied_index(connection)?;
        reader.connection.learn_virtual_tables()?;
        let inside = Mutex::new(Inside { reader: Some(reader), ..Inside::default() });
        Ok(Arc::new(Self { log_index, until, turn: Arc::default(), inside }))
    }

    /// The log index that it sees.
    pub fn log_index(&self) -> u64 {
        self.log_index
    }

    /// Reads through it end then.
    pub fn until(&self) -> Instant {
        self.until
    }

    /// Waits until no read is under way.
    pub async fn turn(&self) -> Turn {
        Arc::clone(&self.turn).lock_owned().await
    }

    /// What was read through it so far.
    pub fn read_set(&self) -> ReadSet {
        let inside = self.inside();
        ReadSet {
            index: self.log_index,
            tables: inside.tables.iter().cloned().collect(),
            everything: inside.everything,
            lost: String::new(),
        }
    }

    /// For the thread that has the turn; None if the snapshot was taken away, or lost to an error.
    pub(super) fn take_reader(&self) -> Option<OpenReader> {
        self.inside().reader.take()
    }

    /// After a read that left it usable.
    pub(super) fn give_back(&self, reader: OpenReader) {
        self.inside().reader = Some(reader);
    }

    /// Notes what a statement reads; before it gives any answer.
    pub(super) fn note(&self, facts: &StatementFacts) {
        let mut inside = self.inside();
        inside.everything |= facts.reads_everything;
        // What a statement means depends on the schema, even if it is that it means nothing.
        inside.tables.insert(SCHEMA_NAME.to_owned());
        inside.tables.extend(facts.read_tables.iter().cloned());
    }

    fn inside(&self) -> MutexGuard<'_, Inside> {
        self.inside.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
