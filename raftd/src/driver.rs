//! The event loop around the Raft core.
//!
//! One task owns the core. It takes what has gathered (messages, proposals,
//! reads, durable writes, ticks), steps the core through all of it, and then
//! carries out what the core is ready for:
//!
//! - entries and hard state go to the log writer's thread,
//! - messages that need nothing durable go to the peers at once,
//! - messages that promise something wait until that is durable,
//! - followers of the log are told how far it is committed and durable here.
//!
//! It never looks inside a payload, and it never waits for a disk or a peer.

mod handle;

use std::{
    collections::{BTreeMap, VecDeque},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use bytes::Bytes;
use raft::{
    Appended, DropReason, Index, Log, LogError, Message, Node, NodeId, ProposalResult, ProposeError, Ready,
    Role, SnapshotFailed, SoftState, Standing, StepError, Term,
};
use resqlite::{
    api::{PeerMessage, ProposalRefusal, ProposalUnknown, proposal_outcome::Outcome},
    daemon::Shutdown,
};
use tokio::{
    sync::{mpsc, oneshot, watch},
    time::{Instant, MissedTickBehavior},
};

use crate::{
    compaction::Compaction,
    convert::{self, Envelope},
    metrics::Metrics,
    peer::Peer,
    proposals::{Proposals, Waiter, refused},
    room::{MembersRoom, Shortage},
    snapshots::Snapshots,
    store::{LogReader, LogWriter, StoreError, Write},
};

pub use self::handle::{DriverHandle, Input, Progress};

/// How many inputs one turn of the loop takes before it lets the core act.
const INPUTS_PER_TURN: usize = 512;

/// How long to wait before a snapshot that failed is tried again; twice as long after each further failure, for
/// each attempt costs a copy of the database.
const MIN_SNAPSHOT_RETRY: Duration = Duration::from_secs(1);
const MAX_SNAPSHOT_RETRY: Duration = Duration::from_secs(30);

/// How long a leader without room waits before it tries again to leave the lead to another member.
const HAND_OVER_AGAIN: Duration = Duration::from_secs(5);

/// Why the loop ended before it was asked to.
#[derive(Debug, thiserror::Error)]
pub enum DriverError {
    /// The log cannot be written or read: nothing more may be promised.
    #[error("the log failed, so this node stops: {0}")]
    Store(#[from] StoreError),
    /// The core cannot read its log.
    #[error("this node stops: {0}")]
    Log(#[from] LogError),
    /// A message showed that this node, or another one, cannot be trusted.
    #[error("this node stops, on a message of node {peer}: {source}")]
    Fatal {
        /// Whose message it was.
        peer: NodeId,
        /// What it showed.
        source: StepError,
    },
}

/// How time passes.
#[derive(Clone, Copy, Debug)]
pub struct Timing {
    /// One tick of the core.
    pub tick: Duration,
    /// How long a leader that stops waits for its successor.
    pub handover_patience: Duration,
}

/// The loop's state. [`Driver::run`] consumes it.
pub struct Driver {
    node: Node,
    envelope: Envelope,
    timing: Timing,
    inputs: mpsc::Receiver<Input>,
    durable: mpsc::UnboundedReceiver<Result<u64, StoreError>>,
    writer: LogWriter,
    reader: LogReader,
    peers: BTreeMap<NodeId, Peer>,
    progress: watch::Sender<Progress>,
    snapshots: Snapshots,
    compaction: Compaction,
    room: MembersRoom,
    shortages: Shortages,
    /// When this node last tried to leave the lead to one with room.
    handed_over_at: Option<Instant>,
    handle: DriverHandle,
    metrics: Metrics,
    proposals: Proposals,
    gathered: Gathered,
    soft_state: SoftState,
    standing: Standing,
    /// How long to wait after the next failure, where the last attempt failed.
    snapshot_retries: BTreeMap<NodeId, Duration>,
    reads: BTreeMap<u64, oneshot::Sender<Option<Index>>>,
    last_read_id: u64,
    /// At most one waiting request for each peer and kind of vote.
    votes: BTreeMap<(NodeId, bool), oneshot::Sender<PeerMessage>>,
    /// Messages that wait for a Ready to be durable, oldest first.
    unpersisted: VecDeque<(u64, Vec<Message>)>,
}

/// The local proposals of one turn: they become one batch for the core.
#[derive(Default)]
struct Gathered {
    waiters: Vec<Waiter>,
    payloads: Vec<Bytes>,
}

/// Where shortages of room are told.
#[derive(Debug)]
pub struct Shortages {
    /// To the peers: this node's own.
    pub own: watch::Sender<Shortage>,
    /// To the state machine: why its proposals are refused.
    pub refusal: watch::Sender<Shortage>,
}

/// What a [`Driver`] is made of.
pub struct DriverParts {
    /// The core, ready to go.
    pub node: Node,
    /// Stamped on every message.
    pub envelope: Envelope,
    /// How time passes.
    pub timing: Timing,
    /// From [`DriverHandle::new`].
    pub inputs: mpsc::Receiver<Input>,
    /// What the log writer reports: the number of the last durable Ready.
    pub durable: mpsc::UnboundedReceiver<Result<u64, StoreError>>,
    /// Makes entries and hard state durable, in order.
    pub writer: LogWriter,
    /// Reads the log.
    pub reader: LogReader,
    /// The other members.
    pub peers: BTreeMap<NodeId, Peer>,
    /// Told of every change.
    pub progress: watch::Sender<Progress>,
    /// Relays snapshots.
    pub snapshots: Snapshots,
    /// Decides what may be discarded.
    pub compaction: Compaction,
    /// Knows who has room.
    pub room: MembersRoom,
    /// Where shortages of room are told.
    pub shortages: Shortages,
    /// For the tasks that the loop starts.
    pub handle: DriverHandle,
    /// What is counted.
    pub metrics: Metrics,
}

impl Driver {
    /// Puts the parts together.
    pub fn new(parts: DriverParts) -> Self {
        let DriverParts { node, envelope, timing, inputs, durable, writer, reader, .. } = parts;
        let DriverParts { peers, progress, snapshots, compaction, room, shortages, handle, metrics, .. } =
            parts;
        let standing = node.status().standing;
        let soft_state = SoftState { role: node.role(), term: node.status().term, leader: node.leader() };
        Self {
            node,
            envelope,
            timing,
            inputs,
            durable,
            writer,
            reader,
            peers,
            progress,
            snapshots,
            compaction,
            room,
            shortages,
            handed_over_at: None,
            handle,
            proposals: Proposals::new(metrics.commit.clone()),
            metrics,
            gathered: Gathered::default(),
            soft_state,
            standing,
            snapshot_retries: BTreeMap::new(),
            reads: BTreeMap::new(),
            last_read_id: 0,
            votes: BTreeMap::new(),
            unpersisted: VecDeque::new(),
        }
    }

    /// Runs until `shutdown`: then a leader hands leadership over, and the log is closed cleanly.
    pub async fn run(mut self, shutdown: Shutdown) -> Result<(), DriverError> {
        let result = self.turn_until(&shutdown).await;
        self.proposals.abandon();
        // Even after an error: what is queued is either made durable or never reported.
        let closed = self.writer.shutdown();
        result.and(closed.map_err(DriverError::from))
    }

    async fn turn_until(&mut self, shutdown: &Shutdown) -> Result<(), DriverError> {
        let mut ticks = tokio::time::interval(self.timing.tick);
        // After a pause of the whole process, time starts anew: a burst of
        // ticks would only make a follower campaign against a live leader.
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut inputs = Vec::with_capacity(INPUTS_PER_TURN);
        let mut stop_at = None;
        let stop = shutdown.wait();
        tokio::pin!(stop);
        loop {
            self.node.set_clock(now_ms());
            self.carry_out()?;
            if let Some(at) = stop_at
                && (!self.is_leader_with_peers() || Instant::now() >= at)
            {
                return Ok(());
            }
            tokio::select! {
                // Time comes first: inputs that never cease must not keep a leader from noticing that its
                // quorum is silent, nor anybody from stopping. Ticks are few, so they hold nothing up.
                biased;
                _ = ticks.tick() => {
                    self.node.tick();
                    self.leave_the_lead_for_want_of_room();
                }
                () = &mut stop, if stop_at.is_none() => {
                    stop_at = Some(Instant::now() + self.timing.handover_patience);
                    // A follower has nothing to hand over, and a leader without a successor just stops.
                    if let Err(error) = self.node.transfer_leadership(None) {
                        tracing::info!(%error, "stopping without a handover");
                        stop_at = Some(Instant::now());
                    }
                }
                durable = self.durable.recv() => self.persisted(durable)?,
                count = self.inputs.recv_many(&mut inputs, INPUTS_PER_TURN) => {
                    assert!(count > 0, "the driver holds a handle on its own queue");
                    self.node.set_clock(now_ms());
                    for input in inputs.drain(..) {
                        self.take(input)?;
                    }
                    self.propose_gathered();
                }
            }
        }
    }

    fn is_leader_with_peers(&self) -> bool {
        self.soft_state.role == Role::Leader && !self.peers.is_empty()
    }

    fn take(&mut self, input: Input) -> Result<(), DriverError> {
        match input {
            Input::Peer(message) => self.step(message)?,
            Input::VoteRequest(message, reply) => {
                if let raft::Body::VoteRequest { pre_vote, .. } = message.body {
                    self.votes.insert((message.from, pre_vote), reply);
                }
                self.step(message)?;
            }
            Input::PeerStreamBroken(peer) => self.node.leader_unreachable(peer),
            Input::PeerConnected(peer) => self.node.peer_reachable(peer),
            Input::PeerUnreachable(peer) => self.node.peer_unreachable(peer),
            Input::Propose(ids, payloads, replies) => {
                self.gathered.waiters.push(Waiter::new(ids, replies));
                self.gathered.payloads.extend(payloads);
            }
            Input::ReadBarrier(reply) => {
                self.last_read_id += 1;
                self.reads.insert(self.last_read_id, reply);
                self.node.read_index(self.last_read_id);
            }
            Input::Status(reply) => drop(reply.send(self.node.status())),
            Input::LogRoom(shortage) => {
                self.room.log_is(shortage);
                self.weigh_room();
            }
            Input::StateMachineRoom(shortage) => {
                self.room.state_machine_is(shortage);
                self.weigh_room();
            }
            Input::PeerRoom(peer, shortage) => {
                self.room.peer_is(peer, shortage);
                self.weigh_room();
            }
            Input::StateMachineDurable(index) => {
                self.compaction.state_machine_is_durable(index);
                self.compact()?;
            }
            Input::MustNotLead(must_not) => self.node.set_must_not_lead(must_not),
            Input::Install(position, reply) => drop(reply.send(self.node.install_snapshot(position)?)),
            Input::SnapshotFinished(peer, result) => self.snapshot_finished(peer, result),
            Input::Transfer(to, reply) => drop(reply.send(self.node.transfer_leadership(to))),
        }
        Ok(())
    }

    /// A peer's mistake is refused and noted; only our own failures end the loop.
    fn step(&mut self, message: Message) -> Result<(), DriverError> {
        let from = message.from;
        match self.node.step(message) {
            Ok(()) => Ok(()),
            Err(source) if source.is_fatal() => Err(DriverError::Fatal { peer: from, source }),
            Err(error) => {
                tracing::warn!(peer = from, %error, "a message was refused");
                self.metrics.error("message_refused");
                Ok(())
            }
        }
    }

    fn propose_gathered(&mut self) {
        let Gathered { waiters, payloads } = std::mem::take(&mut self.gathered);
        if !payloads.is_empty() {
            self.metrics.proposal_batch.observe(payloads.len() as f64);
        }
        let batch_id = self.proposals.register(waiters);
        match self.node.propose(batch_id, payloads) {
            Ok(()) => {}
            // Nothing has gathered in this turn.
            Err(ProposeError::EmptyBatch) => self.proposals.forget(batch_id),
        }
    }

    fn persisted(&mut self, durable: Option<Result<u64, StoreError>>) -> Result<(), DriverError> {
        let number = durable.expect("the log writer reports its end before it drops the channel")?;
        self.node.persisted(number);
        while self.unpersisted.front().is_some_and(|(waiting, _)| *waiting <= number) {
            let (_, messages) = self.unpersisted.pop_front().expect("its front was just looked at");
            self.send_all(messages);
        }
        Ok(())
    }

    /// Does what the core is ready for, until it is ready for nothing more.
    fn carry_out(&mut self) -> Result<(), DriverError> {
        while let Some(ready) = self.node.ready()? {
            self.carry_out_one(ready)?;
        }
        Ok(())
    }

    fn carry_out_one(&mut self, ready: Ready) -> Result<(), DriverError> {
        let must_persist = ready.must_persist();
        // The leader replicates in parallel with its own write (Raft thesis,
        // section 10.2.1): these promise nothing that is not yet durable.
        self.send_all(ready.messages);
        self.compaction.entries_added(&ready.entries);
        if must_persist {
            self.unpersisted.push_back((ready.number, ready.messages_after_persist));
            self.writer.submit(Write {
                number: ready.number,
                hard_state: ready.hard_state,
                install: ready.install,
                entries: ready.entries,
            })?;
        }
        if let Some(standing) = ready.hard_state.map(|state| state.standing)
            && standing != self.standing
        {
            tracing::info!(?standing, "standing");
            self.standing = standing;
        }
        if let Some(soft_state) = ready.soft_state {
            let SoftState { role, term, leader } = soft_state;
            tracing::info!(?role, term, leader, "role");
            self.metrics.role_changed(self.soft_state, soft_state);
            self.soft_state = soft_state;
            self.weigh_room();
        }
        for peer in ready.snapshots {
            self.start_snapshot(peer);
        }
        for outcome in ready.proposals {
            self.proposal_outcome(outcome.batch_id, outcome.result);
        }
        for outcome in ready.reads {
            if let Some(reply) = self.reads.remove(&outcome.read_id) {
                let _ = reply.send(outcome.index);
            }
        }
        self.publish(ready.commit_index, ready.deliverable_index)
    }

    /// Brings a peer a snapshot, beside everything else. The core asks once, and again after a failure.
    fn start_snapshot(&mut self, peer: NodeId) {
        let Some(route) = self.peers.get(&peer).map(|peer| peer.snapshot_route()) else { return };
        self.compaction.hold(peer);
        let retry_after = self.snapshot_retries.get(&peer).copied().unwrap_or(MIN_SNAPSHOT_RETRY);
        let (snapshots, driver) = (self.snapshots.clone(), self.handle.clone());
        tokio::spawn(async move {
            let result = snapshots.bring(peer, route).await;
            let result = result.map_err(|status| {
                tracing::warn!(
                    peer,
                    reason = status.message(),
                    "the snapshot did not get there; trying again"
                );
                SnapshotFailed
            });
            if result.is_err() {
                // The core tries again as soon as it hears; not more often than this.
                tokio::time::sleep(retry_after).await;
            }
            driver.send(Input::SnapshotFinished(peer, result)).await;
        });
    }

    fn snapshot_finished(&mut self, peer: NodeId, result: Result<Index, SnapshotFailed>) {
        match result {
            Ok(index) => {
                tracing::info!(peer, index, "the peer has become the snapshot");
                self.metrics.snapshots.with_label_values(&["sent", "ok"]).inc();
                self.snapshot_retries.remove(&peer);
                self.compaction.hold_after_snapshot(peer, index, Instant::now().into_std());
            }
            Err(SnapshotFailed) => {
                self.metrics.snapshots.with_label_values(&["sent", "failed"]).inc();
                self.metrics.error("snapshot_failed");
                let retry = self.snapshot_retries.entry(peer).or_insert(MIN_SNAPSHOT_RETRY);
                *retry = (*retry * 2).min(MAX_SNAPSHOT_RETRY);
                self.compaction.release(peer);
            }
        }
        self.node.snapshot_finished(peer, result);
    }

    /// Discards what neither this node nor a peer within the tail needs any more.
    fn compact(&mut self) -> Result<(), DriverError> {
        if self.compaction.is_holding() {
            for (peer, status) in self.node.status().peers {
                self.compaction.peer_is_at(peer, status.matched_index, status.recently_active);
            }
            self.compaction.expire_holds(Instant::now().into_std());
        }
        let base = self.reader.base()?.index;
        if let Some(to) = self.compaction.due(base) {
            let base = self.writer.compact(to)?;
            tracing::debug!(base, "compacted");
        }
        Ok(())
    }

    /// Follows what is known of the room: refuses, or takes, and tells everybody.
    fn weigh_room(&mut self) {
        let leads = self.soft_state.role == Role::Leader;
        self.node.set_out_of_room(leads && self.room.leaders_refusal().is_some());
        let said = if leads { self.room.leaders_refusal() } else { self.room.own() };
        let tell = |told: &watch::Sender<Shortage>, now: Shortage| {
            told.send_if_modified(|told| {
                *told != now && {
                    *told = now;
                    true
                }
            });
        };
        tell(&self.shortages.own, said);
        tell(&self.shortages.refusal, self.room.refusal(self.soft_state.leader));
    }

    /// A leader without room leaves the lead to a member that has it, so that writes go on.
    fn leave_the_lead_for_want_of_room(&mut self) {
        let leads = self.soft_state.role == Role::Leader;
        let just_tried = self.handed_over_at.is_some_and(|at| at.elapsed() < HAND_OVER_AGAIN);
        // If most members lack room the next leader could take nothing, either.
        if !leads || self.room.own().is_none() || !self.room.majority_has_room() || just_tried {
            return;
        }
        let status = self.node.status();
        let able = status
            .peers
            .iter()
            .filter(|(id, peer)| peer.recently_active && peer.counts() && self.room.has_room(**id));
        let Some((&to, _)) = able.max_by_key(|(_, peer)| peer.matched_index) else { return };
        self.handed_over_at = Some(Instant::now());
        match self.node.transfer_leadership(Some(to)) {
            Ok(()) => tracing::warn!(to, "no room here: handing leadership over"),
            Err(error) => tracing::warn!(to, %error, "no room here, but leadership cannot be handed over"),
        }
    }

    fn send_all(&mut self, messages: Vec<Message>) {
        for message in messages {
            if let raft::Body::VoteResponse { pre_vote, .. } = message.body {
                // The answer to a unary call; who asked and gave up gets nothing.
                if let Some(reply) = self.votes.remove(&(message.to, pre_vote)) {
                    let _ = reply.send(convert::to_wire(message, self.envelope));
                }
                continue;
            }
            if let Some(peer) = self.peers.get(&message.to) {
                peer.send(message);
            }
        }
    }

    fn proposal_outcome(&mut self, batch_id: u64, result: ProposalResult) {
        match result {
            ProposalResult::Appended(Appended { first_index, term }) => {
                self.proposals.placed(batch_id, first_index, term);
            }
            ProposalResult::Dropped(reason) => {
                let refusal = match reason {
                    DropReason::NoLeader | DropReason::Transferring => ProposalRefusal::NoLeader,
                    DropReason::Overloaded => ProposalRefusal::Overloaded,
                    DropReason::OutOfRoom => ProposalRefusal::OutOfRoom,
                };
                self.proposals.answer(batch_id, refused(refusal));
            }
            ProposalResult::Unknown => self.proposals.answer(batch_id, Outcome::Unknown(ProposalUnknown {})),
        }
    }

    /// Tells the followers of the log, and those who wait for proposals, how far things are.
    fn publish(&mut self, commit_index: Index, deliverable_index: Index) -> Result<(), DriverError> {
        let soft = self.soft_state;
        let now = Progress {
            commit_index,
            deliverable_index,
            term: soft.term,
            leader: soft.leader,
            role: soft.role,
            standing: self.standing,
        };
        let before = self.progress.send_replace(now);
        if before.commit_index != commit_index {
            let reader = &self.reader;
            let term_at = |index| -> Result<Option<Term>, LogError> { reader.term(index) };
            self.proposals.committed(commit_index, term_at)?;
        }
        Ok(())
    }
}

/// The wall clock, in milliseconds since 1970; the core never lets the log's time go backward.
fn now_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64)
}
