//! Everything that can go wrong, and what a driver must do about it.
//!
//! Two classes. What comes from outside (messages, options) is refused with an
//! error and leaves the node as it was. What says that this node can no longer
//! be trusted (its log cannot be read, it lost what it acknowledged, two
//! leaders in one term) is *fatal*: the process must stop.

use std::error::Error;

use crate::types::{Index, NodeId, Term};

/// The log store could not be read. Always fatal: a node never guesses what its log holds.
#[derive(Debug, thiserror::Error)]
#[error("the log cannot be read: {0}")]
pub struct LogError(#[source] Box<dyn Error + Send + Sync>);

impl LogError {
    /// Wraps the store's own error.
    pub fn new(error: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        Self(error.into())
    }
}

/// Why a node cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum NewError {
    /// The options contradict each other.
    #[error(transparent)]
    Options(#[from] OptionsError),
    /// The log cannot be read.
    #[error(transparent)]
    Log(#[from] LogError),
    /// The hard state is older than the log: one of the two is not this node's.
    #[error("the log ends in term {log_term}, but the hard state knows only term {hard_state_term}")]
    HardStateBehindLog {
        /// Of the log's last entry.
        log_term: Term,
        /// Of the hard state.
        hard_state_term: Term,
    },
}

/// What is wrong with the options.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OptionsError {
    /// Zero names nobody.
    #[error("node id 0 is reserved")]
    ZeroId,
    /// This node is not among the voters.
    #[error("node {0} is not among the voters")]
    NotAVoter(NodeId),
    /// The heartbeat interval is 0.
    #[error("heartbeat_ticks must be at least 1")]
    NoHeartbeat,
    /// An election timeout must outlast at least one lost heartbeat.
    #[error("election_ticks must be at least twice heartbeat_ticks")]
    ElectionTimeoutTooShort,
    /// With this bound at 0 nothing could ever move.
    #[error("{0} must be at least 1")]
    ZeroBound(&'static str),
}

/// Why a message was refused. The node is unchanged, apart from [`StepError::Log`].
#[derive(Debug, thiserror::Error)]
pub enum StepError {
    /// The log cannot be read. Fatal.
    #[error(transparent)]
    Log(#[from] LogError),
    /// The message is for somebody else.
    #[error("the message is for node {0}")]
    WrongRecipient(NodeId),
    /// The sender is not a member, or claims to be this node.
    #[error("node {0} is not a peer")]
    UnknownPeer(NodeId),
    /// No correct node sends this.
    #[error("malformed message: {0}")]
    Malformed(#[from] Malformed),
    /// A leader knows that this node held entries which it does not hold. Fatal: acknowledged entries were lost here.
    #[error(
        "this node acknowledged index {acknowledged}, but its log ends at {last_index}: its log was damaged"
    )]
    LogLost {
        /// What this node had acknowledged, at least.
        acknowledged: Index,
        /// Where its log ends.
        last_index: Index,
    },
    /// Two nodes lead one term. Fatal: some node voted twice.
    #[error("term {term} has two leaders, {first} and {second}: a node lost its vote")]
    TwoLeaders {
        /// The term.
        term: Term,
        /// The leader known so far.
        first: NodeId,
        /// The other one.
        second: NodeId,
    },
}

impl StepError {
    /// The process must stop; otherwise only the message is refused.
    pub fn is_fatal(&self) -> bool {
        match self {
            Self::Log(_) | Self::LogLost { .. } | Self::TwoLeaders { .. } => true,
            Self::WrongRecipient(_) | Self::UnknownPeer(_) | Self::Malformed(_) => false,
        }
    }
}

/// What is wrong with a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    /// The term is 0 where there must be one, or absurdly high.
    #[error("its term is out of range")]
    TermOutOfRange,
    /// An incarnation is absurdly high.
    #[error("an incarnation is out of range")]
    IncarnationOutOfRange,
    /// An index is 0 where there must be one, or absurdly high.
    #[error("an index is out of range")]
    IndexOutOfRange,
    /// Index 0 has term 0, and no other index has.
    #[error("index 0 and term 0 do not come together")]
    BaseMismatch,
    /// The entries do not follow each other.
    #[error("its entries have a gap")]
    Gap,
    /// The entries' terms decrease.
    #[error("the terms of its entries go backward")]
    TermsGoBackward,
    /// The entries' timestamps decrease.
    #[error("the timestamps of its entries go backward")]
    TimestampsGoBackward,
    /// An entry is of a later term than the message.
    #[error("it holds an entry of a later term than its own")]
    EntryTermTooHigh,
    /// A no-op carries a payload.
    #[error("a no-op carries a payload")]
    NoopWithPayload,
    /// A forwarded batch has no payloads.
    #[error("a forwarded batch is empty")]
    EmptyBatch,
    /// A follower acknowledges what this leader does not hold.
    #[error("it acknowledges entries that were never sent")]
    AcknowledgesTooMuch,
    /// A follower confirms a read round that was never started.
    #[error("it confirms a read round that was never started")]
    UnknownReadRound,
}

/// Why a proposal was refused at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ProposeError {
    /// A batch must hold at least one payload, or it would have no place in the log.
    #[error("a batch of proposals must not be empty")]
    EmptyBatch,
}

/// Why leadership is not handed over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TransferError {
    /// Only the leader can hand leadership over.
    #[error("this node does not lead")]
    NotLeader,
    /// Another transfer is under way.
    #[error("leadership is already being handed to node {0}")]
    UnderWay(NodeId),
    /// The successor is not a peer of this node.
    #[error("node {0} is not a peer")]
    UnknownPeer(NodeId),
    /// A learner's vote does not count, so it cannot lead.
    #[error("node {0} does not count yet: it is being filled after its disk was lost, or was never started")]
    NotAVoter(NodeId),
    /// This node is the only member.
    #[error("there is nobody to take over")]
    NoSuccessor,
}
