//! The authorizer: sees everything that a statement would do while SQLite prepares it, refuses what
//! may not be, and notes what the executor has to know.
//!
//! SQLite calls it while a user's statement is prepared, again when it prepares that statement anew,
//! and for the statements that virtual tables prepare while they run. It knows names, never values.

use std::{
    collections::BTreeSet,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use rusqlite::{
    Connection,
    hooks::{AuthAction, AuthContext, Authorization, TransactionOperation},
};

use super::{
    ForeignKeysPragma, TransactionKind,
    pragma::{self, Rule},
};

/// The server's own tables begin so; users neither see nor touch them.
pub const RESERVED_PREFIX: &str = "_resqlite_";

/// The virtual tables that may be created: their answers depend on the content only.
const MODULES: [&str; 8] =
    ["fts3", "fts4", "fts4aux", "fts3tokenize", "fts5", "fts5vocab", "rtree", "rtree_i32"];

/// Whether virtual tables of this module may be.
pub(crate) fn is_known_module(name: &str) -> bool {
    MODULES.iter().any(|module| module.eq_ignore_ascii_case(name))
}

/// Table-valued functions and tables that show this node's file or memory.
pub const NODE_LOCAL_TABLES: [&str; 6] =
    ["dbstat", "sqlite_dbpage", "sqlite_stmt", "sqlite_memstat", "bytecode", "tables_used"];

/// Functions whose answers may differ from node to node: the compiler's name; and BM25, which takes
/// logarithms from the C library.
const NODE_LOCAL_FUNCTIONS: [&str; 3] = ["sqlite_compileoption_get", "sqlite_compileoption_used", "bm25"];

/// Functions that reach outside the database, or that write where SQLite believes it reads.
const REFUSED_FUNCTIONS: [(&str, &str); 4] = [
    ("load_extension", "load_extension() runs code that the other nodes do not have"),
    ("fts3_tokenizer", "fts3_tokenizer() handles addresses in memory"),
    ("sqlite_log", "sqlite_log() writes to this node's log"),
    ("optimize", "optimize() writes inside a SELECT; use INSERT INTO t(t) VALUES('optimize')"),
];

/// Whose connection it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Executes the log.
    Writer,
    /// Answers reads and classifies statements. It runs no writes.
    Reader,
}

/// What SQLite is doing on our behalf.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Our own bookkeeping: everything is allowed.
    Internal,
    /// A user's statement is prepared.
    Prepare,
    /// A user's statement runs; virtual tables may prepare their own.
    Step,
    /// VACUUM runs, which attaches a database without a name and copies everything.
    Vacuum,
}

/// What the authorizer saw of a statement.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct StatementFacts {
    /// Refused, for this reason.
    pub refused: Option<String>,
    /// It controls a transaction.
    pub transaction: Option<TransactionKind>,
    /// It is `PRAGMA foreign_keys`.
    pub foreign_keys: Option<ForeignKeysPragma>,
    /// It is a PRAGMA that changes something.
    pub pragma_writes: bool,
    /// It is a PRAGMA whose effect has to end with the request.
    pub until_request_ends: bool,
    /// It reads something that differs from node to node.
    pub node_local: Option<String>,
    /// It changes the schema.
    pub changes_schema: bool,
    /// It creates, drops or renames virtual tables, or may do so.
    pub changes_virtual_tables: bool,
    /// It is an INSERT, UPDATE or DELETE on a user's table; or an R-Tree was connected on its behalf, which
    /// prepares such statements for later.
    pub changes_rows: bool,
    /// It runs ANALYZE or writes its tables.
    pub changes_statistics: bool,
    /// It writes a virtual table.
    pub writes_virtual_table: bool,
    /// The tables that it may change, its triggers' and foreign keys' included; in lower case.
    pub written_tables: BTreeSet<String>,
    /// The virtual tables that it may change; in lower case.
    pub changed_virtual_tables: BTreeSet<String>,
    /// The virtual tables that it changes or reads; in lower case.
    pub virtual_tables: BTreeSet<String>,
    /// The tables that it reads; in lower case.
    pub read_tables: BTreeSet<String>,
    /// It is this PRAGMA.
    pub pragma: Option<String>,
    /// It reads more than the names of tables tell, such as through a virtual table or a PRAGMA; on a reader.
    pub reads_everything: bool,
    /// Tables that it creates or alters: what they are called and refer to has to be checked afterwards.
    pub defined_tables: Vec<String>,
    /// At least one thing was asked. Not so for VACUUM, and for DROP IF EXISTS of what does not exist.
    pub asked: bool,
    /// It drops or alters something: SQLite itself then reads its schema table.
    drops_or_alters: bool,
}

impl StatementFacts {
    /// Adds what was seen later, when SQLite prepared the statement again.
    pub fn merge(&mut self, later: Self) {
        self.refused = self.refused.take().or(later.refused);
        self.transaction = self.transaction.or(later.transaction);
        self.foreign_keys = self.foreign_keys.or(later.foreign_keys);
        self.node_local = self.node_local.take().or(later.node_local);
        self.pragma_writes |= later.pragma_writes;
        self.until_request_ends |= later.until_request_ends;
        self.changes_schema |= later.changes_schema;
        self.changes_virtual_tables |= later.changes_virtual_tables;
        self.changes_rows |= later.changes_rows;
        self.changes_statistics |= later.changes_statistics;
        self.writes_virtual_table |= later.writes_virtual_table;
        self.drops_or_alters |= later.drops_or_alters;
        self.asked |= later.asked;
        self.defined_tables.extend(later.defined_tables);
        self.written_tables.extend(later.written_tables);
        self.virtual_tables.extend(later.virtual_tables);
        self.read_tables.extend(later.read_tables);
        self.reads_everything |= later.reads_everything;
        self.changed_virtual_tables.extend(later.changed_virtual_tables);
        self.pragma = self.pragma.take().or(later.pragma);
    }
}

/// The authorizer of one connection, as its owner holds it. Clones are the same authorizer.
#[derive(Clone)]
pub struct Guard(Arc<Mutex<State>>);

struct State {
    role: Role,
    phase: Phase,
    facts: StatementFacts,
    /// In lower case.
    virtual_tables: BTreeSet<String>,
}

impl Guard {
    /// Puts the authorizer on the connection, in the internal phase.
    pub fn install(connection: &Connection, role: Role) -> rusqlite::Result<Self> {
        let guard = Self(Arc::new(Mutex::new(State {
            role,
            phase: Phase::Internal,
            facts: StatementFacts::default(),
            virtual_tables: BTreeSet::new(),
        })));
        let shared = guard.clone();
        connection.authorizer(Some(move |context: AuthContext<'_>| shared.lock().authorize(context)))?;
        Ok(guard)
    }

    /// Enters a phase and forgets what was seen.
    pub fn begin(&self, phase: Phase) {
        let mut state = self.lock();
        state.phase = phase;
        state.facts = StatementFacts::default();
    }

    /// Goes back to the internal phase and tells what was seen.
    pub fn end(&self) -> StatementFacts {
        let mut state = self.lock();
        state.phase = Phase::Internal;
        std::mem::take(&mut state.facts)
    }

    /// Learns which tables are virtual.
    pub fn learn_virtual_tables(&self, connection: &Connection) -> rusqlite::Result<()> {
        let mut statement =
            connection.prepare("SELECT name FROM sqlite_schema WHERE type = 'table' AND rootpage = 0")?;
        let names = statement.query_map([], |row| Ok(row.get::<_, String>(0)?.to_ascii_lowercase()))?;
        let names: BTreeSet<String> = names.collect::<rusqlite::Result<_>>()?;
        self.lock().virtual_tables = names;
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether a name is the server's own.
pub fn is_reserved(name: &str) -> bool {
    let start = name.as_bytes().get(..RESERVED_PREFIX.len());
    start.is_some_and(|start| start.eq_ignore_ascii_case(RESERVED_PREFIX.as_bytes()))
}

impl State {
    fn authorize(&mut self, context: AuthContext<'_>) -> Authorization {
        match self.phase {
            Phase::Internal => Authorization::Allow,
            // VACUUM INTO attaches a file by its name.
            Phase::Vacuum => match context.action {
                AuthAction::Attach { filename } if !filename.is_empty() => {
                    self.refuse("VACUUM INTO would write a file on every node".into())
                }
                _ => Authorization::Allow,
            },
            Phase::Prepare | Phase::Step => {
                self.facts.asked = true;
                self.authorize_user(&context)
            }
        }
    }

    fn refuse(&mut self, reason: String) -> Authorization {
        // The first reason is the one that the user can do something about.
        self.facts.refused.get_or_insert(reason);
        Authorization::Deny
    }

    fn authorize_user(&mut self, context: &AuthContext<'_>) -> Authorization {
        if let Some(name) = reserved_name(&context.action) {
            // ANALYZE without a name goes over all tables; ours have no statistics.
            if matches!(context.action, AuthAction::Analyze { .. } | AuthAction::Reindex { .. }) {
                return Authorization::Ignore;
            }
            return self
                .refuse(format!("names that begin with {RESERVED_PREFIX} are the server's own: {name}"));
        }
        match context.action {
            AuthAction::Select | AuthAction::Recursive => Authorization::Allow,
            AuthAction::Read { table_name, column_name } => self.read(table_name, column_name),
            AuthAction::Function { function_name } => self.function(function_name),
            AuthAction::Insert { table_name }
            | AuthAction::Delete { table_name }
            | AuthAction::Update { table_name, .. } => self.change(table_name, context.database_name),
            AuthAction::Pragma { pragma_name, pragma_value } => self.pragma(pragma_name, pragma_value),
            AuthAction::Transaction { operation } => self.transaction(operation),
            // In the step phase it is FTS3 that sets savepoints of its own.
            AuthAction::Savepoint { .. } if self.phase == Phase::Step => Authorization::Allow,
            AuthAction::Savepoint { .. } => {
                self.facts.transaction = Some(TransactionKind::Savepoint);
                Authorization::Allow
            }
            AuthAction::Attach { .. } | AuthAction::Detach { .. } => {
                self.refuse("ATTACH and DETACH reach outside the replicated database".into())
            }
            _ => self.schema(context),
        }
    }

    fn read(&mut self, table: &str, column: &str) -> Authorization {
        let lower = table.to_ascii_lowercase();
        if lower == "sqlite_dbpage" {
            return self
                .refuse("sqlite_dbpage shows the file's pages, the server's own tables among them".into());
        }
        self.note_read(&lower);
        let local = match lower.as_str() {
            // Page numbers depend on when transactions were committed, not only on what was.
            "sqlite_schema" | "sqlite_master" => {
                column.eq_ignore_ascii_case("rootpage") && !self.facts.drops_or_alters
            }
            name if NODE_LOCAL_TABLES.contains(&name) => true,
            name => match name.strip_prefix("pragma_") {
                Some(pragma) => pragma::rule(pragma, None) != Rule::Read,
                // FTS5 ranks with BM25 unless it is told otherwise.
                None => column.eq_ignore_ascii_case("rank") && self.virtual_tables.contains(name),
            },
        };
        if local {
            let what = if column.is_empty() { table.to_owned() } else { format!("{table}.{column}") };
            self.facts.node_local.get_or_insert(what);
        }
        Authorization::Allow
    }

    /// Notes what the answer depends on, for those who must know when it changes. In doubt it is everything:
    /// a virtual table reads others, and what SQLite keeps for itself is written without a word.
    fn note_read(&mut self, table: &str) {
        let of_virtual = |owner: &String| {
            table.strip_prefix(owner.as_str()).is_some_and(|rest| rest.is_empty() || rest.starts_with('_'))
        };
        if self.virtual_tables.contains(table) && !self.facts.virtual_tables.contains(table) {
            self.facts.virtual_tables.insert(table.to_owned());
        }
        let own = table.starts_with("sqlite_") && !matches!(table, "sqlite_schema" | "sqlite_master");
        let local = table.starts_with("pragma_") || NODE_LOCAL_TABLES.contains(&table);
        self.facts.reads_everything |= own || local || self.virtual_tables.iter().any(of_virtual);
        if !self.facts.read_tables.contains(table) {
            self.facts.read_tables.insert(table.to_owned());
        }
    }

    fn function(&mut self, name: &str) -> Authorization {
        let lower = name.to_ascii_lowercase();
        if let Some((_, reason)) = REFUSED_FUNCTIONS.iter().find(|(function, _)| *function == lower) {
            return self.refuse((*reason).into());
        }
        if NODE_LOCAL_FUNCTIONS.contains(&lower.as_str()) {
            self.facts.node_local.get_or_insert(format!("{lower}()"));
        }
        Authorization::Allow
    }

    fn change(&mut self, table: &str, database: Option<&str>) -> Authorization {
        let lower = table.to_ascii_lowercase();
        match lower.as_str() {
            // Part of every change of the schema; users themselves are kept from it by SQLite.
            "sqlite_schema" | "sqlite_master" | "sqlite_temp_schema" | "sqlite_temp_master" => {}
            name if database == Some("temp") => {
                return self.refuse(format!("temporary objects live on one connection only: {name}"));
            }
            name => {
                self.facts.changes_rows = true;
                self.facts.changes_statistics |= name.starts_with("sqlite_stat");
                if self.virtual_tables.contains(name) {
                    self.facts.writes_virtual_table = true;
                    self.facts.changed_virtual_tables.insert(lower.clone());
                    self.facts.virtual_tables.insert(lower);
                } else {
                    self.facts.written_tables.insert(lower);
                }
            }
        }
        Authorization::Allow
    }

    fn transaction(&mut self, operation: TransactionOperation) -> Authorization {
        self.facts.transaction = Some(match operation {
            TransactionOperation::Begin => TransactionKind::Begin,
            TransactionOperation::Rollback => TransactionKind::Rollback,
            // rusqlite has no word for COMMIT.
            _ => TransactionKind::Commit,
        });
        Authorization::Allow
    }

    fn pragma(&mut self, name: &str, value: Option<&str>) -> Authorization {
        self.facts.reads_everything = true;
        // That one full-text indexes and R-Trees ask for when they are opened.
        if self.phase == Phase::Prepare && name != "page_size" {
            self.facts.pragma.get_or_insert_with(|| name.to_ascii_lowercase());
        }
        // FTS5 asks for it while it runs.
        if self.phase == Phase::Step && value.is_none() && name == "data_version" {
            return Authorization::Allow;
        }
        match pragma::rule(name, value) {
            Rule::Read => Authorization::Allow,
            // In the step phase it is a table-valued function, which `read` has judged.
            Rule::NodeLocalRead => {
                if self.phase == Phase::Prepare {
                    self.facts.node_local.get_or_insert(format!("PRAGMA {name}"));
                }
                Authorization::Allow
            }
            Rule::Replicated => {
                self.facts.pragma_writes = true;
                Authorization::Allow
            }
            // SQLite changes these settings while preparing: on the writer that is wanted, elsewhere not.
            Rule::Request => {
                self.facts.pragma_writes = true;
                self.facts.until_request_ends = true;
                if self.role == Role::Writer { Authorization::Allow } else { Authorization::Deny }
            }
            Rule::ForeignKeys => {
                self.facts.foreign_keys = Some(match value {
                    None => ForeignKeysPragma::Read,
                    Some(value) if pragma::is_on(value) => ForeignKeysPragma::On,
                    Some(_) => ForeignKeysPragma::Off,
                });
                Authorization::Deny
            }
            Rule::Refused(reason) => self.refuse(format!("PRAGMA {name} is refused: {reason}")),
        }
    }

    fn schema(&mut self, context: &AuthContext<'_>) -> Authorization {
        if context.database_name == Some("temp") {
            return self.refuse("temporary objects live on one connection only".into());
        }
        self.facts.changes_schema = true;
        match context.action {
            AuthAction::CreateTable { table_name } => self.facts.defined_tables.push(table_name.to_owned()),
            AuthAction::AlterTable { table_name, .. } => {
                self.facts.defined_tables.push(table_name.to_owned());
                self.facts.drops_or_alters = true;
                self.facts.changes_virtual_tables = true;
            }
            AuthAction::CreateVtable { module_name, .. } => {
                self.facts.changes_virtual_tables = true;
                self.facts.writes_virtual_table = true;
                if !is_known_module(module_name) {
                    return self.refuse(format!(
                        "virtual tables of the module {module_name} may differ from node to node"
                    ));
                }
            }
            AuthAction::DropVtable { .. } => {
                self.facts.changes_virtual_tables = true;
                self.facts.writes_virtual_table = true;
                self.facts.drops_or_alters = true;
            }
            AuthAction::Analyze { .. } => self.facts.changes_statistics = true,
            AuthAction::DropTable { .. }
            | AuthAction::DropIndex { .. }
            | AuthAction::DropTrigger { .. }
            | AuthAction::DropView { .. }
            | AuthAction::Reindex { .. } => self.facts.drops_or_alters = true,
            AuthAction::CreateIndex { .. }
            | AuthAction::CreateTrigger { .. }
            | AuthAction::CreateView { .. } => {}
            AuthAction::CreateTempIndex { .. }
            | AuthAction::CreateTempTable { .. }
            | AuthAction::CreateTempTrigger { .. }
            | AuthAction::CreateTempView { .. }
            | AuthAction::DropTempIndex { .. }
            | AuthAction::DropTempTable { .. }
            | AuthAction::DropTempTrigger { .. }
            | AuthAction::DropTempView { .. } => {
                return self.refuse("temporary objects live on one connection only".into());
            }
            other => return self.refuse(format!("this SQLite does something unknown here: {other:?}")),
        }
        Authorization::Allow
    }
}

/// The server's own name that an action is about, if it is.
fn reserved_name<'c>(action: &AuthAction<'c>) -> Option<&'c str> {
    let names: [Option<&'c str>; 2] = match *action {
        AuthAction::CreateIndex { index_name, table_name }
        | AuthAction::DropIndex { index_name, table_name } => [Some(index_name), Some(table_name)],
        AuthAction::CreateTrigger { trigger_name, table_name }
        | AuthAction::DropTrigger { trigger_name, table_name } => [Some(trigger_name), Some(table_name)],
        AuthAction::CreateTable { table_name }
        | AuthAction::DropTable { table_name }
        | AuthAction::CreateVtable { table_name, .. }
        | AuthAction::DropVtable { table_name, .. }
        | AuthAction::AlterTable { table_name, .. }
        | AuthAction::Insert { table_name }
        | AuthAction::Delete { table_name }
        | AuthAction::Update { table_name, .. }
        | AuthAction::Read { table_name, .. }
        | AuthAction::Analyze { table_name } => [Some(table_name), None],
        AuthAction::CreateView { view_name } | AuthAction::DropView { view_name } => [Some(view_name), None],
        AuthAction::Reindex { index_name } => [Some(index_name), None],
        _ => [None, None],
    };
    names.into_iter().flatten().find(|name| is_reserved(name))
}
