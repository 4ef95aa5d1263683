//! `resqlite restore`: a file becomes the content of every node, or of none.

use std::{
    fs,
    path::PathBuf,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use crate::{
    backup::{EVERYTHING, argument, resqlite, resqlite_ok},
    harness::{Cluster, Daemon, eventually, execute, only_integer, program, query, sqlite3},
};

/// A file with a little of everything, and many rows whose rowids are no column.
fn file(cluster: &Cluster, rows: u32) -> PathBuf {
    let path = cluster.path().join("to-restore.db");
    sqlite3(&path, EVERYTHING);
    sqlite3(
        &path,
        &format!(
            "create table many(t); with recursive n(i) as (values(1) union all select i + 1 from n where i < {rows})
             insert into many(rowid, t) select i * 3, hex(randomblob(400)) from n"
        ),
    );
    path
}

/// All content as any SQLite sees it, rowids included; without our own tables.
fn content(cluster: &Cluster, node: usize) -> String {
    cluster.dump(node) + &sqlite3(&cluster.database(node), "select max(rowid), sum(rowid) from many")
}

async fn assert_restored(cluster: &Cluster, file: &std::path::Path) {
    cluster.wait_until_level().await;
    let expected = crate::harness::without_own_tables(&sqlite3(file, ".dump"))
        + &sqlite3(file, "select max(rowid), sum(rowid) from many");
    for node in 0..cluster.size() {
        assert!(content(cluster, node) == expected, "node {} differs from the file", node + 1);
        let database = cluster.database(node);
        assert_eq!(
            sqlite3(&database, "pragma integrity_check; select count(*) from _resqlite_restore"),
            "ok\n0\n"
        );
        let beside = fs::read_dir(database.parent().unwrap()).unwrap();
        let names: Vec<String> =
            beside.map(|name| name.unwrap().file_name().into_string().unwrap()).collect();
        assert!(!names.iter().any(|name| name.contains("restoring")), "{names:?}");
    }
    resqlite_ok(cluster, &["verify"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restored_file_is_the_content_of_every_node() {
    let cluster = Cluster::start(3).await;
    let file = file(&cluster, 5_000);
    let text = resqlite_ok(&cluster, &["restore", argument(&file)]);
    assert!(text.contains("this is the content of every node"), "{text}");
    assert_restored(&cluster, &file).await;

    // The nodes go on from it alike.
    let mut node = cluster.client(1);
    execute(&mut node, "insert into kept(t) values('later')").await.unwrap();
    execute(&mut node, "insert into words(text) values('words that came later')").await.unwrap();
    execute(&mut node, "insert into many values(random())").await.unwrap();
    let found =
        query(&mut cluster.client(2), "select count(*) from words where words match 'words'").await.unwrap();
    assert_eq!(only_integer(&found), 2);
    cluster.wait_until_level().await;
    resqlite_ok(&cluster, &["verify"]);

    // What is there is replaced only if that is wanted, and comes back from a backup of it.
    let (succeeded, text) = resqlite(&cluster, &["restore", argument(&file)]);
    assert!(!succeeded && text.contains("not empty") && text.contains("--force"), "{text}");
    let backup = cluster.path().join("backup.db");
    resqlite_ok(&cluster, &["backup", argument(&backup)]);
    execute(&mut node, "drop table many").await.unwrap();
    resqlite_ok(&cluster, &["restore", "--force", argument(&backup)]);
    assert_restored(&cluster, &backup).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn files_that_cannot_be_restored_are_refused_before_anything_is_sent() {
    let cluster = Cluster::start(1).await;
    let path = cluster.path().join("file.db");
    let refused = |what: &str, reason: &str| {
        let (succeeded, text) = resqlite(&cluster, &["restore", argument(&path)]);
        assert!(!succeeded && text.contains(reason), "{what}: {text}");
    };
    refused("none", "cannot be read");
    fs::write(&path, "no database").unwrap();
    refused("a text", "not an SQLite database, or it is encrypted");
    fs::remove_file(&path).unwrap();
    sqlite3(&path, "pragma page_size = 1024; create table t(a)");
    refused("small pages", "pages of 1024 bytes instead of 4096: convert it first with: sqlite3 FILE");
    fs::remove_file(&path).unwrap();
    sqlite3(&path, "create table t(a)");
    let wal = cluster.path().join("file.db-wal");
    fs::write(&wal, "frames").unwrap();
    refused("a write-ahead log", "file.db-wal holds changes that are not in the file itself");
    fs::remove_file(&wal).unwrap();
    let mut bytes = fs::read(&path).unwrap();
    bytes[4_096..].fill(0xee);
    fs::write(&path, bytes).unwrap();
    refused("a damaged one", "the file is damaged");
    let page = fs::read(&path).unwrap()[..4_096].to_vec();
    fs::write(&path, page).unwrap();
    refused("half of one", "the file is damaged");
    let found = query(&mut cluster.client(0), "select count(*) from sqlite_schema where tbl_name = 't'")
        .await
        .unwrap();
    assert_eq!(only_integer(&found), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_goes_away_leaves_nothing_behind() {
    let cluster = Cluster::start(3).await;
    let file = file(&cluster, 10_000);
    // Reads nothing to its end: only the beginning of the file ever comes.
    let mut client = Command::new(program("resqlite"))
        .args(["restore", argument(&file), "--endpoints", cluster.sql_address(0)])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let staged = |node: usize| {
        let sql = "select count(*) from _resqlite_restore_chunks";
        sqlite3(&cluster.database(node), sql).trim().parse::<u64>().unwrap()
    };
    eventually("the upload is under way", || async { (staged(0) > 0).then_some(()) }).await;
    client.kill().unwrap();
    client.wait().unwrap();
    eventually("nothing is staged any more", || async { (staged(0) == 0).then_some(()) }).await;
    resqlite_ok(&cluster, &["restore", "--force", argument(&file)]);
    assert_restored(&cluster, &file).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn kill_nine_during_a_restore_leaves_the_old_content_or_the_new() {
    let mut cluster = Cluster::start(3).await;
    let file = file(&cluster, 10_000);
    for round in 0..4u32 {
        // The node that takes the file, then one that does not; daemons in turn; at another moment each time.
        let victim = round as usize % 3;
        let mut client = Command::new(program("resqlite"))
            .args(["restore", "--force", argument(&file), "--endpoints", &cluster.endpoints()])
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let staging = cluster.database(0).with_file_name("resqlite.db-wal");
        let deadline = Instant::now() + Duration::from_secs(2);
        let enough = u64::from(round) * 2_000_000;
        while fs::metadata(&staging).map_or(0, |wal| wal.len()) < enough
            && client.try_wait().unwrap().is_none()
            && Instant::now() < deadline
        {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        cluster.kill(victim, Daemon::Sqlited);
        if round % 2 == 0 {
            cluster.kill(victim, Daemon::Raftd);
        }
        cluster.launch(victim);
        let output = tokio::task::spawn_blocking(move || client.wait_with_output().unwrap()).await.unwrap();
        assert!(output.status.success(), "{}\n{}", String::from_utf8_lossy(&output.stderr), cluster.logs());
        cluster.wait_until_serving().await;
        assert_restored(&cluster, &file).await;
        execute(&mut cluster.client(0), "drop table many").await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_was_down_during_a_restore_catches_up_with_it() {
    let mut cluster = Cluster::prepare_with(3, "log_tail_entries: 10\nlog_tail_bytes: 1048576", "");
    (0..3).for_each(|node| cluster.launch(node));
    cluster.wait_until_serving().await;
    let file = file(&cluster, 10_000);
    let behind = (cluster.leader().await + 1) % 3;
    cluster.kill(behind, Daemon::Raftd);
    cluster.kill(behind, Daemon::Sqlited);
    resqlite_ok(&cluster, &["restore", argument(&file)]);
    cluster.launch(behind);
    cluster.wait_until_serving().await;
    assert_restored(&cluster, &file).await;
}
