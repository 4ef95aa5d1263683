//! The state machine of one node: the real one, on files in memory where the system offers that, and what of it
//! survives a killed process or a power cut.
//!
//! It knows nothing of Raft. A snapshot is a copy of its files.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use resqlite::api::LogEntry;
use rusqlite::{Connection, config::DbConfig, ffi, types::ValueRef};
use sqlited::{
    apply::{Applied, Applier, ApplyError, ApplySettings, Position},
    connection::{Reader, open_reader},
};

use crate::{random::Random, workload};

/// A number of pages that no history fills.
const NO_CHECKPOINTS: u32 = 1 << 20;

/// A database, open or not.
pub struct Machine {
    directory: PathBuf,
    /// A snapshot gets a directory of its own, as a rename would give it its name: all at once.
    generation: u64,
    settings: ApplySettings,
    /// So much of the write-ahead log survives a power cut.
    durable_wal_bytes: u64,
    open: Option<Open>,
}

struct Open {
    applier: Applier,
    reader: Reader,
}

/// A database's files, and the last entry that they hold.
#[derive(Clone)]
pub struct Snapshot {
    /// Where it stands in the log.
    pub position: Position,
    database: Vec<u8>,
    sums: Vec<u8>,
    wal: Vec<u8>,
}

impl Machine {
    /// A machine that was never started. With checkpoints SQLite moves pages from its write-ahead log into the
    /// database now and then; without, a power cut can tear that log anywhere after its last sync.
    pub fn new(directory: PathBuf, checkpoints: bool) -> Self {
        let checkpoint_pages = if checkpoints { 12 } else { NO_CHECKPOINTS };
        let settings = ApplySettings { checkpoint_pages, ..ApplySettings::default() };
        let mut machine = Self { directory, generation: 0, settings, durable_wal_bytes: 0, open: None };
        machine.begin_generation();
        machine
    }

    fn begin_generation(&mut self) {
        self.generation += 1;
        let directory = self.path();
        let directory = directory.parent().expect("the database lies in a directory of its generation");
        fs::create_dir_all(directory).expect("there is room for a simulation");
        self.durable_wal_bytes = 0;
    }

    fn path(&self) -> PathBuf {
        self.directory.join(self.generation.to_string()).join("resqlite.db")
    }

    fn sums(&self) -> PathBuf {
        self.path().with_extension("db-sums")
    }

    fn wal(&self) -> PathBuf {
        self.path().with_extension("db-wal")
    }

    /// Opens the database, as a starting sqlited does.
    pub fn start(&mut self, cluster_id: u64) {
        let path = self.path();
        let mut applier =
            Applier::open(&path, self.settings.clone()).expect("what a crash left can be opened");
        applier.bind_cluster(cluster_id).expect("the database belongs to the cluster");
        let reader = open_reader(&applier.file()).expect("a database that is open can be read");
        self.open = Some(Open { applier, reader });
    }

    /// Whether it runs.
    pub fn is_open(&self) -> bool {
        self.open.is_some()
    }

    fn opened(&self) -> &Open {
        self.open.as_ref().expect("only a running state machine is asked")
    }

    /// Where it stands in the log.
    pub fn position(&self) -> Position {
        self.opened().applier.position()
    }

    /// Executes entries; the replies come even if a later entry fails.
    pub fn apply(&mut self, entries: &[LogEntry]) -> (Vec<Applied>, Result<(), ApplyError>) {
        let open = self.open.as_mut().expect("only a running state machine is given entries");
        let mut applied = Vec::new();
        let result = open.applier.apply(entries, &mut applied);
        (applied, result)
    }

    /// Makes durable what was applied, and says how far that is.
    pub fn sync(&mut self) -> io::Result<u64> {
        let index = self.opened().applier.durability().sync()?;
        self.durable_wal_bytes = fs::metadata(self.wal())?.len();
        Ok(index)
    }

    /// Lets SQLite's writes and syncs fail after so many more.
    pub fn fail_after(&self, writes: u32, full: bool) {
        let code = if full { ffi::SQLITE_FULL } else { ffi::SQLITE_IOERR_WRITE };
        self.opened().applier.files().fail_after(writes, code);
    }

    /// There is room again.
    pub fn heal(&self) {
        if let Some(open) = &self.open {
            open.applier.files().heal();
        }
    }

    /// Ends it cleanly.
    pub fn stop(&mut self) {
        let Some(Open { applier, reader }) = self.open.take() else { return };
        drop(reader);
        drop(applier);
        // The last connection has written the log back and removed it.
        self.durable_wal_bytes = 0;
    }

    /// Kills it, with the power or without.
    /// True: what was not synced has suffered.
    pub fn kill(&mut self, power_cut: bool, random: &mut Random) -> bool {
        if let Some(Open { applier, reader }) = self.open.take() {
            drop(reader);
            // Closing writes the log back, which a killed process does not do: so it may write nothing any more.
            applier.files().fail_after(0, ffi::SQLITE_IOERR_WRITE);
            drop(applier);
        }
        power_cut
            && self.settings.checkpoint_pages == NO_CHECKPOINTS
            && self.tear_wal(random).expect("the simulation's own files can be changed")
    }

    /// Of what was not synced a part is gone, and another damaged.
    fn tear_wal(&mut self, random: &mut Random) -> io::Result<bool> {
        let wal = match File::options().read(true).write(true).open(self.wal()) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
            opened => opened?,
        };
        let unsynced = wal.metadata()?.len().saturating_sub(self.durable_wal_bytes);
        let kept = self.durable_wal_bytes + random.below(unsynced + 1);
        wal.set_len(kept)?;
        if kept > self.durable_wal_bytes && random.chance(500) {
            let at = self.durable_wal_bytes + random.below(kept - self.durable_wal_bytes);
            let mut byte = [0];
            wal.read_exact_at(&mut byte, at)?;
            wal.write_all_at(&[byte[0] ^ 0x55], at)?;
        }
        Ok(unsynced > 0)
    }

    /// A copy of one consistent view: nothing else runs while its pages are copied.
    pub fn snapshot(&self) -> Snapshot {
        let read = |path: &Path| fs::read(path).expect("the database's files are there while it is open");
        Snapshot {
            position: self.position(),
            database: read(&self.path()),
            sums: read(&self.sums()),
            wal: read(&self.wal()),
        }
    }

    /// Becomes the snapshot, durably.
    pub fn install(&mut self, snapshot: &Snapshot) {
        self.stop();
        let old = self.path();
        self.begin_generation();
        let write = |path: &Path, bytes: &[u8]| fs::write(path, bytes).expect("there is room for a snapshot");
        write(&self.path(), &snapshot.database);
        write(&self.sums(), &snapshot.sums);
        write(&self.wal(), &snapshot.wal);
        self.durable_wal_bytes = snapshot.wal.len() as u64;
        let old = old.parent().expect("the database lies in a directory of its generation");
        fs::remove_dir_all(old).expect("the old generation can be removed");
    }

    /// Its disk is gone, and another one is empty.
    pub fn lose(&mut self) {
        assert!(self.open.is_none(), "a running state machine keeps its disk");
        let old = self.path();
        self.begin_generation();
        let old = old.parent().expect("the database lies in a directory of its generation");
        fs::remove_dir_all(old).expect("the old generation can be removed");
    }

    /// What a snapshot does that leaves out a table.
    pub fn forget_sessions(&self) {
        let connection = Connection::open(self.path()).expect("the snapshot can be opened");
        // The change stays in the write-ahead log: pages in the file itself have checksums.
        let kept = connection.set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, true);
        kept.expect("SQLite knows this switch");
        connection.execute("DELETE FROM _resqlite_sessions", []).expect("the snapshot can be changed");
    }

    /// What a client's read answers.
    pub fn read(&self) -> String {
        let row = self
            .opened()
            .reader
            .read(workload::READ, |statement| statement.query_row([], |row| row.get::<_, String>(0)));
        row.expect("a read of one's own file succeeds")
    }

    /// A hash of everything in the database, rowids and the server's own tables included.
    pub fn content_hash(&self) -> u64 {
        let mut hash = Hash::default();
        // The server's tables are closed to users, and so to the reader.
        let connection = self.opened().reader.connection();
        for sql in [
            "SELECT rowid, * FROM register ORDER BY rowid",
            "SELECT rowid, * FROM counter ORDER BY rowid",
            "SELECT rowid, * FROM account ORDER BY rowid",
            "SELECT rowid, * FROM event ORDER BY rowid",
            "SELECT * FROM _resqlite_sessions ORDER BY client_id",
            "SELECT cluster_id, applied_index, applied_term, applied_timestamp_ms FROM _resqlite_meta",
        ] {
            let mut statement = connection.prepare_cached(sql).expect("the tables are there");
            let columns = statement.column_count();
            let mut rows = statement.query([]).expect("a full scan has no parameters");
            while let Some(row) = rows.next().expect("one's own file can be read") {
                for column in 0..columns {
                    hash.value(row.get_ref(column).expect("the column is there"));
                }
            }
        }
        hash.0
    }
}

/// FNV-1a: the histories compare hashes of what should be equal; nobody forges them.
pub struct Hash(pub u64);

impl Default for Hash {
    fn default() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }
}

impl Hash {
    /// Adds bytes.
    pub fn bytes(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = (self.0 ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3);
        }
    }

    fn value(&mut self, value: ValueRef<'_>) {
        match value {
            ValueRef::Null => self.bytes(b"n"),
            ValueRef::Integer(integer) => {
                self.bytes(b"i");
                self.bytes(&integer.to_le_bytes());
            }
            ValueRef::Real(real) => {
                self.bytes(b"r");
                self.bytes(&real.to_bits().to_le_bytes());
            }
            ValueRef::Text(bytes) | ValueRef::Blob(bytes) => {
                self.bytes(&[b't', bytes.len() as u8]);
                self.bytes(bytes);
            }
        }
    }
}
