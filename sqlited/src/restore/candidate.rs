//! A staged file on its way to become the database.
//!
//! Whether it can be one is decided from its bytes, whose hash is in the log entry: every node decides alike. What
//! goes wrong with the file on this node's disk alone is told apart by hashing it again.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read, Write},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use blake3::Hasher;
use resqlite::{
    api::RestoreFinish,
    database_file::{HEADER_BYTES, VERSIONS, check_header},
};
use rusqlite::{
    Connection, Error, OpenFlags,
    backup::{Backup, StepResult},
    ffi,
    types::ToSqlOutput,
};

use super::staging::{Staging, failed, lost, may_replace};
use crate::{
    backup::VirtualTable,
    classify::{self, Failure},
    connection,
    determinism::authorizer::{RESERVED_PREFIX, is_known_module},
};

/// Where the file is made, beside the database.
const SUFFIX: &str = ".restoring";
const JOURNAL_SUFFIX: &str = ".restoring-journal";
/// How many pages are copied at a time.
const PAGES_PER_STEP: i32 = 1_024;

/// Why there is no candidate.
pub enum Trial {
    /// Every node finds the same.
    Refused(Failure),
    /// This node is in trouble.
    Environment(Error),
}

impl From<Error> for Trial {
    fn from(error: Error) -> Self {
        Self::Environment(error)
    }
}

impl From<io::Error> for Trial {
    fn from(error: io::Error) -> Self {
        Self::Environment(of_file(&error))
    }
}

impl From<Failure> for Trial {
    fn from(failure: Failure) -> Self {
        Self::Refused(failure)
    }
}

/// A full disk may pass, anything else of a disk may not be trusted.
fn of_file(error: &io::Error) -> Error {
    let full = error.kind() == io::ErrorKind::StorageFull;
    let code = if full { ffi::SQLITE_FULL } else { ffi::SQLITE_IOERR };
    Error::SqliteFailure(ffi::Error::new(code), Some(format!("the file to be restored: {error}")))
}

/// A checked database with the server's own tables in it. Dropped, its file goes.
#[derive(Debug)]
pub struct Candidate {
    connection: Connection,
    _file: CandidateFile,
}

/// The file, and what it was before its header was changed.
#[derive(Debug)]
struct CandidateFile {
    path: PathBuf,
    /// The bytes at [`VERSIONS`].
    versions: [u8; 2],
}

impl Candidate {
    /// Makes a file of what is staged beside `database`, and checks it in every way. Blocks.
    pub fn make(
        staged: &Connection,
        staging: &Staging,
        database: &Path,
        upload_id: &[u8],
        finish: &RestoreFinish,
    ) -> Result<Self, Trial> {
        if !staging.is_under_way(upload_id) {
            return Err(lost().into());
        }
        if let Some(failure) = may_replace(staged, finish.replace)? {
            return Err(failure.into());
        }
        let file = CandidateFile::assemble(staged, database, finish)?;
        let connection = file.judge(file.check(), finish)?;
        file.judge(adopt_own_tables(staged, &connection), finish)?;
        Ok(Self { connection, _file: file })
    }

    /// To write what this node knows as of the restoring entry.
    pub fn connection(&self) -> &Connection {
        &self.connection
    }

    /// Copies its pages over the database's, in one transaction, beside readers. On an error nothing has changed.
    pub fn replace(self, database: &mut Connection) -> rusqlite::Result<()> {
        let backup = Backup::new(&self.connection, database)?;
        loop {
            match backup.step(PAGES_PER_STEP)? {
                StepResult::Done => return Ok(()),
                StepResult::More => {}
                // Nobody else writes.
                _ => return Err(Error::SqliteFailure(ffi::Error::new(ffi::SQLITE_BUSY), None)),
            }
        }
    }
}

impl CandidateFile {
    fn assemble(staged: &Connection, database: &Path, finish: &RestoreFinish) -> Result<Self, Trial> {
        remove_leftovers(database)?;
        let path = beside(database, SUFFIX);
        let mut file = OpenOptions::new().read(true).write(true).create_new(true).open(&path)?;
        let mut candidate = Self { path, versions: [0; 2] };
        let mut hasher = Hasher::new();
        let length = Staging::read(staged, |data| -> Result<(), Trial> {
            hasher.update(data);
            Ok(file.write_all(data)?)
        })?;
        if length != finish.size_bytes {
            return Err(lost().into());
        }
        if hasher.finalize().as_bytes()[..] != finish.blake3[..] {
            return Err(failed(
                "the file that was sent is not the one that was announced: its checksum differs",
            )
            .into());
        }
        let mut header = vec![0; HEADER_BYTES.min(usize::try_from(length).unwrap_or(HEADER_BYTES))];
        file.read_exact_at(&mut header, 0)?;
        check_header(&header, length).map_err(|unfit| failed(unfit.to_string()))?;
        // The file is whole without the write-ahead log that it may have had; SQLite shall not look for it.
        candidate.versions.copy_from_slice(&header[VERSIONS]);
        file.write_all_at(&[1, 1], VERSIONS.start as u64)?;
        Ok(candidate)
    }

    /// Opens it, if its content can be a cluster's.
    fn check(&self) -> Result<Connection, Trial> {
        let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let connection = Connection::open_with_flags(&self.path, flags)?;
        connection::harden(&connection)?;
        connection.execute_batch("PRAGMA cell_size_check = ON")?;
        let verdict: String = connection.query_row("PRAGMA quick_check(1)", [], |row| row.get(0))?;
        if verdict != "ok" {
            return Err(failed(format!("the file is damaged: {verdict}")).into());
        }
        check_names(&connection)?;
        check_virtual_tables(&connection)?;
        check_rowids(&connection)?;
        Ok(connection)
    }

    /// Tells what is wrong with the bytes from what is wrong with this node.
    fn judge<T>(&self, checked: Result<T, Trial>, finish: &RestoreFinish) -> Result<T, Trial> {
        let Err(Trial::Environment(error)) = checked else { return checked };
        let code = classify::extended_code(&error);
        let of_the_bytes = match code & 0xff {
            // Such bytes are what every node has, if they are the bytes that were sent.
            ffi::SQLITE_CORRUPT | ffi::SQLITE_NOTADB => self.is_as_sent(finish)?,
            ffi::SQLITE_ERROR | ffi::SQLITE_CONSTRAINT | ffi::SQLITE_TOOBIG | ffi::SQLITE_AUTH => true,
            _ => false,
        };
        if !of_the_bytes {
            return Err(Trial::Environment(error));
        }
        let what = match code & 0xff {
            ffi::SQLITE_CORRUPT | ffi::SQLITE_NOTADB => "is damaged",
            _ => "cannot be used",
        };
        let message = classify::sql_error(&error, 0).message;
        Err(failed(format!("the file {what}: {message} ({})", classify::code_name(code))).into())
    }

    fn is_as_sent(&self, finish: &RestoreFinish) -> io::Result<bool> {
        let (mut file, mut hasher) = (File::open(&self.path)?, Hasher::new());
        let mut header = vec![0; HEADER_BYTES];
        file.read_exact(&mut header)?;
        header[VERSIONS].copy_from_slice(&self.versions);
        hasher.update(&header);
        hasher.update_reader(file)?;
        Ok(hasher.finalize().as_bytes()[..] == finish.blake3[..])
    }
}

impl Drop for CandidateFile {
    fn drop(&mut self) {
        // If that fails, the next restore or the next start removes it.
        let _ = fs::remove_file(&self.path);
    }
}

fn check_names(connection: &Connection) -> Result<(), Trial> {
    let sql = "SELECT name FROM sqlite_schema WHERE lower(substr(name, 1, ?2)) = ?1 OR lower(substr(tbl_name, 1, ?2)) = ?1";
    let mut statement = connection.prepare(sql)?;
    let mut names = statement.query((RESERVED_PREFIX, RESERVED_PREFIX.len() as i64))?;
    match names.next()? {
        None => Ok(()),
        Some(row) => {
            let name: String = row.get(0)?;
            Err(failed(format!(
                "the file holds {name}, and names that begin with {RESERVED_PREFIX} are the server's own: take a file \
                 that `resqlite backup` made, or rename it"
            ))
            .into())
        }
    }
}

fn check_virtual_tables(connection: &Connection) -> Result<(), Trial> {
    let mut statement =
        connection.prepare("SELECT name, sql FROM sqlite_schema WHERE type = 'table' AND rootpage = 0")?;
    let mut tables = statement.query([])?;
    while let Some(row) = tables.next()? {
        let (name, sql): (String, String) = (row.get(0)?, row.get(1)?);
        let module = VirtualTable::parse(&sql).map(|table| table.module).unwrap_or_default();
        if !is_known_module(&module) {
            return Err(failed(format!(
                "the table {name} is of the module {module:?}, which is not known here"
            ))
            .into());
        }
    }
    Ok(())
}

/// A table with the highest rowid there is gets random ones from then on, other ones on each node; but for
/// AUTOINCREMENT, which then fails (<https://sqlite.org/autoinc.html>).
fn check_rowids(connection: &Connection) -> Result<(), Trial> {
    let mut statement = connection.prepare(
        "SELECT s.name FROM sqlite_schema s JOIN pragma_table_list l ON l.name = s.name AND l.schema = 'main'
         WHERE s.type = 'table' AND s.rootpage > 0 AND l.wr = 0",
    )?;
    let names: Vec<String> = statement.query_map([], |row| row.get(0))?.collect::<rusqlite::Result<_>>()?;
    for name in names {
        let columns: Vec<String> = connection
            .prepare("SELECT lower(name) FROM pragma_table_xinfo(?1)")?
            .query_map([&name], |row| row.get(0))?
            .collect::<rusqlite::Result<_>>()?;
        // If all three are columns, the rowid can neither be asked for nor have been chosen.
        let is_free = |rowid: &&str| !columns.iter().any(|column| column == rowid);
        let Some(rowid) = ["rowid", "_rowid_", "oid"].into_iter().find(is_free) else { continue };
        let highest = format!("SELECT max({rowid}) FROM \"{}\"", name.replace('"', "\"\""));
        let highest: Option<i64> = connection.query_row(&highest, [], |row| row.get(0))?;
        if highest == Some(i64::MAX) {
            return Err(failed(format!(
                "the table {name} has a row with the highest rowid there is, so that later ones would get random \
                 rowids: give that row another one first"
            ))
            .into());
        }
    }
    Ok(())
}

/// Copies the server's own tables. Each has a primary key, so its rows are nothing but their values. What is staged
/// stays behind: the restore is over.
fn adopt_own_tables(from: &Connection, to: &Connection) -> Result<(), Trial> {
    to.execute_batch(
        "PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; PRAGMA foreign_keys = OFF; BEGIN",
    )?;
    let mut statement = from.prepare(
        "SELECT type, name, sql FROM sqlite_schema
         WHERE tbl_name LIKE '\\_resqlite\\_%' ESCAPE '\\' AND sql IS NOT NULL ORDER BY rowid",
    )?;
    let objects: Vec<(String, String, String)> = statement
        .query_map([], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)))?
        .collect::<rusqlite::Result<_>>()?;
    for (kind, name, sql) in objects {
        to.execute_batch(&sql)?;
        if kind == "table" && !name.starts_with("_resqlite_restore") {
            copy_rows(from, to, &name)?;
        }
    }
    to.execute_batch("COMMIT")?;
    Ok(())
}

fn copy_rows(from: &Connection, to: &Connection, table: &str) -> rusqlite::Result<()> {
    let mut select = from.prepare(&format!("SELECT * FROM \"{table}\""))?;
    let columns = select.column_count();
    let places = vec!["?"; columns].join(", ");
    let mut insert = to.prepare(&format!("INSERT INTO \"{table}\" VALUES ({places})"))?;
    let mut rows = select.query([])?;
    while let Some(row) = rows.next()? {
        for column in 0..columns {
            insert.raw_bind_parameter(column + 1, ToSqlOutput::Borrowed(row.get_ref(column)?))?;
        }
        insert.raw_execute()?;
    }
    Ok(())
}

/// Removes what a crash has left behind. Call it before the database is opened, too.
pub fn remove_leftovers(database: &Path) -> io::Result<()> {
    for suffix in [SUFFIX, JOURNAL_SUFFIX] {
        match fs::remove_file(beside(database, suffix)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    Ok(())
}

fn beside(database: &Path, suffix: &str) -> PathBuf {
    let mut name = database.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}
