//! How long a cluster is without a leader after the leader was killed and its streams broke.

use std::collections::BTreeMap;

use raft::{HardState, Message, Node, NodeId, Options, Role, Standing};

use crate::support::{Contents, Disk, Write};

const ELECTION_TICKS: u32 = 10;

/// A cluster without faults: messages take no time, syncs neither.
struct Cluster {
    nodes: BTreeMap<NodeId, Node>,
    disks: BTreeMap<NodeId, Disk>,
}

impl Cluster {
    fn new(count: u64, seed: u64) -> Self {
        let mut cluster = Self { nodes: BTreeMap::new(), disks: BTreeMap::new() };
        for id in 1..=count {
            let disk = Disk::holding(true, Contents::default());
            let options = Options {
                election_ticks: ELECTION_TICKS,
                heartbeat_ticks: 1,
                ..Options::new(id, 1..=count, seed * 10 + id)
            };
            let voter = HardState { standing: Standing::Voter, ..HardState::default() };
            cluster.nodes.insert(id, Node::new(options, voter, disk.log()).unwrap());
            cluster.disks.insert(id, disk);
        }
        cluster
    }

    fn tick(&mut self) {
        self.nodes.values_mut().for_each(Node::tick);
        self.settle();
    }

    fn settle(&mut self) {
        loop {
            let mut messages: Vec<Message> = Vec::new();
            for (id, node) in &mut self.nodes {
                let disk = self.disks.get_mut(id).unwrap();
                while let Some(mut ready) = node.ready().unwrap() {
                    messages.append(&mut ready.messages);
                    if ready.must_persist() {
                        disk.write(Write::take_from(&mut ready));
                    }
                }
                if let Some((number, after)) = disk.sync(usize::MAX) {
                    messages.extend(after);
                    node.persisted(number);
                }
            }
            let quiet = messages.is_empty();
            for message in messages {
                if let Some(node) = self.nodes.get_mut(&message.to) {
                    node.step(message).unwrap();
                }
            }
            if quiet {
                return;
            }
        }
    }

    fn leader(&self) -> Option<NodeId> {
        self.nodes.iter().find(|(_, node)| node.role() == Role::Leader).map(|(id, _)| *id)
    }

    fn ticks_until_led(&mut self) -> u32 {
        let mut ticks = 0;
        while self.leader().is_none() {
            self.tick();
            ticks += 1;
            assert!(ticks < 20 * ELECTION_TICKS, "no leader");
        }
        ticks
    }
}

#[test]
fn killed_leader_is_replaced_well_under_an_election_timeout() {
    for count in [3, 5] {
        for seed in 0..500 {
            let mut cluster = Cluster::new(count, seed);
            cluster.ticks_until_led();
            let leader = cluster.leader().unwrap();
            cluster.nodes.remove(&leader);
            for node in cluster.nodes.values_mut() {
                node.leader_unreachable(leader);
            }
            cluster.settle();
            let ticks = cluster.ticks_until_led();
            assert!(
                ticks <= ELECTION_TICKS / 2,
                "{count} nodes, seed {seed}: {ticks} ticks without a leader"
            );
        }
    }
}

#[test]
fn silent_leader_is_replaced_within_two_election_timeouts_and_a_half() {
    for count in [3, 5] {
        for seed in 0..500 {
            let mut cluster = Cluster::new(count, seed);
            cluster.ticks_until_led();
            let leader = cluster.leader().unwrap();
            cluster.nodes.remove(&leader);
            let ticks = cluster.ticks_until_led();
            assert!(
                ticks <= ELECTION_TICKS * 5 / 2,
                "{count} nodes, seed {seed}: {ticks} ticks without a leader"
            );
        }
    }
}
