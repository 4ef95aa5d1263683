//! Whether a write-ahead log still reaches as far as it was written back to the database.
//!
//! It reads the log as SQLite recovers it (<https://sqlite.org/fileformat2.html>, section 4), and never writes. Asked
//! only while nobody has the database open.

use std::{
    fs::File,
    io::{self, BufReader, Read},
    path::Path,
};

use super::{LoadError, PAGE_BYTES};
use crate::snapshot::beside;

const HEADER_BYTES: usize = 32;
const FRAME_HEADER_BYTES: usize = 24;
/// The first bytes of a log whose checksums take words as little-endian; with the lowest bit set, as big-endian.
const MAGIC: u32 = 0x377f_0682;

/// Up to where a write-ahead log is in the database, durably.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WalMark {
    /// They name the log: a new one has others.
    pub salts: [u8; 8],
    /// So many of its frames.
    pub frames: u32,
}

/// Refuses a log that ends before the mark: pages in it would cover newer ones in the database. Another log, or none,
/// may follow the one of the mark: the database holds all of that.
pub(super) fn check(database: &Path, mark: WalMark) -> Result<(), LoadError> {
    let path = beside(database, "-wal");
    let file = match File::open(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        opened => opened?,
    };
    match committed_frames(BufReader::with_capacity(1 << 18, file), mark)? {
        Some(frames) if frames < mark.frames => Err(LoadError::Damaged {
            file: path,
            reason: format!(
                "only {frames} of its frames are what was written, and {} are in the database already",
                mark.frames
            ),
        }),
        _ => Ok(()),
    }
}

/// How many frames end with a commit, looking no further than the mark. None: it is not the mark's log.
fn committed_frames(mut log: impl Read, mark: WalMark) -> io::Result<Option<u32>> {
    let mut header = [0; HEADER_BYTES];
    if !filled(&mut log, &mut header)? || header[16..24] != mark.salts {
        return Ok(None);
    }
    let magic = big_endian(&header, 0);
    let is_big_endian = magic & 1 == 1;
    let mut sum = Sum { is_big_endian, state: [0; 2] };
    sum.add(&header[..24]);
    // SQLite ignores a log with such a header: then the database holds what was written back, and no page less.
    if magic & !1 != MAGIC
        || sum.state != stated(&header, 24)
        || big_endian(&header, 8) as usize != PAGE_BYTES
    {
        return Ok(None);
    }
    let mut committed = 0;
    let mut frame = [0; FRAME_HEADER_BYTES + PAGE_BYTES];
    for number in 1..=mark.frames {
        if !filled(&mut log, &mut frame)? || frame[8..16] != mark.salts {
            break;
        }
        sum.add(&frame[..8]);
        sum.add(&frame[FRAME_HEADER_BYTES..]);
        if sum.state != stated(&frame, 16) || big_endian(&frame, 0) == 0 {
            break;
        }
        if big_endian(&frame, 4) != 0 {
            committed = number;
        }
    }
    Ok(Some(committed))
}

/// Whether there were as many bytes.
fn filled(log: &mut impl Read, buffer: &mut [u8]) -> io::Result<bool> {
    match log.read_exact(buffer) {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
        read => read.map(|()| true),
    }
}

fn big_endian(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

fn stated(bytes: &[u8], at: usize) -> [u32; 2] {
    [big_endian(bytes, at), big_endian(bytes, at + 4)]
}

/// SQLite's checksum of a log, from its beginning (section 4.2).
struct Sum {
    is_big_endian: bool,
    state: [u32; 2],
}

impl Sum {
    fn add(&mut self, bytes: &[u8]) {
        let word = |bytes: &[u8]| {
            let bytes = [bytes[0], bytes[1], bytes[2], bytes[3]];
            if self.is_big_endian { u32::from_be_bytes(bytes) } else { u32::from_le_bytes(bytes) }
        };
        let [mut s0, mut s1] = self.state;
        for pair in bytes.chunks_exact(8) {
            s0 = s0.wrapping_add(word(&pair[..4])).wrapping_add(s1);
            s1 = s1.wrapping_add(word(&pair[4..])).wrapping_add(s0);
        }
        self.state = [s0, s1];
    }
}

#[cfg(test)]
mod tests {
    use rusqlite::Connection;

    use super::*;

    /// A log of SQLite's own, whose last frame is a commit, and what its mark would be.
    fn log() -> (Vec<u8>, WalMark) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("test.db");
        let connection = Connection::open(&path).unwrap();
        connection.execute_batch("PRAGMA journal_mode = WAL; CREATE TABLE t(a)").unwrap();
        for _ in 0..5 {
            connection.execute("INSERT INTO t VALUES (randomblob(9000))", []).unwrap();
        }
        let log = std::fs::read(directory.path().join("test.db-wal")).unwrap();
        let frames = (log.len() - HEADER_BYTES) / (FRAME_HEADER_BYTES + PAGE_BYTES);
        let mark = WalMark { salts: log[16..24].try_into().unwrap(), frames: frames as u32 };
        (log, mark)
    }

    #[test]
    fn sqlites_own_log_reaches_to_its_end_and_a_changed_byte_cuts_it() {
        let (log, mark) = log();
        assert!(mark.frames >= 15, "{mark:?}");
        assert_eq!(committed_frames(&log[..], mark).unwrap(), Some(mark.frames));
        for number in 0..mark.frames as usize {
            for within in [0, 9, 17, 24, 3_000] {
                let mut changed = log.clone();
                changed[HEADER_BYTES + number * (FRAME_HEADER_BYTES + PAGE_BYTES) + within] ^= 4;
                let reaches = committed_frames(&changed[..], mark).unwrap().unwrap();
                assert!(reaches as usize <= number, "frame {number}, byte {within}: {reaches}");
            }
            let cut = HEADER_BYTES + (number + 1) * (FRAME_HEADER_BYTES + PAGE_BYTES) - 1;
            assert!(committed_frames(&log[..cut], mark).unwrap().unwrap() as usize <= number);
        }
    }

    #[test]
    fn a_log_that_sqlite_ignores_is_none() {
        let (log, mark) = log();
        for at in 0..HEADER_BYTES {
            let mut changed = log.clone();
            changed[at] ^= 1;
            assert_eq!(committed_frames(&changed[..], mark).unwrap(), None, "byte {at}");
        }
        assert_eq!(committed_frames(&log[..20], mark).unwrap(), None);
        let other = WalMark { salts: [1; 8], ..mark };
        assert_eq!(committed_frames(&log[..], other).unwrap(), None);
    }
}
