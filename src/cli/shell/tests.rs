//! A shell before a server that executes on a SQLite of its own, so that batches, lines and results can be seen.

use std::{
    fs,
    sync::{Arc, Mutex},
};

use tokio::{net::TcpListener, sync::mpsc};
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tonic::{Code, Request, Response, Status};

use super::*;
use crate::{
    api::{
        self, BackupRequest, BackupResponse, BeginRequest, BeginResponse, ContentHashRequest,
        ContentHashResponse, ExecuteRequest, ExecuteResponse, NodeStatus, QueryRequest, QueryResponse,
        RestoreRequest, RestoreResponse, RollbackRequest, RollbackResponse, RunColumns, RunDone, RunEvent,
        RunRequest, RunResponse, SqlError, StatusRequest, StatusResponse, VerifyRequest, VerifyResponse,
        re_sqlite_server::{ReSqlite, ReSqliteServer},
        run_event,
        value::Kind,
    },
    cli::render::Mode,
    sql_text,
    status_details::with_sql_error,
};

/// Executes one statement after the other, on one connection.
struct Server {
    connection: Arc<Mutex<rusqlite::Connection>>,
    requests: Arc<Mutex<Vec<RunRequest>>>,
}

type Events = ReceiverStream<Result<RunResponse, Status>>;

#[tonic::async_trait]
impl ReSqlite for Server {
    type BackupStream = ReceiverStream<Result<BackupResponse, Status>>;
    type QueryStream = ReceiverStream<Result<QueryResponse, Status>>;
    type RunStream = Events;

    async fn run(&self, request: Request<RunRequest>) -> Result<Response<Events>, Status> {
        let request = request.into_inner();
        self.requests.lock().unwrap().push(request.clone());
        let mut response = RunResponse::default();
        let outcome = run(&self.connection.lock().unwrap(), &request, &mut response.events);
        let (sender, receiver) = mpsc::channel(2);
        sender.try_send(Ok(response)).unwrap();
        if let Err(status) = outcome {
            sender.try_send(Err(status)).unwrap();
        }
        Ok(Response::new(ReceiverStream::new(receiver)))
    }

    async fn begin(&self, _: Request<BeginRequest>) -> Result<Response<BeginResponse>, Status> {
        Err(Status::unimplemented("nothing here is a transaction"))
    }

    async fn rollback(&self, _: Request<RollbackRequest>) -> Result<Response<RollbackResponse>, Status> {
        Err(Status::unimplemented("nothing here is a transaction"))
    }

    async fn backup(&self, _: Request<BackupRequest>) -> Result<Response<Self::BackupStream>, Status> {
        Err(Status::unimplemented("there is nothing to keep"))
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
        let node = Some(NodeStatus { commit_index: 1, ..NodeStatus::default() });
        Ok(Response::new(StatusResponse { node, members: Vec::new() }))
    }

    async fn execute(&self, _: Request<ExecuteRequest>) -> Result<Response<ExecuteResponse>, Status> {
        Err(Status::unimplemented("a shell runs"))
    }

    async fn query(&self, _: Request<QueryRequest>) -> Result<Response<Self::QueryStream>, Status> {
        Err(Status::unimplemented("a shell runs"))
    }
}

fn run(
    connection: &rusqlite::Connection,
    request: &RunRequest,
    events: &mut Vec<RunEvent>,
) -> Result<(), Status> {
    let mut foreign_keys = request.foreign_keys.unwrap_or(true);
    for (statement, number) in sql_text::statements(&request.sql).zip(1..) {
        if statement.text.starts_with("pragma foreign_keys") {
            foreign_keys = statement.text.contains("on");
        } else {
            run_one(connection, statement.text, number, events).map_err(|error| {
                let message = error.to_string();
                let sql = SqlError { message, statement: number, offset: -1, ..SqlError::default() };
                with_sql_error(Code::InvalidArgument, sql.message.clone(), &sql)
            })?;
        }
        let done = RunDone { statement: number, log_index: 2, foreign_keys, ..RunDone::default() };
        events.push(RunEvent { event: Some(run_event::Event::Done(done)) });
    }
    Ok(())
}

fn run_one(
    connection: &rusqlite::Connection,
    text: &str,
    number: u32,
    events: &mut Vec<RunEvent>,
) -> rusqlite::Result<()> {
    let mut prepared = connection.prepare(text)?;
    let names: Vec<String> = prepared.column_names().iter().map(|name| (*name).to_owned()).collect();
    if !names.is_empty() {
        let columns =
            names.iter().map(|name| api::Column { name: name.clone(), declared_type: String::new() });
        let columns = RunColumns { statement: number, columns: columns.collect() };
        events.push(RunEvent { event: Some(run_event::Event::Columns(columns)) });
    }
    let mut rows = prepared.query(())?;
    while let Some(row) = rows.next()? {
        let integer =
            |column| row.get(column).map(|integer| api::Value { kind: Some(Kind::Integer(integer)) });
        let values = (0..names.len()).map(integer).collect::<rusqlite::Result<_>>()?;
        events.push(RunEvent { event: Some(run_event::Event::Row(api::Row { values })) });
    }
    Ok(())
}

/// Takes what a shell prints.
#[derive(Clone, Default)]
struct Printed(Arc<Mutex<Vec<u8>>>);

impl Write for Printed {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

struct Session {
    shell: Shell,
    printed: Printed,
    requests: Arc<Mutex<Vec<RunRequest>>>,
}

impl Session {
    async fn start() -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let requests = Arc::new(Mutex::new(Vec::new()));
        let connection = Arc::new(Mutex::new(rusqlite::Connection::open_in_memory().unwrap()));
        let service = ReSqliteServer::new(Server { connection, requests: requests.clone() });
        let service = service.max_decoding_message_size(64 << 20).max_encoding_message_size(64 << 20);
        let server = tonic::transport::Server::builder().add_service(service);
        tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
        let printed = Printed::default();
        let mut shell = Shell::new(Client::connect([address]).await.unwrap(), Format::option(Mode::List));
        shell.out = output(Box::new(printed.clone()));
        Self { shell, printed, requests }
    }

    /// Runs a text; how it ended, as line and message.
    async fn run(&mut self, text: &str) -> Result<(), (usize, String)> {
        match self.shell.run_input(&mut Input::text(text)).await {
            Ok(()) => Ok(()),
            Err(Stop::Failed { line, message }) => Err((line, message)),
            Err(other) => panic!("{other:?}"),
        }
    }

    fn printed(&mut self) -> String {
        self.shell.out.flush().unwrap();
        String::from_utf8(std::mem::take(&mut *self.printed.0.lock().unwrap())).unwrap()
    }

    fn sent(&self) -> usize {
        self.requests.lock().unwrap().len()
    }
}

#[tokio::test]
async fn results_are_printed_in_order_and_a_script_is_one_request() {
    let mut session = Session::start().await;
    session
        .run("create table t(a);\ninsert into t values(1),(2);\nselect * from t; select 7, 8;")
        .await
        .unwrap();
    assert_eq!(session.printed(), "1\n2\n7|8\n");
    assert_eq!(session.sent(), 1);
}

#[tokio::test]
async fn an_error_names_its_line_and_ends_the_script() {
    let mut session = Session::start().await;
    let outcome = session.run("select 1;\n-- a comment\n\nselect *\n from missing;\nselect 2;").await;
    let (line, message) = outcome.unwrap_err();
    assert_eq!(line, 4);
    assert!(message.starts_with("no such table: missing"), "{message}");
    assert_eq!(session.printed(), "1\n");
}

#[tokio::test]
async fn lines_are_right_in_every_batch_of_a_long_file() {
    let mut session = Session::start().await;
    session.run("create table t(a);").await.unwrap();
    let mut text = String::new();
    for _ in 0..60_000 {
        text.push_str("insert into t\n values(1234567890);\n");
    }
    text.push_str("insert into missing values(1);\nselect 2;");
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("long.sql");
    fs::write(&path, text).unwrap();
    let outcome = session.shell.run_job(Job::File(&path)).await;
    let Err(Stop::Failed { line, message }) = outcome else { panic!("{outcome:?}") };
    assert_eq!(line, 120_001);
    assert!(message.contains("no such table: missing"), "{message}");
    assert!((3..=5).contains(&session.sent()), "two mebibytes travel in few requests: {}", session.sent());
    session.run("select count(*) from t;").await.unwrap();
    assert_eq!(session.printed(), "60000\n");
}

#[tokio::test]
async fn foreign_keys_stay_as_the_session_left_them() {
    let mut session = Session::start().await;
    session.run("select 1;").await.unwrap();
    session.run("pragma foreign_keys=off;").await.unwrap();
    session.run("select 2;").await.unwrap();
    let settings: Vec<_> =
        session.requests.lock().unwrap().iter().map(|request| request.foreign_keys).collect();
    assert_eq!(settings, [None, Some(true), Some(false)]);
}

#[tokio::test]
async fn a_transaction_is_sent_at_its_commit_and_dropped_by_its_rollback() {
    let mut session = Session::start().await;
    session.run("create table t(a); begin; insert into t values(1);").await.unwrap();
    assert!(session.shell.is_in_block());
    assert_eq!(session.sent(), 1, "only what stands before the transaction");
    session.run("insert into t values(2); commit;").await.unwrap();
    let sql = session.requests.lock().unwrap()[1].sql.clone();
    assert_eq!(sql, "begin;\ninsert into t values(1);\ninsert into t values(2);\ncommit;\n");
    session.run("begin; insert into t values(3);\nrollback; select count(*) from t;").await.unwrap();
    assert_eq!(session.printed(), "2\n");
    assert_eq!(session.requests.lock().unwrap()[2].sql, "select count(*) from t;\n");
}

#[tokio::test]
async fn dot_commands_act_between_the_statements() {
    let mut session = Session::start().await;
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("inner.sql");
    fs::write(&file, "select 3 as b;\n.mode list\n").unwrap();
    let saved = directory.path().join("saved");
    let text = format!(
        "select 1 as a;\n.mode csv\n.headers on\nselect 2 as a;\n.read {}\n.headers off\nselect 4;\n.output {}\nselect 5;\n",
        file.display(),
        saved.display(),
    );
    session.run(&text).await.unwrap();
    assert_eq!(session.printed(), "1\na\r\n2\r\nb\r\n3\r\n4\n");
    session.shell.out.flush().unwrap();
    assert_eq!(fs::read_to_string(saved).unwrap(), "5\n");
}

#[tokio::test]
async fn what_a_dot_command_cannot_do_is_said_with_its_line() {
    let mut session = Session::start().await;
    for (text, line, expected) in [
        (
            "select 1;\n.nonsense\n",
            2,
            "unknown command or invalid arguments:  \"nonsense\". Enter \".help\" for help",
        ),
        ("\n\n.mode brilliant", 3, "mode should be one of: column csv json line list table"),
        (".headers", 1, "Usage: .headers on|off"),
        (".timer perhaps", 1, "\"perhaps\" is neither on nor off"),
        (".read /nonexistent", 1, "cannot open \"/nonexistent\": No such file or directory (os error 2)"),
    ] {
        assert_eq!(session.run(text).await, Err((line, expected.to_owned())));
    }
    let directory = tempfile::tempdir().unwrap();
    let itself = directory.path().join("itself.sql");
    fs::write(&itself, format!(".read {}", itself.display())).unwrap();
    let (_, message) = session.run(&format!(".read {}", itself.display())).await.unwrap_err();
    assert!(message.ends_with("input nesting limit of 25 reached"), "{message}");
}
