//! The Unix socket: what raftd offers to the state machine beside it.
//!
//! Propose, follow, read barriers, status. Every stream pushes back when it is
//! full: proposals are taken only while their answers are being taken, and
//! entries are read from the log only as fast as the follower takes them.

use std::{
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use raft::{Index, Log, Position, Role, SnapshotOutcome, Standing};
use resqlite::{
    api::{
        FollowAttach, FollowRequest, FollowResponse, LogStatusRequest, LogStatusResponse, PeerProgress,
        ProposalRefusal, ProposeRequest, ProposeResponse, RaftRole, ReadBarrierRequest, ReadBarrierResponse,
        ReceiveSnapshotRequest, SendSnapshotResponse, SnapshotPart, SnapshotTask, TransferLeadershipRequest,
        TransferLeadershipResponse, WatchSnapshotsRequest, follow_request, log_service_server::LogService,
    },
    daemon::Shutdown,
    disk::Room,
    tls::{PeerTls, Reloading},
};
use tokio::{
    sync::{Semaphore, mpsc, oneshot, watch},
    time::timeout,
};
use tokio_stream::{
    Stream, StreamExt,
    wrappers::{ReceiverStream, UnboundedReceiverStream},
};
use tonic::{Request, Response, Status, Streaming};

use crate::{
    attach::{self, Otherwise, Place},
    convert::entry_to_wire,
    driver::{DriverHandle, Input, Progress},
    metrics::Metrics,
    proposals::{Waiter, refused},
    room::Shortage,
    snapshots::Snapshots,
    store::{LogReader, StoreHandle},
};

/// How many proposals of one stream may be unanswered, or answered but not yet taken.
pub const MAX_OUTSTANDING_PROPOSALS: usize = 65_536;

/// How many read barriers of one stream may be under way.
const MAX_OUTSTANDING_BARRIERS: usize = 1_024;

/// How many bytes of entries go into one message to a follower of the log, unless one entry is larger.
const FOLLOW_BYTES: usize = 1 << 20;

/// How many such messages may wait for the follower.
const FOLLOW_MESSAGES: usize = 4;

/// Serves the local socket of one node.
#[derive(Clone)]
pub struct LocalLogService {
    parts: Arc<LocalLogParts>,
}

/// What the service needs.
pub struct LocalLogParts {
    /// This node.
    pub node_id: u64,
    /// Its cluster.
    pub cluster_id: u64,
    /// The largest payload that may be proposed.
    pub max_payload_bytes: usize,
    /// The event loop.
    pub driver: DriverHandle,
    /// How far the log is.
    pub progress: watch::Receiver<Progress>,
    /// Why proposals are refused for want of room.
    pub refused: watch::Receiver<Shortage>,
    /// The room for the log.
    pub room: watch::Receiver<Room>,
    /// Reads committed entries.
    pub reader: LogReader,
    /// Sizes, for the status.
    pub store: StoreHandle,
    /// Relays snapshots.
    pub snapshots: Snapshots,
    /// The certificates for the peers.
    pub tls: Option<Reloading<PeerTls>>,
    /// How long a transfer of leadership may take.
    pub transfer_patience: Duration,
    /// Ends the streams.
    pub shutdown: Shutdown,
    /// Whether a state machine is attached.
    pub attached: AtomicBool,
    /// What is counted.
    pub metrics: Metrics,
}

type ResponseStream<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

impl LocalLogService {
    /// A service over these parts; clones share them.
    pub fn new(parts: LocalLogParts) -> Self {
        Self { parts: Arc::new(parts) }
    }
}

#[tonic::async_trait]
impl LogService for LocalLogService {
    type ProposeStream = ResponseStream<ProposeResponse>;
    type FollowStream = ResponseStream<FollowResponse>;
    type ReadBarrierStream = ResponseStream<ReadBarrierResponse>;
    type WatchSnapshotsStream = ResponseStream<SnapshotTask>;
    type ReceiveSnapshotStream = ResponseStream<SnapshotPart>;

    async fn propose(
        &self,
        request: Request<Streaming<ProposeRequest>>,
    ) -> Result<Response<Self::ProposeStream>, Status> {
        let outstanding = Arc::new(Semaphore::new(MAX_OUTSTANDING_PROPOSALS));
        let (replies, answers) = mpsc::unbounded_channel();
        let parts = self.parts.clone();
        let permits = outstanding.clone();
        tokio::spawn(async move { parts.take_proposals(request.into_inner(), replies, permits).await });
        let metrics = self.parts.metrics.clone();
        let answers = UnboundedReceiverStream::new(answers).map(move |response: ProposeResponse| {
            metrics.answered(&response.outcomes);
            outstanding.add_permits(response.outcomes.len());
            Ok(response)
        });
        Ok(Response::new(Box::pin(answers)))
    }

    async fn follow(
        &self,
        request: Request<Streaming<FollowRequest>>,
    ) -> Result<Response<Self::FollowStream>, Status> {
        let mut requests = request.into_inner();
        let first = requests.message().await?;
        let Some(FollowRequest { request: Some(follow_request::Request::Attach(attach)) }) = first else {
            return Err(Status::invalid_argument("the first message of Follow must attach"));
        };
        self.parts.check_attach(&attach).await?;
        let attachment = attach.exclusive.then(|| Attachment::take(&self.parts)).transpose()?;
        if attach.exclusive {
            self.parts.driver.send(Input::MustNotLead(attach.must_not_lead)).await;
        }
        let (sender, responses) = mpsc::channel(FOLLOW_MESSAGES);
        let parts = self.parts.clone();
        tokio::spawn(async move {
            tokio::select! {
                () = parts.feed(attach.applied_index, sender) => {}
                () = parts.take_progress(requests, attach.exclusive) => {}
                () = parts.shutdown.wait() => {}
            }
            drop(attachment);
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(responses))))
    }

    async fn read_barrier(
        &self,
        request: Request<Streaming<ReadBarrierRequest>>,
    ) -> Result<Response<Self::ReadBarrierStream>, Status> {
        let (sender, responses) = mpsc::channel(MAX_OUTSTANDING_BARRIERS);
        let parts = self.parts.clone();
        tokio::spawn(async move { parts.take_barriers(request.into_inner(), sender).await });
        Ok(Response::new(Box::pin(ReceiverStream::new(responses))))
    }

    async fn watch_snapshots(
        &self,
        _request: Request<WatchSnapshotsRequest>,
    ) -> Result<Response<Self::WatchSnapshotsStream>, Status> {
        let tasks = ReceiverStream::new(self.parts.snapshots.watch()).map(Ok);
        Ok(Response::new(Box::pin(tasks)))
    }

    async fn send_snapshot(
        &self,
        request: Request<Streaming<SnapshotPart>>,
    ) -> Result<Response<SendSnapshotResponse>, Status> {
        self.parts.snapshots.send(request.into_inner()).await?;
        Ok(Response::new(SendSnapshotResponse {}))
    }

    async fn receive_snapshot(
        &self,
        request: Request<ReceiveSnapshotRequest>,
    ) -> Result<Response<Self::ReceiveSnapshotStream>, Status> {
        let parts = self.parts.snapshots.take(request.into_inner().transfer_id)?;
        Ok(Response::new(Box::pin(ReceiverStream::new(parts))))
    }

    async fn log_status(
        &self,
        _request: Request<LogStatusRequest>,
    ) -> Result<Response<LogStatusResponse>, Status> {
        let (reply, answer) = oneshot::channel();
        self.parts.driver.send(Input::Status(reply)).await;
        let status = answer.await.map_err(|_| stopping())?;
        Ok(Response::new(self.parts.status_response(&status)?))
    }

    async fn transfer_leadership(
        &self,
        request: Request<TransferLeadershipRequest>,
    ) -> Result<Response<TransferLeadershipResponse>, Status> {
        let to = request.into_inner().to;
        let leader_id = self.parts.transfer((to != 0).then_some(to)).await?;
        Ok(Response::new(TransferLeadershipResponse { leader_id }))
    }
}

/// The one state machine of this node, for as long as it is attached.
struct Attachment {
    parts: Arc<LocalLogParts>,
}

impl Attachment {
    fn take(parts: &Arc<LocalLogParts>) -> Result<Self, Status> {
        if parts.attached.swap(true, Ordering::AcqRel) {
            return Err(Status::already_exists("another sqlited is attached to this raftd"));
        }
        parts.metrics.attached.set(1);
        Ok(Self { parts: parts.clone() })
    }
}

impl Drop for Attachment {
    fn drop(&mut self) {
        self.parts.metrics.attached.set(0);
        self.parts.attached.store(false, Ordering::Release);
    }
}

impl LocalLogParts {
    async fn take_proposals(
        &self,
        mut requests: Streaming<ProposeRequest>,
        replies: mpsc::UnboundedSender<ProposeResponse>,
        permits: Arc<Semaphore>,
    ) {
        while let Ok(Some(request)) = requests.message().await {
            let count = request.proposals.len().min(MAX_OUTSTANDING_PROPOSALS) as u32;
            // Waiting here leaves the requests in the stream: that is the push-back.
            let Ok(permit) = permits.acquire_many(count).await else { return };
            permit.forget();
            let (mut ids, mut payloads) = (Vec::new(), Vec::new());
            for proposal in request.proposals {
                if proposal.payload.len() > self.max_payload_bytes {
                    let too_large = refused(ProposalRefusal::TooLarge);
                    Waiter::new(vec![proposal.id], replies.clone()).answer_all(too_large);
                    continue;
                }
                ids.push(proposal.id);
                payloads.push(proposal.payload);
            }
            if !ids.is_empty() {
                self.driver.send(Input::Propose(ids, payloads, replies.clone())).await;
            }
        }
    }

    /// A state machine that does not belong to this log must not be fed from it.
    async fn check_attach(&self, attach: &FollowAttach) -> Result<(), Status> {
        if attach.cluster_id != 0 && attach.cluster_id != self.cluster_id {
            return Err(Status::failed_precondition(format!(
                "the database belongs to cluster {:016x}, the log to cluster {:016x}",
                attach.cluster_id, self.cluster_id
            )));
        }
        let applied = Position {
            index: attach.applied_index,
            term: attach.applied_term,
            timestamp_ms: attach.applied_timestamp_ms,
        };
        let base = self.reader.base().map_err(unreadable)?;
        if applied.index < base.index && !attach.exclusive {
            return Err(Status::out_of_range(format!("the log begins after index {}", base.index)));
        }
        if applied.index < base.index {
            return Err(Status::failed_precondition(format!(
                "the database has applied up to index {}, but the log begins after index {}: \
                 rebuild this node from its peers with `resqlite node replace`",
                applied.index, base.index
            )));
        }
        if !attach.exclusive {
            // An onlooker has applied nothing: it only says where to begin.
            return Ok(());
        }
        let term = self.reader.term(applied.index).map_err(unreadable)?;
        let was_taken = self.snapshots.taken() == Some(applied);
        match attach::place(applied, base.index, term, was_taken) {
            Place::InLog => return Ok(()),
            Place::Install if self.install(applied).await? == SnapshotOutcome::Installed => return Ok(()),
            // What is discarded was refused above.
            Place::Install | Place::Conflict | Place::Discarded => {}
        }
        let now = *self.progress.borrow();
        match attach::without_install(applied, term, now.commit_index, now.leader, self.node_id) {
            Otherwise::Follow => Ok(()),
            Otherwise::LogLost => Err(Status::failed_precondition(format!(
                "the database has applied index {}, but this node leads, and its log ends before that: the log was \
                 lost and begun anew. Keep a copy of the database, empty both data directories on every node, and \
                 restore the copy as a backup",
                applied.index
            ))),
            Otherwise::Wait => {
                Err(Status::unavailable("it is not known yet what is committed; attach again"))
            }
            Otherwise::Foreign => Err(Status::failed_precondition(format!(
                "the database has applied index {} of term {}, but the log holds term {term:?} there: \
                 they do not belong together",
                applied.index, applied.term
            ))),
        }
    }

    /// The log begins anew after a position.
    async fn install(&self, position: Position) -> Result<SnapshotOutcome, Status> {
        let (reply, answer) = oneshot::channel();
        self.driver.send(Input::Install(position, reply)).await;
        let outcome = answer.await.map_err(|_| stopping())?;
        if outcome == SnapshotOutcome::Installed {
            let mut progress = self.progress.clone();
            let installed = progress.wait_for(|now| now.deliverable_index >= position.index).await;
            installed.map_err(|_| stopping())?;
        }
        Ok(outcome)
    }

    /// Sends committed entries after `applied_index` until the follower is gone.
    async fn feed(&self, applied_index: Index, sender: mpsc::Sender<Result<FollowResponse, Status>>) {
        let mut sent = applied_index;
        let mut told = None;
        let (mut progress, mut refused) = (self.progress.clone(), self.refused.clone());
        loop {
            let now = (*progress.borrow_and_update(), refused.borrow_and_update().clone());
            if sent < now.0.deliverable_index || told.as_ref() != Some(&now) {
                // Room first, then the read: what waits for a slow follower stays in the log.
                let Ok(slot) = sender.reserve().await else { return };
                let response = self.next_response(&mut sent, &now);
                let failed = response.is_err();
                slot.send(response);
                if failed {
                    return;
                }
                told = Some(now);
                continue;
            }
            tokio::select! {
                changed = progress.changed() => if changed.is_err() { return },
                changed = refused.changed() => if changed.is_err() { return },
                () = sender.closed() => return,
            }
        }
    }

    fn next_response(
        &self,
        sent: &mut Index,
        (now, refused): &(Progress, Shortage),
    ) -> Result<FollowResponse, Status> {
        let mut entries = Vec::new();
        if *sent < now.deliverable_index {
            entries =
                self.reader.entries(*sent + 1, now.deliverable_index, FOLLOW_BYTES).map_err(unreadable)?;
            *sent += entries.len() as u64;
        }
        Ok(FollowResponse {
            entries: entries.into_iter().map(entry_to_wire).collect(),
            commit_index: now.commit_index,
            term: now.term,
            leader_id: now.leader.unwrap_or(0),
            cluster_id: self.cluster_id,
            writes_refused: refused.as_deref().unwrap_or_default().to_owned(),
        })
    }

    /// Reads the follower's reports until it is gone. Only the state machine's count.
    async fn take_progress(&self, mut requests: Streaming<FollowRequest>, exclusive: bool) {
        let mut shortage = String::new();
        if exclusive {
            // It says so itself if it still lacks what an earlier one lacked.
            self.driver.send(Input::StateMachineRoom(None)).await;
        }
        while let Ok(Some(request)) = requests.message().await {
            if let Some(follow_request::Request::Progress(progress)) = request.request
                && exclusive
            {
                if progress.shortage != shortage {
                    shortage = progress.shortage;
                    let shortage = (!shortage.is_empty()).then(|| shortage.as_str().into());
                    self.driver.send(Input::StateMachineRoom(shortage)).await;
                }
                self.driver.send(Input::StateMachineDurable(progress.durable_index)).await;
                self.driver.send(Input::MustNotLead(progress.must_not_lead)).await;
            }
        }
    }

    async fn take_barriers(
        &self,
        mut requests: Streaming<ReadBarrierRequest>,
        sender: mpsc::Sender<Result<ReadBarrierResponse, Status>>,
    ) {
        while let Ok(Some(ReadBarrierRequest { id })) = requests.message().await {
            // A slot for the answer before the question: at most as many are under way as there are slots.
            let Ok(slot) = sender.clone().reserve_owned().await else { return };
            let (reply, answer) = oneshot::channel();
            self.driver.send(Input::ReadBarrier(reply)).await;
            tokio::spawn(async move {
                let read_index = answer.await.ok().flatten();
                slot.send(Ok(ReadBarrierResponse { id, read_index }));
            });
        }
    }

    async fn transfer(&self, to: Option<u64>) -> Result<u64, Status> {
        let (reply, answer) = oneshot::channel();
        self.driver.send(Input::Transfer(to, reply)).await;
        answer
            .await
            .map_err(|_| stopping())?
            .map_err(|error| Status::failed_precondition(error.to_string()))?;
        let mut progress = self.progress.clone();
        let other_leads = progress.wait_for(|now| now.leader.is_some_and(|leader| leader != self.node_id));
        match timeout(self.transfer_patience, other_leads).await {
            Ok(Ok(now)) => Ok(now.leader.unwrap_or(0)),
            Ok(Err(_)) => Err(stopping()),
            Err(_) => Err(Status::unavailable("nobody took over in time; this node leads on")),
        }
    }

    fn status_response(&self, status: &raft::Status) -> Result<LogStatusResponse, Status> {
        let role = match (status.standing, status.role) {
            (Standing::New | Standing::Founder, _) => RaftRole::New,
            (Standing::Learner, _) => RaftRole::Learner,
            (Standing::Voter, Role::Follower) => RaftRole::Follower,
            (Standing::Voter, Role::PreCandidate | Role::Candidate) => RaftRole::Candidate,
            (Standing::Voter, Role::Leader) => RaftRole::Leader,
        };
        let peers = status.peers.iter().map(|(&node_id, peer)| PeerProgress {
            node_id,
            matched_index: peer.matched_index,
            active: peer.recently_active,
            counts: peer.counts(),
        });
        Ok(LogStatusResponse {
            node_id: self.node_id,
            cluster_id: self.cluster_id,
            role: role.into(),
            term: status.term,
            leader_id: status.leader.unwrap_or(0),
            commit_index: status.commit_index,
            first_index: self.reader.base().map_err(unreadable)?.index + 1,
            last_index: status.last_index,
            durable_index: status.durable_index,
            log_bytes: self.store.log_bytes(),
            version: env!("CARGO_PKG_VERSION").into(),
            peers: peers.collect(),
            free_bytes: self.room.borrow().free_bytes,
            incarnation: status.incarnation,
            waits_for: status.waits_for.clone(),
            warnings: self.tls.iter().filter_map(Reloading::expiry_warning).collect(),
        })
    }
}

fn unreadable(error: raft::LogError) -> Status {
    Status::data_loss(error.to_string())
}

fn stopping() -> Status {
    Status::unavailable("raftd is stopping")
}
