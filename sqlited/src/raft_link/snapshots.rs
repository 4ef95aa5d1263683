//! Snapshots on their way through raftd: it says when one is to be sent or taken, and passes the parts on.
//!
//! Files are read and written on threads of their own, a few parts ahead of the stream at most. It knows nothing
//! of what a part contains.

use std::{
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use bytes::Bytes;
use resqlite::api::{
    ReceiveSnapshotRequest, SnapshotPart, SnapshotPosition, WatchSnapshotsRequest,
    log_service_client::LogServiceClient, snapshot_task::Task,
};
use tokio::{
    sync::{Mutex, mpsc},
    task::{JoinSet, spawn_blocking},
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status, Streaming, transport::Channel};

use super::{SessionEnd, closed_by_raftd};
use crate::{
    apply::Position,
    database::DatabaseFile,
    facts::Facts,
    metrics::Metrics,
    pipeline,
    snapshot::{self, Announced, Incoming, PartReader, Users},
};

/// How many parts may wait between a file and the stream.
const PARTS_WAITING: usize = 4;

/// What sending and taking snapshots needs to know of this node. Clones share it.
#[derive(Clone, Debug)]
pub struct SnapshotExchange {
    database: DatabaseFile,
    cluster_id: u64,
    users: Users,
    bytes_per_second: u64,
    /// Held by whoever writes the incoming file. A thread may outlive the session that it worked for.
    incoming_file: Arc<Mutex<()>>,
    metrics: Metrics,
}

impl SnapshotExchange {
    /// For the database of this cluster; `bytes_per_second` bounds the sending of one snapshot.
    pub fn new(
        database: DatabaseFile,
        cluster_id: u64,
        users: Users,
        bytes_per_second: u64,
        metrics: Metrics,
    ) -> Self {
        Self { database, cluster_id, users, bytes_per_second, incoming_file: Arc::default(), metrics }
    }
}

/// A snapshot that is to replace the database.
pub(super) struct Received {
    incoming: Incoming,
    /// While it is open, raftd knows that somebody is at work on the snapshot.
    stream: Streaming<SnapshotPart>,
}

impl Received {
    /// Replaces the database, or says in the log why not.
    pub(super) async fn replace_database(self, pipeline: &pipeline::Handle, exchange: &SnapshotExchange) {
        let index = self.incoming.position().applied_index;
        let exclusive = exchange.users.exclude().await;
        let replaced = pipeline.replace(self.incoming, exclusive).await;
        exchange.metrics.snapshot("received", matches!(replaced, Some(Ok(()))));
        match replaced {
            Some(Ok(())) => tracing::info!(index, "the database was replaced by a snapshot"),
            Some(Err(reason)) => tracing::warn!(index, reason, "a snapshot was not installed"),
            // Its end ends the daemon.
            None => std::future::pending().await,
        }
        drop(self.stream);
    }
}

/// Does what raftd asks for until the stream breaks or a snapshot was received.
pub(super) async fn exchange(
    mut client: LogServiceClient<Channel>,
    exchange: &SnapshotExchange,
    facts: &Facts,
) -> SessionEnd {
    let mut tasks = match client.watch_snapshots(WatchSnapshotsRequest {}).await {
        Ok(response) => response.into_inner(),
        // A log that keeps everything needs no snapshots.
        Err(status) if status.code() == Code::Unimplemented => return std::future::pending().await,
        Err(status) => return status.into(),
    };
    let mut sending = JoinSet::new();
    // One at a time: who offers another one has given the first one up.
    let mut receiving = JoinSet::new();
    loop {
        tokio::select! {
            task = tasks.message() => match task {
                Ok(Some(task)) => match task.task {
                    Some(Task::Send(id)) => drop(sending.spawn(send(client.clone(), exchange.clone(), id, facts.diverged()))),
                    Some(Task::Receive(id)) => {
                        receiving.abort_all();
                        receiving.spawn(receive(client.clone(), exchange.clone(), id));
                    }
                    None => {}
                },
                Ok(None) => return closed_by_raftd(),
                Err(status) => return status.into(),
            },
            Some(sent) = sending.join_next() => {
                exchange.metrics.snapshot("sent", matches!(sent, Ok(Ok(()))));
                if let Ok(Err(reason)) = sent {
                    tracing::warn!(reason, "a snapshot could not be sent");
                }
            }
            Some(received) = receiving.join_next() => match received {
                Ok(Ok(received)) => return SessionEnd::Received(Box::new(received)),
                Ok(Err(reason)) => {
                    exchange.metrics.snapshot("received", false);
                    tracing::warn!(reason, "a snapshot could not be received");
                }
                // Given up for another one.
                Err(_) => {}
            },
        }
    }
}

async fn send(
    mut client: LogServiceClient<Channel>,
    exchange: SnapshotExchange,
    transfer_id: u64,
    diverged: Option<String>,
) -> Result<(), String> {
    let began = Instant::now();
    let connection_right = exchange.users.share().await;
    let (parts, outgoing) = mpsc::channel(PARTS_WAITING);
    let copied = spawn_blocking(move || {
        if let Some(why) = diverged {
            return Err(format!("this node is no source of snapshots: {why}"));
        }
        let to = snapshot::outgoing(exchange.database.path(), transfer_id);
        let copy = snapshot::copy(&exchange.database, &to, || !parts.is_closed());
        drop(connection_right);
        match copy {
            Ok(copy) => {
                let (index, bytes) = (copy.position.applied_index, copy.size_bytes);
                tracing::info!(
                    index,
                    bytes,
                    copied_ms = began.elapsed().as_millis() as u64,
                    "sending a snapshot"
                );
                feed(copy, transfer_id, exchange.bytes_per_second, &parts)
            }
            Err(error) => Err(error.to_string()),
        }
    });
    let sent = client.send_snapshot(ReceiverStream::new(outgoing)).await;
    // Our own reason is the better one; it made the call fail.
    copied.await.map_err(|_| "the copying thread panicked".to_owned())??;
    sent.map_err(|status| status.message().to_owned())?;
    tracing::info!(seconds = began.elapsed().as_secs_f32(), "a snapshot was sent");
    Ok(())
}

/// Hands out the parts, no faster than is allowed. Blocks.
fn feed(
    copy: snapshot::DatabaseCopy,
    transfer_id: u64,
    bytes_per_second: u64,
    parts: &mpsc::Sender<SnapshotPart>,
) -> Result<(), String> {
    let began = Instant::now();
    let mut reader = PartReader::new(copy.file, copy.size_bytes);
    let mut sent_bytes = 0;
    let mut position = Some(to_wire(copy.position));
    loop {
        let (data, last) = reader.read().map_err(|error| format!("cannot read the copy: {error}"))?;
        sent_bytes += data.len() as u64;
        let part = SnapshotPart { transfer_id, position: position.take(), data, last };
        // Whoever stops listening says why in the answer to the call.
        if parts.blocking_send(part).is_err() || last {
            return Ok(());
        }
        let due = Duration::from_secs_f64(sent_bytes as f64 / bytes_per_second as f64);
        thread::sleep(due.saturating_sub(began.elapsed()));
    }
}

async fn receive(
    mut client: LogServiceClient<Channel>,
    exchange: SnapshotExchange,
    transfer_id: u64,
) -> Result<Received, String> {
    let file_right = Arc::clone(&exchange.incoming_file).lock_owned().await;
    let said = |status: Status| status.message().to_owned();
    let request = ReceiveSnapshotRequest { transfer_id };
    let mut stream = client.receive_snapshot(request).await.map_err(said)?.into_inner();
    let first = stream.message().await.map_err(said)?.ok_or("no part came")?;
    let announced = from_wire(exchange.cluster_id, first.position.ok_or("the first part has no position")?);
    tracing::info!(index = announced.index, "receiving a snapshot");

    let (parts, mut incoming) = mpsc::channel::<Bytes>(PARTS_WAITING);
    let written = spawn_blocking(move || {
        let received = snapshot::receive(exchange.database.path(), announced, || incoming.blocking_recv());
        drop(file_right);
        received
    });
    let mut part = first;
    let cut_off = loop {
        // The thread stops taking parts when it refuses one; it says why.
        if parts.send(part.data).await.is_err() || part.last {
            break None;
        }
        match stream.message().await {
            Ok(Some(next)) => part = next,
            Ok(None) => break Some("the stream ended before the last part".to_owned()),
            Err(status) => break Some(said(status)),
        }
    };
    drop(parts);
    let received = written.await.map_err(|_| "the receiving thread panicked".to_owned())?;
    match (received, cut_off) {
        (Ok(incoming), _) => Ok(Received { incoming, stream }),
        (Err(_), Some(reason)) => Err(reason),
        (Err(error), None) => Err(error.to_string()),
    }
}

fn to_wire(position: Position) -> SnapshotPosition {
    let Position { applied_index, applied_term, applied_timestamp_ms, .. } = position;
    SnapshotPosition { index: applied_index, term: applied_term, timestamp_ms: applied_timestamp_ms }
}

fn from_wire(cluster_id: u64, position: SnapshotPosition) -> Announced {
    let SnapshotPosition { index, term, timestamp_ms } = position;
    Announced { cluster_id, index, term, timestamp_ms }
}
