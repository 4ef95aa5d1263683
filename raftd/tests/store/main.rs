//! What the durable store promises, tried on real files, a real sled, killed processes and injected failures.

#![allow(clippy::unwrap_used, reason = "a panic is the failure report")]

mod crash;
mod damage;
mod faults;
mod model;
mod open;
mod support;
