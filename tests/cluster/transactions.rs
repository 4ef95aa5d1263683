//! A request is all or nothing; conditions decide without a round trip; BEGIN … COMMIT is one request.

use std::{
    io::Write,
    process::{Command, Output, Stdio},
};

use resqlite::api::{ExecuteRequest, ExecuteResponse, Row, Statement, value::Kind};
use tonic::{Code, Status};

use crate::harness::{Cluster, execute, only_integer, program, query, statement};

async fn atomic(
    cluster: &Cluster,
    node: usize,
    statements: impl IntoIterator<Item = Statement>,
) -> Result<ExecuteResponse, Status> {
    let request =
        ExecuteRequest { statements: statements.into_iter().collect(), ..ExecuteRequest::default() };
    Ok(cluster.client(node).execute(request).await?.into_inner())
}

fn guard(sql: &str) -> Statement {
    Statement { guard: true, ..statement(sql) }
}

fn expecting(rows: u64, sql: &str) -> Statement {
    Statement { expect_rows_affected: Some(rows), ..statement(sql) }
}

async fn cluster_with(setup: &[&str]) -> Cluster {
    let cluster = Cluster::start(3).await;
    for sql in setup {
        execute(&mut cluster.client(0), sql).await.unwrap();
    }
    cluster
}

async fn number(cluster: &Cluster, node: usize, sql: &str) -> i64 {
    only_integer(&query(&mut cluster.client(node), sql).await.unwrap())
}

#[tokio::test]
async fn a_condition_that_fails_aborts_the_whole_request() {
    let cluster =
        cluster_with(&["create table t(id integer primary key, n)", "insert into t values(1, 10)"]).await;
    let write = "update t set n = n + 1";
    for (failing, words) in [
        (guard("select n = 11 from t where id = 1"), "the guard, statement 2"),
        (guard("select 1 from t where id = 99"), "the guard, statement 2"),
        (guard("select null"), "the guard, statement 2"),
        (expecting(1, "update t set n = 0 where id = 99"), "expected to change 1 rows, but changed 0"),
        (expecting(0, "delete from t"), "expected to change 0 rows, but changed 2"),
    ] {
        let failing_sql = failing.sql.clone();
        let status =
            atomic(&cluster, 1, [statement("insert into t values(2, 0)"), failing, statement(write)]).await;
        let status = status.expect_err(&failing_sql);
        assert_eq!(status.code(), Code::Aborted, "{failing_sql}: {status:?}");
        assert!(status.message().contains(words), "{failing_sql}: {}", status.message());
    }
    for node in 0..3 {
        assert_eq!(number(&cluster, node, "select sum(n) * 100 + count(*) from t").await, 1_001);
    }
    // Compare and swap: one of two that race.
    let swap =
        |from: i64, to: i64| [expecting(1, &format!("update t set n = {to} where id = 1 and n = {from}"))];
    let (left, right) = tokio::join!(atomic(&cluster, 0, swap(10, 20)), atomic(&cluster, 2, swap(10, 30)));
    let winner = match (&left, &right) {
        (Ok(_), Err(lost)) if lost.code() == Code::Aborted => 20,
        (Err(lost), Ok(_)) if lost.code() == Code::Aborted => 30,
        _ => panic!("one wins and one is aborted: {left:?}, {right:?}"),
    };
    assert_eq!(number(&cluster, 1, "select n from t").await, winner);
}

#[tokio::test]
async fn statements_see_what_the_earlier_ones_of_their_request_did() {
    let cluster = cluster_with(&[
        "create table orders(id integer primary key, customer text)",
        "create table lines(orders references orders, item text)",
    ])
    .await;
    let reply = atomic(
        &cluster,
        2,
        [
            statement("insert into orders(customer) values('Ada')"),
            statement(
                "insert into lines select last_insert_rowid(), value from json_each('[\"pen\", \"ink\"]')",
            ),
            statement("select changes(), total_changes()"),
            statement("update orders set customer = upper(customer) returning id, customer"),
            guard("select count(*) = 2 from lines join orders on orders.id = lines.orders"),
        ],
    )
    .await
    .unwrap();
    let row = |statement: usize| values(&reply.results[statement].rows);
    assert_eq!(row(2), ["2|3"]);
    assert_eq!(row(3), ["1|ADA"]);
    assert_eq!(row(4), ["1"]);
    assert_eq!(reply.results[1].rows_affected, 2);

    // A statement that fails takes everything with it, and is named.
    let failed =
        [statement("insert into orders values(7, 'Eve')"), statement("insert into lines values(99, 'x')")];
    let status = atomic(&cluster, 1, failed).await.unwrap_err();
    assert_eq!(status.code(), Code::FailedPrecondition, "{status:?}");
    assert_eq!(number(&cluster, 0, "select count(*) from orders").await, 1);
}

/// Integers and texts of rows: values by `|`.
fn values(rows: &[Row]) -> Vec<String> {
    let value = |kind: &Option<Kind>| match kind {
        Some(Kind::Integer(integer)) => integer.to_string(),
        Some(Kind::Text(text)) => text.clone(),
        other => panic!("neither integer nor text: {other:?}"),
    };
    let row = |row: &Row| row.values.iter().map(|found| value(&found.kind)).collect::<Vec<_>>().join("|");
    rows.iter().map(row).collect()
}

fn shell(cluster: &Cluster, input: &str) -> Output {
    let mut child = Command::new(program("resqlite"))
        .args(["shell", "--mode", "list", "--endpoints", &cluster.endpoints()])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    child.wait_with_output().unwrap()
}

fn printed(output: &Output) -> String {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout.clone()).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn begin_to_commit_in_the_shell_is_one_request_with_its_reads_in_order() {
    let cluster = cluster_with(&["create table t(n integer primary key, v)"]).await;
    let before = cluster.wait_until_level().await;
    let block = "begin;\n\
        insert into t(v) values('a') returning n;\n\
        select 'rows', count(*) from t;\n\
        insert into t(v) select v || v from t;\n\
        select v from t where n = last_insert_rowid();\n\
        commit;\n\
        select count(*) from t;\n";
    assert_eq!(printed(&shell(&cluster, block)), "1\nrows|1\naa\n2\n");
    assert_eq!(cluster.wait_until_level().await, before + 1, "one entry of the log");

    // ROLLBACK drops it, and what follows is unaffected.
    let dropped = "begin; delete from t; rollback; insert into t(v) values('b'); select count(*) from t;\n";
    assert_eq!(printed(&shell(&cluster, dropped)), "3\n");

    // An error inside drops the block as a whole, and is reported.
    let failing = "begin; insert into t(v) values('c'); insert into t values(1, 'again'); commit;\n";
    let output = shell(&cluster, failing);
    assert_eq!(output.status.code(), Some(1));
    let message = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(message.contains("UNIQUE constraint failed: t.n"), "{message}");
    for node in 0..3 {
        assert_eq!(number(&cluster, node, "select count(*) from t").await, 3);
    }
}
