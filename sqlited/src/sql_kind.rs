//! What a statement is to a script, as a reader's connection tells.
//! It knows nothing of scripts but the kinds.

use resqlite::api::SqlError;

use crate::{
    determinism::{Class, ForeignKeysPragma, TransactionKind},
    errors::own_sql_error,
    script::Kind,
    syntax::SyntaxCheck,
};

/// The kind of a statement of this class. A statement that this node's schema
/// does not know may be known where the log is ahead, so it is proposed as if it
/// were a write, unless nobody can parse it.
pub fn kind(class: Class, sql: &str, syntax: &SyntaxCheck) -> Kind {
    match class {
        Class::ReadOnly => Kind::Read,
        Class::Write => Kind::Write,
        Class::Transaction(TransactionKind::Begin) => Kind::Begin,
        Class::Transaction(TransactionKind::Commit) => Kind::Commit,
        Class::Transaction(TransactionKind::Rollback) => Kind::Rollback,
        Class::Transaction(TransactionKind::Savepoint) => refused(own_sql_error(
            "savepoints are not supported: a request is applied as a whole, and so is what stands between BEGIN and COMMIT",
            0,
        )),
        Class::ForeignKeysPragma(ForeignKeysPragma::Read) => Kind::ForeignKeys(None),
        Class::ForeignKeysPragma(ForeignKeysPragma::On) => Kind::ForeignKeys(Some(true)),
        Class::ForeignKeysPragma(ForeignKeysPragma::Off) => Kind::ForeignKeys(Some(false)),
        Class::Empty => refused(own_sql_error("the statement is empty", 0)),
        Class::Unpreparable { error, depends_on_schema: false } => refused(error),
        Class::Unpreparable { depends_on_schema: true, .. } => match syntax.check(sql) {
            Ok(()) => Kind::Write,
            Err(error) => refused(error),
        },
    }
}

fn refused(error: SqlError) -> Kind {
    Kind::Refused(Box::new(error))
}
