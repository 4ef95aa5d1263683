//! A Raft core without I/O, clocks or threads.
//!
//! A [`Node`] is a plain value. It is told what happened, by [`Node::tick`], [`Node::step`], [`Node::propose`],
//! [`Node::read_index`] and their like, and says through [`Node::ready`] what is to be done. It never blocks, never
//! looks at a clock, and takes randomness only from the seed in its [`Options`]: the same inputs give the same
//! outputs, always.
//!
//! # How to drive it
//!
//! After any call, take [`Ready`]s until there are none. For each of them:
//!
//! 1. Send [`Ready::messages`] at once. A leader's appends are among them: it replicates while it writes.
//! 2. If [`Ready::must_persist`], hand it to the log writer, which makes durable, Ready by Ready, in this order:
//!    [`Ready::hard_state`], [`Ready::install`], [`Ready::entries`]. Further Readys may be taken and written meanwhile;
//!    one sync may serve many.
//! 3. Once that is durable, send [`Ready::messages_after_persist`] and call [`Node::persisted`] with the Ready's
//!    number. A number stands for all before it.
//! 4. Give the state machine the entries up to [`Ready::deliverable_index`], in order.
//! 5. Pass on the outcomes of proposals and reads. A read may be served once the state machine has applied the index
//!    that it was given.
//!
//! A node that cannot write, or that gets a fatal error (see [`error`]), must stop: never retry a failed sync.
//!
//! # What it promises
//!
//! An entry that was deliverable anywhere is never lost, replaced or reordered, as long as what was called durable
//! survives on a majority. An [`Appended`] proposal is not committed yet: it is when an entry of that index *and term*
//! becomes deliverable. Delivery is exactly once in the log's order; a payload that was proposed twice is in the log
//! twice, so whoever retries must be able to tell.
//!
//! # Example
//!
//! A cluster of one, whose disk is a `Vec`:
//!
//! ```
//! use std::sync::{Arc, Mutex};
//! use raft::{Entry, HardState, Index, Log, LogError, Node, Options, Position, Term};
//!
//! #[derive(Clone, Default)]
//! struct MemoryLog(Arc<Mutex<Vec<Entry>>>);
//!
//! impl Log for MemoryLog {
//!     fn base(&self) -> Result<Position, LogError> {
//!         Ok(Position::default())
//!     }
//!     fn last_index(&self) -> Result<Index, LogError> {
//!         Ok(self.0.lock().unwrap().len() as Index)
//!     }
//!     fn term(&self, index: Index) -> Result<Option<Term>, LogError> {
//!         Ok(self.0.lock().unwrap().get(index as usize - 1).map(|entry| entry.term))
//!     }
//!     fn entries(&self, from: Index, to: Index, max_bytes: usize) -> Result<Vec<Entry>, LogError> {
//!         let mut bytes = 0;
//!         let wanted = self.0.lock().unwrap()[from as usize - 1..to as usize].to_vec();
//!         let fits = |entry: &Entry| {
//!             bytes += entry.size_bytes();
//!             bytes <= max_bytes || entry.index == from
//!         };
//!         Ok(wanted.into_iter().take_while(fits).collect())
//!     }
//! }
//!
//! let disk = MemoryLog::default();
//! let mut node = Node::new(Options::new(1, [1], 42), HardState::default(), Box::new(disk.clone()))?;
//! let mut delivered = 0;
//! for tick in 0..100 {
//!     node.set_clock(1_700_000_000_000 + tick * 100);
//!     node.tick();
//!     if tick == 50 {
//!         node.propose(7, vec!["hello".into()])?;
//!     }
//!     while let Some(ready) = node.ready()? {
//!         if ready.must_persist() {
//!             // A real driver also writes the hard state, and syncs, before it goes on.
//!             if let Some(first) = ready.entries.first() {
//!                 disk.0.lock().unwrap().truncate(first.index as usize - 1);
//!             }
//!             disk.0.lock().unwrap().extend(ready.entries);
//!             node.persisted(ready.number);
//!         }
//!         delivered = ready.deliverable_index;
//!     }
//! }
//! // The no-op that opened the term, and the payload.
//! assert_eq!(delivered, 2);
//! assert_eq!(disk.0.lock().unwrap()[1].payload, "hello");
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod election;
pub mod error;
mod forward;
mod log;
mod message;
mod node;
mod options;
mod progress;
mod quorum;
mod read;
mod ready;
mod replication;
mod standing;
mod transfer;
mod types;

pub use error::{LogError, Malformed, NewError, OptionsError, ProposeError, StepError, TransferError};
pub use log::{Install, Log};
pub use message::{Append, AppendResponse, Appended, Body, DropReason, ForwardOutcome, Message};
pub use node::{Node, SnapshotFailed, SnapshotOutcome, Status};
pub use options::Options;
pub use progress::{PeerStatus, ProgressState};
pub use ready::{ProposalOutcome, ProposalResult, ReadOutcome, Ready, SoftState};
pub use types::{
    Entry, EntryKind, HardState, Incarnation, Index, LogEnd, NodeId, Position, Role, Standing, Term,
};
