//! Who is let in, and who is not: clusters whose connections are all TLS, and those who try them.
//!
//! The certificates are made by `resqlite cert`, as a user makes them; only those that it would
//! not make (expired ones) are made here.

use std::{
    fs, io,
    net::TcpStream as StdTcpStream,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
};

use rcgen::{CertificateParams, DnType, ExtendedKeyUsagePurpose, Issuer, KeyPair};
use resqlite::{
    api::{PeerMessage, raft_service_client::RaftServiceClient},
    config::Address,
    tls::{
        ClientTls, Dial, Reloading, ServerName,
        clients::ClientTlsFiles,
        files,
        names::{NodeName, Subject},
    },
};
use time::{Duration, OffsetDateTime};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};
use tokio_rustls::TlsConnector;
use tonic::Code;

use crate::harness::{Cluster, DEADLINE, Daemon, eventually, execute, program, query};

const RAFTD: &str =
    "tls: { ca: $NODE/../ca/ca.crt, certificate: $NODE/tls/peer.crt, key: $NODE/tls/peer.key }";
const SQLITED: &str =
    "tls: { certificate: $NODE/tls/sql.crt, key: $NODE/tls/sql.key, client_ca: $NODE/../ca/ca.crt }";

fn resqlite(arguments: &[&str]) -> Output {
    Command::new(program("resqlite")).args(arguments).stdin(Stdio::null()).output().unwrap()
}

fn cert(arguments: &[&str]) {
    let output = resqlite(&[&["cert"], arguments].concat());
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// An authority in `directory`/ca, and the client's certificate of `user` in `directory`/`user`.
fn authority(directory: &Path, user: &str) -> ClientTlsFiles {
    let (ca, out) = (directory.join("ca"), directory.join(user));
    cert(&["init", "--out", ca.to_str().unwrap()]);
    client_files(&ca, &out, user)
}

fn client_files(ca: &Path, out: &Path, user: &str) -> ClientTlsFiles {
    cert(&["client", "--ca-dir", ca.to_str().unwrap(), "--name", user, "--out", out.to_str().unwrap()]);
    let file = |ending: &str| out.join(format!("{user}.{ending}"));
    ClientTlsFiles::new(ca.join("ca.crt")).identity(file("crt"), file("key"))
}

fn node_files(ca: &Path, out: &Path, cluster: &str, id: usize) {
    let (ca, out, id) = (ca.to_str().unwrap(), out.to_str().unwrap(), id.to_string());
    let host = ["--host", "127.0.0.1", "--host", "localhost"];
    cert(&[&["node", "--ca-dir", ca, "--cluster", cluster, "--id", &id, "--out", out][..], &host].concat());
}

/// A cluster that is all TLS, with certificates, not started.
fn prepare(size: usize) -> Cluster {
    prepare_with(size, "")
}

/// The same, with more settings for sqlited.
pub fn prepare_with(size: usize, sqlited: &str) -> Cluster {
    let mut cluster = Cluster::prepare_with(size, RAFTD, &format!("{SQLITED}\n{sqlited}"));
    cluster.trusted = Some(authority(cluster.path(), "alice"));
    for node in 0..size {
        node_files(&ca(&cluster), &tls_directory(&cluster, node), "test", node + 1);
    }
    cluster
}

async fn start(size: usize) -> Cluster {
    let mut cluster = prepare(size);
    for node in 0..size {
        cluster.launch(node);
    }
    cluster.wait_until_serving().await;
    cluster
}

fn ca(cluster: &Cluster) -> PathBuf {
    cluster.path().join("ca")
}

fn tls_directory(cluster: &Cluster, node: usize) -> PathBuf {
    cluster.path().join(format!("node{}/tls", node + 1))
}

fn peer_files(cluster: &Cluster, node: usize) -> ClientTlsFiles {
    let directory = tls_directory(cluster, node);
    ClientTlsFiles::new(ca(cluster).join("ca.crt"))
        .identity(directory.join("peer.crt"), directory.join("peer.key"))
}

/// A certificate that has expired an hour ago, signed by the cluster's authority.
fn expired(cluster: &Cluster, host: &str) -> ClientTlsFiles {
    let read = |name: &str| fs::read_to_string(ca(cluster).join(name)).unwrap();
    let issuer =
        Issuer::from_ca_cert_pem(&read("ca.crt"), KeyPair::from_pem(&read("ca.key")).unwrap()).unwrap();
    let mut params = CertificateParams::new([host.to_owned()]).unwrap();
    params.distinguished_name.push(DnType::CommonName, "alice");
    params.extended_key_usages =
        vec![ExtendedKeyUsagePurpose::ClientAuth, ExtendedKeyUsagePurpose::ServerAuth];
    params.not_before = OffsetDateTime::now_utc() - Duration::days(2);
    params.not_after = OffsetDateTime::now_utc() - Duration::hours(1);
    let key = KeyPair::generate().unwrap();
    let (certificate_file, key_file) =
        (cluster.path().join("expired.crt"), cluster.path().join("expired.key"));
    fs::write(&certificate_file, params.signed_by(&key, &issuer).unwrap().pem()).unwrap();
    fs::write(&key_file, key.serialize_pem()).unwrap();
    fs::set_permissions(&key_file, fs::Permissions::from_mode(0o600)).unwrap();
    ClientTlsFiles::new(ca(cluster).join("ca.crt")).identity(certificate_file, key_file)
}

/// Shakes hands, and returns the certificate that the server shows once it has accepted ours:
/// only then does it speak HTTP/2.
async fn shake(address: &str, name: &str, files: ClientTlsFiles) -> io::Result<Subject> {
    let config = Reloading::<ClientTls>::load(files).unwrap().current().client.clone();
    let stream = TcpStream::connect(address).await?;
    let name = ServerName::try_from(name.to_owned()).unwrap();
    let mut stream = TlsConnector::from(config).connect(name, stream).await?;
    match stream.read(&mut [0]).await? {
        0 => Err(io::ErrorKind::UnexpectedEof.into()),
        _ => {
            let shown = stream.get_ref().1.peer_certificates().unwrap();
            Ok(Subject::of(&shown[0]).unwrap())
        }
    }
}

async fn shake_sql(cluster: &Cluster, files: ClientTlsFiles) -> io::Result<Subject> {
    shake(cluster.sql_address(0), "127.0.0.1", files).await
}

async fn shake_raft(cluster: &Cluster, files: ClientTlsFiles) -> io::Result<Subject> {
    shake(&raft_address(cluster, 0), "node-1.test.resqlite", files).await
}

pub fn raft_address(cluster: &Cluster, node: usize) -> String {
    let config = fs::read_to_string(cluster.path().join(format!("node{}/resqlite.yaml", node + 1))).unwrap();
    let config = resqlite::config::Config::parse(&config, "test").unwrap();
    config.raftd.listen.to_string()
}

fn log(cluster: &Cluster, node: usize, daemon: &str) -> String {
    fs::read_to_string(cluster.path().join(format!("node{}/{daemon}.log", node + 1))).unwrap()
}

async fn until_logged(cluster: &Cluster, daemon: &str, words: &[&str]) {
    eventually(&format!("{daemon} says {words:?}"), || async {
        log(cluster, 0, daemon).lines().any(|line| words.iter().all(|word| line.contains(word))).then_some(())
    })
    .await;
}

fn refusal(outcome: io::Result<Subject>) -> String {
    outcome.expect_err("it must be refused").to_string()
}

/// The command line against the first node, with these options.
fn shell(cluster: &Cluster, options: &[&str]) -> Output {
    resqlite(&[&["shell", "--endpoints", cluster.sql_address(0), "-c", "select 41 + 1"], options].concat())
}

#[tokio::test]
async fn a_cluster_serves_over_mutual_tls() {
    let cluster = start(3).await;
    execute(&mut cluster.client(0), "create table t(a)").await.unwrap();
    execute(&mut cluster.client(1), "insert into t values (7)").await.unwrap();
    for node in 0..3 {
        assert_eq!(query(&mut cluster.client(node), "select a from t").await.unwrap().len(), 1);
    }
    let at = |path: &str| cluster.path().join(path).to_str().unwrap().to_owned();
    let (ca, cert, key) = (at("ca/ca.crt"), at("alice/alice.crt"), at("alice/alice.key"));
    let output = shell(&cluster, &["--ca", &ca, "--cert", &cert, "--key", &key]);
    assert_eq!(
        String::from_utf8_lossy(&output.stdout),
        "42\n",
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
}

#[tokio::test]
async fn a_client_without_a_certificate_is_refused() {
    let cluster = start(1).await;
    let ca = ca(&cluster).join("ca.crt");
    let message = refusal(shake_sql(&cluster, ClientTlsFiles::new(&ca)).await);
    assert!(message.contains("CertificateRequired"), "{message}");
    let output = shell(&cluster, &["--ca", ca.to_str().unwrap()]);
    assert!(!output.status.success() && output.stdout.is_empty(), "{output:?}");
}

#[tokio::test]
async fn a_client_of_another_authority_is_refused() {
    let cluster = start(1).await;
    let elsewhere = tempfile::tempdir().unwrap();
    let stranger = authority(elsewhere.path(), "alice");
    // It trusts our servers; only its own certificate is from elsewhere.
    let stranger = ClientTlsFiles { ca: ca(&cluster).join("ca.crt"), ..stranger };
    for outcome in [shake_sql(&cluster, stranger.clone()).await, shake_raft(&cluster, stranger).await] {
        let message = refusal(outcome);
        // Both authorities have the same name; the signature does not fit.
        assert!(message.contains("DecryptError"), "{message}");
    }
}

#[tokio::test]
async fn a_server_of_another_authority_is_not_believed() {
    let cluster = start(1).await;
    let elsewhere = tempfile::tempdir().unwrap();
    let deceived = authority(elsewhere.path(), "alice");
    for outcome in [shake_sql(&cluster, deceived.clone()).await, shake_raft(&cluster, deceived).await] {
        let message = refusal(outcome);
        assert!(message.contains("UnknownIssuer") || message.contains("BadSignature"), "{message}");
    }
}

#[tokio::test]
async fn a_server_under_another_name_is_not_believed() {
    let cluster = start(1).await;
    let message = refusal(shake(cluster.sql_address(0), "db1.example.org", alice(&cluster)).await);
    assert!(message.contains("not valid for name"), "{message}");
}

fn alice(cluster: &Cluster) -> ClientTlsFiles {
    cluster.trusted.clone().unwrap()
}

#[tokio::test]
async fn an_expired_certificate_is_refused() {
    let cluster = start(1).await;
    let client = refusal(shake_sql(&cluster, expired(&cluster, "alice.example.org")).await);
    assert!(client.contains("CertificateExpired"), "{client}");
    let peer = refusal(shake_raft(&cluster, expired(&cluster, "node-1.test.resqlite")).await);
    assert!(peer.contains("CertificateExpired"), "{peer}");
}

#[tokio::test]
async fn a_clients_certificate_does_not_open_the_raft_port() {
    let cluster = start(1).await;
    shake_sql(&cluster, alice(&cluster)).await.expect("it is good for what it was made for");
    refusal(shake_raft(&cluster, alice(&cluster)).await);
    until_logged(&cluster, "raftd", &["a TLS handshake failed", "the certificate names no node"]).await;
}

#[tokio::test]
async fn nobody_without_a_certificate_opens_the_raft_port() {
    let cluster = start(1).await;
    let message = refusal(shake_raft(&cluster, ClientTlsFiles::new(ca(&cluster).join("ca.crt"))).await);
    assert!(message.contains("CertificateRequired"), "{message}");
}

#[tokio::test]
async fn a_peers_certificate_does_not_open_the_sql_port() {
    let cluster = start(1).await;
    shake_raft(&cluster, peer_files(&cluster, 0)).await.expect("it is good for what it was made for");
    refusal(shake_sql(&cluster, peer_files(&cluster, 0)).await);
    until_logged(&cluster, "sqlited", &["node-1.test.resqlite is a peer, not a client"]).await;
}

#[tokio::test]
async fn a_node_of_no_member_and_of_another_cluster_is_refused() {
    let cluster = start(1).await;
    for (name, id) in [("test", 9), ("other", 1)] {
        let directory = cluster.path().join(format!("{name}-{id}"));
        node_files(&ca(&cluster), &directory, name, id);
        let files = ClientTlsFiles::new(ca(&cluster).join("ca.crt"))
            .identity(directory.join("peer.crt"), directory.join("peer.key"));
        refusal(shake_raft(&cluster, files).await);
        let dns_name = NodeName { cluster: name.into(), id: id as u64 }.dns_name();
        let words = format!("{dns_name} is not a member of this cluster");
        // The log takes a line a second; until then the attempt is repeated.
        eventually("the refusal is logged", || async {
            let directory = cluster.path().join(format!("{name}-{id}"));
            let files = ClientTlsFiles::new(ca(&cluster).join("ca.crt"))
                .identity(directory.join("peer.crt"), directory.join("peer.key"));
            refusal(shake_raft(&cluster, files).await);
            log(&cluster, 0, "raftd").contains(&words).then_some(())
        })
        .await;
    }
}

#[tokio::test]
async fn a_node_that_speaks_in_anothers_name_is_refused() {
    let cluster = start(3).await;
    let tls = Reloading::<ClientTls>::load(peer_files(&cluster, 2)).unwrap();
    let name = ServerName::try_from("node-1.test.resqlite").unwrap();
    let address: Address = raft_address(&cluster, 0).parse().unwrap();
    let dial = Dial::tls(address, name, move || tls.current().client.clone()).unwrap();
    let mut client = RaftServiceClient::new(dial.connect().await.unwrap());
    let message = PeerMessage { from: 2, to: 1, ..PeerMessage::default() };
    let status = client.request_vote(message).await.unwrap_err();
    assert_eq!(status.code(), Code::PermissionDenied);
    assert!(status.message().contains("a message of node 2 came with the certificate of node 3"), "{status}");
}

#[tokio::test]
async fn a_node_is_called_only_by_the_name_of_the_one_that_is_there() {
    let mut cluster = prepare(3);
    // Node 1 looks for node 2 where node 3 is, and for node 3 where node 2 is.
    let file = cluster.path().join("node1/resqlite.yaml");
    let (second, third) = (raft_address(&cluster, 1), raft_address(&cluster, 2));
    let config = fs::read_to_string(&file).unwrap();
    let config = config.replace(&second, "second").replace(&third, &second).replace("second", &third);
    fs::write(&file, config).unwrap();
    for node in 0..3 {
        cluster.launch(node);
    }
    until_logged(&cluster, "raftd", &["this is node-3.test.resqlite, not node-2.test.resqlite"]).await;
    until_logged(&cluster, "raftd", &["this is node-2.test.resqlite, not node-3.test.resqlite"]).await;
}

#[tokio::test]
async fn a_daemon_does_not_start_with_a_certificate_that_cannot_be_its_own() {
    let mut cluster = prepare(2);
    let other = tls_directory(&cluster, 1);
    let own = tls_directory(&cluster, 0);
    for name in ["peer.crt", "peer.key"] {
        fs::copy(other.join(name), own.join(name)).unwrap();
    }
    fs::copy(other.join("sql.key"), own.join("sql.key")).unwrap();
    for (daemon, words) in [
        (Daemon::Raftd, "tls/peer.crt: this certificate must name node-1.test.resqlite and no other node"),
        (Daemon::Sqlited, "tls/sql.key: "),
    ] {
        cluster.launch_daemon(0, daemon);
        assert_eq!(cluster.wait(0, daemon).code(), Some(78));
        let name = if daemon == Daemon::Raftd { "raftd" } else { "sqlited" };
        let said = log(&cluster, 0, name);
        assert!(said.contains(words), "{said}");
    }
    fs::set_permissions(own.join("sql.key"), fs::Permissions::from_mode(0o644)).unwrap();
    cluster.launch_daemon(0, Daemon::Sqlited);
    assert_eq!(cluster.wait(0, Daemon::Sqlited).code(), Some(78));
    assert!(
        log(&cluster, 0, "sqlited").contains("everybody on this host may use this private key (mode 0644)")
    );
}

#[tokio::test]
async fn plain_text_to_a_tls_port_is_refused() {
    let cluster = start(1).await;
    let output = shell(&cluster, &[]);
    assert!(!output.status.success() && output.stdout.is_empty(), "{output:?}");
    until_logged(&cluster, "sqlited", &["a TLS handshake failed", "it speaks plain text?"]).await;
    let mut stream = TcpStream::connect(raft_address(&cluster, 0)).await.unwrap();
    stream.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await.unwrap();
    let mut answer = Vec::new();
    // An alert, and the end: or the end at once, by a reset.
    let _ = tokio::time::timeout(DEADLINE, stream.read_to_end(&mut answer)).await.expect("it is closed");
    assert!(!answer.starts_with(b"HTTP") && answer.len() < 16, "{answer:?}");
    until_logged(&cluster, "raftd", &["a TLS handshake failed", "it speaks plain text?"]).await;
}

#[tokio::test]
async fn plain_text_beyond_loopback_is_refused_at_the_start() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("resqlite.yaml");
    for daemon in ["raftd", "sqlited"] {
        fs::write(&file, format!("node_id: 1\n{daemon}:\n  listen: 0.0.0.0:1\n")).unwrap();
        let output = Command::new(program(daemon)).arg("--config").arg(&file).output().unwrap();
        let message = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(78), "{message}");
        assert!(message.contains(&format!("say {daemon}.allow_plaintext_on_network: true")), "{message}");
    }
}

#[tokio::test]
async fn handshakes_that_hang_hold_up_nobody() {
    let cluster = start(1).await;
    let raft = raft_address(&cluster, 0);
    // More than may be under way at once, at both ports.
    let connect = |address: &str| StdTcpStream::connect(address).unwrap();
    let hanging: Vec<_> = (0..600).flat_map(|_| [connect(cluster.sql_address(0)), connect(&raft)]).collect();
    for _ in 0..20 {
        shake_sql(&cluster, alice(&cluster)).await.unwrap();
        shake_raft(&cluster, peer_files(&cluster, 0)).await.unwrap();
    }
    query(&mut cluster.client(0), "select 1").await.unwrap();
    drop(hanging);
}

/// Puts a new pair of certificates in the place of a node's, the way a tool for that does.
fn renew(cluster: &Cluster, node: usize) {
    let fresh = tempfile::tempdir_in(cluster.path()).unwrap();
    node_files(&ca(cluster), fresh.path(), "test", node + 1);
    for name in ["peer.key", "peer.crt", "sql.key", "sql.crt"] {
        fs::rename(fresh.path().join(name), tls_directory(cluster, node).join(name)).unwrap();
    }
}

fn on_disk(cluster: &Cluster, name: &str) -> Subject {
    let file = tls_directory(cluster, 0).join(name);
    Subject::of(&files::certificates(&file).unwrap()[0]).unwrap()
}

/// Until new connections see other certificates than these.
async fn until_renewed(cluster: &Cluster) {
    for (name, old) in [("sql.crt", false), ("peer.crt", true)] {
        let new = on_disk(cluster, name);
        eventually("the new certificate is shown", || async {
            let shown = match old {
                false => shake_sql(cluster, alice(cluster)).await,
                true => shake_raft(cluster, peer_files(cluster, 0)).await,
            };
            (shown.unwrap() == new).then_some(())
        })
        .await;
    }
}

#[tokio::test]
async fn certificates_are_replaced_while_connections_stand() {
    let cluster = start(1).await;
    let mut standing = cluster.client(0);
    query(&mut standing, "select 1").await.unwrap();
    let connections = || sockets_of(cluster.pid(0, Daemon::Sqlited));
    let before = connections();

    // Validity is told in seconds: only from the next one on is a new certificate another one.
    let first = on_disk(&cluster, "sql.crt");
    eventually("the clock has moved on", || async {
        (OffsetDateTime::now_utc().unix_timestamp() - 3_600 > first.not_before).then_some(())
    })
    .await;
    renew(&cluster, 0);
    // By itself.
    until_renewed(&cluster).await;
    query(&mut standing, "select 1").await.unwrap();
    assert!(before.is_subset(&connections()), "a connection was dropped");

    let second = on_disk(&cluster, "sql.crt");
    eventually("the clock has moved on", || async {
        (OffsetDateTime::now_utc().unix_timestamp() - 3_600 > second.not_before).then_some(())
    })
    .await;
    renew(&cluster, 0);
    for daemon in [Daemon::Raftd, Daemon::Sqlited] {
        cluster.signal(0, daemon, "HUP");
    }
    until_renewed(&cluster).await;
    query(&mut standing, "select 1").await.unwrap();
    assert!(before.is_subset(&connections()), "a connection was dropped");
}

/// The inodes of a process's sockets.
fn sockets_of(pid: u32) -> std::collections::BTreeSet<String> {
    let descriptors = fs::read_dir(format!("/proc/{pid}/fd")).unwrap();
    let targets = descriptors.filter_map(|entry| fs::read_link(entry.ok()?.path()).ok());
    targets
        .map(|target| target.to_string_lossy().into_owned())
        .filter(|target| target.starts_with("socket:"))
        .collect()
}

#[tokio::test]
async fn a_broken_file_changes_nothing_and_is_named() {
    let cluster = start(1).await;
    let directory = tls_directory(&cluster, 0);
    for (daemon, name, file) in
        [(Daemon::Raftd, "raftd", "peer.crt"), (Daemon::Sqlited, "sqlited", "sql.crt")]
    {
        fs::write(directory.join(file), "not a certificate").unwrap();
        cluster.signal(0, daemon, "HUP");
        let words = format!("{file}: there is no certificate in it");
        until_logged(&cluster, name, &["ERROR", "certificates not reloaded", &words]).await;
    }
    shake_sql(&cluster, alice(&cluster)).await.unwrap();
    let peer = cluster.path().join("again");
    node_files(&ca(&cluster), &peer, "test", 1);
    let peer = ClientTlsFiles::new(ca(&cluster).join("ca.crt"))
        .identity(peer.join("peer.crt"), peer.join("peer.key"));
    shake_raft(&cluster, peer).await.unwrap();
}

#[tokio::test]
async fn a_certificate_that_is_about_to_expire_is_told_of() {
    let mut cluster = prepare(1);
    let expired_ago = expired(&cluster, "node-1.test.resqlite");
    let (certificate, key) = expired_ago.identity.unwrap();
    for name in ["peer", "sql"] {
        fs::copy(&certificate, tls_directory(&cluster, 0).join(format!("{name}.crt"))).unwrap();
        fs::copy(&key, tls_directory(&cluster, 0).join(format!("{name}.key"))).unwrap();
    }
    cluster.launch(0);
    for daemon in ["raftd", "sqlited"] {
        until_logged(&cluster, daemon, &["WARN", "the certificate", "has expired: replace it"]).await;
    }
    // With a good one on sqlited's side, clients get in, and the status tells of the other.
    let fresh = cluster.path().join("fresh");
    node_files(&ca(&cluster), &fresh, "test", 1);
    for name in ["sql.key", "sql.crt"] {
        fs::rename(fresh.join(name), tls_directory(&cluster, 0).join(name)).unwrap();
    }
    eventually("the status warns of the peer certificate", || async {
        let node = cluster.status(0).await?.node?;
        node.warnings.iter().any(|warning| warning.contains("peer.crt has expired")).then_some(())
    })
    .await;
    let at = |path: &str| cluster.path().join(path).to_str().unwrap().to_owned();
    let (ca, cert, key) = (at("ca/ca.crt"), at("alice/alice.crt"), at("alice/alice.key"));
    let options = ["--ca", &ca, "--cert", &cert, "--key", &key];
    let output = resqlite(&[&["status", "--endpoints", cluster.sql_address(0)], &options[..]].concat());
    let table = String::from_utf8_lossy(&output.stdout);
    assert!(table.contains("warning: node 1: the certificate"), "{table}");
}
