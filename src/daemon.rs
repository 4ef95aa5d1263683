//! What makes a process a good daemon: logs, signals, readiness and watchdog.
//!
//! Shared by `raftd` and `sqlited`, so that both behave alike under systemd,
//! on a terminal, and below a playground. It knows nothing of what they do.

use std::{
    convert::Infallible,
    fmt,
    io::{self, IsTerminal, Read},
    thread,
    time::Duration,
};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use sd_notify::NotifyState;
use signal_hook::{
    consts::{SIGHUP, SIGINT, SIGTERM},
    iterator::Signals,
};
use tokio::sync::watch;
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::{
    EnvFilter,
    fmt::{
        FmtContext, FormatEvent, FormatFields,
        format::{Format, Writer},
    },
    registry::LookupSpan,
};

/// Starts logging to stderr: for a person on a terminal, one line each otherwise.
///
/// `RESQLITE_LOG` filters it as `RUST_LOG` does elsewhere; the default is `info`.
pub fn init_logging() {
    let filter = EnvFilter::try_from_env("RESQLITE_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr);
    // journald stamps the lines itself and says so in JOURNAL_STREAM (systemd.exec(5)).
    if is_journal() {
        builder.event_format(JournalLine).init();
    } else {
        builder.with_ansi(io::stderr().is_terminal()).init();
    }
}

/// Says why the program ends, where logging has not begun or nothing of it is left to say.
pub fn say_fatal(program: &str, error: &dyn std::error::Error) {
    let priority = if is_journal() { "<3>" } else { "" };
    eprintln!("{priority}{program}: {error}");
}

fn is_journal() -> bool {
    std::env::var_os("JOURNAL_STREAM").is_some()
}

/// A line as journald takes it from stderr: the priority in front, as in sd-daemon(3), and no time, for it has its own.
struct JournalLine;

impl<S, N> FormatEvent<S, N> for JournalLine
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        write!(writer, "<{}>", priority(event.metadata().level()))?;
        // journalctl shows the priority by colour, so the level is not repeated in words.
        Format::default()
            .without_time()
            .with_ansi(false)
            .with_level(false)
            .format_event(context, writer, event)
    }
}

/// syslog's number for a level.
fn priority(level: &Level) -> u8 {
    match *level {
        Level::ERROR => 3,
        Level::WARN => 4,
        Level::INFO => 6,
        Level::DEBUG | Level::TRACE => 7,
    }
}

/// Tells every part of a process that it is to stop. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Shutdown {
    sender: watch::Sender<bool>,
}

impl Shutdown {
    /// One that has not been triggered.
    pub fn new() -> Self {
        Self { sender: watch::Sender::new(false) }
    }

    /// Asks everybody to stop; more than once does no harm.
    pub fn trigger(&self) {
        self.sender.send_replace(true);
    }

    /// Whether it has been triggered.
    pub fn is_triggered(&self) -> bool {
        *self.sender.borrow()
    }

    /// Returns once it has been triggered.
    pub async fn wait(&self) {
        // We hold a sender ourselves, so waiting cannot fail for want of one.
        let _ = self.sender.subscribe().wait_for(|triggered| *triggered).await;
    }
}

impl Default for Shutdown {
    fn default() -> Self {
        Self::new()
    }
}

/// Counts the requests to reload the configuration (SIGHUP).
pub type Reloads = watch::Receiver<u64>;

/// For a daemon that nobody will ask to reload, such as one in a test.
pub fn no_reloads() -> Reloads {
    watch::channel(0).1
}

/// Handles SIGTERM and SIGINT by triggering `shutdown`, and counts SIGHUP, on a thread of its own.
pub fn handle_signals(shutdown: &Shutdown) -> io::Result<Reloads> {
    let mut signals = Signals::new([SIGTERM, SIGINT, SIGHUP])?;
    let (reloads, receiver) = watch::channel(0);
    let shutdown = shutdown.clone();
    thread::Builder::new().name("signals".into()).spawn(move || {
        for signal in signals.forever() {
            match signal {
                SIGHUP => reloads.send_modify(|count| *count += 1),
                _ => shutdown.trigger(),
            }
        }
    })?;
    Ok(receiver)
}

/// Triggers `shutdown` when stdin ends: whoever started us and held the other
/// end of the pipe is gone, by whatever means, and nobody would stop us otherwise.
pub fn stop_with_stdin(shutdown: &Shutdown) -> io::Result<()> {
    let shutdown = shutdown.clone();
    thread::Builder::new().name("stdin".into()).spawn(move || {
        let mut discarded = [0; 256];
        while matches!(io::stdin().read(&mut discarded), Ok(1..)) {}
        shutdown.trigger();
    })?;
    Ok(())
}

/// Takes as many file descriptors as the process may have, and says how many those are: what it is given at first is
/// often 1,024, for programs that use select(2), which this one does not.
pub fn raise_descriptor_limit() -> u64 {
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit { current: limit.maximum, maximum: limit.maximum };
    match setrlimit(Resource::Nofile, raised) {
        Ok(()) => limit.maximum,
        Err(error) => {
            tracing::warn!(%error, "the limit of file descriptors cannot be raised");
            limit.current
        }
    }
    .unwrap_or(u64::MAX)
}

/// Tells systemd that the service is ready. Silent without systemd, as are the others.
pub fn notify_ready() {
    notify(&[NotifyState::Ready]);
}

/// The line that `systemctl status` shows.
pub fn notify_status(status: &str) {
    notify(&[NotifyState::Status(status)]);
}

/// Tells systemd that the service is stopping.
pub fn notify_stopping() {
    notify(&[NotifyState::Stopping]);
}

/// Keeps systemd's watchdog quiet for as long as the runtime that polls this
/// future makes progress. It never ends, whether a watchdog is set or not.
pub async fn feed_watchdog() -> Infallible {
    let Some(timeout) = sd_notify::watchdog_enabled() else { return std::future::pending().await };
    // Half of the timeout, as sd_watchdog_enabled(3) recommends.
    let mut interval = tokio::time::interval((timeout / 2).max(Duration::from_millis(1)));
    loop {
        interval.tick().await;
        notify(&[NotifyState::Watchdog]);
    }
}

fn notify(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        tracing::debug!(%error, "systemd was not notified");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_shutdown_reaches_those_who_wait_and_those_who_come_late() {
        let shutdown = Shutdown::new();
        let early = tokio::spawn({
            let shutdown = shutdown.clone();
            async move { shutdown.wait().await }
        });
        assert!(!shutdown.is_triggered());
        shutdown.trigger();
        early.await.unwrap();
        shutdown.wait().await;
        assert!(shutdown.is_triggered());
    }
}
