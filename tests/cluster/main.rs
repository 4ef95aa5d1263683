//! Whole clusters of real processes: the tests of what users are promised.
//!
//! Every test starts its own daemons from the binaries beside the `resqlite`
//! program, on free loopback ports, in a directory of its own. Nothing is
//! replaced by a stand-in. Waits are for conditions, with a deadline.

#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

mod backup;
mod bad_input;
mod budget;
mod consistency;
mod damage;
mod documentation;
mod durability;
mod exactly_once;
#[allow(dead_code, reason = "shared with the power cuts")]
mod filesystem;
mod full_disk;
mod harness;
mod hostile;
mod import;
mod large_results;
mod leader;
mod logictest;
mod logictest_format;
mod monitoring;
mod optimistic;
mod playground;
mod random_scripts;
mod real_data;
mod reflection;
mod replacement;
mod restore;
mod snapshots;
mod survival;
mod tls;
mod transactions;
mod users;
mod verify;
mod visibility;
