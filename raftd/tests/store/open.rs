//! What a start accepts, and what it refuses, in which words.

use std::fs;

use raft::{HardState, Log, Position};
use raftd::store::{ReadError, Store, StoreError, StoreOptions, Write};

use crate::support::{Running, copy_dir, entries, entry, filled, options};

fn refusal(options: StoreOptions) -> StoreError {
    match Store::open(options) {
        Ok(_) => panic!("this must be refused"),
        Err(error) => error,
    }
}

#[test]
fn a_new_store_is_empty_and_opens_again() {
    let dir = tempfile::tempdir().unwrap();
    let data_dir = dir.path().join("not/there/yet");
    for _ in 0..2 {
        let store = Store::open(options(&data_dir)).unwrap();
        assert_eq!(store.hard_state(), HardState::new(7));
        let reader = store.reader();
        assert_eq!((reader.base().unwrap(), reader.last_index().unwrap()), (Position::default(), 0));
        assert!(store.handle().log_bytes() > 0);
    }
}

#[test]
fn everything_is_there_after_a_reopening() {
    let dir = tempfile::tempdir().unwrap();
    let (data_dir, log) = filled(dir.path());
    let store = Running::open(&data_dir).unwrap();
    assert_eq!(store.hard_state, HardState { term: 3, voted_for: Some(2), ..HardState::new(7) });
    assert!(store.log() == log);
    assert_eq!(store.reader.term(203).unwrap(), Some(3));
    assert_eq!(store.reader.term(204).unwrap(), None);
}

#[test]
fn a_conflict_replaces_the_end_of_the_log_even_inside_a_record() {
    let dir = tempfile::tempdir().unwrap();
    let mut store = Running::open(dir.path()).unwrap();
    store.append(entries(1..=10, 1, 50));
    store.settle();
    store
        .submit(Write {
            hard_state: Some(HardState { term: 2, ..HardState::new(7) }),
            entries: entries(5..=6, 2, 60),
            ..Write::default()
        })
        .unwrap();
    store.settle();
    let expected = [entries(1..=4, 1, 50), entries(5..=6, 2, 60)].concat();
    assert_eq!(store.log(), expected);
    store.stop();
    let mut store = Running::open(dir.path()).unwrap();
    assert_eq!(store.log(), expected);
    store.append(entries(7..=9, 2, 10));
    store.settle();
    store.stop();
    assert_eq!(Running::open(dir.path()).unwrap().log(), [expected, entries(7..=9, 2, 10)].concat());
}

#[test]
fn compaction_keeps_what_comes_after_and_survives_a_reopening() {
    let dir = tempfile::tempdir().unwrap();
    let (data_dir, log) = filled(dir.path());
    let mut store = Running::open(&data_dir).unwrap();
    // 155 lies inside a record.
    assert_eq!(store.writer.compact(155).unwrap(), 155);
    assert!(matches!(store.reader.read(155, 160, 1), Err(ReadError::Compacted { base: 155 })));
    store.stop();
    let mut store = Running::open(&data_dir).unwrap();
    assert_eq!(store.reader.base().unwrap(), log[154].position());
    assert!(store.log() == log[155..]);
    // More than there is: what is durable goes, and the log begins anew after it.
    assert_eq!(store.writer.compact(1_000).unwrap(), 203);
    store.append(entries(204..=205, 3, 10));
    store.settle();
    store.stop();
    let store = Running::open(&data_dir).unwrap();
    assert_eq!(store.log(), entries(204..=205, 3, 10));
    assert_eq!(store.reader.term(203).unwrap(), Some(3));
}

#[test]
fn a_snapshot_begins_the_log_anew() {
    let dir = tempfile::tempdir().unwrap();
    let (data_dir, _) = filled(dir.path());
    let mut store = Running::open(&data_dir).unwrap();
    let base = Position { index: 150, term: 4, timestamp_ms: 77 };
    store.install(base, false);
    assert_eq!(store.log(), []);
    store.append(vec![entry(151, 4, 20)]);
    store.settle();
    assert_eq!((store.log(), store.reader.base().unwrap()), (vec![entry(151, 4, 20)], base));
    store.stop();
    let store = Running::open(&data_dir).unwrap();
    assert_eq!((store.log(), store.reader.base().unwrap()), (vec![entry(151, 4, 20)], base));
}

#[test]
fn a_snapshot_of_what_the_log_holds_keeps_the_rest() {
    let dir = tempfile::tempdir().unwrap();
    let (data_dir, log) = filled(dir.path());
    let mut store = Running::open(&data_dir).unwrap();
    store.append(entries(204..=206, 3, 5));
    store.install(log[149].position(), true);
    store.settle();
    store.stop();
    let store = Running::open(&data_dir).unwrap();
    assert!(store.log() == [&log[150..], &entries(204..=206, 3, 5)].concat());
}

#[test]
fn a_second_process_is_kept_out() {
    let dir = tempfile::tempdir().unwrap();
    let _first = Store::open(options(dir.path())).unwrap();
    assert!(matches!(refusal(options(dir.path())), StoreError::Locked { .. }));
}

#[test]
fn another_cluster_or_node_is_refused_and_told_the_way() {
    let dir = tempfile::tempdir().unwrap();
    drop(Store::open(options(dir.path())).unwrap());
    let error = refusal(StoreOptions { cluster_id: 0xC2, ..options(dir.path()) });
    assert!(
        matches!(error, StoreError::OtherCluster { stored: 0xC1, configured: 0xC2, .. })
            && error.needs_operator()
    );
    let words = error.to_string();
    assert!(
        ["backup", "empty data directories", "restore"].iter().all(|word| words.contains(word)),
        "{words}"
    );
    let error = refusal(StoreOptions { node_id: 9, ..options(dir.path()) });
    assert!(
        matches!(error, StoreError::OtherNode { stored: 1, configured: 9, .. }) && error.needs_operator()
    );
}

#[test]
fn an_emptied_log_is_damage_and_names_the_way() {
    let dir = tempfile::tempdir().unwrap();
    let (data_dir, _) = filled(dir.path());
    let fresh = tempfile::tempdir().unwrap();
    drop(Store::open(options(fresh.path())).unwrap());
    // A log that is gone, one that sled would make anew, and one that sled opens empty without a word.
    type Spoil<'a> = (&'a str, Box<dyn Fn(&std::path::Path) + 'a>);
    let spoils: [Spoil; 3] = [
        ("log removed", Box::new(|log| fs::remove_dir_all(log).unwrap())),
        (
            "db emptied",
            Box::new(|log| fs::File::options().write(true).open(log.join("db")).unwrap().set_len(0).unwrap()),
        ),
        (
            "log replaced by an empty one",
            Box::new(|log| {
                fs::remove_dir_all(log).unwrap();
                copy_dir(&fresh.path().join("log"), log);
            }),
        ),
    ];
    for (name, spoil) in spoils {
        let copy = tempfile::tempdir().unwrap();
        copy_dir(&data_dir, copy.path());
        spoil(&copy.path().join("log"));
        let error = refusal(options(copy.path()));
        assert!(matches!(error, StoreError::Damaged { .. }), "{name}: {error}");
        assert!(error.to_string().contains("resqlite node replace"), "{name}: {error}");
    }
}

#[test]
fn a_log_without_its_hard_state_is_damage() {
    let dir = tempfile::tempdir().unwrap();
    let (data_dir, _) = filled(dir.path());
    fs::remove_file(data_dir.join("hard_state")).unwrap();
    assert!(matches!(refusal(options(&data_dir)), StoreError::Damaged { .. }));
}

#[test]
fn a_creation_that_was_cut_off_is_begun_again() {
    let dir = tempfile::tempdir().unwrap();
    drop(Store::open(options(dir.path())).unwrap());
    fs::rename(dir.path().join("hard_state"), dir.path().join("hard_state.creating")).unwrap();
    fs::remove_file(dir.path().join("log/conf")).unwrap();
    let mut store = Running::open(dir.path()).unwrap();
    store.append(entries(1..=3, 1, 10));
    store.settle();
    store.stop();
    assert_eq!(Running::open(dir.path()).unwrap().log().len(), 3);
}

#[test]
fn what_a_kill_during_sleds_opening_leaves_is_removed() {
    let dir = tempfile::tempdir().unwrap();
    let (data_dir, log) = filled(dir.path());
    fs::write(data_dir.join("log/snap.00000000FFFFFFFF.generating"), b"half").unwrap();
    assert!(Running::open(&data_dir).unwrap().log() == log);
}
