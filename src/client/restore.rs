//! Replacing the whole content by that of an SQLite file.
//!
//! The file is sent to one node, which proposes it in chunks. When that node fails, the same upload is sent to
//! another one; and when only the answer was lost, its end alone asks what became of it.

use std::{
    fs::File,
    io::{self, Read},
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use blake3::Hasher;
use bytes::Bytes;
use tokio::{sync::mpsc, task::spawn_blocking};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status};

use super::{
    Client,
    endpoints::Connection,
    error::{Error, Verdict, verdict},
    ids::Ticket,
};
use crate::{
    api::{RestoreBegin, RestoreEnd, RestoreRequest, restore_request::Part},
    database_file::{HEADER_BYTES, check_header},
};

/// How much of the file one message carries.
const PART_BYTES: usize = 256 << 10;
/// How often an upload that was lost is sent again.
const MAX_RESTARTS: u32 = 3;
/// How many messages are read ahead.
const PARTS_WAITING: usize = 4;

/// How far a restore is, for whoever watches it. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct RestoreProgress {
    sent_bytes: Arc<AtomicU64>,
    all_sent: Arc<AtomicBool>,
}

impl RestoreProgress {
    /// How much of the file was sent.
    pub fn sent_bytes(&self) -> u64 {
        self.sent_bytes.load(Ordering::Relaxed)
    }

    /// Whether all of it was: the nodes are at work.
    pub fn is_all_sent(&self) -> bool {
        self.all_sent.load(Ordering::Relaxed)
    }
}

/// One file's way into a cluster.
struct Restore<'a> {
    client: &'a Client,
    path: &'a Path,
    upload_id: Bytes,
    size_bytes: u64,
    replace: bool,
    progress: RestoreProgress,
}

impl Client {
    /// Replaces the whole content by that of an SQLite file, and returns the log index from which on that holds.
    /// Only an empty database is replaced, unless `replace`. After any error but [`Error::OutcomeUnknown`] nothing
    /// has changed.
    pub async fn restore(&self, file: &Path, replace: bool, progress: RestoreProgress) -> Result<u64, Error> {
        let size_bytes = check_file(file)?;
        let mut upload_id = [0; 16];
        getrandom::fill(&mut upload_id)
            .map_err(|error| Error::Internal(format!("no random numbers: {error}")))?;
        let upload_id = Bytes::copy_from_slice(&upload_id);
        Restore { client: self, path: file, upload_id, size_bytes, replace, progress }.run().await
    }
}

/// What can be said of the file before anything is sent: its size.
fn check_file(path: &Path) -> Result<u64, Error> {
    let mut file = File::open(path).map_err(|error| unreadable(path, &error))?;
    let size_bytes = file.metadata().map_err(|error| unreadable(path, &error))?.len();
    let mut header = Vec::new();
    file.by_ref()
        .take(HEADER_BYTES as u64)
        .read_to_end(&mut header)
        .map_err(|error| unreadable(path, &error))?;
    check_header(&header, size_bytes)
        .map_err(|unfit| Error::Invalid(format!("{}: {unfit}", path.display())))?;
    for suffix in ["-wal", "-journal"] {
        let mut beside = path.as_os_str().to_owned();
        beside.push(suffix);
        if Path::new(&beside).metadata().is_ok_and(|metadata| metadata.len() > 0) {
            return Err(Error::Invalid(format!(
                "{} holds changes that are not in the file itself: end the programs that use it, and run: \
                 sqlite3 {} 'PRAGMA wal_checkpoint(TRUNCATE)'",
                Path::new(&beside).display(),
                path.display()
            )));
        }
    }
    Ok(size_bytes)
}

fn unreadable(path: &Path, error: &io::Error) -> Error {
    Error::Invalid(format!("{} cannot be read: {error}", path.display()))
}

impl Restore<'_> {
    async fn run(&self) -> Result<u64, Error> {
        let mut attempts = self.client.attempts(true);
        let mut ticket = self.client.ticket().await?;
        let mut restarts = 0;
        // What is asked again when only the answer may be missing.
        let mut last_end: Option<RestoreEnd> = None;
        loop {
            let (_, connection) = attempts.present();
            let sent_before = self.progress.sent_bytes();
            let answer = match &last_end {
                Some(end) => ask_again(connection, end.clone()).await,
                None => {
                    let (answer, end) = self.send(connection, &ticket).await?;
                    last_end = end;
                    answer
                }
            };
            let status = match answer {
                Ok(log_index) => {
                    self.client.saw(log_index);
                    return Ok(log_index);
                }
                Err(status) => status,
            };
            // The upload is gone, or the end came without all of the file: perhaps because a node gave up an attempt
            // of ours that we had given up. What was asked for under this id can succeed no more.
            if status.code() == Code::Aborted && restarts < MAX_RESTARTS {
                restarts += 1;
                ticket = self.client.ticket().await?;
                last_end = None;
                continue;
            }
            if verdict(&status) != Verdict::Final && self.progress.sent_bytes() > sent_before {
                attempts.progressed();
            }
            let failed = attempts.failed(status).await;
            match failed {
                Err(Error::OutcomeUnknown(why)) if last_end.is_none() => {
                    return Err(Error::Unavailable(format!("nothing was changed: {why}")));
                }
                other => other?,
            }
        }
    }

    /// Sends the file. Returns what came of it, and the end if it may have been received.
    async fn send(
        &self,
        mut connection: Connection,
        ticket: &Ticket,
    ) -> Result<(Result<u64, Status>, Option<RestoreEnd>), Error> {
        let file = File::open(self.path).map_err(|error| unreadable(self.path, &error))?;
        let (parts, requests) = mpsc::channel(PARTS_WAITING);
        let (upload_id, size_bytes, replace) = (self.upload_id.clone(), self.size_bytes, self.replace);
        let (id, progress) = (ticket.id.clone(), self.progress.clone());
        progress.all_sent.store(false, Ordering::Relaxed);
        let reading = spawn_blocking(move || -> io::Result<Option<RestoreEnd>> {
            let begin = RestoreBegin { upload_id: upload_id.clone(), size_bytes, replace };
            let Some(blake3) = read_file(file, Part::Begin(begin), &parts, &progress)? else {
                return Ok(None);
            };
            let end = RestoreEnd { upload_id, size_bytes, blake3, replace, id: Some(id) };
            progress.all_sent.store(true, Ordering::Relaxed);
            let sent = parts.blocking_send(message(Part::End(end.clone())));
            Ok(sent.is_ok().then_some(end))
        });
        let answer = connection.restore(ReceiverStream::new(requests)).await;
        let read = reading.await.map_err(|_| Error::Internal("the reading thread panicked".into()))?;
        let end = read.map_err(|error| unreadable(self.path, &error))?;
        Ok((answer.map(|response| response.into_inner().log_index), end))
    }
}

async fn ask_again(mut connection: Connection, end: RestoreEnd) -> Result<u64, Status> {
    let response = connection.restore(tokio_stream::once(message(Part::End(end)))).await?;
    Ok(response.into_inner().log_index)
}

fn message(part: Part) -> RestoreRequest {
    RestoreRequest { part: Some(part) }
}

/// Hands out a file after `begin`, and returns its hash; `None`: nobody takes it any more. Blocks.
fn read_file(
    mut file: File,
    begin: Part,
    parts: &mpsc::Sender<RestoreRequest>,
    progress: &RestoreProgress,
) -> io::Result<Option<Bytes>> {
    let (mut hasher, mut sent_bytes) = (Hasher::new(), 0);
    let mut next = begin;
    loop {
        if parts.blocking_send(message(next)).is_err() {
            return Ok(None);
        }
        progress.sent_bytes.store(sent_bytes, Ordering::Relaxed);
        let mut data = Vec::with_capacity(PART_BYTES);
        if file.by_ref().take(PART_BYTES as u64).read_to_end(&mut data)? == 0 {
            return Ok(Some(Bytes::copy_from_slice(hasher.finalize().as_bytes())));
        }
        hasher.update(&data);
        sent_bytes += data.len() as u64;
        next = Part::Data(data.into());
    }
}
