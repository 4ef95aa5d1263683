//! The readers: threads with a read-only connection each, so that reads run in
//! parallel and never behind the writer.
//!
//! Every wait is bounded. A read ends early when its client has gone, when its
//! deadline has passed, when it has held its snapshot for too long, or when the
//! daemon stops. It is SQLite's progress handler that notices while a statement
//! runs: unlike `sqlite3_interrupt` from another thread, which stops a
//! statement in the same way, it cannot hit the connection's *next* statement.
//! This file knows nothing of the log, of writes or of consistency.

mod reader;
#[cfg(test)]
mod tests;

use std::{
    collections::VecDeque,
    io,
    ops::Range,
    path::Path,
    pin::Pin,
    sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError},
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

use self::reader::Reader;
use crate::{
    limits::{self, ROW_BATCHES_WAITING},
    script::Kind,
};

/// Rows of one read, in order.
#[derive(Debug, Default, PartialEq)]
pub struct ReadBatch {
    /// In the first batch only.
    pub columns: Option<Vec<Column>>,
    /// About [`limits::ROW_BATCH_BYTES`], unless a single row has more.
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
            Self::Classify { answer, .. } => drop(answer.send(Err(status))),
        }
    }
}

fn shutting_down() -> Status {
    Status::unavailable("this node is shutting down")
}
