//! The log as records: the order in which records are written and removed, and what makes a log whole.
//!
//! One writer owns a [`RecordLog`]; readers use [`read_entries`] on the same store. This file knows neither
//! threads nor the hard state: its caller lowers the mark before it truncates and raises it afterwards.
//!
//! Whatever prefix of the changes since the last sync survives a crash, the log stays contiguous: entries are
//! appended upward, a suffix is removed downward, a prefix upward. So at the next start the log may only end
//! with an entry that lacks its last parts, or begin with leftovers below the base. Anything else is damage.

use std::{collections::VecDeque, sync::Arc};

use bytes::{Bytes, BytesMut};
use raft::{Entry, Index, Position, Term};

use super::{
    log_store::{LogStore, LogStoreError},
    record::{self, Content, Key, Link, Part, RecordError},
    term_runs::TermRuns,
};

/// How much is written before it is synced. sled holds what is not synced in memory, and what one power cut can
/// tear should stay within two of its segments.
const SYNC_BYTES: usize = 1 << 20;

/// How many keys are removed before sled is flushed: one large removal kept every touched page in memory.
const REMOVE_BATCH: usize = 256;

/// How many keys a compaction removes at a time, about a millisecond's work: a write that comes meanwhile waits no
/// longer. It is more than the largest group commit adds, so that compaction keeps up.
const DISCARD_BATCH: usize = 32;

/// An index that the log durably reaches, with the term there. Two logs that agree on both are equal up to there
/// (Raft paper, section 5.3, the Log Matching property), so a stale log cannot pass for the one that was marked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Mark {
    /// The last index that is covered; the base's when nothing above it is.
    pub index: Index,
    /// The term of that entry.
    pub term: Term,
}

/// Why a log cannot be recovered.
#[derive(Debug)]
pub(super) enum RecoverError {
    Store(LogStoreError),
    Damaged { index: Index, reason: String },
    NewerFormat(u8),
}

impl From<LogStoreError> for RecoverError {
    fn from(error: LogStoreError) -> Self {
        Self::Store(error)
    }
}

/// The writing side of the log.
pub(super) struct RecordLog {
    store: Arc<dyn LogStore>,
    base: Position,
    last_index: Index,
    terms: TermRuns,
    /// What the next record carries.
    link: Link,
    /// Records may be left that the base made superfluous.
    discarding: bool,
}

impl RecordLog {
    /// Reads the whole log above the base, checks it, and shows every entry to `visit`, ascending.
    ///
    /// This is linear in what is *retained*, not in what was ever written: compaction bounds it. It reads every
    /// retained byte once and hashes it, about a second for each gigabyte that the page cache holds.
    pub(super) fn recover(
        store: Arc<dyn LogStore>,
        base: Position,
        mark: Mark,
        mut visit: impl FnMut(Entry),
    ) -> Result<Self, RecoverError> {
        let mut log = Self::new(store.clone(), base);
        let mut checker = Checker::new(base);
        for item in store.scan(Key::at(0)) {
            let (key, value) = item?;
            log.discarding |= key.first <= base.index;
            checker.take(key, &value, |entry| {
                log.last_index = entry.index;
                log.terms.push(entry.index, entry.term);
                visit(entry);
            })?;
        }
        log.link = checker.link;
        let cut_off = checker.joiner.in_progress();
        if log.last_index < mark.index || log.term(mark.index) != Some(mark.term) {
            return Err(log.missing_mark(mark));
        }
        if cut_off.is_some() {
            // A crash came between the parts of a large entry, so nobody was told that it is durable.
            log.remove_from(Key::at(log.last_index + 1))?;
            log.store.sync()?;
            log.link = log.link_after(log.last_index)?;
        }
        Ok(log)
    }

    /// A log that was given up for a snapshot at `base`, whatever the store still holds.
    pub(super) fn begin_at(store: Arc<dyn LogStore>, base: Position) -> Result<Self, LogStoreError> {
        let mut log = Self::new(store, base);
        log.reset(base)?;
        Ok(log)
    }

    fn new(store: Arc<dyn LogStore>, base: Position) -> Self {
        let (terms, link) = (TermRuns::default(), Link::GENESIS);
        Self { store, base, last_index: base.index, terms, link, discarding: false }
    }

    fn missing_mark(&self, mark: Mark) -> RecoverError {
        let found = self.term(mark.index);
        let (index, reason) = match found {
            None => (
                self.last_index + 1,
                format!("the log ends here, but it was durable up to index {}", mark.index),
            ),
            Some(found) => {
                (mark.index, format!("the entry has term {found}, but term {} was durable", mark.term))
            }
        };
        RecoverError::Damaged { index, reason }
    }

    /// The last entry's index, or the base's.
    pub(super) fn last_index(&self) -> Index {
        self.last_index
    }

    /// Records may be left that [`RecordLog::discard_some`] should remove.
    pub(super) fn is_discarding(&self) -> bool {
        self.discarding
    }

    /// The term of an entry, or of the base.
    pub(super) fn term(&self, index: Index) -> Option<Term> {
        if index == self.base.index {
            return Some(self.base.term);
        }
        (index > self.base.index && index <= self.last_index).then(|| self.terms.term_at(index)).flatten()
    }

    /// How far the log reaches.
    pub(super) fn reach(&self) -> Mark {
        let term = self.term(self.last_index).expect("the term of the last entry, or of the base, is known");
        Mark { index: self.last_index, term }
    }

    /// Appends entries that follow the last one. They are durable when this returns.
    pub(super) fn append(&mut self, entries: &[Entry]) -> Result<(), LogStoreError> {
        let mut unsynced = 0;
        let mut rest = entries;
        while let [first, ..] = rest {
            assert_eq!(first.index, self.last_index + 1, "the log would have a gap");
            let count = if record::is_large(first) {
                self.append_parts(first, &mut unsynced)?;
                1
            } else {
                let count = record::fitting(rest);
                self.put(record::encode_entries(&rest[..count], self.link), &mut unsynced)?;
                count
            };
            for entry in &rest[..count] {
                self.terms.push(entry.index, entry.term);
                self.last_index = entry.index;
            }
            rest = &rest[count..];
        }
        self.store.sync()
    }

    fn append_parts(&mut self, entry: &Entry, unsynced: &mut usize) -> Result<(), LogStoreError> {
        for part in 0..record::part_count(entry) {
            self.put(record::encode_part(entry, part, self.link), unsynced)?;
        }
        Ok(())
    }

    fn put(&mut self, (key, value): (Key, Vec<u8>), unsynced: &mut usize) -> Result<(), LogStoreError> {
        if *unsynced + value.len() > SYNC_BYTES {
            self.store.sync()?;
            *unsynced = 0;
        }
        *unsynced += value.len();
        self.link = Link::to(&value);
        self.store.insert(key, value)
    }

    /// Removes the entries from this index on; it is above the base. Durable when this returns.
    pub(super) fn truncate(&mut self, from: Index) -> Result<(), LogStoreError> {
        assert!(from > self.base.index, "what was compacted can no longer be in conflict");
        self.remove_from(Key::at(from))?;
        if let Some((key, value)) = self.store.at_or_before(Key::end_of(from - 1))? {
            let record = record::decode(key, &value).map_err(|error| damaged(key, &error))?;
            if let Content::Entries(mut entries) = record.content
                && entries.last().is_some_and(|entry| entry.index >= from)
            {
                // The conflict lies inside a record: what comes before it stays.
                entries.retain(|entry| entry.index < from);
                let (key, value) = record::encode_entries(&entries, record.link);
                self.store.insert(key, value)?;
            }
        }
        self.store.sync()?;
        self.last_index = from - 1;
        self.terms.truncate(from);
        self.link = self.link_after(self.last_index)?;
        Ok(())
    }

    /// Moves the base up to an entry of the log. The records before it go with [`RecordLog::discard_some`].
    pub(super) fn compact(&mut self, base: Position) {
        assert!(base.index <= self.last_index, "only what is in the log can be compacted");
        self.base = base;
        self.terms.discard(base.index);
        self.discarding = true;
    }

    /// Removes one batch of the records that lie wholly below the base; says whether there may be more.
    ///
    /// It needs no sync: the base is durable already, and what a crash brings back is removed at the next start.
    pub(super) fn discard_some(&mut self) -> Result<bool, LogStoreError> {
        if !self.discarding {
            return Ok(false);
        }
        let keep = self.first_kept()?;
        for _ in 0..DISCARD_BATCH {
            let Some(first) = self.store.first_key()?.filter(|key| *key < keep) else {
                self.discarding = false;
                break;
            };
            self.store.discard(first)?;
        }
        self.store.flush()?;
        Ok(self.discarding)
    }

    /// The key from which on records are needed: that of the record that holds the first entry above the base.
    fn first_kept(&self) -> Result<Key, LogStoreError> {
        let first = self.base.index + 1;
        if self.last_index < first {
            return Ok(Key::at(first));
        }
        let holder = self.store.at_or_before(Key::end_of(first))?;
        Ok(Key::at(holder.map_or(first, |(holder, _)| holder.first)))
    }

    /// Empties the log, which begins anew after `base`. Durable when this returns.
    pub(super) fn reset(&mut self, base: Position) -> Result<(), LogStoreError> {
        self.remove_from(Key::at(0))?;
        self.store.sync()?;
        self.base = base;
        self.last_index = base.index;
        self.terms.clear();
        self.link = Link::GENESIS;
        self.discarding = false;
        Ok(())
    }

    fn remove_from(&self, from: Key) -> Result<(), LogStoreError> {
        let mut removed = 0;
        while let Some(last) = self.store.last_key()?.filter(|key| *key >= from) {
            self.store.remove(last)?;
            removed += 1;
            if removed % REMOVE_BATCH == 0 {
                self.store.flush()?;
            }
        }
        Ok(())
    }

    fn link_after(&self, index: Index) -> Result<Link, LogStoreError> {
        let last = self.store.at_or_before(Key::end_of(index))?;
        Ok(last.map_or(Link::GENESIS, |(_, value)| Link::to(&value)))
    }
}

fn damaged(key: Key, error: &RecordError) -> LogStoreError {
    LogStoreError::Damaged(format!("the record at index {}, part {}: {error}", key.first, key.part))
}

/// Checks at a start that the records are one unbroken log.
struct Checker {
    base: Position,
    /// Of the record that must come next; `None` before the first one.
    next: Option<Key>,
    link: Link,
    joiner: Joiner,
    last_term: Term,
}

impl Checker {
    fn new(base: Position) -> Self {
        Self { base, next: None, link: Link::GENESIS, joiner: Joiner::default(), last_term: 0 }
    }

    fn take(&mut self, key: Key, value: &Bytes, mut emit: impl FnMut(Entry)) -> Result<(), RecoverError> {
        let damage = |reason: String| RecoverError::Damaged { index: key.first, reason };
        let record = record::decode(key, value).map_err(|error| match error {
            RecordError::NewerFormat(format) => RecoverError::NewerFormat(format),
            other => damage(other.to_string()),
        })?;
        match self.next {
            Some(next) if key != next => return Err(gap(next, key)),
            Some(_) if record.link != self.link => {
                return Err(damage("the record does not follow the one before it".into()));
            }
            // Records before the first one were compacted away, so that nothing tells its link. It may itself
            // be the rest of a large entry below the base, whose first parts are gone already.
            None if key.first > self.base.index + 1 || (key.part > 0 && key.first > self.base.index) => {
                return Err(gap(Key::at(self.base.index + 1), key));
            }
            Some(_) | None => {}
        }
        self.link = Link::to(value);
        match record.content {
            Content::Entries(entries) => {
                self.next = Some(Key::at(key.first + entries.len() as u64));
                for entry in entries {
                    self.entry(entry, &mut emit)?;
                }
            }
            Content::Part(part) if key.first <= self.base.index => {
                self.next = Some(following(key, &part));
            }
            Content::Part(part) => {
                self.next = Some(following(key, &part));
                if let Some(entry) = self.joiner.push(key, part).map_err(|reason| damage(reason.into()))? {
                    self.entry(entry, &mut emit)?;
                }
            }
        }
        Ok(())
    }

    fn entry(&mut self, entry: Entry, emit: &mut impl FnMut(Entry)) -> Result<(), RecoverError> {
        let damage = |reason: String| Err(RecoverError::Damaged { index: entry.index, reason });
        if entry.index == self.base.index && entry.term != self.base.term {
            return damage(format!(
                "the log was compacted here at term {}, not {}",
                self.base.term, entry.term
            ));
        }
        if entry.index <= self.base.index {
            return Ok(());
        }
        if entry.term < self.last_term.max(self.base.term) {
            return damage(format!("the term goes back to {}", entry.term));
        }
        self.last_term = entry.term;
        emit(entry);
        Ok(())
    }
}

fn following(key: Key, part: &Part) -> Key {
    if part.is_last { Key::at(key.first + 1) } else { Key { first: key.first, part: key.part + 1 } }
}

fn gap(expected: Key, found: Key) -> RecoverError {
    let reason = format!("the record is missing; the next one begins at index {}", found.first);
    RecoverError::Damaged { index: expected.first, reason }
}

/// Puts the parts of a large entry together.
#[derive(Default)]
struct Joiner {
    parts: VecDeque<Bytes>,
    entry: Option<(Entry, usize)>,
}

impl Joiner {
    /// The index of an entry whose last part is yet to come.
    fn in_progress(&self) -> Option<Index> {
        self.entry.as_ref().map(|(entry, _)| entry.index)
    }

    /// Takes the next part; returns the entry with the last one.
    fn push(&mut self, key: Key, part: Part) -> Result<Option<Entry>, &'static str> {
        if usize::from(key.part) != self.parts.len() {
            return Err("a part of the entry is missing");
        }
        let head = Entry { payload: Bytes::new(), ..part.entry };
        let expected = self.entry.get_or_insert_with(|| (head.clone(), part.payload_len));
        if *expected != (head, part.payload_len) {
            return Err("the parts of the entry do not belong together");
        }
        self.parts.push_back(part.entry.payload);
        if !part.is_last {
            return Ok(None);
        }
        let Some((mut entry, payload_len)) = self.entry.take() else { return Ok(None) };
        let mut payload = BytesMut::with_capacity(payload_len);
        self.parts.drain(..).for_each(|piece| payload.extend_from_slice(&piece));
        entry.payload = payload.freeze();
        Ok(Some(entry))
    }
}

/// The entries `from..=to`, cut off before the one that would make more than `max_bytes`, but never before the first.
///
/// Entries that are missing at the end are simply not returned: the caller knows whether they should be there.
pub(super) fn read_entries(
    store: &dyn LogStore,
    from: Index,
    to: Index,
    max_bytes: usize,
) -> Result<Vec<Entry>, LogStoreError> {
    let mut found = Vec::new();
    let Some((start, _)) = store.at_or_before(Key::end_of(from))? else { return Ok(found) };
    let mut room = max_bytes;
    let mut joiner = Joiner::default();
    for item in store.scan(Key::at(start.first)) {
        let (key, value) = item?;
        if key.first > to {
            break;
        }
        let record = record::decode(key, &value).map_err(|error| damaged(key, &error))?;
        let entries = match record.content {
            Content::Entries(entries) => entries,
            Content::Part(_) if key.first < from => continue,
            Content::Part(part) => {
                let joined = joiner.push(key, part);
                joined.map_err(|reason| LogStoreError::Damaged(reason.into()))?.into_iter().collect()
            }
        };
        for entry in entries.into_iter().filter(|entry| (from..=to).contains(&entry.index)) {
            if entry.size_bytes() > room && !found.is_empty() {
                return Ok(found);
            }
            room = room.saturating_sub(entry.size_bytes());
            found.push(entry);
        }
        if room == 0 {
            break;
        }
    }
    Ok(found)
}
