//! ReSqlite: SQLite, replicated by Raft.
//!
//! This library is what both daemons, the command line and client programs share:
//!
//! - [`api`]: the generated gRPC messages and services of `proto/`,
//! - [`codec`]: how those become bytes,
//! - [`config`]: the one YAML file that both daemons read,
//! - [`daemon`]: what makes a process a good daemon (logs, signals, sd-notify),
//! - [`directory_lock`]: one process for each data directory,
//! - [`disk`]: room on the filesystem of a daemon's data,
//! - [`status_details`]: how an SQL error travels in a gRPC status,
//! - [`monitoring`]: metrics and health of a daemon, over HTTP,
//! - [`tls`]: certificates, and connections that are as good as those,
//! - [`recovery`]: what the daemons' programs say of data whose cluster is lost,
//! - [`sql_text`]: where one SQL statement ends and the next begins,
//! - [`client`]: the asynchronous client library.
//!
//! It knows nothing of Raft's rules, of sled or of SQLite's library: those
//! belong to `raftd` and `sqlited`.

pub mod api;
pub mod client;
pub mod codec;
pub mod config;
pub mod daemon;
pub mod database_file;
pub mod directory_lock;
pub mod disk;
pub mod monitoring;
pub mod recovery;
pub mod sql_text;
pub mod status_details;
pub mod tls;

#[cfg(feature = "cli")]
pub mod cli;
