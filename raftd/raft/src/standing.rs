//! Whether a member counts: its first start, a disk that was lost, and the way back.
//!
//! A vote is a promise that outlives the process, and so is an acknowledged entry. A member whose data directory is
//! empty has either promised nothing yet or forgotten what it promised, and cannot tell which. So it does not count:
//! it neither votes nor campaigns, and no leader counts it. It asks every other member, and what they say decides
//! (docs/correctness.md has the proofs):
//!
//! ```text
//!          every other member is New or Founder            every other one is Founder, or somebody counts
//!   New ────────────────────────────────────────▶ Founder ────────────────────────────────────────▶ Voter
//!    │                                                                                               ▲
//!    │ somebody has counted: there is a history                the leader says that it holds enough, │
//!    └─────────────────────────────────────────────▶ Learner ────────────────────────────────────────┘
//!                                                                and every other member told its term
//! ```
//!
//! *Founders lost nothing.* A member becomes a founder only when, after its directory was made, every other member
//! said that it had never counted. An earlier directory of this member can then have voted for no candidate that lives
//! and acknowledged to no leader that lives. Before the first election everybody is a founder, so a new directory that
//! meets a history is a lost disk, always. A founder takes over the longest end of a log that any of them reports, and
//! supports only logs that reach it: a cluster that is founded around a survivor's log cannot elect an empty one.
//!
//! *Entries.* A learner counts again only when it holds an entry P of the leader's term T that the leader appended
//! after hearing the learner, and committed without it. Whatever was committed with the help of the lost log, in a term
//! up to T, stands before P in the leader's log. It cannot be of a later term: a majority would have moved to that term
//! before the log was lost, yet a majority without this member acknowledged P in term T after that.
//!
//! *Votes.* A forgotten vote in term v was for a candidate that was in term v at the time. The learner takes over the
//! highest term that every other member tells it, asked after the loss, so it is in no earlier term than v; and in the
//! term in which it is promoted, its vote is that term's leader's.
//!
//! *Incarnations* tell the lives of a member's directory apart. What an earlier one said is dropped, and what it
//! acknowledged is forgotten, as soon as a later one was heard. It is enough to remember that for as long as a process
//! lives: what is counted (votes, acknowledgements, read rounds) does not outlive it either.

use std::collections::BTreeMap;

use rand_chacha::rand_core::Rng;

use crate::{
    error::StepError,
    message::Body,
    node::{Node, State},
    types::{HardState, Incarnation, LogEnd, NodeId, Standing, Term},
};

/// What a member that does not count has been told by the others.
#[derive(Debug)]
pub(crate) struct Inquiry {
    /// Names this life of this node's process: an answer to an earlier one proves nothing.
    nonce: u64,
    answers: BTreeMap<NodeId, Answered>,
    ticks_to_next: u32,
}

#[derive(Clone, Copy, Debug)]
struct Answered {
    standing: Standing,
    term: Term,
    log_end: LogEnd,
}

impl Inquiry {
    pub(crate) fn new(nonce: u64) -> Self {
        Self { nonce, answers: BTreeMap::new(), ticks_to_next: 1 }
    }

    /// Whether this member's answer still has to come before a node of this standing can go on.
    fn lacks(&self, member: NodeId, standing: Standing) -> bool {
        let answer = self.answers.get(&member).map(|answer| answer.standing);
        match standing {
            Standing::Voter => false,
            Standing::New | Standing::Learner => answer.is_none(),
            Standing::Founder => answer.is_none_or(|answer| answer == Standing::New),
        }
    }
}

impl Node {
    /// The members that have to be heard before this node can count; for a learner, the leader has to agree as well.
    pub(crate) fn waits_for(&self) -> Vec<NodeId> {
        let standing = self.hard_state.standing;
        self.options.peers().filter(|peer| self.inquiry.lacks(*peer, standing)).collect()
    }

    /// Whether this node may vote, campaign, and be counted.
    pub(crate) fn counts(&self) -> bool {
        self.hard_state.standing == Standing::Voter
    }

    /// The end that a log must reach to have this node's support.
    pub(crate) fn least_log_end(&self) -> LogEnd {
        self.log.last().end().max(self.hard_state.log_floor)
    }

    pub(crate) fn tick_inquiry(&mut self) {
        let waits_for = self.waits_for();
        if waits_for.is_empty() {
            return;
        }
        self.inquiry.ticks_to_next -= 1;
        if self.inquiry.ticks_to_next > 0 {
            return;
        }
        self.inquiry.ticks_to_next = self.options.heartbeat_ticks;
        for peer in waits_for {
            self.send(peer, Body::StandingRequest { nonce: self.inquiry.nonce });
        }
    }

    /// Takes note of who speaks; false if it is an earlier incarnation, which must not be heard.
    pub(crate) fn note_sender(&mut self, from: NodeId, incarnation: Incarnation, standing: Standing) -> bool {
        let known = self.incarnations.entry(from).or_default();
        if incarnation < *known {
            return false;
        }
        *known = incarnation;
        if matches!(standing, Standing::Voter | Standing::Learner) {
            self.history_exists();
        }
        let next = self.log.last().index + 1;
        if let State::Leader(leader) = &mut self.state
            && let Some(progress) = leader.progress.get_mut(&from)
        {
            progress.introduce(incarnation, standing, next, self.ticks);
            if progress.needs_proof() {
                progress.set_proof(next);
                self.append_noop();
            }
        }
        true
    }

    /// Some member counts, or did.
    fn history_exists(&mut self) {
        match self.hard_state.standing {
            Standing::New => self.stand_as(Standing::Learner),
            // Whoever counted first had heard that everybody was a founder, and this one has lost nothing since.
            Standing::Founder => self.stand_as(Standing::Voter),
            Standing::Learner | Standing::Voter => {}
        }
    }

    fn stand_as(&mut self, standing: Standing) {
        self.hard_state.standing = standing;
        self.inquiry.ticks_to_next = 1;
        self.reset_election_timer();
    }

    /// Answers a member that does not count, of whatever incarnation: one that is too low has to learn it.
    pub(crate) fn handle_standing_request(&mut self, from: NodeId, nonce: u64) {
        let known_incarnation = self.incarnations.get(&from).copied().unwrap_or_default();
        let log_end = self.least_log_end();
        self.send(from, Body::StandingResponse { nonce, known_incarnation, log_end });
    }

    pub(crate) fn handle_standing_response(
        &mut self,
        (from, standing, term): (NodeId, Standing, Term),
        nonce: u64,
        known_incarnation: Incarnation,
        log_end: LogEnd,
    ) {
        if self.counts() || nonce != self.inquiry.nonce {
            return;
        }
        if known_incarnation > self.hard_state.incarnation {
            // The clock that names incarnations went backward. Nothing that this one said was counted. Another member
            // may know of higher ones, so the step is wide and random: none is met by chance.
            self.hard_state.incarnation = known_incarnation + 1 + u64::from(self.rng.next_u32());
        }
        self.inquiry.answers.insert(from, Answered { standing, term, log_end });
        self.conclude();
    }

    /// Draws what can be drawn from the answers so far.
    pub(crate) fn conclude(&mut self) {
        match self.hard_state.standing {
            Standing::Voter => {}
            Standing::Learner => {
                let highest = self.inquiry.answers.values().map(|answer| answer.term).max();
                if let Some(term) = highest.filter(|term| *term > self.hard_state.term) {
                    self.become_follower(term, None);
                }
            }
            Standing::New if self.waits_for().is_empty() => {
                let ends = self.inquiry.answers.values().map(|answer| answer.log_end);
                self.hard_state.log_floor = ends.fold(self.least_log_end(), LogEnd::max);
                self.stand_as(Standing::Founder);
                self.conclude();
            }
            Standing::Founder if self.waits_for().is_empty() => self.stand_as(Standing::Voter),
            Standing::New | Standing::Founder => {}
        }
    }

    /// On a leader: a learner that holds all that its earlier incarnations may have helped to commit counts again.
    pub(crate) fn promote_if_due(&mut self, peer: NodeId) {
        let State::Leader(leader) = &self.state else { return };
        let Some(progress) = leader.progress.get(&peer) else { return };
        if progress.has_proof(self.commit_index) {
            let incarnation = progress.incarnation();
            self.send(peer, Body::Promote { incarnation });
        }
    }

    /// The leader says that this incarnation holds enough to count. It counts once that is durable, and the leader
    /// hears it by the standing that every message carries.
    pub(crate) fn handle_promote(&mut self, from: NodeId, incarnation: Incarnation) -> Result<(), StepError> {
        self.follow(from)?;
        let is_learner = self.hard_state.standing == Standing::Learner;
        if is_learner && incarnation == self.hard_state.incarnation && self.waits_for().is_empty() {
            let standing = Standing::Voter;
            self.hard_state = HardState { voted_for: Some(from), standing, ..self.hard_state };
            self.send(from, Body::HeartbeatResponse { read_round: 0 });
        }
        Ok(())
    }
}
