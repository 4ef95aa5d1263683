//! The readers: threads with a read-only connection each, so that reads run in
//! parallel and never behind the writer.
//!
//! Every wait is bounded. A read ends early when its client has gone, when its
//! deadline has passed, when it has held its snapshot for too long, or when the
//! daemon stops. It is SQLite's progress handler that notices while a statement
//! runs: unlike `sqlite3_interrupt` from another thread, which stops a
//! statement in the same way, it cannot hit the connection's *next* statement.
//! This file knows nothing of the log, of writes or of consistency.

mod held;
mod reader;
#[cfg(test)]
mod tests;

use std::{
    collections::VecDeque,
    io,
    ops::Range,
    pin::Pin,
    sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError, Weak},
    task::{Context, Poll, ready},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use resqlite::api::{Column, Row, Statement};
use tokio::{
    runtime,
    sync::{mpsc, oneshot, watch},
};
use tokio_stream::Stream;
use tonic::Status;

pub use self::held::{Held, Turn};
use self::reader::Reader;
use crate::{
    auth::Caller,
    database::DatabaseFile,
    limits::{self, ROW_BATCHES_WAITING},
    script::Kind,
    users::{Directory, Rights},
};

/// Rows of one statement, in order.
#[derive(Debug, Default, PartialEq)]
pub struct ReadBatch {
    /// In the first batch only.
    pub columns: Option<Vec<Column>>,
    /// About [`limits::ROW_BATCH_BYTES`], unless a single row has more.
    pub rows: Vec<Row>,
    /// The log index that the read sees; in the first batch.
    pub log_index: u64,
    /// Nothing follows of this statement.
    pub last: bool,
}

/// Where a read's batches come out, statement after statement. Dropped, it ends the read.
#[derive(Debug)]
pub struct Batches {
    receiver: mpsc::Receiver<ReadBatch>,
    end: End,
    /// How many statements have not had their last batch.
    statements_left: usize,
}

/// Why a read ended before its last batch. Beside the batches, and not behind
/// them: a client that takes nothing must still learn that there is no more.
type End = Arc<OnceLock<Status>>;

impl Stream for Batches {
    type Item = Result<ReadBatch, Status>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if self.statements_left == 0 {
            return Poll::Ready(None);
        }
        let batch = ready!(self.receiver.poll_recv(context));
        match &batch {
            Some(batch) => self.statements_left -= usize::from(batch.last),
            None => self.statements_left = 0,
        }
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
    phase: watch::Sender<Phase>,
    /// How many threads have no connection and take no job, because the pool is closed.
    resting: watch::Sender<usize>,
    /// Snapshots with connections of their own.
    held: Mutex<Vec<Weak<Held>>>,
}

/// What the pool does with jobs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Open,
    /// For a while no connection may be open: reads end, new ones wait.
    Closed,
    Stopping,
}

/// No reader has the database open for as long as this lives.
#[derive(Debug)]
pub struct Closed {
    queue: Arc<Queue>,
}

impl Drop for Closed {
    fn drop(&mut self) {
        self.queue.go(Phase::Closed, Phase::Open);
    }
}

#[derive(Debug)]
enum Job {
    Read(ReadJob),
    Hold {
        until: Instant,
        answer: oneshot::Sender<Result<Arc<Held>, Status>>,
    },
    Classify {
        statements: Arc<[Statement]>,
        range: Range<usize>,
        answer: oneshot::Sender<Result<Vec<Kind>, Status>>,
    },
}

/// On whose behalf something is read.
#[derive(Clone, Debug)]
pub struct Author {
    name: String,
    rights: Arc<Rights>,
}

impl Author {
    /// The caller, with the rights that are committed now.
    pub fn of(caller: &Caller, directory: &Directory) -> Result<Self, Status> {
        Ok(Self { name: caller.who.to_string(), rights: caller.rights(directory)? })
    }

    /// May read everything.
    pub fn anybody() -> Self {
        Self { name: String::new(), rights: Rights::everything() }
    }
}

#[derive(Debug)]
struct ReadJob {
    author: Author,
    /// All of the request's, from which these are read, in order.
    statements: Arc<[Statement]>,
    range: Range<usize>,
    deadline: Option<Instant>,
    /// The snapshot to read, if it is not to be the present one …
    held: Option<Arc<Held>>,
    /// … and the right to.
    turn: Option<Turn>,
    batches: mpsc::Sender<ReadBatch>,
    end: End,
}

impl Readers {
    /// Starts `count` readers of a database that is open for writing. They use `runtime`'s timers.
    pub fn start(
        database: &DatabaseFile,
        count: usize,
        patience: Patience,
        runtime: &runtime::Handle,
    ) -> io::Result<Self> {
        let queue = Arc::new(Queue {
            jobs: Mutex::default(),
            arrived: Condvar::new(),
            capacity: count * limits::MAX_READS_QUEUED_PER_READER,
            phase: watch::Sender::new(Phase::Open),
            resting: watch::Sender::new(0),
            held: Mutex::default(),
        });
        let readers = Self { queue, threads: Mutex::default() };
        for number in 1..=count {
            let reader = Reader {
                database: database.clone(),
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

    /// Reads with one statement.
    pub fn read(
        &self,
        author: Author,
        statement: Statement,
        deadline: Option<tokio::time::Instant>,
    ) -> Result<Batches, Status> {
        self.push_read(author, Arc::new([statement]), 0..1, deadline, None)
    }

    /// Reads with these of a request's statements, one after the other: none sees less than the one before it.
    pub fn read_all(
        &self,
        author: Author,
        statements: &Arc<[Statement]>,
        range: Range<usize>,
        deadline: Option<tokio::time::Instant>,
    ) -> Result<Batches, Status> {
        self.push_read(author, Arc::clone(statements), range, deadline, None)
    }

    /// How many jobs wait for a reader.
    pub fn waiting(&self) -> usize {
        self.queue.lock().len()
    }

    /// Opens a snapshot; reads of it end at `until`.
    pub async fn hold(&self, until: tokio::time::Instant) -> Result<Arc<Held>, Status> {
        let (answer, held) = oneshot::channel();
        self.queue.push(Job::Hold { until: until.into_std(), answer })?;
        held.await.unwrap_or_else(|_| Err(shutting_down()))
    }

    /// Reads an open snapshot with one statement.
    pub fn read_held(
        &self,
        author: Author,
        held: Arc<Held>,
        turn: Turn,
        statement: Statement,
        deadline: Option<tokio::time::Instant>,
    ) -> Result<Batches, Status> {
        self.push_read(author, Arc::new([statement]), 0..1, deadline, Some((held, turn)))
    }

    fn push_read(
        &self,
        author: Author,
        statements: Arc<[Statement]>,
        range: Range<usize>,
        deadline: Option<tokio::time::Instant>,
        held: Option<(Arc<Held>, Turn)>,
    ) -> Result<Batches, Status> {
        let (held, turn) = held.unzip();
        let (sender, receiver) = mpsc::channel(ROW_BATCHES_WAITING);
        let deadline = deadline.map(tokio::time::Instant::into_std);
        let end = End::default();
        let batches = Batches { receiver, end: Arc::clone(&end), statements_left: range.len() };
        let job = ReadJob { author, statements, range, deadline, held, turn, batches: sender, end };
        self.queue.push(Job::Read(job))?;
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

    /// Ends all reads with ABORTED and closes all connections, so that the database may be replaced. New reads
    /// wait for as long as what is returned lives. Never returns once the pool stops.
    pub async fn close(&self) -> Closed {
        self.queue.go(Phase::Open, Phase::Closed);
        let closed = Closed { queue: Arc::clone(&self.queue) };
        let threads = self.lock_threads().len();
        // We hold a sender, so waiting cannot fail for want of one.
        let _ = self.queue.resting.subscribe().wait_for(|resting| *resting == threads).await;
        // Nobody reads, so nobody uses one of these; and only readers make new ones.
        for held in self.queue.lock_held().drain(..).filter_map(|held| held.upgrade()) {
            drop(held.take_reader());
        }
        closed
    }

    /// Ends all reads and refuses new ones.
    pub fn stop(&self) {
        self.queue.phase.send_replace(Phase::Stopping);
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

    /// The next job; None when there will be no more. While the pool is closed, so is the caller's connection.
    fn pop<C>(&self, connection: &mut Option<C>) -> Option<Job> {
        let mut jobs = self.lock();
        loop {
            match self.phase() {
                Phase::Stopping => return None,
                Phase::Open => {
                    if let Some(job) = jobs.pop_front() {
                        return Some(job);
                    }
                    jobs = self.wait(jobs);
                }
                Phase::Closed => {
                    drop(connection.take());
                    self.resting.send_modify(|resting| *resting += 1);
                    while self.phase() == Phase::Closed {
                        jobs = self.wait(jobs);
                    }
                    self.resting.send_modify(|resting| *resting -= 1);
                }
            }
        }
    }

    fn wait<'a>(&self, jobs: MutexGuard<'a, VecDeque<Job>>) -> MutexGuard<'a, VecDeque<Job>> {
        self.arrived.wait(jobs).unwrap_or_else(PoisonError::into_inner)
    }

    /// Goes from one phase to another, if it is in that one; a stop is for ever.
    fn go(&self, from: Phase, to: Phase) {
        // Under the lock, so that no thread that has just looked misses the call.
        let jobs = self.lock();
        self.phase.send_if_modified(|phase| {
            let goes = *phase == from;
            if goes {
                *phase = to;
            }
            goes
        });
        drop(jobs);
        self.arrived.notify_all();
    }

    fn phase(&self) -> Phase {
        *self.phase.borrow()
    }

    fn is_stopping(&self) -> bool {
        self.phase() == Phase::Stopping
    }

    /// Remembers a snapshot, so that it can be taken away.
    fn add_held(&self, held: &Arc<Held>) {
        let mut all = self.lock_held();
        all.retain(|held| held.strong_count() > 0);
        all.push(Arc::downgrade(held));
    }

    fn lock_held(&self) -> MutexGuard<'_, Vec<Weak<Held>>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock(&self) -> MutexGuard<'_, VecDeque<Job>> {
        self.jobs.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl ReadJob {
    /// Says why there is no more; the stream's closing, when the job is dropped, delivers it.
    fn tell(&self, status: Status) {
        // Only the first reason counts.
        drop(self.end.set(status));
    }
}

impl Job {
    fn refuse(self, status: Status) {
        // Whoever has gone away needs no answer.
        match self {
            Self::Read(job) => job.tell(status),
            Self::Hold { answer, .. } => drop(answer.send(Err(status))),
            Self::Classify { answer, .. } => drop(answer.send(Err(status))),
        }
    }
}

fn shutting_down() -> Status {
    Status::unavailable("this node is shutting down")
}
