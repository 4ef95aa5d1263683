//! The layer itself, in tower's form: every request passes it before the service that it is for.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use tonic::{
    body::Body,
    codegen::http::{Request, Response, header::AUTHORIZATION},
};
use tower::{Layer, Service};

use super::Authenticator;

/// Puts a [`super::Caller`] into the extensions of each request, or answers it with a refusal.
#[derive(Clone, Debug)]
pub struct AuthLayer {
    authenticator: Arc<Authenticator>,
    local: bool,
}

impl AuthLayer {
    /// For listeners that anybody may reach.
    pub fn new(authenticator: Arc<Authenticator>) -> Self {
        Self { authenticator, local: false }
    }

    /// For the local socket: the file's permissions have let in who may do everything.
    pub fn local(authenticator: Arc<Authenticator>) -> Self {
        Self { authenticator, local: true }
    }
}

impl<S> Layer<S> for AuthLayer {
    type Service = Authenticated<S>;

    fn layer(&self, inner: S) -> Authenticated<S> {
        Authenticated { layer: self.clone(), inner }
    }
}

/// A service behind the layer.
#[derive(Clone, Debug)]
pub struct Authenticated<S> {
    layer: AuthLayer,
    inner: S,
}

impl<S, B> Service<Request<B>> for Authenticated<S>
where
    S: Service<Request<B>, Response = Response<Body>> + Clone + Send + 'static,
    S::Future: Send,
    B: Send + 'static,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<S::Response, S::Error>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, mut request: Request<B>) -> Self::Future {
        // The one that is ready is used up; the clone takes its place (tower's own advice).
        let ready = self.inner.clone();
        let mut inner = std::mem::replace(&mut self.inner, ready);
        let AuthLayer { authenticator, local } = self.layer.clone();
        Box::pin(async move {
            let (path, headers) = (request.uri().path(), request.headers());
            match authenticator.admit(path, headers, request.extensions(), local).await {
                Ok(caller) => {
                    // Whoever logs or forwards a request must not come upon it.
                    request.headers_mut().remove(AUTHORIZATION);
                    request.extensions_mut().insert(caller);
                    inner.call(request).await
                }
                Err(status) => Ok(status.into_http()),
            }
        })
    }
}
