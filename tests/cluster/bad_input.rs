//! Bad input gets a clear error, and the server goes on.

use resqlite::api::{
    ExecuteRequest, QueryRequest, RunRequest, Statement, Value, re_sqlite_client::ReSqliteClient, value::Kind,
};
use tonic::{Code, Status, transport::Channel};

use crate::harness::{Cluster, execute, only_integer, query, statement};

async fn refusal(client: &mut ReSqliteClient<Channel>, sql: &str) -> Status {
    execute(client, sql).await.expect_err(&format!("{:.80} is refused", sql))
}

#[tokio::test]
async fn each_mistake_has_its_own_clear_error_and_the_cluster_serves_on() {
    let cluster = Cluster::start(3).await;
    let mut client = cluster.client(1);
    execute(&mut client, "create table t(id integer primary key, n integer not null)").await.unwrap();
    let settled = cluster.wait_until_level().await;

    // What cannot be parsed never reaches the log.
    let garbage = "\u{1}x%&/(".repeat(150_000);
    for (sql, expected) in [
        ("selec 1", "near \"selec\": syntax error"),
        ("insert into t values (1", "incomplete input"),
        ("select 'abc", "unrecognized token: \"'abc\""),
        ("", "empty"),
        ("  -- only a comment\n", "empty"),
        (";", "empty"),
        ("select 1\0", "NUL"),
        (garbage.as_str(), "unrecognized token"),
    ] {
        let status = refusal(&mut client, sql).await;
        assert_eq!(status.code(), Code::InvalidArgument, "{:.40}: {status:?}", sql);
        assert!(status.message().contains(expected), "{:.40}: {}", sql, status.message());
    }
    assert_eq!(cluster.wait_until_level().await, settled, "none of it reached the log");

    // What fails only against the schema may reach the log, and fails there.
    for (sql, code, expected) in [
        ("insert into missing values(1)", Code::InvalidArgument, "no such table: missing"),
        ("insert into t(nope) values(1)", Code::InvalidArgument, "has no column named nope"),
        ("insert into t values(1, null)", Code::FailedPrecondition, "NOT NULL constraint failed: t.n"),
    ] {
        let status = refusal(&mut client, sql).await;
        assert_eq!(status.code(), code, "{sql}: {status:?}");
        assert!(status.message().contains(expected), "{sql}: {}", status.message());
    }

    wrong_parameters(&mut client).await;
    wrong_encodings(&cluster).await;

    execute(&mut client, "insert into t values(7, 1)").await.unwrap();
    for node in 0..3 {
        let rows = query(&mut cluster.client(node), "select count(*) from t").await.unwrap();
        assert_eq!(only_integer(&rows), 1);
    }
}

async fn wrong_parameters(client: &mut ReSqliteClient<Channel>) {
    let one = Value { kind: Some(Kind::Integer(1)) };
    let two_for_three = Statement {
        sql: "insert into t values(?, ? + ?)".into(),
        params: vec![one.clone(), one.clone()],
        ..Statement::default()
    };
    let unknown_name = Statement {
        sql: "insert into t values(:a, 1)".into(),
        named_params: [("b".to_owned(), one)].into(),
        ..Statement::default()
    };
    for wrong in [two_for_three, unknown_name] {
        let sql = wrong.sql.clone();
        let request = ExecuteRequest { statements: vec![wrong], ..ExecuteRequest::default() };
        let status = client.execute(request).await.expect_err(&sql);
        assert_eq!(status.code(), Code::InvalidArgument, "{sql}: {status:?}");
        assert!(status.message().contains("parameter"), "{sql}: {}", status.message());
    }
    let no_statement = client.execute(ExecuteRequest::default()).await.unwrap_err();
    assert_eq!(no_statement.code(), Code::InvalidArgument, "{no_statement:?}");
    let both = ExecuteRequest {
        statements: vec![statement("select 1")],
        script: "select 1".into(),
        ..ExecuteRequest::default()
    };
    assert_eq!(client.execute(both).await.unwrap_err().code(), Code::InvalidArgument);
    let write = QueryRequest { sql: "insert into t values(9, 9)".into(), ..QueryRequest::default() };
    let status = client.query(write).await.expect_err("a write is no query");
    assert_eq!(status.code(), Code::InvalidArgument, "{status:?}");
    assert!(status.message().contains("Execute"), "says what to do: {}", status.message());
}

async fn wrong_encodings(cluster: &Cluster) {
    // A larger message than the server takes: refused by its size, before it is read whole.
    let mut large = cluster.client(0).max_encoding_message_size(256 << 20);
    let status = large.run(RunRequest { sql: "x".repeat(80 << 20), ..RunRequest::default() }).await;
    let status = status.expect_err("too large a message");
    let codes = [Code::OutOfRange, Code::ResourceExhausted, Code::Cancelled, Code::Unknown];
    assert!(codes.contains(&status.code()), "{status:?}");

    // Invalid UTF-8 where the protocol has text: a client that speaks raw bytes can send it.
    let status = invalid_utf8(cluster).await;
    assert_eq!(status.code(), Code::InvalidArgument, "{status:?}");
    assert!(status.message().contains("UTF-8"), "{}", status.message());
}

/// Sends `QueryRequest { sql: "\xff\xfe" }` with a message type that has bytes where ours has a string.
async fn invalid_utf8(cluster: &Cluster) -> Status {
    #[derive(Clone, PartialEq, prost::Message)]
    struct RawQuery {
        #[prost(bytes = "vec", tag = "1")]
        sql: Vec<u8>,
    }
    let endpoint = Channel::from_shared(format!("http://{}", cluster.sql_address(0))).unwrap();
    let mut raw = tonic::client::Grpc::new(endpoint.connect().await.unwrap());
    raw.ready().await.unwrap();
    let codec = resqlite::codec::MessageCodec::<RawQuery, resqlite::api::QueryResponse>::default();
    let path = tonic::codegen::http::uri::PathAndQuery::from_static("/resqlite.v1.ReSqlite/Query");
    let request = tonic::Request::new(RawQuery { sql: vec![0xff, 0xfe] });
    match raw.server_streaming(request, path, codec).await {
        Err(status) => status,
        Ok(response) => response.into_inner().message().await.expect_err("invalid UTF-8 is refused"),
    }
}
