//! `resqlite restore`: an SQLite file becomes the content of a running cluster.

use std::{
    path::PathBuf,
    process::ExitCode,
    time::{Duration, Instant},
};

use indicatif::{HumanBytes, ProgressBar};
use tokio::time::interval;

use super::{Endpoints, connect, fail, progress};
use crate::client::{Error, RestoreProgress};

#[derive(Debug, clap::Args)]
pub struct Arguments {
    #[command(flatten)]
    cluster: Endpoints,
    /// An SQLite file, such as `resqlite backup` makes
    #[arg(value_name = "FILE")]
    file: PathBuf,
    /// Replace what is in the cluster, all of it
    #[arg(long)]
    force: bool,
}

/// Runs the command.
pub async fn run(arguments: Arguments) -> ExitCode {
    match restore(&arguments).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(&error.to_string()),
    }
}

async fn restore(Arguments { cluster, file, force }: &Arguments) -> Result<(), Error> {
    let began = Instant::now();
    let size_bytes = file.metadata().map(|metadata| metadata.len());
    let size_bytes =
        size_bytes.map_err(|error| Error::Invalid(format!("{} cannot be read: {error}", file.display())))?;
    let client = connect(cluster.builder()).await?;
    let (sent, bar) = (RestoreProgress::default(), progress::bar(Some(size_bytes)));
    let log_index = tokio::select! {
        done = client.restore(file, *force, sent.clone()) => done,
        never = show(&bar, &sent) => match never {},
    }?;
    bar.finish_and_clear();
    let (size, seconds) = (HumanBytes(size_bytes), began.elapsed().as_secs_f64());
    println!(
        "{}: {size} restored in {seconds:.1} s; from log index {log_index} on, this is the content of every node",
        file.display()
    );
    if *force {
        println!("What was there before, and what was written until then, is replaced");
    }
    Ok(())
}

async fn show(bar: &ProgressBar, sent: &RestoreProgress) -> std::convert::Infallible {
    let mut ticks = interval(Duration::from_millis(100));
    loop {
        ticks.tick().await;
        bar.set_position(sent.sent_bytes());
        bar.set_message(if sent.is_all_sent() { "the nodes check and copy it" } else { "" });
    }
}
