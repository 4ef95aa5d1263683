//! One thread of the pool: runs a statement on its connection and streams the rows.
//! It knows nothing of the other threads but the queue they share.

use std::{
    cell::{Cell, RefCell},
    collections::HashSet,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
    time::{Duration, Instant},
};

use prost::Message;
use resqlite::api::{ReplyClass, SqlError};
use rusqlite::ffi;
use tokio::{
    runtime,
    sync::mpsc::{self, error::TrySendError},
    time::timeout_at,
};
use tonic::{Code, Status};

use super::{Author, Held, Job, Patience, Phase, Queue, ReadBatch, ReadJob, shutting_down};
use crate::{
    apply,
    classify::{self, Nature},
    connection,
    database::DatabaseFile,
    determinism::{Class, authorizer::StatementFacts},
    errors::{invalid_sql, own_sql_error, sql_status},
    limits::ROW_BATCH_BYTES,
    script::Kind,
    sql_kind,
    syntax::SyntaxCheck,
    users::Where,
    value::{self, BindError},
};

/// How many virtual machine instructions pass between two looks at the clock.
const INSTRUCTIONS_BETWEEN_LOOKS: i32 = 4_096;
/// How many texts a reader remembers as reads.
const KNOWN_READS: usize = 1_024;
/// Longer texts are seldom repeated.
const KNOWN_READ_MAX_BYTES: usize = 4 << 10;

/// One thread of the pool.
pub(super) struct Reader {
    pub database: DatabaseFile,
    pub queue: Arc<Queue>,
    pub patience: Patience,
    pub runtime: runtime::Handle,
}

impl Reader {
    /// Takes job after job until the pool stops.
    pub fn run(self) {
        let mut open: Option<OpenReader> = None;
        while let Some(job) = self.queue.pop(&mut open) {
            // Opened by need, and again after a failure: a connection that has met one may be of no further use.
            let reader = match open.take().map_or_else(|| self.open(), Ok) {
                Ok(reader) => reader,
                Err(error) => {
                    tracing::error!(%error, "a reader cannot open the database");
                    job.refuse(Status::unavailable(format!("this node cannot open its database: {error}")));
                    continue;
                }
            };
            // A panic is a defect; it costs one read its answer, and must not cost all others their reader.
            match catch_unwind(AssertUnwindSafe(|| self.work(&reader, job))) {
                Ok(Ok(())) => open = Some(reader),
                Ok(Err(error)) => {
                    tracing::error!(%error, "a read met an error of this node; its connection is opened anew");
                }
                Err(_) => tracing::error!("a read panicked; its connection is opened anew"),
            }
        }
    }

    fn work(&self, reader: &OpenReader, job: Job) -> rusqlite::Result<()> {
        match job {
            Job::Read(job) => match job.held.clone() {
                None => self.read(reader, job),
                Some(held) => {
                    self.read_held(&held, job);
                    Ok(())
                }
            },
            Job::Hold { until, answer } => {
                let held = self.open().and_then(|reader| Held::open(reader, until));
                let held = held.inspect(|held| self.queue.add_held(held));
                // Nobody waits any more: it is closed again.
                let _ = answer.send(held.map_err(|error| {
                    Status::unavailable(format!("this node cannot open its database: {error}"))
                }));
                Ok(())
            }
            Job::Classify { statements, range, answer } => {
                let kinds = range.map(|at| reader.kind(&statements[at].sql)).collect();
                // Nobody waits any more: nothing to do.
                let _ = answer.send(Ok(kinds));
                Ok(())
            }
        }
    }

    fn open(&self) -> rusqlite::Result<OpenReader> {
        let connection = connection::open_reader(&self.database)?;
        Ok(OpenReader {
            connection,
            syntax: SyntaxCheck::new()?,
            known_reads: RefCell::default(),
            known_under: Cell::new(0),
        })
    }

    /// Answers one read of an open snapshot, with that one's connection.
    fn read_held(&self, held: &Held, mut job: ReadJob) {
        // Until the connection is given back: whoever has the turn next needs it.
        let _turn = job.turn.take();
        let Some(reader) = held.take_reader() else {
            return job.tell(Status::aborted("the transaction's snapshot is gone; begin again"));
        };
        match self.read(&reader, job) {
            Ok(()) => held.give_back(reader),
            Err(error) => {
                tracing::error!(%error, "a transaction's read met an error of this node; it has ended")
            }
        }
    }

    /// Answers a read, statement by statement. An error is the connection's own, not the statements'.
    fn read(&self, reader: &OpenReader, job: ReadJob) -> rusqlite::Result<()> {
        for at in job.range.clone() {
            if !self.read_statement(reader, &job, at)? {
                break;
            }
        }
        Ok(())
    }

    /// Answers one statement of a read. False: it failed, and the client was told why.
    fn read_statement(&self, reader: &OpenReader, job: &ReadJob, at: usize) -> rusqlite::Result<bool> {
        let began = Instant::now();
        let watch = Watch {
            queue: Arc::clone(&self.queue),
            client: job.batches.clone(),
            deadline: job.deadline,
            snapshot_until: job.held.as_ref().map_or(began + self.patience.snapshot, |held| held.until()),
            of_transaction: job.held.is_some(),
            patience: self.patience,
        };
        if let Some(ended) = watch.ended() {
            ended.tell(job);
            return Ok(false);
        }
        let look = watch.clone();
        let connection = reader.connection.connection();
        connection.progress_handler(INSTRUCTIONS_BETWEEN_LOOKS, Some(move || look.ended().is_some()))?;
        let outcome = Reading { reader, job, at, watch: &watch, runtime: &self.runtime }.run();
        // The handler holds an end of the client's channel, which must close now.
        connection.progress_handler(0, None::<fn() -> bool>)?;
        match outcome {
            Ok(()) => Ok(true),
            Err(Failure::Ended(ended)) => {
                ended.tell(job);
                Ok(false)
            }
            Err(Failure::Statement(status)) => {
                job.tell(status);
                Ok(false)
            }
            Err(Failure::Node(error)) => {
                job.tell(Status::unavailable(format!("this node cannot read its database: {error}")));
                Err(error)
            }
        }
    }
}

pub(super) struct OpenReader {
    pub connection: connection::Reader,
    syntax: SyntaxCheck,
    /// Texts that were found to be reads. Should a change of the schema make one of them anything
    /// else, then the connection, which can only read, refuses it.
    known_reads: RefCell<HashSet<Box<str>>>,
    /// Of the schema under which they were: another one's views may expand to more.
    known_under: Cell<i64>,
}

impl OpenReader {
    fn kind(&self, sql: &str) -> Kind {
        sql_kind::kind(self.connection.classify(sql), sql, &self.syntax)
    }

    fn is_known_read(&self, sql: &str) -> rusqlite::Result<bool> {
        let version = self.connection.schema_version()?;
        if self.known_under.replace(version) != version {
            self.known_reads.take();
        }
        Ok(self.known_reads.borrow().contains(sql))
    }

    fn learn_read(&self, sql: &str) {
        let mut known = self.known_reads.borrow_mut();
        if sql.len() <= KNOWN_READ_MAX_BYTES {
            // Simple, and seldom: whoever reads with ever new texts gains nothing from remembering them.
            if known.len() >= KNOWN_READS {
                known.clear();
            }
            known.insert(sql.into());
        }
    }
}

/// Why a read ends before its last row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ended {
    ClientGone,
    Deadline,
    SnapshotTooOld(Duration),
    TransactionTooOld,
    ClientStalled(Duration),
    Replaced,
    Stopping,
}

impl Ended {
    /// Says so to the client, if there is one.
    fn tell(self, job: &ReadJob) {
        let status = match self {
            Self::ClientGone => return,
            Self::Deadline => Status::deadline_exceeded("the read did not end before its deadline"),
            Self::SnapshotTooOld(patience) => Status::aborted(format!(
                "the read held its snapshot for {} s, the longest that a read may: read in smaller pieces",
                patience.as_secs_f32()
            )),
            Self::TransactionTooOld => Status::aborted("the transaction's snapshot has expired; begin again"),
            Self::ClientStalled(patience) => Status::aborted(format!(
                "the client took no rows for {} s: read in smaller pieces",
                patience.as_secs_f32()
            )),
            Self::Replaced => Status::aborted("the database was replaced by a snapshot; try again"),
            Self::Stopping => shutting_down(),
        };
        job.tell(status);
    }
}

/// Notices when a read has to end.
#[derive(Clone)]
struct Watch {
    queue: Arc<Queue>,
    client: mpsc::Sender<ReadBatch>,
    deadline: Option<Instant>,
    snapshot_until: Instant,
    of_transaction: bool,
    patience: Patience,
}

impl Watch {
    fn ended(&self) -> Option<Ended> {
        if self.client.is_closed() {
            return Some(Ended::ClientGone);
        }
        if let Some(ended) = Self::ended_by(self.queue.phase()) {
            return Some(ended);
        }
        let now = Instant::now();
        if self.deadline.is_some_and(|deadline| now >= deadline) {
            return Some(Ended::Deadline);
        }
        let too_old = match self.of_transaction {
            true => Ended::TransactionTooOld,
            false => Ended::SnapshotTooOld(self.patience.snapshot),
        };
        (now >= self.snapshot_until).then_some(too_old)
    }

    fn ended_by(phase: Phase) -> Option<Ended> {
        match phase {
            Phase::Open => None,
            Phase::Closed => Some(Ended::Replaced),
            Phase::Stopping => Some(Ended::Stopping),
        }
    }

    /// Sends a batch, and waits for a slow client, within bounds.
    fn send(&self, batch: ReadBatch, runtime: &runtime::Handle) -> Result<(), Ended> {
        let batch = match self.client.try_send(batch) {
            Ok(()) => return Ok(()),
            Err(TrySendError::Closed(_)) => return Err(Ended::ClientGone),
            Err(TrySendError::Full(batch)) => batch,
        };
        let mut until = self.snapshot_until.min(Instant::now() + self.patience.stalled_client);
        until = self.deadline.map_or(until, |deadline| until.min(deadline));
        let mut phase = self.queue.phase.subscribe();
        runtime.block_on(async {
            tokio::select! {
                sent = timeout_at(until.into(), self.client.send(batch)) => match sent {
                    Ok(Ok(())) => Ok(()),
                    Ok(Err(_)) => Err(Ended::ClientGone),
                    Err(_) => Err(self.ended().unwrap_or(Ended::ClientStalled(self.patience.stalled_client))),
                },
                Ok(phase) = phase.wait_for(|phase| *phase != Phase::Open) => {
                    Err(Self::ended_by(*phase).unwrap_or(Ended::Stopping))
                }
            }
        })
    }
}

/// Why a read gives no (more) rows.
enum Failure {
    Ended(Ended),
    /// The statement's own fault.
    Statement(Status),
    /// This node's.
    Node(rusqlite::Error),
}

impl From<Ended> for Failure {
    fn from(ended: Ended) -> Self {
        Self::Ended(ended)
    }
}

/// One statement of a read under way.
struct Reading<'a> {
    reader: &'a OpenReader,
    job: &'a ReadJob,
    /// Which of the job's statements.
    at: usize,
    watch: &'a Watch,
    runtime: &'a runtime::Handle,
}

impl Reading<'_> {
    /// Of the statement in its request, from 1; for errors.
    fn number(&self) -> usize {
        self.at + 1
    }

    fn run(&self) -> Result<(), Failure> {
        if let Some(held) = &self.job.held {
            return self.check().and_then(|()| self.rows(held.log_index()));
        }
        let connection = self.reader.connection.connection();
        // One snapshot for the log index and the rows. It is given up whichever way this ends.
        let snapshot = connection.unchecked_transaction().map_err(Failure::Node)?;
        let log_index = apply::applied_index(&snapshot).map_err(Failure::Node)?;
        let read = self.check().and_then(|()| self.rows(log_index));
        snapshot.finish().map_err(Failure::Node)?;
        read
    }

    /// Lets only reads pass.
    fn check(&self) -> Result<(), Failure> {
        let statement = &self.job.statements[self.at];
        if self.reader.is_known_read(&statement.sql).map_err(Failure::Node)? {
            return Ok(());
        }
        let error = match self.reader.connection.classify(&statement.sql) {
            Class::ReadOnly => {
                self.reader.learn_read(&statement.sql);
                return Ok(());
            }
            Class::Unpreparable { error, .. } => error,
            Class::Empty => own_sql_error("the statement is empty", 0),
            Class::Write | Class::Transaction(_) | Class::ForeignKeysPragma(_) => {
                own_sql_error("this is not a read: use Execute, or Run, for what is not", 0)
            }
        };
        Err(Failure::Statement(invalid_sql(error, self.number())))
    }

    fn rows(&self, log_index: u64) -> Result<(), Failure> {
        let source = &self.job.statements[self.at];
        let run = |statement: &mut rusqlite::Statement<'_>| {
            Ok(match value::bind(statement, source) {
                Ok(()) => self.stream(statement, log_index),
                Err(BindError::Mismatch(message)) => {
                    Err(Failure::Statement(invalid_sql(own_sql_error(message, 0), self.number())))
                }
                Err(BindError::Sqlite(error)) => Err(self.failure(error, Code::InvalidArgument)),
            })
        };
        // Who may read everything needs no look at what it is.
        let read = if self.job.held.is_none() && self.job.author.rights.reads_everything() {
            self.reader.connection.read(&source.sql, |statement| run(statement))
        } else {
            self.reader.connection.read_noting(&source.sql, |facts| self.noted(facts), run)
        };
        read.unwrap_or_else(|error| Err(self.failure(error, Code::InvalidArgument)))
    }

    /// Notes what is read, and refuses what may not be.
    fn noted(&self, facts: &StatementFacts) -> rusqlite::Result<Option<Result<(), Failure>>> {
        if let Some(held) = &self.job.held {
            held.note(facts);
        }
        let Author { name, rights } = &self.job.author;
        let excess = rights.excess(facts, self.reader.connection.connection(), Where::Reader)?;
        Ok(excess.map(|excess| {
            let message = format!("{name} {excess}");
            let code = ffi::SQLITE_AUTH;
            let failure = classify::Failure::new(ReplyClass::Denied, code, self.number() as u32, message);
            Err(Failure::Statement(sql_status(Code::PermissionDenied, &failure.error)))
        }))
    }

    fn stream(&self, statement: &mut rusqlite::Statement<'_>, log_index: u64) -> Result<(), Failure> {
        let mut batch = ReadBatch { log_index, ..ReadBatch::default() };
        let (mut bytes, mut width) = (0, None);
        let mut rows = statement.raw_query();
        while let Some(row) = rows.next().map_err(|error| self.failure(error, Code::FailedPrecondition))? {
            // Not before the first step, which prepares a cached statement anew after a change of the schema.
            let width = *width.get_or_insert_with(|| {
                let columns = value::columns(row.as_ref());
                let width = columns.len();
                batch.columns = Some(columns);
                width
            });
            let row =
                value::row(row, width).map_err(|error| self.failure(error, Code::FailedPrecondition))?;
            bytes += row.encoded_len();
            batch.rows.push(row);
            if bytes >= ROW_BATCH_BYTES {
                bytes = 0;
                self.watch.send(std::mem::take(&mut batch), self.runtime)?;
            }
        }
        drop(rows);
        if width.is_none() {
            batch.columns = Some(value::columns(statement));
        }
        batch.last = true;
        Ok(self.watch.send(batch, self.runtime)?)
    }

    fn failure(&self, error: rusqlite::Error, code: Code) -> Failure {
        let extended_code = classify::extended_code(&error);
        if extended_code == ffi::SQLITE_INTERRUPT {
            // Nobody else interrupts. Should the reason have gone meanwhile, then only a client's going can have.
            return self.watch.ended().unwrap_or(Ended::ClientGone).into();
        }
        match classify::nature(extended_code, false) {
            Nature::Environmental => Failure::Node(error),
            Nature::Deterministic => {
                let error = SqlError { statement: self.number() as u32, ..classify::sql_error(&error, 0) };
                Failure::Statement(sql_status(code, &error))
            }
        }
    }
}
