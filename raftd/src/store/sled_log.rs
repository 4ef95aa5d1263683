//! The log store on sled 0.34, with what sled leaves to its user to be safe against power cuts.
//!
//! What it does, and why (all of it tried with simulated power cuts, or read in sled's source):
//! - sled's `flush` is `pwrite` and `sync_file_range`: that reaches neither the file's metadata nor the drive's cache.
//!   So every sync is a `flush` and then an `fdatasync` on a descriptor of our own on the same file.
//! - No background flusher: only the log writer decides when something is written.
//! - 8 MiB segments, fixed when the database is created. A page over a quarter of a segment goes to a file of its own
//!   that is never synced; with sled's default of 512 KiB, values of 20 KB lost the database.
//! - Before every opening the file is synced: what sled finds, and bases its snapshot on, must not be lost later.
//! - A kill while sled opens leaves `snap.*.generating`, which the next opening would call corruption: it is removed.
//! - sled panics on some damage. Every call is guarded, and a panic counts as damage.
//!
//! sled's mode settings do nothing, and its batches are no faster than single insertions, so neither is used.

use std::{
    fs::{self, File, OpenOptions},
    io,
    os::unix::fs::MetadataExt,
    panic::{self, AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
    process,
    sync::Once,
    thread,
    time::{Duration, Instant},
};

use bytes::Bytes;
use sled::IVec;

use super::{
    hard_state::sync_dir,
    log_store::{LogStore, LogStoreError, Scan},
    record::Key,
    trial::is_left_out,
};

const SEGMENT_BYTES: usize = 8 << 20;

/// A shorter `conf` is one that sled takes for absent.
const CONF_MIN_BYTES: u64 = 9;

/// How long a database may take to let go of its file after it was closed in this very process.
const RELEASE_PATIENCE: Duration = Duration::from_secs(5);

/// An open sled database.
pub struct SledLog {
    dir: PathBuf,
    db: sled::Db,
    /// Our own descriptor on sled's file, to sync it.
    file: File,
}

impl SledLog {
    /// Makes a new, empty database, durable together with the directory's entry in its parent.
    pub fn create(dir: &Path, cache_bytes: u64) -> Result<Self, LogStoreError> {
        fs::create_dir(dir)?;
        let created = Self::start(dir, cache_bytes)?;
        created.sync()?;
        created.file.sync_all()?;
        File::open(dir.join("conf"))?.sync_all()?;
        sync_dir(dir)?;
        sync_dir(dir.parent().unwrap_or(Path::new("/")))?;
        Ok(created)
    }

    /// Opens a database that must be there already: sled would silently make a new one.
    pub fn open(dir: &Path, cache_bytes: u64) -> Result<Self, LogStoreError> {
        for (name, least_bytes) in [("db", 1), ("conf", CONF_MIN_BYTES)] {
            match fs::metadata(dir.join(name)) {
                Ok(file) if file.len() >= least_bytes => {}
                Ok(_) => return Err(LogStoreError::Damaged(format!("its file {name} is empty"))),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    return Err(LogStoreError::Damaged(format!("its file {name} is missing")));
                }
                Err(error) => return Err(error.into()),
            }
        }
        OpenOptions::new().write(true).open(dir.join("db"))?.sync_data()?;
        remove_unfinished_snapshots(dir)?;
        Self::start(dir, cache_bytes)
    }

    fn start(dir: &Path, cache_bytes: u64) -> Result<Self, LogStoreError> {
        let deadline = Instant::now() + RELEASE_PATIENCE;
        let db = loop {
            let mut config = sled::Config::new().path(dir);
            if !is_left_out("segment_size") {
                config = config.segment_size(SEGMENT_BYTES);
            }
            let config = config.cache_capacity(cache_bytes).flush_every_ms(None);
            match guarded(|| config.open()) {
                // The caller holds the data directory's lock, so that no other process can be the one that holds
                // sled's: sled's threads let go of a database a moment after it was closed.
                Err(LogStoreError::Io(error)) if is_locked(&error) && Instant::now() < deadline => {
                    thread::sleep(Duration::from_millis(5));
                }
                opened => break opened?,
            }
        };
        end_with_sleds_threads();
        let file = OpenOptions::new().write(true).open(dir.join("db"))?;
        Ok(Self { dir: dir.to_owned(), db, file })
    }
}

fn remove_unfinished_snapshots(dir: &Path) -> io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        if name.starts_with("snap.") && name.ends_with(".generating") {
            fs::remove_file(&path)?;
        }
    }
    Ok(())
}

/// From now on, a panic on one of sled's own threads ends the process: [`guarded`] cannot see it, and a flush would wait
/// for that thread for ever. Not earlier, because a damaged database panics there while it is being opened.
fn end_with_sleds_threads() {
    static INSTALLED: Once = Once::new();
    INSTALLED.call_once(|| {
        let print = panic::take_hook();
        panic::set_hook(Box::new(move |panic| {
            print(panic);
            if thread::current().name().is_some_and(|name| name.starts_with("sled-")) {
                process::abort();
            }
        }));
    });
}

/// sled tells a held lock from other errors only by its words.
fn is_locked(error: &io::Error) -> bool {
    error.to_string().contains("could not acquire lock")
}

/// Calls sled so that neither its errors nor its panics pass for anything but what they are.
fn guarded<T>(call: impl FnOnce() -> sled::Result<T>) -> Result<T, LogStoreError> {
    // After a panic the database is never used again (see the trait), so that its state does not matter.
    match catch_unwind(AssertUnwindSafe(call)) {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(sled::Error::Io(error))) => Err(LogStoreError::Io(error)),
        Ok(Err(error)) => Err(LogStoreError::Damaged(format!("sled: {error}"))),
        Err(panic) => {
            let words = panic.downcast_ref::<String>().map(String::as_str);
            let words = words.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("no reason given");
            Err(LogStoreError::Damaged(format!("sled panicked: {words}")))
        }
    }
}

fn record((key, value): (IVec, IVec)) -> Result<(Key, Bytes), LogStoreError> {
    // The value's memory is shared, not copied.
    Ok((self::key(&key)?, Bytes::from_owner(value)))
}

fn key(bytes: &[u8]) -> Result<Key, LogStoreError> {
    Key::from_bytes(bytes)
        .ok_or_else(|| LogStoreError::Damaged(format!("a record has the impossible key {bytes:02x?}")))
}

impl LogStore for SledLog {
    fn insert(&self, key: Key, value: Vec<u8>) -> Result<(), LogStoreError> {
        guarded(|| self.db.insert(key.to_bytes(), value)).map(drop)
    }

    fn remove(&self, key: Key) -> Result<(), LogStoreError> {
        guarded(|| self.db.remove(key.to_bytes())).map(drop)
    }

    fn flush(&self) -> Result<(), LogStoreError> {
        guarded(|| self.db.flush()).map(drop)
    }

    fn sync(&self) -> Result<(), LogStoreError> {
        self.flush()?;
        if is_left_out("fdatasync") {
            return Ok(());
        }
        Ok(self.file.sync_data()?)
    }

    fn first_key(&self) -> Result<Option<Key>, LogStoreError> {
        guarded(|| self.db.first())?.map(|(bytes, _)| key(&bytes)).transpose()
    }

    fn last_key(&self) -> Result<Option<Key>, LogStoreError> {
        guarded(|| self.db.last())?.map(|(bytes, _)| key(&bytes)).transpose()
    }

    fn at_or_before(&self, key: Key) -> Result<Option<(Key, Bytes)>, LogStoreError> {
        guarded(|| self.db.range(..=key.to_bytes()).next_back().transpose())?.map(record).transpose()
    }

    fn scan(&self, from: Key) -> Scan<'_> {
        let mut records = self.db.range(from.to_bytes()..);
        Box::new(std::iter::from_fn(move || {
            let next = guarded(|| records.next().transpose()).transpose()?;
            Some(next.and_then(record))
        }))
    }

    fn size_bytes(&self) -> Result<u64, LogStoreError> {
        let mut blocks = 0;
        for entry in fs::read_dir(&self.dir)? {
            blocks += entry?.metadata()?.blocks();
        }
        // stat(2) counts in these units, whatever the filesystem's are.
        Ok(blocks * 512)
    }
}
