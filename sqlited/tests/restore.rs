//! Restore as part of the state machine: a staged file becomes the content at one entry, or nothing changes.

#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

mod machine;

use std::{fs, path::Path};

use bytes::Bytes;
use machine::{Machine, content};
use resqlite::api::{
    Authority, LoggedRequest, LoggedUser, Operator, ReadSet, ReplyClass, RequestId, RestoreAbandon,
    RestoreChunk, RestoreFinish, RestoreStart, RestoreStep, Rights, Role, StoredReply, UserChange,
    authority::Who, logged_request::Body, restore_step::Step, user_change::Change,
};
use rusqlite::{Connection, ffi};
use sqlited::{apply::ApplySettings, restore::IDLE_MS, users::Directory, verify::content_hashes};

const UPLOAD: &[u8] = b"upload of sixtee";
const OTHER: &[u8] = b"another one's id";

/// A database with a little of everything, in a file of its own.
fn file_made_by(sql: &str) -> Vec<u8> {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("file.db");
    Connection::open(&path).unwrap().execute_batch(sql).unwrap();
    fs::read(path).unwrap()
}

fn everything() -> Vec<u8> {
    file_made_by(
        "CREATE TABLE bag(a, b, g AS (a || b)); INSERT INTO bag(rowid, a, b) VALUES (9, 1, 'x'), (4, x'00ff', 0.1);
         INSERT INTO bag(a) SELECT hex(randomblob(300)) FROM json_each('[1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16]');
         CREATE TABLE kept(id INTEGER PRIMARY KEY AUTOINCREMENT, t UNIQUE); INSERT INTO kept(t) VALUES ('a'), ('b');
         CREATE TABLE w(a PRIMARY KEY, b) WITHOUT ROWID; INSERT INTO w VALUES (2, 1), (1, 2);
         CREATE VIRTUAL TABLE words USING fts5(text); INSERT INTO words VALUES ('some words');
         CREATE VIEW v AS SELECT * FROM kept;
         CREATE TRIGGER added AFTER INSERT ON kept BEGIN INSERT INTO bag(a) VALUES (new.id); END;
         PRAGMA user_version = 5; PRAGMA application_id = 6; ANALYZE;",
    )
}

fn step(upload_id: &'static [u8], step: Step) -> Body {
    Body::Restore(RestoreStep { upload_id: Bytes::from_static(upload_id), step: Some(step) })
}

fn start(upload_id: &'static [u8], file: &[u8], replace: bool) -> Body {
    step(upload_id, Step::Start(RestoreStart { size_bytes: file.len() as u64, replace }))
}

fn chunks(upload_id: &'static [u8], file: &[u8], size: usize) -> Vec<Body> {
    let chunk = |(number, data): (usize, &[u8])| {
        let offset = (number * size) as u64;
        step(upload_id, Step::Chunk(RestoreChunk { offset, data: Bytes::copy_from_slice(data) }))
    };
    file.chunks(size).enumerate().map(chunk).collect()
}

fn finish(upload_id: &'static [u8], file: &[u8], replace: bool) -> Body {
    let blake3 = blake3::hash(file).as_bytes().to_vec().into();
    step(upload_id, Step::Finish(RestoreFinish { size_bytes: file.len() as u64, blake3, replace }))
}

fn steps(file: &[u8], replace: bool) -> Vec<Body> {
    let mut steps = vec![start(UPLOAD, file, replace)];
    steps.extend(chunks(UPLOAD, file, 10_000));
    steps.push(finish(UPLOAD, file, replace));
    steps
}

/// Applies these bodies, and returns the last reply; the others must be good.
fn apply_bodies(machine: &mut Machine, mut bodies: Vec<Body>) -> StoredReply {
    let last = bodies.pop().unwrap();
    for body in bodies {
        let reply = apply_body(machine, body);
        assert_eq!(reply.error, None);
    }
    apply_body(machine, last)
}

fn apply_body(machine: &mut Machine, body: Body) -> StoredReply {
    let request = LoggedRequest { body: Some(body), ..machine.request_atomic(&[]) };
    machine.apply(request)
}

fn refusal(reply: &StoredReply) -> (ReplyClass, String) {
    (reply.class(), reply.error.clone().expect("a refusal").message)
}

fn content_of(file: &[u8]) -> String {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("file.db");
    fs::write(&path, file).unwrap();
    content(&path)
}

fn staged(machine: &Machine) -> i64 {
    let connection = Connection::open(machine.path()).unwrap();
    let sql =
        "SELECT (SELECT count(*) FROM _resqlite_restore) + (SELECT count(*) FROM _resqlite_restore_chunks)";
    connection.query_row(sql, [], |row| row.get(0)).unwrap()
}

fn names_beside(path: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(path.parent().unwrap())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[test]
fn the_content_becomes_the_files_rowids_and_all() {
    let file = everything();
    let mut machine = Machine::new();
    assert_eq!(apply_bodies(&mut machine, steps(&file, false)).error, None);
    assert_eq!(machine.content(), content_of(&file));
    assert_eq!(staged(&machine), 0);
    assert_eq!(
        names_beside(&machine.path()),
        ["resqlite.db", "resqlite.db-shm", "resqlite.db-sums", "resqlite.db-wal"]
    );
    // What was prepared for, and learnt of, the old schema is forgotten.
    machine.ok(&["INSERT INTO kept(t) VALUES ('later')", "INSERT INTO words VALUES ('new words')"]);
    assert_eq!(machine.read("SELECT id, t FROM v WHERE t = 'later'"), "3|later");
    assert_eq!(machine.read("SELECT rowid FROM words WHERE words MATCH 'words' ORDER BY rowid"), "1,2");
    assert_eq!(machine.read("SELECT a FROM bag ORDER BY rowid DESC LIMIT 1"), "3");
    let machine = machine.reopen();
    assert_eq!(machine.read("PRAGMA integrity_check"), "ok");
    assert_eq!(machine.read("SELECT count(*) FROM kept"), "3");
}

#[test]
fn only_an_empty_database_is_replaced_without_being_told_so() {
    let file = everything();
    let mut machine = Machine::new();
    machine.ok(&["CREATE TABLE mine(a)", "INSERT INTO mine VALUES (1)"]);
    let before = machine.content();
    let (class, message) = refusal(&apply_body(&mut machine, start(UPLOAD, &file, false)));
    assert_eq!(class, ReplyClass::Failed);
    assert!(message.contains("not empty") && message.contains("--force"), "{message}");
    assert_eq!(machine.content(), before);
    // What is written between the chunks belongs to the old content.
    let mut bodies = steps(&file, true);
    let last = bodies.pop().unwrap();
    assert_eq!(apply_bodies(&mut machine, bodies).error, None);
    machine.ok(&["INSERT INTO mine VALUES (2)"]);
    assert_eq!(machine.read("SELECT count(*) FROM mine"), "2");
    assert_eq!(apply_body(&mut machine, last).error, None);
    assert_eq!(machine.content(), content_of(&file));
}

#[test]
fn what_was_created_during_an_upload_is_not_lost_unasked() {
    let file = everything();
    let mut machine = Machine::new();
    let mut bodies = steps(&file, false);
    let last = bodies.pop().unwrap();
    assert_eq!(apply_bodies(&mut machine, bodies).error, None);
    machine.ok(&["CREATE TABLE mine(a)"]);
    assert!(refusal(&apply_body(&mut machine, last)).1.contains("not empty"));
    assert_eq!(machine.read("SELECT count(*) FROM mine"), "0");
    assert_eq!(staged(&machine), 0);
}

#[test]
fn grouping_and_restarts_make_no_difference() {
    let file = everything();
    let mut bodies = vec![machine::atomic(vec![machine::statement("CREATE TABLE old(a)", [])])];
    bodies.extend(steps(&file, true));
    bodies.push(machine::atomic(vec![machine::statement("INSERT INTO kept(t) VALUES (random())", [])]));
    let (mut together, mut apart) = (Machine::new(), Machine::new());
    let requests =
        bodies.iter().enumerate().map(|(at, body)| machine::request(at as u64 + 1, body.clone())).collect();
    assert!(together.apply_all(requests).iter().all(|reply| reply.error.is_none()));
    for body in bodies {
        assert_eq!(apply_body(&mut apart, body).error, None);
        apart = apart.reopen_with(ApplySettings { group_entries: 1, ..ApplySettings::default() });
    }
    assert_eq!(together.content(), apart.content());
    let hashes = |machine: &Machine| content_hashes(machine.reader().connection()).unwrap();
    assert_eq!(hashes(&together), hashes(&apart));
}

#[test]
fn a_failure_at_any_write_leaves_the_old_content_or_the_new() {
    let file = everything();
    let mut machine = Machine::new();
    machine.ok(&["CREATE TABLE old(a)", "INSERT INTO old VALUES (1)"]);
    let mut bodies = steps(&file, true);
    let last = bodies.pop().unwrap();
    assert_eq!(apply_bodies(&mut machine, bodies).error, None);
    let old = machine.content();
    let request = LoggedRequest { body: Some(last), ..machine.request_atomic(&[]) };
    let entry = machine.entry(request);
    let mut failures = 0;
    for nth in 0.. {
        machine.applier.files().fail_after(nth, ffi::SQLITE_IOERR_WRITE);
        let applied = machine.try_apply(std::slice::from_ref(&entry));
        machine.applier.files().heal();
        if let Ok(applied) = applied {
            assert_eq!(applied[0].reply.error, None);
            break;
        }
        failures += 1;
        // As after a crash; and also without one.
        if nth % 2 == 0 {
            machine = machine.reopen();
        }
        assert_eq!(machine.content(), old, "after write {nth} has failed");
    }
    assert!(failures > 5, "{failures}");
    assert_eq!(machine.content(), content_of(&file));
    assert_eq!(machine.reopen().content(), content_of(&file));
}

#[test]
fn a_full_disk_delays_a_restore_and_does_not_decide_it() {
    let file = everything();
    let mut machine = Machine::new();
    let mut bodies = steps(&file, false);
    let last = bodies.pop().unwrap();
    assert_eq!(apply_bodies(&mut machine, bodies).error, None);
    let request = LoggedRequest { body: Some(last), ..machine.request_atomic(&[]) };
    let entry = machine.entry(request);
    machine.applier.files().fail_after(3, ffi::SQLITE_FULL);
    assert!(machine.try_apply(std::slice::from_ref(&entry)).unwrap_err().is_retryable());
    machine.applier.files().heal();
    assert_eq!(machine.try_apply(std::slice::from_ref(&entry)).unwrap()[0].reply.error, None);
    assert_eq!(machine.content(), content_of(&file));
}

#[test]
fn files_that_cannot_be_a_clusters_database_are_refused_and_nothing_is_left_of_them() {
    let mut damaged = everything();
    let middle = damaged.len() / 2;
    damaged[4_096..middle].fill(0xee);
    let highest = format!("CREATE TABLE t(a); INSERT INTO t(rowid, a) VALUES ({}, 1)", i64::MAX);
    let unknown = "CREATE TABLE t(a); PRAGMA writable_schema = ON; INSERT INTO sqlite_schema VALUES
        ('table', 'g', 'g', 0, 'CREATE VIRTUAL TABLE g USING dbstat(main)')";
    for (file, reason) in [
        (b"not a database at all, only text".to_vec(), "not an SQLite database, or it is encrypted"),
        (damaged, "damaged"),
        (everything()[..40_000].to_vec(), "cut off"),
        (file_made_by("PRAGMA page_size = 8192; CREATE TABLE t(a)"), "pages of 8192 bytes"),
        (file_made_by("PRAGMA encoding = 'UTF-16'; CREATE TABLE t(a)"), "UTF-16"),
        (file_made_by("PRAGMA auto_vacuum = INCREMENTAL; CREATE TABLE t(a)"), "auto_vacuum"),
        (file_made_by("CREATE TABLE _ReSqlite_mine(a)"), "the server's own"),
        (file_made_by(&highest), "the highest rowid"),
        (file_made_by(unknown), "module \"dbstat\""),
    ] {
        let mut machine = Machine::new();
        machine.ok(&["CREATE TABLE mine(a)"]);
        let before = machine.content();
        let (class, message) = refusal(&apply_bodies(&mut machine, steps(&file, true)));
        assert_eq!(class, ReplyClass::Failed, "{message}");
        assert!(message.contains(reason), "{reason}: {message}");
        assert_eq!(machine.content(), before, "{reason}");
        assert_eq!(staged(&machine), 0, "{reason}");
        assert!(!names_beside(&machine.path()).iter().any(|name| name.contains("restoring")), "{reason}");
        machine.ok(&["INSERT INTO mine VALUES (1)"]);
    }
}

#[test]
fn a_file_that_is_not_what_was_announced_is_refused() {
    let (file, mut other) = (everything(), everything());
    other[5_000] ^= 1;
    let mut machine = Machine::new();
    let mut bodies = steps(&other, false);
    *bodies.last_mut().unwrap() = finish(UPLOAD, &file, false);
    assert!(refusal(&apply_bodies(&mut machine, bodies)).1.contains("checksum"));
    // And so is one with a gap.
    let mut bodies = steps(&file, false);
    bodies.remove(2);
    let (class, message) = refusal(&apply_bodies(&mut machine, bodies));
    assert_eq!(class, ReplyClass::Aborted);
    assert!(message.contains("begin again"), "{message}");
    assert_eq!(apply_bodies(&mut machine, steps(&file, false)).error, None);
    assert_eq!(machine.content(), content_of(&file));
}

#[test]
fn a_file_with_a_write_ahead_log_behind_it_is_taken_without_one() {
    let file = file_made_by("PRAGMA journal_mode = WAL; CREATE TABLE t(a); INSERT INTO t VALUES (7)");
    let mut machine = Machine::new();
    assert_eq!(apply_bodies(&mut machine, steps(&file, false)).error, None);
    assert_eq!(machine.read("SELECT a FROM t"), "7");
    let machine = machine.reopen();
    let mode =
        Connection::open(machine.path()).unwrap().query_row("PRAGMA journal_mode", [], |row| row.get(0));
    assert_eq!(mode, Ok("wal".to_owned()));
}

#[test]
fn requests_before_a_restore_are_remembered_and_the_restore_is_too() {
    let file = everything();
    let mut machine = Machine::new();
    let named = |body, sequence, index: u64| LoggedRequest {
        id: Some(RequestId {
            client_id: Bytes::from_static(b"a client's name!"),
            sequence,
            acknowledged_below: 0,
            made_at_index: index,
        }),
        server_made_id: false,
        body: Some(body),
        ..machine::request(index, Body::Atomic(Default::default()))
    };
    let create = machine::atomic(vec![machine::statement("CREATE TABLE IF NOT EXISTS t(a)", [])]);
    let first = machine.apply(named(create.clone(), 1, 1));
    let mut bodies = steps(&file, true);
    let last = bodies.pop().unwrap();
    assert_eq!(apply_bodies(&mut machine, bodies).error, None);
    let restored = machine.apply(named(last.clone(), 2, 1));
    assert_eq!(restored.error, None);
    assert_eq!(machine.apply(named(create, 1, 1)), first);
    assert_eq!(machine.apply(named(last, 2, 1)), restored);
    assert_eq!(machine.content(), content_of(&file));
}

#[test]
fn whatever_an_optimistic_transaction_has_read_is_changed_by_a_restore() {
    let file = everything();
    let mut machine = Machine::new();
    machine.ok(&["CREATE TABLE kept(id)"]);
    assert_eq!(apply_bodies(&mut machine, steps(&file, true)).error, None);
    let request = LoggedRequest {
        reads: Some(ReadSet { index: 1, tables: vec!["_resqlite_schema".into()], ..ReadSet::default() }),
        ..machine.request_atomic(&["INSERT INTO kept(t) VALUES ('x')"])
    };
    assert_eq!(machine.apply(request).class(), ReplyClass::Aborted);
}

#[test]
fn one_upload_at_a_time_until_it_is_abandoned() {
    let file = everything();
    let mut machine = Machine::new();
    assert_eq!(apply_body(&mut machine, start(UPLOAD, &file, false)).error, None);
    assert_eq!(apply_body(&mut machine, chunks(UPLOAD, &file, 10_000).remove(0)).error, None);
    let (class, message) = refusal(&apply_body(&mut machine, start(OTHER, &file, false)));
    assert_eq!(class, ReplyClass::Failed);
    assert!(message.contains("another restore is under way, last heard of 1 s ago"), "{message}");
    let stray = chunks(OTHER, &file, 10_000).remove(1);
    assert_eq!(apply_body(&mut machine, stray.clone()).class(), ReplyClass::Aborted);
    // The same upload may begin anew, and another one once this one was given up.
    assert_eq!(apply_body(&mut machine, start(UPLOAD, &file, false)).error, None);
    assert_eq!(apply_body(&mut machine, step(UPLOAD, Step::Abandon(RestoreAbandon {}))).error, None);
    assert_eq!(staged(&machine), 0);
    assert_eq!(apply_body(&mut machine, start(OTHER, &file, false)).error, None);
    assert_eq!(apply_body(&mut machine, stray).error, None);

    // Each entry is a second after the one before.
    let last_heard = machine.applier.position().applied_index;
    machine.skip_to(last_heard + IDLE_MS / 1_000 - 1);
    let mut machine = machine.reopen();
    machine.ok(&["CREATE TABLE just(in_time)"]);
    assert_eq!(staged(&machine), 2);
    machine.ok(&["CREATE TABLE too(late)"]);
    assert_eq!(staged(&machine), 0);
    let late = chunks(OTHER, &file, 10_000).remove(2);
    assert_eq!(apply_body(&mut machine, late).class(), ReplyClass::Aborted);
}

#[test]
fn a_vacuum_beside_an_abandoned_upload_makes_no_difference() {
    let file = everything();
    let mut machine = Machine::new();
    assert_eq!(apply_body(&mut machine, start(UPLOAD, &file, false)).error, None);
    let last_heard = machine.applier.position().applied_index;
    machine.skip_to(last_heard + IDLE_MS / 1_000 + 1);
    machine.ok(&["VACUUM"]);
    machine.ok(&["CREATE TABLE t(a)"]);
    assert_eq!(staged(&machine), 0);
}

/// Applies a body on behalf of somebody.
fn apply_as(machine: &mut Machine, who: Option<Who>, body: Body) -> StoredReply {
    let authority = who.map(|who| Authority { who: Some(who) });
    let request = LoggedRequest { authority, body: Some(body), ..machine.request_atomic(&[]) };
    machine.apply(request)
}

fn change_users(machine: &mut Machine, change: Change) {
    let body = Body::Users(UserChange { change: Some(change) });
    assert_eq!(apply_as(machine, Some(Who::Operator(Operator {})), body).error, None);
}

#[test]
fn a_restore_keeps_the_users_and_takes_an_administrator() {
    let file = everything();
    let settings =
        |directory: &Directory| ApplySettings { directory: directory.clone(), ..ApplySettings::default() };
    let directory = Directory::new(false);
    let mut machine = Machine::with(settings(&directory));
    machine.ok(&["CREATE TABLE mine(a)"]);
    for (name, role) in [("root", Role::Admin), ("bob", Role::Write)] {
        let rights = Some(Rights { roles: vec![role.into()], ..Rights::default() });
        change_users(
            &mut machine,
            Change::Add(LoggedUser { name: name.into(), password_hash: "hash".into(), rights }),
        );
    }
    change_users(&mut machine, Change::RequireAuthentication(true));
    let (root, bob) = (Some(Who::User("root".into())), Some(Who::User("bob".into())));
    let strangers = [bob.clone(), None, Some(Who::User("gone".into()))];

    let mut bodies = steps(&file, true);
    let last = bodies.pop().unwrap();
    for who in strangers.clone() {
        assert_eq!(apply_as(&mut machine, who, bodies[0].clone()).class(), ReplyClass::Denied);
    }
    assert_eq!(staged(&machine), 0);
    for body in bodies {
        assert_eq!(apply_as(&mut machine, root.clone(), body).error, None);
    }
    // Nor do others end what an administrator has staged, one way or the other.
    let (content, rows) = (machine.content(), staged(&machine));
    for who in strangers {
        let abandon = step(UPLOAD, Step::Abandon(RestoreAbandon {}));
        for body in [abandon, last.clone()] {
            assert_eq!(apply_as(&mut machine, who.clone(), body).class(), ReplyClass::Denied);
        }
    }
    assert_eq!((machine.content(), staged(&machine)), (content, rows));
    assert_eq!(apply_as(&mut machine, root.clone(), last).error, None);
    assert_eq!(machine.content(), content_of(&file));

    let again = Directory::new(false);
    let check = |machine: &mut Machine, directory: &Directory, table: &str| {
        let names: Vec<String> = directory.current().users().map(|user| user.name.clone()).collect();
        assert_eq!(names, ["bob", "root"]);
        assert!(directory.is_required());
        let create = format!("CREATE TABLE {table}(a)");
        let body = machine.request_atomic(&[&create]).body.unwrap();
        assert_eq!(apply_as(machine, None, body.clone()).class(), ReplyClass::Denied);
        assert_eq!(apply_as(machine, bob.clone(), body).error, None);
    };
    check(&mut machine, &directory, "before");
    let mut machine = machine.reopen_with(settings(&again));
    check(&mut machine, &again, "after");
}
