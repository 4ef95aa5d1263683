//! What comes late: a retry after the answer, a client after its session, a transaction after its snapshot.

#![allow(clippy::unwrap_used, reason = "a panic is the failure's report")]

mod node;

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use node::{Node, PATIENCE};
use resqlite::api::{
    BeginRequest, ExecuteRequest, LogEntry, LogEntryKind, QueryRequest, RequestId, RollbackRequest,
    RunRequest, Statement, Value, run_event::Event, value::Kind,
};
use sqlited::{
    apply::{Applier, ApplySettings},
    auth::Caller,
    limits,
    reads::{Patience, Readers},
    sessions::{WINDOW_ENTRIES, WINDOW_MS},
    transactions::Transactions,
};
use tokio::{
    runtime,
    time::{Instant, timeout},
};
use tonic::Code;

fn id(sequence: u64, made_at_index: u64) -> Option<RequestId> {
    let client_id = Bytes::from_static(&[9; 16]);
    Some(RequestId { client_id, sequence, acknowledged_below: 1, made_at_index })
}

fn write(sql: &str, id: Option<RequestId>) -> ExecuteRequest {
    let statement = Statement { sql: sql.to_owned(), ..Statement::default() };
    ExecuteRequest { statements: vec![statement], id, ..ExecuteRequest::default() }
}

/// The integers of all rows that a Run gives.
async fn run(node: &Node, sql: &str, id: Option<RequestId>) -> Vec<i64> {
    let request = RunRequest { sql: sql.to_owned(), id, ..RunRequest::default() };
    let mut stream = node.client().run(request).await.unwrap().into_inner();
    let mut found = Vec::new();
    while let Some(response) = stream.message().await.unwrap() {
        for event in response.events.into_iter().filter_map(|event| event.event) {
            if let Event::Row(row) = event
                && let [Value { kind: Some(Kind::Integer(integer)) }] = row.values[..]
            {
                found.push(integer);
            }
        }
    }
    found
}

async fn count(node: &Node) -> i64 {
    run(node, "select count(*) from t", None).await[0]
}

#[tokio::test]
async fn a_run_that_is_sent_again_late_writes_nothing_and_reads_what_is_there_by_then() {
    let node = Node::start().await;
    node.client().execute(write("create table t(a)", None)).await.unwrap();
    let sql = "insert into t values (1) returning a; select count(*) from t";
    assert_eq!(run(&node, sql, id(1, 2)).await, [1, 1]);
    for _ in 0..3 {
        node.client().execute(write("insert into t values (2)", None)).await.unwrap();
    }
    let barriers = node.raftd.log().barriers;
    assert_eq!(run(&node, sql, id(1, 2)).await, [1, 4], "the first reply to the write, a fresh read");
    // The reply to the write is as old as the first, so it proves nothing about what was acknowledged since.
    assert!(node.raftd.log().barriers > barriers, "the read waited for a barrier of its own");
    assert_eq!(count(&node).await, 4);
    node.stop().await.unwrap();
}

#[tokio::test]
async fn a_client_that_comes_back_after_its_session_has_expired_is_told_and_nothing_is_applied_twice() {
    let node = Node::start().await;
    node.client().execute(write("create table t(a)", None)).await.unwrap();
    let insert = |id| write("insert into t values (1)", id);
    let first = node.client().execute(insert(id(1, 2))).await.unwrap().into_inner();
    let again = node.client().execute(insert(id(1, 2))).await.unwrap().into_inner();
    assert_eq!(first, again, "within the window it is the first reply");

    node.raftd.set(|log| {
        let last = log.entries.last().unwrap().clone();
        let later = |n: u64| LogEntry {
            index: last.index + n,
            kind: LogEntryKind::Noop.into(),
            timestamp_ms: last.timestamp_ms + WINDOW_MS + n,
            payload: Bytes::new(),
            ..last.clone()
        };
        log.entries.extend((1..=WINDOW_ENTRIES + 1).map(later));
    });
    let late = node.client().execute(insert(id(1, 2))).await.unwrap_err();
    assert_eq!(late.code(), Code::DeadlineExceeded, "the outcome is not known any more: {late}");
    assert_eq!(count(&node).await, 1);
    let now = node.raftd.log().entries.len() as u64;
    node.client().execute(insert(id(2, now))).await.unwrap();
    assert_eq!(count(&node).await, 2, "what it asks anew is executed");
    node.stop().await.unwrap();
}

/// Transactions on a database of their own, each held so long.
fn transactions(directory: &tempfile::TempDir, hold: Duration, most: usize) -> (Applier, Arc<Transactions>) {
    let path = directory.path().join("test.db");
    let writer = Applier::open(&path, ApplySettings::default()).unwrap();
    let readers =
        Readers::start(&writer.file(), 2, Patience::default(), &runtime::Handle::current()).unwrap();
    (writer, Arc::new(Transactions::new(1, Arc::new(readers), hold, most)))
}

#[tokio::test]
async fn a_transaction_ends_by_itself_when_its_time_is_over() {
    let directory = tempfile::tempdir().unwrap();
    let (_writer, transactions) = transactions(&directory, Duration::from_millis(200), 8);
    let caller = Caller::server();
    let begun = transactions.begin(&caller).await.unwrap();
    assert_eq!(begun.expires_in, Duration::from_millis(200));
    transactions.read(&caller, &begun.token, Instant::now() + PATIENCE).await.unwrap();
    assert_eq!(transactions.open(), 1);
    let given_up = async {
        while transactions.open() > 0 {
            tokio::task::yield_now().await;
        }
    };
    tokio::select! {
        never = transactions.expire() => match never {},
        given_up = timeout(PATIENCE, given_up) => given_up.expect("its snapshot is given up though nobody asks"),
    }
    let late = transactions.read(&caller, &begun.token, Instant::now() + PATIENCE).await.unwrap_err();
    assert_eq!(late.code(), Code::Aborted, "{late}");
    assert!(late.message().contains("expired") && late.message().contains("begin again"), "{late}");
    let unnamed =
        transactions.commit(&caller, &begun.token, None, Instant::now() + PATIENCE).await.unwrap_err();
    assert_eq!(unnamed.code(), Code::Aborted, "{unnamed}");
    let named = id(1, 1).unwrap();
    let named =
        transactions.commit(&caller, &begun.token, Some(&named), Instant::now() + PATIENCE).await.unwrap();
    assert!(named.lost.contains("expired"), "the log decides whether it was applied before: {named:?}");
}

#[tokio::test]
async fn so_many_transactions_may_be_open_and_one_that_ends_makes_room() {
    let node = Node::start().await;
    let mut client = node.client();
    let mut tokens = Vec::new();
    for _ in 0..limits::MAX_TRANSACTIONS {
        tokens.push(client.begin(BeginRequest::default()).await.unwrap().into_inner().transaction);
    }
    let refused = client.begin(BeginRequest::default()).await.unwrap_err();
    assert_eq!(refused.code(), Code::ResourceExhausted, "{refused}");
    assert!(refused.message().contains("64 transactions are open"), "{refused}");
    let query = |transaction: &str| QueryRequest {
        sql: "select 1".into(),
        transaction: transaction.to_owned(),
        ..QueryRequest::default()
    };
    client.query(query(&tokens[63])).await.unwrap();
    client.rollback(RollbackRequest { transaction: tokens[0].clone() }).await.unwrap();
    client.begin(BeginRequest::default()).await.unwrap();
    assert_eq!(client.query(query(&tokens[0])).await.unwrap_err().code(), Code::Aborted);
    node.stop().await.unwrap();
}
