//! One raftd: the core, its store, and between them what the daemon's event loop does.
//!
//! The daemon's loop is tied to an asynchronous runtime; this one follows it step by step on the simulation's events.
//! Core, store, compaction and wire format are the daemon's own.

use std::{
    collections::{BTreeMap, VecDeque},
    path::PathBuf,
};

use raft::{
    Index, Log, LogError, Message, Node, NodeId, Options, Position, ProposalResult, Ready, Role, Standing,
    StepError,
};
use raftd::{
    compaction::Compaction,
    store::{LogReader, Media, SteppedWriter, Store, StoreError, StoreOptions, Write},
};

use crate::{
    cluster::{CLUSTER_ID, Cluster, ELECTION_TICKS, Event},
    disk,
    faults::{Kind, Moment, Victim},
    options::Defect,
};

/// A raftd that runs.
pub(crate) struct Raftd {
    pub(crate) node: Node,
    pub(crate) writer: SteppedWriter,
    pub(crate) reader: LogReader,
    pub(crate) compaction: Compaction,
    pub(crate) deliverable_index: Index,
    pub(crate) commit_index: Index,
    /// The last entry of the snapshot that the state machine took last.
    pub(crate) taken: Option<Position>,
    /// Messages that wait for a Ready to be durable, oldest first.
    unpersisted: VecDeque<(u64, Vec<Message>)>,
    /// A vote for another is on its way to the disk.
    votes_for_another: bool,
    /// The log writer is about to work.
    turn_due: bool,
    /// Who waits for what was proposed and asked: the client, and its attempt.
    pub(crate) proposals: BTreeMap<u64, (usize, u64)>,
    pub(crate) reads: BTreeMap<u64, (usize, u64)>,
}

impl Cluster {
    /// Starts raftd on what its disk holds.
    pub(crate) fn start_raftd(&mut self, id: NodeId) {
        if self.hosts[&id].raftd.is_some() || self.hosts[&id].refuses {
            return;
        }
        let options = self.node_options(id);
        let limits = self.limits;
        let host = self.host(id);
        let store_options = StoreOptions {
            data_dir: PathBuf::from(format!("node {id}")),
            cache_bytes: 0,
            cluster_id: CLUSTER_ID,
            node_id: id,
            incarnation: host.raftd_life + 1,
        };
        let media = Media {
            hard_state: host.disk.hard_state(),
            log: host.disk.log(),
            is_new: host.disk.is_new(),
            tail_bytes: limits.tail_bytes,
        };
        let mut store = match Store::open_on(&store_options, media) {
            Ok(store) => store,
            Err(_) if host.disk.failing().is_some() => {
                // The disk fails the start itself; the service manager tries again.
                self.kill_raftd(id, false);
                return self.after(20, Event::StartRaftd(id));
            }
            Err(error) => return self.refuse(id, &error),
        };
        host.disk.is_in_use();
        let reader = store.reader();
        let log = Box::new(reader.clone());
        let node = Node::new(options, store.hard_state(), log).expect("a store that opens has a whole log");
        let status = node.status();
        host.raftd = Some(Raftd {
            node,
            writer: store.stepped_writer(),
            reader,
            compaction: Compaction::new(limits.tail_entries, 1 << 20),
            deliverable_index: status.deliverable_index,
            commit_index: status.commit_index,
            taken: None,
            unpersisted: VecDeque::new(),
            votes_for_another: false,
            turn_due: false,
            proposals: BTreeMap::new(),
            reads: BTreeMap::new(),
        });
        host.raftd_life += 1;
        let life = host.raftd_life;
        self.figures.starts += 1;
        self.note("raftd starts", id, status.last_index);
        self.after(1, Event::Tick(id, life));
        self.after(1, Event::Attach(id));
    }

    fn node_options(&mut self, id: NodeId) -> Options {
        Options {
            election_ticks: ELECTION_TICKS,
            heartbeat_ticks: 2,
            max_append_bytes: self.limits.append_bytes,
            max_inflight_appends: 6,
            max_inflight_bytes: 4 * self.limits.append_bytes,
            max_uncommitted_bytes: 20_000,
            max_forwarded_bytes: 10_000,
            max_pending_reads: 20,
            ..Options::new(id, self.voters(), self.random.number())
        }
    }

    /// A node that finds damage stays down: it must neither vote nor serve.
    fn refuse(&mut self, id: NodeId, error: &StoreError) {
        let host = self.host(id);
        let is_damage = matches!(error, StoreError::Damaged { .. } | StoreError::NewerFormat { .. });
        assert!(is_damage && host.rotten, "node {id} cannot start: {error}");
        host.refuses = true;
        self.note("refuses", id, 0);
        self.kill_sqlited(id, false);
    }

    /// raftd is gone; what it had not made durable may be, too.
    pub(crate) fn kill_raftd(&mut self, id: NodeId, power_cut: bool) {
        let Self { hosts, random, .. } = self;
        let host = hosts.get_mut(&id).expect("every id is a host's");
        let ran = host.raftd.take().is_some();
        host.attached = false;
        let lost = host.disk.lose_unsynced(power_cut, random);
        if lost.log {
            self.strikes(Kind::LogTorn);
        }
        if lost.hard_state {
            self.strikes(Kind::HardStateTorn);
        }
        if ran {
            self.note("raftd is gone", id, power_cut.into());
            if self.random.chance(700) {
                // Connections of a dead process break; a dead host's do not.
                for peer in self.ids() {
                    self.with_node(peer, |node| {
                        node.leader_unreachable(id);
                        node.peer_unreachable(id);
                    });
                }
            }
        }
    }

    /// raftd stops cleanly: everything that it was given becomes durable first.
    pub(crate) fn stop_raftd(&mut self, id: NodeId) {
        if let Some(raftd) = &mut self.host(id).raftd {
            // A disk that fails meanwhile leaves what a crash would.
            while raftd.writer.step(drop).is_ok_and(|worked| worked) {}
        }
        self.kill_raftd(id, false);
    }

    /// Does something to a node that runs, and what comes of it.
    pub(crate) fn with_node(&mut self, id: NodeId, action: impl FnOnce(&mut Node)) {
        let now = self.now;
        let host = self.host(id);
        let clock_ms = host.clock_ms(now);
        if let Some(raftd) = &mut host.raftd {
            raftd.node.set_clock(clock_ms);
            action(&mut raftd.node);
            self.carry_out(id);
        }
    }

    pub(crate) fn step_node(&mut self, id: NodeId, message: Message) {
        let mut result = Ok(());
        self.with_node(id, |node| result = node.step(message));
        match result {
            Ok(()) => {}
            Err(StepError::Log(error)) => self.log_cannot_be_read(id, &error),
            Err(error) => panic!("node {id} was sent what no correct node sends: {error}"),
        }
    }

    fn log_cannot_be_read(&mut self, id: NodeId, error: &LogError) {
        assert!(self.hosts[&id].rotten, "node {id} cannot read its log: {error}");
        self.kill_raftd(id, false);
        self.after(20, Event::StartRaftd(id));
    }

    /// Does what the core is ready for, until it is ready for nothing more.
    fn carry_out(&mut self, id: NodeId) {
        loop {
            let Some(raftd) = &mut self.host(id).raftd else { return };
            match raftd.node.ready() {
                Ok(None) => return,
                Ok(Some(ready)) => self.carry_out_one(id, ready),
                Err(error) => return self.log_cannot_be_read(id, &error),
            }
        }
    }

    fn carry_out_one(&mut self, id: NodeId, mut ready: Ready) {
        let must_persist = ready.must_persist();
        match self.defect {
            Some(Defect::EarlyAcknowledgement) => ready.messages.append(&mut ready.messages_after_persist),
            Some(Defect::ForgottenHardState) => ready.hard_state = None,
            _ => {}
        }
        self.send(ready.messages);
        let Self { hosts, oracle, .. } = self;
        let host = hosts.get_mut(&id).expect("every id is a host's");
        let Some(raftd) = &mut host.raftd else { return };
        raftd.compaction.entries_added(&ready.entries);
        if must_persist {
            let vote = ready.hard_state.and_then(|state| state.voted_for);
            raftd.votes_for_another |= vote.is_some_and(|candidate| candidate != id);
            raftd.unpersisted.push_back((ready.number, ready.messages_after_persist));
            let entries = ready.entries.clone();
            let write = Write {
                number: ready.number,
                hard_state: ready.hard_state,
                install: ready.install,
                entries: ready.entries,
            };
            raftd.writer.submit(write).expect("the writer has not failed");
            oracle.written(&entries, &raftd.reader);
        }
        if raftd.node.role() == Role::Leader {
            oracle.leads(id, raftd.node.status().term, &raftd.reader);
        }
        assert!(ready.deliverable_index <= ready.commit_index, "what is delivered is committed");
        raftd.commit_index = ready.commit_index;
        raftd.deliverable_index = ready.deliverable_index;
        if must_persist {
            self.log_has_work(id);
        }
        for peer in ready.snapshots {
            self.start_snapshot(id, peer);
        }
        for outcome in ready.proposals {
            self.proposal_ends(id, outcome.batch_id, outcome.result);
        }
        for outcome in ready.reads {
            self.read_may_proceed(id, outcome.read_id, outcome.index);
        }
        self.apply_soon(id);
    }

    fn proposal_ends(&mut self, id: NodeId, batch_id: u64, result: ProposalResult) {
        let Some(raftd) = &mut self.host(id).raftd else { return };
        let waiter = raftd.proposals.remove(&batch_id);
        // Appended is not committed, and unknown is not lost: the client waits.
        if let (ProposalResult::Dropped(_), Some((client, attempt))) = (result, waiter) {
            self.retry_soon(client, attempt);
        }
    }

    /// The log writer has something to do.
    pub(crate) fn log_has_work(&mut self, id: NodeId) {
        let host = self.host(id);
        let (life, sync_ms) = (host.raftd_life, host.sync_ms);
        let Some(raftd) = &mut host.raftd else { return };
        if !raftd.turn_due {
            raftd.turn_due = true;
            let delay_ms = self.random.below(sync_ms + 1);
            self.after(delay_ms, Event::LogTurn(id, life));
        }
    }

    /// One turn of the log writer.
    pub(crate) fn log_turn(&mut self, id: NodeId, life: u64) {
        let host = self.host(id);
        if host.raftd_life != life {
            return;
        }
        let Some(raftd) = &mut host.raftd else { return };
        raftd.turn_due = false;
        let mut durable = None;
        let result = raftd.writer.step(|number| durable = Some(number));
        if durable.is_some() && self.dies_at(id, Moment::Durable) {
            return;
        }
        match result {
            Err(error) => return self.log_disk_failed(id, &error),
            Ok(false) => return,
            // Now and then it finds the quiet in which it syncs the mark.
            Ok(true) => {
                let quiet_ms = self.random.between(20, 300);
                self.after(quiet_ms, Event::LogTurn(id, life));
            }
        }
        let Some(number) = durable else { return };
        let Some(raftd) = &mut self.host(id).raftd else { return };
        raftd.node.persisted(number);
        if self.dies_at(id, Moment::Persisted) {
            return;
        }
        let host = self.host(id);
        let Some(raftd) = &mut host.raftd else { return };
        let mut messages = Vec::new();
        while raftd.unpersisted.front().is_some_and(|(waiting, _)| *waiting <= number) {
            messages.extend(raftd.unpersisted.pop_front().into_iter().flat_map(|(_, messages)| messages));
        }
        let is_not_known_to_count = !host.has_counted || host.lost;
        if is_not_known_to_count
            && raftd.unpersisted.is_empty()
            && raftd.node.status().standing == Standing::Voter
        {
            // All that the core knows of itself is durable.
            (host.has_counted, host.lost) = (true, false);
        }
        let has_voted = std::mem::take(&mut raftd.votes_for_another);
        self.send(messages);
        if has_voted && self.dies_at(id, Moment::Voted) {
            return;
        }
        self.with_node(id, |_| {});
    }

    /// A log that cannot be written ends its process.
    fn log_disk_failed(&mut self, id: NodeId, error: &StoreError) {
        let armed = self.host(id).armed.take_if(|armed| matches!(armed.moment, Moment::WhileWriting(_)));
        match armed {
            Some(armed) => {
                self.strikes(Kind::DiedWhileWriting);
                self.crash(id, armed.victim, armed.down_ms);
            }
            None => {
                let (failing, rotten) = (self.hosts[&id].disk.failing(), self.hosts[&id].rotten);
                assert!(failing.is_some() || rotten, "node {id} stops: {error}");
                match failing {
                    Some(disk::ENOSPC) => self.strikes(Kind::LogDiskFull),
                    Some(_) => self.strikes(Kind::LogDiskError),
                    None => {}
                }
                let down_ms = self.random.between(10, 200);
                self.crash(id, Victim::Raftd, down_ms);
            }
        }
        // Whoever was to die, this process may not go on.
        if self.hosts[&id].raftd.is_some() {
            self.kill_raftd(id, false);
            self.after(20, Event::StartRaftd(id));
        }
    }

    /// Discards what neither this node nor a peer within the tail needs any more.
    pub(crate) fn compact(&mut self, id: NodeId, durable_index: Index) {
        let instant = self.instant();
        let Some(raftd) = &mut self.host(id).raftd else { return };
        raftd.compaction.state_machine_is_durable(durable_index);
        for (peer, status) in raftd.node.status().peers {
            raftd.compaction.peer_is_at(peer, status.matched_index, status.recently_active);
        }
        raftd.compaction.expire_holds(instant);
        let base = raftd.reader.base().expect("the window is in memory").index;
        let Some(to) = raftd.compaction.due(base) else { return };
        match raftd.writer.compact(to) {
            Ok(_) => self.log_has_work(id),
            Err(error) => self.log_disk_failed(id, &error),
        }
    }
}
