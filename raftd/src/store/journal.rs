//! The journal: a file of fixed size in which a small write becomes durable with one write and one sync.
//!
//! It is filled from its beginning, frame by frame, and begun anew once everything in it is durable elsewhere. Its
//! length never changes and its blocks are written when it is made, so that an `fdatasync` has nothing but data to
//! write. This file knows frames; what they carry, and when the journal may be begun anew, is decided above it.
//!
//! ```text
//!      0  header of the even epochs, a block
//!   4096  header of the odd epochs, a block
//!   8192  frames, each of whole blocks
//!
//! A frame, and a header, which is a frame without a payload:
//!  0  magic     [u8; 8]
//!  8  format    u32
//! 12  checksum  u32      CRC32C of everything else
//! 16  epoch     u64      one more each time the journal is begun anew
//! 24  sequence  u64      from 0 in every epoch; of a header u64::MAX
//! 32  length    u32      of the payload
//! 36  payload
//! ```
//!
//! Numbers are little-endian. Frames fill whole blocks because a block that is written again may be torn: the next
//! frame must not share one with a frame that was acknowledged. The new epoch's header is durable before its first
//! frame is written, and frame n before frame n + 1. So of what is found at a start, a frame that is not whole is
//! the one that a crash interrupted, unless a later one of the same epoch, or one of a later epoch, is there: that is
//! damage. The first epoch is a random number, so that no payload can hold what passes for a frame.

use std::io;

use bytes::{Buf, BufMut, Bytes};

use super::{block_file::BlockFile, log_store::LogStoreError, trial::is_left_out};

/// The length of the file.
pub const JOURNAL_BYTES: usize = 4 << 20;

/// The format that this version writes, and the newest that it reads.
const FORMAT: u32 = 1;

const MAGIC: &[u8; 8] = b"RSQLJRNL";
const BLOCK_BYTES: usize = 4096;
const FRAMES_AT: usize = 2 * BLOCK_BYTES;
const FRAME_HEADER_BYTES: usize = 36;
const FORMAT_AT: usize = 8;
const CHECKSUM_AT: usize = 12;
const HEADER_SEQUENCE: u64 = u64::MAX;

/// A payload in the making, with room for the frame's header before it.
pub(super) struct Draft {
    bytes: Vec<u8>,
}

impl Draft {
    /// Nothing yet.
    pub(super) fn new() -> Self {
        Self { bytes: vec![0; FRAME_HEADER_BYTES] }
    }

    /// Where the payload is written to.
    pub(super) fn payload(&mut self) -> &mut Vec<u8> {
        &mut self.bytes
    }

    pub(super) fn payload_bytes(&self) -> usize {
        self.bytes.len() - FRAME_HEADER_BYTES
    }

    pub(super) fn clear(&mut self) {
        self.bytes.truncate(FRAME_HEADER_BYTES);
    }

    /// Fills in the header, and fills the last block up.
    fn seal(&mut self, epoch: u64, sequence: u64) -> &[u8] {
        let length = u32::try_from(self.payload_bytes()).expect("a payload fits into the journal");
        let mut header = &mut self.bytes[..FRAME_HEADER_BYTES];
        header.put_slice(MAGIC);
        header.put_u32_le(FORMAT);
        header.put_u32_le(0);
        header.put_u64_le(epoch);
        header.put_u64_le(sequence);
        header.put_u32_le(length);
        let checksum = checksum_of(&self.bytes);
        (&mut self.bytes[CHECKSUM_AT..]).put_u32_le(checksum);
        self.bytes.resize(self.bytes.len().next_multiple_of(BLOCK_BYTES), 0);
        &self.bytes
    }
}

/// Of a frame's bytes without the blocks' padding.
fn checksum_of(frame: &[u8]) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c(&frame[..CHECKSUM_AT]), &frame[CHECKSUM_AT + 4..])
}

/// A frame that was found whole.
struct Frame {
    epoch: u64,
    sequence: u64,
    payload: Bytes,
}

impl Frame {
    /// The frame that begins here, if a whole one does.
    fn at(file: &Bytes, at: usize) -> Result<Option<Self>, LogStoreError> {
        let rest = file.slice(at.min(file.len())..);
        if rest.len() < FRAME_HEADER_BYTES || !rest.starts_with(MAGIC) {
            return Ok(None);
        }
        let (mut format, mut numbers) = (&rest[FORMAT_AT..], &rest[CHECKSUM_AT..]);
        let (format, checksum) = (format.get_u32_le(), numbers.get_u32_le());
        let (epoch, sequence, length) = (numbers.get_u64_le(), numbers.get_u64_le(), numbers.get_u32_le());
        let end = FRAME_HEADER_BYTES.saturating_add(length as usize);
        if end > rest.len() || checksum != checksum_of(&rest[..end]) {
            return Ok(None);
        }
        if format > FORMAT {
            return Err(LogStoreError::NewerFormat { found: format, known: FORMAT });
        }
        Ok(Some(Self { epoch, sequence, payload: rest.slice(FRAME_HEADER_BYTES..end) }))
    }

    fn occupied_bytes(&self) -> usize {
        (FRAME_HEADER_BYTES + self.payload.len()).next_multiple_of(BLOCK_BYTES)
    }
}

/// An open journal.
pub(super) struct Journal {
    file: Box<dyn BlockFile>,
    epoch: u64,
    /// Of the next frame.
    sequence: u64,
    /// Where the next frame goes.
    end: usize,
}

impl Journal {
    /// Makes an empty journal in an empty file, durable but for the file's name.
    pub(super) fn create(file: Box<dyn BlockFile>) -> io::Result<Self> {
        let mut random = [0; 8];
        getrandom::fill(&mut random).map_err(io::Error::other)?;
        file.write_all_at(&vec![0; JOURNAL_BYTES], 0)?;
        let epoch = u64::from_le_bytes(random) >> 1;
        let mut journal = Self { file, epoch, sequence: 0, end: FRAMES_AT };
        journal.restart()?;
        Ok(journal)
    }

    /// Opens a journal and returns the payloads of its frames, in order. They stay until it is begun anew.
    pub(super) fn open(file: Box<dyn BlockFile>) -> Result<(Self, Vec<Bytes>), LogStoreError> {
        let bytes = Bytes::from(file.read_all()?);
        if bytes.len() != JOURNAL_BYTES {
            return Err(damaged(format!("it is {} bytes long instead of {JOURNAL_BYTES}", bytes.len())));
        }
        let epoch = newest_epoch(&bytes)?;
        let mut journal = Self { file, epoch, sequence: 0, end: FRAMES_AT };
        let mut payloads = Vec::new();
        while let Some(frame) = Frame::at(&bytes, journal.end)? {
            if frame.epoch != epoch || frame.sequence != journal.sequence {
                break;
            }
            journal.end += frame.occupied_bytes();
            journal.sequence += 1;
            payloads.push(frame.payload);
        }
        journal.check_rest(&bytes)?;
        Ok((journal, payloads))
    }

    /// Nothing that was written after the end may be there.
    fn check_rest(&self, bytes: &Bytes) -> Result<(), LogStoreError> {
        for at in (self.end..JOURNAL_BYTES).step_by(BLOCK_BYTES) {
            let Some(frame) = Frame::at(bytes, at)? else { continue };
            let is_later = frame.epoch == self.epoch && frame.sequence >= self.sequence;
            if is_later || frame.epoch > self.epoch {
                return Err(damaged(format!(
                    "frame {} of epoch {} is not whole at byte {}, but a later one is there",
                    self.sequence, self.epoch, self.end
                )));
            }
        }
        Ok(())
    }

    /// Whether a payload of this length still fits.
    pub(super) fn has_room(&self, payload_bytes: usize) -> bool {
        let frame = (FRAME_HEADER_BYTES + payload_bytes).next_multiple_of(BLOCK_BYTES);
        self.end + frame <= JOURNAL_BYTES
    }

    /// Whether nothing was written since the journal was begun anew.
    pub(super) fn is_empty(&self) -> bool {
        self.sequence == 0
    }

    /// Makes a payload durable, and clears the draft.
    ///
    /// # Panics
    /// If there is no room for it.
    pub(super) fn append(&mut self, draft: &mut Draft) -> io::Result<()> {
        assert!(self.has_room(draft.payload_bytes()), "the journal must be begun anew first");
        let frame = draft.seal(self.epoch, self.sequence);
        self.file.write_all_at(frame, self.end as u64)?;
        self.end += frame.len();
        self.sequence += 1;
        draft.clear();
        self.sync()
    }

    /// Begins anew, durably: what the journal holds must be durable elsewhere.
    pub(super) fn restart(&mut self) -> io::Result<()> {
        self.epoch += 1;
        self.sequence = 0;
        self.end = FRAMES_AT;
        let slot = (self.epoch % 2) * BLOCK_BYTES as u64;
        self.file.write_all_at(Draft::new().seal(self.epoch, HEADER_SEQUENCE), slot)?;
        self.sync()
    }

    fn sync(&self) -> io::Result<()> {
        if is_left_out("fdatasync") { Ok(()) } else { self.file.sync_data() }
    }
}

/// What the newer header says that is whole: a crash tears only the one that it writes, before anything depends on it.
fn newest_epoch(bytes: &Bytes) -> Result<u64, LogStoreError> {
    let mut newest = None;
    for slot in 0..2 {
        let header = Frame::at(bytes, slot * BLOCK_BYTES)?;
        let header = header.filter(|header| header.sequence == HEADER_SEQUENCE);
        newest = newest.max(header.map(|header| header.epoch));
    }
    newest.ok_or_else(|| damaged("both of its headers are damaged".into()))
}

fn damaged(reason: String) -> LogStoreError {
    LogStoreError::Damaged(format!("its journal: {reason}"))
}

#[cfg(test)]
mod tests {
    use std::{fs::File, os::unix::fs::FileExt};

    use super::*;

    fn filled(payloads: &[&[u8]]) -> (File, Journal) {
        let file = tempfile::tempfile().unwrap();
        let mut journal = Journal::create(Box::new(file.try_clone().unwrap())).unwrap();
        for payload in payloads {
            append(&mut journal, payload);
        }
        (file, journal)
    }

    fn append(journal: &mut Journal, payload: &[u8]) {
        let mut draft = Draft::new();
        draft.payload().put_slice(payload);
        journal.append(&mut draft).unwrap();
    }

    fn reopened(file: &File) -> Result<Vec<Bytes>, LogStoreError> {
        Journal::open(Box::new(file.try_clone().unwrap())).map(|(_, payloads)| payloads)
    }

    fn spoil(file: &File, at: usize) {
        let mut byte = [0];
        file.read_exact_at(&mut byte, at as u64).unwrap();
        FileExt::write_all_at(file, &[byte[0] ^ 0x40], at as u64).unwrap();
    }

    fn refusal(file: &File) -> String {
        reopened(file).unwrap_err().to_string()
    }

    #[test]
    fn what_was_appended_is_found_in_order() {
        let large = vec![7; 3 * BLOCK_BYTES];
        let (file, _) = filled(&[b"one", &large, b"", b"four"]);
        assert_eq!(reopened(&file).unwrap(), [&b"one"[..], &large, b"", b"four"]);
    }

    #[test]
    fn a_new_beginning_forgets_what_was_there() {
        let (file, mut journal) = filled(&[b"one", b"two", b"three"]);
        journal.restart().unwrap();
        assert!(journal.is_empty() && reopened(&file).unwrap().is_empty());
        append(&mut journal, b"four");
        assert_eq!(reopened(&file).unwrap(), [&b"four"[..]]);
    }

    #[test]
    fn the_frame_that_a_crash_interrupted_is_not_there() {
        let (file, mut journal) = filled(&[b"one", b"two"]);
        spoil(&file, FRAMES_AT + BLOCK_BYTES + FRAME_HEADER_BYTES);
        assert_eq!(reopened(&file).unwrap(), [&b"one"[..]]);
        // Of a new epoch it is the first one that is torn, before whole frames of the old epoch.
        journal.restart().unwrap();
        spoil(&file, FRAMES_AT);
        assert!(reopened(&file).unwrap().is_empty());
    }

    #[test]
    fn a_frame_that_rotted_is_damage() {
        let (file, _) = filled(&[b"one", b"two", b"three"]);
        spoil(&file, FRAMES_AT + BLOCK_BYTES);
        assert!(refusal(&file).contains("frame 1 of epoch"), "{}", refusal(&file));
    }

    #[test]
    fn a_header_that_a_crash_tore_leaves_the_epoch_before() {
        let (file, mut journal) = filled(&[b"one"]);
        journal.restart().unwrap();
        spoil(&file, (journal.epoch as usize % 2) * BLOCK_BYTES);
        assert_eq!(reopened(&file).unwrap(), [&b"one"[..]]);
        spoil(&file, ((journal.epoch as usize + 1) % 2) * BLOCK_BYTES);
        assert!(refusal(&file).contains("both of its headers"), "{}", refusal(&file));
    }

    #[test]
    fn a_header_that_rotted_under_its_frames_is_damage() {
        let (file, mut journal) = filled(&[b"one"]);
        journal.restart().unwrap();
        append(&mut journal, b"two");
        spoil(&file, (journal.epoch as usize % 2) * BLOCK_BYTES + 20);
        assert!(refusal(&file).contains("not whole"), "{}", refusal(&file));
    }

    #[test]
    fn another_length_is_damage_and_a_newer_format_is_not() {
        let (file, _) = filled(&[]);
        file.set_len(JOURNAL_BYTES as u64 - 1).unwrap();
        assert!(refusal(&file).contains("instead of"), "{}", refusal(&file));

        let (file, journal) = filled(&[]);
        let mut header = Draft::new();
        header.seal(journal.epoch, HEADER_SEQUENCE);
        (&mut header.bytes[FORMAT_AT..]).put_u32_le(FORMAT + 1);
        let checksum = checksum_of(&header.bytes[..FRAME_HEADER_BYTES]);
        (&mut header.bytes[CHECKSUM_AT..]).put_u32_le(checksum);
        FileExt::write_all_at(&file, &header.bytes, (journal.epoch % 2) * BLOCK_BYTES as u64).unwrap();
        assert!(matches!(reopened(&file), Err(LogStoreError::NewerFormat { found: 2, known: 1 })));
    }

    #[test]
    fn it_is_full_when_its_last_block_is() {
        let (_, mut journal) = filled(&[]);
        for _ in 0..JOURNAL_BYTES / BLOCK_BYTES - 3 {
            append(&mut journal, b"x");
        }
        assert!(journal.has_room(BLOCK_BYTES - FRAME_HEADER_BYTES) && !journal.has_room(BLOCK_BYTES));
        append(&mut journal, b"x");
        assert!(!journal.has_room(0));
        journal.restart().unwrap();
        assert!(journal.has_room(0));
    }
}
