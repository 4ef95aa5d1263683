//! Optimistic transactions, as the state machine judges them: which statements count as a change of which
//! tables, what a read depends on, and that every node says the same.

#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

mod machine;

use std::collections::BTreeSet;

use machine::{Machine, atomic, list, statement};
use resqlite::api::{LoggedRequest, ReadSet, ReplyClass, RequestId, StoredReply, logged_request::Body};
use rusqlite::{Connection, OpenFlags};
use sqlited::{apply::ApplySettings, versions::SCHEMA_NAME};

/// The stored versions: names with the log index of their last change.
fn versions(machine: &Machine) -> Vec<(String, u64)> {
    let connection = Connection::open_with_flags(machine.path(), OpenFlags::SQLITE_OPEN_READ_ONLY).unwrap();
    let mut statement = connection.prepare("SELECT name, log_index FROM _resqlite_versions").unwrap();
    let rows = statement.query_map([], |row| Ok((row.get(0)?, row.get::<_, i64>(1)? as u64))).unwrap();
    rows.collect::<rusqlite::Result<_>>().unwrap()
}

/// The tables that count as changed by this request.
fn changed(machine: &mut Machine, sql: &str) -> Vec<String> {
    let reply = machine.atomic(&[sql]);
    assert_eq!(reply.error, None, "{sql}");
    let names = versions(machine).into_iter().filter(|(_, index)| *index == reply.log_index);
    names.map(|(name, _)| name).collect()
}

/// What a read depends on: tables, and whether it is everything.
fn reads(machine: &Machine, sql: &str) -> (Vec<String>, bool) {
    let reader = machine.reader();
    reader.learn_virtual_tables().unwrap();
    let mut seen = (BTreeSet::new(), false);
    let noted = |facts: &sqlited::determinism::authorizer::StatementFacts| {
        seen = (facts.read_tables.clone(), facts.reads_everything);
        Ok(None)
    };
    reader.read_noting(sql, noted, |statement| statement.query([])?.next().map(drop)).unwrap();
    (seen.0.into_iter().collect(), seen.1)
}

fn committing(machine: &Machine, index: u64, tables: &[&str], sql: &str) -> LoggedRequest {
    let tables = tables.iter().map(|table| (*table).to_owned()).collect();
    let reads = Some(ReadSet { index, tables, ..ReadSet::default() });
    LoggedRequest { reads, ..machine.request_atomic(&[sql]) }
}

fn conflict(reply: &StoredReply) -> &str {
    assert_eq!(reply.class(), ReplyClass::Aborted, "{reply:?}");
    let error = reply.error.as_ref().unwrap();
    assert_eq!((error.name.as_str(), error.statement), ("SQLITE_BUSY_SNAPSHOT", 0));
    assert!(reply.results.is_empty());
    &error.message
}

const SCHEMA: [&str; 11] = [
    "CREATE TABLE t(a INTEGER PRIMARY KEY, b)",
    "CREATE TABLE u(a INTEGER PRIMARY KEY, b) WITHOUT ROWID",
    "CREATE TABLE Log(what)",
    "CREATE TABLE p(id INTEGER PRIMARY KEY)",
    "CREATE TABLE c(p REFERENCES p ON DELETE CASCADE ON UPDATE SET NULL)",
    "CREATE TABLE d(p REFERENCES p ON DELETE SET NULL)",
    "CREATE VIEW v AS SELECT t.a, u.b FROM t JOIN u USING (a)",
    "CREATE TRIGGER t_log AFTER INSERT ON t BEGIN INSERT INTO log VALUES (new.a); END",
    "CREATE TRIGGER v_insert INSTEAD OF INSERT ON v BEGIN INSERT INTO u VALUES (new.a, new.b); END",
    "CREATE VIRTUAL TABLE f USING fts5(a)",
    "CREATE VIRTUAL TABLE r USING rtree(id, x0, x1)",
];

#[test]
fn a_statement_counts_as_a_change_of_every_table_that_it_may_write() {
    let mut machine = Machine::new();
    machine.ok(&SCHEMA);
    machine.ok(&["CREATE TABLE f_notes(a)"]);
    let mut check = |sql: &str, tables: &[&str]| assert_eq!(changed(&mut machine, sql), tables, "{sql}");
    check("INSERT INTO T VALUES (1, 1)", &["log", "t"]);
    check("UPDATE t SET b = 2 WHERE a = 99", &["t"]);
    check("INSERT INTO u VALUES (1, 1)", &["u"]);
    check("DELETE FROM u", &["u"]);
    check("INSERT INTO v(a, b) VALUES (2, 2)", &["u", "v"]);
    check("INSERT INTO p VALUES (1), (2), (3)", &["p"]);
    check("DELETE FROM p WHERE id = 1", &["c", "d", "p"]);
    check("UPDATE p SET id = 9 WHERE id = 2", &["c", "p"]);
    check("INSERT OR REPLACE INTO p VALUES (3)", &["c", "d", "p"]);
    check("INSERT INTO c VALUES (3)", &["c"]);
    check("INSERT INTO f VALUES ('some words')", &["f"]);
    check("INSERT INTO r VALUES (1, 0, 1)", &["r"]);
    check("INSERT INTO f_notes VALUES (1)", &["f_notes"]);
    check("INSERT INTO f_notes SELECT a FROM f", &["f"]);
    check("SELECT count(*) FROM t", &[]);
    check("PRAGMA user_version = 7", &[SCHEMA_NAME]);
    check("CREATE TABLE n(a)", &[SCHEMA_NAME]);
    check("ALTER TABLE n ADD COLUMN b", &[SCHEMA_NAME]);
    check("DROP TABLE n", &[SCHEMA_NAME]);
    check("VACUUM", &[SCHEMA_NAME]);
}

#[test]
fn the_actions_of_foreign_keys_count_whenever_they_are_enforced() {
    let mut machine = Machine::new();
    machine.ok(&SCHEMA);
    let sql = "DELETE FROM p WHERE id = 1";
    // Seen often enough to be kept prepared, in either setting.
    for foreign_keys in [false, false, false, true, true, true, false] {
        let request = LoggedRequest { foreign_keys, ..machine.request_atomic(&[sql]) };
        let index = machine.apply(request).log_index;
        let names = versions(&machine).into_iter().filter(|(_, version)| *version == index);
        let names: Vec<String> = names.map(|(name, _)| name).collect();
        assert_eq!(names, if foreign_keys { vec!["c", "d", "p"] } else { vec!["p"] });
    }
}

#[test]
fn a_read_depends_on_the_base_tables_of_all_that_it_names() {
    let mut machine = Machine::new();
    machine.ok(&SCHEMA);
    machine.ok(&["CREATE TABLE s(a INTEGER PRIMARY KEY AUTOINCREMENT)"]);
    let tables = |sql: &str| {
        let (tables, everything) = reads(&machine, sql);
        assert!(!everything, "{sql}");
        tables
    };
    assert_eq!(tables("SELECT b FROM T WHERE a = 1"), ["t"]);
    assert_eq!(tables("SELECT count(*) FROM t"), ["t"]);
    assert_eq!(tables("SELECT rowid FROM log"), ["log"]);
    assert!(tables("SELECT 1").is_empty());
    assert_eq!(tables("SELECT 1 WHERE EXISTS (SELECT 1 FROM u)"), ["u"]);
    assert_eq!(tables("SELECT a FROM t UNION SELECT a FROM u"), ["t", "u"]);
    let of_view = tables("SELECT a FROM v");
    assert!(["t", "u"].iter().all(|table| of_view.contains(&(*table).to_owned())), "{of_view:?}");
    let of_cte = tables("WITH x AS (SELECT a FROM t) SELECT count(*) FROM x, p");
    assert!(["t", "p"].iter().all(|table| of_cte.contains(&(*table).to_owned())), "{of_cte:?}");
    // More than names can tell.
    for sql in [
        "SELECT * FROM f",
        "SELECT count(*) FROM f",
        "SELECT rowid FROM f('word')",
        "SELECT * FROM f_content",
        "SELECT * FROM r",
        "SELECT * FROM sqlite_sequence",
        "PRAGMA foreign_key_check",
        "SELECT * FROM pragma_foreign_key_check",
    ] {
        assert!(reads(&machine, sql).1, "{sql}");
    }
}

#[test]
fn writes_are_executed_only_if_no_table_that_was_read_has_changed() {
    let mut machine = Machine::new();
    machine.ok(&SCHEMA);
    let index = machine.ok(&["INSERT INTO t VALUES (1, 1)", "INSERT INTO u VALUES (1, 1)"]).log_index;
    let first = committing(&machine, index, &[SCHEMA_NAME, "t"], "UPDATE t SET b = b + 1");
    assert_eq!(machine.apply(first).error, None);
    let second = committing(&machine, index, &[SCHEMA_NAME, "t"], "UPDATE t SET b = b + 1");
    let reply = machine.apply(second);
    let expected =
        format!("the table t, read by the transaction at index {index}, was changed at index {}", index + 1);
    assert_eq!(conflict(&reply), expected);
    assert_eq!(machine.read("SELECT b FROM t"), "2");

    let other = committing(&machine, index, &[SCHEMA_NAME, "u"], "UPDATE u SET b = b + 1");
    assert_eq!(machine.apply(other).error, None);
    let newer = committing(&machine, index + 1, &["t"], "UPDATE t SET b = b + 1");
    assert_eq!(machine.apply(newer).error, None);

    machine.ok(&["CREATE TABLE n(a)"]);
    let after_ddl = committing(&machine, index + 4, &[SCHEMA_NAME, "u"], "UPDATE u SET b = b + 1");
    assert!(conflict(&machine.apply(after_ddl)).starts_with("the schema, read by"));
}

#[test]
fn who_has_read_everything_loses_to_any_change_and_to_none() {
    let mut machine = Machine::new();
    machine.ok(&SCHEMA);
    let index = machine.ok(&["INSERT INTO u VALUES (1, 1)"]).log_index;
    let everything = |machine: &Machine, index| {
        let reads = Some(ReadSet { index, everything: true, ..ReadSet::default() });
        LoggedRequest { reads, ..machine.request_atomic(&["INSERT INTO log VALUES (1)"]) }
    };
    let request = everything(&machine, index);
    assert_eq!(machine.apply(request).error, None);
    let request = everything(&machine, index);
    assert!(conflict(&machine.apply(request)).contains("something"));
}

#[test]
fn what_was_rolled_back_changed_nothing() {
    let mut machine = Machine::new();
    machine.ok(&SCHEMA);
    let before = versions(&machine);
    assert!(machine.atomic(&["INSERT INTO t VALUES (1, 1)", "INSERT INTO t VALUES (1, 1)"]).error.is_some());
    assert!(machine.atomic(&["INSERT OR ROLLBACK INTO p VALUES (1), (1)"]).error.is_some());
    assert!(machine.atomic(&["CREATE TABLE n(a)", "no SQL"]).error.is_some());
    assert_eq!(versions(&machine), before);
    // Of a script the statements before the error stand.
    let reply = machine.script(&["INSERT INTO u VALUES (1, 1)", "INSERT INTO p VALUES (1), (1)"]);
    let after: Vec<_> = versions(&machine).into_iter().filter(|version| !before.contains(version)).collect();
    assert_eq!(after, [("u".to_owned(), reply.log_index)]);
}

#[test]
fn a_commit_that_is_sent_again_gets_the_first_outcome() {
    let mut machine = Machine::new();
    machine.ok(&SCHEMA);
    let index = machine.ok(&["INSERT INTO u VALUES (1, 1)"]).log_index;
    let named = |mut request: LoggedRequest, sequence| {
        let client_id = vec![9; 16].into();
        request.id = Some(RequestId { client_id, sequence, acknowledged_below: 1, made_at_index: index });
        LoggedRequest { server_made_id: false, ..request }
    };
    let lost = |machine: &Machine| {
        let reads = Some(ReadSet { lost: "it is gone".into(), ..ReadSet::default() });
        LoggedRequest { reads, ..machine.request_atomic(&["UPDATE u SET b = b + 1"]) }
    };
    let commit = named(committing(&machine, index, &["u"], "UPDATE u SET b = b + 1"), 1);
    let first = machine.apply(commit);
    assert_eq!(first.error, None);
    // Another node knows nothing of the transaction; the log does.
    let again = named(lost(&machine), 1);
    assert_eq!(machine.apply(again), first);
    // What never came before is refused, and stays refused should it come late.
    let unknown = named(lost(&machine), 2);
    let refusal = machine.apply(unknown);
    assert_eq!(conflict(&refusal), "it is gone");
    let late = named(committing(&machine, index + 1, &["p"], "UPDATE u SET b = b + 1"), 2);
    assert_eq!(machine.apply(late), refusal);
    assert_eq!(machine.read("SELECT b FROM u"), "2");
}

#[test]
fn versions_are_the_same_however_entries_are_grouped() {
    let statements = [
        "INSERT INTO t(b) VALUES (random())",
        "INSERT INTO f VALUES ('some words')",
        "UPDATE u SET b = 1",
        "INSERT OR ROLLBACK INTO p VALUES (1)",
        "DELETE FROM p",
        "INSERT INTO r VALUES (1, 0, 1)",
        "SELECT count(*) FROM r",
        "UPDATE t SET b = (SELECT count(*) FROM r) WHERE a = 1",
        "CREATE TABLE IF NOT EXISTS n(a)",
        "DROP TABLE IF EXISTS n",
        "VACUUM",
        "ANALYZE",
        "no SQL",
        "INSERT INTO f_data VALUES (1, 1)",
        "DELETE FROM log",
        "INSERT INTO v(a, b) VALUES (random(), 1)",
    ];
    let bodies = |seed: u64| {
        let mut state = seed;
        let mut below = move |end: usize| {
            // SplitMix64: any sequence will do, as long as a seed gives the same one.
            state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mixed = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            ((mixed ^ (mixed >> 31)) % end as u64) as usize
        };
        let mut bodies = vec![Body::Script(list(&SCHEMA))];
        for _ in 0..60 {
            let chosen: Vec<&str> = (0..1 + below(3)).map(|_| statements[below(statements.len())]).collect();
            bodies.push(if below(2) == 0 {
                Body::Script(list(&chosen))
            } else {
                atomic(chosen.iter().map(|sql| statement(sql, [])).collect())
            });
        }
        bodies
    };
    for seed in 0..10 {
        let mut one_by_one = Machine::with(ApplySettings { group_entries: 1, ..ApplySettings::default() });
        let mut grouped = Machine::new();
        let mut requests: Vec<LoggedRequest> =
            (1..).zip(bodies(seed)).map(|(index, body)| machine::request(index, body)).collect();
        // Every third is a transaction that has read a table some entries ago.
        for (index, request) in (1u64..).zip(&mut requests).filter(|(index, _)| index % 3 == 0) {
            let tables = vec!["t".to_owned(), "u".to_owned()];
            let everything = index % 9 == 0;
            request.reads = Some(ReadSet { index: index - 3, tables, everything, ..ReadSet::default() });
        }
        let replies = grouped.apply_all(requests.clone());
        let halves = requests.split_at(requests.len() / 2);
        let mut others = one_by_one.apply_all(halves.0.to_vec());
        one_by_one = one_by_one.reopen();
        others.extend(one_by_one.apply_all(halves.1.to_vec()));
        assert_eq!(replies, others, "seed {seed}");
        assert_eq!(versions(&grouped), versions(&one_by_one), "seed {seed}");
        assert!(!versions(&grouped).is_empty());
    }
}
