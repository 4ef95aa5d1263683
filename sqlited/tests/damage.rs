//! One changed byte anywhere in what sqlited keeps: it is refused, or harmless, and never served.
//!
//! `FLIPS=1000 cargo test --release -p sqlited --test damage -- --nocapture` tries so many places of every file.

#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

mod machine;
mod node;

use std::{
    collections::BTreeMap,
    env,
    error::Error,
    fs,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use machine::Machine;
use node::{Node, PATIENCE};
use resqlite::{
    api::{ExecuteRequest, QueryRequest, Statement, TableHash},
    daemon::{Shutdown, no_reloads},
};
use rusqlite::{Connection, types::Value};
use sqlited::{
    Listeners, RunError,
    apply::{Applier, ApplySettings, Position},
    soundness::{self, RunningMark},
    verify::content_hashes,
};
use tempfile::TempDir;
use tokio::{net::TcpListener, time::timeout};

/// How many bytes of each file are changed, one at a time, unless `FLIPS` says otherwise.
const FEW_FLIPS: u64 = 40;

/// Everything that a database holds.
#[derive(Clone, Debug, PartialEq)]
struct Content {
    position: Position,
    hashes: Vec<TableHash>,
    rows: Vec<Vec<Value>>,
}

const TABLES: [&str; 3] = ["t", "bag", "text"];
const FILES: [&str; 3] = ["resqlite.db", "resqlite.db-wal", "resqlite.db-sums"];

/// What a node with these files would serve after an unclean start; an error if it would refuse.
fn start(database: &Path) -> Result<Content, String> {
    let applier = Applier::open(database, ApplySettings::default()).map_err(|error| error.to_string())?;
    let position = applier.position();
    let file = applier.file();
    let content = soundness::check(&file, Some(position.applied_index))
        .map_err(|damage| damage.to_string())
        .and_then(|()| {
            let connection = file.open_to_read().map_err(|error| error.to_string())?;
            content_of(&connection, position).map_err(|error| error.to_string())
        });
    // As a killed process: closing would write to the database.
    applier.files().fail_after(0, rusqlite::ffi::SQLITE_IOERR_WRITE);
    content
}

fn content_of(connection: &Connection, position: Position) -> Result<Content, Box<dyn Error>> {
    let hashes = content_hashes(connection)?;
    let mut rows = Vec::new();
    for table in TABLES {
        let mut statement = connection.prepare(&format!("SELECT rowid, * FROM {table}"))?;
        let columns = statement.column_count();
        let found = statement.query_map([], |row| (0..columns).map(|column| row.get(column)).collect())?;
        rows.extend(found.collect::<rusqlite::Result<Vec<Vec<Value>>>>()?);
    }
    Ok(Content { position, hashes, rows })
}

/// A state machine with tables of several kinds, and what it held after each entry from then on.
struct Recorded {
    machine: Machine,
    history: BTreeMap<u64, Content>,
}

impl Recorded {
    fn new(checkpoint_pages: u32) -> Self {
        let mut machine = Machine::with(ApplySettings { checkpoint_pages, ..ApplySettings::default() });
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
        let mut recorded = Self { machine, history: BTreeMap::new() };
        recorded.record();
        recorded
    }

    fn record(&mut self) {
        let applier = &self.machine.applier;
        let connection = applier.file().open_to_read().unwrap();
        let content = content_of(&connection, applier.position()).unwrap();
        self.history.insert(content.position.applied_index, content);
    }

    fn write(&mut self, entries: usize) {
        for number in 0..entries {
            let update = format!("update t set b = {number}.5, a = a || '.' where n % 9 = {}", number % 9);
            let insert = format!("insert into text values ('more words {number}')");
            self.machine.ok(&[&update, &insert, "update bag set a = randomblob(99) where rowid % 7 = 0"]);
            self.record();
        }
    }

    /// The files as they are now, as a killed process leaves them.
    fn killed(&self) -> Left {
        Left { files: files_beside(&self.machine.path()), history: self.history.clone() }
    }

    /// The files as a clean stop leaves them: the log is written back and gone.
    fn stopped(self) -> Left {
        let Self { machine, history } = self;
        let path = machine.path();
        drop(machine.applier);
        Left { files: files_beside(&path), history }
    }

    /// How much of the write-ahead log is in use, and how much of that is known to be in the database.
    fn wal_frames(&self) -> (u32, u32) {
        let shm = fs::read(self.machine.path().with_file_name("resqlite.db-shm")).unwrap();
        let number = |at: usize| u32::from_le_bytes(shm[at..at + 4].try_into().unwrap());
        (number(16), number(96))
    }
}

struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % bound
    }
}

/// What came of changes of one file.
#[derive(Debug, Default)]
struct Outcomes {
    refused: u64,
    harmless: u64,
    /// An earlier state, from which the log is applied again.
    earlier: u64,
    reasons: String,
}

/// What a process left behind.
struct Left {
    files: BTreeMap<&'static str, Vec<u8>>,
    history: BTreeMap<u64, Content>,
}

fn files_beside(database: &Path) -> BTreeMap<&'static str, Vec<u8>> {
    let read = |name| fs::read(database.with_file_name(name)).ok().map(|bytes| (name, bytes));
    FILES.into_iter().filter_map(read).collect()
}

impl Left {
    /// Changes one byte of one file, again and again, and starts.
    fn flip(&self, name: &str, seed: u64) -> Outcomes {
        let flips = env::var("FLIPS").map_or(FEW_FLIPS, |flips| flips.parse().expect("FLIPS is a number"));
        let (mut random, mut outcomes) = (Random(seed), Outcomes::default());
        let newest = self.history.last_key_value().unwrap().1;
        let bytes = &self.files[name];
        for _ in 0..flips {
            let (at, bits) = (random.below(bytes.len() as u64), random.below(255) as u8 + 1);
            let (_directory, database) = copy(&self.files);
            let file = fs::File::options().write(true).open(database.with_file_name(name)).unwrap();
            file.write_all_at(&[bytes[at as usize] ^ bits], at).unwrap();
            match start(&database) {
                Err(reason) => {
                    assert!(reason.contains("resqlite.db"), "the file is named: {reason}");
                    assert!(reason.contains("resqlite node replace"), "and the way on: {reason}");
                    outcomes.refused += 1;
                    outcomes.reasons = reason;
                }
                Ok(content) if content == *newest => outcomes.harmless += 1,
                Ok(content) => {
                    let then = self.history.get(&content.position.applied_index);
                    assert!(
                        then == Some(&content),
                        "{name}, byte {at} ^ {bits:#x}: it serves what never was"
                    );
                    outcomes.earlier += 1;
                }
            }
        }
        println!("{name}: {flips} flips, {outcomes:?}");
        outcomes
    }
}

fn copy(files: &BTreeMap<&str, Vec<u8>>) -> (TempDir, PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    files.iter().for_each(|(name, bytes)| fs::write(directory.path().join(name), bytes).unwrap());
    let database = directory.path().join("resqlite.db");
    (directory, database)
}

#[test]
fn a_flipped_byte_beside_a_log_that_was_written_back_is_refused_or_harmless() {
    // The log is as long as SQLite lets it grow, and all of it is in the database.
    let mut recorded = Recorded::new(60);
    while recorded.wal_frames().0 == 0 || recorded.wal_frames().0 != recorded.wal_frames().1 {
        recorded.write(1);
    }
    let left = recorded.killed();
    let database = left.flip("resqlite.db", 1);
    assert_eq!(database.earlier, 0);
    let log = left.flip("resqlite.db-wal", 2);
    assert!(log.refused > 0 && log.reasons.contains("resqlite.db-wal"), "{}", log.reasons);
    assert_eq!(log.earlier, 0, "older pages would cover newer ones");
    left.flip("resqlite.db-sums", 3);
}

#[test]
fn a_flipped_byte_beside_a_log_that_goes_on_is_refused_or_harmless_or_the_log_is_applied_again() {
    let mut recorded = Recorded::new(60);
    recorded.write(9);
    // Begun anew, with fresh frames before stale ones.
    while recorded.wal_frames().0 < 5 || recorded.wal_frames().1 != 0 {
        recorded.write(1);
    }
    let left = recorded.killed();
    assert_eq!(left.flip("resqlite.db", 4).earlier, 0);
    left.flip("resqlite.db-wal", 5);
    left.flip("resqlite.db-sums", 6);
}

#[test]
fn a_flipped_byte_beside_a_log_that_a_reader_held_back_is_refused_or_harmless_or_the_log_is_applied_again() {
    let mut recorded = Recorded::new(60);
    recorded.write(5);
    let view = recorded.machine.applier.file().open_to_read().unwrap();
    view.execute_batch("BEGIN; SELECT * FROM t LIMIT 1").unwrap();
    // Checkpoints get as far as the view, and no further: the file was written to and not synced.
    recorded.write(12);
    let (frames, backfilled) = recorded.wal_frames();
    assert!(0 < backfilled && backfilled < frames, "{backfilled} of {frames}");
    let left = recorded.killed();
    drop(view);
    assert_eq!(left.flip("resqlite.db", 7).earlier, 0);
    left.flip("resqlite.db-wal", 8);
    left.flip("resqlite.db-sums", 9);
}

#[test]
fn a_flipped_byte_in_a_closed_database_is_refused_unless_nothing_is_read_there() {
    let left = Recorded::new(4_096).stopped();
    assert_eq!(left.files.len(), 2, "the log is gone");
    let outcomes = left.flip("resqlite.db", 10);
    assert!(outcomes.earlier == 0 && outcomes.refused > outcomes.harmless, "{outcomes:?}");
    left.flip("resqlite.db-sums", 11);
}

/// Prepares a node's directory with a database that was stopped cleanly.
fn prepared() -> (TempDir, resqlite::config::Config, PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    let config = node::config(directory.path());
    fs::create_dir_all(&config.sqlited.data_dir).unwrap();
    let database = config.sqlited.data_dir.join(sqlited::DATABASE_FILE);
    for (name, bytes) in Recorded::new(4_096).stopped().files {
        fs::write(database.with_file_name(name), bytes).unwrap();
    }
    (directory, config, database)
}

async fn refusal(config: &resqlite::config::Config) -> RunError {
    let listeners = Listeners { sql: TcpListener::bind("127.0.0.1:0").await.unwrap(), metrics: None };
    let run = sqlited::run(config.clone(), listeners, no_reloads(), Shutdown::new());
    timeout(PATIENCE, run).await.unwrap().unwrap_err()
}

#[tokio::test]
async fn after_an_unclean_stop_a_damaged_database_is_refused_and_kept() {
    let (_directory, config, database) = prepared();
    let file = fs::File::options().write(true).open(&database).unwrap();
    let page = file.metadata().unwrap().len() / 4_096 / 2;
    file.write_all_at(&[0xff; 4_096], page * 4_096).unwrap();
    let evidence = fs::read(&database).unwrap();
    // As a killed process leaves it.
    drop(RunningMark::set(&database).unwrap());

    for _ in 0..2 {
        let refused = refusal(&config).await;
        assert!(matches!(refused, RunError::Damaged(_)), "{refused}");
        assert_eq!(refused.exit_code(), 78, "starting again helps nobody");
        let (said, page) = (refused.to_string(), format!("page {} is not", page + 1));
        for part in ["resqlite.db: damaged", "at applied index 7", &page, "resqlite node replace"] {
            assert!(said.contains(part), "{part:?} is not in: {said}");
        }
        assert!(fs::read(&database).unwrap() == evidence, "the file is kept as it is");
    }
}

#[tokio::test]
async fn lost_checksums_are_damage_until_the_operator_trusts_the_file() {
    let (_directory, config, database) = prepared();
    let sums = database.with_file_name("resqlite.db-sums");
    fs::remove_file(&sums).unwrap();
    let refused = refusal(&config).await;
    assert_eq!(refused.exit_code(), 78);
    assert!(refused.to_string().contains("resqlite.db-sums: damaged: it is missing"), "{refused}");
    assert!(!sums.exists(), "none are made in silence");
    fs::write(database.with_file_name("resqlite.db.trusted"), "").unwrap();
    assert_eq!(start(&database).unwrap().position.applied_index, 7);
    assert!(sums.exists());
}

#[tokio::test]
async fn a_page_that_rots_under_a_running_node_is_not_served_and_ends_it() {
    let node = Node::start().await;
    let statement = |sql: &str| Statement { sql: sql.into(), ..Statement::default() };
    let sql = "create table t as with recursive s(n) as (values(1) union all select n+1 from s where n<9000) \
               select n, 'text ' || n as a from s";
    // So much that the write-ahead log is written back: then all is read from the file, and nothing is in a cache yet.
    let much = "with recursive s(n) as (values(1) union all select n+1 from s where n<20) \
                insert into filler select zeroblob(1000000) from s";
    let statements = [sql, "create table filler(a)", much].map(statement).into();
    node.client().execute(ExecuteRequest { statements, ..ExecuteRequest::default() }).await.unwrap();
    let database = node.config.sqlited.data_dir.join(sqlited::DATABASE_FILE);
    let bytes = fs::read(&database).unwrap();
    let value = b"text 8999";
    let at = bytes.windows(value.len()).position(|bytes| bytes == value).unwrap();
    fs::File::options().write(true).open(&database).unwrap().write_all_at(b"T", at as u64).unwrap();

    let query = |sql: &str| QueryRequest { sql: sql.into(), ..QueryRequest::default() };
    let mut rows = node.client().query(query("select * from t where n = 8999")).await;
    let answer = match &mut rows {
        Ok(rows) => rows.get_mut().message().await.map(drop),
        Err(status) => Err(status.clone()),
    };
    assert_eq!(answer.unwrap_err().code(), tonic::Code::Unavailable, "the caller asks another node");
    let ended = timeout(PATIENCE, node.running).await.unwrap().unwrap().unwrap_err();
    assert_eq!(ended.exit_code(), 78, "{ended}");
    let page = format!("page {} is not what was written", at / 4_096 + 1);
    assert!(ended.to_string().contains(&page), "{page:?} is not in: {ended}");
}
