//! A node whose content is not that of most members serves nobody; one that nobody can judge serves on.
//!
//! The node is real; what its two peers came to is put in its log by the test.

#![allow(clippy::unwrap_used, reason = "a panic is the failure's report")]

mod node;

use node::{FakeRaftd, Node, PATIENCE};
use prost::Message;
use resqlite::{
    api::{
        BeginRequest, Consistency, ContentHashRequest, ContentReport, ExecuteRequest, LogEntryKind,
        LoggedRequest, NodeStatus, QueryRequest, ReadOptions, RequestId, RunRequest, Statement,
        StatusRequest, VerifyRequest, logged_request::Body,
    },
    config::{Config, Member},
};
use tokio::time::timeout;
use tonic::{Code, Status};
use tonic_health::pb::health_check_response::ServingStatus;

/// Gives the node two peers, of whom it hears through its log only.
fn three_members(config: &mut Config) {
    for id in [2, 3] {
        let address = |port: u64| format!("127.0.0.1:{port}").parse().unwrap();
        config.cluster.members.push(Member { id, raft: address(10 + id), sql: address(20 + id) });
    }
}

fn write(sql: &str) -> ExecuteRequest {
    let statement = Statement { sql: sql.to_owned(), ..Statement::default() };
    ExecuteRequest { statements: vec![statement], ..ExecuteRequest::default() }
}

fn read(consistency: Consistency) -> QueryRequest {
    let read = ReadOptions { consistency: consistency.into(), ..ReadOptions::default() };
    QueryRequest { sql: "select count(*) from t".into(), read: Some(read), ..QueryRequest::default() }
}

/// All bodies that sqlited has put in the log.
fn bodies(log: &FakeRaftd) -> Vec<(u64, Body)> {
    let log = log.log();
    let payloads = log.entries.iter().filter(|entry| entry.kind() == LogEntryKind::Payload);
    payloads
        .filter_map(|entry| Some((entry.index, LoggedRequest::decode(entry.payload.clone()).unwrap().body?)))
        .collect()
}

/// What the node itself reported about a marker.
async fn own_report(node: &Node, marker: u64) -> Vec<u8> {
    let report = |raftd: &FakeRaftd| {
        bodies(raftd).into_iter().find_map(|(_, body)| match body {
            Body::Report(report) if report.marker_index == marker => Some(report),
            _ => None,
        })
    };
    let mut changed = node.raftd.changes();
    let found = async {
        loop {
            if let Some(report) = report(&node.raftd) {
                return report;
            }
            changed.changed().await.unwrap();
        }
    };
    let report = timeout(PATIENCE, found).await.expect("the node reports in time");
    assert_eq!(report.node_id, 1);
    report.hash.to_vec()
}

/// Lets a peer report.
fn peer_reports(node: &Node, peer: u64, marker_index: u64, hash: &[u8]) {
    let entry = node.raftd.log().entries.iter().find(|entry| !entry.payload.is_empty()).unwrap().clone();
    let id = RequestId {
        client_id: vec![peer as u8; 16].into(),
        sequence: marker_index,
        acknowledged_below: marker_index,
        made_at_index: marker_index,
    };
    let report = ContentReport { node_id: peer, marker_index, hash: hash.to_vec().into() };
    let request = LoggedRequest {
        id: Some(id),
        server_made_id: true,
        body: Some(Body::Report(report)),
        ..LoggedRequest::decode(entry.payload).unwrap()
    };
    node.raftd.append(LogEntryKind::Payload, request.encode_to_vec().into());
}

async fn status(node: &Node) -> NodeStatus {
    node.client().status(StatusRequest {}).await.unwrap().into_inner().node.unwrap()
}

/// The status once it is as asked. Asked again whenever the log or the health has changed, and in any case soon.
async fn status_once(node: &Node, condition: impl Fn(&NodeStatus) -> bool) -> NodeStatus {
    let asking = async {
        loop {
            let status = status(node).await;
            if condition(&status) {
                return status;
            }
            tokio::task::yield_now().await;
        }
    };
    timeout(PATIENCE, asking).await.expect("the status is as asked in time")
}

async fn count(node: &Node, consistency: Consistency) -> Result<usize, Status> {
    let mut stream = node.client().query(read(consistency)).await?.into_inner();
    Ok(stream.message().await?.unwrap().rows.len())
}

fn assert_refused(status: &Status) {
    assert_eq!(status.code(), Code::Unavailable, "{status}");
    assert!(status.message().contains("resqlite node replace"), "what to do: {status}");
}

async fn assert_serves_nobody(node: &Node) {
    for consistency in [Consistency::Linearizable, Consistency::Sequential, Consistency::Stale] {
        assert_refused(&count(node, consistency).await.unwrap_err());
    }
    let mut client = node.client();
    assert_refused(&client.execute(write("insert into t values (2)")).await.unwrap_err());
    assert_refused(&client.begin(BeginRequest::default()).await.unwrap_err());
    assert_refused(&client.verify(VerifyRequest {}).await.unwrap_err());
    for sql in ["select * from t", "insert into t values (2)"] {
        let run = RunRequest { sql: sql.into(), ..RunRequest::default() };
        let mut events = client.run(run).await.unwrap().into_inner();
        assert_refused(&events.message().await.unwrap_err());
    }
    let seen = status(node).await;
    assert!(seen.unhealthy.contains("resqlite node replace"), "{seen:?}");
}

/// A node with a table, and its verified content as of a marker.
async fn verified() -> (Node, u64, Vec<u8>) {
    let node = Node::start_as(three_members, |_| {}).await;
    node.until_health(ServingStatus::Serving).await;
    node.client().execute(write("create table t(a)")).await.unwrap();
    node.client().execute(write("insert into t values (1)")).await.unwrap();
    let marker = node.client().verify(VerifyRequest {}).await.unwrap().into_inner().log_index;
    let own = own_report(&node, marker).await;
    (node, marker, own)
}

#[tokio::test]
async fn a_node_that_differs_from_most_members_serves_nobody_before_and_after_a_restart() {
    let (node, marker, own) = verified().await;
    let begun = node.client().begin(BeginRequest::default()).await.unwrap().into_inner();
    peer_reports(&node, 2, marker, &[7; 32]);
    peer_reports(&node, 3, marker, &[7; 32]);
    node.until_health(ServingStatus::NotServing).await;
    node.raftd.until(|log| log.must_not_lead).await;
    assert_serves_nobody(&node).await;
    let in_transaction = QueryRequest { transaction: begun.transaction, ..read(Consistency::Linearizable) };
    assert_refused(&node.client().query(in_transaction).await.unwrap_err());

    let index = node.raftd.log().entries.len() as u64;
    status_once(&node, |status| status.applied_index == index).await;
    let hashes = ContentHashRequest { log_index: marker };
    assert!(node.client().content_hash(hashes).await.is_ok(), "what differs can still be looked into");
    let mark = node.directory.path().join("sql/resqlite.db.diverged");
    // It refuses everybody at once, and the note of it takes as long as the disk does.
    let noted = async {
        while !mark.exists() {
            tokio::task::yield_now().await;
        }
    };
    timeout(PATIENCE, noted).await.expect("the mark is made in time");
    let mark = std::fs::read_to_string(mark).unwrap();
    for fact in [format!("log index {marker}"), blake3::Hash::from_slice(&own).unwrap().to_string()] {
        assert!(mark.contains(&fact), "{mark}");
    }

    node.raftd.set(|log| log.must_not_lead = false);
    let node = node.restart().await;
    node.raftd.until(|log| log.must_not_lead).await;
    node.until_health(ServingStatus::NotServing).await;
    assert_serves_nobody(&node).await;
    node.stop().await.unwrap();
}

#[tokio::test]
async fn a_node_that_agrees_with_most_members_serves_on_whatever_the_third_holds() {
    let (node, marker, own) = verified().await;
    peer_reports(&node, 2, marker, &own);
    peer_reports(&node, 3, marker, &[7; 32]);
    let index = node.raftd.log().entries.len() as u64;
    let seen = status_once(&node, |status| status.applied_index == index).await;
    assert_eq!((seen.unhealthy.as_str(), seen.alarm.as_str()), ("", ""));
    assert_eq!(count(&node, Consistency::Linearizable).await.unwrap(), 1);
    assert!(!node.raftd.log().must_not_lead);
    node.stop().await.unwrap();
}

#[tokio::test]
async fn without_a_majority_all_of_them_alarm_and_serve_on() {
    let (node, marker, _) = verified().await;
    peer_reports(&node, 2, marker, &[7; 32]);
    peer_reports(&node, 3, marker, &[8; 32]);
    let alarmed = |status: &NodeStatus| status.alarm.contains("nodes 1, 2, 3");
    let seen = status_once(&node, alarmed).await;
    assert_eq!(seen.unhealthy, "");
    assert!(seen.alarm.contains("restore a backup"), "what to do: {}", seen.alarm);
    node.client().execute(write("insert into t values (2)")).await.unwrap();
    assert_eq!(count(&node, Consistency::Linearizable).await.unwrap(), 1);
    assert!(!node.raftd.log().must_not_lead);

    let marker = node.client().verify(VerifyRequest {}).await.unwrap().into_inner().log_index;
    let own = own_report(&node, marker).await;
    peer_reports(&node, 3, marker, &own);
    status_once(&node, |status| status.alarm.is_empty()).await;
    node.stop().await.unwrap();
}

#[tokio::test]
async fn reports_of_strangers_and_of_no_hash_count_for_nothing() {
    let (node, marker, _) = verified().await;
    for stranger in [4, 5, 6] {
        peer_reports(&node, stranger, marker, &[7; 32]);
    }
    peer_reports(&node, 2, marker, &[7; 31]);
    peer_reports(&node, 3, marker, &[]);
    let index = node.raftd.log().entries.len() as u64;
    let seen = status_once(&node, |status| status.applied_index == index).await;
    assert_eq!((seen.unhealthy.as_str(), seen.alarm.as_str()), ("", ""));
    assert_eq!(count(&node, Consistency::Linearizable).await.unwrap(), 1);
    node.stop().await.unwrap();
}

#[tokio::test]
async fn the_leader_puts_a_marker_in_the_log_at_its_interval_and_a_follower_does_not() {
    let every_second = |config: &mut Config| config.sqlited.verify_interval_seconds = 1;
    let node = Node::start_as(every_second, |_| {}).await;
    node.until_health(ServingStatus::Serving).await;
    let markers = |raftd: &FakeRaftd| {
        bodies(raftd).into_iter().filter(|(_, body)| matches!(body, Body::Verify(_))).count()
    };
    let mut changed = node.raftd.changes();
    let three = async {
        while markers(&node.raftd) < 3 {
            changed.changed().await.unwrap();
        }
    };
    timeout(PATIENCE, three).await.expect("a marker each second");
    node.stop().await.unwrap();

    let follower = |config: &mut Config| {
        three_members(config);
        every_second(config);
    };
    let node = Node::start_as(follower, |raftd| raftd.set(|log| log.leader_id = 2)).await;
    node.until_health(ServingStatus::Serving).await;
    // Long enough for three markers, while the log shows that the node is at work.
    let began = std::time::Instant::now();
    node.client().execute(write("create table t(a)")).await.unwrap();
    while began.elapsed() < std::time::Duration::from_secs(3) {
        node.client().execute(write("insert into t values (1)")).await.unwrap();
    }
    assert_eq!(markers(&node.raftd), 0);
    node.stop().await.unwrap();
}
