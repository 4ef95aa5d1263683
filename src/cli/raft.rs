//! `resqlite raft`: a Raft node by itself, without SQL.
//!
//! Speaks raftd's local protocol: proposes bytes, and follows what is committed.

use std::{
    collections::BTreeMap,
    io::{self, BufRead, BufWriter, Write},
    path::{Path, PathBuf},
    process::ExitCode,
    thread,
    time::Duration,
};

use bytes::Bytes;
use hyper_util::rt::TokioIo;
use tokio::{
    net::UnixStream,
    sync::mpsc,
    time::{Instant, sleep},
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{
    Status, Streaming,
    transport::{Channel, Endpoint, Uri},
};

use super::{EXIT_BROKEN_PIPE, fail};
use crate::api::{
    FollowAttach, FollowRequest, LogEntry, LogEntryKind, Proposal, ProposalRefusal, ProposeRequest,
    ProposeResponse, follow_request, log_service_client::LogServiceClient, proposal_outcome::Outcome,
};

/// How many payloads are proposed together, at most.
const BATCH: usize = 256;
/// For how long what was refused for want of a leader is proposed again, and how often.
const RETRY: (Duration, Duration) = (Duration::from_secs(30), Duration::from_millis(50));
/// raftd's bound on a message is the largest request's size and a little more.
const MAX_MESSAGE_BYTES: usize = 96 << 20;

#[derive(Debug, clap::Subcommand)]
pub enum Command {
    /// Propose payloads; print the index at which each was committed
    Propose {
        /// The Unix socket of a raftd
        #[arg(long, value_name = "PATH")]
        socket: PathBuf,
        /// What to propose; without any, each line of stdin
        payloads: Vec<String>,
    },
    /// Print the committed payloads: index, term, timestamp in ms, and payload
    Follow {
        /// The Unix socket of a raftd
        #[arg(long, value_name = "PATH")]
        socket: PathBuf,
        /// The first index to print
        #[arg(long, value_name = "INDEX", default_value_t = 1)]
        from: u64,
        /// End after so many payloads; else go on for ever
        #[arg(long, value_name = "N")]
        count: Option<u64>,
    },
}

/// Runs the command.
pub async fn run(command: Command) -> ExitCode {
    let mut out = BufWriter::new(io::stdout());
    let outcome = match command {
        Command::Propose { socket, payloads } => propose(&socket, payloads, &mut out).await,
        Command::Follow { socket, from, count } => follow(&socket, from, count, &mut out).await,
    };
    match (outcome, out.flush()) {
        (Ok(()), Ok(())) => ExitCode::SUCCESS,
        (Err(Failure::Output(error)), _) | (_, Err(error)) if error.kind() == io::ErrorKind::BrokenPipe => {
            ExitCode::from(EXIT_BROKEN_PIPE)
        }
        (Err(failure), _) => fail(&failure.to_string()),
        (Ok(()), Err(error)) => fail(&error.to_string()),
    }
}

#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error("cannot reach raftd at {socket}: {reason}")]
    Unreachable { socket: String, reason: String },
    #[error("raftd: {}", .0.message())]
    Status(#[from] Status),
    #[error("{0}")]
    Output(#[from] io::Error),
    #[error("payload {number} was refused: {reason}")]
    Refused { number: u64, reason: &'static str },
    #[error("payload {number} may or may not be committed: leadership changed, or raftd ended, on the way")]
    Unknown { number: u64 },
}

async fn connect(socket: &Path) -> Result<LogServiceClient<Channel>, Failure> {
    let path = socket.to_owned();
    let connector = tower::service_fn(move |_: Uri| {
        let path = path.clone();
        async move { UnixStream::connect(path).await.map(TokioIo::new) }
    });
    // The address is only a name: the connector knows the way.
    let channel = Endpoint::from_static("http://raftd").connect_with_connector(connector).await;
    let channel = channel.map_err(|error| {
        let mut reason: &dyn std::error::Error = &error;
        while let Some(cause) = reason.source() {
            reason = cause;
        }
        Failure::Unreachable { socket: socket.display().to_string(), reason: reason.to_string() }
    })?;
    Ok(LogServiceClient::new(channel).max_decoding_message_size(MAX_MESSAGE_BYTES))
}

async fn propose(socket: &Path, payloads: Vec<String>, out: &mut impl Write) -> Result<(), Failure> {
    let mut client = connect(socket).await?;
    let (requests, stream) = mpsc::channel(1);
    // raftd answers the call itself only with the first outcome, so it is not awaited yet.
    let answers = client.propose(ReceiverStream::new(stream)).await?.into_inner();
    let mut proposer = Proposer { requests, answers, next_number: 1 };
    if !payloads.is_empty() {
        for batch in payloads.chunks(BATCH) {
            proposer.propose(batch.iter().map(|payload| Bytes::from(payload.clone())), out).await?;
        }
        return Ok(());
    }
    let mut lines = stdin_lines();
    let mut batch = Vec::new();
    while lines.recv_many(&mut batch, BATCH).await > 0 {
        let gathered: Vec<Bytes> = batch.drain(..).collect::<io::Result<_>>()?;
        proposer.propose(gathered, out).await?;
        out.flush()?;
    }
    Ok(())
}

/// The lines of stdin, read by a thread of its own.
fn stdin_lines() -> mpsc::Receiver<io::Result<Bytes>> {
    let (sender, receiver) = mpsc::channel(BATCH);
    thread::spawn(move || {
        for line in io::stdin().lock().split(b'\n') {
            // The receiver is gone when proposing failed.
            if sender.blocking_send(line.map(Bytes::from)).is_err() {
                return;
            }
        }
    });
    receiver
}

struct Proposer {
    requests: mpsc::Sender<ProposeRequest>,
    answers: Streaming<ProposeResponse>,
    /// Of the next payload, from 1; also its id on the stream.
    next_number: u64,
}

impl Proposer {
    /// Proposes payloads until each is committed, and prints their indexes in order.
    async fn propose(
        &mut self,
        payloads: impl IntoIterator<Item = Bytes>,
        out: &mut impl Write,
    ) -> Result<(), Failure> {
        let mut waiting: BTreeMap<u64, Bytes> = BTreeMap::new();
        for payload in payloads {
            waiting.insert(self.next_number, payload);
            self.next_number += 1;
        }
        let mut committed = BTreeMap::new();
        let deadline = Instant::now() + RETRY.0;
        while let Some(&number) = waiting.keys().next() {
            let proposals =
                waiting.iter().map(|(id, payload)| Proposal { id: *id, payload: payload.clone() });
            let request = ProposeRequest { proposals: proposals.collect() };
            self.requests.send(request).await.map_err(|_| Failure::Unknown { number })?;
            let refused = self.outcomes(&mut waiting, &mut committed).await?;
            if let Some((number, reason)) = refused {
                if Instant::now() >= deadline {
                    return Err(Failure::Refused { number, reason });
                }
                sleep(RETRY.1).await;
            }
        }
        for index in committed.values() {
            writeln!(out, "{index}")?;
        }
        Ok(())
    }

    /// Takes one outcome for each that waits. Those refused go on waiting; returns one of them.
    async fn outcomes(
        &mut self,
        waiting: &mut BTreeMap<u64, Bytes>,
        committed: &mut BTreeMap<u64, u64>,
    ) -> Result<Option<(u64, &'static str)>, Failure> {
        let mut missing = waiting.len();
        let mut refused = None;
        while missing > 0 {
            let number = *waiting.keys().next().expect("an outcome is missing, so its payload waits");
            let Some(response) = self.answers.message().await? else {
                return Err(Failure::Unknown { number });
            };
            for outcome in response.outcomes {
                missing = missing.saturating_sub(1);
                match outcome.outcome {
                    Some(Outcome::CommittedIndex(index)) => {
                        waiting.remove(&outcome.id);
                        committed.insert(outcome.id, index);
                    }
                    Some(Outcome::Refused(refusal)) => {
                        refused = Some((outcome.id, explain(outcome.id, refusal)?));
                    }
                    Some(Outcome::Unknown(_)) | None => return Err(Failure::Unknown { number: outcome.id }),
                }
            }
        }
        Ok(refused)
    }
}

/// Why a payload was refused; an error if proposing it again cannot help.
fn explain(number: u64, refusal: i32) -> Result<&'static str, Failure> {
    match ProposalRefusal::try_from(refusal).unwrap_or_default() {
        ProposalRefusal::Unspecified => Err(Failure::Refused { number, reason: "raftd does not say why" }),
        ProposalRefusal::TooLarge => Err(Failure::Refused { number, reason: "it is too large" }),
        ProposalRefusal::ShuttingDown => Err(Failure::Refused { number, reason: "raftd is shutting down" }),
        ProposalRefusal::NoLeader => Ok("there is no leader"),
        ProposalRefusal::Overloaded => Ok("the leader is overloaded"),
        ProposalRefusal::OutOfRoom => {
            Err(Failure::Refused { number, reason: "the leader, or most members, lack room on their disks" })
        }
        ProposalRefusal::Overwritten => Ok("another leader's entry took its place"),
    }
}

async fn follow(socket: &Path, from: u64, count: Option<u64>, out: &mut impl Write) -> Result<(), Failure> {
    let mut left = count.unwrap_or(u64::MAX);
    if left == 0 {
        return Ok(());
    }
    let mut client = connect(socket).await?;
    let attach = FollowAttach { applied_index: from.saturating_sub(1), ..FollowAttach::default() };
    let request = FollowRequest { request: Some(follow_request::Request::Attach(attach)) };
    // The stream stays open for as long as the sender lives.
    let (requests, stream) = mpsc::channel(1);
    requests.send(request).await.expect("the receiver is held here");
    let mut responses = client.follow(ReceiverStream::new(stream)).await?.into_inner();
    while let Some(response) = responses.message().await? {
        let wanted =
            |entry: &&LogEntry| entry.index >= from && entry.kind == i32::from(LogEntryKind::Payload);
        for entry in response.entries.iter().filter(wanted) {
            write_entry(entry, out)?;
            left -= 1;
            if left == 0 {
                return Ok(());
            }
        }
        out.flush()?;
    }
    Ok(())
}

fn write_entry(entry: &LogEntry, out: &mut impl Write) -> io::Result<()> {
    write!(out, "{}\t{}\t{}\t", entry.index, entry.term, entry.timestamp_ms)?;
    out.write_all(&entry.payload)?;
    out.write_all(b"\n")
}
