//! No write is acknowledged before it is durable on a majority: counted at the system calls.

use std::{fs, process::Command};

use crate::harness::{Cluster, Daemon, execute, program};

/// How many `fdatasync` calls on the log each node's raftd has completed so far.
fn completed_syncs(cluster: &Cluster) -> Vec<usize> {
    let trace = |node: usize| cluster.path().join(format!("strace{node}"));
    let is_log_sync = |line: &&str| {
        let is_of_log = line.contains("/raft/journal>") || line.contains("/raft/log/db>");
        line.contains("fdatasync(") && is_of_log && line.ends_with("= 0")
    };
    let count =
        |node| fs::read_to_string(trace(node)).unwrap_or_default().lines().filter(is_log_sync).count();
    (0..cluster.size()).map(count).collect()
}

#[tokio::test]
async fn every_acknowledgement_follows_an_fdatasync_on_a_majority() {
    let mut cluster = Cluster::prepare(3);
    for node in 0..3 {
        let mut strace = Command::new("strace");
        // -f --seccomp-bpf: only the traced call is slowed down; -y names the file.
        strace.args(["-f", "--seccomp-bpf", "-y", "-e", "trace=fdatasync", "-o"]);
        strace.arg(cluster.path().join(format!("strace{node}"))).arg(program("raftd"));
        cluster.launch_command(node, Daemon::Raftd, &mut strace);
        cluster.launch_daemon(node, Daemon::Sqlited);
    }
    cluster.wait_until_serving().await;
    execute(&mut cluster.client(0), "create table t(n integer)").await.unwrap();
    for n in 0..50 {
        cluster.wait_until_level().await;
        let before = completed_syncs(&cluster);
        execute(&mut cluster.client(n % 3), &format!("insert into t values({n})")).await.unwrap();
        let after = completed_syncs(&cluster);
        let synced = before.iter().zip(&after).filter(|(before, after)| after > before).count();
        assert!(
            synced >= 2,
            "write {n} was acknowledged after syncs on {synced} of 3 logs: {before:?} {after:?}"
        );
    }
}
