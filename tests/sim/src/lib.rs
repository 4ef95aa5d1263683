//! Deterministic simulation of whole clusters: one thread and one seed make one history.
//!
//! Real are the Raft core, the store's logic (records, marks, the hard-state file, the log writer), compaction, the
//! wire format of messages, and the execution of entries on SQLite. Simulated are the disk under the store, the
//! network, the clocks, the processes' deaths, and the event loops that the daemons run on tokio. Checked at every
//! step are Raft's promises and what clients are told; see `docs/correctness.md`.
//!
//! A history has two phases. In the first, faults strike while clients work. In the second there are no faults, and
//! everything must come to its end within a bounded time.

mod clients;
mod cluster;
mod disk;
mod faults;
mod injection;
mod machine;
mod model;
mod options;
mod oracle;
mod raftd_process;
mod random;
mod runner;
mod snapshots;
mod sqlited_process;
mod workload;

pub use cluster::{Figures, PROGRESS_WITHIN_MS};
pub use faults::{Kind, Strikes};
pub use options::{Defect, Options};
pub use runner::{Failure, Summary, run, run_many, shrink};
