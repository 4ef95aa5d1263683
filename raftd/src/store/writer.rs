//! The log-writer thread: makes writes durable in their order, as many at a time as wait for it.
//!
//! Invariants: nothing is reported before it is durable; the hard state of a write is durable before its entries;
//! the mark never says more than is durable, and is lowered durably before anything under it is removed. The first
//! error is the last thing that the thread does: a sync is never tried again, for after a failed one nothing that
//! the kernel or sled holds in memory may be trusted.

use std::{
    collections::VecDeque,
    panic::{AssertUnwindSafe, catch_unwind},
    path::PathBuf,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread::{self, JoinHandle},
    time::Duration,
};

use raft::{Entry, HardState, Index, Install, Position};

use resqlite::directory_lock::DirectoryLock;

use crate::metrics::WriterMetrics;

use super::{
    cache::{LogReader, ReadError, SharedWindow},
    error::StoreError,
    hard_state::HardStateFile,
    record_log::{Mark, RecordLog},
};

/// How much payload one group commit takes at most, or a single larger write.
const GROUP_BYTES: usize = 1 << 20;

/// How much may wait for the thread.
const QUEUE_BYTES: usize = 64 << 20;

/// How many commands may wait for the thread.
const QUEUE_COMMANDS: usize = 16_384;

/// The mark is made durable at least once for so many bytes. The slots, which say it at every election and vote, and
/// at every start and clean stop, are enough for safety; this bounds how much of a log could lose its end to rotten
/// bytes *after a power cut* without being noticed here. (After a mere crash the mark is exact.)
const MARK_SYNC_BYTES: usize = 16 << 20;

/// After so long without work the mark is made durable, so that it is exact on a quiet node.
const IDLE: Duration = Duration::from_secs(1);

/// Something to make durable: first the hard state, then the install, then the entries.
#[derive(Clone, Debug, Default)]
pub struct Write {
    /// What is reported once this write and all before it are durable. Never decreases.
    pub number: u64,
    /// Term and vote.
    pub hard_state: Option<HardState>,
    /// A new beginning of the log.
    pub install: Option<Install>,
    /// Entries, which replace everything in the log from the first one's index on.
    pub entries: Vec<Entry>,
}

/// Told by the log-writer thread, in order: the highest durable number, or once, last, why it ended. After an error
/// the process must end: what the node would say next could be untrue.
pub type Report = Box<dyn FnMut(Result<u64, StoreError>) + Send>;

/// Hands writes to the log-writer thread. Only one thread may hold it. Dropping it stops the thread cleanly.
pub struct LogWriter {
    queue: Arc<Queue>,
    window: SharedWindow,
    reader: LogReader,
    thread: Option<JoinHandle<()>>,
}

impl LogWriter {
    pub(super) fn start(mut log_thread: LogThread, mut report: Report) -> Result<Self, std::io::Error> {
        let mut writer = Self::without_thread(&log_thread);
        let work = move || {
            let ended = catch_unwind(AssertUnwindSafe(|| log_thread.run(&mut report)));
            let error = match ended {
                Ok(Ok(())) => return,
                Ok(Err(error)) => error,
                Err(_) => StoreError::WriterStopped(
                    "an invariant of the log is broken; the panic says which".into(),
                ),
            };
            log_thread.queue.fail(&error);
            report(Err(error));
        };
        writer.thread = Some(thread::Builder::new().name("log-writer".into()).spawn(work)?);
        Ok(writer)
    }

    /// The submitting half alone.
    pub(super) fn without_thread(log_thread: &LogThread) -> Self {
        let queue = Arc::clone(&log_thread.queue);
        let (window, reader) = (log_thread.window.clone(), log_thread.reader.clone());
        Self { queue, window, reader, thread: None }
    }

    /// Queues a write. Its entries can be read at once; it is durable when its number is reported.
    ///
    /// Waits while too much is queued: a disk that cannot keep up must slow its writers down.
    ///
    /// # Panics
    /// If the entries would leave a gap in the log or replace one that was compacted.
    pub fn submit(&mut self, write: Write) -> Result<(), StoreError> {
        {
            let mut window = self.window.lock();
            if let Some(install) = write.install {
                window.install(install);
            }
            window.submit(write.number, &write.entries);
        }
        self.queue.push(Command::Write(write))
    }

    /// Discards the entries up to `to`, or up to the last durable one if that comes first. They can no longer be read
    /// when this returns; the space is given back little by little, between writes. Returns the new base's index.
    pub fn compact(&mut self, to: Index) -> Result<Index, StoreError> {
        let (base, to) = {
            let window = self.window.lock();
            (window.base(), to.min(window.durable_index()))
        };
        if to <= base.index {
            return Ok(base.index);
        }
        let entries = match self.reader.read(to, to, 1) {
            Ok(entries) => entries,
            Err(ReadError::Store(error)) => return Err(error),
            Err(ReadError::Compacted { base }) => return Ok(base),
        };
        let base = entries.first().expect("a read of an index in the log returns it").position();
        self.window.lock().install(Install { base, keep_suffix: true });
        self.queue.push(Command::Compact(base))?;
        Ok(to)
    }

    /// Makes everything queued durable, reports it, and ends the thread.
    pub fn shutdown(mut self) -> Result<(), StoreError> {
        self.stop();
        self.queue.lock().failure.take().map_or(Ok(()), |reason| Err(StoreError::WriterStopped(reason)))
    }

    fn stop(&mut self) {
        self.queue.close();
        if let Some(thread) = self.thread.take() {
            // The thread catches its panics and reports them itself.
            let _ = thread.join();
        }
    }
}

impl Drop for LogWriter {
    fn drop(&mut self) {
        self.stop();
    }
}

enum Command {
    Write(Write),
    Compact(Position),
}

impl Command {
    fn size_bytes(&self) -> usize {
        match self {
            Self::Write(write) => write.entries.iter().map(Entry::size_bytes).sum(),
            Self::Compact(_) => 0,
        }
    }
}

/// What waits for the thread, oldest first.
#[derive(Default)]
pub(super) struct Queue {
    state: Mutex<QueueState>,
    changed: Condvar,
}

#[derive(Default)]
struct QueueState {
    commands: VecDeque<Command>,
    bytes: usize,
    closed: bool,
    failure: Option<String>,
}

/// What the thread does next.
enum Next {
    Group(Write),
    Compact(Position),
    Idle,
    Closed,
}

impl Queue {
    fn lock(&self) -> MutexGuard<'_, QueueState> {
        // Nothing under the lock can panic half-way.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn push(&self, command: Command) -> Result<(), StoreError> {
        let size = command.size_bytes();
        let is_full = |state: &mut QueueState| {
            let crowded = state.bytes + size > QUEUE_BYTES || state.commands.len() >= QUEUE_COMMANDS;
            crowded && !state.commands.is_empty() && state.failure.is_none()
        };
        let mut state = self.changed.wait_while(self.lock(), is_full).unwrap_or_else(PoisonError::into_inner);
        if let Some(reason) = &state.failure {
            return Err(StoreError::WriterStopped(reason.clone()));
        }
        state.bytes += size;
        state.commands.push_back(command);
        drop(state);
        self.changed.notify_all();
        Ok(())
    }

    /// The bytes of the entries that wait.
    pub(super) fn waiting_bytes(&self) -> usize {
        self.lock().bytes
    }

    fn close(&self) {
        self.lock().closed = true;
        self.changed.notify_all();
    }

    fn fail(&self, error: &StoreError) {
        let mut state = self.lock();
        state.failure = Some(error.to_string());
        state.commands.clear();
        drop(state);
        self.changed.notify_all();
    }

    /// Takes all that waits and belongs together; waits for it at most `patience`.
    fn next(&self, patience: Duration) -> Next {
        let is_quiet = |state: &mut QueueState| state.commands.is_empty() && !state.closed;
        let waited = self.changed.wait_timeout_while(self.lock(), patience, is_quiet);
        let (mut state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        let next = match state.pop() {
            None if state.closed => Next::Closed,
            None => Next::Idle,
            Some(Command::Compact(base)) => Next::Compact(base),
            Some(Command::Write(first)) => Next::Group(state.group(first)),
        };
        drop(state);
        self.changed.notify_all();
        next
    }
}

impl QueueState {
    fn pop(&mut self) -> Option<Command> {
        let command = self.commands.pop_front()?;
        self.bytes -= command.size_bytes();
        Some(command)
    }

    /// Adds the writes that follow to a group, as long as one commit can carry them all.
    fn group(&mut self, mut group: Write) -> Write {
        let mut room = GROUP_BYTES.saturating_sub(group.entries.iter().map(Entry::size_bytes).sum());
        while let Some(Command::Write(next)) = self.commands.front()
            && next.install.is_none()
        {
            let Some(left) = room.checked_sub(next.entries.iter().map(Entry::size_bytes).sum()) else {
                break;
            };
            room = left;
            let Some(Command::Write(next)) = self.pop() else { break };
            group.absorb(next);
        }
        group
    }
}

impl Write {
    /// Becomes both writes, one after the other.
    fn absorb(&mut self, next: Write) {
        self.number = next.number;
        self.hard_state = next.hard_state.or(self.hard_state);
        if let Some(first) = next.entries.first() {
            self.entries.retain(|entry| entry.index < first.index);
        }
        self.entries.extend(next.entries);
    }
}

/// What one turn of the thread came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Turn {
    /// Something was done.
    Done,
    /// There was nothing to do.
    Idle,
    /// Nothing will come any more, and everything is durable.
    Closed,
}

/// What the thread owns.
pub(super) struct LogThread {
    pub(super) queue: Arc<Queue>,
    pub(super) window: SharedWindow,
    pub(super) reader: LogReader,
    pub(super) log: RecordLog,
    /// Where the log lies, for error messages.
    pub(super) log_path: PathBuf,
    pub(super) hard_state: HardStateFile,
    /// Kept as long as anything may be written.
    pub(super) _lock: Option<Arc<DirectoryLock>>,
    /// How much the mark was raised since it was last synced.
    pub(super) unsynced_mark_bytes: usize,
    /// Where somebody counts.
    pub(super) metrics: Option<WriterMetrics>,
}

impl LogThread {
    fn run(&mut self, report: &mut Report) -> Result<(), StoreError> {
        loop {
            let patience = if self.log.is_discarding() { Duration::ZERO } else { IDLE };
            let reported = |number| report(Ok(number));
            if self.turn(patience, reported)? == Turn::Closed {
                return Ok(());
            }
        }
    }

    /// Does what comes next, after waiting for it at most `patience`.
    pub(super) fn turn(&mut self, patience: Duration, report: impl FnOnce(u64)) -> Result<Turn, StoreError> {
        match self.queue.next(patience) {
            Next::Group(group) => {
                let number = group.number;
                self.write_measured(group)?;
                self.window.lock().persisted(number);
                report(number);
                self.discard_some()?;
            }
            Next::Compact(base) => {
                self.compact(base)?;
                self.discard_some()?;
            }
            Next::Idle if self.log.is_discarding() => self.discard_some()?,
            Next::Idle => {
                self.sync_mark()?;
                return Ok(Turn::Idle);
            }
            Next::Closed => {
                self.sync_mark()?;
                return Ok(Turn::Closed);
            }
        }
        Ok(Turn::Done)
    }

    fn write_measured(&mut self, group: Write) -> Result<(), StoreError> {
        let Some(metrics) = self.metrics.clone().filter(|_| !group.entries.is_empty()) else {
            return self.write(group);
        };
        let bytes: usize = group.entries.iter().map(Entry::size_bytes).sum();
        metrics.append_batch.observe(group.entries.len() as f64);
        let (work, timer) = (metrics.busy.begin(), metrics.append.start_timer());
        self.write(group)?;
        timer.observe_duration();
        metrics.appended_bytes.inc_by(bytes as u64);
        drop(work);
        Ok(())
    }

    fn write(&mut self, group: Write) -> Result<(), StoreError> {
        if let Some(install) = group.install {
            self.install(install, group.hard_state)?;
        }
        let first = group.entries.first().map(|entry| entry.index);
        let conflict = first.filter(|first| *first <= self.log.last_index());
        self.save_before_entries(group.hard_state, conflict)?;
        if let Some(from) = conflict {
            self.log
                .truncate(from)
                .map_err(StoreError::log(&self.log_path, "remove entries from the log"))?;
        }
        if first.is_some() {
            self.log.append(&group.entries).map_err(StoreError::log(&self.log_path, "write the log"))?;
            self.raise_mark(group.entries.iter().map(Entry::size_bytes).sum())?;
        }
        Ok(())
    }

    /// Makes term and vote durable if they changed, and lowers the mark below a conflict.
    fn save_before_entries(
        &mut self,
        hard_state: Option<HardState>,
        conflict: Option<Index>,
    ) -> Result<(), StoreError> {
        let old = self.hard_state.state();
        let mut new = old;
        new.hard_state = hard_state.unwrap_or(old.hard_state);
        let lowered = conflict.filter(|from| *from <= old.mark.index);
        if let Some(from) = lowered {
            let index = from - 1;
            let term =
                self.log.term(index).expect("what comes before a conflict is in the log, or is its base");
            new.mark = Mark { index, term };
        }
        if new == old { Ok(()) } else { self.hard_state.save(new) }
    }

    /// The mark follows the sync that it covers, and comes before anybody is told; its own sync can wait.
    fn raise_mark(&mut self, written_bytes: usize) -> Result<(), StoreError> {
        self.hard_state.note_mark(self.log.reach())?;
        self.unsynced_mark_bytes += written_bytes;
        if self.unsynced_mark_bytes >= MARK_SYNC_BYTES { self.sync_mark() } else { Ok(()) }
    }

    fn sync_mark(&mut self) -> Result<(), StoreError> {
        if self.unsynced_mark_bytes == 0 {
            return Ok(());
        }
        self.unsynced_mark_bytes = 0;
        self.hard_state.sync_mark()
    }

    fn install(&mut self, install: Install, hard_state: Option<HardState>) -> Result<(), StoreError> {
        let Install { base, keep_suffix } = install;
        let mut state = self.hard_state.state();
        state.hard_state = hard_state.unwrap_or(state.hard_state);
        if keep_suffix {
            self.hard_state.save(state)?;
            return self.compact(base);
        }
        // One save gives up the old log and begins the new one: there is no moment at which a crash would leave a
        // node that has forgotten what it acknowledged and does not yet say that it holds the snapshot.
        state.base = base;
        state.mark = Mark { index: base.index, term: base.term };
        state.discard_log = true;
        self.hard_state.save(state)?;
        self.log.reset(base).map_err(StoreError::log(&self.log_path, "empty the log"))?;
        state.discard_log = false;
        self.hard_state.save(state)
    }

    /// The base is durable before the first record goes.
    fn compact(&mut self, base: Position) -> Result<(), StoreError> {
        let mut state = self.hard_state.state();
        state.base = base;
        state.mark = self.log.reach();
        self.hard_state.save(state)?;
        self.log.compact(base);
        Ok(())
    }

    /// One batch at a time, so that no write waits long behind a large compaction.
    fn discard_some(&mut self) -> Result<(), StoreError> {
        self.log.discard_some().map(drop).map_err(StoreError::log(&self.log_path, "remove compacted entries"))
    }
}
