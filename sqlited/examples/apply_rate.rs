//! Measures how many entries a second the state machine applies: single-row inserts in groups of 100.
//!
//! `cargo run --release -p sqlited --example apply_rate`

use std::time::Instant;

use bytes::Bytes;
use prost::Message;
use resqlite::api::{
    LogEntry, LogEntryKind, LoggedRequest, RequestId, Statement, StatementList, Value, logged_request::Body,
    value::Kind,
};
use sqlited::{
    apply::{Applier, ApplySettings, REQUEST_FORMAT},
    version::execution_version,
};

const ENTRIES: u64 = 200_000;
const GROUP: usize = 100;

/// Makes the entry at an index, with parameters or with everything in the text.
fn entry(index: u64, sql: String, params: Vec<Value>, server_made_id: bool) -> LogEntry {
    let request = LoggedRequest {
        format: REQUEST_FORMAT,
        execution_version: execution_version(),
        id: Some(RequestId {
            client_id: Bytes::from_static(b"client of a rate"),
            sequence: index,
            acknowledged_below: index.saturating_sub(GROUP as u64),
            made_at_index: index - 1,
        }),
        server_made_id,
        seed: Bytes::copy_from_slice(&[7; 16]),
        foreign_keys: true,
        step_budget: 100_000_000,
        result_limit_bytes: 1 << 20,
        reads: None,
        authority: None,
        body: Some(Body::Atomic(StatementList {
            statements: vec![Statement { sql, params, ..Statement::default() }],
        })),
    };
    LogEntry {
        index,
        term: 1,
        kind: LogEntryKind::Payload.into(),
        timestamp_ms: 1_700_000_000_000 + index,
        payload: request.encode_to_vec().into(),
    }
}

fn measure(what: &str, make: impl Fn(u64) -> (String, Vec<Value>), server_made_id: bool) {
    let directory = tempfile::tempdir().expect("a scratch directory");
    let path = directory.path().join("resqlite.db");
    let mut applier = Applier::open(&path, ApplySettings::default()).expect("a new database");
    let create = "CREATE TABLE t(id INTEGER PRIMARY KEY, name TEXT, score INTEGER)".to_owned();
    let mut log = vec![entry(1, create, Vec::new(), server_made_id)];
    log.extend((2..=ENTRIES + 1).map(|index| {
        let (sql, params) = make(index);
        entry(index, sql, params, server_made_id)
    }));
    let mut applied = Vec::new();
    let start = Instant::now();
    for group in log.chunks(GROUP) {
        applier.apply(group, &mut applied).expect("nothing is wrong here");
        assert!(applied.iter().all(|applied| applied.reply.error.is_none()));
        applied.clear();
    }
    let rate = ENTRIES as f64 / start.elapsed().as_secs_f64();
    println!("{what}: {rate:.0} inserts/s");
}

fn main() {
    let parameters = |index: u64| {
        let values = [Kind::Text(format!("name {index}")), Kind::Integer(index as i64)];
        let values = values.map(|kind| Value { kind: Some(kind) }).into();
        ("INSERT INTO t(name, score) VALUES (?1, ?2)".to_owned(), values)
    };
    let literals =
        |index: u64| (format!("INSERT INTO t(name, score) VALUES ('name {index}', {index})"), Vec::new());
    measure("parameters, id made by the server", parameters, true);
    measure("parameters, id made by the client", parameters, false);
    measure("literals, id made by the server", literals, true);
}
