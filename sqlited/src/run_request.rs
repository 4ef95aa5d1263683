//! `Run`, and the scripts of `Execute`: any SQL, statement after statement; the
//! server decides what is read here and what goes through the log.
//!
//! A read sees every earlier write of its request. A linearizable request asks
//! for one barrier: everything acknowledged before it began, and its own
//! writes, are seen by all of its reads. It knows nothing of gRPC but statuses
//! and of SQLite nothing at all.

use std::{ops::Range, sync::Arc};

use resqlite::api::{
    Column, ReadOptions, RequestId, Row, RunColumns, RunDone, RunEvent, RunResponse, Statement,
    StatementList, StatementResult, StoredReply, Value, logged_request::Body, run_event::Event, value,
};
use tokio::{sync::mpsc, time::Instant};
use tokio_stream::StreamExt;
use tonic::Status;

use crate::{
    auth::Caller,
    consistency::ReadGate,
    deadline::Deadline,
    errors::{invalid_sql, own_sql_error, reply_status},
    limits::{MAX_STATEMENTS, ROW_BATCH_BYTES},
    reads::{Author, ReadBatch, Readers},
    script::{Kind, Step, next_step},
    users::Directory,
    write_path::{WriteId, WritePath},
};

/// So many statements are classified at first; a script that goes on gets twice as many each time.
const FIRST_WINDOW: usize = 64;
const LARGEST_WINDOW: usize = 2_048;

/// Where the events go; a slow client makes the script wait.
pub type Events = mpsc::Sender<Result<RunResponse, Status>>;

/// What a script is run with.
#[derive(Debug)]
pub struct ScriptRequest {
    /// The statements, in order; parameters only if it is a single one.
    pub statements: Arc<[Statement]>,
    /// Who runs it.
    pub caller: Caller,
    /// What its reads ask for.
    pub read: ReadOptions,
    /// The client's name for it.
    pub id: Option<RequestId>,
    /// The setting that it begins with.
    pub foreign_keys: bool,
    /// Until when.
    pub deadline: Deadline,
}

/// The parts of the daemon that a script needs.
#[derive(Clone, Debug)]
pub struct Runner {
    /// Takes its writes.
    pub writes: Arc<WritePath>,
    /// Take its reads.
    pub readers: Arc<Readers>,
    /// Holds its reads back until they may begin.
    pub gate: ReadGate,
    /// Says what their user may read.
    pub directory: Directory,
}

impl Runner {
    /// Runs a script to its end, its first error, or until the client has gone.
    pub async fn run(&self, request: ScriptRequest, events: Events) {
        let client_gone = events.clone();
        let mut script = Script::new(self, request, events);
        let ended = tokio::select! {
            ended = script.run() => ended,
            () = client_gone.closed() => return,
        };
        // Events before an error belong to statements that were completed: they come first.
        let flushed = script.output.flush().await;
        if let (Err(status), Ok(())) = (ended, flushed) {
            // Nobody listens any more, then nobody needs it.
            let _ = script.output.events.send(Err(status)).await;
        }
    }
}

/// Splits a text; an error if nothing or too much is in it.
pub fn split(sql: &str) -> Result<Vec<Statement>, Status> {
    if let Some(at) = sql.bytes().position(|byte| byte == 0) {
        return Err(nul_byte(at, 0));
    }
    let mut statements = Vec::new();
    for found in resqlite::sql_text::statements(sql) {
        if statements.len() == MAX_STATEMENTS {
            return Err(Status::resource_exhausted(format!(
                "the request holds more than {MAX_STATEMENTS} statements: split it"
            )));
        }
        statements.push(Statement { sql: found.text.to_owned(), ..Statement::default() });
    }
    if statements.is_empty() {
        return Err(invalid_sql(own_sql_error("the request holds no statement", 0), 0));
    }
    Ok(statements)
}

/// The refusal of a text that SQLite would take to end in its middle.
pub fn nul_byte(at: usize, statement: usize) -> Status {
    let mut error = own_sql_error("the SQL text holds a NUL byte", statement);
    error.offset = i32::try_from(at).unwrap_or(-1);
    invalid_sql(error, statement)
}

/// A script on its way.
struct Script<'a> {
    runner: &'a Runner,
    request: ScriptRequest,
    sizes: Vec<usize>,
    /// Of the first statements; the rest is not yet classified.
    kinds: Vec<Kind>,
    window: usize,
    foreign_keys: bool,
    /// Whether the reads' consistency has been waited for.
    gate_passed: bool,
    /// Reads see at least this.
    seen_index: u64,
    output: Output,
}

impl<'a> Script<'a> {
    fn new(runner: &'a Runner, request: ScriptRequest, events: Events) -> Self {
        let sizes = request.statements.iter().map(|statement| statement.sql.len()).collect();
        let foreign_keys = request.foreign_keys;
        let output = Output { events, gathered: RunResponse::default(), bytes: 0, foreign_keys };
        Self {
            runner,
            request,
            sizes,
            kinds: Vec::new(),
            window: FIRST_WINDOW,
            foreign_keys,
            gate_passed: false,
            seen_index: 0,
            output,
        }
    }

    async fn run(&mut self) -> Result<(), Status> {
        let mut next = 0;
        loop {
            let Some(step) = next_step(&self.kinds, &self.sizes, next) else {
                self.classify_more().await?;
                continue;
            };
            let step = step.map_err(|error| {
                let number = error.statement as usize;
                invalid_sql(error, number)
            })?;
            next = match step {
                Step::Done => return Ok(()),
                Step::Read(range) => self.read(range).await?,
                Step::ForeignKeys(statement, enabled) => self.foreign_keys(statement, enabled).await?,
                Step::Write(range) => self.write(range).await?,
                Step::Block { statements, end, commit } => {
                    self.block(next, &statements, end, commit).await?;
                    end + 1
                }
            };
        }
    }

    async fn classify_more(&mut self) -> Result<(), Status> {
        let from = self.kinds.len();
        let to = self.request.statements.len().min(from + self.window);
        self.window = (self.window * 2).min(LARGEST_WINDOW);
        let kinds = self.runner.readers.classify(&self.request.statements, from..to).await?;
        self.kinds.extend(kinds);
        Ok(())
    }

    async fn read(&mut self, range: Range<usize>) -> Result<usize, Status> {
        let deadline = self.request.deadline.of_step();
        if !self.gate_passed {
            self.runner.gate.pass(&self.request.read, deadline).await?;
            self.gate_passed = true;
        }
        self.runner.gate.see_index(self.seen_index, deadline).await?;
        let Range { start, end } = range.clone();
        let statements = &self.request.statements;
        // Anew each time, and after what has to be seen: a right that was revoked meanwhile is gone.
        let author = Author::of(&self.request.caller, &self.runner.directory)?;
        let deadline = self.request.deadline.named();
        let mut batches = self.runner.readers.read_all(author, statements, range, deadline)?;
        let (mut number, mut log_index) = (start + 1, 0);
        while let Some(batch) = batches.next().await {
            let ReadBatch { columns, rows, log_index: seen, last } = batch?;
            if let Some(columns) = columns {
                log_index = seen;
                self.output.columns(number, columns);
            }
            for row in rows {
                self.output.row(row);
            }
            if last {
                self.output.done(number, &StatementResult::default(), log_index).await?;
                number += 1;
            } else {
                self.output.flush().await?;
            }
        }
        Ok(end)
    }

    async fn foreign_keys(&mut self, statement: usize, enabled: Option<bool>) -> Result<usize, Status> {
        let number = statement + 1;
        if let Some(enabled) = enabled {
            self.foreign_keys = enabled;
            self.output.foreign_keys = enabled;
        } else {
            let name = "foreign_keys".to_owned();
            self.output.columns(number, vec![Column { name, declared_type: String::new() }]);
            let value = Value { kind: Some(value::Kind::Integer(self.foreign_keys.into())) };
            self.output.row(Row { values: vec![value] });
        }
        self.output.done(number, &StatementResult::default(), 0).await?;
        Ok(statement + 1)
    }

    async fn write(&mut self, range: Range<usize>) -> Result<usize, Status> {
        let first = range.start;
        let statements = self.request.statements[range.clone()].to_vec();
        let reply = self.propose(first, Body::Script(StatementList { statements })).await?;
        let executed = reply.results.len();
        for (offset, result) in reply.results.iter().enumerate() {
            self.output.result(first + offset + 1, result, reply.log_index).await?;
        }
        if let Some(status) = reply_status(&reply, |proposed| first + proposed) {
            return Err(status);
        }
        // A retried request may get the reply to a longer or a shorter part than it asks for
        // today; the reply says how far the script really went.
        let next = (first + executed).min(self.sizes.len());
        if next < range.end {
            // The execution stopped before a read, whose tables did not exist yet when it was classified
            // (or before a VACUUM, which travels alone). What follows was classified in the same ignorance.
            self.kinds.truncate(next);
            self.window = FIRST_WINDOW;
            if executed == 0 {
                // Whatever this node takes it for, it will never be executed from the log.
                self.kinds.push(Kind::Read);
            }
        } else if self.kinds.len() < next {
            self.kinds.resize(next, Kind::Write);
        }
        Ok(next)
    }

    async fn block(
        &mut self,
        begin: usize,
        statements: &[usize],
        end: usize,
        commit: bool,
    ) -> Result<(), Status> {
        let nothing = StatementResult::default();
        if !commit || statements.is_empty() {
            return self.output.done(end + 1, &nothing, 0).await;
        }
        let list = statements.iter().map(|&at| self.request.statements[at].clone()).collect();
        let reply = self.propose(begin, Body::Atomic(StatementList { statements: list })).await?;
        let number = |proposed: usize| statements.get(proposed - 1).map_or(end, |at| *at) + 1;
        if let Some(status) = reply_status(&reply, number) {
            return Err(status);
        }
        self.output.done(begin + 1, &nothing, reply.log_index).await?;
        for (&at, result) in statements.iter().zip(&reply.results) {
            self.output.result(at + 1, result, reply.log_index).await?;
        }
        self.output.done(end + 1, &nothing, reply.log_index).await
    }

    async fn propose(&mut self, first: usize, body: Body) -> Result<Arc<StoredReply>, Status> {
        // What is known so far must not wait for consensus.
        self.output.flush().await?;
        let id = match &self.request.id {
            Some(id) => WriteId::ClientMade { id: id.clone(), part: first },
            None => WriteId::ServerMade,
        };
        let deadline: Instant = self.request.deadline.of_step();
        let reply = self
            .runner
            .writes
            .write(&self.request.caller, id, self.foreign_keys, None, body, deadline)
            .await?;
        self.seen_index = self.seen_index.max(reply.log_index);
        // A write that was made just now is as good as a barrier. One under a client's id may be a repeated one:
        // its reply is then as old as the first.
        self.gate_passed |= self.request.id.is_none();
        Ok(reply)
    }
}

/// Gathers events into messages.
struct Output {
    events: Events,
    gathered: RunResponse,
    bytes: usize,
    foreign_keys: bool,
}

impl Output {
    fn push(&mut self, event: Event) {
        let event = RunEvent { event: Some(event) };
        self.bytes += prost::Message::encoded_len(&event);
        self.gathered.events.push(event);
    }

    fn columns(&mut self, number: usize, columns: Vec<Column>) {
        if !columns.is_empty() {
            self.push(Event::Columns(RunColumns { statement: number as u32, columns }));
        }
    }

    fn row(&mut self, row: Row) {
        self.push(Event::Row(row));
    }

    async fn result(
        &mut self,
        number: usize,
        result: &StatementResult,
        log_index: u64,
    ) -> Result<(), Status> {
        self.columns(number, result.columns.clone());
        for row in &result.rows {
            self.row(row.clone());
            self.flush_when_full().await?;
        }
        self.done(number, result, log_index).await
    }

    async fn done(&mut self, number: usize, result: &StatementResult, log_index: u64) -> Result<(), Status> {
        self.push(Event::Done(RunDone {
            statement: number as u32,
            rows_affected: result.rows_affected,
            last_insert_rowid: result.last_insert_rowid,
            log_index,
            foreign_keys: self.foreign_keys,
        }));
        self.flush_when_full().await
    }

    async fn flush_when_full(&mut self) -> Result<(), Status> {
        if self.bytes >= ROW_BATCH_BYTES { self.flush().await } else { Ok(()) }
    }

    async fn flush(&mut self) -> Result<(), Status> {
        if self.gathered.events.is_empty() {
            return Ok(());
        }
        self.bytes = 0;
        let response = std::mem::take(&mut self.gathered);
        self.events.send(Ok(response)).await.map_err(|_| Status::cancelled("the client has gone"))
    }
}
