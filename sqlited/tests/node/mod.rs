//! A real sqlited in this process, and beside it an in-memory log that speaks raftd's socket protocol:
//! a second, single-node implementation of `LogService` that can be told to refuse, to forget, to hold back and to die.

#![allow(dead_code, reason = "each test binary uses its own part")]

use std::{
    collections::VecDeque,
    path::{Path, PathBuf},
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard},
    thread,
    time::Duration,
};

use bytes::Bytes;
use resqlite::{
    api::{
        FollowRequest, FollowResponse, LogEntry, LogEntryKind, LogStatusRequest, LogStatusResponse,
        ProposalOutcome, ProposalRefusal, ProposalUnknown, ProposeRequest, ProposeResponse, RaftRole,
        ReadBarrierRequest, ReadBarrierResponse, ReceiveSnapshotRequest, SendSnapshotResponse, SnapshotPart,
        SnapshotTask, TransferLeadershipRequest, TransferLeadershipResponse, WatchSnapshotsRequest,
        follow_request,
        log_service_server::{LogService, LogServiceServer},
        proposal_outcome::Outcome,
        re_sqlite_client::ReSqliteClient,
    },
    config::Config,
    daemon::{Shutdown, no_reloads},
};
use sqlited::{Listeners, RunError};
use tempfile::TempDir;
use tokio::{
    net::{TcpListener, UnixListener},
    sync::{mpsc, watch},
    task::JoinHandle,
    time::timeout,
};
use tokio_stream::{
    Stream,
    wrappers::{ReceiverStream, UnixListenerStream},
};
use tonic::{
    Request, Response, Status, Streaming,
    transport::{Channel, Endpoint, Server},
};
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};

/// Nothing here takes so long unless it is broken.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// What becomes of a proposal.
#[derive(Clone, Copy, Debug)]
pub enum Fate {
    Commit,
    Refuse(ProposalRefusal),
    /// Lost on the way.
    Lose,
    /// Committed, but the answer is lost.
    CommitUnheard,
}

/// The log, and how it is to behave. It outlives the "process" that serves it.
#[derive(Debug)]
pub struct Log {
    pub entries: Vec<LogEntry>,
    /// For the next proposals; Commit when it is empty.
    pub fates: VecDeque<Fate>,
    pub leader: bool,
    /// Who it is, while there is one.
    pub leader_id: u64,
    pub refuse_attach: bool,
    /// Barriers that were asked for.
    pub barriers: u64,
    /// Barriers are answered only while this is true.
    pub answer_barriers: bool,
    pub cluster_id: u64,
    /// What sqlited said last.
    pub must_not_lead: bool,
    /// Why proposals are refused for want of room, as raftd says it.
    pub writes_refused: String,
}

/// The in-memory raftd.
#[derive(Clone)]
pub struct FakeRaftd {
    log: Arc<Mutex<Log>>,
    changed: watch::Sender<()>,
}

impl FakeRaftd {
    pub fn new(cluster_id: u64) -> Self {
        let log = Log {
            entries: Vec::new(),
            fates: VecDeque::new(),
            leader: true,
            leader_id: 1,
            refuse_attach: false,
            barriers: 0,
            answer_barriers: true,
            cluster_id,
            must_not_lead: false,
            writes_refused: String::new(),
        };
        let fake = Self { log: Arc::new(Mutex::new(log)), changed: watch::Sender::new(()) };
        fake.append(LogEntryKind::Noop, Bytes::new());
        fake
    }

    pub fn log(&self) -> MutexGuard<'_, Log> {
        self.log.lock().unwrap()
    }

    /// Changes behaviour, and lets everybody notice.
    pub fn set(&self, change: impl FnOnce(&mut Log)) {
        change(&mut self.log());
        self.changed.send_replace(());
    }

    /// News of the log.
    pub fn changes(&self) -> watch::Receiver<()> {
        self.changed.subscribe()
    }

    /// Returns once the log is as asked.
    pub async fn until(&self, condition: impl Fn(&Log) -> bool) {
        let mut changed = self.changed.subscribe();
        let waiting = async {
            while !condition(&self.log()) {
                changed.changed().await.unwrap();
            }
        };
        timeout(PATIENCE, waiting).await.expect("the log is as asked in time");
    }

    pub fn append(&self, kind: LogEntryKind, payload: Bytes) -> u64 {
        let mut log = self.log();
        let index = log.entries.len() as u64 + 1;
        // As the real one: never backward, whatever a test has put there.
        let last_ms = log.entries.last().map_or(1_700_000_000_000, |entry| entry.timestamp_ms);
        let timestamp_ms = last_ms + 1;
        log.entries.push(LogEntry { index, term: 1, kind: kind.into(), timestamp_ms, payload });
        drop(log);
        self.changed.send_replace(());
        index
    }

    /// How many entries are requests.
    pub fn payloads(&self) -> usize {
        self.log().entries.iter().filter(|entry| !entry.payload.is_empty()).count()
    }

    fn decide(&self, payload: Bytes) -> Outcome {
        let fate = self.log().fates.pop_front();
        self.changed.send_replace(());
        match fate.unwrap_or(Fate::Commit) {
            Fate::Commit if !self.log().leader => Outcome::Refused(ProposalRefusal::NoLeader.into()),
            Fate::Commit => Outcome::CommittedIndex(self.append(LogEntryKind::Payload, payload)),
            Fate::Refuse(reason) => Outcome::Refused(reason.into()),
            Fate::Lose => Outcome::Unknown(ProposalUnknown {}),
            Fate::CommitUnheard => {
                self.append(LogEntryKind::Payload, payload);
                Outcome::Unknown(ProposalUnknown {})
            }
        }
    }

    /// Serves the socket from a thread of its own until the returned process is killed.
    pub fn serve(&self, socket: &Path) -> FakeProcess {
        let (kill, killed) = tokio::sync::oneshot::channel::<()>();
        let (fake, socket) = (self.clone(), socket.to_owned());
        let (bound_sender, bound) = std::sync::mpsc::channel();
        let thread = thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let _ = std::fs::remove_file(&socket);
                let listener = UnixListener::bind(&socket).unwrap();
                bound_sender.send(()).unwrap();
                let service = LogServiceServer::new(fake).max_decoding_message_size(usize::MAX);
                let serving = Server::builder()
                    .add_service(service)
                    .serve_with_incoming(UnixListenerStream::new(listener));
                tokio::select! {
                    served = serving => served.unwrap(),
                    _ = killed => {}
                }
            });
            // Dropping the runtime breaks every connection in its middle, as a kill does.
        });
        bound.recv().unwrap();
        FakeProcess { kill: Some(kill), thread: Some(thread) }
    }
}

/// A served [`FakeRaftd`]; dropped, it is killed.
pub struct FakeProcess {
    kill: Option<tokio::sync::oneshot::Sender<()>>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Drop for FakeProcess {
    fn drop(&mut self) {
        drop(self.kill.take());
        self.thread.take().map(thread::JoinHandle::join);
    }
}

type Streamed<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl LogService for FakeRaftd {
    type ProposeStream = Streamed<ProposeResponse>;
    type FollowStream = Streamed<FollowResponse>;
    type ReadBarrierStream = Streamed<ReadBarrierResponse>;
    type WatchSnapshotsStream = Streamed<SnapshotTask>;
    type ReceiveSnapshotStream = Streamed<SnapshotPart>;

    async fn propose(
        &self,
        request: Request<Streaming<ProposeRequest>>,
    ) -> Result<Response<Self::ProposeStream>, Status> {
        let (sender, responses) = mpsc::channel(16);
        let (fake, mut requests) = (self.clone(), request.into_inner());
        tokio::spawn(async move {
            while let Ok(Some(ProposeRequest { proposals })) = requests.message().await {
                let outcomes = proposals.into_iter().map(|proposal| {
                    let outcome = fake.decide(proposal.payload);
                    ProposalOutcome { id: proposal.id, outcome: Some(outcome) }
                });
                let response = ProposeResponse { outcomes: outcomes.collect() };
                if sender.send(Ok(response)).await.is_err() {
                    return;
                }
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(responses))))
    }

    async fn follow(
        &self,
        request: Request<Streaming<FollowRequest>>,
    ) -> Result<Response<Self::FollowStream>, Status> {
        let mut requests = request.into_inner();
        let Some(follow_request::Request::Attach(attach)) =
            requests.message().await?.and_then(|message| message.request)
        else {
            return Err(Status::invalid_argument("attach first"));
        };
        if self.log().refuse_attach {
            return Err(Status::failed_precondition("the log holds another term there"));
        }
        self.set(|log| log.must_not_lead = attach.must_not_lead);
        let reports = self.clone();
        tokio::spawn(async move {
            while let Ok(Some(message)) = requests.message().await {
                if let Some(follow_request::Request::Progress(progress)) = message.request {
                    reports.set(|log| log.must_not_lead = progress.must_not_lead);
                }
            }
        });
        let (sender, responses) = mpsc::channel(4);
        let fake = self.clone();
        tokio::spawn(async move {
            let mut sent = attach.applied_index as usize;
            let mut changed = fake.changed.subscribe();
            loop {
                let response = {
                    let log = fake.log();
                    FollowResponse {
                        entries: log.entries[sent..].to_vec(),
                        commit_index: log.entries.len() as u64,
                        term: 1,
                        leader_id: if log.leader { log.leader_id } else { 0 },
                        cluster_id: log.cluster_id,
                        writes_refused: log.writes_refused.clone(),
                    }
                };
                sent += response.entries.len();
                if sender.send(Ok(response)).await.is_err() || changed.changed().await.is_err() {
                    return;
                }
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(responses))))
    }

    async fn read_barrier(
        &self,
        request: Request<Streaming<ReadBarrierRequest>>,
    ) -> Result<Response<Self::ReadBarrierStream>, Status> {
        let (sender, responses) = mpsc::channel(16);
        let (fake, mut requests) = (self.clone(), request.into_inner());
        tokio::spawn(async move {
            while let Ok(Some(ReadBarrierRequest { id })) = requests.message().await {
                fake.set(|log| log.barriers += 1);
                fake.until(|log| log.answer_barriers).await;
                let read_index = {
                    let log = fake.log();
                    log.leader.then_some(log.entries.len() as u64)
                };
                if sender.send(Ok(ReadBarrierResponse { id, read_index })).await.is_err() {
                    return;
                }
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(responses))))
    }

    async fn watch_snapshots(
        &self,
        _request: Request<WatchSnapshotsRequest>,
    ) -> Result<Response<Self::WatchSnapshotsStream>, Status> {
        Err(Status::unimplemented("this log keeps everything"))
    }

    async fn send_snapshot(
        &self,
        _request: Request<Streaming<SnapshotPart>>,
    ) -> Result<Response<SendSnapshotResponse>, Status> {
        Err(Status::unimplemented("this log keeps everything"))
    }

    async fn receive_snapshot(
        &self,
        _request: Request<ReceiveSnapshotRequest>,
    ) -> Result<Response<Self::ReceiveSnapshotStream>, Status> {
        Err(Status::unimplemented("this log keeps everything"))
    }

    async fn log_status(
        &self,
        _request: Request<LogStatusRequest>,
    ) -> Result<Response<LogStatusResponse>, Status> {
        let log = self.log();
        Ok(Response::new(LogStatusResponse {
            node_id: 1,
            cluster_id: log.cluster_id,
            role: if log.leader { RaftRole::Leader } else { RaftRole::Candidate }.into(),
            term: 1,
            leader_id: if log.leader { log.leader_id } else { 0 },
            commit_index: log.entries.len() as u64,
            ..LogStatusResponse::default()
        }))
    }

    async fn transfer_leadership(
        &self,
        _request: Request<TransferLeadershipRequest>,
    ) -> Result<Response<TransferLeadershipResponse>, Status> {
        Err(Status::failed_precondition("there is nobody else"))
    }
}

/// A running sqlited with its log.
pub struct Node {
    pub raftd: FakeRaftd,
    pub process: Option<FakeProcess>,
    pub shutdown: Shutdown,
    pub running: JoinHandle<Result<(), RunError>>,
    pub channel: Channel,
    pub socket: PathBuf,
    pub directory: TempDir,
    pub config: Config,
}

/// The configuration of a node in this directory.
pub fn config(directory: &Path) -> Config {
    let text = format!(
        "node_id: 1\ncluster: {{election_timeout_ms: 100, heartbeat_interval_ms: 10}}\n\
         raftd: {{socket: \"{0}/raftd.sock\"}}\n\
         sqlited: {{data_dir: \"{0}/sql\", readers: 2, max_request_bytes: 1048576, step_budget: 1000000}}\n",
        directory.display()
    );
    Config::parse(&text, "test.yaml").unwrap()
}

impl Node {
    /// Starts one that serves.
    pub async fn start() -> Self {
        let node = Self::start_with(|_| {}).await;
        node.until_health(ServingStatus::Serving).await;
        node
    }

    /// Starts one whose log was prepared first.
    pub async fn start_with(prepare: impl FnOnce(&FakeRaftd)) -> Self {
        Self::start_as(|_| {}, prepare).await
    }

    /// Starts one with other settings, whose log was prepared first.
    pub async fn start_as(set: impl FnOnce(&mut Config), prepare: impl FnOnce(&FakeRaftd)) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let mut config = config(directory.path());
        set(&mut config);
        let raftd = FakeRaftd::new(config.cluster_id());
        prepare(&raftd);
        let process = Some(raftd.serve(&config.raftd.socket));
        Self::launch(directory, config, raftd, process).await
    }

    async fn launch(
        directory: TempDir,
        config: Config,
        raftd: FakeRaftd,
        process: Option<FakeProcess>,
    ) -> Self {
        let socket = config.raftd.socket.clone();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let shutdown = Shutdown::new();
        let listeners = Listeners { sql: listener, metrics: None };
        let running = tokio::spawn(sqlited::run(config.clone(), listeners, no_reloads(), shutdown.clone()));
        let channel = Endpoint::from_shared(format!("http://{address}")).unwrap().connect_lazy();
        Self { raftd, process, shutdown, running, channel, socket, directory, config }
    }

    pub fn client(&self) -> ReSqliteClient<Channel> {
        ReSqliteClient::new(self.channel.clone()).max_decoding_message_size(usize::MAX)
    }

    /// Returns once the health service says so.
    pub async fn until_health(&self, wanted: ServingStatus) {
        let watching = async {
            let mut client = HealthClient::new(self.channel.clone());
            let mut stream = client.watch(HealthCheckRequest::default()).await.unwrap().into_inner();
            while let Some(response) = stream.message().await.unwrap() {
                if response.status() == wanted {
                    return;
                }
            }
            panic!("the health stream ended");
        };
        timeout(PATIENCE, watching).await.expect("the health is as asked in time");
    }

    /// Stops it cleanly, and starts it again beside the same log.
    pub async fn restart(self) -> Self {
        let Self { raftd, process, shutdown, running, directory, config, .. } = self;
        shutdown.trigger();
        timeout(PATIENCE, running).await.expect("it stops in time").unwrap().unwrap();
        Self::launch(directory, config, raftd, process).await
    }

    /// Stops it cleanly.
    pub async fn stop(self) -> Result<(), RunError> {
        self.shutdown.trigger();
        timeout(PATIENCE, self.running).await.expect("it stops in time").expect("it does not panic")
    }
}
