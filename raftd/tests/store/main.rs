//! What the durable store promises, tried on real files, a real sled, killed processes and injected failures.

mod crash;
mod damage;
mod faults;
mod model;
mod open;
mod support;
