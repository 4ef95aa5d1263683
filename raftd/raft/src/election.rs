//! Elections: timers, pre-votes, votes, and what a node becomes.
//!
//! Raft paper, section 5.2 and 5.4.1; dissertation, sections 4.2.3 (disruptive
//! servers) and 9.6 (pre-vote). Nothing here knows about entries, beyond which
//! of two logs ends later.

use std::collections::BTreeMap;

use crate::{
    message::Body,
    node::{Node, State},
    quorum::{self, VoteResult},
    replication::Leader,
    types::{HardState, NodeId, Position, Term},
};

/// The answers to a campaign, this node's own vote among them once it is durable.
pub(crate) type Votes = BTreeMap<NodeId, bool>;

/// A follower whose leader's stream broke waits at most this many ticks, so that not all of them campaign at once.
const BROKEN_STREAM_JITTER_TICKS: u32 = 2;

impl Node {
    /// The transport saw the leader's stream break. This node no longer believes that the leader lives, so it asks
    /// for pre-votes almost at once; peers that still hear the leader refuse, and nothing is disturbed. A node that
    /// does not follow that peer takes no notice.
    pub fn leader_unreachable(&mut self, peer: NodeId) {
        if !matches!(self.state, State::Follower { leader: Some(leader) } if leader == peer) {
            return;
        }
        self.become_follower(self.hard_state.term, None);
        let jitter = self.random_below(BROKEN_STREAM_JITTER_TICKS + 1);
        self.election_timeout = jitter;
        if jitter == 0 {
            self.campaign();
        }
    }

    pub(crate) fn tick_election(&mut self) {
        self.election_elapsed += 1;
        if self.election_elapsed >= self.election_timeout {
            self.campaign();
        }
    }

    /// How long to wait, in this role, before the next campaign. Random, so that elections are rarely split.
    pub(crate) fn reset_election_timer(&mut self) {
        let (election, heartbeat) = (self.options.election_ticks, self.options.heartbeat_ticks);
        let (least, spread) = match self.state {
            State::Follower { .. } | State::Leader(_) => (election, election),
            // Pre-votes disturb nobody, and a refusal often only means that a peer noticed the leader's end later.
            State::PreCandidate(_) => (heartbeat, heartbeat + 1),
            State::Candidate(_) => (election / 2, election.div_ceil(2)),
        };
        self.election_elapsed = 0;
        self.election_timeout = least + self.random_below(spread);
    }

    /// Asks for pre-votes; a lone voter needs none. Whoever does not count only ceases to believe in its leader.
    fn campaign(&mut self) {
        // Nor does a founder support itself before it holds what the cluster was founded on. In each case the node also
        // ceases to believe in its leader, so that its vote is free for whoever campaigns.
        if self.must_not_lead || !self.counts() || self.log.last().end() < self.least_log_end() {
            self.become_follower(self.hard_state.term, None);
            return;
        }
        if self.options.voters.len() == 1 {
            self.become_candidate(false);
            return;
        }
        self.abandon_requests();
        self.state = State::PreCandidate(BTreeMap::from([(self.options.id, true)]));
        self.reset_election_timer();
        self.request_votes(self.hard_state.term + 1, true, false);
    }

    /// Begins a term and votes for itself. The requests leave, and the own vote counts, once that is durable.
    pub(crate) fn become_candidate(&mut self, leadership_transfer: bool) {
        self.abandon_requests();
        let (term, voted_for) = (self.hard_state.term + 1, Some(self.options.id));
        self.hard_state = HardState { term, voted_for, ..self.hard_state };
        self.state = State::Candidate(BTreeMap::new());
        self.reset_election_timer();
        self.request_votes(self.hard_state.term, false, leadership_transfer);
    }

    fn request_votes(&mut self, term: Term, pre_vote: bool, leadership_transfer: bool) {
        let last = self.log.last();
        let peers: Vec<NodeId> = self.options.peers().collect();
        for peer in peers {
            let body = Body::VoteRequest {
                pre_vote,
                last_index: last.index,
                last_term: last.term,
                leadership_transfer,
            };
            self.send_in_term(peer, term, body);
        }
    }

    /// A candidate counts itself once its vote would survive a crash.
    pub(crate) fn count_own_vote(&mut self) {
        if !self.hard_state_is_durable() {
            return;
        }
        let own = self.options.id;
        if let State::Candidate(votes) = &mut self.state
            && votes.insert(own, true).is_none()
        {
            self.count_votes();
        }
    }

    /// Answers a campaign, or the question whether one would succeed.
    pub(crate) fn handle_vote_request(
        &mut self,
        from: NodeId,
        term: Term,
        pre_vote: bool,
        last: Position,
        leadership_transfer: bool,
    ) {
        if !self.counts() {
            return;
        }
        if term > self.hard_state.term && !leadership_transfer && self.hears_a_leader() {
            // A pre-candidate may know that it is refused. A candidate of a higher term must not pull this node out of
            // a living leader's term: it is not even heard (dissertation, section 4.2.3).
            if pre_vote {
                self.send(from, Body::VoteResponse { pre_vote, granted: false });
            }
            return;
        }
        if term > self.hard_state.term && !pre_vote {
            self.become_follower(term, None);
        }
        let up_to_date = last.end() >= self.least_log_end();
        if pre_vote {
            let granted = up_to_date && term > self.hard_state.term && !self.goes_before(from, last);
            let answer_term = if granted { term } else { self.hard_state.term };
            self.send_in_term(from, answer_term, Body::VoteResponse { pre_vote, granted });
            return;
        }
        let free = match self.hard_state.voted_for {
            Some(candidate) => candidate == from,
            None => self.leader().is_none(),
        };
        let granted = term == self.hard_state.term && free && up_to_date;
        if granted {
            self.hard_state.voted_for = Some(from);
            self.reset_election_timer();
        }
        self.send(from, Body::VoteResponse { pre_vote, granted });
    }

    /// Two nodes that ask for pre-votes in the same tick would grant each other's, and then split the votes. Of two
    /// equal logs, the higher id goes first; but only in that tick, so that a node that cannot win stands in nobody's
    /// way.
    fn goes_before(&self, rival: NodeId, rival_last: Position) -> bool {
        let own = self.log.last();
        matches!(self.state, State::PreCandidate(_))
            && self.election_elapsed == 0
            && (own.term, own.index) == (rival_last.term, rival_last.index)
            && self.options.id > rival
    }

    /// A living leader was heard within the shortest election timeout. A leader is its own witness until its quorum
    /// fails it.
    fn hears_a_leader(&self) -> bool {
        match self.state {
            State::Leader(_) => true,
            State::Follower { leader: Some(_) } => self.election_elapsed < self.options.election_ticks,
            State::Follower { leader: None } | State::PreCandidate(_) | State::Candidate(_) => false,
        }
    }

    pub(crate) fn handle_pre_vote_granted(&mut self, from: NodeId, term: Term) {
        // A grant for another campaign than the one this node is asking about is void.
        if term != self.hard_state.term + 1 {
            return;
        }
        let State::PreCandidate(votes) = &mut self.state else { return };
        votes.insert(from, true);
        if quorum::count_votes(&self.options.voters, votes) == VoteResult::Won {
            self.become_candidate(false);
        }
    }

    pub(crate) fn handle_pre_vote_refused(&mut self, from: NodeId) {
        // Refused by all or not, the next try comes when the timer says so.
        if let State::PreCandidate(votes) = &mut self.state {
            votes.entry(from).or_insert(false);
        }
    }

    pub(crate) fn handle_vote(&mut self, from: NodeId, granted: bool) {
        if let State::Candidate(votes) = &mut self.state {
            votes.entry(from).or_insert(granted);
            self.count_votes();
        }
    }

    fn count_votes(&mut self) {
        let State::Candidate(votes) = &self.state else { return };
        match quorum::count_votes(&self.options.voters, votes) {
            VoteResult::Won if votes.contains_key(&self.options.id) => self.become_leader(),
            // Peers may have made a majority already, but a leader speaks only in a term that is durable.
            VoteResult::Won | VoteResult::Pending => {}
            VoteResult::Lost => self.become_follower(self.hard_state.term, None),
        }
    }

    fn become_leader(&mut self) {
        let last = self.log.last();
        self.state = State::Leader(Box::new(Leader::new(&self.options, last, self.ticks)));
        self.election_elapsed = 0;
        self.append_noop();
    }

    pub(crate) fn become_follower(&mut self, term: Term, leader: Option<NodeId>) {
        let new_term = term != self.hard_state.term;
        assert!(term >= self.hard_state.term, "term {} would fall to {term}", self.hard_state.term);
        if new_term || leader != self.leader() {
            self.abandon_requests();
        }
        if new_term {
            self.hard_state = HardState { term, voted_for: None, ..self.hard_state };
        }
        let previous = std::mem::replace(&mut self.state, State::Follower { leader });
        if let State::Leader(previous) = previous {
            previous.reads.abandon(&mut self.outbox);
        }
        self.reset_election_timer();
    }
}
