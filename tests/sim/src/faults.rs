//! What goes wrong, when, and to whom: drawn before a history begins, so that single faults can be left out of it.

use raft::NodeId;

use crate::{options::Options, random::Random};

/// The random stream of the faults.
const STREAM: u64 = 1;

/// Where a process dies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Moment {
    /// Wherever it is.
    Now,
    /// Within the log writer's next work, after so many of its operations.
    WhileWriting(u64),
    /// After its next write is durable, before the node knows.
    Durable,
    /// When the node knows, before it tells anybody.
    Persisted,
    /// When its next vote for another is on its way; it comes back at once, so that somebody may ask again.
    Voted,
    /// After its next entries are applied, before anybody is answered.
    Applied,
    /// After it became a snapshot, before its log did.
    Installed,
}

/// Which processes of a host die.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Victim {
    /// raftd alone.
    Raftd,
    /// sqlited alone.
    Sqlited,
    /// Both.
    Both,
    /// Both, with what the operating system had not written yet.
    Power,
}

/// What a fault comes to when it strikes: each is counted, so that a run tells which of them it has not tried.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// raftd was killed.
    RaftdKilled,
    /// sqlited was killed.
    SqlitedKilled,
    /// Both were killed.
    BothKilled,
    /// A host lost its power.
    PowerCut,
    /// A crash within the log writer's work.
    DiedWhileWriting,
    /// A crash after a write was durable, before the node knew.
    DiedWhenDurable,
    /// A crash before anybody was told what is durable.
    DiedWhenPersisted,
    /// A crash just after a vote had left.
    DiedWhenVoted,
    /// A crash after entries were applied, before anybody was answered.
    DiedWhenApplied,
    /// A crash between a snapshot's installation and the log's new start.
    DiedWhenInstalled,
    /// Changes to the log that were not synced are gone.
    LogTorn,
    /// A part of what was written to the hard-state file is gone.
    HardStateTorn,
    /// A part of SQLite's write-ahead log is gone.
    WalTorn,
    /// A clean stop.
    Stop,
    /// Processes that stand still.
    Pause,
    /// A partition.
    Partition,
    /// A partition of one direction.
    OneWayPartition,
    /// One link, in one direction.
    LinkCut,
    /// Loss, repetition and delay.
    Weather,
    /// A broken stream.
    BrokenStream,
    /// A clock that jumped back.
    ClockBackward,
    /// A clock that jumped forward.
    ClockForward,
    /// A clock that runs at another speed.
    Drift,
    /// An error of the log's disk that ended raftd.
    LogDiskError,
    /// The log's disk was full, which ended raftd.
    LogDiskFull,
    /// Slow syncs.
    SlowDisk,
    /// An error of the database's disk.
    DatabaseDiskError,
    /// The database's disk was full.
    DatabaseDiskFull,
    /// A changed bit in the log.
    RotInLog,
    /// A changed bit in the hard-state file.
    RotInHardState,
    /// The log's disk was lost.
    LostLogDisk,
    /// The disk of log and database was lost.
    LostDiskOfBoth,
    /// A request to hand leadership over.
    Transfer,
}

impl Kind {
    /// All of them.
    pub const ALL: [Self; 33] = [
        Self::RaftdKilled,
        Self::SqlitedKilled,
        Self::BothKilled,
        Self::PowerCut,
        Self::DiedWhileWriting,
        Self::DiedWhenDurable,
        Self::DiedWhenPersisted,
        Self::DiedWhenVoted,
        Self::DiedWhenApplied,
        Self::DiedWhenInstalled,
        Self::LogTorn,
        Self::HardStateTorn,
        Self::WalTorn,
        Self::Stop,
        Self::Pause,
        Self::Partition,
        Self::OneWayPartition,
        Self::LinkCut,
        Self::Weather,
        Self::BrokenStream,
        Self::ClockBackward,
        Self::ClockForward,
        Self::Drift,
        Self::LogDiskError,
        Self::LogDiskFull,
        Self::SlowDisk,
        Self::DatabaseDiskError,
        Self::DatabaseDiskFull,
        Self::RotInLog,
        Self::RotInHardState,
        Self::LostLogDisk,
        Self::LostDiskOfBoth,
        Self::Transfer,
    ];
}

/// How often each kind of fault struck.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Strikes([u64; Kind::ALL.len()]);

impl Default for Strikes {
    fn default() -> Self {
        Self([0; Kind::ALL.len()])
    }
}

impl Strikes {
    /// One more.
    pub fn count(&mut self, kind: Kind) {
        self.0[kind as usize] += 1;
    }

    /// Adds another history's.
    pub fn add(&mut self, other: &Self) {
        for (sum, more) in self.0.iter_mut().zip(other.0) {
            *sum += more;
        }
    }

    /// Every kind, and how often it struck.
    pub fn each(&self) -> impl Iterator<Item = (Kind, u64)> {
        Kind::ALL.into_iter().zip(self.0)
    }

    /// What was never tried.
    pub fn missing(&self) -> Vec<Kind> {
        self.each().filter(|(_, times)| *times == 0).map(|(kind, _)| kind).collect()
    }
}

/// One thing that goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Processes die and come back.
    Crash {
        /// Where.
        host: NodeId,
        /// Which.
        victim: Victim,
        /// When.
        moment: Moment,
        /// For how long they are gone.
        down_ms: u64,
    },
    /// Both processes are stopped cleanly and come back.
    Stop {
        /// Where.
        host: NodeId,
        /// For how long.
        down_ms: u64,
    },
    /// Both processes stand still.
    Pause {
        /// Where.
        host: NodeId,
        /// For how long.
        for_ms: u64,
    },
    /// Those in the set do not reach the others; both ways, unless it says otherwise.
    Partition {
        /// A bit for each host.
        side: u64,
        /// The others still reach those in the set.
        one_way: bool,
        /// For how long.
        for_ms: u64,
    },
    /// One host does not reach one other.
    Cut {
        /// Who speaks.
        from: NodeId,
        /// Who does not hear.
        to: NodeId,
        /// For how long.
        for_ms: u64,
    },
    /// Messages are lost, repeated, and late.
    Weather {
        /// Of a thousand.
        loss: u64,
        /// Of a thousand.
        repetition: u64,
        /// At most.
        delay_ms: u64,
        /// For how long.
        for_ms: u64,
    },
    /// A connection breaks and comes back.
    BrokenStream {
        /// Who is told.
        host: NodeId,
        /// Whose it was.
        peer: NodeId,
    },
    /// A clock jumps.
    Clock {
        /// Whose.
        host: NodeId,
        /// Backward or forward.
        jump_ms: i64,
    },
    /// A clock runs too fast or too slow from now on.
    Drift {
        /// Whose.
        host: NodeId,
        /// Ticks for every thousand that there should be.
        per_mille: u64,
    },
    /// The log's disk fails.
    LogDisk {
        /// Whose.
        host: NodeId,
        /// So many operations still succeed.
        after: u64,
        /// It is full, rather than broken.
        full: bool,
        /// How long until the process is started again.
        down_ms: u64,
    },
    /// The log's disk is slow.
    SlowDisk {
        /// Whose.
        host: NodeId,
        /// At most, for each sync.
        sync_ms: u64,
        /// For how long.
        for_ms: u64,
    },
    /// The database's disk fails.
    SqlDisk {
        /// Whose.
        host: NodeId,
        /// So many writes still succeed.
        after: u32,
        /// It is full, rather than broken.
        full: bool,
        /// For how long.
        for_ms: u64,
    },
    /// A bit changes on a disk, and the host loses its power some time later.
    Rot {
        /// Whose.
        host: NodeId,
        /// In the log, rather than in the hard state.
        in_log: bool,
        /// How long until the power cut.
        until_ms: u64,
    },
    /// A disk is lost with all that is on it, and replaced by an empty one; also that of a node that refuses to start.
    LostDisk {
        /// Whose.
        host: NodeId,
        /// The database lay on it as well as the log.
        with_database: bool,
        /// How long until the host is back.
        down_ms: u64,
    },
    /// Somebody asks the leader to hand over.
    Transfer {
        /// Who is asked.
        host: NodeId,
    },
}

/// The faults of a history, with how many operations come before each.
pub fn draw(options: &Options, hosts: u64) -> Vec<(u64, u64, Fault)> {
    let mut random = Random::new(options.seed, STREAM);
    // Rot that is found keeps a host down for good, so it may strike a minority only.
    let rotting = random.below(hosts.div_ceil(2));
    // Every fault is drawn whether or not it happens, so that leaving one out changes no other.
    let all: Vec<Fault> = (0..options.faults).map(|_| one(&mut random, hosts, rotting)).collect();
    let after = |number: u64| number * options.operations / options.faults.max(1);
    let numbered = (0..).zip(all);
    numbered
        .filter(|(number, _)| !options.without.contains(number))
        .map(|(number, fault)| (after(number), number, fault))
        .collect()
}

fn one(random: &mut Random, hosts: u64, rotting: u64) -> Fault {
    let host = random.between(1, hosts);
    let other = 1 + (host - 1 + random.between(1, hosts - 1)) % hosts;
    let for_ms = random.between(20, 500);
    let down_ms = random.between(5, 400);
    let after = random.below(40);
    let full = random.chance(500);
    match random.below(100) {
        0..30 => {
            let (victim, moment) = (victim(random), moment(random));
            let down_ms = if moment == Moment::Voted { down_ms / 100 } else { down_ms };
            Fault::Crash { host, victim, moment, down_ms }
        }
        30..34 => Fault::Stop { host, down_ms },
        34..39 => Fault::Pause { host, for_ms },
        39..52 => Fault::Partition { side: random.below(1 << hosts), one_way: random.chance(300), for_ms },
        52..57 => Fault::Cut { from: host, to: other, for_ms },
        57..64 => Fault::Weather {
            loss: random.below(300),
            repetition: random.below(300),
            delay_ms: random.between(1, 60),
            for_ms,
        },
        64..68 => Fault::BrokenStream { host, peer: other },
        68..73 => Fault::Clock { host, jump_ms: random.between(0, 8_000_000) as i64 - 4_000_000 },
        73..76 => Fault::Drift { host, per_mille: random.between(500, 2_000) },
        76..83 => Fault::LogDisk { host, after, full, down_ms },
        83..86 => Fault::SlowDisk { host, sync_ms: random.between(5, 150), for_ms },
        86..91 => Fault::SqlDisk { host, after: after as u32, full, for_ms },
        91..94 if rotting > 0 => {
            let host = random.between(1, rotting);
            Fault::Rot { host, in_log: random.chance(300), until_ms: random.below(300) }
        }
        94..98 => Fault::LostDisk { host, with_database: random.chance(700), down_ms },
        _ => Fault::Transfer { host },
    }
}

fn victim(random: &mut Random) -> Victim {
    random.pick(&[Victim::Raftd, Victim::Sqlited, Victim::Both, Victim::Power, Victim::Power])
}

fn moment(random: &mut Random) -> Moment {
    match random.below(7) {
        0 => Moment::Now,
        5 => Moment::Voted,
        1 => Moment::WhileWriting(random.below(12)),
        2 => Moment::Durable,
        3 => Moment::Persisted,
        4 => Moment::Applied,
        _ => Moment::Installed,
    }
}
