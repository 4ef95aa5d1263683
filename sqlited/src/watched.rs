//! What sqlited answers to those who watch it: figures that are read when they
//! are asked for, and the checks of `/livez` and `/readyz`. It only looks.

use std::{path::PathBuf, sync::Arc, time::Duration};

use prometheus::Registry;
use resqlite::{
    api::Statement,
    monitoring::{Busy, Check, Monitored},
};
use tokio::{
    sync::watch,
    time::{Instant, timeout},
};
use tokio_stream::StreamExt;

use crate::{
    facts::Facts,
    metrics::Metrics,
    pipeline::{Backlog, Progress},
    raft_link::RaftLink,
    reads::{Author, Readers},
    status::file_bytes,
    transactions::Transactions,
    waiters::Waiters,
};

/// A group of entries that takes longer than this to apply has something under it that does not answer: a request's
/// budget ends it after seconds.
const APPLY_PATIENCE: Duration = Duration::from_secs(120);
/// A database that answers takes less.
const READ_PATIENCE: Duration = Duration::from_secs(2);

/// sqlited, as those see it who watch it.
#[derive(Debug)]
pub struct Watched {
    /// What is counted.
    pub metrics: Metrics,
    /// How far this node is, and whether it can go on.
    pub facts: Facts,
    /// What raftd has told.
    pub link: RaftLink,
    /// Who waits for a write.
    pub waiters: Arc<Waiters>,
    /// Who reads.
    pub readers: Arc<Readers>,
    /// Who has a transaction open.
    pub transactions: Arc<Transactions>,
    /// What waits to be applied.
    pub backlog: Backlog,
    /// How far what was applied is durable.
    pub progress: watch::Receiver<Progress>,
    /// Whether this node serves.
    pub serving: watch::Receiver<bool>,
    /// For how long the applying thread has been at the same group.
    pub applying: Busy,
    /// The database's file.
    pub database: PathBuf,
}

impl Watched {
    fn apply_loop(&self) -> Check {
        let seconds = self.applying.for_how_long().as_secs();
        let stuck = seconds >= APPLY_PATIENCE.as_secs();
        let why =
            || format!("a group of entries has taken {seconds} s: look at the disk of sqlited.data_dir");
        Check::new("apply_loop", stuck.then(why))
    }

    fn raftd(&self) -> Check {
        let lost = !self.link.state().borrow().connected;
        Check::new("raftd", lost.then(|| "no link to it: see whether raftd beside this node runs".to_owned()))
    }

    fn leader(&self) -> Check {
        let leaderless = self.link.state().borrow().leader_id == 0;
        let why = || "none is known: see whether most members run and reach each other".to_owned();
        Check::new("leader", leaderless.then(why))
    }

    fn caught_up(&self) -> Check {
        let why =
            || "what was committed 10 s ago is not yet applied here: wait, or see why it is slow".to_owned();
        Check::new("caught_up", self.facts.is_behind().then(why))
    }

    async fn database(&self) -> Check {
        let statement = Statement { sql: "SELECT 1".to_owned(), ..Statement::default() };
        let answered = async {
            let mut batches =
                self.readers.read(Author::anybody(), statement, Some(Instant::now() + READ_PATIENCE))?;
            batches.next().await.transpose()
        };
        let failure = match timeout(READ_PATIENCE, answered).await {
            Ok(Ok(_)) => None,
            Ok(Err(status)) => Some(format!("a read fails: {}", status.message())),
            Err(_) => Some("a read was not answered within 2 s: see what the readers are at".to_owned()),
        };
        Check::new("database", failure)
    }
}

impl Monitored for Watched {
    async fn metrics(&self) -> &Registry {
        let Self { metrics, facts, .. } = self;
        let state = self.link.state().borrow().clone();
        let applied_index = facts.applied_index();
        let commit_index = state.commit_index.max(applied_index);
        metrics.serving.set((*self.serving.borrow()).into());
        metrics.raftd_connected.set(state.connected.into());
        metrics.leader_id.set(state.leader_id as i64);
        metrics.commit_index.set(commit_index as i64);
        metrics.applied_index.set(applied_index as i64);
        metrics.durable_index.set(self.progress.borrow().durable_index as i64);
        metrics.lag_entries.set((commit_index - applied_index) as i64);
        metrics.stuck.set(facts.stuck_now().is_some().into());
        metrics.diverged.set(facts.diverged().is_some().into());
        metrics.alarm.set(facts.alarm().is_some().into());
        let (database_bytes, wal_bytes) = file_bytes(&self.database);
        metrics.database_bytes.set(database_bytes as i64);
        metrics.wal_bytes.set(wal_bytes as i64);
        metrics.disk_free_bytes.set(facts.room().borrow().free_bytes as i64);
        metrics.writes_waiting.set(self.waiters.waiting() as i64);
        metrics.reads_waiting.set(self.readers.waiting() as i64);
        metrics.entries_waiting_bytes.set(self.backlog.bytes() as i64);
        metrics.transactions_open.set(self.transactions.open() as i64);
        metrics.registry()
    }

    async fn live(&self) -> Vec<Check> {
        // That this is answered at all says that the event loop turns: it is the same one.
        vec![Check::new("event_loop", None), self.apply_loop()]
    }

    async fn ready(&self) -> Vec<Check> {
        vec![
            self.raftd(),
            self.leader(),
            self.caught_up(),
            Check::new("can_apply", self.facts.stuck_now()),
            Check::new("not_diverged", self.facts.diverged()),
            self.database().await,
        ]
    }
}
