//! Accepts connections and does the handshakes, for a gRPC server.
//!
//! A handshake that hangs holds up nobody: many are under way at once, and each holds a seat
//! ([`super::admission`]), which it loses in time, or to the next that comes where there are too many.

use std::{
    future::Future,
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
    task::JoinSet,
    time::{Interval, MissedTickBehavior, Sleep, interval, sleep},
};
use tokio_rustls::{TlsAcceptor, rustls::ServerConfig, server::TlsStream};
use tokio_stream::Stream;
use tonic::transport::server::Connected;

use super::{
    admission::{Admission, Closing, Limit, Seat},
    names::Subject,
};

/// How often those are closed whose time is over.
const SWEEP_EVERY: Duration = Duration::from_secs(1);
/// HTTP/2 begins with so many bytes (RFC 9113, section 3.4). From then on its pings tell who is alive.
const PREFACE_BYTES: usize = 24;
/// After an error of accept(2), such as no more file descriptors, before the next try.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// Failed handshakes, and refused connections, are logged at this pace at most: they cost a stranger nothing.
const COMPLAIN_EVERY: Duration = Duration::from_secs(1);

/// Who is at the other end of a connection; an extension of every request that comes over it.
#[derive(Clone, Debug)]
pub struct Caller {
    /// Where it came from.
    pub address: SocketAddr,
    /// What its certificate says, if it has shown one: checked already.
    pub certificate: Option<Arc<Subject>>,
    /// The connection's, which is to be told of its calls.
    pub seat: Seat,
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
    admission: Admission,
    sweep: Interval,
    handshakes: JoinSet<Handshake>,
    pause: Option<Pin<Box<Sleep>>>,
    complained: Option<Instant>,
}

/// `None`: it has lost its seat.
type Handshake = Option<Result<Connection, (SocketAddr, io::Error)>>;

impl Incoming {
    /// Takes what comes to this listener as it is.
    pub fn plain(listener: TcpListener, admission: Admission) -> Self {
        Self::new(listener, admission, None)
    }

    /// Takes only who completes a handshake.
    pub fn tls(
        listener: TcpListener,
        admission: Admission,
        config: impl Fn() -> Arc<ServerConfig> + Send + 'static,
    ) -> Self {
        Self::new(listener, admission, Some(Box::new(config)))
    }

    fn new(listener: TcpListener, admission: Admission, tls: Option<CurrentConfig>) -> Self {
        let mut sweep = interval(SWEEP_EVERY);
        sweep.set_missed_tick_behavior(MissedTickBehavior::Delay);
        Self { listener, tls, admission, sweep, handshakes: JoinSet::new(), pause: None, complained: None }
    }

    fn begin_handshake(&mut self, accepted: Accepted, config: Arc<ServerConfig>) {
        let Accepted { stream, address, seat, mut closing } = accepted;
        self.handshakes.spawn(async move {
            let shaken = tokio::select! {
                shaken = TlsAcceptor::from(config).accept(stream) => shaken,
                () = &mut closing => return None,
            };
            Some(match shaken {
                Ok(stream) => Ok(Connection::secured(stream, address, seat, closing)),
                Err(error) => Err((address, error)),
            })
        });
    }

    fn may_complain(&mut self) -> bool {
        let may = self.complained.is_none_or(|at| at.elapsed() >= COMPLAIN_EVERY);
        if may {
            self.complained = Some(Instant::now());
        }
        may
    }

    fn turn_away(&mut self, address: SocketAddr, limit: Limit) {
        if self.may_complain() {
            tracing::warn!(
                %address,
                "a connection was turned away: all that {} allows have calls under way; if it is no flood, raise it",
                limit.name()
            );
        }
    }

    fn complain(&mut self, address: SocketAddr, error: &io::Error) {
        if !self.may_complain() {
            return;
        }
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
        let (seat, closing) = match self.admission.admit(address.ip(), Instant::now()) {
            Ok(admitted) => admitted,
            // Closed without a word: an answer to one of so many would cost more than the refusal saves.
            Err(limit) => {
                self.turn_away(address, limit);
                return Poll::Ready(None);
            }
        };
        // What has gathered is sent at once. A failure means that the connection is gone already.
        let _ = stream.set_nodelay(true);
        let accepted = Accepted { stream, address, seat, closing };
        match self.tls.as_ref().map(|current| current()) {
            None => Poll::Ready(Some(Connection::plain(accepted))),
            Some(config) => {
                self.begin_handshake(accepted, config);
                Poll::Ready(None)
            }
        }
    }
}

impl Stream for Incoming {
    type Item = io::Result<Connection>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        while self.sweep.poll_tick(cx).is_ready() {
            self.admission.sweep(Instant::now());
        }
        loop {
            match self.handshakes.poll_join_next(cx) {
                Poll::Ready(Some(Ok(Some(Ok(connection))))) => return Poll::Ready(Some(Ok(connection))),
                Poll::Ready(Some(Ok(Some(Err((address, error)))))) => {
                    self.complain(address, &error);
                    continue;
                }
                // It lost its seat, or the runtime is ending.
                Poll::Ready(Some(Ok(None) | Err(_))) => continue,
                Poll::Ready(None) | Poll::Pending => {}
            }
            if let Some(connection) = ready!(self.poll_accept(cx)) {
                return Poll::Ready(Some(Ok(connection)));
            }
        }
    }
}

/// A connection that has a seat.
struct Accepted {
    stream: TcpStream,
    address: SocketAddr,
    seat: Seat,
    closing: Closing,
}

/// A connection that a gRPC server may serve.
#[derive(Debug)]
pub struct Connection {
    stream: Transport,
    caller: Caller,
    closing: Closing,
    /// Until HTTP/2's beginning is complete.
    preface_bytes_left: usize,
}

#[derive(Debug)]
enum Transport {
    Plain(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
}

impl Connection {
    fn plain(accepted: Accepted) -> Self {
        let Accepted { stream, address, seat, closing } = accepted;
        let caller = Caller { address, certificate: None, seat };
        Self { stream: Transport::Plain(stream), caller, closing, preface_bytes_left: PREFACE_BYTES }
    }

    fn secured(stream: TlsStream<TcpStream>, address: SocketAddr, seat: Seat, closing: Closing) -> Self {
        let shown = stream.get_ref().1.peer_certificates().and_then(|chain| chain.first());
        // It was read before, when it was verified.
        let certificate = shown.and_then(|shown| Subject::of(shown).ok()).map(Arc::new);
        let caller = Caller { address, certificate, seat };
        let stream = Transport::Tls(Box::new(stream));
        Self { stream, caller, closing, preface_bytes_left: PREFACE_BYTES }
    }

    /// An error once the seat is lost; until then whoever polls is woken when that happens.
    fn check_seat(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        match Pin::new(&mut self.closing).poll(cx) {
            Poll::Pending => Ok(()),
            Poll::Ready(()) => Err(io::Error::new(io::ErrorKind::ConnectionAborted, "it gave way to others")),
        }
    }

    fn received(&mut self, bytes: usize) {
        if self.preface_bytes_left == 0 {
            return;
        }
        self.preface_bytes_left = self.preface_bytes_left.saturating_sub(bytes);
        if self.preface_bytes_left == 0 {
            self.caller.seat.speaks();
        }
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
        self.check_seat(cx)?;
        let before = buffer.filled().len();
        let read = match &mut self.stream {
            Transport::Plain(stream) => Pin::new(stream).poll_read(cx, buffer),
            Transport::Tls(stream) => Pin::new(stream).poll_read(cx, buffer),
        };
        self.received(buffer.filled().len() - before);
        read
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.check_seat(cx)?;
        match &mut self.stream {
            Transport::Plain(stream) => Pin::new(stream).poll_write(cx, bytes),
            Transport::Tls(stream) => Pin::new(stream).poll_write(cx, bytes),
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.check_seat(cx)?;
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
        self.check_seat(cx)?;
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
