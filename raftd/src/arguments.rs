//! What raftd understands on its command line; its manual page is made from this, too.

use std::path::PathBuf;

use clap::Parser;
use resqlite::config::DEFAULT_PATH;

/// The consensus daemon of ReSqlite.
#[derive(Debug, Parser)]
#[command(name = "raftd", version)]
pub struct Arguments {
    /// The configuration file, shared with sqlited.
    #[arg(long, value_name = "FILE", default_value = DEFAULT_PATH)]
    pub config: PathBuf,
    /// Check the configuration and exit.
    #[arg(long)]
    pub check: bool,
    /// Stop when standard input ends: whoever started this process is gone then.
    #[arg(long)]
    pub stop_with_stdin: bool,
    /// Say what the data directory holds, or make it the beginning of a new cluster: for `resqlite cluster recover`.
    #[arg(long, value_enum, value_name = "STEP", hide = true)]
    pub recover: Option<Recover>,
}

/// A step of `resqlite cluster recover`.
#[derive(Clone, Copy, Debug, clap::ValueEnum)]
pub enum Recover {
    /// Changes nothing.
    Show,
    /// The data becomes that of the cluster which the configuration describes.
    Found,
}
