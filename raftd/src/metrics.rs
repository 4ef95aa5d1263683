//! What raftd counts, and what it answers to those who watch it.
//!
//! Counters and histograms on the way of a proposal are touched once for a
//! batch, never once for an entry. Figures of the log and of the peers are read
//! from the core when somebody asks. It knows nothing of HTTP.

use std::time::Duration;

use prometheus::{Histogram, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Registry};
use raft::{Log, PeerStatus, ProgressState, Role, SoftState};
use resqlite::{
    api::{ProposalOutcome, ProposalRefusal, proposal_outcome::Outcome},
    disk::Room,
    monitoring::{Busy, Check, LATENCY_SECONDS, Monitored, SIZES},
};
use tokio::{
    sync::{oneshot, watch},
    time::timeout,
};

use crate::{
    driver::{DriverHandle, Input},
    store::{LogReader, StoreHandle},
};

/// An event loop that takes longer to answer does not turn.
const LOOP_PATIENCE: Duration = Duration::from_secs(5);
/// A write to the log that takes longer than this has a disk under it that does not answer.
const WRITE_PATIENCE: Duration = Duration::from_secs(30);

resqlite::define_metrics! {
    /// The metrics of raftd.
    pub struct Metrics {
        /// The version of raftd, as a label; always 1.
        pub build_info: IntGaugeVec = "resqlite_raft_build_info", &["version"][..];
        /// 1 on the node that leads, else 0.
        pub is_leader: IntGauge = "resqlite_raft_is_leader";
        /// The leader's id; 0 while none is known.
        pub leader_id: IntGauge = "resqlite_raft_leader_id";
        /// The term that this node is in.
        pub term: IntGauge = "resqlite_raft_term";
        /// The last index that this node knows to be committed.
        pub commit_index: IntGauge = "resqlite_raft_commit_index";
        /// The last index that is durable on this node.
        pub durable_index: IntGauge = "resqlite_raft_durable_index";
        /// The first index that the log still holds.
        pub first_index: IntGauge = "resqlite_raft_first_index";
        /// The last index of the log.
        pub last_index: IntGauge = "resqlite_raft_last_index";
        /// Connections at the raft port.
        pub connections: IntGauge = "resqlite_raft_connections";
        /// Connections at the raft port that were closed or turned away because a limit was reached, by its name.
        pub refused: IntCounterVec = "resqlite_raft_connections_refused_total", &["limit"][..];
        /// What the log takes on disk.
        pub log_bytes: IntGauge = "resqlite_raft_log_bytes";
        /// What is free on the filesystem of the log.
        pub disk_free_bytes: IntGauge = "resqlite_raft_disk_free_bytes";
        /// On the leader, for each other member: how many entries it is not yet known to hold.
        pub peer_lag_entries: IntGaugeVec = "resqlite_raft_peer_lag_entries", &["peer"][..];
        /// On the leader, for each other member: 1 if it was heard of within an election timeout.
        pub peer_active: IntGaugeVec = "resqlite_raft_peer_active", &["peer"][..];
        /// On the leader, for each other member: 1 while it is being brought a snapshot.
        pub peer_in_snapshot: IntGaugeVec = "resqlite_raft_peer_in_snapshot", &["peer"][..];
        /// Elections in which this node stood: how often it asked for votes.
        pub elections: IntCounter = "resqlite_raft_elections_total";
        /// How often another leader, or none, came to be known.
        pub leader_changes: IntCounter = "resqlite_raft_leader_changes_total";
        /// Proposals made at this node, by what became of them.
        pub proposals: IntCounterVec = "resqlite_raft_proposals_total", &["outcome"][..];
        /// How many proposals one batch carried.
        pub proposal_batch: Histogram = "resqlite_raft_proposal_batch_entries", SIZES;
        /// From a batch's proposal at this node until it is known here to be committed.
        pub commit: Histogram = "resqlite_raft_commit_seconds", LATENCY_SECONDS;
        /// One group written to the log and made durable.
        pub append: Histogram = "resqlite_raft_append_seconds", LATENCY_SECONDS;
        /// One sync of the log: of its journal, or of sled's file.
        pub fsync: Histogram = "resqlite_raft_fsync_seconds", LATENCY_SECONDS;
        /// How many entries one group carried.
        pub append_batch: Histogram = "resqlite_raft_append_batch_entries", SIZES;
        /// Payload bytes written to the log.
        pub appended_bytes: IntCounter = "resqlite_raft_appended_bytes_total";
        /// Inputs that wait for the event loop.
        pub inputs_waiting: IntGauge = "resqlite_raft_inputs_waiting";
        /// Bytes of entries that wait for the log writer.
        pub writes_waiting_bytes: IntGauge = "resqlite_raft_writes_waiting_bytes";
        /// 1 while a sqlited is attached.
        pub attached: IntGauge = "resqlite_raft_state_machine_attached";
        /// Snapshots, by direction and by what became of them.
        pub snapshots: IntCounterVec = "resqlite_raft_snapshots_total", &["direction", "result"][..];
        /// Snapshot bytes that were passed on, by direction: the progress of a transfer is how fast this grows.
        pub snapshot_bytes: IntCounterVec = "resqlite_raft_snapshot_bytes_total", &["direction"][..];
        /// What went wrong and was survived, by kind.
        pub errors: IntCounterVec = "resqlite_raft_errors_total", &["kind"][..];
    }
}

/// What the log writer's thread counts.
#[derive(Clone, Debug)]
pub struct WriterMetrics {
    /// As in [`Metrics`].
    pub append: Histogram,
    /// As in [`Metrics`].
    pub append_batch: Histogram,
    /// As in [`Metrics`].
    pub appended_bytes: IntCounter,
    /// At a write.
    pub busy: Busy,
}

impl Metrics {
    /// Those that the log writer's thread counts.
    pub fn of_writer(&self, busy: &Busy) -> WriterMetrics {
        WriterMetrics {
            append: self.append.clone(),
            append_batch: self.append_batch.clone(),
            appended_bytes: self.appended_bytes.clone(),
            busy: busy.clone(),
        }
    }

    /// Something went wrong and was survived.
    pub fn error(&self, kind: &str) {
        self.errors.with_label_values(&[kind]).inc();
    }

    /// This node's view of who leads has changed.
    pub fn role_changed(&self, before: SoftState, now: SoftState) {
        let stands = |role| matches!(role, Role::Candidate | Role::Leader);
        // A node alone is elected before anybody sees it as a candidate.
        if stands(now.role) && (now.term != before.term || !stands(before.role)) {
            self.elections.inc();
        }
        if now.leader != before.leader {
            self.leader_changes.inc();
        }
    }

    /// Proposals were answered.
    pub fn answered(&self, outcomes: &[ProposalOutcome]) {
        let mut counts = [0; OUTCOMES.len()];
        for outcome in outcomes {
            counts[kind_of(outcome)] += 1;
        }
        for (kind, count) in OUTCOMES.iter().zip(counts).filter(|(_, count)| *count > 0) {
            self.proposals.with_label_values(&[kind]).inc_by(count);
        }
    }

    /// A label's series begin at zero: an alert on an increase would miss the very first event otherwise.
    fn begin_series(&self) {
        self.build_info.with_label_values(&[env!("CARGO_PKG_VERSION")]).set(1);
        for outcome in OUTCOMES {
            self.proposals.with_label_values(&[outcome]);
        }
        for direction in ["sent", "received"] {
            self.snapshot_bytes.with_label_values(&[direction]);
            for result in ["ok", "failed"] {
                self.snapshots.with_label_values(&[direction, result]);
            }
        }
        for kind in ERROR_KINDS {
            self.errors.with_label_values(&[kind]);
        }
    }

    /// Takes over what the core says of itself.
    fn note(&self, status: &raft::Status) {
        self.is_leader.set((status.role == Role::Leader).into());
        self.leader_id.set(status.leader.unwrap_or(0) as i64);
        self.term.set(status.term as i64);
        self.commit_index.set(status.commit_index as i64);
        self.durable_index.set(status.durable_index as i64);
        self.last_index.set(status.last_index as i64);
        // A node that leads no longer knows nothing of the others any more.
        let of_peers = [&self.peer_lag_entries, &self.peer_active, &self.peer_in_snapshot];
        of_peers.iter().for_each(|gauges| gauges.reset());
        for (peer, PeerStatus { state, matched_index, recently_active, .. }) in &status.peers {
            let values = [
                status.last_index.saturating_sub(*matched_index) as i64,
                (*recently_active).into(),
                matches!(state, ProgressState::Snapshot).into(),
            ];
            for (gauges, value) in of_peers.iter().zip(values) {
                gauges.with_label_values(&[&peer.to_string()]).set(value);
            }
        }
    }
}

/// What can become of a proposal, as a label.
const OUTCOMES: [&str; 8] = [
    "committed",
    "unknown",
    "no_leader",
    "overloaded",
    "too_large",
    "shutting_down",
    "overwritten",
    "out_of_room",
];

/// Where in [`OUTCOMES`] an outcome is.
fn kind_of(outcome: &ProposalOutcome) -> usize {
    match outcome.outcome {
        Some(Outcome::CommittedIndex(_)) => 0,
        Some(Outcome::Unknown(_)) | None => 1,
        Some(Outcome::Refused(refusal)) => {
            match ProposalRefusal::try_from(refusal).unwrap_or(ProposalRefusal::Unspecified) {
                ProposalRefusal::NoLeader => 2,
                ProposalRefusal::Overloaded => 3,
                ProposalRefusal::TooLarge => 4,
                ProposalRefusal::ShuttingDown => 5,
                ProposalRefusal::Overwritten => 6,
                ProposalRefusal::OutOfRoom => 7,
                ProposalRefusal::Unspecified => 1,
            }
        }
    }
}

/// The kinds of `resqlite_raft_errors_total`.
const ERROR_KINDS: [&str; 3] = ["message_refused", "stream_refused", "snapshot_failed"];

/// raftd, as those see it who watch it.
pub struct Watched {
    metrics: Metrics,
    driver: DriverHandle,
    reader: LogReader,
    store: StoreHandle,
    writer: Busy,
    room: watch::Receiver<Room>,
}

impl Watched {
    /// Over these parts; `writer` tells for how long the log writer has been at the same write, `room` how much there is
    /// on the log's filesystem.
    pub fn new(
        metrics: Metrics,
        driver: DriverHandle,
        reader: LogReader,
        store: StoreHandle,
        writer: Busy,
        room: watch::Receiver<Room>,
    ) -> Self {
        metrics.begin_series();
        Self { metrics, driver, reader, store, writer, room }
    }

    async fn status(&self) -> Option<raft::Status> {
        let (reply, answer) = oneshot::channel();
        let asked = async {
            self.driver.send(Input::Status(reply)).await;
            answer.await.ok()
        };
        timeout(LOOP_PATIENCE, asked).await.ok().flatten()
    }

    fn event_loop(status: Option<&raft::Status>) -> Check {
        let why = || format!("it has not answered for {} s: restart raftd", LOOP_PATIENCE.as_secs());
        Check::new("event_loop", status.is_none().then(why))
    }

    fn log_writer(&self) -> Check {
        let seconds = self.writer.for_how_long().as_secs();
        let stuck = seconds >= WRITE_PATIENCE.as_secs();
        let why = || format!("a write to the log has taken {seconds} s: look at the disk of raftd.data_dir");
        Check::new("log_writer", stuck.then(why))
    }
}

impl Monitored for Watched {
    async fn metrics(&self) -> &Registry {
        if let Some(status) = self.status().await {
            self.metrics.note(&status);
        }
        if let Ok(base) = self.reader.base() {
            self.metrics.first_index.set(base.index as i64 + 1);
        }
        self.metrics.log_bytes.set(self.store.log_bytes() as i64);
        self.metrics.inputs_waiting.set(self.driver.inputs_waiting() as i64);
        self.metrics.writes_waiting_bytes.set(self.store.waiting_bytes() as i64);
        self.metrics.disk_free_bytes.set(self.room.borrow().free_bytes as i64);
        self.metrics.registry()
    }

    async fn live(&self) -> Vec<Check> {
        vec![Self::event_loop(self.status().await.as_ref()), self.log_writer()]
    }

    async fn ready(&self) -> Vec<Check> {
        let status = self.status().await;
        let leaderless = status.as_ref().is_some_and(|status| status.leader.is_none());
        let why = || "none is known: see whether most members run and reach each other".to_owned();
        vec![Self::event_loop(status.as_ref()), Check::new("leader", leaderless.then(why)), self.log_writer()]
    }
}
