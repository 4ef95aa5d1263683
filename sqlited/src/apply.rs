//! Applies committed log entries to the database, many in one SQLite transaction.
//!
//! It knows SQLite and the format of log entries; nothing of gRPC, of tokio or of threads. After any
//! crash the file itself says which entries it holds: the applied index is part of every transaction.

mod error;
mod request;
mod restore;
mod tables;

use std::{
    fs::File,
    io,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use prost::Message;
use resqlite::api::{LogEntry, LogEntryKind, LoggedRequest, StoredReply, logged_request::Body};
use rusqlite::{Connection, InterruptHandle};

use crate::{
    connection::Writer,
    database::DatabaseFile,
    execute::{self, Remedies, Savepoints, Stop},
    page_sums::LoadError,
    restore::Staging,
    sessions::{ClientId, Sessions},
    soundness::{self, Damage},
    sqlite_ffi::VfsState,
    users::{Directory, Users},
    verify::Verifications,
    version,
    versions::Versions,
};

pub use error::ApplyError;
use error::environment;
use request::{Memory, is_marker, is_restore, run_request, run_vacuum};
use tables::{OwnStatements, open_tables};
pub use tables::{Position, applied_index, stored_position};

/// The format of [`LoggedRequest`] that this version writes and reads.
pub const REQUEST_FORMAT: u32 = 1;

/// Once replies are so large together they are handed over before more is executed: entries are small, but what
/// they return may not be, and a node that starts again meets the same entries again.
const REPLY_BYTES_AT_ONCE: usize = 16 << 20;

/// How entries are gathered into transactions. What an entry means does not depend on it.
#[derive(Clone, Debug)]
pub struct ApplySettings {
    /// At most so many entries in one transaction.
    pub group_entries: usize,
    /// No further entry once the payloads have so many bytes.
    pub group_bytes: usize,
    /// How many pages the WAL may have before a commit writes it back to the database. Done by SQLite in the
    /// committing thread: a checkpoint beside a busy writer never catches up, and the WAL would grow for ever.
    pub checkpoint_pages: u32,
    /// Who hashes the content at the markers that ask for it, and compares what the nodes report.
    pub verifications: Option<Verifications>,
    /// Where the users are published once they are committed.
    pub directory: Directory,
}

impl Default for ApplySettings {
    fn default() -> Self {
        Self {
            group_entries: 1_000,
            group_bytes: 4 << 20,
            checkpoint_pages: 4_096,
            verifications: None,
            directory: Directory::default(),
        }
    }
}

/// A request that was applied, and its reply. The transaction is committed.
#[derive(Clone, Debug)]
pub struct Applied {
    /// The entry.
    pub index: u64,
    /// Who sent the request; zeros if it did not say.
    pub client_id: ClientId,
    /// The request's number.
    pub sequence: u64,
    /// What came of it, or of the same request when it was applied first.
    pub reply: Arc<StoredReply>,
}

/// Makes the WAL durable, from any thread, beside a running [`Applier`].
#[derive(Clone, Debug)]
pub struct Durability {
    wal: Arc<File>,
    applied_index: Arc<AtomicU64>,
}

impl Durability {
    /// Syncs the WAL and returns an applied index that is now durable: the one from before the sync.
    /// After an error no later sync of the same file may be trusted: end the process.
    pub fn sync(&self) -> io::Result<u64> {
        let applied_index = self.applied_index.load(Ordering::Acquire);
        self.wal.sync_data()?;
        Ok(applied_index)
    }
}

/// The state machine: one database and the sessions in it.
pub struct Applier {
    writer: Writer,
    sessions: Sessions,
    versions: Versions,
    users: Users,
    position: Position,
    settings: ApplySettings,
    execution_version: u64,
    durability: Durability,
    /// A transaction has failed, and what it left in memory is not taken back yet.
    in_disorder: bool,
    file: DatabaseFile,
    staging: Staging,
}

/// An entry, decoded.
enum Work {
    Nothing,
    Request(Box<LoggedRequest>),
}

struct Item<'e> {
    entry: &'e LogEntry,
    work: Work,
}

/// How a group ended.
enum Group {
    /// So many entries are committed, and their replies are so large.
    Committed { done: usize, reply_bytes: usize },
    /// The transaction is gone: execute it again, with this knowledge about its last entry.
    Lost { at: usize, statement: u32, remedy: execute::Remedy },
    /// This entry has to be the first of a group.
    Cut { at: usize },
}

/// Trouble with one entry of a group.
struct Trouble {
    at: usize,
    error: rusqlite::Error,
}

impl Applier {
    /// Opens or creates the database that lies there.
    pub fn open(path: &Path, settings: ApplySettings) -> Result<Self, ApplyError> {
        let file = DatabaseFile::at(path)
            .map_err(|error| ApplyError::Open { path: path.to_owned(), reason: error.to_string() })?;
        Self::open_file(&file, settings)
    }

    /// Opens or creates a database, and reads where it stands.
    pub fn open_file(file: &DatabaseFile, settings: ApplySettings) -> Result<Self, ApplyError> {
        let path = file.path();
        let failed = |reason: String| ApplyError::Open { path: path.to_owned(), reason };
        let sqlite = |error: rusqlite::Error| match file.damage(None) {
            Some(damage) => ApplyError::Damaged(damage),
            None if soundness::is_damage(&error) => ApplyError::Damaged(Damage {
                file: path.to_owned(),
                applied_index: None,
                reason: error.to_string(),
            }),
            None => failed(error.to_string()),
        };
        file.sums().load().map_err(|error| match error {
            LoadError::Damaged { file, reason } => {
                ApplyError::Damaged(Damage { file, applied_index: None, reason })
            }
            error => failed(error.to_string()),
        })?;
        let writer = Writer::open(file, settings.checkpoint_pages).map_err(sqlite)?;
        let position = open_tables(&writer.connection).map_err(sqlite)?.map_err(failed)?;
        check_local_time(&writer.connection).map_err(sqlite)?.map_err(failed)?;
        let sessions = Sessions::load(&writer.connection).map_err(sqlite)?;
        let versions = Versions::load(&writer.connection).map_err(sqlite)?;
        let staging = Staging::load(&writer.connection).map_err(sqlite)?;
        let mut users = Users::load(&writer.connection).map_err(sqlite)?;
        users.publish(&settings.directory);
        let wal = open_wal(path).map_err(|error| failed(format!("cannot open its -wal: {error}")))?;
        let applied_index = Arc::new(AtomicU64::new(position.applied_index));
        Ok(Self {
            writer,
            sessions,
            versions,
            users,
            position,
            settings,
            execution_version: version::execution_version(),
            durability: Durability { wal: Arc::new(wal), applied_index },
            in_disorder: false,
            file: file.clone(),
            staging,
        })
    }

    /// How many clients' requests are remembered.
    pub fn sessions(&self) -> usize {
        self.sessions.count()
    }

    /// Where the database stands in the log.
    pub fn position(&self) -> Position {
        self.position
    }

    /// Binds the database to a cluster, or checks that it belongs to it. Stored with the next entries.
    pub fn bind_cluster(&mut self, cluster_id: u64) -> Result<(), ApplyError> {
        match self.position.cluster_id {
            0 => self.position.cluster_id = cluster_id,
            stored if stored != cluster_id => {
                return Err(ApplyError::ForeignCluster { stored, offered: cluster_id });
            }
            _ => {}
        }
        Ok(())
    }

    /// Gives the database to another cluster, durably. Only while nothing follows a log.
    pub fn adopt_cluster(&mut self, cluster_id: u64) -> Result<(), ApplyError> {
        tables::store_cluster(&self.writer.connection, cluster_id)
            .map_err(|error| error.to_string())
            .and_then(|()| self.durability.sync().map_err(|error| error.to_string()))
            .map_err(|reason| ApplyError::Adopt { cluster_id, reason })?;
        self.position.cluster_id = cluster_id;
        Ok(())
    }

    /// Makes what was applied durable.
    pub fn durability(&self) -> Durability {
        self.durability.clone()
    }

    /// How entries are gathered.
    pub fn settings(&self) -> ApplySettings {
        self.settings.clone()
    }

    /// Closes the database after leaving the write-ahead log, which SQLite does only for a connection that is alone:
    /// so nobody else has the file open afterwards, and it may be replaced. A program that still held the old one
    /// would, as its last user, delete the *new* one's write-ahead log by name. On an error nothing has changed.
    pub fn close_alone(self) -> Result<(), (Box<Self>, rusqlite::Error)> {
        let left = self.writer.connection.query_row("PRAGMA journal_mode = DELETE", [], |_| Ok(()));
        left.map_err(|error| (Box::new(self), error))
    }

    /// Closes the database for a stop. The last connection writes the log back, so that the file alone is all there is;
    /// but not while an interrupt is pending, and the one that ended a running [`Self::apply`] pends until a
    /// statement begins.
    pub fn close(self) {
        if let Err(error) = self.writer.connection.query_row("SELECT 1", [], |_| Ok(())) {
            tracing::warn!(%error, "the write-ahead log stays beside the database");
        }
    }

    /// Interrupts a running [`Self::apply`] from another thread; it then ends with
    /// [`ApplyError::Environment`] and applies the entry again when it is called again.
    pub fn interrupt_handle(&self) -> InterruptHandle {
        self.writer.connection.get_interrupt_handle()
    }

    /// The database, for whoever reads it beside this.
    pub fn file(&self) -> DatabaseFile {
        self.file.clone()
    }

    /// The writer's clock and fault switches, for tests.
    pub fn files(&self) -> Arc<VfsState> {
        Arc::clone(&self.writer.files)
    }

    /// Applies committed entries, whose first must follow the applied index.
    ///
    /// The replies are appended to `applied` once they are committed, also when a later entry fails: so the
    /// position and the replies always agree. After an error the same entries, from the position on, may be
    /// tried again. Large replies end it early, without an error: call it again with the rest.
    pub fn apply(&mut self, entries: &[LogEntry], applied: &mut Vec<Applied>) -> Result<(), ApplyError> {
        let (mut rest, mut reply_bytes) = (entries, 0);
        while let Some(first) = rest.first() {
            if self.in_disorder {
                self.recover(first.index)?;
            }
            let expected = self.position.applied_index + 1;
            if first.index != expected {
                return Err(ApplyError::Gap { expected, got: first.index });
            }
            let (done, group_reply_bytes) = self.apply_group(rest, applied)?;
            rest = &rest[done..];
            reply_bytes += group_reply_bytes;
            if reply_bytes >= REPLY_BYTES_AT_ONCE {
                return Ok(());
            }
        }
        Ok(())
    }

    /// Applies at least one entry; returns how many, and how large the replies are.
    fn apply_group(
        &mut self,
        entries: &[LogEntry],
        applied: &mut Vec<Applied>,
    ) -> Result<(usize, usize), ApplyError> {
        let mut items = self.decode_group(entries)?;
        let mut remedies = Remedies::new();
        let mut replies = Vec::new();
        let mut in_trouble = false;
        if let [Item { entry, work: Work::Request(request) }] = &items[..]
            && let Some(finish) = restore::finish_of(request)
        {
            applied.push(self.finish_restore(entry, request, finish)?);
            return Ok((1, 0));
        }
        loop {
            replies.clear();
            match self.run_group(&items, &remedies, &mut replies) {
                Ok(Group::Committed { done, reply_bytes }) => {
                    applied.append(&mut replies);
                    return Ok((done, reply_bytes));
                }
                Ok(Group::Lost { at, statement, remedy }) => {
                    // The remedies are about the last entry of the group only.
                    if at + 1 < items.len() {
                        remedies.clear();
                        items.truncate(at + 1);
                    }
                    remedies.insert(statement, remedy);
                    self.recover(items[at].entry.index)?;
                }
                Ok(Group::Cut { at }) => {
                    remedies.clear();
                    items.truncate(at);
                    self.recover(items[at - 1].entry.index)?;
                }
                Err(trouble) => {
                    let index = items[trouble.at].entry.index;
                    self.recover(index)?;
                    // The entries before it need not wait for this one; it is then the first to be tried.
                    if trouble.at == 0 || in_trouble {
                        return Err(environment(index, &trouble.error));
                    }
                    in_trouble = true;
                    remedies.clear();
                    items.truncate(trouble.at);
                }
            }
        }
    }

    /// Decodes as many entries as may share a transaction; at least one.
    fn decode_group<'e>(&self, entries: &'e [LogEntry]) -> Result<Vec<Item<'e>>, ApplyError> {
        let mut items: Vec<Item<'e>> = Vec::with_capacity(entries.len().min(self.settings.group_entries));
        let mut bytes = 0;
        let mut foreign_keys = None;
        for (entry, expected) in entries.iter().zip(self.position.applied_index + 1..) {
            let full = items.len() >= self.settings.group_entries || bytes >= self.settings.group_bytes;
            if full && !items.is_empty() {
                break;
            }
            let work = if entry.index == expected {
                self.decode(entry)
            } else {
                Err(ApplyError::Gap { expected, got: entry.index })
            };
            let work = match work {
                Ok(work) => work,
                // The entries before it are applied first; then it fails by itself.
                Err(_) if !items.is_empty() => break,
                Err(error) => return Err(error),
            };
            if let Work::Request(request) = &work {
                // SQLite ignores a change of this setting inside a transaction.
                if *foreign_keys.get_or_insert(request.foreign_keys) != request.foreign_keys {
                    break;
                }
            }
            if is_restore(&work) && !items.is_empty() {
                break;
            }
            bytes += entry.payload.len();
            // What is committed with a marker is what every node hashes; a restore is a transaction of its own.
            let ends_group = is_marker(&work) || is_restore(&work);
            items.push(Item { entry, work });
            if ends_group {
                break;
            }
        }
        Ok(items)
    }

    fn decode(&self, entry: &LogEntry) -> Result<Work, ApplyError> {
        let index = entry.index;
        match LogEntryKind::try_from(entry.kind) {
            Ok(LogEntryKind::Noop) => return Ok(Work::Nothing),
            Ok(LogEntryKind::Payload) => {}
            Err(_) => {
                let reason = format!("it is of the unknown kind {}", entry.kind);
                return Err(ApplyError::CorruptPayload { index, reason });
            }
        }
        let request = LoggedRequest::decode(entry.payload.clone())
            .map_err(|error| ApplyError::CorruptPayload { index, reason: error.to_string() })?;
        if request.format != REQUEST_FORMAT {
            return Err(ApplyError::UnknownFormat { index, format: request.format });
        }
        if request.execution_version != self.execution_version {
            let (entry, own) = (request.execution_version, self.execution_version);
            return Err(ApplyError::ForeignExecutionVersion { index, entry, own });
        }
        Ok(Work::Request(Box::new(request)))
    }

    /// Executes the items in one transaction and commits it, or says why not.
    fn run_group(
        &mut self,
        items: &[Item<'_>],
        remedies: &Remedies,
        replies: &mut Vec<Applied>,
    ) -> Result<Group, Trouble> {
        let at_start = |error| Trouble { at: 0, error };
        let requests = || {
            items.iter().filter_map(|item| match &item.work {
                Work::Request(request) => Some(request),
                Work::Nothing => None,
            })
        };
        if let Some(first) = requests().next() {
            self.writer.set_foreign_keys(first.foreign_keys).map_err(at_start)?;
        }
        let mut own = OwnStatements::on(&self.writer.connection);
        let mut savepoints = Savepoints::on(&self.writer);
        own.begin.run().map_err(at_start)?;
        let (mut done, mut reply_bytes) = (0, 0);
        for (at, item) in items.iter().enumerate() {
            let trouble = |error| Trouble { at, error };
            let none = Remedies::new();
            let remedies = if at + 1 == items.len() { remedies } else { &none };
            let Work::Request(request) = &item.work else {
                done = at + 1;
                continue;
            };
            let memory = Memory {
                sessions: &mut self.sessions,
                versions: &mut self.versions,
                users: &mut self.users,
                staging: &mut self.staging,
            };
            match run_request(&self.writer, memory, &mut savepoints, request, item.entry, remedies) {
                Ok((reply, ends_group)) => {
                    reply_bytes += reply.reply.encoded_len();
                    replies.push(reply);
                    done = at + 1;
                    if ends_group || reply_bytes >= REPLY_BYTES_AT_ONCE {
                        break;
                    }
                }
                Err(Stop::Lost { statement, remedy }) => return Ok(Group::Lost { at, statement, remedy }),
                // VACUUM runs between groups.
                Err(Stop::Vacuum) if at > 0 => return Ok(Group::Cut { at }),
                Err(Stop::Vacuum) => {
                    own.rollback.run().map_err(trouble)?;
                    let memory = Memory {
                        sessions: &mut self.sessions,
                        versions: &mut self.versions,
                        users: &mut self.users,
                        staging: &mut self.staging,
                    };
                    replies.push(run_vacuum(&self.writer, memory, request, item.entry).map_err(trouble)?);
                    own.begin.run().map_err(trouble)?;
                    done = 1;
                    break;
                }
                Err(Stop::Environment(error)) => return Err(trouble(error)),
            }
        }
        let last = items[done - 1].entry;
        let trouble = |error| Trouble { at: done - 1, error };
        self.sessions.save(&mut own.put_session, &mut own.delete_session).map_err(trouble)?;
        self.versions.save(&mut own.put_version, &mut own.delete_version).map_err(trouble)?;
        if self.users.is_dirty() {
            self.save_users(&mut own).map_err(trouble)?;
        }
        own.save_position(self.position.cluster_id, last).map_err(trouble)?;
        own.commit.run().map_err(trouble)?;
        drop((own, savepoints));
        self.note_committed(last);
        self.pass_on(&items[..done]);
        Ok(Group::Committed { done, reply_bytes })
    }

    /// What is deleted here must not stay readable in a free page, which every backup copies. Whatever else is
    /// deleted is not worth the writing.
    fn save_users(&self, own: &mut OwnStatements<'_>) -> rusqlite::Result<()> {
        self.writer.connection.execute_batch("PRAGMA secure_delete = ON")?;
        let (put, delete) = (&mut own.put_user, &mut own.delete_user);
        let saved = self.users.save(put, delete, &mut own.require_authentication);
        self.writer.connection.execute_batch("PRAGMA secure_delete = OFF")?;
        saved
    }

    /// Everything up to this entry is committed.
    fn note_committed(&mut self, last: &LogEntry) {
        self.sessions.committed();
        self.versions.committed();
        self.users.committed();
        // Before the index is: who waits for that sees the users as of it.
        self.users.publish(&self.settings.directory);
        self.position.applied_index = last.index;
        self.position.applied_term = last.term;
        self.position.applied_timestamp_ms = last.timestamp_ms;
        self.durability.applied_index.store(last.index, Ordering::Release);
    }

    /// What was committed that asks this node to hash its content, or tells it what another one's came to.
    fn pass_on(&self, items: &[Item<'_>]) {
        let Some(verifications) = &self.settings.verifications else { return };
        for Item { entry, work } in items {
            match work {
                // The last of its group, so the content is that as of its index.
                work if is_marker(work) => verifications.marker(entry.index),
                Work::Request(request) => {
                    if let Some(Body::Report(report)) = &request.body {
                        verifications.report(report);
                    }
                }
                Work::Nothing => {}
            }
        }
    }

    /// Back to the last committed state, in the database and in memory. It may fail itself, and is then due again.
    fn recover(&mut self, index: u64) -> Result<(), ApplyError> {
        self.in_disorder = true;
        let mut back = || {
            if !self.writer.connection.is_autocommit() {
                self.writer.connection.execute_batch("ROLLBACK")?;
            }
            // It may have failed in the middle of a request that set it.
            self.writer.connection.execute_batch("PRAGMA defer_foreign_keys = OFF")?;
            self.writer.reload_schema()?;
            self.sessions.reload(&self.writer.connection)?;
            self.versions.reload(&self.writer.connection)?;
            self.users.reload(&self.writer.connection)?;
            self.staging = Staging::load(&self.writer.connection)?;
            Ok(())
        };
        back().map_err(|error| environment(index, &error))?;
        self.in_disorder = false;
        Ok(())
    }
}

/// `'localtime'` must mean UTC, in summer and in winter.
fn check_local_time(connection: &Connection) -> rusqlite::Result<Result<(), String>> {
    let same: bool = connection.query_row(
        "SELECT datetime('2024-01-15 12:00', 'localtime') = '2024-01-15 12:00:00'
            AND datetime('2024-07-15 12:00', 'localtime') = '2024-07-15 12:00:00'",
        [],
        |row| row.get(0),
    )?;
    Ok(if same { Ok(()) } else { Err("the local time is not UTC: start sqlited with TZ=UTC".into()) })
}

/// Opens the WAL, which SQLite keeps as long as the writer is open, and makes its name durable.
fn open_wal(path: &Path) -> io::Result<File> {
    let mut name = path.as_os_str().to_owned();
    name.push("-wal");
    let wal = File::open(&name)?;
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
    File::open(parent.unwrap_or(Path::new(".")))?.sync_all()?;
    Ok(wal)
}
