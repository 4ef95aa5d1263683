//! The sending side towards one other raftd.
//!
//! Each peer has one task, one connection and one long-lived AppendEntries
//! stream that carries everything but votes, in order. Nothing here waits for
//! a peer: what does not fit into the bounded queue is dropped, as a network
//! would, and Raft sends again.

use std::time::Duration;

use raft::{Body, Message, NodeId};
use resqlite::{
    api::{PeerMessage, raft_service_client::RaftServiceClient},
    tls::Dial,
};
use tokio::{
    sync::{
        mpsc::{self, error::TrySendError},
        watch,
    },
    time::timeout,
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;

use crate::{
    convert::{self, Envelope},
    driver::{DriverHandle, Input},
    room::Shortage,
    snapshots::Route,
};

/// How many messages may wait for one peer. Appends are bounded by the core's
/// window long before; the rest is small.
const QUEUE_MESSAGES: usize = 1_024;

const FIRST_RETRY: Duration = Duration::from_millis(20);
const LAST_RETRY: Duration = Duration::from_millis(500);

/// What the sending tasks need to know of the cluster.
#[derive(Clone, Debug)]
pub struct PeerOptions {
    /// This node.
    pub node_id: NodeId,
    /// Stamped on every message.
    pub envelope: Envelope,
    /// A peer that does not answer for so long is taken for unreachable.
    pub patience: Duration,
    /// Why this node lacks room: what is sent says so, too.
    pub shortage: watch::Receiver<Shortage>,
}

/// A handle on the task that talks to one peer.
#[derive(Debug)]
pub struct Peer {
    id: NodeId,
    queue: mpsc::Sender<Message>,
    votes: VoteSender,
    snapshots: Route,
}

/// Asks for votes, outside the stream: a vote must not wait behind entries.
#[derive(Clone, Debug)]
struct VoteSender {
    channel: Channel,
    options: PeerOptions,
    driver: DriverHandle,
}

impl Peer {
    /// Starts the task; it ends when the handle is dropped.
    pub fn start(id: NodeId, dial: Dial, options: PeerOptions, driver: DriverHandle) -> Self {
        // A dead host sends no RST: keep-alives find it in seconds rather than in TCP's quarter of an hour.
        let dial = dial.with(|endpoint| {
            endpoint
                .connect_timeout(options.patience)
                .tcp_nodelay(true)
                .http2_keep_alive_interval(options.patience)
                .keep_alive_timeout(options.patience)
                .keep_alive_while_idle(true)
                .initial_stream_window_size(8 << 20)
                .initial_connection_window_size(16 << 20)
        });
        let (queue, receiver) = mpsc::channel(QUEUE_MESSAGES);
        let votes =
            VoteSender { channel: dial.connect_lazy(), options: options.clone(), driver: driver.clone() };
        let snapshots = Route {
            channel: dial.connect_lazy(),
            cluster_id: options.envelope.cluster_id,
            from: options.node_id,
        };
        tokio::spawn(Connector { id, dial, options, driver }.run(receiver));
        Self { id, queue, votes, snapshots }
    }

    /// How a snapshot reaches the peer.
    pub fn snapshot_route(&self) -> Route {
        self.snapshots.clone()
    }

    /// Sends a message, or drops it when the peer is too far behind to take it.
    pub fn send(&self, message: Message) {
        if matches!(message.body, Body::VoteRequest { .. }) {
            tokio::spawn(self.votes.clone().ask(message));
            return;
        }
        if let Err(TrySendError::Full(_)) = self.queue.try_send(message) {
            tracing::debug!(peer = self.id, "the peer's queue is full; a message was dropped");
        }
    }
}

impl VoteSender {
    async fn ask(self, message: Message) {
        let request = convert::to_wire(message, self.options.envelope);
        let to = request.to;
        let mut client = RaftServiceClient::new(self.channel);
        match timeout(self.options.patience, client.request_vote(request)).await {
            Ok(Ok(response)) => self.driver.deliver(response.into_inner()).await,
            Ok(Err(status)) => tracing::debug!(peer = to, %status, "no answer to a vote request"),
            Err(_) => tracing::debug!(peer = to, "no answer to a vote request in time"),
        }
    }
}

struct Connector {
    id: NodeId,
    dial: Dial,
    options: PeerOptions,
    driver: DriverHandle,
}

impl Connector {
    async fn run(self, mut queue: mpsc::Receiver<Message>) {
        let mut retry_after = FIRST_RETRY;
        let mut complained = false;
        loop {
            match self.connect().await {
                Ok((messages, broken)) => {
                    tracing::info!(peer = self.id, "connected");
                    retry_after = FIRST_RETRY;
                    complained = false;
                    self.driver.send(Input::PeerConnected(self.id)).await;
                    if self.forward(&mut queue, messages, broken).await.is_none() {
                        return;
                    }
                    tracing::warn!(peer = self.id, "the stream to the peer broke");
                }
                Err(status) if !complained => {
                    tracing::warn!(peer = self.id, reason = status.message(), "cannot connect; trying again");
                    complained = true;
                }
                Err(_) => {}
            }
            self.driver.send(Input::PeerUnreachable(self.id)).await;
            if drop_until(&mut queue, retry_after).await.is_none() {
                return;
            }
            retry_after = (retry_after * 2).min(LAST_RETRY);
        }
    }

    /// Opens the stream. The second half of the pair ends when the stream is broken.
    async fn connect(
        &self,
    ) -> Result<(mpsc::Sender<PeerMessage>, tonic::Streaming<PeerMessage>), tonic::Status> {
        let unavailable = |error: tonic::transport::Error| tonic::Status::unavailable(error_chain(&error));
        let channel = self.dial.connect().await.map_err(unavailable)?;
        // One slot: what waits, waits in our own bounded queue.
        let (messages, receiver) = mpsc::channel(1);
        // The peer answers the headers at once, so that this returns before the first message.
        let mut client = RaftServiceClient::new(channel);
        let response = timeout(self.options.patience, client.append_entries(ReceiverStream::new(receiver)))
            .await
            .map_err(|_| tonic::Status::deadline_exceeded("the peer does not answer"))??;
        Ok((messages, response.into_inner()))
    }

    /// Moves messages from the queue to the stream until that breaks (Some) or the handle is gone (None).
    async fn forward(
        &self,
        queue: &mut mpsc::Receiver<Message>,
        messages: mpsc::Sender<PeerMessage>,
        mut broken: tonic::Streaming<PeerMessage>,
    ) -> Option<()> {
        loop {
            tokio::select! {
                message = queue.recv() => {
                    let mut wire = convert::to_wire(message?, self.options.envelope);
                    wire.shortage = self.options.shortage.borrow().as_deref().unwrap_or_default().to_owned();
                    if messages.send(wire).await.is_err() {
                        return Some(());
                    }
                }
                // The answering half carries nothing: whatever comes is its end.
                _ = broken.message() => return Some(()),
            }
        }
    }
}

/// While there is no connection, messages are lost. None when the handle is gone.
async fn drop_until(queue: &mut mpsc::Receiver<Message>, pause: Duration) -> Option<()> {
    let pause = tokio::time::sleep(pause);
    tokio::pin!(pause);
    loop {
        tokio::select! {
            message = queue.recv() => drop(message?),
            () = &mut pause => return Some(()),
        }
    }
}

fn error_chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}
