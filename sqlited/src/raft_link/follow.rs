//! The followed log: committed entries go to the pipeline, progress comes back.

use std::time::Duration;

use resqlite::api::{
    FollowAttach, FollowProgress, FollowRequest, FollowResponse, follow_request,
    log_service_client::LogServiceClient,
};
use tokio::{
    sync::{mpsc, watch},
    time::sleep,
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, transport::Channel};

use super::{LinkState, SessionEnd, closed_by_raftd, refuses_for_good};
use crate::{
    facts::Facts,
    pipeline::{self, Progress},
};

/// The pause before attaching again where raftd was not ready.
const ATTACH_AGAIN: Duration = Duration::from_millis(200);

/// Attaches where the database stands and follows until the stream breaks.
pub(super) async fn follow(
    mut client: LogServiceClient<Channel>,
    cluster_id: u64,
    pipeline: &pipeline::Handle,
    mut progress: watch::Receiver<Progress>,
    facts: &Facts,
    state: &watch::Sender<LinkState>,
) -> SessionEnd {
    let (mut health, mut room) = (facts.watch_health(), facts.room());
    // Behind everything that an earlier life of the link has queued.
    let Some(position) = pipeline.position().await else {
        // The pipeline only ends when the daemon does.
        return std::future::pending().await;
    };
    let attach = FollowAttach {
        cluster_id: position.cluster_id,
        applied_index: position.applied_index,
        applied_term: position.applied_term,
        applied_timestamp_ms: position.applied_timestamp_ms,
        exclusive: true,
        must_not_lead: health.borrow_and_update().diverged.is_some(),
    };
    let attach = FollowRequest { request: Some(follow_request::Request::Attach(attach)) };
    let (requests, mut entries) = loop {
        let (requests, outgoing) = mpsc::channel(1);
        if requests.send(attach.clone()).await.is_err() {
            return closed_by_raftd();
        }
        match client.follow(ReceiverStream::new(outgoing)).await {
            Ok(response) => break (requests, response.into_inner()),
            // raftd cannot tell yet. The session goes on, because it may take a snapshot to settle it.
            Err(status) if status.code() == Code::Unavailable => sleep(ATTACH_AGAIN).await,
            Err(status) => return refused(status),
        }
    };

    let mut expected_index = position.applied_index + 1;
    let mut bound = position.cluster_id;
    loop {
        let news = async {
            let permit = requests.reserve().await.ok()?;
            tokio::select! {
                changed = progress.changed() => changed.ok()?,
                changed = health.changed() => changed.ok()?,
                changed = room.changed() => changed.ok()?,
            }
            Some(permit)
        };
        tokio::select! {
            permit = news => {
                let Some(permit) = permit else { return closed_by_raftd() };
                let must_not_lead = health.borrow_and_update().diverged.is_some();
                let shortage = room.borrow_and_update().shortage.clone();
                permit.send(report(*progress.borrow_and_update(), must_not_lead, shortage));
            }
            message = entries.message() => {
                let response = match message {
                    Ok(Some(response)) => response,
                    Ok(None) => return closed_by_raftd(),
                    Err(status) => return refused(status),
                };
                if let Err(end) = belongs(&response, cluster_id, &mut bound, pipeline) {
                    return end;
                }
                learn(state, &response);
                for entry in &response.entries {
                    if entry.index != expected_index {
                        let found = entry.index;
                        return SessionEnd::Lost(format!("raftd sent entry {found} where {expected_index} was due"));
                    }
                    expected_index += 1;
                }
                if !response.entries.is_empty() {
                    pipeline.apply(response.entries).await;
                }
            }
        }
    }
}

/// A database that has not yet belonged to a cluster joins raftd's; any other must be raftd's already.
fn belongs(
    response: &FollowResponse,
    configured: u64,
    bound: &mut u64,
    pipeline: &pipeline::Handle,
) -> Result<(), SessionEnd> {
    let theirs = response.cluster_id;
    if theirs == 0 || theirs == *bound {
        return Ok(());
    }
    if theirs != configured {
        return Err(SessionEnd::DoesNotBelong(format!(
            "raftd belongs to cluster {theirs:016x}, the configuration describes {configured:016x}"
        )));
    }
    if *bound != 0 {
        let ours = *bound;
        return Err(SessionEnd::DoesNotBelong(format!(
            "raftd belongs to cluster {theirs:016x}, the database to {ours:016x}"
        )));
    }
    pipeline.bind(theirs);
    *bound = theirs;
    Ok(())
}

fn learn(state: &watch::Sender<LinkState>, response: &FollowResponse) {
    state.send_if_modified(|state| {
        let last = response.entries.last().map_or(0, |entry| entry.index);
        let new = LinkState {
            connected: true,
            leader_id: response.leader_id,
            term: response.term,
            commit_index: response.commit_index.max(last).max(state.commit_index),
            writes_refused: response.writes_refused.clone(),
        };
        let changed = *state != new;
        *state = new;
        changed
    });
}

fn report(progress: Progress, must_not_lead: bool, shortage: Option<String>) -> FollowRequest {
    let Progress { applied_index, durable_index } = progress;
    let shortage = shortage.unwrap_or_default();
    let progress = FollowProgress { applied_index, durable_index, must_not_lead, shortage };
    FollowRequest { request: Some(follow_request::Request::Progress(progress)) }
}

fn refused(status: tonic::Status) -> SessionEnd {
    if refuses_for_good(&status) {
        return SessionEnd::DoesNotBelong(status.message().to_owned());
    }
    status.into()
}
