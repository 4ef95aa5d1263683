//! What goes on by itself: markers at an interval, this node's reports, and what they all come to.
//!
//! It knows how a node behaves that differs from most others; how a content is hashed is not its business.

use std::{collections::BTreeSet, convert::Infallible, io, path::PathBuf, sync::Arc, time::Duration};

use resqlite::api::{ContentReport, VerifyMarker, logged_request::Body};
use tokio::{
    sync::watch,
    task::spawn_blocking,
    time::{Instant, sleep, sleep_until},
};
use tonic::Status;

use super::{Mark, Verdict, Verification, Verifications, content, verdict};
use crate::{
    auth::Caller,
    facts::Facts,
    raft_link::{LinkState, RaftLink},
    reads::Readers,
    snapshot::Users,
    write_path::{WriteId, WritePath},
};

/// How long a marker or a report is tried to be put in the log.
const WRITE_PATIENCE: Duration = Duration::from_secs(30);
/// The pause after that was in vain.
const AGAIN_AFTER: Duration = Duration::from_secs(1);

/// All that goes on by itself.
#[derive(Debug)]
pub struct Upkeep {
    /// Between two markers; zero: there are none but those that are asked for.
    pub interval: Duration,
    /// The database that is marked.
    pub database: PathBuf,
    /// This node.
    pub node_id: u64,
    /// What is known.
    pub verifications: Verifications,
    /// Where it is said that this node cannot be trusted.
    pub facts: Facts,
    /// Their reads then end.
    pub readers: Arc<Readers>,
    /// Keeps a snapshot from taking the database's place in the middle of it.
    pub users: Users,
    /// Says who leads.
    pub link: RaftLink,
    /// Takes markers and reports.
    pub writes: Arc<WritePath>,
}

impl Upkeep {
    /// Runs until dropped.
    pub async fn run(self) -> Infallible {
        tokio::select! {
            never = self.schedule() => never,
            never = self.send_reports() => never,
            never = self.compare() => never,
        }
    }

    /// While this node leads, puts a marker in the log whenever the interval has passed since the last one, whoever
    /// asked for that.
    async fn schedule(&self) -> Infallible {
        if self.interval.is_zero() {
            std::future::pending::<()>().await;
        }
        let mut known = self.verifications.known.subscribe();
        let mut state = self.link.state();
        loop {
            let last = known.borrow_and_update().last_marker;
            let due = async {
                sleep_until(last + self.interval).await;
                leads(&mut state, self.node_id).await;
            };
            tokio::select! {
                () = due => {}
                // There may have been another marker.
                Ok(()) = known.changed() => continue,
            }
            // Once it is written, its entry is applied and `last_marker` has moved on.
            if let Err(status) = self.write(Body::Verify(VerifyMarker {})).await {
                tracing::warn!(reason = status.message(), "no marker for the scheduled verification");
                sleep(AGAIN_AFTER).await;
            }
        }
    }

    /// Puts what this node's content came to in the log, marker after marker, so that every node can compare.
    async fn send_reports(&self) -> Infallible {
        let mut known = self.verifications.known.subscribe();
        let mut reported = 0;
        loop {
            let next = known.borrow_and_update().own.range(reported + 1..).next().map(|(index, _)| *index);
            let Some(marker_index) = next else {
                // We hold a sender, so waiting cannot fail for want of one.
                let _ = known.changed().await;
                continue;
            };
            reported = marker_index;
            let tables = match self.verifications.result(marker_index).await {
                Some(Verification::Done(tables)) => tables,
                Some(Verification::Failed(reason)) => {
                    tracing::warn!(marker_index, reason, "this node's content was not hashed");
                    continue;
                }
                Some(Verification::UnderWay) | None => continue,
            };
            let hash = content::sum(&tables).as_bytes().to_vec().into();
            let report = ContentReport { node_id: self.node_id, marker_index, hash };
            if let Err(status) = self.write(Body::Report(report)).await {
                let reason = status.message();
                tracing::warn!(
                    marker_index,
                    reason,
                    "the other nodes were not told what this one's content is"
                );
            }
        }
    }

    async fn write(&self, body: Body) -> Result<(), Status> {
        let deadline = Instant::now() + WRITE_PATIENCE;
        self.writes.write(&Caller::server(), WriteId::ServerMade, true, None, body, deadline).await.map(drop)
    }

    /// Says aloud when nodes differ; when it is this node that differs from most members, marks it.
    async fn compare(&self) -> Infallible {
        let mut known = self.verifications.known.subscribe();
        let mut named = BTreeSet::new();
        loop {
            known.borrow_and_update();
            self.alarm();
            self.name_others(&mut named);
            if self.facts.diverged().is_none() && self.found().is_some() {
                self.condemn().await;
            }
            // We hold a sender, so waiting cannot fail for want of one.
            let _ = known.changed().await;
        }
    }

    fn members(&self) -> usize {
        self.verifications.members.len()
    }

    /// Without a majority nobody can tell who is right. All of them say so, and go on: to stop would take away the
    /// service from everybody, and heal nothing.
    fn alarm(&self) {
        let known = self.verifications.known.borrow();
        let compared = known.reports.iter().rev().find(|(_, reports)| reports.len() > 1);
        let split = compared.filter(|(_, reports)| verdict(reports, self.members()) == Verdict::Split);
        let alarm = split.map(|(index, reports)| {
            let nodes: Vec<String> = reports.keys().map(u64::to_string).collect();
            format!(
                "nodes {} were compared as of log index {index}, differ, and no content is that of most members: \
                 `resqlite verify` names the tables; compare them by hand, and restore a backup if need be",
                nodes.join(", ")
            )
        });
        if let Some(alarm) = &alarm
            && self.facts.alarm().as_ref() != Some(alarm)
        {
            tracing::error!(alarm, "the nodes do not hold the same");
        }
        self.facts.publish_alarm(alarm);
    }

    /// Says once for each marker which other nodes differ from most members.
    fn name_others(&self, named: &mut BTreeSet<(u64, u64)>) {
        let known = self.verifications.known.borrow();
        for (&marker_index, reports) in &known.reports {
            let Verdict::Majority(majority) = verdict(reports, self.members()) else { continue };
            for (&node, _) in reports.iter().filter(|(_, hash)| **hash != majority) {
                if node != self.node_id && named.insert((marker_index, node)) {
                    tracing::error!(node, marker_index, "a node's content differs from that of most members");
                }
            }
        }
        named.retain(|(marker_index, _)| known.reports.contains_key(marker_index));
    }

    /// The newest marker as of which this node differs from most members.
    fn found(&self) -> Option<Mark> {
        let known = self.verifications.known.borrow();
        known.reports.iter().rev().find_map(|(&marker_index, reports)| {
            let own = *reports.get(&self.node_id)?;
            match verdict(reports, self.members()) {
                Verdict::Majority(majority) if majority != own => Some(Mark { marker_index, own, majority }),
                Verdict::Majority(_) | Verdict::Open | Verdict::Split => None,
            }
        })
    }

    /// Serves nobody from now on, nor after a restart.
    async fn condemn(&self) {
        let share = self.users.share().await;
        // A snapshot may have taken the place of the database that was hashed: then nothing is known any more.
        let Some(mark) = self.found() else { return };
        tracing::error!(
            marker_index = mark.marker_index,
            own = %mark.own,
            majority = %mark.majority,
            "this node has diverged: {mark}"
        );
        self.facts.publish_diverged(Some(mark.to_string()));
        let database = self.database.clone();
        let saved = spawn_blocking(move || mark.save(&database)).await;
        if let Err(error) = saved.unwrap_or_else(|panicked| Err(io::Error::other(panicked))) {
            // The next verification after a restart finds it again.
            tracing::error!(%error, "cannot mark the database: a restart would forget that it has diverged");
        }
        drop(share);
        // Whatever is being read ends; what comes is refused at the gate.
        drop(self.readers.close().await);
    }
}

async fn leads(state: &mut watch::Receiver<LinkState>, node_id: u64) {
    if state.wait_for(|state| state.connected && state.leader_id == node_id).await.is_err() {
        std::future::pending::<()>().await;
    }
}
