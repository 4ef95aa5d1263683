//! What is in memory of the log, and the one way to read it: recent entries from here, older ones from the store.
//!
//! Invariants: the cached entries are contiguous and end with the last one; an entry leaves memory only once it is
//! durable; whoever truncates, compacts or resets the log counts the generation up, so that a reader that went to
//! the store meanwhile notices. The lock is held for moments, and never across input or output.

use std::{
    collections::VecDeque,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use raft::{Entry, Index, Install, LogError, Position, Term};

use super::{error::StoreError, log_store::LogStore, record_log, term_runs::TermRuns};

/// Why entries cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// The entries were compacted away: whoever needs them needs a snapshot.
    #[error("the log begins after index {base}")]
    Compacted {
        /// Everything up to here is gone.
        base: Index,
    },
    /// The log cannot be read. Fatal.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Reads the log: cheap at its end, from the store before that. Clones read the same log.
///
/// Entries show from the moment they are handed to the writer, durable or not.
#[derive(Clone)]
pub struct LogReader {
    window: SharedWindow,
    store: Arc<dyn LogStore>,
    file: PathBuf,
}

impl LogReader {
    pub(super) fn new(window: SharedWindow, store: Arc<dyn LogStore>, file: PathBuf) -> Self {
        Self { window, store, file }
    }

    /// The entries `from..=to` as far as the log has them, cut off before the one that would make more than
    /// `max_bytes` (see [`Entry::size_bytes`]), but never before the first.
    pub fn read(&self, from: Index, to: Index, max_bytes: usize) -> Result<Vec<Entry>, ReadError> {
        loop {
            let (stored_to, generation) = {
                let window = self.window.lock();
                if from <= window.base.index {
                    return Err(ReadError::Compacted { base: window.base.index });
                }
                let to = to.min(window.last_index);
                if from > to {
                    return Ok(Vec::new());
                }
                if from >= window.first_cached() {
                    return Ok(window.cached(from, to, max_bytes));
                }
                // What lies in memory is left to the next call: the two never need to be of one moment.
                (to.min(window.first_cached() - 1), window.generation)
            };
            let read = record_log::read_entries(&*self.store, from, stored_to, max_bytes);
            if self.window.lock().generation != generation {
                continue;
            }
            let entries = read.map_err(StoreError::log(&self.file, "read the log"))?;
            let whole = entries.iter().zip(from..).all(|(entry, index)| entry.index == index);
            if entries.is_empty() || !whole {
                let index = (from..).zip(&entries).find(|(index, entry)| entry.index != *index);
                let index = index.map_or(from, |(index, _)| index);
                let reason = "the entry is missing".to_owned();
                return Err(
                    StoreError::Damaged { file: self.file.clone(), index: Some(index), reason }.into()
                );
            }
            return Ok(entries);
        }
    }
}

impl raft::Log for LogReader {
    fn base(&self) -> Result<Position, LogError> {
        Ok(self.window.lock().base)
    }

    fn last_index(&self) -> Result<Index, LogError> {
        Ok(self.window.lock().last_index)
    }

    fn term(&self, index: Index) -> Result<Option<Term>, LogError> {
        Ok(self.window.lock().term(index))
    }

    fn entries(&self, from: Index, to: Index, max_bytes: usize) -> Result<Vec<Entry>, LogError> {
        self.read(from, to, max_bytes).map_err(LogError::new)
    }
}

/// The window that the writer, its thread and all readers share.
#[derive(Clone)]
pub(super) struct SharedWindow(Arc<Mutex<Window>>);

impl SharedWindow {
    pub(super) fn new(window: Window) -> Self {
        Self(Arc::new(Mutex::new(window)))
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Window> {
        // A panic under the lock is a broken invariant; the writer's thread reports it, and the process ends.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The log's end as it will be once everything that was handed over is durable.
pub(super) struct Window {
    base: Position,
    last_index: Index,
    durable_index: Index,
    /// Writes that are not durable yet: the number, and the last index that it makes durable. An index that has
    /// been replaced since is not counted.
    writes: VecDeque<(u64, Index)>,
    entries: VecDeque<Entry>,
    entries_bytes: usize,
    max_bytes: usize,
    terms: TermRuns,
    generation: u64,
}

impl Window {
    pub(super) fn new(base: Position, max_bytes: usize) -> Self {
        Self {
            base,
            last_index: base.index,
            durable_index: base.index,
            writes: VecDeque::new(),
            entries: VecDeque::new(),
            entries_bytes: 0,
            max_bytes,
            terms: TermRuns::default(),
            generation: 0,
        }
    }

    /// Takes an entry that was found in the store at the start.
    pub(super) fn recover(&mut self, entry: Entry) {
        self.push(entry);
        self.durable_index = self.last_index;
        self.evict();
    }

    pub(super) fn base(&self) -> Position {
        self.base
    }

    pub(super) fn durable_index(&self) -> Index {
        self.durable_index
    }

    pub(super) fn term(&self, index: Index) -> Option<Term> {
        if index == self.base.index {
            return Some(self.base.term);
        }
        (index > self.base.index && index <= self.last_index).then(|| self.terms.term_at(index)).flatten()
    }

    /// The index of the first cached entry; the next one to come if there is none.
    fn first_cached(&self) -> Index {
        self.last_index + 1 - self.entries.len() as Index
    }

    fn cached(&self, from: Index, to: Index, max_bytes: usize) -> Vec<Entry> {
        let skipped = (from - self.first_cached()) as usize;
        let mut room = max_bytes;
        let mut found = Vec::new();
        for entry in self.entries.range(skipped..).take_while(|entry| entry.index <= to) {
            if entry.size_bytes() > room && !found.is_empty() {
                break;
            }
            room = room.saturating_sub(entry.size_bytes());
            found.push(entry.clone());
        }
        found
    }

    /// Takes a write's entries, which replace everything from the first one's index on.
    pub(super) fn submit(&mut self, number: u64, entries: &[Entry]) {
        let Some(first) = entries.first() else { return };
        assert!(first.index > self.base.index, "index {} was compacted and cannot be replaced", first.index);
        assert!(first.index <= self.last_index + 1, "index {} would leave a gap in the log", first.index);
        if first.index <= self.last_index {
            self.truncate(first.index);
        }
        entries.iter().for_each(|entry| self.push(entry.clone()));
        self.writes.push_back((number, self.last_index));
        self.evict();
    }

    fn truncate(&mut self, from: Index) {
        self.generation += 1;
        while self.entries.back().is_some_and(|entry| entry.index >= from) {
            self.entries_bytes -= self.entries.pop_back().map_or(0, |entry| entry.size_bytes());
        }
        self.terms.truncate(from);
        self.last_index = from - 1;
        self.durable_index = self.durable_index.min(from - 1);
        for (_, last) in &mut self.writes {
            *last = (*last).min(from - 1);
        }
    }

    fn push(&mut self, entry: Entry) {
        assert_eq!(entry.index, self.last_index + 1, "the log would have a gap");
        self.last_index = entry.index;
        self.terms.push(entry.index, entry.term);
        self.entries_bytes += entry.size_bytes();
        self.entries.push_back(entry);
    }

    /// Moves the base, as an install or a compaction says.
    pub(super) fn install(&mut self, Install { base, keep_suffix }: Install) {
        self.generation += 1;
        if keep_suffix {
            assert!(
                base.index <= self.last_index,
                "the log does not hold the entry that it should be compacted to"
            );
            while self.entries.front().is_some_and(|entry| entry.index <= base.index) {
                self.pop_front();
            }
            self.terms.discard(base.index);
        } else {
            self.entries.clear();
            self.entries_bytes = 0;
            self.terms.clear();
            self.last_index = base.index;
            self.durable_index = base.index;
            for (_, last) in &mut self.writes {
                *last = base.index;
            }
        }
        self.base = base;
    }

    /// Every write up to this number is durable.
    pub(super) fn persisted(&mut self, number: u64) {
        while let Some((_, last)) = self.writes.front().copied().filter(|(written, _)| *written <= number) {
            self.writes.pop_front();
            self.durable_index = self.durable_index.max(last);
        }
        self.evict();
    }

    fn evict(&mut self) {
        while self.entries_bytes > self.max_bytes
            && self.entries.front().is_some_and(|entry| entry.index <= self.durable_index)
        {
            self.pop_front();
        }
    }

    fn pop_front(&mut self) {
        self.entries_bytes -= self.entries.pop_front().map_or(0, |entry| entry.size_bytes());
    }
}
