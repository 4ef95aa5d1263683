//! Backups: the content as of one moment, as an SQLite file or as SQL, for a client to keep.
//!
//! Made of a copy beside the database, so that no view is held while the client takes its time. It knows SQLite and
//! files; what the moment must have seen is the caller's business.

mod dump;
mod parts;
mod virtual_table;

use std::{
    fs::{self, File},
    io,
    path::PathBuf,
    sync::Arc,
};

use resqlite::api::{BackupFormat, BackupHeader, BackupResponse, backup_response::Part};
use rusqlite::Connection;
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, mpsc},
    task::spawn_blocking,
    time::timeout,
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use self::parts::PartWriter;
use crate::{
    connection,
    database::DatabaseFile,
    limits::CLIENT_STALL_MAX,
    snapshot::{self, CopyError, Shared, Users},
};

pub use dump::{DumpError, dump};
pub use virtual_table::VirtualTable;

/// How many messages may wait between the file and the client.
const PARTS_WAITING: usize = 4;
/// What has to stay free on the disk beside a copy.
const SPARE_BYTES: u64 = 64 << 20;

/// What a client receives.
pub type Responses = ReceiverStream<Result<BackupResponse, Status>>;

/// Makes backups of one database, one at a time. Clones share that.
#[derive(Clone, Debug)]
pub struct Backups {
    database: DatabaseFile,
    users: Users,
    at_once: Arc<Semaphore>,
}

/// Why there is no backup, or no more of it.
#[derive(Debug, thiserror::Error)]
pub enum BackupError {
    /// There is no copy.
    #[error(transparent)]
    Copy(#[from] CopyError),
    /// The copy cannot be changed or read.
    #[error("the copy of the database cannot be used: {0}")]
    Sqlite(#[from] rusqlite::Error),
    /// The copy cannot be read, or nobody takes it any more.
    #[error("the copy of the database cannot be sent: {0}")]
    Io(#[from] io::Error),
    /// The content cannot be put into SQL.
    #[error(transparent)]
    Dump(#[from] DumpError),
}

impl Backups {
    /// Of this database.
    pub fn new(database: DatabaseFile, users: Users) -> Self {
        Self { database, users, at_once: Arc::new(Semaphore::new(1)) }
    }

    /// Begins a backup of what is in the database now.
    pub async fn start(&self, format: BackupFormat) -> Result<Responses, Status> {
        let turn = Arc::clone(&self.at_once).try_acquire_owned().map_err(|_| {
            Status::resource_exhausted(
                "another backup is under way at this node: wait for its end, or ask another node",
            )
        })?;
        self.check_room()?;
        let right = self.users.share().await;
        let (made, mut parts) = mpsc::channel(PARTS_WAITING);
        let database = self.database.clone();
        spawn_blocking(move || make(&database, format, (turn, right), &made));
        let (to_client, responses) = mpsc::channel(1);
        // Beside the thread that makes the parts, for only here a wait can be bounded: a client that takes nothing
        // must not keep the copy, and others from their backup. It finds its stream ended before the trailer.
        tokio::spawn(async move {
            while let Some(part) = parts.recv().await {
                if !matches!(timeout(CLIENT_STALL_MAX, to_client.send(part)).await, Ok(Ok(()))) {
                    return;
                }
            }
        });
        Ok(ReceiverStream::new(responses))
    }

    /// Refuses what would fill the disk under the database.
    fn check_room(&self) -> Result<(), Status> {
        let of_disk = |error: io::Error| Status::internal(format!("cannot look at the disk: {error}"));
        let size_bytes = fs::metadata(self.database.path()).map_err(of_disk)?.len();
        let free_bytes = resqlite::disk::free_bytes(self.database.path()).map_err(of_disk)?;
        let needed_bytes = size_bytes + SPARE_BYTES;
        if free_bytes < needed_bytes {
            return Err(Status::resource_exhausted(format!(
                "a backup needs {needed_bytes} bytes of free space beside this node's database for its copy, there are \
                 {free_bytes}: free some, or ask another node"
            )));
        }
        Ok(())
    }
}

type Parts = mpsc::Sender<Result<BackupResponse, Status>>;

/// Makes and hands out all parts. Blocks.
fn make(database: &DatabaseFile, format: BackupFormat, turn: (OwnedSemaphorePermit, Shared), parts: &Parts) {
    let made = match format {
        BackupFormat::Database => send_file(database, turn, parts),
        BackupFormat::Sql => send_dump(database, turn, parts),
    };
    let Err(error) = made else { return };
    if parts.is_closed() {
        tracing::info!("a client has given up its backup");
        return;
    }
    tracing::warn!(%error, "a backup failed");
    // Whoever has gone away meanwhile needs no answer.
    let _ = parts.blocking_send(Err(status(&error)));
}

fn status(error: &BackupError) -> Status {
    match error {
        BackupError::Dump(DumpError::Inexpressible { .. }) => Status::failed_precondition(error.to_string()),
        BackupError::Copy(_) | BackupError::Sqlite(_) | BackupError::Io(_) | BackupError::Dump(_) => {
            Status::unavailable(error.to_string())
        }
    }
}

fn send_file(
    database: &DatabaseFile,
    (turn, right): (OwnedSemaphorePermit, Shared),
    parts: &Parts,
) -> Result<(), BackupError> {
    let (copy, log_index) = Copy::make(database, right, parts)?;
    // Closed, so that nothing is left to be written; and then it needs its name no longer.
    copy.connection.close().map_err(|(_, error)| error)?;
    let mut file = File::open(&copy.name.0)?;
    drop(copy.name);
    let size_bytes = file.metadata()?.len();
    header(parts, BackupHeader { log_index, size_bytes })?;
    let mut out = PartWriter::new(parts);
    io::copy(&mut file, &mut out)?;
    out.finish()?;
    tracing::info!(log_index, size_bytes, "a backup was made");
    drop(turn);
    Ok(())
}

fn send_dump(
    database: &DatabaseFile,
    (turn, right): (OwnedSemaphorePermit, Shared),
    parts: &Parts,
) -> Result<(), BackupError> {
    let (copy, log_index) = Copy::make(database, right, parts)?;
    header(parts, BackupHeader { log_index, size_bytes: 0 })?;
    let mut out = PartWriter::new(parts);
    dump(&copy.connection, &mut out)?;
    let size_bytes = out.finish()?;
    tracing::info!(log_index, size_bytes, "a dump was made");
    drop(turn);
    Ok(())
}

fn header(parts: &Parts, header: BackupHeader) -> io::Result<()> {
    parts::send(parts, Part::Header(header))
}

/// A copy of the database without the server's own tables.
struct Copy {
    // Declared first, so closed before its file goes.
    connection: Connection,
    name: FileName,
}

impl Copy {
    /// Copies what is there now; says where that stands in the log.
    fn make(database: &DatabaseFile, right: Shared, parts: &Parts) -> Result<(Self, u64), BackupError> {
        let name = FileName(snapshot::outgoing_backup(database.path()));
        let position = snapshot::copy_pages(database, &name.0, || !parts.is_closed())?;
        // The database itself is not needed any more, and may be replaced.
        drop(right);
        let connection = Connection::open(&name.0)?;
        remove_own_tables(&connection)?;
        // Only now: a defensive connection keeps its journal.
        connection::harden(&connection)?;
        Ok((Self { connection, name }, position.applied_index))
    }
}

/// Removes the server's own tables, with their content overwritten. VACUUM would make the file smaller, but it gives
/// new rowids to the rows of tables without an INTEGER PRIMARY KEY: the pages stay in the file, free and empty.
pub fn remove_own_tables(copy: &Connection) -> rusqlite::Result<()> {
    // Not as a write-ahead log any more, so that the file is all there is, and any program may read it.
    copy.query_row("PRAGMA journal_mode = DELETE", [], |_| Ok(()))?;
    copy.execute_batch(
        "PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; PRAGMA foreign_keys = OFF; PRAGMA secure_delete = ON",
    )?;
    let own =
        "SELECT name FROM sqlite_schema WHERE type = 'table' AND name LIKE '\\_resqlite\\_%' ESCAPE '\\'";
    let own: Vec<String> =
        copy.prepare(own)?.query_map([], |row| row.get(0))?.collect::<rusqlite::Result<_>>()?;
    own.iter().try_for_each(|name| copy.execute_batch(&format!("DROP TABLE \"{name}\"")))
}

/// The copy's file, which goes away with this.
struct FileName(PathBuf);

impl Drop for FileName {
    fn drop(&mut self) {
        // If that fails, the next start removes it.
        let _ = fs::remove_file(&self.0);
    }
}
