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
    /// Opens a leader's term; has no payload (Raft dissertation, section 6.4, step 1).
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

/// What must survive a crash beside the log (Raft paper, figure 2, "persistent state").
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HardState {
    /// The latest term this node has seen.
    pub term: Term,
    /// Whom it voted for in that term.
    pub voted_for: Option<NodeId>,
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
