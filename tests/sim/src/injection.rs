//! How the faults strike.

use raft::NodeId;

use crate::{
    cluster::{Armed, Cluster, Event, Weather},
    disk,
    faults::{Fault, Moment, Victim},
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
                    self.after(for_ms, Event::SqlDiskHeals(host));
                }
            }
            Fault::Rot { host, in_log, until_ms } => self.rot(host, in_log, until_ms),
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

    fn rot(&mut self, id: NodeId, in_log: bool, until_ms: u64) {
        let Self { hosts, random, .. } = self;
        let host = hosts.get_mut(&id).expect("every id is a host's");
        host.rotten = true;
        if in_log {
            host.disk.rot_log(random);
        } else {
            host.disk.rot_hard_state(random);
        }
        self.after(until_ms, Event::PowerCut(id));
    }

    /// The processes of a host are gone, and come back.
    pub(crate) fn crash(&mut self, id: NodeId, victim: Victim, down_ms: u64) {
        let power_cut = victim == Victim::Power;
        self.host(id).armed = None;
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

    /// Whether a crash was waiting for this moment; then it has happened.
    pub(crate) fn dies_at(&mut self, id: NodeId, moment: Moment) -> bool {
        let Some(armed) = self.host(id).armed.take_if(|armed| armed.moment == moment) else { return false };
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
            host.machine.heal();
            host.disk.heal();
            self.start_raftd(id);
            self.start_sqlited(id);
        }
    }
}
