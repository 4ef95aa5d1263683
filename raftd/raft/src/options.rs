//! What a node is told at its making: who it is, who votes, how long to wait, how much to hold.

use std::collections::BTreeSet;

use crate::{error::OptionsError, types::NodeId};

/// The settings of a node. Pre-vote and check-quorum are not among them: they are always on.
#[derive(Clone, Debug)]
pub struct Options {
    /// This node.
    pub id: NodeId,
    /// Every member, this one among them.
    pub voters: BTreeSet<NodeId>,
    /// A follower that has not heard a leader for this long, and at most twice as long, campaigns.
    /// A leader that has not heard a quorum for this long steps down.
    pub election_ticks: u32,
    /// How often a leader sends heartbeats.
    pub heartbeat_ticks: u32,
    /// The only source of randomness: equal seeds and inputs give equal histories. Take it from the operating
    /// system's entropy at every start, so that no two nodes and no two lives of a node share it.
    pub seed: u64,
    /// An append carries at most this many bytes of entries, or a single larger entry.
    pub max_append_bytes: usize,
    /// How many appends may be under way to one peer.
    pub max_inflight_appends: usize,
    /// A peer is sent no more entries while this many bytes are under way to it.
    pub max_inflight_bytes: usize,
    /// A leader refuses proposals that would make its uncommitted tail larger than this. A batch larger than the
    /// bound is taken when nothing else is uncommitted.
    pub max_uncommitted_bytes: usize,
    /// A follower refuses proposals while it waits for the leader's answer about this many bytes.
    pub max_forwarded_bytes: usize,
    /// How many read indexes may be asked for at a time; more are answered "ask again".
    pub max_pending_reads: usize,
}

impl Options {
    /// Settings that suit a local network, for a node among `voters`.
    pub fn new(id: NodeId, voters: impl IntoIterator<Item = NodeId>, seed: u64) -> Self {
        Self {
            id,
            voters: voters.into_iter().collect(),
            election_ticks: 10,
            heartbeat_ticks: 1,
            seed,
            max_append_bytes: 1 << 20,
            max_inflight_appends: 256,
            max_inflight_bytes: 16 << 20,
            max_uncommitted_bytes: 64 << 20,
            max_forwarded_bytes: 32 << 20,
            max_pending_reads: 65_536,
        }
    }

    /// Says what is wrong, if anything is.
    pub fn check(&self) -> Result<(), OptionsError> {
        if self.id == 0 || self.voters.contains(&0) {
            return Err(OptionsError::ZeroId);
        }
        if !self.voters.contains(&self.id) {
            return Err(OptionsError::NotAVoter(self.id));
        }
        if self.heartbeat_ticks == 0 {
            return Err(OptionsError::NoHeartbeat);
        }
        if self.election_ticks / 2 < self.heartbeat_ticks {
            return Err(OptionsError::ElectionTimeoutTooShort);
        }
        for (name, bound) in [
            ("max_append_bytes", self.max_append_bytes),
            ("max_inflight_appends", self.max_inflight_appends),
            ("max_inflight_bytes", self.max_inflight_bytes),
            ("max_uncommitted_bytes", self.max_uncommitted_bytes),
            ("max_forwarded_bytes", self.max_forwarded_bytes),
            ("max_pending_reads", self.max_pending_reads),
        ] {
            if bound == 0 {
                return Err(OptionsError::ZeroBound(name));
            }
        }
        Ok(())
    }

    /// Everybody but this node.
    pub(crate) fn peers(&self) -> impl Iterator<Item = NodeId> + use<'_> {
        self.voters.iter().copied().filter(|peer| *peer != self.id)
    }

    /// Whether the node is another voter.
    pub(crate) fn is_peer(&self, node: NodeId) -> bool {
        node != self.id && self.voters.contains(&node)
    }
}
