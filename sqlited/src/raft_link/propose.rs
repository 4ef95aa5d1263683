//! The stream of proposals: what has gathered travels as one message.

use std::collections::HashMap;

use bytes::Bytes;
use resqlite::api::{
    self, ProposalRefusal, ProposeRequest, log_service_client::LogServiceClient, proposal_outcome,
};
use tokio::sync::{mpsc, oneshot};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;

use super::{SessionEnd, closed_by_raftd};
use crate::limits::PROPOSE_BATCH_BYTES;

/// What came of a proposal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Committed at this index.
    Committed(u64),
    /// Certainly not committed: no leader took it.
    NoLeader,
    /// Certainly not committed: too much is under way.
    Overloaded,
    /// Certainly not committed, and never will be.
    TooLarge,
    /// Certainly not committed: the leader, or most members, lack room on their disks.
    OutOfRoom,
    /// Certainly not committed: raftd stops.
    ShuttingDown,
    /// Certainly not committed: another leader's entry stands in its place.
    Overwritten,
    /// It may or may not be committed, now or later.
    Unknown,
}

/// A payload, and where to say what came of it.
#[derive(Debug)]
pub(super) struct Proposal {
    pub payload: Bytes,
    pub answer: oneshot::Sender<Outcome>,
}

/// Forwards proposals until the stream breaks. Those under way are then dropped, which makes them unknown.
pub(super) async fn forward(
    mut client: LogServiceClient<Channel>,
    proposals: &mut mpsc::Receiver<Proposal>,
) -> SessionEnd {
    // One message waits at most: while it does, more proposals gather behind it for the next.
    let (requests, outgoing) = mpsc::channel(1);
    let mut outcomes = match client.propose(ReceiverStream::new(outgoing)).await {
        Ok(response) => response.into_inner(),
        Err(status) => return status.into(),
    };
    let mut under_way = HashMap::new();
    let mut next_id = 1;
    loop {
        let gathered = async {
            let permit = requests.reserve().await.ok()?;
            Some((permit, proposals.recv().await?))
        };
        tokio::select! {
            gathered = gathered => {
                let Some((permit, first)) = gathered else { return closed_by_raftd() };
                let request = gather(first, proposals, &mut next_id, &mut under_way);
                if !request.proposals.is_empty() {
                    permit.send(request);
                }
            }
            message = outcomes.message() => match message {
                Ok(Some(response)) => for outcome in response.outcomes {
                    let Some(answer) = under_way.remove(&outcome.id) else { continue };
                    // One who no longer waits needs no answer.
                    let _ = oneshot::Sender::send(answer, meaning(&outcome));
                },
                Ok(None) => return closed_by_raftd(),
                Err(status) => return status.into(),
            }
        }
    }
}

/// Takes all that waits, up to a bound in bytes.
fn gather(
    first: Proposal,
    proposals: &mut mpsc::Receiver<Proposal>,
    next_id: &mut u64,
    under_way: &mut HashMap<u64, oneshot::Sender<Outcome>>,
) -> ProposeRequest {
    let mut request = ProposeRequest::default();
    let mut bytes = 0;
    let mut next = Some(first);
    while let Some(proposal) = next {
        // Its client has gone, and it was never sent: then it need not be.
        if !proposal.answer.is_closed() {
            bytes += proposal.payload.len();
            under_way.insert(*next_id, proposal.answer);
            request.proposals.push(api::Proposal { id: *next_id, payload: proposal.payload });
            *next_id += 1;
        }
        next = if bytes < PROPOSE_BATCH_BYTES { proposals.try_recv().ok() } else { None };
    }
    request
}

fn meaning(outcome: &api::ProposalOutcome) -> Outcome {
    match outcome.outcome {
        Some(proposal_outcome::Outcome::CommittedIndex(index)) => Outcome::Committed(index),
        Some(proposal_outcome::Outcome::Refused(refusal)) => match ProposalRefusal::try_from(refusal) {
            Ok(ProposalRefusal::NoLeader) => Outcome::NoLeader,
            Ok(ProposalRefusal::Overloaded) => Outcome::Overloaded,
            Ok(ProposalRefusal::TooLarge) => Outcome::TooLarge,
            Ok(ProposalRefusal::OutOfRoom) => Outcome::OutOfRoom,
            Ok(ProposalRefusal::ShuttingDown) => Outcome::ShuttingDown,
            Ok(ProposalRefusal::Overwritten) => Outcome::Overwritten,
            // A newer raftd's reason: nothing may be concluded from it.
            Ok(ProposalRefusal::Unspecified) | Err(_) => Outcome::Unknown,
        },
        Some(proposal_outcome::Outcome::Unknown(_)) | None => Outcome::Unknown,
    }
}
