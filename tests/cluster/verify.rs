//! `resqlite verify`: nodes that hold the same are told from one that does not, while writes go on.

use std::{
    fs,
    process::{Command, Output},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use resqlite::api::{Consistency, ReadOptions, value::Kind};
use tonic::Code;

use crate::harness::{Cluster, Daemon, eventually, execute, program, query, query_with, sqlite3};

async fn verify(cluster: &Cluster) -> (bool, String) {
    let (program, endpoints) = (program("resqlite"), cluster.endpoints());
    let run = move || Command::new(program).args(["verify", "--endpoints", &endpoints]).output().unwrap();
    let Output { status, stdout, stderr } = tokio::task::spawn_blocking(run).await.unwrap();
    let text = [stdout, stderr].map(|bytes| String::from_utf8(bytes).unwrap()).concat();
    assert!(status.code().is_some(), "{text}");
    (status.success(), text)
}

/// Gives a stopped node another content, and checksums that agree with it: as if it had executed something else.
fn change(cluster: &Cluster, node: usize) {
    let database = cluster.database(node);
    sqlite3(&database, "update t set text = 'text X' where id = 7");
    fs::write(database.with_file_name("resqlite.db.trusted"), "").unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_byte_changed_behind_a_nodes_back_is_found_and_the_node_named() {
    let mut cluster = Cluster::start(3).await;
    let mut node = cluster.client(0);
    execute(&mut node, "create table t(id integer primary key, text)").await.unwrap();
    execute(&mut node, "create table other(n integer)").await.unwrap();
    execute(&mut node, "create virtual table words using fts5(text)").await.unwrap();
    execute(&mut node, "insert into words values ('some words to find')").await.unwrap();
    for number in 0..20 {
        execute(&mut node, &format!("insert into t values ({number}, 'text {number}')")).await.unwrap();
    }

    let done = Arc::new(AtomicBool::new(false));
    let writer = tokio::spawn({
        let (mut node, done) = (cluster.client(1), done.clone());
        async move {
            let mut written = 0;
            while !done.load(Ordering::Relaxed) {
                execute(&mut node, "insert into other values (random())").await.unwrap();
                written += 1;
            }
            written
        }
    });
    for _ in 0..3 {
        let (good, text) = verify(&cluster).await;
        assert!(good && text.contains("all 3 nodes hold the same"), "{text}");
    }
    done.store(true, Ordering::Relaxed);
    assert!(writer.await.unwrap() > 0, "writes went on");

    let victim = 2;
    assert!(cluster.stop(victim, Daemon::Sqlited));
    change(&cluster, victim);
    cluster.launch(victim);
    cluster.wait_until_serving().await;
    let (good, text) = verify(&cluster).await;
    assert!(!good && text.contains("2 of 3 nodes hold the same"), "{text}");
    let named: Vec<&str> = text.lines().filter(|line| line.contains("DIFFERS")).collect();
    assert_eq!(named.len(), 1, "{text}");
    assert!(named[0].starts_with("node 3 ") && named[0].contains("in the table t:"), "{text}");

    assert!(cluster.stop(victim, Daemon::Sqlited));
    let (good, text) = verify(&cluster).await;
    assert!(!good && text.contains(": not compared: "), "{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_schedule_finds_the_changed_byte_and_the_node_leaves_serving_and_leading_to_the_others() {
    let mut cluster = Cluster::prepare_with(3, "", "verify_interval_seconds: 1");
    (0..3).for_each(|node| cluster.launch(node));
    cluster.wait_until_serving().await;
    let victim = cluster.leader().await;
    let others = [(victim + 1) % 3, (victim + 2) % 3];
    execute(&mut cluster.client(0), "create table t(id integer primary key, text)").await.unwrap();
    for number in 0..20 {
        execute(&mut cluster.client(0), &format!("insert into t values ({number}, 'text {number}')"))
            .await
            .unwrap();
    }
    cluster.wait_until_level().await;
    assert!(cluster.stop(victim, Daemon::Sqlited));
    change(&cluster, victim);
    cluster.launch(victim);

    assert_diverged(&cluster, victim).await;
    for node in others {
        execute(&mut cluster.client(node), "insert into t(text) values ('after')").await.unwrap();
        let rows = query(&mut cluster.client(node), "select text from t where id = 7").await.unwrap();
        assert_eq!(rows[0].values[0].kind, Some(Kind::Text("text 7".into())));
        assert_eq!(cluster.status(node).await.unwrap().node.unwrap().unhealthy, "");
    }

    for daemon in [Daemon::Sqlited, Daemon::Raftd] {
        cluster.kill(victim, daemon);
    }
    cluster.launch(victim);
    assert_diverged(&cluster, victim).await;

    // It votes and keeps the log as ever, so that the cluster bears the loss of another node.
    cluster.kill(others[0], Daemon::Raftd);
    cluster.kill(others[0], Daemon::Sqlited);
    eventually("the node that is left leads and serves", || async {
        execute(&mut cluster.client(others[1]), "insert into t(text) values ('alone')").await.ok()
    })
    .await;
    assert_eq!(cluster.leader().await, others[1]);
}

/// Waits until a node says that it has diverged and another one leads; then it serves nothing.
async fn assert_diverged(cluster: &Cluster, victim: usize) {
    let said = eventually("the node says that it has diverged", || async {
        Some(cluster.status(victim).await?.node?.unhealthy).filter(|unhealthy| !unhealthy.is_empty())
    })
    .await;
    assert!(said.contains("differs from that of most members"), "{said}");
    assert!(said.contains("resqlite node replace"), "what to do: {said}");
    eventually("another node leads", || async {
        let status = cluster.status(victim).await?.node?;
        (status.leader_id != 0 && status.leader_id != victim as u64 + 1).then_some(())
    })
    .await;
    for consistency in [Consistency::Linearizable, Consistency::Sequential, Consistency::Stale] {
        let read = ReadOptions { consistency: consistency.into(), ..ReadOptions::default() };
        let refused = query_with(&mut cluster.client(victim), "select count(*) from t", read).await;
        assert_eq!(refused.unwrap_err().code(), Code::Unavailable, "{consistency:?}");
    }
    let refused = execute(&mut cluster.client(victim), "insert into t(text) values ('never')").await;
    assert_eq!(refused.unwrap_err().code(), Code::Unavailable);
}
