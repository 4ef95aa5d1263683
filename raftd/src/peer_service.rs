//! The receiving side of the raft port: what other raftds say to this one.
//!
//! A stranger is refused before the core sees a word of it: every message
//! carries the cluster id. Reading from a peer's stream waits while the
//! driver's queue is full, and HTTP/2 flow control passes that on.

use std::pin::Pin;

use raft::NodeId;
use resqlite::api::{PeerMessage, raft_service_server::RaftService};
use tokio::sync::oneshot;
use tokio_stream::{Stream, wrappers::ReceiverStream};
use tonic::{Request, Response, Status, Streaming};

use crate::{
    convert,
    driver::{DriverHandle, Input},
};

/// Serves the peers of one node.
#[derive(Clone, Debug)]
pub struct PeerService {
    node_id: NodeId,
    cluster_id: u64,
    driver: DriverHandle,
}

impl PeerService {
    /// For the node of this id, in the cluster of this id.
    pub fn new(node_id: NodeId, cluster_id: u64, driver: DriverHandle) -> Self {
        Self { node_id, cluster_id, driver }
    }

    /// Refuses strangers, and what cannot be understood.
    fn admit(&self, message: PeerMessage) -> Result<raft::Message, Status> {
        if message.cluster_id != self.cluster_id {
            return Err(Status::failed_precondition(format!(
                "node {} belongs to another cluster (id {:016x}, here it is {:016x}): \
                 compare cluster.name and the member ids in both configurations",
                message.from, message.cluster_id, self.cluster_id
            )));
        }
        if message.to != self.node_id {
            return Err(Status::failed_precondition(format!(
                "this is node {}, not node {}: compare the addresses in both configurations",
                self.node_id, message.to
            )));
        }
        convert::from_wire(message).map_err(|error| Status::invalid_argument(error.to_string()))
    }
}

#[tonic::async_trait]
impl RaftService for PeerService {
    async fn request_vote(&self, request: Request<PeerMessage>) -> Result<Response<PeerMessage>, Status> {
        let message = self.admit(request.into_inner())?;
        if !matches!(message.body, raft::Body::VoteRequest { .. }) {
            return Err(Status::invalid_argument("RequestVote takes vote requests only"));
        }
        let (reply, answer) = oneshot::channel();
        self.driver.send(Input::VoteRequest(message, reply)).await;
        // The core stays silent where a refusal would say nothing; the asker has a deadline.
        answer.await.map(Response::new).map_err(|_| Status::unavailable("no answer to this vote request"))
    }

    type AppendEntriesStream = Pin<Box<dyn Stream<Item = Result<PeerMessage, Status>> + Send>>;

    async fn append_entries(
        &self,
        request: Request<Streaming<PeerMessage>>,
    ) -> Result<Response<Self::AppendEntriesStream>, Status> {
        let service = self.clone();
        // Nothing is ever sent but a refusal; the end of this half says that the stream is broken.
        let (refusal, answers) = tokio::sync::mpsc::channel(1);
        tokio::spawn(async move {
            if let Err(status) = service.receive(request.into_inner()).await {
                tracing::warn!(reason = status.message(), "a peer's stream was refused");
                let _ = refusal.send(Err(status)).await;
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(answers))))
    }
}

impl PeerService {
    async fn receive(&self, mut stream: Streaming<PeerMessage>) -> Result<(), Status> {
        let mut speaker = None;
        let result = loop {
            match stream.message().await {
                Ok(Some(message)) => match self.admit(message) {
                    Ok(message) => {
                        speaker = Some(message.from);
                        self.driver.send(Input::Peer(message)).await;
                    }
                    Err(status) => break Err(status),
                },
                // A process that dies ends its streams at once: the sooner that is known, the sooner a new leader.
                Ok(None) | Err(_) => break Ok(()),
            }
        };
        if let Some(peer) = speaker {
            self.driver.send(Input::PeerStreamBroken(peer)).await;
        }
        result
    }
}
