//! The log writer without a thread of its own, so that a simulation decides when it runs and where it dies.
//!
//! What it does in a turn is the thread's own code; only waiting is left out.

use std::time::Duration;

use raft::Index;

use super::{
    error::StoreError,
    writer::{LogThread, LogWriter, Turn, Write},
};

/// Hands writes to a log writer that works only when told to. Dropping it loses what was not written, as a killed
/// process does.
pub struct SteppedWriter {
    writer: LogWriter,
    log_thread: LogThread,
}

impl SteppedWriter {
    pub(super) fn new(log_thread: LogThread) -> Self {
        Self { writer: LogWriter::without_thread(&log_thread), log_thread }
    }

    /// As [`LogWriter::submit`].
    pub fn submit(&mut self, write: Write) -> Result<(), StoreError> {
        self.writer.submit(write)
    }

    /// As [`LogWriter::compact`].
    pub fn compact(&mut self, to: Index) -> Result<Index, StoreError> {
        self.writer.compact(to)
    }

    /// One turn of the log writer: writes all that waits and belongs together, or does a piece of its other work.
    /// `durable` hears the highest number that is durable now, as soon as it is. False: there was nothing to do.
    ///
    /// # Errors
    /// The node must stop: as of the thread, nothing may be tried again.
    pub fn step(&mut self, durable: impl FnOnce(u64)) -> Result<bool, StoreError> {
        Ok(self.log_thread.turn(Duration::ZERO, durable)? == Turn::Done)
    }
}
