//! Handing leadership to a chosen successor (dissertation, section 3.10).
//!
//! The leader takes no new proposals, waits until the successor holds its whole
//! log, and tells it to campaign at once. If nothing has come of it within an
//! election timeout, the leader goes on.

use std::cmp::Reverse;

use crate::{
    error::TransferError,
    message::Body,
    node::{Node, State},
    types::NodeId,
};

/// A transfer under way.
#[derive(Debug)]
pub(crate) struct Transfer {
    pub(crate) to: NodeId,
    elapsed: u32,
    told: bool,
}

impl Node {
    /// Hands leadership to a peer, or else to the one that holds most of the log, of those heard lately if there are
    /// any.
    ///
    /// # Errors
    /// This node does not lead, hands over already, or has nobody to hand over to.
    pub fn transfer_leadership(&mut self, to: Option<NodeId>) -> Result<(), TransferError> {
        let State::Leader(leader) = &mut self.state else { return Err(TransferError::NotLeader) };
        if let Some(transfer) = &leader.transfer {
            return Err(TransferError::UnderWay(transfer.to));
        }
        let to = match to {
            Some(peer) => match leader.progress.get(&peer) {
                Some(progress) if progress.counts() => peer,
                Some(_) => return Err(TransferError::NotAVoter(peer)),
                None => return Err(TransferError::UnknownPeer(peer)),
            },
            None => leader
                .progress
                .iter()
                .filter(|(_, progress)| progress.counts())
                .max_by_key(|(peer, progress)| {
                    let active = progress.was_heard_within(self.options.election_ticks, self.ticks);
                    (active, progress.matched(), Reverse(**peer))
                })
                .map(|(peer, _)| *peer)
                .ok_or(TransferError::NoSuccessor)?,
        };
        leader.transfer = Some(Transfer { to, elapsed: 0, told: false });
        self.continue_transfer();
        Ok(())
    }

    /// Says whether this node must leave leading to others, because its state machine cannot be trusted. It then hands
    /// over what it leads, tries again until somebody takes it, and does not campaign. It votes and replicates as ever:
    /// its log is as good as any. Forgotten by a restart.
    pub fn set_must_not_lead(&mut self, must_not_lead: bool) {
        self.must_not_lead = must_not_lead;
        self.yield_leadership();
    }

    pub(crate) fn yield_leadership(&mut self) {
        if self.must_not_lead {
            // Not the leader, under way, or nobody there yet: in every case the next tick looks again.
            let _ = self.transfer_leadership(None);
        }
    }

    /// Tells the successor to campaign, once it holds everything.
    pub(crate) fn continue_transfer(&mut self) {
        let State::Leader(leader) = &mut self.state else { return };
        let Some(transfer) = &mut leader.transfer else { return };
        let to = transfer.to;
        if !transfer.told && leader.progress[&to].matched() == self.log.last().index {
            transfer.told = true;
            self.send(to, Body::TimeoutNow);
        }
    }

    pub(crate) fn tick_transfer(&mut self) {
        let State::Leader(leader) = &mut self.state else { return };
        let Some(transfer) = &mut leader.transfer else { return };
        transfer.elapsed += 1;
        if transfer.elapsed >= self.options.election_ticks {
            leader.transfer = None;
        }
    }

    /// The leader wants this node to succeed it: campaign without asking first.
    pub(crate) fn handle_timeout_now(&mut self, from: NodeId) {
        let asked_by_leader =
            matches!(self.state, State::Follower { leader: Some(leader) } if leader == from);
        if asked_by_leader && self.counts() && !self.must_not_lead {
            self.become_candidate(true);
        }
    }
}
