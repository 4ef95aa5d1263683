//! What nodes say to each other, and which messages are sane.
//!
//! A message comes from outside: [`Message::check`] refuses what no correct
//! node sends, before anything else looks at it. Nothing here knows a node's
//! state; what can only be judged by it is judged where it is handled.

use bytes::Bytes;

use crate::{
    error::Malformed,
    types::{Entry, EntryKind, Incarnation, Index, LogEnd, NodeId, Standing, Term},
};

/// Terms above this are refused: a single damaged message must not use up all the terms there are.
const MAX_TERM: Term = 1 << 62;

/// Indexes above this are refused, so that sums of indexes cannot overflow.
const MAX_INDEX: Index = 1 << 62;

/// Incarnations from here on are refused, so that there is always a higher one.
const MAX_INCARNATION: Incarnation = u64::MAX - (1 << 32);

/// One message from one node to another.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    /// Who says it.
    pub from: NodeId,
    /// To whom.
    pub to: NodeId,
    /// The sender's term. A pre-vote, and its grant, carry the term of the campaign it is about.
    pub term: Term,
    /// Which life of the sender's data directory speaks.
    pub incarnation: Incarnation,
    /// Whether the sender counts.
    pub standing: Standing,
    /// What is said.
    pub body: Body,
}

/// Who speaks: what every message of a node has in common.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Origin {
    pub(crate) id: NodeId,
    pub(crate) term: Term,
    pub(crate) incarnation: Incarnation,
    pub(crate) standing: Standing,
}

impl Origin {
    pub(crate) fn message(self, to: NodeId, body: Body) -> Message {
        let Self { id, term, incarnation, standing } = self;
        Message { from: id, to, term, incarnation, standing, body }
    }
}

/// What a message says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Body {
    /// Asks for a vote or a pre-vote.
    VoteRequest {
        /// Only asks whether a vote would be granted.
        pre_vote: bool,
        /// The candidate's last index.
        last_index: Index,
        /// The term of the candidate's last entry.
        last_term: Term,
        /// The old leader asked for this campaign: that it is still heard does not stand against it.
        leadership_transfer: bool,
    },
    /// Answers [`Body::VoteRequest`].
    VoteResponse {
        /// Answers a pre-vote.
        pre_vote: bool,
        /// The candidate has it.
        granted: bool,
    },
    /// Hands over entries, or probes, or tells the commit index.
    Append(Append),
    /// Answers [`Body::Append`].
    AppendResponse(AppendResponse),
    /// The leader lives.
    Heartbeat {
        /// At most what the follower is known to hold.
        commit_index: Index,
        /// The read round that an answer confirms; 0 when there is none.
        read_round: u64,
    },
    /// Answers [`Body::Heartbeat`].
    HeartbeatResponse {
        /// As in the heartbeat.
        read_round: u64,
    },
    /// Asks the leader for an index that a linearizable read must wait for.
    ReadIndex {
        /// Chosen by the asker; never used twice.
        read_id: u64,
    },
    /// Answers [`Body::ReadIndex`].
    ReadIndexResponse {
        /// As in the question.
        read_id: u64,
        /// None when the asked node cannot say.
        index: Option<Index>,
    },
    /// Hands proposals to the leader.
    Forward {
        /// Chosen by the sender; never used twice.
        batch_id: u64,
        /// Not empty.
        payloads: Vec<Bytes>,
    },
    /// Answers [`Body::Forward`].
    ForwardResponse {
        /// As in the question.
        batch_id: u64,
        /// What became of the batch.
        outcome: ForwardOutcome,
    },
    /// The leader tells its successor to campaign at once.
    TimeoutNow,
    /// A member that does not count asks another how things are.
    StandingRequest {
        /// Names the asker's process: it counts only what was said after it began.
        nonce: u64,
    },
    /// Answers [`Body::StandingRequest`]; the answer's term and standing are the answer's main part.
    StandingResponse {
        /// As in the question.
        nonce: u64,
        /// The highest incarnation of the asker that was heard.
        known_incarnation: Incarnation,
        /// The end that a log must reach to have this member's support.
        log_end: LogEnd,
    },
    /// The leader tells a learner that it holds enough to count again.
    Promote {
        /// Which incarnation does. Another one does not.
        incarnation: Incarnation,
    },
}

/// Entries for a follower.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Append {
    /// The index before the first entry.
    pub previous_index: Index,
    /// The leader's term there.
    pub previous_term: Term,
    /// Contiguous; may be empty.
    pub entries: Vec<Entry>,
    /// The leader's commit index, which may lie beyond these entries.
    pub commit_index: Index,
}

impl Append {
    /// The last index that sender and receiver share once this is accepted.
    pub fn last_index(&self) -> Index {
        self.previous_index + self.entries.len() as Index
    }
}

/// What a follower makes of an [`Append`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AppendResponse {
    /// The follower's durable log equals the leader's up to this index.
    Matched(Index),
    /// The follower's log does not hold the entry before the ones sent.
    Rejected {
        /// The `previous_index` that was refused: tells a late answer from a current one.
        previous_index: Index,
        /// The last index at which the logs may agree.
        hint_index: Index,
        /// The follower's term there.
        hint_term: Term,
    },
}

/// Where a batch of proposals stands in the log. It is not committed yet, and
/// never will be if an entry of another term takes its place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Appended {
    /// The index of the batch's first entry; the others follow.
    pub first_index: Index,
    /// The term of its entries.
    pub term: Term,
}

/// Why a proposal was not taken. It is certain that it will not commit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DropReason {
    /// No leader is known, or the asked node does not lead.
    NoLeader,
    /// Too many bytes are under way; try again later.
    Overloaded,
    /// Leadership is being handed over.
    Transferring,
    /// The leader's driver has said that there is no room: see [`Node::set_out_of_room`](crate::Node::set_out_of_room).
    OutOfRoom,
}

/// What the leader did with a forwarded batch.
pub type ForwardOutcome = Result<Appended, DropReason>;

impl Message {
    /// Refuses what no correct node sends, whatever the states of the two.
    pub(crate) fn check(&self) -> Result<(), Malformed> {
        if self.term > MAX_TERM {
            return Err(Malformed::TermOutOfRange);
        }
        if self.incarnation > MAX_INCARNATION {
            return Err(Malformed::IncarnationOutOfRange);
        }
        match &self.body {
            Body::VoteRequest { last_index, last_term, .. } => {
                self.require_term()?;
                if *last_index > MAX_INDEX {
                    return Err(Malformed::IndexOutOfRange);
                }
                if (*last_index == 0) != (*last_term == 0) {
                    return Err(Malformed::BaseMismatch);
                }
                if *last_term >= self.term {
                    return Err(Malformed::EntryTermTooHigh);
                }
            }
            Body::Append(append) => {
                self.require_term()?;
                append.check(self.term)?;
            }
            Body::AppendResponse(response) => {
                self.require_term()?;
                response.check()?;
            }
            Body::Heartbeat { .. }
            | Body::HeartbeatResponse { .. }
            | Body::TimeoutNow
            | Body::Promote { .. } => self.require_term()?,
            Body::Forward { payloads, .. } => {
                self.require_term()?;
                if payloads.is_empty() {
                    return Err(Malformed::EmptyBatch);
                }
            }
            Body::StandingResponse { known_incarnation, log_end, .. } => {
                if *known_incarnation > MAX_INCARNATION {
                    return Err(Malformed::IncarnationOutOfRange);
                }
                if log_end.index > MAX_INDEX || log_end.term > MAX_TERM {
                    return Err(Malformed::IndexOutOfRange);
                }
            }
            Body::VoteResponse { .. }
            | Body::StandingRequest { .. }
            | Body::ReadIndex { .. }
            | Body::ReadIndexResponse { .. }
            | Body::ForwardResponse { .. } => {}
        }
        Ok(())
    }

    /// Nobody leads, follows or campaigns in term 0.
    fn require_term(&self) -> Result<(), Malformed> {
        if self.term == 0 { Err(Malformed::TermOutOfRange) } else { Ok(()) }
    }
}

impl Append {
    fn check(&self, message_term: Term) -> Result<(), Malformed> {
        if self.previous_index > MAX_INDEX || self.commit_index > MAX_INDEX {
            return Err(Malformed::IndexOutOfRange);
        }
        if (self.previous_index == 0) != (self.previous_term == 0) {
            return Err(Malformed::BaseMismatch);
        }
        let (mut index, mut term, mut timestamp_ms) = (self.previous_index, self.previous_term, 0);
        for entry in &self.entries {
            if entry.index != index + 1 {
                return Err(Malformed::Gap);
            }
            if entry.term < term || entry.term == 0 {
                return Err(Malformed::TermsGoBackward);
            }
            if entry.timestamp_ms < timestamp_ms {
                return Err(Malformed::TimestampsGoBackward);
            }
            if entry.kind == EntryKind::Noop && !entry.payload.is_empty() {
                return Err(Malformed::NoopWithPayload);
            }
            (index, term, timestamp_ms) = (entry.index, entry.term, entry.timestamp_ms);
        }
        if term > message_term { Err(Malformed::EntryTermTooHigh) } else { Ok(()) }
    }
}

impl AppendResponse {
    fn check(&self) -> Result<(), Malformed> {
        match *self {
            Self::Matched(index) if index > MAX_INDEX => Err(Malformed::IndexOutOfRange),
            // The place before the first entry is in every log, so nobody can refuse it.
            Self::Rejected { previous_index: 0, .. } => Err(Malformed::IndexOutOfRange),
            Self::Matched(_) | Self::Rejected { .. } => Ok(()),
        }
    }
}
