//! The disk under one raftd: a log store and a hard-state file that lose, tear, fail and rot.
//!
//! A killed process loses what it had not handed to the operating system; a power cut loses, besides, what was not
//! synced, and tears it at the sectors' borders. It knows bytes and records, not what they mean.

use std::{
    io,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use bytes::Bytes;
use raftd::store::{
    block_file::BlockFile,
    log_store::{LogStore, LogStoreError, Scan},
    memory_log::MemoryLog,
    record::Key,
};

use crate::random::Random;

/// What a drive writes as a whole.
const SECTOR_BYTES: usize = 512;

/// The system's error for a broken medium, and for one without room.
pub const EIO: i32 = 5;
/// See [`EIO`].
pub const ENOSPC: i32 = 28;

/// Fails everything from a coming operation on, until the process is gone.
#[derive(Default)]
struct Failure {
    /// So many operations still succeed; `None`: all do.
    after: Option<u64>,
    errno: i32,
}

/// What survives the process.
pub struct Disk {
    log: Arc<MemoryLog>,
    file: Arc<Mutex<Sectors>>,
    failure: Arc<Mutex<Failure>>,
    is_new: bool,
}

/// What a crash took with it that was written and not synced.
pub struct Lost {
    /// Changes to the log.
    pub log: bool,
    /// Sectors of the hard-state file.
    pub hard_state: bool,
}

/// The content of the hard-state file.
#[derive(Clone, Default)]
struct Sectors {
    /// Sure to survive a power cut.
    durable: Vec<u8>,
    /// As the process sees it.
    current: Vec<u8>,
}

impl Disk {
    /// A disk with nothing on it.
    pub fn new() -> Self {
        Self { log: Arc::default(), file: Arc::default(), failure: Arc::default(), is_new: true }
    }

    /// Nothing was ever written.
    pub fn is_new(&self) -> bool {
        self.is_new
    }

    /// Somebody was told of what is on it.
    pub fn is_in_use(&mut self) {
        self.is_new = false;
    }

    /// The log store, as a process opens it.
    pub fn log(&self) -> Arc<dyn LogStore> {
        Arc::new(SimulatedLog { log: Arc::clone(&self.log), failure: Arc::clone(&self.failure) })
    }

    /// The hard-state file, as a process opens it.
    pub fn hard_state(&self) -> Box<dyn BlockFile> {
        Box::new(SimulatedFile { file: Arc::clone(&self.file), failure: Arc::clone(&self.failure) })
    }

    /// Lets so many writes and syncs pass and fails what follows.
    pub fn fail_after(&self, operations: u64, errno: i32) {
        *lock(&self.failure) = Failure { after: Some(operations), errno };
    }

    /// What has not failed yet will not. A process that was failed does not trust its disk again.
    pub fn heal(&self) {
        *lock(&self.failure) = Failure::default();
    }

    /// What fails, if anything does or will.
    pub fn failing(&self) -> Option<i32> {
        let failure = lock(&self.failure);
        failure.after.map(|_| failure.errno)
    }

    /// The process is gone, and with a power cut also what the operating system had not written yet.
    pub fn lose_unsynced(&mut self, power_cut: bool, random: &mut Random) -> Lost {
        *lock(&self.failure) = Failure::default();
        let unsynced = self.log.unsynced();
        let survivors = random.below(unsynced as u64 + 1) as usize;
        self.log = Arc::new(self.log.after_power_cut(survivors));
        let mut file = lock(&self.file).clone();
        let hard_state = power_cut && file.tear(random);
        self.file = Arc::new(Mutex::new(file));
        Lost { log: survivors < unsynced, hard_state }
    }

    /// Changes one bit of a record that lies on the disk. False: there is none.
    pub fn rot_log(&self, random: &mut Random) -> bool {
        let keys = self.log.keys();
        let Some(key) = keys.get(random.below(keys.len() as u64) as usize) else { return false };
        self.log.flip_bit(*key, random.below(1 << 20) as usize)
    }

    /// Changes one bit of one of the two copies of the hard state, or of the note. False: there is no file.
    pub fn rot_hard_state(&self, random: &mut Random) -> bool {
        let mut file = lock(&self.file);
        let at = random.below(file.current.len() as u64) as usize;
        let mask = 1 << random.below(8);
        if let Some(byte) = file.current.get_mut(at) {
            *byte ^= mask;
        }
        let is_there = at < file.current.len();
        if let Some(byte) = file.durable.get_mut(at) {
            *byte ^= mask;
        }
        is_there
    }
}

impl Default for Disk {
    fn default() -> Self {
        Self::new()
    }
}

impl Sectors {
    /// Each sector that was not synced is as it was, or as it was to be. True: one is as it was.
    fn tear(&mut self, random: &mut Random) -> bool {
        let mut torn = false;
        self.durable.resize(self.current.len(), 0);
        for (old, new) in self.durable.chunks_mut(SECTOR_BYTES).zip(self.current.chunks(SECTOR_BYTES)) {
            if old != new {
                let survives = random.chance(500);
                torn |= !survives;
                if survives {
                    old.copy_from_slice(new);
                }
            }
        }
        self.current.clone_from(&self.durable);
        torn
    }
}

impl Failure {
    fn step(&mut self) -> io::Result<()> {
        match &mut self.after {
            None => Ok(()),
            Some(0) => Err(io::Error::from_raw_os_error(self.errno)),
            Some(left) => {
                *left -= 1;
                Ok(())
            }
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // One thread runs a history; a panic under the lock is already its end.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

struct SimulatedLog {
    log: Arc<MemoryLog>,
    failure: Arc<Mutex<Failure>>,
}

impl SimulatedLog {
    fn step(&self) -> Result<(), LogStoreError> {
        lock(&self.failure).step().map_err(LogStoreError::Io)
    }
}

impl LogStore for SimulatedLog {
    fn insert(&self, key: Key, value: Vec<u8>) -> Result<(), LogStoreError> {
        self.step()?;
        self.log.insert(key, value)
    }

    fn remove(&self, key: Key) -> Result<(), LogStoreError> {
        self.step()?;
        self.log.remove(key)
    }

    fn flush(&self) -> Result<(), LogStoreError> {
        self.step()?;
        self.log.flush()
    }

    fn sync(&self) -> Result<(), LogStoreError> {
        self.step()?;
        self.log.sync()
    }

    fn first_key(&self) -> Result<Option<Key>, LogStoreError> {
        self.log.first_key()
    }

    fn last_key(&self) -> Result<Option<Key>, LogStoreError> {
        self.log.last_key()
    }

    fn at_or_before(&self, key: Key) -> Result<Option<(Key, Bytes)>, LogStoreError> {
        self.log.at_or_before(key)
    }

    fn scan(&self, from: Key) -> Scan<'_> {
        self.log.scan(from)
    }

    fn size_bytes(&self) -> Result<u64, LogStoreError> {
        self.log.size_bytes()
    }
}

struct SimulatedFile {
    file: Arc<Mutex<Sectors>>,
    failure: Arc<Mutex<Failure>>,
}

impl BlockFile for SimulatedFile {
    fn read_all(&self) -> io::Result<Vec<u8>> {
        Ok(lock(&self.file).current.clone())
    }

    fn write_all_at(&self, bytes: &[u8], at: u64) -> io::Result<()> {
        lock(&self.failure).step()?;
        let mut file = lock(&self.file);
        let (from, to) = (at as usize, at as usize + bytes.len());
        if file.current.len() < to {
            file.current.resize(to, 0);
        }
        file.current[from..to].copy_from_slice(bytes);
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        lock(&self.failure).step()?;
        let mut file = lock(&self.file);
        let current = file.current.clone();
        file.durable = current;
        Ok(())
    }
}
