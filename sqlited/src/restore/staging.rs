//! The chunks of a file that is being restored, as rows of the database.
//!
//! Part of the state machine: every rule here depends on the log's entries alone, time included. One upload at a time.
//! One that is silent for [`IDLE_MS`] of the log's time is abandoned, and the next request of any kind removes it.

use resqlite::api::{ReplyClass, RestoreChunk, RestoreStart, RestoreStep, restore_step::Step};
use rusqlite::{Connection, OptionalExtension, ffi};

use crate::classify::Failure;

/// An upload of which nothing was heard for so long is abandoned.
pub const IDLE_MS: u64 = 60_000;
/// The largest file.
pub const MAX_FILE_BYTES: u64 = 1 << 40;

const CHUNKS: &str = "SELECT start, data FROM _resqlite_restore_chunks ORDER BY start";
const USER_OBJECTS: &str = "SELECT EXISTS (SELECT 1 FROM sqlite_schema
    WHERE tbl_name NOT LIKE '\\_resqlite\\_%' ESCAPE '\\' AND name NOT LIKE 'sqlite\\_%' ESCAPE '\\')";

/// An upload under way.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Upload {
    id: Vec<u8>,
    size_bytes: u64,
    last_timestamp_ms: u64,
}

/// What is staged: the row of the database, as it is in the open transaction.
#[derive(Debug, Default)]
pub struct Staging {
    upload: Option<Upload>,
}

impl Staging {
    /// Creates the tables in a new database.
    pub const SCHEMA: &str = "CREATE TABLE IF NOT EXISTS _resqlite_restore(\
        id INTEGER PRIMARY KEY CHECK (id = 0), upload_id BLOB NOT NULL, size_bytes INTEGER NOT NULL, \
        last_timestamp_ms INTEGER NOT NULL); \
        CREATE TABLE IF NOT EXISTS _resqlite_restore_chunks(start INTEGER PRIMARY KEY, data BLOB NOT NULL)";

    /// Reads what is staged in the database. Also the way back after a rollback.
    pub fn load(connection: &Connection) -> rusqlite::Result<Self> {
        let sql = "SELECT upload_id, size_bytes, last_timestamp_ms FROM _resqlite_restore";
        let upload = connection.query_row(sql, [], |row| {
            let number = |column| row.get::<_, i64>(column).map(|number| number as u64);
            Ok(Upload { id: row.get(0)?, size_bytes: number(1)?, last_timestamp_ms: number(2)? })
        });
        Ok(Self { upload: upload.optional()? })
    }

    /// Removes what nobody goes on with.
    pub fn expire(&mut self, connection: &Connection, timestamp_ms: u64) -> rusqlite::Result<()> {
        let is_idle = |upload: &Upload| timestamp_ms.saturating_sub(upload.last_timestamp_ms) >= IDLE_MS;
        if self.upload.as_ref().is_some_and(is_idle) { self.clear(connection) } else { Ok(()) }
    }

    /// Removes everything.
    pub fn clear(&mut self, connection: &Connection) -> rusqlite::Result<()> {
        connection.execute_batch("DELETE FROM _resqlite_restore; DELETE FROM _resqlite_restore_chunks")?;
        self.upload = None;
        Ok(())
    }

    /// Does a step that is not the last one.
    pub fn apply(
        &mut self,
        connection: &Connection,
        step: &RestoreStep,
        timestamp_ms: u64,
    ) -> rusqlite::Result<Option<Failure>> {
        match &step.step {
            Some(Step::Start(start)) => self.start(connection, &step.upload_id, start, timestamp_ms),
            Some(Step::Chunk(chunk)) => self.chunk(connection, &step.upload_id, chunk, timestamp_ms),
            Some(Step::Abandon(_)) => {
                if self.is_under_way(&step.upload_id) {
                    self.clear(connection)?;
                }
                Ok(None)
            }
            Some(Step::Finish(_)) | None => Ok(Some(invalid("the step of the restore is empty"))),
        }
    }

    fn start(
        &mut self,
        connection: &Connection,
        id: &[u8],
        start: &RestoreStart,
        timestamp_ms: u64,
    ) -> rusqlite::Result<Option<Failure>> {
        if id.len() != 16 || !(1..=MAX_FILE_BYTES).contains(&start.size_bytes) {
            return Ok(Some(invalid(
                "a restore needs an upload_id of 16 bytes, and a file that is not empty",
            )));
        }
        if let Some(failure) = may_replace(connection, start.replace)? {
            return Ok(Some(failure));
        }
        match &self.upload {
            Some(upload) if upload.id != id => {
                let silent_s = timestamp_ms.saturating_sub(upload.last_timestamp_ms) / 1_000;
                return Ok(Some(failed(format!(
                    "another restore is under way, last heard of {silent_s} s ago: wait for its end; it is given up \
                     once it was silent for {} s",
                    IDLE_MS / 1_000
                ))));
            }
            // The same again: what is staged of it may stay.
            Some(upload) if upload.size_bytes == start.size_bytes => {}
            _ => self.clear(connection)?,
        }
        connection.execute(
            "INSERT OR REPLACE INTO _resqlite_restore VALUES (0, ?1, ?2, ?3)",
            (id, start.size_bytes as i64, timestamp_ms as i64),
        )?;
        let (id, size_bytes) = (id.to_vec(), start.size_bytes);
        self.upload = Some(Upload { id, size_bytes, last_timestamp_ms: timestamp_ms });
        Ok(None)
    }

    fn chunk(
        &mut self,
        connection: &Connection,
        id: &[u8],
        chunk: &RestoreChunk,
        timestamp_ms: u64,
    ) -> rusqlite::Result<Option<Failure>> {
        let Some(upload) = self.upload.as_mut().filter(|upload| upload.id == id) else {
            return Ok(Some(lost()));
        };
        let end = chunk.offset.checked_add(chunk.data.len() as u64);
        if chunk.data.is_empty() || end.is_none_or(|end| end > upload.size_bytes) {
            return Ok(Some(invalid("a chunk of the restore is empty or lies behind the file's end")));
        }
        connection.execute(
            "INSERT OR REPLACE INTO _resqlite_restore_chunks VALUES (?1, ?2)",
            (chunk.offset as i64, &chunk.data[..]),
        )?;
        connection.execute("UPDATE _resqlite_restore SET last_timestamp_ms = ?1", [timestamp_ms as i64])?;
        upload.last_timestamp_ms = timestamp_ms;
        Ok(None)
    }

    /// Whether this upload is the one under way.
    pub fn is_under_way(&self, id: &[u8]) -> bool {
        self.upload.as_ref().is_some_and(|upload| upload.id == id)
    }

    /// Hands the file to `take`, piece by piece, as far as there is no gap. Returns its length.
    pub fn read<E: From<rusqlite::Error>>(
        connection: &Connection,
        mut take: impl FnMut(&[u8]) -> Result<(), E>,
    ) -> Result<u64, E> {
        let mut statement = connection.prepare(CHUNKS)?;
        let mut rows = statement.query([])?;
        let mut length = 0u64;
        while let Some(row) = rows.next()? {
            let start = row.get::<_, i64>(0)? as u64;
            // Chunks overlap where a second attempt cut the same file otherwise.
            let Some(known) = length.checked_sub(start) else { return Ok(length) };
            let data = row.get_ref(1)?.as_blob().unwrap_or_default();
            let new = usize::try_from(known).ok().and_then(|known| data.get(known..)).unwrap_or_default();
            take(new)?;
            length += new.len() as u64;
        }
        Ok(length)
    }
}

/// Whether there may be content, if there is any.
pub(super) fn may_replace(connection: &Connection, replace: bool) -> rusqlite::Result<Option<Failure>> {
    if replace || !connection.query_row(USER_OBJECTS, [], |row| row.get::<_, bool>(0))? {
        return Ok(None);
    }
    Ok(Some(failed(
        "the database is not empty, and a restore replaces everything in it: say so with --force",
    )))
}

/// What is not under way any more may begin anew.
pub(super) fn lost() -> Failure {
    let message = "this upload is not under way, or not complete: it was given up after a silence, or another one \
                   came; nothing was changed: begin again";
    Failure::new(ReplyClass::Aborted, ffi::SQLITE_ABORT, 0, message)
}

pub(super) fn failed(message: impl Into<String>) -> Failure {
    Failure::new(ReplyClass::Failed, ffi::SQLITE_ERROR, 0, message)
}

fn invalid(message: &str) -> Failure {
    Failure::new(ReplyClass::Invalid, ffi::SQLITE_ERROR, 0, message)
}
