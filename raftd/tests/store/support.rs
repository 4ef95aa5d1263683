//! A running store for tests, and entries whose contents follow from index and term.

use std::{
    path::{Path, PathBuf},
    sync::mpsc::{Receiver, channel},
    time::Duration,
};

use raft::{Entry, EntryKind, HardState, Index, Install, Log, Position, Term};
use raftd::store::{LogReader, LogWriter, Store, StoreError, StoreOptions, Write};

/// Far longer than any step takes: reaching it is a failure.
pub const PATIENCE: Duration = Duration::from_secs(60);

pub fn options(data_dir: &Path) -> StoreOptions {
    StoreOptions {
        data_dir: data_dir.to_owned(),
        cache_bytes: 16 << 20,
        cluster_id: 0xC1,
        node_id: 1,
        incarnation: 7,
    }
}

/// An entry whose payload of this length nobody could mistake for another one's.
pub fn entry(index: Index, term: Term, len: usize) -> Entry {
    let seed = index.wrapping_mul(31).wrapping_add(term.wrapping_mul(7));
    let payload: Vec<u8> =
        (0..len as u64).map(|at| (seed.wrapping_add(at.wrapping_mul(seed | 1)) >> 3) as u8).collect();
    Entry { index, term, kind: EntryKind::Payload, timestamp_ms: 1_000 + index, payload: payload.into() }
}

pub fn entries(indexes: std::ops::RangeInclusive<Index>, term: Term, len: usize) -> Vec<Entry> {
    indexes.map(|index| entry(index, term, len)).collect()
}

/// A store with its writer, and what the writer reported.
pub struct Running {
    pub reader: LogReader,
    pub writer: LogWriter,
    pub hard_state: HardState,
    reports: Receiver<Result<u64, StoreError>>,
    number: u64,
    reported: u64,
}

impl Running {
    pub fn open(dir: &Path) -> Result<Self, StoreError> {
        Store::open(options(dir)).map(Self::start)
    }

    pub fn start(mut store: Store) -> Self {
        let (sender, reports) = channel();
        let reader = store.reader();
        let hard_state = store.hard_state();
        let report = Box::new(move |report| drop(sender.send(report)));
        let writer = store.start_writer(report).unwrap();
        Self { reader, writer, hard_state, reports, number: 0, reported: 0 }
    }

    pub fn submit(&mut self, write: Write) -> Result<u64, StoreError> {
        self.number += 1;
        self.writer.submit(Write { number: self.number, ..write })?;
        Ok(self.number)
    }

    pub fn append(&mut self, entries: Vec<Entry>) -> u64 {
        self.submit(Write { entries, ..Write::default() }).unwrap()
    }

    pub fn vote(&mut self, term: Term, voted_for: Option<u64>) -> u64 {
        let hard_state = Some(HardState { term, voted_for, ..HardState::new(7) });
        self.submit(Write { hard_state, ..Write::default() }).unwrap()
    }

    pub fn install(&mut self, base: Position, keep_suffix: bool) -> u64 {
        let install = Some(Install { base, keep_suffix });
        self.submit(Write { install, ..Write::default() }).unwrap()
    }

    /// Waits until everything that was submitted is durable.
    pub fn settle(&mut self) {
        while self.reported < self.number {
            self.reported = self.next_report().expect("the writer goes on");
        }
    }

    pub fn next_report(&mut self) -> Result<u64, StoreError> {
        self.reports.recv_timeout(PATIENCE).expect("the writer reports in time")
    }

    /// Everything that the writer still has to say.
    pub fn remaining_reports(self) -> Vec<Result<u64, StoreError>> {
        drop(self.writer);
        self.reports.try_iter().collect()
    }

    pub fn log(&self) -> Vec<Entry> {
        whole_log(&self.reader)
    }

    pub fn stop(self) {
        self.writer.shutdown().unwrap();
    }
}

/// Every entry, in reads of a size that splits records.
pub fn whole_log(reader: &LogReader) -> Vec<Entry> {
    let last = reader.last_index().unwrap();
    let mut log: Vec<Entry> = Vec::new();
    let mut next = reader.base().unwrap().index + 1;
    while next <= last {
        let read = reader.read(next, last, 10_000).unwrap();
        next += read.len() as u64;
        log.extend(read);
    }
    log
}

/// A copy of a data directory as a killed process would leave it.
pub fn copy_dir(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for item in std::fs::read_dir(from).unwrap() {
        let (path, name) = item.map(|item| (item.path(), item.file_name())).unwrap();
        if path.is_dir() {
            copy_dir(&path, &to.join(name));
        } else if name != "ballast" {
            std::fs::copy(&path, to.join(name)).unwrap();
        }
    }
}

/// A directory with a closed store of 203 entries in several records. 100 and the next three, which are in parts, are in
/// sled for good; the rest is in the journal.
pub fn filled(dir: &Path) -> (PathBuf, Vec<Entry>) {
    let (store, log) = fill(dir);
    store.stop();
    (dir.to_owned(), log)
}

/// The same as a killed process leaves it.
pub fn filled_and_killed(dir: &Path) -> (PathBuf, Vec<Entry>) {
    let living = tempfile::tempdir().unwrap();
    let (_store, log) = fill(living.path());
    copy_dir(living.path(), dir);
    (dir.to_owned(), log)
}

fn fill(dir: &Path) -> (Running, Vec<Entry>) {
    let mut log = Vec::new();
    let mut store = Running::open(dir).unwrap();
    store.vote(3, Some(2));
    let mut append = |added: Vec<Entry>| {
        log.extend(added.clone());
        store.append(added);
        store.settle();
    };
    (1..=100).step_by(10).for_each(|start| append(entries(start..=start + 9, 3, 100)));
    append(entries(101..=103, 3, 150_000));
    (104..=203).step_by(10).for_each(|start| append(entries(start..=start + 9, 3, 100)));
    (store, log)
}
