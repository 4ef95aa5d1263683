//! A log store behind a journal: small writes become durable in the journal, and in the store later, many at once.
//!
//! sled's own way to the disk takes two system calls, wakes seven threads and appends to its file, for every group of
//! entries; the journal takes one write and one sync of a file whose length stays. What makes both one log:
//!
//! - Every insertion goes to the store at once, where it can be read, and to the journal's next frame. A sync makes
//!   the frame durable. The store is synced only when enough has gathered (it is *settled*), and only after that the
//!   journal is begun anew.
//! - So after a crash the store holds a prefix of all changes that reaches at least to where the journal begins, and
//!   to insert the journal's records again, in their order, gives everything that was synced: an insertion means the
//!   same however often it is done.
//! - A removal of what is not yet in the store for good, from its end, could not be repeated so: before a removal the
//!   store is settled, and until the next sync, which is the store's own, the journal takes nothing.
//! - A discard needs none of this: the journal brings back records at the end of the log only, and what comes back
//!   below the log's base is removed again.
//!
//! It knows the trait and the journal; what a record means is decided above.

use std::{
    fs::{File, OpenOptions},
    io,
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
};

use bytes::{Buf, BufMut, Bytes};
use prometheus::Histogram;

use super::{
    block_file::BlockFile,
    hard_state::sync_dir,
    journal::{Draft, JOURNAL_BYTES, Journal},
    log_store::{LogStore, LogStoreError, Scan},
    record::Key,
    sled_log::SledLog,
};

/// The store is settled when so much gathered that only the journal holds durably. What one power cut can tear of sled's
/// file must stay within two of its segments; and a write that comes meanwhile waits, which at 1 MiB showed in the p99.
const SETTLE_BYTES: usize = 256 << 10;

/// So large a write goes to the store at once: to write it twice would cost more than the store's own sync.
const MAX_FRAME_BYTES: usize = 256 << 10;

/// How many discards may gather before the store is flushed, which keeps every page that they touched until then.
const UNFLUSHED_DISCARDS: usize = 256;

/// A log store with its journal.
pub struct JournaledLog {
    records: Box<dyn LogStore>,
    state: Mutex<State>,
    /// Where somebody measures the syncs.
    fsync: Option<Histogram>,
}

struct State {
    journal: Journal,
    /// What the next sync has to make durable, unless it outgrew the journal.
    draft: Draft,
    /// The bytes of values since the store was settled.
    unsettled_bytes: usize,
    /// Something was removed, so that the next sync must be the store's own.
    has_removed: bool,
    unflushed_discards: usize,
}

impl JournaledLog {
    /// Makes a sled database in `dir` and its journal beside it, both empty and durable.
    pub fn create(dir: &Path, cache_bytes: u64) -> Result<Self, LogStoreError> {
        let records = SledLog::create(dir, cache_bytes)?;
        let path = journal_path(dir);
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(true).open(&path)?;
        let log = Self::create_on(Box::new(records), Box::new(file.try_clone()?))?;
        file.sync_all()?;
        sync_dir(path.parent().unwrap_or(Path::new("/")))?;
        Ok(log)
    }

    /// Opens the database in `dir` and its journal. Both must be there.
    pub fn open(dir: &Path, cache_bytes: u64) -> Result<Self, LogStoreError> {
        let file = match OpenOptions::new().read(true).write(true).open(journal_path(dir)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(LogStoreError::Damaged("its journal is missing".into()));
            }
            opened => opened?,
        };
        // What is read from the journal is built upon, so it must not be lost later.
        File::sync_data(&file)?;
        Self::open_on(Box::new(SledLog::open(dir, cache_bytes)?), Box::new(file))
    }

    /// As [`JournaledLog::create`], on other media. The records are an empty store, the file is empty.
    pub fn create_on(records: Box<dyn LogStore>, file: Box<dyn BlockFile>) -> Result<Self, LogStoreError> {
        Ok(Self::with(records, Journal::create(file)?))
    }

    /// As [`JournaledLog::open`], on other media.
    pub fn open_on(records: Box<dyn LogStore>, file: Box<dyn BlockFile>) -> Result<Self, LogStoreError> {
        let (mut journal, frames) = Journal::open(file)?;
        for mut frame in frames {
            while frame.has_remaining() {
                let (key, value) = read_record(&mut frame)?;
                records.insert(key, value)?;
            }
        }
        records.sync()?;
        journal.restart()?;
        Ok(Self::with(records, journal))
    }

    fn with(records: Box<dyn LogStore>, journal: Journal) -> Self {
        let state = State {
            journal,
            draft: Draft::new(),
            unsettled_bytes: 0,
            has_removed: false,
            unflushed_discards: 0,
        };
        Self { records, state: Mutex::new(state), fsync: None }
    }

    /// The time that each sync takes is to be noted.
    pub(super) fn measured(self, fsync: Option<Histogram>) -> Self {
        Self { fsync, ..self }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // After a panic the process ends, as after any error (see the trait).
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes everything durable in the store itself, and begins the journal anew.
    fn settle(&self, state: &mut State) -> Result<(), LogStoreError> {
        self.records.sync()?;
        if !state.journal.is_empty() {
            state.journal.restart()?;
        }
        state.draft.clear();
        state.unsettled_bytes = 0;
        state.has_removed = false;
        state.unflushed_discards = 0;
        Ok(())
    }

    fn make_durable(&self) -> Result<(), LogStoreError> {
        let state = &mut *self.lock();
        let frame_bytes = state.draft.payload_bytes();
        let is_too_much = frame_bytes > MAX_FRAME_BYTES
            || state.unsettled_bytes > SETTLE_BYTES
            || !state.journal.has_room(frame_bytes);
        if state.has_removed || is_too_much {
            return self.settle(state);
        }
        if frame_bytes == 0 { Ok(()) } else { Ok(state.journal.append(&mut state.draft)?) }
    }
}

/// Beside the database, whose directory is sled's.
fn journal_path(dir: &Path) -> PathBuf {
    dir.with_file_name("journal")
}

impl State {
    fn note(&mut self, key: Key, value: &[u8]) {
        self.unsettled_bytes += value.len();
        if self.has_removed || self.draft.payload_bytes() > MAX_FRAME_BYTES {
            return;
        }
        let length = u32::try_from(value.len()).expect("a record is at most 64 KiB");
        let frame = self.draft.payload();
        frame.put_slice(&key.to_bytes());
        frame.put_u32_le(length);
        frame.put_slice(value);
    }
}

fn read_record(frame: &mut Bytes) -> Result<(Key, Vec<u8>), LogStoreError> {
    let impossible = || LogStoreError::Damaged("its journal holds an impossible record".into());
    if frame.len() < Key::BYTES + size_of::<u32>() {
        return Err(impossible());
    }
    let key = Key::from_bytes(&frame.split_to(Key::BYTES)).ok_or_else(impossible)?;
    let length = frame.get_u32_le() as usize;
    if length > frame.len() {
        return Err(impossible());
    }
    Ok((key, frame.split_to(length).to_vec()))
}

impl LogStore for JournaledLog {
    fn insert(&self, key: Key, value: Vec<u8>) -> Result<(), LogStoreError> {
        self.lock().note(key, &value);
        self.records.insert(key, value)
    }

    fn remove(&self, key: Key) -> Result<(), LogStoreError> {
        let mut state = self.lock();
        if !state.has_removed {
            self.settle(&mut state)?;
            state.has_removed = true;
        }
        self.records.remove(key)
    }

    fn discard(&self, key: Key) -> Result<(), LogStoreError> {
        self.lock().unflushed_discards += 1;
        self.records.discard(key)
    }

    fn flush(&self) -> Result<(), LogStoreError> {
        let mut state = self.lock();
        if !state.has_removed && state.unflushed_discards < UNFLUSHED_DISCARDS {
            return Ok(());
        }
        state.unflushed_discards = 0;
        self.records.flush()
    }

    fn sync(&self) -> Result<(), LogStoreError> {
        let timer = self.fsync.as_ref().map(Histogram::start_timer);
        let synced = self.make_durable();
        drop(timer);
        synced
    }

    fn first_key(&self) -> Result<Option<Key>, LogStoreError> {
        self.records.first_key()
    }

    fn last_key(&self) -> Result<Option<Key>, LogStoreError> {
        self.records.last_key()
    }

    fn at_or_before(&self, key: Key) -> Result<Option<(Key, Bytes)>, LogStoreError> {
        self.records.at_or_before(key)
    }

    fn scan(&self, from: Key) -> Scan<'_> {
        self.records.scan(from)
    }

    fn size_bytes(&self) -> Result<u64, LogStoreError> {
        Ok(self.records.size_bytes()? + JOURNAL_BYTES as u64)
    }
}
