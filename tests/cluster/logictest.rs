//! Files in the format of sqllogictest, through a cluster of three nodes and through plain SQLite: both do the same.
//!
//! Every record goes to the next node. `RESQLITE_LOGICTEST` names another file, or a directory of them (`*.test`).

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use resqlite::{
    api::{RunRequest, re_sqlite_client::ReSqliteClient, run_event::Event},
    client::Value,
};
use tonic::transport::Channel;

use crate::{
    harness::{Cluster, is_worth_retrying},
    logictest_format::{Kind, Record, Renderer, hashed, is_as_expected, parse, sorted},
};

/// So many mistakes of one file are told.
const TOLD: usize = 10;

type Rows = Vec<Vec<Value>>;

/// A three-node cluster as one engine.
struct Replicated {
    nodes: Vec<ReSqliteClient<Channel>>,
    turn: usize,
    /// What a PRAGMA foreign_keys of the file has left behind.
    foreign_keys: bool,
}

impl Replicated {
    async fn run(&mut self, sql: &str) -> Result<Rows, String> {
        self.turn += 1;
        let node = self.turn % self.nodes.len();
        let request =
            RunRequest { sql: sql.into(), foreign_keys: Some(self.foreign_keys), ..RunRequest::default() };
        let failed = |status: tonic::Status| {
            // A cluster in trouble is no answer that could agree with SQLite's.
            assert!(!is_worth_retrying(&status), "node {}: {status:?}", node + 1);
            status.message().to_owned()
        };
        let mut responses = self.nodes[node].run(request).await.map_err(failed)?.into_inner();
        let mut rows = Vec::new();
        while let Some(response) = responses.message().await.map_err(failed)? {
            for event in response.events.into_iter().filter_map(|event| event.event) {
                match event {
                    Event::Columns(_) => {}
                    Event::Row(row) => rows.push(row.values.into_iter().map(Into::into).collect()),
                    Event::Done(done) => self.foreign_keys = done.foreign_keys,
                }
            }
        }
        Ok(rows)
    }
}

/// Plain SQLite, with foreign keys as a cluster has them from the start.
fn plain() -> rusqlite::Connection {
    let connection = rusqlite::Connection::open_in_memory().unwrap();
    connection.execute_batch("pragma foreign_keys = on").unwrap();
    connection
}

fn run_plain(connection: &rusqlite::Connection, sql: &str) -> Result<Rows, String> {
    let read = || -> rusqlite::Result<Rows> {
        let mut statement = connection.prepare(sql)?;
        let columns = statement.column_count();
        let mut found = statement.query([])?;
        let mut rows = Vec::new();
        while let Some(row) = found.next()? {
            rows.push(
                (0..columns)
                    .map(|column| Ok(plain_value(row.get_ref(column)?)))
                    .collect::<rusqlite::Result<_>>()?,
            );
        }
        Ok(rows)
    };
    read().map_err(|error| error.to_string())
}

fn plain_value(value: rusqlite::types::ValueRef<'_>) -> Value {
    use rusqlite::types::ValueRef;
    match value {
        ValueRef::Null => Value::Null,
        ValueRef::Integer(integer) => Value::Integer(integer),
        ValueRef::Real(real) => Value::Real(real),
        ValueRef::Text(bytes) => match str::from_utf8(bytes) {
            Ok(text) => Value::Text(text.to_owned()),
            Err(_) => Value::InvalidText(bytes.to_vec().into()),
        },
        ValueRef::Blob(bytes) => Value::Blob(bytes.to_vec().into()),
    }
}

/// Compares what both did with what the file says. An error says what is wrong.
fn judge(
    record: &Record,
    replicated: &Result<Rows, String>,
    plain: &Result<Rows, String>,
    renderer: &Renderer,
    labels: &mut BTreeMap<String, String>,
) -> Result<(), String> {
    if replicated.is_ok() != plain.is_ok() {
        return Err(format!("the cluster: {replicated:?}\nplain SQLite: {plain:?}"));
    }
    match (&record.kind, replicated, plain) {
        (Kind::Statement { succeeds }, outcome, _) if *succeeds == outcome.is_ok() => Ok(()),
        (Kind::Statement { .. }, outcome, _) => Err(format!("the file expects otherwise: {outcome:?}")),
        (Kind::Query { types, sort, label, expected }, Ok(replicated), Ok(plain)) => {
            let exactly = |rows: &Rows| {
                let row = |row: &Vec<Value>| row.iter().map(|value| format!("{value:?}")).collect();
                sorted(rows.iter().map(row).collect(), *sort)
            };
            if exactly(replicated) != exactly(plain) {
                return Err(format!("the cluster: {replicated:?}\nplain SQLite: {plain:?}"));
            }
            if let Some(row) = replicated.iter().find(|row| row.len() != types.len()) {
                return Err(format!("the file expects {} columns, there are {}", types.len(), row.len()));
            }
            let row = |row: &Vec<Value>| {
                types.iter().zip(row).map(|(kind, value)| renderer.text(*kind, value)).collect()
            };
            let values = sorted(replicated.iter().map(row).collect(), *sort);
            if !is_as_expected(expected, &values) {
                return Err(format!("the file expects {expected:?}, the result is {values:?}"));
            }
            let Some(label) = label else { return Ok(()) };
            let hash = hashed(&values);
            match labels.insert(label.clone(), hash.clone()) {
                Some(earlier) if earlier != hash => {
                    Err(format!("another result under the label {label} before"))
                }
                _ => Ok(()),
            }
        }
        (Kind::Query { .. }, failed, _) => Err(format!("both fail: {failed:?}")),
    }
}

/// Runs a file; returns how many records it has and what is wrong.
async fn run_file(path: &Path) -> (usize, Vec<String>) {
    let text = fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let records = match parse(&text) {
        Ok(records) => records,
        Err(error) => return (0, vec![format!("{}: {error}", path.display())]),
    };
    let cluster = Cluster::start(3).await;
    let mut replicated =
        Replicated { nodes: (0..3).map(|node| cluster.client(node)).collect(), turn: 0, foreign_keys: true };
    let plain = plain();
    let renderer = Renderer::new();
    let mut labels = BTreeMap::new();
    let mut wrong = Vec::new();
    for record in &records {
        let (ours, theirs) = (replicated.run(&record.sql).await, run_plain(&plain, &record.sql));
        if let Err(what) = judge(record, &ours, &theirs, &renderer, &mut labels) {
            wrong.push(format!("{}:{}: {}\n{what}", path.display(), record.line, record.sql));
        }
    }
    cluster.wait_until_level().await;
    let first = cluster.dump(0);
    if (1..3).any(|node| cluster.dump(node) != first) {
        wrong.push(format!("{}: the nodes differ", path.display()));
    }
    (records.len(), wrong)
}

/// The files at a path, or in the directory there and below it.
fn files(path: &Path) -> Vec<PathBuf> {
    if !path.is_dir() {
        return vec![path.to_owned()];
    }
    let entries = fs::read_dir(path).unwrap().map(|entry| entry.unwrap().path());
    let wanted =
        entries.filter(|path| path.is_dir() || path.extension().is_some_and(|ending| ending == "test"));
    let mut found: Vec<PathBuf> = wanted.flat_map(|path| files(&path)).collect();
    found.sort();
    found
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cluster_answers_like_plain_sqlite() {
    let own = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/logictest");
    let path = std::env::var_os("RESQLITE_LOGICTEST").map_or(own, PathBuf::from);
    let files = files(&path);
    assert!(!files.is_empty(), "{} holds no *.test", path.display());
    let mut wrong = Vec::new();
    let mut total = 0;
    for file in &files {
        let (records, found) = run_file(file).await;
        println!("{}: {records} records, {} wrong", file.display(), found.len());
        total += records;
        wrong.extend(found.into_iter().take(TOLD));
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n\n"));
    assert!(total > 0, "no records in {}", path.display());
}
