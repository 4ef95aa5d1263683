//! Bytes that are not what was written: in a log, in a database, and in a snapshot on its way. None is ever served,
//! and a daemon that finds them says which file, where, and the one command that helps.

use std::{
    fs,
    io::{Read, Write},
    net::{Shutdown, TcpListener, TcpStream},
    os::unix::fs::FileExt,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
};

use crate::{
    harness::{Cluster, Daemon, eventually, execute, only_integer, query},
    snapshots::{installs, leave_behind, log_status},
};

/// In a row, so that it can be recognised wherever it travels.
const MARKER: &str = "a value that somebody on the way will change, and that nobody must ever see changed";

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_log_ends_raftd_for_good_and_says_what_to_do() {
    let mut cluster = Cluster::start(3).await;
    execute(&mut cluster.client(0), &format!("create table t as select '{MARKER}' as a")).await.unwrap();
    execute(&mut cluster.client(0), "insert into t values ('later')").await.unwrap();
    cluster.wait_until_level().await;
    cluster.kill(0, Daemon::Sqlited);
    cluster.kill(0, Daemon::Raftd);
    // A young log is in the journal; the next start that succeeds brings it to sled.
    let (journal, at) = changed(&cluster, "journal");
    expect_refusal(&mut cluster, "damaged: its journal: frame ");
    journal.write_all_at(&MARKER.as_bytes()[..1], at).unwrap();
    cluster.launch_daemon(0, Daemon::Raftd);
    eventually("raftd is up on the mended log", || async {
        raftd_log(&cluster).rsplit_once("resqlite node replace")?.1.contains("raftd is up").then_some(())
    })
    .await;
    cluster.kill(0, Daemon::Raftd);
    changed(&cluster, "log/db");
    expect_refusal(&mut cluster, "damaged at index ");
}

/// Changes the marker's first byte in a file of the first node's raftd.
fn changed(cluster: &Cluster, name: &str) -> (fs::File, u64) {
    let path = cluster.path().join("node1/raft").join(name);
    let bytes = fs::read(&path).unwrap();
    let found = bytes.windows(MARKER.len()).position(|window| window == MARKER.as_bytes());
    let at = found.expect("the log holds the request, as it is") as u64;
    let file = fs::File::options().write(true).open(&path).unwrap();
    file.write_all_at(b"X", at).unwrap();
    (file, at)
}

fn expect_refusal(cluster: &mut Cluster, words: &str) {
    cluster.launch_daemon(0, Daemon::Raftd);
    assert_eq!(cluster.wait(0, Daemon::Raftd).code(), Some(78), "the service manager leaves it at that");
    let said = raftd_log(cluster).lines().last().unwrap().to_owned();
    for part in ["node1/raft/log", words, "resqlite node replace"] {
        assert!(said.contains(part), "{part:?} is not in: {said}");
    }
}

fn raftd_log(cluster: &Cluster) -> String {
    fs::read_to_string(cluster.path().join("node1/raftd.log")).unwrap()
}

/// Hands on what comes to a port, and changes one byte of the marker while it is told to.
struct Tamperer {
    port: u16,
    active: Arc<AtomicBool>,
    changed: Arc<AtomicU64>,
}

impl Tamperer {
    fn before(port: u16) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let tamperer = Self {
            port: listener.local_addr().unwrap().port(),
            active: Arc::default(),
            changed: Arc::default(),
        };
        let (active, changed) = (tamperer.active.clone(), tamperer.changed.clone());
        thread::spawn(move || {
            for from in listener.incoming().flatten() {
                // Nobody is there while the node is stopped; then the connection is closed again.
                let Ok(to) = TcpStream::connect(("127.0.0.1", port)) else { continue };
                let (back_from, back_to) = (to.try_clone().unwrap(), from.try_clone().unwrap());
                let (active, changed) = (active.clone(), changed.clone());
                thread::spawn(move || copy(back_from, back_to, |_| {}));
                thread::spawn(move || {
                    copy(from, to, |bytes| {
                        if active.load(Ordering::Relaxed) && tamper(bytes) {
                            changed.fetch_add(1, Ordering::Relaxed);
                        }
                    });
                });
            }
        });
        tamperer
    }
}

/// Both ends learn when one of them goes.
fn copy(mut from: TcpStream, mut to: TcpStream, mut change: impl FnMut(&mut [u8])) {
    let mut buffer = vec![0; 64 << 10];
    while let Ok(read @ 1..) = from.read(&mut buffer) {
        change(&mut buffer[..read]);
        if to.write_all(&buffer[..read]).is_err() {
            break;
        }
    }
    let _ = (from.shutdown(Shutdown::Both), to.shutdown(Shutdown::Both));
}

fn tamper(bytes: &mut [u8]) -> bool {
    // A part of it, so that one that is cut by the ends of two reads is mostly recognised, too.
    let part = &MARKER.as_bytes()[20..40];
    match bytes.windows(part.len()).position(|window| window == part) {
        Some(at) => {
            bytes[at + 7] ^= 1;
            true
        }
        None => false,
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_that_is_changed_on_its_way_is_refused_and_sent_again() {
    let mut cluster = Cluster::prepare_with(3, "log_tail_entries: 200\nlog_tail_bytes: 1048576", "");
    let config = |node: usize| cluster.path().join(format!("node{}/resqlite.yaml", node + 1));
    let text = fs::read_to_string(config(2)).unwrap();
    let raft = text.split("id: 3, raft: \"127.0.0.1:").nth(1).unwrap().split('"').next().unwrap().to_owned();
    let tamperer = Tamperer::before(raft.parse().unwrap());
    // The others reach node 3 only past the tamperer.
    for node in [0, 1] {
        let text = fs::read_to_string(config(node)).unwrap();
        let direct = format!("id: 3, raft: \"127.0.0.1:{raft}\"");
        let through = format!("id: 3, raft: \"127.0.0.1:{}\"", tamperer.port);
        fs::write(config(node), text.replace(&direct, &through)).unwrap();
    }
    (0..3).for_each(|node| cluster.launch(node));
    cluster.wait_until_serving().await;
    let mut client = cluster.client(0);
    execute(&mut client, "create table filler(n integer primary key)").await.unwrap();
    execute(&mut client, "create table t(a)").await.unwrap();
    cluster.wait_until_level().await;
    cluster.kill(2, Daemon::Raftd);
    cluster.kill(2, Daemon::Sqlited);
    execute(&mut client, &format!("insert into t values ('{MARKER}')")).await.unwrap();
    let marked = log_status(&cluster, 0).await.unwrap().last_index;
    leave_behind(&mut cluster, 2, 1_280).await;
    assert!(log_status(&cluster, 0).await.unwrap().first_index > marked, "only a snapshot brings the row");

    tamperer.active.store(true, Ordering::Relaxed);
    cluster.launch(2);
    let log = cluster.path().join("node3/sqlited.log");
    eventually("two snapshots are refused", || async {
        let refused = fs::read_to_string(&log).unwrap_or_default();
        (refused.matches("was damaged on its way").count() >= 2).then_some(())
    })
    .await;
    assert!(tamperer.changed.load(Ordering::Relaxed) >= 2);
    assert_eq!(installs(&cluster, 2), 0);
    tamperer.active.store(false, Ordering::Relaxed);
    cluster.wait_until_level().await;
    assert!(installs(&cluster, 2) >= 1, "sent again, it is taken");
    let rows = query(&mut cluster.client(2), &format!("select count(*) from t where a = '{MARKER}'")).await;
    assert_eq!(only_integer(&rows.unwrap()), 1);
}
