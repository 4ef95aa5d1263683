//! The database's file, and the only way in which this process opens it: with every page held against its checksum.
//!
//! It knows the file and SQLite's VFS; what a connection is set to is [`crate::connection`]'s business.

use std::{
    ops::{Deref, DerefMut},
    path::{Path, PathBuf},
    sync::Arc,
};

use rusqlite::{Connection, Error, OpenFlags, ffi};

use crate::{
    connection,
    page_sums::PageSums,
    soundness::Damage,
    sqlite_ffi::{Clock, Vfs, VfsState},
};

/// A database, wherever in the process it is used. Clones share it; it may be replaced while nobody has it open.
#[derive(Clone, Debug)]
pub struct DatabaseFile(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    path: PathBuf,
    sums: Arc<PageSums>,
    writing: Vfs,
    reading: Vfs,
}

/// A connection to a [`DatabaseFile`].
#[derive(Debug)]
pub struct OpenDatabase {
    // Dropped in this order: the file's VFS must outlive the connection.
    connection: Connection,
    _file: DatabaseFile,
}

impl DatabaseFile {
    /// The database that lies there, or shall. Nothing is opened yet.
    pub fn at(path: &Path) -> rusqlite::Result<Self> {
        let sums = Arc::new(PageSums::of(path));
        let register = |clock| {
            Vfs::register(Arc::clone(&sums), clock)
                .ok_or_else(|| Error::SqliteFailure(ffi::Error::new(ffi::SQLITE_NOMEM), None))
        };
        let (writing, reading) = (register(Clock::Log)?, register(Clock::System)?);
        Ok(Self(Arc::new(Shared { path: path.to_owned(), sums, writing, reading })))
    }

    /// Where it lies.
    pub fn path(&self) -> &Path {
        &self.0.path
    }

    /// The checksums of its pages.
    pub fn sums(&self) -> &PageSums {
        &self.0.sums
    }

    /// The writing connection's clock and fault switches.
    pub fn state(&self) -> &Arc<VfsState> {
        self.0.writing.state()
    }

    /// Opens it for the one who writes, or makes it. The sums have to be loaded before.
    pub(crate) fn open_to_write(&self) -> rusqlite::Result<OpenDatabase> {
        self.open(OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_CREATE, &self.0.writing)
    }

    /// Opens it for reading, while the one who writes has it open.
    pub fn open_to_read(&self) -> rusqlite::Result<OpenDatabase> {
        self.open(OpenFlags::SQLITE_OPEN_READ_ONLY, &self.0.reading)
    }

    fn open(&self, flags: OpenFlags, vfs: &Vfs) -> rusqlite::Result<OpenDatabase> {
        let flags = flags | OpenFlags::SQLITE_OPEN_NO_MUTEX | OpenFlags::SQLITE_OPEN_PRIVATE_CACHE;
        let connection = Connection::open_with_flags_and_vfs(&self.0.path, flags, vfs.name())?;
        connection::harden(&connection)?;
        Ok(OpenDatabase { connection, _file: self.clone() })
    }

    /// What a page was found to be that is not what was written, with where the database stands in the log.
    pub fn damage(&self, applied_index: Option<u64>) -> Option<Damage> {
        let reason = self.0.sums.damage()?;
        Some(Damage { file: self.0.path.clone(), applied_index, reason })
    }
}

impl Deref for OpenDatabase {
    type Target = Connection;

    fn deref(&self) -> &Connection {
        &self.connection
    }
}

impl DerefMut for OpenDatabase {
    fn deref_mut(&mut self) -> &mut Connection {
        &mut self.connection
    }
}
