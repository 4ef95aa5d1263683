//! The raftd program: reads the configuration, binds the listeners, runs the daemon.

use std::{fs, io, os::unix::net::UnixStream, path::Path, process::ExitCode};

use clap::Parser;
use raftd::{
    Listeners,
    arguments::{Arguments, Recover},
    recover,
};
use resqlite::{
    config::{Config, EXIT_CONFIG},
    daemon::{self, Shutdown},
    monitoring, recovery,
};
use tokio::net::{TcpListener, UnixListener};

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let config = match Config::load(&arguments.config) {
        Ok(config) => config,
        Err(error) => return fail(EXIT_CONFIG, &error),
    };
    if arguments.check {
        return ExitCode::SUCCESS;
    }
    if let Some(step) = arguments.recover {
        return recover(&config, step);
    }
    daemon::init_logging();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    match runtime.map(|runtime| runtime.block_on(start(config, arguments.stop_with_stdin))) {
        Ok(code) => code,
        Err(error) => fail(1, &error),
    }
}

fn recover(config: &Config, step: Recover) -> ExitCode {
    let log = match step {
        Recover::Show => recover::show(config),
        Recover::Found => recover::found(config),
    };
    match log {
        Ok(log) => {
            print!("{}", recovery::to_text(&log));
            ExitCode::SUCCESS
        }
        Err(error) => fail(error.exit_code(), &error),
    }
}

async fn start(config: Config, stop_with_stdin: bool) -> ExitCode {
    let shutdown = Shutdown::new();
    let reloads = match daemon::handle_signals(&shutdown) {
        Ok(reloads) => reloads,
        Err(error) => return fail(1, &error),
    };
    let prepared = prepare(&config, &shutdown, stop_with_stdin).await;
    let listeners = match prepared {
        Ok(listeners) => listeners,
        Err(error) => return fail(1, &error),
    };
    let socket = config.raftd.socket.clone();
    let result = raftd::run(config, listeners, reloads, shutdown).await;
    let _ = fs::remove_file(socket);
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(error.exit_code(), &error),
    }
}

async fn prepare(config: &Config, shutdown: &Shutdown, stop_with_stdin: bool) -> io::Result<Listeners> {
    if stop_with_stdin {
        daemon::stop_with_stdin(shutdown)?;
    }
    let raft = TcpListener::bind(config.raftd.listen).await.map_err(|error| {
        io::Error::new(error.kind(), format!("cannot listen on {}: {error}", config.raftd.listen))
    })?;
    let local = bind_socket(&config.raftd.socket).map_err(|error| {
        io::Error::new(error.kind(), format!("cannot listen on {}: {error}", config.raftd.socket.display()))
    })?;
    let metrics = monitoring::bind(config.raftd.metrics_listen).await?;
    Ok(Listeners { raft, local, metrics })
}

/// Binds the Unix socket, over the file that a killed raftd left behind but never under a living one.
fn bind_socket(path: &Path) -> io::Result<UnixListener> {
    if path.exists() {
        if UnixStream::connect(path).is_ok() {
            return Err(io::Error::new(io::ErrorKind::AddrInUse, "another raftd serves it"));
        }
        fs::remove_file(path)?;
    }
    UnixListener::bind(path)
}

fn fail(code: u8, error: &dyn std::error::Error) -> ExitCode {
    daemon::say_fatal("raftd", error);
    ExitCode::from(code)
}
