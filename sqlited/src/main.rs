//! The `sqlited` program: arguments, configuration, a listener; then the library runs.

use std::process::ExitCode;

use clap::Parser;
use resqlite::{
    config::{self, Config},
    daemon::{self, Shutdown},
    monitoring, recovery,
};
use sqlited::{
    Listeners,
    arguments::{Arguments, Recover},
    recover,
};
use tokio::{net::TcpListener, runtime};

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let config = match Config::load(&arguments.config) {
        Ok(config) => config,
        Err(error) => {
            daemon::say_fatal("sqlited", &error);
            return ExitCode::from(config::EXIT_CONFIG);
        }
    };
    if arguments.check {
        return ExitCode::SUCCESS;
    }
    if let Some(step) = arguments.recover {
        return recover(&config, step);
    }
    daemon::init_logging();
    match start(config, &arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            tracing::error!("{}", failure.reason);
            ExitCode::from(failure.exit_code)
        }
    }
}

fn recover(config: &Config, step: Recover) -> ExitCode {
    let database = match step {
        Recover::Show => recover::show(config),
        Recover::Found => recover::found(config),
    };
    match database {
        Ok(database) => {
            print!("{}", recovery::to_text(&database));
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("sqlited: {error}");
            ExitCode::from(error.exit_code())
        }
    }
}

/// Why the process ends, and how it says so.
struct Failure {
    reason: String,
    exit_code: u8,
}

impl Failure {
    fn new(reason: impl Into<String>) -> Self {
        Self { reason: reason.into(), exit_code: 1 }
    }
}

fn start(config: Config, arguments: &Arguments) -> Result<(), Failure> {
    let shutdown = Shutdown::new();
    let reloads = daemon::handle_signals(&shutdown)
        .map_err(|error| Failure::new(format!("cannot handle signals: {error}")))?;
    if arguments.stop_with_stdin {
        daemon::stop_with_stdin(&shutdown)
            .map_err(|error| Failure::new(format!("cannot watch stdin: {error}")))?;
    }
    let runtime = runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| Failure::new(format!("cannot start the runtime: {error}")))?;
    let address = config.sqlited.listen;
    let result = runtime.block_on(async {
        let listener = TcpListener::bind(address)
            .await
            .map_err(|error| Failure::new(format!("cannot listen on {address}: {error}")))?;
        let metrics = monitoring::bind(config.sqlited.metrics_listen).await;
        let metrics = metrics.map_err(|error| Failure::new(error.to_string()))?;
        let listeners = Listeners { sql: listener, metrics };
        let reloading =
            sqlited::reload::answer_requests(arguments.config.clone(), config.clone(), reloads.clone());
        tokio::select! {
            result = sqlited::run(config, listeners, reloads, shutdown) => {
                result.map_err(|error| Failure { reason: error.to_string(), exit_code: error.exit_code() })
            }
            never = reloading => match never {},
        }
    });
    // Threads that are still at work after their grace are left behind: nothing durable depends on them.
    runtime.shutdown_background();
    result
}
