//! What a node wants done: writes, messages, answers; and what of it is durable.
//!
//! The one rule that this file keeps: nothing is said in a term, and no vote or
//! entry is acknowledged, before it is durable here (Raft paper, figure 2:
//! "updated on stable storage before responding to RPCs").

use std::collections::VecDeque;

use crate::{
    error::LogError,
    log::Install,
    message::{AppendResponse, Appended, Body, DropReason, Message, Origin},
    node::Node,
    types::{Entry, HardState, Index, NodeId, Role, Term},
};

/// What the driver must do now. See the crate's page for the order.
#[derive(Debug)]
pub struct Ready {
    /// Counts the Readys of this node's life, from 1.
    pub number: u64,
    /// To be made durable.
    pub hard_state: Option<HardState>,
    /// To be made durable, before the entries: the log begins anew after a snapshot.
    pub install: Option<Install>,
    /// To be made durable: replaces everything in the log from the first one's index on.
    pub entries: Vec<Entry>,
    /// May be sent at once, in this order for each peer.
    pub messages: Vec<Message>,
    /// May be sent only once this Ready and all before it are durable.
    pub messages_after_persist: Vec<Message>,
    /// The last index that is known to be committed.
    pub commit_index: Index,
    /// The last index that is committed and durable here: the state machine may be given everything up to it.
    pub deliverable_index: Index,
    /// What became of proposals.
    pub proposals: Vec<ProposalOutcome>,
    /// What became of reads.
    pub reads: Vec<ReadOutcome>,
    /// Peers whose next entry has been discarded here: each needs a snapshot, and then
    /// [`Node::snapshot_finished`](crate::Node::snapshot_finished).
    pub snapshots: Vec<NodeId>,
    /// Present when the role, the term or the known leader changed.
    pub soft_state: Option<SoftState>,
}

impl Ready {
    /// The driver must call [`Node::persisted`](crate::Node::persisted) with this number, once this Ready and all
    /// before it are durable. A Ready for which this is false has nothing to write and nothing that waits for a write.
    pub fn must_persist(&self) -> bool {
        self.has_writes() || !self.messages_after_persist.is_empty()
    }

    /// There is something to write. Otherwise the Ready only waits for those before it.
    pub fn has_writes(&self) -> bool {
        self.hard_state.is_some() || self.install.is_some() || !self.entries.is_empty()
    }

    fn has_news(&self) -> bool {
        !(self.messages.is_empty()
            && self.proposals.is_empty()
            && self.reads.is_empty()
            && self.snapshots.is_empty()
            && self.soft_state.is_none())
    }
}

/// What a node is, and whom it follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SoftState {
    /// The node's role.
    pub role: Role,
    /// Its term.
    pub term: Term,
    /// The leader of that term, where it is known and believed to live.
    pub leader: Option<NodeId>,
}

/// What became of a batch that was given to [`Node::propose`](crate::Node::propose).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProposalOutcome {
    /// As given.
    pub batch_id: u64,
    /// What became of it.
    pub result: ProposalResult,
}

/// What became of a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProposalResult {
    /// It stands in the leader's log. Whether it commits shows when entries of these indexes are delivered: if their
    /// term is another, the batch is lost.
    Appended(Appended),
    /// It is certain that it will not commit.
    Dropped(DropReason),
    /// It was forwarded, and no answer came: it may have been appended, and may commit.
    Unknown,
}

/// What became of a read that was given to [`Node::read_index`](crate::Node::read_index).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReadOutcome {
    /// As given.
    pub read_id: u64,
    /// A state machine that has applied up to this index may serve the read. `None`: ask again.
    pub index: Option<Index>,
}

/// What has gathered since the last Ready.
#[derive(Debug, Default)]
pub(crate) struct Outbox {
    pub(crate) messages: Vec<Message>,
    pub(crate) messages_after_persist: Vec<Message>,
    pub(crate) proposals: Vec<ProposalOutcome>,
    pub(crate) reads: Vec<ReadOutcome>,
    pub(crate) snapshots: Vec<NodeId>,
}

impl Outbox {
    pub(crate) fn proposal(&mut self, batch_id: u64, result: ProposalResult) {
        self.proposals.push(ProposalOutcome { batch_id, result });
    }

    pub(crate) fn read(&mut self, read_id: u64, index: Option<Index>) {
        self.reads.push(ReadOutcome { read_id, index });
    }
}

/// What was reported and handed over, and what of it is durable.
#[derive(Debug)]
pub(crate) struct Reported {
    /// The number of the last Ready.
    number: u64,
    /// The last hard state that was handed over.
    hard_state: HardState,
    /// The last hard state that is known to be durable.
    durable_hard_state: HardState,
    /// Readys that were not confirmed yet, with the hard states that they carried.
    outstanding: VecDeque<(u64, Option<HardState>)>,
    commit_index: Index,
    deliverable_index: Index,
    soft_state: SoftState,
}

impl Reported {
    pub(crate) fn new(hard_state: HardState, commit_index: Index) -> Self {
        Self {
            number: 0,
            hard_state,
            durable_hard_state: hard_state,
            outstanding: VecDeque::new(),
            commit_index,
            deliverable_index: commit_index,
            soft_state: SoftState { role: Role::Follower, term: hard_state.term, leader: None },
        }
    }

    pub(crate) fn deliverable_index(&self) -> Index {
        self.deliverable_index
    }
}

impl Node {
    /// What is to be done now, or `None` until something happens. Call it until it is `None`, after any other call.
    ///
    /// Several Readys may be under way; each must be written in the order of their numbers.
    ///
    /// # Errors
    /// The log could not be read: the process must stop.
    pub fn ready(&mut self) -> Result<Option<Ready>, LogError> {
        self.start_reads();
        self.replicate()?;

        let number = self.reported.number + 1;
        let hard_state = (self.hard_state != self.reported.hard_state).then_some(self.hard_state);
        let has_writes = hard_state.is_some() || self.log.has_unwritten();
        if !has_writes && self.reported.outstanding.is_empty() {
            // What they waited for has become durable meanwhile.
            self.outbox.messages.append(&mut self.outbox.messages_after_persist);
        }
        let soft_state = self.soft_state();
        let deliverable_index =
            self.reported.deliverable_index.max(self.commit_index.min(self.log.durable()));
        let moved = (self.reported.commit_index, self.reported.deliverable_index)
            != (self.commit_index, deliverable_index);
        let (install, entries) = self.log.hand_over(number);
        let outbox = std::mem::take(&mut self.outbox);
        let ready = Ready {
            number,
            hard_state,
            install,
            entries,
            messages: outbox.messages,
            messages_after_persist: outbox.messages_after_persist,
            commit_index: self.commit_index,
            deliverable_index,
            proposals: outbox.proposals,
            reads: outbox.reads,
            snapshots: outbox.snapshots,
            soft_state: (soft_state != self.reported.soft_state).then_some(soft_state),
        };
        if !(ready.must_persist() || ready.has_news() || moved) {
            return Ok(None);
        }
        self.reported.number = number;
        self.reported.hard_state = self.hard_state;
        self.reported.commit_index = self.commit_index;
        self.reported.deliverable_index = deliverable_index;
        self.reported.soft_state = soft_state;
        if ready.must_persist() {
            self.reported.outstanding.push_back((number, hard_state));
        }
        Ok(Some(ready))
    }

    /// Everything in the Readys up to this number is durable, and the [`Log`](crate::Log) shows it.
    ///
    /// # Panics
    /// If no such Ready was handed out: a driver that confirms what it was not given cannot be trusted with the rest.
    pub fn persisted(&mut self, number: u64) {
        assert!(number <= self.reported.number, "Ready {number} was never handed out");
        let done = self.reported.outstanding.partition_point(|(outstanding, _)| *outstanding <= number);
        for (_, hard_state) in self.reported.outstanding.drain(..done) {
            self.reported.durable_hard_state = hard_state.unwrap_or(self.reported.durable_hard_state);
        }
        self.log.persisted(number);
        self.count_own_vote();
        self.advance_commit();
    }

    /// Whether term, vote and standing, as they are now, would survive a crash.
    pub(crate) fn hard_state_is_durable(&self) -> bool {
        self.reported.durable_hard_state == self.hard_state
    }

    pub(crate) fn send(&mut self, to: NodeId, body: Body) {
        self.send_in_term(to, self.hard_state.term, body);
    }

    /// Files a message where it may leave without claiming what a crash could undo.
    pub(crate) fn send_in_term(&mut self, to: NodeId, term: Term, body: Body) {
        let acknowledged = match &body {
            Body::AppendResponse(AppendResponse::Matched(index)) => *index,
            _ => 0,
        };
        let durable = self.hard_state_is_durable() && acknowledged <= self.log.durable();
        let message = Origin { term, ..self.origin() }.message(to, body);
        if durable {
            self.outbox.messages.push(message);
        } else {
            self.outbox.messages_after_persist.push(message);
        }
    }
}
