//! The clients: each does one thing at a time, and sends it again, elsewhere, until it has an answer or gives up.
//!
//! Every operation is checked when it ends: a write stands after everything that was acknowledged before it began, and
//! a read has seen all of that (linearizability, with the log's order as the witness: each answer names its index, and
//! the model says what the answer must be there).

use std::collections::BTreeSet;

use raft::{Index, NodeId};
use resqlite::api::{ReplyClass, RequestId, StoredReply};

use crate::{
    cluster::{Cluster, Event},
    options::Defect,
    workload::{self, Write},
};

/// One client.
pub(crate) struct Client {
    number: u64,
    /// Of its last request.
    sequence: u64,
    /// Requests that it gave up: it does not know what became of them.
    unknown: BTreeSet<u64>,
    /// Counts what it sent, so that late news is told from current.
    attempt: u64,
    current: Option<Operation>,
    /// What it still has to do after the faults.
    last_operations: Vec<Kind>,
}

/// What it is at.
#[derive(Clone)]
struct Operation {
    kind: Kind,
    /// The highest index that anybody had been told when it began.
    bound: Index,
    seed: [u64; 2],
    id: RequestId,
    /// Where it was sent last, and in which life of sqlited there.
    sent_to: Option<(NodeId, u64)>,
    /// Of a read: it must see at least this.
    read_index: Option<Index>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Write(Write),
    Read,
}

impl Client {
    pub(crate) fn new(number: u64) -> Self {
        Self {
            number,
            sequence: 0,
            unknown: BTreeSet::new(),
            attempt: 0,
            current: None,
            last_operations: Vec::new(),
        }
    }

    /// It has the replies of everything below.
    fn floor(&self) -> u64 {
        self.unknown.first().copied().unwrap_or(self.sequence)
    }
}

impl Cluster {
    pub(crate) fn start_clients(&mut self) {
        self.begin(0, Kind::Write(Write::CreateTables));
        for client in 1..self.clients.len() {
            self.after(200, Event::Client(client, 0));
        }
    }

    pub(crate) fn clients_are_idle(&self) -> bool {
        self.clients.iter().all(|client| client.current.is_none() && client.last_operations.is_empty())
    }

    pub(crate) fn waiting_clients(&self) -> Vec<String> {
        let waiting = self.clients.iter().filter_map(|client| Some((client, client.current.as_ref()?)));
        waiting.map(|(client, operation)| format!("{}: {:?}", client.number, operation.kind)).collect()
    }

    /// The faults have stopped: everybody writes and reads once more.
    pub(crate) fn start_last_operations(&mut self) {
        for client in 0..self.clients.len() {
            let write = Write::Add { counter: 0 };
            self.clients[client].last_operations = vec![Kind::Read, Kind::Write(write)];
            if self.clients[client].current.is_none() {
                let attempt = self.clients[client].attempt;
                self.after(0, Event::Client(client, attempt));
            }
        }
    }

    /// A pause or an operation's patience has ended.
    pub(crate) fn client_wakes(&mut self, client: usize, attempt: u64) {
        if self.clients[client].attempt != attempt {
            return;
        }
        if self.clients[client].current.is_none() {
            return self.begin_next(client);
        }
        let needed = Some(Kind::Write(Write::CreateTables));
        let is_needed = self.clients[client].current.as_ref().map(|operation| operation.kind) == needed;
        if self.operations_left > 0 && !is_needed && self.random.chance(30) {
            self.give_up(client);
        } else {
            self.send_operation(client);
        }
    }

    fn begin_next(&mut self, client: usize) {
        if let Some(kind) = self.clients[client].last_operations.pop() {
            return self.begin(client, kind);
        }
        let Some(left) = self.operations_left.checked_sub(1) else { return };
        self.operations_left = left;
        self.inject_due_faults();
        let kind = if self.random.chance(350) {
            Kind::Read
        } else {
            let Client { number, sequence, .. } = self.clients[client];
            Kind::Write(Write::draw(&mut self.random, number, sequence + 1))
        };
        self.begin(client, kind);
    }

    fn begin(&mut self, client: usize, kind: Kind) {
        self.begun += 1;
        let seed = [self.random.number(), self.random.number()];
        let bound = self.acknowledged;
        let asking = &mut self.clients[client];
        if let Kind::Write(write) = kind {
            asking.sequence += 1;
            self.model.wants((asking.number, asking.sequence), write);
        }
        let id = RequestId {
            client_id: workload::client_id(asking.number).to_vec().into(),
            sequence: asking.sequence,
            acknowledged_below: asking.floor(),
            made_at_index: bound,
        };
        asking.current = Some(Operation { kind, bound, seed, id, sent_to: None, read_index: None });
        self.send_operation(client);
    }

    /// It no longer wants to know; what it asked for may happen or not.
    fn give_up(&mut self, client: usize) {
        let asking = &mut self.clients[client];
        let Some(operation) = asking.current.take() else { return };
        if let Kind::Write(_) = operation.kind {
            asking.unknown.insert(operation.id.sequence);
        }
        asking.attempt += 1;
        let attempt = asking.attempt;
        self.after(1, Event::Client(client, attempt));
    }

    fn send_operation(&mut self, client: usize) {
        let to = 1 + self.random.below(self.hosts.len() as u64);
        self.clients[client].attempt += 1;
        let attempt = self.clients[client].attempt;
        let id = self.unique();
        let patience_ms = self.random.between(100, 600);
        let Self { hosts, clients, .. } = self;
        let host = hosts.get_mut(&to).expect("every id is a host's");
        let Some(operation) = &mut clients[client].current else { return };
        operation.read_index = None;
        let Some(raftd) = host.raftd.as_mut().filter(|_| host.machine.is_open()) else {
            operation.sent_to = None;
            return self.after(patience_ms / 10, Event::Client(client, attempt));
        };
        operation.sent_to = Some((to, host.sqlited_life));
        let kind = operation.kind;
        let payload = match kind {
            Kind::Write(write) => {
                raftd.proposals.insert(id, (client, attempt));
                Some(workload::payload(write, operation.id.clone(), operation.seed))
            }
            Kind::Read => {
                raftd.reads.insert(id, (client, attempt));
                None
            }
        };
        self.after(patience_ms, Event::Client(client, attempt));
        self.with_node(to, |node| match payload {
            Some(payload) => node.propose(id, vec![payload]).expect("the batch is not empty"),
            None => node.read_index(id),
        });
    }

    /// It was refused for certain.
    pub(crate) fn retry_soon(&mut self, client: usize, attempt: u64) {
        if self.clients[client].attempt == attempt && self.clients[client].current.is_some() {
            let pause_ms = self.random.between(2, 30);
            self.after(pause_ms, Event::Client(client, attempt));
        }
    }

    /// A node has executed somebody's request; whoever waits for it there has the answer.
    pub(crate) fn write_was_applied(
        &mut self,
        id: NodeId,
        client: usize,
        sequence: u64,
        reply: &StoredReply,
    ) {
        let asked = Some((id, self.hosts[&id].sqlited_life));
        let asking = &self.clients[client];
        let Some(operation) = &asking.current else { return };
        if operation.id.sequence != sequence || operation.sent_to != asked || operation.kind == Kind::Read {
            return;
        }
        assert_ne!(reply.class(), ReplyClass::Expired, "a request in use was forgotten: {reply:?}");
        let executed_at = self.model.executed_at((asking.number, sequence));
        assert_eq!(executed_at, Some(reply.log_index), "an answer names another index than the request's");
        assert!(
            reply.log_index > operation.bound,
            "linearizability: a write stands at {}, but {} was acknowledged before it began",
            reply.log_index,
            operation.bound
        );
        self.complete(client, reply.log_index);
    }

    /// The log says which index a read must wait for.
    pub(crate) fn read_may_proceed(&mut self, id: NodeId, read_id: u64, index: Option<Index>) {
        let Some(raftd) = &mut self.host(id).raftd else { return };
        let Some((client, attempt)) = raftd.reads.remove(&read_id) else { return };
        if self.clients[client].attempt != attempt {
            return;
        }
        let index = if self.defect == Some(Defect::StaleRead) { Some(0) } else { index };
        match index {
            None => self.retry_soon(client, attempt),
            Some(index) => {
                if let Some(operation) = &mut self.clients[client].current {
                    operation.read_index = Some(index);
                }
                self.serve_reads(id);
            }
        }
    }

    /// Reads that a node may answer by now.
    pub(crate) fn serve_reads(&mut self, id: NodeId) {
        let host = &self.hosts[&id];
        if !host.machine.is_open() {
            return;
        }
        let (asked, applied) = (Some((id, host.sqlited_life)), host.machine.position().applied_index);
        for client in 0..self.clients.len() {
            let Some(operation) = &self.clients[client].current else { continue };
            if operation.sent_to != asked || operation.read_index.is_none_or(|index| index > applied) {
                continue;
            }
            assert!(
                applied >= operation.bound,
                "linearizability: a read at {applied} misses {}, which was acknowledged before it began",
                operation.bound
            );
            let expected = self.model.read_at(applied);
            if !expected.is_empty() {
                let found = self.hosts[&id].machine.read();
                assert_eq!(found, expected, "linearizability: node {id} answers a read at {applied}");
            }
            self.complete(client, applied);
        }
    }

    fn complete(&mut self, client: usize, index: Index) {
        self.acknowledged = self.acknowledged.max(index);
        self.figures.operations += 1;
        let asking = &mut self.clients[client];
        asking.current = None;
        asking.attempt += 1;
        let attempt = asking.attempt;
        let pause_ms = self.random.below(6);
        self.after(pause_ms, Event::Client(client, attempt));
    }
}
