//! The hard-state file: what a node may forget under no circumstances, kept outside sled.
//!
//! Identity, term, vote, where the log begins and how far it durably reaches. sled can lose what it was told, even
//! all of it, and open empty without a word; this file is what tells such a log from a whole one. It knows nothing
//! of records.
//!
//! ```text
//! block 0, 4 KiB   slot: the state
//! block 1, 4 KiB   slot: the state
//! block 2, 4 KiB   note: a later mark than the slots'
//! ```
//!
//! A save writes one slot, syncs, writes the other, syncs, and only then returns. So at rest both slots hold the
//! same state: damage to one forgets nothing, as a single good copy of *two versions* in turn would (a vote, say).
//! While a save is under way at most one slot is in flux, and the other holds the state before it or the state
//! itself. Either is right, for nobody was told yet.
//!
//! The note raises the mark between saves, cheaply: it is written without a sync after every group commit, so that
//! it survives a killed process, and it is synced now and then and at a clean stop. It counts only together with
//! the save whose sequence number it carries; so a save that lowers the mark takes every earlier note back with it.
//! A note that is damaged or lost means a lower mark, which is still true.

use std::{
    fs::{File, OpenOptions},
    io,
    path::{Path, PathBuf},
};

use bytes::{Buf, BufMut};
use raft::{HardState, LogEnd, NodeId, Position, Standing};

use super::{block_file::BlockFile, error::StoreError, record_log::Mark};

/// The format that this version writes, and the newest that it reads.
const FORMAT: u32 = 1;

const BLOCK_BYTES: usize = 4096;
const FILE_BYTES: usize = 3 * BLOCK_BYTES;
const NOTE_AT: u64 = 2 * BLOCK_BYTES as u64;
const SLOT_MAGIC: &[u8; 8] = b"RSQLHARD";
const NOTE_MAGIC: &[u8; 8] = b"RSQLMARK";
/// Magic, format, checksum: the same in every later format, so that a newer one can be told from damage.
const HEADER_BYTES: usize = 16;

/// Whose data directory this is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Hash of the cluster's name and member ids.
    pub cluster_id: u64,
    /// The member.
    pub node_id: NodeId,
}

/// What the file holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct State {
    pub(super) identity: Identity,
    pub(super) hard_state: HardState,
    /// The entry before the log's first.
    pub(super) base: Position,
    /// The log durably reaches this far, at least.
    pub(super) mark: Mark,
    /// The log was given up for a snapshot at `base`: whatever the store still holds must go.
    pub(super) discard_log: bool,
}

/// The open file, and what it holds.
pub(super) struct HardStateFile {
    /// For error messages.
    path: PathBuf,
    file: Box<dyn BlockFile>,
    sequence: u64,
    state: State,
}

impl HardStateFile {
    /// Writes a new file, durably except for its directory entry.
    pub(super) fn create(path: &Path, state: State) -> Result<Self, StoreError> {
        let file = OpenOptions::new().create(true).truncate(true).read(true).write(true).open(path);
        let file = file.map_err(StoreError::io(path, "create the hard-state file"))?;
        Self::create_in(Box::new(file), path, state)
    }

    /// As [`HardStateFile::create`], in an empty file that is open already.
    pub(super) fn create_in(file: Box<dyn BlockFile>, path: &Path, state: State) -> Result<Self, StoreError> {
        // All blocks are written, so that no later write needs room on the disk.
        let zeroed = file.write_all_at(&[0; FILE_BYTES], 0).and_then(|()| file.sync_data());
        zeroed.map_err(StoreError::io(path, "create the hard-state file"))?;
        let mut created = Self { path: path.to_owned(), file, sequence: 0, state };
        created.save(state)?;
        Ok(created)
    }

    /// As [`HardStateFile::open`]; `None` if there is no such file.
    pub(super) fn open_if_there(path: &Path) -> Result<Option<Self>, StoreError> {
        match path.try_exists() {
            Ok(true) => Self::open(path).map(Some),
            Ok(false) => Ok(None),
            Err(error) => Err(StoreError::io(path, "find the hard-state file")(error)),
        }
    }

    /// Reads the file. The mark is the highest that is true; the slots are as they were found until the next save.
    pub(super) fn open(path: &Path) -> Result<Self, StoreError> {
        let file = OpenOptions::new().read(true).write(true).open(path);
        let file = file.map_err(StoreError::io(path, "open the hard-state file"))?;
        Self::open_in(Box::new(file), path)
    }

    /// As [`HardStateFile::open`], of a file that is open already.
    pub(super) fn open_in(file: Box<dyn BlockFile>, path: &Path) -> Result<Self, StoreError> {
        let bytes = file.read_all().map_err(StoreError::io(path, "read the hard-state file"))?;
        let damaged = |reason: &str| StoreError::Damaged {
            file: path.to_owned(),
            index: None,
            reason: reason.to_owned(),
        };
        if bytes.len() != FILE_BYTES {
            return Err(damaged(&format!("it has {} bytes instead of {FILE_BYTES}", bytes.len())));
        }
        let newer = |found| StoreError::NewerFormat { file: path.to_owned(), found, known: FORMAT };
        let slots = [
            decode_slot(&bytes[..BLOCK_BYTES]).map_err(newer)?,
            decode_slot(&bytes[BLOCK_BYTES..2 * BLOCK_BYTES]).map_err(newer)?,
        ];
        let Some((sequence, mut state)) = slots.into_iter().flatten().max_by_key(|(sequence, _)| *sequence)
        else {
            return Err(damaged("neither copy of the hard state can be read"));
        };
        if let Some((noted_at, mark)) = decode_note(&bytes[2 * BLOCK_BYTES..]).map_err(newer)?
            && noted_at == sequence
        {
            state.mark = mark;
        }
        Ok(Self { path: path.to_owned(), file, sequence, state })
    }

    pub(super) fn state(&self) -> State {
        self.state
    }

    /// Makes the state durable in both slots. After an error nothing may be assumed of the file.
    pub(super) fn save(&mut self, state: State) -> Result<(), StoreError> {
        self.sequence += 1;
        let slot = encode_slot(self.sequence, &state);
        for at in [0, BLOCK_BYTES as u64] {
            let written = self.file.write_all_at(&slot, at).and_then(|()| self.file.sync_data());
            written.map_err(StoreError::io(&self.path, "write the hard state"))?;
        }
        self.state = state;
        Ok(())
    }

    /// Raises the mark to what is durable by now, without a sync.
    pub(super) fn note_mark(&mut self, mark: Mark) -> Result<(), StoreError> {
        let note = encode_note(self.sequence, mark);
        self.file.write_all_at(&note, NOTE_AT).map_err(StoreError::io(&self.path, "write the mark"))?;
        self.state.mark = mark;
        Ok(())
    }

    /// Makes the last note durable.
    pub(super) fn sync_mark(&mut self) -> Result<(), StoreError> {
        self.file.sync_data().map_err(StoreError::io(&self.path, "sync the mark"))
    }
}

/// Makes a directory's entries durable.
pub(super) fn sync_dir(dir: &Path) -> io::Result<()> {
    File::open(dir)?.sync_all()
}

fn encode_slot(sequence: u64, state: &State) -> Vec<u8> {
    let mut block = begin(SLOT_MAGIC);
    let State { identity, hard_state, base, mark, discard_log } = state;
    block.put_u64_le(sequence);
    for number in [identity.cluster_id, identity.node_id, hard_state.incarnation, hard_state.term] {
        block.put_u64_le(number);
    }
    block.put_u8(hard_state.voted_for.is_some().into());
    block.put_u64_le(hard_state.voted_for.unwrap_or_default());
    block.put_u8(encode_standing(hard_state.standing));
    block.put_u64_le(hard_state.log_floor.term);
    block.put_u64_le(hard_state.log_floor.index);
    for number in [base.index, base.term, base.timestamp_ms, mark.index, mark.term] {
        block.put_u64_le(number);
    }
    block.put_u8((*discard_log).into());
    seal(block)
}

/// `Ok(None)` if the slot is torn or damaged; the format if it is a newer one.
fn decode_slot(block: &[u8]) -> Result<Option<(u64, State)>, u32> {
    let Some(mut body) = open_block(block, SLOT_MAGIC)? else { return Ok(None) };
    let sequence = body.get_u64_le();
    let identity = Identity { cluster_id: body.get_u64_le(), node_id: body.get_u64_le() };
    let (incarnation, term) = (body.get_u64_le(), body.get_u64_le());
    let (has_voted, candidate) = (body.get_u8() != 0, body.get_u64_le());
    let Some(standing) = decode_standing(body.get_u8()) else { return Ok(None) };
    let log_floor = LogEnd { term: body.get_u64_le(), index: body.get_u64_le() };
    let voted_for = has_voted.then_some(candidate);
    let hard_state = HardState { term, voted_for, incarnation, standing, log_floor };
    let base =
        Position { index: body.get_u64_le(), term: body.get_u64_le(), timestamp_ms: body.get_u64_le() };
    let mark = Mark { index: body.get_u64_le(), term: body.get_u64_le() };
    let discard_log = body.get_u8() != 0;
    Ok(Some((sequence, State { identity, hard_state, base, mark, discard_log })))
}

fn encode_standing(standing: Standing) -> u8 {
    match standing {
        Standing::New => 1,
        Standing::Founder => 2,
        Standing::Learner => 3,
        Standing::Voter => 4,
    }
}

fn decode_standing(byte: u8) -> Option<Standing> {
    match byte {
        1 => Some(Standing::New),
        2 => Some(Standing::Founder),
        3 => Some(Standing::Learner),
        4 => Some(Standing::Voter),
        _ => None,
    }
}

fn encode_note(sequence: u64, mark: Mark) -> Vec<u8> {
    let mut block = begin(NOTE_MAGIC);
    block.put_u64_le(sequence);
    block.put_u64_le(mark.index);
    block.put_u64_le(mark.term);
    seal(block)
}

fn decode_note(block: &[u8]) -> Result<Option<(u64, Mark)>, u32> {
    let Some(mut body) = open_block(block, NOTE_MAGIC)? else { return Ok(None) };
    Ok(Some((body.get_u64_le(), Mark { index: body.get_u64_le(), term: body.get_u64_le() })))
}

fn begin(magic: &[u8; 8]) -> Vec<u8> {
    let mut block = Vec::with_capacity(BLOCK_BYTES);
    block.put_slice(magic);
    block.put_u32_le(FORMAT);
    block.put_u32_le(0);
    block
}

fn seal(mut block: Vec<u8>) -> Vec<u8> {
    block.resize(BLOCK_BYTES, 0);
    let checksum = checksum_of(&block);
    block[12..HEADER_BYTES].copy_from_slice(&checksum.to_le_bytes());
    block
}

fn checksum_of(block: &[u8]) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c(&block[..12]), &block[HEADER_BYTES..])
}

/// The body of a block that is whole.
fn open_block<'a>(block: &'a [u8], magic: &[u8; 8]) -> Result<Option<&'a [u8]>, u32> {
    let (header, body) = block.split_at(HEADER_BYTES);
    let (found_magic, mut header) = header.split_at(magic.len());
    let (format, checksum) = (header.get_u32_le(), header.get_u32_le());
    if found_magic != magic || checksum != checksum_of(block) {
        return Ok(None);
    }
    if format > FORMAT { Err(format) } else { Ok(Some(body)) }
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::FileExt};

    use super::*;

    fn state(term: u64) -> State {
        State {
            identity: Identity { cluster_id: 1, node_id: 2 },
            hard_state: HardState {
                term,
                voted_for: Some(term % 3 + 1),
                incarnation: 3,
                standing: Standing::Learner,
                log_floor: LogEnd { term: 7, index: 8 },
            },
            base: Position { index: 4, term: 1, timestamp_ms: 5 },
            mark: Mark { index: 40, term: 1 },
            discard_log: false,
        }
    }

    fn saved(terms: &[u64]) -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("hard_state");
        let mut file = HardStateFile::create(&path, state(0)).unwrap();
        for term in terms {
            file.save(state(*term)).unwrap();
        }
        (dir, path)
    }

    fn overwrite(path: &Path, at: usize, bytes: &[u8]) {
        let file = OpenOptions::new().write(true).open(path).unwrap();
        FileExt::write_all_at(&file, bytes, at as u64).unwrap();
    }

    #[test]
    fn what_was_saved_last_is_read() {
        let (_dir, path) = saved(&[1, 2, 3]);
        assert_eq!(HardStateFile::open(&path).unwrap().state(), state(3));
    }

    #[test]
    fn a_lost_copy_forgets_nothing() {
        for slot in [0, BLOCK_BYTES] {
            let (_dir, path) = saved(&[1, 2, 3]);
            overwrite(&path, slot, &[0xAA; BLOCK_BYTES]);
            let mut file = HardStateFile::open(&path).unwrap();
            assert_eq!(file.state(), state(3), "a vote was forgotten");
            file.save(state(4)).unwrap();
            overwrite(&path, BLOCK_BYTES - slot, &[0xAA; BLOCK_BYTES]);
            assert_eq!(
                HardStateFile::open(&path).unwrap().state(),
                state(4),
                "the lost copy was not repaired"
            );
        }
    }

    #[test]
    fn a_save_that_was_torn_leaves_the_state_before_it_or_itself() {
        for cut in [0, 1, 16, 60, 512, BLOCK_BYTES - 1, BLOCK_BYTES] {
            let (_dir, path) = saved(&[1, 2]);
            let before = fs::read(&path).unwrap();
            let mut file = HardStateFile::open(&path).unwrap();
            file.save(state(3)).unwrap();
            let after = fs::read(&path).unwrap();
            // Torn in the first slot, with the second still old; then in the second, with the first already new.
            let first = [&after[..cut], &before[cut..]].concat();
            let second = [&after[..BLOCK_BYTES + cut], &before[BLOCK_BYTES + cut..]].concat();
            for (torn, allowed) in [(first, [state(2), state(3)]), (second, [state(3), state(3)])] {
                fs::write(&path, torn).unwrap();
                let found = HardStateFile::open(&path).unwrap().state();
                assert!(allowed.contains(&found), "cut at {cut}: {found:?}");
            }
        }
    }

    #[test]
    fn without_any_copy_it_is_damage() {
        let (_dir, path) = saved(&[1]);
        overwrite(&path, 100, &[0xAA]);
        overwrite(&path, BLOCK_BYTES + 100, &[0xAA]);
        assert!(matches!(HardStateFile::open(&path), Err(StoreError::Damaged { .. })));
        fs::write(&path, b"short").unwrap();
        assert!(matches!(HardStateFile::open(&path), Err(StoreError::Damaged { .. })));
    }

    #[test]
    fn a_newer_format_is_told_from_damage() {
        let (_dir, path) = saved(&[1]);
        let mut block = fs::read(&path).unwrap()[..BLOCK_BYTES].to_vec();
        block[8..12].copy_from_slice(&(FORMAT + 1).to_le_bytes());
        let sealed = seal(block);
        overwrite(&path, 0, &sealed);
        assert!(matches!(
            HardStateFile::open(&path),
            Err(StoreError::NewerFormat { found: 2, known: 1, .. })
        ));
    }

    #[test]
    fn a_note_raises_the_mark_until_the_next_save() {
        let (_dir, path) = saved(&[1]);
        let raised = Mark { index: 90, term: 1 };
        let mut file = HardStateFile::open(&path).unwrap();
        file.note_mark(raised).unwrap();
        assert_eq!(HardStateFile::open(&path).unwrap().state().mark, raised);
        // A damaged note only means the lower mark, which is still true.
        let whole = fs::read(&path).unwrap();
        overwrite(&path, 2 * BLOCK_BYTES + 20, &[0xAA]);
        assert_eq!(HardStateFile::open(&path).unwrap().state().mark, state(1).mark);
        fs::write(&path, whole).unwrap();
        // A save that lowers the mark takes the note back.
        file.save(state(2)).unwrap();
        assert_eq!(HardStateFile::open(&path).unwrap().state().mark, state(2).mark);
    }
}
