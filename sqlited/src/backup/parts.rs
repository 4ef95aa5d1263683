//! Bytes as messages of one size, with a hash of all of them at the end. It knows nothing of what they are.

use std::io::{self, ErrorKind, Write};

use blake3::Hasher;
use resqlite::api::{BackupResponse, BackupTrailer, backup_response::Part};

use super::Parts;

/// How much one message carries.
const PART_BYTES: usize = 256 << 10;

/// Hands out what is written to it.
pub(super) struct PartWriter<'p> {
    parts: &'p Parts,
    buffer: Vec<u8>,
    hasher: Hasher,
    size_bytes: u64,
}

impl<'p> PartWriter<'p> {
    pub(super) fn new(parts: &'p Parts) -> Self {
        Self { parts, buffer: Vec::with_capacity(PART_BYTES), hasher: Hasher::new(), size_bytes: 0 }
    }

    fn send(&mut self) -> io::Result<()> {
        self.hasher.update(&self.buffer);
        self.size_bytes += self.buffer.len() as u64;
        let data = std::mem::replace(&mut self.buffer, Vec::with_capacity(PART_BYTES));
        send(self.parts, Part::Data(data.into()))
    }

    /// Says that this was all, and returns how much.
    pub(super) fn finish(mut self) -> io::Result<u64> {
        if !self.buffer.is_empty() {
            self.send()?;
        }
        let blake3 = self.hasher.finalize().as_bytes().to_vec().into();
        send(self.parts, Part::Trailer(BackupTrailer { size_bytes: self.size_bytes, blake3 }))?;
        Ok(self.size_bytes)
    }
}

impl Write for PartWriter<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let taken = bytes.len().min(PART_BYTES - self.buffer.len());
        self.buffer.extend_from_slice(&bytes[..taken]);
        if self.buffer.len() == PART_BYTES {
            self.send()?;
        }
        Ok(taken)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Hands out one message; waits while enough others wait. Blocks.
pub(super) fn send(parts: &Parts, part: Part) -> io::Result<()> {
    let response = BackupResponse { part: Some(part) };
    parts
        .blocking_send(Ok(response))
        .map_err(|_| io::Error::new(ErrorKind::BrokenPipe, "the client has gone"))
}
