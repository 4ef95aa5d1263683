//! A log on a simulated disk: what was written but not synced may be lost in a crash.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex},
};

use raft::{Entry, HardState, Index, Install, Log, LogError, Message, Position, Ready, Term};

/// What a disk holds.
#[derive(Clone, Debug, Default)]
pub struct Contents {
    pub hard_state: HardState,
    pub base: Position,
    pub entries: Vec<Entry>,
}

/// The part of a Ready that goes to the disk, and the messages that wait for it.
#[derive(Clone, Debug)]
pub struct Write {
    pub number: u64,
    pub hard_state: Option<HardState>,
    pub install: Option<Install>,
    pub entries: Vec<Entry>,
    pub messages_after: Vec<Message>,
}

impl Write {
    /// Takes the durable part out of a Ready.
    pub fn take_from(ready: &mut Ready) -> Self {
        Self {
            number: ready.number,
            hard_state: ready.hard_state,
            install: ready.install,
            entries: std::mem::take(&mut ready.entries),
            messages_after: std::mem::take(&mut ready.messages_after_persist),
        }
    }
}

impl Contents {
    pub fn last(&self) -> Position {
        self.entries.last().map_or(self.base, Entry::position)
    }

    pub fn entry(&self, index: Index) -> Option<&Entry> {
        index.checked_sub(self.base.index + 1).and_then(|offset| self.entries.get(offset as usize))
    }

    pub fn term(&self, index: Index) -> Option<Term> {
        if index == self.base.index {
            Some(self.base.term)
        } else {
            self.entry(index).map(|entry| entry.term)
        }
    }

    pub fn position(&self, index: Index) -> Option<Position> {
        if index == self.base.index { Some(self.base) } else { self.entry(index).map(Entry::position) }
    }

    /// Forgets the entries up to `base`.
    pub fn compact(&mut self, base: Position) {
        assert!(base.index >= self.base.index, "the base moves only up");
        self.entries.retain(|entry| entry.index > base.index);
        self.base = base;
    }

    pub fn apply(&mut self, write: &Write) {
        self.hard_state = write.hard_state.unwrap_or(self.hard_state);
        if let Some(install) = write.install {
            if install.keep_suffix {
                assert_eq!(self.term(install.base.index), Some(install.base.term), "nothing to keep");
            } else {
                self.entries.clear();
            }
            self.compact(install.base);
        }
        if let Some(first) = write.entries.first() {
            assert!(
                first.index > self.base.index && first.index <= self.last().index + 1,
                "a gap: {write:?}"
            );
            self.entries.truncate((first.index - self.base.index - 1) as usize);
            self.entries.extend(write.entries.iter().cloned());
        }
    }
}

/// A disk with writes under way.
#[derive(Debug, Default)]
pub struct Disk {
    /// What the node reads.
    visible: Arc<Mutex<Contents>>,
    /// What survives a crash.
    pub durable: Contents,
    /// Written in order, not synced yet.
    pub pending: VecDeque<Write>,
    /// Writes can be read before they are synced.
    eager: bool,
}

impl Disk {
    /// A disk that holds something from the start.
    pub fn holding(eager: bool, durable: Contents) -> Self {
        let visible = Arc::new(Mutex::new(durable.clone()));
        Self { visible, durable, pending: VecDeque::new(), eager }
    }

    /// The log as the node reads it.
    pub fn log(&self) -> Box<dyn Log + Send> {
        Box::new(Visible(Arc::clone(&self.visible)))
    }

    pub fn write(&mut self, write: Write) {
        if self.eager {
            self.visible.lock().unwrap().apply(&write);
        }
        self.pending.push_back(write);
    }

    /// Makes the oldest writes durable: the number of the last one, and the messages that may leave now.
    pub fn sync(&mut self, writes: usize) -> Option<(u64, Vec<Message>)> {
        let mut messages = Vec::new();
        let mut number = None;
        for write in self.pending.drain(..writes.min(self.pending.len())) {
            self.durable.apply(&write);
            if !self.eager {
                self.visible.lock().unwrap().apply(&write);
            }
            number = Some(write.number);
            messages.extend(write.messages_after);
        }
        number.map(|number| (number, messages))
    }

    /// Loses what was not synced, but for the oldest `survive` writes, which reached the platter unnoticed.
    pub fn crash(&mut self, survive: usize) {
        self.sync(survive);
        self.pending.clear();
        self.visible = Arc::new(Mutex::new(self.durable.clone()));
    }

    pub fn compact(&mut self, index: Index) {
        let base = self.durable.position(index).expect("only what is durable can be compacted");
        self.durable.compact(base);
        self.visible.lock().unwrap().compact(base);
    }
}

struct Visible(Arc<Mutex<Contents>>);

impl Log for Visible {
    fn base(&self) -> Result<Position, LogError> {
        Ok(self.0.lock().unwrap().base)
    }

    fn last_index(&self) -> Result<Index, LogError> {
        Ok(self.0.lock().unwrap().last().index)
    }

    fn term(&self, index: Index) -> Result<Option<Term>, LogError> {
        Ok(self.0.lock().unwrap().term(index))
    }

    fn entries(&self, from: Index, to: Index, max_bytes: usize) -> Result<Vec<Entry>, LogError> {
        let contents = self.0.lock().unwrap();
        let (mut bytes, mut entries) = (0, Vec::new());
        for index in from..=to {
            let entry = contents.entry(index).ok_or_else(|| LogError::new(format!("no entry at {index}")))?;
            bytes += entry.size_bytes();
            if bytes > max_bytes && !entries.is_empty() {
                break;
            }
            entries.push(entry.clone());
        }
        Ok(entries)
    }
}
