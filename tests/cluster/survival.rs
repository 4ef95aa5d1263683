//! Processes die, at the worst of moments; nothing acknowledged is lost, nothing is applied twice.

use std::{
    collections::BTreeSet,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use resqlite::api::{RequestId, re_sqlite_client::ReSqliteClient, value::Kind};
use tonic::transport::Channel;

use crate::harness::{Cluster, Daemon, eventually, execute, execute_as, only_integer, query};

/// How often something is killed.
const ROUNDS: usize = 20;

/// One client that inserts numbered rows through one node, each under its own
/// id, and sends a request again, under the same id, until it is acknowledged.
struct Writer {
    number: usize,
    client: ReSqliteClient<Channel>,
    journal: Arc<Journal>,
}

/// What all writers know together.
#[derive(Default)]
struct Journal {
    acknowledged: Mutex<BTreeSet<(usize, u64)>>,
    acknowledgements: AtomicU64,
    done: AtomicBool,
}

impl Writer {
    async fn run(mut self) {
        let client_id = bytes::Bytes::from(vec![self.number as u8 + 1; 16]);
        let mut sequence = 0;
        while !self.journal.done.load(Ordering::Relaxed) {
            sequence += 1;
            let id = RequestId {
                client_id: client_id.clone(),
                sequence,
                acknowledged_below: sequence,
                made_at_index: 1,
            };
            let sql = format!("insert into t values({}, {sequence})", self.number);
            // The last request is pursued to its acknowledgement too, so that none is in doubt at the end.
            while let Err(status) = self.send(&sql, &id).await {
                assert!(is_worth_retrying(&status), "writer {}: {status:?}", self.number);
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            self.journal.acknowledged.lock().unwrap().insert((self.number, sequence));
            self.journal.acknowledgements.fetch_add(1, Ordering::Relaxed);
        }
    }

    async fn send(&mut self, sql: &str, id: &RequestId) -> Result<(), tonic::Status> {
        let answer = execute_as(&mut self.client, sql, Some(id.clone()));
        match tokio::time::timeout(Duration::from_secs(5), answer).await {
            Ok(result) => result.map(drop),
            Err(_) => Err(tonic::Status::deadline_exceeded("the test's own patience")),
        }
    }
}

fn is_worth_retrying(status: &tonic::Status) -> bool {
    use tonic::Code::{Cancelled, DeadlineExceeded, ResourceExhausted, Unavailable, Unknown};
    // A killed server breaks the connection, which the client library reports as unknown or cancelled.
    matches!(status.code(), Unavailable | DeadlineExceeded | ResourceExhausted | Unknown | Cancelled)
}

/// What a round kills, and of whom.
fn victims(round: usize, leader: usize) -> Vec<(usize, Daemon)> {
    let follower = (leader + 1 + round % 2) % 3;
    match round % 6 {
        0 => vec![(leader, Daemon::Raftd)],
        1 => vec![(leader, Daemon::Sqlited)],
        2 => vec![(leader, Daemon::Raftd), (leader, Daemon::Sqlited)],
        3 => vec![(follower, Daemon::Raftd)],
        4 => vec![(follower, Daemon::Sqlited)],
        _ => vec![(follower, Daemon::Raftd), (follower, Daemon::Sqlited)],
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn kill_nine_of_any_daemon_loses_nothing_and_repeats_nothing() {
    let mut cluster = Cluster::start(3).await;
    execute(&mut cluster.client(0), "create table t(writer integer, sequence integer)").await.unwrap();

    let journal = Arc::new(Journal::default());
    let writers: Vec<_> = (0..3)
        .map(|number| Writer { number, client: cluster.client(number), journal: journal.clone() })
        .map(|writer| tokio::spawn(writer.run()))
        .collect();

    let mut pauses_ms = Vec::new();
    for round in 0..ROUNDS {
        let victims = victims(round, cluster.leader().await);
        let before = journal.acknowledgements.load(Ordering::Relaxed);
        let killed_at = Instant::now();
        for &(node, daemon) in &victims {
            cluster.kill(node, daemon);
        }
        eventually(&format!("writes resume after round {round} killed {victims:?}"), || async {
            (journal.acknowledgements.load(Ordering::Relaxed) > before + 10).then_some(())
        })
        .await;
        pauses_ms.push(killed_at.elapsed().as_millis());
        for &(node, daemon) in &victims {
            cluster.launch_daemon(node, daemon);
        }
        cluster.wait_until_serving().await;
    }
    println!("ten acknowledgements after each kill, ms: {pauses_ms:?}");

    journal.done.store(true, Ordering::Relaxed);
    for writer in writers {
        writer.await.unwrap();
    }
    cluster.wait_until_level().await;

    let acknowledged = journal.acknowledged.lock().unwrap().clone();
    println!("{} acknowledged writes over {ROUNDS} rounds", acknowledged.len());
    for node in 0..3 {
        let rows = query(&mut cluster.client(node), "select writer, sequence from t").await.unwrap();
        let found: Vec<(usize, u64)> =
            rows.iter().map(|row| (integer(row, 0) as usize, integer(row, 1) as u64)).collect();
        let distinct: BTreeSet<_> = found.iter().copied().collect();
        assert_eq!(distinct.len(), found.len(), "a write was applied twice at node {}", node + 1);
        let lost: Vec<_> = acknowledged.difference(&distinct).collect();
        assert!(lost.is_empty(), "lost at node {}: {lost:?}", node + 1);
        assert_eq!(distinct, acknowledged, "every write was pursued to its acknowledgement");
    }
    let first = cluster.dump(0);
    assert!((1..3).all(|node| cluster.dump(node) == first), "the nodes differ");
}

fn integer(row: &resqlite::api::Row, column: usize) -> i64 {
    match row.values[column].kind {
        Some(Kind::Integer(integer)) => integer,
        ref other => panic!("not an integer: {other:?}"),
    }
}

#[tokio::test]
async fn all_nodes_killed_at_once_come_back_with_everything() {
    for size in [1, 3] {
        let mut cluster = Cluster::start(size).await;
        execute(&mut cluster.client(0), "create table t(n integer)").await.unwrap();
        for n in 0..100 {
            let node = n as usize % size;
            execute(&mut cluster.client(node), &format!("insert into t values({n})")).await.unwrap();
        }
        for round in 1..=3 {
            cluster.kill_all();
            (0..size).for_each(|node| cluster.launch(node));
            cluster.wait_until_serving().await;
            for node in 0..size {
                let rows = query(&mut cluster.client(node), "select count(distinct n) from t").await.unwrap();
                assert_eq!(only_integer(&rows), 99 + round, "{size} nodes, round {round}, node {}", node + 1);
            }
            execute(&mut cluster.client(0), &format!("insert into t values({})", 1_000 + round))
                .await
                .unwrap();
        }
    }
}

#[tokio::test]
async fn killed_before_the_first_write_is_no_damage() {
    for size in [1, 3] {
        let mut cluster = Cluster::prepare(size);
        // At a different point of the very first start in each round: the
        // moment is the time that the process needs to get so far.
        for round in 0..10 {
            (0..size).for_each(|node| cluster.launch(node));
            for _ in 0..round {
                // One round trip, successful or not, is a moment of varying length.
                let _ = cluster.status(0).await;
            }
            cluster.kill_all();
        }
        (0..size).for_each(|node| cluster.launch(node));
        cluster.wait_until_serving().await;
        execute(&mut cluster.client(0), "create table t(n)").await.unwrap();
    }
}

#[tokio::test]
async fn a_node_that_was_away_catches_up() {
    let mut cluster = Cluster::start(3).await;
    let away = (cluster.leader().await + 1) % 3;
    let stays = (away + 1) % 3;
    execute(&mut cluster.client(stays), "create table t(n integer)").await.unwrap();
    cluster.kill(away, Daemon::Raftd);
    cluster.kill(away, Daemon::Sqlited);
    for n in 0..200 {
        execute(&mut cluster.client(stays), &format!("insert into t values({n})")).await.unwrap();
    }
    cluster.launch(away);
    cluster.wait_until_serving().await;
    let rows = query(&mut cluster.client(away), "select count(*) from t").await.unwrap();
    assert_eq!(only_integer(&rows), 200);
}

#[tokio::test]
async fn sigterm_stops_every_daemon_cleanly_and_the_rest_serve_on() {
    let mut cluster = Cluster::start(3).await;
    execute(&mut cluster.client(0), "create table t(n integer)").await.unwrap();
    let leader = cluster.leader().await;
    let asked_at = Instant::now();
    assert!(cluster.stop(leader, Daemon::Raftd), "raftd ends with status 0");
    assert!(cluster.stop(leader, Daemon::Sqlited), "sqlited ends with status 0");
    assert!(asked_at.elapsed() < Duration::from_secs(10), "each stops within its five seconds");
    let other = (leader + 1) % 3;
    eventually("the others serve", || async {
        execute(&mut cluster.client(other), "insert into t values(1)").await.ok()
    })
    .await;
    cluster.launch(leader);
    cluster.wait_until_serving().await;
}
