//! Keeps out of the log what no node can parse.
//!
//! Whether a text is SQL at all does not depend on a database, so it is asked
//! of an empty one in memory: a node that lags must not refuse a statement
//! whose table it has not yet seen. It knows nothing of requests.

use std::sync::{Mutex, PoisonError};

use resqlite::api::SqlError;
use rusqlite::{
    Connection,
    hooks::{AuthAction, AuthContext, Authorization},
};

use crate::{
    classify::{is_malformed, sql_error},
    connection,
    expansion::{self, Schema},
};

/// An empty database to parse against.
#[derive(Debug)]
pub struct SyntaxCheck {
    empty: Mutex<Connection>,
}

impl SyntaxCheck {
    /// Fails only for want of memory.
    pub fn new() -> rusqlite::Result<Self> {
        let empty = Connection::open_in_memory()?;
        connection::harden(&empty)?;
        // Some PRAGMAs act while they are prepared, and on the whole process at that
        // (hard_heap_limit): here none may do anything.
        empty.authorizer(Some(|context: AuthContext<'_>| match context.action {
            AuthAction::Pragma { .. } => Authorization::Deny,
            _ => Authorization::Allow,
        }))?;
        Ok(Self { empty: Mutex::new(empty) })
    }

    /// An error if the text cannot be parsed, whatever the schema. What is merely unknown here passes.
    pub fn check(&self, sql: &str) -> Result<(), SqlError> {
        expansion::check(sql, &Schema::default())?;
        let empty = self.empty.lock().unwrap_or_else(PoisonError::into_inner);
        let Err(error) = empty.prepare(sql) else { return Ok(()) };
        let error = sql_error(&error, 1);
        if is_malformed(&error) { Err(error) } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_cannot_be_parsed_is_refused() {
        let syntax = SyntaxCheck::new().unwrap();
        for sql in [
            "insert into nowhere values (1)",
            "select a from nowhere",
            "drop table \"a: syntax error\"",
            "pragma hard_heap_limit = 1",
            "pragma foreign_keys = on",
            "begin",
            "select no_such_function(1)",
            "insert into nowhere values (?1, :b)",
        ] {
            assert_eq!(syntax.check(sql), Ok(()), "{sql}");
        }
        for (sql, message) in [
            ("selec 1", "near \"selec\": syntax error"),
            ("insert into t values (1", "incomplete input"),
            ("select 'open", "unrecognized token: \"'open\""),
            ("create table t(a b c, )", "near \")\": syntax error"),
        ] {
            assert_eq!(syntax.check(sql).unwrap_err().message, message, "{sql}");
        }
    }

    #[test]
    fn garbage_of_any_size_is_refused_and_the_next_text_is_not() {
        let syntax = SyntaxCheck::new().unwrap();
        assert!(syntax.check(&"(".repeat(1 << 20)).is_err());
        assert!(syntax.check(&"\u{1}\u{2}§".repeat(1 << 18)).is_err());
        syntax.check("select 1").unwrap();
    }
}
