//! Snapshots on their way from one state machine to another, past two raftds.
//!
//! raftd relays them and keeps nothing: a part is taken only when the next hop
//! has room, so a transfer of any size takes a few parts of memory, and a
//! transfer that stalls is given up. What a snapshot contains, and whether it
//! is whole, is the state machines' business.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use prometheus::IntCounter;
use raft::{NodeId, Position};
use resqlite::api::{
    SnapshotChunk, SnapshotHeader, SnapshotPart, SnapshotPosition, SnapshotTask,
    raft_service_client::RaftServiceClient, snapshot_task::Task,
};
use tokio::{
    sync::{mpsc, oneshot},
    time::{sleep, timeout},
};
use tokio_stream::{StreamExt, wrappers::ReceiverStream};
use tonic::{Status, Streaming, transport::Channel};

use crate::metrics::Metrics;

/// How many parts of one transfer may wait for the next hop.
const PARTS_IN_FLIGHT: usize = 4;

/// A state machine that lets go of a snapshot it has received is either becoming it, and attaches soon, or has
/// refused it.
const ATTACH_PATIENCE: Duration = Duration::from_secs(10);

/// How many tasks may wait for the state machine: one for each peer is plenty.
const TASKS_IN_FLIGHT: usize = 16;

/// A transfer in which nothing moves for so long is given up.
const STALLED_AFTER: Duration = Duration::from_secs(120);

/// Before the first part a state machine copies its database to a file, and a large one takes its time. Whether it
/// is still at it is known by its listening for tasks; this is only the last resort.
const COPY_PATIENCE: Duration = Duration::from_secs(6 * 3_600);

/// Only the part that says so is a snapshot's end; an error, or a channel that closes before, is a transfer cut off.
type PartSender = mpsc::Sender<Result<SnapshotPart, Status>>;

/// The other end.
pub type PartReceiver = mpsc::Receiver<Result<SnapshotPart, Status>>;

/// A snapshot that comes from our own state machine.
struct Outgoing {
    parts: PartSender,
    /// Answers the state machine once the peer has it all.
    finished: oneshot::Receiver<Result<(), Status>>,
}

/// A snapshot that waits for our own state machine to take it.
struct Incoming {
    position: Position,
    parts: PartReceiver,
}

#[derive(Default)]
struct State {
    last_transfer_id: u64,
    watcher: Option<mpsc::Sender<SnapshotTask>>,
    outgoing: BTreeMap<u64, Outgoing>,
    incoming: BTreeMap<u64, Incoming>,
    /// What a state machine that attaches may have become.
    taken: Option<Position>,
}

/// The transfers of one node. Clones share them.
#[derive(Clone)]
pub struct Snapshots {
    state: Arc<Mutex<State>>,
    sent_bytes: IntCounter,
    received_bytes: IntCounter,
}

impl Snapshots {
    /// No transfers yet; `metrics` count what passes.
    pub fn new(metrics: &Metrics) -> Self {
        let bytes = |direction| metrics.snapshot_bytes.with_label_values(&[direction]);
        Self { state: Arc::default(), sent_bytes: bytes("sent"), received_bytes: bytes("received") }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing in here panics while it holds the lock half-way.
        self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// The state machine listens for tasks; a later listener replaces an earlier one.
    pub fn watch(&self) -> mpsc::Receiver<SnapshotTask> {
        let (sender, receiver) = mpsc::channel(TASKS_IN_FLIGHT);
        let mut state = self.lock();
        state.watcher = Some(sender);
        // What an earlier listener was asked for and has not begun, nobody will begin.
        state.outgoing.clear();
        state.incoming.clear();
        receiver
    }

    fn assign(state: &mut State, task: Task) -> Result<(), Status> {
        let listens =
            state.watcher.as_ref().is_some_and(|w| w.try_send(SnapshotTask { task: Some(task) }).is_ok());
        if listens {
            Ok(())
        } else {
            Err(Status::unavailable("the state machine takes no snapshot task now"))
        }
    }

    /// Asks our state machine for a snapshot and brings it to a peer. Returns the peer's index.
    pub async fn bring(&self, peer: NodeId, route: Route) -> Result<u64, Status> {
        let (parts, mut receiver) = mpsc::channel(PARTS_IN_FLIGHT);
        let (finish, finished) = oneshot::channel();
        let (transfer_id, listener) = {
            let mut state = self.lock();
            state.last_transfer_id += 1;
            let transfer_id = state.last_transfer_id;
            state.outgoing.insert(transfer_id, Outgoing { parts, finished });
            if let Err(status) = Self::assign(&mut state, Task::Send(transfer_id)) {
                state.outgoing.remove(&transfer_id);
                return Err(status);
            }
            (transfer_id, state.watcher.clone())
        };
        let listener = listener.expect("a task was assigned to it");
        let result = match first_part(&listener, &mut receiver).await {
            Ok(first) => deliver(peer, route, first, &mut receiver, &self.sent_bytes).await,
            Err(status) => Err(status),
        };
        drop(listener);
        // Unless the state machine has begun, nobody else would forget it.
        self.lock().outgoing.remove(&transfer_id);
        let _ = finish.send(result.clone().map(drop));
        result
    }

    /// Our state machine hands over the snapshot that [`Snapshots::bring`] asked for.
    pub async fn send(&self, mut stream: Streaming<SnapshotPart>) -> Result<(), Status> {
        let first = stalled(timeout(COPY_PATIENCE, stream.next()).await)?
            .transpose()?
            .ok_or_else(|| Status::invalid_argument("no part came"))?;
        let outgoing = self.lock().outgoing.remove(&first.transfer_id);
        let Outgoing { parts, finished } = outgoing
            .ok_or_else(|| Status::not_found(format!("nobody waits for snapshot {}", first.transfer_id)))?;
        let mut next = Some(Ok(first));
        while let Some(part) = next {
            let over = part.as_ref().map_or(true, |part| part.last);
            if parts.send(part).await.is_err() || over {
                break;
            }
            next = next_part(&mut stream).await.transpose();
        }
        drop(parts);
        finished.await.unwrap_or_else(|_| Err(Status::aborted("the transfer was given up")))
    }

    /// The leader sends a snapshot: offers it to our state machine and passes the parts on until all are taken.
    pub async fn offer(
        &self,
        position: Position,
        first: SnapshotChunk,
        mut chunks: Streaming<SnapshotChunk>,
    ) -> Result<Taken, Status> {
        let (sender, parts) = mpsc::channel(PARTS_IN_FLIGHT);
        let transfer_id = {
            let mut state = self.lock();
            state.last_transfer_id += 1;
            let transfer_id = state.last_transfer_id;
            Self::assign(&mut state, Task::Receive(transfer_id))?;
            // One at a time: the sender of an earlier one has given up, or it would not send again.
            state.incoming.clear();
            state.incoming.insert(transfer_id, Incoming { position, parts });
            transfer_id
        };
        let SnapshotChunk { data, last, .. } = first;
        let first = SnapshotPart { transfer_id, position: Some(position_to_wire(position)), data, last };
        match relay(first, &mut chunks, &sender, &self.received_bytes).await {
            // A small one may be all relayed before the state machine has come for it.
            Ok(()) => Ok(Taken { parts: sender }),
            Err(status) => {
                self.lock().incoming.remove(&transfer_id);
                let _ = sender.try_send(Err(status.clone()));
                Err(status)
            }
        }
    }

    /// Our state machine takes an offered snapshot.
    pub fn take(&self, transfer_id: u64) -> Result<PartReceiver, Status> {
        let mut state = self.lock();
        let incoming = state.incoming.remove(&transfer_id);
        let incoming = incoming.ok_or_else(|| Status::not_found("this snapshot is no longer on offer"))?;
        state.taken = Some(incoming.position);
        tracing::info!(index = incoming.position.index, "receiving a snapshot");
        Ok(incoming.parts)
    }
}

/// A snapshot of which our state machine has taken the last part.
pub struct Taken {
    parts: PartSender,
}

impl Taken {
    /// Returns once the state machine has let go of the snapshot and has had the time to attach with it.
    pub async fn given_up(&self) {
        self.parts.closed().await;
        sleep(ATTACH_PATIENCE).await;
    }
}

impl Snapshots {
    /// The last entry of the snapshot that our state machine took last.
    pub fn taken(&self) -> Option<Position> {
        self.lock().taken
    }
}

/// How a snapshot reaches a peer.
#[derive(Clone, Debug)]
pub struct Route {
    /// A connection of its own, so that appends do not wait behind it.
    pub channel: Channel,
    /// Stamped on it.
    pub cluster_id: u64,
    /// This node.
    pub from: NodeId,
}

fn given_up() -> Status {
    Status::aborted("the state machine gave the snapshot up")
}

/// The first part comes once the state machine has made its copy. It is waited for as long as that one listens.
async fn first_part(
    listener: &mpsc::Sender<SnapshotTask>,
    parts: &mut PartReceiver,
) -> Result<SnapshotPart, Status> {
    tokio::select! {
        biased;
        first = timeout(COPY_PATIENCE, parts.recv()) => stalled(first)?.ok_or_else(given_up)?,
        () = listener.closed() => Err(given_up()),
    }
}

async fn deliver(
    peer: NodeId,
    route: Route,
    first: SnapshotPart,
    parts: &mut PartReceiver,
    sent_bytes: &IntCounter,
) -> Result<u64, Status> {
    let position =
        first.position.ok_or_else(|| Status::invalid_argument("the first part has no position"))?;
    tracing::info!(peer, index = position.index, "sending a snapshot");
    let header =
        SnapshotHeader { cluster_id: route.cluster_id, from: route.from, to: peer, position: Some(position) };
    let (sender, chunks) = mpsc::channel(PARTS_IN_FLIGHT);
    let mut client = RaftServiceClient::new(route.channel);
    let feed = async {
        let mut chunk = SnapshotChunk { header: Some(header), data: first.data, last: first.last };
        loop {
            let (last, bytes) = (chunk.last, chunk.data.len() as u64);
            if sender.send(chunk).await.is_err() {
                break;
            }
            sent_bytes.inc_by(bytes);
            if last {
                break;
            }
            match parts.recv().await {
                Some(Ok(SnapshotPart { data, last, .. })) => {
                    chunk = SnapshotChunk { header: None, data, last }
                }
                Some(Err(status)) => return status,
                None => return given_up(),
            }
        }
        drop(sender);
        // All is sent; what became of it, the answer says.
        std::future::pending().await
    };
    tokio::select! {
        response = client.install_snapshot(ReceiverStream::new(chunks)) => Ok(response?.into_inner().index),
        // Dropping the call resets the stream, which the peer cannot take for the snapshot's end.
        status = feed => Err(status),
    }
}

/// Passes chunks on as parts until the last one is taken.
async fn relay(
    first: SnapshotPart,
    chunks: &mut Streaming<SnapshotChunk>,
    sender: &PartSender,
    received_bytes: &IntCounter,
) -> Result<(), Status> {
    let transfer_id = first.transfer_id;
    let mut part = first;
    loop {
        let last = part.last;
        received_bytes.inc_by(part.data.len() as u64);
        stalled(timeout(STALLED_AFTER, sender.send(Ok(part))).await)?
            .map_err(|_| Status::aborted("the state machine gave the snapshot up"))?;
        if last {
            return Ok(());
        }
        // A call that is cancelled looks like one that has ended.
        let chunk = stalled(timeout(STALLED_AFTER, chunks.message()).await)??;
        let SnapshotChunk { data, last, .. } =
            chunk.ok_or_else(|| Status::aborted("the snapshot was cut off"))?;
        part = SnapshotPart { transfer_id, position: None, data, last };
    }
}

async fn next_part(stream: &mut Streaming<SnapshotPart>) -> Result<Option<SnapshotPart>, Status> {
    stalled(timeout(STALLED_AFTER, stream.next()).await)?.transpose()
}

fn stalled<T>(result: Result<T, tokio::time::error::Elapsed>) -> Result<T, Status> {
    result.map_err(|_| Status::deadline_exceeded("the snapshot transfer stalled"))
}

/// A position as it goes on the wire.
pub fn position_to_wire(position: Position) -> SnapshotPosition {
    SnapshotPosition { index: position.index, term: position.term, timestamp_ms: position.timestamp_ms }
}

/// A position from the wire.
pub fn position_from_wire(position: SnapshotPosition) -> Position {
    Position { index: position.index, term: position.term, timestamp_ms: position.timestamp_ms }
}

#[cfg(test)]
mod tests {
    use tokio::time::{Instant, advance};
    use tonic::transport::Endpoint;

    use super::*;

    fn nowhere() -> Route {
        let channel = Endpoint::from_static("http://127.0.0.1:1").connect_lazy();
        Route { channel, cluster_id: 1, from: 1 }
    }

    #[tokio::test(start_paused = true)]
    async fn a_long_copy_is_no_stall_but_a_state_machine_that_is_gone_is() {
        let snapshots = Snapshots::new(&Metrics::new());
        let mut tasks = snapshots.watch();
        let bringing = snapshots.clone();
        let brought = tokio::spawn(async move { bringing.bring(2, nowhere()).await });
        assert!(matches!(tasks.recv().await.unwrap().task, Some(Task::Send(1))));
        advance(10 * STALLED_AFTER).await;
        tokio::task::yield_now().await;
        assert!(!brought.is_finished(), "it may be copying still");

        let gone_at = Instant::now();
        drop(tasks);
        assert_eq!(brought.await.unwrap().unwrap_err().message(), given_up().message());
        assert!(gone_at.elapsed() < STALLED_AFTER);
    }
}
