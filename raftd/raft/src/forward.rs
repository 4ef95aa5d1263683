//! Proposals: appended by a leader, forwarded by a follower, refused when nobody leads.
//!
//! Nothing is queued here. A batch is appended, is on its way to the leader, or
//! is dropped at once with the reason. A forwarded batch whose answer does not
//! come is *unknown*, which is not the same as dropped: it may still commit.

use std::collections::{BTreeMap, VecDeque};

use bytes::Bytes;

use crate::{
    error::ProposeError,
    message::{Appended, Body, DropReason, ForwardOutcome},
    node::{Node, State},
    ready::{Outbox, ProposalResult},
    types::NodeId,
};

/// What a batch and each of its payloads count for, beside their bytes.
const OVERHEAD_BYTES: usize = 40;

/// Batches that the leader was handed, and whose answers are still to come.
#[derive(Debug)]
pub(crate) struct Forwarded {
    /// Its upper half names this life of the node, its lower half counts the batches in it: the leader refuses what
    /// it has seen before, whatever the network repeats.
    next_id: u64,
    batches: BTreeMap<u64, Batch>,
    bytes: usize,
}

#[derive(Debug)]
struct Batch {
    /// As the driver calls it.
    batch_id: u64,
    bytes: usize,
    sent_at_tick: u64,
}

impl Forwarded {
    pub(crate) fn new(life: u32) -> Self {
        Self { next_id: u64::from(life) << 32, batches: BTreeMap::new(), bytes: 0 }
    }

    /// Nobody will answer any more. Each batch may or may not have been appended.
    pub(crate) fn abandon(&mut self, outbox: &mut Outbox) {
        for batch in std::mem::take(&mut self.batches).into_values() {
            outbox.proposal(batch.batch_id, ProposalResult::Unknown);
        }
        self.bytes = 0;
    }

    fn answer(&mut self, id: u64, result: ProposalResult, outbox: &mut Outbox) {
        if let Some(batch) = self.batches.remove(&id) {
            self.bytes -= batch.bytes;
            outbox.proposal(batch.batch_id, result);
        }
    }
}

/// How many lives of a peer are remembered: a copy would have to be delayed over this many restarts to pass as new.
const REMEMBERED_LIVES: usize = 16;

/// Which batches of a peer this leader has taken: of each of the peer's lives, most recently heard last, the highest id.
/// Ids rise within a life, and no order is known among lives, so each life is remembered by itself.
#[derive(Debug, Default)]
pub(crate) struct TakenBatches(VecDeque<u64>);

impl TakenBatches {
    /// Notes a batch; false if it, or a later one of that life, has been taken before.
    fn is_new(&mut self, id: u64) -> bool {
        let same_life = self.0.iter().position(|last| last >> 32 == id >> 32);
        let last = same_life.and_then(|position| self.0.remove(position));
        if self.0.len() == REMEMBERED_LIVES {
            self.0.pop_front();
        }
        self.0.push_back(last.map_or(id, |last| last.max(id)));
        last.is_none_or(|last| id > last)
    }
}

impl Node {
    /// Proposes payloads, which become consecutive entries; what became of them comes in a [`Ready`](crate::Ready).
    /// Choose `batch_id` as you like: the core does not compare it with others.
    ///
    /// # Errors
    /// The batch is empty.
    pub fn propose(&mut self, batch_id: u64, payloads: Vec<Bytes>) -> Result<(), ProposeError> {
        if payloads.is_empty() {
            return Err(ProposeError::EmptyBatch);
        }
        match self.state {
            State::Leader(_) => {
                let result = match self.append_if_allowed(payloads) {
                    Ok(appended) => ProposalResult::Appended(appended),
                    Err(reason) => ProposalResult::Dropped(reason),
                };
                self.outbox.proposal(batch_id, result);
            }
            State::Follower { leader: Some(leader) } => self.forward(leader, batch_id, payloads),
            State::Follower { leader: None } | State::PreCandidate(_) | State::Candidate(_) => {
                self.outbox.proposal(batch_id, ProposalResult::Dropped(DropReason::NoLeader));
            }
        }
        Ok(())
    }

    fn append_if_allowed(&mut self, payloads: Vec<Bytes>) -> Result<Appended, DropReason> {
        let State::Leader(leader) = &self.state else { return Err(DropReason::NoLeader) };
        if leader.transfer.is_some() {
            return Err(DropReason::Transferring);
        }
        if self.out_of_room {
            return Err(DropReason::OutOfRoom);
        }
        if !leader.has_room(size_bytes(&payloads), &self.options) {
            return Err(DropReason::Overloaded);
        }
        Ok(self.append_payloads(payloads))
    }

    fn forward(&mut self, leader: NodeId, batch_id: u64, payloads: Vec<Bytes>) {
        let bytes = OVERHEAD_BYTES + size_bytes(&payloads);
        let forwarded = &mut self.forwarded;
        if forwarded.bytes > 0 && forwarded.bytes.saturating_add(bytes) > self.options.max_forwarded_bytes {
            self.outbox.proposal(batch_id, ProposalResult::Dropped(DropReason::Overloaded));
            return;
        }
        let id = forwarded.next_id;
        forwarded.next_id = id.wrapping_add(1);
        forwarded.bytes += bytes;
        forwarded.batches.insert(id, Batch { batch_id, bytes, sent_at_tick: self.ticks });
        self.send(leader, Body::Forward { batch_id: id, payloads });
    }

    pub(crate) fn handle_forward(&mut self, from: NodeId, batch_id: u64, payloads: Vec<Bytes>) {
        // Whoever is asked in its own term once led that term. If it no longer does, it may have taken a first copy of
        // this batch before it stepped down: it cannot say "dropped", so it says nothing.
        let State::Leader(leader) = &mut self.state else { return };
        if !leader.taken.entry(from).or_default().is_new(batch_id) {
            // The first copy has been answered. An answer to this one could only contradict it.
            return;
        }
        let outcome = self.append_if_allowed(payloads);
        self.send(from, Body::ForwardResponse { batch_id, outcome });
    }

    /// Only the leader that was handed the batch may answer: on a change of leader or term the batch is given up, and
    /// ids are never used twice.
    pub(crate) fn handle_forward_response(&mut self, from: NodeId, batch_id: u64, outcome: ForwardOutcome) {
        if self.leader() != Some(from) {
            return;
        }
        let result = match outcome {
            Ok(appended) => ProposalResult::Appended(appended),
            Err(reason) => ProposalResult::Dropped(reason),
        };
        self.forwarded.answer(batch_id, result, &mut self.outbox);
    }

    /// Gives up batches whose answer must have been lost.
    pub(crate) fn expire_forwarded(&mut self) {
        let patience = 2 * u64::from(self.options.election_ticks);
        while let Some((id, batch)) = self.forwarded.batches.first_key_value() {
            if self.ticks - batch.sent_at_tick < patience {
                return;
            }
            let id = *id;
            self.forwarded.answer(id, ProposalResult::Unknown, &mut self.outbox);
        }
    }
}

/// What payloads count for where bytes are bounded.
fn size_bytes(payloads: &[Bytes]) -> usize {
    payloads.iter().map(|payload| payload.len() + OVERHEAD_BYTES).sum()
}
