//! The record: how entries of the Raft log are laid out as keys and values of the log store.
//!
//! This file knows bytes and nothing else: no store, no files, no order of operations. Decoding never
//! panics, whatever the bytes are, and accepts nothing that encoding could not have produced.
//!
//! A key is the big-endian index of the record's first entry and a part number, so that the order of
//! the keys is the order of the log. A value is at most 64 KiB:
//!
//! ```text
//!  0  format    u8       1
//!  1  shape     u8       0 = whole entries, 1 = one part of a large entry
//!  2  checksum  u32      CRC32C of the key and of the value without these four bytes
//!  6  link      [u8; 16] BLAKE3, truncated, of the value before this one
//! 22  body
//!       entries: count u32, then for each: kind u8, term u64, timestamp_ms u64, length u32, payload
//!       part:    kind u8, term u64, timestamp_ms u64, length u32 of the whole payload, this part of it
//! ```
//!
//! Numbers in values are little-endian. The checksum finds damaged bytes. The link finds what a
//! checksum cannot: a record that is whole but stale, or that stands where another one stood.
//! Format, checksum and their places stay where they are in every later format, so that a newer
//! format can be told from damage.

use bytes::{Buf, BufMut, Bytes};
use raft::{Entry, EntryKind, Index};

/// The format that this version writes, and the newest that it reads.
pub const FORMAT: u8 = 1;

/// The largest value. sled moves a page that outgrows a quarter of a segment to a file that it never
/// syncs. A page holds up to 17 values before it splits: with 8 MiB segments 64 KiB is safe.
pub const MAX_VALUE_BYTES: usize = 64 << 10;

const HEADER_BYTES: usize = 22;
const CHECKSUM_AT: usize = 2;
const COUNT_BYTES: usize = 4;
const ENTRY_HEADER_BYTES: usize = 21;
/// How much of a large entry's payload every part but the last carries.
const PART_BYTES: usize = MAX_VALUE_BYTES - HEADER_BYTES - ENTRY_HEADER_BYTES;

/// The largest payload that an entry may have: all parts must have numbers.
pub const MAX_PAYLOAD_BYTES: usize = PART_BYTES * u16::MAX as usize;

/// Where a record stands: the index of its first entry, and its part when that entry is split.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Key {
    /// Index of the record's first (or, in parts, only) entry.
    pub first: Index,
    /// 0, or the number of the part.
    pub part: u16,
}

impl Key {
    /// Length of a key in bytes.
    pub const BYTES: usize = 10;

    /// The key of a record that begins with this entry.
    pub fn at(first: Index) -> Self {
        Self { first, part: 0 }
    }

    /// The last key that a record beginning with this entry can have.
    pub fn end_of(first: Index) -> Self {
        Self { first, part: u16::MAX }
    }

    /// The key's bytes, which sort as the keys do.
    pub fn to_bytes(self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        bytes[..8].copy_from_slice(&self.first.to_be_bytes());
        bytes[8..].copy_from_slice(&self.part.to_be_bytes());
        bytes
    }

    /// The key with these bytes, or `None` if they are not a key.
    pub fn from_bytes(mut bytes: &[u8]) -> Option<Self> {
        (bytes.len() == Self::BYTES).then(|| Self { first: bytes.get_u64(), part: bytes.get_u16() })
    }
}

/// What ties a record to the one before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Link([u8; 16]);

impl Link {
    /// The link of a record that begins an empty log.
    pub const GENESIS: Self = Self([0; 16]);

    /// The link that the record after this value carries.
    pub fn to(value: &[u8]) -> Self {
        let mut link = [0; 16];
        link.copy_from_slice(&blake3::hash(value).as_bytes()[..16]);
        Self(link)
    }
}

/// A decoded record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// Ties it to the record before it.
    pub link: Link,
    /// What it holds.
    pub content: Content,
}

/// What a record holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Content {
    /// At least one entry, with consecutive indexes.
    Entries(Vec<Entry>),
    /// One part of an entry that is too large for a record.
    Part(Part),
}

/// One part of a large entry; the entry's fields stand in every part.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    /// The entry, with this part of the payload.
    pub entry: Entry,
    /// Length of the whole payload in bytes.
    pub payload_len: usize,
    /// Whether the payload ends with this part.
    pub is_last: bool,
}

/// Why bytes are not a record.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RecordError {
    /// Written by a later version of this software.
    #[error("the record has format {0}; this version knows up to {FORMAT}")]
    NewerFormat(u8),
    /// The bytes are not those that were written.
    #[error("the record's checksum does not match")]
    Checksum,
    /// The checksum matches, and still it is no record.
    #[error("the record is malformed: {0}")]
    Malformed(&'static str),
}

/// Whether the entry needs records of its own, in parts.
pub fn is_large(entry: &Entry) -> bool {
    entry.payload.len() > MAX_VALUE_BYTES - HEADER_BYTES - COUNT_BYTES - ENTRY_HEADER_BYTES
}

/// How many of the first entries fit one record; 0 if the first one is large.
pub fn fitting(entries: &[Entry]) -> usize {
    let mut room = MAX_VALUE_BYTES - HEADER_BYTES - COUNT_BYTES;
    let fits = |entry: &&Entry| {
        let needed = ENTRY_HEADER_BYTES + entry.payload.len();
        room.checked_sub(needed).map(|left| room = left).is_some()
    };
    entries.iter().take_while(fits).count()
}

/// The record of these entries, of which there is at least one and not more than [`fitting`].
pub fn encode_entries(entries: &[Entry], link: Link) -> (Key, Vec<u8>) {
    let key = Key::at(entries[0].index);
    let payloads: usize = entries.iter().map(|entry| entry.payload.len()).sum();
    let body = COUNT_BYTES + entries.len() * ENTRY_HEADER_BYTES + payloads;
    let mut value = begin(0, link, body);
    value.put_u32_le(entries.len() as u32);
    for entry in entries {
        put_entry_header(&mut value, entry);
        value.put_slice(&entry.payload);
    }
    (key, seal(key, value))
}

/// How many parts a large entry has.
pub fn part_count(entry: &Entry) -> u16 {
    let parts = entry.payload.len().div_ceil(PART_BYTES);
    u16::try_from(parts).expect("the length of a payload is bounded where it is proposed")
}

/// The record of one part of a large entry; `part` counts from 0 to [`part_count`].
pub fn encode_part(entry: &Entry, part: u16, link: Link) -> (Key, Vec<u8>) {
    let key = Key { first: entry.index, part };
    let start = usize::from(part) * PART_BYTES;
    let piece = &entry.payload[start..entry.payload.len().min(start + PART_BYTES)];
    let mut value = begin(1, link, ENTRY_HEADER_BYTES + piece.len());
    put_entry_header(&mut value, entry);
    value.put_slice(piece);
    (key, seal(key, value))
}

/// The record under this key. Payloads share the memory of `value`.
pub fn decode(key: Key, value: &Bytes) -> Result<Record, RecordError> {
    if value.len() < HEADER_BYTES || value.len() > MAX_VALUE_BYTES {
        return Err(RecordError::Malformed("its length is impossible"));
    }
    let mut header = &value[..HEADER_BYTES];
    let (format, shape, checksum) = (header.get_u8(), header.get_u8(), header.get_u32_le());
    if checksum != checksum_of(key, value) {
        return Err(RecordError::Checksum);
    }
    if format > FORMAT {
        return Err(RecordError::NewerFormat(format));
    }
    let mut link = [0; 16];
    header.copy_to_slice(&mut link);
    let body = value.slice(HEADER_BYTES..);
    let content = match shape {
        0 => Content::Entries(decode_entries(key, body)?),
        1 => Content::Part(decode_part(key, body)?),
        _ => return Err(RecordError::Malformed("its shape is unknown")),
    };
    Ok(Record { link: Link(link), content })
}

fn begin(shape: u8, link: Link, body_len: usize) -> Vec<u8> {
    let mut value = Vec::with_capacity(HEADER_BYTES + body_len);
    value.put_u8(FORMAT);
    value.put_u8(shape);
    value.put_u32_le(0);
    value.put_slice(&link.0);
    value
}

fn seal(key: Key, mut value: Vec<u8>) -> Vec<u8> {
    assert!(value.len() <= MAX_VALUE_BYTES, "a record outgrew its bound");
    let checksum = checksum_of(key, &value);
    value[CHECKSUM_AT..CHECKSUM_AT + 4].copy_from_slice(&checksum.to_le_bytes());
    value
}

fn checksum_of(key: Key, value: &[u8]) -> u32 {
    let sum = crc32c::crc32c(&key.to_bytes());
    let sum = crc32c::crc32c_append(sum, &value[..CHECKSUM_AT]);
    crc32c::crc32c_append(sum, &value[CHECKSUM_AT + 4..])
}

fn put_entry_header(value: &mut Vec<u8>, entry: &Entry) {
    value.put_u8(match entry.kind {
        EntryKind::Noop => 0,
        EntryKind::Payload => 1,
    });
    value.put_u64_le(entry.term);
    value.put_u64_le(entry.timestamp_ms);
    value.put_u32_le(u32::try_from(entry.payload.len()).expect("bounded by MAX_PAYLOAD_BYTES"));
}

/// The entry without its payload, and the payload's length.
fn take_entry_header(body: &mut Bytes, index: Index) -> Result<(Entry, usize), RecordError> {
    if body.len() < ENTRY_HEADER_BYTES {
        return Err(RecordError::Malformed("it ends inside an entry"));
    }
    let kind = match body.get_u8() {
        0 => EntryKind::Noop,
        1 => EntryKind::Payload,
        _ => return Err(RecordError::Malformed("the kind of an entry is unknown")),
    };
    let (term, timestamp_ms) = (body.get_u64_le(), body.get_u64_le());
    let payload_len = body.get_u32_le() as usize;
    Ok((Entry { index, term, kind, timestamp_ms, payload: Bytes::new() }, payload_len))
}

fn decode_entries(key: Key, mut body: Bytes) -> Result<Vec<Entry>, RecordError> {
    if key.part != 0 {
        return Err(RecordError::Malformed("it holds whole entries under the key of a part"));
    }
    if body.len() < COUNT_BYTES {
        return Err(RecordError::Malformed("it ends inside its header"));
    }
    let count = body.get_u32_le();
    if count == 0 {
        return Err(RecordError::Malformed("it holds no entry"));
    }
    if key.first.checked_add(u64::from(count)).is_none() {
        return Err(RecordError::Malformed("its indexes are impossible"));
    }
    let mut entries = Vec::new();
    for offset in 0..u64::from(count) {
        let (mut entry, payload_len) = take_entry_header(&mut body, key.first + offset)?;
        if body.len() < payload_len {
            return Err(RecordError::Malformed("it ends inside an entry"));
        }
        entry.payload = body.split_to(payload_len);
        entries.push(entry);
    }
    if !body.is_empty() {
        return Err(RecordError::Malformed("bytes follow its last entry"));
    }
    Ok(entries)
}

fn decode_part(key: Key, mut body: Bytes) -> Result<Part, RecordError> {
    let (mut entry, payload_len) = take_entry_header(&mut body, key.first)?;
    let start = usize::from(key.part) * PART_BYTES;
    let Some(left) = payload_len.checked_sub(start).filter(|left| *left > 0) else {
        return Err(RecordError::Malformed("its part lies behind the payload's end"));
    };
    if body.len() != left.min(PART_BYTES) {
        return Err(RecordError::Malformed("its part has the wrong length"));
    }
    entry.payload = body;
    Ok(Part { entry, payload_len, is_last: left <= PART_BYTES })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn entry(index: Index, payload: Vec<u8>) -> Entry {
        Entry {
            index,
            term: 7,
            kind: EntryKind::Payload,
            timestamp_ms: 1_000 + index,
            payload: payload.into(),
        }
    }

    fn payloads() -> impl Strategy<Value = Vec<Vec<u8>>> {
        prop::collection::vec(prop::collection::vec(any::<u8>(), 0..200), 1..20)
    }

    proptest! {
        #[test]
        fn what_is_encoded_decodes_to_the_same(first in 1..u64::MAX / 2, payloads in payloads()) {
            let entries: Vec<_> = (first..).zip(payloads).map(|(index, payload)| entry(index, payload)).collect();
            let link = Link::to(b"before");
            let (key, value) = encode_entries(&entries, link);
            prop_assert_eq!(Key::from_bytes(&key.to_bytes()), Some(key));
            let record = decode(key, &value.into()).unwrap();
            prop_assert_eq!(record, Record { link, content: Content::Entries(entries) });
        }

        #[test]
        fn every_changed_byte_is_detected(payloads in payloads(), at in any::<prop::sample::Index>(), flip in 1..=255u8) {
            let entries: Vec<_> = (1..).zip(payloads).map(|(index, payload)| entry(index, payload)).collect();
            let (key, mut value) = encode_entries(&entries, Link::GENESIS);
            let at = at.index(value.len());
            value[at] ^= flip;
            prop_assert_eq!(decode(key, &value.into()), Err(RecordError::Checksum));
        }

        #[test]
        fn every_truncation_is_detected(payloads in payloads(), at in any::<prop::sample::Index>()) {
            let entries: Vec<_> = (1..).zip(payloads).map(|(index, payload)| entry(index, payload)).collect();
            let (key, mut value) = encode_entries(&entries, Link::GENESIS);
            value.truncate(at.index(value.len()));
            prop_assert!(decode(key, &value.into()).is_err());
        }

        #[test]
        fn no_bytes_make_decoding_panic(first in any::<u64>(), part in any::<u16>(), shape in 0..3u8, body in prop::collection::vec(any::<u8>(), 0..300)) {
            // Sealed with a true checksum, so that the bytes get past it to the parsing.
            let key = Key { first, part };
            let mut value = begin(shape, Link::GENESIS, body.len());
            value.extend(body);
            let _ = decode(key, &seal(key, value).into());
        }
    }

    #[test]
    fn a_record_under_another_key_is_detected() {
        let (_, value) = encode_entries(&[entry(5, b"five".to_vec())], Link::GENESIS);
        assert_eq!(decode(Key::at(6), &value.into()), Err(RecordError::Checksum));
    }

    #[test]
    fn a_newer_format_is_told_from_damage() {
        let (key, mut value) = encode_entries(&[entry(5, b"five".to_vec())], Link::GENESIS);
        value[0] = FORMAT + 1;
        assert_eq!(decode(key, &seal(key, value).into()), Err(RecordError::NewerFormat(FORMAT + 1)));
    }

    #[test]
    fn a_large_entry_comes_back_from_its_parts() {
        for len in [MAX_VALUE_BYTES, PART_BYTES * 2, PART_BYTES * 2 + 1, 1 << 20] {
            let payload: Vec<u8> = (0..len).map(|at| at as u8).collect();
            let whole = entry(9, payload);
            assert!(is_large(&whole) && fitting(std::slice::from_ref(&whole)) == 0);
            let mut joined = Vec::new();
            for part in 0..part_count(&whole) {
                let (key, value) = encode_part(&whole, part, Link::GENESIS);
                assert!(value.len() <= MAX_VALUE_BYTES);
                let Content::Part(piece) = decode(key, &value.into()).unwrap().content else {
                    panic!("a part")
                };
                assert_eq!((piece.payload_len, piece.is_last), (len, part + 1 == part_count(&whole)));
                joined.extend_from_slice(&piece.entry.payload);
            }
            assert_eq!(joined, whole.payload);
        }
    }

    #[test]
    fn the_largest_entry_that_is_not_large_fits_one_record() {
        let largest = MAX_VALUE_BYTES - HEADER_BYTES - COUNT_BYTES - ENTRY_HEADER_BYTES;
        let fits = entry(1, vec![0; largest]);
        assert!(!is_large(&fits));
        assert_eq!(fitting(&[fits.clone(), entry(2, Vec::new())]), 1);
        assert_eq!(encode_entries(&[fits], Link::GENESIS).1.len(), MAX_VALUE_BYTES);
        assert!(is_large(&entry(1, vec![0; largest + 1])));
    }
}
