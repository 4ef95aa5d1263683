//! Read barriers: all reads that wait share one.
//!
//! A read may only use a barrier that was asked for after the read began, so a
//! read that comes while one is under way waits for the next: at most one is
//! under way, and one more gathers.

use resqlite::api::{ReadBarrierRequest, log_service_client::LogServiceClient};
use tokio::sync::{mpsc, oneshot};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;

use super::{SessionEnd, closed_by_raftd};

/// Forwards barriers until the stream breaks; those who wait then see their sender dropped.
pub(super) async fn forward(
    mut client: LogServiceClient<Channel>,
    asked: &mut mpsc::Receiver<oneshot::Sender<Option<u64>>>,
) -> SessionEnd {
    let (requests, outgoing) = mpsc::channel(1);
    let mut answers = match client.read_barrier(ReceiverStream::new(outgoing)).await {
        Ok(response) => response.into_inner(),
        Err(status) => return status.into(),
    };
    for id in 1.. {
        let mut sharing = tokio::select! {
            first = asked.recv() => match first {
                Some(first) => vec![first],
                None => return closed_by_raftd(),
            },
            // Nothing was asked, so this is the stream's end.
            message = answers.message() => return message.map_or_else(SessionEnd::from, |_| closed_by_raftd()),
        };
        while let Ok(more) = asked.try_recv() {
            sharing.push(more);
        }
        sharing.retain(|answer| !answer.is_closed());
        if sharing.is_empty() {
            continue;
        }
        if requests.send(ReadBarrierRequest { id }).await.is_err() {
            return closed_by_raftd();
        }
        let read_index = loop {
            match answers.message().await {
                Ok(Some(answer)) if answer.id == id => break answer.read_index,
                Ok(Some(_)) => {}
                Ok(None) => return closed_by_raftd(),
                Err(status) => return status.into(),
            }
        };
        for answer in sharing {
            let _ = answer.send(read_index);
        }
    }
    closed_by_raftd()
}
