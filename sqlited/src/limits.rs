//! Every bound of the service in one place: what a request may ask for, how
//! much may wait, and for how long.
//!
//! Limits on what a *request* may hold are constants or cluster-wide settings,
//! so that a request is refused alike whichever node it reaches. It knows
//! nothing of how the limits are enforced.

use std::time::Duration;

/// How many statements one atomic request, or one request's script, may hold.
pub const MAX_STATEMENTS: usize = 200_000;

/// How many parameters one statement may have: SQLite's `SQLITE_MAX_VARIABLE_NUMBER`.
pub const MAX_PARAMETERS: usize = 32_766;

/// A script travels in entries of about so many bytes: large enough that a
/// round of consensus is shared by many statements, small enough that the entry
/// does not keep others waiting.
pub const SCRIPT_PART_BYTES: usize = 256 << 10;

/// A script travels in entries of at most so many statements.
pub const SCRIPT_PART_STATEMENTS: usize = 2_048;

/// A reader answers at most so many statements of a script before it takes another's read: enough that handing them
/// over costs little for each, few enough that nobody waits long.
pub const SCRIPT_READS: usize = 64;

/// What a gRPC message may be larger than the log entry that it becomes.
pub const MESSAGE_SLACK_BYTES: usize = 64 << 10;

/// File descriptors that clients may not have: the database's, raftd's, the metrics', and those of reads and transactions.
pub const DESCRIPTORS_RESERVED: u64 = 512;

/// How long a request is worked on when its client names no deadline.
pub const DEFAULT_DEADLINE: Duration = Duration::from_secs(10);

/// How many election timeouts a request waits for a leader, or for raftd, before it is UNAVAILABLE.
pub const LEADERLESS_ELECTION_TIMEOUTS: u32 = 5;

/// How many writes may wait for their reply.
pub const MAX_WRITES_WAITING: usize = 16_384;

/// How many bytes the waiting writes may have together.
pub const MAX_WRITE_BYTES_WAITING: usize = 128 << 20;

/// How many bytes of proposals travel to raftd in one message, unless one alone is larger.
pub const PROPOSE_BATCH_BYTES: usize = 1 << 20;

/// How many reads may wait for a reader, for each reader.
pub const MAX_READS_QUEUED_PER_READER: usize = 256;

/// How many linearizable reads may wait for a barrier.
pub const MAX_BARRIERS_WAITING: usize = 65_536;

/// Committed entries that were received and are not yet applied may have so
/// many bytes; then HTTP/2's flow control makes raftd wait.
pub const FOLLOW_QUEUE_BYTES: usize = 32 << 20;

/// A group of entries that is applied in one transaction is closed at so many bytes.
pub const APPLY_GROUP_BYTES: usize = 4 << 20;

/// Rows travel in messages of about so many bytes.
pub const ROW_BATCH_BYTES: usize = 64 << 10;

/// How many messages of rows may wait for a client that is slower than its reader.
pub const ROW_BATCHES_WAITING: usize = 8;

/// How long a read may hold its snapshot. Pages behind the oldest snapshot
/// cannot be checkpointed, so the write-ahead log grows for as long.
pub const SNAPSHOT_MAX: Duration = Duration::from_secs(300);

/// How long the snapshot of an optimistic transaction is held.
pub const TRANSACTION_MAX: Duration = Duration::from_secs(30);

/// How many optimistic transactions may be open at a node: each has a connection of its own.
pub const MAX_TRANSACTIONS: usize = 64;

/// How long a read waits for a client that takes no rows, before it gives its reader to others.
pub const CLIENT_STALL_MAX: Duration = Duration::from_secs(30);

/// How long the last step of a restore may take, in which every node copies the whole content.
pub const RESTORE_FINISH_MAX: Duration = Duration::from_secs(1_800);

/// After a stop was asked for, requests under way have so long to end.
pub const STOP_GRACE: Duration = Duration::from_secs(2);

/// Then they are refused, and that has so long to reach the clients.
pub const STOP_LAST_WORDS: Duration = Duration::from_millis(500);

/// After that, threads have so long to end. A process that leaves earlier loses nothing: SQLite is crash-safe.
pub const STOP_JOIN: Duration = Duration::from_secs(2);

/// A node that has not applied what was committed so long ago is behind, and says so in its health.
pub const BEHIND_AFTER: Duration = Duration::from_secs(10);

/// At least this often (in entries) the applied state is made durable, so that raftd may discard its log.
pub const DURABLE_EVERY_ENTRIES: u64 = 4_096;

/// After a write the applied state is durable at the latest so much later.
pub const DURABLE_EVERY: Duration = Duration::from_secs(1);
