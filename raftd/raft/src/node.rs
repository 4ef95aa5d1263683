//! The node: its state, its public face, and where each message goes.
//!
//! What the messages mean is told in `election`, `replication`, `read`,
//! `forward` and `transfer`; this file only decides whether a message is of
//! this term, and who hears it.

use std::collections::BTreeMap;

use rand_chacha::{
    ChaCha8Rng,
    rand_core::{Rng, SeedableRng},
};

use crate::{
    election::Votes,
    error::{LogError, NewError, StepError},
    forward::Forwarded,
    log::{Log, RaftLog},
    message::{AppendResponse, Body, Message, Origin},
    options::Options,
    progress::{PeerStatus, Progress},
    read::AskedReads,
    ready::{Outbox, Reported, SoftState},
    replication::Leader,
    standing::Inquiry,
    types::{HardState, Incarnation, Index, NodeId, Position, Role, Standing, Term},
};

/// One member of a Raft cluster, without anything that does I/O. See the crate's page.
pub struct Node {
    pub(crate) options: Options,
    pub(crate) rng: ChaCha8Rng,
    pub(crate) log: RaftLog,
    pub(crate) hard_state: HardState,
    pub(crate) state: State,
    pub(crate) commit_index: Index,
    /// The wall clock, as the driver last told it.
    pub(crate) now_ms: u64,
    /// Its state machine cannot be trusted.
    pub(crate) must_not_lead: bool,
    /// Whether the driver wants no new payloads in the log.
    pub(crate) out_of_room: bool,
    /// Ticks since this node was made.
    pub(crate) ticks: u64,
    /// Ticks since a leader was heard, a vote was granted or a campaign began.
    pub(crate) election_elapsed: u32,
    /// The campaign begins when `election_elapsed` reaches it.
    pub(crate) election_timeout: u32,
    /// Batches that the leader was handed, and reads that it was asked for.
    pub(crate) forwarded: Forwarded,
    pub(crate) asked_reads: AskedReads,
    /// What the others said while this node does not count.
    pub(crate) inquiry: Inquiry,
    /// The highest incarnation of every other member that this process has heard.
    pub(crate) incarnations: BTreeMap<NodeId, Incarnation>,
    pub(crate) outbox: Outbox,
    pub(crate) reported: Reported,
}

/// What a node is, with what it knows only while it is that.
pub(crate) enum State {
    Follower { leader: Option<NodeId> },
    PreCandidate(Votes),
    Candidate(Votes),
    Leader(Box<Leader>),
}

/// A node as it is now, for people and metrics.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Status {
    /// This node.
    pub id: NodeId,
    /// What it is.
    pub role: Role,
    /// Whether it counts.
    pub standing: Standing,
    /// Which life of its data directory this is.
    pub incarnation: Incarnation,
    /// If it does not count: the members that it has to hear first.
    pub waits_for: Vec<NodeId>,
    /// Its term.
    pub term: Term,
    /// Whom it voted for in that term.
    pub voted_for: Option<NodeId>,
    /// The leader, where it is known.
    pub leader: Option<NodeId>,
    /// The last index known to be committed.
    pub commit_index: Index,
    /// The last index that was handed out as deliverable.
    pub deliverable_index: Index,
    /// The last index that is durable here.
    pub durable_index: Index,
    /// The last index of the log.
    pub last_index: Index,
    /// To whom leadership is being handed over.
    pub transferring_to: Option<NodeId>,
    /// On a leader: its view of every other member.
    pub peers: BTreeMap<NodeId, PeerStatus>,
}

impl Node {
    /// Makes a node from what it left behind: nothing, the first time.
    ///
    /// # Errors
    /// The options are contradictory, the log cannot be read, or the two do not belong together.
    pub fn new(options: Options, hard_state: HardState, log: Box<dyn Log + Send>) -> Result<Self, NewError> {
        options.check()?;
        let commit_index = log.base()?.index;
        let log = RaftLog::new(log)?;
        if log.last().term > hard_state.term {
            return Err(NewError::HardStateBehindLog {
                log_term: log.last().term,
                hard_state_term: hard_state.term,
            });
        }
        let mut rng = ChaCha8Rng::seed_from_u64(options.seed);
        let life = rng.next_u32();
        let nonce = if hard_state.standing == Standing::Voter { 0 } else { rng.next_u64() };
        let mut node = Self {
            forwarded: Forwarded::new(life),
            asked_reads: AskedReads::new(life),
            inquiry: Inquiry::new(nonce),
            incarnations: BTreeMap::new(),
            options,
            rng,
            log,
            hard_state,
            state: State::Follower { leader: None },
            commit_index,
            now_ms: 0,
            must_not_lead: false,
            out_of_room: false,
            ticks: 0,
            election_elapsed: 0,
            election_timeout: 0,
            outbox: Outbox::default(),
            reported: Reported::new(hard_state, commit_index),
        };
        node.reset_election_timer();
        // A lone member has nobody to ask.
        node.conclude();
        Ok(node)
    }

    /// Tells the wall clock, for the timestamps of proposals. It may jump: timestamps in the log never go backward.
    pub fn set_clock(&mut self, now_ms: u64) {
        self.now_ms = now_ms;
    }

    /// Says whether there is no room for new payloads: as a leader this node then drops proposals. All that is under
    /// way goes on, and so do elections: the no-op of a term needs hardly any room.
    pub fn set_out_of_room(&mut self, out_of_room: bool) {
        self.out_of_room = out_of_room;
    }

    /// A tick has passed.
    pub fn tick(&mut self) {
        self.ticks += 1;
        match self.state {
            State::Leader(_) => self.tick_leader(),
            State::Follower { .. } | State::PreCandidate(_) | State::Candidate(_) => self.tick_election(),
        }
        self.tick_inquiry();
        self.expire_forwarded();
        self.expire_reads();
        self.yield_leadership();
    }

    /// Takes in a message from a peer.
    ///
    /// # Errors
    /// The message is refused and the node unchanged; or, if [`StepError::is_fatal`], the process must stop.
    ///
    /// # Panics
    /// If the message proves that a committed entry was lost: Raft's safety is broken, and going on would spread it.
    pub fn step(&mut self, message: Message) -> Result<(), StepError> {
        if message.to != self.options.id {
            return Err(StepError::WrongRecipient(message.to));
        }
        if !self.options.is_peer(message.from) {
            return Err(StepError::UnknownPeer(message.from));
        }
        message.check()?;
        let is_current = self.note_sender(message.from, message.incarnation, message.standing);
        if let Body::StandingRequest { nonce } = message.body {
            self.handle_standing_request(message.from, nonce);
            return Ok(());
        }
        if !is_current {
            return Ok(());
        }
        if let Body::StandingResponse { nonce, known_incarnation, log_end } = message.body {
            let who = (message.from, message.standing, message.term);
            self.handle_standing_response(who, nonce, known_incarnation, log_end);
            return Ok(());
        }
        // Nothing else is meant for a member that nobody has counted yet, and it has nothing to say to it.
        if matches!(self.hard_state.standing, Standing::New | Standing::Founder) {
            return Ok(());
        }
        if let Body::VoteRequest { pre_vote, last_index, last_term, leadership_transfer } = message.body {
            let last = Position { index: last_index, term: last_term, timestamp_ms: 0 };
            self.handle_vote_request(message.from, message.term, pre_vote, last, leadership_transfer);
            return Ok(());
        }
        if message.term < self.hard_state.term {
            self.correct_the_past(&message);
            return Ok(());
        }
        let granted_pre_vote = Body::VoteResponse { pre_vote: true, granted: true };
        if message.body == granted_pre_vote {
            self.handle_pre_vote_granted(message.from, message.term);
            return Ok(());
        }
        if message.term > self.hard_state.term {
            self.become_follower(message.term, None);
        }
        self.dispatch(message)
    }

    /// Handles a message of this node's own term.
    fn dispatch(&mut self, message: Message) -> Result<(), StepError> {
        let from = message.from;
        match message.body {
            Body::Append(append) => {
                self.follow(from)?;
                self.handle_append(from, append)?;
            }
            Body::Heartbeat { commit_index, read_round } => {
                self.follow(from)?;
                self.handle_heartbeat(from, commit_index, read_round)?;
            }
            Body::AppendResponse(AppendResponse::Matched(index)) => self.handle_matched(from, index)?,
            Body::AppendResponse(AppendResponse::Rejected { previous_index, hint_index, hint_term }) => {
                self.handle_rejected(from, previous_index, hint_index, hint_term)?;
            }
            Body::HeartbeatResponse { read_round } => self.handle_heartbeat_response(from, read_round)?,
            Body::VoteResponse { pre_vote: false, granted } => self.handle_vote(from, granted),
            Body::VoteResponse { pre_vote: true, .. } => self.handle_pre_vote_refused(from),
            Body::ReadIndex { read_id } => self.handle_read_index(from, read_id),
            Body::ReadIndexResponse { read_id, index } => {
                self.handle_read_index_response(from, read_id, index)
            }
            Body::Forward { batch_id, payloads } => self.handle_forward(from, batch_id, payloads),
            Body::ForwardResponse { batch_id, outcome } => {
                self.handle_forward_response(from, batch_id, outcome)
            }
            Body::TimeoutNow => self.handle_timeout_now(from),
            Body::Promote { incarnation } => self.handle_promote(from, incarnation)?,
            Body::VoteRequest { .. } | Body::StandingRequest { .. } | Body::StandingResponse { .. } => {
                unreachable!("they are handled before the terms are compared")
            }
        }
        Ok(())
    }

    /// Tells a leader of an earlier term that its time is over. Without this, a node that campaigned once and was cut
    /// off would ignore the leader, and be ignored as a candidate, for ever (pre-vote and check-quorum together).
    fn correct_the_past(&mut self, message: &Message) {
        match &message.body {
            Body::Append(append) if append.previous_index > 0 => {
                let previous_index = append.previous_index;
                let rejected = AppendResponse::Rejected { previous_index, hint_index: 0, hint_term: 0 };
                self.send(message.from, Body::AppendResponse(rejected));
            }
            Body::Append(_) | Body::Heartbeat { .. } => {
                self.send(message.from, Body::HeartbeatResponse { read_round: 0 });
            }
            // Late answers, and requests to a leadership that is over: the sender finds out by itself.
            _ => {}
        }
    }

    /// A leader of this term has spoken.
    pub(crate) fn follow(&mut self, leader: NodeId) -> Result<(), StepError> {
        match self.leader() {
            Some(known) if known == leader => {}
            Some(known) => {
                return Err(StepError::TwoLeaders {
                    term: self.hard_state.term,
                    first: known,
                    second: leader,
                });
            }
            None => self.become_follower(self.hard_state.term, Some(leader)),
        }
        self.election_elapsed = 0;
        Ok(())
    }

    /// The transport works again: do not wait to look where the peer stands.
    pub fn peer_reachable(&mut self, peer: NodeId) {
        if let State::Leader(leader) = &mut self.state
            && let Some(progress) = leader.progress.get_mut(&peer)
        {
            progress.resume();
        }
    }

    /// The transport to the peer broke: what is under way may be lost.
    pub fn peer_unreachable(&mut self, peer: NodeId) {
        if let State::Leader(leader) = &mut self.state {
            if let Some(progress) = leader.progress.get_mut(&peer) {
                progress.probe();
            }
        } else if self.leader() == Some(peer) {
            self.abandon_requests();
        }
    }

    /// The leader of the current term: this node, or the one it hears.
    pub fn leader(&self) -> Option<NodeId> {
        match &self.state {
            State::Follower { leader } => *leader,
            State::PreCandidate(_) | State::Candidate(_) => None,
            State::Leader(_) => Some(self.options.id),
        }
    }

    /// What this node is.
    pub fn role(&self) -> Role {
        match &self.state {
            State::Follower { .. } => Role::Follower,
            State::PreCandidate(_) => Role::PreCandidate,
            State::Candidate(_) => Role::Candidate,
            State::Leader(_) => Role::Leader,
        }
    }

    /// The node as it is now.
    pub fn status(&self) -> Status {
        let (peers, transferring_to) = match &self.state {
            State::Leader(leader) => {
                let view = |progress: &Progress| {
                    progress.status(progress.was_heard_within(self.options.election_ticks, self.ticks))
                };
                let peers = leader.progress.iter().map(|(peer, progress)| (*peer, view(progress))).collect();
                (peers, leader.transfer.as_ref().map(|transfer| transfer.to))
            }
            State::Follower { .. } | State::PreCandidate(_) | State::Candidate(_) => (BTreeMap::new(), None),
        };
        Status {
            id: self.options.id,
            role: self.role(),
            standing: self.hard_state.standing,
            incarnation: self.hard_state.incarnation,
            waits_for: self.waits_for(),
            term: self.hard_state.term,
            voted_for: self.hard_state.voted_for,
            leader: self.leader(),
            commit_index: self.commit_index,
            deliverable_index: self.reported.deliverable_index(),
            durable_index: self.log.durable(),
            last_index: self.log.last().index,
            transferring_to,
            peers,
        }
    }

    /// Who speaks, in this node's own term.
    pub(crate) fn origin(&self) -> Origin {
        let HardState { term, incarnation, standing, .. } = self.hard_state;
        Origin { id: self.options.id, term, incarnation, standing }
    }

    pub(crate) fn soft_state(&self) -> SoftState {
        SoftState { role: self.role(), term: self.hard_state.term, leader: self.leader() }
    }

    /// Forgets what was asked of a leader that can no longer be trusted to answer.
    pub(crate) fn abandon_requests(&mut self) {
        self.forwarded.abandon(&mut self.outbox);
        self.asked_reads.abandon(&mut self.outbox);
    }

    /// A number below `bound`. The slight bias of the remainder does not matter here.
    pub(crate) fn random_below(&mut self, bound: u32) -> u32 {
        self.rng.next_u32() % bound.max(1)
    }
}

impl std::fmt::Debug for Node {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.status().fmt(f)
    }
}

/// A snapshot was taken over, or was not needed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SnapshotOutcome {
    /// The log will begin after it, once the next Ready is durable.
    Installed,
    /// The node is at or past it already; nothing changed.
    Ignored,
}

impl Node {
    /// This node's state machine has durably become the snapshot whose last entry is at `base`. The log now begins
    /// after it: what conflicts with it or ends before it is dropped, what follows it is kept. A snapshot at or below
    /// the commit index changes nothing: a late one never rewinds.
    ///
    /// # Errors
    /// The log could not be read: the process must stop.
    pub fn install_snapshot(&mut self, base: Position) -> Result<SnapshotOutcome, LogError> {
        if base.index <= self.commit_index || matches!(self.state, State::Leader(_)) {
            return Ok(SnapshotOutcome::Ignored);
        }
        self.log.install(base)?;
        self.commit_index = base.index;
        if base.term > self.hard_state.term {
            self.become_follower(base.term, None);
        }
        if let Some(leader) = self.leader() {
            // Committed entries are in the log of every later leader, so this holds whoever sent the snapshot.
            self.send(leader, Body::AppendResponse(AppendResponse::Matched(base.index)));
        }
        Ok(SnapshotOutcome::Installed)
    }

    /// The driver has brought a peer a snapshot up to this index, or could not.
    pub fn snapshot_finished(&mut self, peer: NodeId, result: Result<Index, SnapshotFailed>) {
        if let State::Leader(leader) = &mut self.state
            && let Some(progress) = leader.progress.get_mut(&peer)
        {
            progress.snapshot_finished(result.ok());
        }
    }
}

/// A snapshot could not be brought to a peer; why is the driver's business.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SnapshotFailed;
