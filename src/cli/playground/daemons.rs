//! The daemons of a playground: started, watched, stopped.
//!
//! One task for each process owns it. A death is reported and nothing more:
//! whoever kills daemons under a playground wants to see what happens.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::{ExitStatus, Stdio},
    time::Duration,
};

use rustix::process::{Pid, Signal, kill_process};
use tokio::{
    process::{Child, Command},
    sync::{mpsc, watch},
    task::JoinHandle,
    time::timeout,
};

/// How long a daemon may take to stop before it is killed.
const STOP_WITHIN: Duration = Duration::from_secs(5);
/// How much of a log is shown when something went wrong.
const TAIL_LINES: usize = 20;

/// Where the files of a node are.
#[derive(Clone, Debug)]
pub struct NodeFiles {
    pub id: usize,
    pub directory: PathBuf,
    pub config: PathBuf,
    pub socket: PathBuf,
}

impl NodeFiles {
    /// The files of node `id` below `directory`; the socket is in `sockets` if that is given.
    pub fn new(id: usize, directory: &Path, sockets: Option<&Path>) -> Self {
        let directory = directory.join(format!("node{id}"));
        Self {
            id,
            config: directory.join("resqlite.yaml"),
            socket: sockets
                .map_or(directory.join("raftd.sock"), |sockets| sockets.join(format!("node{id}.sock"))),
            directory,
        }
    }

    fn log(&self, daemon: &str) -> PathBuf {
        self.directory.join(format!("{daemon}.log"))
    }

    /// The ends of both logs, for an error message.
    pub fn log_tails(&self) -> String {
        ["raftd", "sqlited"].map(|daemon| tail(&self.log(daemon))).join("\n")
    }
}

fn tail(log: &Path) -> String {
    let bytes = fs::read(log).unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes);
    let lines: Vec<&str> = text.lines().collect();
    let last = &lines[lines.len().saturating_sub(TAIL_LINES)..];
    format!("--- the end of {}:\n{}", log.display(), last.join("\n"))
}

/// A process that ended without having been told to.
#[derive(Debug)]
struct Death {
    node: usize,
    daemon: &'static str,
    status: String,
    log: PathBuf,
}

/// All processes of a playground.
#[derive(Debug)]
pub struct Daemons {
    stop: watch::Sender<bool>,
    tasks: Vec<JoinHandle<()>>,
    deaths: Option<mpsc::UnboundedReceiver<Death>>,
}

impl Daemons {
    /// Starts both daemons of every node. If one cannot be started, none is left.
    pub fn start(nodes: &[NodeFiles], raftd: &Path, sqlited: &Path) -> Result<Self, String> {
        let stop = watch::Sender::new(false);
        // Holds at most one message for each process.
        let (reports, deaths) = mpsc::unbounded_channel();
        let mut tasks = Vec::new();
        for files in nodes {
            for (daemon, program) in [("raftd", raftd), ("sqlited", sqlited)] {
                let child = spawn(files, daemon, program)?;
                let death = Death { node: files.id, daemon, status: String::new(), log: files.log(daemon) };
                tasks.push(tokio::spawn(own(child, stop.subscribe(), reports.clone(), death)));
            }
        }
        Ok(Self { stop, tasks, deaths: Some(deaths) })
    }

    /// Waits until a daemon dies, and tells why as far as its log does.
    pub async fn first_death(&mut self) -> String {
        let Some(deaths) = &mut self.deaths else { return std::future::pending().await };
        let Some(death) = deaths.recv().await else { return std::future::pending().await };
        format!("node {}'s {} ended: {}\n{}", death.node, death.daemon, death.status, tail(&death.log))
    }

    /// From now on a death is a line on stderr.
    pub fn report_deaths(&mut self) {
        let Some(mut deaths) = self.deaths.take() else { return };
        tokio::spawn(async move {
            while let Some(death) = deaths.recv().await {
                eprintln!("node {}: {} ended: {}", death.node, death.daemon, death.status);
            }
        });
    }

    /// Stops what still runs: asks first, and kills what has not stopped in time.
    pub async fn stop(self) {
        self.stop.send_replace(true);
        for task in self.tasks {
            // A task that panicked has dropped its child, and thereby killed it.
            let _ = task.await;
        }
    }
}

fn spawn(files: &NodeFiles, daemon: &str, program: &Path) -> Result<Child, String> {
    let log = files.log(daemon);
    let file = File::options().create(true).append(true).open(&log);
    let file = file.map_err(|error| format!("cannot open {}: {error}", log.display()))?;
    let child = Command::new(program)
        .arg("--config")
        .arg(&files.config)
        .arg("--stop-with-stdin")
        .stdin(Stdio::piped())
        .stdout(file.try_clone().map_err(|error| error.to_string())?)
        .stderr(file)
        // A group of its own: Ctrl-C at the terminal is for us, who then stop the daemons in order.
        .process_group(0)
        .kill_on_drop(true)
        .spawn();
    child.map_err(|error| format!("cannot start {}: {error}", program.display()))
}

/// Owns a process until its end, or until it is told to stop it.
async fn own(
    mut child: Child,
    mut stop: watch::Receiver<bool>,
    reports: mpsc::UnboundedSender<Death>,
    mut death: Death,
) {
    // `wait` would close it, and the daemon would stop.
    let _held_open = child.stdin.take();
    tokio::select! {
        ended = child.wait() => {
            death.status = ended.map_or_else(|error| error.to_string(), |status: ExitStatus| status.to_string());
            // Nobody listens any more once everything is being stopped.
            let _ = reports.send(death);
            return;
        }
        // An error means that the playground itself is gone, which is the same.
        _ = stop.wait_for(|stop| *stop) => {}
    }
    if let Some(pid) = child.id().and_then(|id| Pid::from_raw(id.cast_signed())) {
        // It may have ended by itself at this moment; it is not reaped before `wait`, so the id is still its own.
        let _ = kill_process(pid, Signal::TERM);
    }
    if timeout(STOP_WITHIN, child.wait()).await.is_err() {
        eprintln!("node {}: {} did not stop within {STOP_WITHIN:?} and is killed", death.node, death.daemon);
        // Fails only if it has just ended.
        let _ = child.kill().await;
    }
}
