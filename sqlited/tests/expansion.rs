//! Statements whose *preparing* would explode are refused alike on every path, and ordinary deep ones are not.

#![allow(clippy::unwrap_used, reason = "a panic is the failure's report")]

mod machine;
mod node;

use std::time::{Duration, Instant};

use machine::Machine;
use node::Node;
use resqlite::api::{
    BeginRequest, Consistency, ExecuteRequest, QueryRequest, ReadOptions, RunRequest, Statement,
};
use rusqlite::Connection;
use sqlited::expansion::{MAX_DEPTH, Schema, TooComplex, check};
use tonic::{Code, Status};

fn chain(levels: usize, first: &str, next: impl Fn(usize) -> String) -> String {
    let ctes: Vec<String> =
        (1..=levels).map(|level| format!("c{level}(a) as ({})", next(level - 1))).collect();
    format!("with c0(a) as ({first}), {} select * from c{levels}", ctes.join(", "))
}

fn nested(levels: usize, first: &str, next: impl Fn(&str) -> String) -> String {
    (0..levels).fold(first.to_owned(), |inner, _| next(&inner))
}

/// Each doubles, or more, what SQLite builds while it prepares the statement, with every level.
fn explosive(levels: usize) -> Vec<String> {
    vec![
        chain(levels, "select 1", |c| format!("select x.a from c{c} x, c{c} y")),
        chain(levels, "select 1", |c| format!("select x.a from c{c} x join main.absent join c{c} y")),
        chain(levels, "select 1", |c| format!("select (select a from c{c}) + (select a from c{c})")),
        chain(levels, "select 1", |c| format!("select 1 where 1 in c{c} and 2 not in c{c}")),
        chain(levels, "select 1", |c| format!("select a from c{c} union all select a from \"C{c}\"")),
        chain(levels, "select 1", |c| format!("select a from [c{c}] where exists (select * from `c{c}`)")),
        chain(levels, "select 1", |c| format!("select x.a from (c{c} x join 'c{c}')")),
        chain(levels, "select 1", |c| format!("select /* ( */ 1 from/**/c{c} x -- (\n,c{c} y")),
        chain(levels, "select b from t", |c| format!("select a + a from c{c}")),
        nested(levels, "select 1 as a", |inner| format!("select a+a as a from ({inner})")),
        nested(levels, "select 1 as a", |inner| format!("select max(a, a) a from ({inner})")),
        nested(levels, "select b as a, b from t", |inner| {
            format!("select a+b as a, b+a as b from ({inner})")
        }),
        nested(levels, "select 1 as a", |inner| format!("select (select a+a) as a from ({inner})")),
        nested(levels, "select 1 as a", |inner| {
            format!("select case when a is distinct from 1 then a end as a from ({inner})")
        }),
    ]
}

#[test]
fn what_doubles_with_every_level_is_refused_at_once_and_a_few_levels_are_not() {
    for sql in explosive(40) {
        let began = Instant::now();
        assert_eq!(check(&sql, &Schema::default()), Err(TooComplex::Expansion), "{sql}");
        assert!(began.elapsed() < Duration::from_secs(1), "{sql}");
    }
    let database = Connection::open_in_memory().unwrap();
    database.execute_batch("create table t(b); create table absent(a)").unwrap();
    for sql in explosive(5) {
        assert_eq!(check(&sql, &Schema::default()), Ok(()), "{sql}");
        database.prepare(&sql).unwrap_or_else(|error| panic!("SQLite knows it: {error}: {sql}"));
    }
}

/// The most that the measure lets pass is prepared in reasonable time and memory.
#[test]
fn what_is_not_refused_is_soon_prepared() {
    let database = Connection::open_in_memory().unwrap();
    database.execute_batch("create table t(b); create table absent(a)").unwrap();
    for form in 0..explosive(1).len() {
        let passing = (1..40).map(|levels| explosive(levels).swap_remove(form));
        let largest = passing.take_while(|sql| check(sql, &Schema::default()).is_ok()).last().unwrap();
        let began = Instant::now();
        // It may hit one of SQLite's own limits; but soon.
        let _ = database.prepare(&largest);
        assert!(began.elapsed() < Duration::from_secs(20), "{} bytes: {largest}", largest.len());
    }
}

#[test]
fn nesting_that_would_overflow_the_stack_is_refused() {
    let too_deep = chain(20_000, "select 1", |c| format!("select a from c{c}"));
    assert_eq!(check(&too_deep, &Schema::default()), Err(TooComplex::Depth));
    let too_deep = nested(20_000, "select 1 as a", |inner| format!("select a from ({inner})"));
    assert_eq!(check(&too_deep, &Schema::default()), Err(TooComplex::Depth));
    let deep = chain(MAX_DEPTH - 10, "select 1", |c| format!("select a from c{c}"));
    assert_eq!(check(&deep, &Schema::default()), Ok(()));
    Connection::open_in_memory().unwrap().prepare(&deep).unwrap();
    let parentheses = format!("select {}1{}", "(".repeat(10_000), ")".repeat(10_000));
    assert_eq!(check(&parentheses, &Schema::default()), Ok(()), "SQLite's own parser bounds these");
}

#[test]
fn long_but_ordinary_statements_pass() {
    let columns: Vec<String> = (0..200).map(|n| format!("x.c{n} as c{n}")).collect();
    let wide =
        nested(30, "select * from t", |inner| format!("select {} from ({inner}) x", columns.join(", ")));
    let report = chain(40, "select 1", |c| {
        format!(
            "select coalesce(c{c}.a, 0) as a from c{c} left join t on t.id = c{c}.a where c{c}.a > 1 group by c{c}.a"
        )
    });
    let values = format!("insert into t select * from (values {}(1))", "(1),".repeat(50_000));
    let recursive = "with recursive n(x) as (select 1 union all select x + 1 from n where x < 9) select x, x, x from n, n m";
    let compound = vec!["select a, b from t where a in (select a from u)"; 400].join(" union all ");
    let dashes = "select 1 - -1, 2 / 3 -- select * from (\n from t";
    for sql in [
        &wide,
        &report,
        &values,
        recursive,
        &compound,
        dashes,
        "select",
        "with",
        "with a",
        "with a as (",
        ")(",
    ] {
        assert_eq!(check(sql, &Schema::default()), Ok(()), "{}", &sql[..sql.len().min(300)]);
    }
}

fn ok(machine: &mut Machine, sql: &str) {
    machine.ok(&[sql]);
}

/// The message of a statement that fails.
fn error(machine: &mut Machine, sql: &str) -> Option<String> {
    machine.atomic(&[sql]).error.map(|error| error.message)
}

/// Views, each twice in the next.
fn views(from: usize, to: usize) -> Vec<String> {
    (from..to)
        .map(|n| {
            format!("create view v{n} as select (select a from v{}) + (select a from v{}) as a", n - 1, n - 1)
        })
        .collect()
}

#[test]
fn views_count_wherever_they_are_used() {
    let mut machine = Machine::new();
    ok(&mut machine, "create table t(a)");
    ok(&mut machine, "create view v0 as select a from t");
    let refused = views(1, 40).iter().position(|sql| error(&mut machine, sql).is_some());
    let last = refused.expect("some view is the last");
    assert!((8..16).contains(&last), "{last}");
    let message = error(&mut machine, &format!("select 1 from v{last} x, v{last} y, v{last} z")).unwrap();
    assert!(message.contains("expand to more than"), "{message}");
    for sql in [
        format!("insert into t select x.a from v{last} x, v{last} y, v{last} z"),
        format!("create table u as select x.a from v{last} x, v{last} y, v{last} z"),
        format!("delete from t where a in v{last} or a in (select a from main.v{last}) or a in (v{last})"),
        format!(
            "create trigger g after insert on t begin select * from v{last} x, v{last} y, v{last} z; end"
        ),
    ] {
        let message = error(&mut machine, &sql).unwrap();
        assert!(message.contains("expand to more than"), "{sql}: {message}");
    }
}

#[test]
fn a_view_that_is_replaced_does_not_make_others_explode_behind_their_back() {
    let mut machine = Machine::new();
    ok(&mut machine, "create table t(a)");
    ok(&mut machine, "create view w0 as select a from t");
    ok(&mut machine, "create view v0 as select a from w0");
    for sql in views(1, 9) {
        ok(&mut machine, &sql);
    }
    for n in 1..9 {
        ok(
            &mut machine,
            &format!(
                "create view w{n} as select (select a from w{}) + (select a from w{}) as a",
                n - 1,
                n - 1
            ),
        );
    }
    ok(&mut machine, "drop view v0");
    let message = error(&mut machine, "create view v0 as select x.a from w8 x, w8 y").unwrap();
    assert!(message.contains("expand to more than"), "{message}");
    ok(&mut machine, "create view v0 as select a from t");
    assert_eq!(error(&mut machine, "select count(*) from v3"), None);
}

#[test]
fn what_triggers_expand_to_counts_for_the_statement_that_sets_them_off() {
    let mut machine = Machine::new();
    ok(&mut machine, "create table t(a primary key)");
    ok(&mut machine, "create table child(a references t(a) on delete cascade)");
    ok(&mut machine, "create view v0 as select a from t");
    let last = views(1, 40).iter().position(|sql| error(&mut machine, sql).is_some()).unwrap();
    ok(
        &mut machine,
        &format!(
            "create trigger g1 after delete on child begin delete from child where a in (select a from v{last}); end"
        ),
    );
    assert_eq!(error(&mut machine, "delete from t"), None);
    ok(
        &mut machine,
        &format!(
            "create trigger g2 after delete on child begin delete from child where a in (select a from v{last}); end"
        ),
    );
    for sql in ["delete from child", "delete from t"] {
        let message = error(&mut machine, sql).unwrap();
        assert!(message.contains("expand to more than"), "{sql}: {message}");
    }
    ok(&mut machine, "insert into t values (1)");
    ok(&mut machine, "drop trigger g2");
    ok(&mut machine, "delete from t");
}

fn write(sql: &str) -> ExecuteRequest {
    let statement = Statement { sql: sql.to_owned(), ..Statement::default() };
    ExecuteRequest { statements: vec![statement], ..ExecuteRequest::default() }
}

fn read(sql: &str) -> QueryRequest {
    QueryRequest { sql: sql.to_owned(), ..QueryRequest::default() }
}

async fn run(node: &Node, sql: &str) -> Result<(), Status> {
    let request = RunRequest { sql: sql.to_owned(), ..RunRequest::default() };
    let mut events = node.client().run(request).await?.into_inner();
    while events.message().await?.is_some() {}
    Ok(())
}

#[tokio::test]
async fn what_would_explode_while_it_is_prepared_is_refused_on_every_path() {
    let node = Node::start().await;
    let mut client = node.client();
    client.execute(write("create table t(a)")).await.unwrap();
    // 40 levels, each twice in the next: a thousand thousand million copies.
    let explosive = chain(40, "select 1", |c| format!("select x.a from c{c} x, c{c} y"));
    let insert = format!("insert into t {explosive}");
    let assert_refused = |status: Status| {
        assert_eq!(status.code(), Code::InvalidArgument, "{status}");
        assert!(status.message().contains("expand to more than"), "what is wrong, and what to do: {status}");
    };
    let began = Instant::now();
    for consistency in [Consistency::Linearizable, Consistency::Sequential, Consistency::Stale] {
        let options = ReadOptions { consistency: consistency.into(), ..ReadOptions::default() };
        let query = QueryRequest { read: Some(options), ..read(&explosive) };
        assert_refused(client.query(query).await.unwrap_err());
    }
    for sql in [&explosive, &insert, &format!("begin; {insert}; commit"), &format!("explain {explosive}")] {
        assert_refused(run(&node, sql).await.unwrap_err());
    }
    assert_refused(client.execute(write(&insert)).await.unwrap_err());
    let script = ExecuteRequest { script: insert.clone(), ..ExecuteRequest::default() };
    assert_refused(client.execute(script).await.unwrap_err());
    let transaction = client.begin(BeginRequest::default()).await.unwrap().into_inner().transaction;
    let held = QueryRequest { transaction, ..read(&explosive) };
    assert_refused(client.query(held).await.unwrap_err());
    assert!(began.elapsed() < Duration::from_secs(10), "refused at once: {:?}", began.elapsed());
    client.query(read("select count(*) from t")).await.unwrap();
    node.stop().await.unwrap();
}

#[tokio::test]
async fn a_read_that_is_known_is_measured_again_when_its_view_is_another_one() {
    let node = Node::start().await;
    let mut client = node.client();
    client.execute(write("create table t(a)")).await.unwrap();
    client.execute(write("create view v as select a from t")).await.unwrap();
    let joined: Vec<String> = (0..60).map(|n| format!("v x{n}")).collect();
    let sql = format!("select count(*) from {}", joined.join(", "));
    for _ in 0..3 {
        run(&node, &sql).await.unwrap();
        client.query(read(&sql)).await.unwrap();
    }
    client.execute(write("drop view v")).await.unwrap();
    let columns = vec!["a"; 1_000].join(", ");
    client.execute(write(&format!("create view v as select {columns} from t"))).await.unwrap();
    // Whichever reader it comes to.
    for _ in 0..6 {
        let status = client.query(read(&sql)).await.unwrap_err();
        assert!(status.message().contains("expand to more than"), "{status}");
    }
    node.stop().await.unwrap();
}
