//! A checksum for every page of the database's file, so that a changed byte is never served.
//!
//! SQLite checks a page's structure, not its content, so the VFS ([`crate::sqlite_ffi`]) tells this module of every
//! page that it reads from the database's file or writes to it. The sums lie in a file of their own (see `sidecar`);
//! the database stays an ordinary one, without bytes that other programs would have to keep right.
//!
//! **Why a crash leaves no page with a wrong sum.** In WAL mode only a checkpoint writes to the database's file
//! (<https://sqlite.org/walformat.html>, and `walCheckpoint` in SQLite's wal.c). It syncs the write-ahead log first,
//! then writes pages, then syncs the database's file, and only after that may the log be begun anew. The sums are
//! written and synced within that last sync, after the file itself. So at any moment a page whose sum may be an older
//! or a newer one, or torn, is a page that the log still holds, durably: after a crash it is read from there, and the
//! next checkpoint writes it, and its sum, again. The same goes for a page written under a rollback journal, which the
//! first change of the journal's mode needs: the sync comes before the journal's end, and a journal that is still
//! there is rolled back through the same VFS before anything is read.
//!
//! The argument needs the log to be there as far as it was written back. SQLite takes a log that is damaged in the
//! middle for one that ends there, and older pages in it would cover newer ones in the file. So the sidecar says also
//! how far the log was when the file was last synced, and `wal` looks whether it still reaches so far.
//!
//! While the process runs, a reader never reads a page of the file that a checkpoint is writing: SQLite writes back
//! only what every reader finds in the log. The exception is the header that is read when a connection is opened;
//! the VFS lets that pass, and it is read again, as a page, before anything depends on it.

mod sidecar;
mod wal;

use std::{
    collections::BTreeSet,
    fs::{self, File},
    io::{self, Read},
    path::{Path, PathBuf},
    sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard},
};

use resqlite::database_file;
use tokio::sync::watch;

use crate::snapshot::{beside, sync_directory_of};

pub use sidecar::{Builder, FILE_SUFFIX};
use sidecar::{SUMS_PER_BLOCK, Sidecar};
pub use wal::WalMark;

/// The size of a page of every cluster's database.
pub const PAGE_BYTES: usize = database_file::PAGE_BYTES as usize;

/// Says that the database is to be trusted as it is, and the sums are to be made anew: an operator's word.
pub const TRUSTED_SUFFIX: &str = ".trusted";

/// Of a page that was never written: a hole in the file reads as zeros.
const SUM_OF_ZEROS: u32 = 0x98f9_4189;

/// Why the sums of a database cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// A file is not what was written.
    #[error("{}: {reason}", file.display())]
    Damaged {
        /// Which.
        file: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A newer version has written them.
    #[error("{}: its format is {found}, and this version knows {known} only: upgrade this node", file.display())]
    NewerFormat {
        /// The sums' file.
        file: PathBuf,
        /// Its format.
        found: u32,
        /// This version's.
        known: u32,
    },
    /// The file system's reason.
    #[error("the checksums of the database's pages cannot be read: {0}")]
    Io(#[from] io::Error),
}

/// The sums of one database, shared by all who have it open.
#[derive(Debug)]
pub struct PageSums {
    database: PathBuf,
    table: RwLock<Table>,
    /// What was found to be damaged first.
    damage: watch::Sender<Option<String>>,
}

/// What is known of each page, and which blocks of the sidecar do not say so yet.
#[derive(Debug, Default)]
struct Table {
    sums: Vec<u32>,
    changed: BTreeSet<usize>,
    sidecar: Option<Sidecar>,
}

impl PageSums {
    /// For this database; nothing is read before [`Self::load`].
    pub fn of(database: &Path) -> Self {
        Self { database: database.to_owned(), table: RwLock::default(), damage: watch::Sender::new(None) }
    }

    /// Reads the sums before the database is opened for writing, when nobody else has it open. For a new database
    /// they are made; that they are missing beside one that holds something is damage.
    pub fn load(&self) -> Result<(), LoadError> {
        let path = beside(&self.database, FILE_SUFFIX);
        let trusted = beside(&self.database, TRUSTED_SUFFIX);
        if is_empty(&self.database)? {
            // New, or lost as a whole: then it says itself that it holds nothing.
            Builder::default().save(&path)?;
            sync_directory_of(&self.database)?;
        } else if trusted.try_exists()? {
            tracing::warn!(database = %self.database.display(), "its checksums are made anew, as an operator asks");
            sums_of_file(&self.database)?.save(&path)?;
            sync_directory_of(&self.database)?;
            fs::remove_file(&trusted)?;
            sync_directory_of(&self.database)?;
        }
        let (sidecar, sums) = Sidecar::open(&path)?;
        wal::check(&self.database, sidecar.wal_mark())?;
        *self.write_table() = Table { sums, changed: BTreeSet::new(), sidecar: Some(sidecar) };
        self.damage.send_replace(None);
        Ok(())
    }

    /// Whether this page is what was written last; if not, that is noted.
    pub fn check(&self, page: u64, content: &[u8]) -> bool {
        let expected = usize::try_from(page).ok().and_then(|at| self.read_table().sums.get(at).copied());
        if crc32c::crc32c(content) == expected.unwrap_or(SUM_OF_ZEROS) {
            return true;
        }
        let what = format!("page {} is not what was written: its checksum differs", page + 1);
        self.damage.send_if_modified(|damage| {
            let is_first = damage.is_none();
            damage.get_or_insert(what);
            is_first
        });
        false
    }

    /// This page is about to be written.
    pub fn note_write(&self, page: u64, content: &[u8]) {
        let Ok(at) = usize::try_from(page) else { return };
        let mut table = self.write_table();
        let first_changed = at.min(table.sums.len());
        if at >= table.sums.len() {
            table.sums.resize(at + 1, SUM_OF_ZEROS);
        }
        table.sums[at] = crc32c::crc32c(content);
        table.changed.extend(first_changed / SUMS_PER_BLOCK..=at / SUMS_PER_BLOCK);
    }

    /// The file is about to have no more than so many pages.
    pub fn note_truncate(&self, pages: u64) {
        let mut table = self.write_table();
        table.sums.truncate(usize::try_from(pages).unwrap_or(usize::MAX));
    }

    /// The file was synced, up to where the write-ahead log was: makes the sums durable, too.
    pub fn save(&self, mark: WalMark) -> io::Result<()> {
        let Table { sums, changed, sidecar } = &mut *self.write_table();
        let Some(sidecar) = sidecar else { return Ok(()) };
        sidecar.save(sums, changed, mark)?;
        changed.clear();
        Ok(())
    }

    /// What was found to be damaged first.
    pub fn damage(&self) -> Option<String> {
        self.damage.borrow().clone()
    }

    /// Waits until something is found to be damaged.
    pub async fn damaged(&self) -> String {
        let mut damage = self.damage.subscribe();
        // We hold a sender, so waiting cannot fail for want of one.
        let found = damage.wait_for(Option::is_some).await.ok().and_then(|found| found.clone());
        found.unwrap_or_default()
    }

    fn read_table(&self) -> RwLockReadGuard<'_, Table> {
        // Nothing under the lock can panic half-way.
        self.table.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write_table(&self) -> RwLockWriteGuard<'_, Table> {
        self.table.write().unwrap_or_else(PoisonError::into_inner)
    }
}

fn is_empty(database: &Path) -> io::Result<bool> {
    match fs::metadata(database) {
        Ok(metadata) => Ok(metadata.len() == 0),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(true),
        Err(error) => Err(error),
    }
}

fn sums_of_file(database: &Path) -> io::Result<Builder> {
    let (mut file, mut builder) = (File::open(database)?, Builder::default());
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(builder),
            read => builder.add(&buffer[..read]),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page(byte: u8) -> Vec<u8> {
        vec![byte; PAGE_BYTES]
    }

    fn loaded(database: &Path) -> PageSums {
        let sums = PageSums::of(database);
        sums.load().unwrap();
        sums
    }

    #[test]
    fn a_page_that_was_never_written_is_a_page_of_zeros() {
        assert_eq!(crc32c::crc32c(&[0; PAGE_BYTES]), SUM_OF_ZEROS);
        let directory = tempfile::tempdir().unwrap();
        let sums = loaded(&directory.path().join("test.db"));
        sums.note_write(7, &page(1));
        for hole in [0, 6, 8, 1 << 40] {
            assert!(sums.check(hole, &page(0)), "page {hole}");
        }
        assert_eq!(sums.damage(), None);
        assert!(!sums.check(6, &page(1)));
        assert!(sums.damage().unwrap().contains("page 7 "), "the field counts pages from 1");
    }

    #[test]
    fn what_was_saved_is_known_again_and_what_was_not_is_not() {
        let directory = tempfile::tempdir().unwrap();
        let database = directory.path().join("test.db");
        let sums = loaded(&database);
        for at in 0..3_000 {
            sums.note_write(at, &page(at as u8));
        }
        sums.save(WalMark::default()).unwrap();
        fs::write(&database, page(0)).unwrap();
        sums.note_write(2_500, &page(99));
        let again = loaded(&database);
        assert!((0..3_000).all(|at| again.check(at, &page(at as u8))));
        again.note_write(2_500, &page(99));
        again.note_truncate(2_600);
        again.save(WalMark::default()).unwrap();
        let again = loaded(&database);
        assert!(again.check(2_500, &page(99)) && again.check(2_599, &page(2_599_u64 as u8)));
        assert!(again.check(2_600, &page(0)), "it is gone");
    }

    #[test]
    fn missing_sums_are_damage_unless_an_operator_trusts_the_file() {
        let directory = tempfile::tempdir().unwrap();
        let database = directory.path().join("test.db");
        fs::write(&database, [page(1), page(2)].concat()).unwrap();
        for _ in 0..2 {
            let error = PageSums::of(&database).load().unwrap_err().to_string();
            assert!(error.contains("test.db-sums: it is missing"), "{error}");
        }
        fs::write(directory.path().join("test.db.trusted"), "").unwrap();
        let sums = loaded(&database);
        assert!(sums.check(0, &page(1)) && sums.check(1, &page(2)) && !sums.check(1, &page(3)));
        assert!(!directory.path().join("test.db.trusted").exists(), "it holds once");
        assert!(!loaded(&database).check(0, &page(2)));
    }
}
