//! Who lacks room on its filesystems, and whether new proposals are taken in spite of it.
//!
//! A leader takes proposals while it has room itself and a majority has, it included: an entry that could be committed
//! only by filling up the rest of a member's room is not begun. What is under way, elections and compaction are never
//! held up. A minority without room goes on until its disks are full; its raftds then stop and, thanks to their
//! ballast, come back. A node without room refuses its own clients in any case: it may not be able to execute what
//! they write. It knows the reasons as text, and nothing of directories.

use std::{collections::BTreeMap, sync::Arc};

use raft::NodeId;

/// Why there is no room, in words for people; None where there is.
pub type Shortage = Option<Arc<str>>;

/// What is known of the room of every member.
#[derive(Debug, Default)]
pub struct MembersRoom {
    node_id: NodeId,
    members: usize,
    log: Shortage,
    state_machine: Shortage,
    /// Only those without room.
    peers: BTreeMap<NodeId, Arc<str>>,
}

impl MembersRoom {
    /// Everybody has room until they say otherwise.
    pub fn new(node_id: NodeId, members: usize) -> Self {
        Self { node_id, members, ..Self::default() }
    }

    /// Of this node's log.
    pub fn log_is(&mut self, shortage: Shortage) {
        self.log = shortage;
    }

    /// Of the state machine beside this node.
    pub fn state_machine_is(&mut self, shortage: Shortage) {
        self.state_machine = shortage;
    }

    /// What a peer says of itself.
    pub fn peer_is(&mut self, peer: NodeId, shortage: Shortage) {
        match shortage {
            Some(why) => drop(self.peers.insert(peer, why)),
            None => drop(self.peers.remove(&peer)),
        }
    }

    /// Whether the peer has room, as far as is known.
    pub fn has_room(&self, peer: NodeId) -> bool {
        !self.peers.contains_key(&peer)
    }

    /// Whether most members have room, as far as is known.
    pub fn majority_has_room(&self) -> bool {
        let without_room = self.peers.len() + usize::from(self.own().is_some());
        self.members - without_room > self.members / 2
    }

    /// What this node says of itself to its peers.
    pub fn own(&self) -> Shortage {
        self.log.clone().or_else(|| self.state_machine.clone())
    }

    /// Why this node, as the leader, takes no proposals.
    pub fn leaders_refusal(&self) -> Shortage {
        if let Some(own) = self.own() {
            return Some(own);
        }
        if self.majority_has_room() {
            return None;
        }
        let peers: Vec<String> = self.peers.iter().map(|(id, why)| format!("node {id}: {why}")).collect();
        Some(format!("most members lack room: {}", peers.join("; ")).into())
    }

    /// Why this node's clients are refused, under this leader.
    pub fn refusal(&self, leader: Option<NodeId>) -> Shortage {
        match leader {
            Some(leader) if leader == self.node_id => self.leaders_refusal(),
            Some(leader) => self.own().or_else(|| {
                self.peers.get(&leader).map(|why| format!("the leader, node {leader}, refuses: {why}").into())
            }),
            None => self.own(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn full(what: &str) -> Shortage {
        Some(what.into())
    }

    #[test]
    fn a_leader_without_room_refuses_and_so_does_one_whose_state_machine_has_none() {
        let mut room = MembersRoom::new(1, 3);
        assert_eq!(room.leaders_refusal(), None);
        room.state_machine_is(full("sql"));
        assert_eq!(room.leaders_refusal(), full("sql"));
        room.log_is(full("raft"));
        assert_eq!(room.leaders_refusal(), full("raft"));
        room.log_is(None);
        room.state_machine_is(None);
        assert_eq!(room.leaders_refusal(), None);
    }

    #[test]
    fn a_minority_without_room_stops_nobody_else_and_a_majority_stops_all() {
        let mut room = MembersRoom::new(1, 3);
        room.peer_is(2, full("raft"));
        assert_eq!(room.leaders_refusal(), None);
        room.peer_is(3, full("raft"));
        assert_eq!(room.leaders_refusal(), full("most members lack room: node 2: raft; node 3: raft"));
        room.peer_is(2, None);
        assert_eq!(room.leaders_refusal(), None);

        let mut even = MembersRoom::new(1, 4);
        even.peer_is(2, full("raft"));
        assert_eq!(even.leaders_refusal(), None);
        even.peer_is(3, full("raft"));
        assert!(even.leaders_refusal().is_some(), "two of four are no majority");
    }

    #[test]
    fn a_followers_clients_hear_of_its_own_shortage_and_of_the_leaders() {
        let mut room = MembersRoom::new(1, 3);
        room.peer_is(2, full("raft"));
        assert_eq!(room.refusal(Some(3)), None);
        assert_eq!(room.refusal(Some(2)), full("the leader, node 2, refuses: raft"));
        assert_eq!(room.refusal(Some(1)), None);
        room.log_is(full("own"));
        assert_eq!(room.refusal(Some(3)), full("own"));
        assert_eq!(room.refusal(None), full("own"));
    }
}
