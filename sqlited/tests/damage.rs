//! One changed byte anywhere in the database's file: it is refused, or harmless, or the comparison of the nodes'
//! contents sees what it has changed.

#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

mod machine;
mod node;

use std::{fs, os::unix::fs::FileExt, path::Path};

use machine::Machine;
use resqlite::{
    api::TableHash,
    daemon::{Shutdown, no_reloads},
};
use rusqlite::{Connection, types::Value};
use sqlited::{
    Listeners, RunError,
    apply::{Applier, ApplySettings, Position},
    soundness::{self, RunningMark},
    verify::content_hashes,
};
use tokio::{net::TcpListener, time::timeout};

/// How many bytes are changed, one at a time.
const FLIPS: u64 = 1_000;

/// What came of a start on changed bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    Refused,
    Harmless,
    FoundByComparison,
}

/// Everything that a database holds.
#[derive(Debug, PartialEq)]
struct Content {
    position: Position,
    hashes: Vec<TableHash>,
    rows: Vec<Vec<Value>>,
}

const TABLES: [&str; 3] = ["t", "bag", "text"];

/// What a node with this file would do at an unclean start; an error if it would refuse.
fn start(database: &Path) -> Result<Content, String> {
    let applier = Applier::open(database, ApplySettings::default()).map_err(|error| error.to_string())?;
    let position = applier.position();
    soundness::check(database, Some(position.applied_index)).map_err(|damage| damage.to_string())?;
    let connection = Connection::open(database).map_err(|error| error.to_string())?;
    let hashes = content_hashes(&connection).map_err(|error| error.to_string())?;
    let rows = read_rows(&connection).map_err(|error| error.to_string())?;
    Ok(Content { position, hashes, rows })
}

fn read_rows(connection: &Connection) -> rusqlite::Result<Vec<Vec<Value>>> {
    let mut all = Vec::new();
    for table in TABLES {
        let mut statement = connection.prepare(&format!("SELECT rowid, * FROM {table}"))?;
        let columns = statement.column_count();
        let rows = statement.query_map([], |row| (0..columns).map(|column| row.get(column)).collect())?;
        all.extend(rows.collect::<rusqlite::Result<Vec<Vec<Value>>>>()?);
    }
    Ok(all)
}

/// A database with tables of several kinds, closed.
fn filled() -> Machine {
    let mut machine = Machine::new();
    for sql in [
        "create table t(n integer primary key, a text unique, b real)",
        "create table bag(a blob)",
        "create virtual table text using fts5(words)",
        "insert into t with recursive s(n) as (values(1) union all select n+1 from s where n<800) \
         select n, 'text ' || n, n / 7.0 from s",
        "insert into bag with recursive s(n) as (values(1) union all select n+1 from s where n<200) \
         select randomblob(n * 10) from s",
        "insert into text with recursive s(n) as (values(1) union all select n+1 from s where n<200) \
         select 'some words of row ' || n from s",
        "delete from bag where rowid % 3 = 0",
    ] {
        machine.ok(&[sql]);
    }
    machine.reopen()
}

struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % bound
    }
}

#[test]
fn a_flipped_byte_in_the_database_is_refused_or_harmless_or_found_by_comparison() {
    let machine = filled();
    let original = machine.path();
    drop(machine.applier);
    let expected = start(&original).unwrap();
    let bytes = fs::read(&original).unwrap();
    let mut random = Random(9);
    let mut outcomes = [0; 3];
    let directory = tempfile::tempdir().unwrap();
    for flip in 0..FLIPS {
        let copy = directory.path().join(format!("{flip}.db"));
        fs::write(&copy, &bytes).unwrap();
        let (at, bits) = (random.below(bytes.len() as u64), random.below(255) as u8 + 1);
        let file = fs::File::options().write(true).open(&copy).unwrap();
        file.write_all_at(&[bytes[at as usize] ^ bits], at).unwrap();
        let outcome = match start(&copy) {
            Err(_) => Outcome::Refused,
            Ok(content) if content == expected => Outcome::Harmless,
            Ok(content) => {
                // Where the node stands is compared with the log's terms when it attaches.
                let differs = content.hashes != expected.hashes || content.position != expected.position;
                assert!(differs, "byte {at} ^ {bits:#x} changed rows, and no hash says so");
                Outcome::FoundByComparison
            }
        };
        outcomes[outcome as usize] += 1;
        for suffix in ["", "-wal", "-shm"] {
            let _ = fs::remove_file(directory.path().join(format!("{flip}.db{suffix}")));
        }
    }
    let [refused, harmless, compared] = outcomes;
    println!("{FLIPS} flips: {refused} refused, {harmless} harmless, {compared} found by comparison");
    assert!(refused > FLIPS / 20, "pages and cells are checked: {refused} of {FLIPS} were refused");
}

/// Breaks a page in the middle of the file.
fn break_a_page(database: &Path) {
    let file = fs::File::options().write(true).open(database).unwrap();
    let page = file.metadata().unwrap().len() / 4_096 / 2;
    file.write_all_at(&[0xff; 4_096], page * 4_096).unwrap();
}

#[tokio::test]
async fn after_an_unclean_stop_a_damaged_database_is_refused_and_kept() {
    let machine = filled();
    let directory = tempfile::tempdir().unwrap();
    let config = node::config(directory.path());
    fs::create_dir_all(&config.sqlited.data_dir).unwrap();
    let database = config.sqlited.data_dir.join(sqlited::DATABASE_FILE);
    let original = machine.path();
    drop(machine.applier);
    fs::copy(original, &database).unwrap();
    break_a_page(&database);
    let evidence = fs::read(&database).unwrap();
    // As a killed process leaves it.
    drop(RunningMark::set(&database).unwrap());

    for _ in 0..2 {
        let listeners = Listeners { sql: TcpListener::bind("127.0.0.1:0").await.unwrap(), metrics: None };
        let run = sqlited::run(config.clone(), listeners, no_reloads(), Shutdown::new());
        let refused = timeout(node::PATIENCE, run).await.unwrap().unwrap_err();
        assert!(matches!(refused, RunError::Damaged(_)), "{refused}");
        assert_eq!(refused.exit_code(), 78, "starting again helps nobody");
        let said = refused.to_string();
        for part in ["resqlite.db: damaged", "at applied index 7", "resqlite node replace"] {
            assert!(said.contains(part), "{part:?} is not in: {said}");
        }
        assert!(fs::read(&database).unwrap() == evidence, "the file is kept as it is");
    }
}
