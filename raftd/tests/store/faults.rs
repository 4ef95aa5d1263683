//! A log store that fails, and one that counts: what is reported is durable, and nothing after a failure.

use std::{
    io,
    path::Path,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
        mpsc::{Receiver, Sender, channel},
    },
};

use bytes::Bytes;
use raft::Entry;
use raftd::store::{
    Store, StoreError, Write,
    log_store::{LogStore, LogStoreError, Scan},
    memory_log::MemoryLog,
    record::Key,
};

use crate::support::{PATIENCE, Running, entries, entry, options};

/// Fails from the k-th change, flush or sync on.
struct FailingLog {
    inner: MemoryLog,
    before_failure: AtomicU64,
    errno: i32,
}

impl FailingLog {
    fn step(&self) -> Result<(), LogStoreError> {
        let left =
            self.before_failure.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1));
        left.map(drop).map_err(|_| LogStoreError::Io(io::Error::from_raw_os_error(self.errno)))
    }
}

impl LogStore for FailingLog {
    fn insert(&self, key: Key, value: Vec<u8>) -> Result<(), LogStoreError> {
        self.step()?;
        self.inner.insert(key, value)
    }

    fn remove(&self, key: Key) -> Result<(), LogStoreError> {
        self.step()?;
        self.inner.remove(key)
    }

    fn flush(&self) -> Result<(), LogStoreError> {
        self.step()?;
        self.inner.flush()
    }

    fn sync(&self) -> Result<(), LogStoreError> {
        self.step()?;
        self.inner.sync()
    }

    fn first_key(&self) -> Result<Option<Key>, LogStoreError> {
        self.inner.first_key()
    }

    fn last_key(&self) -> Result<Option<Key>, LogStoreError> {
        self.inner.last_key()
    }

    fn at_or_before(&self, key: Key) -> Result<Option<(Key, Bytes)>, LogStoreError> {
        self.inner.at_or_before(key)
    }

    fn scan(&self, from: Key) -> Scan<'_> {
        self.inner.scan(from)
    }

    fn size_bytes(&self) -> Result<u64, LogStoreError> {
        self.inner.size_bytes()
    }
}

fn open_on(dir: &Path, log: Arc<dyn LogStore>) -> Running {
    Running::start(Store::open_with(options(dir), |_, _| Ok(log.clone())).unwrap())
}

/// A history with every kind of operation, and the log after each reported number.
fn history() -> Vec<(Write, Vec<Entry>)> {
    let mut log: Vec<Entry> = Vec::new();
    let mut steps = Vec::new();
    for (entries, keep) in [
        (entries(1..=5, 1, 100), 0),
        (vec![entry(6, 1, 200_000)], 5),
        (entries(4..=8, 2, 10), 3),
        (vec![entry(9, 2, 3_000_000)], 8),
        (entries(2..=3, 3, 10), 1),
    ] {
        log.truncate(keep);
        log.extend(entries.clone());
        steps.push((Write { entries, ..Write::default() }, log.clone()));
    }
    steps
}

#[test]
fn after_the_first_failure_nothing_is_reported_and_what_was_reported_is_there() {
    for errno in [5 /* EIO */, 28 /* ENOSPC */] {
        let mut failures = 0;
        for k in 0.. {
            let dir = tempfile::tempdir().unwrap();
            let log =
                Arc::new(FailingLog { inner: MemoryLog::new(), before_failure: AtomicU64::new(k), errno });
            let mut store = open_on(dir.path(), log.clone());
            let steps = history();
            for (write, _) in &steps {
                // Refused once the writer has failed.
                let _ = store.submit(write.clone());
            }
            let (durable, failed): (Vec<_>, Vec<_>) =
                store.remaining_reports().into_iter().partition(Result::is_ok);
            let reported = durable.into_iter().flatten().max().unwrap_or(0) as usize;
            let expected = reported.checked_sub(1).map(|at| steps[at].1.clone()).unwrap_or_default();

            // Only what was synced is left. Writes that were not reported may be there, in part or whole.
            let left = Arc::new(log.inner.after_power_cut(0));
            let log = open_on(dir.path(), left).log();
            let allowed =
                steps[reported.saturating_sub(1)..].iter().any(|(_, later)| later.starts_with(&log));
            assert!(log == expected || allowed, "k = {k}, errno {errno}");
            if failed.is_empty() {
                assert_eq!(reported, steps.len());
                break;
            }
            assert_eq!(failed.len(), 1, "the failure is reported once, and last");
            failures += 1;
        }
        assert!(failures > 50, "the history has more steps than {failures}");
    }
}

#[test]
fn after_a_failure_every_write_is_refused_with_the_reason() {
    let dir = tempfile::tempdir().unwrap();
    let log = Arc::new(FailingLog { inner: MemoryLog::new(), before_failure: AtomicU64::new(0), errno: 5 });
    let mut store = open_on(dir.path(), log);
    store.append(entries(1..=2, 1, 10));
    let failure = store.next_report().unwrap_err();
    assert!(matches!(failure, StoreError::Io { .. }), "{failure}");
    let refused = store.submit(Write { entries: entries(3..=3, 1, 10), ..Write::default() }).unwrap_err();
    assert!(
        matches!(&refused, StoreError::WriterStopped(reason) if *reason == failure.to_string()),
        "{refused}"
    );
    assert!(store.writer.shutdown().is_err());
}

/// Stops in every sync until it is let go.
struct GatedLog {
    inner: MemoryLog,
    entered: Sender<()>,
    gate: Mutex<Receiver<()>>,
}

impl LogStore for GatedLog {
    fn insert(&self, key: Key, value: Vec<u8>) -> Result<(), LogStoreError> {
        self.inner.insert(key, value)
    }

    fn remove(&self, key: Key) -> Result<(), LogStoreError> {
        self.inner.remove(key)
    }

    fn flush(&self) -> Result<(), LogStoreError> {
        self.inner.flush()
    }

    fn sync(&self) -> Result<(), LogStoreError> {
        let _ = self.entered.send(());
        let _ = self.gate.lock().unwrap().recv();
        self.inner.sync()
    }

    fn first_key(&self) -> Result<Option<Key>, LogStoreError> {
        self.inner.first_key()
    }

    fn last_key(&self) -> Result<Option<Key>, LogStoreError> {
        self.inner.last_key()
    }

    fn at_or_before(&self, key: Key) -> Result<Option<(Key, Bytes)>, LogStoreError> {
        self.inner.at_or_before(key)
    }

    fn scan(&self, from: Key) -> Scan<'_> {
        self.inner.scan(from)
    }

    fn size_bytes(&self) -> Result<u64, LogStoreError> {
        self.inner.size_bytes()
    }
}

#[test]
fn what_gathers_during_a_sync_becomes_one_record_and_one_sync() {
    let dir = tempfile::tempdir().unwrap();
    let (entered, at_sync) = channel();
    let (open_gate, gate) = channel();
    let log = Arc::new(GatedLog { inner: MemoryLog::new(), entered, gate: Mutex::new(gate) });
    let mut store = open_on(dir.path(), log.clone());
    store.append(vec![entry(1, 1, 10)]);
    at_sync.recv_timeout(PATIENCE).unwrap();
    for index in 2..=100 {
        store.append(vec![entry(index, 1, 10)]);
    }
    // A conflict among what waits never reaches the store.
    store.append(vec![entry(90, 2, 10)]);
    assert_eq!(store.reader.read(90, 90, 1).unwrap()[0].term, 2, "what waits can be read");
    open_gate.send(()).unwrap();
    assert_eq!(store.next_report().unwrap(), 1, "only what the sync covered");
    open_gate.send(()).unwrap();
    assert_eq!(store.next_report().unwrap(), 101, "all that gathered, at once");
    assert_eq!((log.inner.syncs(), log.inner.keys()), (2, vec![Key::at(1), Key::at(2)]));
    drop(open_gate);
}

#[test]
fn a_large_entry_is_synced_every_mebibyte() {
    let dir = tempfile::tempdir().unwrap();
    let log = Arc::new(MemoryLog::new());
    let mut store = open_on(dir.path(), log.clone());
    store.append(vec![entry(1, 1, 5 << 20)]);
    store.settle();
    assert_eq!(log.syncs(), 6);
    assert!(log.keys().len() > 80);
}

#[test]
fn compacted_records_go_a_batch_at_a_time() {
    let dir = tempfile::tempdir().unwrap();
    let log = Arc::new(MemoryLog::new());
    let mut store = open_on(dir.path(), log.clone());
    for index in 1..=2_000 {
        store.append(vec![entry(index, 1, 70_000)]);
        store.settle();
    }
    assert_eq!(log.keys().len(), 4_000);
    store.writer.compact(1_990).unwrap();
    let deadline = std::time::Instant::now() + PATIENCE;
    while log.keys().len() != 20 {
        assert!(std::time::Instant::now() < deadline, "{} records are left", log.keys().len());
        std::thread::yield_now();
    }
    assert_eq!(log.keys()[0], Key::at(1_991));
    assert_eq!(store.log().len(), 10);
}
