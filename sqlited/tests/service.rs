//! What clients of sqlited may rely on, whatever its raftd does.

#![allow(clippy::unwrap_used, reason = "a panic is the failure's report")]

mod node;

use std::time::{Duration, Instant};

use bytes::Bytes;
use node::{Fate, Node, PATIENCE};
use prost::Message;
use resqlite::api::{
    Consistency, ExecuteRequest, ExecuteResponse, LogEntryKind, LoggedRequest, ProposalRefusal, QueryRequest,
    ReadOptions, RequestId, Row, RunEvent, RunRequest, Statement, StatusRequest, Value, run_event::Event,
    value::Kind,
};
use tokio::{task::JoinSet, time::timeout};
use tonic::{Code, Request, Status};
use tonic_health::pb::health_check_response::ServingStatus;

/// Rows without an end.
const ENDLESS: &str = "with recursive n(x) as (select 1 union all select x + 1 from n) select x from n";
/// Work without an end, and no rows.
const BUSY: &str = "with recursive n(x) as (select 1 union all select x + 1 from n) select count(*) from n";

fn statement(sql: &str) -> Statement {
    Statement { sql: sql.to_owned(), ..Statement::default() }
}

fn write(sql: &str) -> ExecuteRequest {
    ExecuteRequest { statements: vec![statement(sql)], ..ExecuteRequest::default() }
}

fn read(sql: &str, read: ReadOptions) -> QueryRequest {
    QueryRequest { sql: sql.to_owned(), read: Some(read), ..QueryRequest::default() }
}

fn stale() -> ReadOptions {
    ReadOptions { consistency: Consistency::Stale.into(), ..ReadOptions::default() }
}

fn integer(value: i64) -> Value {
    Value { kind: Some(Kind::Integer(value)) }
}

fn with_timeout<T>(message: T, milliseconds: u64) -> Request<T> {
    let mut request = Request::new(message);
    request.set_timeout(Duration::from_millis(milliseconds));
    request
}

impl Node {
    async fn execute(
        &self,
        request: impl tonic::IntoRequest<ExecuteRequest>,
    ) -> Result<ExecuteResponse, Status> {
        timeout(PATIENCE, self.client().execute(request)).await.unwrap().map(tonic::Response::into_inner)
    }

    async fn query(&self, request: impl tonic::IntoRequest<QueryRequest>) -> Result<Vec<Row>, Status> {
        let mut stream = timeout(PATIENCE, self.client().query(request)).await.unwrap()?.into_inner();
        let mut rows = Vec::new();
        while let Some(response) = timeout(PATIENCE, stream.message()).await.unwrap()? {
            rows.extend(response.rows);
        }
        Ok(rows)
    }

    async fn number(&self, sql: &str) -> Result<i64, Status> {
        let rows = self.query(read(sql, ReadOptions::default())).await?;
        match rows[0].values[0].kind {
            Some(Kind::Integer(value)) => Ok(value),
            ref other => panic!("{other:?} is no integer"),
        }
    }

    /// The refusal, once the node has heard that there is no room.
    async fn refused_for_want_of_room(&self) -> Status {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match self.execute(write("create table if not exists t(a)")).await {
                Err(status) if status.code() == Code::ResourceExhausted => return status,
                other => assert!(Instant::now() < deadline, "refused in time: {other:?}"),
            }
        }
    }

    /// Every event of a Run; an error comes last.
    async fn run_sql(&self, request: RunRequest) -> (Vec<Event>, Option<Status>) {
        let mut stream = match timeout(PATIENCE, self.client().run(request)).await.unwrap() {
            Ok(response) => response.into_inner(),
            Err(status) => return (Vec::new(), Some(status)),
        };
        let mut events = Vec::new();
        loop {
            match timeout(PATIENCE, stream.message()).await.unwrap() {
                Ok(Some(response)) => {
                    events.extend(response.events.into_iter().filter_map(|RunEvent { event }| event));
                }
                Ok(None) => return (events, None),
                Err(status) => return (events, Some(status)),
            }
        }
    }
}

fn run(sql: &str) -> RunRequest {
    RunRequest { sql: sql.to_owned(), ..RunRequest::default() }
}

/// The rows of all statements.
fn rows(events: &[Event]) -> Vec<Row> {
    let rows = events.iter().filter_map(|event| match event {
        Event::Row(row) => Some(row.clone()),
        _ => None,
    });
    rows.collect()
}

#[tokio::test]
async fn a_write_is_seen_by_the_next_linearizable_read() {
    let node = Node::start().await;
    node.execute(write("create table t(a integer primary key, b text)")).await.unwrap();
    let mut insert = statement("insert into t(b) values (?), (?) returning a, b");
    insert.params = vec![Value { kind: Some(Kind::Text("x".into())) }, Value { kind: None }];
    let response =
        node.execute(ExecuteRequest { statements: vec![insert], ..ExecuteRequest::default() }).await.unwrap();
    assert_eq!(response.log_index, 3);
    let result = &response.results[0];
    assert_eq!((result.rows_affected, result.last_insert_rowid, result.rows.len()), (2, 2, 2));
    assert_eq!(result.columns[0].declared_type.to_lowercase(), "integer");
    assert_eq!(node.number("select count(*) from t").await.unwrap(), 2);
    node.stop().await.unwrap();
}

#[tokio::test]
async fn refusals_are_retried_until_the_write_is_in_and_it_is_in_once() {
    let node = Node::start().await;
    node.raftd.set(|log| {
        log.fates.extend([
            Fate::Refuse(ProposalRefusal::Overloaded),
            Fate::Refuse(ProposalRefusal::Overwritten),
            Fate::Refuse(ProposalRefusal::NoLeader),
            Fate::Refuse(ProposalRefusal::ShuttingDown),
        ]);
    });
    node.execute(write("create table t(a)")).await.unwrap();
    assert_eq!(node.raftd.payloads(), 1);
    assert!(node.raftd.log().fates.is_empty());
    node.stop().await.unwrap();
}

#[tokio::test]
async fn an_unknown_outcome_is_proposed_again_and_applied_once() {
    let node = Node::start().await;
    node.execute(write("create table t(a)")).await.unwrap();
    node.raftd.set(|log| log.fates.extend([Fate::Lose, Fate::Lose, Fate::CommitUnheard]));
    let response = node.execute(write("insert into t values (1) returning a")).await.unwrap();
    assert_eq!(response.results[0].rows, [Row { values: vec![integer(1)] }]);
    assert_eq!(node.number("select count(*) from t").await.unwrap(), 1);
    node.stop().await.unwrap();
}

#[tokio::test]
async fn an_outcome_that_stays_unknown_is_said_to_be_unknown() {
    let node = Node::start().await;
    node.execute(write("create table t(a)")).await.unwrap();
    node.raftd.set(|log| log.fates.extend(std::iter::repeat_n(Fate::Lose, 100_000)));
    let status = node.execute(with_timeout(write("insert into t values (1)"), 500)).await.unwrap_err();
    assert_eq!(status.code(), Code::DeadlineExceeded, "{status}");
    assert!(status.message().contains("outcome unknown"), "{status}");
    node.stop().await.unwrap();
}

#[tokio::test]
async fn without_a_leader_a_write_is_unavailable_and_certainly_not_applied() {
    let node = Node::start().await;
    node.raftd.set(|log| log.leader = false);
    node.until_health(ServingStatus::NotServing).await;
    let status = node.execute(write("create table t(a)")).await.unwrap_err();
    assert_eq!(status.code(), Code::Unavailable, "{status}");
    assert!(status.message().contains("no leader"), "{status}");
    assert_eq!(node.raftd.payloads(), 0);
    let status = node.number("select 1").await.unwrap_err();
    assert_eq!(status.code(), Code::Unavailable, "{status}");

    node.raftd.set(|log| log.leader = true);
    node.until_health(ServingStatus::Serving).await;
    node.execute(write("create table t(a)")).await.unwrap();
    node.stop().await.unwrap();
}

#[tokio::test]
async fn a_write_survives_the_restart_of_its_raftd() {
    let mut node = Node::start().await;
    node.execute(write("create table t(a)")).await.unwrap();
    node.process = None;
    node.until_health(ServingStatus::NotServing).await;
    let mut client = node.client();
    let writing = tokio::spawn(async move { client.execute(write("insert into t values (1)")).await });
    node.process = Some(node.raftd.serve(&node.socket));
    timeout(PATIENCE, writing).await.unwrap().unwrap().unwrap();
    assert_eq!(node.number("select count(*) from t").await.unwrap(), 1);
    node.stop().await.unwrap();
}

#[tokio::test]
async fn without_raftd_status_and_stale_reads_are_answered() {
    let mut node = Node::start().await;
    node.execute(write("create table t(a)")).await.unwrap();
    node.process = None;
    node.until_health(ServingStatus::NotServing).await;
    let status = node.client().status(StatusRequest {}).await.unwrap().into_inner();
    let seen = status.node.unwrap();
    assert_eq!((seen.role.as_str(), seen.applied_index), ("unknown", 2));
    assert_eq!(status.members.len(), 1);
    assert!(node.query(read("select * from t", stale())).await.unwrap().is_empty());
    let write = node.execute(write("insert into t values (1)")).await.unwrap_err();
    assert_eq!(write.code(), Code::Unavailable, "{write}");
    node.stop().await.unwrap();
}

#[tokio::test]
async fn a_database_that_does_not_belong_to_its_log_stops_the_daemon() {
    let node = Node::start_with(|raftd| raftd.set(|log| log.refuse_attach = true)).await;
    let error = timeout(PATIENCE, node.running).await.unwrap().unwrap().unwrap_err();
    assert_eq!(error.exit_code(), 78);
    assert!(error.to_string().contains("do not belong together"), "{error}");

    let node = Node::start_with(|raftd| raftd.set(|log| log.cluster_id += 1)).await;
    let error = timeout(PATIENCE, node.running).await.unwrap().unwrap().unwrap_err();
    assert!(error.to_string().contains("the configuration describes"), "{error}");
}

#[tokio::test]
async fn an_entry_that_this_node_cannot_execute_is_named_and_never_skipped() {
    let node = Node::start().await;
    node.execute(write("create table t(a)")).await.unwrap();
    let mut request = LoggedRequest::decode(node.raftd.log().entries[1].payload.clone()).unwrap();
    request.execution_version ^= 1;
    node.raftd.append(LogEntryKind::Payload, request.encode_to_vec().into());
    node.until_health(ServingStatus::NotServing).await;
    let seen = node.client().status(StatusRequest {}).await.unwrap().into_inner().node.unwrap();
    assert!(seen.unhealthy.contains("entry 3 was made for the execution version"), "{}", seen.unhealthy);
    assert_eq!(seen.applied_index, 2);
    let status = node.execute(write("insert into t values (1)")).await.unwrap_err();
    assert_eq!(status.code(), Code::Unavailable, "{status}");
    assert!(status.message().contains("this node cannot execute"), "{status}");
    assert!(node.query(read("select * from t", stale())).await.unwrap().is_empty());
    node.stop().await.unwrap();
}

#[tokio::test]
async fn a_run_decides_what_is_read_and_what_is_written() {
    let node = Node::start().await;
    let sql = "create table t(a); insert into t values (1), (2); select sum(a) from t;
        begin; insert into t values (3) returning a; select count(*) from t; commit;
        pragma foreign_keys = off; pragma foreign_keys; begin; delete from t; rollback; select count(*) from t";
    let (events, error) = node.run_sql(run(sql)).await;
    assert!(error.is_none(), "{error:?}");
    let values: Vec<_> = rows(&events).into_iter().map(|row| row.values[0].clone()).collect();
    assert_eq!(values, [3, 3, 3, 0, 3].map(integer));
    let Some(Event::Done(done)) = events.last() else { panic!("{events:?}") };
    assert_eq!((done.statement, done.foreign_keys), (13, false));
    node.stop().await.unwrap();
}

#[tokio::test]
async fn dropping_what_is_not_there_is_a_write_and_not_a_vacuum() {
    let node = Node::start().await;
    for what in ["table", "view", "index", "trigger"] {
        let drop = format!("drop {what} if exists absent");
        node.execute(write(&drop)).await.unwrap();
        let statements = vec![statement("create table t(a)"), statement(&drop), statement("drop table t")];
        node.execute(ExecuteRequest { statements, ..ExecuteRequest::default() }).await.unwrap();
        let sql = format!(
            "create table t(a); {drop}; insert into t values (1); select count(*) from t; drop table t"
        );
        let (events, error) = node.run_sql(run(&sql)).await;
        assert!(error.is_none(), "{what}: {error:?}");
        assert_eq!(rows(&events), [Row { values: vec![integer(1)] }], "{what}");
    }
    node.stop().await.unwrap();
}

#[tokio::test]
async fn a_vacuum_travels_alone_wherever_it_stands_in_a_script() {
    let node = Node::start().await;
    let sql = "create table t(a); insert into t values (1); vacuum; insert into t values (2); vacuum; vacuum;
        select count(*) from t; analyze; select count(*) from t";
    let (events, error) = node.run_sql(run(sql)).await;
    assert!(error.is_none(), "{error:?}");
    assert_eq!(rows(&events).len(), 2);
    let Some(Event::Done(done)) = events.last() else { panic!("{events:?}") };
    assert_eq!(done.statement, 9);
    node.stop().await.unwrap();
}

#[tokio::test]
async fn a_script_stops_at_its_first_error_and_names_the_statement() {
    let node = Node::start().await;
    let (events, error) = node
        .run_sql(run("create table t(a unique); insert into t values (1); select 1; insert into t values (1); select 2"))
        .await;
    assert_eq!(rows(&events).len(), 1);
    let error = error.unwrap();
    assert_eq!(error.code(), Code::FailedPrecondition);
    assert_eq!(error.message(), "UNIQUE constraint failed: t.a");
    assert_eq!(statement_of(&error), 4);

    // What cannot be parsed stops it as well, and is never proposed.
    let before = node.raftd.payloads();
    let (_, error) = node.run_sql(run("insert into t values (2); selec 1; insert into t values (3)")).await;
    assert_eq!(statement_of(&error.unwrap()), 2);
    assert_eq!(node.raftd.payloads(), before + 1);
    assert_eq!(node.number("select max(a) from t").await.unwrap(), 2);

    let script = "begin; insert into t values (7); insert into t values (1); commit".to_owned();
    let request = ExecuteRequest { script, ..ExecuteRequest::default() };
    let error = node.execute(request).await.unwrap_err();
    assert_eq!(statement_of(&error), 3);
    assert_eq!(node.number("select max(a) from t").await.unwrap(), 2);
    node.stop().await.unwrap();
}

/// The number of the statement in the status details.
fn statement_of(status: &Status) -> u32 {
    resqlite::status_details::sql_error(status).unwrap().statement
}

#[tokio::test]
async fn a_script_that_is_sent_again_under_its_id_is_applied_once() {
    let node = Node::start().await;
    let id = RequestId {
        client_id: Bytes::from_static(&[7; 16]),
        sequence: 1,
        acknowledged_below: 1,
        made_at_index: 1,
    };
    let sql = "create table t(a); insert into t values (1); select count(*) from t; insert into t values (2);
        begin; insert into t values (3); commit; select count(*) from t";
    let request = RunRequest { id: Some(id), ..run(sql) };
    let (first, error) = node.run_sql(request.clone()).await;
    assert!(error.is_none(), "{error:?}");
    let (second, error) = node.run_sql(request).await;
    assert!(error.is_none(), "{error:?}");
    assert_eq!(first.len(), second.len());
    assert_eq!(node.number("select count(*) from t").await.unwrap(), 3);
    node.stop().await.unwrap();
}

#[tokio::test]
async fn bad_input_gets_a_clear_error_and_the_server_goes_on() {
    let node = Node::start().await;
    node.execute(write("create table t(a)")).await.unwrap();
    let logged = node.raftd.payloads();
    let garbage = "\u{1}%&(§".repeat(1 << 17);
    for (sql, words) in [
        ("", "empty"),
        ("  -- nothing", "empty"),
        ("selec 1", "near \"selec\": syntax error"),
        ("insert into t values (1", "incomplete input"),
        ("insert into t values (1); insert into t values (2)", "more than one statement"),
        ("insert into t values ('a\0b')", "NUL byte"),
        (garbage.as_str(), "unrecognized token"),
    ] {
        let status = node.execute(write(sql)).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument, "{status}");
        assert!(status.message().contains(words), "{status}");
        let status = node.number(sql).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument, "{status}");
    }
    for request in [
        ExecuteRequest::default(),
        ExecuteRequest { script: "select 1".into(), ..write("select 1") },
        ExecuteRequest { id: Some(RequestId::default()), ..write("insert into t values (1)") },
    ] {
        assert_eq!(node.execute(request).await.unwrap_err().code(), Code::InvalidArgument);
    }
    assert_eq!(node.number("insert into t values (1)").await.unwrap_err().code(), Code::InvalidArgument);
    assert_eq!(node.number("select ?").await.unwrap_err().code(), Code::InvalidArgument);
    let large = node.execute(write(&format!("insert into t values ('{}')", "x".repeat(1 << 20)))).await;
    assert_eq!(large.unwrap_err().code(), Code::ResourceExhausted);
    let larger = node.execute(write(&"x".repeat(2 << 20))).await.unwrap_err();
    assert_eq!(larger.code(), Code::OutOfRange, "{larger}");
    assert_eq!(node.raftd.payloads(), logged, "nothing of all that reached the log");

    // What fails only against the schema fails where it is executed, alike on all nodes.
    let status = node.execute(write("insert into nowhere values (1)")).await.unwrap_err();
    assert_eq!((status.code(), status.message()), (Code::InvalidArgument, "no such table: nowhere"));
    let mut wrong = statement("insert into t values (?, ?)");
    wrong.params = vec![integer(1)];
    let wrong = ExecuteRequest { statements: vec![wrong], ..ExecuteRequest::default() };
    assert_eq!(node.execute(wrong).await.unwrap_err().code(), Code::InvalidArgument);
    node.execute(write("insert into t values (1)")).await.unwrap();
    node.stop().await.unwrap();
}

#[tokio::test]
async fn a_read_ends_with_its_client_or_with_its_deadline() {
    let node = Node::start().await;
    // As many as there are readers: if one of them went on, the last read would wait for ever.
    for _ in 0..2 {
        let gone = timeout(Duration::from_millis(50), node.client().query(read(BUSY, stale()))).await;
        assert!(gone.is_err(), "it has no end");
    }
    for _ in 0..2 {
        let status = node.query(with_timeout(read(BUSY, stale()), 500)).await.unwrap_err();
        assert_eq!(status.code(), Code::DeadlineExceeded, "{status}");
    }
    assert!(node.query(with_timeout(read("select 1", stale()), 20_000)).await.is_ok());
    node.stop().await.unwrap();
}

#[tokio::test]
async fn a_client_that_takes_nothing_holds_up_nobody_else_and_loses_nothing() {
    let node = Node::start().await;
    let limited = format!("{ENDLESS} limit 300000");
    let mut slow = node.client().query(read(&limited, stale())).await.unwrap().into_inner();
    for _ in 0..10 {
        assert_eq!(node.number("select 7").await.unwrap(), 7);
    }
    node.execute(write("create table t(a)")).await.unwrap();
    let (mut count, mut sum) = (0, 0);
    while let Some(response) = timeout(PATIENCE, slow.message()).await.unwrap().unwrap() {
        for row in response.rows {
            let Some(Kind::Integer(value)) = row.values[0].kind else { panic!("{row:?}") };
            count += 1;
            sum += value;
        }
    }
    assert_eq!((count, sum), (300_000, 300_000 * 300_001 / 2));
    node.stop().await.unwrap();
}

#[tokio::test]
async fn reads_that_wait_share_one_barrier() {
    let node = Node::start().await;
    let before = node.raftd.log().barriers;
    node.raftd.set(|log| log.answer_barriers = false);
    let mut reads = JoinSet::new();
    let query = |node: &Node| {
        let mut client = node.client();
        async move { client.query(read("select 1", ReadOptions::default())).await.map(drop) }
    };
    reads.spawn(query(&node));
    node.raftd.until(|log| log.barriers == before + 1).await;
    for _ in 0..50 {
        reads.spawn(query(&node));
    }
    // Requests of one connection are taken up in order, so all fifty wait once this one is answered.
    tokio::task::yield_now().await;
    node.client().status(StatusRequest {}).await.unwrap();
    node.raftd.set(|log| log.answer_barriers = true);
    while let Some(read) = reads.join_next().await {
        read.unwrap().unwrap();
    }
    assert_eq!(node.raftd.log().barriers, before + 2);
    node.stop().await.unwrap();
}

#[tokio::test]
async fn a_read_that_asks_for_more_than_this_node_has_waits_or_fails_but_never_lies() {
    let node = Node::start().await;
    node.execute(write("create table t(a)")).await.unwrap();
    let sequential = |min_index| ReadOptions {
        consistency: Consistency::Sequential.into(),
        min_index,
        ..ReadOptions::default()
    };
    node.query(read("select * from t", sequential(2))).await.unwrap();
    let status = node.query(with_timeout(read("select 1", sequential(9)), 500)).await.unwrap_err();
    assert_eq!(status.code(), Code::DeadlineExceeded, "{status}");
    assert!(status.message().contains("up to index 2"), "{status}");

    let bounded = ReadOptions { max_staleness_ms: 1, ..stale() };
    node.query(read("select 1", bounded)).await.unwrap();
    node.raftd.set(|log| log.leader = false);
    let (asked, bound) = (Instant::now(), Duration::from_millis(bounded.max_staleness_ms));
    while asked.elapsed() <= bound {
        tokio::task::yield_now().await;
    }
    let status = node.query(read("select 1", bounded)).await.unwrap_err();
    assert_eq!(status.code(), Code::Unavailable, "{status}");
    node.query(read("select 1", stale())).await.unwrap();
    node.stop().await.unwrap();
}

#[tokio::test]
async fn a_stop_takes_less_than_five_seconds_and_tells_who_waits() {
    let node = Node::start().await;
    let mut client = node.client();
    let reading = tokio::spawn(async move { client.query(read(BUSY, stale())).await.map(drop) });
    node.raftd.set(|log| log.fates.extend(std::iter::repeat_n(Fate::Lose, 100_000)));
    let mut client = node.client();
    let writing = tokio::spawn(async move { client.execute(write("create table t(a)")).await.map(drop) });
    node.raftd.until(|log| log.fates.len() < 100_000).await;
    let began = Instant::now();
    node.stop().await.unwrap();
    assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
    let status = reading.await.unwrap().unwrap_err();
    assert_eq!(status.code(), Code::Unavailable, "{status}");
    let status = writing.await.unwrap().unwrap_err();
    assert_eq!(status.code(), Code::DeadlineExceeded, "{status}");
    assert!(status.message().contains("outcome unknown"), "{status}");
}

#[tokio::test]
async fn a_client_that_knows_nothing_learns_the_service_by_reflection() {
    use tonic_reflection::pb::v1::{
        ServerReflectionRequest, server_reflection_client::ServerReflectionClient,
        server_reflection_request::MessageRequest, server_reflection_response::MessageResponse,
    };

    let node = Node::start().await;
    let mut client = ServerReflectionClient::new(node.channel.clone());
    let mut ask = async |message_request| {
        let request = ServerReflectionRequest {
            message_request: Some(message_request),
            ..ServerReflectionRequest::default()
        };
        let mut answers =
            client.server_reflection_info(tokio_stream::once(request)).await.unwrap().into_inner();
        answers.message().await.unwrap().unwrap().message_response.unwrap()
    };
    let MessageResponse::ListServicesResponse(list) = ask(MessageRequest::ListServices(String::new())).await
    else {
        panic!("it was asked for a list")
    };
    let names: Vec<_> = list.service.iter().map(|service| service.name.as_str()).collect();
    assert!(names.contains(&"resqlite.v1.ReSqlite"), "{names:?}");
    assert!(!names.contains(&"resqlite.v1.RaftService"), "it is not served here: {names:?}");
    let symbol = MessageRequest::FileContainingSymbol("resqlite.v1.ReSqlite".to_owned());
    let answer = ask(symbol).await;
    assert!(matches!(answer, MessageResponse::FileDescriptorResponse(_)), "{answer:?}");
    node.stop().await.unwrap();
}

#[tokio::test]
async fn while_raftd_lacks_room_writes_are_refused_and_reads_go_on() {
    let node = Node::start().await;
    node.execute(write("create table t(a)")).await.unwrap();
    node.raftd.set(|log| log.writes_refused = "the filesystem of /raft has 7 bytes free".into());
    node.refused_for_want_of_room().await;
    let before = node.raftd.payloads();
    let refused = node.refused_for_want_of_room().await;
    assert!(refused.message().contains("/raft has 7 bytes free"), "{refused}");
    assert!(refused.message().contains("the write was not applied"), "{refused}");
    assert_eq!(node.raftd.payloads(), before, "nothing was proposed");
    assert_eq!(node.number("select count(*) from t").await.unwrap(), 0);
    let status = node.client().status(StatusRequest {}).await.unwrap().into_inner().node.unwrap();
    assert_eq!(
        (status.unhealthy.as_str(), status.writes_refused.as_str()),
        ("", "the filesystem of /raft has 7 bytes free")
    );

    node.raftd.set(|log| log.writes_refused.clear());
    let deadline = Instant::now() + PATIENCE;
    while node.execute(write("insert into t values(1)")).await.is_err() {
        assert!(Instant::now() < deadline, "writes go on by themselves");
    }
}

#[tokio::test]
async fn a_leader_without_room_is_no_mystery_to_the_clients_of_other_nodes() {
    let node = Node::start().await;
    node.raftd.set(|log| log.fates.push_back(Fate::Refuse(ProposalRefusal::OutOfRoom)));
    let refused = node.execute(write("create table t(a)")).await.unwrap_err();
    assert_eq!(refused.code(), Code::ResourceExhausted);
    assert!(refused.message().contains("lack room on their disks"), "{refused}");
}
