//! Calls a gRPC server, in plain text or over TLS.
//!
//! Each new connection is made with the certificates of that moment.

use std::{fmt, io, sync::Arc};

use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio_rustls::{
    TlsConnector,
    client::TlsStream,
    rustls::{ClientConfig, pki_types::ServerName},
};
use tonic::transport::{Channel, Endpoint, Error, Uri};
use tower::service_fn;

use crate::config::Address;

/// How to reach one server.
#[derive(Clone, Debug)]
pub struct Dial {
    address: Address,
    endpoint: Endpoint,
    tls: Option<Target>,
}

/// Whom to find there.
#[derive(Clone)]
struct Target {
    name: ServerName<'static>,
    config: Arc<dyn Fn() -> Arc<ClientConfig> + Send + Sync>,
}

impl fmt::Debug for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.name.fmt(f)
    }
}

impl Dial {
    /// In plain text.
    pub fn plain(address: Address) -> Result<Self, Error> {
        let endpoint = Endpoint::from_shared(format!("http://{address}"))?;
        Ok(Self { address, endpoint, tls: None })
    }

    /// Over TLS, to whoever proves to be `name`; `config` is asked before each connection.
    pub fn tls(
        address: Address,
        name: ServerName<'static>,
        config: impl Fn() -> Arc<ClientConfig> + Send + Sync + 'static,
    ) -> Result<Self, Error> {
        let endpoint = Endpoint::from_shared(format!("https://{address}"))?;
        Ok(Self { address, endpoint, tls: Some(Target { name, config: Arc::new(config) }) })
    }

    /// The same, with other settings. A connect timeout includes the handshake.
    pub fn with(self, settings: impl FnOnce(Endpoint) -> Endpoint) -> Self {
        Self { endpoint: settings(self.endpoint), ..self }
    }

    /// Connects now.
    pub async fn connect(&self) -> Result<Channel, Error> {
        match self.tls.clone() {
            None => self.endpoint.connect().await,
            Some(target) => self.endpoint.connect_with_connector(connector(&self.address, target)).await,
        }
    }

    /// Connects when the channel is first used, and again whenever the connection broke.
    pub fn connect_lazy(&self) -> Channel {
        match self.tls.clone() {
            None => self.endpoint.connect_lazy(),
            Some(target) => self.endpoint.connect_with_connector_lazy(connector(&self.address, target)),
        }
    }
}

type Secured = TokioIo<TlsStream<TcpStream>>;

fn connector(
    address: &Address,
    target: Target,
) -> impl tower::Service<Uri, Response = Secured, Error = io::Error, Future: Send> + Send + 'static {
    let address = address.clone();
    service_fn(move |_uri: Uri| secure(address.clone(), target.clone()))
}

async fn secure(address: Address, target: Target) -> io::Result<Secured> {
    let stream = TcpStream::connect(address.as_str()).await?;
    stream.set_nodelay(true)?;
    let stream = TlsConnector::from((target.config)()).connect(target.name, stream).await?;
    Ok(TokioIo::new(stream))
}
