//! Starts, kills and looks into clusters of real processes.

use std::{
    collections::BTreeSet,
    env,
    fs::{self, File},
    net::TcpListener,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::Mutex,
    time::{Duration, Instant},
};

use resqlite::api::{
    ExecuteRequest, ExecuteResponse, QueryRequest, ReadOptions, RequestId, Row, Statement, StatusRequest,
    StatusResponse, re_sqlite_client::ReSqliteClient, value::Kind,
};
use resqlite::{
    config::Address,
    tls::{ClientTls, Dial, Reloading, ServerName, clients::ClientTlsFiles},
};
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};
use tonic::{Status, transport::Channel};

/// How long anything may take that is bound to happen.
pub const DEADLINE: Duration = Duration::from_secs(30);

/// A daemon of a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Daemon {
    /// Consensus.
    Raftd,
    /// SQL.
    Sqlited,
}

impl Daemon {
    fn name(self) -> &'static str {
        match self {
            Self::Raftd => "raftd",
            Self::Sqlited => "sqlited",
        }
    }
}

/// A cluster; its processes die with it.
pub struct Cluster {
    directory: TempDir,
    nodes: Vec<Node>,
    /// Set once the cluster is TLS: how our clients know it, and are known to it.
    pub trusted: Option<ClientTlsFiles>,
}

struct Node {
    directory: PathBuf,
    sql_address: String,
    metrics_ports: [u16; 2],
    raftd: Option<Child>,
    sqlited: Option<Child>,
}

/// A program that was built together with this test.
///
/// `RESQLITE_TEST_PROGRAMS` names a directory with other builds to be tried, such as one that is broken on purpose.
pub fn program(name: &str) -> PathBuf {
    if let Some(others) = env::var_os("RESQLITE_TEST_PROGRAMS") {
        return Path::new(&others).join(name);
    }
    let built = Path::new(env!("CARGO_BIN_EXE_resqlite")).with_file_name(name);
    assert!(built.exists(), "{} is not built: run `cargo build --workspace --bins` first", built.display());
    built
}

/// Ports that are free now, and that no other test of this process was given.
pub fn free_ports(count: usize) -> Vec<u16> {
    static GIVEN: Mutex<BTreeSet<u16>> = Mutex::new(BTreeSet::new());
    let mut given = GIVEN.lock().unwrap();
    let mut ports = Vec::new();
    while ports.len() < count {
        let probe = TcpListener::bind(("127.0.0.1", 0)).unwrap();
        let port = probe.local_addr().unwrap().port();
        if given.insert(port) {
            ports.push(port);
        }
    }
    ports
}

/// Waits until `check` gives something; panics with `what` after [`DEADLINE`].
pub async fn eventually<T, F: Future<Output = Option<T>>>(what: &str, mut check: impl FnMut() -> F) -> T {
    let deadline = Instant::now() + DEADLINE;
    loop {
        if let Some(found) = check().await {
            return found;
        }
        assert!(Instant::now() < deadline, "not within {DEADLINE:?}: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

impl Cluster {
    /// Starts a cluster of so many nodes and waits until every node serves.
    pub async fn start(size: usize) -> Self {
        let mut cluster = Self::prepare(size);
        for node in 0..size {
            cluster.launch(node);
        }
        cluster.wait_until_serving().await;
        cluster
    }

    /// Writes the configurations of a cluster without starting it.
    pub fn prepare(size: usize) -> Self {
        Self::prepare_with(size, "", "")
    }

    /// As [`Cluster::prepare`], with more settings for raftd and for sqlited, each of them a line of YAML.
    pub fn prepare_with(size: usize, raftd: &str, sqlited: &str) -> Self {
        let directory = tempfile::Builder::new().prefix("resqlite-").tempdir().unwrap();
        let ports = free_ports(size * 4);
        let members: String = (0..size)
            .map(|i| {
                let (raft, sql) = (ports[4 * i], ports[4 * i + 1]);
                format!("    - {{ id: {}, raft: \"127.0.0.1:{raft}\", sql: \"127.0.0.1:{sql}\" }}\n", i + 1)
            })
            .collect();
        let prepare_node = |i: usize| {
            let node = directory.path().join(format!("node{}", i + 1));
            fs::create_dir_all(&node).unwrap();
            let (raft, sql, at) = (ports[4 * i], ports[4 * i + 1], node.display());
            let metrics_ports @ [raftd_metrics, sqlited_metrics] = [ports[4 * i + 2], ports[4 * i + 3]];
            let config = format!(
                "node_id: {}\ncluster:\n  name: test\n  members:\n{members}raftd:\n  listen: 127.0.0.1:{raft}\n  \
                 data_dir: {at}/raft\n  socket: {at}/raftd.sock\n  metrics_listen: 127.0.0.1:{raftd_metrics}\n{}\
                 sqlited:\n  listen: 127.0.0.1:{sql}\n  data_dir: {at}/sql\n  \
                 metrics_listen: 127.0.0.1:{sqlited_metrics}\n{}",
                i + 1,
                indented(raftd, &node),
                indented(sqlited, &node)
            );
            fs::write(node.join("resqlite.yaml"), config).unwrap();
            let sql_address = format!("127.0.0.1:{sql}");
            Node { directory: node, sql_address, metrics_ports, raftd: None, sqlited: None }
        };
        let nodes = (0..size).map(prepare_node).collect();
        Self { directory, nodes, trusted: None }
    }

    /// How many nodes there are; they are counted from 0 here, while ids count from 1.
    pub fn size(&self) -> usize {
        self.nodes.len()
    }

    /// The directory that holds everything.
    pub fn path(&self) -> &Path {
        self.directory.path()
    }

    /// Starts both daemons of a node, or those that do not run.
    pub fn launch(&mut self, node: usize) {
        for daemon in [Daemon::Raftd, Daemon::Sqlited] {
            if self.slot(node, daemon).is_none() {
                self.launch_daemon(node, daemon);
            }
        }
    }

    /// Starts one daemon of a node.
    pub fn launch_daemon(&mut self, node: usize, daemon: Daemon) {
        let mut command = Command::new(program(daemon.name()));
        self.launch_command(node, daemon, &mut command);
    }

    /// Starts a daemon through another program, such as strace, whose last argument is still to come.
    pub fn launch_command(&mut self, node: usize, daemon: Daemon, command: &mut Command) {
        let directory = self.nodes[node].directory.clone();
        let log =
            File::options().create(true).append(true).open(directory.join(format!("{}.log", daemon.name())));
        let child = command
            .arg("--config")
            .arg(directory.join("resqlite.yaml"))
            .arg("--stop-with-stdin")
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(log.unwrap())
            .spawn()
            .unwrap();
        *self.slot(node, daemon) = Some(child);
    }

    fn slot(&mut self, node: usize, daemon: Daemon) -> &mut Option<Child> {
        match daemon {
            Daemon::Raftd => &mut self.nodes[node].raftd,
            Daemon::Sqlited => &mut self.nodes[node].sqlited,
        }
    }

    /// `kill -9`, and waits until the process is gone.
    pub fn kill(&mut self, node: usize, daemon: Daemon) {
        if let Some(mut child) = self.slot(node, daemon).take() {
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }

    /// Whether a daemon that was launched has ended by itself.
    pub fn has_ended(&mut self, node: usize, daemon: Daemon) -> bool {
        self.slot(node, daemon).as_mut().is_some_and(|child| child.try_wait().unwrap().is_some())
    }

    /// `kill -9` of everything, as close together as one process can do it.
    pub fn kill_all(&mut self) {
        let mut children: Vec<Child> = self
            .nodes
            .iter_mut()
            .flat_map(|node| [node.raftd.take(), node.sqlited.take()])
            .flatten()
            .collect();
        children.iter_mut().for_each(|child| child.kill().unwrap());
        for child in &mut children {
            child.wait().unwrap();
        }
    }

    /// Waits until a daemon has ended by itself.
    pub fn wait(&mut self, node: usize, daemon: Daemon) -> ExitStatus {
        self.slot(node, daemon).take().expect("the daemon was started").wait().unwrap()
    }

    /// Stops a daemon as systemd does, and returns whether it ended cleanly.
    pub fn stop(&mut self, node: usize, daemon: Daemon) -> bool {
        let mut child = self.slot(node, daemon).take().expect("the daemon runs");
        let pid = child.id().to_string();
        assert!(Command::new("kill").args(["-TERM", &pid]).status().unwrap().success());
        child.wait().unwrap().success()
    }

    /// The process id of a daemon that runs.
    pub fn pid(&self, node: usize, daemon: Daemon) -> u32 {
        let node = &self.nodes[node];
        let child = match daemon {
            Daemon::Raftd => &node.raftd,
            Daemon::Sqlited => &node.sqlited,
        };
        child.as_ref().expect("the daemon runs").id()
    }

    /// Sends a daemon a signal by its name, such as STOP.
    pub fn signal(&self, node: usize, daemon: Daemon, name: &str) {
        let pid = self.pid(node, daemon).to_string();
        assert!(Command::new("kill").args([&format!("-{name}"), &pid]).status().unwrap().success());
    }

    /// The most memory that a daemon ever had resident.
    pub fn peak_resident_bytes(&self, node: usize, daemon: Daemon) -> u64 {
        peak_resident_bytes(self.pid(node, daemon)).expect("the daemon runs")
    }

    /// Asks a daemon over HTTP for one of `/metrics`, `/livez` and `/readyz`: status and body, when it answers.
    pub async fn watch(&self, node: usize, daemon: Daemon, path: &str) -> Option<(u16, String)> {
        let [raftd, sqlited] = self.nodes[node].metrics_ports;
        let port = if daemon == Daemon::Raftd { raftd } else { sqlited };
        let asked = async {
            let mut stream = TcpStream::connect(("127.0.0.1", port)).await.ok()?;
            let request = format!("GET {path} HTTP/1.1\r\nhost: node\r\n\r\n");
            stream.write_all(request.as_bytes()).await.ok()?;
            let mut answer = String::new();
            stream.read_to_string(&mut answer).await.ok()?;
            let (head, body) = answer.split_once("\r\n\r\n")?;
            Some((head.split(' ').nth(1)?.parse().ok()?, body.to_owned()))
        };
        tokio::time::timeout(DEADLINE, asked).await.ok()?
    }

    /// The value of a series in a daemon's metrics.
    pub async fn metric(&self, node: usize, daemon: Daemon, series: &str) -> f64 {
        let (_, text) = self.watch(node, daemon, "/metrics").await.expect("it answers");
        let value = text.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' ')?.parse().ok());
        value.unwrap_or_else(|| panic!("there is no {series} in\n{text}"))
    }

    /// Where clients reach a node.
    pub fn sql_address(&self, node: usize) -> &str {
        &self.nodes[node].sql_address
    }

    /// All addresses, as `--endpoints` takes them.
    pub fn endpoints(&self) -> String {
        self.nodes.iter().map(|node| node.sql_address.clone()).collect::<Vec<_>>().join(",")
    }

    /// A node's database file.
    pub fn database(&self, node: usize) -> PathBuf {
        self.nodes[node].directory.join("sql/resqlite.db")
    }

    /// A client that speaks to one node only, and never retries.
    pub fn client(&self, node: usize) -> ReSqliteClient<Channel> {
        let address: Address = self.nodes[node].sql_address.parse().unwrap();
        let dial = match &self.trusted {
            None => Dial::plain(address),
            Some(files) => {
                let tls = Reloading::<ClientTls>::load(files.clone()).unwrap();
                let name = ServerName::try_from(address.host().to_owned()).unwrap();
                Dial::tls(address, name, move || tls.current().client.clone())
            }
        };
        ReSqliteClient::new(dial.unwrap().connect_lazy()).max_decoding_message_size(64 << 20)
    }

    /// What a node says of itself, when it says anything.
    pub async fn status(&self, node: usize) -> Option<StatusResponse> {
        let mut client = self.client(node);
        let asked = client.status(StatusRequest {});
        Some(tokio::time::timeout(Duration::from_secs(2), asked).await.ok()?.ok()?.into_inner())
    }

    /// Waits until every node answers a linearizable read.
    pub async fn wait_until_serving(&self) {
        for node in 0..self.size() {
            eventually(&format!("node {} serves\n{}", node + 1, self.logs()), || async {
                query(&mut self.client(node), "select 1").await.ok()
            })
            .await;
        }
    }

    /// The node that leads, by the leader's own account.
    pub async fn leader(&self) -> usize {
        eventually("there is a leader", || async {
            for node in 0..self.size() {
                if self
                    .status(node)
                    .await
                    .is_some_and(|status| status.node.unwrap_or_default().role == "leader")
                {
                    return Some(node);
                }
            }
            None
        })
        .await
    }

    /// Waits until all nodes have applied the same entries, and returns that index.
    pub async fn wait_until_level(&self) -> u64 {
        eventually("all nodes have applied the same entries", || async {
            let mut indexes = BTreeSet::new();
            for node in 0..self.size() {
                let status = self.status(node).await?.node?;
                indexes.extend([status.applied_index, status.commit_index]);
            }
            if indexes.len() == 1 { indexes.first().copied() } else { None }
        })
        .await
    }

    /// A node's content as the sqlite3 program dumps it, without our own tables.
    pub fn dump(&self, node: usize) -> String {
        without_own_tables(&sqlite3(&self.database(node), ".dump"))
    }

    /// The ends of all logs, for the message of a failing test.
    pub fn logs(&self) -> String {
        let mut text = String::new();
        for node in &self.nodes {
            for daemon in ["raftd", "sqlited"] {
                let path = node.directory.join(format!("{daemon}.log"));
                let log = fs::read_to_string(&path).unwrap_or_default();
                let tail: Vec<&str> = log.lines().rev().take(8).collect();
                let tail: Vec<&str> = tail.into_iter().rev().collect();
                text.push_str(&format!("--- {}\n{}\n", path.display(), tail.join("\n")));
            }
        }
        text
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        self.kill_all();
        if std::thread::panicking() {
            eprintln!("{}", self.logs());
        }
    }
}

/// The most memory that a process ever had resident; `None` if it is gone.
pub fn peak_resident_bytes(pid: u32) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kibibytes: u64 = line.trim().strip_suffix(" kB")?.parse().ok()?;
    Some(kibibytes << 10)
}

/// Settings as lines of a section, with the node's directory where they say $NODE.
fn indented(settings: &str, node: &Path) -> String {
    let settings = settings.replace("$NODE", &node.to_string_lossy());
    settings.lines().map(|line| format!("  {line}\n")).collect()
}

/// Runs the sqlite3 program on a database and returns what it prints.
pub fn sqlite3(database: &Path, commands: &str) -> String {
    let output =
        Command::new("sqlite3").arg("-batch").arg(database).arg(commands).output().expect("sqlite3 runs");
    assert!(output.status.success(), "sqlite3: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// A dump without the statements about `_resqlite_*` tables.
pub fn without_own_tables(dump: &str) -> String {
    resqlite::sql_text::statements(dump)
        .map(|statement| statement.text)
        .filter(|text| !text.contains("_resqlite_"))
        .collect::<Vec<_>>()
        .join("\n")
}

/// A statement without parameters.
pub fn statement(sql: &str) -> Statement {
    Statement { sql: sql.into(), ..Statement::default() }
}

/// Executes one statement under an id of the server's making.
pub async fn execute(client: &mut ReSqliteClient<Channel>, sql: &str) -> Result<ExecuteResponse, Status> {
    execute_as(client, sql, None).await
}

/// Executes one statement under a given id.
pub async fn execute_as(
    client: &mut ReSqliteClient<Channel>,
    sql: &str,
    id: Option<RequestId>,
) -> Result<ExecuteResponse, Status> {
    let request = ExecuteRequest { statements: vec![statement(sql)], id, ..ExecuteRequest::default() };
    Ok(client.execute(request).await?.into_inner())
}

/// Whether a failed write may be sent again, under the same id.
pub fn is_worth_retrying(status: &Status) -> bool {
    use tonic::Code::{Cancelled, DeadlineExceeded, ResourceExhausted, Unavailable, Unknown};
    // A killed server breaks the connection, which the client library reports as unknown or cancelled. What comes
    // with details is the answer of the execution, which stays the same.
    status.details().is_empty()
        && matches!(status.code(), Unavailable | DeadlineExceeded | ResourceExhausted | Unknown | Cancelled)
}

/// Sends a request, which must have an id, to one node after the other until one of them answers for good.
pub async fn pursue(
    clients: &[ReSqliteClient<Channel>],
    first: usize,
    request: &ExecuteRequest,
) -> Result<ExecuteResponse, Status> {
    assert!(request.id.is_some(), "only a request with an id may be repeated");
    let deadline = Instant::now() + DEADLINE;
    for attempt in first.. {
        let mut client = clients[attempt % clients.len()].clone();
        let mut sent = tonic::Request::new(request.clone());
        sent.set_timeout(Duration::from_secs(5));
        match client.execute(sent).await {
            Ok(response) => return Ok(response.into_inner()),
            Err(status) if is_worth_retrying(&status) && Instant::now() < deadline => {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            Err(status) => return Err(status),
        }
    }
    unreachable!("there is always another attempt")
}

/// A linearizable query; all rows.
pub async fn query(client: &mut ReSqliteClient<Channel>, sql: &str) -> Result<Vec<Row>, Status> {
    query_with(client, sql, ReadOptions::default()).await
}

/// A query at a chosen consistency; all rows.
pub async fn query_with(
    client: &mut ReSqliteClient<Channel>,
    sql: &str,
    read: ReadOptions,
) -> Result<Vec<Row>, Status> {
    let request = QueryRequest { sql: sql.into(), read: Some(read), ..QueryRequest::default() };
    let mut responses = client.query(request).await?.into_inner();
    let mut rows = Vec::new();
    while let Some(response) = responses.message().await? {
        rows.extend(response.rows);
    }
    Ok(rows)
}

/// The only integer of a result of one row and column.
pub fn only_integer(rows: &[Row]) -> i64 {
    match rows {
        [Row { values }] => match values.as_slice() {
            [value] => match value.kind {
                Some(Kind::Integer(integer)) => integer,
                ref other => panic!("not an integer: {other:?}"),
            },
            _ => panic!("not one column: {values:?}"),
        },
        _ => panic!("not one row: {rows:?}"),
    }
}
