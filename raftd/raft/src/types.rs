//! The words that every other file uses: ids, terms, indexes, entries, roles.
//!
//! Plain data only; nothing here knows how consensus works.

use bytes::Bytes;

/// Names a member of the cluster. Zero names nobody.
pub type NodeId = u64;

/// A leader's reign. Term 0 precedes the first election.
pub type Term = u64;

/// A place in the log, counted from 1. Index 0 precedes the first entry.
pub type Index = u64;

/// What an entry costs beside its payload, roughly, wherever bytes are bounded.
/// Without it, empty payloads would pass every bound.
const ENTRY_OVERHEAD_BYTES: usize = 40;

/// What an entry is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EntryKind {
    /// Opens a leader's term (Raft dissertation, section 6.4, step 1), or proves to a leader that it commits without a
    /// learner; has no payload.
    Noop,
    /// Carries bytes for the state machine.
    Payload,
}

/// An entry of the replicated log. Index and term name it: two entries with the same ones are the same.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Its place in the log.
    pub index: Index,
    /// The term of the leader that made it.
    pub term: Term,
    /// What it is for.
    pub kind: EntryKind,
    /// The leader's wall clock, never less than that of the entry before, whoever leads.
    pub timestamp_ms: u64,
    /// Opaque to the core.
    pub payload: Bytes,
}

impl Entry {
    /// What the entry counts for where bytes are bounded.
    pub fn size_bytes(&self) -> usize {
        self.payload.len() + ENTRY_OVERHEAD_BYTES
    }

    /// Its place, without its payload.
    pub fn position(&self) -> Position {
        Position { index: self.index, term: self.term, timestamp_ms: self.timestamp_ms }
    }
}

/// Where an entry stands, without its payload. All zeros is the place before the first entry.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Position {
    /// The entry's index.
    pub index: Index,
    /// The entry's term.
    pub term: Term,
    /// The entry's timestamp.
    pub timestamp_ms: u64,
}

impl Position {
    /// The end of a log whose last entry this is.
    pub fn end(self) -> LogEnd {
        LogEnd { term: self.term, index: self.index }
    }
}

/// Where a log ends. Of two logs, the one with the greater end is more up to date (paper, section 5.4.1).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct LogEnd {
    /// The last entry's term. It decides first.
    pub term: Term,
    /// The last entry's index.
    pub index: Index,
}

/// Tells the lives of a member's data directory apart: a later one has a higher number.
pub type Incarnation = u64;

/// Whether a member counts, and what its data directory has lived through. In the order in which one can follow from
/// the other.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Standing {
    /// An empty data directory: a first start or a lost disk, nobody knows yet. Does not count.
    #[default]
    New,
    /// Certainly at its first start, but not everybody is known to be. Does not count.
    Founder,
    /// Its disk was lost: it is being filled. Does not count.
    Learner,
    /// Votes, leads, and is counted.
    Voter,
}

/// What must survive a crash beside the log (Raft paper, figure 2, "persistent state").
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HardState {
    /// The latest term this node has seen.
    pub term: Term,
    /// Whom it voted for in that term.
    pub voted_for: Option<NodeId>,
    /// Which life of this member's data directory this is.
    pub incarnation: Incarnation,
    /// Whether the member counts.
    pub standing: Standing,
    /// No log that ends before this has the member's support: what the cluster was founded on.
    pub log_floor: LogEnd,
}

impl HardState {
    /// Of a data directory that was just made. The incarnation must be higher than that of any earlier directory of
    /// the same member; the wall clock is a good start.
    pub fn new(incarnation: Incarnation) -> Self {
        Self { incarnation, ..Self::default() }
    }
}

/// What a node currently is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Follows a leader, or waits for one.
    Follower,
    /// Asks whether it would be elected, which disturbs nobody (dissertation, section 9.6).
    PreCandidate,
    /// Asks for votes.
    Candidate,
    /// Leads its term.
    Leader,
}
