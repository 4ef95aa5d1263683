//! From the followed log to replies: the thread that applies, and the one that
//! makes what was applied durable.
//!
//! The applying thread takes all that has come in, applies it in one go, and
//! hands the replies to the runtime in one message. Entries that wait are
//! bounded in bytes; beyond that the link stops reading and HTTP/2's flow
//! control makes raftd wait. It knows nothing of clients and of SQL.

mod syncer;

use std::{
    io,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
        mpsc as blocking,
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use prost::Message;
use resqlite::api::LogEntry;
use rusqlite::InterruptHandle;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot, watch};

use self::syncer::{Syncer, ToSync};
use crate::{
    apply::{Applied, Applier, ApplyError, ApplySettings, Position},
    database::DatabaseFile,
    facts::Facts,
    limits::{APPLY_GROUP_BYTES, FOLLOW_QUEUE_BYTES},
    metrics::PipelineMetrics,
    snapshot::{Exclusive, Incoming},
    waiters::Waiters,
};

/// The first pause before a failed apply is tried again; doubled up to the second.
const MIN_RETRY: Duration = Duration::from_millis(100);
const MAX_RETRY: Duration = Duration::from_secs(5);
/// So many groups of replies may wait for the runtime.
const GROUPS_WAITING: usize = 16;

/// How far the database is, and how much of that survives a power cut.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// The last applied entry.
    pub applied_index: u64,
    /// The last entry that is durably applied: raftd may discard its log up to here.
    pub durable_index: u64,
}

/// What the link hands in. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Handle {
    commands: blocking::Sender<Command>,
    room: Arc<Semaphore>,
}

#[derive(Debug)]
enum Command {
    /// The database joins this cluster.
    Bind(u64),
    Apply(Queued),
    /// Where the database stands once everything before this is applied.
    Position(oneshot::Sender<Position>),
    Replace(Replacement),
}

/// A snapshot that the database is to become.
#[derive(Debug)]
struct Replacement {
    incoming: Incoming,
    /// Nobody else has the database open until this goes.
    exclusive: Exclusive,
    done: oneshot::Sender<Result<(), String>>,
}

/// Entries, and the room that they take in the queue until they are applied.
#[derive(Debug)]
struct Queued {
    entries: Vec<LogEntry>,
    bytes: usize,
    _room: OwnedSemaphorePermit,
}

impl Handle {
    /// Queues entries; waits while the queue is full.
    pub async fn apply(&self, entries: Vec<LogEntry>) {
        let bytes: usize = entries.iter().map(Message::encoded_len).sum();
        // More than the whole queue would wait for ever; it goes in once the queue is empty.
        let room = bytes.min(FOLLOW_QUEUE_BYTES) as u32;
        let Ok(room) = Arc::clone(&self.room).acquire_many_owned(room).await else { return };
        self.send(Command::Apply(Queued { entries, bytes, _room: room }));
    }

    /// Binds a database that has not yet belonged to a cluster.
    pub fn bind(&self, cluster_id: u64) {
        self.send(Command::Bind(cluster_id));
    }

    /// Where the database stands once all that was queued is applied. None: the pipeline has ended.
    pub async fn position(&self) -> Option<Position> {
        let (answer, position) = oneshot::channel();
        self.send(Command::Position(answer));
        position.await.ok()
    }

    /// Replaces the database by a snapshot once all that was queued is applied. An error says in words why it was
    /// not done; the database is then as it was. None: the pipeline has ended.
    pub async fn replace(&self, incoming: Incoming, exclusive: Exclusive) -> Option<Result<(), String>> {
        let (done, replaced) = oneshot::channel();
        self.send(Command::Replace(Replacement { incoming, exclusive, done }));
        replaced.await.ok()
    }

    fn send(&self, command: Command) {
        // Only an ended pipeline takes nothing more, and its end ends the daemon.
        drop(self.commands.send(command));
    }
}

/// Tells how much waits to be applied; unlike a [`Handle`], it keeps nothing going.
#[derive(Clone, Debug)]
pub struct Backlog {
    room: Arc<Semaphore>,
}

impl Backlog {
    /// The bytes of the entries that wait, or are being applied.
    pub fn bytes(&self) -> usize {
        FOLLOW_QUEUE_BYTES.saturating_sub(self.room.available_permits())
    }
}

/// What the threads tell the runtime.
#[derive(Debug)]
enum Event {
    Applied {
        applied: Vec<Applied>,
        index: u64,
    },
    /// The database is another one now.
    Replaced {
        index: u64,
    },
    Unhealthy(String),
    Failed(PipelineError),
}

/// The threads, seen from the runtime.
pub struct Pipeline {
    handle: Handle,
    events: mpsc::Receiver<Event>,
    progress: watch::Receiver<Progress>,
    stop: Arc<AtomicBool>,
    interrupt: Arc<Mutex<InterruptHandle>>,
    threads: Vec<JoinHandle<()>>,
}

/// Why nothing is applied any more.
#[derive(Debug, thiserror::Error)]
pub enum PipelineError {
    /// An entry could not be applied, and going on is no use.
    #[error(transparent)]
    Apply(ApplyError),
    /// What was applied could not be made durable. No later sync of the file could be trusted.
    #[error("cannot sync the write-ahead log: {0}: check the disk, then start sqlited again")]
    Sync(io::Error),
    /// A snapshot was received and recorded, but not put in the database's place.
    #[error("cannot replace the database by the snapshot beside it: {0}: a start of sqlited tries again")]
    Install(io::Error),
    /// A defect of ours: the thread's own last words are in the log.
    #[error("the applying thread has ended unexpectedly")]
    Ended,
}

impl Pipeline {
    /// Starts the threads on an open database; `metrics` count what they do.
    pub fn start(applier: Applier, metrics: PipelineMetrics) -> io::Result<Self> {
        let (commands, queue) = blocking::channel();
        let (events, event_receiver) = mpsc::channel(GROUPS_WAITING);
        let index = applier.position().applied_index;
        // What the last run left behind is durable once the first sync says so, not before.
        let (publish, progress) = watch::channel(Progress { applied_index: index, durable_index: 0 });
        let (syncer, to_sync) = Syncer::new(applier.durability(), index, publish, metrics.wal_sync.clone());
        let sync_failed = events.clone();
        let stop = Arc::new(AtomicBool::new(false));
        metrics.sessions.set(applier.sessions() as i64);
        let interrupt = Arc::new(Mutex::new(applier.interrupt_handle()));
        let worker = Worker {
            applier,
            queue,
            events,
            to_sync,
            stop: Arc::clone(&stop),
            interrupt: Arc::clone(&interrupt),
            metrics,
        };
        let threads = vec![
            thread::Builder::new().name("apply".into()).spawn(move || worker.run())?,
            thread::Builder::new().name("wal-sync".into()).spawn(move || {
                if let Err(error) = syncer.run() {
                    drop(sync_failed.blocking_send(Event::Failed(PipelineError::Sync(error))));
                }
            })?,
        ];
        let room = Arc::new(Semaphore::new(FOLLOW_QUEUE_BYTES));
        Ok(Self {
            handle: Handle { commands, room },
            events: event_receiver,
            progress,
            stop,
            interrupt,
            threads,
        })
    }

    /// For the link.
    pub fn handle(&self) -> Handle {
        self.handle.clone()
    }

    /// For those who watch.
    pub fn backlog(&self) -> Backlog {
        Backlog { room: Arc::clone(&self.handle.room) }
    }

    /// For the reports to raftd: news whenever more has become durable.
    pub fn progress(&self) -> watch::Receiver<Progress> {
        self.progress.clone()
    }

    /// Hands out replies and news until the pipeline fails.
    pub async fn deliver(&mut self, waiters: &Waiters, facts: &Facts) -> PipelineError {
        while let Some(event) = self.events.recv().await {
            match event {
                Event::Applied { applied, index } => {
                    for Applied { client_id, sequence, reply, .. } in &applied {
                        waiters.complete((*client_id, *sequence), reply);
                    }
                    // After the replies: who sees the index and finds no reply knows that none will come.
                    facts.publish_applied(index);
                    facts.publish_stuck(None);
                }
                Event::Replaced { index } => {
                    facts.publish_applied(index);
                    facts.publish_stuck(None);
                    // Whatever was wrong with the content went with it.
                    facts.publish_diverged(None);
                }
                Event::Unhealthy(why) => facts.publish_stuck(Some(why)),
                Event::Failed(error) => return error,
            }
        }
        PipelineError::Ended
    }

    /// Ends the threads. Every other [`Handle`] must be gone. Blocks.
    pub fn stop(self) {
        let Self { handle, events, threads, stop, interrupt, .. } = self;
        stop.store(true, Ordering::Release);
        drop((handle, events));
        // What is interrupted is rolled back, and applied after the next start.
        interrupt.lock().unwrap_or_else(PoisonError::into_inner).interrupt();
        for thread in threads {
            thread.thread().unpark();
            if thread.join().is_err() {
                tracing::error!("a thread of the pipeline panicked");
            }
        }
    }
}

/// What to do about a failed apply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Remedy {
    /// It may pass: a full disk, a lock, want of memory.
    Retry,
    /// Only an operator can help, and until then this process can at least say so.
    Wait,
    /// Nothing that this process holds can be trusted any more.
    Exit,
}

fn remedy(error: &ApplyError) -> Remedy {
    match error {
        error if error.is_retryable() => Remedy::Retry,
        ApplyError::UnknownFormat { .. }
        | ApplyError::ForeignExecutionVersion { .. }
        | ApplyError::CorruptPayload { .. } => Remedy::Wait,
        ApplyError::Environment { .. }
        | ApplyError::Open { .. }
        | ApplyError::Damaged(_)
        | ApplyError::ForeignCluster { .. }
        | ApplyError::Adopt { .. }
        | ApplyError::Gap { .. } => Remedy::Exit,
    }
}

/// The applying thread.
struct Worker {
    applier: Applier,
    queue: blocking::Receiver<Command>,
    events: mpsc::Sender<Event>,
    to_sync: ToSync,
    stop: Arc<AtomicBool>,
    interrupt: Arc<Mutex<InterruptHandle>>,
    metrics: PipelineMetrics,
}

impl Worker {
    fn run(mut self) {
        let mut next = None;
        while let Some(command) = next.take().or_else(|| self.queue.recv().ok()) {
            let done = match command {
                Command::Replace(replacement) => match self.replace(replacement) {
                    Some(worker) => {
                        self = worker;
                        Ok(())
                    }
                    None => return,
                },
                Command::Position(answer) => {
                    // Who asked may have given up.
                    let _ = answer.send(self.applier.position());
                    Ok(())
                }
                Command::Bind(cluster_id) => self.applier.bind_cluster(cluster_id),
                Command::Apply(first) => {
                    let (group, after) = self.gather(first);
                    next = after;
                    self.apply(group)
                }
            };
            if let Err(error) = done {
                self.tell(Event::Failed(PipelineError::Apply(error)));
                return;
            }
            if self.stopping() {
                break;
            }
        }
        self.applier.close();
    }

    /// Becomes a snapshot, with a new connection. None: that failed half-way, and this process cannot go on.
    fn replace(self, Replacement { incoming, exclusive, done }: Replacement) -> Option<Self> {
        let (settings, file) = (self.applier.settings(), self.applier.file());
        let Self { applier, queue, events, to_sync, stop, interrupt, metrics } = self;
        let applier = match make_way(applier, &incoming) {
            Err((applier, why)) => {
                incoming.discard();
                let _ = done.send(Err(why));
                *applier
            }
            Ok(()) => match become_snapshot(incoming, &file, settings) {
                Err(error) => {
                    drop(events.blocking_send(Event::Failed(error)));
                    return None;
                }
                Ok(applier) => {
                    let index = applier.position().applied_index;
                    if let Some(verifications) = applier.settings().verifications {
                        verifications.forget();
                    }
                    *interrupt.lock().unwrap_or_else(PoisonError::into_inner) = applier.interrupt_handle();
                    // Only its own database's write-ahead log may be synced from here on.
                    to_sync.replaced(applier.durability(), index);
                    // Whoever waits for a request that came in the snapshot asks again, and finds its reply.
                    drop(events.blocking_send(Event::Replaced { index }));
                    let _ = done.send(Ok(()));
                    applier
                }
            },
        };
        drop(exclusive);
        Some(Self { applier, queue, events, to_sync, stop, interrupt, metrics })
    }

    /// All that has come in, up to a bound, and the command that follows it.
    fn gather(&self, first: Queued) -> (Vec<Queued>, Option<Command>) {
        let mut bytes = first.bytes;
        let mut group = vec![first];
        while bytes < APPLY_GROUP_BYTES {
            match self.queue.try_recv() {
                Ok(Command::Apply(queued)) => {
                    bytes += queued.bytes;
                    group.push(queued);
                }
                Ok(other) => return (group, Some(other)),
                Err(_) => break,
            }
        }
        (group, None)
    }

    /// Applies a group, again and again if need be. Returns early when the daemon stops.
    fn apply(&mut self, mut group: Vec<Queued>) -> Result<(), ApplyError> {
        let entries: Vec<LogEntry> = group.iter_mut().flat_map(|queued| queued.entries.drain(..)).collect();
        let mut pause = MIN_RETRY;
        loop {
            let before = self.applier.position().applied_index;
            let left = entries.partition_point(|entry| entry.index <= before);
            let mut applied = Vec::new();
            let (work, timer) = (self.metrics.busy.begin(), self.metrics.apply.start_timer());
            let result = self.applier.apply(&entries[left..], &mut applied);
            timer.observe_duration();
            drop(work);
            let index = self.applier.position().applied_index;
            if index > before {
                self.note_applied(index - before);
                pause = MIN_RETRY;
                self.tell(Event::Applied { applied, index });
                self.to_sync.applied(index);
            }
            let all_applied = entries.last().is_none_or(|last| last.index <= index);
            if all_applied || self.stopping() {
                return Ok(());
            }
            // Large replies were to be handed over first.
            let Err(error) = result else { continue };
            self.wait_for_remedy(error, &mut pause)?;
            if self.stopping() {
                return Ok(());
            }
        }
    }

    fn note_applied(&self, entries: u64) {
        self.metrics.apply_batch.observe(entries as f64);
        self.metrics.applied_entries.inc_by(entries);
        self.metrics.sessions.set(self.applier.sessions() as i64);
    }

    fn wait_for_remedy(&self, error: ApplyError, pause: &mut Duration) -> Result<(), ApplyError> {
        self.metrics.apply_errors.inc();
        match remedy(&error) {
            Remedy::Exit => return Err(error),
            Remedy::Retry => {
                tracing::error!(%error, retry_ms = pause.as_millis() as u64, "cannot apply; trying again");
                self.tell(Event::Unhealthy(error.to_string()));
                thread::park_timeout(*pause);
                *pause = (*pause * 2).min(MAX_RETRY);
            }
            Remedy::Wait => {
                tracing::error!(%error, "cannot apply; waiting for the operator");
                self.tell(Event::Unhealthy(error.to_string()));
                while !self.stopping() {
                    thread::park();
                }
            }
        }
        Ok(())
    }

    fn tell(&self, event: Event) {
        // The runtime only stops listening when the daemon stops.
        drop(self.events.blocking_send(event));
    }

    fn stopping(&self) -> bool {
        self.stop.load(Ordering::Acquire)
    }
}

/// Closes the database for a snapshot that is ahead of it; otherwise says why not.
fn make_way(applier: Applier, incoming: &Incoming) -> Result<(), (Box<Applier>, String)> {
    let (own, snapshot) = (applier.position().applied_index, incoming.position().applied_index);
    if own >= snapshot {
        // It came late; becoming it would rewind the log.
        return Err((
            Box::new(applier),
            format!("the database is at index {own}, the snapshot only at {snapshot}"),
        ));
    }
    applier.close_alone().map_err(|(applier, error)| {
        (applier, format!("the database cannot be closed; end other programs that use it ({error})"))
    })
}

/// Puts the snapshot in the closed database's place and opens it.
fn become_snapshot(
    incoming: Incoming,
    file: &DatabaseFile,
    settings: ApplySettings,
) -> Result<Applier, PipelineError> {
    incoming.install().map_err(PipelineError::Install)?;
    Applier::open_file(file, settings).map_err(PipelineError::Apply)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{apply::REQUEST_FORMAT, metrics::Metrics, version::execution_version};
    use resqlite::api::{
        LogEntryKind, LoggedRequest, RequestId, Statement, StatementList, logged_request::Body,
    };
    use resqlite::monitoring::Busy;
    use rusqlite::ffi;
    use tokio::time::timeout;

    const LONG: Duration = Duration::from_secs(60);

    fn entry(index: u64, sql: &str) -> LogEntry {
        let statement = Statement { sql: sql.to_owned(), ..Statement::default() };
        let request = LoggedRequest {
            format: REQUEST_FORMAT,
            execution_version: execution_version(),
            id: Some(RequestId {
                client_id: vec![1; 16].into(),
                sequence: index,
                acknowledged_below: index,
                made_at_index: 0,
            }),
            server_made_id: true,
            seed: vec![0; 16].into(),
            foreign_keys: true,
            step_budget: 1_000_000,
            result_limit_bytes: 1_000_000,
            reads: None,
            authority: None,
            body: Some(Body::Atomic(StatementList { statements: vec![statement] })),
        };
        LogEntry {
            index,
            term: 1,
            kind: LogEntryKind::Payload.into(),
            timestamp_ms: 1,
            payload: request.encode_to_vec().into(),
        }
    }

    #[tokio::test]
    async fn a_full_disk_is_no_result_and_what_waited_is_applied_once_there_is_room() {
        let directory = tempfile::tempdir().unwrap();
        let applier = Applier::open(&directory.path().join("test.db"), ApplySettings::default()).unwrap();
        let files = applier.files();
        let mut pipeline = Pipeline::start(applier, Metrics::new().of_pipeline(&Busy::default())).unwrap();
        let (handle, waiters, facts) = (pipeline.handle(), Waiters::new(10), Facts::new(0));
        let mut progress = pipeline.progress();
        let mut waiter = waiters.register(([1; 16], 2)).unwrap();

        files.fail_after(0, ffi::SQLITE_FULL);
        let story = async {
            handle.apply(vec![entry(1, "create table t(a)"), entry(2, "insert into t values (7)")]).await;
            let why = facts.unhealthy().await;
            assert!(why.contains("free space on the disk"), "{why}");
            assert_eq!(facts.applied_index(), 0);
            files.heal();
            let reply = waiter.reply().await;
            assert_eq!((reply.log_index, reply.results[0].rows_affected), (2, 1));
            facts.applied(2).await;
            assert_eq!(facts.health(), None);
            let durable = progress.wait_for(|progress| progress.durable_index == 2).await.unwrap();
            assert_eq!(durable.applied_index, 2);
        };
        tokio::select! {
            error = pipeline.deliver(&waiters, &facts) => panic!("{error}"),
            told = timeout(LONG, story) => told.unwrap(),
        }
        drop(handle);
        tokio::task::spawn_blocking(move || pipeline.stop()).await.unwrap();
    }

    #[tokio::test]
    async fn an_io_error_ends_the_pipeline_and_nothing_counts_as_applied() {
        let directory = tempfile::tempdir().unwrap();
        let applier = Applier::open(&directory.path().join("test.db"), ApplySettings::default()).unwrap();
        let files = applier.files();
        let mut pipeline = Pipeline::start(applier, Metrics::new().of_pipeline(&Busy::default())).unwrap();
        let (handle, waiters, facts) = (pipeline.handle(), Waiters::new(10), Facts::new(0));
        files.fail_after(0, ffi::SQLITE_IOERR_WRITE);
        handle.apply(vec![entry(1, "create table t(a)")]).await;
        let error = timeout(LONG, pipeline.deliver(&waiters, &facts)).await.unwrap();
        assert!(matches!(error, PipelineError::Apply(ApplyError::Environment { index: 1, .. })), "{error}");
        assert_eq!(facts.applied_index(), 0);
        drop(handle);
        tokio::task::spawn_blocking(move || pipeline.stop()).await.unwrap();
    }

    #[test]
    fn what_may_pass_is_tried_again_and_what_cannot_be_trusted_is_not() {
        let environment = |code| ApplyError::Environment { index: 7, code, message: String::new() };
        assert_eq!(remedy(&environment(ffi::SQLITE_FULL)), Remedy::Retry);
        assert_eq!(remedy(&environment(ffi::SQLITE_IOERR_FSYNC)), Remedy::Exit);
        assert_eq!(remedy(&environment(ffi::SQLITE_CORRUPT)), Remedy::Exit);
        assert_eq!(remedy(&ApplyError::UnknownFormat { index: 1, format: 9 }), Remedy::Wait);
        assert_eq!(remedy(&ApplyError::Gap { expected: 1, got: 3 }), Remedy::Exit);
    }
}
