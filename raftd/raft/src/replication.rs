//! Entries on their way from the leader's log into everybody's, and the commit index.
//!
//! Raft paper, sections 5.3 and 5.4.2. Appends are not sent when something
//! happens but when the driver asks what is to be done, so that all that has
//! gathered since then goes out as one message for each peer.

use std::collections::{BTreeMap, VecDeque};

use bytes::Bytes;

use crate::{
    error::{LogError, Malformed, StepError},
    forward::TakenBatches,
    log::RaftLog,
    message::{Append, AppendResponse, Appended, Body, Origin},
    node::{Node, State},
    options::Options,
    progress::Progress,
    quorum,
    read::Reads,
    ready::Outbox,
    transfer::Transfer,
    types::{Entry, EntryKind, Index, NodeId, Position, Term},
};

/// What a node knows only while it leads.
pub(crate) struct Leader {
    pub(crate) progress: BTreeMap<NodeId, Progress>,
    /// The no-op that opened the term. Only entries from here on are committed by counting copies.
    pub(crate) first_index: Index,
    pub(crate) reads: Reads,
    pub(crate) transfer: Option<Transfer>,
    /// Which forwarded batches were taken: none is taken twice.
    pub(crate) taken: BTreeMap<NodeId, TakenBatches>,
    uncommitted: Uncommitted,
    heartbeat_elapsed: u32,
}

/// How much this leader has appended and not yet committed.
#[derive(Default)]
struct Uncommitted {
    /// The last index and the bytes of each batch.
    batches: VecDeque<(Index, usize)>,
    bytes: usize,
}

impl Leader {
    pub(crate) fn new(options: &Options, last: Position, tick: u64) -> Self {
        Self {
            progress: options.peers().map(|peer| (peer, Progress::new(last.index + 1, tick))).collect(),
            first_index: last.index + 1,
            reads: Reads::default(),
            transfer: None,
            taken: BTreeMap::new(),
            uncommitted: Uncommitted::default(),
            heartbeat_elapsed: 0,
        }
    }

    /// Whether another batch of this size fits under the bound.
    pub(crate) fn has_room(&self, bytes: usize, options: &Options) -> bool {
        self.uncommitted.bytes == 0
            || self.uncommitted.bytes.saturating_add(bytes) <= options.max_uncommitted_bytes
    }

    /// A heartbeat for everybody. It never names a commit index beyond what the peer is known to hold: what lies
    /// there in the peer's log may be something else.
    pub(crate) fn heartbeat(&mut self, origin: Origin, commit_index: Index, outbox: &mut Outbox) {
        let read_round = self.reads.round();
        for (peer, progress) in &mut self.progress {
            let commit_index = commit_index.min(progress.matched());
            progress.commit_told = progress.commit_told.max(commit_index);
            let body = Body::Heartbeat { commit_index, read_round };
            outbox.messages.push(origin.message(*peer, body));
        }
    }
}

/// What sending to one peer needs to know of the leader.
struct Sender<'a> {
    options: &'a Options,
    log: &'a RaftLog,
    origin: Origin,
    commit_index: Index,
    now_tick: u64,
}

impl Sender<'_> {
    /// Sends a peer what it may have now: entries, a probe, or the news of a commit.
    fn send_to(&self, peer: NodeId, progress: &mut Progress, outbox: &mut Outbox) -> Result<(), LogError> {
        let Options { max_inflight_appends, max_inflight_bytes, .. } = *self.options;
        while progress.may_send(max_inflight_appends, max_inflight_bytes)
            && (progress.next() <= self.log.last().index || progress.must_probe())
        {
            if !self.send_append(peer, progress, self.options.max_append_bytes, outbox)? {
                return Ok(());
            }
        }
        let commit_index = self.commit_index.min(progress.matched());
        if progress.commit_told < commit_index {
            // Followers answer clients of their own: they hear of a commit now, not with the next heartbeat.
            progress.commit_told = commit_index;
            self.push(peer, Body::Heartbeat { commit_index, read_round: 0 }, outbox);
        }
        Ok(())
    }

    /// Sends one append; false if the peer needs a snapshot instead.
    fn send_append(
        &self,
        peer: NodeId,
        progress: &mut Progress,
        max_bytes: usize,
        outbox: &mut Outbox,
    ) -> Result<bool, LogError> {
        let previous_index = progress.next() - 1;
        let Some(previous_term) = self.log.term(previous_index)? else {
            if progress.was_heard_within(self.options.election_ticks, self.now_tick) {
                progress.await_snapshot();
                outbox.snapshots.push(peer);
            }
            return Ok(false);
        };
        let entries = match max_bytes {
            0 => Vec::new(),
            _ if progress.next() > self.log.last().index => Vec::new(),
            _ => self.log.entries(progress.next(), max_bytes)?,
        };
        let bytes = entries.iter().map(Entry::size_bytes).sum();
        let append = Append { previous_index, previous_term, entries, commit_index: self.commit_index };
        progress.sent(append.last_index(), bytes);
        if progress.is_replicating() {
            progress.commit_told = progress.commit_told.max(self.commit_index.min(append.last_index()));
        }
        self.push(peer, Body::Append(append), outbox);
        Ok(true)
    }

    fn push(&self, to: NodeId, body: Body, outbox: &mut Outbox) {
        outbox.messages.push(self.origin.message(to, body));
    }
}

impl Node {
    /// On a leader: sends every peer what it may have now.
    pub(crate) fn replicate(&mut self) -> Result<(), LogError> {
        let origin = self.origin();
        let State::Leader(leader) = &mut self.state else { return Ok(()) };
        let sender = Sender {
            options: &self.options,
            log: &self.log,
            origin,
            commit_index: self.commit_index,
            now_tick: self.ticks,
        };
        for (peer, progress) in &mut leader.progress {
            sender.send_to(*peer, progress, &mut self.outbox)?;
            if std::mem::take(&mut progress.check_due) {
                sender.send_append(*peer, progress, 0, &mut self.outbox)?;
            }
        }
        Ok(())
    }

    pub(crate) fn tick_leader(&mut self) {
        let origin = self.origin();
        let State::Leader(leader) = &mut self.state else { return };
        leader.heartbeat_elapsed += 1;
        let (own, patience, now) = (self.options.id, self.options.election_ticks, self.ticks);
        let heard = |node| node == own || leader.progress[&node].counts_as_heard(patience, now);
        if !quorum::holds(&self.options.voters, heard) {
            // Cut off from the majority, which may have another leader by now: stop promising anything.
            self.become_follower(self.hard_state.term, None);
            return;
        }
        if leader.heartbeat_elapsed >= self.options.heartbeat_ticks {
            leader.heartbeat_elapsed = 0;
            leader.heartbeat(origin, self.commit_index, &mut self.outbox);
            for progress in leader.progress.values_mut() {
                progress.check_due = progress.is_stalled_at_heartbeat();
            }
        }
        self.tick_transfer();
    }

    /// Opens the term with an entry of its own: only entries of this term commit by counting, and they take all
    /// earlier ones with them.
    pub(crate) fn append_noop(&mut self) {
        self.append_own(EntryKind::Noop, vec![Bytes::new()]);
    }

    /// Appends payloads to the leader's log, and says where they stand.
    pub(crate) fn append_payloads(&mut self, payloads: Vec<Bytes>) -> Appended {
        let (first, bytes) = self.append_own(EntryKind::Payload, payloads);
        let last_index = self.log.last().index;
        if let State::Leader(leader) = &mut self.state {
            leader.uncommitted.batches.push_back((last_index, bytes));
            leader.uncommitted.bytes += bytes;
        }
        first
    }

    fn append_own(&mut self, kind: EntryKind, payloads: Vec<Bytes>) -> (Appended, usize) {
        let last = self.log.last();
        let term = self.hard_state.term;
        // Whatever the clocks of successive leaders say, time in the log does not run backward.
        let timestamp_ms = self.now_ms.max(last.timestamp_ms);
        let first_index = last.index + 1;
        let entries: Vec<Entry> = (first_index..)
            .zip(payloads)
            .map(|(index, payload)| Entry { index, term, kind, timestamp_ms, payload })
            .collect();
        let bytes = entries.iter().map(Entry::size_bytes).sum();
        self.log.append(entries);
        (Appended { first_index, term }, bytes)
    }

    /// On a leader: commits what a majority holds durably, if it is of this term (paper, section 5.4.2, figure 8).
    pub(crate) fn advance_commit(&mut self) {
        let State::Leader(leader) = &mut self.state else { return };
        let (own, durable) = (self.options.id, self.log.durable());
        let held = |node| if node == own { durable } else { leader.progress[&node].counted_matched() };
        let index = quorum::reached(&self.options.voters, held);
        if index < leader.first_index || index <= self.commit_index {
            return;
        }
        self.commit_index = index;
        let done = leader.uncommitted.batches.partition_point(|(last, _)| *last <= index);
        for (_, bytes) in leader.uncommitted.batches.drain(..done) {
            leader.uncommitted.bytes -= bytes;
        }
    }

    /// A follower learns how far the log is committed.
    fn commit_up_to(&mut self, index: Index) {
        self.commit_index = self.commit_index.max(index);
    }

    pub(crate) fn handle_append(&mut self, from: NodeId, append: Append) -> Result<(), StepError> {
        let last_index = append.last_index();
        let commit_index = append.commit_index.min(last_index);
        if !self.holds_previous(&append)? {
            let response = self.reject(&append)?;
            self.send(from, Body::AppendResponse(response));
            return Ok(());
        }
        let continues = append.previous_index == self.log.last().index;
        if continues
            && append.entries.first().is_some_and(|first| first.timestamp_ms < self.log.last().timestamp_ms)
        {
            return Err(Malformed::TimestampsGoBackward.into());
        }
        self.append_new(append.entries)?;
        self.commit_up_to(commit_index);
        // Late or repeated, the leader may know that everything up to the commit index equals its own log.
        let matched = last_index.max(self.commit_index);
        self.send(from, Body::AppendResponse(AppendResponse::Matched(matched)));
        Ok(())
    }

    /// Whether the logs agree before the entries that were sent. Below the commit index they do, even where this log
    /// has discarded the entry and can no longer compare: a purged predecessor is no conflict.
    fn holds_previous(&self, append: &Append) -> Result<bool, LogError> {
        Ok(append.previous_index <= self.commit_index
            || self.log.term(append.previous_index)? == Some(append.previous_term))
    }

    /// Appends those entries that this log does not hold yet, and truncates only where one of them conflicts: a late
    /// append must not cut off what came after it.
    fn append_new(&mut self, mut entries: Vec<Entry>) -> Result<(), LogError> {
        let base = self.log.base()?;
        let mut held = 0;
        for entry in &entries {
            if entry.index > base.index {
                let term = self.log.term(entry.index)?;
                if term != Some(entry.term) {
                    assert!(
                        entry.index > self.commit_index,
                        "the leader's entry {} of term {} conflicts with a committed one of term {term:?}",
                        entry.index,
                        entry.term
                    );
                    break;
                }
            }
            held += 1;
        }
        self.log.append(entries.split_off(held));
        Ok(())
    }

    /// Says where the logs may agree: the last entry here that is not of a later term than the leader's there. The
    /// committed prefix agrees in any case.
    fn reject(&self, append: &Append) -> Result<AppendResponse, LogError> {
        let previous_index = append.previous_index;
        let high = (previous_index - 1).min(self.log.last().index);
        let hint_index = self.log.last_with_term_at_most(self.commit_index, high, append.previous_term)?;
        let hint_term = self.log.term(hint_index)?.unwrap_or(0);
        Ok(AppendResponse::Rejected { previous_index, hint_index, hint_term })
    }

    pub(crate) fn handle_matched(&mut self, from: NodeId, index: Index) -> Result<(), StepError> {
        let State::Leader(leader) = &mut self.state else { return Ok(()) };
        if index > self.log.last().index {
            return Err(Malformed::AcknowledgesTooMuch.into());
        }
        let base = self.log.base()?;
        if let Some(progress) = leader.progress.get_mut(&from) {
            progress.heard_at(self.ticks);
            progress.acknowledged(index, base.index);
        }
        self.advance_commit();
        self.continue_transfer();
        Ok(())
    }

    pub(crate) fn handle_rejected(
        &mut self,
        from: NodeId,
        previous_index: Index,
        hint_index: Index,
        hint_term: Term,
    ) -> Result<(), StepError> {
        let State::Leader(leader) = &mut self.state else { return Ok(()) };
        let Some(progress) = leader.progress.get_mut(&from) else { return Ok(()) };
        progress.heard_at(self.ticks);
        if !progress.is_current_rejection(previous_index) {
            return Ok(());
        }
        // Entries of a later term than the follower's cannot be in its log: skip them all.
        let high = hint_index.min(previous_index - 1);
        let low = progress.matched().max(self.log.base()?.index).min(high);
        progress.rejected(self.log.last_with_term_at_most(low, high, hint_term)?);
        Ok(())
    }

    pub(crate) fn handle_heartbeat(
        &mut self,
        from: NodeId,
        commit_index: Index,
        read_round: u64,
    ) -> Result<(), StepError> {
        let last_index = self.log.last().index;
        if commit_index > last_index && self.counts() {
            // The leader names only what this node has acknowledged. A learner's earlier incarnations may have done
            // that, and the leader forgets it with the answer.
            return Err(StepError::LogLost { acknowledged: commit_index, last_index });
        }
        self.commit_up_to(commit_index.min(last_index));
        self.send(from, Body::HeartbeatResponse { read_round });
        Ok(())
    }

    pub(crate) fn handle_heartbeat_response(
        &mut self,
        from: NodeId,
        read_round: u64,
    ) -> Result<(), StepError> {
        let State::Leader(leader) = &mut self.state else { return Ok(()) };
        if read_round > leader.reads.round() {
            return Err(Malformed::UnknownReadRound.into());
        }
        if let Some(progress) = leader.progress.get_mut(&from) {
            progress.heard_at(self.ticks);
            progress.resume();
            progress.read_round = progress.read_round.max(read_round);
        }
        self.finish_reads();
        self.promote_if_due(from);
        Ok(())
    }
}
