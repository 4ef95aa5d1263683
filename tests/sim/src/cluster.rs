//! A simulated cluster: its hosts, its network, its clock, and the events that wait for their time.
//!
//! One thread, one queue of events, and all randomness from the seed: the same [`Options`] give the same history,
//! always. What the events do is told in `raftd_process`, `sqlited_process`, `snapshots`, `clients` and `injection`.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
    time::{Duration, Instant},
};

use bytes::Bytes;
use prost::Message as _;
use raft::{Message, NodeId};
use raftd::convert::{self, Envelope};
use resqlite::api::PeerMessage;

use crate::{
    clients::Client,
    disk::Disk,
    faults::{self, Fault, Moment, Strikes, Victim},
    machine::{Hash, Machine},
    model::Model,
    options::{Defect, Options},
    oracle::Oracle,
    raftd_process::Raftd,
    random::Random,
    snapshots::Transfer,
};

/// How often a node's core is told that time has passed, by its own clock.
pub(crate) const TICK_MS: u64 = 10;
/// In ticks.
pub(crate) const ELECTION_TICKS: u32 = 10;
/// The cluster that the hosts belong to.
pub(crate) const CLUSTER_ID: u64 = 0xC1;
/// 2024-02-29 12:00:00 UTC, when every history begins.
const START_MS: i64 = 1_709_208_000_000;
/// The faults end at the latest when so much time has passed since the last operation began.
const LAST_WORDS_MS: u64 = 1_500;
/// The random stream of everything but the faults.
const STREAM: u64 = 0;

/// After the faults have stopped, this is enough for a leader, every outstanding operation, one more of every client,
/// and for every node to apply it all: fifty election timeouts.
pub const PROGRESS_WITHIN_MS: u64 = 50 * ELECTION_TICKS as u64 * TICK_MS;

/// Something that waits for its time.
pub(crate) enum Event {
    Tick(NodeId, u64),
    LogTurn(NodeId, u64),
    Apply(NodeId, u64),
    SyncDatabase(NodeId, u64),
    Attach(NodeId),
    StartRaftd(NodeId),
    StartSqlited(NodeId),
    Message(NodeId, Bytes),
    Client(usize, u64),
    SnapshotArrives(Box<Transfer>),
    SnapshotConfirms(Box<Transfer>, u64),
    SnapshotFailed { from: NodeId, life: u64, to: NodeId },
    PowerCut(NodeId),
    CutEnds(u64),
    WeatherEnds,
    FastDisk(NodeId),
    SqlDiskHeals(NodeId),
}

impl Event {
    /// On which host it happens.
    fn host(&self) -> Option<NodeId> {
        match self {
            Self::Tick(host, _)
            | Self::LogTurn(host, _)
            | Self::Apply(host, _)
            | Self::SyncDatabase(host, _)
            | Self::Attach(host)
            | Self::StartRaftd(host)
            | Self::StartSqlited(host)
            | Self::Message(host, _)
            | Self::SnapshotFailed { from: host, .. } => Some(*host),
            Self::SnapshotArrives(transfer) | Self::SnapshotConfirms(transfer, _) => Some(transfer.to),
            Self::Client(..)
            | Self::PowerCut(_)
            | Self::CutEnds(_)
            | Self::WeatherEnds
            | Self::FastDisk(_)
            | Self::SqlDiskHeals(_) => None,
        }
    }
}

/// A crash that waits for its moment.
#[derive(Clone, Copy)]
pub(crate) struct Armed {
    pub(crate) moment: Moment,
    pub(crate) victim: Victim,
    pub(crate) down_ms: u64,
}

/// One host: two processes, their disks, its clock.
pub(crate) struct Host {
    pub(crate) id: NodeId,
    pub(crate) disk: Disk,
    pub(crate) raftd: Option<Raftd>,
    /// Counts the starts of raftd.
    pub(crate) raftd_life: u64,
    pub(crate) machine: Machine,
    /// Counts the starts of sqlited.
    pub(crate) sqlited_life: u64,
    /// The state machine follows the log.
    pub(crate) attached: bool,
    /// An event to apply is on its way.
    pub(crate) apply_due: bool,
    pub(crate) armed: Option<Armed>,
    pub(crate) paused_until: u64,
    pub(crate) sync_ms: u64,
    /// Its database's disk fails, or will: because it is full, or because it is broken.
    pub(crate) database_fails_full: Option<bool>,
    /// A bit on its disk has changed.
    pub(crate) rotten: bool,
    /// It refuses to start, as it must.
    pub(crate) refuses: bool,
    /// Its disk was lost, and it does not count again yet.
    pub(crate) lost: bool,
    /// It has counted once.
    pub(crate) has_counted: bool,
    clock_ms: i64,
    clock_since: u64,
    clock_per_mille: u64,
}

impl Host {
    fn new(id: NodeId, directory: &Path, random: &mut Random) -> Self {
        Self {
            id,
            disk: Disk::new(),
            raftd: None,
            raftd_life: 0,
            machine: Machine::new(directory.join(id.to_string()), random.chance(500)),
            sqlited_life: 0,
            attached: false,
            apply_due: false,
            armed: None,
            paused_until: 0,
            sync_ms: 3,
            database_fails_full: None,
            rotten: false,
            refuses: false,
            lost: false,
            has_counted: false,
            clock_ms: START_MS + random.below(2_000) as i64,
            clock_since: 0,
            clock_per_mille: random.between(950, 1_050),
        }
    }

    /// What its clock shows.
    pub(crate) fn clock_ms(&self, now: u64) -> u64 {
        let passed = (now - self.clock_since) * self.clock_per_mille / 1_000;
        (self.clock_ms + passed as i64).max(0) as u64
    }

    /// Its clock jumps, and runs at another speed from now on.
    pub(crate) fn set_clock(&mut self, now: u64, jump_ms: i64, per_mille: Option<u64>) {
        self.clock_ms = self.clock_ms(now) as i64 + jump_ms;
        self.clock_since = now;
        self.clock_per_mille = per_mille.unwrap_or(self.clock_per_mille);
    }

    fn tick_ms(&self) -> u64 {
        (TICK_MS * 1_000 / self.clock_per_mille).max(1)
    }
}

/// What the network does to messages.
#[derive(Clone, Copy)]
pub(crate) struct Weather {
    pub(crate) loss: u64,
    pub(crate) repetition: u64,
    pub(crate) delay_ms: u64,
}

/// What a history came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Figures {
    /// Operations that were completed.
    pub operations: u64,
    /// Faults that happened.
    pub faults: u64,
    /// Entries that were committed.
    pub entries: u64,
    /// Elections that were won.
    pub elections: u64,
    /// Requests that were in the log more than once.
    pub duplicates: u64,
    /// Starts of processes.
    pub starts: u64,
    /// Snapshots that became a state machine.
    pub snapshots: u64,
    /// Comparisons of whole databases.
    pub comparisons: u64,
    /// Nodes that found damage and refused to go on.
    pub refusals: u64,
    /// How often each kind of fault struck.
    pub strikes: Strikes,
    /// Events that were carried out.
    pub events: u64,
    /// Simulated time.
    pub simulated_ms: u64,
    /// Of everything that happened: two runs of the same history have the same.
    pub trace: u64,
}

/// A history as it goes.
pub struct Cluster {
    pub(crate) random: Random,
    pub(crate) now: u64,
    epoch: Instant,
    pub(crate) hosts: BTreeMap<NodeId, Host>,
    events: BTreeMap<(u64, u64), Event>,
    scheduled: u64,
    pub(crate) calm: Weather,
    pub(crate) weather: Weather,
    /// Who does not reach whom, by the number of the fault.
    pub(crate) cuts: Vec<(u64, NodeId, NodeId)>,
    pub(crate) clients: Vec<Client>,
    pub(crate) limits: Limits,
    pub(crate) oracle: Oracle,
    pub(crate) model: Model,
    /// Hashes of whole databases, by the index that they had applied.
    pub(crate) contents: BTreeMap<u64, u64>,
    /// The highest index that any completed operation has seen.
    pub(crate) acknowledged: u64,
    pub(crate) last_id: u64,
    /// Operations that may still be begun.
    pub(crate) operations_left: u64,
    pub(crate) begun: u64,
    pub(crate) faults: Vec<(u64, u64, Fault)>,
    pub(crate) next_fault: usize,
    pub(crate) figures: Figures,
    trace: Hash,
    pub(crate) defect: Option<Defect>,
    /// What happens is told on standard error.
    is_told: bool,
}

/// The sizes of a history's buffers, small so that their borders are met.
#[derive(Clone, Copy)]
pub(crate) struct Limits {
    pub(crate) append_bytes: usize,
    pub(crate) tail_bytes: usize,
    pub(crate) tail_entries: u64,
    pub(crate) apply_bytes: usize,
    /// How long a state machine lets entries gather, at most.
    pub(crate) apply_delay_ms: u64,
}

impl Cluster {
    /// A cluster whose processes have just been started for the first time, with its files in `directory`.
    pub fn new(options: &Options, directory: &Path) -> Self {
        let mut random = Random::new(options.seed, STREAM);
        let count = random.pick(&[3, 3, 5]);
        let calm = Weather {
            loss: random.pick(&[0, 0, 5, 50]),
            repetition: random.pick(&[0, 0, 20, 100]),
            delay_ms: random.pick(&[1, 3, 10]),
        };
        let limits = Limits {
            append_bytes: random.pick(&[300, 3_000, 1 << 20]),
            tail_bytes: random.pick(&[1, 2_000, 1 << 20]),
            tail_entries: random.pick(&[3, 30, 150]),
            apply_bytes: random.pick(&[1_000, 5_000, 1 << 20]),
            apply_delay_ms: random.pick(&[8, 30, 60]),
        };
        let clients = random.pick(&[12, 24, 36]);
        let hosts = (1..=count).map(|id| (id, Host::new(id, directory, &mut random))).collect();
        let mut cluster = Self {
            random,
            now: 0,
            epoch: Instant::now(),
            hosts,
            events: BTreeMap::new(),
            scheduled: 0,
            calm,
            weather: calm,
            cuts: Vec::new(),
            clients: (0..clients).map(Client::new).collect(),
            limits,
            oracle: Oracle::default(),
            model: Model::default(),
            contents: BTreeMap::new(),
            acknowledged: 0,
            last_id: 0,
            operations_left: options.operations,
            begun: 0,
            faults: faults::draw(options, count),
            next_fault: 0,
            figures: Figures::default(),
            trace: Hash::default(),
            defect: options.defect,
            is_told: std::env::var_os("SIM_TRACE").is_some(),
        };
        for id in cluster.ids() {
            cluster.start_raftd(id);
            cluster.start_sqlited(id);
        }
        cluster
    }

    /// Runs the history to its end: faults first, then the proof of progress without any.
    ///
    /// # Panics
    /// If a promise was broken; the message says which.
    pub fn run(mut self) -> Figures {
        self.start_clients();
        let mut quiet_since = None;
        while quiet_since.is_none_or(|since| self.now < since + LAST_WORDS_MS && !self.clients_are_idle()) {
            self.step();
            if quiet_since.is_none() && self.operations_left == 0 {
                quiet_since = Some(self.now);
            }
        }
        self.stop_faults();
        self.start_last_operations();
        let deadline = self.now + PROGRESS_WITHIN_MS;
        while !self.is_settled() {
            assert!(self.now < deadline, "no progress without faults: {}", self.situation());
            self.step();
        }
        self.compare_everything();
        self.figures.entries = self.oracle.last_index();
        self.figures.elections = self.oracle.elections() as u64;
        self.figures.duplicates = self.model.duplicates();
        self.figures.refusals = self.hosts.values().filter(|host| host.refuses).count() as u64;
        self.figures.simulated_ms = self.now;
        self.figures.trace = self.trace.0;
        self.figures
    }

    /// Nobody waits for anything, and every node that may run holds everything.
    fn is_settled(&self) -> bool {
        let last = self.oracle.last_index();
        let holds_all = |host: &Host| {
            let committed = host.raftd.as_ref().is_some_and(|raftd| raftd.deliverable_index == last);
            committed && host.machine.is_open() && host.machine.position().applied_index == last
        };
        self.clients_are_idle() && self.hosts.values().all(|host| host.refuses || holds_all(host))
    }

    fn situation(&self) -> String {
        let mut text = format!("{} committed", self.oracle.last_index());
        for host in self.hosts.values() {
            let raftd = host.raftd.as_ref().map(|raftd| format!("{:?}", raftd.node.status()));
            let applied = host.machine.is_open().then(|| host.machine.position().applied_index);
            let raftd = raftd.as_deref().unwrap_or("down");
            text +=
                &format!("\n  node {}: applied {applied:?}, attached {}, {raftd}", host.id, host.attached);
        }
        text + &format!("\n  waiting: {:?}", self.waiting_clients())
    }

    fn step(&mut self) {
        let ((at, _), event) = self.events.pop_first().expect("ticks never end");
        self.now = at;
        if let Some(host) = event.host()
            && self.hosts[&host].paused_until > at
        {
            let until = self.hosts[&host].paused_until;
            self.scheduled += 1;
            self.events.insert((until, self.scheduled), event);
            return;
        }
        self.figures.events += 1;
        match event {
            Event::Tick(id, life) => self.tick(id, life),
            Event::LogTurn(id, life) => self.log_turn(id, life),
            Event::Apply(id, life) => self.apply(id, life),
            Event::SyncDatabase(id, life) => self.sync_database(id, life),
            Event::Attach(id) => self.attach(id),
            Event::StartRaftd(id) => self.start_raftd(id),
            Event::StartSqlited(id) => self.start_sqlited(id),
            Event::Message(id, bytes) => self.receive(id, bytes),
            Event::Client(client, attempt) => self.client_wakes(client, attempt),
            Event::SnapshotArrives(transfer) => self.snapshot_arrives(*transfer),
            Event::SnapshotConfirms(transfer, until) => self.snapshot_confirms(transfer, until),
            Event::SnapshotFailed { from, life, to } => {
                self.snapshot_ends(from, life, to, Err(raft::SnapshotFailed));
            }
            Event::PowerCut(id) => self.crash(id, Victim::Power, 50),
            Event::CutEnds(number) => self.cuts.retain(|(cut, ..)| *cut != number),
            Event::WeatherEnds => self.weather = self.calm,
            Event::FastDisk(id) => self.host(id).sync_ms = 3,
            Event::SqlDiskHeals(id) => self.heal_database_disk(id),
        }
    }

    fn tick(&mut self, id: NodeId, life: u64) {
        let host = &self.hosts[&id];
        if host.raftd_life == life && host.raftd.is_some() {
            let after = host.tick_ms();
            self.after(after, Event::Tick(id, life));
            self.with_node(id, raft::Node::tick);
        }
    }

    /// The simulated time, for what reckons in the system's: only differences matter to it.
    pub(crate) fn instant(&self) -> Instant {
        self.epoch + Duration::from_millis(self.now)
    }

    /// Has something happen later.
    pub(crate) fn after(&mut self, delay_ms: u64, event: Event) {
        self.scheduled += 1;
        self.events.insert((self.now + delay_ms, self.scheduled), event);
    }

    pub(crate) fn ids(&self) -> Vec<NodeId> {
        self.hosts.keys().copied().collect()
    }

    pub(crate) fn host(&mut self, id: NodeId) -> &mut Host {
        self.hosts.get_mut(&id).expect("every id is a host's")
    }

    pub(crate) fn unique(&mut self) -> u64 {
        self.last_id += 1;
        self.last_id
    }

    pub(crate) fn note(&mut self, what: &str, id: NodeId, number: u64) {
        self.trace.bytes(what.as_bytes());
        for number in [self.now, id, number] {
            self.trace.bytes(&number.to_le_bytes());
        }
        if self.is_told {
            eprintln!("{:>6} ms  node {id}: {what} {number}", self.now);
        }
    }

    pub(crate) fn is_cut(&self, from: NodeId, to: NodeId) -> bool {
        self.cuts.iter().any(|(_, a, b)| (*a, *b) == (from, to))
    }

    /// Sends messages through the network, as bytes.
    pub(crate) fn send(&mut self, messages: Vec<Message>) {
        for message in messages {
            let (from, to) = (message.from, message.to);
            if self.is_cut(from, to) || self.random.chance(self.weather.loss) {
                continue;
            }
            let envelope = Envelope { cluster_id: CLUSTER_ID };
            let bytes = Bytes::from(convert::to_wire(message, envelope).encode_to_vec());
            let copies = 1 + u64::from(self.random.chance(self.weather.repetition));
            for _ in 0..copies {
                let delay_ms = self.random.below(self.weather.delay_ms + 1);
                self.after(delay_ms, Event::Message(to, bytes.clone()));
            }
        }
    }

    fn receive(&mut self, id: NodeId, bytes: Bytes) {
        let message = PeerMessage::decode(bytes).expect("what was encoded can be decoded");
        let message = convert::from_wire(message).expect("what was sent has a meaning");
        if self.is_cut(message.from, id) {
            return;
        }
        self.step_node(id, message);
    }

    /// All members.
    pub(crate) fn voters(&self) -> BTreeSet<NodeId> {
        self.hosts.keys().copied().collect()
    }
}
