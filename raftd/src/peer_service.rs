//! The receiving side of the raft port: what other raftds say to this one.
//!
//! A stranger is refused before the core sees a word of it: every message
//! carries the cluster id, and with TLS the node that it claims to come from
//! must be the one that the connection's certificate names. Reading from a peer's stream waits while the
//! driver's queue is full, and HTTP/2 flow control passes that on.

use std::{pin::Pin, time::Duration};

use raft::NodeId;
use resqlite::{
    api::{
        InstallSnapshotResponse, PeerMessage, SnapshotChunk, SnapshotHeader, SnapshotPosition,
        raft_service_server::RaftService,
    },
    tls::{Caller, UnderWay},
};
use tokio::{
    sync::{oneshot, watch},
    time::timeout,
};
use tokio_stream::{Stream, wrappers::ReceiverStream};
use tonic::{Request, Response, Status, Streaming};

use crate::{
    convert,
    driver::{DriverHandle, Input, Progress},
    metrics::Metrics,
    snapshots::{Snapshots, position_from_wire},
};

/// How long the state machine may take to check a snapshot that it has received whole, and to become it.
const INSTALL_PATIENCE: Duration = Duration::from_secs(600);

/// Serves the peers of one node.
#[derive(Clone)]
pub struct PeerService {
    /// This node.
    pub node_id: NodeId,
    /// Its cluster.
    pub cluster_id: u64,
    /// The event loop.
    pub driver: DriverHandle,
    /// How far the log is.
    pub progress: watch::Receiver<Progress>,
    /// The way to the state machine.
    pub snapshots: Snapshots,
    /// What is counted.
    pub metrics: Metrics,
}

impl PeerService {
    /// Refuses strangers, those who have strayed, and those who speak in another's name.
    fn check_address(
        &self,
        caller: Option<NodeId>,
        cluster_id: u64,
        from: NodeId,
        to: NodeId,
    ) -> Result<(), Status> {
        if let Some(caller) = caller.filter(|caller| *caller != from) {
            return Err(Status::permission_denied(format!(
                "a message of node {from} came with the certificate of node {caller}: compare node_id and \
                 raftd.tls.certificate in the configuration of that host"
            )));
        }
        if cluster_id != self.cluster_id {
            return Err(Status::failed_precondition(format!(
                "node {from} belongs to another cluster (id {cluster_id:016x}, here it is {:016x}): \
                 compare cluster.name and the member ids in both configurations",
                self.cluster_id
            )));
        }
        if to != self.node_id {
            return Err(Status::failed_precondition(format!(
                "this is node {}, not node {to}: compare the addresses in both configurations",
                self.node_id
            )));
        }
        Ok(())
    }

    /// Refuses strangers, and what cannot be understood.
    fn admit(&self, caller: Option<NodeId>, message: PeerMessage) -> Result<raft::Message, Status> {
        self.check_address(caller, message.cluster_id, message.from, message.to)?;
        convert::from_wire(message).map_err(|error| Status::invalid_argument(error.to_string()))
    }
}

/// The node that the connection's certificate names; `None` in plain text.
fn node_of<T>(request: &Request<T>) -> Option<NodeId> {
    request.extensions().get::<Caller>()?.node()
}

/// Keeps the connection its seat, as long as it lives.
fn under_way<T>(request: &Request<T>) -> Option<UnderWay> {
    Some(request.extensions().get::<Caller>()?.seat.call())
}

#[tonic::async_trait]
impl RaftService for PeerService {
    async fn request_vote(&self, request: Request<PeerMessage>) -> Result<Response<PeerMessage>, Status> {
        let caller = node_of(&request);
        let message = self.admit(caller, request.into_inner())?;
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
        let (caller, under_way) = (node_of(&request), under_way(&request));
        // Nothing is ever sent but a refusal; the end of this half says that the stream is broken.
        let (refusal, answers) = tokio::sync::mpsc::channel(1);
        tokio::spawn(async move {
            if let Err(status) = service.receive(caller, request.into_inner()).await {
                tracing::warn!(reason = status.message(), "a peer's stream was refused");
                service.metrics.error("stream_refused");
                let _ = refusal.send(Err(status)).await;
            }
            drop(under_way);
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(answers))))
    }

    async fn install_snapshot(
        &self,
        request: Request<Streaming<SnapshotChunk>>,
    ) -> Result<Response<InstallSnapshotResponse>, Status> {
        let (caller, _under_way) = (node_of(&request), under_way(&request));
        let mut chunks = request.into_inner();
        let mut first = chunks.message().await?.unwrap_or_default();
        let header = first.header.take();
        let Some(SnapshotHeader { cluster_id, from, to, position: Some(position) }) = header else {
            return Err(Status::invalid_argument("the first chunk has no header"));
        };
        self.check_address(caller, cluster_id, from, to)?;
        let commit_index = self.progress.borrow().commit_index;
        if position.index <= commit_index {
            // A late one; installing it would rewind the log.
            return Ok(Response::new(InstallSnapshotResponse { index: commit_index }));
        }
        let received = self.receive_snapshot(position, first, chunks).await;
        let result = if received.is_ok() { "ok" } else { "failed" };
        self.metrics.snapshots.with_label_values(&["received", result]).inc();
        received.map(Response::new)
    }
}

impl PeerService {
    async fn receive_snapshot(
        &self,
        position: SnapshotPosition,
        first: SnapshotChunk,
        chunks: Streaming<SnapshotChunk>,
    ) -> Result<InstallSnapshotResponse, Status> {
        let mut progress = self.progress.clone();
        let taken = self.snapshots.offer(position_from_wire(position), first, chunks).await?;
        let installed =
            timeout(INSTALL_PATIENCE, progress.wait_for(|now| now.deliverable_index >= position.index));
        tokio::select! {
            installed = installed => match installed {
                Ok(Ok(_)) => Ok(InstallSnapshotResponse { index: position.index }),
                Ok(Err(_)) => Err(Status::unavailable("raftd is stopping")),
                Err(_) => {
                    Err(Status::deadline_exceeded("the state machine did not become the snapshot in time"))
                }
            },
            () = taken.given_up() => Err(Status::aborted("the state machine did not become the snapshot")),
        }
    }

    async fn receive(
        &self,
        caller: Option<NodeId>,
        mut stream: Streaming<PeerMessage>,
    ) -> Result<(), Status> {
        let mut speaker = None;
        // Once for every stream: what an earlier one said may be over.
        let mut shortage = None;
        let result = loop {
            match stream.message().await {
                Ok(Some(mut message)) => {
                    let said = std::mem::take(&mut message.shortage);
                    match self.admit(caller, message) {
                        Ok(message) => {
                            speaker = Some(message.from);
                            if shortage.as_ref() != Some(&said) {
                                let told = (!said.is_empty()).then(|| said.as_str().into());
                                self.driver.send(Input::PeerRoom(message.from, told)).await;
                                shortage = Some(said);
                            }
                            self.driver.send(Input::Peer(message)).await;
                        }
                        Err(status) => break Err(status),
                    }
                }
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
