//! A write without an end is ended alike on every node, and the cluster serves on.

use std::time::{Duration, Instant};

use resqlite::api::{ExecuteRequest, Row, value::Kind};
use tonic::{Code, Request, Status};

use crate::harness::{Cluster, eventually, execute, only_integer, query, statement};

/// More than enough for the default budget; how long it took is printed, and is nobody's verdict.
const PATIENCE: Duration = Duration::from_secs(120);

async fn endless(cluster: &Cluster, node: usize, sql: &str) -> Status {
    let began = Instant::now();
    let mut request =
        Request::new(ExecuteRequest { statements: vec![statement(sql)], ..ExecuteRequest::default() });
    request.set_timeout(PATIENCE);
    let status = cluster.client(node).execute(request).await.expect_err("it has no end");
    println!("refused after {:.1} s: {sql}", began.elapsed().as_secs_f64());
    status
}

#[tokio::test(flavor = "multi_thread")]
async fn a_write_without_an_end_is_refused_alike_on_all_nodes_and_the_cluster_serves_on() {
    let cluster = Cluster::start(3).await;
    execute(&mut cluster.client(0), "create table t(n integer primary key, v)").await.unwrap();
    execute(&mut cluster.client(0), "insert into t values(1, 'before')").await.unwrap();
    let numbers = "with recursive n(i) as (select 1 union all select i + 1 from n)";
    for (node, sql) in [
        format!("{numbers} insert into t(v) select i from n"),
        format!("{numbers} update t set v = (select count(*) from n)"),
    ]
    .iter()
    .enumerate()
    {
        let status = endless(&cluster, node, sql).await;
        assert_eq!(status.code(), Code::ResourceExhausted, "{status:?}");
        assert!(status.message().contains("more than its budget of"), "{}", status.message());
    }

    execute(&mut cluster.client(2), "insert into t values(2, 'after')").await.unwrap();
    let expected = [(1, "before"), (2, "after")];
    for node in 0..3 {
        let read = || async { query(&mut cluster.client(node), "select n, v from t order by n").await.ok() };
        let rows = eventually("the node serves on", read).await;
        assert_eq!(rows.iter().map(number_and_text).collect::<Vec<_>>(), expected, "node {}", node + 1);
    }
    cluster.wait_until_level().await;
    let first = cluster.dump(0);
    assert!((1..3).all(|node| cluster.dump(node) == first), "the nodes differ");
}

fn number_and_text(row: &Row) -> (i64, &str) {
    match row.values.iter().map(|value| value.kind.as_ref()).collect::<Vec<_>>()[..] {
        [Some(Kind::Integer(number)), Some(Kind::Text(text))] => (*number, text),
        ref other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_read_without_an_end_ends_with_its_deadline_and_keeps_no_write_waiting() {
    let cluster = Cluster::start(3).await;
    execute(&mut cluster.client(0), "create table t(n integer)").await.unwrap();
    let mut reader = cluster.client(1);
    let endless = tokio::spawn(async move {
        let sql =
            "with recursive n(i) as (select 1 union all select i + 1 from n) select max(i) from n".into();
        let mut request = Request::new(resqlite::api::QueryRequest { sql, ..Default::default() });
        request.set_timeout(Duration::from_secs(2));
        match reader.query(request).await {
            Ok(response) => response.into_inner().message().await.expect_err("it has no end"),
            Err(status) => status,
        }
    });
    for n in 0..20 {
        execute(&mut cluster.client(1), &format!("insert into t values({n})")).await.unwrap();
    }
    let rows = query(&mut cluster.client(1), "select count(*) from t").await.unwrap();
    assert_eq!(only_integer(&rows), 20, "the writes went on beside the read");
    let status = endless.await.unwrap();
    assert!(matches!(status.code(), Code::DeadlineExceeded | Code::Cancelled), "{status:?}");
}
