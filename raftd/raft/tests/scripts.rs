//! Raft's rules, one script each, in `tests/scripts`: commands, and what nodes did in answer.
//!
//! `UPDATE_GOLDENFILES=1 cargo test -p raft --test scripts` records anew; read what changed before you commit it.

#![allow(clippy::unwrap_used, reason = "a panic is the failure report")]

mod script;
mod support;

use std::{fs, panic};

#[test]
fn every_script_gives_its_recorded_output() {
    let directory = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/scripts");
    let mut paths: Vec<_> = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    let failed: Vec<_> = paths
        .iter()
        .filter(|path| {
            let run = || goldenscript::run(&mut script::Script::default(), path).unwrap();
            panic::catch_unwind(run).is_err()
        })
        .collect();
    assert!(failed.is_empty(), "scripts that failed: {failed:#?}");
    assert!(paths.len() >= 35, "scripts are missing");
}
