//! The form in which a snapshot travels: parts of a file, each with a checksum, and a hash of the whole at the end.
//!
//! The end of a stream proves nothing: only the last part's hash says that all has come. It knows nothing of SQLite.

use std::io::{self, Read};

use bytes::Bytes;
use prost::Message;

/// The format of snapshots that this version sends and takes.
const FORMAT: u32 = 1;

/// How much of the file one part carries.
pub const PART_BYTES: usize = 256 << 10;

/// One part.
#[derive(Clone, PartialEq, Message)]
struct Part {
    /// In the first part only, as is the size.
    #[prost(uint32, tag = "1")]
    format: u32,
    /// Of the whole file.
    #[prost(uint64, tag = "2")]
    size_bytes: u64,
    /// Where in the file the data belongs.
    #[prost(uint64, tag = "3")]
    offset: u64,
    #[prost(bytes = "bytes", tag = "4")]
    data: Bytes,
    /// Of the data.
    #[prost(fixed32, tag = "5")]
    crc32c: u32,
    /// Of the whole file; in the last part only.
    #[prost(bytes = "bytes", tag = "6")]
    blake3: Bytes,
}

/// Why a part is refused.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum PartError {
    /// It cannot be decoded.
    #[error("a part of the snapshot cannot be read: {0}")]
    Unreadable(String),
    /// The sender is of another version.
    #[error(
        "the snapshot has format {0}, this version knows {FORMAT} only: install the same version on every node"
    )]
    UnknownFormat(u32),
    /// A part is missing, repeated, or too much.
    #[error("a part for byte {found} of the snapshot came where byte {expected} was due")]
    OutOfOrder {
        /// Where the next part should begin.
        expected: u64,
        /// Where it begins.
        found: u64,
    },
    /// The data is not what was sent.
    #[error("the snapshot's part at byte {0} was damaged on its way")]
    Damaged(u64),
    /// All parts came, and yet the whole is not what was sent.
    #[error("the snapshot's hash is not that of what was received")]
    OtherContent,
}

/// Cuts a file into parts.
#[derive(Debug)]
pub struct PartReader<R> {
    file: R,
    size_bytes: u64,
    offset: u64,
    hasher: blake3::Hasher,
}

impl<R: Read> PartReader<R> {
    /// The file has so many bytes.
    pub fn new(file: R, size_bytes: u64) -> Self {
        Self { file, size_bytes, offset: 0, hasher: blake3::Hasher::new() }
    }

    /// The next part, encoded, and whether it is the last one.
    pub fn read(&mut self) -> io::Result<(Bytes, bool)> {
        let left = self.size_bytes - self.offset;
        let mut data = vec![0; usize::try_from(left).map_or(PART_BYTES, |left| left.min(PART_BYTES))];
        self.file.read_exact(&mut data)?;
        self.hasher.update(&data);
        let mut part =
            Part { offset: self.offset, crc32c: crc32c::crc32c(&data), data: data.into(), ..Part::default() };
        if self.offset == 0 {
            (part.format, part.size_bytes) = (FORMAT, self.size_bytes);
        }
        self.offset += part.data.len() as u64;
        let last = self.offset == self.size_bytes;
        if last {
            part.blake3 = Bytes::copy_from_slice(self.hasher.finalize().as_bytes());
        }
        Ok((part.encode_to_vec().into(), last))
    }
}

/// Checks parts as they come.
#[derive(Debug, Default)]
pub struct PartTaker {
    /// Known once the first part has come.
    size_bytes: Option<u64>,
    offset: u64,
    hasher: blake3::Hasher,
}

impl PartTaker {
    /// Checks the next part. Returns its data, and whether the snapshot is now whole. After an error nothing that
    /// came is of any use.
    pub fn take(&mut self, encoded: Bytes) -> Result<(Bytes, bool), PartError> {
        let part = Part::decode(encoded).map_err(|error| PartError::Unreadable(error.to_string()))?;
        let size_bytes = match self.size_bytes {
            Some(size) => size,
            None if part.format != FORMAT => return Err(PartError::UnknownFormat(part.format)),
            None => *self.size_bytes.insert(part.size_bytes),
        };
        let end = part.offset.saturating_add(part.data.len() as u64);
        if part.offset != self.offset || end > size_bytes {
            return Err(PartError::OutOfOrder { expected: self.offset, found: part.offset });
        }
        if crc32c::crc32c(&part.data) != part.crc32c {
            return Err(PartError::Damaged(part.offset));
        }
        self.hasher.update(&part.data);
        self.offset = end;
        let whole = end == size_bytes;
        if whole && part.blake3[..] != self.hasher.finalize().as_bytes()[..] {
            return Err(PartError::OtherContent);
        }
        Ok((part.data, whole))
    }

    /// How many bytes have come.
    pub fn received_bytes(&self) -> u64 {
        self.offset
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Three parts, the last of them short.
    fn parts(content: &[u8]) -> Vec<Bytes> {
        let mut reader = PartReader::new(content, content.len() as u64);
        let mut parts = Vec::new();
        loop {
            let (part, last) = reader.read().unwrap();
            parts.push(part);
            if last {
                return parts;
            }
        }
    }

    fn content() -> Vec<u8> {
        (0..2 * PART_BYTES + 1_000).map(|at| (at % 251) as u8).collect()
    }

    /// What was received, if it was whole.
    fn take(parts: &[Bytes]) -> Result<Option<Vec<u8>>, PartError> {
        let (mut taker, mut received) = (PartTaker::default(), Vec::new());
        for part in parts {
            let (data, whole) = taker.take(part.clone())?;
            received.extend_from_slice(&data);
            if whole {
                return Ok(Some(received));
            }
        }
        Ok(None)
    }

    #[test]
    fn what_is_sent_is_what_is_received() {
        let parts = parts(&content());
        assert_eq!(parts.len(), 3);
        assert_eq!(take(&parts), Ok(Some(content())));
    }

    #[test]
    fn a_snapshot_that_is_cut_off_anywhere_is_never_whole() {
        let parts = parts(&content());
        for count in 0..parts.len() {
            assert_eq!(take(&parts[..count]), Ok(None), "{count} parts");
        }
    }

    #[test]
    fn a_missing_or_repeated_part_is_refused() {
        let parts = parts(&content());
        let missing = take(&[parts[0].clone(), parts[2].clone()]);
        assert_eq!(missing, Err(PartError::OutOfOrder { expected: 262_144, found: 524_288 }));
        let repeated = take(&[parts[0].clone(), parts[0].clone()]);
        assert_eq!(repeated, Err(PartError::OutOfOrder { expected: 262_144, found: 0 }));
    }

    #[test]
    fn no_flipped_byte_yields_another_content() {
        let sent = parts(&content());
        for nth in 0..sent.len() {
            // Every byte of the envelope, and some of the data.
            let length = sent[nth].len();
            for at in (0..length).filter(|at| *at < 64 || *at > length - 64 || at % 4_099 == 0) {
                let mut parts = sent.clone();
                let mut bytes = parts[nth].to_vec();
                bytes[at] ^= 0x10;
                parts[nth] = bytes.into();
                let taken = take(&parts);
                assert!(
                    !matches!(&taken, Ok(Some(received)) if *received != content()),
                    "part {nth}, byte {at}"
                );
            }
        }
    }

    #[test]
    fn a_flipped_byte_of_the_data_is_refused_with_its_place() {
        let mut parts = parts(&content());
        let mut bytes = parts[1].to_vec();
        bytes[PART_BYTES / 2] ^= 1;
        parts[1] = bytes.into();
        assert_eq!(take(&parts), Err(PartError::Damaged(262_144)));
    }

    #[test]
    fn another_files_part_does_not_pass_for_ones_own() {
        let mut other = content();
        other[PART_BYTES + 7] ^= 1;
        let (mut mixed, other) = (parts(&content()), parts(&other));
        mixed[1] = other[1].clone();
        assert_eq!(take(&mixed), Err(PartError::OtherContent));
    }

    #[test]
    fn a_newer_format_is_refused_by_name() {
        let part = Part { format: 2, size_bytes: 1, ..Part::default() };
        assert_eq!(take(&[part.encode_to_vec().into()]), Err(PartError::UnknownFormat(2)));
    }
}
