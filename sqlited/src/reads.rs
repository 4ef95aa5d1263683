//! The readers: threads with a read-only connection each, so that reads run in
//! parallel and never behind the writer.
//!
//! Every wait is bounded. A read ends early when its client has gone, when its
//! deadline has passed, when it has held its snapshot for too long, or when the
//! daemon stops. It is SQLite's progress handler that notices while a statement
//! runs: unlike `sqlite3_interrupt` from another thread, which stops a
//! statement in the same way, it cannot hit the connection's *next* statement.
//! This file knows nothing of the log, of writes or of consistency.

use std::{
    cell::RefCell,
    collections::{HashSet, VecDeque},
    io,
    ops::Range,
    path::{Path, PathBuf},
    pin::Pin,
    sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError},
    task::{Context, Poll, ready},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use prost::Message;
use resqlite::api::{Column, Row, SqlError, Statement};
use rusqlite::ffi;
use tokio::{
    runtime,
    sync::{
        mpsc::{self, error::TrySendError},
        oneshot, watch,
    },
    time::timeout_at,
};
use tokio_stream::Stream;
use tonic::{Code, Status};

use crate::{
    apply,
    classify::{self, Nature},
    connection,
    determinism::Class,
    errors::{invalid_sql, own_sql_error, sql_status},
    limits::{self, ROW_BATCH_BYTES, ROW_BATCHES_WAITING},
    script::Kind,
    sql_kind,
    syntax::SyntaxCheck,
    value::{self, BindError},
};

/// How many virtual machine instructions pass between two looks at the clock.
const INSTRUCTIONS_BETWEEN_LOOKS: i32 = 4_096;
/// How many texts a reader remembers as reads.
const KNOWN_READS: usize = 1_024;
/// Longer texts are seldom repeated.
const KNOWN_READ_MAX_BYTES: usize = 4 << 10;

/// Rows of one read, in order.
#[derive(Debug, Default, PartialEq)]
pub struct ReadBatch {
    /// In the first batch only.
    pub columns: Option<Vec<Column>>,
    /// About [`ROW_BATCH_BYTES`], unless a single row has more.
    pub rows: Vec<Row>,
    /// The log index that the read sees; in the first batch.
    pub log_index: u64,
    /// Nothing follows.
    pub last: bool,
}

/// Where a read's batches come out. Dropped, it ends the read.
#[derive(Debug)]
pub struct Batches {
    receiver: mpsc::Receiver<ReadBatch>,
    end: End,
    over: bool,
}

/// Why a read ended before its last batch. Beside the batches, and not behind
/// them: a client that takes nothing must still learn that there is no more.
type End = Arc<OnceLock<Status>>;

impl Stream for Batches {
    type Item = Result<ReadBatch, Status>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if self.over {
            return Poll::Ready(None);
        }
        let batch = ready!(self.receiver.poll_recv(context));
        self.over = batch.as_ref().is_none_or(|batch| batch.last);
        // Without its last batch a result is cut short, and must never look complete.
        let cut_short = || Status::internal("the read ended without its end");
        Poll::Ready(Some(batch.ok_or_else(|| self.end.get().cloned().unwrap_or_else(cut_short))))
    }
}

/// How long a read may hold what others need.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    /// Its snapshot, which keeps checkpoints from reclaiming the write-ahead log.
    pub snapshot: Duration,
    /// Its reader, while the client takes no rows.
    pub stalled_client: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self { snapshot: limits::SNAPSHOT_MAX, stalled_client: limits::CLIENT_STALL_MAX }
    }
}

/// The pool.
#[derive(Debug)]
pub struct Readers {
    queue: Arc<Queue>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

/// Jobs that wait for a reader.
#[derive(Debug)]
struct Queue {
    jobs: Mutex<VecDeque<Job>>,
    arrived: Condvar,
    capacity: usize,
    stopping: watch::Sender<bool>,
}

#[derive(Debug)]
enum Job {
    Read(ReadJob),
    Classify {
        statements: Arc<[Statement]>,
        range: Range<usize>,
        answer: oneshot::Sender<Result<Vec<Kind>, Status>>,
    },
}

#[derive(Debug)]
struct ReadJob {
    statement: Statement,
    /// Of the statement in its request, from 1; for errors.
    number: usize,
    deadline: Option<Instant>,
    batches: mpsc::Sender<ReadBatch>,
    end: End,
}

impl Readers {
    /// Starts `count` readers of the database at `path`, which must exist. They use `runtime`'s timers.
    pub fn start(
        path: &Path,
        count: usize,
        patience: Patience,
        runtime: &runtime::Handle,
    ) -> io::Result<Self> {
        let queue = Arc::new(Queue {
            jobs: Mutex::default(),
            arrived: Condvar::new(),
            capacity: count * limits::MAX_READS_QUEUED_PER_READER,
            stopping: watch::Sender::new(false),
        });
        let readers = Self { queue, threads: Mutex::default() };
        for number in 1..=count {
            let reader = Reader {
                path: path.to_owned(),
                queue: Arc::clone(&readers.queue),
                patience,
                runtime: runtime.clone(),
            };
            let thread =
                thread::Builder::new().name(format!("reader-{number}")).spawn(move || reader.run())?;
            readers.lock_threads().push(thread);
        }
        Ok(readers)
    }

    /// Reads with one statement, `number` in its request.
    pub fn read(
        &self,
        statement: Statement,
        number: usize,
        deadline: Option<tokio::time::Instant>,
    ) -> Result<Batches, Status> {
        let (sender, receiver) = mpsc::channel(ROW_BATCHES_WAITING);
        let deadline = deadline.map(tokio::time::Instant::into_std);
        let end = End::default();
        let batches = Batches { receiver, end: Arc::clone(&end), over: false };
        self.queue.push(Job::Read(ReadJob { statement, number, deadline, batches: sender, end }))?;
        Ok(batches)
    }

    /// What these statements are to a script, as far as this node's schema tells now.
    pub async fn classify(
        &self,
        statements: &Arc<[Statement]>,
        range: Range<usize>,
    ) -> Result<Vec<Kind>, Status> {
        let (answer, kinds) = oneshot::channel();
        self.queue.push(Job::Classify { statements: Arc::clone(statements), range, answer })?;
        kinds.await.unwrap_or_else(|_| Err(shutting_down()))
    }

    /// Ends all reads and refuses new ones.
    pub fn stop(&self) {
        self.queue.stopping.send_replace(true);
        // Jobs that nobody will take: their clients see UNAVAILABLE.
        for job in self.queue.lock().drain(..) {
            job.refuse(shutting_down());
        }
        self.queue.arrived.notify_all();
    }

    /// Waits for the threads, after [`Self::stop`]. Blocks.
    pub fn join(&self) {
        for thread in self.lock_threads().drain(..) {
            if thread.join().is_err() {
                tracing::error!("a reader panicked");
            }
        }
    }

    fn lock_threads(&self) -> MutexGuard<'_, Vec<JoinHandle<()>>> {
        self.threads.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Queue {
    fn push(&self, job: Job) -> Result<(), Status> {
        let mut jobs = self.lock();
        if self.is_stopping() {
            return Err(shutting_down());
        }
        if jobs.len() >= self.capacity {
            let waiting = jobs.len();
            return Err(Status::resource_exhausted(format!(
                "{waiting} reads are waiting already; try again later, or at another node"
            )));
        }
        jobs.push_back(job);
        drop(jobs);
        self.arrived.notify_one();
        Ok(())
    }

    /// The next job; None when there will be no more.
    fn pop(&self) -> Option<Job> {
        let mut jobs = self.lock();
        loop {
            if self.is_stopping() {
                return None;
            }
            if let Some(job) = jobs.pop_front() {
                return Some(job);
            }
            jobs = self.arrived.wait(jobs).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn is_stopping(&self) -> bool {
        *self.stopping.borrow()
    }

    fn lock(&self) -> MutexGuard<'_, VecDeque<Job>> {
        self.jobs.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Job {
    fn refuse(self, status: Status) {
        // Whoever has gone away needs no answer.
        match self {
            Self::Read(job) => job.tell(status),
            Self::Classify { answer, .. } => drop(answer.send(Err(status))),
        }
    }
}

fn shutting_down() -> Status {
    Status::unavailable("this node is shutting down")
}

/// One thread of the pool.
struct Reader {
    path: PathBuf,
    queue: Arc<Queue>,
    patience: Patience,
    runtime: runtime::Handle,
}

impl Reader {
    fn run(self) {
        let mut open: Option<OpenReader> = None;
        while let Some(job) = self.queue.pop() {
            // Opened by need, and again after a failure: a connection that has met one may be of no further use.
            let reader = match open.take().map_or_else(|| self.open(), Ok) {
                Ok(reader) => reader,
                Err(error) => {
                    tracing::error!(%error, "a reader cannot open the database");
                    job.refuse(Status::unavailable(format!("this node cannot open its database: {error}")));
                    continue;
                }
            };
            let fit = match job {
                Job::Read(job) => self.read(&reader, job),
                Job::Classify { statements, range, answer } => {
                    let kinds = range.map(|at| reader.kind(&statements[at].sql));
                    // Nobody waits any more: nothing to do.
                    let _ = answer.send(Ok(kinds.collect()));
                    Ok(())
                }
            };
            match fit {
                Ok(()) => open = Some(reader),
                Err(error) => {
                    tracing::error!(%error, "a read met an error of this node; its connection is opened anew")
                }
            }
        }
    }

    fn open(&self) -> rusqlite::Result<OpenReader> {
        let connection = connection::open_reader(&self.path)?;
        Ok(OpenReader { connection, syntax: SyntaxCheck::new()?, known_reads: RefCell::default() })
    }

    /// Answers one read. An error is the connection's own, not the statement's.
    fn read(&self, reader: &OpenReader, job: ReadJob) -> rusqlite::Result<()> {
        let began = Instant::now();
        let watch = Watch {
            queue: Arc::clone(&self.queue),
            client: job.batches.clone(),
            deadline: job.deadline,
            snapshot_until: began + self.patience.snapshot,
            patience: self.patience,
        };
        if let Some(ended) = watch.ended() {
            ended.tell(&job);
            return Ok(());
        }
        let look = watch.clone();
        let connection = reader.connection.connection();
        connection.progress_handler(INSTRUCTIONS_BETWEEN_LOOKS, Some(move || look.ended().is_some()))?;
        let outcome = Reading { reader, job: &job, watch: &watch, runtime: &self.runtime }.run();
        // The handler holds an end of the client's channel, which must close now.
        connection.progress_handler(0, None::<fn() -> bool>)?;
        match outcome {
            Ok(()) => Ok(()),
            Err(Failure::Ended(ended)) => {
                ended.tell(&job);
                Ok(())
            }
            Err(Failure::Statement(status)) => {
                job.tell(status);
                Ok(())
            }
            Err(Failure::Node(error)) => {
                job.tell(Status::unavailable(format!("this node cannot read its database: {error}")));
                Err(error)
            }
        }
    }
}

struct OpenReader {
    connection: connection::Reader,
    syntax: SyntaxCheck,
    /// Texts that were found to be reads. Should a change of the schema make one of them anything
    /// else, then the connection, which can only read, refuses it.
    known_reads: RefCell<HashSet<Box<str>>>,
}

impl OpenReader {
    fn kind(&self, sql: &str) -> Kind {
        sql_kind::kind(self.connection.classify(sql), sql, &self.syntax)
    }

    fn is_known_read(&self, sql: &str) -> bool {
        self.known_reads.borrow().contains(sql)
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
    ClientStalled(Duration),
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
            Self::ClientStalled(patience) => Status::aborted(format!(
                "the client took no rows for {} s: read in smaller pieces",
                patience.as_secs_f32()
            )),
            Self::Stopping => shutting_down(),
        };
        job.tell(status);
    }
}

impl ReadJob {
    /// Says why there is no more; the stream's closing, when the job is dropped, delivers it.
    fn tell(&self, status: Status) {
        // Only the first reason counts.
        drop(self.end.set(status));
    }
}

/// Notices when a read has to end.
#[derive(Clone)]
struct Watch {
    queue: Arc<Queue>,
    client: mpsc::Sender<ReadBatch>,
    deadline: Option<Instant>,
    snapshot_until: Instant,
    patience: Patience,
}

impl Watch {
    fn ended(&self) -> Option<Ended> {
        if self.client.is_closed() {
            return Some(Ended::ClientGone);
        }
        if self.queue.is_stopping() {
            return Some(Ended::Stopping);
        }
        let now = Instant::now();
        if self.deadline.is_some_and(|deadline| now >= deadline) {
            return Some(Ended::Deadline);
        }
        (now >= self.snapshot_until).then_some(Ended::SnapshotTooOld(self.patience.snapshot))
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
        let mut stopping = self.queue.stopping.subscribe();
        runtime.block_on(async {
            tokio::select! {
                sent = timeout_at(until.into(), self.client.send(batch)) => match sent {
                    Ok(Ok(())) => Ok(()),
                    Ok(Err(_)) => Err(Ended::ClientGone),
                    Err(_) => Err(self.ended().unwrap_or(Ended::ClientStalled(self.patience.stalled_client))),
                },
                _ = stopping.wait_for(|stopping| *stopping) => Err(Ended::Stopping),
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

/// One read under way.
struct Reading<'a> {
    reader: &'a OpenReader,
    job: &'a ReadJob,
    watch: &'a Watch,
    runtime: &'a runtime::Handle,
}

impl Reading<'_> {
    fn run(&self) -> Result<(), Failure> {
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
        let ReadJob { statement, number, .. } = self.job;
        if self.reader.is_known_read(&statement.sql) {
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
        Err(Failure::Statement(invalid_sql(error, *number)))
    }

    fn rows(&self, log_index: u64) -> Result<(), Failure> {
        let source = &self.job.statement;
        let read = self.reader.connection.read(&source.sql, |statement| {
            Ok(match value::bind(statement, source) {
                Ok(()) => self.stream(statement, log_index),
                Err(BindError::Mismatch(message)) => {
                    Err(Failure::Statement(invalid_sql(own_sql_error(message, 0), self.job.number)))
                }
                Err(BindError::Sqlite(error)) => Err(self.failure(error, Code::InvalidArgument)),
            })
        });
        read.unwrap_or_else(|error| Err(self.failure(error, Code::InvalidArgument)))
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
                let error = SqlError { statement: self.job.number as u32, ..classify::sql_error(&error, 0) };
                Failure::Statement(sql_status(code, &error))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::apply::{Applier, ApplySettings};
    use tokio::time::timeout;
    use tokio_stream::StreamExt;

    const ENDLESS: &str = "with recursive n(x) as (select 1 union all select x + 1 from n) select x from n";
    const BUSY: &str =
        "with recursive n(x) as (select 1 union all select x + 1 from n) select count(*) from n";
    const LONG: Duration = Duration::from_secs(60);

    /// A pool of one reader on an empty database.
    struct Pool {
        readers: Readers,
        _writer: Applier,
        _directory: tempfile::TempDir,
    }

    impl Pool {
        fn new(patience: Patience) -> Self {
            let directory = tempfile::tempdir().unwrap();
            let path = directory.path().join("test.db");
            let writer = Applier::open(&path, ApplySettings::default()).unwrap();
            let readers = Readers::start(&path, 1, patience, &runtime::Handle::current()).unwrap();
            Self { readers, _writer: writer, _directory: directory }
        }

        fn read(&self, sql: &str) -> Batches {
            self.readers.read(statement(sql), 1, None).unwrap()
        }

        async fn stop(self) {
            self.readers.stop();
            tokio::task::spawn_blocking(move || self.readers.join()).await.unwrap();
        }
    }

    fn statement(sql: &str) -> Statement {
        Statement { sql: sql.to_owned(), ..Statement::default() }
    }

    async fn end_of(mut batches: Batches) -> Status {
        loop {
            match timeout(LONG, batches.next()).await.unwrap() {
                Some(Ok(_)) => {}
                Some(Err(status)) => return status,
                None => panic!("the read ended well"),
            }
        }
    }

    #[tokio::test]
    async fn a_snapshot_is_held_for_a_bounded_time() {
        let pool = Pool::new(Patience { snapshot: Duration::from_millis(50), stalled_client: LONG });
        let status = end_of(pool.read(BUSY)).await;
        assert_eq!(status.code(), Code::Aborted);
        assert!(status.message().contains("held its snapshot"), "{status}");
        pool.stop().await;
    }

    #[tokio::test]
    async fn a_client_that_takes_nothing_gives_its_reader_back_and_its_result_looks_cut_short() {
        let pool = Pool::new(Patience { snapshot: LONG, stalled_client: Duration::from_millis(50) });
        let stalled = pool.read(ENDLESS);
        // Answered by the same reader, after it has given up on the other client.
        let mut next = pool.read("select 1");
        assert!(timeout(LONG, next.next()).await.unwrap().unwrap().unwrap().last);
        let status = end_of(stalled).await;
        assert_eq!(status.code(), Code::Aborted);
        assert!(status.message().contains("took no rows"), "{status}");
        pool.stop().await;
    }

    #[tokio::test]
    async fn a_read_ends_when_its_client_has_gone() {
        let pool = Pool::new(Patience::default());
        drop(pool.read(BUSY));
        drop(pool.read(ENDLESS));
        let mut next = pool.read("select 1");
        assert!(timeout(LONG, next.next()).await.unwrap().unwrap().unwrap().last);
        pool.stop().await;
    }

    #[tokio::test]
    async fn more_reads_than_may_wait_are_refused_and_a_stop_answers_those_that_do() {
        let pool = Pool::new(Patience::default());
        let mut waiting = vec![pool.read(BUSY)];
        let refused = loop {
            match pool.readers.read(statement("select 1"), 1, None) {
                Ok(batches) => waiting.push(batches),
                Err(status) => break status,
            }
        };
        assert_eq!(refused.code(), Code::ResourceExhausted);
        assert!(waiting.len() >= limits::MAX_READS_QUEUED_PER_READER);
        pool.readers.stop();
        for batches in waiting {
            assert_eq!(end_of(batches).await.code(), Code::Unavailable);
        }
        let late = pool.readers.read(statement("select 1"), 1, None);
        assert_eq!(late.unwrap_err().code(), Code::Unavailable);
        pool.stop().await;
    }

    #[tokio::test]
    async fn statements_that_depend_on_the_schema_are_proposed_and_the_rest_is_sorted_here() {
        let pool = Pool::new(Patience::default());
        let texts = [
            "select 1",
            "explain insert into t values (1)",
            "create table t(a)",
            "insert into unseen values (1)",
            "select * from unseen",
            "drop table if exists unseen",
            "drop trigger if exists unseen",
            "drop view if exists unseen",
            "drop index if exists unseen",
            "begin immediate",
            "end",
            "rollback",
            "pragma foreign_keys",
            "pragma foreign_keys = 0",
        ];
        let statements: Arc<[Statement]> = texts.iter().map(|sql| statement(sql)).collect();
        let kinds = pool.readers.classify(&statements, 0..statements.len()).await.unwrap();
        use Kind::{Begin, Commit, ForeignKeys, Read, Rollback, Write};
        let expected = [
            Read,
            // Its table is unknown here.
            Write,
            Write,
            Write,
            Write,
            Write,
            Write,
            Write,
            Write,
            Begin,
            Commit,
            Rollback,
            ForeignKeys(None),
            ForeignKeys(Some(false)),
        ];
        for ((text, kind), expected) in texts.iter().zip(kinds).zip(expected) {
            assert_eq!(kind, expected, "{text}");
        }
        let statements: Arc<[Statement]> =
            ["savepoint a", "selec", "attach 'x' as y"].iter().map(|sql| statement(sql)).collect();
        let kinds = pool.readers.classify(&statements, 0..3).await.unwrap();
        assert!(kinds.iter().all(|kind| matches!(kind, Kind::Refused(_))), "{kinds:?}");
        pool.stop().await;
    }
}
