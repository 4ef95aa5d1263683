//! What can become of a call: the errors, and what a gRPC status means.
//!
//! The one place that decides which failures may be tried again.

use std::{error::Error as _, iter};

use tonic::{Code, Status};

use crate::{api::SqlError, status_details::sql_error};

/// Why a call did not succeed.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// SQLite refused a statement: its message, extended code and the statement's number.
    #[error("{}", .0.message)]
    Sql(Box<SqlError>),
    /// An expectation or a guard did not hold; nothing was changed. Trying again from the start may succeed.
    #[error("{message}")]
    Aborted {
        /// What did not hold.
        message: String,
        /// More of it, if the server said more.
        sql: Option<Box<SqlError>>,
    },
    /// A limit of the cluster, such as a size or a queue; nothing was changed.
    #[error("{message}")]
    Limit {
        /// Which limit.
        message: String,
        /// More of it, if a statement hit the limit.
        sql: Option<Box<SqlError>>,
    },
    /// Nobody could serve the call in time. A write was certainly not applied.
    #[error("{0}")]
    Unavailable(String),
    /// A write may or may not have been applied: every node that could have told was out of reach
    /// until the deadline.
    #[error("outcome unknown: {0}")]
    OutcomeUnknown(String),
    /// The call itself is wrong; the same call will never succeed.
    #[error("{0}")]
    Invalid(String),
    /// This client may not do that.
    #[error("{0}")]
    Denied(String),
    /// The server failed in a way that it should not.
    #[error("internal error: {0}")]
    Internal(String),
}

impl Error {
    /// What SQLite said, and of which statement, if the error is about one.
    pub fn sql_error(&self) -> Option<&SqlError> {
        match self {
            Self::Sql(sql) => Some(sql),
            Self::Aborted { sql, .. } | Self::Limit { sql, .. } => sql.as_deref(),
            _ => None,
        }
    }
}

/// What a failed attempt allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// The answer is final.
    Final,
    /// Another attempt may succeed; this one certainly changed nothing.
    Retry,
    /// Another attempt may succeed, under the same id only: this one may yet have been applied.
    RetryUnknown,
}

/// Decides what may follow a failed attempt.
pub(super) fn verdict(status: &Status) -> Verdict {
    // A status that came over the wire has no source; one that tonic made of a broken connection does.
    let transport = status.source().is_some();
    match status.code() {
        // The cluster has answered: it does not remember so old an id any more.
        Code::DeadlineExceeded if sql_error(status).is_some() => Verdict::Final,
        Code::DeadlineExceeded => Verdict::RetryUnknown,
        Code::Unavailable if !transport => Verdict::Retry,
        Code::Unavailable if never_connected(status) => Verdict::Retry,
        Code::Unavailable => Verdict::RetryUnknown,
        // A server sends CANCELLED when the deadline that we told it has passed.
        Code::Cancelled => Verdict::RetryUnknown,
        Code::Unknown | Code::Internal if transport => Verdict::RetryUnknown,
        _ => Verdict::Final,
    }
}

fn never_connected(status: &Status) -> bool {
    causes(status).any(|cause| cause.is::<tonic::ConnectError>())
}

fn causes(status: &Status) -> impl Iterator<Item = &(dyn std::error::Error + 'static)> {
    iter::successors(status.source(), |&cause| cause.source())
}

/// A status in words: with its innermost cause, where the connection was at fault.
pub(super) fn describe(status: &Status) -> String {
    match causes(status).last() {
        Some(cause) => cause.to_string(),
        None if status.message().is_empty() => status.code().description().to_owned(),
        None => status.message().to_owned(),
    }
}

impl From<Status> for Error {
    fn from(status: Status) -> Self {
        let sql = sql_error(&status).map(Box::new);
        let message = describe(&status);
        match (status.code(), sql) {
            (Code::Aborted, sql) => Self::Aborted { message, sql },
            (Code::ResourceExhausted | Code::OutOfRange, sql) => Self::Limit { message, sql },
            (Code::DeadlineExceeded | Code::Cancelled, _) => Self::OutcomeUnknown(message),
            (Code::Unavailable, _) => Self::Unavailable(message),
            (_, Some(sql)) => Self::Sql(sql),
            (Code::InvalidArgument | Code::FailedPrecondition | Code::Unimplemented, _) => {
                Self::Invalid(message)
            }
            (Code::Unauthenticated | Code::PermissionDenied, _) => Self::Denied(message),
            _ => Self::Internal(message),
        }
    }
}
