//! What a read waits for, so that it sees what its client asked to see.
//! It knows nothing of SQL, nor of how the read is then done.

use std::{future::pending, time::Duration};

use prometheus::Histogram;
use resqlite::{
    api::{Consistency, ReadOptions},
    daemon::Shutdown,
};
use tokio::{
    sync::watch,
    time::{Instant, sleep_until, timeout},
};
use tonic::Status;

use crate::{
    facts::Facts,
    limits,
    raft_link::{LinkState, RaftLink},
};

/// The first pause before a barrier is asked for again.
const MIN_RETRY: Duration = Duration::from_millis(5);

/// Waits on behalf of reads.
#[derive(Clone, Debug)]
pub struct ReadGate {
    link: RaftLink,
    facts: Facts,
    election_timeout: Duration,
    shutdown: Shutdown,
    /// Notes how long reads wait here.
    waits: Histogram,
}

impl ReadGate {
    /// A gate before this node's data.
    pub fn new(
        link: RaftLink,
        facts: Facts,
        election_timeout: Duration,
        shutdown: Shutdown,
        waits: Histogram,
    ) -> Self {
        Self { link, facts, election_timeout, shutdown, waits }
    }

    /// Returns once a read that begins now sees what `options` ask for.
    pub async fn pass(&self, options: &ReadOptions, deadline: Instant) -> Result<(), Status> {
        let asked = Consistency::try_from(options.consistency).map_err(|_| {
            Status::invalid_argument(format!(
                "{} is not a consistency that this node knows",
                options.consistency
            ))
        })?;
        self.check_trust()?;
        // However the wait ends.
        let _waiting = self.waits.start_timer();
        match asked {
            Consistency::Linearizable => self.see_all_acknowledged(deadline, self.patience()).await,
            Consistency::Sequential => self.see_index(options.min_index, deadline).await,
            Consistency::Stale => self.be_fresh(options.max_staleness_ms, deadline).await,
        }?;
        self.check_trust()
    }

    /// Whether this node's content may be shown to anybody, at any consistency.
    pub fn check_trust(&self) -> Result<(), Status> {
        self.facts.diverged().map_or(Ok(()), |why| {
            Err(Status::unavailable(format!("this node serves no reads: {why}; ask another node meanwhile")))
        })
    }

    /// Waits until this index is applied.
    pub async fn see_index(&self, index: u64, deadline: Instant) -> Result<(), Status> {
        if self.facts.applied_index() >= index {
            return Ok(());
        }
        tokio::select! {
            biased;
            () = self.facts.applied(index) => Ok(()),
            why = self.facts.stuck() => Err(Status::unavailable(format!("this node cannot execute: {why}"))),
            () = self.shutdown.wait() => Err(Status::unavailable("this node is shutting down")),
            () = sleep_until(deadline) => Err(Status::deadline_exceeded(format!(
                "this node has applied the log up to index {}, the read asks for {index}",
                self.facts.applied_index()
            ))),
        }
    }

    /// The read index of the Raft thesis, section 6.4: a quorum confirms the
    /// leader after the read began, then the read waits for what was committed by then.
    async fn see_all_acknowledged(&self, deadline: Instant, patience: Duration) -> Result<(), Status> {
        let began = Instant::now();
        let give_up = deadline.min(began + patience);
        let (confirmed_from, index) = tokio::select! {
            biased;
            confirmed = self.confirmed_index() => confirmed,
            () = self.shutdown.wait() => return Err(Status::unavailable("this node is shutting down")),
            () = sleep_until(give_up) => {
                let waited = began.elapsed().as_millis();
                return Err(Status::unavailable(format!(
                    "no leader was confirmed within {waited} ms: a linearizable read needs most members of the cluster"
                )));
            }
        };
        self.see_index(index, deadline).await?;
        self.facts.publish_fresh(confirmed_from);
        Ok(())
    }

    async fn confirmed_index(&self) -> (Instant, u64) {
        let mut state = self.link.state();
        let mut pause = MIN_RETRY;
        loop {
            let asked = Instant::now();
            if state.borrow_and_update().connected
                && let Some(index) = self.link.read_barrier().await
            {
                return (asked, index);
            }
            self.news(&mut state, pause).await;
            pause = (pause * 2).min(self.election_timeout / 4);
        }
    }

    /// A change of the link is the best moment to ask again; else a pause will do.
    async fn news(&self, state: &mut watch::Receiver<LinkState>, pause: Duration) {
        let changed = async {
            if state.changed().await.is_err() {
                pending::<()>().await;
            }
        };
        let _ = timeout(pause, changed).await;
    }

    /// Whatever is known to be fresh enough will do. A leader that has gone
    /// silent, or an apply that lags, are not noticed at once; a confirmed barrier cannot lie.
    async fn be_fresh(&self, max_staleness_ms: u64, deadline: Instant) -> Result<(), Status> {
        if max_staleness_ms == 0 {
            return Ok(());
        }
        let bound = Duration::from_millis(max_staleness_ms);
        let fresh = self.facts.fresh_as_of().is_some_and(|moment| moment.elapsed() <= bound);
        if fresh {
            return Ok(());
        }
        self.see_all_acknowledged(deadline, self.election_timeout).await.map_err(|error| {
            Status::unavailable(format!(
                "this node's data may be older than {max_staleness_ms} ms: {}",
                error.message()
            ))
        })
    }

    fn patience(&self) -> Duration {
        self.election_timeout * limits::LEADERLESS_ELECTION_TIMEOUTS
    }
}
