//! Raft's promises, checked at every step on what the nodes write, become and deliver (Raft paper, figure 3).
//!
//! It sees every node's log through its own reader and knows nothing of SQL.

use std::collections::BTreeMap;

use raft::{Entry, Index, Log, NodeId, Term};
use raftd::store::LogReader;

/// What has been seen so far.
#[derive(Default)]
pub struct Oracle {
    leaders: BTreeMap<Term, NodeId>,
    /// Every entry that was ever handed to a disk, with the term of the entry before it.
    entries: BTreeMap<(Index, Term), (Entry, Term)>,
    /// What was delivered anywhere; the first one is at index 1.
    committed: Vec<Entry>,
}

impl Oracle {
    /// Log matching: an entry's index and term say what it is, and what comes before it. Nothing that was delivered
    /// anywhere is replaced by a later term's entry; timestamps never go backward.
    pub fn written(&mut self, entries: &[Entry], log: &LogReader) {
        let Some(first) = entries.first() else { return };
        let mut previous_term = match log.term(first.index - 1).expect("the window is in memory") {
            Some(term) => term,
            None => panic!("index {} was written after a gap", first.index),
        };
        let mut previous_timestamp_ms = 0;
        for entry in entries {
            assert!(entry.term >= previous_term, "terms go backward at index {}", entry.index);
            assert!(
                entry.timestamp_ms >= previous_timestamp_ms,
                "timestamps go backward at index {}",
                entry.index
            );
            let known = self.entries.entry((entry.index, entry.term));
            let known = known.or_insert_with(|| (entry.clone(), previous_term));
            assert!(
                known.0 == *entry && known.1 == previous_term,
                "log matching: two entries at index {} in term {}",
                entry.index,
                entry.term
            );
            if let Some(committed) = self.committed(entry.index) {
                assert!(
                    committed.term >= entry.term || committed == entry,
                    "index {} was delivered in term {} and replaced in term {}",
                    entry.index,
                    committed.term,
                    entry.term
                );
            }
            (previous_term, previous_timestamp_ms) = (entry.term, entry.timestamp_ms);
        }
    }

    /// Election safety, and leader completeness.
    pub fn leads(&mut self, id: NodeId, term: Term, log: &LogReader) {
        if let Some(first) = self.leaders.insert(term, id) {
            assert_eq!(first, id, "election safety: term {term} has two leaders");
            return;
        }
        let base = log.base().expect("the window is in memory").index;
        // One that leads an earlier term may still believe in itself: it owes what was committed before its own.
        let owed = self.committed.iter().skip(base as usize).take_while(|entry| entry.term < term);
        for committed in owed {
            let term_there = log.term(committed.index).expect("the window is in memory");
            assert_eq!(
                term_there,
                Some(committed.term),
                "leader completeness: node {id} leads term {term} without index {}",
                committed.index
            );
        }
    }

    /// State-machine safety. True: nobody had it before.
    pub fn delivered(&mut self, id: NodeId, entry: &Entry) -> bool {
        if let Some(committed) = self.committed(entry.index) {
            assert_eq!(committed, entry, "state-machine safety: node {id} applies something else");
            return false;
        }
        let last = self.committed.last();
        assert_eq!(entry.index, self.committed.len() as Index + 1, "node {id} leaves out an entry");
        assert!(
            last.is_none_or(|last| last.timestamp_ms <= entry.timestamp_ms),
            "timestamps go backward at the committed index {}",
            entry.index
        );
        self.committed.push(entry.clone());
        true
    }

    fn committed(&self, index: Index) -> Option<&Entry> {
        self.committed.get((index as usize).checked_sub(1)?)
    }

    /// How many elections were won.
    pub fn elections(&self) -> usize {
        self.leaders.len()
    }

    /// How many entries were delivered.
    pub fn last_index(&self) -> Index {
        self.committed.len() as Index
    }
}
