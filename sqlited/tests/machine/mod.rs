//! A state machine in a scratch directory, fed with entries as raftd would hand them over.

#![allow(dead_code, reason = "each test binary uses its own part")]
#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

use std::path::PathBuf;

use bytes::Bytes;
use prost::Message;
use resqlite::api::{
    LogEntry, LogEntryKind, LoggedRequest, ReplyClass, RequestId, Row, Statement, StatementList,
    StatementResult, StoredReply, Value, logged_request::Body, value::Kind,
};
use sqlited::{
    apply::{Applied, Applier, ApplyError, ApplySettings, REQUEST_FORMAT},
    connection::{Reader, open_reader},
    value, version,
};
use tempfile::TempDir;

/// 2024-02-29 12:00:00 UTC, when the first entry was made; each later one a second later.
pub const FIRST_TIMESTAMP_MS: u64 = 1_709_208_000_000;

/// One node's state machine and the end of its log.
pub struct Machine {
    pub applier: Applier,
    directory: TempDir,
    next_index: u64,
}

impl Machine {
    pub fn new() -> Self {
        Self::with(ApplySettings::default())
    }

    pub fn with(settings: ApplySettings) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let applier = Applier::open(&directory.path().join("resqlite.db"), settings).unwrap();
        Self { applier, directory, next_index: 1 }
    }

    /// A machine that goes on from a copy of this one's file, as one restored from a snapshot does.
    pub fn restored_copy(self, settings: ApplySettings) -> (Self, Self) {
        let next_index = self.next_index;
        let directory = self.directory;
        // Closing the last connection writes the WAL back.
        drop(self.applier);
        let copy = tempfile::tempdir().unwrap();
        for name in ["resqlite.db", "resqlite.db-sums"] {
            std::fs::copy(directory.path().join(name), copy.path().join(name)).unwrap();
        }
        let open = |directory: TempDir| {
            let applier = Applier::open(&directory.path().join("resqlite.db"), settings.clone()).unwrap();
            Self { applier, directory, next_index }
        };
        (open(directory), open(copy))
    }

    pub fn reopen(self) -> Self {
        self.reopen_with(ApplySettings::default())
    }

    pub fn reopen_with(self, settings: ApplySettings) -> Self {
        let (next_index, directory) = (self.next_index, self.directory);
        drop(self.applier);
        let path = directory.path().join("resqlite.db");
        let applier = Applier::open(&path, settings).unwrap();
        Self { applier, directory, next_index }
    }

    pub fn path(&self) -> PathBuf {
        self.directory.path().join("resqlite.db")
    }

    pub fn reader(&self) -> Reader {
        open_reader(&self.applier.file()).unwrap()
    }

    /// The next entry of the log, not yet applied.
    pub fn entry(&mut self, request: LoggedRequest) -> LogEntry {
        let index = self.next_index;
        self.next_index += 1;
        entry_at(index, request)
    }

    pub fn skip_to(&mut self, index: u64) {
        let entries: Vec<LogEntry> = (self.next_index..index).map(noop_at).collect();
        self.next_index = index;
        self.try_apply(&entries).unwrap();
    }

    pub fn try_apply(&mut self, entries: &[LogEntry]) -> Result<Vec<Applied>, ApplyError> {
        let mut applied = Vec::new();
        self.applier.apply(entries, &mut applied)?;
        Ok(applied)
    }

    pub fn apply_all(&mut self, requests: Vec<LoggedRequest>) -> Vec<StoredReply> {
        let entries: Vec<LogEntry> = requests.into_iter().map(|request| self.entry(request)).collect();
        let applied = self.try_apply(&entries).unwrap();
        applied.into_iter().map(|applied| StoredReply::clone(&applied.reply)).collect()
    }

    pub fn apply(&mut self, request: LoggedRequest) -> StoredReply {
        self.apply_all(vec![request]).remove(0)
    }

    /// Executes statements together.
    pub fn atomic(&mut self, sql: &[&str]) -> StoredReply {
        let request = self.request_atomic(sql);
        self.apply(request)
    }

    /// Executes statements one by one.
    pub fn script(&mut self, sql: &[&str]) -> StoredReply {
        let request = self.request_script(sql);
        self.apply(request)
    }

    /// Executes statements one by one, which must all succeed.
    pub fn ok(&mut self, sql: &[&str]) -> StoredReply {
        let reply = self.script(sql);
        assert_eq!(reply.error, None, "{sql:?}");
        assert_eq!(reply.results.len(), sql.len(), "{sql:?}");
        reply
    }

    /// Executes one statement that must fail, and gives its class and message.
    pub fn refusal(&mut self, sql: &str) -> (ReplyClass, String) {
        let reply = self.atomic(&[sql]);
        let error = reply.error.clone().unwrap_or_else(|| panic!("{sql} was not refused: {reply:?}"));
        (reply.class(), error.message)
    }

    pub fn request_atomic(&self, sql: &[&str]) -> LoggedRequest {
        request(self.next_index, Body::Atomic(list(sql)))
    }

    pub fn request_script(&self, sql: &[&str]) -> LoggedRequest {
        request(self.next_index, Body::Script(list(sql)))
    }

    /// What a read answers, as text.
    pub fn read(&self, sql: &str) -> String {
        let reader = self.reader();
        let rows = reader
            .read(sql, |statement| {
                let columns = statement.column_count();
                let rows: Vec<Row> = statement
                    .query_map([], |row| value::row(row, columns))?
                    .collect::<rusqlite::Result<_>>()?;
                Ok(rows)
            })
            .unwrap_or_else(|error| panic!("{sql}: {error}"));
        rows_text(&rows)
    }

    /// All content but the server's own, rowids included, as text.
    pub fn content(&self) -> String {
        content(&self.path())
    }
}

/// All content but the server's own, rowids included, as text.
pub fn content(path: &std::path::Path) -> String {
    use rusqlite::{Connection, OpenFlags, types::ValueRef};
    let connection = Connection::open_with_flags(path, OpenFlags::SQLITE_OPEN_READ_ONLY).unwrap();
    let mut out = String::new();
    let show = |out: &mut String, sql: &str| {
        let mut statement = connection.prepare(sql).unwrap_or_else(|error| panic!("{sql}: {error}"));
        let columns = statement.column_count();
        let mut rows = statement.query([]).unwrap();
        while let Some(row) = rows.next().unwrap() {
            for column in 0..columns {
                match row.get_ref(column).unwrap() {
                    // The bits, so that -0.0 is not 0.0.
                    ValueRef::Real(real) => out.push_str(&format!("{:016x}r|", real.to_bits())),
                    other => out.push_str(&format!("{other:?}|")),
                }
            }
            out.push('\n');
        }
    };
    show(&mut out, "SELECT user_version, application_id FROM pragma_user_version, pragma_application_id");
    show(
        &mut out,
        "SELECT type, name, tbl_name, sql FROM sqlite_schema WHERE name NOT LIKE '\\_resqlite\\_%' ESCAPE '\\'
         AND tbl_name NOT LIKE '\\_resqlite\\_%' ESCAPE '\\' ORDER BY rowid",
    );
    let tables: Vec<(String, bool)> = connection
        .prepare(
            "SELECT s.name, l.wr FROM sqlite_schema s JOIN pragma_table_list l ON l.name = s.name AND l.schema = 'main'
             WHERE s.type = 'table' AND s.rootpage > 0
             AND s.name NOT LIKE '\\_resqlite\\_%' ESCAPE '\\' ORDER BY s.name",
        )
        .unwrap()
        .query_map([], |row| Ok((row.get(0)?, row.get(1)?)))
        .unwrap()
        .collect::<rusqlite::Result<_>>()
        .unwrap();
    for (table, without_rowid) in tables {
        out.push_str(&format!("-- {table}\n"));
        let quoted = table.replace('"', "\"\"");
        let sql = if without_rowid {
            format!("SELECT * FROM \"{quoted}\"")
        } else {
            format!("SELECT rowid, * FROM \"{quoted}\" ORDER BY rowid")
        };
        show(&mut out, &sql);
    }
    out
}

/// A request made by a server, with nothing out of the ordinary.
pub fn request(index: u64, body: Body) -> LoggedRequest {
    LoggedRequest {
        format: REQUEST_FORMAT,
        execution_version: version::execution_version(),
        id: Some(RequestId {
            client_id: Bytes::from_static(b"machine's server"),
            sequence: index,
            acknowledged_below: index.saturating_sub(100),
            made_at_index: index.saturating_sub(1),
        }),
        server_made_id: true,
        seed: Bytes::copy_from_slice(&u128::from(index).to_be_bytes()),
        foreign_keys: true,
        step_budget: 10_000_000,
        result_limit_bytes: 1 << 20,
        reads: None,
        authority: None,
        body: Some(body),
    }
}

pub fn list(sql: &[&str]) -> StatementList {
    StatementList { statements: sql.iter().map(|sql| statement(sql, [])).collect() }
}

pub fn statement(sql: &str, params: impl IntoIterator<Item = Kind>) -> Statement {
    let params = params.into_iter().map(|kind| Value { kind: Some(kind) }).collect();
    Statement { sql: sql.into(), params, ..Statement::default() }
}

pub fn atomic(statements: Vec<Statement>) -> Body {
    Body::Atomic(StatementList { statements })
}

pub fn entry_at(index: u64, request: LoggedRequest) -> LogEntry {
    LogEntry {
        index,
        term: 1,
        kind: LogEntryKind::Payload.into(),
        timestamp_ms: FIRST_TIMESTAMP_MS + index * 1_000,
        payload: request.encode_to_vec().into(),
    }
}

pub fn noop_at(index: u64) -> LogEntry {
    LogEntry {
        index,
        term: 1,
        kind: LogEntryKind::Noop.into(),
        timestamp_ms: FIRST_TIMESTAMP_MS + index * 1_000,
        payload: Bytes::new(),
    }
}

/// The rows of a result, as text: values by `|`, rows by `,`.
pub fn text(result: &StatementResult) -> String {
    rows_text(&result.rows)
}

pub fn rows_text(rows: &[Row]) -> String {
    let value = |value: &Value| match &value.kind {
        None | Some(Kind::Null(_)) => "NULL".to_owned(),
        Some(Kind::Integer(integer)) => integer.to_string(),
        Some(Kind::Real(real)) => format!("{real:?}"),
        Some(Kind::Text(text)) => text.clone(),
        Some(Kind::Blob(bytes) | Kind::InvalidText(bytes)) => format!("{bytes:?}"),
    };
    let row = |row: &Row| row.values.iter().map(value).collect::<Vec<_>>().join("|");
    rows.iter().map(row).collect::<Vec<_>>().join(",")
}
