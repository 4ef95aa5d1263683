//! How the faults strike.

use raft::NodeId;

use crate::{
    cluster::{Armed, Cluster, Event, Host, Weather},
    disk::{self, Disk},
    faults::{Fault, Kind, Moment, Victim},
};

impl Cluster {
    /// The faults whose turn has come.
    pub(crate) fn inject_due_faults(&mut self) {
        while let Some((after, number, fault)) = self.faults.get(self.next_fault).copied() {
            if after > self.begun {
                return;
            }
            self.next_fault += 1;
            self.figures.faults += 1;
            self.note(&format!("{fault:?}"), 0, number);
            self.inject(number, fault);
        }
    }

    fn inject(&mut self, number: u64, fault: Fault) {
        let now = self.now;
        if let Some(kind) = at_once(fault) {
            self.strikes(kind);
        }
        match fault {
            Fault::Crash { host, victim, moment: Moment::Now, down_ms } => self.crash(host, victim, down_ms),
            Fault::Crash { host, victim, moment, down_ms } => {
                let struck = self.host(host);
                struck.armed = Some(Armed { moment, victim, down_ms });
                if let Moment::WhileWriting(after) = moment {
                    struck.disk.fail_after(after, disk::EIO);
                }
            }
            Fault::Stop { host, down_ms } => {
                self.stop_sqlited(host);
                self.stop_raftd(host);
                self.come_back(host, Victim::Both, down_ms);
            }
            Fault::Pause { host, for_ms } => self.host(host).paused_until = now + for_ms,
            Fault::Partition { side, one_way, for_ms } => self.partition(number, side, one_way, for_ms),
            Fault::Cut { from, to, for_ms } => {
                self.cuts.push((number, from, to));
                self.after(for_ms, Event::CutEnds(number));
            }
            Fault::Weather { loss, repetition, delay_ms, for_ms } => {
                self.weather = Weather { loss, repetition, delay_ms };
                self.after(for_ms, Event::WeatherEnds);
            }
            Fault::BrokenStream { host, peer } => self.with_node(host, |node| {
                node.leader_unreachable(peer);
                node.peer_unreachable(peer);
                node.peer_reachable(peer);
            }),
            Fault::Clock { host, jump_ms } => self.host(host).set_clock(now, jump_ms, None),
            Fault::Drift { host, per_mille } => self.host(host).set_clock(now, 0, Some(per_mille)),
            Fault::LogDisk { host, after, full, .. } => {
                let errno = if full { disk::ENOSPC } else { disk::EIO };
                self.host(host).disk.fail_after(after, errno);
            }
            Fault::SlowDisk { host, sync_ms, for_ms } => {
                self.host(host).sync_ms = sync_ms;
                self.after(for_ms, Event::FastDisk(host));
            }
            Fault::SqlDisk { host, after, full, for_ms } => {
                if self.hosts[&host].machine.is_open() {
                    self.host(host).machine.fail_after(after, full);
                    self.host(host).database_fails_full = Some(full);
                    self.after(for_ms, Event::SqlDiskHeals(host));
                }
            }
            Fault::Rot { host, in_log, until_ms } => self.rot(host, in_log, until_ms),
            Fault::LostDisk { host, with_database, down_ms } => self.lose_disk(host, with_database, down_ms),
            Fault::Transfer { host } => self.with_node(host, |node| {
                // Refused where nobody leads or nobody can follow.
                let _ = node.transfer_leadership(None);
            }),
        }
    }

    fn partition(&mut self, number: u64, side: u64, one_way: bool, for_ms: u64) {
        let is_in = |id: NodeId| side & (1 << (id - 1)) != 0;
        for a in self.ids() {
            for b in self.ids() {
                if is_in(a) && !is_in(b) {
                    self.cuts.push((number, a, b));
                    if !one_way {
                        self.cuts.push((number, b, a));
                    }
                }
            }
        }
        self.after(for_ms, Event::CutEnds(number));
    }

    /// Whether a minority has lost what it promised, this host included. More cannot be lost without loss.
    fn may_lose(&self, id: NodeId) -> bool {
        let is_lost = |host: &&Host| host.id == id || host.rotten || host.lost;
        // Before every member has counted, the first start needs them all.
        self.hosts.values().all(|host| host.has_counted)
            && 2 * self.hosts.values().filter(is_lost).count() < self.hosts.len()
    }

    fn lose_disk(&mut self, id: NodeId, with_database: bool, down_ms: u64) {
        if !self.may_lose(id) {
            return;
        }
        self.strikes(if with_database { Kind::LostDiskOfBoth } else { Kind::LostLogDisk });
        self.kill_raftd(id, true);
        self.note("loses its disk", id, with_database.into());
        let host = self.host(id);
        host.armed = None;
        host.disk = Disk::new();
        (host.lost, host.rotten, host.refuses) = (true, false, false);
        if with_database {
            self.kill_sqlited(id, true);
            self.host(id).machine.lose();
        }
        self.come_back(id, Victim::Both, down_ms);
    }

    fn rot(&mut self, id: NodeId, in_log: bool, until_ms: u64) {
        if !self.may_lose(id) {
            return;
        }
        let Self { hosts, random, .. } = self;
        let host = hosts.get_mut(&id).expect("every id is a host's");
        let rotted = if in_log { host.disk.rot_log(random) } else { host.disk.rot_hard_state(random) };
        host.rotten |= rotted;
        if rotted {
            self.strikes(if in_log { Kind::RotInLog } else { Kind::RotInHardState });
        }
        self.after(until_ms, Event::PowerCut(id));
    }

    /// Something of this kind has happened.
    pub(crate) fn strikes(&mut self, kind: Kind) {
        self.figures.strikes.count(kind);
    }

    /// The processes of a host are gone, and come back.
    pub(crate) fn crash(&mut self, id: NodeId, victim: Victim, down_ms: u64) {
        let power_cut = victim == Victim::Power;
        self.host(id).armed = None;
        self.strikes(match victim {
            Victim::Raftd => Kind::RaftdKilled,
            Victim::Sqlited => Kind::SqlitedKilled,
            Victim::Both => Kind::BothKilled,
            Victim::Power => Kind::PowerCut,
        });
        if victim != Victim::Sqlited {
            self.kill_raftd(id, power_cut);
        }
        if victim != Victim::Raftd {
            self.kill_sqlited(id, power_cut);
        }
        self.come_back(id, victim, down_ms);
    }

    fn come_back(&mut self, id: NodeId, victim: Victim, down_ms: u64) {
        // Neither daemon waits for the other to start.
        let (first, second) = (down_ms, down_ms + self.random.below(40));
        let (raftd, sqlited) = if self.random.chance(500) { (first, second) } else { (second, first) };
        if victim != Victim::Sqlited {
            self.after(raftd, Event::StartRaftd(id));
        }
        if victim != Victim::Raftd {
            self.after(sqlited, Event::StartSqlited(id));
        }
    }

    pub(crate) fn heal_database_disk(&mut self, id: NodeId) {
        let host = self.host(id);
        host.database_fails_full = None;
        host.machine.heal();
    }

    /// Whether a crash was waiting for this moment; then it has happened.
    pub(crate) fn dies_at(&mut self, id: NodeId, moment: Moment) -> bool {
        let Some(armed) = self.host(id).armed.take_if(|armed| armed.moment == moment) else { return false };
        match moment {
            // Others are counted where they are found.
            Moment::Now | Moment::WhileWriting(_) => {}
            Moment::Durable => self.strikes(Kind::DiedWhenDurable),
            Moment::Persisted => self.strikes(Kind::DiedWhenPersisted),
            Moment::Voted => self.strikes(Kind::DiedWhenVoted),
            Moment::Applied => self.strikes(Kind::DiedWhenApplied),
            Moment::Installed => self.strikes(Kind::DiedWhenInstalled),
        }
        self.crash(id, armed.victim, armed.down_ms);
        true
    }

    /// Everything works again, and everybody who may run does.
    pub(crate) fn stop_faults(&mut self) {
        self.note("the faults stop", 0, 0);
        self.operations_left = 0;
        self.cuts.clear();
        self.calm = Weather { loss: 0, repetition: 0, delay_ms: 2 };
        self.weather = self.calm;
        for id in self.ids() {
            let now = self.now;
            let host = self.host(id);
            host.armed = None;
            host.paused_until = now;
            host.sync_ms = 3;
            host.set_clock(now, 0, Some(1_000));
            host.disk.heal();
            self.heal_database_disk(id);
            self.start_raftd(id);
            self.start_sqlited(id);
        }
    }
}

/// What a fault comes to as soon as it is injected; the others are counted where they strike.
fn at_once(fault: Fault) -> Option<Kind> {
    Some(match fault {
        Fault::Stop { .. } => Kind::Stop,
        Fault::Pause { .. } => Kind::Pause,
        Fault::Partition { one_way: false, .. } => Kind::Partition,
        Fault::Partition { one_way: true, .. } => Kind::OneWayPartition,
        Fault::Cut { .. } => Kind::LinkCut,
        Fault::Weather { .. } => Kind::Weather,
        Fault::BrokenStream { .. } => Kind::BrokenStream,
        Fault::Clock { jump_ms: ..0, .. } => Kind::ClockBackward,
        Fault::Clock { .. } => Kind::ClockForward,
        Fault::Drift { .. } => Kind::Drift,
        Fault::SlowDisk { .. } => Kind::SlowDisk,
        Fault::Transfer { .. } => Kind::Transfer,
        Fault::Crash { .. }
        | Fault::LogDisk { .. }
        | Fault::SqlDisk { .. }
        | Fault::Rot { .. }
        | Fault::LostDisk { .. } => return None,
    })
}
