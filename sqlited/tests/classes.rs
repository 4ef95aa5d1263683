//! What a statement is, as a reading connection tells it: SQLite's parser says so, never the text.

#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

mod machine;

use machine::Machine;
use sqlited::determinism::{Class, ForeignKeysPragma, TransactionKind};

fn machine() -> Machine {
    let mut machine = Machine::new();
    machine.ok(&["CREATE TABLE t(a)", "CREATE VIRTUAL TABLE f USING fts5(a)"]);
    machine
}

#[test]
fn reads_are_known_as_such() {
    let reader = machine().reader();
    for sql in [
        "SELECT * FROM t",
        "WITH x AS (SELECT 1) SELECT * FROM x",
        "VALUES (1)",
        "EXPLAIN DELETE FROM t",
        "EXPLAIN QUERY PLAN INSERT INTO t VALUES (1)",
        "PRAGMA table_info(t)",
        "PRAGMA user_version",
        "PRAGMA page_count",
        "PRAGMA integrity_check",
        "SELECT * FROM dbstat",
        "SELECT rootpage FROM sqlite_schema",
        "SELECT * FROM pragma_database_list",
        "SELECT rank FROM f WHERE f MATCH 'x' -- and a comment",
        "SELECT datetime('now'), random(), last_insert_rowid()",
    ] {
        assert_eq!(reader.classify(sql), Class::ReadOnly, "{sql}");
    }
}

#[test]
fn writes_are_known_as_such() {
    let reader = machine().reader();
    for sql in [
        "INSERT INTO t VALUES (1)",
        "WITH x AS (SELECT 1) INSERT INTO t SELECT * FROM x",
        "INSERT INTO t VALUES (1) RETURNING a",
        "DELETE FROM t",
        "CREATE TABLE u(a)",
        "CREATE TABLE IF NOT EXISTS t(a)",
        "DROP TABLE t",
        "ALTER TABLE t RENAME TO u",
        "ANALYZE",
        "REINDEX",
        "VACUUM",
        "PRAGMA user_version = 5",
        "PRAGMA defer_foreign_keys = ON",
    ] {
        assert_eq!(reader.classify(sql), Class::Write, "{sql}");
    }
}

#[test]
fn transactions_and_the_foreign_keys_setting_are_told_apart() {
    let reader = machine().reader();
    use TransactionKind::{Begin, Commit, Rollback, Savepoint};
    for (sql, kind) in [
        ("BEGIN", Begin),
        ("BEGIN IMMEDIATE TRANSACTION", Begin),
        ("COMMIT", Commit),
        ("END", Commit),
        ("ROLLBACK", Rollback),
        ("SAVEPOINT a", Savepoint),
        ("RELEASE a", Savepoint),
        ("ROLLBACK TO a", Savepoint),
    ] {
        assert_eq!(reader.classify(sql), Class::Transaction(kind), "{sql}");
    }
    use ForeignKeysPragma::{Off, On, Read};
    for (sql, pragma) in [
        ("PRAGMA foreign_keys", Read),
        ("PRAGMA foreign_keys=OFF", Off),
        ("PRAGMA main.foreign_keys = yes", On),
        ("pragma FOREIGN_KEYS(1)", On),
    ] {
        assert_eq!(reader.classify(sql), Class::ForeignKeysPragma(pragma), "{sql}");
    }
    // Nothing of this has touched the reader itself.
    assert!(reader.connection().is_autocommit());
    let off: i64 = reader.connection().query_row("PRAGMA foreign_keys", [], |row| row.get(0)).unwrap();
    assert_eq!(off, 0);
    assert_eq!(reader.classify("PRAGMA foreign_keys = ON"), Class::ForeignKeysPragma(On));
    assert_eq!(
        reader.connection().query_row("PRAGMA foreign_keys", [], |row| row.get::<_, i64>(0)).unwrap(),
        off
    );
}

#[test]
fn nothing_is_empty() {
    let reader = machine().reader();
    for sql in ["", "  ", ";", "-- comment", "/* comment */ ;"] {
        assert_eq!(reader.classify(sql), Class::Empty, "{sql}");
    }
}

fn unpreparable(sql: &str) -> (String, bool) {
    match machine().reader().classify(sql) {
        Class::Unpreparable { error, depends_on_schema } => (error.message, depends_on_schema),
        other => panic!("{sql}: {other:?}"),
    }
}

#[test]
fn what_cannot_be_parsed_does_not_depend_on_the_schema() {
    for sql in [
        "SELEC 1",
        "SELECT",
        "SELECT * FROM t WHERE",
        "SELECT 'open",
        "CREATE TABLE",
        "SELECT 1; SELECT 2",
        "SELECT \0",
        "SELECT #",
    ] {
        let (message, depends_on_schema) = unpreparable(sql);
        assert!(!depends_on_schema, "{sql}: {message}");
    }
}

#[test]
fn what_fails_against_the_schema_may_succeed_elsewhere() {
    for sql in
        ["SELECT * FROM nowhere", "INSERT INTO t(b) VALUES (1)", "CREATE TABLE t(a)", "SELECT nofunction(1)"]
    {
        let (message, depends_on_schema) = unpreparable(sql);
        assert!(depends_on_schema, "{sql}: {message}");
    }
}

#[test]
fn refusals_carry_their_reason() {
    for (sql, words) in [
        ("ATTACH 'x' AS y", "ATTACH"),
        ("PRAGMA journal_mode = DELETE", "write-ahead log"),
        ("PRAGMA optimize", "connection's history"),
        ("SELECT * FROM _resqlite_meta", "server's own"),
        ("CREATE TEMP TABLE x(a)", "temporary"),
        ("INSERT INTO t SELECT pageno FROM dbstat", "differs from node to node"),
        ("SELECT load_extension('x')", "load_extension"),
    ] {
        let (message, depends_on_schema) = unpreparable(sql);
        assert!(message.contains(words) && !depends_on_schema, "{sql}: {message}");
    }
}

#[test]
fn a_reader_reads_and_nothing_else() {
    let machine = machine();
    let reader = machine.reader();
    for sql in [
        "INSERT INTO t VALUES (1)",
        "BEGIN",
        "SAVEPOINT x",
        "PRAGMA user_version = 3",
        "PRAGMA foreign_keys = ON",
        "SELECT * FROM _resqlite_meta",
    ] {
        assert!(reader.read(sql, |statement| statement.raw_execute()).is_err(), "{sql}");
    }
    assert!(reader.connection().is_autocommit());
}
