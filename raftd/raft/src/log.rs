//! The log as the core sees it: what the store holds, plus a tail that is not durable yet.
//!
//! Invariants: `base <= offset <= last`; every entry in `(base, offset]` is read
//! from the store, every later one is in `tail`; an index is called durable only
//! once the driver said so for exactly the entry that is there now.

use std::collections::VecDeque;

use crate::{
    error::LogError,
    types::{Entry, Index, Position, Term},
};

/// The durable log, read only. The core reads it synchronously, so keep the recent entries and the base in memory.
///
/// It must show every entry of a [`Ready`](crate::Ready) once [`Node::persisted`](crate::Node::persisted) has been
/// called for it. What it shows of writes that are still under way does not matter: the core does not look there.
pub trait Log {
    /// The entry before the first one: all zeros until the log has been compacted. It may only move up, to an entry
    /// that was deliverable.
    fn base(&self) -> Result<Position, LogError>;

    /// The last entry's index, or the base's. Read only when a node is made.
    fn last_index(&self) -> Result<Index, LogError>;

    /// The term of an entry, or of the base; `None` outside.
    fn term(&self, index: Index) -> Result<Option<Term>, LogError>;

    /// The entries `from..=to`, all of them above the base, cut off before the one that would make more than
    /// `max_bytes` (see [`Entry::size_bytes`]), but never before the first.
    fn entries(&self, from: Index, to: Index, max_bytes: usize) -> Result<Vec<Entry>, LogError>;
}

/// A new beginning of the log, from a snapshot. The driver carries it out before it appends the entries of the same
/// [`Ready`](crate::Ready).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Install {
    /// The last entry that the snapshot covers: the log's new base.
    pub base: Position,
    /// The log holds that entry: discard only what comes before. Otherwise discard the whole log, which conflicts
    /// with the snapshot or ends before it.
    pub keep_suffix: bool,
}

/// The store and the unstable tail as one log.
pub(crate) struct RaftLog {
    store: Box<dyn Log + Send>,
    /// A base that the store does not show yet.
    installing: Option<Position>,
    /// An install that was not handed to the driver yet.
    install: Option<Install>,
    /// The number of the Ready whose persistence ends the last install.
    install_number: u64,
    /// The last index that is read from the store.
    offset: Index,
    /// The entries after `offset`.
    tail: VecDeque<Entry>,
    /// The last entry, or the base.
    last: Position,
    /// The last index that was handed to the driver to be written.
    handed: Index,
    /// The last index that is known to be durable.
    durable: Index,
    /// Writes that were handed over: the number of the Ready, and the last index that it makes durable. An index
    /// that has been replaced since is not counted.
    writes: VecDeque<(u64, Index)>,
}

impl RaftLog {
    pub(crate) fn new(store: Box<dyn Log + Send>) -> Result<Self, LogError> {
        let base = store.base()?;
        let last_index = store.last_index()?;
        let mut log = Self {
            store,
            installing: None,
            install: None,
            install_number: 0,
            offset: last_index,
            tail: VecDeque::new(),
            last: base,
            handed: last_index,
            durable: last_index,
            writes: VecDeque::new(),
        };
        if last_index > base.index {
            log.last = log.stored_entries(last_index, last_index, 1)?[0].position();
        }
        Ok(log)
    }

    pub(crate) fn base(&self) -> Result<Position, LogError> {
        self.installing.map_or_else(|| self.store.base(), Ok)
    }

    pub(crate) fn last(&self) -> Position {
        self.last
    }

    pub(crate) fn durable(&self) -> Index {
        self.durable
    }

    /// The term at an index; `None` before the base and after the end.
    pub(crate) fn term(&self, index: Index) -> Result<Option<Term>, LogError> {
        if index >= self.last.index {
            return Ok((index == self.last.index).then_some(self.last.term));
        }
        if index > self.offset {
            return Ok(Some(self.tail[self.tail_position(index)].term));
        }
        let base = self.base()?;
        if index <= base.index {
            return Ok((index == base.index).then_some(base.term));
        }
        match self.store.term(index)? {
            Some(term) => Ok(Some(term)),
            // A compaction since the line above is the one honest reason; the next look at the base will show it.
            None if self.store.base()?.index > index => Ok(None),
            None => Err(LogError::new(format!("the entry at index {index} is missing"))),
        }
    }

    /// The last index in `low..=high` whose term is at most `term`; `low` if there is none above it. Terms never
    /// decrease in a log, so that a binary search finds it.
    pub(crate) fn last_with_term_at_most(
        &self,
        low: Index,
        high: Index,
        term: Term,
    ) -> Result<Index, LogError> {
        let (mut found, mut unknown) = (low, high);
        while found < unknown {
            let middle = unknown - (unknown - found) / 2;
            match self.term(middle)? {
                Some(there) if there > term => unknown = middle - 1,
                _ => found = middle,
            }
        }
        Ok(found)
    }

    /// Entries from `from` on, at most `max_bytes` of them but at least one if there is one.
    pub(crate) fn entries(&self, from: Index, max_bytes: usize) -> Result<Vec<Entry>, LogError> {
        let mut entries = Vec::new();
        let mut room = max_bytes;
        if from <= self.offset {
            entries = self.stored_entries(from, self.offset, max_bytes)?;
            if entries.last().is_some_and(|entry| entry.index < self.offset) {
                return Ok(entries);
            }
            room = room.saturating_sub(entries.iter().map(Entry::size_bytes).sum());
        }
        let start = from.max(self.offset + 1);
        if start > self.last.index {
            return Ok(entries);
        }
        for entry in self.tail.range(self.tail_position(start)..) {
            if entry.size_bytes() > room && !entries.is_empty() {
                break;
            }
            room = room.saturating_sub(entry.size_bytes());
            entries.push(entry.clone());
        }
        Ok(entries)
    }

    fn stored_entries(&self, from: Index, to: Index, max_bytes: usize) -> Result<Vec<Entry>, LogError> {
        let entries = self.store.entries(from, to, max_bytes)?;
        // One gap here would be sent to every follower.
        let contiguous = entries.iter().zip(from..=to).all(|(entry, index)| entry.index == index);
        if entries.is_empty() || !contiguous || entries.len() as Index > to - from + 1 {
            return Err(LogError::new(format!("the entries from index {from} to {to} are not all there")));
        }
        Ok(entries)
    }

    fn tail_position(&self, index: Index) -> usize {
        // The tail is in memory, so its length and every difference of its indexes fit a usize.
        (index - self.offset - 1) as usize
    }

    /// Appends entries, replacing everything from the first one's index on.
    pub(crate) fn append(&mut self, entries: Vec<Entry>) {
        let (Some(first), Some(last)) = (entries.first(), entries.last()) else { return };
        let (first, last) = (first.index, last.position());
        assert!(
            first <= self.last.index + 1,
            "appending at {first} would leave a gap after {}",
            self.last.index
        );
        let kept = first - 1;
        if kept < self.last.index {
            self.offset = self.offset.min(kept);
            self.tail.truncate((kept - self.offset) as usize);
            self.handed = self.handed.min(kept);
            self.durable = self.durable.min(kept);
            for (_, last_written) in &mut self.writes {
                *last_written = (*last_written).min(kept);
            }
        }
        self.tail.extend(entries);
        self.last = last;
    }

    /// Moves the base to an entry that a snapshot covers.
    pub(crate) fn install(&mut self, base: Position) -> Result<(), LogError> {
        let contained = self.term(base.index)? == Some(base.term);
        // An entry that the store was never given cannot be kept there; what follows it is handed over anew.
        let keep_suffix = contained && self.handed >= base.index;
        if contained {
            let covered = base.index.saturating_sub(self.offset) as usize;
            self.tail.drain(..covered.min(self.tail.len()));
            self.offset = self.offset.max(base.index);
        } else {
            self.tail.clear();
            self.offset = base.index;
            self.last = base;
        }
        if !keep_suffix {
            self.handed = base.index;
            self.durable = 0;
            self.writes.clear();
        }
        let earlier_drops_all = self.install.is_some_and(|install| !install.keep_suffix);
        self.installing = Some(base);
        self.install = Some(Install { base, keep_suffix: keep_suffix && !earlier_drops_all });
        Ok(())
    }

    /// What the driver must write next, as part of the Ready of this number.
    pub(crate) fn hand_over(&mut self, number: u64) -> (Option<Install>, Vec<Entry>) {
        let install = self.install.take();
        if install.is_some() {
            self.install_number = number;
        }
        let entries: Vec<Entry> = if self.handed < self.last.index {
            self.tail.range(self.tail_position(self.handed.max(self.offset) + 1)..).cloned().collect()
        } else {
            Vec::new()
        };
        self.handed = self.last.index;
        if install.is_some() || !entries.is_empty() {
            self.writes.push_back((number, self.last.index));
        }
        (install, entries)
    }

    /// Whether there is something to write.
    pub(crate) fn has_unwritten(&self) -> bool {
        self.install.is_some() || self.handed < self.last.index
    }

    /// Every write up to the Ready of this number is durable.
    pub(crate) fn persisted(&mut self, number: u64) {
        let done = self.writes.partition_point(|(written, _)| *written <= number);
        for (_, last) in self.writes.drain(..done) {
            self.durable = self.durable.max(last);
        }
        while self.tail.front().is_some_and(|entry| entry.index <= self.durable) {
            self.tail.pop_front();
            self.offset += 1;
        }
        if self.install.is_none() && number >= self.install_number {
            self.installing = None;
        }
    }
}
