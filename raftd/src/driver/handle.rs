//! How everybody else speaks to the event loop, and what it tells them.
//!
//! It knows the loop's queue, and nothing of what the loop does with an input.

use bytes::Bytes;
use raft::{
    Index, Message, NodeId, Position, Role, SnapshotFailed, SnapshotOutcome, Standing, Term, TransferError,
};
use resqlite::api::PeerMessage;
use tokio::sync::{mpsc, oneshot};

use crate::{convert, proposals::ReplySender, room::Shortage};

/// How many inputs may wait for the loop. A full queue makes the senders wait,
/// and through HTTP/2 flow control those who send to them.
const QUEUE_INPUTS: usize = 4_096;

/// What can happen to a node.
#[derive(Debug)]
pub enum Input {
    /// A message of a peer.
    Peer(Message),
    /// A peer asks for a vote and waits for the answer.
    VoteRequest(Message, oneshot::Sender<PeerMessage>),
    /// The stream on which a peer spoke to us has ended.
    PeerStreamBroken(NodeId),
    /// Our stream to a peer is up.
    PeerConnected(NodeId),
    /// Our stream to a peer is down.
    PeerUnreachable(NodeId),
    /// Local proposals: their ids and payloads, pairwise, and where the answers go.
    Propose(Vec<u64>, Vec<Bytes>, ReplySender),
    /// A local reader asks for a read index; None means "ask again".
    ReadBarrier(oneshot::Sender<Option<Index>>),
    /// Somebody asks how this node is.
    Status(oneshot::Sender<raft::Status>),
    /// Whether there is room for this node's log.
    LogRoom(Shortage),
    /// Whether there is room for the state machine beside this node.
    StateMachineRoom(Shortage),
    /// Whether a peer has room, by its own account.
    PeerRoom(NodeId, Shortage),
    /// The state machine has durably applied the log up to here.
    StateMachineDurable(Index),
    /// Whether the state machine says of itself that it cannot be trusted.
    MustNotLead(bool),
    /// The state machine has become a snapshot whose last entry is this one.
    Install(Position, oneshot::Sender<SnapshotOutcome>),
    /// A peer has a snapshot up to this index, or it could not be brought there.
    SnapshotFinished(NodeId, Result<Index, SnapshotFailed>),
    /// Leadership is to go to this member, or to the most advanced one; answered once that has begun.
    Transfer(Option<NodeId>, oneshot::Sender<Result<(), TransferError>>),
}

/// How everybody else speaks to the loop.
#[derive(Clone, Debug)]
pub struct DriverHandle {
    inputs: mpsc::Sender<Input>,
}

impl DriverHandle {
    /// A handle, and the queue to start a [`Driver`](super::Driver) with.
    pub fn new() -> (Self, mpsc::Receiver<Input>) {
        let (inputs, receiver) = mpsc::channel(QUEUE_INPUTS);
        (Self { inputs }, receiver)
    }

    /// How many inputs wait for the loop.
    pub fn inputs_waiting(&self) -> usize {
        self.inputs.max_capacity() - self.inputs.capacity()
    }

    /// Waits for room and sends. A loop that has ended takes nothing more.
    pub async fn send(&self, input: Input) {
        let _ = self.inputs.send(input).await;
    }

    /// Delivers a peer's answer, unless it cannot be understood.
    pub async fn deliver(&self, message: PeerMessage) {
        match convert::from_wire(message) {
            Ok(message) => self.send(Input::Peer(message)).await,
            Err(error) => tracing::warn!(%error, "a peer's answer was dropped"),
        }
    }
}

/// What the followers of the log watch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Committed, as far as this node knows.
    pub commit_index: Index,
    /// Committed and durable here: what may be handed to a state machine.
    pub deliverable_index: Index,
    /// This node's term.
    pub term: Term,
    /// The leader of that term, once known.
    pub leader: Option<NodeId>,
    /// What this node is.
    pub role: Role,
    /// Whether it counts.
    pub standing: Standing,
}

impl Default for Progress {
    fn default() -> Self {
        Self {
            commit_index: 0,
            deliverable_index: 0,
            term: 0,
            leader: None,
            role: Role::Follower,
            standing: Standing::New,
        }
    }
}
