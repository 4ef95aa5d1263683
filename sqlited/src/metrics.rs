//! What sqlited counts. On the way of a write everything but its own latency is
//! touched once for a group of entries, never once for an entry.

use prometheus::{Histogram, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec};
use resqlite::monitoring::{Busy, LATENCY_SECONDS, SIZES};

resqlite::define_metrics! {
    /// The metrics of sqlited.
    pub struct Metrics {
        /// The versions of sqlited and of SQLite, as labels; always 1.
        pub build_info: IntGaugeVec = "resqlite_sql_build_info", &["version", "sqlite_version"][..];
        /// 1 while this node serves reads and writes, as its health service and /readyz say.
        pub serving: IntGauge = "resqlite_sql_serving";
        /// 1 while the link to raftd is up.
        pub raftd_connected: IntGauge = "resqlite_sql_raftd_connected";
        /// The leader's id as raftd told it; 0 while none is known.
        pub leader_id: IntGauge = "resqlite_sql_leader_id";
        /// The last index that raftd has said is committed.
        pub commit_index: IntGauge = "resqlite_sql_commit_index";
        /// The last index that is applied to the database.
        pub applied_index: IntGauge = "resqlite_sql_applied_index";
        /// The last index that is durably applied: raftd may discard its log up to here.
        pub durable_index: IntGauge = "resqlite_sql_durable_index";
        /// How many committed entries are not yet applied here.
        pub lag_entries: IntGauge = "resqlite_sql_lag_entries";
        /// 1 while nothing can be applied because of this host: a full disk, damage, another version.
        pub stuck: IntGauge = "resqlite_sql_stuck";
        /// 1 while this node's content is known to differ from that of most members.
        pub diverged: IntGauge = "resqlite_sql_diverged";
        /// 1 while there is something that a person must look at, though the node serves on.
        pub alarm: IntGauge = "resqlite_sql_alarm";
        /// What the database file takes on disk.
        pub database_bytes: IntGauge = "resqlite_sql_database_bytes";
        /// What its write-ahead log takes on disk.
        pub wal_bytes: IntGauge = "resqlite_sql_wal_bytes";
        /// What is free on the filesystem of the database.
        pub disk_free_bytes: IntGauge = "resqlite_sql_disk_free_bytes";
        /// Calls, by method and by the gRPC status that ended them; CANCELLED where the client went away.
        pub requests: IntCounterVec = "resqlite_sql_requests_total", &["method", "code"][..];
        /// From a call's arrival to the end of its answer: Query is a read, Execute a write, Run any script.
        pub request: HistogramVec = "resqlite_sql_request_seconds", (&["method"][..], LATENCY_SECONDS);
        /// Calls that are under way.
        pub requests_under_way: IntGauge = "resqlite_sql_requests_under_way";
        /// Connections of clients.
        pub connections: IntGauge = "resqlite_sql_connections";
        /// Connections and calls that were turned away or ended because a limit was reached, by its name in sqlited.limits.
        pub refused: IntCounterVec = "resqlite_sql_refused_total", &["limit"][..];
        /// Bytes of the requests that are under way, as sqlited.limits.request_bytes bounds them.
        pub request_bytes: IntGauge = "resqlite_sql_request_bytes";
        /// From the proposal of a write until it is committed and applied here, however often it was proposed.
        pub write: Histogram = "resqlite_sql_write_seconds", LATENCY_SECONDS;
        /// What a read waits before it may begin, to see what it asks to see.
        pub read_wait: Histogram = "resqlite_sql_read_wait_seconds", LATENCY_SECONDS;
        /// Writes that wait for their reply.
        pub writes_waiting: IntGauge = "resqlite_sql_writes_waiting";
        /// Reads that wait for a reader.
        pub reads_waiting: IntGauge = "resqlite_sql_reads_waiting";
        /// Bytes of committed entries that wait to be applied.
        pub entries_waiting_bytes: IntGauge = "resqlite_sql_entries_waiting_bytes";
        /// Optimistic transactions that are open at this node.
        pub transactions_open: IntGauge = "resqlite_sql_transactions_open";
        /// One group of entries applied, in one transaction of SQLite.
        pub apply: Histogram = "resqlite_sql_apply_seconds", LATENCY_SECONDS;
        /// How many entries one group held.
        pub apply_batch: Histogram = "resqlite_sql_apply_batch_entries", SIZES;
        /// Entries that were applied.
        pub applied_entries: IntCounter = "resqlite_sql_applied_entries_total";
        /// Attempts to apply that failed because of this host.
        pub apply_errors: IntCounter = "resqlite_sql_apply_errors_total";
        /// One sync of the write-ahead log.
        pub wal_sync: Histogram = "resqlite_sql_wal_sync_seconds", LATENCY_SECONDS;
        /// Clients whose requests are remembered, so that none is applied twice.
        pub sessions: IntGauge = "resqlite_sql_sessions";
        /// Snapshots of the database, by direction and by what became of them.
        pub snapshots: IntCounterVec = "resqlite_sql_snapshots_total", &["direction", "result"][..];
    }
}

/// What the threads of the pipeline count.
#[derive(Clone, Debug)]
pub struct PipelineMetrics {
    /// As in [`Metrics`].
    pub apply: Histogram,
    /// As in [`Metrics`].
    pub apply_batch: Histogram,
    /// As in [`Metrics`].
    pub applied_entries: IntCounter,
    /// As in [`Metrics`].
    pub apply_errors: IntCounter,
    /// As in [`Metrics`].
    pub wal_sync: Histogram,
    /// As in [`Metrics`].
    pub sessions: IntGauge,
    /// At a group of entries.
    pub busy: Busy,
}

impl Metrics {
    /// Those that the threads of the pipeline count; `busy` is to tell how long they are at a group.
    pub fn of_pipeline(&self, busy: &Busy) -> PipelineMetrics {
        PipelineMetrics {
            apply: self.apply.clone(),
            apply_batch: self.apply_batch.clone(),
            applied_entries: self.applied_entries.clone(),
            apply_errors: self.apply_errors.clone(),
            wal_sync: self.wal_sync.clone(),
            sessions: self.sessions.clone(),
            busy: busy.clone(),
        }
    }

    /// A label's series begin at zero: an alert on an increase would miss the very first event otherwise.
    pub fn begin_series(&self) {
        self.build_info.with_label_values(&[env!("CARGO_PKG_VERSION"), rusqlite::version()]).set(1);
        for direction in ["sent", "received"] {
            for result in ["ok", "failed"] {
                self.snapshots.with_label_values(&[direction, result]);
            }
        }
    }

    /// A transfer has ended.
    pub fn snapshot(&self, direction: &str, ok: bool) {
        self.snapshots.with_label_values(&[direction, if ok { "ok" } else { "failed" }]).inc();
    }
}
