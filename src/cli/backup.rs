//! `resqlite backup` and `resqlite dump`: the whole content as of one moment, into a file or to stdout.

use std::{
    io::{self, Write},
    path::{Path, PathBuf},
    process::ExitCode,
};

use indicatif::HumanBytes;

use super::{EXIT_BROKEN_PIPE, Endpoints, connect, fail, new_file::NewFile, progress};
use crate::{
    api::BackupFormat,
    client::{Backup, Error},
};

#[derive(Debug, clap::Args)]
pub struct BackupArguments {
    #[command(flatten)]
    cluster: Endpoints,
    /// Where to: an ordinary SQLite file; - is stdout
    #[arg(value_name = "FILE")]
    file: PathBuf,
    /// Replace FILE if there is one
    #[arg(long)]
    force: bool,
}

#[derive(Debug, clap::Args)]
pub struct DumpArguments {
    #[command(flatten)]
    cluster: Endpoints,
    /// Where to: SQL text; left out, it goes to stdout
    #[arg(value_name = "FILE", default_value = "-", hide_default_value = true)]
    file: PathBuf,
    /// Replace FILE if there is one
    #[arg(long)]
    force: bool,
}

/// Why there is no backup.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error(transparent)]
    Cluster(#[from] Error),
    #[error("cannot write the backup: {0}")]
    Output(io::Error),
    #[error(
        "{0} belongs to another database, and would be taken for this one's: remove it, or choose another name"
    )]
    Leftover(String),
    #[error("interrupted: there is no backup")]
    Interrupted,
}

/// Where a backup goes.
enum Output {
    Stdout(io::Stdout),
    File(NewFile),
}

/// Runs `resqlite backup`.
pub async fn run_backup(arguments: BackupArguments) -> ExitCode {
    let BackupArguments { cluster, file, force } = arguments;
    let ready = check_leftovers(&file);
    finish(match ready {
        Ok(()) => keep(&cluster, BackupFormat::Database, &file, force).await,
        Err(failure) => Err(failure),
    })
}

/// Runs `resqlite dump`.
pub async fn run_dump(arguments: DumpArguments) -> ExitCode {
    let DumpArguments { cluster, file, force } = arguments;
    finish(keep(&cluster, BackupFormat::Sql, &file, force).await)
}

fn finish(kept: Result<(), Failure>) -> ExitCode {
    match kept {
        Ok(()) => ExitCode::SUCCESS,
        Err(Failure::Output(error)) if error.kind() == io::ErrorKind::BrokenPipe => {
            ExitCode::from(EXIT_BROKEN_PIPE)
        }
        Err(failure) => fail(&failure.to_string()),
    }
}

/// SQLite takes what it finds beside a file for that file's own.
fn check_leftovers(file: &Path) -> Result<(), Failure> {
    for suffix in ["-wal", "-journal"] {
        let mut beside = file.as_os_str().to_owned();
        beside.push(suffix);
        if Path::new(&beside).exists() {
            return Err(Failure::Leftover(Path::new(&beside).display().to_string()));
        }
    }
    Ok(())
}

async fn keep(cluster: &Endpoints, format: BackupFormat, file: &Path, force: bool) -> Result<(), Failure> {
    let mut output = if file == Path::new("-") {
        Output::Stdout(io::stdout())
    } else {
        Output::File(NewFile::create(file, force).map_err(Failure::Output)?)
    };
    let taken = async {
        let client = connect(cluster.builder()).await?;
        let backup = client.backup(format).await?;
        take(backup, &mut output).await
    };
    // Whoever gives up should find no half of a file.
    let (bytes, log_index) = tokio::select! {
        taken = taken => taken?,
        _ = tokio::signal::ctrl_c() => return Err(Failure::Interrupted),
    };
    match output {
        Output::Stdout(mut stdout) => stdout.flush().map_err(Failure::Output),
        Output::File(new) => {
            new.finish().map_err(Failure::Output)?;
            let size = HumanBytes(bytes);
            println!("{}: {size}, everything up to log index {log_index}", file.display());
            Ok(())
        }
    }
}

/// Takes everything; says how much, and as of which index.
async fn take(mut backup: Backup, output: &mut Output) -> Result<(u64, u64), Failure> {
    let bar = progress::bar(backup.size_bytes());
    let mut bytes = 0;
    while let Some(data) = backup.next().await? {
        match output {
            Output::Stdout(stdout) => stdout.write_all(&data),
            Output::File(file) => file.write_all(&data),
        }
        .map_err(Failure::Output)?;
        bytes += data.len() as u64;
        bar.set_position(bytes);
    }
    bar.finish_and_clear();
    Ok((bytes, backup.log_index()))
}
