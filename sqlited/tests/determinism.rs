//! Everything that could differ from node to node, and how each is closed.

#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

mod machine;

use machine::{Machine, text};
use resqlite::api::ReplyClass;
use sqlited::determinism::pragma::{PRAGMAS, Rule};

/// Asserts that a statement is refused, with a reason that holds these words.
fn assert_refused(machine: &mut Machine, sql: &str, words: &str) {
    let (class, message) = machine.refusal(sql);
    assert!(message.contains(words), "{sql}: {message}");
    assert_eq!(class, ReplyClass::Invalid, "{sql}: {message}");
}

#[test]
fn now_is_the_entrys_timestamp_in_every_form() {
    let mut machine = Machine::new();
    machine.ok(&[
        "CREATE TABLE t(a, b DEFAULT CURRENT_TIMESTAMP, c DEFAULT (datetime('now')))",
        "CREATE TABLE log(at)",
        "CREATE TRIGGER tr AFTER INSERT ON t BEGIN INSERT INTO log VALUES (julianday('now')); END",
    ]);
    let reply = machine.atomic(&[
        "INSERT INTO t(a) VALUES (1)",
        "SELECT b, c FROM t",
        "SELECT datetime(at) FROM log",
        "SELECT CURRENT_DATE, CURRENT_TIME, date(), strftime('%s', 'now'), unixepoch(), datetime('now', 'subsec')",
        "SELECT datetime('now', 'localtime')",
    ]);
    // The first entry's second is 12:00:01; this is the second one's.
    assert_eq!(text(&reply.results[1]), "2024-02-29 12:00:02|2024-02-29 12:00:02");
    assert_eq!(text(&reply.results[2]), "2024-02-29 12:00:02");
    let expected = "2024-02-29|12:00:02|2024-02-29|1709208002|1709208002|2024-02-29 12:00:02.000";
    assert_eq!(text(&reply.results[3]), expected);
    assert_eq!(text(&reply.results[4]), "2024-02-29 12:00:02");
}

#[test]
fn a_timestamp_beyond_sqlites_calendar_is_its_last_moment() {
    let mut machine = Machine::new();
    let request = machine.request_atomic(&["SELECT datetime('now')"]);
    let mut entry = machine.entry(request);
    entry.timestamp_ms = u64::MAX;
    let applied = machine.try_apply(&[entry]).unwrap();
    assert_eq!(text(&applied[0].reply.results[0]), "9999-12-31 23:59:59");
}

#[test]
fn random_numbers_come_from_the_requests_seed() {
    let statements = ["SELECT random(), hex(randomblob(8)), random()"];
    let once = |seed: &'static [u8]| {
        let mut machine = Machine::new();
        let mut request = machine.request_atomic(&statements);
        request.seed = seed.into();
        text(&machine.apply(request).results[0])
    };
    assert_eq!(once(b"0123456789abcdef"), once(b"0123456789abcdef"));
    assert_ne!(once(b"0123456789abcdef"), once(b"0123456789abcdeX"));
    assert_ne!(once(b"a seed that is longer than thirty-two bytes"), once(b""));
}

#[test]
fn random_numbers_differ_within_a_request_and_in_defaults_and_triggers() {
    let mut machine = Machine::new();
    machine.ok(&["CREATE TABLE t(a, b DEFAULT (random()), c DEFAULT (randomblob(4)))"]);
    machine.ok(&["INSERT INTO t(a) VALUES (1), (2), (3)"]);
    assert_eq!(machine.read("SELECT count(DISTINCT b), count(DISTINCT c), max(length(c)) FROM t"), "3|3|4");
}

#[test]
fn randomblob_takes_its_length_as_sqlite_does_and_is_bounded() {
    let mut machine = Machine::new();
    let sql = "SELECT length(randomblob(0)), length(randomblob(NULL)), length(randomblob(-5)),
               length(randomblob('16')), length(randomblob(2.9)), length(randomblob('x'))";
    assert_eq!(text(&machine.atomic(&[sql]).results[0]), "1|1|1|16|2|1");
    let (class, _) = machine.refusal("SELECT randomblob(1000000000)");
    assert_eq!(class, ReplyClass::Limit);
}

#[test]
fn last_insert_rowid_and_changes_start_afresh_for_every_request() {
    let mut machine = Machine::new();
    machine.ok(&["CREATE TABLE t(a)", "INSERT INTO t VALUES (1), (2), (3)"]);
    let reply = machine.atomic(&["SELECT last_insert_rowid(), changes(), total_changes()"]);
    assert_eq!(text(&reply.results[0]), "0|0|0");
    let reply = machine.atomic(&[
        "INSERT INTO t VALUES (4), (5)",
        "SELECT last_insert_rowid(), changes(), total_changes()",
        "UPDATE t SET a = 0 WHERE a = 99",
        "SELECT last_insert_rowid(), changes(), total_changes()",
    ]);
    assert_eq!(text(&reply.results[1]), "5|2|2");
    assert_eq!(text(&reply.results[3]), "5|0|2");
    assert_eq!(reply.results[0].rows_affected, 2);
    assert_eq!(reply.results[0].last_insert_rowid, 5);
    assert_eq!(reply.results[2].rows_affected, 0);
}

#[test]
fn changes_is_fresh_even_behind_a_trigger() {
    // SQLite puts changes() back to its old value when a trigger ends: to what an earlier request left.
    let mut machine = Machine::new();
    machine.ok(&[
        "CREATE TABLE t(a)",
        "CREATE TABLE log(a)",
        "CREATE TRIGGER tr AFTER INSERT ON t BEGIN INSERT INTO log VALUES (new.a); END",
        "INSERT INTO log VALUES (1), (2), (3)",
    ]);
    machine.ok(&["INSERT INTO t VALUES (changes()), (changes()), (changes())"]);
    assert_eq!(machine.read("SELECT group_concat(a) FROM t"), "0,0,0");
}

#[test]
fn changing_the_schema_affects_no_rows() {
    let mut machine = Machine::new();
    let reply = machine.ok(&[
        "CREATE TABLE t(a)",
        "INSERT INTO t VALUES (1), (2)",
        "CREATE TABLE u AS SELECT * FROM t",
        "ALTER TABLE t ADD COLUMN b",
        "DROP TABLE t",
    ]);
    let affected: Vec<u64> = reply.results.iter().map(|result| result.rows_affected).collect();
    assert_eq!(affected, [0, 2, 0, 0, 0]);
}

#[test]
fn localtime_is_utc_wherever_the_node_is() {
    let mut machine = Machine::new();
    let sql = "SELECT datetime('2024-07-01 12:00', 'localtime'), datetime('2024-07-01 12:00', 'utc')";
    assert_eq!(text(&machine.atomic(&[sql]).results[0]), "2024-07-01 12:00:00|2024-07-01 12:00:00");
}

#[test]
fn other_databases_are_out_of_reach() {
    let mut machine = Machine::new();
    assert_refused(&mut machine, "ATTACH 'other.db' AS other", "ATTACH");
    assert_refused(&mut machine, "ATTACH ':memory:' AS other", "ATTACH");
    assert_refused(&mut machine, "DETACH main", "DETACH");
    assert_refused(&mut machine, "VACUUM INTO '/tmp/copy.db'", "VACUUM INTO");
    assert!(!std::path::Path::new("/tmp/copy.db").exists());
}

#[test]
fn temporary_objects_are_refused() {
    let mut machine = Machine::new();
    machine.ok(&["CREATE TABLE t(a)"]);
    for sql in [
        "CREATE TEMP TABLE x(a)",
        "CREATE TABLE temp.x(a)",
        "CREATE TEMP VIEW x AS SELECT 1",
        "CREATE TEMP TRIGGER x AFTER INSERT ON t BEGIN SELECT 1; END",
        "CREATE VIRTUAL TABLE temp.x USING fts5(a)",
        "CREATE TEMP TABLE x AS SELECT * FROM t",
    ] {
        assert_refused(&mut machine, sql, "temporary objects");
    }
}

#[test]
fn transaction_control_is_refused_inside_a_request() {
    let mut machine = Machine::new();
    for sql in [
        "BEGIN",
        "BEGIN EXCLUSIVE",
        "COMMIT",
        "END",
        "ROLLBACK",
        "SAVEPOINT a",
        "RELEASE request",
        "ROLLBACK TO request",
    ] {
        assert_refused(&mut machine, sql, "are not statements of a request");
    }
    let reply = machine.script(&["CREATE TABLE t(a)", "COMMIT", "INSERT INTO t VALUES (1)"]);
    assert_eq!(reply.results.len(), 1);
    assert_eq!(reply.error.unwrap().statement, 2);
}

#[test]
fn the_text_of_our_own_statements_gives_users_no_way_in() {
    let mut machine = Machine::new();
    for sql in ["SAVEPOINT request", "RELEASE request", "COMMIT", "BEGIN IMMEDIATE", "ROLLBACK"] {
        for _ in 0..3 {
            assert_refused(&mut machine, sql, "are not statements of a request");
        }
    }
    machine.ok(&["CREATE TABLE t(a)"]);
}

#[test]
fn the_servers_own_tables_are_neither_seen_nor_touched() {
    let mut machine = Machine::new();
    machine.ok(&["CREATE TABLE t(a)", "CREATE VIEW v AS SELECT * FROM _resqlite_meta"]);
    for sql in [
        "SELECT * FROM _resqlite_meta",
        "SELECT count(*) FROM _RESQLITE_SESSIONS",
        "SELECT * FROM v",
        "INSERT INTO t SELECT applied_index FROM _resqlite_meta",
        "UPDATE _resqlite_meta SET applied_index = 0",
        "DELETE FROM _resqlite_sessions",
        "DROP TABLE _resqlite_meta",
        "ALTER TABLE _resqlite_meta RENAME TO mine",
        "ALTER TABLE _resqlite_meta ADD COLUMN x",
        "CREATE TABLE _resqlite_mine(a)",
        "CREATE TABLE _ReSqlite_mine AS SELECT 1",
        "CREATE VIEW _resqlite_view AS SELECT 1",
        "CREATE INDEX _resqlite_index ON t(a)",
        "CREATE INDEX i ON _resqlite_meta(format)",
        "CREATE TRIGGER _resqlite_trigger AFTER INSERT ON t BEGIN SELECT 1; END",
        "CREATE TRIGGER tr AFTER UPDATE ON _resqlite_meta BEGIN SELECT 1; END",
        "CREATE VIRTUAL TABLE _resqlite_fts USING fts5(a)",
        "ALTER TABLE t RENAME TO _resqlite_t",
        "CREATE TABLE child(a REFERENCES _resqlite_sessions(client_id))",
        "ALTER TABLE t ADD COLUMN b REFERENCES _Resqlite_meta(id)",
    ] {
        assert_refused(&mut machine, sql, "are the server's own");
    }
    // A trigger's body is judged when it would fire.
    machine.ok(&["CREATE TRIGGER tr AFTER INSERT ON t BEGIN DELETE FROM _resqlite_meta; END"]);
    assert_refused(&mut machine, "INSERT INTO t VALUES (1)", "are the server's own");
}

#[test]
fn analyze_of_everything_leaves_the_servers_tables_out() {
    let mut machine = Machine::new();
    machine.ok(&[
        "CREATE TABLE t(a)",
        "CREATE INDEX i ON t(a)",
        "INSERT INTO t VALUES (1), (2)",
        "ANALYZE",
        "REINDEX",
    ]);
    assert_eq!(machine.read("SELECT tbl, idx, stat FROM sqlite_stat1"), "t|i|2 1");
}

#[test]
fn functions_that_reach_outside_are_refused() {
    let mut machine = Machine::new();
    assert_refused(&mut machine, "SELECT load_extension('x')", "load_extension");
    assert_refused(&mut machine, "SELECT fts3_tokenizer('simple')", "fts3_tokenizer");
    assert_refused(&mut machine, "SELECT sqlite_log(1, 'x')", "sqlite_log");
    machine.ok(&["CREATE VIRTUAL TABLE f USING fts4(a)"]);
    assert_refused(&mut machine, "SELECT optimize(f) FROM f", "optimize");
}

#[test]
fn writes_may_not_read_what_is_local_to_the_node() {
    let mut machine = Machine::new();
    machine.ok(&[
        "CREATE TABLE t(a)",
        "CREATE VIEW v AS SELECT page_count FROM pragma_page_count()",
        "CREATE VIRTUAL TABLE f USING fts5(a)",
    ]);
    for sql in [
        "INSERT INTO t SELECT pageno FROM dbstat",
        "INSERT INTO t SELECT page_count FROM pragma_page_count",
        "INSERT INTO t SELECT rootpage FROM sqlite_schema",
        "INSERT INTO t SELECT rootpage FROM main.sqlite_master",
        "CREATE TABLE x AS SELECT rootpage FROM sqlite_schema",
        "INSERT INTO t SELECT sqlite_compileoption_get(0)",
        "INSERT INTO t SELECT bm25(f) FROM f WHERE f MATCH 'x'",
        "INSERT INTO t SELECT rank FROM f WHERE f MATCH 'x'",
        "INSERT INTO t SELECT name FROM pragma_table_list",
        "INSERT INTO t SELECT file FROM pragma_database_list",
        "SELECT * FROM pragma_function_list",
        "PRAGMA page_count",
        "PRAGMA schema_version",
    ] {
        assert_refused(&mut machine, sql, "differs from node to node");
    }
    // Through a view SQLite itself refuses it, because the schema is not trusted.
    assert_refused(&mut machine, "INSERT INTO t SELECT * FROM v", "unsafe use of virtual table");
    assert_refused(&mut machine, "EXPLAIN SELECT 1", "EXPLAIN");
    assert_refused(&mut machine, "EXPLAIN QUERY PLAN SELECT 1", "EXPLAIN");
    // What depends on the content alone is open.
    machine.ok(&[
        "INSERT INTO t SELECT name FROM sqlite_schema WHERE type = 'table' AND name = 't'",
        "INSERT INTO t SELECT name FROM pragma_table_info('t')",
    ]);
    assert_eq!(machine.read("SELECT group_concat(a) FROM t"), "t,a");
}

#[test]
fn virtual_tables_of_known_modules_only() {
    let mut machine = Machine::new();
    machine.ok(&[
        "CREATE VIRTUAL TABLE f3 USING fts3(a)",
        "CREATE VIRTUAL TABLE f4 USING fts4(a)",
        "CREATE VIRTUAL TABLE f5 USING FTS5(a)",
        "CREATE VIRTUAL TABLE fv USING fts5vocab(f5, row)",
        "CREATE VIRTUAL TABLE r USING rtree(id, x0, x1)",
    ]);
    assert_refused(&mut machine, "CREATE VIRTUAL TABLE d USING dbstat(main)", "module dbstat");
}

#[test]
fn every_refused_pragma_is_refused_with_its_reason() {
    let mut machine = Machine::new();
    for pragma in PRAGMAS {
        if let Rule::Refused(reason) = pragma.plain {
            assert_refused(&mut machine, &format!("PRAGMA {}", pragma.name), reason);
        }
        if let Rule::Refused(reason) = pragma.with_value {
            assert_refused(&mut machine, &format!("PRAGMA {} = 1", pragma.name), reason);
            assert_refused(&mut machine, &format!("PRAGMA main.{}(1)", pragma.name), reason);
        }
    }
    assert_refused(&mut machine, "PRAGMA no_such_thing = 1", "there is no such PRAGMA");
}

#[test]
fn a_refused_pragma_changes_nothing_even_though_sqlite_acts_while_preparing() {
    let mut machine = Machine::new();
    machine.ok(&["CREATE TABLE t(a CHECK (a > 0))"]);
    assert_refused(&mut machine, "PRAGMA ignore_check_constraints = ON", "would change");
    assert_refused(&mut machine, "EXPLAIN PRAGMA ignore_check_constraints = ON", "would change");
    assert_eq!(machine.refusal("INSERT INTO t VALUES (0)").0, ReplyClass::Failed);
    assert_refused(&mut machine, "PRAGMA case_sensitive_like = ON", "would change");
    assert_eq!(text(&machine.atomic(&["SELECT 'a' LIKE 'A'"]).results[0]), "1");
}

#[test]
fn replicated_pragmas_are_kept_with_the_database() {
    let mut machine = Machine::new();
    machine.ok(&["PRAGMA user_version = 42", "PRAGMA application_id(7)"]);
    let reply = machine.atomic(&["PRAGMA user_version", "PRAGMA application_id"]);
    assert_eq!((text(&reply.results[0]), text(&reply.results[1])), ("42".into(), "7".into()));
    let machine = machine.reopen();
    assert_eq!(machine.read("SELECT user_version FROM pragma_user_version"), "42");
}

#[test]
fn pragma_foreign_keys_belongs_to_the_request_as_a_whole() {
    let mut machine = Machine::new();
    for sql in ["PRAGMA foreign_keys", "PRAGMA foreign_keys = OFF", "PRAGMA foreign_keys(0)"] {
        assert_refused(&mut machine, sql, "belongs to the request as a whole");
    }
    machine.ok(&["CREATE TABLE p(id INTEGER PRIMARY KEY)", "CREATE TABLE c(p REFERENCES p)"]);
    assert_eq!(machine.refusal("INSERT INTO c VALUES (1)").1, "FOREIGN KEY constraint failed");
}

#[test]
fn defer_foreign_keys_holds_until_its_request_ends() {
    let mut machine = Machine::new();
    machine.ok(&["CREATE TABLE p(id INTEGER PRIMARY KEY)", "CREATE TABLE c(p REFERENCES p)"]);
    for _ in 0..3 {
        let reply = machine.atomic(&[
            "PRAGMA defer_foreign_keys = ON",
            "INSERT INTO c VALUES (1)",
            "INSERT OR IGNORE INTO p VALUES (1)",
            "DELETE FROM c",
        ]);
        assert_eq!(reply.error, None);
    }
    let requests = vec![
        machine.request_atomic(&["PRAGMA defer_foreign_keys = ON"]),
        machine.request_atomic(&["INSERT INTO c VALUES (9)", "DELETE FROM c"]),
    ];
    let requests = requests.into_iter().enumerate().map(|(number, mut request)| {
        request.id.as_mut().unwrap().sequence += number as u64;
        request
    });
    let replies = machine.apply_all(requests.collect());
    assert_eq!(replies[1].error.as_ref().unwrap().message, "FOREIGN KEY constraint failed");
}

#[test]
fn the_highest_rowid_is_refused_because_later_ones_would_be_random() {
    let mut machine = Machine::new();
    machine.ok(&[
        "CREATE TABLE t(a)",
        "CREATE TABLE s(id INTEGER PRIMARY KEY, a)",
        "CREATE VIRTUAL TABLE f USING fts5(a)",
    ]);
    for sql in [
        "INSERT INTO t(rowid, a) VALUES (9223372036854775807, 1)",
        "INSERT INTO s VALUES (9223372036854775807, 1)",
        "UPDATE s SET id = 9223372036854775807",
        "INSERT INTO f(rowid, a) VALUES (9223372036854775807, 'x')",
    ] {
        machine.ok(&["INSERT INTO s VALUES (1, 1) ON CONFLICT DO NOTHING"]);
        let (class, message) = machine.refusal(sql);
        assert_eq!(class, ReplyClass::Failed, "{sql}");
        assert!(message.contains("highest rowid"), "{sql}: {message}");
    }
    assert_eq!(machine.read("SELECT count(*) FROM t"), "0");
    machine.ok(&["INSERT INTO t(rowid, a) VALUES (9223372036854775806, 1)"]);
    // The row after it would be the highest.
    assert!(machine.refusal("INSERT INTO t(a) VALUES (1)").1.contains("highest rowid"));
}

#[test]
fn the_highest_rowid_is_noticed_when_a_table_is_copied_whole() {
    let mut machine = Machine::new();
    machine.ok(&["CREATE TABLE t(id INTEGER PRIMARY KEY, a)", "CREATE TABLE u(id INTEGER PRIMARY KEY, a)"]);
    // SQLite copies such tables page by page, without looking at the rows. The first table can only have
    // the row if it came with a file; a statement that moves it there and on in one request is as good.
    let reply = machine
        .atomic(&["INSERT INTO t VALUES (9223372036854775806, 1)", "INSERT INTO u SELECT id, a FROM t"]);
    assert_eq!(reply.error, None);
    let path = machine.path();
    let outside = rusqlite::Connection::open(path).unwrap();
    outside.execute("UPDATE t SET id = 9223372036854775807", []).unwrap();
    drop(outside);
    assert!(machine.refusal("INSERT INTO u SELECT * FROM t").1.contains("highest rowid"));
}

#[test]
fn statistics_written_by_hand_hold_at_once_as_after_a_restart() {
    // Which table is the outer one of the join, and so which row comes first, goes by the statistics.
    let setup = [
        "CREATE TABLE t(a)",
        "CREATE INDEX ta ON t(a)",
        "CREATE TABLE u(a)",
        "CREATE INDEX ua ON u(a)",
        "INSERT INTO t VALUES (2), (1)",
        "INSERT INTO u VALUES (1), (2)",
        "ANALYZE sqlite_schema",
        "INSERT INTO sqlite_stat1 VALUES ('t', 'ta', '10 1'), ('u', 'ua', '1000000 1')",
    ];
    let pick = "SELECT t.a FROM t JOIN u ON t.a = u.a LIMIT 1";
    let turn = "UPDATE sqlite_stat1 SET stat = iif(tbl = 't', '1000000 1', '10 1')";
    let first = |restart: bool| {
        let mut machine = Machine::new();
        machine.ok(&setup);
        let before = text(&machine.atomic(&[pick]).results[0]);
        machine.ok(&[turn]);
        if restart {
            machine = machine.reopen();
        }
        (before, text(&machine.atomic(&[pick]).results[0]))
    };
    assert_eq!(first(true), ("2".to_owned(), "1".to_owned()));
    assert_eq!(first(false), first(true));
}

#[test]
fn a_rolled_back_analyze_leaves_no_statistics_in_memory() {
    let setup = ["CREATE TABLE t(a, b)", "CREATE INDEX ia ON t(a)", "CREATE INDEX ib ON t(b)", "ANALYZE"];
    let fill = "WITH RECURSIVE n(i) AS (VALUES (1) UNION ALL SELECT i + 1 FROM n WHERE i < 1000)
                INSERT INTO t SELECT i % 2, i FROM n";
    let mut live = Machine::new();
    live.ok(&setup);
    live.ok(&[fill]);
    assert!(live.atomic(&["ANALYZE", "INSERT INTO nowhere VALUES (1)"]).error.is_some());
    let mut restarted = Machine::new();
    restarted.ok(&setup);
    restarted.ok(&[fill]);
    restarted.skip_to(4);
    let mut restarted = restarted.reopen();
    let pick = "SELECT rowid, a, b FROM t WHERE a = 1 AND b > 3 LIMIT 1";
    let live = live.atomic(&[pick]);
    assert_eq!(live.results, restarted.atomic(&[pick]).results);
}

#[test]
fn a_dump_with_statistics_and_sequences_is_applied() {
    let mut machine = Machine::new();
    machine.ok(&[
        "CREATE TABLE t(id INTEGER PRIMARY KEY AUTOINCREMENT, a)",
        "CREATE INDEX i ON t(a)",
        "INSERT INTO t VALUES (1, 'x')",
        "ANALYZE sqlite_master",
        "INSERT INTO sqlite_stat1 VALUES ('t', 'i', '1000 10')",
        "DELETE FROM sqlite_sequence",
        "INSERT INTO sqlite_sequence VALUES ('t', 99)",
        "INSERT INTO t(a) VALUES ('y')",
    ]);
    assert_eq!(machine.read("SELECT group_concat(id) FROM t"), "1,100");
}

#[test]
fn the_schema_table_cannot_be_written() {
    let mut machine = Machine::new();
    assert!(machine.refusal("UPDATE sqlite_schema SET sql = ''").1.contains("may not be modified"));
    assert_refused(&mut machine, "PRAGMA writable_schema = ON", "corrupt");
    machine.ok(&["CREATE VIRTUAL TABLE f USING fts5(a)"]);
    assert!(machine.refusal("DELETE FROM f_data").1.contains("may not be modified"));
}

#[test]
fn double_quoted_strings_are_sqlites_default() {
    let mut machine = Machine::new();
    machine.ok(&[
        "CREATE TABLE t(a DEFAULT \"x\")",
        "INSERT INTO t VALUES (\"y\")",
        "INSERT INTO t DEFAULT VALUES",
    ]);
    assert_eq!(machine.read("SELECT group_concat(a) FROM t"), "y,x");
}

#[test]
fn a_statement_that_is_more_or_less_than_one_is_refused() {
    let mut machine = Machine::new();
    assert_refused(&mut machine, "SELECT 1; SELECT 2", "more than one");
    assert_refused(&mut machine, "SELECT 1; nonsense", "more than one");
    assert_refused(&mut machine, "", "empty");
    assert_refused(&mut machine, " -- nothing\n", "empty");
    assert_refused(&mut machine, "SELECT 1\0; DROP TABLE x", "NUL");
    assert_eq!(machine.atomic(&["SELECT 1; -- and no more"]).error, None);
    assert_eq!(machine.atomic(&["/* first */ SELECT 1 ;; "]).error, None);
}

#[test]
fn a_table_made_from_columns_of_one_name_is_refused_where_their_names_would_be_random() {
    let mut machine = Machine::new();
    machine.ok(&["CREATE TABLE few AS SELECT 1 a, 2 a, 3 a, 4 a"]);
    assert_eq!(machine.read("SELECT \"a:3\" FROM few"), "4");
    let (class, message) = machine.refusal("CREATE TABLE many AS SELECT 1 a, 2 a, 3 a, 4 a, 5 a");
    assert_eq!(class, ReplyClass::Invalid, "{message}");
    assert!(message.contains("random names"), "{message}");
}

#[test]
fn a_pragma_behind_a_statement_does_not_reach_the_next_request() {
    let mut machine = Machine::new();
    machine
        .ok(&["CREATE TABLE parent(id INTEGER PRIMARY KEY)", "CREATE TABLE child(id REFERENCES parent(id))"]);
    // SQLite takes `$a('); …` for a parameter that ends at the parenthesis, and what follows for another statement.
    let smuggled = "SELECT $a('); PRAGMA defer_foreign_keys=ON; --'";
    let (first, second) =
        (machine.request_atomic(&[smuggled]), machine.request_atomic(&["INSERT INTO child VALUES (1)"]));
    let replies = machine.apply_all(vec![first, second]);
    assert!(replies[0].error.is_some());
    assert!(replies[1].error.is_some(), "enforced at once, as always");
}
