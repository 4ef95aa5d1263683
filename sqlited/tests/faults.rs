//! This node's trouble never becomes a request's result, and no trouble lets the node diverge.

#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

mod machine;

use machine::{Machine, content};
use resqlite::api::{LogEntry, StoredReply};
use rusqlite::ffi;
use sqlited::apply::{Applied, ApplyError};

const SETUP: [&str; 3] = [
    "CREATE TABLE t(id INTEGER PRIMARY KEY, a, b)",
    "CREATE INDEX i ON t(a)",
    "CREATE VIRTUAL TABLE f USING fts5(a)",
];

fn entries(machine: &mut Machine) -> Vec<LogEntry> {
    let fill = "WITH RECURSIVE n(i) AS (VALUES (1) UNION ALL SELECT i + 1 FROM n WHERE i < 100)
                INSERT INTO t(a, b) SELECT random(), randomblob(300) FROM n";
    let mut entries = Vec::new();
    for round in 0..3 {
        let requests = [
            machine.request_atomic(&[fill, "UPDATE t SET a = random()"]),
            machine.request_script(&[fill, "INSERT INTO t(id) VALUES (1)", fill]),
            machine.request_atomic(&["INSERT INTO f SELECT hex(b) FROM t LIMIT 50"]),
            machine.request_atomic(&[
                &format!("CREATE TABLE x{round} AS SELECT * FROM t"),
                "DELETE FROM t WHERE id % 3 = 0",
            ]),
        ];
        for mut request in requests {
            let index = 2 + entries.len() as u64;
            request.id.as_mut().unwrap().sequence = index;
            entries.push(machine.entry(request));
        }
    }
    entries
}

fn replies(applied: &[Applied]) -> Vec<StoredReply> {
    applied.iter().map(|applied| (*applied.reply).clone()).collect()
}

/// Applies the same entries without and with a fault after so many writes, and demands the same end.
fn survives(code: i32, retryable: bool) {
    let mut calm = Machine::new();
    calm.ok(&SETUP);
    let log = entries(&mut calm);
    let expected = replies(&calm.try_apply(&log).unwrap());
    let mut failures = 0;
    for writes in (0..200).step_by(13) {
        let mut machine = Machine::new();
        machine.ok(&SETUP);
        let mut applied = Vec::new();
        machine.applier.files().fail_after(writes, code);
        let first_attempt = machine.applier.apply(&log, &mut applied);
        machine.applier.files().heal();
        let Err(error) = first_attempt else { continue };
        failures += 1;
        let ApplyError::Environment { index, code: reported, .. } = &error else { panic!("{error}") };
        // What SQLite makes of a failure differs with the place where it happens, its nature does not.
        assert!(
            [code & 0xff, ffi::SQLITE_IOERR, ffi::SQLITE_CANTOPEN].contains(&(reported & 0xff)),
            "{error}"
        );
        assert!(error.to_string().contains(&format!("entry {index} cannot be applied here")), "{error}");
        if reported & 0xff == code & 0xff {
            assert_eq!(error.is_retryable(), retryable, "{error}");
        }
        let position = machine.applier.position().applied_index;
        assert_eq!(applied.len() as u64, position - 1, "replies and position agree");
        // The same process goes on, or a new one does.
        if writes % 26 == 0 {
            machine = machine.reopen();
        }
        let rest = &log[applied.len()..];
        machine.applier.apply(rest, &mut applied).unwrap();
        for (reply, expected) in replies(&applied).iter().zip(&expected) {
            assert_eq!(reply, expected, "after {writes} writes");
        }
        assert!(content(&machine.path()) == content(&calm.path()), "after {writes} writes");
    }
    assert!(failures > 5, "only {failures} attempts failed");
}

#[test]
fn a_full_disk_stops_the_node_and_is_no_result() {
    survives(ffi::SQLITE_FULL, true);
}

#[test]
fn an_io_error_stops_the_node_and_is_no_result() {
    survives(ffi::SQLITE_IOERR_WRITE, false);
}

#[test]
fn a_failed_sync_stops_the_node_and_is_no_result() {
    survives(ffi::SQLITE_IOERR_FSYNC, false);
}

#[test]
fn a_locked_database_stops_the_node_and_is_no_result() {
    let mut machine = Machine::new();
    machine.ok(&SETUP);
    let other = rusqlite::Connection::open(machine.path()).unwrap();
    other.execute_batch("BEGIN IMMEDIATE").unwrap();
    let request = machine.request_atomic(&["INSERT INTO t(a) VALUES (1)"]);
    let entry = machine.entry(request);
    let error = machine.try_apply(std::slice::from_ref(&entry)).unwrap_err();
    assert!(
        error.is_retryable() && error.to_string().contains("another process holds the database"),
        "{error}"
    );
    other.execute_batch("ROLLBACK").unwrap();
    assert_eq!(machine.try_apply(&[entry]).unwrap()[0].reply.error, None);
}

#[test]
fn an_interrupted_apply_is_no_result_and_goes_on_afterwards() {
    let mut machine = Machine::new();
    machine.ok(&SETUP);
    let endless = "WITH RECURSIVE n(i) AS (VALUES (1) UNION ALL SELECT i + 1 FROM n WHERE i < 20000000)
                   INSERT INTO t(a) SELECT i FROM n WHERE i > 19999999";
    let mut request = machine.request_atomic(&[endless]);
    request.step_budget = 1 << 30;
    let before = machine.request_atomic(&["INSERT INTO t(a) VALUES (1)"]);
    let mut request = {
        request.id.as_mut().unwrap().sequence += 1;
        request
    };
    let log = [machine.entry(before), machine.entry(std::mem::take(&mut request))];
    let handle = machine.applier.interrupt_handle();
    let done = std::sync::atomic::AtomicBool::new(false);
    let mut applied = Vec::new();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            // An interrupt counts for statements that run: insist until one has hit.
            while !done.load(std::sync::atomic::Ordering::Relaxed) {
                handle.interrupt();
                std::thread::yield_now();
            }
        });
        let error = machine.applier.apply(&log, &mut applied).unwrap_err();
        done.store(true, std::sync::atomic::Ordering::Relaxed);
        assert!(error.is_retryable() && error.to_string().contains("interrupted"), "{error}");
    });
    let left = &log[applied.len()..];
    machine.applier.apply(left, &mut applied).unwrap();
    for applied in &applied {
        assert_eq!(applied.reply.error, None);
    }
    assert_eq!(machine.read("SELECT count(*) FROM t"), "2");
}

#[test]
fn what_is_synced_is_at_least_what_was_applied_before() {
    let mut machine = Machine::new();
    let durability = machine.applier.durability();
    assert_eq!(durability.sync().unwrap(), 0);
    machine.ok(&SETUP);
    assert_eq!(durability.sync().unwrap(), 1);
}

#[test]
fn a_file_that_is_not_a_database_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("resqlite.db");
    std::fs::write(&path, b"this is not a database, and long enough to look at".repeat(100)).unwrap();
    std::fs::write(directory.path().join("resqlite.db.trusted"), "").unwrap();
    let error = sqlited::apply::Applier::open(&path, Default::default()).err().unwrap().to_string();
    assert!(error.contains("not a database"), "{error}");
}
