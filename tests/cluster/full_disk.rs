//! A disk that fills up: new writes are refused while there is still room for everything else, and taken again once
//! there is room; and a disk without a single free byte loses nothing.

use std::{fs, os::unix::fs::symlink};

use resqlite::api::{ExecuteRequest, QueryRequest};
use tonic::{Code, Status};

use crate::{
    filesystem::Filesystem,
    harness::{Cluster, Daemon, eventually, execute, only_integer, query, statement},
};

const FILESYSTEM_BYTES: u64 = 64 << 20;
const MIN_FREE_BYTES: u64 = 16 << 20;

/// A row of `t` takes a little more than this in the log, and half of it in the database.
const ROW_BYTES: usize = 64 << 10;

/// Where the refusal is waited for: the room is looked at four times a second, and a fast disk must not have taken
/// half of what is to be kept free between two looks.
const SMALL_ROW_BYTES: usize = 8 << 10;

/// A cluster of which these nodes have their data on a small filesystem each. None where mounting is not allowed.
async fn start(size: usize, small: &[usize], bytes: u64) -> Option<(Cluster, Vec<Filesystem>)> {
    let mut cluster = Cluster::prepare_with(size, "log_tail_entries: 100\nlog_tail_bytes: 1048576", "");
    let mut filesystems = Vec::new();
    for node in 0..size {
        let directory = cluster.path().join(format!("node{}", node + 1));
        let config = directory.join("resqlite.yaml");
        let text = fs::read_to_string(&config).unwrap();
        fs::write(&config, format!("{text}min_free_bytes: {MIN_FREE_BYTES}\n")).unwrap();
        if small.contains(&node) {
            let image = directory.join("image");
            let filesystem = Filesystem::mount(image, directory.join("small"), bytes)?;
            for name in ["raft", "sql"] {
                fs::create_dir(filesystem.path().join(name)).unwrap();
                symlink(filesystem.path().join(name), directory.join(name)).unwrap();
            }
            filesystems.push(filesystem);
        }
    }
    (0..size).for_each(|node| cluster.launch(node));
    cluster.wait_until_serving().await;
    execute(&mut cluster.client(0), "create table t(n integer primary key, filler blob)").await.unwrap();
    Some((cluster, filesystems))
}

async fn write_row(cluster: &Cluster, node: usize) -> Result<(), Status> {
    write_row_of(cluster, node, ROW_BYTES).await
}

async fn write_row_of(cluster: &Cluster, node: usize, bytes: usize) -> Result<(), Status> {
    let insert = format!("insert into t(filler) values(x'{}')", "5a".repeat(bytes / 2));
    let request = ExecuteRequest { statements: vec![statement(&insert)], ..ExecuteRequest::default() };
    cluster.client(node).execute(request).await.map(drop)
}

/// Writes until this node refuses for want of room, and returns how many rows it took.
async fn write_until_refused(cluster: &Cluster, node: usize) -> i64 {
    for written in 0.. {
        let Err(refused) = write_row_of(cluster, node, SMALL_ROW_BYTES).await else { continue };
        assert_eq!(refused.code(), Code::ResourceExhausted, "{refused}\n{}", cluster.logs());
        for needed in ["the filesystem of ", " bytes free", "new writes need", "the write was not applied"] {
            assert!(refused.message().contains(needed), "{needed:?} is not in {refused}");
        }
        return written;
    }
    unreachable!()
}

async fn rows(cluster: &Cluster, node: usize) -> i64 {
    only_integer(&query(&mut cluster.client(node), "select count(*) from t").await.unwrap())
}

async fn writes_go_on(cluster: &Cluster, node: usize) {
    let what = format!("node {} takes writes again\n{}", node + 1, cluster.logs());
    eventually(&what, || async { write_row(cluster, node).await.ok() }).await;
}

fn assert_equal_and_sound(cluster: &Cluster) {
    let first = cluster.dump(0);
    for node in 0..cluster.size() {
        assert!(cluster.dump(node) == first, "node {} differs from node 1", node + 1);
        let verdict = crate::harness::sqlite3(&cluster.database(node), "pragma integrity_check");
        assert_eq!(verdict, "ok\n", "node {}", node + 1);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_runs_out_of_room_refuses_and_the_others_go_on_without_its_lead() {
    let Some((cluster, filesystems)) = start(3, &[0], FILESYSTEM_BYTES).await else { return };
    let filesystem = &filesystems[0];
    // Whoever leads: with room it takes everything, and a leader without room leaves the lead.
    filesystem.take("hog", 12 << 20);
    let mut written = write_until_refused(&cluster, 0).await;
    assert!(filesystem.free_bytes() > MIN_FREE_BYTES / 2, "refused long before the end");
    assert_eq!(rows(&cluster, 0).await, written, "it reads, linearizably");
    let status = cluster.status(0).await.unwrap().node.unwrap();
    assert!(status.writes_refused.contains("min_free_bytes"), "{status:?}");
    assert_eq!(status.unhealthy, "");
    assert!(status.database_free_bytes < MIN_FREE_BYTES * 9 / 8 && status.log_free_bytes > 0, "{status:?}");

    for node in [1, 2] {
        writes_go_on(&cluster, node).await;
        written += 1;
    }
    assert_ne!(cluster.leader().await, 0, "it left the lead to a node with room");

    filesystem.give_back("hog");
    writes_go_on(&cluster, 0).await;
    written += 1;
    cluster.wait_until_level().await;
    assert_eq!(rows(&cluster, 0).await, written);
    assert_equal_and_sound(&cluster);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cluster_that_runs_out_of_room_reads_and_elects_and_takes_writes_again_by_itself() {
    let Some((mut cluster, filesystems)) = start(3, &[0, 1, 2], FILESYSTEM_BYTES).await else { return };
    filesystems.iter().for_each(|filesystem| filesystem.take("hog", 12 << 20));
    let mut written = 0;
    for node in 0..3 {
        written += write_until_refused(&cluster, node).await;
    }
    // Nobody has room: elections and reads go on all the same.
    let leader = cluster.leader().await;
    cluster.kill(leader, Daemon::Raftd);
    let other = (leader + 1) % 3;
    eventually("another node leads", || async {
        let status = cluster.status(other).await?.node?;
        (status.leader_id != 0 && status.leader_id != leader as u64 + 1).then_some(())
    })
    .await;
    cluster.launch(leader);
    cluster.wait_until_serving().await;
    for node in 0..3 {
        assert_eq!(rows(&cluster, node).await, written);
        assert_eq!(write_until_refused(&cluster, node).await, 0);
    }

    filesystems.iter().for_each(|filesystem| filesystem.give_back("hog"));
    for node in 0..3 {
        writes_go_on(&cluster, node).await;
        written += 1;
    }
    cluster.wait_until_level().await;
    assert_eq!(rows(&cluster, 0).await, written);
    assert_equal_and_sound(&cluster);
}

/// Writes through node 1 until the raftd of node 0 has ended.
async fn write_until_raftd_ends(cluster: &mut Cluster) -> i64 {
    // Many times what its disk could take.
    for written in 0..4_000 {
        if cluster.has_ended(0, Daemon::Raftd) {
            return written;
        }
        write_row(cluster, 1).await.unwrap();
    }
    panic!("the raftd of node 1 goes on without a free byte\n{}", cluster.logs());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_follower_without_a_free_byte_stops_and_comes_back_whole() {
    let Some((mut cluster, filesystems)) = start(3, &[0], 2 * FILESYSTEM_BYTES).await else { return };
    let filesystem = &filesystems[0];
    filesystem.take("reserve", FILESYSTEM_BYTES);
    let mut written = write_until_refused(&cluster, 0).await;
    writes_go_on(&cluster, 1).await;
    filesystem.take_everything("hog");
    written += 1 + write_until_raftd_ends(&mut cluster).await;

    // The reserve lets it start, and go on for a while.
    for daemon in [Daemon::Raftd, Daemon::Sqlited] {
        cluster.kill(0, daemon);
    }
    cluster.launch(0);
    eventually(&format!("node 1 starts with a full disk\n{}", cluster.logs()), || async {
        stale_rows(&cluster, 0).await
    })
    .await;
    written += write_until_raftd_ends(&mut cluster).await;

    filesystem.give_back("hog");
    filesystem.give_back("reserve");
    for daemon in [Daemon::Raftd, Daemon::Sqlited] {
        cluster.kill(0, daemon);
    }
    cluster.launch(0);
    cluster.wait_until_serving().await;
    cluster.wait_until_level().await;
    assert_eq!(rows(&cluster, 0).await, written);
    assert_equal_and_sound(&cluster);
    let ballast = |of: &str| filesystem.path().join(of).join("ballast");
    eventually("the reserve is kept again", || async {
        (ballast("raft").exists() && ballast("sql").exists()).then_some(())
    })
    .await;
}

/// What a node holds, whether or not anybody leads.
async fn stale_rows(cluster: &Cluster, node: usize) -> Option<i64> {
    let read = resqlite::api::ReadOptions {
        consistency: resqlite::api::Consistency::Stale.into(),
        ..resqlite::api::ReadOptions::default()
    };
    let sql = "select count(*) from t".to_owned();
    let request = QueryRequest { sql, read: Some(read), ..QueryRequest::default() };
    let mut stream = cluster.client(node).query(request).await.ok()?.into_inner();
    Some(only_integer(&stream.message().await.ok()??.rows))
}

#[tokio::test(flavor = "multi_thread")]
async fn at_zero_bytes_nothing_is_lost_and_a_restart_works() {
    let Some((mut cluster, filesystems)) = start(3, &[0, 1, 2], FILESYSTEM_BYTES).await else { return };
    for _ in 0..40 {
        write_row(&cluster, 0).await.unwrap();
    }
    // Another program takes the rest while writes go on: faster than any watermark.
    let mut written = 40;
    for filesystem in &filesystems {
        filesystem.take_everything("hog");
        assert_eq!(filesystem.free_bytes(), 0);
    }
    // What is acknowledged until everybody has noticed counts.
    while write_row(&cluster, 1).await.is_ok() {
        written += 1;
    }
    cluster.kill_all();
    (0..3).for_each(|node| cluster.launch(node));
    for node in 0..3 {
        let what = format!("node {} starts with a full disk and has every row\n{}", node + 1, cluster.logs());
        eventually(&what, || async { (stale_rows(&cluster, node).await? >= written).then_some(()) }).await;
    }
    assert!(write_row(&cluster, 0).await.is_err());

    filesystems.iter().for_each(|filesystem| filesystem.give_back("hog"));
    // A daemon that found no room for what it had to write has ended, as it must; a service manager starts it again.
    cluster.kill_all();
    (0..3).for_each(|node| cluster.launch(node));
    cluster.wait_until_serving().await;
    for node in 0..3 {
        writes_go_on(&cluster, node).await;
        written += 1;
    }
    cluster.wait_until_level().await;
    // A write that was refused for another reason than the watermark may have been applied.
    let found = rows(&cluster, 0).await;
    assert!((written..=written + 2).contains(&found), "{written} acknowledged, {found} found");
    assert_equal_and_sound(&cluster);
}
