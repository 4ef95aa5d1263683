//! Restore: an SQLite file takes the place of the whole content, on every node at the same entry of the log.
//!
//! The file travels through the log in chunks, which are staged as rows in the database itself (`staging`): so they
//! belong to the applied index beside them, survive a crash, and travel in snapshots. The last entry makes a file of
//! them beside the database, checks it, gives it the server's own tables, and copies its pages over the database's in
//! one transaction (`candidate`). A crash at any moment leaves the old content or the new.

mod candidate;
mod staging;
mod upload;

pub use candidate::{Candidate, Trial, remove_leftovers};
pub use staging::{IDLE_MS, MAX_FILE_BYTES, Staging};
pub use upload::Uploads;
