//! What a leader knows about one follower, and how much it may send it.
//!
//! Invariant: `next > matched`. Shipped bugs elsewhere came from letting `next`
//! fall to or below `matched`, so every change goes through here and is asserted.

use std::collections::VecDeque;

use crate::types::{Incarnation, Index, Standing};

/// How entries are sent to a follower.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProgressState {
    /// It is not known where the follower's log parts from the leader's: one append at a time looks for the place.
    Probe,
    /// Appends are pipelined, as far as the window allows.
    Replicate,
    /// The follower needs entries that have been discarded; nothing is sent until it has a snapshot.
    Snapshot,
}

/// A leader's view of a follower.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PeerStatus {
    /// How entries are sent to it.
    pub state: ProgressState,
    /// Its log is known to equal the leader's up to here, durably.
    pub matched_index: Index,
    /// The next index to send.
    pub next_index: Index,
    /// Appends under way.
    pub inflight_appends: usize,
    /// Their bytes.
    pub inflight_bytes: usize,
    /// It was heard of within the last election timeout.
    pub recently_active: bool,
    /// Whether it counts; unknown until this leader has heard it.
    pub standing: Option<Standing>,
}

impl PeerStatus {
    /// Whether it counts, as far as the leader knows: whoever does not cannot be elected.
    pub fn counts(&self) -> bool {
        self.standing.is_none_or(|standing| standing == Standing::Voter)
    }
}

/// The appends under way to one follower.
#[derive(Debug, Default)]
struct Inflight {
    /// The last index and the bytes of each.
    appends: VecDeque<(Index, usize)>,
    bytes: usize,
}

#[derive(Debug)]
pub(crate) struct Progress {
    state: ProgressState,
    matched: Index,
    next: Index,
    inflight: Inflight,
    /// A probe is under way; the next one waits for a sign of life.
    probe_sent: bool,
    /// Something was acknowledged, or sent, since the last heartbeat.
    moved_since_heartbeat: bool,
    /// The highest commit index that the follower was told, as far as it could use it.
    pub(crate) commit_told: Index,
    /// An append without entries is due, to find out whether those under way arrived.
    pub(crate) check_due: bool,
    /// The last read round that the follower confirmed.
    pub(crate) read_round: u64,
    /// The leader's tick at which it was last heard of, or at which the leadership began.
    heard_at_tick: u64,
    /// Who it said it is, once it was heard in this leadership.
    introduced: Option<(Incarnation, Standing)>,
    /// Of a learner: an entry of this term that was appended after it was heard, and is committed without it. 0 when
    /// there is none.
    proof: Index,
}

impl Progress {
    pub(crate) fn new(next: Index, tick: u64) -> Self {
        Self {
            state: ProgressState::Probe,
            matched: 0,
            next,
            inflight: Inflight::default(),
            probe_sent: false,
            moved_since_heartbeat: false,
            commit_told: 0,
            check_due: false,
            read_round: 0,
            heard_at_tick: tick,
            introduced: None,
            proof: 0,
        }
    }

    /// The follower says who it is. A later incarnation has forgotten all that the earlier ones acknowledged.
    pub(crate) fn introduce(&mut self, incarnation: Incarnation, standing: Standing, next: Index, tick: u64) {
        let standing = match self.introduced {
            Some((known, before)) if known == incarnation => standing.max(before),
            Some(_) => {
                *self = Self::new(next, tick);
                standing
            }
            None => standing,
        };
        self.introduced = Some((incarnation, standing));
    }

    pub(crate) fn incarnation(&self) -> Incarnation {
        self.introduced.map_or(0, |(incarnation, _)| incarnation)
    }

    fn standing(&self) -> Option<Standing> {
        self.introduced.map(|(_, standing)| standing)
    }

    /// Whether the follower counts. One that was not heard yet has acknowledged nothing that could be counted, and
    /// gets the benefit of the doubt until an election timeout has passed.
    pub(crate) fn counts(&self) -> bool {
        self.standing().is_none_or(|standing| standing == Standing::Voter)
    }

    /// A learner for which no entry was appended yet.
    pub(crate) fn needs_proof(&self) -> bool {
        self.standing() == Some(Standing::Learner) && self.proof == 0
    }

    pub(crate) fn set_proof(&mut self, index: Index) {
        self.proof = index;
    }

    /// Whether it is a learner that may count again.
    pub(crate) fn has_proof(&self, commit_index: Index) -> bool {
        let held = self.matched.min(commit_index);
        self.standing() == Some(Standing::Learner) && self.proof != 0 && held >= self.proof
    }

    pub(crate) fn status(&self, recently_active: bool) -> PeerStatus {
        PeerStatus {
            state: self.state,
            matched_index: self.matched,
            next_index: self.next,
            inflight_appends: self.inflight.appends.len(),
            inflight_bytes: self.inflight.bytes,
            recently_active,
            standing: self.standing(),
        }
    }

    pub(crate) fn heard_at(&mut self, tick: u64) {
        self.heard_at_tick = tick;
    }

    pub(crate) fn was_heard_within(&self, ticks: u32, now: u64) -> bool {
        now - self.heard_at_tick < u64::from(ticks)
    }

    /// As [`Progress::was_heard_within`], as far as it counts.
    pub(crate) fn counts_as_heard(&self, ticks: u32, now: u64) -> bool {
        self.counts() && self.was_heard_within(ticks, now)
    }

    pub(crate) fn is_replicating(&self) -> bool {
        self.state == ProgressState::Replicate
    }

    pub(crate) fn matched(&self) -> Index {
        self.matched
    }

    /// As [`Progress::matched`], as far as it counts.
    pub(crate) fn counted_matched(&self) -> Index {
        if self.counts() { self.matched } else { 0 }
    }

    /// The last read round that the follower confirmed, as far as it counts.
    pub(crate) fn counted_read_round(&self) -> u64 {
        if self.counts() { self.read_round } else { 0 }
    }

    pub(crate) fn next(&self) -> Index {
        self.next
    }

    /// Whether another append with entries may be sent now.
    pub(crate) fn may_send(&self, max_appends: usize, max_bytes: usize) -> bool {
        match self.state {
            ProgressState::Probe => !self.probe_sent,
            ProgressState::Replicate => {
                self.inflight.appends.len() < max_appends && self.inflight.bytes < max_bytes
            }
            ProgressState::Snapshot => false,
        }
    }

    /// Whether an append without entries is due: a probe looks for the follower's place even when the leader has
    /// nothing new.
    pub(crate) fn must_probe(&self) -> bool {
        self.state == ProgressState::Probe && !self.probe_sent
    }

    /// Entries up to `last` were sent; none, if `last` is the one before the next.
    pub(crate) fn sent(&mut self, last: Index, bytes: usize) {
        match self.state {
            ProgressState::Probe => self.probe_sent = true,
            ProgressState::Replicate if last >= self.next => {
                self.next = last + 1;
                self.inflight.appends.push_back((last, bytes));
                self.inflight.bytes += bytes;
                self.moved_since_heartbeat = true;
            }
            ProgressState::Replicate | ProgressState::Snapshot => {}
        }
    }

    /// The follower's durable log equals the leader's up to `index`; the leader's own log begins after `base`.
    pub(crate) fn acknowledged(&mut self, index: Index, base: Index) {
        self.moved_since_heartbeat = true;
        if index >= self.matched {
            self.matched = index;
            match self.state {
                ProgressState::Probe => self.enter(ProgressState::Replicate, index + 1),
                ProgressState::Snapshot if index >= base => self.enter(ProgressState::Replicate, index + 1),
                ProgressState::Replicate | ProgressState::Snapshot => self.next = self.next.max(index + 1),
            }
        }
        let arrived = self.inflight.appends.partition_point(|(last, _)| *last <= index);
        for (_, bytes) in self.inflight.appends.drain(..arrived) {
            self.inflight.bytes -= bytes;
        }
        self.check();
    }

    /// Whether a rejection of an append after `previous` says something new. A late one would send the leader back
    /// over entries that the follower has acknowledged since.
    pub(crate) fn is_current_rejection(&self, previous: Index) -> bool {
        match self.state {
            ProgressState::Probe => previous == self.next - 1 && previous > self.matched,
            ProgressState::Replicate => previous > self.matched,
            ProgressState::Snapshot => false,
        }
    }

    /// The logs agree at most up to `agree`: look there.
    pub(crate) fn rejected(&mut self, agree: Index) {
        self.enter(ProgressState::Probe, agree.max(self.matched) + 1);
    }

    /// What is under way may be lost: look where the follower stands.
    ///
    /// Of one that has not answered this leader yet nothing is known to match, and that is no reason to begin at the
    /// first entry: it would be sent a snapshot for having been away at the election.
    pub(crate) fn probe(&mut self) {
        match self.state {
            ProgressState::Replicate => self.enter(ProgressState::Probe, self.matched + 1),
            ProgressState::Probe => self.probe_sent = false,
            ProgressState::Snapshot => {}
        }
    }

    /// A sign of life: another probe may be sent.
    pub(crate) fn resume(&mut self) {
        self.probe_sent = false;
    }

    /// The follower needs a snapshot.
    pub(crate) fn await_snapshot(&mut self) {
        self.enter(ProgressState::Snapshot, self.next);
    }

    /// The follower has a snapshot up to `index`, or, if `None`, the attempt failed.
    pub(crate) fn snapshot_finished(&mut self, index: Option<Index>) {
        if self.state != ProgressState::Snapshot {
            return;
        }
        self.enter(ProgressState::Probe, index.unwrap_or(0).max(self.matched) + 1);
        // Failing again at once would help nobody: wait for a sign of life.
        self.probe_sent = index.is_none();
    }

    /// Called with each periodic heartbeat. True if appends are under way and nothing has moved since the last one:
    /// the last of them may be lost, and no later one would show the gap.
    pub(crate) fn is_stalled_at_heartbeat(&mut self) -> bool {
        let moved = std::mem::replace(&mut self.moved_since_heartbeat, false);
        self.state == ProgressState::Replicate && !moved && !self.inflight.appends.is_empty()
    }

    fn enter(&mut self, state: ProgressState, next: Index) {
        self.state = state;
        self.next = next;
        self.inflight = Inflight::default();
        self.probe_sent = false;
        self.check();
    }

    fn check(&self) {
        assert!(self.next > self.matched, "next {} is not above matched {}", self.next, self.matched);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn replicating(matched: Index) -> Progress {
        let mut progress = Progress::new(matched + 1, 0);
        progress.acknowledged(matched, 0);
        progress
    }

    #[test]
    fn a_late_acknowledgement_moves_nothing_back() {
        let mut progress = replicating(5);
        progress.sent(9, 100);
        progress.acknowledged(3, 0);
        assert_eq!((progress.matched(), progress.next()), (5, 10));
    }

    #[test]
    fn a_late_rejection_is_ignored() {
        let progress = replicating(5);
        assert!(!progress.is_current_rejection(5));
        assert!(progress.is_current_rejection(6));
    }

    #[test]
    fn next_never_falls_to_matched() {
        let mut progress = replicating(5);
        progress.rejected(2);
        assert_eq!((progress.matched(), progress.next()), (5, 6));
    }

    #[test]
    fn the_window_is_bounded_in_appends_and_in_bytes() {
        let mut progress = replicating(0);
        assert!(progress.may_send(2, 100));
        progress.sent(1, 60);
        assert!(progress.may_send(2, 100) && !progress.may_send(1, 100) && !progress.may_send(2, 60));
        progress.acknowledged(1, 0);
        assert!(progress.may_send(1, 60));
    }
}
