//! The whole content as of one moment, as an SQLite file or as SQL.

use blake3::Hasher;
use bytes::Bytes;
use tonic::{Request, Status, Streaming};

use super::{
    Client,
    endpoints::Connection,
    error::{Error, Verdict, describe, verdict},
};
use crate::api::{
    BackupFormat, BackupHeader, BackupRequest, BackupResponse, BackupTrailer, backup_response::Part,
};

/// A backup on its way. The server waits while nobody takes it, for a bounded time.
#[derive(Debug)]
pub struct Backup {
    header: BackupHeader,
    stream: Streaming<BackupResponse>,
    hasher: Hasher,
    received_bytes: u64,
    over: bool,
}

impl Client {
    /// Begins a backup, which sees every write that was acknowledged before this call.
    pub async fn backup(&self, format: BackupFormat) -> Result<Backup, Error> {
        // A node may answer with headers first and fail afterwards, so an attempt includes the first message.
        let call = |mut connection: Connection, _| async move {
            let request = Request::new(BackupRequest { format: format.into() });
            let mut stream = connection.backup(request).await?.into_inner();
            match stream.message().await?.and_then(|message| message.part) {
                Some(Part::Header(header)) => Ok((header, stream)),
                _ => Err(Status::internal("the server sent no header")),
            }
        };
        let (header, stream) = self.attempts(false).call(call).await?;
        self.saw(header.log_index);
        Ok(Backup { header, stream, hasher: Hasher::new(), received_bytes: 0, over: false })
    }
}

impl Backup {
    /// Everything up to this entry of the log is in it, and nothing after.
    pub fn log_index(&self) -> u64 {
        self.header.log_index
    }

    /// How large it will be, if that is known before.
    pub fn size_bytes(&self) -> Option<u64> {
        Some(self.header.size_bytes).filter(|size| *size > 0)
    }

    /// The next bytes; `None` after the last ones, when their checksum was right. Only then what was received is a backup.
    pub async fn next(&mut self) -> Result<Option<Bytes>, Error> {
        if self.over {
            return Ok(None);
        }
        match self.stream.message().await {
            Ok(Some(BackupResponse { part: Some(Part::Data(data)) })) => {
                self.hasher.update(&data);
                self.received_bytes += data.len() as u64;
                Ok(Some(data))
            }
            Ok(Some(BackupResponse { part: Some(Part::Trailer(trailer)) })) => {
                self.check(&trailer)?;
                self.over = true;
                // Takes the stream's end: dropping the stream before it would reset it.
                match self.stream.message().await {
                    Ok(None) => Ok(None),
                    Ok(Some(_)) => Err(Error::Internal("the server sent more than the whole backup".into())),
                    Err(_) => Ok(None),
                }
            }
            Ok(Some(_)) => Err(Error::Internal("the server sent a message that is not due".into())),
            Ok(None) => Err(self.cut_off("the server ended it")),
            Err(status) if verdict(&status) == Verdict::Final => Err(status.into()),
            Err(status) => Err(self.cut_off(&describe(&status))),
        }
    }

    fn check(&self, trailer: &BackupTrailer) -> Result<(), Error> {
        let same = trailer.size_bytes == self.received_bytes
            && trailer.blake3[..] == self.hasher.finalize().as_bytes()[..];
        let damaged = || Error::Internal("the backup was damaged on its way: its checksum is wrong".into());
        same.then_some(()).ok_or_else(damaged)
    }

    fn cut_off(&self, reason: &str) -> Error {
        Error::Unavailable(format!("the backup broke off after {} bytes: {reason}", self.received_bytes))
    }
}
