//! The durable store of one node: its log, its hard state, its identity.
//!
//! ```text
//! data_dir/lock         held by the one process that uses the directory
//! data_dir/hard_state   identity, term, vote, the log's base and mark (see `hard_state`)
//! data_dir/log/         the entries, in sled (see `record`, `record_log`, `sled_log`)
//! data_dir/journal      what sled has yet to make durable (see `journal`, `journaled_log`)
//! data_dir/ballast      room to give back when the disk is full
//! ```
//!
//! Writes go through one thread ([`LogWriter`]), reads through any number of [`LogReader`]s. It knows Raft's words,
//! but not its rules: what may be truncated or compacted is decided above.
//!
//! What is opened is either whole or refused. The log must reach from its base to its mark, unbroken; anything less
//! is damage, even if sled opened it without a word.

pub mod block_file;
mod cache;
mod error;
mod hard_state;
mod journal;
pub mod journaled_log;
pub mod log_store;
pub mod memory_log;
pub mod record;
mod record_log;
pub mod sled_log;
mod stepped;
mod term_runs;
mod trial;
mod writer;

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
};

use prometheus::Histogram;
use raft::{HardState, Incarnation, LogEnd, NodeId, Position, Standing};
use resqlite::{directory_lock::DirectoryLock, disk::Ballast};

use self::{
    block_file::BlockFile,
    cache::{SharedWindow, Window},
    hard_state::{HardStateFile, State, sync_dir},
    journaled_log::JournaledLog,
    log_store::{LogStore, LogStoreError},
    record_log::{Mark, RecordLog, RecoverError},
    writer::{LogThread, Queue},
};
use crate::metrics::WriterMetrics;

pub use self::{
    cache::{LogReader, ReadError},
    error::StoreError,
    hard_state::Identity,
    stepped::SteppedWriter,
    writer::{LogWriter, Report, Write},
};

/// How much of the log's end stays in memory.
const TAIL_BYTES: usize = 16 << 20;

/// Two of sled's segments: one to go on writing in, one for its snapshot and for what it zeroes.
const BALLAST_BYTES: u64 = 16 << 20;

/// What a data directory keeps in reserve for the day its filesystem is full. [`Store::open`] gives it back; somebody
/// has to renew it.
pub fn ballast(data_dir: &Path) -> Ballast {
    Ballast::in_dir(data_dir, BALLAST_BYTES)
}

/// What [`Store::open`] needs to know.
#[derive(Clone, Debug)]
pub struct StoreOptions {
    /// The directory, made if it is not there.
    pub data_dir: PathBuf,
    /// How much memory sled may use to cache the log.
    pub cache_bytes: u64,
    /// Hash of the cluster's name and member ids.
    pub cluster_id: u64,
    /// This member.
    pub node_id: NodeId,
    /// If the directory has to be made: its incarnation. See [`raft::HardState::new`].
    pub incarnation: Incarnation,
}

/// What a store lies on when that is not a directory, for simulations. See [`Store::open_on`].
pub struct Media {
    /// Identity, term, vote, base and mark.
    pub hard_state: Box<dyn BlockFile>,
    /// The entries.
    pub log: Arc<dyn LogStore>,
    /// Both are empty.
    pub is_new: bool,
    /// How much of the log's end stays in memory.
    pub tail_bytes: usize,
}

/// Where a store lies: who else may use it, and what is kept there beside the data.
struct Place {
    /// For error messages.
    log_path: PathBuf,
    /// In a directory only.
    lock: Option<Arc<DirectoryLock>>,
    tail_bytes: usize,
}

/// An open store. It becomes useful through [`Store::reader`] and [`Store::start_writer`].
pub struct Store {
    identity: Identity,
    hard_state: HardState,
    log_end: LogEnd,
    reader: LogReader,
    handle: StoreHandle,
    /// Until the writer is started.
    log_thread: Option<LogThread>,
}

impl Store {
    /// Opens the store of a data directory, or makes a new one in an empty or missing directory.
    ///
    /// Reads and checks all of the retained log: this is linear in what compaction left, not in history.
    pub fn open(options: StoreOptions) -> Result<Self, StoreError> {
        Self::open_in_directory(options, None)
    }

    /// As [`Store::open`], with the time that each sync takes noted in `fsync`.
    pub fn open_measured(options: StoreOptions, fsync: Histogram) -> Result<Self, StoreError> {
        Self::open_in_directory(options, Some(fsync))
    }

    fn open_in_directory(options: StoreOptions, fsync: Option<Histogram>) -> Result<Self, StoreError> {
        let cache_bytes = options.cache_bytes;
        Self::open_with(options, |dir, is_new| {
            let opened = if is_new {
                JournaledLog::create(dir, cache_bytes)
            } else {
                JournaledLog::open(dir, cache_bytes)
            };
            opened.map(|log| Arc::new(log.measured(fsync.clone())) as Arc<dyn LogStore>)
        })
    }

    /// As [`Store::open`], of a directory that may belong to any member of any cluster, but must hold something.
    pub fn open_of_any_cluster(options: StoreOptions) -> Result<Self, StoreError> {
        let path = options.data_dir.join("hard_state");
        let Identity { cluster_id, node_id } = HardStateFile::open(&path)?.state().identity;
        Self::open(StoreOptions { cluster_id, node_id, ..options })
    }

    /// As [`Store::open`], with the log in another log store: `open_log` is given the log's directory and whether the
    /// store is new.
    pub fn open_with(
        options: StoreOptions,
        mut open_log: impl FnMut(&Path, bool) -> Result<Arc<dyn LogStore>, LogStoreError>,
    ) -> Result<Self, StoreError> {
        let dir = &options.data_dir;
        make_dir(dir)?;
        let lock = DirectoryLock::acquire(dir).map_err(StoreError::io(dir, "lock the data directory"))?;
        let lock = Arc::new(lock.ok_or_else(|| StoreError::Locked { dir: dir.clone() })?);
        let ballast = ballast(dir);
        ballast.release_if_full().map_err(StoreError::io(dir, "give back the ballast"))?;

        let log_path = dir.join("log");
        let mut open_log = |is_new| match open_log(&log_path, is_new) {
            // On a full disk sled cannot even open; that is what the ballast is for.
            Err(LogStoreError::Io(error))
                if !is_new && error::is_full(&error) && ballast.release().is_ok_and(|released| released) =>
            {
                open_log(&log_path, false)
            }
            opened => opened,
        };
        let (hard_state, log) = match HardStateFile::open_if_there(&dir.join("hard_state"))? {
            None => create(&options, &log_path, &mut open_log)?,
            Some(found) => {
                check_identity(&options, found.state().identity)?;
                let log = open_log(false).map_err(StoreError::log(&log_path, "open the log"))?;
                (found, log)
            }
        };
        let place = Place { log_path, lock: Some(lock), tail_bytes: TAIL_BYTES };
        Self::recover(hard_state, log, place)
    }

    /// As [`Store::open`], on other media than a directory: everything but the lock, the ballast and the making of
    /// directories is the same code. The paths of `options` are for error messages only.
    pub fn open_on(options: &StoreOptions, media: Media) -> Result<Self, StoreError> {
        let Media { hard_state, log, is_new, tail_bytes } = media;
        let path = options.data_dir.join("hard_state");
        let file = if is_new {
            HardStateFile::create_in(hard_state, &path, State::new(options))?
        } else {
            HardStateFile::open_in(hard_state, &path)?
        };
        check_identity(options, file.state().identity)?;
        let place = Place { log_path: options.data_dir.join("log"), lock: None, tail_bytes };
        Self::recover(file, log, place)
    }

    fn recover(mut file: HardStateFile, log: Arc<dyn LogStore>, place: Place) -> Result<Self, StoreError> {
        let Place { log_path, lock, tail_bytes } = place;
        let mut state = file.state();
        let mut window = Window::new(state.base, tail_bytes);
        let records = if state.discard_log {
            // A crash came between the decision to begin anew after a snapshot and its end.
            let emptied = RecordLog::begin_at(log.clone(), state.base);
            emptied.map_err(StoreError::log(&log_path, "empty the log"))?
        } else {
            let recovered =
                RecordLog::recover(log.clone(), state.base, state.mark, |entry| window.recover(entry));
            recovered.map_err(|error| recover_error(&log_path, error))?
        };
        // Everything that was found is durable: the log was synced before it was opened. From here on this node may
        // build on it, so the mark says so first. This also repairs a slot that a crash has torn.
        state.mark = records.reach();
        state.discard_log = false;
        file.save(state)?;
        let window = SharedWindow::new(window);
        let reader = LogReader::new(window.clone(), log.clone(), log_path.clone());
        let log_thread = LogThread {
            queue: Arc::default(),
            window,
            reader: reader.clone(),
            log: records,
            log_path: log_path.clone(),
            hard_state: file,
            _lock: lock,
            unsynced_mark_bytes: 0,
            metrics: None,
        };
        let handle = StoreHandle { log, log_path, queue: Arc::clone(&log_thread.queue) };
        let State { identity, hard_state, mark, .. } = state;
        let log_end = LogEnd { term: mark.term, index: mark.index };
        Ok(Self { identity, hard_state, log_end, reader, handle, log_thread: Some(log_thread) })
    }

    /// The term and the vote that were recovered.
    pub fn hard_state(&self) -> HardState {
        self.hard_state
    }

    /// Whose directory this is.
    pub fn identity(&self) -> Identity {
        self.identity
    }

    /// The end of the log that was recovered.
    pub fn log_end(&self) -> LogEnd {
        self.log_end
    }

    /// Gives the log to another cluster, of which this member becomes a founder: one save, so that it belongs to the
    /// one or the other. Before the writer is started.
    pub fn found_cluster(&mut self, options: &StoreOptions) -> Result<(), StoreError> {
        let Some(log_thread) = &mut self.log_thread else {
            return Err(StoreError::WriterStopped("the log is in use".into()));
        };
        let StoreOptions { cluster_id, node_id, incarnation, .. } = *options;
        let mut state = log_thread.hard_state.state();
        state.identity = Identity { cluster_id, node_id };
        state.hard_state = HardState {
            term: state.hard_state.term,
            standing: Standing::Founder,
            log_floor: self.log_end,
            ..HardState::new(incarnation)
        };
        log_thread.hard_state.save(state)?;
        (self.identity, self.hard_state) = (state.identity, state.hard_state);
        Ok(())
    }

    /// Reads the log, on any thread.
    pub fn reader(&self) -> LogReader {
        self.reader.clone()
    }

    /// Watches the store.
    pub fn handle(&self) -> StoreHandle {
        self.handle.clone()
    }

    /// The writer is to count what it does. Before it is started.
    pub fn count_writes(&mut self, metrics: WriterMetrics) {
        if let Some(log_thread) = &mut self.log_thread {
            log_thread.metrics = Some(metrics);
        }
    }

    /// Starts the log-writer thread, which calls `report`.
    ///
    /// # Panics
    /// If it was started before.
    pub fn start_writer(&mut self, report: Report) -> Result<LogWriter, StoreError> {
        let log_thread = self.take_log_thread();
        let log_path = log_thread.log_path.clone();
        LogWriter::start(log_thread, report).map_err(StoreError::io(&log_path, "start the log writer"))
    }

    /// The log writer without its thread, for simulations: nothing is written until it is told to.
    ///
    /// # Panics
    /// If a writer was started before.
    pub fn stepped_writer(&mut self) -> SteppedWriter {
        SteppedWriter::new(self.take_log_thread())
    }

    fn take_log_thread(&mut self) -> LogThread {
        self.log_thread.take().expect("a store has one writer")
    }
}

/// Watches the store while its parts are in use elsewhere.
#[derive(Clone)]
pub struct StoreHandle {
    log: Arc<dyn LogStore>,
    log_path: PathBuf,
    queue: Arc<Queue>,
}

impl StoreHandle {
    /// How many bytes of entries wait for the log writer.
    pub fn waiting_bytes(&self) -> usize {
        self.queue.waiting_bytes()
    }

    /// What the log takes on disk, in bytes; 0 while the filesystem does not say. Space that compaction frees is used
    /// again rather than given back.
    pub fn log_bytes(&self) -> u64 {
        self.log.size_bytes().unwrap_or_else(|error| {
            tracing::warn!(file = %self.log_path.display(), %error, "the log cannot be measured");
            0
        })
    }
}

/// Makes the directory, durable with every directory above it that is new.
fn make_dir(dir: &Path) -> Result<(), StoreError> {
    if dir.is_dir() {
        return Ok(());
    }
    let parent = dir.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    make_dir(parent)?;
    match fs::create_dir(dir) {
        // Another process was quicker; the lock tells which of the two goes on.
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists && dir.is_dir() => {}
        made => made.map_err(StoreError::io(dir, "create the directory"))?,
    }
    sync_dir(parent).map_err(StoreError::io(parent, "sync the directory"))
}

/// Makes a new store. The hard state gets its name last: a directory without it holds nothing that anybody was told.
fn create(
    options: &StoreOptions,
    log_path: &Path,
    open_log: &mut impl FnMut(bool) -> Result<Arc<dyn LogStore>, LogStoreError>,
) -> Result<(HardStateFile, Arc<dyn LogStore>), StoreError> {
    let dir = &options.data_dir;
    let (path, unfinished) = (dir.join("hard_state"), dir.join("hard_state.creating"));
    if log_path.exists() {
        if !unfinished.exists() {
            let reason = "it is missing, but there is a log beside it".to_owned();
            return Err(StoreError::Damaged { file: path, index: None, reason });
        }
        fs::remove_dir_all(log_path).map_err(StoreError::io(log_path, "remove an unfinished log"))?;
    }
    HardStateFile::create(&unfinished, State::new(options))?;
    sync_dir(dir).map_err(StoreError::io(dir, "sync the directory"))?;
    let log = open_log(true).map_err(StoreError::log(log_path, "create the log"))?;
    fs::rename(&unfinished, &path).map_err(StoreError::io(&path, "name the hard-state file"))?;
    sync_dir(dir).map_err(StoreError::io(dir, "sync the directory"))?;
    let file = HardStateFile::open(&path)?;
    Ok((file, log))
}

impl State {
    /// Of a member that was never started.
    fn new(options: &StoreOptions) -> Self {
        let StoreOptions { cluster_id, node_id, incarnation, .. } = *options;
        Self {
            identity: Identity { cluster_id, node_id },
            hard_state: HardState::new(incarnation),
            base: Position::default(),
            mark: Mark::default(),
            discard_log: false,
        }
    }
}

fn check_identity(options: &StoreOptions, stored: Identity) -> Result<(), StoreError> {
    let dir = options.data_dir.clone();
    if stored.cluster_id != options.cluster_id {
        return Err(StoreError::OtherCluster {
            dir,
            stored: stored.cluster_id,
            configured: options.cluster_id,
        });
    }
    if stored.node_id != options.node_id {
        return Err(StoreError::OtherNode { dir, stored: stored.node_id, configured: options.node_id });
    }
    Ok(())
}

fn recover_error(log_path: &Path, error: RecoverError) -> StoreError {
    let file = log_path.to_owned();
    match error {
        RecoverError::Store(error) => StoreError::log(log_path, "read the log")(error),
        RecoverError::Damaged { index, reason } => StoreError::Damaged { file, index: Some(index), reason },
        RecoverError::NewerFormat(found) => {
            StoreError::NewerFormat { file, found: found.into(), known: record::FORMAT.into() }
        }
    }
}
