//! One sqlited: attaches to the log, applies what is committed and durable, answers, and makes durable what it applied.

use raft::{Index, Log, NodeId, Position, SnapshotOutcome};
use raftd::{
    attach::{self, Otherwise, Place},
    convert,
    store::ReadError,
};
use resqlite::api::LogEntry;

use crate::{
    cluster::{CLUSTER_ID, Cluster, Event},
    faults::{Kind, Moment},
    options::Defect,
};

/// Whole databases are compared where the applied index is a multiple of this.
const COMPARE_EVERY: Index = 32;

impl Cluster {
    pub(crate) fn start_sqlited(&mut self, id: NodeId) {
        let host = self.host(id);
        if host.machine.is_open() || host.refuses {
            return;
        }
        host.machine.start(CLUSTER_ID);
        host.sqlited_life += 1;
        let (life, applied) = (host.sqlited_life, host.machine.position().applied_index);
        self.figures.starts += 1;
        self.note("sqlited starts", id, applied);
        self.after(1, Event::Attach(id));
        let sync_ms = self.random.between(20, 120);
        self.after(sync_ms, Event::SyncDatabase(id, life));
    }

    pub(crate) fn kill_sqlited(&mut self, id: NodeId, power_cut: bool) {
        let Self { hosts, random, .. } = self;
        let host = hosts.get_mut(&id).expect("every id is a host's");
        host.attached = false;
        if host.machine.is_open() {
            if host.machine.kill(power_cut, random) {
                self.strikes(Kind::WalTorn);
            }
            self.note("sqlited is gone", id, power_cut.into());
        }
    }

    pub(crate) fn stop_sqlited(&mut self, id: NodeId) {
        let host = self.host(id);
        host.attached = false;
        host.machine.stop();
    }

    /// The state machine says what it holds, and the log whether that belongs together, by the daemon's own rules.
    pub(crate) fn attach(&mut self, id: NodeId) {
        let host = self.host(id);
        if host.attached || !host.machine.is_open() {
            return;
        }
        let Some(raftd) = &mut host.raftd else { return };
        let position = host.machine.position();
        let applied = Position {
            index: position.applied_index,
            term: position.applied_term,
            timestamp_ms: position.applied_timestamp_ms,
        };
        let base = raftd.reader.base().expect("the window is in memory").index;
        let term = raftd.reader.term(applied.index).expect("the window is in memory");
        match attach::place(applied, base, term, raftd.taken == Some(applied)) {
            Place::InLog => return self.attached(id),
            Place::Discarded => panic!(
                "node {id} has discarded its log up to {base}, but its database holds only {}",
                applied.index
            ),
            Place::Install => {
                let outcome = raftd.node.install_snapshot(applied).expect("the window is in memory");
                self.with_node(id, |_| {});
                if outcome == SnapshotOutcome::Installed {
                    return self.attached(id);
                }
            }
            Place::Conflict => {}
        }
        let Some(raftd) = &self.host(id).raftd else { return };
        let leader = raftd.node.leader();
        match attach::without_install(applied, term, raftd.commit_index, leader, id) {
            Otherwise::Follow => self.attached(id),
            Otherwise::Wait => self.after(20, Event::Attach(id)),
            refusal @ (Otherwise::LogLost | Otherwise::Foreign) => {
                panic!(
                    "node {id} has applied {applied:?}, but its log holds term {term:?} there: {refusal:?}"
                )
            }
        }
    }

    fn attached(&mut self, id: NodeId) {
        self.host(id).attached = true;
        self.apply_soon(id);
    }

    /// There may be something to apply.
    pub(crate) fn apply_soon(&mut self, id: NodeId) {
        let host = self.host(id);
        let Some(raftd) = &host.raftd else { return };
        if !host.attached || host.apply_due || !host.machine.is_open() {
            return;
        }
        if raftd.deliverable_index > host.machine.position().applied_index {
            host.apply_due = true;
            let life = host.sqlited_life;
            let delay_ms = self.random.below(self.limits.apply_delay_ms);
            self.after(delay_ms, Event::Apply(id, life));
        }
    }

    pub(crate) fn apply(&mut self, id: NodeId, life: u64) {
        let host = self.host(id);
        host.apply_due = false;
        if host.sqlited_life != life || !host.attached || !host.machine.is_open() {
            return self.apply_soon(id);
        }
        let Some(entries) = self.entries_to_apply(id) else { return };
        let (applied, result) = self.host(id).machine.apply(&entries);
        let reached = self.hosts[&id].machine.position().applied_index;
        self.note("applied", id, reached);
        for done in &applied {
            self.model.check_reply(id, done.index, &done.reply);
        }
        self.compare(id);
        if reached >= entries[0].index && self.dies_at(id, Moment::Applied) {
            return;
        }
        for done in applied {
            let client = u128::from_be_bytes(done.client_id) as usize - 1;
            self.write_was_applied(id, client, done.sequence, &done.reply);
        }
        self.serve_reads(id);
        match result {
            Ok(()) => self.apply_soon(id),
            Err(error) if error.is_retryable() => {
                self.database_disk_failed(id);
                let host = self.host(id);
                host.apply_due = true;
                self.after(15, Event::Apply(id, life));
            }
            // What this process holds in memory is not to be trusted any more.
            Err(_) => {
                self.database_disk_failed(id);
                self.kill_sqlited(id, false);
                self.after(30, Event::StartSqlited(id));
            }
        }
    }

    fn database_disk_failed(&mut self, id: NodeId) {
        // Counted once, however often it is tried again.
        if let Some(full) = self.host(id).database_fails_full.take() {
            self.strikes(if full { Kind::DatabaseDiskFull } else { Kind::DatabaseDiskError });
        }
    }

    /// The next committed entries, up to the next comparison.
    fn entries_to_apply(&mut self, id: NodeId) -> Option<Vec<LogEntry>> {
        let limits = self.limits;
        let Self { hosts, oracle, model, .. } = self;
        let host = hosts.get_mut(&id).expect("every id is a host's");
        let raftd = host.raftd.as_ref()?;
        let from = host.machine.position().applied_index + 1;
        let to = raftd.deliverable_index.min((from - 1) / COMPARE_EVERY * COMPARE_EVERY + COMPARE_EVERY);
        if from > to {
            return None;
        }
        let entries = match raftd.reader.read(from, to, limits.apply_bytes) {
            Ok(entries) => entries,
            Err(ReadError::Compacted { base }) => {
                panic!("node {id} needs index {from}, but has discarded its log up to {base}")
            }
            Err(ReadError::Store(error)) => {
                assert!(host.rotten, "node {id} cannot read its log: {error}");
                self.kill_raftd(id, false);
                self.after(20, Event::StartRaftd(id));
                return None;
            }
        };
        for entry in &entries {
            if oracle.delivered(id, entry) {
                model.committed(entry);
            }
        }
        Some(entries.into_iter().map(convert::entry_to_wire).collect())
    }

    /// Equal contents at equal indexes, and what the model says.
    fn compare(&mut self, id: NodeId) {
        let machine = &self.hosts[&id].machine;
        let index = machine.position().applied_index;
        if !index.is_multiple_of(COMPARE_EVERY) || self.model.read_at(index).is_empty() {
            return;
        }
        assert_eq!(machine.read(), self.model.read_at(index), "node {id} holds something else at {index}");
        let hash = machine.content_hash();
        let first = *self.contents.entry(index).or_insert(hash);
        assert_eq!(hash, first, "the databases differ at index {index}; node {id} is one of the two");
        self.figures.comparisons += 1;
    }

    /// At the end all databases are compared, wherever they stand.
    pub(crate) fn compare_everything(&mut self) {
        let last = self.oracle.last_index();
        let mut hashes = Vec::new();
        for host in self.hosts.values().filter(|host| !host.refuses) {
            let read = host.machine.read();
            assert_eq!(read, self.model.read_at(last), "node {} holds something else at the end", host.id);
            hashes.push(host.machine.content_hash());
            self.figures.comparisons += 1;
        }
        assert!(hashes.windows(2).all(|pair| pair[0] == pair[1]), "the databases differ at the end");
    }

    /// What was applied becomes durable, and raftd hears how far.
    pub(crate) fn sync_database(&mut self, id: NodeId, life: u64) {
        let host = self.host(id);
        if host.sqlited_life != life || !host.machine.is_open() {
            return;
        }
        let attached = host.attached;
        let applied_index = host.machine.position().applied_index;
        let durable_index = if self.defect == Some(Defect::EarlyDiscard) {
            applied_index
        } else {
            self.host(id).machine.sync().expect("a file in memory can be synced")
        };
        let again_ms = self.random.between(20, 120);
        self.after(again_ms, Event::SyncDatabase(id, life));
        if attached {
            self.compact(id, durable_index);
        }
    }
}
