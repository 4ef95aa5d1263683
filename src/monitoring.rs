//! How a daemon is watched: `/metrics`, `/livez` and `/readyz` over plain HTTP/1.1.
//!
//! Whoever watches must not be able to harm: connections, the size of a request
//! and the time that one may take are bounded, and the figures are read when
//! they are asked for. It knows nothing of what a daemon does; the daemon
//! implements [`Monitored`].

mod busy;
mod define;

use std::{
    convert::Infallible, fmt::Write as _, future::Future, io, net::SocketAddr, sync::Arc, time::Duration,
};

use http_body_util::Full;
use hyper::{
    Method, Request, Response, StatusCode,
    body::{Bytes, Incoming},
    header::{ALLOW, CONTENT_TYPE, HeaderValue},
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use prometheus::{Registry, TEXT_FORMAT, TextEncoder};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::Semaphore,
    time::{sleep, timeout},
};

pub use busy::{Busy, BusyGuard};
pub use define::{Define, LATENCY_SECONDS, SIZES, define, registry_of_process};

/// So many connections are served at the same time; further ones wait in the listener's queue.
pub const MAX_CONNECTIONS: usize = 16;
/// A connection, which carries one request, is closed after this: a reader who takes longer is too slow.
pub const MAX_REQUEST_TIME: Duration = Duration::from_secs(10);
/// A request's head must have arrived after this …
const MAX_HEAD_TIME: Duration = Duration::from_secs(5);
/// … and be no larger than this.
const MAX_HEAD_BYTES: usize = 16 << 10;
/// Running out of file descriptors, say, is not cured by asking again at once.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// One thing that must hold for a daemon to be alive, or ready.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Check {
    /// What it is called: a word.
    pub name: &'static str,
    /// Why it does not hold and what to do, where it does not.
    pub failure: Option<String>,
}

impl Check {
    /// One that holds unless there is a reason why not.
    pub fn new(name: &'static str, failure: Option<String>) -> Self {
        Self { name, failure }
    }
}

/// A daemon, as those see it who watch it.
pub trait Monitored: Send + Sync + 'static {
    /// The metrics, with those figures brought up to date that are only read when somebody asks.
    fn metrics(&self) -> impl Future<Output = &Registry> + Send;

    /// Whether the loops of the process turn. If not, only a restart helps.
    fn live(&self) -> impl Future<Output = Vec<Check>> + Send;

    /// Whether it can do what it is for, now. If not, a restart rarely helps.
    fn ready(&self) -> impl Future<Output = Vec<Check>> + Send;
}

/// Listens where the configuration says; `None` if it says nowhere.
pub async fn bind(address: Option<SocketAddr>) -> io::Result<Option<TcpListener>> {
    let Some(address) = address else { return Ok(None) };
    let bound = TcpListener::bind(address).await.map_err(|error| {
        let hint = "choose another metrics_listen, or null for none";
        io::Error::new(error.kind(), format!("cannot listen on {address} for metrics: {error}; {hint}"))
    });
    bound.map(Some)
}

/// Answers those who watch; never ends. Without a listener there is nobody to answer.
pub async fn serve(listener: Option<TcpListener>, daemon: impl Monitored) -> Infallible {
    let Some(listener) = listener else { return std::future::pending().await };
    let (daemon, permits) = (Arc::new(daemon), Arc::new(Semaphore::new(MAX_CONNECTIONS)));
    loop {
        let permit = Arc::clone(&permits).acquire_owned().await.expect("nobody closes the semaphore");
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(%error, "no connection for metrics can be accepted");
                sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let daemon = Arc::clone(&daemon);
        tokio::spawn(async move {
            if timeout(MAX_REQUEST_TIME, serve_one(stream, daemon)).await.is_err() {
                tracing::debug!("a request for metrics took too long");
            }
            drop(permit);
        });
    }
}

/// One request on a connection of its own: then nothing idle has to be bounded.
async fn serve_one(stream: TcpStream, daemon: Arc<impl Monitored>) {
    let service = service_fn(move |request: Request<Incoming>| {
        let daemon = Arc::clone(&daemon);
        async move { Ok::<_, Infallible>(answer(&*daemon, &request).await) }
    });
    let served = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(MAX_HEAD_TIME)
        .max_buf_size(MAX_HEAD_BYTES)
        .keep_alive(false)
        .serve_connection(TokioIo::new(stream), service)
        .await;
    if let Err(error) = served {
        tracing::debug!(%error, "a request for metrics failed");
    }
}

async fn answer(daemon: &impl Monitored, request: &Request<Incoming>) -> Response<Full<Bytes>> {
    if !matches!(*request.method(), Method::GET | Method::HEAD) {
        let mut refusal =
            text(StatusCode::METHOD_NOT_ALLOWED, "only GET and HEAD are answered here\n".into());
        refusal.headers_mut().insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
        return refusal;
    }
    match request.uri().path() {
        "/metrics" => metrics(daemon.metrics().await),
        "/livez" => verdict(&daemon.live().await),
        "/readyz" => verdict(&daemon.ready().await),
        _ => text(StatusCode::NOT_FOUND, "there are /metrics, /livez and /readyz\n".into()),
    }
}

fn metrics(registry: &Registry) -> Response<Full<Bytes>> {
    match TextEncoder::new().encode_to_string(&registry.gather()) {
        Ok(figures) => {
            let mut response = text(StatusCode::OK, figures);
            response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(TEXT_FORMAT));
            response
        }
        Err(error) => text(StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")),
    }
}

/// A line for each check, as Kubernetes' own servers answer: `[+]` for what holds, `[-]` and why for what does not.
fn verdict(checks: &[Check]) -> Response<Full<Bytes>> {
    let mut lines = String::new();
    for Check { name, failure } in checks {
        let written = match failure {
            None => writeln!(lines, "[+]{name} ok"),
            Some(why) => writeln!(lines, "[-]{name} failed: {why}"),
        };
        written.expect("a String takes everything");
    }
    let holds = checks.iter().all(|check| check.failure.is_none());
    text(if holds { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE }, lines)
}

fn text(status: StatusCode, body: String) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(body.into()));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    response
}

#[cfg(test)]
mod tests;
