//! Accepts connections and does the handshakes, for a gRPC server.
//!
//! A handshake that hangs holds up nobody: many are under way at once, each has a
//! deadline, and where there are too many the oldest gives way to the next that comes.

use std::{
    collections::VecDeque,
    io,
    net::SocketAddr,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::{Duration, Instant},
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream},
    task::{AbortHandle, JoinSet},
    time::{Sleep, sleep, timeout},
};
use tokio_rustls::{TlsAcceptor, rustls::ServerConfig, server::TlsStream};
use tokio_stream::Stream;
use tonic::transport::server::Connected;

use super::names::Subject;

/// How long a handshake may take.
const HANDSHAKE_WITHIN: Duration = Duration::from_secs(10);
/// How many handshakes are under way at most.
const MAX_HANDSHAKES: usize = 512;
/// After an error of accept(2), such as no more file descriptors, before the next try.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// Failed handshakes are logged at this pace at most: they cost a stranger nothing.
const COMPLAIN_EVERY: Duration = Duration::from_secs(1);

/// Who is at the other end of a connection; an extension of every request that comes over it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Caller {
    /// Where it came from.
    pub address: SocketAddr,
    /// What its certificate says, if it has shown one: checked already.
    pub certificate: Option<Arc<Subject>>,
}

impl Caller {
    /// The user that a client's certificate names.
    pub fn user(&self) -> Option<&str> {
        self.certificate.as_ref()?.common_name.as_deref()
    }

    /// The node that a peer's certificate names.
    pub fn node(&self) -> Option<u64> {
        Some(self.certificate.as_ref()?.nodes.first()?.id)
    }
}

type CurrentConfig = Box<dyn Fn() -> Arc<ServerConfig> + Send>;

/// The stream of connections that a gRPC server takes.
pub struct Incoming {
    listener: TcpListener,
    /// `None` for plain text. Asked for each connection, so that a new certificate counts at once.
    tls: Option<CurrentConfig>,
    handshakes: JoinSet<Handshake>,
    /// In the order of their beginnings; some may have ended.
    order: VecDeque<AbortHandle>,
    pause: Option<Pin<Box<Sleep>>>,
    complained: Option<Instant>,
}

type Handshake = Result<Connection, (SocketAddr, io::Error)>;

impl Incoming {
    /// Takes what comes to this listener as it is.
    pub fn plain(listener: TcpListener) -> Self {
        Self::new(listener, None)
    }

    /// Takes only who completes a handshake.
    pub fn tls(listener: TcpListener, config: impl Fn() -> Arc<ServerConfig> + Send + 'static) -> Self {
        Self::new(listener, Some(Box::new(config)))
    }

    fn new(listener: TcpListener, tls: Option<CurrentConfig>) -> Self {
        Self {
            listener,
            tls,
            handshakes: JoinSet::new(),
            order: VecDeque::new(),
            pause: None,
            complained: None,
        }
    }

    fn begin_handshake(&mut self, stream: TcpStream, address: SocketAddr, config: Arc<ServerConfig>) {
        self.order.retain(|handshake| !handshake.is_finished());
        if self.order.len() >= MAX_HANDSHAKES
            && let Some(oldest) = self.order.pop_front()
        {
            oldest.abort();
        }
        let handshake = self.handshakes.spawn(async move {
            match timeout(HANDSHAKE_WITHIN, TlsAcceptor::from(config).accept(stream)).await {
                Ok(Ok(stream)) => Ok(Connection::secured(stream, address)),
                Ok(Err(error)) => Err((address, error)),
                Err(_) => Err((address, io::Error::new(io::ErrorKind::TimedOut, "it took too long"))),
            }
        });
        self.order.push_back(handshake);
    }

    fn complain(&mut self, address: SocketAddr, error: &io::Error) {
        if self.complained.is_some_and(|at| at.elapsed() < COMPLAIN_EVERY) {
            return;
        }
        self.complained = Some(Instant::now());
        let hint = match error.kind() {
            io::ErrorKind::InvalidData if error.to_string().contains("InvalidContentType") => {
                " (it speaks plain text?)"
            }
            _ => "",
        };
        tracing::warn!(%address, %error, "a TLS handshake failed{hint}");
    }

    /// The next connection from the listener: `Some` if it is ready for use as it is.
    fn poll_accept(&mut self, cx: &mut Context<'_>) -> Poll<Option<Connection>> {
        if let Some(pause) = &mut self.pause {
            ready!(pause.as_mut().poll(cx));
            self.pause = None;
        }
        let (stream, address) = match ready!(self.listener.poll_accept(cx)) {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection; trying again");
                self.pause = Some(Box::pin(sleep(ACCEPT_PAUSE)));
                return Poll::Ready(None);
            }
        };
        // What has gathered is sent at once. A failure means that the connection is gone already.
        let _ = stream.set_nodelay(true);
        let Some(config) = self.tls.as_ref().map(|current| current()) else {
            let caller = Caller { address, certificate: None };
            return Poll::Ready(Some(Connection { stream: Transport::Plain(stream), caller }));
        };
        self.begin_handshake(stream, address, config);
        Poll::Ready(None)
    }
}

impl Stream for Incoming {
    type Item = io::Result<Connection>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        loop {
            match self.handshakes.poll_join_next(cx) {
                Poll::Ready(Some(Ok(Ok(connection)))) => return Poll::Ready(Some(Ok(connection))),
                Poll::Ready(Some(Ok(Err((address, error))))) => {
                    self.complain(address, &error);
                    continue;
                }
                // It gave way to others.
                Poll::Ready(Some(Err(_aborted))) => continue,
                Poll::Ready(None) | Poll::Pending => {}
            }
            if let Some(connection) = ready!(self.poll_accept(cx)) {
                return Poll::Ready(Some(Ok(connection)));
            }
        }
    }
}

/// A connection that a gRPC server may serve.
#[derive(Debug)]
pub struct Connection {
    stream: Transport,
    caller: Caller,
}

#[derive(Debug)]
enum Transport {
    Plain(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
}

impl Connection {
    fn secured(stream: TlsStream<TcpStream>, address: SocketAddr) -> Self {
        let shown = stream.get_ref().1.peer_certificates().and_then(|chain| chain.first());
        // It was read before, when it was verified.
        let certificate = shown.and_then(|shown| Subject::of(shown).ok()).map(Arc::new);
        Self { stream: Transport::Tls(Box::new(stream)), caller: Caller { address, certificate } }
    }
}

impl Connected for Connection {
    type ConnectInfo = Caller;

    fn connect_info(&self) -> Caller {
        self.caller.clone()
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match &mut self.stream {
            Transport::Plain(stream) => Pin::new(stream).poll_read(cx, buffer),
            Transport::Tls(stream) => Pin::new(stream).poll_read(cx, buffer),
        }
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match &mut self.stream {
            Transport::Plain(stream) => Pin::new(stream).poll_write(cx, bytes),
            Transport::Tls(stream) => Pin::new(stream).poll_write(cx, bytes),
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.stream {
            Transport::Plain(stream) => Pin::new(stream).poll_flush(cx),
            Transport::Tls(stream) => Pin::new(stream).poll_flush(cx),
        }
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.stream {
            Transport::Plain(stream) => Pin::new(stream).poll_shutdown(cx),
            Transport::Tls(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match &mut self.stream {
            Transport::Plain(stream) => Pin::new(stream).poll_write_vectored(cx, bytes),
            Transport::Tls(stream) => Pin::new(stream).poll_write_vectored(cx, bytes),
        }
    }

    fn is_write_vectored(&self) -> bool {
        match &self.stream {
            Transport::Plain(stream) => stream.is_write_vectored(),
            Transport::Tls(stream) => stream.is_write_vectored(),
        }
    }
}
