//! When each table was last changed: what an optimistic transaction is judged by.
//!
//! The map in memory decides; each group writes the rows that it touched in the same transaction as
//! everything else. It depends on the log's entries alone and is the same on every node. What counts
//! is what a statement *may* write, as SQLite's authorizer told when it was prepared: triggers and
//! foreign keys' actions included, whether or not a row was changed.

use std::collections::{BTreeMap, BTreeSet};

use resqlite::api::{ReadSet, ReplyClass};
use rusqlite::{Connection, OptionalExtension, ffi};

use crate::{classify::Failure, connection::LazyStatement, determinism::authorizer::StatementFacts};

/// The schema, as if it were a table. No table of a user's can have this name.
pub const SCHEMA_NAME: &str = "_resqlite_schema";

/// The log index of every table's last change.
#[derive(Debug, Default)]
pub struct Versions {
    /// Since the last change of the schema, which itself changes everything: so that tables that are
    /// gone need no room, and names never have to be told apart that meant different tables.
    tables: BTreeMap<String, u64>,
    /// The highest of them.
    latest: u64,
    /// What differs from the stored rows.
    dirty: BTreeSet<String>,
}

impl Versions {
    /// Creates the table in a new database.
    pub const SCHEMA: &str = "CREATE TABLE IF NOT EXISTS _resqlite_versions(\
        name TEXT PRIMARY KEY NOT NULL, log_index INTEGER NOT NULL) WITHOUT ROWID";
    /// Writes a name and its index.
    pub const PUT: &str = "INSERT INTO _resqlite_versions(name, log_index) VALUES (?1, ?2)
        ON CONFLICT DO UPDATE SET log_index = excluded.log_index";
    /// Deletes a name.
    pub const DELETE: &str = "DELETE FROM _resqlite_versions WHERE name = ?1";

    /// Reads all versions from the database.
    pub fn load(connection: &Connection) -> rusqlite::Result<Self> {
        let mut statement = connection.prepare("SELECT name, log_index FROM _resqlite_versions")?;
        let rows = statement.query_map([], |row| Ok((row.get(0)?, row.get::<_, i64>(1)? as u64)))?;
        let tables: BTreeMap<String, u64> = rows.collect::<rusqlite::Result<_>>()?;
        Ok(Self { latest: highest(&tables), tables, dirty: BTreeSet::new() })
    }

    /// Why the writes that depend on these reads must not be executed.
    pub fn conflict(&self, reads: &ReadSet) -> Option<Failure> {
        let since = reads.index;
        if !reads.lost.is_empty() {
            return Some(aborted(&reads.lost));
        }
        if reads.everything && self.latest > since {
            return Some(aborted(&format!(
                "the transaction has read what cannot be told apart by tables, at index {since}, and something \
                 was changed at index {}",
                self.latest
            )));
        }
        let changed = |name: &str| self.tables.get(name).copied().filter(|index| *index > since);
        let (name, index) = reads.tables.iter().find_map(|name| Some((name, changed(name)?)))?;
        let what = if name == SCHEMA_NAME { "the schema".to_owned() } else { format!("the table {name}") };
        Some(aborted(&format!(
            "{what}, read by the transaction at index {since}, was changed at index {index}"
        )))
    }

    /// Notes that the entry at `index` executed a statement that is no read.
    pub fn wrote(&mut self, facts: &StatementFacts, index: u64) {
        // A PRAGMA whose effect ends with its request leaves nothing behind.
        let pragma = facts.pragma_writes && !facts.until_request_ends;
        if facts.changes_schema || facts.changes_virtual_tables || pragma {
            return self.changed_everything(index);
        }
        // What a virtual table does to its own tables is seen only while it prepares its statements, once
        // on each connection: it is noted under the virtual table's own name, which is seen always.
        let virtual_tables = &facts.virtual_tables;
        let beneath = |name: &str| {
            let owns =
                |owner: &String| name.strip_prefix(owner.as_str()).is_some_and(|rest| rest.starts_with('_'));
            virtual_tables.iter().any(owns)
        };
        for name in facts.written_tables.iter().filter(|name| !beneath(name)).chain(virtual_tables) {
            self.set(name, index);
        }
    }

    /// Notes a change that concerns every table, such as one of the schema.
    pub fn changed_everything(&mut self, index: u64) {
        self.dirty.extend(std::mem::take(&mut self.tables).into_keys());
        self.set(SCHEMA_NAME, index);
    }

    fn set(&mut self, name: &str, index: u64) {
        self.latest = index;
        match self.tables.get_mut(name) {
            Some(version) if *version == index => return,
            Some(version) => *version = index,
            None => drop(self.tables.insert(name.to_owned(), index)),
        }
        if !self.dirty.contains(name) {
            self.dirty.insert(name.to_owned());
        }
    }

    /// Writes what was touched since [`Self::committed`], with [`Self::PUT`] and [`Self::DELETE`].
    pub(crate) fn save(
        &self,
        put: &mut LazyStatement<'_>,
        delete: &mut LazyStatement<'_>,
    ) -> rusqlite::Result<()> {
        for name in &self.dirty {
            match self.tables.get(name) {
                Some(index) => put.get()?.execute((name, *index as i64))?,
                None => delete.get()?.execute((name,))?,
            };
        }
        Ok(())
    }

    /// What was saved is committed: only now may the way back be forgotten.
    pub fn committed(&mut self) {
        self.dirty.clear();
    }

    /// Goes back to what the database holds. After an error it has to be called again.
    pub fn reload(&mut self, connection: &Connection) -> rusqlite::Result<()> {
        let mut statement = connection.prepare("SELECT log_index FROM _resqlite_versions WHERE name = ?1")?;
        for name in &self.dirty {
            let stored: Option<i64> = statement.query_row((name,), |row| row.get(0)).optional()?;
            match stored {
                Some(index) => self.tables.insert(name.clone(), index as u64),
                None => self.tables.remove(name),
            };
        }
        self.latest = highest(&self.tables);
        self.dirty.clear();
        Ok(())
    }
}

fn highest(tables: &BTreeMap<String, u64>) -> u64 {
    tables.values().copied().max().unwrap_or(0)
}

/// SQLite's own word for a transaction that cannot write because its snapshot is out of date.
fn aborted(message: &str) -> Failure {
    Failure::new(ReplyClass::Aborted, ffi::SQLITE_BUSY_SNAPSHOT, 0, message)
}
