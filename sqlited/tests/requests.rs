//! What one request may say and what it gets: values, parameters, conditions, limits.

mod machine;

use std::collections::HashMap;

use machine::{Machine, atomic, statement, text};
use resqlite::api::{LoggedRequest, ReplyClass, Statement, StoredReply, Value, value::Kind};

fn run(machine: &mut Machine, statements: Vec<Statement>) -> StoredReply {
    let mut request = machine.request_atomic(&[]);
    request.body = Some(atomic(statements));
    machine.apply(request)
}

fn named(sql: &str, params: &[(&str, Kind)]) -> Statement {
    let named_params: HashMap<String, Value> =
        params.iter().map(|(name, kind)| ((*name).to_owned(), Value { kind: Some(kind.clone()) })).collect();
    Statement { sql: sql.into(), named_params, ..Statement::default() }
}

#[test]
fn every_kind_of_value_comes_back_as_it_went() {
    let mut machine = Machine::new();
    let values = [
        Kind::Null(true),
        Kind::Integer(i64::MIN),
        Kind::Real(-0.5),
        Kind::Text("tail after a NUL\0 byte, and ü".into()),
        Kind::Text(String::new()),
        Kind::Blob(b"\0\xff".as_slice().into()),
        Kind::Blob(b"".as_slice().into()),
        Kind::InvalidText(b"\xff\xfe".as_slice().into()),
    ];
    machine.ok(&["CREATE TABLE t(id INTEGER PRIMARY KEY, v)"]);
    for value in values {
        let insert = statement("INSERT INTO t(v) VALUES (?1) RETURNING v, typeof(v)", [value.clone()]);
        let reply = run(&mut machine, vec![insert]);
        let row = &reply.results[0].rows[0];
        assert_eq!(row.values[0].kind.as_ref(), Some(&value));
    }
    assert_eq!(
        machine.read("SELECT group_concat(typeof(v)) FROM t"),
        "null,integer,real,text,text,blob,blob,text"
    );
}

#[test]
fn a_nan_becomes_null_as_sqlite_has_it() {
    let mut machine = Machine::new();
    let reply = run(
        &mut machine,
        vec![statement("SELECT ?1, ?2", [Kind::Real(f64::NAN), Kind::Real(f64::INFINITY)])],
    );
    assert_eq!(text(&reply.results[0]), "NULL|inf");
}

#[test]
fn a_value_without_a_kind_is_null() {
    let mut machine = Machine::new();
    let source =
        Statement { sql: "SELECT ?1".into(), params: vec![Value { kind: None }], ..Statement::default() };
    assert_eq!(text(&run(&mut machine, vec![source]).results[0]), "NULL");
}

#[test]
fn parameters_go_by_position_or_by_name_with_or_without_prefix() {
    let mut machine = Machine::new();
    let reply = run(
        &mut machine,
        vec![
            statement("SELECT ?, ?", [Kind::Integer(1), Kind::Integer(2)]),
            statement("SELECT ?2, ?1, ?2", [Kind::Integer(1), Kind::Integer(2)]),
            named(
                "SELECT :a, @b, $c",
                &[("a", Kind::Integer(1)), ("@b", Kind::Integer(2)), ("c", Kind::Integer(3))],
            ),
            Statement {
                params: vec![Value { kind: Some(Kind::Integer(7)) }],
                ..named("SELECT ?1, :x", &[("x", Kind::Integer(8))])
            },
        ],
    );
    let texts: Vec<String> = reply.results.iter().map(text).collect();
    assert_eq!(texts, ["1|2", "2|1|2", "1|2|3", "7|8"]);
}

#[test]
fn parameters_that_do_not_fit_are_a_clear_error() {
    let mut machine = Machine::new();
    let one = || Kind::Integer(1);
    for (source, words) in [
        (statement("SELECT ?, ?", [one()]), "has 2 parameters, but 1 were given"),
        (statement("SELECT 1", [one()]), "has 0 parameters, but 1 were given"),
        (statement("SELECT ?", []), "has 1 parameters, but 0 were given"),
        (named("SELECT :a", &[("b", one())]), "no parameter named \"b\""),
        (named("SELECT :a, :b", &[("a", one())]), "parameter 2 (:b) was not given"),
        (named("SELECT :a", &[("a", one()), (":a", one())]), "was given twice"),
        (named("SELECT :a", &[("a\0", one())]), "no parameter named"),
        (
            Statement { params: vec![Value::default(); 3], ..named("SELECT ?, :b", &[("b", one())]) },
            "3 were given by position",
        ),
    ] {
        let sql = source.sql.clone();
        let reply = run(&mut machine, vec![statement("SELECT 1", []), source]);
        let error = reply.error.as_ref().unwrap();
        assert!(error.message.contains(words), "{sql}: {}", error.message);
        assert_eq!(
            (reply.class(), error.name.as_str(), error.statement),
            (ReplyClass::Invalid, "SQLITE_RANGE", 2)
        );
    }
}

#[test]
fn an_expectation_that_fails_undoes_the_whole_request() {
    let mut machine = Machine::new();
    machine
        .ok(&["CREATE TABLE account(id INTEGER PRIMARY KEY, version)", "INSERT INTO account VALUES (1, 1)"]);
    let swap = |from: i64| Statement {
        expect_rows_affected: Some(1),
        ..statement(
            "UPDATE account SET version = version + 1 WHERE id = 1 AND version = ?1",
            [Kind::Integer(from)],
        )
    };
    let log = || statement("INSERT INTO account(version) VALUES (0)", []);
    assert_eq!(run(&mut machine, vec![log(), swap(1)]).class(), ReplyClass::Ok);
    let reply = run(&mut machine, vec![log(), swap(1)]);
    assert_eq!(reply.class(), ReplyClass::Aborted);
    let error = reply.error.unwrap();
    assert_eq!(error.statement, 2);
    assert!(error.message.contains("expected to change 1 rows, but changed 0"), "{}", error.message);
    assert_eq!(machine.read("SELECT count(*), max(version) FROM account"), "2|2");
}

#[test]
fn a_guard_holds_if_sqlite_takes_its_value_for_true() {
    let mut machine = Machine::new();
    machine.ok(&["CREATE TABLE t(a)"]);
    for (sql, holds) in [
        ("SELECT 1", true),
        ("SELECT 0", false),
        ("SELECT NULL", false),
        ("SELECT 0.1", true),
        ("SELECT '0.1x'", true),
        ("SELECT 'x'", false),
        ("SELECT x'31'", true),
        ("SELECT 1 WHERE 0", false),
        ("SELECT NOT EXISTS (SELECT * FROM t)", true),
        ("CREATE TABLE u(a)", false),
    ] {
        let guard = Statement { guard: true, ..statement(sql, []) };
        let reply = run(&mut machine, vec![guard, statement("SELECT 'reached'", [])]);
        let expected = if holds { ReplyClass::Ok } else { ReplyClass::Aborted };
        assert_eq!(reply.class(), expected, "{sql}: {reply:?}");
    }
    assert_eq!(machine.read("SELECT count(*) FROM sqlite_schema WHERE name = 'u'"), "0");
}

#[test]
fn results_are_bounded() {
    let mut machine = Machine::new();
    machine.ok(&["CREATE TABLE t(a)"]);
    let fill = "WITH RECURSIVE n(i) AS (VALUES (1) UNION ALL SELECT i + 1 FROM n WHERE i < 1000) INSERT INTO t SELECT zeroblob(100) FROM n";
    machine.ok(&[fill]);
    for statements in [
        vec!["SELECT * FROM t"],
        vec!["SELECT * FROM t LIMIT 50", "SELECT * FROM t LIMIT 50"],
        vec!["DELETE FROM t RETURNING a"],
    ] {
        let request = LoggedRequest { result_limit_bytes: 6_000, ..machine.request_atomic(&statements) };
        let reply = machine.apply(request);
        assert_eq!(reply.class(), ReplyClass::Limit);
        assert!(reply.error.unwrap().message.contains("larger than 6000 bytes"));
    }
    assert_eq!(machine.read("SELECT count(*) FROM t"), "1000");
}

#[test]
fn values_are_bounded() {
    let mut machine = Machine::new();
    let (class, message) = machine.refusal("SELECT zeroblob(16777217)");
    assert_eq!((class, message.as_str()), (ReplyClass::Limit, "string or blob too big"));
    let too_big = statement("SELECT length(?1)", [Kind::Blob(vec![0; (16 << 20) + 1].into())]);
    assert_eq!(run(&mut machine, vec![too_big]).class(), ReplyClass::Limit);
    // Such operands would keep one step busy for hours.
    let (class, _) =
        machine.refusal("SELECT instr(zeroblob(16000000), CAST(zeroblob(8000000) || x'01' AS BLOB))");
    assert_eq!(class, ReplyClass::Limit);
    let (class, message) = machine.refusal(&format!("SELECT 'a' LIKE '{}'", "%".repeat(1_001)));
    assert_eq!((class, message.as_str()), (ReplyClass::Failed, "LIKE or GLOB pattern too complex"));
}

#[test]
fn the_budget_counts_over_all_statements_of_a_request() {
    let mut machine = Machine::new();
    machine.ok(&["CREATE TABLE t(a)"]);
    let fill = "WITH RECURSIVE n(i) AS (VALUES (1) UNION ALL SELECT i + 1 FROM n WHERE i < 1000) INSERT INTO t SELECT i FROM n";
    let class = |machine: &mut Machine, statements: &[&str]| {
        let request = LoggedRequest { step_budget: 30_000, ..machine.request_atomic(statements) };
        machine.apply(request).class()
    };
    assert_eq!(class(&mut machine, &[fill]), ReplyClass::Ok);
    assert_eq!(class(&mut machine, &[fill, fill, fill, fill]), ReplyClass::Limit);
    assert_eq!(machine.read("SELECT count(*) FROM t"), "1000");
}

#[test]
fn what_others_do_for_a_statement_blows_the_fuse_but_not_the_budget() {
    // A full-text index runs statements of its own, whose steps the main statement's count leaves out.
    let mut machine = Machine::new();
    machine.ok(&["CREATE VIRTUAL TABLE f USING fts5(a, content='')", "CREATE TABLE t(a)"]);
    let fill = "WITH RECURSIVE n(i) AS (VALUES (1) UNION ALL SELECT i + 1 FROM n WHERE i < 3000)
                INSERT INTO t SELECT hex(randomblob(100)) FROM n";
    machine.ok(&[fill]);
    let index = |budget: u64, machine: &mut Machine| {
        let sql = "INSERT INTO f(rowid, a) SELECT rowid, a FROM t";
        let request = LoggedRequest {
            step_budget: budget,
            ..machine.request_atomic(&[sql, "INSERT INTO f(f) VALUES ('delete-all')"])
        };
        machine.apply(request).class()
    };
    let exact = (1..)
        .map(|thousands| thousands * 1_000)
        .find(|budget| index(*budget, &mut machine) == ReplyClass::Ok)
        .unwrap();
    assert!(exact < 100_000, "{exact}");
    assert_eq!(index(exact, &mut machine), ReplyClass::Ok);
}

#[test]
fn an_endless_read_inside_a_request_is_over_budget() {
    let mut machine = Machine::new();
    let sql = "WITH RECURSIVE n(i) AS (VALUES (1) UNION ALL SELECT i + 1 FROM n) SELECT max(i) FROM n";
    let request = LoggedRequest { step_budget: 50_000, ..machine.request_atomic(&[sql]) };
    assert_eq!(machine.apply(request).class(), ReplyClass::Limit);
}

#[test]
fn an_empty_request_is_invalid_and_an_empty_list_does_nothing() {
    let mut machine = Machine::new();
    let request = LoggedRequest { body: None, ..machine.request_atomic(&[]) };
    assert_eq!(machine.apply(request).class(), ReplyClass::Invalid);
    let reply = machine.atomic(&[]);
    assert_eq!((reply.class(), reply.results.len()), (ReplyClass::Ok, 0));
}
