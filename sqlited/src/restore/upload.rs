//! A file on its way from a client into the log: cut into entries, a few of them at a time.
//!
//! It knows the client's stream and the write path, and nothing of SQLite. What comes of the steps is decided where
//! they are applied.

use std::{io, path::PathBuf, sync::Arc, time::Duration};

use bytes::BytesMut;
use resqlite::{
    api::{
        RestoreAbandon, RestoreBegin, RestoreChunk, RestoreEnd, RestoreFinish, RestoreRequest,
        RestoreResponse, RestoreStart, RestoreStep, StoredReply, logged_request::Body, restore_request::Part,
        restore_step::Step,
    },
    disk,
};
use tokio::{
    task::JoinSet,
    time::{Instant, timeout},
};
use tonic::{Status, Streaming};

use crate::{
    auth::Caller,
    errors::reply_status,
    limits::{CLIENT_STALL_MAX, RESTORE_FINISH_MAX},
    write_path::{WriteId, WritePath},
};

/// How much of the file one entry carries.
const CHUNK_BYTES: usize = 1 << 20;
/// How many chunks may be under way.
const CHUNKS_UNDER_WAY: usize = 4;
/// A slow client's data is passed on this often, so that the upload is not taken for abandoned.
const CHUNK_EVERY: Duration = Duration::from_secs(15);
/// How long a step that stages something may take.
const STEP_MAX: Duration = Duration::from_secs(60);
/// The file is staged, made beside the database, and written to the write-ahead log.
const COPIES: u64 = 3;

/// Takes files. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Uploads {
    writes: Arc<WritePath>,
    database: PathBuf,
}

/// The file so far.
struct Upload {
    caller: Caller,
    id: bytes::Bytes,
    size_bytes: u64,
    waiting: BytesMut,
    /// Where in the file `waiting` begins.
    offset: u64,
    passed_on: Instant,
    under_way: JoinSet<Result<(), Status>>,
}

impl Uploads {
    /// For this node's database.
    pub fn new(writes: Arc<WritePath>, database: PathBuf) -> Self {
        Self { writes, database }
    }

    /// Takes a file to its end. In a task of its own, so that somebody is still there to give up the upload of a
    /// client that has gone.
    pub async fn take(
        &self,
        caller: Caller,
        requests: Streaming<RestoreRequest>,
    ) -> Result<RestoreResponse, Status> {
        let uploads = self.clone();
        let taken = tokio::spawn(async move { uploads.take_all(&caller, requests).await });
        taken.await.map_err(|_| Status::internal("the upload ended without an answer"))?
    }

    async fn take_all(
        &self,
        caller: &Caller,
        mut requests: Streaming<RestoreRequest>,
    ) -> Result<RestoreResponse, Status> {
        match next(&mut requests).await? {
            Some(Part::End(end)) => self.finish(caller, end).await,
            Some(Part::Begin(begin)) => {
                let id = begin.upload_id.clone();
                let taken = self.take_file(caller, begin, &mut requests).await;
                match taken {
                    Ok(end) => self.finish(caller, end).await,
                    Err(status) => {
                        // If that fails, it is given up after a while.
                        let _ = self.step(caller, &id, Step::Abandon(RestoreAbandon {})).await;
                        Err(status)
                    }
                }
            }
            _ => Err(Status::invalid_argument("a restore begins with a begin, or is an end alone")),
        }
    }

    async fn take_file(
        &self,
        caller: &Caller,
        begin: RestoreBegin,
        requests: &mut Streaming<RestoreRequest>,
    ) -> Result<RestoreEnd, Status> {
        let RestoreBegin { upload_id, size_bytes, replace } = begin;
        self.check_room(size_bytes)?;
        self.step(caller, &upload_id, Step::Start(RestoreStart { size_bytes, replace })).await?;
        let mut upload = Upload {
            caller: caller.clone(),
            id: upload_id,
            size_bytes,
            waiting: BytesMut::new(),
            offset: 0,
            passed_on: Instant::now(),
            under_way: JoinSet::new(),
        };
        loop {
            match next(requests).await? {
                Some(Part::Data(data)) => {
                    upload.waiting.extend_from_slice(&data);
                    while upload.is_chunk_due() {
                        self.pass_on(&mut upload).await?;
                    }
                }
                Some(Part::End(end)) => {
                    while !upload.waiting.is_empty() {
                        self.pass_on(&mut upload).await?;
                    }
                    while let Some(staged) = upload.under_way.join_next().await {
                        outcome(staged)?;
                    }
                    if (end.size_bytes, &end.upload_id) != (upload.offset, &upload.id) {
                        return Err(Status::invalid_argument("the end of the restore is another file's"));
                    }
                    return Ok(end);
                }
                Some(Part::Begin(_)) => return Err(Status::invalid_argument("the restore begins twice")),
                None => return Err(Status::cancelled("the file was cut off; nothing was changed")),
            }
        }
    }

    /// Proposes the next chunk; waits while enough are under way.
    async fn pass_on(&self, upload: &mut Upload) -> Result<(), Status> {
        let data = upload.waiting.split_to(upload.waiting.len().min(CHUNK_BYTES)).freeze();
        let offset = upload.offset;
        upload.offset += data.len() as u64;
        if upload.offset > upload.size_bytes {
            return Err(Status::invalid_argument(
                "the file is larger than its begin said; nothing was changed",
            ));
        }
        upload.passed_on = Instant::now();
        if upload.under_way.len() >= CHUNKS_UNDER_WAY
            && let Some(staged) = upload.under_way.join_next().await
        {
            outcome(staged)?;
        }
        let (uploads, caller, id) = (self.clone(), upload.caller.clone(), upload.id.clone());
        upload.under_way.spawn(async move {
            uploads.step(&caller, &id, Step::Chunk(RestoreChunk { offset, data })).await.map(drop)
        });
        Ok(())
    }

    async fn step(
        &self,
        caller: &Caller,
        upload_id: &bytes::Bytes,
        step: Step,
    ) -> Result<Arc<StoredReply>, Status> {
        self.write(caller, WriteId::ServerMade, upload_id.clone(), step, STEP_MAX).await
    }

    async fn finish(&self, caller: &Caller, end: RestoreEnd) -> Result<RestoreResponse, Status> {
        let RestoreEnd { upload_id, size_bytes, blake3, replace, id } = end;
        let id = id.map_or(WriteId::ServerMade, |id| WriteId::ClientMade { id, part: 0 });
        let step = Step::Finish(RestoreFinish { size_bytes, blake3, replace });
        let reply = self.write(caller, id, upload_id, step, RESTORE_FINISH_MAX).await?;
        Ok(RestoreResponse { log_index: reply.log_index })
    }

    async fn write(
        &self,
        caller: &Caller,
        id: WriteId,
        upload_id: bytes::Bytes,
        step: Step,
        at_most: Duration,
    ) -> Result<Arc<StoredReply>, Status> {
        let body = Body::Restore(RestoreStep { upload_id, step: Some(step) });
        let reply = self.writes.write(caller, id, true, None, body, Instant::now() + at_most).await?;
        reply_status(&reply, |number| number).map_or(Ok(reply), Err)
    }

    fn check_room(&self, size_bytes: u64) -> Result<(), Status> {
        let free_bytes = disk::free_bytes(&self.database)
            .map_err(|error: io::Error| Status::internal(format!("cannot look at the disk: {error}")))?;
        let needed_bytes = size_bytes.saturating_mul(COPIES);
        if free_bytes < needed_bytes {
            return Err(Status::resource_exhausted(format!(
                "a restore of {size_bytes} bytes needs {needed_bytes} bytes of free space on every node's disk, this \
                 node's has {free_bytes}; nothing was changed"
            )));
        }
        Ok(())
    }
}

impl Upload {
    fn is_chunk_due(&self) -> bool {
        let waiting = self.waiting.len();
        waiting >= CHUNK_BYTES || (waiting > 0 && self.passed_on.elapsed() >= CHUNK_EVERY)
    }
}

async fn next(requests: &mut Streaming<RestoreRequest>) -> Result<Option<Part>, Status> {
    let silent = |_| {
        let seconds = CLIENT_STALL_MAX.as_secs();
        Status::deadline_exceeded(format!("nothing of the file came for {seconds} s; nothing was changed"))
    };
    let request = timeout(CLIENT_STALL_MAX, requests.message()).await.map_err(silent)??;
    Ok(request.and_then(|request| request.part))
}

fn outcome(staged: Result<Result<(), Status>, tokio::task::JoinError>) -> Result<(), Status> {
    staged.unwrap_or_else(|_| Err(Status::internal("a part of the upload ended without an answer")))
}
