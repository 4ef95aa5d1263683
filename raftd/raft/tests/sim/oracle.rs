//! What Raft promises, checked from outside: it sees everything, and nobody asks it anything.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use raft::{Appended, Entry, EntryKind, Index, NodeId, ProposalResult, Ready, Role, Status, Term};

use crate::support::{Contents, Write};

#[derive(Default)]
pub struct Oracle {
    /// Who led each term.
    leaders: BTreeMap<Term, NodeId>,
    /// Every entry ever written, by index and term, with the term before it: equal names mean equal logs.
    entries: BTreeMap<(Index, Term), (Entry, Option<Term>)>,
    /// What was delivered anywhere.
    committed: BTreeMap<Index, Entry>,
    /// Each node's log as the node itself sees it, durable or not.
    logs: BTreeMap<NodeId, Contents>,
    /// The highest commit index seen.
    commit_index: Index,
    /// Where each payload was committed.
    payloads: BTreeMap<Bytes, Index>,
    /// Payloads of which it was said that they never commit.
    dropped: BTreeSet<Bytes>,
    /// Batches without an outcome.
    proposals: BTreeMap<u64, (NodeId, Vec<Bytes>)>,
    /// Reads without an outcome, and what had been delivered when they were asked.
    reads: BTreeMap<u64, (NodeId, Index)>,
    /// Batches that were said to stand in the log.
    appended: usize,
}

impl Oracle {
    pub fn started(&mut self, id: NodeId, durable: &Contents) {
        self.logs.insert(id, durable.clone());
    }

    /// Nobody will hear the outcomes.
    pub fn crashed(&mut self, id: NodeId) {
        self.proposals.retain(|_, (proposer, _)| *proposer != id);
        self.reads.retain(|_, (reader, _)| *reader != id);
    }

    pub fn proposed(&mut self, id: NodeId, batch_id: u64, payloads: &[Bytes]) {
        self.proposals.insert(batch_id, (id, payloads.to_vec()));
    }

    pub fn read_asked(&mut self, id: NodeId, read_id: u64) {
        let delivered = self.committed.last_key_value().map_or(0, |(index, _)| *index);
        self.reads.insert(read_id, (id, delivered));
    }

    /// A node said what it wants done.
    pub fn saw(&mut self, id: NodeId, status: &Status, ready: &Ready, write: Option<&Write>) {
        if let Some(write) = write {
            self.written(id, write);
        }
        if status.role == Role::Leader {
            self.leads(id, status.term);
        }
        assert!(status.commit_index >= ready.deliverable_index);
        for outcome in &ready.proposals {
            let (proposer, payloads) =
                self.proposals.remove(&outcome.batch_id).expect("one outcome for each batch");
            assert_eq!(proposer, id);
            match outcome.result {
                ProposalResult::Appended(appended) => self.stands(appended, &payloads),
                ProposalResult::Dropped(_) => self.dropped.extend(payloads),
                ProposalResult::Unknown => {}
            }
        }
        for outcome in &ready.reads {
            let (reader, delivered) = self.reads.remove(&outcome.read_id).expect("one outcome for each read");
            assert_eq!(reader, id);
            if let Some(index) = outcome.index {
                assert!(index >= delivered, "read {} at {index} misses {delivered}", outcome.read_id);
            }
        }
    }

    /// Log matching: an entry's index and term say what it is, and what comes before it.
    fn written(&mut self, id: NodeId, write: &Write) {
        let log = self.logs.entry(id).or_default();
        log.apply(write);
        for entry in &write.entries {
            let before = log.position(entry.index - 1).expect("no gaps");
            assert!(entry.timestamp_ms >= before.timestamp_ms, "time runs backward at {}", entry.index);
            assert!(entry.term >= before.term, "terms run backward at {}", entry.index);
            let seen =
                self.entries.entry((entry.index, entry.term)).or_insert((entry.clone(), Some(before.term)));
            assert_eq!(*seen, (entry.clone(), Some(before.term)), "two entries of one index and term");
            if let Some(committed) = self.committed.get(&entry.index) {
                // A follower may hold something else where others have committed, but never a later term's entry.
                assert!(
                    committed.term >= entry.term || committed == entry,
                    "{committed:?} could be replaced by {entry:?}"
                );
            }
        }
    }

    /// Election safety and leader completeness.
    fn leads(&mut self, id: NodeId, term: Term) {
        if let Some(leader) = self.leaders.insert(term, id) {
            assert_eq!(leader, id, "term {term} has two leaders");
            return;
        }
        let log = &self.logs[&id];
        for (index, entry) in self.committed.range(log.base.index + 1..) {
            assert_eq!(log.entry(*index), Some(entry), "leader {id} of term {term} lacks a committed entry");
        }
    }

    fn stands(&mut self, appended: Appended, payloads: &[Bytes]) {
        self.appended += 1;
        for (index, payload) in (appended.first_index..).zip(payloads) {
            if let Some((entry, _)) = self.entries.get(&(index, appended.term)) {
                assert_eq!(entry.payload, *payload, "the batch does not stand where it was said to");
            }
        }
    }

    /// State machine safety, and no payload twice or after it was given up.
    pub fn delivered(&mut self, id: NodeId, entry: &Entry) {
        if let Some(committed) = self.committed.get(&entry.index) {
            assert_eq!(committed, entry, "node {id} applies something else");
            return;
        }
        if let Some((_, before)) = self.committed.range(..entry.index).next_back() {
            assert!(before.index + 1 == entry.index && before.timestamp_ms <= entry.timestamp_ms);
        }
        if entry.kind == EntryKind::Payload {
            assert!(!self.dropped.contains(&entry.payload), "a dropped proposal was committed: {entry:?}");
            let earlier = self.payloads.insert(entry.payload.clone(), entry.index);
            assert_eq!(earlier, None, "a payload was committed twice: {entry:?}");
        }
        self.committed.insert(entry.index, entry.clone());
    }

    /// Nothing is called committed before a majority holds it durably.
    pub fn check_commit<'a>(
        &mut self,
        index: Index,
        voters: usize,
        disks: impl Iterator<Item = &'a Contents>,
    ) {
        if index <= self.commit_index {
            return;
        }
        self.commit_index = index;
        let terms: Vec<Option<Term>> = disks
            .map(|disk| if disk.base.index > index { Some(Term::MAX) } else { disk.term(index) })
            .collect();
        let compacted = terms.iter().filter(|term| **term == Some(Term::MAX)).count();
        let most = terms
            .iter()
            .flatten()
            .map(|term| terms.iter().filter(|other| **other == Some(*term)).count())
            .max()
            .unwrap_or(0);
        assert!(most + compacted > voters / 2, "index {index} is called committed: {terms:?}");
    }

    /// With all faults gone, every batch and every read has had its outcome.
    pub fn nothing_left_open(&self, id: NodeId) {
        let proposals: Vec<_> = self.proposals.iter().filter(|(_, (proposer, _))| *proposer == id).collect();
        let reads: Vec<_> = self.reads.iter().filter(|(_, (reader, _))| *reader == id).collect();
        assert!(proposals.is_empty() && reads.is_empty(), "node {id} owes outcomes: {proposals:?} {reads:?}");
    }

    /// What was proposed at each node after the faults stopped is committed.
    pub fn committed_proposals_of_the_end(&self, nodes: usize) {
        assert!(self.appended >= nodes && self.payloads.len() >= nodes);
    }
}
