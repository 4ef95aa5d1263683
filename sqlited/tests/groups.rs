//! A group of entries in one transaction must mean what the entries mean one by one.

#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

mod machine;

use machine::{Machine, content, statement, text};
use resqlite::api::{LogEntry, LoggedRequest, ReplyClass, StoredReply};
use sqlited::apply::{ApplySettings, REQUEST_FORMAT};

/// Applies requests once as one group and once each in a group of its own, and demands the same replies
/// and content. Gives the replies and the machine.
fn alike(setup: &[&str], requests: &[fn(&Machine) -> LoggedRequest]) -> (Vec<StoredReply>, Machine) {
    let run = |settings: ApplySettings| {
        let mut machine = Machine::with(settings);
        if !setup.is_empty() {
            machine.ok(setup);
        }
        let entries: Vec<LogEntry> = requests
            .iter()
            .map(|make| {
                let request = make(&machine);
                machine.entry(request)
            })
            .collect();
        let applied = machine.try_apply(&entries).unwrap();
        let replies: Vec<StoredReply> = applied.iter().map(|applied| (*applied.reply).clone()).collect();
        (replies, machine)
    };
    let (together, machine) = run(ApplySettings::default());
    let (apart, other) = run(ApplySettings { group_entries: 1, ..ApplySettings::default() });
    assert_eq!(together, apart);
    assert_eq!(content(&machine.path()), content(&other.path()));
    assert_eq!(machine.applier.position(), other.applier.position());
    (together, machine)
}

fn classes(replies: &[StoredReply]) -> Vec<ReplyClass> {
    replies.iter().map(StoredReply::class).collect()
}

#[test]
fn or_rollback_fails_its_own_request_only() {
    let (replies, machine) = alike(
        &["CREATE TABLE t(a UNIQUE)"],
        &[
            |machine| machine.request_atomic(&["INSERT INTO t VALUES (1)"]),
            |machine| {
                machine.request_atomic(&["INSERT INTO t VALUES (2)", "INSERT OR ROLLBACK INTO t VALUES (1)"])
            },
            |machine| machine.request_atomic(&["INSERT INTO t VALUES (3)"]),
        ],
    );
    assert_eq!(classes(&replies), [ReplyClass::Ok, ReplyClass::Failed, ReplyClass::Ok]);
    let error = replies[1].error.as_ref().unwrap();
    assert_eq!((error.statement, error.name.as_str()), (2, "SQLITE_CONSTRAINT_UNIQUE"));
    assert_eq!(machine.read("SELECT group_concat(a) FROM t"), "1,3");
}

#[test]
fn raise_rollback_fails_its_own_request_only() {
    let (replies, machine) = alike(
        &[
            "CREATE TABLE t(a)",
            "CREATE TRIGGER tr BEFORE INSERT ON t WHEN new.a < 0 BEGIN SELECT RAISE(ROLLBACK, 'negative'); END",
        ],
        &[
            |machine| machine.request_atomic(&["INSERT INTO t VALUES (1)"]),
            |machine| {
                machine.request_script(&[
                    "INSERT INTO t VALUES (2)",
                    "INSERT INTO t VALUES (-1)",
                    "INSERT INTO t VALUES (3)",
                ])
            },
            |machine| machine.request_atomic(&["INSERT INTO t VALUES (4)"]),
            |machine| machine.request_atomic(&["INSERT INTO t VALUES (-4)"]),
            |machine| machine.request_atomic(&["INSERT INTO t VALUES (5)"]),
        ],
    );
    assert_eq!(replies[1].error.as_ref().unwrap().message, "negative");
    assert_eq!(replies[1].results.len(), 1);
    assert_eq!(machine.read("SELECT group_concat(a) FROM t"), "1,2,4,5");
}

#[test]
fn or_fail_and_raise_fail_leave_nothing_of_their_statement() {
    let (replies, machine) = alike(
        &[
            "CREATE TABLE t(a PRIMARY KEY)",
            "CREATE TRIGGER no BEFORE INSERT ON t WHEN new.a = 13 BEGIN SELECT RAISE(FAIL, 'no'); END",
        ],
        &[
            |machine| machine.request_script(&["INSERT OR FAIL INTO t VALUES (1), (1)"]),
            |machine| machine.request_atomic(&["INSERT INTO t VALUES (2), (13)"]),
            |machine| machine.request_atomic(&["INSERT INTO t VALUES (3)"]),
        ],
    );
    use ReplyClass::{Failed, Ok};
    assert_eq!(classes(&replies), [Failed, Failed, Ok]);
    assert_eq!(machine.read("SELECT group_concat(a) FROM t"), "3");
}

#[test]
fn autoincrement_at_its_end_fails_its_own_request_only() {
    let (replies, machine) = alike(
        &[
            "CREATE TABLE t(id INTEGER PRIMARY KEY AUTOINCREMENT, a)",
            "CREATE TABLE u(a)",
            "INSERT INTO t(a) VALUES (1)",
            "UPDATE sqlite_sequence SET seq = 9223372036854775807",
        ],
        &[
            |machine| machine.request_atomic(&["INSERT INTO u VALUES (1)"]),
            |machine| machine.request_atomic(&["INSERT INTO u VALUES (2)", "INSERT INTO t(a) VALUES (2)"]),
            |machine| machine.request_atomic(&["INSERT INTO u VALUES (3)"]),
        ],
    );
    assert_eq!(replies[1].error.as_ref().unwrap().name, "SQLITE_FULL");
    assert_eq!(machine.read("SELECT group_concat(a) FROM u"), "1,3");
}

#[test]
fn a_deferred_foreign_key_fails_its_own_request_and_not_the_groups_commit() {
    let (replies, machine) = alike(
        &[
            "CREATE TABLE p(id INTEGER PRIMARY KEY)",
            "CREATE TABLE c(p REFERENCES p DEFERRABLE INITIALLY DEFERRED)",
        ],
        &[
            |machine| machine.request_atomic(&["INSERT INTO p VALUES (1)"]),
            |machine| machine.request_atomic(&["INSERT INTO c VALUES (2)"]),
            |machine| machine.request_atomic(&["INSERT INTO c VALUES (3)", "INSERT INTO p VALUES (3)"]),
            |machine| machine.request_script(&["INSERT INTO c VALUES (4)", "INSERT INTO p VALUES (4)"]),
            |machine| machine.request_atomic(&["INSERT INTO c VALUES (1)"]),
        ],
    );
    use ReplyClass::{Failed, Ok};
    assert_eq!(classes(&replies), [Ok, Failed, Ok, Failed, Ok]);
    let error = replies[3].error.as_ref().unwrap();
    assert_eq!((error.statement, error.name.as_str()), (1, "SQLITE_CONSTRAINT_FOREIGNKEY"));
    assert_eq!(machine.read("SELECT group_concat(p) FROM c"), "3,1");
}

#[test]
fn parents_of_earlier_orphans_forgive_no_later_violation_and_the_group_commits() {
    // SQLite's count of violations goes below zero when orphans from before get their parents.
    let (replies, machine) = alike(
        &[
            "CREATE TABLE p(id INTEGER PRIMARY KEY)",
            "CREATE TABLE c(p REFERENCES p DEFERRABLE INITIALLY DEFERRED)",
        ],
        &[
            |machine| LoggedRequest {
                foreign_keys: false,
                ..machine.request_atomic(&["INSERT INTO c VALUES (1), (1), (1)"])
            },
            |machine| {
                machine.request_atomic(&[
                    "INSERT INTO c VALUES (2)",
                    "INSERT INTO p VALUES (1)",
                    "INSERT INTO p VALUES (2)",
                ])
            },
            |machine| machine.request_atomic(&["INSERT INTO c VALUES (9)"]),
            |machine| machine.request_script(&["INSERT INTO c VALUES (9)"]),
            |machine| machine.request_atomic(&["INSERT INTO c VALUES (1)"]),
        ],
    );
    use ReplyClass::{Failed, Ok};
    assert_eq!(classes(&replies), [Ok, Ok, Failed, Failed, Ok]);
    assert_eq!(machine.read("SELECT group_concat(p) FROM c"), "1,1,1,2,1");
}

#[test]
fn a_statement_over_its_budget_fails_its_own_request_only() {
    let endless = |machine: &Machine| {
        let sql =
            "WITH RECURSIVE n(i) AS (VALUES (1) UNION ALL SELECT i + 1 FROM n) INSERT INTO t SELECT i FROM n";
        LoggedRequest { step_budget: 100_000, ..machine.request_atomic(&["INSERT INTO t VALUES (0)", sql]) }
    };
    let (replies, machine) = alike(
        &["CREATE TABLE t(a)"],
        &[
            |machine| machine.request_atomic(&["INSERT INTO t VALUES (1)"]),
            endless,
            |machine| machine.request_atomic(&["INSERT INTO t VALUES (2)"]),
            endless,
        ],
    );
    use ReplyClass::{Limit, Ok};
    assert_eq!(classes(&replies), [Ok, Limit, Ok, Limit]);
    let error = replies[1].error.as_ref().unwrap();
    assert_eq!(error.statement, 2);
    assert!(error.message.contains("budget of 100000"), "{}", error.message);
    assert_eq!(machine.read("SELECT group_concat(a) FROM t"), "1,2");
}

#[test]
fn a_request_with_another_foreign_keys_setting_is_alone_with_it() {
    let unchecked = |machine: &Machine| LoggedRequest {
        foreign_keys: false,
        ..machine.request_atomic(&["INSERT INTO c VALUES (2)"])
    };
    let checked = |machine: &Machine| machine.request_atomic(&["INSERT INTO c VALUES (3)"]);
    let (replies, machine) = alike(
        &["CREATE TABLE p(id INTEGER PRIMARY KEY)", "CREATE TABLE c(p REFERENCES p)"],
        &[checked, unchecked, checked, unchecked],
    );
    use ReplyClass::{Failed, Ok};
    assert_eq!(classes(&replies), [Failed, Ok, Failed, Ok]);
    assert_eq!(machine.read("SELECT group_concat(p) FROM c"), "2,2");
}

#[test]
fn vacuum_runs_between_groups_and_keeps_what_came_before() {
    let (replies, machine) = alike(
        &["CREATE TABLE t(a)", "INSERT INTO t VALUES (1), (2), (3)", "DELETE FROM t WHERE a = 1"],
        &[
            |machine| machine.request_atomic(&["INSERT INTO t VALUES (4)"]),
            |machine| machine.request_atomic(&["VACUUM"]),
            |machine| machine.request_atomic(&["INSERT INTO t VALUES (5)"]),
            |machine| {
                machine.request_script(&["INSERT INTO t VALUES (6)", "VACUUM", "INSERT INTO t VALUES (7)"])
            },
            |machine| machine.request_script(&["VACUUM", "INSERT INTO t VALUES (8)"]),
            |machine| machine.request_atomic(&["INSERT INTO t VALUES (9)", "VACUUM"]),
        ],
    );
    let done: Vec<usize> = replies.iter().map(|reply| reply.results.len()).collect();
    // A script ends before a VACUUM, and after one that it begins with.
    assert_eq!(done, [1, 1, 1, 1, 1, 0]);
    assert!(replies[5].error.as_ref().unwrap().message.contains("cannot be part of a transaction"));
    assert_eq!(machine.read("SELECT group_concat(a) FROM t"), "2,3,4,5,6");
}

#[test]
fn a_script_stops_before_its_first_read() {
    let mut machine = Machine::new();
    let reply = machine.script(&[
        "CREATE TABLE t(a)",
        "INSERT INTO t VALUES (1)",
        "SELECT * FROM t",
        "INSERT INTO t VALUES (2)",
    ]);
    assert_eq!((reply.results.len(), reply.class()), (2, ReplyClass::Ok));
    for read in
        ["SELECT 1", "EXPLAIN DELETE FROM t", "PRAGMA page_count", "PRAGMA table_info(t)", "VALUES (1)"]
    {
        let reply = machine.script(&[read, "INSERT INTO t VALUES (2)"]);
        assert_eq!((reply.results.len(), reply.class()), (0, ReplyClass::Ok), "{read}");
    }
    assert_eq!(machine.read("SELECT group_concat(a) FROM t"), "1");
    // What returns rows and writes is not a read.
    let reply = machine.script(&["INSERT INTO t VALUES (3) RETURNING a, a + 1"]);
    assert_eq!(text(&reply.results[0]), "3|4");
}

#[test]
fn a_script_keeps_what_was_done_before_its_first_error() {
    let mut machine = Machine::new();
    let reply = machine.script(&[
        "CREATE TABLE t(a NOT NULL)",
        "INSERT INTO t VALUES (1)",
        "INSERT INTO t VALUES (NULL)",
        "INSERT INTO t VALUES (2)",
    ]);
    assert_eq!(reply.results.len(), 2);
    let error = reply.error.unwrap();
    assert_eq!((error.statement, error.name.as_str()), (3, "SQLITE_CONSTRAINT_NOTNULL"));
    assert_eq!(machine.read("SELECT group_concat(a) FROM t"), "1");
}

#[test]
fn an_atomic_request_keeps_nothing_of_a_failure() {
    let mut machine = Machine::new();
    let reply = machine.atomic(&[
        "CREATE TABLE t(a)",
        "INSERT INTO t VALUES (1)",
        "SELECT * FROM t",
        "INSERT INTO nowhere VALUES (1)",
    ]);
    assert_eq!((reply.results.len(), reply.class()), (0, ReplyClass::Invalid));
    let error = reply.error.unwrap();
    assert_eq!((error.statement, error.message.as_str()), (4, "no such table: nowhere"));
    assert_eq!(machine.atomic(&["SELECT nope"]).error.unwrap().offset, 7);
    assert_eq!(error.log_index, reply.log_index);
    assert_eq!(machine.read("SELECT count(*) FROM sqlite_schema WHERE name = 't'"), "0");
}

#[test]
fn an_atomic_request_reads_its_own_writes_in_order() {
    let mut machine = Machine::new();
    let reply = machine.atomic(&[
        "CREATE TABLE t(id INTEGER PRIMARY KEY, a TEXT)",
        "INSERT INTO t(a) VALUES ('x'), ('y')",
        "SELECT id, a FROM t",
        "DELETE FROM t WHERE id = last_insert_rowid()",
        "SELECT id, a FROM t",
    ]);
    assert_eq!(reply.error, None);
    assert_eq!(text(&reply.results[2]), "1|x,2|y");
    assert_eq!(text(&reply.results[4]), "1|x");
    let columns: Vec<(&str, &str)> =
        reply.results[2].columns.iter().map(|c| (c.name.as_str(), c.declared_type.as_str())).collect();
    assert_eq!(columns, [("id", "INTEGER"), ("a", "TEXT")]);
}

#[test]
fn noops_advance_the_applied_index_and_have_no_reply() {
    let mut machine = Machine::new();
    machine.skip_to(5);
    let position = machine.applier.position();
    assert_eq!((position.applied_index, position.applied_term), (4, 1));
    let machine = machine.reopen();
    assert_eq!(machine.applier.position(), position);
}

#[test]
fn the_position_survives_a_restart_with_its_cluster() {
    let mut machine = Machine::new();
    machine.applier.bind_cluster(0xfedc_ba98_7654_3210).unwrap();
    machine.ok(&["CREATE TABLE t(a)"]);
    let position = machine.applier.position();
    let mut machine = machine.reopen();
    assert_eq!(machine.applier.position(), position);
    assert_eq!(position.cluster_id, 0xfedc_ba98_7654_3210);
    machine.applier.bind_cluster(position.cluster_id).unwrap();
    let message = machine.applier.bind_cluster(1).unwrap_err().to_string();
    assert!(message.contains("belongs to the cluster fedcba9876543210"), "{message}");
}

#[test]
fn entries_that_do_not_follow_are_refused() {
    let mut machine = Machine::new();
    let error = machine.try_apply(&[machine::noop_at(2)]).unwrap_err().to_string();
    assert!(error.contains("entry 1 should be next"), "{error}");
    let error = machine.try_apply(&[machine::noop_at(1), machine::noop_at(3)]).unwrap_err().to_string();
    assert!(error.contains("entry 3 does not follow"), "{error}");
    assert_eq!(machine.applier.position().applied_index, 1);
}

#[test]
fn an_entry_that_cannot_be_understood_stops_the_node_after_those_before_it() {
    type Spoil = fn(&mut LoggedRequest);
    let spoil: [(&str, Spoil); 2] = [
        ("format 9", |request| request.format = REQUEST_FORMAT + 8),
        ("install the same version", |request| request.execution_version ^= 1),
    ];
    for (words, spoil) in spoil {
        let mut machine = Machine::new();
        let good = machine.request_atomic(&["CREATE TABLE t(a)"]);
        let mut bad = good.clone();
        bad.id.as_mut().unwrap().sequence += 1;
        spoil(&mut bad);
        let entries = [machine.entry(good), machine.entry(bad)];
        let mut applied = Vec::new();
        let error = machine.applier.apply(&entries, &mut applied).unwrap_err().to_string();
        assert!(error.contains("entry 2") && error.contains(words), "{error}");
        assert_eq!((applied.len(), machine.applier.position().applied_index), (1, 1));
    }
    let mut machine = Machine::new();
    let request = machine.request_atomic(&["SELECT 1"]);
    let mut entry = machine.entry(request);
    entry.payload = b"\xff\xff not a request".as_slice().into();
    let error = machine.try_apply(&[entry]).unwrap_err().to_string();
    assert!(error.starts_with("entry 1 cannot be read"), "{error}");
}

#[test]
fn a_statement_means_the_same_whether_it_was_seen_before_or_not() {
    // U+00A0 is a letter to SQLite and a blank to Unicode.
    let mut machine = Machine::new();
    let sql = "SELECT 1\u{a0}";
    let replies: Vec<StoredReply> = (0..4).map(|_| machine.atomic(&[sql])).collect();
    assert!(replies.iter().all(|reply| reply.results == replies[0].results), "{replies:?}");
    // Cached, and prepared anew after the schema changed.
    machine.ok(&["CREATE TABLE t(a)"]);
    for column in ["b", "c", "d"] {
        for _ in 0..3 {
            machine.ok(&["INSERT INTO t(a) VALUES (1)"]);
            let rows = machine.atomic(&["SELECT * FROM t LIMIT 1"]);
            assert_eq!(rows.results[0].columns.len(), rows.results[0].rows[0].values.len());
        }
        machine.ok(&[&format!("ALTER TABLE t ADD COLUMN {column}")]);
    }
    machine.ok(&["DROP TABLE t"]);
    let (class, message) = machine.refusal("INSERT INTO t(a) VALUES (1)");
    assert_eq!((class, message.as_str()), (ReplyClass::Invalid, "no such table: t"));
}

#[test]
fn the_budget_does_not_depend_on_what_is_cached() {
    // Finds the exact budget of a statement on a fresh node; it must be exact on a warm one, too.
    let setup =
        ["CREATE TABLE t(a, b)", "CREATE INDEX i ON t(a)", "INSERT INTO t VALUES ('abc', 1), ('abd', 2)"];
    let run = |warm_up: bool, budget: u64| {
        let mut machine = Machine::new();
        machine.ok(&setup);
        let query = |machine: &Machine| {
            let mut request = machine.request_atomic(&[]);
            let like = statement(
                "SELECT * FROM t WHERE a LIKE ?1",
                [resqlite::api::value::Kind::Text("ab%".into())],
            );
            request.body = Some(machine::atomic(vec![like]));
            request
        };
        if warm_up {
            for column in ["c", "d", "e"] {
                for _ in 0..3 {
                    let request = query(&machine);
                    assert_eq!(machine.apply(request).error, None);
                }
                machine.ok(&[&format!("ALTER TABLE t ADD COLUMN {column}")]);
                assert!(machine.atomic(&["DROP INDEX i", "SELECT nonsense"]).error.is_some());
            }
        } else {
            machine.ok(&[
                "ALTER TABLE t ADD COLUMN c",
                "ALTER TABLE t ADD COLUMN d",
                "ALTER TABLE t ADD COLUMN e",
            ]);
            machine.skip_to(20);
            machine = machine.reopen();
        }
        let request = LoggedRequest { step_budget: budget, ..query(&machine) };
        machine.apply(request).class()
    };
    let exact = (1..500).find(|budget| run(false, *budget) == ReplyClass::Ok).unwrap();
    assert_eq!(run(true, exact), ReplyClass::Ok);
    assert_eq!(run(true, exact - 1), ReplyClass::Limit);
}

#[test]
fn what_does_nothing_because_of_if_exists_is_no_vacuum() {
    let mut machine = Machine::new();
    machine.ok(&[
        "DROP TABLE IF EXISTS nowhere",
        "DROP INDEX IF EXISTS nowhere",
        "CREATE TABLE t(a)",
        "CREATE TABLE IF NOT EXISTS t(a)",
    ]);
    let reply = machine.atomic(&[
        "INSERT INTO t VALUES (1)",
        "DROP VIEW IF EXISTS nowhere",
        "INSERT INTO t VALUES (2)",
    ]);
    assert_eq!(reply.error, None);
    assert_eq!(machine.read("SELECT count(*) FROM t"), "2");
}

#[test]
fn a_statement_is_judged_by_the_schema_of_its_moment() {
    // Refused while it would create the table, and nothing to refuse once the table exists.
    let sql = "CREATE TABLE IF NOT EXISTS x AS SELECT rootpage FROM sqlite_schema";
    let run = |warm_up: bool| {
        let mut machine = Machine::new();
        if warm_up {
            for _ in 0..3 {
                assert_eq!(machine.refusal(sql).0, ReplyClass::Invalid);
            }
        }
        machine.ok(&["CREATE TABLE x(a)"]);
        machine.atomic(&[sql]).class()
    };
    assert_eq!((run(true), run(false)), (ReplyClass::Ok, ReplyClass::Ok));
    // Within one request, too.
    let mut machine = Machine::new();
    for _ in 0..3 {
        assert_eq!(machine.refusal(sql).0, ReplyClass::Invalid);
    }
    assert_eq!(machine.atomic(&["CREATE TABLE x(a)", sql]).class(), ReplyClass::Ok);
}

#[test]
fn the_servers_own_tables_take_a_line_each_in_a_dump() {
    let machine = Machine::new();
    let connection = rusqlite::Connection::open(machine.path()).unwrap();
    let many_lines: i64 = connection
        .query_row("SELECT count(*) FROM sqlite_schema WHERE instr(sql, char(10)) > 0", [], |row| row.get(0))
        .unwrap();
    assert_eq!(many_lines, 0);
}

#[test]
fn large_replies_are_handed_over_before_more_is_executed() {
    const ENTRIES: usize = 12;
    let mut machine = Machine::new();
    machine.ok(&["CREATE TABLE t(a)"]);
    let entries: Vec<LogEntry> = (0..ENTRIES)
        .map(|_| {
            let request = machine.request_atomic(&["INSERT INTO t VALUES (1)", "SELECT zeroblob(4194304)"]);
            machine.entry(LoggedRequest { result_limit_bytes: 64 << 20, ..request })
        })
        .collect();
    let (mut rest, mut calls) = (&entries[..], 0);
    while !rest.is_empty() {
        let applied = machine.try_apply(rest).unwrap();
        assert!((1..=4).contains(&applied.len()), "{} replies of 4 MiB at once", applied.len());
        assert!(applied.iter().all(|applied| applied.reply.class() == ReplyClass::Ok));
        // The position agrees with what was handed over: a crash between two calls loses nothing.
        assert_eq!(machine.applier.position().applied_index, applied.last().unwrap().index);
        rest = &rest[applied.len()..];
        calls += 1;
    }
    assert!(calls >= ENTRIES / 4);
    assert_eq!(machine.read("SELECT count(*) FROM t"), ENTRIES.to_string());
}
