//! Statements that mean the same on every node: what is replaced, what is refused, what is a read.
//!
//! - [`authorizer`]: sees what a statement would do while it is prepared, and refuses what may not be,
//! - [`pragma`]: the table of every PRAGMA and what becomes of it,
//! - [`bounded`]: functions that would work for hours within one step,
//! - [`random`]: `random()` and `randomblob()` from the request's seed.
//!
//! The clock is part of the writer's VFS. Nothing here knows of the log or of transactions, and nothing
//! looks at SQL text: SQLite's own parser says what a statement is.

use resqlite::api::SqlError;
use rusqlite::{Batch, Connection, Statement, ffi};

use crate::classify;

pub mod authorizer;
pub mod bounded;
pub mod pragma;
pub mod random;

use authorizer::{Guard, Phase, StatementFacts};

/// What a single statement is, as far as running it is concerned.
#[derive(Clone, Debug, PartialEq)]
pub enum Class {
    /// No statement: nothing but blanks and comments.
    Empty,
    /// Changes nothing: a reader answers it. EXPLAIN of anything is one.
    ReadOnly,
    /// Goes through the log.
    Write,
    /// Controls a transaction.
    Transaction(TransactionKind),
    /// `PRAGMA foreign_keys`: travels with the requests of its session.
    ForeignKeysPragma(ForeignKeysPragma),
    /// Cannot be prepared.
    Unpreparable {
        /// Why.
        error: SqlError,
        /// The same text may be valid on a node that has applied more, so only the log can say.
        depends_on_schema: bool,
    },
}

/// The statements that control transactions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TransactionKind {
    /// BEGIN, of any kind.
    Begin,
    /// COMMIT or END.
    Commit,
    /// ROLLBACK, but not ROLLBACK TO.
    Rollback,
    /// SAVEPOINT, RELEASE or ROLLBACK TO.
    Savepoint,
}

/// What a `PRAGMA foreign_keys` does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ForeignKeysPragma {
    /// Asks for the setting.
    Read,
    /// Turns enforcement on.
    On,
    /// Turns enforcement off.
    Off,
}

/// Why a text is not one statement that can be prepared.
pub(crate) enum PrepareError {
    /// SQLite says so, or our authorizer made it say so.
    Sqlite(rusqlite::Error),
    /// More than one statement.
    Several,
    /// A NUL byte would end the text unseen.
    Nul,
}

/// Prepares a single statement and reports what the authorizer saw. `None`: there is no statement in the text.
pub(crate) fn prepare_single<'c>(
    connection: &'c Connection,
    guard: &Guard,
    sql: &str,
) -> (Result<Option<Statement<'c>>, PrepareError>, StatementFacts) {
    use rusqlite::fallible_iterator::FallibleIterator;

    if sql.contains('\0') {
        return (Err(PrepareError::Nul), StatementFacts::default());
    }
    guard.begin(Phase::Prepare);
    let mut batch = Batch::new(connection, sql);
    let first = batch.next();
    let mut facts = guard.end();
    let Ok(Some(statement)) = first else { return (first.map_err(PrepareError::Sqlite), facts) };
    // What follows may only be blanks and comments.
    guard.begin(Phase::Prepare);
    let second = batch.next();
    let also = guard.end();
    match second {
        Ok(None) => (Ok(Some(statement)), facts),
        _ => {
            // A PRAGMA that has its effect while it is prepared has had it.
            facts.until_request_ends |= also.until_request_ends;
            (Err(PrepareError::Several), facts)
        }
    }
}

/// What a prepared statement is.
pub(crate) fn class_of_prepared(statement: &Statement<'_>, facts: &StatementFacts) -> Class {
    if let Some(kind) = facts.transaction {
        return Class::Transaction(kind);
    }
    if statement.is_explain() != 0 {
        return Class::ReadOnly;
    }
    // sqlite3_stmt_readonly() says 1 for a PRAGMA that changes a setting: the authorizer's word goes first.
    // It also says 1 for DROP TRIGGER IF EXISTS of one that is unknown here. A read has columns.
    let writes = facts.pragma_writes || !statement.readonly() || statement.column_count() == 0;
    if writes { Class::Write } else { Class::ReadOnly }
}

/// Whether a prepared statement is a VACUUM, which the authorizer is not asked about: SQLite's own program says so.
pub(crate) fn is_vacuum(
    connection: &Connection,
    guard: &Guard,
    statement: &Statement<'_>,
    facts: &StatementFacts,
    sql: &str,
) -> rusqlite::Result<bool> {
    if facts.asked || statement.readonly() || statement.is_explain() != 0 {
        return Ok(false);
    }
    guard.begin(Phase::Prepare);
    let explained = connection.prepare(&format!("EXPLAIN {sql}"));
    guard.end();
    let mut explained = explained?;
    let opcodes = explained.query_map([], |row| row.get::<_, String>("opcode"))?;
    let opcodes: Vec<String> = opcodes.collect::<rusqlite::Result<_>>()?;
    Ok(opcodes.iter().any(|opcode| opcode == "Vacuum"))
}

/// Classifies a text that should be a single statement, on a reader's connection.
pub(crate) fn classify_on_reader(connection: &Connection, guard: &Guard, sql: &str) -> Class {
    let (prepared, facts) = prepare_single(connection, guard, sql);
    if let Some(pragma) = facts.foreign_keys {
        return Class::ForeignKeysPragma(pragma);
    }
    let unpreparable = |error: SqlError, depends_on_schema| Class::Unpreparable { error, depends_on_schema };
    match prepared {
        Ok(None) => Class::Empty,
        // A setting that SQLite would change while preparing, and so on this connection: it was kept from it.
        Err(_) if facts.pragma_writes && facts.refused.is_none() => Class::Write,
        Ok(Some(statement)) => {
            let class = class_of_prepared(&statement, &facts);
            match facts.node_local {
                Some(what) if class == Class::Write => {
                    unpreparable(refusal(&node_local_reason(&what)), false)
                }
                _ => class,
            }
        }
        Err(PrepareError::Sqlite(_)) if facts.refused.is_some() => {
            unpreparable(refusal(facts.refused.as_deref().unwrap_or_default()), false)
        }
        Err(PrepareError::Sqlite(error)) => {
            let error = classify::sql_error(&error, 1);
            let depends_on_schema = !classify::is_malformed(&error);
            unpreparable(error, depends_on_schema)
        }
        Err(PrepareError::Several) => unpreparable(several(), false),
        Err(PrepareError::Nul) => unpreparable(nul(), false),
    }
}

/// The reason for refusing a write that reads what differs from node to node.
pub(crate) fn node_local_reason(what: &str) -> String {
    format!("a write may not read {what}: it differs from node to node")
}

fn refusal(reason: &str) -> SqlError {
    classify::Failure::refused(1, reason).error
}

/// The error of a text with more than one statement.
pub(crate) fn several() -> SqlError {
    own_error("a single statement was expected, but the text holds more than one")
}

/// The error of a text with a NUL byte.
pub(crate) fn nul() -> SqlError {
    own_error("the statement contains a NUL byte")
}

fn own_error(message: &str) -> SqlError {
    let class = resqlite::api::ReplyClass::Invalid;
    classify::Failure::new(class, ffi::SQLITE_ERROR, 1, message).error
}
