//! sqlited: executes the committed log on SQLite and answers clients.
//!
//! It owns one SQLite file. Data flows one way:
//!
//! ```text
//! client ─▶ service ─▶ write_path ─▶ raft_link ──▶ raftd
//!                                                    │ committed
//! client ◀─ service ◀─ waiters ◀─ pipeline (apply) ◀─┘
//!
//! client ─▶ service ─▶ consistency (barrier, applied index) ─▶ reads ─▶ client
//! ```
//!
//! The service side knows nothing of how an entry is executed; the execution
//! core knows nothing of clients, of Raft and of time. They meet in
//! [`pipeline`] (entries in, replies out) and [`reads`] (a connection).

pub mod accounts;
pub mod apply;
pub mod arguments;
pub mod auth;
pub mod backup;
pub mod calls;
pub mod classify;
pub mod connection;
pub mod consistency;
pub mod database;
pub mod deadline;
pub mod determinism;
pub mod errors;
mod execute;
pub mod expansion;
pub mod facts;
pub mod intake;
pub mod leadership;
pub mod limits;
mod local;
pub mod metrics;
pub mod page_sums;
pub mod pipeline;
pub mod raft_link;
pub mod reads;
pub mod recover;
pub mod reload;
pub mod restore;
pub mod run_request;
pub mod script;
pub mod service;
pub mod sessions;
pub mod snapshot;
pub mod soundness;
pub mod sql_kind;
pub mod sqlite_ffi;
pub mod status;
pub mod syntax;
pub mod transactions;
pub mod users;
pub mod value;
pub mod verify;
pub mod version;
pub mod versions;
pub mod waiters;
pub mod watched;
pub mod write_path;

use std::{
    convert::Infallible,
    fs, io,
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use resqlite::{
    api::{self, re_sqlite_server::ReSqliteServer},
    config::{Config, EXIT_CONFIG},
    daemon::{self, Reloads, Shutdown},
    directory_lock::DirectoryLock,
    disk::{self, Ballast, Watermark},
    monitoring::{self, Busy},
    tls::{Admission, ConnectionLimits, ConnectionMetrics, Incoming, Reloading, SqlTls, TlsError},
};
use tokio::{
    net::TcpListener,
    runtime,
    sync::watch,
    time::{sleep, timeout},
};
use tonic::{server::NamedService, transport::Server};
use tonic_health::pb::health_server::{Health, HealthServer};

use crate::{
    accounts::Accounts,
    apply::{Applier, ApplyError, ApplySettings},
    auth::{AuthLayer, Authenticator},
    backup::Backups,
    calls::CountCalls,
    consistency::ReadGate,
    database::DatabaseFile,
    facts::Facts,
    intake::Intake,
    leadership::Leadership,
    metrics::Metrics,
    pipeline::{Pipeline, PipelineError},
    raft_link::{DoesNotBelong, RaftLink, SnapshotExchange},
    reads::{Patience, Readers},
    restore::Uploads,
    run_request::Runner,
    service::{Service, ServiceParts},
    soundness::{Check, Damage, RunningMark},
    status::StatusSource,
    syntax::SyntaxCheck,
    transactions::Transactions,
    users::Directory,
    verify::{Mark, Upkeep, Verifications},
    waiters::Waiters,
    watched::Watched,
    write_path::{WritePath, WriteSettings},
};

/// The database's file in the data directory.
pub const DATABASE_FILE: &str = "resqlite.db";

/// Kept in reserve for a start on a full filesystem: room for the index of the largest write-ahead log, and to go on.
const BALLAST_BYTES: u64 = 4 << 20;

/// A client that is silent for so long is asked whether it is still there …
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
/// … and taken for dead after this.
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(5);
/// What the headers of a request may have; a token, or a name and its password, take the most of it.
const MAX_HEADER_BYTES: u32 = 16 << 10;

/// Why sqlited ended.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The data directory cannot be used.
    #[error("the data directory {path} cannot be used: {reason}")]
    DataDir {
        /// The directory.
        path: String,
        /// The operating system's words.
        reason: io::Error,
    },
    /// The database cannot be opened.
    #[error("the database cannot be opened: {0}")]
    Open(ApplyError),
    /// The database is not what was written.
    #[error(transparent)]
    Damaged(#[from] Damage),
    /// The database was written in another cluster.
    #[error(
        "the database belongs to cluster {database:016x}, the configuration describes {configured:016x}: \
         a cluster's name and member ids cannot change under its data; \
         to move data into another cluster, back it up, start with empty directories, and restore"
    )]
    OtherCluster {
        /// Recorded in the database.
        database: u64,
        /// Of the configuration.
        configured: u64,
    },
    /// Database and raftd have different histories.
    #[error(transparent)]
    DoesNotBelong(#[from] DoesNotBelong),
    /// Nothing can be applied any more.
    #[error(transparent)]
    Pipeline(#[from] PipelineError),
    /// Something that a thread or a connection needs is not to be had.
    #[error("cannot start: {0}")]
    Start(String),
    /// The certificates for the clients cannot be used.
    #[error("sqlited.tls: {0}")]
    Tls(#[from] TlsError),
    /// The listener failed.
    #[error("the listener failed: {0}")]
    Serve(#[from] tonic::transport::Error),
}

impl RunError {
    /// The process's exit status: 78 when only the operator can help, else 1.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::OtherCluster { .. } | Self::DoesNotBelong(_) | Self::Damaged(_) | Self::Tls(_) => {
                EXIT_CONFIG
            }
            _ => 1,
        }
    }
}

/// Where the daemon listens; bound by the caller, so that tests choose free ports.
#[derive(Debug)]
pub struct Listeners {
    /// For clients.
    pub sql: TcpListener,
    /// For those who watch, where somebody may.
    pub metrics: Option<TcpListener>,
}

/// Runs the daemon until `shutdown`, or until it must not go on. Needs a
/// runtime with timers; a current-thread one is the fastest.
pub async fn run(
    config: Config,
    listeners: Listeners,
    reloads: Reloads,
    shutdown: Shutdown,
) -> Result<(), RunError> {
    let Listeners { sql: listener, metrics: watchers } = listeners;
    let (metrics, applying) = (Metrics::new(), Busy::default());
    metrics.begin_series();
    let tls = config.sqlited.tls.clone().map(Reloading::<SqlTls>::load).transpose()?;
    let admission = admission(&config, &metrics);
    let incoming = match tls.clone() {
        None => Incoming::plain(listener, admission),
        Some(tls) => Incoming::tls(listener, admission, move || tls.current().server.clone()),
    };
    let database = prepare_data_dir(&config.sqlited.data_dir)?;
    let _lock = lock_data_dir(&config.sqlited.data_dir)?;
    let ballast = Ballast::in_dir(&config.sqlited.data_dir, BALLAST_BYTES);
    give_back_if_full(&ballast, &config.sqlited.data_dir)?;
    let finished = snapshot::finish(&database);
    if finished
        .map_err(|error| RunError::Start(format!("cannot finish the install of a snapshot: {error}")))?
    {
        tracing::info!("a snapshot that was received before has taken the database's place");
    }
    restore::remove_leftovers(&database)
        .map_err(|error| RunError::Start(format!("cannot remove what a restore has left behind: {error}")))?;
    let member_ids = config.cluster.members.iter().map(|member| member.id);
    let file = DatabaseFile::at(&database).map_err(|error| RunError::Start(error.to_string()))?;
    let verifications = Verifications::new(file.clone(), config.node_id, member_ids);
    let diverged = Mark::load(&database).map_err(|error| {
        RunError::Start(format!("cannot tell whether the content was found wrong: {error}"))
    })?;
    let running = RunningMark::set(&database);
    let (running, stopped_cleanly) = running
        .map_err(|error| RunError::Start(format!("cannot note that the database is in use: {error}")))?;
    let directory = Directory::new(config.cluster.require_auth);
    let applier = open(&file, &config, verifications.clone(), directory.clone())?;
    let facts = Facts::new(applier.position().applied_index);
    facts.publish_diverged(diverged);
    let readers =
        Readers::start(&file, config.sqlited.readers, Patience::default(), &runtime::Handle::current());
    let readers =
        Arc::new(readers.map_err(|error| RunError::Start(format!("no thread for a reader: {error}")))?);
    let pipeline = Pipeline::start(applier, metrics.of_pipeline(&applying));
    let mut pipeline = pipeline.map_err(|error| RunError::Start(format!("no thread to apply: {error}")))?;

    let waiters = Waiters::new(limits::MAX_WRITES_WAITING);
    let (link, keeper) = RaftLink::new(&config.raftd.socket, config.sqlited.max_request_bytes as usize);
    // Triggered once requests that are under way at a stop have had their grace.
    let abort = Shutdown::new();
    let election_timeout = Duration::from_millis(config.cluster.election_timeout_ms);
    let writes = WritePath::new(
        link.clone(),
        Arc::clone(&waiters),
        facts.clone(),
        write_settings(&config),
        abort.clone(),
        metrics.write.clone(),
    );
    let no_entropy = |error| RunError::Start(format!("no entropy: {error}"));
    let writes = Arc::new(writes.map_err(no_entropy)?);
    let runner = Runner {
        writes: Arc::clone(&writes),
        readers: Arc::clone(&readers),
        gate: ReadGate::new(
            link.clone(),
            facts.clone(),
            election_timeout,
            abort.clone(),
            metrics.read_wait.clone(),
        ),
        directory: directory.clone(),
    };
    let authenticator =
        Arc::new(Authenticator::new(directory.clone(), runner.gate.clone()).map_err(no_entropy)?);
    let accounts =
        Accounts { writes: Arc::clone(&runner.writes), directory, authenticator: Arc::clone(&authenticator) };
    let transactions = Arc::new(Transactions::new(
        config.node_id,
        Arc::clone(&readers),
        limits::TRANSACTION_MAX,
        limits::MAX_TRANSACTIONS,
    ));
    let users = snapshot::Users::new(readers.clone());
    let mut check = match stopped_cleanly {
        true => Check::needless(),
        false => Check::start(&file, facts.applied_index(), users.share().await)
            .map_err(|error| RunError::Start(format!("no thread for a check: {error}")))?,
    };
    if let Err(damage) = check.wait_a_little().await {
        keep_evidence(pipeline);
        return Err(damage.into());
    }
    let service = Service::new(ServiceParts {
        runner,
        transactions: Arc::clone(&transactions),
        accounts,
        verifications: verifications.clone(),
        uploads: Uploads::new(Arc::clone(&writes), database.clone()),
        backups: Backups::new(file.clone(), users.clone()),
        facts: facts.clone(),
        node_id: config.node_id,
        syntax: SyntaxCheck::new().map_err(|error| RunError::Start(error.to_string()))?,
        status: StatusSource::new(&config, tls.clone(), database.clone(), link.clone(), facts.clone()),
        leadership: Leadership::new(&config, link.clone()),
        max_result_bytes: config.sqlited.max_result_bytes as usize,
    });
    let upkeep = Upkeep {
        interval: Duration::from_secs(config.sqlited.verify_interval_seconds),
        database: database.clone(),
        node_id: config.node_id,
        verifications,
        facts: facts.clone(),
        readers: Arc::clone(&readers),
        users: users.clone(),
        link: link.clone(),
        writes,
    };
    let exchange = SnapshotExchange::new(
        file.clone(),
        config.cluster_id(),
        users,
        config.sqlited.snapshot_bytes_per_second,
        metrics.clone(),
    );
    let (serving, is_serving) = watch::channel(false);
    let ready_within = election_timeout * limits::LEADERLESS_ELECTION_TIMEOUTS;
    let watched = Watched {
        metrics: metrics.clone(),
        facts: facts.clone(),
        link: link.clone(),
        waiters: Arc::clone(&waiters),
        readers: Arc::clone(&readers),
        transactions: Arc::clone(&transactions),
        backlog: pipeline.backlog(),
        progress: pipeline.progress(),
        serving: is_serving.clone(),
        applying,
        database,
    };
    let (reporter, health) = tonic_health::server::health_reporter();
    let watermark = Watermark::new(&config.sqlited.data_dir, config.min_free_bytes);
    let local = local::Local::bind(&config.sqlited.data_dir, Arc::clone(&authenticator));

    let intake = Intake::new(config.sqlited.limits.clone(), largest_message(&config), metrics.clone());
    let layers = (CountCalls::new(metrics), intake, AuthLayer::new(authenticator));

    tracing::info!(
        node = config.node_id,
        cluster = config.cluster.name,
        applied_index = facts.applied_index(),
        "sqlited is up"
    );
    let result = tokio::select! {
        served = serve(&config, incoming, service.clone(), health, layers, shutdown.clone()) => served,
        served = local.serve(&config, service, shutdown.clone()) => served,
        () = limit_the_stop(&shutdown, &abort, &readers) => Ok(()),
        error = keeper.run(config.cluster_id(), pipeline.handle(), pipeline.progress(), exchange, facts.clone()) => Err(error.into()),
        never = disk::keep_watch(watermark, ballast, facts.room_publisher()) => match never {},
        error = pipeline.deliver(&waiters, &facts) => Err(error.into()),
        damage = check.damage() => Err(damage.into()),
        _ = file.sums().damaged() => Ok(()),
        never = transactions.expire() => match never {},
        never = upkeep.run() => match never {},
        never = keep_certificates(tls, reloads) => match never {},
        never = status::keep_health(reporter, link, config.node_id, facts.clone(), serving) => match never {},
        never = status::announce(is_serving.clone(), ready_within) => match never {},
        never = daemon::feed_watchdog() => match never {},
        never = monitoring::serve(watchers, watched) => match never {},
    };
    daemon::notify_stopping();
    abort.trigger();
    // Whatever else has failed: a page that is not what was written is the reason why.
    let result = match file.damage(Some(facts.applied_index())) {
        Some(damage) => Err(damage.into()),
        None => result,
    };
    if let Err(RunError::Damaged(_)) = result {
        keep_evidence(pipeline);
        return result;
    }
    let stopped = stop_threads(readers, pipeline).await;
    if stopped && result.is_ok() && check.is_done() {
        // Without it the next start checks the database, and that is all.
        let _ = running.clear();
    }
    tracing::info!("sqlited has stopped");
    result
}

/// Leaves the database open until the process ends: closing it would write to it.
fn keep_evidence(pipeline: Pipeline) {
    std::mem::forget(pipeline);
}

/// Makes the directory, readable to nobody else, and names the database in it.
fn prepare_data_dir(path: &Path) -> Result<PathBuf, RunError> {
    let unusable = |reason| RunError::DataDir { path: path.display().to_string(), reason };
    fs::DirBuilder::new().recursive(true).mode(0o750).create(path).map_err(unusable)?;
    Ok(path.join(DATABASE_FILE))
}

/// Keeps everybody else from the data directory, as long as the result lives.
fn lock_data_dir(path: &Path) -> Result<DirectoryLock, RunError> {
    let unusable = |reason| RunError::DataDir { path: path.display().to_string(), reason };
    let in_use = || io::Error::new(io::ErrorKind::WouldBlock, "another sqlited is using it");
    DirectoryLock::acquire(path).and_then(|locked| locked.ok_or_else(in_use)).map_err(unusable)
}

/// On a full filesystem not even the database could be opened: its index of the write-ahead log is a new file.
fn give_back_if_full(ballast: &Ballast, dir: &Path) -> Result<(), RunError> {
    let released = ballast.release_if_full();
    let released =
        released.map_err(|reason| RunError::DataDir { path: dir.display().to_string(), reason })?;
    if released {
        tracing::warn!(dir = %dir.display(), "the filesystem is full: the room kept in reserve was given back");
    }
    Ok(())
}

fn open(
    database: &DatabaseFile,
    config: &Config,
    verifications: Verifications,
    directory: Directory,
) -> Result<Applier, RunError> {
    let settings =
        ApplySettings { verifications: Some(verifications), directory, ..ApplySettings::default() };
    let applier = Applier::open_file(database, settings).map_err(|error| match error {
        ApplyError::Damaged(damage) => RunError::Damaged(damage),
        error => RunError::Open(error),
    })?;
    let (recorded, configured) = (applier.position().cluster_id, config.cluster_id());
    if recorded != 0 && recorded != configured {
        return Err(RunError::OtherCluster { database: recorded, configured });
    }
    Ok(applier)
}

fn write_settings(config: &Config) -> WriteSettings {
    WriteSettings {
        execution_version: version::execution_version(),
        format: apply::REQUEST_FORMAT,
        max_request_bytes: config.sqlited.max_request_bytes as usize,
        step_budget: config.sqlited.step_budget,
        result_limit_bytes: config.sqlited.max_result_bytes,
        election_timeout: Duration::from_millis(config.cluster.election_timeout_ms),
    }
}

/// The largest message that a client may send.
fn largest_message(config: &Config) -> usize {
    config.sqlited.max_request_bytes as usize + limits::MESSAGE_SLACK_BYTES
}

/// Seats for as many clients as may be, and as this process can have file descriptors for.
fn admission(config: &Config, metrics: &Metrics) -> Admission {
    let limits = &config.sqlited.limits;
    let descriptors = daemon::raise_descriptor_limit().saturating_sub(limits::DESCRIPTORS_RESERVED);
    let total = limits.connections.min(descriptors.max(1));
    if total < limits.connections {
        tracing::warn!(
            connections = total,
            "this process may not have the file descriptors for sqlited.limits.connections: raise its limit (LimitNOFILE)"
        );
    }
    let limits = ConnectionLimits {
        total: total as usize,
        per_address: limits.connections_per_address as usize,
        first_bytes: Duration::from_secs(limits.first_bytes_seconds),
        idle: Duration::from_secs(limits.idle_seconds),
    };
    let metrics = ConnectionMetrics { open: metrics.connections.clone(), refused: metrics.refused.clone() };
    Admission::new(limits, metrics)
}

/// Serves until `shutdown`, and then until the last request under way has ended.
async fn serve(
    config: &Config,
    incoming: Incoming,
    service: Service,
    health: HealthServer<impl Health>,
    (calls, intake, auth): (CountCalls, Intake, AuthLayer),
    shutdown: Shutdown,
) -> Result<(), RunError> {
    let reflection = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(api::DESCRIPTORS)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
            // The other services of our protos are not served here.
            .with_service_name(<ReSqliteServer<Service> as NamedService>::NAME)
            .with_service_name("grpc.health.v1.Health")
    };
    let unreflected = |error| RunError::Start(format!("no reflection: {error}"));
    Server::builder()
        .http2_keepalive_interval(Some(KEEPALIVE_INTERVAL))
        .http2_keepalive_timeout(Some(KEEPALIVE_TIMEOUT))
        .http2_max_header_list_size(Some(MAX_HEADER_BYTES))
        .max_concurrent_streams(Some(config.sqlited.limits.streams_per_connection))
        .layer(calls)
        .layer(intake)
        .layer(auth)
        .add_service(health)
        .add_service(reflection().build_v1().map_err(unreflected)?)
        .add_service(reflection().build_v1alpha().map_err(unreflected)?)
        .add_service(
            ReSqliteServer::new(service)
                .max_decoding_message_size(largest_message(config))
                // What may be sent is bounded where it is made.
                .max_encoding_message_size(usize::MAX),
        )
        .serve_with_incoming_shutdown(incoming, async move { shutdown.wait().await })
        .await?;
    Ok(())
}

async fn keep_certificates(tls: Option<Reloading<SqlTls>>, reloads: Reloads) -> Infallible {
    match tls {
        Some(tls) => tls.keep(reloads).await,
        None => std::future::pending().await,
    }
}

/// Returns when a stop has taken as long as it may.
async fn limit_the_stop(shutdown: &Shutdown, abort: &Shutdown, readers: &Readers) {
    shutdown.wait().await;
    daemon::notify_stopping();
    tracing::info!("stopping: requests under way may end");
    sleep(limits::STOP_GRACE).await;
    abort.trigger();
    readers.stop();
    // For the last words to be sent.
    sleep(limits::STOP_LAST_WORDS).await;
}

/// Lets the threads finish what they are at and close the database, for a bounded time; says whether they have.
async fn stop_threads(readers: Arc<Readers>, pipeline: Pipeline) -> bool {
    let stopped = tokio::task::spawn_blocking(move || {
        readers.stop();
        readers.join();
        pipeline.stop();
    });
    let stopped = timeout(limits::STOP_JOIN, stopped).await.is_ok();
    if !stopped {
        // Nothing is lost: the database is as after a crash, and the log has what it lacks.
        tracing::warn!("a thread is still at work; leaving all the same");
    }
    stopped
}
