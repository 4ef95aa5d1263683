//! What the committed log means, by a few lines of Rust instead of by SQLite: the oracle for every reply and every read.
//!
//! Requests are recognised by their ids; what a client asked for under an id, it has told the model beforehand. So a
//! request that is applied twice, lost or given another's effect shows as a difference.

use std::{collections::BTreeMap, fmt::Write as _};

use prost::Message;
use raft::{Entry, EntryKind, Index};
use resqlite::api::{LoggedRequest, ReplyClass, StoredReply, value::Kind};

use crate::workload::{ACCOUNTS, COUNTERS, OPENING_BALANCE, REGISTERS, Write};

/// Whose request: the client, and the number among its requests.
pub type Name = (u64, u64);

/// What the log should have made of a request.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Outcome {
    class: ReplyClass,
    index: Index,
    /// Of the first statement's first row.
    value: Option<i64>,
}

/// The whole of a database, and the memory of what was done.
#[derive(Default)]
pub struct Model {
    /// What was asked for.
    wanted: BTreeMap<Name, Write>,
    done: BTreeMap<Name, Outcome>,
    /// Below them the clients have all replies.
    floors: BTreeMap<u64, u64>,
    registers: Vec<i64>,
    counters: Vec<i64>,
    balances: Vec<i64>,
    events: u64,
    /// What a read answers after each index, from 1.
    reads: Vec<String>,
    /// Whose request an index holds, and whether it is the one that was executed.
    requests: BTreeMap<Index, (Name, Outcome)>,
    duplicates: u64,
}

impl Model {
    /// A client is about to send a request.
    pub fn wants(&mut self, name: Name, write: Write) {
        self.wanted.insert(name, write);
    }

    /// The next entry of the log was committed.
    pub fn committed(&mut self, entry: &Entry) {
        assert_eq!(entry.index, self.reads.len() as Index + 1, "the log is committed in order");
        if entry.kind == EntryKind::Payload {
            self.execute(entry);
        }
        let read = self.render();
        self.reads.push(read);
    }

    fn execute(&mut self, entry: &Entry) {
        let request = LoggedRequest::decode(entry.payload.clone()).expect("only the simulation proposes");
        let id = request.id.expect("every client names its requests");
        let client = u128::from_be_bytes(id.client_id[..].try_into().expect("16 bytes")) as u64 - 1;
        let name = (client, id.sequence);
        let floor = self.floors.entry(client).or_default();
        *floor = id.acknowledged_below.min(id.sequence).max(*floor);
        let forgotten = id.sequence < *floor;
        let outcome = if forgotten {
            Outcome { class: ReplyClass::Expired, index: entry.index, value: None }
        } else if let Some(first) = self.done.get(&name) {
            self.duplicates += 1;
            first.clone()
        } else {
            let write = *self.wanted.get(&name).expect("nobody asked for what was committed");
            let (class, value) = self.perform(write);
            let outcome = Outcome { class, index: entry.index, value };
            self.done.insert(name, outcome.clone());
            outcome
        };
        self.requests.insert(entry.index, (name, outcome));
    }

    fn perform(&mut self, write: Write) -> (ReplyClass, Option<i64>) {
        if write == Write::CreateTables {
            self.registers = vec![0; REGISTERS as usize];
            self.counters = vec![0; COUNTERS as usize];
            self.balances = vec![OPENING_BALANCE; ACCOUNTS as usize];
            return (ReplyClass::Ok, None);
        }
        if self.registers.is_empty() {
            // No such table.
            return (ReplyClass::Invalid, None);
        }
        match write {
            Write::CreateTables => unreachable!("it was handled above"),
            Write::CompareAndSwap { register, old, new } => {
                let value = &mut self.registers[register as usize];
                if *value != old {
                    return (ReplyClass::Aborted, None);
                }
                *value = new;
            }
            Write::Add { counter } => {
                let n = &mut self.counters[counter as usize];
                *n += 1;
                return (ReplyClass::Ok, Some(*n));
            }
            Write::Insert { .. } => self.events += 1,
            Write::Transfer { from, to, amount } => {
                if self.balances[from as usize] < amount {
                    return (ReplyClass::Failed, None);
                }
                self.balances[from as usize] -= amount;
                self.balances[to as usize] += amount;
            }
        }
        (ReplyClass::Ok, None)
    }

    fn render(&self) -> String {
        let list = |numbers: &[i64]| numbers.iter().map(i64::to_string).collect::<Vec<_>>().join(",");
        let mut text = String::new();
        if !self.registers.is_empty() {
            let (registers, counters) = (list(&self.registers), list(&self.counters));
            write!(text, "{registers} {counters} {} {}", list(&self.balances), self.events)
                .expect("writing to a string does not fail");
        }
        text
    }

    /// A node says that it has executed the request of an index, with this reply.
    pub fn check_reply(&self, node: u64, index: Index, reply: &StoredReply) {
        let (name, expected) =
            self.requests.get(&index).expect("a node has executed what is not a committed request");
        let first = reply.results.first().and_then(|result| result.rows.first());
        let value = first.and_then(|row| match row.values.first()?.kind {
            Some(Kind::Integer(integer)) => Some(integer),
            _ => None,
        });
        let found = Outcome { class: reply.class(), index: reply.log_index, value };
        assert_eq!(found, *expected, "node {node}, index {index}, request {name:?}: {reply:?}");
    }

    /// What a read must answer where everything up to this index was applied; empty before there are tables.
    pub fn read_at(&self, index: Index) -> &str {
        (index as usize).checked_sub(1).map_or("", |at| &self.reads[at])
    }

    /// Where a request was executed.
    pub fn executed_at(&self, name: Name) -> Option<Index> {
        self.done.get(&name).map(|outcome| outcome.index)
    }

    /// How many entries repeated a request.
    pub fn duplicates(&self) -> u64 {
        self.duplicates
    }
}
