//! One changed byte anywhere: it is detected or harmless, but never shortens the log or alters what is read.

use std::{
    fs,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use raft::{Entry, HardState};
use raftd::store::{ReadError, Store, StoreError};

use crate::support::{Running, copy_dir, entry, filled, filled_and_killed, options, whole_log};

/// What came of a start on changed bytes.
#[derive(Debug, PartialEq, Eq)]
enum Outcome {
    Refused,
    Harmless,
}

/// Starts, reads everything, and compares.
fn start(dir: &Path, hard_state: HardState, log: &[Entry]) -> Outcome {
    let store = match Store::open(options(dir)) {
        Ok(store) => store,
        Err(StoreError::Damaged { .. } | StoreError::Io { .. } | StoreError::NewerFormat { .. }) => {
            return Outcome::Refused;
        }
        Err(error) => panic!("not an answer to damage: {error}"),
    };
    assert_eq!(store.hard_state(), hard_state, "the hard state was altered");
    let reader = store.reader();
    match reader.read(1, log.len() as u64, usize::MAX) {
        Err(ReadError::Store(StoreError::Damaged { .. })) => return Outcome::Refused,
        Err(error) => panic!("not an answer to damage: {error}"),
        Ok(_) => {}
    }
    assert!(whole_log(&reader) == log, "the log was altered");
    Outcome::Harmless
}

fn flip(path: &Path, at: u64, bits: u8) {
    let file = fs::File::options().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ bits], at).unwrap();
}

/// Where the file holds anything: most of sled's segment is empty.
fn occupied_bytes(path: &Path) -> u64 {
    let bytes = fs::read(path).unwrap();
    bytes.iter().rposition(|byte| *byte != 0).map_or(0, |at| at as u64 + 1)
}

struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % bound
    }
}

/// Flips one byte of a small store, as a killed process left it, again and again.
fn flips(name: &str, count: u64, seed: u64) -> (u64, u64) {
    let dir = tempfile::tempdir().unwrap();
    let (data_dir, log) = filled_and_killed(dir.path());
    flips_in(&data_dir, &log, name, count, seed)
}

fn flips_in(data_dir: &Path, log: &[Entry], name: &str, count: u64, seed: u64) -> (u64, u64) {
    let hard_state = HardState { term: 3, voted_for: Some(2), ..HardState::new(7) };
    let occupied = occupied_bytes(&data_dir.join(name));
    let unchanged = tempfile::tempdir().unwrap();
    copy_dir(data_dir, unchanged.path());
    assert_eq!(start(unchanged.path(), hard_state, log), Outcome::Harmless, "without damage it must start");
    let mut random = Random(seed);
    let (mut refused, mut harmless) = (0, 0);
    for _ in 0..count {
        let copy = tempfile::tempdir().unwrap();
        copy_dir(data_dir, copy.path());
        let (at, bits) = (random.below(occupied), random.below(255) as u8 + 1);
        flip(&copy.path().join(name), at, bits);
        match start(copy.path(), hard_state, log) {
            Outcome::Refused => refused += 1,
            Outcome::Harmless => harmless += 1,
        }
    }
    (refused, harmless)
}

#[test]
fn a_flipped_byte_in_sleds_file_is_detected_or_harmless() {
    let (refused, _) = flips("log/db", 40, 1);
    assert!(refused > 20, "most of the file is the log: {refused} refused");
}

#[test]
fn a_flipped_byte_in_the_journal_is_detected_or_harmless() {
    let (refused, _) = flips("journal", 40, 7);
    assert!(refused > 5, "what sled has not yet is in whole frames: {refused} refused");
}

#[test]
fn a_lost_or_shortened_journal_is_damage() {
    let dir = tempfile::tempdir().unwrap();
    let (data_dir, log) = filled(dir.path());
    let journal = data_dir.join("journal");
    fs::File::options().write(true).open(&journal).unwrap().set_len(8192).unwrap();
    assert_eq!(start(&data_dir, HardState::default(), &log), Outcome::Refused);
    fs::remove_file(&journal).unwrap();
    assert_eq!(start(&data_dir, HardState::default(), &log), Outcome::Refused);
}

#[test]
fn a_flipped_byte_in_sleds_configuration_is_detected_or_harmless() {
    flips("log/conf", 10, 2);
}

#[test]
fn a_flipped_byte_in_the_hard_state_is_harmless() {
    assert_eq!(flips("hard_state", 40, 3), (0, 40));
}

#[test]
fn a_flipped_byte_in_an_old_log_of_many_segments_is_detected_or_harmless() {
    let dir = tempfile::tempdir().unwrap();
    let (data_dir, mut log) = filled(dir.path());
    // Opened again, so that there is a snapshot of sled's, and filled beyond it; stopped, so that nothing is torn.
    for round in 0..2 {
        let mut store = Running::open(&data_dir).unwrap();
        for index in 204 + round * 300..504 + round * 300 {
            log.push(entry(index, 3, 20_000));
            store.append(vec![entry(index, 3, 20_000)]);
            store.settle();
        }
        store.stop();
    }
    let segments = fs::metadata(data_dir.join("log/db")).unwrap().len() >> 23;
    assert!(segments >= 3, "{segments} segments");
    flips_in(&data_dir, &log, "log/db", 15, 5);
    let snapshots = fs::read_dir(data_dir.join("log")).unwrap().map(|item| item.unwrap().file_name());
    let snapshot =
        snapshots.map(|name| name.into_string().unwrap()).find(|name| name.starts_with("snap.")).unwrap();
    flips_in(&data_dir, &log, &format!("log/{snapshot}"), 10, 6);
}

#[test]
fn a_shortened_log_is_damage_wherever_it_is_cut() {
    let dir = tempfile::tempdir().unwrap();
    let (data_dir, log) = filled_and_killed(dir.path());
    let occupied = occupied_bytes(&data_dir.join("log/db"));
    let mut random = Random(4);
    for _ in 0..10 {
        let copy = tempfile::tempdir().unwrap();
        copy_dir(&data_dir, copy.path());
        let file: PathBuf = copy.path().join("log/db");
        fs::File::options().write(true).open(file).unwrap().set_len(random.below(occupied)).unwrap();
        assert_eq!(start(copy.path(), HardState::default(), &log), Outcome::Refused);
    }
}
