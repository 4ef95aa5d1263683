//! What the requests under way may take together: a layer around all services that bounds how many there are, the
//! bytes that they hold, and how long one may dribble in.
//!
//! A request counts from its first byte until its answer is sent. Where there is no room, the oldest that
//! has not come whole gives way, at once to one that is still small, and to a large one after a grace: so those who send
//! parts and stop keep nobody out, and large requests that arrive in earnest do not push each other out in turn.
//! It knows nothing of what a request says.

use std::{
    collections::{BTreeMap, HashMap},
    future::Future,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll, ready},
    time::Duration,
};

use http_body_util::BodyExt;
use hyper::body::{Body as HttpBody, Frame};
use resqlite::{
    config::Limits,
    tls::{Caller, UnderWay},
};
use tokio::{
    sync::oneshot,
    time::{Instant, Sleep, sleep_until},
};
use tonic::{
    Status,
    body::Body,
    codegen::{
        Bytes,
        http::{Request, Response},
    },
};
use tower::{Layer, Service};

use crate::metrics::Metrics;

/// Up to this a request counts as small.
const SMALL_BYTES: usize = 64 << 10;
/// A request that has not come whole after this gives way to a large one, too.
const GRACE: Duration = Duration::from_secs(5);
/// A request that goes on coming at this pace, or faster, may take as long as it takes.
const BYTES_PER_SECOND: u64 = 1 << 10;

/// Bounds what is under way. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Intake {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    limits: Limits,
    /// No message is larger; so a stream of them never holds more than this.
    max_message_bytes: usize,
    metrics: Metrics,
    table: Mutex<Table>,
}

#[derive(Debug, Default)]
struct Table {
    next: u64,
    held_bytes: usize,
    calls: HashMap<u64, usize>,
    /// Those that wait for more of their request, in the order of their beginnings.
    unfinished: BTreeMap<u64, Unfinished>,
}

#[derive(Debug)]
struct Unfinished {
    began: Instant,
    /// Tells the request that it has to give way.
    _end: oneshot::Sender<()>,
}

impl Table {
    /// Ends the oldest request that has not come whole, other than `spared`; `false` if there is none, or none that
    /// began before `latest`.
    fn end_one(&mut self, spared: Option<u64>, latest: Option<Instant>) -> bool {
        let mut oldest = self.unfinished.iter().filter(|(id, _)| Some(**id) != spared);
        let Some((&id, _)) = oldest.next().filter(|(_, it)| latest.is_none_or(|latest| it.began <= latest))
        else {
            return false;
        };
        self.unfinished.remove(&id);
        if let Some(held) = self.calls.get_mut(&id) {
            self.held_bytes -= std::mem::take(held);
        }
        true
    }
}

impl Intake {
    /// Nothing is under way.
    pub fn new(limits: Limits, max_message_bytes: usize, metrics: Metrics) -> Self {
        for limit in ["calls", "request_bytes", "request_seconds"] {
            metrics.refused.with_label_values(&[limit]);
        }
        Self { shared: Arc::new(Shared { limits, max_message_bytes, metrics, table: Mutex::default() }) }
    }

    fn begin(&self, seat: Option<UnderWay>) -> Result<Arc<Call>, Status> {
        let Shared { limits, .. } = &*self.shared;
        let mut table = self.shared.lock();
        if table.calls.len() as u64 >= limits.calls {
            self.shared.refused("calls");
            if !table.end_one(None, None) {
                return Err(Status::resource_exhausted(format!(
                    "{} calls are under way at this node (sqlited.limits.calls): try again later, or at another node",
                    limits.calls
                )));
            }
            // The one that gives way is counted until it has noticed.
        }
        let id = table.next;
        table.next += 1;
        table.calls.insert(id, 0);
        Ok(Arc::new(Call { shared: Arc::clone(&self.shared), id, began: Instant::now(), _seat: seat }))
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Table> {
        // Nothing under the lock can panic half-way.
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn refused(&self, limit: &str) {
        self.metrics.refused.with_label_values(&[limit]).inc();
    }
}

/// One call, from its headers until its answer is sent and nobody holds its request any more.
#[derive(Debug)]
struct Call {
    shared: Arc<Shared>,
    id: u64,
    began: Instant,
    _seat: Option<UnderWay>,
}

impl Call {
    /// Makes room for so many bytes more.
    fn hold(&self, bytes: usize) -> Result<(), Status> {
        let Shared { limits, max_message_bytes, metrics, .. } = &*self.shared;
        let mut table = self.shared.lock();
        let held = table.calls.get(&self.id).copied().unwrap_or_default();
        let holds = (held + bytes).min(*max_message_bytes);
        let latest = if holds <= SMALL_BYTES { None } else { Some(Instant::now() - GRACE) };
        while (table.held_bytes - held + holds) as u64 > limits.request_bytes {
            self.shared.refused("request_bytes");
            if !table.end_one(Some(self.id), latest) {
                return Err(Status::resource_exhausted(format!(
                    "the requests under way at this node have {} bytes together (sqlited.limits.request_bytes): try \
                     again later, or at another node",
                    limits.request_bytes
                )));
            }
        }
        table.held_bytes = table.held_bytes - held + holds;
        table.calls.insert(self.id, holds);
        metrics.request_bytes.set(table.held_bytes as i64);
        Ok(())
    }

    /// It has to wait for more of its request.
    fn wait(&self) -> oneshot::Receiver<()> {
        let (end, ended) = oneshot::channel();
        self.shared.lock().unfinished.insert(self.id, Unfinished { began: self.began, _end: end });
        ended
    }

    /// It waits no longer.
    fn go_on(&self) {
        self.shared.lock().unfinished.remove(&self.id);
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        let mut table = self.shared.lock();
        table.unfinished.remove(&self.id);
        if let Some(held) = table.calls.remove(&self.id) {
            table.held_bytes -= held;
        }
        self.shared.metrics.request_bytes.set(table.held_bytes as i64);
    }
}

/// A request's body whose bytes are counted, and whose sender may not take too long.
struct Counted {
    body: Body,
    call: Arc<Call>,
    received_bytes: u64,
    /// How long it has waited for its sender, all in all.
    waited: Duration,
    waiting: Option<Waiting>,
}

struct Waiting {
    since: Instant,
    deadline: Pin<Box<Sleep>>,
    ended: oneshot::Receiver<()>,
}

impl Counted {
    fn new(body: Body, call: Arc<Call>) -> Self {
        Self { body, call, received_bytes: 0, waited: Duration::ZERO, waiting: None }
    }

    /// More is to come: it is waited for, but not for ever.
    fn poll_patience(&mut self, cx: &mut Context<'_>) -> Poll<Status> {
        let Self { call, received_bytes, waited, waiting, .. } = self;
        let waiting = waiting.get_or_insert_with(|| {
            let allowed = call.shared.limits.request_seconds + *received_bytes / BYTES_PER_SECOND;
            let (since, left) = (Instant::now(), Duration::from_secs(allowed).saturating_sub(*waited));
            Waiting { since, deadline: Box::pin(sleep_until(since + left)), ended: call.wait() }
        });
        if Pin::new(&mut waiting.ended).poll(cx).is_ready() {
            return Poll::Ready(Status::resource_exhausted(
                "this request has not come whole, and gave way to others, for there is no room (sqlited.limits): try \
                 again later, or at another node",
            ));
        }
        ready!(waiting.deadline.as_mut().poll(cx));
        call.shared.refused("request_seconds");
        Poll::Ready(Status::deadline_exceeded(format!(
            "the request has not come whole in time (sqlited.limits.request_seconds): {received_bytes} bytes of it came"
        )))
    }

    fn end_waiting(&mut self) {
        if let Some(waiting) = self.waiting.take() {
            self.waited += waiting.since.elapsed();
            self.call.go_on();
        }
    }
}

impl HttpBody for Counted {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let Poll::Ready(frame) = Pin::new(&mut self.body).poll_frame(cx) else {
            let status = ready!(self.poll_patience(cx));
            self.end_waiting();
            // What came is given up, and whatever else comes with it.
            self.body = Body::empty();
            return Poll::Ready(Some(Err(status)));
        };
        self.end_waiting();
        if let Some(Ok(frame)) = &frame
            && let Some(data) = frame.data_ref()
        {
            self.received_bytes += data.len() as u64;
            self.call.hold(data.len())?;
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }
}

impl<S> Layer<S> for Intake {
    type Service = Bounded<S>;

    fn layer(&self, service: S) -> Bounded<S> {
        Bounded { service, intake: self.clone() }
    }
}

/// A service that gets no more than there is room for.
#[derive(Clone, Debug)]
pub struct Bounded<S> {
    service: S,
    intake: Intake,
}

impl<S> Service<Request<Body>> for Bounded<S>
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
        let seat = request.extensions().get::<Caller>().map(|caller| caller.seat.call());
        let call = match self.intake.begin(seat) {
            Ok(call) => call,
            Err(status) => return Box::pin(async move { Ok(status.into_http()) }),
        };
        let body = |body| Body::new(Counted::new(body, Arc::clone(&call)));
        let answer = self.service.call(request.map(body));
        Box::pin(async move {
            let (head, body) = answer.await?.into_parts();
            // It goes with the last frame of the answer, or with whoever wanted it.
            let body = body.map_frame(move |frame| {
                let _under_way = &call;
                frame
            });
            Ok(Response::from_parts(head, Body::new(body)))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tonic::Code;

    const MESSAGE: usize = 1 << 20;

    fn intake(calls: u64, request_bytes: u64) -> Intake {
        let limits = Limits { calls, request_bytes, ..Limits::default() };
        Intake::new(limits, MESSAGE, Metrics::new())
    }

    fn has_to_give_way(ended: &mut oneshot::Receiver<()>) -> bool {
        matches!(ended.try_recv(), Err(oneshot::error::TryRecvError::Closed))
    }

    #[tokio::test]
    async fn a_small_request_takes_room_from_the_oldest_that_has_not_come_whole() {
        let intake = intake(10, 2 * MESSAGE as u64);
        let (first, second) = (intake.begin(None).unwrap(), intake.begin(None).unwrap());
        first.hold(MESSAGE).unwrap();
        second.hold(MESSAGE).unwrap();
        let (mut first_ended, mut second_ended) = (first.wait(), second.wait());
        let small = intake.begin(None).unwrap();
        small.hold(100).unwrap();
        assert!(has_to_give_way(&mut first_ended) && !has_to_give_way(&mut second_ended));
        // A large one waits for its turn: those who send in earnest must not push each other out.
        let large = intake.begin(None).unwrap();
        assert_eq!(large.hold(MESSAGE).unwrap_err().code(), Code::ResourceExhausted);
        assert!(!has_to_give_way(&mut second_ended));
    }

    #[tokio::test(start_paused = true)]
    async fn a_large_request_takes_room_from_one_that_has_not_come_whole_for_long() {
        let intake = intake(10, 2 * MESSAGE as u64);
        let (slow, large) = (intake.begin(None).unwrap(), intake.begin(None).unwrap());
        slow.hold(MESSAGE).unwrap();
        large.hold(MESSAGE).unwrap();
        let mut ended = slow.wait();
        let another = intake.begin(None).unwrap();
        tokio::time::advance(GRACE).await;
        another.hold(MESSAGE).unwrap();
        assert!(has_to_give_way(&mut ended));
        assert_eq!(intake.shared.metrics.refused.with_label_values(&["request_bytes"]).get(), 1);
    }

    #[tokio::test]
    async fn what_has_come_whole_is_never_taken_back_and_its_room_is_free_once_it_is_answered() {
        let intake = intake(10, 2 * MESSAGE as u64);
        let calls: Vec<_> = (0..2).map(|_| intake.begin(None).unwrap()).collect();
        for call in &calls {
            call.hold(MESSAGE).unwrap();
        }
        let another = intake.begin(None).unwrap();
        assert_eq!(another.hold(1).unwrap_err().code(), Code::ResourceExhausted);
        drop(calls);
        another.hold(MESSAGE).unwrap();
        drop(another);
        let table = intake.shared.lock();
        assert!(table.held_bytes == 0 && table.calls.is_empty() && table.unfinished.is_empty());
    }

    #[tokio::test]
    async fn a_stream_of_messages_holds_one_of_them() {
        let intake = intake(10, 2 * MESSAGE as u64);
        let stream = intake.begin(None).unwrap();
        for _ in 0..100 {
            stream.hold(MESSAGE).unwrap();
        }
        assert_eq!(intake.shared.lock().held_bytes, MESSAGE);
    }

    #[tokio::test]
    async fn calls_have_a_bound_and_those_that_dribble_give_way() {
        let intake = intake(8, 2 * MESSAGE as u64);
        let calls: Vec<_> = (0..8).map(|_| intake.begin(None).unwrap()).collect();
        let refused = intake.begin(None).unwrap_err();
        assert!(refused.message().contains("8 calls are under way"), "{refused}");
        let mut ended = calls[3].wait();
        let _another = intake.begin(None).unwrap();
        assert!(has_to_give_way(&mut ended));
    }

    #[tokio::test(start_paused = true)]
    async fn a_request_that_dribbles_in_is_ended_and_one_that_comes_at_a_pace_is_not() {
        for (pause, bytes, comes_whole) in [(2, 10_usize, false), (2, 4 << 10, true)] {
            let intake = intake(8, 1 << 30);
            let (frames, received) = tokio::sync::mpsc::channel::<Result<Bytes, Status>>(1);
            let frames_in = tokio_stream::StreamExt::map(
                tokio_stream::wrappers::ReceiverStream::new(received),
                |bytes| bytes.map(Frame::data),
            );
            let body = Body::new(http_body_util::StreamBody::new(frames_in));
            let counted = Counted::new(body, intake.begin(None).unwrap());
            let sender = tokio::spawn(async move {
                for _ in 0..50 {
                    tokio::time::sleep(Duration::from_secs(pause)).await;
                    if frames.send(Ok(vec![0; bytes].into())).await.is_err() {
                        return;
                    }
                }
            });
            let outcome = counted.collect().await;
            assert_eq!(outcome.is_ok(), comes_whole);
            if let Err(status) = outcome {
                assert_eq!(status.code(), Code::DeadlineExceeded);
                assert!(status.message().contains("request_seconds"), "{status}");
            }
            sender.await.unwrap();
        }
    }
}
