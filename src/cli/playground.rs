//! `resqlite playground`: a whole cluster on this machine, of real processes.
//!
//! Lays out directories and configurations, starts the daemons, waits until
//! they serve, and leaves nothing running behind, however it ends: each daemon
//! stops when its stdin does, and its stdin is a pipe that we hold.

mod daemons;

use std::{
    env, fs,
    io::{self, IsTerminal, Write},
    net::{Ipv4Addr, SocketAddr, TcpListener},
    os::unix::{ffi::OsStrExt, fs::DirBuilderExt},
    path::{self, Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use tokio::signal::unix::{Signal, SignalKind, signal};

use self::daemons::{Daemons, NodeFiles};
use super::{connect, fail, format_of, render::Mode, run_stdin, shell::Shell};
use crate::client::Client;

/// Ports of one node to those of the next.
const PORTS_APART: u16 = 10;
/// How long a cluster may take until every node serves; a large log must be replayed first.
const READY_WITHIN: Duration = Duration::from_secs(60);
/// What `sockaddr_un` holds, without the NUL at its end (unix(7)).
const MAX_SOCKET_PATH_BYTES: usize = 107;
/// What a shell reports of a program that SIGINT ended.
const EXIT_INTERRUPTED: u8 = 128 + 2;

#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// How many nodes
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u16).range(1..=99))]
    nodes: u16,
    /// Where the files go, and stay [default: a temporary directory that is removed in the end]
    #[arg(long, value_name = "DIR")]
    data_dir: Option<PathBuf>,
    /// Raft port of the first node; the next ones are for SQL and for the metrics of sqlited and raftd; the second
    /// node's are ten higher
    #[arg(long, value_name = "PORT", default_value_t = 50050)]
    base_port: u16,
    /// Print the endpoints and run until Ctrl-C, without a shell
    #[arg(long)]
    keep: bool,
    /// How results are laid out [default: table on a terminal, else list]
    #[arg(long, value_enum)]
    mode: Option<Mode>,
}

/// Runs the command.
pub async fn run(arguments: Arguments) -> ExitCode {
    match Playground::prepare(&arguments) {
        Ok(playground) => playground.run(&arguments).await,
        Err(message) => fail(&message),
    }
}

/// A cluster of three for another command's use; its files are removed when it is dropped.
pub struct Temporary {
    playground: Playground,
    daemons: Daemons,
}

/// Starts a cluster on the default ports and waits until it serves.
pub async fn temporary() -> Result<Temporary, String> {
    let arguments = Arguments { nodes: 3, data_dir: None, base_port: 50050, keep: true, mode: None };
    let playground = Playground::prepare(&arguments)?;
    let daemons = Daemons::start(&playground.nodes, &playground.raftd, &playground.sqlited)?;
    match playground.wait_until_ready().await {
        Ok(()) => Ok(Temporary { playground, daemons }),
        Err(message) => {
            daemons.stop().await;
            Err(message)
        }
    }
}

impl Temporary {
    /// Where its nodes are.
    pub fn endpoints(&self) -> &[String] {
        &self.playground.endpoints
    }

    /// Stops its processes.
    pub async fn stop(self) {
        self.daemons.stop().await;
    }
}

/// A directory that is removed when nobody needs it any more.
#[derive(Debug)]
struct Scratch(PathBuf);

impl Scratch {
    /// A new one; its name is short, because sockets lie in it.
    fn new(parent: &Path) -> Result<Self, String> {
        let random = getrandom::u32().map_err(|error| format!("no random numbers: {error}"))?;
        let path = parent.join(format!("resqlite-{random:08x}"));
        let created = fs::DirBuilder::new().mode(0o700).create(&path);
        created.map_err(|error| format!("cannot create {}: {error}", path.display()))?;
        Ok(Self(path))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.0) {
            eprintln!("cannot remove {}: {error}", self.0.display());
        }
    }
}

struct Playground {
    nodes: Vec<NodeFiles>,
    endpoints: Vec<String>,
    raftd: PathBuf,
    sqlited: PathBuf,
    /// Removed at the end, after the daemons have.
    _scratch: Vec<Scratch>,
}

impl Playground {
    /// Writes everything that the daemons need.
    fn prepare(arguments: &Arguments) -> Result<Self, String> {
        let mut scratch = Vec::new();
        let raftd = daemon_path("raftd")?;
        let sqlited = daemon_path("sqlited")?;
        let ports = ports(arguments.base_port, arguments.nodes)?;
        let directory = match &arguments.data_dir {
            // Absolute, so that the daemons' arguments name it whatever directory they run in.
            Some(directory) => path::absolute(directory).map_err(|error| error.to_string())?,
            None => {
                scratch.push(Scratch::new(&env::temp_dir())?);
                scratch[0].0.clone()
            }
        };
        let longest = directory.join(format!("node{}", arguments.nodes)).join("raftd.sock");
        let sockets = if longest.as_os_str().as_bytes().len() > MAX_SOCKET_PATH_BYTES {
            let runtime = env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from).unwrap_or_else(env::temp_dir);
            scratch.push(Scratch::new(&runtime)?);
            scratch.last().map(|scratch| scratch.0.clone())
        } else {
            None
        };
        let mut nodes = Vec::new();
        for id in 1..=ports.len() {
            let files = NodeFiles::new(id, &directory, sockets.as_deref());
            let written = fs::create_dir_all(&files.directory)
                .and_then(|()| fs::write(&files.config, configuration(id, &ports, &files)));
            written.map_err(|error| format!("cannot prepare {}: {error}", files.directory.display()))?;
            nodes.push(files);
        }
        let endpoints = ports.iter().map(|addresses| addresses.sql.to_string()).collect();
        Ok(Self { nodes, endpoints, raftd, sqlited, _scratch: scratch })
    }

    async fn run(&self, arguments: &Arguments) -> ExitCode {
        let mut signals = match StopSignals::new() {
            Ok(signals) => signals,
            Err(error) => return fail(&format!("cannot handle signals: {error}")),
        };
        let mut daemons = match Daemons::start(&self.nodes, &self.raftd, &self.sqlited) {
            Ok(daemons) => daemons,
            Err(message) => return fail(&message),
        };
        let code = self.serve(arguments, &mut daemons, &mut signals).await;
        daemons.stop().await;
        code
    }

    async fn serve(
        &self,
        arguments: &Arguments,
        daemons: &mut Daemons,
        signals: &mut StopSignals,
    ) -> ExitCode {
        let ready = tokio::select! {
            ready = self.wait_until_ready() => ready,
            died = daemons.first_death() => Err(died),
            () = signals.received(true) => return ExitCode::from(EXIT_INTERRUPTED),
        };
        if let Err(message) = ready {
            return fail(&message);
        }
        daemons.report_deaths();
        if arguments.keep {
            let mut out = io::stdout();
            let said =
                writeln!(out, "ready endpoints={}", self.endpoints.join(",")).and_then(|()| out.flush());
            if let Err(error) = said {
                return fail(&format!("cannot write to stdout: {error}"));
            }
            signals.received(true).await;
            return ExitCode::SUCCESS;
        }
        // A shell at a terminal has Ctrl-C for itself: it interrupts a query.
        let interrupts = !io::stdin().is_terminal();
        tokio::select! {
            code = self.run_shell(arguments) => code,
            () = signals.received(interrupts) => ExitCode::from(EXIT_INTERRUPTED),
        }
    }

    async fn run_shell(&self, arguments: &Arguments) -> ExitCode {
        match connect(Client::builder().endpoints(&self.endpoints)).await {
            Ok(client) => run_stdin(Shell::new(client, format_of(arguments.mode, false))).await,
            Err(error) => fail(&error.to_string()),
        }
    }

    /// Returns once every node answers a linearizable read.
    async fn wait_until_ready(&self) -> Result<(), String> {
        for (endpoint, files) in self.endpoints.iter().zip(&self.nodes) {
            let builder = Client::builder().endpoints([endpoint]).connect_for(READY_WITHIN);
            let client = builder.deadline(Some(READY_WITHIN)).retry_for(READY_WITHIN).connect().await;
            let answer = match client {
                Ok(client) => client.query_one("SELECT 1", ()).await.map(drop),
                Err(error) => Err(error),
            };
            answer.map_err(|error| {
                format!("no leader serves after {READY_WITHIN:?}: {error}\n{}", files.log_tails())
            })?;
        }
        Ok(())
    }
}

/// The signals that end a playground. One that arrives while nobody waits is not lost.
struct StopSignals {
    terminate: Signal,
    hang_up: Signal,
    interrupt: Signal,
}

impl StopSignals {
    fn new() -> io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            hang_up: signal(SignalKind::hangup())?,
            interrupt: signal(SignalKind::interrupt())?,
        })
    }

    /// Returns when one has arrived; SIGINT counts only if `interrupts`.
    async fn received(&mut self, interrupts: bool) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.hang_up.recv() => {}
            _ = self.interrupt.recv(), if interrupts => {}
        }
    }
}

/// A daemon's program: beside our own, as built and as installed, or in PATH.
pub(super) fn daemon_path(name: &str) -> Result<PathBuf, String> {
    let own = env::current_exe().map_err(|error| format!("cannot tell where this program is: {error}"))?;
    let beside = own.parent().map(|directory| directory.join(name));
    let path = env::var_os("PATH").unwrap_or_default();
    let candidates = beside.into_iter().chain(env::split_paths(&path).map(|directory| directory.join(name)));
    candidates
        .into_iter()
        .find(|candidate| candidate.is_file())
        .ok_or_else(|| format!("cannot find {name}, neither beside {} nor in PATH", own.display()))
}

/// Where a node listens, on four ports in a row.
#[derive(Clone, Copy, Debug)]
struct Addresses {
    raft: SocketAddr,
    sql: SocketAddr,
    sqlited_metrics: SocketAddr,
    raftd_metrics: SocketAddr,
}

impl Addresses {
    fn from(first_port: u16) -> Option<Self> {
        let port = |offset| Some(SocketAddr::from((Ipv4Addr::LOCALHOST, first_port.checked_add(offset)?)));
        Some(Self { raft: port(0)?, sql: port(1)?, sqlited_metrics: port(2)?, raftd_metrics: port(3)? })
    }

    fn all(self) -> [SocketAddr; 4] {
        [self.raft, self.sql, self.sqlited_metrics, self.raftd_metrics]
    }
}

/// The addresses of each node, all of them free.
fn ports(base: u16, nodes: u16) -> Result<Vec<Addresses>, String> {
    let too_high =
        || format!("there are no ports for {nodes} nodes from {base} on; choose a lower --base-port");
    let mut addresses = Vec::new();
    for node in 0..nodes {
        let of_node = base.checked_add(PORTS_APART * node).and_then(Addresses::from).ok_or_else(too_high)?;
        for address in of_node.all() {
            TcpListener::bind(address).map_err(|error| match error.kind() {
                io::ErrorKind::AddrInUse => {
                    format!(
                        "port {} is in use, perhaps by another playground; choose another --base-port",
                        address.port()
                    )
                }
                _ => format!("cannot listen on {address}: {error}"),
            })?;
        }
        addresses.push(of_node);
    }
    Ok(addresses)
}

/// A node's configuration file.
fn configuration(id: usize, ports: &[Addresses], files: &NodeFiles) -> String {
    let members = ports.iter().enumerate().map(|(position, Addresses { raft, sql, .. })| {
        format!("    - {{ id: {}, raft: \"{raft}\", sql: \"{sql}\" }}\n", position + 1)
    });
    let Addresses { raft, sql, sqlited_metrics, raftd_metrics } = &ports[id - 1];
    format!(
        "node_id: {id}\ncluster:\n  name: playground\n  members:\n{}raftd:\n  listen: {raft}\n  data_dir: {}\n  \
         socket: {}\n  metrics_listen: {raftd_metrics}\n\
         sqlited:\n  listen: {sql}\n  data_dir: {}\n  metrics_listen: {sqlited_metrics}\n",
        members.collect::<String>(),
        yaml_string(&files.directory.join("raft")),
        yaml_string(&files.socket),
        yaml_string(&files.directory.join("sql")),
    )
}

/// Any path is a YAML string in double quotes once it is escaped as JSON demands.
fn yaml_string(path: &Path) -> String {
    serde_json::Value::from(path.to_string_lossy()).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;

    #[test]
    fn the_configuration_is_one_that_the_daemons_accept() {
        let ports: Vec<Addresses> = (0..3).map(|i| Addresses::from(1000 + 10 * i).unwrap()).collect();
        let files = NodeFiles::new(2, Path::new("/tmp/a \"quoted\": #dir"), None);
        let config = Config::parse(&configuration(2, &ports, &files), "test").unwrap();
        assert_eq!(config.node_id, 2);
        assert_eq!(config.cluster.members.len(), 3);
        assert_eq!(config.this_member().sql.as_str(), "127.0.0.1:1011");
        assert_eq!(config.sqlited.metrics_listen, Some(([127, 0, 0, 1], 1012).into()));
        assert_eq!(config.raftd.metrics_listen, Some(([127, 0, 0, 1], 1013).into()));
        assert_eq!(config.raftd.data_dir, Path::new("/tmp/a \"quoted\": #dir/node2/raft"));
        assert_eq!(config.raftd.socket, Path::new("/tmp/a \"quoted\": #dir/node2/raftd.sock"));
    }

    #[test]
    fn a_port_in_use_and_ports_beyond_the_last_are_refused_by_name() {
        let taken = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let port = taken.local_addr().unwrap().port();
        let message = ports(port, 1).unwrap_err();
        assert!(message.starts_with(&format!("port {port} is in use")), "{message}");
        assert!(ports(65_530, 2).unwrap_err().contains("lower --base-port"));
    }
}
