//! Runs the scripts: a cluster whose every message and every sync happens when the script says so.
//!
//! | command | what it does |
//! |---|---|
//! | `cluster nodes=3 [option=value…]` | makes the nodes; see [`Script::cluster`] for the options |
//! | `preset 1 terms=1/1/2 [term=2] [vote=1] [standing=learner] [incarnation=1]` | starts a node anew, with a log of entries of these terms |
//! | `tick 1 [n]` | lets time pass |
//! | `timeout 1` | lets time pass until the node campaigns |
//! | `elect 1` | `timeout`, then `stabilize`; the node must lead |
//! | `propose 1 id payload…`, `read 1 id…` | asks something of a node |
//! | `room 1 none`, `room 1 again` | tells a node whether there is room for payloads |
//! | `deliver [from=1] [to=2] [n=1]`, `drop …`, `repeat …` | hands over, loses or copies messages under way, oldest first |
//! | `sync 1 [n]` | makes the node's oldest writes durable |
//! | `stabilize` | syncs and delivers until nothing is under way |
//! | `cut 1 2`, `heal` | loses every message between two nodes, until healed |
//! | `must_not_lead 1 true` | the state machine of the node says whether it cannot be trusted |
//! | `crash 1`, `restart 1` | loses what was not synced; comes back with the rest |
//! | `wipe 1 [incarnation=5]` | loses the whole disk; comes back with an empty one |
//! | `step from=1 to=2 term=3 KIND …` | hands a node a message made by hand; see [`Script::step`] |
//! | `log 1…`, `status 1…`, `progress 1` | shows the durable log, the node, a leader's view |
//! | `network` | shows what is under way |

mod show;

use std::{
    collections::{BTreeMap, BTreeSet},
    error::Error,
    fmt::Write as _,
};

use bytes::Bytes;
use goldenscript::{Command, Context};
use raft::{
    Append, AppendResponse, Body, Entry, EntryKind, HardState, Index, Message, Node, NodeId, Options,
    Position, Role, SnapshotFailed, Standing, Term,
};
use show::{show_message, show_position, show_ready, show_status};

use crate::support::{Contents, Disk, Write};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

#[derive(Default)]
pub struct Script {
    options: BTreeMap<NodeId, Options>,
    nodes: BTreeMap<NodeId, Node>,
    disks: BTreeMap<NodeId, Disk>,
    network: Vec<Message>,
    cut: BTreeSet<(NodeId, NodeId)>,
    /// The commit and deliverable indexes that were shown last.
    reached: BTreeMap<NodeId, (Index, Index)>,
    output: String,
}

impl goldenscript::Runner for Script {
    type Command = Command;

    fn run(&mut self, command: &Command, _: &Context) -> Result<String> {
        self.output.clear();
        let mut args = Args::of(command);
        match command.name.as_str() {
            "cluster" => self.cluster(&mut args)?,
            "preset" => self.preset(&mut args)?,
            "tick" => {
                let (id, ticks) = (args.id()?, args.next_or(1)?);
                (0..ticks).try_for_each(|_| self.with(id, Node::tick))?;
            }
            "timeout" => self.timeout(args.id()?)?,
            "elect" => {
                let id = args.id()?;
                self.timeout(id)?;
                self.stabilize()?;
                if self.node(id)?.role() != Role::Leader {
                    return Err(format!("n{id} was not elected: {}", self.output).into());
                }
            }
            "propose" => {
                let (id, batch_id) = (args.id()?, args.next()?);
                let payloads = args.rest().into_iter().map(Bytes::from).collect();
                self.try_with(id, |node| Ok(node.propose(batch_id, payloads)?))?;
            }
            "room" => {
                let (id, word) = (args.id()?, args.next::<String>()?);
                self.with(id, |node| node.set_out_of_room(word == "none"))?;
            }
            "read" => {
                let (id, reads) = (args.id()?, args.rest());
                let reads: Vec<u64> =
                    reads.iter().map(|read_id| Ok(read_id.parse()?)).collect::<Result<_>>()?;
                self.with(id, |node| reads.into_iter().for_each(|read_id| node.read_index(read_id)))?;
            }
            "clock" => {
                let (id, now_ms) = (args.id()?, args.next()?);
                self.with(id, |node| node.set_clock(now_ms))?;
            }
            "deliver" => self.deliver(&mut args)?,
            "drop" => {
                let messages = self.take(&mut args)?;
                writeln!(self.output, "lost: {}", messages.len())?;
            }
            "repeat" => {
                let messages = self.take(&mut args)?;
                let copies = messages.iter().chain(&messages).cloned();
                self.network.splice(0..0, copies);
            }
            "sync" => {
                let (id, writes) = (args.id()?, args.next_or(usize::MAX)?);
                self.sync(id, writes)?;
            }
            "stabilize" => self.stabilize()?,
            "cut" => {
                let (a, b) = (args.id()?, args.id()?);
                self.cut.extend([(a, b), (b, a)]);
            }
            "heal" => self.cut.clear(),
            "crash" => {
                let id = args.id()?;
                self.nodes.remove(&id).ok_or("it is down")?;
                self.disk(id)?.crash(0);
            }
            "restart" => self.start(args.id()?)?,
            "wipe" => {
                let id = args.id()?;
                self.nodes.remove(&id);
                // Another life has another seed, as its driver must see to.
                self.options.get_mut(&id).ok_or("no such node")?.seed += 1_000;
                let incarnation = match args.key("incarnation")? {
                    Some(incarnation) => incarnation,
                    None => self.disk(id)?.durable.hard_state.incarnation + 1,
                };
                let contents = Contents { hard_state: HardState::new(incarnation), ..Contents::default() };
                self.disks.insert(id, Disk::holding(id % 2 == 0, contents));
                self.start(id)?;
            }
            "leader_unreachable" => {
                let (id, peer) = (args.id()?, args.id()?);
                self.with(id, |node| node.leader_unreachable(peer))?;
            }
            "peer_unreachable" => {
                let (id, peer) = (args.id()?, args.id()?);
                self.with(id, |node| node.peer_unreachable(peer))?;
            }
            "peer_reachable" => {
                let (id, peer) = (args.id()?, args.id()?);
                self.with(id, |node| node.peer_reachable(peer))?;
            }
            "transfer" => {
                let (id, to) = (args.id()?, args.key("to")?);
                self.try_with(id, |node| Ok(node.transfer_leadership(to)?))?;
            }
            "must_not_lead" => {
                let (id, must_not) = (args.id()?, args.next()?);
                self.with(id, |node| node.set_must_not_lead(must_not))?;
            }
            "compact" => {
                let (id, index) = (args.id()?, args.next()?);
                self.disk(id)?.compact(index);
            }
            "install" => {
                let (id, base) = (args.id()?, position(&args.next::<String>()?)?);
                let outcome = self.node(id)?.install_snapshot(base)?;
                writeln!(self.output, "n{id} snapshot {outcome:?}")?;
                self.pump(id)?;
            }
            "snapshot_finished" => {
                let (id, peer, index) = (args.id()?, args.id()?, args.key("index")?);
                self.with(id, |node| node.snapshot_finished(peer, index.ok_or(SnapshotFailed)))?;
            }
            "step" => self.step(&mut args)?,
            "log" => self.show_logs(&mut args)?,
            "status" => self.show_statuses(&mut args)?,
            "progress" => self.show_progress(args.id()?)?,
            "network" => {
                for message in &self.network {
                    writeln!(self.output, "n{}→n{} {}", message.from, message.to, show_message(message))?;
                }
            }
            name => return Err(format!("unknown command {name}").into()),
        }
        args.done()?;
        Ok(std::mem::take(&mut self.output))
    }
}

impl Script {
    /// Makes the nodes. Options are those of [`Options`], by name; the seed of a node is its id.
    fn cluster(&mut self, args: &mut Args) -> Result<()> {
        let count: u64 = args.key("nodes")?.unwrap_or(3);
        for id in 1..=count {
            let mut options = Options { heartbeat_ticks: 2, ..Options::new(id, 1..=count, id) };
            for (name, bound) in [
                ("max_append_bytes", &mut options.max_append_bytes),
                ("max_inflight_appends", &mut options.max_inflight_appends),
                ("max_inflight_bytes", &mut options.max_inflight_bytes),
                ("max_uncommitted_bytes", &mut options.max_uncommitted_bytes),
                ("max_forwarded_bytes", &mut options.max_forwarded_bytes),
                ("max_pending_reads", &mut options.max_pending_reads),
            ] {
                *bound = args.peek(name)?.unwrap_or(*bound);
            }
            let hard_state = voter_unless(&mut Args::of(args.1))?;
            self.options.insert(id, options);
            self.disks.insert(id, Disk::holding(id % 2 == 0, Contents { hard_state, ..Contents::default() }));
            self.start(id)?;
        }
        args.forget_keys();
        Ok(())
    }

    fn preset(&mut self, args: &mut Args) -> Result<()> {
        let id = args.id()?;
        let terms: Vec<Term> = list(&args.key::<String>("terms")?.unwrap_or_default())?;
        let term = args.key("term")?.unwrap_or(terms.last().copied().unwrap_or(0));
        let entries = (1..).zip(terms).map(|(index, term)| payload_entry(index, term, "x")).collect();
        let hard_state = HardState { term, voted_for: args.key("vote")?, ..voter_unless(args)? };
        let disk = Disk::holding(id % 2 == 0, Contents { hard_state, base: Position::default(), entries });
        self.disks.insert(id, disk);
        self.start(id)
    }

    fn start(&mut self, id: NodeId) -> Result<()> {
        let options = self.options.get(&id).ok_or("no such node")?.clone();
        let disk = self.disk(id)?;
        let node = Node::new(options, disk.durable.hard_state, disk.log())?;
        self.nodes.insert(id, node);
        self.reached.remove(&id);
        self.pump(id)
    }

    fn node(&mut self, id: NodeId) -> Result<&mut Node> {
        self.nodes.get_mut(&id).ok_or_else(|| format!("n{id} is down").into())
    }

    fn disk(&mut self, id: NodeId) -> Result<&mut Disk> {
        self.disks.get_mut(&id).ok_or_else(|| format!("there is no n{id}").into())
    }

    fn with(&mut self, id: NodeId, action: impl FnOnce(&mut Node)) -> Result<()> {
        self.try_with(id, |node| {
            action(node);
            Ok(())
        })
    }

    fn try_with(&mut self, id: NodeId, action: impl FnOnce(&mut Node) -> Result<()>) -> Result<()> {
        action(self.node(id)?)?;
        self.pump(id)
    }

    /// Takes what a node wants done and shows it.
    fn pump(&mut self, id: NodeId) -> Result<()> {
        while let Some(mut ready) = self.node(id)?.ready()? {
            show_ready(&mut self.output, id, &ready)?;
            let reached = (ready.commit_index, ready.deliverable_index);
            if self.reached.insert(id, reached).unwrap_or_default() != reached {
                writeln!(self.output, "n{id} commit={} deliverable={}", reached.0, reached.1)?;
            }
            if ready.must_persist() {
                self.disk(id)?.write(Write::take_from(&mut ready));
            }
            self.network.extend(ready.messages);
        }
        Ok(())
    }

    fn sync(&mut self, id: NodeId, writes: usize) -> Result<()> {
        let Some((number, messages)) = self.disk(id)?.sync(writes) else { return Ok(()) };
        writeln!(self.output, "n{id} has synced #{number}")?;
        self.network.extend(messages);
        self.with(id, |node| node.persisted(number))
    }

    fn timeout(&mut self, id: NodeId) -> Result<()> {
        let before = self.node(id)?.status();
        for _ in 0..40 {
            self.with(id, Node::tick)?;
            let now = self.node(id)?.status();
            if now.role != Role::Follower && (now.role, now.term) != (before.role, before.term) {
                return Ok(());
            }
        }
        Err(format!("n{id} did not campaign").into())
    }

    /// Takes messages out of the network, oldest first.
    fn take(&mut self, args: &mut Args) -> Result<Vec<Message>> {
        let (from, to): (Option<NodeId>, Option<NodeId>) = (args.key("from")?, args.key("to")?);
        let mut left = args.key("n")?.unwrap_or(usize::MAX);
        let (mut taken, mut kept) = (Vec::new(), Vec::new());
        for message in self.network.drain(..) {
            let chosen = from.is_none_or(|id| id == message.from) && to.is_none_or(|id| id == message.to);
            if chosen && left > 0 {
                left -= 1;
                taken.push(message);
            } else {
                kept.push(message);
            }
        }
        self.network = kept;
        Ok(taken)
    }

    fn deliver(&mut self, args: &mut Args) -> Result<()> {
        for message in self.take(args)? {
            self.hand_over(message)?;
        }
        Ok(())
    }

    fn hand_over(&mut self, message: Message) -> Result<()> {
        if self.cut.contains(&(message.from, message.to)) || !self.nodes.contains_key(&message.to) {
            return Ok(());
        }
        self.try_with(message.to, |node| Ok(node.step(message)?))
    }

    fn stabilize(&mut self) -> Result<()> {
        for _ in 0..1_000 {
            if self.network.is_empty() && self.disks.values().all(|disk| disk.pending.is_empty()) {
                return Ok(());
            }
            let up: Vec<NodeId> = self.nodes.keys().copied().collect();
            for id in up {
                self.sync(id, usize::MAX)?;
            }
            for message in std::mem::take(&mut self.network) {
                self.hand_over(message)?;
            }
        }
        Err("it does not stabilize".into())
    }

    /// Hands over a message: `append prev=2@1 [entries=3@1/4@2] [commit=2]`, `matched=3`, `rejected=5 hint=3@1`,
    /// `heartbeat [commit=2] [round=1]`, `heard [round=1]`, `vote last=3@1`, `pre_vote last=3@1`, `granted`, `refused`,
    /// `timeout_now`, `forward id=1 payload…`, `read_answer id=1 [index=5]`, `promote [of=1]`. The sender is a voter of
    /// incarnation 1, unless `standing=` or `incarnation=` say otherwise.
    fn step(&mut self, args: &mut Args) -> Result<()> {
        let (from, to): (NodeId, NodeId) = (args.must("from")?, args.must("to")?);
        let term = args.must("term")?;
        let HardState { standing, incarnation, .. } = voter_unless(args)?;
        let kind = args.next::<String>().unwrap_or_default();
        let body = if let Some(index) = args.key("matched")? {
            Body::AppendResponse(AppendResponse::Matched(index))
        } else if let Some(previous_index) = args.key("rejected")? {
            let hint = position(&args.must::<String>("hint")?)?;
            let (hint_index, hint_term) = (hint.index, hint.term);
            Body::AppendResponse(AppendResponse::Rejected { previous_index, hint_index, hint_term })
        } else {
            match kind.as_str() {
                "append" => {
                    let previous = position(&args.must::<String>("prev")?)?;
                    let entries = args.key::<String>("entries")?.unwrap_or_default();
                    Body::Append(Append {
                        previous_index: previous.index,
                        previous_term: previous.term,
                        entries: entries
                            .split('/')
                            .filter(|text| !text.is_empty())
                            .map(entry)
                            .collect::<Result<_>>()?,
                        commit_index: args.key("commit")?.unwrap_or(0),
                    })
                }
                "heartbeat" => Body::Heartbeat {
                    commit_index: args.key("commit")?.unwrap_or(0),
                    read_round: args.key("round")?.unwrap_or(0),
                },
                "heard" => Body::HeartbeatResponse { read_round: args.key("round")?.unwrap_or(0) },
                "vote" | "pre_vote" => {
                    let last = position(&args.must::<String>("last")?)?;
                    Body::VoteRequest {
                        pre_vote: kind == "pre_vote",
                        last_index: last.index,
                        last_term: last.term,
                        leadership_transfer: false,
                    }
                }
                "refused" => Body::VoteResponse { pre_vote: false, granted: false },
                "granted" => Body::VoteResponse { pre_vote: false, granted: true },
                "timeout_now" => Body::TimeoutNow,
                "promote" => Body::Promote { incarnation: args.key("of")?.unwrap_or(1) },
                "forward" => Body::Forward {
                    batch_id: args.must("id")?,
                    payloads: args.rest().into_iter().map(Bytes::from).collect(),
                },
                "read_answer" => {
                    Body::ReadIndexResponse { read_id: args.must("id")?, index: args.key("index")? }
                }
                kind => return Err(format!("unknown message {kind}").into()),
            }
        };
        self.try_with(to, |node| Ok(node.step(Message { from, to, term, incarnation, standing, body })?))
    }

    fn chosen(&self, args: &mut Args) -> Result<Vec<NodeId>> {
        let chosen: Vec<NodeId> = args.rest().iter().map(|id| Ok(id.parse()?)).collect::<Result<_>>()?;
        Ok(if chosen.is_empty() { self.options.keys().copied().collect() } else { chosen })
    }

    fn show_logs(&mut self, args: &mut Args) -> Result<()> {
        for id in self.chosen(args)? {
            let durable = self.disk(id)?.durable.clone();
            let entries: Vec<String> =
                durable.entries.iter().map(|entry| show_position(entry.position())).collect();
            writeln!(self.output, "n{id} after {}: {}", show_position(durable.base), entries.join(" "))?;
        }
        Ok(())
    }

    fn show_statuses(&mut self, args: &mut Args) -> Result<()> {
        for id in self.chosen(args)? {
            if let Ok(node) = self.node(id) {
                let status = node.status();
                show_status(&mut self.output, &status)?;
            }
        }
        Ok(())
    }

    fn show_progress(&mut self, id: NodeId) -> Result<()> {
        let status = self.node(id)?.status();
        for (peer, progress) in status.peers {
            writeln!(
                self.output,
                "n{id}'s view of n{peer}: {:?} matched={} next={} inflight={}",
                progress.state, progress.matched_index, progress.next_index, progress.inflight_appends
            )?;
        }
        Ok(())
    }
}

fn payload_entry(index: Index, term: Term, payload: &str) -> Entry {
    Entry { index, term, kind: EntryKind::Payload, timestamp_ms: 0, payload: Bytes::from(payload.to_owned()) }
}

/// Reads `5@2`: index 5 of term 2.
fn position(text: &str) -> Result<Position> {
    let (index, term) = text.split_once('@').ok_or("expected INDEX@TERM")?;
    Ok(Position { index: index.parse()?, term: term.parse()?, timestamp_ms: 0 })
}

/// Reads `5@2` or, with a timestamp, `5@2.1000`.
fn entry(text: &str) -> Result<Entry> {
    let (name, timestamp_ms) = text.split_once('.').unwrap_or((text, "0"));
    let Position { index, term, .. } = position(name)?;
    Ok(Entry { timestamp_ms: timestamp_ms.parse()?, ..payload_entry(index, term, "y") })
}

fn standing(text: &str) -> Result<Standing> {
    match text {
        "new" => Ok(Standing::New),
        "founder" => Ok(Standing::Founder),
        "learner" => Ok(Standing::Learner),
        "voter" => Ok(Standing::Voter),
        text => Err(format!("{text} is no standing").into()),
    }
}

/// What a member says of itself: a voter of incarnation 1, unless the arguments say otherwise.
fn voter_unless(args: &mut Args) -> Result<HardState> {
    let standing = args.key::<String>("standing")?.map_or(Ok(Standing::Voter), |name| standing(&name))?;
    let incarnation = args.key("incarnation")?.unwrap_or(1);
    Ok(HardState { standing, ..HardState::new(incarnation) })
}

fn list(text: &str) -> Result<Vec<u64>> {
    text.split('/').filter(|item| !item.is_empty()).map(|item| Ok(item.parse()?)).collect()
}

/// The arguments of a command, parsed as they are taken.
struct Args<'a>(goldenscript::ArgumentConsumer<'a>, &'a Command);

impl<'a> Args<'a> {
    fn of(command: &'a Command) -> Self {
        Self(command.consume_args(), command)
    }

    fn next<T: std::str::FromStr<Err: Error + 'static>>(&mut self) -> Result<T> {
        Ok(self.0.next_pos().ok_or("an argument is missing")?.parse()?)
    }

    fn next_or<T: std::str::FromStr<Err: Error + 'static>>(&mut self, default: T) -> Result<T> {
        self.0.next_pos().map_or(Ok(default), |value| Ok(value.parse()?))
    }

    fn id(&mut self) -> Result<NodeId> {
        self.next()
    }

    fn rest(&mut self) -> Vec<String> {
        std::iter::from_fn(|| self.0.next_pos()).map(str::to_owned).collect()
    }

    fn key<T: std::str::FromStr<Err: Error + 'static>>(&mut self, key: &str) -> Result<Option<T>> {
        self.0.take_key(key).map(|value| Ok(value.parse()?)).transpose()
    }

    /// Like `key`, but leaves the argument to be read again.
    fn peek<T: std::str::FromStr<Err: Error + 'static>>(&self, key: &str) -> Result<Option<T>> {
        Args::of(self.1).key(key)
    }

    fn must<T: std::str::FromStr<Err: Error + 'static>>(&mut self, key: &str) -> Result<T> {
        self.key(key)?.ok_or_else(|| format!("{key}= is missing").into())
    }

    fn forget_keys(&mut self) {
        while self.0.next_key().is_some() {}
    }

    fn done(&self) -> Result<()> {
        self.0.reject_next()
    }
}
