//! How failures become gRPC statuses.
//!
//! It knows nothing of how the errors came about.

use resqlite::{
    api::{ReplyClass, SqlError, StoredReply},
    status_details,
};
use tonic::{Code, Status};

/// The status for an SQL error.
pub fn sql_status(code: Code, error: &SqlError) -> Status {
    status_details::with_sql_error(code, status_message(&error.message), error)
}

/// Statuses travel in HTTP headers, which hyper bounds: a message that quotes a
/// megabyte of SQL would break the connection instead of explaining anything.
fn status_message(message: &str) -> String {
    const MAX_BYTES: usize = 1_000; // Thrice, and encoded, that is below the 8 KiB at which gRPC's C core begins to refuse metadata.
    if message.len() <= MAX_BYTES {
        return message.to_owned();
    }
    let mut end = MAX_BYTES;
    while !message.is_char_boundary(end) {
        end -= 1;
    }
    format!("{}…", &message[..end])
}

/// SQL that is refused before it reaches the log.
pub fn invalid_sql(mut error: SqlError, statement: usize) -> Status {
    error.statement = statement_number(statement);
    sql_status(Code::InvalidArgument, &bounded(error))
}

/// An error in SQLite's manner that is ours: about a statement, with no place in its text.
pub fn own_sql_error(message: impl Into<String>, statement: usize) -> SqlError {
    SqlError {
        message: message.into(),
        // SQLITE_ERROR: "SQL error or missing database", SQLite's word for everything of this kind.
        extended_code: 1,
        name: "SQLITE_ERROR".to_owned(),
        statement: statement_number(statement),
        offset: -1,
        log_index: 0,
    }
}

/// The status of a request that was executed and failed. `number` turns a
/// statement's number among those that were proposed, from 1, into its number in the client's request.
pub fn reply_status(reply: &StoredReply, number: impl Fn(usize) -> usize) -> Option<Status> {
    let code = match reply.class() {
        ReplyClass::Ok => {
            // A reply of class OK holds no error; one that does must not pass for a success.
            reply.error.as_ref()?;
            Code::Unknown
        }
        ReplyClass::Invalid => Code::InvalidArgument,
        ReplyClass::Failed => Code::FailedPrecondition,
        ReplyClass::Aborted => Code::Aborted,
        ReplyClass::Limit => Code::ResourceExhausted,
        ReplyClass::Expired => Code::DeadlineExceeded,
        ReplyClass::Denied => Code::PermissionDenied,
    };
    let mut error = reply.error.clone().unwrap_or_default();
    if error.statement > 0 {
        error.statement = statement_number(number(error.statement as usize));
    }
    error.log_index = reply.log_index;
    Some(sql_status(code, &bounded(error)))
}

fn bounded(mut error: SqlError) -> SqlError {
    error.message = status_message(&error.message);
    error
}

fn statement_number(number: usize) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_statements_number_is_counted_in_the_whole_request() {
        let reply = StoredReply {
            error: Some(own_sql_error("x", 2)),
            class: ReplyClass::Failed.into(),
            log_index: 9,
            ..StoredReply::default()
        };
        let status = reply_status(&reply, |proposed| proposed + 10).unwrap();
        let error = status_details::sql_error(&status).unwrap();
        assert_eq!((error.statement, error.log_index), (12, 9));
    }

    #[test]
    fn a_message_that_quotes_endless_sql_is_cut_between_characters() {
        let status = sql_status(Code::InvalidArgument, &own_sql_error("é".repeat(100_000), 1));
        assert!(status.message().len() < 1_010);
        assert!(status.message().ends_with('…'));
    }

    #[test]
    fn success_is_no_status() {
        assert!(reply_status(&StoredReply::default(), |proposed| proposed).is_none());
    }
}
