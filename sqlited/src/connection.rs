//! How the database is opened: one writer, many readers, the same limits and meaning on both.
//!
//! Every setting that could change what a statement means is fixed here, for all nodes; none is
//! configurable. It knows nothing of the log.

use std::{
    cell::{Cell, RefCell},
    collections::HashMap,
    fmt,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering},
    },
    time::Duration,
};

use rusqlite::{CachedStatement, Connection, Error, Statement, config::DbConfig, limits::Limit};

use crate::{
    classify,
    database::{DatabaseFile, OpenDatabase},
    determinism::{
        self, Class,
        authorizer::{Guard, Phase, Role, StatementFacts},
        bounded,
        random::{RandomSource, Sequence},
    },
    expansion::{self, Schema, TooComplex},
    sqlite_ffi::{self, VfsState},
};

/// The longest string, blob or row, in bytes.
pub const MAX_VALUE_BYTES: i32 = 16 << 20;

/// SQLite's run-time limits, alike on every node: what exceeds one fails, and so they are part of
/// what a statement means.
const LIMITS: [(Limit, i32); 13] = [
    // Besides memory, it bounds how long functions such as replace() work within one step.
    (Limit::SQLITE_LIMIT_LENGTH, MAX_VALUE_BYTES),
    (Limit::SQLITE_LIMIT_SQL_LENGTH, 64 << 20),
    (Limit::SQLITE_LIMIT_COLUMN, 2_000),
    (Limit::SQLITE_LIMIT_EXPR_DEPTH, 1_000),
    (Limit::SQLITE_LIMIT_COMPOUND_SELECT, 500),
    (Limit::SQLITE_LIMIT_VDBE_OP, 25_000_000),
    (Limit::SQLITE_LIMIT_FUNCTION_ARG, 1_000),
    // VACUUM attaches one.
    (Limit::SQLITE_LIMIT_ATTACHED, 1),
    // LIKE takes time in proportion to the text times the pattern, all in one step.
    (Limit::SQLITE_LIMIT_LIKE_PATTERN_LENGTH, 1_000),
    (Limit::SQLITE_LIMIT_VARIABLE_NUMBER, 32_766),
    (Limit::SQLITE_LIMIT_TRIGGER_DEPTH, 1_000),
    (Limit::SQLITE_LIMIT_WORKER_THREADS, 0),
    (Limit::SQLITE_LIMIT_PARSER_DEPTH, 2_500),
];

/// SQLite's switches, alike on every node.
const SWITCHES: [(DbConfig, bool); 11] = [
    (DbConfig::SQLITE_DBCONFIG_DEFENSIVE, true),
    (DbConfig::SQLITE_DBCONFIG_TRUSTED_SCHEMA, false),
    (DbConfig::SQLITE_DBCONFIG_ENABLE_FTS3_TOKENIZER, false),
    (DbConfig::SQLITE_DBCONFIG_ENABLE_TRIGGER, true),
    (DbConfig::SQLITE_DBCONFIG_ENABLE_VIEW, true),
    (DbConfig::SQLITE_DBCONFIG_ENABLE_QPSG, false),
    (DbConfig::SQLITE_DBCONFIG_LEGACY_ALTER_TABLE, false),
    // Double-quoted strings: SQLite's default, which many a dump relies on.
    (DbConfig::SQLITE_DBCONFIG_DQS_DML, true),
    (DbConfig::SQLITE_DBCONFIG_DQS_DDL, true),
    (DbConfig::SQLITE_DBCONFIG_REVERSE_SCANORDER, false),
    (DbConfig::SQLITE_DBCONFIG_ENABLE_COMMENTS, true),
];

/// How long to wait for a lock that somebody else holds on the file; nobody should.
const BUSY_TIMEOUT: Duration = Duration::from_secs(5);

/// How many prepared statements a connection keeps.
const CACHED_STATEMENTS: usize = 256;

/// How many virtual machine steps pass between two looks at the fuse.
const STEPS_PER_LOOK: i32 = 4_096;

/// A reading connection: `query_only`, with the writer's limits and the same things closed.
pub struct Reader {
    connection: OpenDatabase,
    guard: Guard,
    /// The definitions by which statements are measured, and the version of the schema that they are of.
    definitions: RefCell<Option<(i64, Schema)>>,
}

/// Opens a reading connection on the database that the writer of this process has open.
pub fn open_reader(file: &DatabaseFile) -> rusqlite::Result<Reader> {
    sqlite_ffi::make_local_time_utc();
    let connection = file.open_to_read()?;
    configure(&connection)?;
    connection.execute_batch("PRAGMA query_only = ON")?;
    let guard = Guard::install(&connection, Role::Reader)?;
    Ok(Reader { connection, guard, definitions: RefCell::default() })
}

impl fmt::Debug for Reader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Reader").field(&self.connection.path()).finish()
    }
}

impl Reader {
    /// The connection, to run prepared reads on and to interrupt.
    pub fn connection(&self) -> &Connection {
        &self.connection
    }

    /// The version of the schema that the connection now sees.
    pub fn schema_version(&self) -> rusqlite::Result<i64> {
        // Not from the cache, which is keyed by text: what is in there runs for users.
        self.connection.query_row("PRAGMA schema_version", [], |row| row.get(0))
    }

    /// Refuses a statement that would take too long to prepare.
    fn check_expansion(&self, sql: &str) -> rusqlite::Result<Result<(), TooComplex>> {
        if !expansion::may_expand(sql) {
            return Ok(Ok(()));
        }
        let version = self.schema_version()?;
        let mut definitions = self.definitions.borrow_mut();
        let schema = match definitions.take() {
            Some((known, schema)) if known == version => schema,
            _ => Schema::read(&self.connection)?,
        };
        Ok(expansion::check(sql, &definitions.insert((version, schema)).1))
    }

    /// What a text is that should be a single statement. Nothing is executed.
    pub fn classify(&self, sql: &str) -> Class {
        match self.check_expansion(sql) {
            Ok(Ok(())) => determinism::classify_on_reader(&self.connection, &self.guard, sql),
            Ok(Err(too_complex)) => {
                // Where the log is ahead, a view may be another one.
                let depends_on_schema = expansion::check(sql, &Schema::default()).is_ok();
                Class::Unpreparable { error: too_complex.into(), depends_on_schema }
            }
            Err(error) => {
                Class::Unpreparable { error: classify::sql_error(&error, 1), depends_on_schema: true }
            }
        }
    }

    /// Like [`Self::read`], and tells `noted` what the answer depends on before there is any; what that returns,
    /// if anything, is the answer. Never from the cache: of a statement in there the authorizer says nothing.
    ///
    /// What was noted holds while the statement runs: the connection has read in its transaction already, so it
    /// knows the schema of that snapshot, and SQLite has no reason to prepare the statement anew.
    pub fn read_noting<T>(
        &self,
        sql: &str,
        noted: impl FnOnce(&StatementFacts) -> rusqlite::Result<Option<T>>,
        run: impl FnOnce(&mut Statement<'_>) -> rusqlite::Result<T>,
    ) -> rusqlite::Result<T> {
        self.guard.begin(Phase::Prepare);
        let prepared = self.connection.prepare(sql);
        let facts = self.guard.end();
        let answer = noted(&facts)?;
        let mut statement = prepared?;
        if let Some(answer) = answer {
            return Ok(answer);
        }
        if facts.transaction.is_some() || facts.pragma_writes || !statement.readonly() {
            return Err(Error::InvalidQuery);
        }
        self.guard.begin(Phase::Step);
        let result = run(&mut statement);
        self.guard.end();
        result
    }

    /// Learns which tables are virtual in the snapshot that is open.
    pub fn learn_virtual_tables(&self) -> rusqlite::Result<()> {
        self.guard.learn_virtual_tables(&self.connection)
    }

    /// Prepares a text that [`Self::classify`] called [`Class::ReadOnly`], or takes it from the cache, and
    /// hands it to `run`. While it runs, users' rules hold.
    pub fn read<T>(
        &self,
        sql: &str,
        run: impl FnOnce(&mut CachedStatement<'_>) -> rusqlite::Result<T>,
    ) -> rusqlite::Result<T> {
        self.guard.begin(Phase::Prepare);
        let prepared = self.connection.prepare_cached(sql);
        let facts = self.guard.end();
        let mut statement = prepared?;
        if facts.transaction.is_some() || facts.pragma_writes || !statement.readonly() {
            statement.discard();
            return Err(Error::InvalidQuery);
        }
        self.guard.begin(Phase::Step);
        let result = run(&mut statement);
        self.guard.end();
        result
    }
}

/// Closes what a file that somebody made on purpose could use against its reader. For each connection that is neither
/// the writer's nor a reader's: those copy pages, or look at a file as a whole, and run nobody's SQL.
pub(crate) fn harden(connection: &Connection) -> rusqlite::Result<()> {
    connection.set_db_config(DbConfig::SQLITE_DBCONFIG_DEFENSIVE, true)?;
    connection.set_db_config(DbConfig::SQLITE_DBCONFIG_TRUSTED_SCHEMA, false).map(drop)
}

/// What readers and the writer have in common.
fn configure(connection: &Connection) -> rusqlite::Result<()> {
    connection.busy_timeout(BUSY_TIMEOUT)?;
    connection.set_prepared_statement_cache_capacity(CACHED_STATEMENTS);
    for (limit, value) in LIMITS {
        connection.set_limit(limit, value)?;
    }
    for (switch, value) in SWITCHES {
        connection.set_db_config(switch, value)?;
    }
    // The cache's size decides where a sorter spills; mapped memory would hide read errors.
    connection.execute_batch("PRAGMA cache_size = -65536; PRAGMA mmap_size = 0; PRAGMA cell_size_check = ON")
}

/// The one connection that writes.
pub(crate) struct Writer {
    pub connection: OpenDatabase,
    pub guard: Guard,
    pub files: Arc<VfsState>,
    pub random: RandomSource,
    pub fuse: Arc<Fuse>,
    /// Set when a row with the highest rowid was written.
    pub highest_rowid_used: Arc<AtomicBool>,
    pub known: RefCell<KnownStatements>,
    changes_base: Arc<AtomicU64>,
    foreign_keys: Cell<bool>,
    /// Whether the schema may hold deferred foreign keys; `None`: it has changed since that was looked up.
    may_defer: Cell<Option<bool>>,
    /// The definitions by which statements are measured; `None`: as above.
    definitions: RefCell<Option<Schema>>,
}

impl Writer {
    /// Opens or creates the database. `checkpoint_pages`: how long the WAL grows before a commit
    /// writes it back.
    pub fn open(file: &DatabaseFile, checkpoint_pages: u32) -> rusqlite::Result<Self> {
        sqlite_ffi::make_local_time_utc();
        let connection = file.open_to_write()?;
        configure(&connection)?;
        connection.execute_batch(&format!(
            "PRAGMA page_size = 4096;
             PRAGMA encoding = 'UTF-8';
             PRAGMA auto_vacuum = NONE;
             PRAGMA journal_mode = WAL;
             PRAGMA synchronous = NORMAL;
             PRAGMA wal_autocheckpoint = {checkpoint_pages};
             PRAGMA journal_size_limit = 67108864;
             PRAGMA analysis_limit = 0;
             PRAGMA recursive_triggers = OFF;
             PRAGMA automatic_index = ON;
             PRAGMA foreign_keys = ON;"
        ))?;
        let guard = Guard::install(&connection, Role::Writer)?;
        let random = RandomSource::install(&connection, i64::from(MAX_VALUE_BYTES))?;
        bounded::install(&connection)?;
        let changes_base = Arc::default();
        sqlite_ffi::count_changes_from(&connection, Arc::clone(&changes_base))?;
        let writer = Self {
            guard,
            files: Arc::clone(file.state()),
            random,
            fuse: Fuse::install(&connection)?,
            highest_rowid_used: watch_rowids(&connection)?,
            known: RefCell::default(),
            changes_base,
            foreign_keys: Cell::new(true),
            may_defer: Cell::new(None),
            definitions: RefCell::default(),
            connection,
        };
        writer.guard.learn_virtual_tables(&writer.connection)?;
        Ok(writer)
    }

    /// Makes everything fresh that one request could otherwise learn from another, or from its node.
    pub fn begin_request(&self, timestamp_ms: u64, seed: &[u8]) {
        self.files.set_time_ms(timestamp_ms);
        self.random.set(Sequence::seeded(seed));
        self.changes_base.store(self.connection.total_changes(), Ordering::Relaxed);
        sqlite_ffi::set_last_insert_rowid(&self.connection, 0);
    }

    /// Turns the enforcement of foreign keys on or off. Only between transactions: SQLite ignores it within.
    pub fn set_foreign_keys(&self, on: bool) -> rusqlite::Result<()> {
        if self.foreign_keys.get() != on {
            self.connection.set_db_config(DbConfig::SQLITE_DBCONFIG_ENABLE_FKEY, on)?;
            self.foreign_keys.set(on);
            // What a statement writes depends on it: the actions of foreign keys.
            self.forget_statements();
        }
        Ok(())
    }

    /// Forgets all prepared statements and what is known of them. Due whenever the schema has changed: a cached
    /// statement would notice after a few steps and start anew, so that its steps would differ from a
    /// restarted node's; and what the authorizer saw of it may not hold any more.
    pub fn forget_statements(&self) {
        self.connection.flush_prepared_statement_cache();
        self.known.take();
        self.may_defer.set(None);
        self.definitions.take();
    }

    /// Refuses a statement that would take too long to prepare.
    pub fn check_expansion(&self, sql: &str) -> rusqlite::Result<Result<(), TooComplex>> {
        if !expansion::may_expand(sql) {
            return Ok(Ok(()));
        }
        let mut definitions = self.definitions.borrow_mut();
        let schema = match definitions.take() {
            Some(schema) => schema,
            None => Schema::read(&self.connection)?,
        };
        Ok(expansion::check(sql, definitions.insert(schema)))
    }

    /// Starts SQLite's count of open violations of deferred foreign keys from zero. It is one count for the whole
    /// transaction, and it is *below* zero after a request that inserted the parents of rows which were orphans from
    /// before: the next request of the group would be forgiven as many violations, and the group's COMMIT fails
    /// unless the sum is exactly zero.
    pub fn reset_deferred_violations(&self) -> rusqlite::Result<()> {
        let may_defer = match self.may_defer.get() {
            Some(known) => known,
            None => {
                let sql = "SELECT EXISTS(SELECT 1 FROM sqlite_schema WHERE sql LIKE '%deferred%')";
                let found = self.connection.query_row(sql, [], |row| row.get(0))?;
                self.may_defer.set(Some(found));
                found
            }
        };
        if may_defer {
            // This PRAGMA has its effect while it is prepared; if it ran, it would expire all prepared statements.
            drop(self.connection.prepare("PRAGMA defer_foreign_keys = OFF")?);
        }
        Ok(())
    }

    /// Reads the schema and the statistics again, as a restarted node does: ones that were rolled back, or
    /// written by hand, would otherwise still choose this node's query plans.
    pub fn reload_schema(&self) -> rusqlite::Result<()> {
        self.connection.execute_batch("PRAGMA writable_schema = RESET")?;
        self.forget_statements();
        self.guard.learn_virtual_tables(&self.connection)
    }
}

/// A statement of ours that is prepared when it is first needed: most groups need few of those that there are, and each
/// costs as much as a small request. Never from the cache: that is keyed by text, and what is in there runs for users.
pub(crate) struct LazyStatement<'c> {
    connection: &'c Connection,
    sql: &'static str,
    prepared: Option<Statement<'c>>,
}

impl<'c> LazyStatement<'c> {
    pub fn new(connection: &'c Connection, sql: &'static str) -> Self {
        Self { connection, sql, prepared: None }
    }

    pub fn get(&mut self) -> rusqlite::Result<&mut Statement<'c>> {
        let statement = match self.prepared.take() {
            Some(prepared) => prepared,
            None => self.connection.prepare(self.sql)?,
        };
        Ok(self.prepared.insert(statement))
    }

    /// Runs it, without parameters.
    pub fn run(&mut self) -> rusqlite::Result<()> {
        self.get()?.raw_execute().map(drop)
    }
}

/// Notes when a row gets the highest rowid there is.
fn watch_rowids(connection: &Connection) -> rusqlite::Result<Arc<AtomicBool>> {
    let used = Arc::new(AtomicBool::new(false));
    let noted = Arc::clone(&used);
    connection.update_hook(Some(move |_, _: &str, _: &str, rowid: i64| {
        if rowid == i64::MAX {
            noted.store(true, Ordering::Relaxed);
        }
    }))?;
    Ok(used)
}

/// Ends a statement that runs far too long. Only a fuse: how many steps it sees depends on the node.
pub(crate) struct Fuse {
    left: AtomicI64,
    blown: AtomicBool,
}

impl Fuse {
    fn install(connection: &Connection) -> rusqlite::Result<Arc<Self>> {
        let fuse = Arc::new(Self { left: AtomicI64::new(i64::MAX), blown: AtomicBool::new(false) });
        let shared = Arc::clone(&fuse);
        let look = move || {
            let left = shared.left.fetch_sub(i64::from(STEPS_PER_LOOK), Ordering::Relaxed);
            let blown = left < i64::from(STEPS_PER_LOOK);
            shared.blown.fetch_or(blown, Ordering::Relaxed);
            blown
        };
        connection.progress_handler(STEPS_PER_LOOK, Some(look))?;
        Ok(fuse)
    }

    /// Lets about so many steps pass from now on.
    pub fn set(&self, steps: u64) {
        self.left.store(i64::try_from(steps).unwrap_or(i64::MAX), Ordering::Relaxed);
        self.blown.store(false, Ordering::Relaxed);
    }

    /// Lets everything pass.
    pub fn remove(&self) {
        self.left.store(i64::MAX, Ordering::Relaxed);
    }

    /// Whether it blew since it was set.
    pub fn is_blown(&self) -> bool {
        self.blown.load(Ordering::Relaxed)
    }
}

/// What is known of statements that were seen before under the same schema. A text that comes for the second time is worth
/// keeping prepared; one that comes once, such as a line of a dump, is not.
#[derive(Default)]
pub(crate) struct KnownStatements {
    young: HashMap<Box<str>, Arc<StatementFacts>>,
    old: HashMap<Box<str>, Arc<StatementFacts>>,
}

impl KnownStatements {
    /// Two generations of so many statements: what is not seen again while one fills up is forgotten.
    const GENERATION: usize = 1_024;
    /// Longer texts are seldom repeated and take room.
    const MAX_BYTES: usize = 8 << 10;

    /// What is known of this text.
    pub fn get(&mut self, sql: &str) -> Option<Arc<StatementFacts>> {
        if let Some(facts) = self.young.get(sql) {
            return Some(Arc::clone(facts));
        }
        let facts = self.old.remove(sql)?;
        self.insert(sql, Arc::clone(&facts));
        Some(facts)
    }

    /// Remembers a text that is a single statement.
    pub fn insert(&mut self, sql: &str, facts: Arc<StatementFacts>) {
        if sql.len() > Self::MAX_BYTES {
            return;
        }
        if self.young.len() >= Self::GENERATION {
            self.old = std::mem::take(&mut self.young);
        }
        self.young.insert(sql.into(), facts);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{fs, path::Path};

    fn is_closed(connection: &Connection) -> bool {
        // Nobody ever turns extensions on; SQLite has them off.
        let loaded = connection.query_row("SELECT load_extension('evil.so')", [], |_| Ok(()));
        assert!(loaded.unwrap_err().to_string().contains("not authorized"));
        connection.db_config(DbConfig::SQLITE_DBCONFIG_DEFENSIVE).unwrap()
            && !connection.db_config(DbConfig::SQLITE_DBCONFIG_TRUSTED_SCHEMA).unwrap()
    }

    #[test]
    fn every_kind_of_connection_is_defensive_and_trusts_no_schema() {
        let directory = tempfile::tempdir().unwrap();
        let database = DatabaseFile::at(&directory.path().join("test.db")).unwrap();
        database.sums().load().unwrap();
        let writer = Writer::open(&database, 1_000).unwrap();
        assert!(is_closed(&writer.connection));
        assert!(is_closed(open_reader(&database).unwrap().connection()));
        let other = Connection::open_in_memory().unwrap();
        assert!(!is_closed(&other), "SQLite's own defaults");
        harden(&other).unwrap();
        assert!(is_closed(&other));
    }

    #[test]
    fn no_connection_is_opened_without_being_closed_to_what_files_may_hold() {
        let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
        let mut opened = 0;
        let mut directories = vec![sources];
        while let Some(directory) = directories.pop() {
            for entry in fs::read_dir(directory).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() {
                    directories.push(path);
                    continue;
                }
                let text = fs::read_to_string(&path).unwrap();
                let code = text.split("#[cfg(test)]").next().unwrap();
                let count = |what: &str| code.matches(what).count();
                let opens = count("Connection::open") + count(".open_to_");
                let closes = count("harden(&") + count("configure(&connection)");
                assert_eq!(opens, closes, "{}: as many connections as calls that close them", path.display());
                opened += opens;
            }
        }
        assert!(opened >= 8, "{opened} connections");
    }
}
