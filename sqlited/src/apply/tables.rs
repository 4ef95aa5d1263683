//! The server's own tables, and the statements that keep them in each group's transaction.
//!
//! They are part of the database, so what they say is true of exactly the content beside them. Nothing here knows
//! what a request is.

use resqlite::api::LogEntry;
use rusqlite::Connection;

use crate::{
    connection::LazyStatement, restore::Staging, sessions::Sessions, users::Users, versions::Versions,
};

/// The format of the server's own tables.
const SCHEMA_FORMAT: i64 = 1;

// In one line, as the other tables of the server: so a dump can be rid of them line by line.
const META_SCHEMA: &str = "CREATE TABLE IF NOT EXISTS _resqlite_meta(\
    id INTEGER PRIMARY KEY CHECK (id = 0), \
    format INTEGER NOT NULL, \
    cluster_id INTEGER NOT NULL, \
    applied_index INTEGER NOT NULL, \
    applied_term INTEGER NOT NULL, \
    applied_timestamp_ms INTEGER NOT NULL)";

/// Where the database stands in the log.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Position {
    /// 0: it does not belong to a cluster yet.
    pub cluster_id: u64,
    /// The last entry whose effects are in the database; 0 before the first.
    pub applied_index: u64,
    /// That entry's term.
    pub applied_term: u64,
    /// That entry's timestamp.
    pub applied_timestamp_ms: u64,
}

/// The applied index of the snapshot that this connection reads.
pub fn applied_index(connection: &Connection) -> rusqlite::Result<u64> {
    // Not from the cache, which is keyed by text: what is in there runs for users.
    let column =
        connection.query_row("SELECT applied_index FROM _resqlite_meta", [], |row| row.get::<_, i64>(0));
    column.map(|index| index as u64)
}

/// Creates the server's tables in a new database, and reads the position.
pub(super) fn open_tables(connection: &Connection) -> rusqlite::Result<Result<Position, String>> {
    let encoding: String = connection.query_row("PRAGMA encoding", [], |row| row.get(0))?;
    if encoding != "UTF-8" {
        return Ok(Err(format!("its encoding is {encoding}: only UTF-8 is supported")));
    }
    connection.execute_batch(&format!(
        "BEGIN IMMEDIATE; {META_SCHEMA}; {}; {}; {}; {};
         INSERT OR IGNORE INTO _resqlite_meta VALUES (0, {SCHEMA_FORMAT}, 0, 0, 0, 0); COMMIT",
        Sessions::SCHEMA,
        Versions::SCHEMA,
        Users::SCHEMA,
        Staging::SCHEMA,
    ))?;
    stored_position(connection)
}

/// Gives the database to a cluster.
pub(super) fn store_cluster(connection: &Connection, cluster_id: u64) -> rusqlite::Result<()> {
    connection.execute("UPDATE _resqlite_meta SET cluster_id = ?1", [cluster_id as i64]).map(drop)
}

/// Where a database stands in the log; or, in words, why this version cannot tell.
pub fn stored_position(connection: &Connection) -> rusqlite::Result<Result<Position, String>> {
    let columns =
        "SELECT format, cluster_id, applied_index, applied_term, applied_timestamp_ms FROM _resqlite_meta";
    connection.query_row(columns, [], |row| {
        let column = |index| row.get::<_, i64>(index).map(|column| column as u64);
        let format = row.get::<_, i64>(0)?;
        if format != SCHEMA_FORMAT {
            return Ok(Err(format!("its format is {format}: this version knows {SCHEMA_FORMAT} only")));
        }
        Ok(Ok(Position {
            cluster_id: column(1)?,
            applied_index: column(2)?,
            applied_term: column(3)?,
            applied_timestamp_ms: column(4)?,
        }))
    })
}

/// Our own statements around the requests of a group.
pub(super) struct OwnStatements<'c> {
    pub(super) begin: LazyStatement<'c>,
    pub(super) commit: LazyStatement<'c>,
    pub(super) rollback: LazyStatement<'c>,
    pub(super) put_session: LazyStatement<'c>,
    pub(super) delete_session: LazyStatement<'c>,
    pub(super) put_version: LazyStatement<'c>,
    pub(super) delete_version: LazyStatement<'c>,
    pub(super) put_user: LazyStatement<'c>,
    pub(super) delete_user: LazyStatement<'c>,
    pub(super) require_authentication: LazyStatement<'c>,
    put_position: LazyStatement<'c>,
}

impl<'c> OwnStatements<'c> {
    pub(super) fn on(connection: &'c Connection) -> Self {
        let own = |sql| LazyStatement::new(connection, sql);
        Self {
            begin: own("BEGIN IMMEDIATE"),
            commit: own("COMMIT"),
            rollback: own("ROLLBACK"),
            put_session: own("INSERT INTO _resqlite_sessions(client_id, state) VALUES (?1, ?2)
                 ON CONFLICT DO UPDATE SET state = excluded.state"),
            delete_session: own("DELETE FROM _resqlite_sessions WHERE client_id = ?1"),
            put_version: own(Versions::PUT),
            delete_version: own(Versions::DELETE),
            put_user: own(Users::PUT),
            delete_user: own(Users::DELETE),
            require_authentication: own(Users::REQUIRE),
            put_position: own(
                "UPDATE _resqlite_meta SET cluster_id = ?1, applied_index = ?2, applied_term = ?3,
                 applied_timestamp_ms = ?4",
            ),
        }
    }

    pub(super) fn save_position(&mut self, cluster_id: u64, last: &LogEntry) -> rusqlite::Result<()> {
        // SQLite's integers have a sign; the bits are the same.
        let columns = [cluster_id, last.index, last.term, last.timestamp_ms].map(|column| column as i64);
        self.put_position.get()?.execute(columns).map(drop)
    }
}
