//! The simulation: nodes, disks, a network and clients, driven by one seed.

mod failover;
mod oracle;

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use oracle::Oracle;
use raft::{
    HardState, Incarnation, Index, Message, Node, NodeId, Options, Position, Role, SnapshotFailed, Standing,
};
use rand_chacha::{
    ChaCha8Rng,
    rand_core::{Rng, SeedableRng},
};

use crate::support::{Contents, Disk, Write};

const ELECTION_TICKS: u32 = 10;

/// A node, its disk and its state machine.
struct Host {
    /// None while it is down.
    node: Option<Node>,
    disk: Disk,
    /// How far the state machine has applied, and how far it would be after a crash.
    applied: Position,
    applied_durably: Position,
    clock_ms: u64,
    /// What it held before it lost its disk, until it counts again.
    lost: Option<Contents>,
}

impl Host {
    /// A disk that counts has replaced the lost one.
    fn may_count_again(&mut self) {
        if self.disk.durable.hard_state.standing == Standing::Voter {
            self.lost = None;
        }
    }
}

/// A snapshot on its way.
struct Transit {
    from: NodeId,
    to: NodeId,
    base: Position,
}

pub struct Simulation {
    rng: ChaCha8Rng,
    now: u64,
    hosts: BTreeMap<NodeId, Host>,
    /// By time of arrival; the second number keeps the order of sending.
    network: BTreeMap<(u64, u64), Message>,
    sent: u64,
    /// Pairs that cannot hear each other, in this direction.
    cut: BTreeSet<(NodeId, NodeId)>,
    snapshots: Vec<Transit>,
    oracle: Oracle,
    /// How bad this seed's world is, in percent.
    loss: u32,
    repetition: u32,
    max_delay: u32,
    crashes: u32,
    wipes: u32,
    next_id: u64,
}

/// What a directory holds that was just made.
fn empty(incarnation: Incarnation) -> Contents {
    Contents { hard_state: HardState::new(incarnation), ..Contents::default() }
}

impl Simulation {
    pub fn new(seed: u64) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let mut below = |bound: u32| rng.next_u32() % bound;
        let count = if below(2) == 0 { 3 } else { 5 };
        let (loss, repetition, max_delay) =
            ([0, 1, 10, 30][below(4) as usize], [0, 5, 20][below(3) as usize], 1 + below(20));
        let crashes = [0, 1, 4][below(3) as usize];
        let wipes = [0, 1, 4][below(3) as usize];
        let hosts = (1..=count)
            .map(|id| {
                let disk = Disk::holding(below(2) == 0, empty(1));
                let (applied, applied_durably) = (Position::default(), Position::default());
                let clock_ms = 1_000 + u64::from(below(1_000));
                (id, Host { node: None, disk, applied, applied_durably, clock_ms, lost: None })
            })
            .collect();
        let mut simulation = Self {
            rng,
            now: 0,
            hosts,
            network: BTreeMap::new(),
            sent: 0,
            cut: BTreeSet::new(),
            snapshots: Vec::new(),
            oracle: Oracle::default(),
            loss,
            repetition,
            max_delay,
            crashes,
            wipes,
            next_id: 0,
        };
        for id in simulation.ids() {
            simulation.start(id);
        }
        simulation
    }

    pub fn run(&mut self) {
        for _ in 0..2_500 {
            self.step();
        }
        self.heal();
        self.must_make_progress();
    }

    fn ids(&self) -> Vec<NodeId> {
        self.hosts.keys().copied().collect()
    }

    fn below(&mut self, bound: u32) -> u32 {
        self.rng.next_u32() % bound.max(1)
    }

    fn chance(&mut self, per_mille: u32) -> bool {
        self.below(1_000) < per_mille
    }

    fn anyone(&mut self) -> NodeId {
        1 + u64::from(self.below(self.hosts.len() as u32))
    }

    fn start(&mut self, id: NodeId) {
        let seed = self.rng.next_u64();
        let voters = self.ids();
        let host = self.hosts.get_mut(&id).unwrap();
        let options = Options {
            election_ticks: ELECTION_TICKS,
            heartbeat_ticks: 2,
            max_append_bytes: 150,
            max_inflight_appends: 4,
            max_inflight_bytes: 400,
            max_uncommitted_bytes: 2_000,
            max_forwarded_bytes: 1_000,
            max_pending_reads: 20,
            ..Options::new(id, voters, seed)
        };
        host.may_count_again();
        let hard_state: HardState = host.disk.durable.hard_state;
        let mut node = Node::new(options, hard_state, host.disk.log()).unwrap();
        node.set_clock(host.clock_ms);
        // The state machine says what it holds; beyond the commit index that restores a log's beginning that was lost
        // between the install of a snapshot and its record in the log.
        host.applied = host.applied_durably;
        node.install_snapshot(host.applied).unwrap();
        host.node = Some(node);
        self.oracle.started(id, &self.hosts[&id].disk.durable);
        self.pump(id);
    }

    fn crash(&mut self, id: NodeId) {
        let survive = self.below(4) as usize;
        let host = self.hosts.get_mut(&id).unwrap();
        if host.node.take().is_some() {
            host.disk.crash(survive);
            self.oracle.crashed(id);
            // Streams that carried its messages break.
            if self.chance(500) {
                for peer in self.ids() {
                    self.with(peer, |node| {
                        node.leader_unreachable(id);
                        node.peer_unreachable(id);
                    });
                }
            }
        }
    }

    /// The host loses its whole disk, if fewer than half of the hosts do not count for that reason: no more can be
    /// lost without losing what was promised.
    fn wipe(&mut self, id: NodeId) {
        let lost = self.hosts.values().filter(|host| host.lost.is_some()).count();
        if self.hosts[&id].lost.is_none() && 2 * (lost + 1) >= self.hosts.len() {
            return;
        }
        self.crash(id);
        // The state machine may lie on another disk, and the clock that names incarnations may run backward.
        let (keeps_state, clock_jumps) = (self.chance(300), self.chance(100));
        let eager = self.chance(500);
        let host = self.hosts.get_mut(&id).unwrap();
        let before = std::mem::take(&mut host.disk.durable);
        let incarnation = before.hard_state.incarnation + u64::from(self.rng.next_u32());
        host.disk = Disk::holding(eager, empty(if clock_jumps { incarnation / 2 } else { incarnation }));
        // What was acknowledged last counts; an incarnation that never counted acknowledged nothing.
        host.lost.get_or_insert(before);
        if !keeps_state {
            (host.applied, host.applied_durably) = (Position::default(), Position::default());
        }
    }

    /// Does something to a node that is up, and what comes of it.
    fn with(&mut self, id: NodeId, action: impl FnOnce(&mut Node)) {
        if let Some(node) = &mut self.hosts.get_mut(&id).unwrap().node {
            action(node);
            self.pump(id);
        }
    }

    fn step(&mut self) {
        self.now += 1;
        self.deliver();
        let id = self.anyone();
        match self.below(100) {
            0..35 => self.tick(id),
            35..60 => self.sync(id),
            60..70 => self.propose(id),
            70..78 => self.read(id),
            78..80 => self.compact(id),
            80..83 => self.finish_snapshot(),
            83..84 => self.misreport_a_stream(id),
            84..85 if self.chance(150) => self.with(id, |node| {
                let _not_the_leader = node.transfer_leadership(None);
            }),
            85..86 if self.chance(300) => self.partition(),
            86..88 if self.chance(300) => self.cut.clear(),
            88..90 => self.jump_clock(id),
            90..93 => {
                let crashes = self.crashes;
                if self.chance(crashes * 30) {
                    self.crash(id);
                }
            }
            96..98 => {
                let wipes = self.wipes;
                if self.chance(wipes * 30) {
                    self.wipe(id);
                }
            }
            93..96 if self.hosts[&id].node.is_none() => self.start(id),
            _ => {}
        }
    }

    fn tick(&mut self, id: NodeId) {
        let host = self.hosts.get_mut(&id).unwrap();
        host.clock_ms += 10;
        let clock_ms = host.clock_ms;
        self.with(id, |node| {
            node.set_clock(clock_ms);
            node.tick();
        });
    }

    fn jump_clock(&mut self, id: NodeId) {
        let jump = u64::from(self.below(10_000));
        let forward = self.chance(500);
        let host = self.hosts.get_mut(&id).unwrap();
        host.clock_ms = if forward { host.clock_ms + jump } else { host.clock_ms.saturating_sub(jump) };
    }

    fn sync(&mut self, id: NodeId) {
        let writes = 1 + self.below(3) as usize;
        let host = self.hosts.get_mut(&id).unwrap();
        if host.node.is_none() {
            return;
        }
        let Some((number, messages)) = host.disk.sync(writes) else { return };
        host.may_count_again();
        self.send(messages);
        self.with(id, |node| node.persisted(number));
    }

    fn propose(&mut self, id: NodeId) {
        if self.hosts[&id].node.is_none() {
            return;
        }
        let batch_id = self.unique();
        let payloads: Vec<Bytes> =
            (0..=self.below(3)).map(|nth| Bytes::from(format!("{id}/{batch_id}/{nth}"))).collect();
        self.oracle.proposed(id, batch_id, &payloads);
        self.with(id, |node| node.propose(batch_id, payloads).unwrap());
    }

    fn read(&mut self, id: NodeId) {
        if self.hosts[&id].node.is_none() {
            return;
        }
        let read_id = self.unique();
        self.oracle.read_asked(id, read_id);
        self.with(id, |node| node.read_index(read_id));
    }

    fn unique(&mut self) -> u64 {
        self.next_id += 1;
        self.next_id
    }

    /// The state machine syncs, and the log discards some of what it covers.
    fn compact(&mut self, id: NodeId) {
        let host = self.hosts.get_mut(&id).unwrap();
        let Some(node) = &host.node else { return };
        host.applied_durably = host.applied;
        // A state machine that became a snapshot may be ahead of the log.
        let upto = host.applied_durably.index.min(node.status().deliverable_index);
        let base = host.disk.durable.base.index;
        // A driver does not compact while an install is under way.
        let installing = host.disk.pending.iter().any(|write| write.install.is_some());
        if upto > base && !installing {
            let index = base + 1 + u64::from(self.rng.next_u32()) % (upto - base);
            self.hosts.get_mut(&id).unwrap().disk.compact(index);
        }
    }

    fn finish_snapshot(&mut self) {
        if self.snapshots.is_empty() {
            return;
        }
        let nth = self.below(self.snapshots.len() as u32) as usize;
        let Transit { from, to, base } = self.snapshots.swap_remove(nth);
        if self.chance(200) || self.hosts[&to].node.is_none() {
            self.with(from, |node| node.snapshot_finished(to, Err(SnapshotFailed)));
            return;
        }
        let host = self.hosts.get_mut(&to).unwrap();
        if base.index > host.applied.index {
            // The state machine becomes the snapshot, durably, before the log moves.
            host.applied = base;
            host.applied_durably = base;
        }
        self.with(to, |node| {
            node.install_snapshot(base).unwrap();
        });
        self.with(from, |node| node.snapshot_finished(to, Ok(base.index)));
    }

    /// A stream breaks and comes back although both ends live.
    fn misreport_a_stream(&mut self, id: NodeId) {
        let peer = self.anyone();
        self.with(id, |node| {
            node.leader_unreachable(peer);
            node.peer_unreachable(peer);
            node.peer_reachable(peer);
        });
    }

    fn partition(&mut self) {
        let ids = self.ids();
        let side: BTreeSet<NodeId> = ids.iter().copied().filter(|_| self.chance(500)).collect();
        let one_way = self.chance(200);
        for a in &ids {
            for b in &ids {
                if side.contains(a) && !side.contains(b) {
                    self.cut.insert((*a, *b));
                    if !one_way {
                        self.cut.insert((*b, *a));
                    }
                }
            }
        }
    }

    fn send(&mut self, messages: Vec<Message>) {
        for message in messages {
            if self.below(100) < self.loss || self.cut.contains(&(message.from, message.to)) {
                continue;
            }
            let copies = if self.below(100) < self.repetition { 2 } else { 1 };
            for _ in 0..copies {
                self.sent += 1;
                let max_delay = self.max_delay;
                let at = self.now + u64::from(self.below(max_delay));
                self.network.insert((at, self.sent), message.clone());
            }
        }
    }

    fn deliver(&mut self) {
        while let Some(arrival) = self.network.first_entry() {
            if arrival.key().0 > self.now {
                return;
            }
            let message = arrival.remove();
            if !self.cut.contains(&(message.from, message.to)) {
                self.with(message.to, |node| node.step(message).unwrap());
            }
        }
    }

    /// Takes what a node wants done, checks it and sees to it.
    fn pump(&mut self, id: NodeId) {
        loop {
            let host = self.hosts.get_mut(&id).unwrap();
            let Some(node) = &mut host.node else { return };
            let Some(mut ready) = node.ready().unwrap() else { return };
            let status = node.status();
            if ready.must_persist() {
                host.disk.write(Write::take_from(&mut ready));
            }
            assert!(ready.entries.is_empty() && ready.messages_after_persist.is_empty());
            let write = host.disk.pending.back().filter(|write| write.number == ready.number);
            self.oracle.saw(id, &status, &ready, write);
            while host.applied.index < ready.deliverable_index {
                let next = host.applied.index + 1;
                let entry =
                    host.disk.durable.entry(next).expect("what is deliverable is durable and not compacted");
                self.oracle.delivered(id, entry);
                host.applied = entry.position();
            }
            let voters = self.hosts.len();
            self.oracle.check_commit(
                ready.commit_index,
                voters,
                self.hosts.values().map(|host| host.lost.as_ref().unwrap_or(&host.disk.durable)),
            );
            for to in ready.snapshots {
                let base = self.hosts[&id].applied;
                self.snapshots.push(Transit { from: id, to, base });
            }
            self.send(ready.messages);
        }
    }

    fn heal(&mut self) {
        self.cut.clear();
        (self.loss, self.repetition, self.max_delay) = (0, 0, 1);
        for id in self.ids() {
            if self.hosts[&id].node.is_none() {
                self.start(id);
            }
        }
    }

    /// Lets everything happen that needs no time.
    fn settle(&mut self) {
        loop {
            let pending = self.hosts.values().any(|host| !host.disk.pending.is_empty());
            if !pending && self.network.is_empty() && self.snapshots.is_empty() {
                return;
            }
            self.now += 1;
            self.deliver();
            self.finish_snapshot();
            for id in self.ids() {
                self.sync(id);
            }
        }
    }

    /// Once the faults stop, a leader is found, everybody agrees, and proposals of every node commit.
    fn must_make_progress(&mut self) {
        let mut ticks = 0;
        while !self.agree() {
            assert!(ticks < 12 * ELECTION_TICKS, "no agreement after {ticks} ticks: {:?}", self.statuses());
            ticks += 1;
            for id in self.ids() {
                self.tick(id);
            }
            self.settle();
        }
        for id in self.ids() {
            self.propose(id);
            self.read(id);
        }
        self.settle();
        assert!(self.agree(), "proposals did not commit: {:?}", self.statuses());
        // Answers that were lost are given up after two election timeouts.
        for _ in 0..2 * ELECTION_TICKS {
            for id in self.ids() {
                self.tick(id);
            }
            self.settle();
        }
        assert!(self.agree(), "the calm did not last: {:?}", self.statuses());
        for id in self.ids() {
            self.oracle.nothing_left_open(id);
        }
        self.oracle.committed_proposals_of_the_end(self.hosts.len());
    }

    fn agree(&self) -> bool {
        let statuses = self.statuses();
        let Some(leader) = statuses.iter().find(|status| status.role == Role::Leader) else { return false };
        let committed: Index = leader.last_index;
        statuses.iter().all(|status| {
            status.leader == Some(leader.id)
                && status.standing == Standing::Voter
                && status.term == leader.term
                && status.last_index == committed
                && status.deliverable_index == committed
        })
    }

    fn statuses(&self) -> Vec<raft::Status> {
        self.hosts.values().filter_map(|host| host.node.as_ref()).map(Node::status).collect()
    }
}
