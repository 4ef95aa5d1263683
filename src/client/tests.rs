//! What the client does when servers fail, against servers that fail as told.

use std::{
    collections::VecDeque,
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::Instant,
};

use tokio::{net::TcpListener, sync::mpsc};
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tonic::{Code, Response};

use super::*;
use crate::api::{
    BackupFormat, BackupHeader, BackupRequest, BackupResponse, BackupTrailer, BeginRequest, BeginResponse,
    ContentHashRequest, ContentHashResponse, NodeStatus, QueryResponse, RequestId, RestoreRequest,
    RestoreResponse, RollbackRequest, RollbackResponse, RunColumns, RunDone, RunEvent, RunResponse,
    VerifyRequest, VerifyResponse,
    backup_response::Part,
    re_sqlite_server::{ReSqlite, ReSqliteServer},
    run_event,
};
use crate::status_details::with_sql_error;

type Answers<T> = Mutex<VecDeque<Result<T, Status>>>;

/// A node that answers as it was told, and remembers what it was asked.
#[derive(Default)]
struct Told {
    executed: Mutex<Vec<ExecuteRequest>>,
    queried: Mutex<Vec<QueryRequest>>,
    ran: Mutex<Vec<RunRequest>>,
    backup_answers: Answers<Vec<Result<BackupResponse, Status>>>,
    /// Without a further answer, a request succeeds.
    execute_answers: Answers<ExecuteResponse>,
    query_answers: Answers<Vec<Result<QueryResponse, Status>>>,
    run_answers: Answers<Vec<Result<RunResponse, Status>>>,
}

struct Node(Arc<Told>);

fn stream<T: Send + 'static>(
    messages: Vec<Result<T, Status>>,
) -> Response<ReceiverStream<Result<T, Status>>> {
    let (sender, receiver) = mpsc::channel(messages.len().max(1));
    for message in messages {
        sender.try_send(message).expect("the channel has room for all of them");
    }
    Response::new(ReceiverStream::new(receiver))
}

#[tonic::async_trait]
impl ReSqlite for Node {
    type BackupStream = ReceiverStream<Result<BackupResponse, Status>>;
    type QueryStream = ReceiverStream<Result<QueryResponse, Status>>;
    type RunStream = ReceiverStream<Result<RunResponse, Status>>;

    async fn execute(&self, request: Request<ExecuteRequest>) -> Result<Response<ExecuteResponse>, Status> {
        self.0.executed.lock().unwrap().push(request.into_inner());
        let answer = self.0.execute_answers.lock().unwrap().pop_front();
        answer.unwrap_or_else(|| Ok(executed_at(50))).map(Response::new)
    }

    async fn query(&self, request: Request<QueryRequest>) -> Result<Response<Self::QueryStream>, Status> {
        self.0.queried.lock().unwrap().push(request.into_inner());
        let answer = self.0.query_answers.lock().unwrap().pop_front();
        answer.unwrap_or_else(|| Ok(vec![Ok(QueryResponse::default())])).map(stream)
    }

    async fn run(&self, request: Request<RunRequest>) -> Result<Response<Self::RunStream>, Status> {
        self.0.ran.lock().unwrap().push(request.into_inner());
        self.0.run_answers.lock().unwrap().pop_front().unwrap_or_else(|| Ok(Vec::new())).map(stream)
    }

    async fn begin(&self, _: Request<BeginRequest>) -> Result<Response<BeginResponse>, Status> {
        Err(Status::unimplemented("nothing here is a transaction"))
    }

    async fn rollback(&self, _: Request<RollbackRequest>) -> Result<Response<RollbackResponse>, Status> {
        Err(Status::unimplemented("nothing here is a transaction"))
    }

    async fn backup(&self, _: Request<BackupRequest>) -> Result<Response<Self::BackupStream>, Status> {
        self.0.backup_answers.lock().unwrap().pop_front().unwrap_or_else(|| Ok(Vec::new())).map(stream)
    }

    async fn move_leader(
        &self,
        _: Request<api::MoveLeaderRequest>,
    ) -> Result<Response<api::MoveLeaderResponse>, Status> {
        Err(Status::unimplemented("nobody leads here"))
    }

    async fn restore(
        &self,
        _: Request<tonic::Streaming<RestoreRequest>>,
    ) -> Result<Response<RestoreResponse>, Status> {
        Err(Status::unimplemented("there is nothing to replace"))
    }

    async fn login(&self, _: Request<api::LoginRequest>) -> Result<Response<api::LoginResponse>, Status> {
        Err(Status::unimplemented("there are no users here"))
    }

    async fn change_users(
        &self,
        _: Request<api::ChangeUsersRequest>,
    ) -> Result<Response<api::ChangeUsersResponse>, Status> {
        Err(Status::unimplemented("there are no users here"))
    }

    async fn list_users(
        &self,
        _: Request<api::ListUsersRequest>,
    ) -> Result<Response<api::ListUsersResponse>, Status> {
        Err(Status::unimplemented("there are no users here"))
    }

    async fn verify(&self, _: Request<VerifyRequest>) -> Result<Response<VerifyResponse>, Status> {
        Err(Status::unimplemented("there is nothing to compare"))
    }

    async fn content_hash(
        &self,
        _: Request<ContentHashRequest>,
    ) -> Result<Response<ContentHashResponse>, Status> {
        Err(Status::unimplemented("there is nothing to compare"))
    }

    async fn status(&self, _: Request<StatusRequest>) -> Result<Response<StatusResponse>, Status> {
        let node = NodeStatus { commit_index: 42, applied_index: 41, ..NodeStatus::default() };
        Ok(Response::new(StatusResponse { node: Some(node), members: Vec::new() }))
    }
}

fn executed_at(log_index: u64) -> ExecuteResponse {
    ExecuteResponse { results: vec![api::StatementResult::default()], log_index }
}

/// Starts a node; it serves until the test's runtime ends.
async fn start() -> (Arc<Told>, String) {
    let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let told = Arc::new(Told::default());
    let server = tonic::transport::Server::builder().add_service(ReSqliteServer::new(Node(told.clone())));
    tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
    (told, address)
}

/// An address on which nobody listens.
async fn nobody() -> String {
    let address: SocketAddr = TcpListener::bind(("127.0.0.1", 0)).await.unwrap().local_addr().unwrap();
    address.to_string()
}

async fn client(endpoints: &[&str]) -> Client {
    Client::connect(endpoints.iter().copied()).await.unwrap()
}

fn unavailable() -> Status {
    Status::unavailable("no leader")
}

fn ids(told: &Told) -> Vec<RequestId> {
    told.executed.lock().unwrap().iter().map(|request| request.id.clone().unwrap()).collect()
}

#[tokio::test]
async fn a_write_is_tried_again_under_the_same_id() {
    let (told, address) = start().await;
    told.execute_answers.lock().unwrap().extend([
        Err(unavailable()),
        Err(Status::deadline_exceeded("outcome unknown")),
        Ok(executed_at(60)),
    ]);
    let client = client(&[&address]).await;
    client.execute("insert into t values(?)", (1,)).await.unwrap();
    let ids = ids(&told);
    assert_eq!(ids.len(), 3);
    assert!(ids.iter().all(|id| *id == ids[0]), "{ids:?}");
    assert_eq!((ids[0].client_id.len(), ids[0].sequence, ids[0].acknowledged_below), (16, 1, 1));
    assert_eq!(ids[0].made_at_index, 42, "learnt from the node's status");
    assert_eq!(client.seen_index(), 60);
}

#[tokio::test]
async fn each_write_has_an_id_of_its_own_and_acknowledges_the_ones_before() {
    let (told, address) = start().await;
    let client = client(&[&address]).await;
    for _ in 0..3 {
        client.execute("insert into t values(1)", ()).await.unwrap();
    }
    let ids = ids(&told);
    let sequences: Vec<_> =
        ids.iter().map(|id| (id.sequence, id.acknowledged_below, id.made_at_index)).collect();
    assert_eq!(sequences, [(1, 1, 42), (2, 2, 50), (3, 3, 50)]);
    let other = Client::connect([address]).await.unwrap();
    other.execute("insert into t values(1)", ()).await.unwrap();
    let last = told.executed.lock().unwrap().last().unwrap().id.clone().unwrap();
    assert_ne!(last.client_id, ids[0].client_id);
}

#[tokio::test]
async fn another_endpoint_takes_over() {
    let (told, address) = start().await;
    let client = client(&[&nobody().await, &address]).await;
    client.execute("insert into t values(1)", ()).await.unwrap();
    assert_eq!(told.executed.lock().unwrap().len(), 1);
}

#[tokio::test]
async fn a_connection_that_breaks_in_the_middle_is_no_answer() {
    let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
    let broken = listener.local_addr().unwrap().to_string();
    tokio::spawn(async move {
        loop {
            // Accepts, and closes at once.
            drop(listener.accept().await);
        }
    });
    let (told, address) = start().await;
    let client = client(&[&broken, &address]).await;
    client.execute("insert into t values(1)", ()).await.unwrap();
    assert_eq!(told.executed.lock().unwrap().len(), 1);
}

#[tokio::test]
async fn a_cluster_that_is_gone_is_reported_within_the_deadline() {
    let begun = Instant::now();
    let builder = Client::builder().endpoints([nobody().await]).connect_for(Duration::from_millis(200));
    let error = builder.connect().await.unwrap_err();
    assert!(matches!(&error, Error::Unavailable(message) if message.contains("refused")), "{error:?}");
    assert!(begun.elapsed() < Duration::from_secs(5));
    let wrong = Client::connect(["nonsense"]).await.unwrap_err();
    assert!(matches!(&wrong, Error::Invalid(message) if message.contains("\"nonsense\"")), "{wrong:?}");
}

#[tokio::test]
async fn what_became_of_a_write_is_unknown_only_if_it_may_have_been_applied() {
    let (told, address) = start().await;
    let client = client(&[&address]).await.with_deadline(Some(Duration::from_millis(300)));
    told.execute_answers.lock().unwrap().extend((0..100).map(|_| Err(unavailable())));
    let error = client.execute("insert into t values(1)", ()).await.unwrap_err();
    assert!(matches!(error, Error::Unavailable(_)), "{error:?}");

    told.execute_answers.lock().unwrap().push_front(Err(Status::deadline_exceeded("leadership changed")));
    let error = client.execute("insert into t values(1)", ()).await.unwrap_err();
    assert!(matches!(error, Error::OutcomeUnknown(_)), "{error:?}");
}

#[tokio::test]
async fn an_sql_error_comes_with_its_details_and_is_final() {
    let (told, address) = start().await;
    let client = client(&[&address]).await;
    let sql = SqlError {
        message: "UNIQUE constraint failed: t.a".into(),
        extended_code: 1555,
        name: "SQLITE_CONSTRAINT_PRIMARYKEY".into(),
        statement: 2,
        offset: -1,
        log_index: 7,
    };
    let codes = [
        Code::FailedPrecondition,
        Code::InvalidArgument,
        Code::Aborted,
        Code::ResourceExhausted,
        Code::DeadlineExceeded,
    ];
    told.execute_answers
        .lock()
        .unwrap()
        .extend(codes.map(|code| Err(with_sql_error(code, sql.message.clone(), &sql))));
    let mut errors = Vec::new();
    for _ in codes {
        errors.push(client.execute("insert into t values(1)", ()).await.unwrap_err());
    }
    assert_eq!(told.executed.lock().unwrap().len(), codes.len(), "none was tried again");
    assert_eq!(errors[0], Error::Sql(Box::new(sql.clone())));
    assert_eq!(errors[0].to_string(), "UNIQUE constraint failed: t.a");
    assert_eq!(errors[1], Error::Sql(Box::new(sql.clone())));
    assert!(matches!(errors[2], Error::Aborted { .. }), "{:?}", errors[2]);
    assert!(matches!(errors[3], Error::Limit { .. }), "{:?}", errors[3]);
    assert!(errors[..4].iter().all(|error| error.sql_error() == Some(&sql)));
    assert!(
        matches!(errors[4], Error::OutcomeUnknown(_)),
        "the id is too old to be remembered: {:?}",
        errors[4]
    );
}

#[tokio::test]
async fn a_query_is_tried_again_and_its_rows_arrive_in_order() {
    let (told, address) = start().await;
    let row = |integer: i64| api::Row { values: vec![Value::Integer(integer).into()] };
    let column = Column { name: "a".into(), declared_type: "INTEGER".into() };
    let first = QueryResponse { columns: vec![column.clone()], rows: vec![row(1), row(2)], log_index: 77 };
    let second = QueryResponse { rows: vec![row(3)], ..QueryResponse::default() };
    told.query_answers.lock().unwrap().extend([
        Err(unavailable()),
        Ok(vec![Err(unavailable())]),
        Ok(vec![Ok(first), Ok(second)]),
    ]);
    let client = client(&[&address]).await.with_consistency(Consistency::Sequential);
    let mut rows =
        client.query("select a from t where a > :low", Params::named([("low", 0.into())])).await.unwrap();
    assert_eq!((rows.columns(), rows.log_index()), (&[column][..], 77));
    let mut found = Vec::new();
    while let Some(row) = rows.next().await.unwrap() {
        found.push(row.get::<i64>(0).unwrap());
    }
    assert_eq!(found, [1, 2, 3]);
    let queried = told.queried.lock().unwrap()[2].clone();
    assert_eq!(queried.named_params["low"], Value::Integer(0).into());
    let read = queried.read.unwrap();
    assert_eq!((read.consistency(), read.min_index), (api::Consistency::Sequential, 42));
    assert_eq!(client.seen_index(), 77);
}

fn columns(statement: u32) -> RunEvent {
    RunEvent { event: Some(run_event::Event::Columns(RunColumns { statement, columns: Vec::new() })) }
}

fn run_row(integer: i64) -> RunEvent {
    RunEvent { event: Some(run_event::Event::Row(api::Row { values: vec![Value::Integer(integer).into()] })) }
}

fn done(statement: u32) -> RunEvent {
    RunEvent {
        event: Some(run_event::Event::Done(RunDone { statement, log_index: 90, ..RunDone::default() })),
    }
}

fn message(events: &[RunEvent]) -> Result<RunResponse, Status> {
    Ok(RunResponse { events: events.to_vec() })
}

/// The events of a run, in brief, and how it ended.
async fn events_of(mut run: Run) -> (Vec<String>, Result<(), Error>) {
    let mut found = Vec::new();
    loop {
        match run.next().await {
            Ok(Some(Event::Columns { statement, .. })) => found.push(format!("columns {statement}")),
            Ok(Some(Event::Row(row))) => found.push(format!("row {}", row.get::<i64>(0).unwrap())),
            Ok(Some(Event::Done(done))) => found.push(format!("done {}", done.statement)),
            Ok(None) => return (found, Ok(())),
            Err(error) => return (found, Err(error)),
        }
    }
}

#[tokio::test]
async fn a_run_goes_on_elsewhere_and_repeats_no_event() {
    let (first, first_address) = start().await;
    let (second, second_address) = start().await;
    let beginning = [columns(1), run_row(10), done(1), done(2)];
    let rest = [columns(3), run_row(30), done(3)];
    first.run_answers.lock().unwrap().push_back(Ok(vec![message(&beginning), Err(unavailable())]));
    second.run_answers.lock().unwrap().push_back(Ok(vec![message(&beginning), message(&rest)]));
    let client = client(&[&first_address, &second_address]).await;
    let (events, outcome) = events_of(client.run("select 1; insert …; select 3").await.unwrap()).await;
    assert_eq!(outcome, Ok(()));
    assert_eq!(events, ["columns 1", "row 10", "done 1", "done 2", "columns 3", "row 30", "done 3"]);
    let (first, second) = (first.ran.lock().unwrap()[0].clone(), second.ran.lock().unwrap()[0].clone());
    assert!(first.id.is_some());
    assert_eq!(first, second);
    assert_eq!(client.seen_index(), 90);
}

#[tokio::test]
async fn a_result_that_broke_off_is_not_continued_with_other_rows() {
    let (told, address) = start().await;
    let answer = vec![message(&[columns(1), run_row(10)]), Err(unavailable())];
    told.run_answers.lock().unwrap().push_back(Ok(answer));
    let (events, outcome) = events_of(client(&[&address]).await.run("select 1").await.unwrap()).await;
    assert_eq!(events, ["columns 1", "row 10"]);
    assert!(matches!(outcome, Err(Error::Unavailable(_))), "{outcome:?}");
    assert_eq!(told.ran.lock().unwrap().len(), 1);
}

#[tokio::test]
async fn a_run_that_makes_no_progress_ends() {
    let (told, address) = start().await;
    let builder = Client::builder().endpoints([address]).retry_for(Duration::from_millis(200)).deadline(None);
    let client = builder.connect().await.unwrap();
    // Each time the same completed statement, and then nothing more.
    let answers = (0..1000).map(|_| Ok(vec![message(&[done(1)]), Err(Status::deadline_exceeded("slow"))]));
    told.run_answers.lock().unwrap().extend(answers);
    let (events, outcome) = events_of(client.run("insert …; insert …").await.unwrap()).await;
    assert_eq!(events, ["done 1"]);
    assert!(matches!(outcome, Err(Error::OutcomeUnknown(_))), "{outcome:?}");
}

#[test]
fn values_are_had_in_types_that_hold_them() {
    let values =
        [Value::Integer(300), Value::Real(1.5), Value::from("x"), Value::Null, Value::from(vec![1u8])];
    let row = Row(api::Row { values: values.clone().map(Into::into).to_vec() });
    assert_eq!(row.get::<i64>(0), Ok(300));
    assert_eq!(row.get::<u16>(0), Ok(300));
    assert!(row.get::<u8>(0).unwrap_err().to_string().contains("INTEGER"));
    assert_eq!(row.get::<f64>(1), Ok(1.5));
    assert_eq!(row.get::<String>(2), Ok("x".to_owned()));
    assert_eq!(row.get::<Option<i64>>(3), Ok(None));
    assert!(row.get::<i64>(3).is_err());
    assert_eq!(row.get::<Vec<u8>>(4), Ok(vec![1]));
    assert!(row.get::<i64>(5).is_err());
    assert_eq!(row.into_values(), values);
}

fn backup_of(parts: Vec<Part>) -> Vec<Result<BackupResponse, Status>> {
    let header = Part::Header(BackupHeader { log_index: 7, size_bytes: 6 });
    std::iter::once(header).chain(parts).map(|part| Ok(BackupResponse { part: Some(part) })).collect()
}

fn trailer(of: &[u8]) -> Part {
    let blake3 = blake3::hash(of).as_bytes().to_vec().into();
    Part::Trailer(BackupTrailer { size_bytes: of.len() as u64, blake3 })
}

/// What comes of a backup that a node sends so.
async fn backup(parts: Vec<Result<BackupResponse, Status>>) -> Result<Vec<u8>, Error> {
    let (told, address) = start().await;
    told.backup_answers.lock().unwrap().push_back(Ok(parts));
    let mut backup = client(&[&address]).await.backup(BackupFormat::Database).await?;
    assert_eq!((backup.log_index(), backup.size_bytes()), (7, Some(6)));
    let mut bytes = Vec::new();
    while let Some(data) = backup.next().await? {
        bytes.extend_from_slice(&data);
    }
    Ok(bytes)
}

#[tokio::test]
async fn a_backup_is_whole_only_with_its_checksum() {
    let data = |text: &'static str| Part::Data(text.into());
    let whole = backup_of(vec![data("abc"), data("def"), trailer(b"abcdef")]);
    assert_eq!(backup(whole).await, Ok(b"abcdef".to_vec()));
    let cut_off = backup(backup_of(vec![data("abc")])).await;
    assert!(matches!(&cut_off, Err(Error::Unavailable(why)) if why.contains("after 3 bytes")), "{cut_off:?}");
    let mut broken = backup_of(vec![data("abc")]);
    broken.push(Err(unavailable()));
    assert!(matches!(backup(broken).await, Err(Error::Unavailable(_))));
    for lie in [vec![data("abcdeg"), trailer(b"abcdef")], vec![data("abc"), trailer(b"abcdef")]] {
        assert!(matches!(backup(backup_of(lie)).await, Err(Error::Internal(_))));
    }
}
