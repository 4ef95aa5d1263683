//! `resqlite verify`: nodes that hold the same are told from one that does not, while writes go on.

use std::{
    process::{Command, Output},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use crate::harness::{Cluster, Daemon, execute, program, sqlite3};

async fn verify(cluster: &Cluster) -> (bool, String) {
    let (program, endpoints) = (program("resqlite"), cluster.endpoints());
    let run = move || Command::new(program).args(["verify", "--endpoints", &endpoints]).output().unwrap();
    let Output { status, stdout, stderr } = tokio::task::spawn_blocking(run).await.unwrap();
    let text = [stdout, stderr].map(|bytes| String::from_utf8(bytes).unwrap()).concat();
    assert!(status.code().is_some(), "{text}");
    (status.success(), text)
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
    sqlite3(&cluster.database(victim), "update t set text = 'text X' where id = 7");
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
