//! Any node takes any request, and a linearizable read sees what was acknowledged.

use resqlite::api::{Consistency, ReadOptions};

use crate::harness::{Cluster, execute, only_integer, query, query_with};

#[tokio::test]
async fn a_write_at_any_node_is_seen_at_every_node_at_once() {
    let cluster = Cluster::start(3).await;
    execute(&mut cluster.client(0), "create table t(n integer)").await.unwrap();
    for round in 0..10 {
        for writer in 0..3 {
            let sql = format!("insert into t values({round})");
            let written = execute(&mut cluster.client(writer), &sql).await.unwrap();
            let expected = round * 3 + writer as i64 + 1;
            for reader in 0..3 {
                let rows = query(&mut cluster.client(reader), "select count(*) from t").await.unwrap();
                assert_eq!(only_integer(&rows), expected, "linearizable at node {}", reader + 1);
                let sequential = ReadOptions {
                    consistency: Consistency::Sequential.into(),
                    min_index: written.log_index,
                    ..ReadOptions::default()
                };
                let rows =
                    query_with(&mut cluster.client(reader), "select count(*) from t", sequential).await;
                assert_eq!(only_integer(&rows.unwrap()), expected, "sequential at node {}", reader + 1);
            }
        }
    }
}

#[tokio::test]
async fn a_single_node_is_a_cluster() {
    let cluster = Cluster::start(1).await;
    let mut client = cluster.client(0);
    execute(&mut client, "create table t(n integer)").await.unwrap();
    execute(&mut client, "insert into t values (40), (2)").await.unwrap();
    assert_eq!(only_integer(&query(&mut client, "select sum(n) from t").await.unwrap()), 42);
}
