//! The endpoints of a client, and trying again at another one.
//!
//! Knows which failures may be tried again ([`super::error`]), but nothing of
//! what is being called.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use tokio::time::{Instant, sleep, timeout_at};
use tonic::{
    Status,
    service::interceptor::InterceptedService,
    transport::{Channel, Endpoint},
};

use super::{
    error::{Error, Verdict, describe, verdict},
    users::Sign,
};
use crate::{
    api::re_sqlite_client::ReSqliteClient,
    tls::{ClientTls, Dial, Reloading, ServerName},
};

/// The largest answer that a client takes, above every limit that servers have on one message.
const MAX_MESSAGE_BYTES: usize = 96 << 20;
/// A dead host is noticed after at most this long, and once more for the ping's answer.
const KEEP_ALIVE: Duration = Duration::from_secs(5);
/// How long to wait after all endpoints have failed, at first and at most.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(20), Duration::from_millis(500));

/// A connection that is made when it is first used, and again whenever it broke.
pub(super) type Connection = ReSqliteClient<InterceptedService<Channel, Sign>>;

/// Where servers are, and which of them is used at present.
#[derive(Debug)]
pub(super) struct Endpoints {
    all: Vec<(String, Connection)>,
    current: AtomicUsize,
}

/// How long a call may take.
#[derive(Clone, Copy, Debug)]
pub(super) struct Patience {
    /// In all, until the answer begins; `None` is for ever.
    pub deadline: Option<Duration>,
    /// While nobody answers.
    pub retry_for: Duration,
}

impl Endpoints {
    /// Takes `host:port` each; at least one.
    pub fn new(
        addresses: &[String],
        tls: Option<&Reloading<ClientTls>>,
        sign: &Sign,
        connect_timeout: Duration,
    ) -> Result<Self, Error> {
        if addresses.is_empty() {
            return Err(Error::Invalid("no endpoint was given".into()));
        }
        let all =
            addresses.iter().map(|address| connection(address, tls.cloned(), sign.clone(), connect_timeout));
        Ok(Self { all: all.collect::<Result<_, _>>()?, current: AtomicUsize::new(0) })
    }

    pub fn addresses(&self) -> impl Iterator<Item = &str> {
        self.all.iter().map(|(address, _)| address.as_str())
    }

    /// Leaves the endpoint `failed`, unless somebody else did so already.
    fn leave(&self, failed: usize) {
        let next = (failed + 1) % self.all.len();
        let _ = self.current.compare_exchange(failed, next, Ordering::Relaxed, Ordering::Relaxed);
    }
}

fn connection(
    address: &str,
    tls: Option<Reloading<ClientTls>>,
    sign: Sign,
    connect_timeout: Duration,
) -> Result<(String, Connection), Error> {
    let channel = match address.starts_with("unix:") {
        true => local_channel(address, connect_timeout)?,
        false => channel(address, tls, connect_timeout)?,
    };
    let client = ReSqliteClient::with_interceptor(channel, sign)
        .max_decoding_message_size(MAX_MESSAGE_BYTES)
        .max_encoding_message_size(MAX_MESSAGE_BYTES);
    Ok((address.to_owned(), client))
}

/// A socket of this host, which needs no TLS: `unix:` and its path.
fn local_channel(address: &str, connect_timeout: Duration) -> Result<Channel, Error> {
    let endpoint = Endpoint::from_shared(address.to_owned());
    let endpoint =
        endpoint.map_err(|error| Error::Invalid(format!("\"{address}\" is not an endpoint: {error}")))?;
    Ok(endpoint.connect_timeout(connect_timeout).connect_lazy())
}

fn channel(
    address: &str,
    tls: Option<Reloading<ClientTls>>,
    connect_timeout: Duration,
) -> Result<Channel, Error> {
    let wrong = |reason: String| Error::Invalid(format!("\"{address}\" is not an endpoint: {reason}"));
    let parsed: crate::config::Address = address.parse().map_err(wrong)?;
    let dial = match tls {
        None => Dial::plain(parsed),
        Some(tls) => {
            let name = ServerName::try_from(parsed.host().to_owned());
            let name = name.map_err(|error| wrong(error.to_string()))?;
            Dial::tls(parsed, name, move || tls.refreshed().client.clone())
        }
    };
    let channel = dial
        .map_err(|error| wrong(error.to_string()))?
        .with(|endpoint| {
            endpoint
                .connect_timeout(connect_timeout)
                .tcp_nodelay(true)
                .http2_keep_alive_interval(KEEP_ALIVE)
                .keep_alive_timeout(KEEP_ALIVE)
                .keep_alive_while_idle(true)
                .http2_adaptive_window(true)
        })
        .connect_lazy();
    Ok(channel)
}

/// The attempts of one call.
#[derive(Debug)]
pub(super) struct Attempts {
    endpoints: Arc<Endpoints>,
    patience: Patience,
    /// Which endpoint the present attempt goes to.
    node: usize,
    deadline: Option<Instant>,
    /// When the failures began that no progress has ended since.
    failing_since: Option<Instant>,
    failures: u32,
    /// Whether any attempt may have been applied although it failed.
    maybe_applied: bool,
    /// Whether an unknown outcome matters: reads have none.
    changes_something: bool,
}

impl Attempts {
    pub fn new(endpoints: Arc<Endpoints>, patience: Patience, changes_something: bool) -> Self {
        Self {
            node: endpoints.current.load(Ordering::Relaxed),
            endpoints,
            patience,
            deadline: patience.deadline.map(|duration| Instant::now() + duration),
            failing_since: None,
            failures: 0,
            maybe_applied: false,
            changes_something,
        }
    }

    /// The same, asking this endpoint first.
    pub fn starting_at(self, node: usize) -> Self {
        Self { node, ..self }
    }

    /// The endpoint that the present attempt goes to, or the last one went to.
    pub fn present(&self) -> (usize, Connection) {
        (self.node, self.endpoints.all[self.node].1.clone())
    }

    /// Says that an answer brought something new: what fails afterwards is a new failure.
    pub fn progressed(&mut self) {
        if self.failing_since.take().is_some() {
            self.failures = 0;
            self.deadline = None;
        }
    }

    /// Calls until there is an answer, or none to be hoped for.
    pub async fn call<T, F>(
        &mut self,
        mut attempt: impl FnMut(Connection, Option<Duration>) -> F,
    ) -> Result<T, Error>
    where
        F: Future<Output = Result<T, Status>>,
    {
        loop {
            let left = self.deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            let answer = attempt(self.endpoints.all[self.node].1.clone(), left);
            let answer = match self.deadline {
                None => Ok(answer.await),
                Some(deadline) => timeout_at(deadline, answer).await,
            };
            match answer {
                Ok(Ok(answer)) => return Ok(answer),
                Ok(Err(status)) => self.failed(status).await?,
                Err(_elapsed) => {
                    self.maybe_applied = true;
                    return Err(self.give_up("no answer before the deadline"));
                }
            }
        }
    }

    /// Says that an attempt failed. Returns when the next one is due, or the error that ends the call.
    pub async fn failed(&mut self, status: Status) -> Result<(), Error> {
        match verdict(&status) {
            Verdict::Final => return Err(status.into()),
            Verdict::Retry => {}
            Verdict::RetryUnknown => self.maybe_applied = true,
        }
        self.endpoints.leave(self.node);
        self.node = (self.node + 1) % self.endpoints.all.len();
        let since = *self.failing_since.get_or_insert_with(Instant::now);
        if self.failures == 0 {
            self.deadline = self.deadline.or_else(|| self.patience.deadline.map(|duration| since + duration));
        }
        let pause = self.pause()?;
        self.failures += 1;

        let next = Instant::now() + pause;
        let patience_ends = since + self.patience.retry_for;
        if next >= self.deadline.map_or(patience_ends, |deadline| deadline.min(patience_ends)) {
            return Err(self.give_up(&describe(&status)));
        }
        sleep(pause).await;
        Ok(())
    }

    /// No pause while there are endpoints that were not asked; then longer and longer ones, of
    /// which half is random so that many clients do not come back all at once.
    fn pause(&self) -> Result<Duration, Error> {
        let round = (self.failures + 1) / self.endpoints.all.len() as u32;
        if !(self.failures + 1).is_multiple_of(self.endpoints.all.len() as u32) {
            return Ok(Duration::ZERO);
        }
        let whole = BACKOFF.1.min(BACKOFF.0 * 2u32.saturating_pow(round.min(16) - 1));
        let random =
            getrandom::u32().map_err(|error| Error::Internal(format!("no random numbers: {error}")))?;
        Ok(whole / 2 + whole.mul_f64(f64::from(random) / f64::from(u32::MAX) / 2.0))
    }

    fn give_up(&self, reason: &str) -> Error {
        let addresses: Vec<_> = self.endpoints.addresses().collect();
        let message = format!("tried {}: {reason}", addresses.join(", "));
        match self.maybe_applied && self.changes_something {
            true => Error::OutcomeUnknown(message),
            false => Error::Unavailable(message),
        }
    }
}
