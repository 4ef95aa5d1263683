//! Whole clusters under random faults: delay, loss, repetition, reordering, partitions, crashes that lose what was
//! not synced, clocks that jump, compaction, snapshots, transfers. Raft's promises are checked at every step.
//!
//! `RAFT_SEEDS=20000 cargo test -p raft --test random_cluster` runs more seeds; `RAFT_SEED=17` runs one.

#![allow(clippy::unwrap_used, reason = "a panic is the failure report")]

mod sim;
mod support;

use std::{env, panic};

/// Runs one seed; on failure, says which.
fn run(seed: u64) {
    if let Err(failure) = panic::catch_unwind(|| sim::Simulation::new(seed).run()) {
        eprintln!("failed with seed {seed}: RAFT_SEED={seed} cargo test -p raft --test random_cluster");
        panic::resume_unwind(failure);
    }
}

/// Seeds that once found a bug:
/// 15532: a leader that had stepped down within its term called the second copy of a forwarded batch dropped.
/// 56721: a copy of a batch from an earlier life of a node made the leader forget what it had taken of the later one.
const REGRESSIONS: [u64; 2] = [15_532, 56_721];

#[test]
fn seeds_that_once_failed() {
    REGRESSIONS.into_iter().for_each(run);
}

#[test]
fn raft_keeps_its_promises_under_random_faults() {
    let number = |name| env::var(name).ok().map(|value| value.parse::<u64>().expect("a number"));
    let seeds = match number("RAFT_SEED") {
        Some(seed) => seed..seed + 1,
        None => 0..number("RAFT_SEEDS").unwrap_or(300),
    };
    let threads = 2;
    std::thread::scope(|scope| {
        for thread in 0..threads {
            let seeds = seeds.clone();
            scope.spawn(move || seeds.filter(|seed| seed % threads == thread).for_each(run));
        }
    });
}
