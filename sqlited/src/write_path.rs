//! A write, from a client's request to its reply: name it, propose it, propose
//! it again while that is of use, and wait until it was executed here.
//!
//! Proposing again is safe because the request keeps its id: whoever executes
//! it a second time finds it applied. What matters is what a client is told:
//! UNAVAILABLE only when the write was certainly not applied and never will
//! be; DEADLINE_EXCEEDED when nobody can know. It knows nothing of SQL.

use std::{
    collections::BTreeSet,
    pin::pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use bytes::Bytes;
use prometheus::Histogram;
use prost::Message;
use resqlite::{
    api::{LoggedRequest, ReadSet, RequestId, StoredReply, logged_request::Body},
    daemon::Shutdown,
};
use tokio::{
    sync::{Semaphore, watch},
    time::{Instant, sleep_until, timeout},
};
use tonic::Status;

use crate::{
    auth::Caller,
    facts::Facts,
    limits,
    raft_link::{LinkState, Outcome, RaftLink},
    waiters::{Waiter, Waiters},
};

/// A client's sequence is multiplied by this much, to make room for the parts of its script.
const PARTS_PER_SEQUENCE: u64 = 1 << 24;
/// The largest sequence that a client may use.
const MAX_SEQUENCE: u64 = u64::MAX / PARTS_PER_SEQUENCE;
/// The first pause before proposing again what was refused.
const MIN_RETRY: Duration = Duration::from_millis(5);

/// What every write of this node has in common.
#[derive(Clone, Copy, Debug)]
pub struct WriteSettings {
    /// Of the execution core of this program.
    pub execution_version: u64,
    /// Of [`LoggedRequest`].
    pub format: u32,
    /// The largest log entry.
    pub max_request_bytes: usize,
    /// Virtual machine steps for each request.
    pub step_budget: u64,
    /// The largest result.
    pub result_limit_bytes: u64,
    /// The cluster's election timeout.
    pub election_timeout: Duration,
}

/// What a write is called.
#[derive(Clone, Debug)]
pub enum WriteId {
    /// The server names it.
    ServerMade,
    /// The client has named it; the part is the number of the first statement, from 0, in the client's request.
    ClientMade {
        /// As it came.
        id: RequestId,
        /// Tells the parts of one script apart.
        part: usize,
    },
}

/// Proposes the writes of this node.
#[derive(Debug)]
pub struct WritePath {
    link: RaftLink,
    waiters: Arc<Waiters>,
    facts: Facts,
    settings: WriteSettings,
    own_ids: OwnIds,
    bytes_waiting: Semaphore,
    shutdown: Shutdown,
    /// Notes how long writes take that were applied.
    latency: Histogram,
}

impl WritePath {
    /// Fails only when the operating system has no entropy.
    pub fn new(
        link: RaftLink,
        waiters: Arc<Waiters>,
        facts: Facts,
        settings: WriteSettings,
        shutdown: Shutdown,
        latency: Histogram,
    ) -> Result<Self, getrandom::Error> {
        let own_ids = OwnIds::new()?;
        let bytes_waiting = Semaphore::new(limits::MAX_WRITE_BYTES_WAITING);
        Ok(Self { link, waiters, facts, settings, own_ids, bytes_waiting, shutdown, latency })
    }

    /// Writes on behalf of `caller`, and returns the reply of the execution on this node, which may be an SQL
    /// error. `reads`: only if all of that still holds.
    pub async fn write(
        &self,
        caller: &Caller,
        id: WriteId,
        foreign_keys: bool,
        reads: Option<ReadSet>,
        body: Body,
        deadline: Instant,
    ) -> Result<Arc<StoredReply>, Status> {
        // An id of our own is in use for as long as `own_id` lives.
        let (id, own_id) = match id {
            WriteId::ServerMade => {
                let own_id = self.own_ids.take();
                // The id is new, so nothing of it is in the log yet: the highest index known, also to a node that
                // has yet to catch up.
                let made_at_index = self.facts.applied_index().max(self.link.state().borrow().commit_index);
                let id = RequestId { made_at_index, ..own_id.request_id() };
                (id, Some(own_id))
            }
            WriteId::ClientMade { id, part } => (part_id(id, part)?, None),
        };
        let key = (client_id(&id)?, id.sequence);
        let request = LoggedRequest {
            format: self.settings.format,
            execution_version: self.settings.execution_version,
            id: Some(id),
            server_made_id: own_id.is_some(),
            seed: seed()?,
            foreign_keys,
            step_budget: self.settings.step_budget,
            result_limit_bytes: self.settings.result_limit_bytes,
            reads,
            authority: caller.authority(),
            body: Some(body),
        };
        let payload = self.encoded(&request)?;
        drop(request);

        let room = u32::try_from(payload.len()).ok().map(|bytes| self.bytes_waiting.try_acquire_many(bytes));
        let Some(Ok(_room)) = room else {
            return Err(Status::resource_exhausted("too many bytes of writes are waiting; try again later"));
        };
        let waiter =
            self.waiters.register(key).map_err(|error| Status::resource_exhausted(error.to_string()))?;
        let attempts = Attempts {
            path: self,
            state: self.link.state(),
            deadline,
            maybe_applied: false,
            leaderless_since: None,
            pause: MIN_RETRY,
        };
        let began = Instant::now();
        let reply = attempts.run(payload, waiter).await?;
        self.latency.observe(began.elapsed().as_secs_f64());
        Ok(reply)
    }

    /// Why nothing may be proposed now, whoever asks.
    fn standing_refusal(&self) -> Option<Interruption> {
        if self.shutdown.is_triggered() {
            return Some(Interruption::Shutdown);
        }
        if let Some(why) = self.facts.health() {
            return Some(Interruption::Unhealthy(why));
        }
        self.want_of_room().map(Interruption::OutOfRoom)
    }

    /// Why there is no room for a new write, here or at the leader.
    pub fn want_of_room(&self) -> Option<String> {
        let own = self.facts.room().borrow().shortage.clone();
        own.or_else(|| Some(self.link.state().borrow().writes_refused.clone()).filter(|why| !why.is_empty()))
    }

    fn encoded(&self, request: &LoggedRequest) -> Result<Bytes, Status> {
        let (bytes, limit) = (request.encoded_len(), self.settings.max_request_bytes);
        if bytes > limit {
            return Err(Status::resource_exhausted(format!(
                "the request takes {bytes} bytes in the log, the limit (max_request_bytes) is {limit}: split it"
            )));
        }
        Ok(request.encode_to_vec().into())
    }
}

/// One write's attempts.
struct Attempts<'a> {
    path: &'a WritePath,
    state: watch::Receiver<LinkState>,
    deadline: Instant,
    /// Once an outcome was unknown, no refusal of a later attempt makes it certain again.
    maybe_applied: bool,
    leaderless_since: Option<Instant>,
    pause: Duration,
}

/// What ends the waiting before a reply does.
enum Interruption {
    Deadline,
    Shutdown,
    Unhealthy(String),
    OutOfRoom(String),
}

impl Attempts<'_> {
    async fn run(mut self, payload: Bytes, mut waiter: Waiter) -> Result<Arc<StoredReply>, Status> {
        let path = self.path;
        let interrupted = async |deadline| {
            tokio::select! {
                () = sleep_until(deadline) => Interruption::Deadline,
                () = path.shutdown.wait() => Interruption::Shutdown,
                why = path.facts.unhealthy() => Interruption::Unhealthy(why),
            }
        };
        let mut interrupted = pin!(interrupted(self.deadline));
        loop {
            if let Some(why) = path.standing_refusal() {
                return Err(self.given_up(why, false));
            }
            if !self.state.borrow().connected {
                let connected = tokio::select! {
                    biased;
                    reply = waiter.reply() => return Ok(reply),
                    why = &mut interrupted => return Err(self.given_up(why, false)),
                    connected = self.connected() => connected,
                };
                connected?;
            }
            let outcome = tokio::select! {
                biased;
                reply = waiter.reply() => return Ok(reply),
                why = &mut interrupted => return Err(self.given_up(why, true)),
                outcome = path.link.propose(payload.clone()) => outcome,
            };
            tokio::select! {
                biased;
                reply = waiter.reply() => return Ok(reply),
                why = &mut interrupted => {
                    let under_way = matches!(outcome, Outcome::Committed(_) | Outcome::Unknown);
                    return Err(self.given_up(why, under_way));
                }
                ready = self.after(outcome) => ready?,
            }
            // Replies are given before the index that `after` waits for is published. One that is missing
            // was executed elsewhere and came in a snapshot; asking again finds it if it was kept.
            if let Some(reply) = waiter.try_reply() {
                return Ok(reply);
            }
        }
    }

    /// Waits for what has to happen before the same may be proposed again.
    async fn after(&mut self, outcome: Outcome) -> Result<(), Status> {
        if outcome != Outcome::NoLeader {
            self.leaderless_since = None;
        }
        match outcome {
            Outcome::Committed(index) => {
                self.maybe_applied = true;
                self.path.facts.applied(index).await;
            }
            Outcome::Unknown => self.maybe_applied = true,
            Outcome::TooLarge => {
                return Err(Status::resource_exhausted(
                    "raftd refuses an entry of this size: split the request",
                ));
            }
            Outcome::OutOfRoom => {
                let unnamed =
                    || "the leader, or most members, lack room on their disks: see `resqlite status`".into();
                let why = self.path.want_of_room().unwrap_or_else(unnamed);
                return Err(self.given_up(Interruption::OutOfRoom(why), false));
            }
            Outcome::NoLeader => self.leader().await?,
            Outcome::Overloaded | Outcome::Overwritten | Outcome::ShuttingDown => {
                tokio::time::sleep(self.next_pause()).await;
            }
        }
        Ok(())
    }

    /// Waits for a leader, for a bounded time.
    async fn leader(&mut self) -> Result<(), Status> {
        let since = *self.leaderless_since.get_or_insert_with(Instant::now);
        let patience = self.patience();
        if since.elapsed() < patience || self.maybe_applied {
            let pause = self.next_pause();
            // Known here and refused all the same: a leader that is only being learnt of, or that has just lost.
            if self.state.borrow_and_update().leader_id == 0 {
                let _ = timeout(pause.max(patience / 10), self.state.wait_for(LinkState::has_leader)).await;
            } else {
                let _ = timeout(pause, self.state.changed()).await;
            }
            return Ok(());
        }
        Err(Status::unavailable(format!(
            "no leader for {} ms: most members of the cluster cannot be reached; the write was not applied",
            since.elapsed().as_millis()
        )))
    }

    /// Waits for raftd, for a bounded time.
    async fn connected(&mut self) -> Result<(), Status> {
        let patience = self.patience();
        let connected = timeout(patience, self.state.wait_for(|state| state.connected)).await;
        if connected.is_ok() || self.maybe_applied {
            return Ok(());
        }
        Err(Status::unavailable("raftd beside this node cannot be reached; the write was not applied"))
    }

    fn patience(&self) -> Duration {
        self.path.settings.election_timeout * limits::LEADERLESS_ELECTION_TIMEOUTS
    }

    fn next_pause(&mut self) -> Duration {
        let pause = self.pause;
        self.pause = (pause * 2).min(self.path.settings.election_timeout / 4);
        pause
    }

    fn given_up(&self, why: Interruption, under_way: bool) -> Status {
        let reason = match &why {
            Interruption::Deadline => "the deadline passed".to_owned(),
            Interruption::Shutdown => "this node is shutting down".to_owned(),
            Interruption::Unhealthy(why) => format!("this node cannot execute: {why}"),
            Interruption::OutOfRoom(why) => why.clone(),
        };
        if self.maybe_applied || under_way {
            return Status::deadline_exceeded(format!(
                "{reason}; outcome unknown: safe to retry with the same id"
            ));
        }
        let text = format!("{reason}; the write was not applied");
        match why {
            Interruption::Deadline => Status::deadline_exceeded(text),
            Interruption::Shutdown | Interruption::Unhealthy(_) => Status::unavailable(text),
            Interruption::OutOfRoom(_) => Status::resource_exhausted(text),
        }
    }
}

fn seed() -> Result<Bytes, Status> {
    let mut seed = [0; 16];
    getrandom::fill(&mut seed).map_err(|error| Status::internal(format!("no entropy: {error}")))?;
    Ok(Bytes::copy_from_slice(&seed))
}

fn client_id(id: &RequestId) -> Result<[u8; 16], Status> {
    id.client_id.as_ref().try_into().map_err(|_| {
        Status::invalid_argument(format!("id.client_id has {} bytes instead of 16", id.client_id.len()))
    })
}

/// The id of a part of a client's request. All of a client's sequences are
/// stretched alike, so that they keep their order and their meaning.
fn part_id(id: RequestId, part: usize) -> Result<RequestId, Status> {
    if !(1..=MAX_SEQUENCE).contains(&id.sequence) {
        let sequence = id.sequence;
        return Err(Status::invalid_argument(format!(
            "id.sequence {sequence} is not between 1 and {MAX_SEQUENCE}"
        )));
    }
    if id.acknowledged_below > id.sequence {
        return Err(Status::invalid_argument(
            "id.acknowledged_below is beyond id.sequence: the reply to this request cannot have been received",
        ));
    }
    Ok(RequestId {
        sequence: id.sequence * PARTS_PER_SEQUENCE + part as u64,
        acknowledged_below: id.acknowledged_below * PARTS_PER_SEQUENCE,
        ..id
    })
}

/// Names the writes that their clients do not name.
#[derive(Debug)]
struct OwnIds {
    client_id: Bytes,
    counter: Mutex<Counter>,
}

#[derive(Debug, Default)]
struct Counter {
    last: u64,
    in_use: BTreeSet<u64>,
}

/// One sequence, in use for as long as this lives.
#[derive(Debug)]
struct OwnId<'a> {
    ids: &'a OwnIds,
    sequence: u64,
}

impl OwnIds {
    fn new() -> Result<Self, getrandom::Error> {
        let mut client_id = [0; 16];
        getrandom::fill(&mut client_id)?;
        Ok(Self { client_id: Bytes::copy_from_slice(&client_id), counter: Mutex::default() })
    }

    fn take(&self) -> OwnId<'_> {
        let mut counter = self.lock();
        counter.last += 1;
        let sequence = counter.last;
        counter.in_use.insert(sequence);
        OwnId { ids: self, sequence }
    }

    fn lock(&self) -> MutexGuard<'_, Counter> {
        self.counter.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl OwnId<'_> {
    fn request_id(&self) -> RequestId {
        RequestId {
            client_id: self.ids.client_id.clone(),
            sequence: self.sequence,
            // Nobody will ask again for what is no longer in use.
            acknowledged_below: self.ids.lock().in_use.first().copied().unwrap_or(self.sequence),
            made_at_index: 0,
        }
    }
}

impl Drop for OwnId<'_> {
    fn drop(&mut self) {
        self.ids.lock().in_use.remove(&self.sequence);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_servers_ids_acknowledge_only_what_is_no_longer_in_use() {
        let ids = OwnIds::new().unwrap();
        let (first, second) = (ids.take(), ids.take());
        assert_eq!((second.request_id().sequence, second.request_id().acknowledged_below), (2, 1));
        drop(first);
        assert_eq!(second.request_id().acknowledged_below, 2);
        drop(second);
        assert_eq!(ids.take().request_id().acknowledged_below, 3);
    }

    #[test]
    fn the_parts_of_a_request_stay_between_its_neighbours() {
        let id = |sequence| RequestId { sequence, acknowledged_below: sequence, ..RequestId::default() };
        let last_part = part_id(id(4), limits::MAX_STATEMENTS).unwrap();
        let next = part_id(id(5), 0).unwrap();
        assert!(last_part.sequence < next.sequence);
        assert_eq!(next.acknowledged_below, next.sequence);
        assert!(last_part.sequence < next.acknowledged_below);
    }

    #[test]
    fn ids_out_of_range_are_refused() {
        for (sequence, acknowledged_below) in [(0, 0), (MAX_SEQUENCE + 1, 0), (3, 4)] {
            let id = RequestId { sequence, acknowledged_below, ..RequestId::default() };
            assert_eq!(part_id(id, 0).unwrap_err().code(), tonic::Code::InvalidArgument);
        }
        let id = RequestId { client_id: Bytes::from_static(b"short"), ..RequestId::default() };
        assert!(client_id(&id).unwrap_err().message().contains("5 bytes instead of 16"));
    }
}
