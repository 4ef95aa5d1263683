//! However often a request is sent, and whoever dies meanwhile: it is applied once, and its reply stays the same.

use std::time::Duration;

use bytes::Bytes;
use resqlite::{
    api::{ExecuteRequest, ExecuteResponse, RequestId},
    client::{Client, Error, Statement},
};
use tokio::{sync::watch, task::JoinSet};
use tonic::Code;

use crate::harness::{
    Cluster, Daemon, eventually, execute, execute_as, only_integer, pursue, query, statement,
};

/// How often the leader is killed while one request is repeated, and how often that is sent after each kill.
const KILLS: usize = 5;
const REPEATS: usize = 20;

fn id(client: u8, sequence: u64, acknowledged_below: u64) -> RequestId {
    let client_id = Bytes::from(vec![client; 16]);
    RequestId { client_id, sequence, acknowledged_below, made_at_index: 1 }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_repeated_a_hundred_times_under_leader_kills_is_applied_once() {
    let mut cluster = Cluster::start(3).await;
    execute(&mut cluster.client(0), "create table t(n integer primary key, r, at)").await.unwrap();
    let clients: Vec<_> = (0..3).map(|node| cluster.client(node)).collect();
    // What it returns would differ if it were executed a second time.
    let insert = "insert into t(r, at) values(random(), strftime('%f', 'now')) returning *";
    let request = ExecuteRequest {
        statements: vec![statement(insert)],
        id: Some(id(7, 1, 1)),
        ..ExecuteRequest::default()
    };

    let mut first: Option<ExecuteResponse> = None;
    for _ in 0..KILLS {
        let leader = cluster.leader().await;
        let mut repeats = JoinSet::new();
        for repeat in 0..REPEATS {
            let (clients, request) = (clients.clone(), request.clone());
            repeats.spawn(async move { pursue(&clients, repeat, &request).await });
        }
        cluster.kill(leader, Daemon::Raftd);
        while let Some(reply) = repeats.join_next().await {
            let reply = reply.unwrap().unwrap();
            let expected = first.get_or_insert_with(|| reply.clone());
            assert_eq!(&reply, expected, "every reply is the first one");
        }
        cluster.launch_daemon(leader, Daemon::Raftd);
        cluster.wait_until_serving().await;
    }
    for node in 0..3 {
        let rows = query(&mut cluster.client(node), "select count(*) from t").await.unwrap();
        assert_eq!(only_integer(&rows), 1, "applied once, as seen at node {}", node + 1);
    }
}

#[tokio::test]
async fn a_failure_is_a_reply_that_stays_though_it_would_succeed_by_now() {
    let cluster = Cluster::start(3).await;
    execute(&mut cluster.client(0), "create table t(n integer primary key)").await.unwrap();
    execute(&mut cluster.client(0), "insert into t values(1)").await.unwrap();
    let insert = "insert into t values(1)";
    let first = execute_as(&mut cluster.client(1), insert, Some(id(1, 1, 1))).await.unwrap_err();
    assert_eq!(first.code(), Code::FailedPrecondition, "{first:?}");
    execute(&mut cluster.client(0), "delete from t").await.unwrap();
    let again = execute_as(&mut cluster.client(2), insert, Some(id(1, 1, 1))).await.unwrap_err();
    assert_eq!((again.code(), again.message()), (first.code(), first.message()));
    assert_eq!(again.details(), first.details());
}

#[tokio::test]
async fn an_id_that_cannot_be_answered_has_its_own_error_and_changes_nothing() {
    let cluster = Cluster::start(3).await;
    let mut client = cluster.client(0);
    execute(&mut client, "create table t(n integer)").await.unwrap();
    let insert = "insert into t values(1)";
    execute_as(&mut client, insert, Some(id(1, 1, 1))).await.unwrap();
    execute_as(&mut client, insert, Some(id(1, 2, 2))).await.unwrap();

    // The second request said that the client has the reply to the first: it is forgotten, and never applied again.
    let acknowledged = execute_as(&mut cluster.client(1), insert, Some(id(1, 1, 1))).await.unwrap_err();
    assert_eq!(acknowledged.code(), Code::DeadlineExceeded, "{acknowledged:?}");
    assert!(acknowledged.message().contains("acknowledged the reply"), "{}", acknowledged.message());

    let short = RequestId { client_id: Bytes::from_static(b"short"), ..id(1, 3, 3) };
    for (wrong, words) in [
        (short, "5 bytes instead of 16"),
        (id(1, 0, 0), "id.sequence 0 is not between"),
        (id(1, 3, 4), "acknowledged_below is beyond"),
    ] {
        let status = execute_as(&mut client, insert, Some(wrong)).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument, "{status:?}");
        assert!(status.message().contains(words), "{}", status.message());
    }
    for node in 0..3 {
        let rows = query(&mut cluster.client(node), "select count(*) from t").await.unwrap();
        assert_eq!(only_integer(&rows), 2);
    }
}

#[tokio::test]
async fn of_replies_that_nobody_acknowledges_the_oldest_go_and_still_nothing_is_applied_twice() {
    // The bound of the server: sessions::MAX_SESSION_BYTES, 4 MiB.
    let cluster = Cluster::start(3).await;
    let mut client = cluster.client(0);
    execute(&mut client, "create table t(n integer primary key, v)").await.unwrap();
    let insert = "insert into t(v) values(zeroblob(1 << 20)) returning n, v";
    let mut last = None;
    for sequence in 1..=10 {
        last = Some(execute_as(&mut client, insert, Some(id(3, sequence, 1))).await.unwrap());
    }
    let again = execute_as(&mut cluster.client(1), insert, Some(id(3, 10, 1))).await.unwrap();
    assert_eq!(Some(again), last, "the newest replies are kept");
    let oldest = execute_as(&mut cluster.client(2), insert, Some(id(3, 1, 1))).await.unwrap_err();
    assert_eq!(oldest.code(), Code::DeadlineExceeded, "{oldest:?}");
    assert!(oldest.message().contains("was applied before; its reply was not kept"), "{}", oldest.message());
    for node in 0..3 {
        let rows = query(&mut cluster.client(node), "select count(*) from t").await.unwrap();
        assert_eq!(only_integer(&rows), 10);
    }
}

/// How many accounts, clients, and how much money in each account at first.
const ACCOUNTS: i64 = 20;
const CLIENTS: usize = 16;
const BALANCE: i64 = 100;

/// One client of the bank: transfers until it is told to stop. Returns how many transfers it saw succeed and how many
/// fail for want of money.
async fn transfer_until(client: Client, number: usize, mut stop: watch::Receiver<bool>) -> (i64, i64) {
    let (mut done, mut refused) = (0, 0);
    while !*stop.borrow_and_update() {
        let turn = (number as i64 + 1) * (done + refused + 1);
        let (from, to) = (turn * 7 % ACCOUNTS, (turn * 11 + 3) % ACCOUNTS);
        let amount = 1 + turn % 90;
        let result = client
            .execute_all([
                Statement::new("select count(*) = ?1 from account", (ACCOUNTS,)).guard(),
                Statement::new(
                    "update account set balance = balance - ?1 where id = ?2 and balance >= ?1",
                    (amount, from),
                )
                .expect_rows_affected(1),
                Statement::new("update account set balance = balance + ?1 where id = ?2", (amount, to))
                    .expect_rows_affected(1),
                Statement::new(
                    "insert into transfer values(?1, ?2, ?3, ?4)",
                    (number as i64, from, to, amount),
                ),
            ])
            .await;
        match result {
            Ok(_) => done += 1,
            Err(Error::Aborted { .. }) => refused += 1,
            Err(error) => panic!("client {number}: {error:?}"),
        }
    }
    (done, refused)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bank_under_sixteen_clients_and_leader_kills_keeps_its_total() {
    let mut cluster = Cluster::start(3).await;
    let mut admin = cluster.client(0);
    execute(&mut admin, "create table account(id integer primary key, balance integer check(balance >= 0))")
        .await
        .unwrap();
    execute(&mut admin, "create table transfer(client, source, target, amount)").await.unwrap();
    let fill = format!(
        "with recursive n(i) as (select 0 union all select i + 1 from n where i < {}) insert into account select i, {BALANCE} from n",
        ACCOUNTS - 1
    );
    execute(&mut admin, &fill).await.unwrap();

    let (stop, stopped) = watch::channel(false);
    let mut running = JoinSet::new();
    for number in 0..CLIENTS {
        let mut endpoints: Vec<_> = (0..3).map(|node| cluster.sql_address(node).to_owned()).collect();
        endpoints.rotate_left(number % 3);
        let client = Client::builder().endpoints(endpoints).deadline(Some(Duration::from_secs(60)));
        let client = client.retry_for(Duration::from_secs(60)).connect().await.unwrap();
        let stopped = stopped.clone();
        running.spawn(async move { (number, transfer_until(client, number, stopped).await) });
    }
    for round in 0..4 {
        let leader = cluster.leader().await;
        let before = transfers(&cluster, (leader + 1) % 3).await;
        let victims = if round % 2 == 0 { vec![Daemon::Raftd] } else { vec![Daemon::Raftd, Daemon::Sqlited] };
        victims.iter().for_each(|&daemon| cluster.kill(leader, daemon));
        let survivor = (leader + 1) % 3;
        eventually("transfers resume", || async {
            (transfers(&cluster, survivor).await > before + 50).then_some(())
        })
        .await;
        victims.iter().for_each(|&daemon| cluster.launch_daemon(leader, daemon));
        cluster.wait_until_serving().await;
        assert_eq!(total(&cluster, leader).await, ACCOUNTS * BALANCE, "after kill {round}");
    }
    stop.send_replace(true);
    let (mut seen, mut refused) = (0, 0);
    while let Some(ended) = running.join_next().await {
        let (number, (done, without_money)) = ended.unwrap();
        let mine = format!("select count(*) from transfer where client = {number}");
        let recorded = only_integer(&query(&mut cluster.client(number % 3), &mine).await.unwrap());
        assert_eq!(
            recorded, done,
            "client {number}: each transfer that it was told of is there once, and no other"
        );
        (seen, refused) = (seen + done, refused + without_money);
    }
    println!("{seen} transfers, {refused} refused for want of money");
    for node in 0..3 {
        assert_eq!(total(&cluster, node).await, ACCOUNTS * BALANCE);
        let wrong = format!(
            "select count(*) from account a where balance <> {BALANCE}
               + (select coalesce(sum(amount), 0) from transfer where target = a.id)
               - (select coalesce(sum(amount), 0) from transfer where source = a.id)"
        );
        assert_eq!(only_integer(&query(&mut cluster.client(node), &wrong).await.unwrap()), 0);
    }
    cluster.wait_until_level().await;
    let first = cluster.dump(0);
    assert!((1..3).all(|node| cluster.dump(node) == first), "the nodes differ");
}

async fn transfers(cluster: &Cluster, node: usize) -> i64 {
    let count = || async { query(&mut cluster.client(node), "select count(*) from transfer").await.ok() };
    only_integer(&eventually("the transfers are counted", count).await)
}

async fn total(cluster: &Cluster, node: usize) -> i64 {
    let sum = || async { query(&mut cluster.client(node), "select sum(balance) from account").await.ok() };
    only_integer(&eventually("the balances are summed", sum).await)
}
