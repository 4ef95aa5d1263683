//! Those who mean harm, or whose client is broken: floods, dribbles, bombs and strangers, each while another client is
//! served.

use std::{
    fs::{self, File},
    future::Future,
    io,
    net::{Ipv4Addr, SocketAddr},
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use h2::client::SendRequest;
use resqlite::{
    api::{ExecuteRequest, RunRequest, Statement, re_sqlite_client::ReSqliteClient},
    codec::MessageCodec,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpSocket, TcpStream},
    process::{Child, Command},
    task::JoinSet,
    time::{sleep, timeout},
};
use tonic::{
    Code, Status,
    codegen::{
        Bytes,
        http::{HeaderMap, Method, Request},
    },
    transport::Channel,
};

use crate::{
    harness::{Cluster, DEADLINE, Daemon, eventually, execute, only_integer, program, query, statement},
    tls,
};

/// HTTP/2's beginning and an empty SETTINGS frame.
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";
/// No request of the client who is served may take longer, whatever the others do; much less than any hang.
const PATIENCE: Duration = Duration::from_secs(15);

/// Frames of HTTP/2 (RFC 9113, section 6).
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const CONTINUATION: u8 = 9;
const END_HEADERS: u8 = 4;
const REFUSED_STREAM: [u8; 4] = [0, 0, 0, 7];

/// One node, with more settings for sqlited.
async fn start(sqlited: &str) -> Cluster {
    let mut cluster = Cluster::prepare_with(1, "", sqlited);
    cluster.launch(0);
    cluster.wait_until_serving().await;
    execute(&mut cluster.client(0), "create table t(n integer primary key, x)").await.unwrap();
    cluster
}

/// Does `harm` while another client writes and reads, without a single failure; at least ten times, and for as long as
/// the harm is done.
async fn while_another_is_served<T>(cluster: &Cluster, harm: impl Future<Output = T>) -> T {
    let done = Arc::new(AtomicBool::new(false));
    let mut client = cluster.client(0);
    let served = tokio::spawn({
        let done = Arc::clone(&done);
        async move {
            let mut requests = 0;
            while requests < 10 || !done.load(Ordering::Relaxed) {
                let both = async {
                    execute(&mut client, "insert into t(x) values (1)").await?;
                    query(&mut client, "select count(*) from t").await
                };
                let rows = timeout(PATIENCE, both).await.expect("served in time").expect("served");
                requests += 1;
                assert_eq!(only_integer(&rows), requests);
            }
        }
    });
    let result = harm.await;
    done.store(true, Ordering::Relaxed);
    served.await.unwrap();
    execute(&mut cluster.client(0), "delete from t").await.expect("a newcomer is served");
    result
}

fn sql_address(cluster: &Cluster) -> SocketAddr {
    cluster.sql_address(0).parse().unwrap()
}

async fn connect(cluster: &Cluster) -> TcpStream {
    TcpStream::connect(sql_address(cluster)).await.unwrap()
}

/// Connections from one of the many addresses of loopback.
async fn connect_from(host: u8, to: SocketAddr) -> io::Result<TcpStream> {
    let socket = TcpSocket::new_v4()?;
    socket.bind(SocketAddr::from((Ipv4Addr::new(127, 0, 1, host), 0)))?;
    socket.connect(to).await
}

/// Until the other end closes the connection, by whatever means.
async fn until_closed(stream: &mut (impl AsyncReadExt + Unpin)) {
    let mut discarded = [0; 4096];
    let closed = async { while matches!(stream.read(&mut discarded).await, Ok(1..)) {} };
    timeout(DEADLINE, closed).await.expect("it is closed");
}

/// Sends a byte at a time until the other end has had enough.
async fn dribble(mut stream: TcpStream, bytes: Vec<u8>) {
    let (mut reading, mut writing) = stream.split();
    let dribbled = async {
        for byte in bytes.iter().cycle() {
            if writing.write_all(&[*byte]).await.is_err() {
                break;
            }
            sleep(Duration::from_millis(200)).await;
        }
    };
    tokio::select! {
        () = until_closed(&mut reading) => {}
        () = dribbled => {}
    }
}

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = (payload.len() as u32).to_be_bytes();
    let mut frame = vec![length[1], length[2], length[3], kind, flags];
    frame.extend(stream.to_be_bytes());
    frame.extend(payload);
    frame
}

fn refused(limit: &str) -> String {
    format!("resqlite_sql_refused_total{{limit=\"{limit}\"}}")
}

/// HTTP/2 without gRPC's manners.
async fn http2(cluster: &Cluster) -> SendRequest<Bytes> {
    let (client, connection) = h2::client::handshake(connect(cluster).await).await.unwrap();
    tokio::spawn(connection);
    client
}

/// The headers of an Execute call.
fn execute_headers() -> Request<()> {
    let uri = "http://node/resqlite.v1.ReSqlite/Execute";
    let request = Request::builder().method(Method::POST).uri(uri).header("te", "trailers");
    request.header("content-type", "application/grpc").body(()).unwrap()
}

/// A message's beginning: uncompressed, and of such a length.
fn prefix(length: u32) -> Vec<u8> {
    [&[0][..], &length.to_be_bytes()].concat()
}

/// The status of a call that sends this and then no more, or ends there.
async fn call(client: SendRequest<Bytes>, request: Request<()>, body: Vec<u8>, ends: bool) -> (Code, String) {
    let mut client = client.ready().await.unwrap();
    let (response, mut sender) = client.send_request(request, false).unwrap();
    sender.send_data(body.into(), ends).unwrap();
    let answered = async {
        let (head, mut body) = response.await.unwrap().into_parts();
        while let Some(data) = body.data().await {
            data.unwrap();
        }
        status(&head.headers).or(status(&body.trailers().await.unwrap().unwrap_or_default()))
    };
    timeout(DEADLINE, answered).await.expect("it is answered").expect("a status")
}

fn status(headers: &HeaderMap) -> Option<(Code, String)> {
    let code: i32 = headers.get("grpc-status")?.to_str().ok()?.parse().ok()?;
    let message = headers.get("grpc-message").map(|message| message.to_str().unwrap().to_owned());
    Some((Code::from(code), message.unwrap_or_default().replace("%20", " ")))
}

#[tokio::test(flavor = "multi_thread")]
async fn ten_thousand_idle_connections_keep_nobody_out() {
    let cluster = start("").await;
    let descriptors = resqlite::daemon::raise_descriptor_limit();
    assert!(
        descriptors > 11_000,
        "this test needs 11,000 file descriptors, and may have {descriptors}: ulimit -Hn"
    );
    let streams: Vec<TcpStream> = while_another_is_served(&cluster, async {
        let mut idle = JoinSet::new();
        for host in 1..=20 {
            let to = sql_address(&cluster);
            idle.spawn(async move {
                let mut streams = Vec::new();
                for number in 0..500 {
                    let mut stream = connect_from(host, to).await.unwrap();
                    if number % 2 == 0 {
                        // It may have had to give way already.
                        let _ = stream.write_all(PREFACE).await;
                    }
                    streams.push(stream);
                }
                streams
            });
        }
        idle.join_all().await.into_iter().flatten().collect()
    })
    .await;
    assert_eq!(streams.len(), 10_000);
    // Those who said nothing give way first: to others, or, where all of this takes longer, to time.
    eventually("the silent ones are closed again", || async {
        let open = cluster.metric(0, Daemon::Sqlited, "resqlite_sql_connections").await;
        assert!(open <= 4_096.0, "{open} connections");
        let mut closed = 0.0;
        for limit in ["connections", "first_bytes_seconds"] {
            closed += cluster.metric(0, Daemon::Sqlited, &refused(limit)).await;
        }
        (closed >= 5_000.0).then_some(())
    })
    .await;
    drop(streams);
    eventually("the seats are free again", || async {
        let open = cluster.metric(0, Daemon::Sqlited, "resqlite_sql_connections").await;
        (open < 100.0).then_some(())
    })
    .await;
    // All of one address: it takes away from its own only.
    while_another_is_served(&cluster, async {
        let mut more = Vec::new();
        for _ in 0..1_100 {
            let mut stream = connect_from(99, sql_address(&cluster)).await.unwrap();
            let _ = stream.write_all(PREFACE).await;
            more.push(stream);
        }
        eventually("one address has its limit", || async {
            let refused = cluster.metric(0, Daemon::Sqlited, &refused("connections_per_address")).await;
            (refused >= 76.0).then_some(())
        })
        .await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flood_at_the_raft_port_takes_no_peer_its_connection() {
    let cluster = Cluster::start(3).await;
    execute(&mut cluster.client(0), "create table t(n integer primary key, x)").await.unwrap();
    let leader = cluster.leader().await;
    let term = cluster.metric(leader, Daemon::Raftd, "resqlite_raft_term").await;
    while_another_is_served(&cluster, async {
        let mut idle = Vec::new();
        for node in 0..3 {
            let to: SocketAddr = tls::raft_address(&cluster, node).parse().unwrap();
            for number in 0..700 {
                idle.push(connect_from(1 + (number % 7) as u8, to).await.unwrap());
            }
            // They say nothing, and give way: to others, or, where all of this takes longer, to time.
            eventually("the raft port closes what is too much", || async {
                let open = cluster.metric(node, Daemon::Raftd, "resqlite_raft_connections").await;
                assert!(open <= 512.0, "{open} connections");
                let mut closed = 0.0;
                for limit in ["connections", "first_bytes_seconds"] {
                    let series = format!("resqlite_raft_connections_refused_total{{limit=\"{limit}\"}}");
                    closed += cluster.metric(node, Daemon::Raftd, &series).await;
                }
                (closed >= 180.0).then_some(())
            })
            .await;
        }
    })
    .await;
    assert_eq!(cluster.metric(leader, Daemon::Raftd, "resqlite_raft_term").await, term, "no election");
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_dribbles_is_cut_off() {
    let cluster = start("limits: { first_bytes_seconds: 2, idle_seconds: 3, request_seconds: 2 }").await;
    let headers = [PREFACE, &frame(HEADERS, 0, 1, &[0x83])].concat();
    while_another_is_served(&cluster, async {
        let mut slow = JoinSet::new();
        for _ in 0..50 {
            // The beginning of HTTP/2.
            let stream = connect(&cluster).await;
            slow.spawn(dribble(stream, PREFACE.to_vec()));
            // The headers of a request, which never end.
            let mut stream = connect(&cluster).await;
            stream.write_all(&headers).await.unwrap();
            slow.spawn(dribble(stream, frame(CONTINUATION, 0, 1, &[0x84])));
        }
        // A request's body.
        for _ in 0..50 {
            let (client, request) = (http2(&cluster).await, execute_headers());
            slow.spawn(async move {
                let (code, message) = call(client, request, prefix(1_000), false).await;
                assert_eq!(code, Code::DeadlineExceeded, "{message}");
                assert!(message.contains("request_seconds"), "{message}");
            });
        }
        timeout(DEADLINE, slow.join_all()).await.expect("all of them are cut off");
    })
    .await;
    for limit in ["first_bytes_seconds", "idle_seconds", "request_seconds"] {
        let count = cluster.metric(0, Daemon::Sqlited, &refused(limit)).await;
        assert!(count >= 50.0, "{limit}: {count}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_handshake_that_dribbles_is_cut_off() {
    let mut cluster = tls::prepare_with(1, "limits: { first_bytes_seconds: 2 }");
    cluster.launch(0);
    cluster.wait_until_serving().await;
    execute(&mut cluster.client(0), "create table t(n integer primary key, x)").await.unwrap();
    while_another_is_served(&cluster, async {
        let mut slow = JoinSet::new();
        for _ in 0..50 {
            let stream = connect(&cluster).await;
            // The header of a record that holds a ClientHello, and the hello's.
            slow.spawn(dribble(stream, vec![0x16, 3, 1, 2, 0, 1, 0, 1, 0xfc, 3, 3]));
        }
        timeout(DEADLINE, slow.join_all()).await.expect("all of them are cut off");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_half_open_connection_is_noticed() {
    let cluster = start("").await;
    let mut gone = connect(&cluster).await;
    gone.write_all(PREFACE).await.unwrap();
    // It answers nothing from now on, no ping either, as a host does that has lost its power.
    let began = Instant::now();
    while_another_is_served(&cluster, until_closed(&mut gone)).await;
    assert!(began.elapsed() < Duration::from_secs(25), "{:?}", began.elapsed());
}

#[tokio::test(flavor = "multi_thread")]
async fn frames_and_bytes_that_make_no_sense_end_their_connection_and_nothing_else() {
    let cluster = start("").await;
    let random: Vec<u8> = (0..4_096_u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    // A frame of 16 MiB, of which a part comes: more than anybody has allowed.
    let huge = [PREFACE, &[0xff, 0xff, 0xff, 0, 0, 0, 0, 0, 1], &[0; 32 << 10]].concat();
    let settings = [PREFACE, &frame(4, 0, 0, &[0; 7])].concat();
    // More headers than may be, none of which is a literal that ends.
    let headers =
        [PREFACE, &frame(HEADERS, 0, 1, &[0x83]), &frame(CONTINUATION, 0, 1, &[0x83; 16 << 10]).repeat(64)];
    let http1 =
        b"POST /resqlite.v1.ReSqlite/Execute HTTP/1.1\r\nhost: node\r\ncontent-length: 9\r\n\r\n".to_vec();
    while_another_is_served(&cluster, async {
        for bytes in [random, huge, settings, headers.concat(), http1] {
            for _ in 0..20 {
                let mut stream = connect(&cluster).await;
                let (mut reading, mut writing) = stream.split();
                // It may be refused before all of it is sent.
                let send = async {
                    let _ = writing.write_all(&bytes).await;
                    let _ = writing.shutdown().await;
                };
                tokio::join!(send, until_closed(&mut reading));
            }
        }
    })
    .await;
    let peak = cluster.peak_resident_bytes(0, Daemon::Sqlited);
    assert!(peak < 256 << 20, "{peak} bytes");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_compressed_message_is_refused_so_there_are_no_bombs() {
    let cluster = start("").await;
    while_another_is_served(&cluster, async {
        let client = http2(&cluster).await;
        for encoding in ["gzip", "deflate", "zstd"] {
            let mut request = execute_headers();
            request.headers_mut().insert("grpc-encoding", encoding.parse().unwrap());
            // "Compressed", and what would be gzip's beginning.
            let body = [&[1, 0, 0, 0, 10, 0x1f, 0x8b, 8][..], &[0; 7]].concat();
            let (code, message) = call(client.clone(), request, body, true).await;
            assert_eq!(code, Code::Unimplemented, "{encoding}: {message}");
        }
        // Compressed without saying how.
        let (code, message) =
            call(client, execute_headers(), [&[1, 0, 0, 0, 1][..], &[0]].concat(), true).await;
        assert_eq!(code, Code::Internal, "{message}");
    })
    .await;
}

/// `ExecuteRequest`, whose statements are empty elements of two bytes each.
#[derive(Clone, PartialEq, prost::Message)]
struct Swollen {
    #[prost(bytes = "vec", repeated, tag = "1")]
    statements: Vec<Vec<u8>>,
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_that_would_swell_in_memory_or_is_too_large_is_refused() {
    let cluster = start("").await;
    while_another_is_served(&cluster, async {
        // 4 GiB are announced: it does not take a byte of them to be refused.
        let (code, message) = call(http2(&cluster).await, execute_headers(), prefix(u32::MAX), false).await;
        assert_eq!(code, Code::OutOfRange, "{message}");

        let endpoint = Channel::from_shared(format!("http://{}", cluster.sql_address(0))).unwrap();
        let mut raw = tonic::client::Grpc::new(endpoint.connect().await.unwrap());
        raw.ready().await.unwrap();
        let path = tonic::codegen::http::uri::PathAndQuery::from_static("/resqlite.v1.ReSqlite/Execute");
        let codec = MessageCodec::<Swollen, resqlite::api::ExecuteResponse>::default();
        let swollen = Swollen { statements: vec![Vec::new(); 4 << 20] };
        let status = raw.unary(tonic::Request::new(swollen), path, codec).await.unwrap_err();
        assert_eq!(status.code(), Code::ResourceExhausted, "{status}");
        assert!(status.message().contains("split the request"), "{status}");
    })
    .await;
    let peak = cluster.peak_resident_bytes(0, Daemon::Sqlited);
    assert!(peak < 256 << 20, "{peak} bytes");
}

#[tokio::test(flavor = "multi_thread")]
async fn statements_and_parameters_have_a_bound_that_is_named() {
    let cluster = start("").await;
    while_another_is_served(&cluster, async {
        let mut client: ReSqliteClient<Channel> = cluster.client(0);
        let many =
            ExecuteRequest { statements: vec![statement("select 1"); 200_001], ..ExecuteRequest::default() };
        let status = client.execute(many).await.unwrap_err();
        assert_eq!(status.code(), Code::ResourceExhausted);
        assert!(status.message().contains("200001 statements, the limit is 200000: split it"), "{status}");
        let parameters = Statement {
            sql: "select ?".into(),
            params: vec![resqlite::api::Value::default(); 32_767],
            ..Statement::default()
        };
        let request = ExecuteRequest { statements: vec![parameters], ..ExecuteRequest::default() };
        let status = client.execute(request).await.unwrap_err();
        assert_eq!(status.code(), Code::ResourceExhausted);
        assert!(status.message().contains("32767 parameters, the limit is 32766"), "{status}");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn more_streams_than_a_connection_may_have_are_refused() {
    let cluster = start("limits: { streams_per_connection: 100 }").await;
    while_another_is_served(&cluster, async {
        let mut stream = connect(&cluster).await;
        // POST, http, and two literals (RFC 7541, section 6.2.2): an Execute that waits for its message, which never comes.
        let (path, kind) = ("/resqlite.v1.ReSqlite/Execute", "application/grpc");
        let literals =
            [&[0x04, path.len() as u8], path.as_bytes(), &[0x0f, 0x10, kind.len() as u8], kind.as_bytes()];
        let headers = [&[0x83, 0x86][..], &literals.concat()].concat();
        let opened = (0..300).flat_map(|n| frame(HEADERS, END_HEADERS, 2 * n + 1, &headers));
        let bytes: Vec<u8> = PREFACE.iter().copied().chain(opened).collect();
        stream.write_all(&bytes).await.unwrap();
        let count_refused = async {
            let mut refused = 0;
            while refused < 200 {
                let mut head = [0; 9];
                stream.read_exact(&mut head).await.unwrap();
                let length = u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize;
                let mut payload = vec![0; length];
                stream.read_exact(&mut payload).await.unwrap();
                refused += usize::from(head[3] == RST_STREAM && payload == REFUSED_STREAM);
            }
        };
        timeout(DEADLINE, count_refused).await.expect("those that are too many are refused");
        let under_way = cluster.metric(0, Daemon::Sqlited, "resqlite_sql_requests_under_way").await;
        assert!(under_way >= 100.0, "{under_way} calls, and the others wait for theirs");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn parts_of_requests_share_one_bound_and_the_oldest_gives_way() {
    const BOUND: f64 = (4 << 20) as f64;
    let limits = "max_request_bytes: 1048576\nlimits: { request_bytes: 4194304, calls: 300 }";
    let cluster = start(limits).await;
    let before = cluster.peak_resident_bytes(0, Daemon::Sqlited);
    while_another_is_served(&cluster, async {
        let mut parts = JoinSet::new();
        for _ in 0..20 {
            let client = http2(&cluster).await;
            for _ in 0..40 {
                let (client, request) = (client.clone(), execute_headers());
                let body = [prefix(1_000_000), vec![0; 60_000]].concat();
                parts.spawn(call(client, request, body, false));
            }
            let held = cluster.metric(0, Daemon::Sqlited, "resqlite_sql_request_bytes").await;
            assert!(held <= BOUND, "{held} bytes");
        }
        // Of 800 parts, with 48 MB together, no more stay than there is room for; those that give way are told so.
        for _ in 0..700 {
            let (code, message) = parts.join_next().await.expect("one gave way").unwrap();
            assert_eq!(code, Code::ResourceExhausted, "{message}");
            assert!(message.contains("gave way to others"), "{message}");
        }
        // And of calls that have said nothing but that they are one.
        let client = http2(&cluster).await;
        for _ in 0..400 {
            parts.spawn(call(client.clone(), execute_headers(), prefix(1_000_000), false));
        }
        for _ in 0..100 {
            let (code, message) = parts.join_next().await.expect("one gave way").unwrap();
            assert_eq!(code, Code::ResourceExhausted, "{message}");
        }
    })
    .await;
    for limit in ["request_bytes", "calls"] {
        assert!(cluster.metric(0, Daemon::Sqlited, &refused(limit)).await > 0.0, "{limit}");
    }
    let grown = cluster.peak_resident_bytes(0, Daemon::Sqlited) - before;
    assert!(grown < 64 << 20, "{grown} bytes");
    eventually("what is gone holds nothing", || async {
        (cluster.metric(0, Daemon::Sqlited, "resqlite_sql_request_bytes").await == 0.0).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_raftd_of_another_cluster_is_refused_although_its_certificate_is_right() {
    let mut cluster = tls::prepare_with(3, "");
    for node in 0..3 {
        cluster.launch(node);
    }
    cluster.wait_until_serving().await;
    execute(&mut cluster.client(0), "create table t(n integer primary key, x)").await.unwrap();
    cluster.kill(2, Daemon::Raftd);
    cluster.kill(2, Daemon::Sqlited);
    // In node 3's place, with its certificate, comes a raftd of a cluster of the same name that has a fourth member.
    let directory = cluster.path().join("node3");
    let file = directory.join("resqlite.yaml");
    let config = fs::read_to_string(&file).unwrap();
    let fourth = "    - { id: 4, raft: \"127.0.0.1:1\", sql: \"127.0.0.1:2\" }\nraftd:\n";
    fs::write(&file, config.replacen("raftd:\n", fourth, 1)).unwrap();
    fs::remove_dir_all(directory.join("raft")).unwrap();
    while_another_is_served(&cluster, async {
        let mut stranger = raftd_alone(&directory);
        eventually("it is refused by the members", || async {
            let refuses = |node: usize| {
                let log = fs::read_to_string(cluster.path().join(format!("node{node}/raftd.log"))).unwrap();
                log.contains("node 3 belongs to another cluster")
            };
            (refuses(1) && refuses(2)).then_some(())
        })
        .await;
        stranger.kill().await.unwrap();
    })
    .await;
}

/// A raftd that dies with the test.
fn raftd_alone(directory: &Path) -> Child {
    let mut command = Command::new(program("raftd"));
    command.arg("--config").arg(directory.join("resqlite.yaml")).kill_on_drop(true);
    command.stderr(File::create(directory.join("stranger.log")).unwrap()).spawn().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn no_sql_reaches_a_file_of_the_host_or_the_schema_table() {
    let cluster = start("").await;
    let out = cluster.path().join("out");
    let out = out.to_str().unwrap();
    let library = cluster.path().join("evil.so");
    fs::write(&library, "x").unwrap();
    let library = library.to_str().unwrap();
    let attempts = [
        format!("vacuum into '{out}'"),
        format!("attach '{out}' as other"),
        format!("select load_extension('{library}')"),
        format!("select writefile('{out}', 'x')"),
        "select readfile('/etc/hostname')".to_owned(),
        format!("create virtual table v using csv(filename = '{library}')"),
        "create virtual table v using dbstat(main)".to_owned(),
        format!("pragma temp_store_directory = '{out}'"),
        "pragma writable_schema = on".to_owned(),
        "pragma trusted_schema = on".to_owned(),
        "update sqlite_schema set sql = 'x'".to_owned(),
        "delete from sqlite_schema".to_owned(),
        "insert into f_data values (1, x'00')".to_owned(),
        "select state from _resqlite_users".to_owned(),
        "select * from w".to_owned(),
    ];
    for sql in ["create virtual table f using fts5(x)", "create view w as select * from _resqlite_users"] {
        execute(&mut cluster.client(0), sql).await.unwrap();
    }
    while_another_is_served(&cluster, async {
        let mut client = cluster.client(0);
        for sql in &attempts {
            execute(&mut client, sql).await.expect_err(sql);
            query(&mut client, sql).await.expect_err(sql);
            let begun = client.begin(resqlite::api::BeginRequest::default()).await.unwrap().into_inner();
            let transaction = begun.transaction;
            let request = resqlite::api::QueryRequest { sql: sql.clone(), transaction, ..Default::default() };
            let answered = match client.query(request).await {
                Err(status) => Err(status),
                Ok(rows) => rows.into_inner().message().await,
            };
            answered.expect_err(sql);
            let script = RunRequest { sql: sql.clone(), ..Default::default() };
            run(&mut client, script).await.expect_err(sql);
        }
        // A view that was made to be looked at by somebody who trusts it.
        execute(&mut client, "create view v as select fts3_tokenizer('simple') as x").await.ok();
        query(&mut client, "select x from v").await.expect_err("no tokenizer by name");
    })
    .await;
    assert!(!Path::new(out).exists());
}

/// A script to its end.
async fn run(client: &mut ReSqliteClient<Channel>, script: RunRequest) -> Result<(), Status> {
    let mut events = client.run(script).await?.into_inner();
    while events.message().await?.is_some() {}
    Ok(())
}

#[test]
fn no_request_names_a_file_of_the_server() {
    // What a backup is written to, and a restore read from, is the client's own business: the server is told no name.
    let proto =
        fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/proto/resqlite/v1/sql.proto")).unwrap();
    for message in ["BackupRequest", "RestoreRequest", "RestoreBegin", "RestoreEnd"] {
        let body = proto.split(&format!("message {message} {{")).nth(1).expect(message);
        let body = body.split("\n}").next().unwrap();
        assert!(!body.contains("string "), "{message} holds a text: {body}");
    }
}
