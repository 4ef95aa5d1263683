//! What a user may do, and whether a statement stays within it.
//!
//! A view, a trigger and the action of a foreign key give no rights of their own: what they touch, the user
//! must be allowed to. That is the rule which SQLite's authorizer can carry: it names the view on whose
//! behalf a table is read, but it gives the name of a CTE in the same place, and that the user may choose.

use std::{
    collections::BTreeSet,
    sync::{Arc, LazyLock},
};

use resqlite::api::{self, Role};
use rusqlite::{Connection, OptionalExtension};

use crate::determinism::authorizer::{NODE_LOCAL_TABLES, StatementFacts, is_reserved};

/// On how many single tables a user may have rights.
const MAX_TABLES: usize = 1_000;
/// The longest name of a table in a grant.
const MAX_TABLE_NAME_BYTES: usize = 255;

/// PRAGMAs that tell of the rows of every table.
const PRAGMAS_OF_EVERYTHING: [&str; 3] = ["foreign_key_check", "integrity_check", "quick_check"];

/// Virtual tables that are called like a function and show nothing but their arguments.
pub const MODULES_ANYBODY_MAY_CALL: [&str; 3] = ["json_each", "json_tree", "fts3tokenize"];

/// Where a statement is about to run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Where {
    /// On a reader, where the answer may be this node's own.
    Reader,
    /// In the log, where every node has to come to the same verdict.
    Log,
}

/// What a user may do. Names of tables are in lower case.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rights {
    admin: bool,
    write: bool,
    read: bool,
    backup: bool,
    read_tables: BTreeSet<String>,
    write_tables: BTreeSet<String>,
}

impl Rights {
    /// Of an administrator.
    pub fn everything() -> Arc<Self> {
        static EVERYTHING: LazyLock<Arc<Rights>> =
            LazyLock::new(|| Arc::new(Rights { admin: true, ..Rights::default() }));
        Arc::clone(&EVERYTHING)
    }

    /// From a request; or why that names no rights.
    pub fn parse(rights: &api::Rights) -> Result<Self, String> {
        let mut parsed = Self::default();
        for &role in &rights.roles {
            match Role::try_from(role) {
                Ok(Role::Admin) => parsed.admin = true,
                Ok(Role::Write) => parsed.write = true,
                Ok(Role::Read) => parsed.read = true,
                Ok(Role::Backup) => parsed.backup = true,
                Ok(Role::Unspecified) | Err(_) => return Err(format!("there is no role {role}")),
            }
        }
        parsed.read_tables = parse_tables(&rights.read_tables)?;
        parsed.write_tables = parse_tables(&rights.write_tables)?;
        Ok(parsed)
    }

    /// As they are shown and stored.
    pub fn to_api(&self) -> api::Rights {
        let roles = [
            (self.admin, Role::Admin),
            (self.write, Role::Write),
            (self.read, Role::Read),
            (self.backup, Role::Backup),
        ];
        api::Rights {
            roles: roles.into_iter().filter(|(has, _)| *has).map(|(_, role)| role.into()).collect(),
            read_tables: self.read_tables.iter().cloned().collect(),
            write_tables: self.write_tables.iter().cloned().collect(),
        }
    }

    /// These and the others; or why that is too much.
    pub fn grant(&self, other: &Self) -> Result<Self, String> {
        let granted = Self {
            admin: self.admin || other.admin,
            write: self.write || other.write,
            read: self.read || other.read,
            backup: self.backup || other.backup,
            read_tables: &self.read_tables | &other.read_tables,
            write_tables: &self.write_tables | &other.write_tables,
        };
        if granted.read_tables.len() + granted.write_tables.len() > MAX_TABLES {
            return Err(format!(
                "a user may have rights on {MAX_TABLES} single tables at most: grant a role"
            ));
        }
        Ok(granted)
    }

    /// These without the others.
    pub fn revoke(&self, other: &Self) -> Result<Self, String> {
        Ok(Self {
            admin: self.admin && !other.admin,
            write: self.write && !other.write,
            read: self.read && !other.read,
            backup: self.backup && !other.backup,
            read_tables: &self.read_tables - &other.read_tables,
            write_tables: &self.write_tables - &other.write_tables,
        })
    }

    /// May do everything.
    pub fn is_admin(&self) -> bool {
        self.admin
    }

    /// May take backups.
    pub fn may_backup(&self) -> bool {
        self.admin || self.backup
    }

    /// May change every table, and the schema.
    pub fn writes_everything(&self) -> bool {
        self.admin || self.write
    }

    /// May read every table.
    pub fn reads_everything(&self) -> bool {
        self.writes_everything() || self.read
    }

    fn may_read(&self, table: &str) -> bool {
        self.reads_everything() || self.read_tables.contains(table) || self.write_tables.contains(table)
    }

    fn may_write(&self, table: &str) -> bool {
        self.writes_everything() || self.write_tables.contains(table)
    }

    /// What a prepared statement would do beyond these rights, in words; `None`: it stays within them.
    ///
    /// The connection is asked what an unknown name is, with the schema that the statement was prepared under.
    pub fn excess(
        &self,
        facts: &StatementFacts,
        connection: &Connection,
        place: Where,
    ) -> rusqlite::Result<Option<String>> {
        if self.writes_everything() {
            return Ok(None);
        }
        if facts.changes_schema || facts.changes_statistics {
            return Ok(Some("may not change the schema: that takes the role write".into()));
        }
        if facts.pragma_writes {
            return Ok(Some("may not change a setting by a PRAGMA: that takes the role write".into()));
        }
        if let Some(pragma) = &facts.pragma
            && !self.reads_everything()
            && (place == Where::Log || PRAGMAS_OF_EVERYTHING.contains(&pragma.as_str()))
        {
            // Some PRAGMAs open virtual tables, which then ask for what they need: on the nodes where they are
            // not open already. In the log that must not make a difference.
            return Ok(Some(format!("may not use PRAGMA {pragma} here: that takes the role read")));
        }
        let mut excess = BTreeSet::new();
        for table in facts.written_tables.iter().chain(&facts.changed_virtual_tables) {
            if !self.may_write(table) {
                excess.extend(self.uncovered(table, connection)?);
            }
        }
        for table in &facts.read_tables {
            if !self.may_read(table) && !is_harmless(table) {
                excess.extend(self.uncovered(table, connection)?);
            }
        }
        // One table, and not for what: see `uncovered`.
        Ok(excess.first().map(|table| format!("has not the rights on the table {table} that this takes")))
    }

    /// What it is that a right is wanting on, unless other rights cover it: what a view stands for has been asked
    /// for by its own names; what the schema does not know is a CTE or a function; and the tables beneath a virtual
    /// table are its own. A virtual table that is opened by a statement asks for some of those, and one that is
    /// open already does not, which differs from node to node: so they count as the virtual table itself.
    fn uncovered(&self, table: &str, connection: &Connection) -> rusqlite::Result<Option<String>> {
        let kind = "SELECT type FROM pragma_table_list(?1) WHERE schema = 'main'";
        let kind: Option<String> = connection.query_row(kind, [table], |row| row.get(0)).optional()?;
        Ok(match kind.as_deref() {
            None if NODE_LOCAL_TABLES.contains(&table) || table.starts_with("pragma_") => {
                Some(table.to_owned())
            }
            None | Some("view") => None,
            // Named after its virtual table, with one word added (sqlite3ShadowTableName).
            Some("shadow") => {
                let owner = table.rsplit_once('_').map_or(table, |(owner, _)| owner);
                (!self.may_read(owner)).then(|| owner.to_owned())
            }
            Some(_) => Some(table.to_owned()),
        })
    }
}

/// What everybody may read: names and definitions are no secret, and statistics tell but how many rows there are;
/// an R-Tree looks at them when it is opened.
fn is_harmless(table: &str) -> bool {
    match table.strip_prefix("pragma_") {
        Some(pragma) => !PRAGMAS_OF_EVERYTHING.contains(&pragma),
        None => matches!(table, "sqlite_schema" | "sqlite_master" | "sqlite_stat1"),
    }
}

fn parse_tables(tables: &[String]) -> Result<BTreeSet<String>, String> {
    let parse = |table: &String| {
        if table.is_empty() || table.len() > MAX_TABLE_NAME_BYTES {
            return Err(format!("a table's name has 1 to {MAX_TABLE_NAME_BYTES} bytes"));
        }
        if is_reserved(table) {
            return Err(format!("{table} is the server's own: nobody has rights on it"));
        }
        Ok(table.to_ascii_lowercase())
    };
    tables.iter().map(parse).collect()
}
