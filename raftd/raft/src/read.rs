//! Linearizable reads without a log entry: ReadIndex (dissertation, section 6.4).
//!
//! A leader may say "read at my commit index" once an entry of its term is
//! committed, and once a majority has confirmed, after the read came in, that
//! it still leads. Rounds are numbered within a leadership and travel in
//! heartbeats; all reads that have gathered share one. Leases are not used.

use std::collections::{BTreeMap, VecDeque};

use crate::{
    message::Body,
    node::{Node, State},
    quorum,
    ready::Outbox,
    types::{Index, NodeId},
};

/// A read that is waiting at the leader.
#[derive(Clone, Copy, Debug)]
enum Reader {
    /// Of this node's driver.
    Local(u64),
    /// Of a peer, under the peer's own id.
    Peer(NodeId, u64),
}

/// The reads of a leadership.
#[derive(Debug, Default)]
pub(crate) struct Reads {
    /// The last round that was started.
    round: u64,
    /// Waiting for the next round.
    waiting: Vec<Reader>,
    /// Started and not yet confirmed: the round, the commit index at its start, its reads.
    rounds: VecDeque<(u64, Index, Vec<Reader>)>,
    /// How many reads wait in either.
    pending: usize,
}

impl Reads {
    pub(crate) fn round(&self) -> u64 {
        self.round
    }

    /// The leadership is over. Peers notice by themselves.
    pub(crate) fn abandon(self, outbox: &mut Outbox) {
        let started = self.rounds.into_iter().flat_map(|(_, _, readers)| readers);
        for reader in started.chain(self.waiting) {
            if let Reader::Local(read_id) = reader {
                outbox.read(read_id, None);
            }
        }
    }

    fn begin_round(&mut self, commit_index: Index) {
        self.round += 1;
        self.rounds.push_back((self.round, commit_index, std::mem::take(&mut self.waiting)));
    }
}

/// The reads for which a follower has asked its leader.
#[derive(Debug)]
pub(crate) struct AskedReads {
    /// Never used twice: it begins at random in each life of the node.
    next_id: u64,
    /// Waiting for the next question.
    unasked: Vec<u64>,
    /// Under way: the reads that share the question, and the tick at which it was asked.
    asked: BTreeMap<u64, (Vec<u64>, u64)>,
    pending: usize,
}

impl AskedReads {
    pub(crate) fn new(life: u32) -> Self {
        Self { next_id: u64::from(life) << 32, unasked: Vec::new(), asked: BTreeMap::new(), pending: 0 }
    }

    /// The driver must ask again. A late answer finds nothing, for the next question has another id.
    pub(crate) fn abandon(&mut self, outbox: &mut Outbox) {
        let asked = std::mem::take(&mut self.asked).into_values().flat_map(|(reads, _)| reads);
        for read_id in asked.chain(std::mem::take(&mut self.unasked)) {
            outbox.read(read_id, None);
        }
        self.pending = 0;
    }

    fn answer(&mut self, id: u64, index: Option<Index>, outbox: &mut Outbox) {
        for read_id in self.asked.remove(&id).map(|(reads, _)| reads).unwrap_or_default() {
            outbox.read(read_id, index);
            self.pending -= 1;
        }
    }
}

impl Node {
    /// Asks for an index at which a read is linearizable; the answer comes in a [`Ready`](crate::Ready). Choose
    /// `read_id` as you like: the core does not compare it with others.
    pub fn read_index(&mut self, read_id: u64) {
        let room = self.options.max_pending_reads;
        match &mut self.state {
            State::Leader(leader) if leader.reads.pending < room => {
                leader.reads.pending += 1;
                leader.reads.waiting.push(Reader::Local(read_id));
            }
            State::Follower { leader: Some(_) } if self.asked_reads.pending < room => {
                self.asked_reads.pending += 1;
                self.asked_reads.unasked.push(read_id);
            }
            _ => self.outbox.read(read_id, None),
        }
    }

    pub(crate) fn handle_read_index(&mut self, from: NodeId, read_id: u64) {
        let room = self.options.max_pending_reads;
        match &mut self.state {
            State::Leader(leader) if leader.reads.pending < room => {
                leader.reads.pending += 1;
                leader.reads.waiting.push(Reader::Peer(from, read_id));
            }
            _ => self.send(from, Body::ReadIndexResponse { read_id, index: None }),
        }
    }

    /// Only the leader that was asked may answer: on a change of leader or term the question is forgotten, and ids
    /// are never used twice, so that an answer to an earlier question or leadership finds nothing.
    pub(crate) fn handle_read_index_response(&mut self, from: NodeId, read_id: u64, index: Option<Index>) {
        if self.leader() == Some(from) {
            self.asked_reads.answer(read_id, index, &mut self.outbox);
        }
    }

    /// Sends off the reads that have gathered: a leader in a new round, a follower in one question.
    pub(crate) fn start_reads(&mut self) {
        let origin = self.origin();
        match &mut self.state {
            State::Leader(leader) => {
                // Before its no-op commits, a new leader does not know how far its predecessors had committed.
                if leader.reads.waiting.is_empty() || self.commit_index < leader.first_index {
                    return;
                }
                leader.reads.begin_round(self.commit_index);
                leader.heartbeat(origin, self.commit_index, &mut self.outbox);
                self.finish_reads();
            }
            State::Follower { leader: Some(leader) } if !self.asked_reads.unasked.is_empty() => {
                let leader = *leader;
                let read_id = self.asked_reads.next_id;
                self.asked_reads.next_id = read_id.wrapping_add(1);
                let reads = std::mem::take(&mut self.asked_reads.unasked);
                self.asked_reads.asked.insert(read_id, (reads, self.ticks));
                self.send(leader, Body::ReadIndex { read_id });
            }
            _ => {}
        }
    }

    /// Answers the reads whose round a majority has confirmed.
    pub(crate) fn finish_reads(&mut self) {
        let State::Leader(leader) = &mut self.state else { return };
        let own = self.options.id;
        let confirmed = quorum::reached(&self.options.voters, |node| {
            if node == own { leader.reads.round } else { leader.progress[&node].counted_read_round() }
        });
        let mut answers = Vec::new();
        let done = leader.reads.rounds.partition_point(|(round, _, _)| *round <= confirmed);
        for (_, index, readers) in leader.reads.rounds.drain(..done) {
            leader.reads.pending -= readers.len();
            answers.extend(readers.into_iter().map(|reader| (reader, index)));
        }
        for (reader, index) in answers {
            match reader {
                Reader::Local(read_id) => self.outbox.read(read_id, Some(index)),
                Reader::Peer(peer, read_id) => {
                    self.send(peer, Body::ReadIndexResponse { read_id, index: Some(index) });
                }
            }
        }
    }

    /// Gives up questions whose answer must have been lost.
    pub(crate) fn expire_reads(&mut self) {
        let patience = u64::from(self.options.election_ticks);
        while let Some((id, (_, asked_at))) = self.asked_reads.asked.first_key_value() {
            if self.ticks - asked_at < patience {
                return;
            }
            let id = *id;
            self.asked_reads.answer(id, None, &mut self.outbox);
        }
    }
}
