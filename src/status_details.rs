//! How an SQL error travels in a gRPC status.
//!
//! In `grpc-status-details-bin`, in the form that every gRPC library knows: a
//! `google.rpc.Status` whose details hold the message. The server writes it,
//! the client library reads it. It knows nothing of how errors come about.

use bytes::Bytes;
use prost::Message;
use tonic::{Code, Status};

use crate::api::SqlError;

/// The type URL of an [`SqlError`] in the status details.
pub const SQL_ERROR_TYPE_URL: &str = "type.googleapis.com/resqlite.v1.SqlError";

/// `google.rpc.Status`, as far as it is needed here.
#[derive(Clone, PartialEq, Message)]
struct RpcStatus {
    #[prost(int32, tag = "1")]
    code: i32,
    #[prost(string, tag = "2")]
    message: String,
    #[prost(message, repeated, tag = "3")]
    details: Vec<Any>,
}

/// `google.protobuf.Any`.
#[derive(Clone, PartialEq, Message)]
struct Any {
    #[prost(string, tag = "1")]
    type_url: String,
    #[prost(bytes = "bytes", tag = "2")]
    value: Bytes,
}

/// A status that carries an SQL error. The message is what people see who look no further.
pub fn with_sql_error(code: Code, message: String, error: &SqlError) -> Status {
    let any = Any { type_url: SQL_ERROR_TYPE_URL.to_owned(), value: error.encode_to_vec().into() };
    let details = RpcStatus { code: code.into(), message: message.clone(), details: vec![any] };
    Status::with_details(code, message, details.encode_to_vec().into())
}

/// The SQL error that a status carries, if it does.
pub fn sql_error(status: &Status) -> Option<SqlError> {
    let details = RpcStatus::decode(status.details()).ok()?.details;
    let any = details.into_iter().find(|any| any.type_url == SQL_ERROR_TYPE_URL)?;
    SqlError::decode(any.value).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_server_puts_in_the_client_takes_out() {
        let error = SqlError { message: "no such table: t".into(), statement: 3, ..SqlError::default() };
        let status = with_sql_error(Code::InvalidArgument, error.message.clone(), &error);
        assert_eq!((status.code(), status.message()), (Code::InvalidArgument, "no such table: t"));
        assert_eq!(sql_error(&status), Some(error));
        assert_eq!(sql_error(&Status::invalid_argument("no details")), None);
        let other = Status::with_details(Code::Internal, "", Bytes::from_static(b"\xff"));
        assert_eq!(sql_error(&other), None);
    }
}
