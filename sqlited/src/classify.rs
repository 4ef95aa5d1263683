//! The one place that tells deterministic errors from environmental ones.
//!
//! A *deterministic* error comes from the request and the database's content: every node gets the
//! same one, so it is the request's result. An *environmental* one comes from this node (its disk,
//! its memory, another process): it is never a result; the node stops applying instead.

use resqlite::api::{ReplyClass, SqlError};
use rusqlite::{Error, ffi};

/// Whose fault an error is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Nature {
    /// The same on every node: it is the request's result.
    Deterministic,
    /// This node's trouble: it must not become a result.
    Environmental,
}

/// Judges an extended result code of an apply. `disk_was_full`: whether a write of this node hit a full disk.
pub fn nature(extended_code: i32, disk_was_full: bool) -> Nature {
    use Nature::{Deterministic, Environmental};
    match extended_code {
        // FTS5 says so when its content table and its index differ, which a user can bring about; the
        // same goes for a sqlite_sequence that is not what it should be.
        ffi::SQLITE_CORRUPT_VTAB | ffi::SQLITE_CORRUPT_SEQUENCE => return Deterministic,
        ffi::SQLITE_LOCKED_SHAREDCACHE | ffi::SQLITE_ERROR_SNAPSHOT => return Environmental,
        _ => {}
    }
    match extended_code & 0xff {
        ffi::SQLITE_ERROR
        | ffi::SQLITE_ABORT
        | ffi::SQLITE_TOOBIG
        | ffi::SQLITE_CONSTRAINT
        | ffi::SQLITE_MISMATCH
        | ffi::SQLITE_AUTH
        | ffi::SQLITE_RANGE
        // Without a shared cache only the statement itself can be in its own way (an R-Tree that is
        // read and written by one statement).
        | ffi::SQLITE_LOCKED => Deterministic,
        // AUTOINCREMENT at its end says "full" as well, and that is the same everywhere; a writer's
        // max_page_count is never set, so only a write that failed makes it this node's trouble.
        ffi::SQLITE_FULL if !disk_was_full => Deterministic,
        // SQLITE_INTERRUPT is here, too: the step budget's own fuse is recognised before this is asked.
        _ => Environmental,
    }
}

/// A failure that is a request's result.
#[derive(Clone, Debug, PartialEq)]
pub struct Failure {
    /// The status that it becomes.
    pub class: ReplyClass,
    /// What the client is told; the log index is filled in when the reply is made.
    pub error: SqlError,
}

impl Failure {
    /// An error of ours in SQLite's manner.
    pub fn new(class: ReplyClass, code: i32, statement: u32, message: impl Into<String>) -> Self {
        let error = SqlError {
            message: message.into(),
            extended_code: code,
            name: code_name(code).to_owned(),
            statement,
            offset: -1,
            log_index: 0,
        };
        Self { class, error }
    }

    /// SQL that we refuse, with the reason.
    pub fn refused(statement: u32, reason: impl Into<String>) -> Self {
        Self::new(ReplyClass::Invalid, ffi::SQLITE_AUTH, statement, reason)
    }
}

/// The extended result code of an error.
pub fn extended_code(error: &Error) -> i32 {
    match error {
        Error::SqliteFailure(inner, _) => inner.extended_code,
        Error::SqlInputError { error: inner, .. } => inner.extended_code,
        // rusqlite's own errors do not come from SQLite; none is expected here.
        _ => ffi::SQLITE_MISUSE,
    }
}

/// What the client is told about an error of SQLite's. `statement` counts from 1 within the request.
pub fn sql_error(error: &Error, statement: u32) -> SqlError {
    let code = extended_code(error);
    let (message, offset) = match error {
        Error::SqliteFailure(_, Some(message)) => (message.clone(), -1),
        Error::SqliteFailure(inner, None) => (inner.to_string(), -1),
        Error::SqlInputError { msg, offset, .. } => (msg.clone(), *offset),
        other => (other.to_string(), -1),
    };
    SqlError {
        message,
        extended_code: code,
        name: code_name(code).to_owned(),
        statement,
        offset,
        log_index: 0,
    }
}

/// The class of a deterministic error while a statement was prepared, or while it ran.
pub fn class_of(extended_code: i32, preparing: bool) -> ReplyClass {
    match extended_code & 0xff {
        ffi::SQLITE_TOOBIG => ReplyClass::Limit,
        ffi::SQLITE_RANGE | ffi::SQLITE_AUTH => ReplyClass::Invalid,
        _ if preparing => ReplyClass::Invalid,
        _ => ReplyClass::Failed,
    }
}

/// Whether an error of preparing says that the text is not SQL at all, whatever the schema: then it
/// need not be proposed. What fails only against the schema may succeed on a node that is further on.
pub fn is_malformed(error: &SqlError) -> bool {
    let message = error.message.as_str();
    error.extended_code & 0xff == ffi::SQLITE_TOOBIG
        || message == "incomplete input"
        || (message.starts_with("near \"") && message.ends_with("\": syntax error"))
        || message.starts_with("unrecognized token:")
        || message.starts_with("parser stack overflow")
}

macro_rules! code_names {
    ($($name:ident)*) => {
        /// The name of a result code, such as `SQLITE_CONSTRAINT_UNIQUE`; of an unknown extended
        /// code, its primary code's name.
        pub fn code_name(extended_code: i32) -> &'static str {
            match extended_code {
                $(ffi::$name => stringify!($name),)*
                other if other & 0xff != other => code_name(other & 0xff),
                _ => "SQLITE_ERROR",
            }
        }
    };
}

code_names! {
    SQLITE_OK SQLITE_ERROR SQLITE_INTERNAL SQLITE_PERM SQLITE_ABORT SQLITE_BUSY SQLITE_LOCKED SQLITE_NOMEM
    SQLITE_READONLY SQLITE_INTERRUPT SQLITE_IOERR SQLITE_CORRUPT SQLITE_NOTFOUND SQLITE_FULL SQLITE_CANTOPEN
    SQLITE_PROTOCOL SQLITE_EMPTY SQLITE_SCHEMA SQLITE_TOOBIG SQLITE_CONSTRAINT SQLITE_MISMATCH SQLITE_MISUSE
    SQLITE_NOLFS SQLITE_AUTH SQLITE_FORMAT SQLITE_RANGE SQLITE_NOTADB SQLITE_NOTICE SQLITE_WARNING
    SQLITE_ERROR_MISSING_COLLSEQ SQLITE_ERROR_RETRY SQLITE_ERROR_SNAPSHOT SQLITE_ABORT_ROLLBACK
    SQLITE_BUSY_RECOVERY SQLITE_BUSY_SNAPSHOT SQLITE_BUSY_TIMEOUT SQLITE_LOCKED_SHAREDCACHE SQLITE_LOCKED_VTAB
    SQLITE_READONLY_RECOVERY SQLITE_READONLY_CANTLOCK SQLITE_READONLY_ROLLBACK SQLITE_READONLY_DBMOVED
    SQLITE_READONLY_CANTINIT SQLITE_READONLY_DIRECTORY
    SQLITE_IOERR_READ SQLITE_IOERR_SHORT_READ SQLITE_IOERR_WRITE SQLITE_IOERR_FSYNC SQLITE_IOERR_DIR_FSYNC
    SQLITE_IOERR_TRUNCATE SQLITE_IOERR_FSTAT SQLITE_IOERR_UNLOCK SQLITE_IOERR_RDLOCK SQLITE_IOERR_DELETE
    SQLITE_IOERR_BLOCKED SQLITE_IOERR_NOMEM SQLITE_IOERR_ACCESS SQLITE_IOERR_CHECKRESERVEDLOCK SQLITE_IOERR_LOCK
    SQLITE_IOERR_CLOSE SQLITE_IOERR_DIR_CLOSE SQLITE_IOERR_SHMOPEN SQLITE_IOERR_SHMSIZE SQLITE_IOERR_SHMLOCK
    SQLITE_IOERR_SHMMAP SQLITE_IOERR_SEEK SQLITE_IOERR_DELETE_NOENT SQLITE_IOERR_MMAP SQLITE_IOERR_GETTEMPPATH
    SQLITE_IOERR_CONVPATH SQLITE_IOERR_DATA SQLITE_IOERR_CORRUPTFS SQLITE_IOERR_IN_PAGE
    SQLITE_CORRUPT_VTAB SQLITE_CORRUPT_SEQUENCE SQLITE_CORRUPT_INDEX
    SQLITE_CANTOPEN_NOTEMPDIR SQLITE_CANTOPEN_ISDIR SQLITE_CANTOPEN_FULLPATH SQLITE_CANTOPEN_CONVPATH
    SQLITE_CANTOPEN_SYMLINK
    SQLITE_CONSTRAINT_CHECK SQLITE_CONSTRAINT_COMMITHOOK SQLITE_CONSTRAINT_FOREIGNKEY SQLITE_CONSTRAINT_FUNCTION
    SQLITE_CONSTRAINT_NOTNULL SQLITE_CONSTRAINT_PRIMARYKEY SQLITE_CONSTRAINT_TRIGGER SQLITE_CONSTRAINT_UNIQUE
    SQLITE_CONSTRAINT_VTAB SQLITE_CONSTRAINT_ROWID SQLITE_CONSTRAINT_PINNED SQLITE_CONSTRAINT_DATATYPE
    SQLITE_AUTH_USER SQLITE_NOTICE_RECOVER_WAL SQLITE_NOTICE_RECOVER_ROLLBACK SQLITE_WARNING_AUTOINDEX
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_request_brings_about_is_deterministic() {
        for code in [
            ffi::SQLITE_ERROR,
            ffi::SQLITE_CONSTRAINT_UNIQUE,
            ffi::SQLITE_TOOBIG,
            ffi::SQLITE_MISMATCH,
            ffi::SQLITE_LOCKED_VTAB,
            ffi::SQLITE_CORRUPT_VTAB,
        ] {
            assert_eq!(nature(code, false), Nature::Deterministic, "{}", code_name(code));
        }
    }

    #[test]
    fn what_the_node_brings_about_is_environmental() {
        for code in [
            ffi::SQLITE_IOERR_WRITE,
            ffi::SQLITE_NOMEM,
            ffi::SQLITE_CORRUPT,
            ffi::SQLITE_CORRUPT_INDEX,
            ffi::SQLITE_BUSY_SNAPSHOT,
            ffi::SQLITE_INTERRUPT,
            ffi::SQLITE_CANTOPEN,
            ffi::SQLITE_READONLY,
            ffi::SQLITE_SCHEMA,
            ffi::SQLITE_MISUSE,
        ] {
            assert_eq!(nature(code, false), Nature::Environmental, "{}", code_name(code));
        }
    }

    #[test]
    fn full_is_the_disks_only_if_the_disk_was_full() {
        assert_eq!(nature(ffi::SQLITE_FULL, true), Nature::Environmental);
        assert_eq!(nature(ffi::SQLITE_FULL, false), Nature::Deterministic);
    }

    #[test]
    fn an_unknown_extended_code_goes_by_its_primary_code() {
        assert_eq!(code_name(ffi::SQLITE_CONSTRAINT_PRIMARYKEY), "SQLITE_CONSTRAINT_PRIMARYKEY");
        assert_eq!(code_name(ffi::SQLITE_CONSTRAINT | (200 << 8)), "SQLITE_CONSTRAINT");
    }
}
