//! raftd: consensus and the durable log, as a process.
//!
//! It replicates opaque payloads between the members of a cluster and hands
//! them, committed and durable, to the state machine on its Unix socket. It
//! never looks inside a payload and knows nothing of SQL.
//!
//! ```text
//! peers ──▶ peer_service ─┐                       ┌─▶ peer ──▶ peers
//!                         ├─▶ driver (raft::Node) ┤
//! socket ─▶ log_service ──┘         │   ▲         └─▶ log_service ─▶ socket
//!                                   ▼   │ durable
//!                              store (log writer thread, sled)
//! ```

pub mod arguments;
pub mod attach;
pub mod callers;
pub mod compaction;
pub mod convert;
pub mod driver;
pub mod log_service;
pub mod metrics;
pub mod peer;
pub mod peer_service;
pub mod proposals;
pub mod recover;
pub mod room;
pub mod snapshots;
pub mod store;

use std::{
    collections::BTreeMap,
    convert::Infallible,
    fmt::Display,
    sync::atomic::AtomicBool,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use resqlite::{
    api::{log_service_server::LogServiceServer, raft_service_server::RaftServiceServer},
    config::{Config, EXIT_CONFIG},
    daemon::{self, Reloads, Shutdown},
    disk::{self, Room, Watermark},
    monitoring::{self, Busy},
    tls::{
        Admission, ConnectionLimits, ConnectionMetrics, Dial, Incoming, PeerTls, Reloading, ServerName,
        TlsError, names::NodeName, peers::PeerSource,
    },
};
use tokio::{
    net::{TcpListener, UnixListener},
    sync::{mpsc, watch},
    time::sleep,
};
use tonic::transport::Server;

use crate::{
    callers::{Admitted, UnknownUser},
    compaction::Compaction,
    convert::Envelope,
    driver::{Driver, DriverError, DriverHandle, DriverParts, Input, Progress, Shortages, Timing},
    log_service::{LocalLogParts, LocalLogService},
    metrics::{Metrics, Watched},
    peer::{Peer, PeerOptions},
    peer_service::PeerService,
    room::{MembersRoom, Shortage},
    snapshots::Snapshots,
    store::{Store, StoreError, StoreOptions},
};

/// What one peer message may measure: an append of the largest entry, and then some.
const MESSAGE_SLACK_BYTES: usize = 2 << 20;

/// Where the daemon listens; bound by the caller, so that tests choose free ports.
#[derive(Debug)]
pub struct Listeners {
    /// For the peers.
    pub raft: TcpListener,
    /// For the state machine beside it.
    pub local: UnixListener,
    /// For those who watch, where somebody may.
    pub metrics: Option<TcpListener>,
}

/// Why raftd ended.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The log cannot be opened.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The log and the hard state do not make a node.
    #[error("this node cannot start: {0}")]
    Node(#[from] raft::NewError),
    /// The event loop failed.
    #[error(transparent)]
    Driver(#[from] DriverError),
    /// A member's address cannot be used.
    #[error("the raft address of member {id} cannot be used: {reason}")]
    Address {
        /// The member.
        id: u64,
        /// What is wrong.
        reason: String,
    },
    /// The certificates for the peers cannot be used.
    #[error("raftd.tls: {0}")]
    Tls(#[from] TlsError),
    /// Somebody is to be let in who does not exist.
    #[error("raftd.socket_users: {0}")]
    Users(#[from] UnknownUser),
    /// A listener failed.
    #[error("a listener failed: {0}")]
    Serve(#[from] tonic::transport::Error),
    /// The operating system gives no random numbers.
    #[error("no entropy: {0}")]
    Entropy(#[from] getrandom::Error),
}

impl RunError {
    /// The process's exit status: 78 when only the operator can help, else 1.
    pub fn exit_code(&self) -> u8 {
        // Whether the log is found damaged at the start or while the node runs.
        let store = match self {
            Self::Store(error) => Some(error),
            error => StoreError::among_the_causes(error),
        };
        match self {
            _ if store.is_some_and(StoreError::needs_operator) => EXIT_CONFIG,
            Self::Address { .. } | Self::Tls(_) | Self::Users(_) => EXIT_CONFIG,
            _ => 1,
        }
    }
}

/// Runs the daemon until `shutdown`, or until it must not go on.
pub async fn run(
    config: Config,
    mut listeners: Listeners,
    reloads: Reloads,
    shutdown: Shutdown,
) -> Result<(), RunError> {
    let tls = PeerSource::of(&config).map(Reloading::<PeerTls>::load).transpose()?;
    let cluster_id = config.cluster_id();
    let metrics = Metrics::new();
    let options = StoreOptions {
        data_dir: config.raftd.data_dir.clone(),
        cache_bytes: config.raftd.cache_bytes,
        cluster_id,
        node_id: config.node_id,
        incarnation: new_incarnation()?,
    };
    let mut store = Store::open_measured(options, metrics.fsync.clone())?;
    let writing = Busy::default();
    store.count_writes(metrics.of_writer(&writing));
    let reader = store.reader();
    let node = raft::Node::new(core_options(&config)?, store.hard_state(), Box::new(reader.clone()))?;
    let envelope = Envelope { cluster_id };

    let (driver, inputs) = DriverHandle::new();
    let (progress, progress_receiver) = watch::channel(Progress::default());
    let (durable_sender, durable) = mpsc::unbounded_channel();
    let writer = store.start_writer(Box::new(move |result| drop(durable_sender.send(result))))?;
    let snapshots = Snapshots::new(&metrics);
    let (own_shortage, shortage) = watch::channel(None);
    let (refusal, refused) = watch::channel(None);
    let peers = start_peers(&config, tls.as_ref(), envelope, &shortage, &driver)?;
    let parts = DriverParts {
        node,
        envelope,
        timing: timing(&config),
        inputs,
        durable,
        writer,
        reader: reader.clone(),
        peers,
        progress,
        snapshots: snapshots.clone(),
        compaction: Compaction::new(config.raftd.log_tail_entries, config.raftd.log_tail_bytes),
        room: MembersRoom::new(config.node_id, config.cluster.members.len()),
        shortages: Shortages { own: own_shortage, refusal },
        handle: driver.clone(),
        metrics: metrics.clone(),
    };
    let (room, room_seen) = watch::channel(Room::default());
    let watched = Watched::new(
        metrics.clone(),
        driver.clone(),
        reader.clone(),
        store.handle(),
        writing,
        room_seen.clone(),
    );
    let watchers = listeners.metrics.take();
    let local = LocalLogService::new(LocalLogParts {
        node_id: config.node_id,
        cluster_id,
        max_payload_bytes: max_payload_bytes(&config),
        driver: driver.clone(),
        progress: progress_receiver.clone(),
        refused,
        room: room_seen.clone(),
        reader,
        store: store.handle(),
        snapshots: snapshots.clone(),
        tls: tls.clone(),
        // The core gives a transfer up after one election timeout.
        transfer_patience: Duration::from_millis(2 * config.cluster.election_timeout_ms),
        shutdown: shutdown.clone(),
        attached: AtomicBool::new(false),
        metrics: metrics.clone(),
    });
    let room_driver = driver.clone();
    let peer_service = PeerService {
        node_id: config.node_id,
        cluster_id,
        driver,
        progress: progress_receiver.clone(),
        snapshots,
        metrics,
    };

    daemon::notify_ready();
    tracing::info!(node = config.node_id, cluster = config.cluster.name, "raftd is up");
    let result = tokio::select! {
        result = Driver::new(parts).run(shutdown.clone()) => result.map_err(RunError::from),
        result = serve(&config, listeners, tls.clone(), local, peer_service) => result,
        never = keep_certificates(tls, reloads) => match never {},
        never = daemon::feed_watchdog() => match never {},
        never = monitoring::serve(watchers, watched) => match never {},
        never = report_status(progress_receiver) => match never {},
        never = keep_room(&config, room) => match never {},
        never = tell_room(room_seen, room_driver) => match never {},
    };
    daemon::notify_stopping();
    result
}

/// Measures the room for the log, for ever.
async fn keep_room(config: &Config, room: watch::Sender<Room>) -> Infallible {
    let dir = &config.raftd.data_dir;
    disk::keep_watch(Watermark::new(dir, config.min_free_bytes), store::ballast(dir), room).await
}

/// Tells the event loop of it.
async fn tell_room(mut room: watch::Receiver<Room>, driver: DriverHandle) -> Infallible {
    let mut told = None;
    while room.changed().await.is_ok() {
        let shortage: Shortage = room.borrow_and_update().shortage.as_deref().map(Into::into);
        if shortage != told {
            told = shortage.clone();
            driver.send(Input::LogRoom(shortage)).await;
        }
    }
    std::future::pending().await
}

/// The incarnation of a data directory that is made now: the wall clock makes it the highest so far, and random bits make
/// it unlike any other even where the clock went backward.
pub(crate) fn new_incarnation() -> Result<u64, getrandom::Error> {
    let now_ms = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64);
    Ok((now_ms << INCARNATION_RANDOM_BITS) | (getrandom::u64()? >> (64 - INCARNATION_RANDOM_BITS)))
}

const INCARNATION_RANDOM_BITS: u32 = 20;

fn core_options(config: &Config) -> Result<raft::Options, RunError> {
    let ids = config.cluster.members.iter().map(|member| member.id);
    let mut options = raft::Options::new(config.node_id, ids, getrandom::u64()?);
    options.heartbeat_ticks = TICKS_PER_HEARTBEAT;
    let ticks = config.cluster.election_timeout_ms * u64::from(TICKS_PER_HEARTBEAT)
        / config.cluster.heartbeat_interval_ms;
    options.election_ticks = u32::try_from(ticks).unwrap_or(u32::MAX);
    Ok(options)
}

/// Finer ticks than heartbeats spread the election timeouts of the followers.
const TICKS_PER_HEARTBEAT: u32 = 2;

fn timing(config: &Config) -> Timing {
    Timing {
        tick: Duration::from_millis(config.cluster.heartbeat_interval_ms) / TICKS_PER_HEARTBEAT,
        handover_patience: Duration::from_millis(config.cluster.election_timeout_ms)
            .min(Duration::from_secs(3)),
    }
}

/// The largest payload: a full request of sqlited and its envelope.
fn max_payload_bytes(config: &Config) -> usize {
    usize::try_from(config.sqlited.max_request_bytes).unwrap_or(usize::MAX).saturating_add(64 << 10)
}

fn start_peers(
    config: &Config,
    tls: Option<&Reloading<PeerTls>>,
    envelope: Envelope,
    shortage: &watch::Receiver<Shortage>,
    driver: &DriverHandle,
) -> Result<BTreeMap<u64, Peer>, RunError> {
    let patience = Duration::from_millis(config.cluster.election_timeout_ms);
    let others = config.cluster.members.iter().filter(|member| member.id != config.node_id);
    let start = |member: &resqlite::config::Member| {
        let unusable = |error: &dyn Display| RunError::Address { id: member.id, reason: error.to_string() };
        let dial = match tls.cloned() {
            None => Dial::plain(member.raft.clone()),
            Some(tls) => {
                let name = NodeName { cluster: config.cluster.name.clone(), id: member.id }.dns_name();
                let name = ServerName::try_from(name).map_err(|error| unusable(&error))?;
                Dial::tls(member.raft.clone(), name, move || tls.current().client.clone())
            }
        };
        let dial = dial.map_err(|error| unusable(&error))?;
        let options = PeerOptions { node_id: config.node_id, envelope, patience, shortage: shortage.clone() };
        Ok((member.id, Peer::start(member.id, dial, options, driver.clone())))
    };
    others.map(start).collect()
}

/// A peer has a connection or two; the rest is room for those who try, and give way to the next.
const PEER_CONNECTIONS: ConnectionLimits = ConnectionLimits {
    total: 512,
    per_address: 128,
    first_bytes: Duration::from_secs(10),
    // A follower that is called by nobody but at elections may keep its connection.
    idle: Duration::from_secs(3_600),
};

async fn serve(
    config: &Config,
    listeners: Listeners,
    tls: Option<Reloading<PeerTls>>,
    local: LocalLogService,
    peer_service: PeerService,
) -> Result<(), RunError> {
    let message_bytes = max_payload_bytes(config) + MESSAGE_SLACK_BYTES;
    let keep_alive = Duration::from_millis(config.cluster.election_timeout_ms);
    daemon::raise_descriptor_limit();
    let metrics = &peer_service.metrics;
    let metrics = ConnectionMetrics { open: metrics.connections.clone(), refused: metrics.refused.clone() };
    let admission = Admission::new(PEER_CONNECTIONS, metrics);
    let incoming = match tls {
        None => Incoming::plain(listeners.raft, admission),
        Some(tls) => Incoming::tls(listeners.raft, admission, move || tls.current().server.clone()),
    };
    let peers = Server::builder()
        .http2_keepalive_interval(Some(keep_alive))
        .http2_keepalive_timeout(Some(keep_alive))
        .initial_stream_window_size(8 << 20)
        .initial_connection_window_size(16 << 20)
        .add_service(RaftServiceServer::new(peer_service).max_decoding_message_size(message_bytes))
        .serve_with_incoming(incoming);
    let admitted = Admitted::new(&config.raftd.socket_users)?;
    let local = Server::builder()
        .initial_stream_window_size(8 << 20)
        .initial_connection_window_size(16 << 20)
        .add_service(LogServiceServer::new(local).max_decoding_message_size(message_bytes))
        .serve_with_incoming(callers::admitted(listeners.local, admitted));
    tokio::try_join!(peers, local)?;
    Ok(())
}

/// Keeps the certificates current, or says that there is nothing to reload.
async fn keep_certificates(tls: Option<Reloading<PeerTls>>, mut reloads: Reloads) -> Infallible {
    if let Some(tls) = tls {
        return tls.keep(reloads).await;
    }
    while reloads.changed().await.is_ok() {
        tracing::info!("nothing in raftd's configuration can be reloaded; restart it to apply changes");
    }
    std::future::pending().await
}

/// How often the line changes at most.
const STATUS_INTERVAL: Duration = Duration::from_secs(1);

/// Keeps the line that `systemctl status` shows.
async fn report_status(mut progress: watch::Receiver<Progress>) -> Infallible {
    let mut shown = String::new();
    loop {
        let line = {
            let now = progress.borrow_and_update();
            let leader = now.leader.map_or("none".into(), |leader| leader.to_string());
            // What is committed and not yet durable here.
            let lag = now.commit_index.saturating_sub(now.deliverable_index);
            match now.standing {
                raft::Standing::New | raft::Standing::Founder => {
                    "first start: waits until every member is there".to_owned()
                }
                raft::Standing::Learner => {
                    format!("Learner, term {}, leader {leader}, lag {lag} entries", now.term)
                }
                raft::Standing::Voter => {
                    format!("{:?}, term {}, leader {leader}, lag {lag} entries", now.role, now.term)
                }
            }
        };
        if line != shown {
            daemon::notify_status(&line);
            shown = line;
            // Under load the lag is another one with every commit; nobody reads that fast.
            sleep(STATUS_INTERVAL).await;
        }
        if progress.changed().await.is_err() {
            return std::future::pending().await;
        }
    }
}

#[cfg(test)]
mod tests {
    use raft::LogError;

    use super::*;

    #[test]
    fn a_damaged_log_is_the_operators_business_wherever_it_is_found() {
        let damaged = || StoreError::Damaged { file: "log".into(), index: Some(7), reason: "rotten".into() };
        let read = || LogError::new(store::ReadError::Store(damaged()));
        for error in [
            RunError::Store(damaged()),
            RunError::Driver(DriverError::Store(damaged())),
            RunError::Driver(DriverError::Log(read())),
            RunError::Driver(DriverError::Log(LogError::new(damaged()))),
            RunError::Node(raft::NewError::Log(read())),
        ] {
            assert_eq!(error.exit_code(), EXIT_CONFIG, "{error:?}");
            let said = error.to_string();
            assert!(said.contains("log: damaged at index 7") && said.contains("node replace"), "{said}");
        }
        let full = || StoreError::Io {
            path: "log".into(),
            action: "write",
            source: std::io::ErrorKind::StorageFull.into(),
        };
        assert_eq!(RunError::Driver(DriverError::Store(full())).exit_code(), 1, "it may pass");
        assert_eq!(RunError::Store(full()).exit_code(), 1);
    }
}
