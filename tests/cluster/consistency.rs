//! What a read may see: never less than its client asked for, and rather an error than a lie.

use std::time::Duration;

use resqlite::api::{Consistency, QueryRequest, ReadOptions, Row};
use tokio::task::JoinSet;
use tonic::{Code, Request, Status};

use crate::harness::{Cluster, Daemon, eventually, execute, only_integer, query_with};

/// Of the configuration's defaults.
const READERS: usize = 4;

fn linearizable() -> ReadOptions {
    ReadOptions::default()
}

fn sequential(min_index: u64) -> ReadOptions {
    ReadOptions { consistency: Consistency::Sequential.into(), min_index, ..ReadOptions::default() }
}

fn stale(max_staleness_ms: u64) -> ReadOptions {
    ReadOptions { consistency: Consistency::Stale.into(), max_staleness_ms, ..ReadOptions::default() }
}

/// Reads `select sum(n) from t` within a deadline.
async fn sum(cluster: &Cluster, node: usize, read: ReadOptions, patience: Duration) -> Result<i64, Status> {
    let mut request = Request::new(QueryRequest {
        sql: "select sum(n) from t".into(),
        read: Some(read),
        ..QueryRequest::default()
    });
    request.set_timeout(patience);
    let mut responses = cluster.client(node).query(request).await?.into_inner();
    let mut rows: Vec<Row> = Vec::new();
    while let Some(response) = responses.message().await? {
        rows.extend(response.rows);
    }
    Ok(only_integer(&rows))
}

async fn cluster_with_one() -> Cluster {
    let cluster = Cluster::start(3).await;
    execute(&mut cluster.client(0), "create table t(n integer)").await.unwrap();
    execute(&mut cluster.client(0), "insert into t values(1)").await.unwrap();
    cluster.wait_until_level().await;
    cluster
}

const SHORT: Duration = Duration::from_millis(700);
const LONG: Duration = Duration::from_secs(20);

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_hears_nothing_answers_only_what_it_can_answer_truly() {
    let cluster = cluster_with_one().await;
    let away = (cluster.leader().await + 1) % 3;
    let other = (away + 1) % 3;
    // Nothing reaches this follower's database any more, while the others go on.
    cluster.signal(away, Daemon::Raftd, "STOP");
    let token = execute(&mut cluster.client(other), "insert into t values(10)").await.unwrap().log_index;

    let refused = sum(&cluster, away, sequential(token), SHORT).await.unwrap_err();
    assert!(matches!(refused.code(), Code::DeadlineExceeded | Code::Cancelled), "{refused:?}");
    assert_eq!(sum(&cluster, away, stale(0), LONG).await.unwrap(), 1, "stale answers what there is");
    assert_eq!(
        sum(&cluster, away, sequential(token - 1), LONG).await.unwrap(),
        1,
        "an older token is satisfied"
    );
    assert_eq!(sum(&cluster, other, sequential(token), LONG).await.unwrap(), 11);
    let too_old =
        eventually("its data become too old", || async { sum(&cluster, away, stale(100), LONG).await.err() })
            .await;
    assert_eq!(too_old.code(), Code::Unavailable, "{too_old:?}");
    assert!(too_old.message().contains("may be older than 100 ms"), "{}", too_old.message());
    let unconfirmed = sum(&cluster, away, linearizable(), LONG).await.unwrap_err();
    assert_eq!(unconfirmed.code(), Code::Unavailable, "{unconfirmed:?}");

    cluster.signal(away, Daemon::Raftd, "CONT");
    assert_eq!(sum(&cluster, away, sequential(token), LONG).await.unwrap(), 11, "the token is waited for");
    let fresh = || async { sum(&cluster, away, stale(1_000), LONG).await.ok() };
    assert_eq!(eventually("it is fresh again", fresh).await, 11);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_leader_that_slept_through_its_replacement_does_not_answer_from_the_past() {
    let cluster = cluster_with_one().await;
    for round in 0..3 {
        let asleep = cluster.leader().await;
        let other = (asleep + 1) % 3;
        cluster.signal(asleep, Daemon::Raftd, "STOP");
        let add = format!("insert into t values({})", 10 + round);
        eventually("the others have a leader", || async {
            execute(&mut cluster.client(other), &add).await.ok()
        })
        .await;
        let expected = sum(&cluster, other, linearizable(), LONG).await.unwrap();
        // It wakes up and believes that it leads. The question reaches it with that belief.
        let (answer, ()) = tokio::join!(sum(&cluster, asleep, linearizable(), LONG), async {
            cluster.signal(asleep, Daemon::Raftd, "CONT");
        });
        assert_eq!(answer.unwrap(), expected, "round {round}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_quorum_nothing_is_linearizable_or_fresh_but_stale_is_served() {
    let mut cluster = cluster_with_one().await;
    let alone = cluster.leader().await;
    for node in (0..3).filter(|&node| node != alone) {
        cluster.kill(node, Daemon::Raftd);
    }
    let unconfirmed = sum(&cluster, alone, linearizable(), LONG).await.unwrap_err();
    assert_eq!(unconfirmed.code(), Code::Unavailable, "{unconfirmed:?}");
    let too_old = eventually("its data become too old", || async {
        sum(&cluster, alone, stale(200), LONG).await.err()
    })
    .await;
    assert_eq!(too_old.code(), Code::Unavailable, "{too_old:?}");
    assert_eq!(sum(&cluster, alone, stale(0), LONG).await.unwrap(), 1);
    let refused = execute(&mut cluster.client(alone), "insert into t values(2)").await.unwrap_err();
    assert!(matches!(refused.code(), Code::Unavailable | Code::DeadlineExceeded), "{refused:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reader_is_free_again_when_its_client_leaves_or_its_deadline_passes() {
    let cluster = cluster_with_one().await;
    let endless = "with recursive n(i) as (select 1 union all select i + 1 from n) select max(i) from n";
    let occupy = |patience: Duration| {
        let mut reads = JoinSet::new();
        for _ in 0..READERS {
            let mut client = cluster.client(0);
            reads.spawn(async move {
                let mut request =
                    Request::new(QueryRequest { sql: endless.into(), ..QueryRequest::default() });
                request.set_timeout(patience);
                match client.query(request).await {
                    Ok(response) => response.into_inner().message().await.map(drop),
                    Err(status) => Err(status),
                }
            });
        }
        reads
    };
    let all_are_busy = || async {
        eventually("all readers are busy", || async { sum(&cluster, 0, stale(0), SHORT).await.err() }).await;
    };

    // The clients leave.
    let mut reads = occupy(Duration::from_secs(3_600));
    all_are_busy().await;
    reads.abort_all();
    while reads.join_next().await.is_some() {}
    assert_eq!(sum(&cluster, 0, stale(0), LONG).await.unwrap(), 1);

    // The deadlines pass.
    let mut reads = occupy(Duration::from_secs(3));
    all_are_busy().await;
    while let Some(ended) = reads.join_next().await {
        let status = ended.unwrap().expect_err("it has no end");
        assert!(matches!(status.code(), Code::DeadlineExceeded | Code::Cancelled), "{status:?}");
    }
    let rows = query_with(&mut cluster.client(0), "select sum(n) from t", stale(0)).await.unwrap();
    assert_eq!(only_integer(&rows), 1);
}
