//! The file of the sums: `resqlite.db-sums`.
//!
//! ```text
//! 0      header, and at 4096 the same once more: one of them may rot
//! 8192   the sum of every page, CRC32C, 4 bytes each, little-endian
//! ```
//!
//! The sums need no check of their own: a changed one fails its page. A write that a power cut tears leaves each byte
//! old or new, so that only sums of pages which were being written can be wrong; those pages are still in the
//! write-ahead log (see [`super`]). The header is smaller than a sector, and its checksum finds one that is neither.

use std::{
    collections::BTreeSet,
    fs::{self, File},
    io,
    os::unix::fs::FileExt,
    path::Path,
};

use super::{LoadError, PAGE_BYTES, WalMark};

/// The file's name is the database's with this at its end.
pub const FILE_SUFFIX: &str = "-sums";

const MAGIC: &[u8; 8] = b"ReSqSums";
/// The format of the file that this version writes and reads.
const FORMAT: u32 = 1;
const HEADER_BYTES: usize = 40;
const HEADERS_AT: [u64; 2] = [0, 4_096];
const SUMS_AT: u64 = 8_192;
/// How many sums are written together.
pub(super) const SUMS_PER_BLOCK: usize = 1_024;

/// The open file.
#[derive(Debug)]
pub(super) struct Sidecar {
    file: File,
    mark: WalMark,
}

/// What the header says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Header {
    pages: u64,
    mark: WalMark,
}

/// Why a header is not one.
enum Unreadable {
    Damaged,
    NewerFormat(u32),
}

impl Header {
    fn encode(self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[..8].copy_from_slice(MAGIC);
        bytes[8..12].copy_from_slice(&FORMAT.to_le_bytes());
        bytes[12..20].copy_from_slice(&self.pages.to_le_bytes());
        bytes[20..28].copy_from_slice(&self.mark.salts);
        bytes[28..32].copy_from_slice(&self.mark.frames.to_le_bytes());
        // Four bytes are free.
        let sum = crc32c::crc32c(&bytes[..36]);
        bytes[36..].copy_from_slice(&sum.to_le_bytes());
        bytes
    }

    fn decode(bytes: &[u8; HEADER_BYTES]) -> Result<Self, Unreadable> {
        let number = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        if &bytes[..8] != MAGIC || crc32c::crc32c(&bytes[..36]) != number(36) {
            return Err(Unreadable::Damaged);
        }
        if number(8) != FORMAT {
            return Err(Unreadable::NewerFormat(number(8)));
        }
        let pages = u64::from(number(12)) | u64::from(number(16)) << 32;
        let mut salts = [0; 8];
        salts.copy_from_slice(&bytes[20..28]);
        Ok(Self { pages, mark: WalMark { salts, frames: number(28) } })
    }
}

impl Sidecar {
    /// Opens the file and reads all sums.
    pub(super) fn open(path: &Path) -> Result<(Self, Vec<u32>), LoadError> {
        let damaged = |reason: &str| LoadError::Damaged { file: path.to_owned(), reason: reason.to_owned() };
        let file = match File::options().read(true).write(true).open(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(damaged(
                    "it is missing, and without it nobody can tell whether the database is damaged",
                ));
            }
            opened => opened?,
        };
        let header = match HEADERS_AT.map(|at| read_header(&file, at)) {
            [Ok(header), _] | [_, Ok(header)] => header,
            [Err(Unreadable::NewerFormat(found)), _] | [_, Err(Unreadable::NewerFormat(found))] => {
                return Err(LoadError::NewerFormat { file: path.to_owned(), found, known: FORMAT });
            }
            [Err(Unreadable::Damaged), Err(Unreadable::Damaged)] => {
                return Err(damaged("neither copy of its header is what was written"));
            }
        };
        let sums_bytes = file.metadata()?.len().saturating_sub(SUMS_AT);
        if sums_bytes / 4 < header.pages {
            return Err(damaged("it is cut off"));
        }
        let mut bytes = vec![0; header.pages as usize * 4];
        file.read_exact_at(&mut bytes, SUMS_AT)?;
        let sums = bytes.chunks_exact(4).map(|sum| u32::from_le_bytes([sum[0], sum[1], sum[2], sum[3]]));
        Ok((Self { file, mark: header.mark }, sums.collect()))
    }

    /// Up to where the write-ahead log is in the database.
    pub(super) fn wal_mark(&self) -> WalMark {
        self.mark
    }

    /// Writes the blocks that have changed and the header, durably.
    pub(super) fn save(&mut self, sums: &[u32], changed: &BTreeSet<usize>, mark: WalMark) -> io::Result<()> {
        let first_sums = changed.iter().map(|block| block * SUMS_PER_BLOCK);
        for first in first_sums.filter(|first| *first < sums.len()) {
            let block = &sums[first..sums.len().min(first + SUMS_PER_BLOCK)];
            self.file.write_all_at(&encode(block), SUMS_AT + first as u64 * 4)?;
        }
        write_headers(&self.file, Header { pages: sums.len() as u64, mark })?;
        self.file.sync_data()?;
        self.mark = mark;
        Ok(())
    }
}

fn encode(sums: &[u32]) -> Vec<u8> {
    sums.iter().flat_map(|sum| sum.to_le_bytes()).collect()
}

fn write_headers(file: &File, header: Header) -> io::Result<()> {
    HEADERS_AT.iter().try_for_each(|at| file.write_all_at(&header.encode(), *at))
}

fn read_header(file: &File, at: u64) -> Result<Header, Unreadable> {
    let mut bytes = [0; HEADER_BYTES];
    file.read_exact_at(&mut bytes, at).map_err(|_| Unreadable::Damaged)?;
    Header::decode(&bytes)
}

/// Makes the sums of a file that comes piece by piece.
#[derive(Debug, Default)]
pub struct Builder {
    sums: Vec<u32>,
    /// Of the page that is not whole yet.
    sum: u32,
    length: usize,
}

impl Builder {
    /// The next bytes of the file.
    pub fn add(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let (now, later) = bytes.split_at(bytes.len().min(PAGE_BYTES - self.length));
            self.sum = crc32c::crc32c_append(self.sum, now);
            self.length += now.len();
            if self.length == PAGE_BYTES {
                self.sums.push(self.sum);
                (self.sum, self.length) = (0, 0);
            }
            bytes = later;
        }
    }

    /// Writes the sums, durably but for the file's name. What does not fill a page is no page of a database.
    pub fn save(self, path: &Path) -> io::Result<()> {
        match fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let file = File::create_new(path)?;
        file.write_all_at(&encode(&self.sums), SUMS_AT)?;
        write_headers(&file, Header { pages: self.sums.len() as u64, mark: WalMark::default() })?;
        file.sync_all()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn saved(path: &Path, pages: usize) -> Vec<u32> {
        let mut builder = Builder::default();
        (0..pages).for_each(|page| builder.add(&[page as u8; PAGE_BYTES]));
        let sums = builder.sums.clone();
        builder.save(path).unwrap();
        sums
    }

    #[test]
    fn pieces_of_any_size_make_the_same_sums() {
        let bytes: Vec<u8> = (0..5 * PAGE_BYTES).map(|at| (at / 7) as u8).collect();
        let mut whole = Builder::default();
        whole.add(&bytes);
        for size in [1, 100, 4_095, 4_097, 9_000] {
            let mut builder = Builder::default();
            bytes.chunks(size).for_each(|piece| builder.add(piece));
            assert_eq!(builder.sums, whole.sums, "pieces of {size}");
        }
        assert_eq!(whole.sums.len(), 5);
        assert_eq!(whole.sums[1], crc32c::crc32c(&bytes[PAGE_BYTES..2 * PAGE_BYTES]));
    }

    #[test]
    fn one_rotten_header_is_read_over_two_are_damage() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("sums");
        for at in 0..HEADER_BYTES as u64 {
            let sums = saved(&path, 3);
            let file = File::options().write(true).open(&path).unwrap();
            for (copy, header_at) in HEADERS_AT.into_iter().enumerate() {
                file.write_all_at(&[0xee], header_at + at).unwrap();
                let opened = Sidecar::open(&path).map(|(_, sums)| sums);
                match (copy, opened) {
                    (0, Ok(read)) => assert_eq!(read, sums),
                    (1, Err(LoadError::Damaged { reason, .. })) => assert!(reason.contains("neither copy")),
                    (_, other) => panic!("byte {at}, copy {copy}: {other:?}"),
                }
            }
        }
    }

    #[test]
    fn a_file_that_was_cut_off_is_damage() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("sums");
        saved(&path, 3);
        File::options().write(true).open(&path).unwrap().set_len(SUMS_AT + 11).unwrap();
        assert!(matches!(Sidecar::open(&path), Err(LoadError::Damaged { .. })));
    }

    #[test]
    fn a_newer_format_is_refused_in_words() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("sums");
        saved(&path, 3);
        let mut newer = Header { pages: 3, mark: WalMark::default() }.encode();
        newer[8] = 2;
        let sum = crc32c::crc32c(&newer[..36]);
        newer[36..].copy_from_slice(&sum.to_le_bytes());
        let file = File::options().write(true).open(&path).unwrap();
        HEADERS_AT.iter().for_each(|at| file.write_all_at(&newer, *at).unwrap());
        let error = Sidecar::open(&path).map(drop).unwrap_err().to_string();
        assert!(
            error.contains("its format is 2, and this version knows 1 only: upgrade this node"),
            "{error}"
        );
    }
}
