//! Optimistic transactions: of two over the same rows one commits; the client library tries the other again.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use resqlite::{
    api::{
        BeginRequest, ExecuteRequest, ExecuteResponse, QueryRequest, RequestId, RollbackRequest, Row,
        re_sqlite_client::ReSqliteClient,
    },
    client::{self, Client},
};
use tonic::{Code, Status, transport::Channel};

use crate::harness::{Cluster, Daemon, eventually, execute, only_integer, query, statement};

type Node = ReSqliteClient<Channel>;

async fn begin(node: &mut Node) -> String {
    let begun = node.begin(BeginRequest::default()).await.unwrap().into_inner();
    assert!(begun.log_index > 0 && begun.expires_in_ms > 0, "{begun:?}");
    begun.transaction
}

async fn read(node: &mut Node, transaction: &str, sql: &str) -> Result<Vec<Row>, Status> {
    let request =
        QueryRequest { sql: sql.into(), transaction: transaction.into(), ..QueryRequest::default() };
    let mut responses = node.query(request).await?.into_inner();
    let mut rows = Vec::new();
    while let Some(response) = responses.message().await? {
        rows.extend(response.rows);
    }
    Ok(rows)
}

async fn commit(node: &mut Node, transaction: &str, sql: &str) -> Result<ExecuteResponse, Status> {
    commit_as(node, transaction, sql, None).await
}

async fn commit_as(
    node: &mut Node,
    transaction: &str,
    sql: &str,
    id: Option<RequestId>,
) -> Result<ExecuteResponse, Status> {
    let request = ExecuteRequest {
        statements: vec![statement(sql)],
        transaction: transaction.into(),
        id,
        ..ExecuteRequest::default()
    };
    Ok(node.execute(request).await?.into_inner())
}

#[tokio::test]
async fn of_two_transactions_over_the_same_rows_one_commits_and_over_different_tables_both() {
    let cluster = Cluster::start(3).await;
    let (mut one, mut other) = (cluster.client(0), cluster.client(1));
    execute(&mut one, "create table a(n integer)").await.unwrap();
    execute(&mut one, "create table b(n integer)").await.unwrap();
    execute(&mut one, "insert into a values (1)").await.unwrap();
    execute(&mut one, "insert into b values (1)").await.unwrap();

    let (first, second) = (begin(&mut one).await, begin(&mut other).await);
    assert_eq!(only_integer(&read(&mut one, &first, "select n from a").await.unwrap()), 1);
    assert_eq!(only_integer(&read(&mut other, &second, "select n from a").await.unwrap()), 1);
    commit(&mut one, &first, "update a set n = n + 1").await.unwrap();
    // The snapshot is what it was.
    assert_eq!(only_integer(&read(&mut other, &second, "select n from a").await.unwrap()), 1);
    let lost = commit(&mut other, &second, "update a set n = n + 1").await.unwrap_err();
    assert_eq!(lost.code(), Code::Aborted, "{lost:?}");
    assert!(lost.message().contains("the table a, read by the transaction"), "{lost:?}");
    assert_eq!(only_integer(&query(&mut one, "select n from a").await.unwrap()), 2);

    let (first, second) = (begin(&mut one).await, begin(&mut other).await);
    read(&mut one, &first, "select n from a").await.unwrap();
    read(&mut other, &second, "select n from b").await.unwrap();
    commit(&mut one, &first, "update a set n = n + 1").await.unwrap();
    commit(&mut other, &second, "update b set n = n + 1").await.unwrap();
    let sum = query(&mut one, "select a.n + b.n from a, b").await.unwrap();
    assert_eq!(only_integer(&sum), 5);

    tokens_that_are_not_good_say_why(&mut one, &mut other).await;
}

/// Part of the test above, which has the cluster for it.
async fn tokens_that_are_not_good_say_why(one: &mut Node, other: &mut Node) {
    let token = begin(one).await;
    let elsewhere = read(other, &token, "select 1").await.unwrap_err();
    assert_eq!(elsewhere.code(), Code::FailedPrecondition);
    assert!(elsewhere.message().contains("began at node 1"), "{elsewhere:?}");
    assert_eq!(commit(other, &token, "delete from a").await.unwrap_err().code(), Code::FailedPrecondition);
    one.rollback(RollbackRequest { transaction: token.clone() }).await.unwrap();
    for status in [
        read(one, &token, "select 1").await.unwrap_err(),
        commit(one, &token, "delete from a").await.unwrap_err(),
        read(one, "1-00000000000000ff", "select 1").await.unwrap_err(),
    ] {
        assert_eq!(status.code(), Code::Aborted, "{status:?}");
        assert!(status.message().contains("begin again"), "{status:?}");
    }
    let malformed = read(one, "what?", "select 1").await.unwrap_err();
    assert_eq!(malformed.code(), Code::InvalidArgument);

    // A commit whose answer was lost is asked for again, at any node, under its id.
    let id =
        RequestId { client_id: vec![5; 16].into(), sequence: 1, acknowledged_below: 1, made_at_index: 1 };
    let token = begin(one).await;
    read(one, &token, "select n from a").await.unwrap();
    let first = commit_as(one, &token, "update a set n = n + 100", Some(id.clone())).await.unwrap();
    for node in [one, other] {
        let again = commit_as(node, &token, "update a set n = n + 100", Some(id.clone())).await.unwrap();
        assert_eq!(again, first);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bank_under_sixteen_clients_and_leader_kills_keeps_its_total() {
    const ACCOUNTS: u64 = 20;
    const CLIENTS: u64 = 16;
    let mut cluster = Cluster::start(3).await;
    let mut node = cluster.client(0);
    execute(&mut node, "create table account(id integer primary key, balance integer)").await.unwrap();
    execute(&mut node, "create table transfer(client integer, number integer, primary key (client, number))")
        .await
        .unwrap();
    execute(&mut node, "insert into account select value, 100 from json_each('[1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20]')")
        .await
        .unwrap();

    let (done, committed) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let mut clients = Vec::new();
    for number in 0..CLIENTS {
        let endpoints: Vec<String> =
            (0..3).map(|at| cluster.sql_address((number as usize + at) % 3).to_owned()).collect();
        let builder = Client::builder().endpoints(endpoints).retry_for(Duration::from_secs(60));
        let client = builder.deadline(Some(Duration::from_secs(60))).connect().await.unwrap();
        let (done, committed) = (done.clone(), committed.clone());
        clients.push(tokio::spawn(async move {
            let mut transfers = 0;
            while !done.load(Ordering::Relaxed) {
                transfers += 1;
                let (from, to) =
                    (1 + (number + transfers) % ACCOUNTS, 1 + (number + 7 * transfers) % ACCOUNTS);
                transfer(&client, number, transfers, from, to).await.unwrap();
                committed.fetch_add(1, Ordering::Relaxed);
            }
            transfers
        }));
    }
    for round in 0..3 {
        let leader = cluster.leader().await;
        let before = committed.load(Ordering::Relaxed);
        let victims: &[Daemon] =
            if round == 1 { &[Daemon::Raftd] } else { &[Daemon::Raftd, Daemon::Sqlited] };
        victims.iter().for_each(|&daemon| cluster.kill(leader, daemon));
        eventually("transfers go on", || async {
            (committed.load(Ordering::Relaxed) > before + 5).then_some(())
        })
        .await;
        cluster.launch(leader);
        cluster.wait_until_serving().await;
    }
    done.store(true, Ordering::Relaxed);
    let mut transfers = 0;
    for client in clients {
        transfers += client.await.unwrap();
    }
    cluster.wait_until_level().await;
    println!("{transfers} transfers");
    for at in 0..3 {
        let node = &mut cluster.client(at);
        let total = query(node, "select sum(balance) from account").await.unwrap();
        assert_eq!(only_integer(&total), 100 * ACCOUNTS as i64, "at node {}", at + 1);
        // Each was applied, and its number is unique: so once.
        let applied = query(node, "select count(*) from transfer").await.unwrap();
        assert_eq!(only_integer(&applied), transfers as i64, "at node {}", at + 1);
        assert_eq!(only_integer(&query(node, "select min(balance) >= 0 from account").await.unwrap()), 1);
    }
}

/// Moves half of what one account holds, by values that the client has computed from what it read.
async fn transfer(client: &Client, number: u64, count: u64, from: u64, to: u64) -> Result<(), client::Error> {
    client
        .transaction(|transaction| async move {
            let balance = async |id: u64| -> Result<i64, client::Error> {
                let row =
                    transaction.query_one("select balance from account where id = ?", (id as i64,)).await?;
                row.map_or(Ok(0), |row| row.get(0))
            };
            let (there, here) = (balance(from).await?, balance(to).await?);
            if from != to {
                let moved = there / 2;
                let update = "update account set balance = ? where id = ?";
                transaction.execute(update, (there - moved, from as i64));
                transaction.execute(update, (here + moved, to as i64));
            }
            transaction.execute("insert into transfer values (?, ?)", (number as i64, count as i64));
            Ok(())
        })
        .await
}
