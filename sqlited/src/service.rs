//! The public gRPC service: checks what came in, hands it on, and turns what
//! comes back into messages. It knows nothing of Raft and of SQLite nothing but words.

use std::{pin::Pin, sync::Arc};

use resqlite::api::{
    BackupFormat, BackupRequest, BackupResponse, BeginRequest, BeginResponse, ChangeUsersRequest,
    ChangeUsersResponse, ContentHashRequest, ContentHashResponse, ExecuteRequest, ExecuteResponse,
    ListUsersRequest, ListUsersResponse, LoginRequest, LoginResponse, MoveLeaderRequest, MoveLeaderResponse,
    QueryRequest, QueryResponse, ReadOptions, RestoreRequest, RestoreResponse, RollbackRequest,
    RollbackResponse, RunEvent, RunRequest, RunResponse, Statement, StatementList, StatementResult,
    StatusRequest, StatusResponse, VerifyMarker, VerifyRequest, VerifyResponse, logged_request::Body,
    re_sqlite_server::ReSqlite, run_event::Event,
};
use tokio::{sync::mpsc, time::timeout_at};
use tokio_stream::{Stream, StreamExt, once, wrappers::ReceiverStream};
use tonic::{Request, Response, Status, Streaming};

use crate::{
    accounts::Accounts,
    auth::Caller,
    backup::Backups,
    deadline::Deadline,
    errors::{invalid_sql, own_sql_error, reply_status},
    facts::Facts,
    leadership::Leadership,
    limits::{MAX_PARAMETERS, MAX_STATEMENTS},
    reads::{Author, ReadBatch},
    restore::Uploads,
    run_request::{Runner, ScriptRequest, nul_byte, split},
    script::Kind,
    status::StatusSource,
    syntax::SyntaxCheck,
    transactions::Transactions,
    verify::{Verification, Verifications},
    write_path::WriteId,
};

/// Texts up to this size are parsed where they arrive; longer ones on a reader's thread, where they delay nobody.
const PARSED_INLINE_BYTES: usize = 16 << 10;
/// How many messages of events may wait for a client.
const EVENTS_WAITING: usize = 4;

/// `resqlite.v1.ReSqlite`. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Service {
    parts: Arc<ServiceParts>,
}

/// What the service hands its requests to.
#[derive(Debug)]
pub struct ServiceParts {
    /// Writes, reads and scripts.
    pub runner: Runner,
    /// Optimistic transactions.
    pub transactions: Arc<Transactions>,
    /// Users.
    pub accounts: Accounts,
    /// The content's hashes.
    pub verifications: Verifications,
    /// Copies of the whole content.
    pub backups: Backups,
    /// Files that are to become the content.
    pub uploads: Uploads,
    /// How this node is.
    pub facts: Facts,
    /// Of this node.
    pub node_id: u64,
    /// Keeps what cannot be parsed out of the log.
    pub syntax: SyntaxCheck,
    /// Answers `Status`.
    pub status: StatusSource,
    /// Hands leadership over.
    pub leadership: Leadership,
    /// The largest result of `Execute`, whose answer is a single message.
    pub max_result_bytes: usize,
}

type Streamed<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

impl Service {
    /// A service over these parts.
    pub fn new(parts: ServiceParts) -> Self {
        Self { parts: Arc::new(parts) }
    }
}

#[tonic::async_trait]
impl ReSqlite for Service {
    type BackupStream = ReceiverStream<Result<BackupResponse, Status>>;
    type QueryStream = Streamed<QueryResponse>;
    type RunStream = ReceiverStream<Result<RunResponse, Status>>;

    async fn execute(&self, request: Request<ExecuteRequest>) -> Result<Response<ExecuteResponse>, Status> {
        let deadline = Deadline::of_request(request.metadata());
        let caller = Caller::of(request.extensions());
        let request = request.into_inner();
        let response = match (request.statements.is_empty(), request.script.is_empty()) {
            (false, true) => self.parts.execute_atomic(caller, request, deadline).await?,
            (true, false) if !request.transaction.is_empty() => {
                return Err(Status::invalid_argument(
                    "a transaction commits statements, not a script: all of them are applied, or none",
                ));
            }
            (true, false) => self.parts.execute_script(caller, request, deadline).await?,
            (true, true) => return Err(invalid_sql(own_sql_error("the request holds no statement", 0), 0)),
            (false, false) => {
                return Err(Status::invalid_argument(
                    "a request holds either statements or a script, not both",
                ));
            }
        };
        Ok(Response::new(response))
    }

    async fn query(&self, request: Request<QueryRequest>) -> Result<Response<Self::QueryStream>, Status> {
        let deadline = Deadline::of_request(request.metadata());
        let caller = Caller::of(request.extensions());
        let QueryRequest { sql, params, named_params, read, transaction } = request.into_inner();
        let statement = Statement { sql, params, named_params, ..Statement::default() };
        check_statement(&statement, 1)?;
        let Runner { readers, gate, directory, .. } = &self.parts.runner;
        let mut batches = if transaction.is_empty() {
            gate.pass(&read.unwrap_or_default(), deadline.of_step()).await?;
            readers.read(Author::of(&caller, directory)?, statement, deadline.named())?
        } else {
            gate.check_trust()?;
            let (held, turn) =
                self.parts.transactions.read(&caller, &transaction, deadline.of_step()).await?;
            readers.read_held(Author::of(&caller, directory)?, held, turn, statement, deadline.named())?
        };
        // An error before the first row is the call's own status, which every client sees at once.
        let first =
            batches.next().await.ok_or_else(|| Status::internal("the read ended without an answer"))??;
        let rest = batches.map(|batch| batch.map(query_response));
        Ok(Response::new(Box::pin(once(Ok(query_response(first))).chain(rest))))
    }

    async fn run(&self, request: Request<RunRequest>) -> Result<Response<Self::RunStream>, Status> {
        let deadline = Deadline::of_request(request.metadata());
        let caller = Caller::of(request.extensions());
        let RunRequest { sql, params, named_params, read, id, foreign_keys } = request.into_inner();
        let mut statements = split(&sql)?;
        if !(params.is_empty() && named_params.is_empty()) {
            let [only] = statements.as_mut_slice() else {
                return Err(Status::invalid_argument("parameters need a request of a single statement"));
            };
            (only.params, only.named_params) = (params, named_params);
            check_parameters(only, 1)?;
        }
        let request = ScriptRequest {
            statements: statements.into(),
            caller,
            read: read.unwrap_or_default(),
            id,
            foreign_keys: foreign_keys.unwrap_or(true),
            deadline,
        };
        let (events, stream) = mpsc::channel(EVENTS_WAITING);
        let runner = self.parts.runner.clone();
        // A task of its own: a stream is only polled when its client takes something.
        tokio::spawn(async move { runner.run(request, events).await });
        Ok(Response::new(ReceiverStream::new(stream)))
    }

    async fn begin(&self, request: Request<BeginRequest>) -> Result<Response<BeginResponse>, Status> {
        let deadline = Deadline::of_request(request.metadata());
        let caller = Caller::of(request.extensions());
        let read = request.into_inner().read.unwrap_or_default();
        self.parts.runner.gate.pass(&read, deadline.of_step()).await?;
        let begun = self.parts.transactions.begin(&caller).await?;
        Ok(Response::new(BeginResponse {
            transaction: begun.token,
            log_index: begun.log_index,
            expires_in_ms: begun.expires_in.as_millis() as u64,
        }))
    }

    async fn rollback(
        &self,
        request: Request<RollbackRequest>,
    ) -> Result<Response<RollbackResponse>, Status> {
        let caller = Caller::of(request.extensions());
        self.parts.transactions.rollback(&caller, &request.into_inner().transaction)?;
        Ok(Response::new(RollbackResponse {}))
    }

    async fn verify(&self, request: Request<VerifyRequest>) -> Result<Response<VerifyResponse>, Status> {
        let deadline = Deadline::of_request(request.metadata()).of_step();
        let caller = Caller::of(request.extensions());
        let (id, body) = (WriteId::ServerMade, Body::Verify(VerifyMarker {}));
        let reply = self.parts.runner.writes.write(&caller, id, true, None, body, deadline).await?;
        if let Some(status) = reply_status(&reply, |number| number) {
            return Err(status);
        }
        Ok(Response::new(VerifyResponse { log_index: reply.log_index }))
    }

    async fn content_hash(
        &self,
        request: Request<ContentHashRequest>,
    ) -> Result<Response<ContentHashResponse>, Status> {
        let deadline = Deadline::of_request(request.metadata()).of_step();
        let index = request.into_inner().log_index;
        let ServiceParts { runner, verifications, node_id, .. } = &*self.parts;
        // A marker's result is known of from the moment that its entry is applied.
        runner.gate.see_index(index, deadline).await?;
        let result = timeout_at(deadline, verifications.result(index));
        match result.await {
            Ok(Some(Verification::Done(tables))) => {
                Ok(Response::new(ContentHashResponse { node_id: *node_id, tables: tables.to_vec() }))
            }
            Ok(Some(Verification::Failed(why))) => Err(Status::unavailable(why)),
            Ok(Some(Verification::UnderWay)) | Err(_) => {
                Err(Status::deadline_exceeded("the content is still being hashed: ask again, with more time"))
            }
            Ok(None) => Err(Status::not_found(format!(
                "this node has not hashed its content as of index {index}: there is no marker, or the node was \
                 restarted since"
            ))),
        }
    }

    async fn backup(&self, request: Request<BackupRequest>) -> Result<Response<Self::BackupStream>, Status> {
        let deadline = Deadline::of_request(request.metadata()).of_step();
        let format = request.into_inner().format;
        let format = BackupFormat::try_from(format).map_err(|_| {
            Status::invalid_argument(format!("{format} is not a backup format that this node knows"))
        })?;
        let ServiceParts { runner, backups, facts, .. } = &*self.parts;
        // What a node holds that is not well, or that differs from the others, nobody should keep.
        if let Some(why) = facts.health() {
            return Err(Status::unavailable(format!("this node is no source for a backup: {why}")));
        }
        runner.gate.pass(&ReadOptions::default(), deadline).await?;
        Ok(Response::new(backups.start(format).await?))
    }

    async fn move_leader(
        &self,
        request: Request<MoveLeaderRequest>,
    ) -> Result<Response<MoveLeaderResponse>, Status> {
        let leader_id = self.parts.leadership.move_to(request.into_inner().to).await?;
        Ok(Response::new(MoveLeaderResponse { leader_id }))
    }

    async fn restore(
        &self,
        request: Request<Streaming<RestoreRequest>>,
    ) -> Result<Response<RestoreResponse>, Status> {
        let caller = Caller::of(request.extensions());
        Ok(Response::new(self.parts.uploads.take(caller, request.into_inner()).await?))
    }

    async fn status(&self, _request: Request<StatusRequest>) -> Result<Response<StatusResponse>, Status> {
        Ok(Response::new(self.parts.status.status().await))
    }

    async fn login(&self, request: Request<LoginRequest>) -> Result<Response<LoginResponse>, Status> {
        let deadline = Deadline::of_request(request.metadata()).of_step();
        let caller = Caller::of(request.extensions());
        let lifetime_ms = request.into_inner().lifetime_ms;
        Ok(Response::new(self.parts.accounts.login(&caller, lifetime_ms, deadline).await?))
    }

    async fn change_users(
        &self,
        request: Request<ChangeUsersRequest>,
    ) -> Result<Response<ChangeUsersResponse>, Status> {
        let deadline = Deadline::of_request(request.metadata()).of_step();
        let caller = Caller::of(request.extensions());
        let log_index = self.parts.accounts.change(&caller, request.into_inner(), deadline).await?;
        Ok(Response::new(ChangeUsersResponse { log_index }))
    }

    async fn list_users(
        &self,
        request: Request<ListUsersRequest>,
    ) -> Result<Response<ListUsersResponse>, Status> {
        let deadline = Deadline::of_request(request.metadata()).of_step();
        self.parts.runner.gate.pass(&ReadOptions::default(), deadline).await?;
        Ok(Response::new(self.parts.accounts.list()))
    }
}

impl ServiceParts {
    async fn execute_atomic(
        &self,
        caller: Caller,
        request: ExecuteRequest,
        deadline: Deadline,
    ) -> Result<ExecuteResponse, Status> {
        let ExecuteRequest { statements, id, foreign_keys, transaction, .. } = request;
        if statements.len() > MAX_STATEMENTS {
            return Err(Status::resource_exhausted(format!(
                "the request holds {} statements, the limit is {MAX_STATEMENTS}: split it",
                statements.len()
            )));
        }
        for (position, statement) in statements.iter().enumerate() {
            check_statement(statement, position + 1)?;
        }
        let statements = self.parsable(statements).await?;
        let reads = match transaction.as_str() {
            "" => None,
            token => Some(self.transactions.commit(&caller, token, id.as_ref(), deadline.of_step()).await?),
        };
        let id = id.map_or(WriteId::ServerMade, |id| WriteId::ClientMade { id, part: 0 });
        let body = Body::Atomic(StatementList { statements });
        let (foreign_keys, deadline) = (foreign_keys.unwrap_or(true), deadline.of_step());
        let reply = self.runner.writes.write(&caller, id, foreign_keys, reads, body, deadline).await?;
        if let Some(status) = reply_status(&reply, |number| number) {
            return Err(status);
        }
        let reply = Arc::unwrap_or_clone(reply);
        Ok(ExecuteResponse { results: reply.results, log_index: reply.log_index })
    }

    /// The statements again, unless one of them cannot be parsed.
    async fn parsable(&self, statements: Vec<Statement>) -> Result<Vec<Statement>, Status> {
        let bytes: usize = statements.iter().map(|statement| statement.sql.len()).sum();
        if bytes <= PARSED_INLINE_BYTES {
            for (position, statement) in statements.iter().enumerate() {
                self.syntax.check(&statement.sql).map_err(|error| invalid_sql(error, position + 1))?;
            }
            return Ok(statements);
        }
        let statements: Arc<[Statement]> = statements.into();
        let kinds = self.runner.readers.classify(&statements, 0..statements.len()).await?;
        for (position, kind) in kinds.into_iter().enumerate() {
            if let Kind::Refused(error) = kind {
                return Err(invalid_sql(*error, position + 1));
            }
        }
        Ok(statements.to_vec())
    }

    async fn execute_script(
        &self,
        caller: Caller,
        request: ExecuteRequest,
        deadline: Deadline,
    ) -> Result<ExecuteResponse, Status> {
        let statements = split(&request.script)?;
        let count = statements.len();
        let request = ScriptRequest {
            statements: statements.into(),
            caller,
            read: Default::default(),
            id: request.id,
            foreign_keys: request.foreign_keys.unwrap_or(true),
            deadline,
        };
        let (events, stream) = mpsc::channel(EVENTS_WAITING);
        let gathered = gather(stream, count, self.max_result_bytes);
        let ((), response) = tokio::join!(self.runner.run(request, events), gathered);
        response
    }
}

/// The events of a script as one answer.
async fn gather(
    mut stream: mpsc::Receiver<Result<RunResponse, Status>>,
    statements: usize,
    max_bytes: usize,
) -> Result<ExecuteResponse, Status> {
    let mut response =
        ExecuteResponse { results: vec![StatementResult::default(); statements], log_index: 0 };
    let (mut bytes, mut current, mut completed) = (0, 0, 0);
    while let Some(message) = stream.recv().await {
        let message = message?;
        bytes += prost::Message::encoded_len(&message);
        if bytes > max_bytes {
            return Err(Status::resource_exhausted(format!(
                "the script's results exceed {max_bytes} bytes (max_result_bytes) after statement {completed}; \
                 what was executed until then stays"
            )));
        }
        for RunEvent { event } in message.events {
            match event {
                Some(Event::Columns(columns)) => {
                    current = columns.statement as usize - 1;
                    response.results[current].columns = columns.columns;
                }
                Some(Event::Row(row)) => response.results[current].rows.push(row),
                Some(Event::Done(done)) => {
                    completed = done.statement as usize;
                    let result = &mut response.results[completed - 1];
                    result.rows_affected = done.rows_affected;
                    result.last_insert_rowid = done.last_insert_rowid;
                    response.log_index = response.log_index.max(done.log_index);
                }
                None => {}
            }
        }
    }
    Ok(response)
}

fn query_response(batch: ReadBatch) -> QueryResponse {
    let log_index = if batch.columns.is_some() { batch.log_index } else { 0 };
    QueryResponse { columns: batch.columns.unwrap_or_default(), rows: batch.rows, log_index }
}

/// What can be said of a statement without SQLite.
fn check_statement(statement: &Statement, number: usize) -> Result<(), Status> {
    if let Some(at) = statement.sql.bytes().position(|byte| byte == 0) {
        return Err(nul_byte(at, number));
    }
    let mut found = resqlite::sql_text::statements(&statement.sql);
    let message = match (found.next(), found.next()) {
        (Some(_), None) => return check_parameters(statement, number),
        (None, _) => "the statement is empty",
        (Some(_), Some(_)) => {
            "there is more than one statement where one is expected; send several, a script, or use Run"
        }
    };
    Err(invalid_sql(own_sql_error(message, number), number))
}

fn check_parameters(statement: &Statement, number: usize) -> Result<(), Status> {
    let count = statement.params.len() + statement.named_params.len();
    if count > MAX_PARAMETERS {
        return Err(Status::resource_exhausted(format!(
            "statement {number} has {count} parameters, the limit is {MAX_PARAMETERS}"
        )));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use tonic::Code;

    fn check(sql: &str) -> Result<(), Status> {
        check_statement(&Statement { sql: sql.to_owned(), ..Statement::default() }, 1)
    }

    #[test]
    fn texts_that_are_no_single_statement_are_refused_with_words() {
        check("select ';' -- ;").unwrap();
        check("select 1;").unwrap();
        for (sql, words) in [
            ("", "empty"),
            (" -- nothing\n;", "empty"),
            ("select 1; select 2", "more than one statement"),
            ("select '\0'", "NUL byte"),
        ] {
            let status = check(sql).unwrap_err();
            assert_eq!(status.code(), Code::InvalidArgument, "{sql:?}");
            assert!(status.message().contains(words), "{sql:?}: {}", status.message());
        }
    }

    #[tokio::test]
    async fn a_scripts_results_have_a_bound() {
        let (events, stream) = mpsc::channel(1);
        let event = RunEvent { event: Some(Event::Row(Default::default())) };
        events.send(Ok(RunResponse { events: vec![event; 100] })).await.unwrap();
        let status = gather(stream, 1, 10).await.unwrap_err();
        assert_eq!(status.code(), Code::ResourceExhausted);
    }
}
