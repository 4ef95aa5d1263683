//! Counts and times every gRPC call, whatever it is: a layer around all services.
//!
//! A call ends with its trailers, or with headers alone where it fails before
//! its first message, or when its client goes away. It knows nothing of what
//! the services do.

use std::{
    future::Future,
    pin::Pin,
    task::{Context, Poll},
    time::Instant,
};

use http_body_util::BodyExt;
use tonic::{
    Code, Status,
    body::Body,
    codegen::http::{HeaderMap, Request, Response},
    server::NamedService,
};
use tower::{Layer, Service};

use resqlite::api::re_sqlite_server::ReSqliteServer;

use crate::{auth, metrics::Metrics};

/// What calls of other services, and of methods that do not exist, are counted as.
const OTHER: &str = "other";

/// Wraps services so that their calls are counted.
#[derive(Clone, Debug)]
pub struct CountCalls {
    metrics: Metrics,
}

impl CountCalls {
    /// Counts here.
    pub fn new(metrics: Metrics) -> Self {
        Self { metrics }
    }
}

impl<S> Layer<S> for CountCalls {
    type Service = Counted<S>;

    fn layer(&self, service: S) -> Counted<S> {
        Counted { service, metrics: self.metrics.clone() }
    }
}

/// A service whose calls are counted.
#[derive(Clone, Debug)]
pub struct Counted<S> {
    service: S,
    metrics: Metrics,
}

impl<S> Service<Request<Body>> for Counted<S>
where
    S: Service<Request<Body>, Response = Response<Body>>,
    S::Future: Send + 'static,
{
    type Response = Response<Body>;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Self::Error>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.service.poll_ready(context)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let mut call = Call::begin(self.metrics.clone(), request.uri().path());
        let answer = self.service.call(request);
        Box::pin(async move {
            let (head, body) = answer.await?.into_parts();
            if let Some(code) = code_in(&head.headers) {
                call.ended(code);
                return Ok(Response::from_parts(head, body));
            }
            let body = body.map_frame(move |frame| {
                if let Some(code) = frame.trailers_ref().and_then(code_in) {
                    call.ended(code);
                }
                frame
            });
            Ok(Response::from_parts(head, Body::new(body)))
        })
    }
}

/// One call; it is over when this goes.
#[derive(Debug)]
struct Call {
    metrics: Metrics,
    method: String,
    began: Instant,
    /// Until another one is known: a client that goes away before the end says nothing more.
    code: Code,
}

impl Call {
    fn begin(metrics: Metrics, path: &str) -> Self {
        metrics.requests_under_way.inc();
        let service = <ReSqliteServer<()> as NamedService>::NAME;
        // Names that only a stranger made up must not become series of their own.
        let known = Some(path).filter(|path| auth::needs(path).is_some());
        let method = known.and_then(|path| path.strip_prefix('/')?.strip_prefix(service)?.strip_prefix('/'));
        Self {
            metrics,
            method: method.unwrap_or(OTHER).to_owned(),
            began: Instant::now(),
            code: Code::Cancelled,
        }
    }

    /// A method, so that a closure captures the call and not a copy of its field.
    fn ended(&mut self, code: Code) {
        self.code = code;
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        let method = self.method.as_str();
        self.metrics.requests_under_way.dec();
        self.metrics.requests.with_label_values(&[method, code_name(self.code)]).inc();
        self.metrics.request.with_label_values(&[method]).observe(self.began.elapsed().as_secs_f64());
    }
}

fn code_in(headers: &HeaderMap) -> Option<Code> {
    Status::from_header_map(headers).map(|status| status.code())
}

/// The names of <https://grpc.github.io/grpc/core/md_doc_statuscodes.html>.
fn code_name(code: Code) -> &'static str {
    match code {
        Code::Ok => "OK",
        Code::Cancelled => "CANCELLED",
        Code::Unknown => "UNKNOWN",
        Code::InvalidArgument => "INVALID_ARGUMENT",
        Code::DeadlineExceeded => "DEADLINE_EXCEEDED",
        Code::NotFound => "NOT_FOUND",
        Code::AlreadyExists => "ALREADY_EXISTS",
        Code::PermissionDenied => "PERMISSION_DENIED",
        Code::ResourceExhausted => "RESOURCE_EXHAUSTED",
        Code::FailedPrecondition => "FAILED_PRECONDITION",
        Code::Aborted => "ABORTED",
        Code::OutOfRange => "OUT_OF_RANGE",
        Code::Unimplemented => "UNIMPLEMENTED",
        Code::Internal => "INTERNAL",
        Code::Unavailable => "UNAVAILABLE",
        Code::DataLoss => "DATA_LOSS",
        Code::Unauthenticated => "UNAUTHENTICATED",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_counts_once_by_its_method_and_its_end() {
        let metrics = Metrics::new();
        let mut call = Call::begin(metrics.clone(), "/resqlite.v1.ReSqlite/Query");
        assert_eq!(metrics.requests_under_way.get(), 1);
        call.code = Code::Ok;
        drop(call);
        assert_eq!(metrics.requests_under_way.get(), 0);
        assert_eq!(metrics.requests.with_label_values(&["Query", "OK"]).get(), 1);
        assert_eq!(metrics.request.with_label_values(&["Query"]).get_sample_count(), 1);
    }

    #[test]
    fn a_client_that_goes_away_and_a_made_up_method_have_their_own_places() {
        let metrics = Metrics::new();
        drop(Call::begin(metrics.clone(), "/resqlite.v1.ReSqlite/Run"));
        assert_eq!(metrics.requests.with_label_values(&["Run", "CANCELLED"]).get(), 1);
        let mut call = Call::begin(metrics.clone(), "/resqlite.v1.ReSqlite/MadeUp");
        call.code = Code::Unimplemented;
        drop(call);
        drop(Call::begin(metrics.clone(), "/grpc.health.v1.Health/Watch"));
        assert_eq!(metrics.requests.with_label_values(&["other", "UNIMPLEMENTED"]).get(), 1);
        // It went away before it could be told that there is no such method.
        drop(Call::begin(metrics.clone(), "/resqlite.v1.ReSqlite/MadeUpToo"));
        assert_eq!(metrics.requests.with_label_values(&["other", "CANCELLED"]).get(), 2);
    }
}
