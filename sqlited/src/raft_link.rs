//! The link to the raftd beside this daemon, on its Unix socket.
//!
//! raftd may be restarted alone at any moment, so the link reconnects for ever
//! and everybody who asks through it waits meanwhile, up to their own deadlines.
//! Its streams live and die together: proposals, the followed log, read barriers,
//! and snapshots. The link knows nothing of SQL and never looks into an entry.

mod barrier;
mod follow;
mod propose;
mod snapshots;

use std::{path::Path, sync::Arc, time::Duration};

use resqlite::api::log_service_client::LogServiceClient;
use tokio::{
    sync::{Mutex, mpsc, oneshot, watch},
    time::{Instant, sleep},
};
use tonic::{
    Code, Status,
    transport::{Channel, Endpoint},
};

pub use propose::Outcome;
pub use snapshots::SnapshotExchange;

use crate::{facts::Facts, limits, pipeline};

/// The first pause before connecting again; doubled up to [`MAX_BACKOFF`].
const MIN_BACKOFF: Duration = Duration::from_millis(20);
/// A raftd that comes back is found after this long at the latest.
const MAX_BACKOFF: Duration = Duration::from_millis(500);
/// A socket that accepts and then says nothing is given up after this long.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// What the link knows of raftd and of the cluster at this moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LinkState {
    /// Whether raftd follows up what we ask: the streams are there.
    pub connected: bool,
    /// 0 while no leader is known.
    pub leader_id: u64,
    /// raftd's current term.
    pub term: u64,
    /// The highest index that raftd has told us is committed.
    pub commit_index: u64,
    /// Why raftd refuses proposals for want of room; empty while it takes them.
    pub writes_refused: String,
}

impl LinkState {
    /// Whether a proposal has somewhere to go.
    pub fn has_leader(&self) -> bool {
        self.connected && self.leader_id != 0
    }
}

/// The link cannot be of use: this database and that raftd do not belong together.
#[derive(Debug, thiserror::Error)]
#[error("this database and its raftd do not belong together: {0}")]
pub struct DoesNotBelong(pub String);

/// How the rest of the daemon asks raftd for something. Cheap to clone.
#[derive(Clone, Debug)]
pub struct RaftLink {
    proposals: mpsc::Sender<propose::Proposal>,
    barriers: mpsc::Sender<oneshot::Sender<Option<u64>>>,
    state: watch::Sender<LinkState>,
    channel: Arc<std::sync::Mutex<Option<Channel>>>,
}

impl RaftLink {
    /// A link and the task that keeps it; it does nothing until that runs.
    pub fn new(socket: &Path, max_entry_bytes: usize) -> (Self, LinkKeeper) {
        let (proposals, proposals_asked) = mpsc::channel(limits::MAX_WRITES_WAITING);
        let (barriers, barriers_asked) = mpsc::channel(limits::MAX_BARRIERS_WAITING);
        let link = Self {
            proposals,
            barriers,
            state: watch::Sender::new(LinkState::default()),
            channel: Arc::default(),
        };
        let keeper = LinkKeeper {
            endpoint: format!("unix://{}", socket.display()),
            max_message_bytes: max_entry_bytes + limits::APPLY_GROUP_BYTES + limits::MESSAGE_SLACK_BYTES,
            link: link.clone(),
            proposals: Mutex::new(proposals_asked),
            barriers: Mutex::new(barriers_asked),
        };
        (link, keeper)
    }

    /// What is known now, and news of it.
    pub fn state(&self) -> watch::Receiver<LinkState> {
        self.state.subscribe()
    }

    /// The connection, for single calls such as `LogStatus`.
    pub fn client(&self) -> Option<LogServiceClient<Channel>> {
        let channel = self.channel.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        channel.clone().map(LogServiceClient::new)
    }

    /// Proposes a payload and returns what came of it. Once it is asked for, an
    /// answer that is not awaited, or none at all, means that the outcome is unknown.
    pub async fn propose(&self, payload: bytes::Bytes) -> Outcome {
        let (answer, outcome) = oneshot::channel();
        match self.proposals.try_send(propose::Proposal { payload, answer }) {
            Ok(()) => outcome.await.unwrap_or(Outcome::Unknown),
            Err(_) => Outcome::Overloaded,
        }
    }

    /// An index that was committed when a quorum confirmed the leader, after
    /// this call: what a linearizable read must have applied. None: no leader confirmed.
    pub async fn read_barrier(&self) -> Option<u64> {
        let (answer, index) = oneshot::channel();
        self.barriers.try_send(answer).ok()?;
        index.await.ok().flatten()
    }
}

/// Why one life of the connection ended.
enum SessionEnd {
    DoesNotBelong(String),
    Lost(String),
    /// A snapshot is to replace the database, and then the log is to be followed from there.
    Received(Box<snapshots::Received>),
}

impl From<Status> for SessionEnd {
    fn from(status: Status) -> Self {
        Self::Lost(format!("{}: {}", status.code(), status.message()))
    }
}

fn closed_by_raftd() -> SessionEnd {
    SessionEnd::Lost("raftd closed the stream".to_owned())
}

/// Keeps the link connected.
#[derive(Debug)]
pub struct LinkKeeper {
    endpoint: String,
    max_message_bytes: usize,
    link: RaftLink,
    // Each is taken by one stream at a time; the locks are never contended.
    proposals: Mutex<mpsc::Receiver<propose::Proposal>>,
    barriers: Mutex<mpsc::Receiver<oneshot::Sender<Option<u64>>>>,
}

impl LinkKeeper {
    /// Connects, and connects again, for ever. `cluster_id` is what the
    /// configuration says; `pipeline` takes the followed entries; a node whose `facts` say that it
    /// has diverged leaves leading, and the sending of snapshots, to others.
    pub async fn run(
        self,
        cluster_id: u64,
        pipeline: pipeline::Handle,
        progress: watch::Receiver<pipeline::Progress>,
        exchange: SnapshotExchange,
        facts: Facts,
    ) -> DoesNotBelong {
        let mut backoff = MIN_BACKOFF;
        let mut last_reason = String::new();
        loop {
            let began = Instant::now();
            let end = self.session(cluster_id, &pipeline, progress.clone(), &exchange, &facts).await;
            let was_connected = self.link.state.send_replace(LinkState::default()).connected;
            *self.link.channel.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = None;
            match end {
                SessionEnd::DoesNotBelong(why) => return DoesNotBelong(why),
                // Said once, and not at every attempt.
                SessionEnd::Lost(why) if was_connected || why != last_reason => {
                    tracing::warn!(endpoint = self.endpoint, reason = why, "no link to raftd; trying again");
                    last_reason = why;
                }
                SessionEnd::Lost(_) => {}
                SessionEnd::Received(received) => {
                    received.replace_database(&pipeline, &exchange).await;
                    continue;
                }
            }
            // Only a life that lasted earns a quick return: one that ends at once, again and again, must not spin.
            let lasted = was_connected && began.elapsed() > MAX_BACKOFF;
            backoff = if lasted { MIN_BACKOFF } else { (backoff * 2).min(MAX_BACKOFF) };
            sleep(backoff).await;
        }
    }

    async fn session(
        &self,
        cluster_id: u64,
        pipeline: &pipeline::Handle,
        progress: watch::Receiver<pipeline::Progress>,
        exchange: &SnapshotExchange,
        facts: &Facts,
    ) -> SessionEnd {
        let endpoint = match Endpoint::from_shared(self.endpoint.clone()) {
            Ok(endpoint) => endpoint.connect_timeout(CONNECT_TIMEOUT),
            Err(error) => return SessionEnd::Lost(format!("{} is no socket's path: {error}", self.endpoint)),
        };
        let channel = match endpoint.connect().await {
            Ok(channel) => channel,
            Err(error) => return SessionEnd::Lost(with_causes(&error)),
        };
        let client = LogServiceClient::new(channel.clone()).max_decoding_message_size(self.max_message_bytes);
        *self.link.channel.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = Some(channel);

        let mut proposals = self.proposals.lock().await;
        let mut barriers = self.barriers.lock().await;
        // Dropping them together is what makes every unanswered proposal's outcome unknown.
        tokio::select! {
            end = follow::follow(client.clone(), cluster_id, pipeline, progress, facts, &self.link.state) => end,
            end = propose::forward(client.clone(), &mut proposals) => end,
            end = barrier::forward(client.clone(), &mut barriers) => end,
            end = snapshots::exchange(client, exchange, facts) => end,
        }
    }
}

/// tonic says only "transport error"; what happened is in the causes.
fn with_causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}

/// Whether a status says that the two do not belong together, rather than that something broke.
fn refuses_for_good(status: &Status) -> bool {
    status.code() == Code::FailedPrecondition
}
