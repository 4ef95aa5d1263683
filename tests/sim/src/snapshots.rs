//! Snapshots: from the state machine of a leader, past two raftds, to the state machine of a follower.

use raft::{Index, NodeId, Position, SnapshotFailed};

use crate::{
    cluster::{Cluster, Event},
    faults::Moment,
    machine::Snapshot,
    options::Defect,
};

/// How long a sender waits before it tries again.
const RETRY_MS: u64 = 60;
/// How long a follower may take to become the snapshot.
const INSTALL_PATIENCE_MS: u64 = 300;

/// A snapshot on its way.
pub(crate) struct Transfer {
    from: NodeId,
    /// Of the sending raftd.
    life: u64,
    pub(crate) to: NodeId,
    snapshot: Snapshot,
}

impl Transfer {
    fn index(&self) -> Index {
        self.snapshot.position.applied_index
    }
}

impl Cluster {
    /// The core asks for a snapshot for a peer.
    pub(crate) fn start_snapshot(&mut self, from: NodeId, to: NodeId) {
        let host = self.host(from);
        let life = host.raftd_life;
        let Some(raftd) = &mut host.raftd else { return };
        raftd.compaction.hold(to);
        if !host.attached {
            return self.after(RETRY_MS, Event::SnapshotFailed { from, life, to });
        }
        let snapshot = host.machine.snapshot();
        self.note("sends a snapshot", from, snapshot.position.applied_index);
        let delay_ms = self.random.between(1, 80);
        self.after(delay_ms, Event::SnapshotArrives(Box::new(Transfer { from, life, to, snapshot })));
    }

    pub(crate) fn snapshot_arrives(&mut self, transfer: Transfer) {
        let Transfer { from, life, to, .. } = transfer;
        let lost = self.is_cut(from, to) || self.is_cut(to, from) || self.random.chance(100);
        let host = self.host(to);
        let position = transfer.snapshot.position;
        let commit_index = host.raftd.as_ref().map(|raftd| raftd.commit_index);
        if let Some(commit_index) = commit_index
            && position.applied_index <= commit_index
            && !lost
        {
            // A late one; installing it would rewind the log.
            return self.snapshot_ends(from, life, to, Ok(commit_index));
        }
        let Some(raftd) = host.raftd.as_mut().filter(|_| !lost && host.machine.is_open()) else {
            return self.after(RETRY_MS, Event::SnapshotFailed { from, life, to });
        };
        raftd.taken = Some(Position {
            index: position.applied_index,
            term: position.applied_term,
            timestamp_ms: position.applied_timestamp_ms,
        });
        host.attached = false;
        if host.machine.position().applied_index < position.applied_index {
            host.machine.install(&transfer.snapshot);
            if self.defect == Some(Defect::ForgottenSessions) {
                self.host(to).machine.forget_sessions();
            }
            self.figures.snapshots += 1;
            self.note("becomes a snapshot", to, position.applied_index);
            self.host(to).machine.start(crate::cluster::CLUSTER_ID);
        }
        if self.dies_at(to, Moment::Installed) {
            return self.after(RETRY_MS, Event::SnapshotFailed { from, life, to });
        }
        let delay_ms = self.random.between(1, 20);
        self.after(delay_ms, Event::Attach(to));
        let until = self.now + INSTALL_PATIENCE_MS;
        self.after(delay_ms, Event::SnapshotConfirms(Box::new(transfer), until));
    }

    /// The follower's raftd answers once its log begins after the snapshot.
    pub(crate) fn snapshot_confirms(&mut self, transfer: Box<Transfer>, until: u64) {
        let Transfer { from, life, to, .. } = *transfer;
        let index = transfer.index();
        let raftd = self.hosts[&to].raftd.as_ref();
        if raftd.is_some_and(|raftd| raftd.deliverable_index >= index) {
            self.snapshot_ends(from, life, to, Ok(index));
        } else if self.now < until {
            self.after(5, Event::SnapshotConfirms(transfer, until));
        } else {
            self.after(RETRY_MS, Event::SnapshotFailed { from, life, to });
        }
    }

    pub(crate) fn snapshot_ends(
        &mut self,
        from: NodeId,
        life: u64,
        to: NodeId,
        result: Result<Index, SnapshotFailed>,
    ) {
        let instant = self.instant();
        let host = self.host(from);
        let Some(raftd) = host.raftd.as_mut().filter(|_| host.raftd_life == life) else { return };
        match result {
            Ok(index) => raftd.compaction.hold_after_snapshot(to, index, instant),
            Err(SnapshotFailed) => raftd.compaction.release(to),
        }
        self.with_node(from, |node| node.snapshot_finished(to, result));
    }
}
