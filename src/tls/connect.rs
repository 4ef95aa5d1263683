//! Calls a gRPC server, in plain text or over TLS.
//!
//! Each new connection is made with the certificates of that moment.

use std::{fmt, io, sync::Arc, time::Duration};

use hyper_util::rt::TokioIo;
use tokio::{
    io::{AsyncBufReadExt, BufReader},
    net::TcpStream,
    time::timeout,
};
use tokio_rustls::{
    TlsConnector,
    client::TlsStream,
    rustls::{ClientConfig, pki_types::ServerName},
};
use tonic::transport::{Channel, Endpoint, Error, Uri};
use tower::service_fn;

use crate::config::Address;

/// For how long we wait for the server's first word after the handshake.
const FIRST_WORD_WITHIN: Duration = Duration::from_millis(500);

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

type Secured = TokioIo<BufReader<TlsStream<TcpStream>>>;

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
    // In TLS 1.3 a client is through before the server has looked at its certificate (RFC 8446, section 2). An HTTP/2
    // server speaks at once, so its first word tells: an alert then is the reason why there is no connection, and no
    // request has been sent on it. A server that waits for us gets its way.
    let mut stream = BufReader::new(stream);
    match timeout(FIRST_WORD_WITHIN, stream.fill_buf()).await {
        Ok(Ok([])) => Err(io::Error::new(io::ErrorKind::UnexpectedEof, "closed right after the handshake")),
        Ok(Err(error)) => Err(error),
        Ok(Ok(_)) | Err(_) => Ok(TokioIo::new(stream)),
    }
}
