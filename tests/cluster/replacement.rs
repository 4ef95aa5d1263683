//! Disks that are lost: of one node, of a majority; and what an empty directory may do.

use std::{
    collections::BTreeSet,
    fs,
    path::PathBuf,
    process::{Command, Output, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicI64, Ordering},
    },
};

use resqlite::api::{ExecuteRequest, RequestId, value::Kind};

use crate::harness::{Cluster, Daemon, eventually, execute, program, pursue, query, statement};

/// Loses both directories of a node, whose daemons must not run.
fn wipe(cluster: &Cluster, node: usize) {
    for daemon in ["raft", "sql"] {
        fs::remove_dir_all(directory(cluster, node).join(daemon)).unwrap();
    }
}

fn directory(cluster: &Cluster, node: usize) -> PathBuf {
    cluster.path().join(format!("node{}", node + 1))
}

fn kill(cluster: &mut Cluster, node: usize) {
    cluster.kill(node, Daemon::Raftd);
    cluster.kill(node, Daemon::Sqlited);
}

/// Waits until a node says this of its role.
async fn wait_for_role(cluster: &Cluster, node: usize, roles: &[&str]) {
    eventually(&format!("node {} is one of {roles:?}\n{}", node + 1, cluster.logs()), || async {
        let status = cluster.status(node).await?.node?;
        roles.contains(&status.role.as_str()).then_some(())
    })
    .await;
}

fn resqlite(cluster: &Cluster, node: usize, arguments: &[&str]) -> (bool, String) {
    let config = directory(cluster, node).join("resqlite.yaml");
    let mut command = Command::new(program("resqlite"));
    let Output { status, stdout, stderr } =
        command.args(arguments).arg("--config").arg(config).stdin(Stdio::null()).output().unwrap();
    (status.success(), [stdout, stderr].map(|bytes| String::from_utf8(bytes).unwrap()).concat())
}

fn raftd_log(cluster: &Cluster, node: usize) -> String {
    fs::read_to_string(directory(cluster, node).join("raftd.log")).unwrap()
}

async fn numbers(cluster: &Cluster, node: usize) -> BTreeSet<i64> {
    let rows = query(&mut cluster.client(node), "select n from t").await.unwrap();
    let numbers: Vec<i64> = rows
        .iter()
        .map(|row| match row.values[0].kind {
            Some(Kind::Integer(number)) => number,
            ref other => panic!("not a number: {other:?}"),
        })
        .collect();
    let distinct: BTreeSet<i64> = numbers.iter().copied().collect();
    assert_eq!(distinct.len(), numbers.len(), "a row is there twice");
    distinct
}

/// Writes 1, 2, 3 … each until it is acknowledged, through whichever node answers.
struct Load {
    done: Arc<AtomicBool>,
    acknowledged: Arc<AtomicI64>,
    task: tokio::task::JoinHandle<()>,
}

impl Load {
    fn start(cluster: &Cluster) -> Self {
        let (done, acknowledged) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicI64::new(0)));
        let clients: Vec<_> = (0..cluster.size()).map(|node| cluster.client(node)).collect();
        let task = tokio::spawn({
            let (done, acknowledged) = (done.clone(), acknowledged.clone());
            async move {
                for number in 1.. {
                    let id = RequestId {
                        client_id: bytes::Bytes::from_static(&[7; 16]),
                        sequence: number as u64,
                        acknowledged_below: number as u64,
                        made_at_index: 1,
                    };
                    let statements = vec![statement(&format!("insert into t values ({number})"))];
                    let request = ExecuteRequest { statements, id: Some(id), ..ExecuteRequest::default() };
                    pursue(&clients, number as usize, &request).await.unwrap();
                    acknowledged.store(number, Ordering::SeqCst);
                    if done.load(Ordering::SeqCst) {
                        return;
                    }
                }
            }
        });
        Self { done, acknowledged, task }
    }

    async fn goes_on(&self, when: &str) {
        let before = self.acknowledged.load(Ordering::SeqCst);
        eventually(&format!("writes go on {when}"), || async {
            (self.acknowledged.load(Ordering::SeqCst) > before + 20).then_some(())
        })
        .await;
    }

    async fn end(self) -> i64 {
        self.done.store(true, Ordering::SeqCst);
        self.task.await.unwrap();
        self.acknowledged.load(Ordering::SeqCst)
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_disk_is_filled_and_counts_again_while_writes_go_on() {
    let mut cluster = Cluster::start(3).await;
    execute(&mut cluster.client(0), "create table t(n integer)").await.unwrap();
    let load = Load::start(&cluster);
    for round in 0..2 {
        let leader = cluster.leader().await;
        // First a follower, then the leader itself.
        let lost = if round == 0 { (leader + 1) % 3 } else { leader };
        kill(&mut cluster, lost);
        load.goes_on("without the lost node").await;
        wipe(&cluster, lost);
        fs::remove_file(directory(&cluster, lost).join("raftd.log")).unwrap();
        cluster.launch(lost);
        wait_for_role(&cluster, lost, &["follower", "leader"]).await;
        let log = raftd_log(&cluster, lost);
        assert!(log.contains("standing=Learner") && log.contains("standing=Voter"), "{log}");
        load.goes_on("with the node that was filled").await;
        // It counts: with another node gone, the two that are left serve.
        let other = (lost + 1) % 3;
        kill(&mut cluster, other);
        load.goes_on("with the node that was filled in the majority").await;
        cluster.launch(other);
        cluster.wait_until_serving().await;
    }
    let last = load.end().await;
    cluster.wait_until_level().await;
    for node in 0..3 {
        assert_eq!(numbers(&cluster, node).await, (1..=last).collect(), "node {}", node + 1);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_disk_makes_no_majority_with_one_node_left() {
    let mut cluster = Cluster::start(3).await;
    execute(&mut cluster.client(0), "create table t(n integer)").await.unwrap();
    let leader = cluster.leader().await;
    let (away, lost) = ((leader + 1) % 3, (leader + 2) % 3);
    kill(&mut cluster, away);
    // Acknowledged by the leader and by the node that is about to lose it.
    execute(&mut cluster.client(leader), "insert into t values (1)").await.unwrap();
    kill(&mut cluster, lost);
    wipe(&cluster, lost);
    cluster.launch(lost);
    wait_for_role(&cluster, lost, &["learner"]).await;
    eventually("the last node steps down", || async {
        let status = cluster.status(leader).await?.node?;
        (status.leader_id == 0).then_some(())
    })
    .await;
    let status = cluster.status(lost).await.unwrap().node.unwrap();
    let missing = format!("does not count before it has heard node {}", away + 1);
    assert_eq!((status.role.as_str(), status.unhealthy.as_str()), ("learner", missing.as_str()));
    let (good, table) = {
        let (program, endpoints) = (program("resqlite"), cluster.endpoints());
        let run = move || Command::new(program).args(["status", "--endpoints", &endpoints]).output();
        let output = tokio::task::spawn_blocking(run).await.unwrap().unwrap();
        (output.status.success(), String::from_utf8(output.stdout).unwrap())
    };
    assert!(good && table.contains("learner") && table.contains(&missing), "{table}");

    cluster.launch(away);
    cluster.wait_until_serving().await;
    wait_for_role(&cluster, lost, &["follower", "leader"]).await;
    for node in 0..3 {
        assert_eq!(numbers(&cluster, node).await, BTreeSet::from([1]));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_first_start_waits_for_every_member() {
    let mut cluster = Cluster::prepare(3);
    cluster.launch(0);
    cluster.launch(1);
    for node in 0..2 {
        eventually("the first start says for whom it waits", || async {
            let status = cluster.status(node).await?.node?;
            (status.role == "new" && status.unhealthy == "the first start waits for node 3").then_some(())
        })
        .await;
    }
    // They went on waiting through a restart; with the third they need nothing more.
    kill(&mut cluster, 0);
    cluster.launch(0);
    cluster.launch(2);
    cluster.wait_until_serving().await;
    assert!(!(0..3).any(|node| raftd_log(&cluster, node).contains("Learner")), "{}", cluster.logs());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_log_is_refused_and_the_node_replaced() {
    let mut cluster = Cluster::start(3).await;
    execute(&mut cluster.client(0), "create table t(n integer)").await.unwrap();
    execute(&mut cluster.client(0), "insert into t values (1)").await.unwrap();
    let damaged = (cluster.leader().await + 1) % 3;

    let (good, text) = resqlite(&cluster, damaged, &["node", "replace"]);
    assert!(!good && text.contains("is in use: stop raftd and sqlited first"), "{text}");

    kill(&mut cluster, damaged);
    let hard_state = directory(&cluster, damaged).join("raft/hard_state");
    fs::write(&hard_state, vec![0; fs::metadata(&hard_state).unwrap().len() as usize]).unwrap();
    cluster.launch_daemon(damaged, Daemon::Raftd);
    eventually("the damaged log is refused", || async {
        let log = raftd_log(&cluster, damaged);
        (log.contains("damaged") && log.contains("resqlite node replace")).then_some(())
    })
    .await;
    kill(&mut cluster, damaged);

    let (good, text) = resqlite(&cluster, damaged, &["node", "replace"]);
    assert!(good && text.contains("What was there is kept in"), "{text}");
    let kept = text.lines().filter_map(|line| line.strip_prefix("What was there is kept in "));
    let kept: Vec<PathBuf> = kept.map(PathBuf::from).collect();
    assert!(kept[0].join("hard_state").is_file() && kept[1].join("resqlite.db").is_file(), "{kept:?}");
    let (good, text) = resqlite(&cluster, damaged, &["node", "replace"]);
    assert!(!good && text.contains("nothing to replace"), "{text}");

    cluster.launch(damaged);
    wait_for_role(&cluster, damaged, &["follower", "leader"]).await;
    cluster.wait_until_level().await;
    assert_eq!(numbers(&cluster, damaged).await, BTreeSet::from([1]));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_log_or_a_database_that_is_lost_alone_is_filled_or_says_what_to_do() {
    let mut cluster = Cluster::start(3).await;
    execute(&mut cluster.client(0), "create table t(n integer)").await.unwrap();
    execute(&mut cluster.client(0), "insert into t values (1)").await.unwrap();
    cluster.wait_until_level().await;
    let lost = (cluster.leader().await + 1) % 3;
    let up = cluster.leader().await;
    // The database, while the log reaches back to its beginning; then the log, while the database is whole: whether
    // the leader or the own sqlited is heard first, the node is filled.
    for gone in ["sql", "raft"] {
        kill(&mut cluster, lost);
        fs::remove_dir_all(directory(&cluster, lost).join(gone)).unwrap();
        cluster.launch(lost);
        wait_for_role(&cluster, lost, &["follower", "leader"]).await;
        execute(&mut cluster.client(up), "insert into t select max(n) + 1 from t").await.unwrap();
        cluster.wait_until_level().await;
    }
    // With no leader to be heard, the new log begins where the database stands.
    cluster.kill_all();
    fs::remove_dir_all(directory(&cluster, lost).join("raft")).unwrap();
    cluster.launch(lost);
    eventually("the new log begins after what the database has applied", || async {
        let (_, metrics) = cluster.watch(lost, Daemon::Raftd, "/metrics").await?;
        let line = metrics.lines().find(|line| line.starts_with("resqlite_raft_first_index "))?;
        (!line.ends_with(" 1")).then_some(())
    })
    .await;
    for node in 0..cluster.size() {
        cluster.launch(node);
    }
    cluster.wait_until_serving().await;
    cluster.wait_until_level().await;
    kill(&mut cluster, lost);
    fs::remove_dir_all(directory(&cluster, lost).join("sql")).unwrap();
    cluster.launch(lost);
    eventually("sqlited says what to do", || async {
        let log = fs::read_to_string(directory(&cluster, lost).join("sqlited.log")).unwrap();
        log.contains("rebuild this node from its peers with `resqlite node replace`").then_some(())
    })
    .await;
    kill(&mut cluster, lost);
    assert!(resqlite(&cluster, lost, &["node", "replace"]).0);
    cluster.launch(lost);
    wait_for_role(&cluster, lost, &["follower", "leader"]).await;
    cluster.wait_until_level().await;
    assert_eq!(numbers(&cluster, lost).await, BTreeSet::from([1, 2, 3]));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lone_node_that_lost_its_log_says_what_to_do() {
    let mut cluster = Cluster::start(1).await;
    execute(&mut cluster.client(0), "create table t(n integer)").await.unwrap();
    execute(&mut cluster.client(0), "insert into t values (1)").await.unwrap();
    let (good, text) = resqlite(&cluster, 0, &["node", "replace"]);
    assert!(!good && text.contains("only member"), "{text}");
    kill(&mut cluster, 0);
    fs::remove_dir_all(directory(&cluster, 0).join("raft")).unwrap();
    fs::remove_file(directory(&cluster, 0).join("raftd.log")).unwrap();
    // A sqlited that attaches before the new log has begun lets it go on from where the database stands.
    cluster.launch_daemon(0, Daemon::Raftd);
    eventually("the new log has begun", || async {
        raftd_log(&cluster, 0).contains("role=Leader").then_some(())
    })
    .await;
    cluster.launch_daemon(0, Daemon::Sqlited);
    eventually("sqlited says what to do", || async {
        let log = fs::read_to_string(directory(&cluster, 0).join("sqlited.log")).unwrap();
        log.contains("the log was lost and begun anew").then_some(())
    })
    .await;
}

/// Gives a node another cluster: a name, and the ids of its members.
fn reconfigure(cluster: &Cluster, node: usize, name: &str, members: &[usize]) {
    let path = directory(cluster, node).join("resqlite.yaml");
    let original = directory(cluster, node).join("original.yaml");
    if !original.exists() {
        fs::copy(&path, &original).unwrap();
    }
    let strangers: Vec<String> = (1..=cluster.size())
        .filter(|id| !members.contains(id))
        .map(|id| format!("    - {{ id: {id},"))
        .collect();
    let text = fs::read_to_string(original).unwrap().replace("name: test", &format!("name: {name}"));
    let lines = text.lines().filter(|line| !strangers.iter().any(|stranger| line.starts_with(stranger)));
    fs::write(path, lines.map(|line| format!("{line}\n")).collect::<String>()).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_majority_is_recovered_from_the_survivor() {
    let mut cluster = Cluster::start(3).await;
    execute(&mut cluster.client(0), "create table t(n integer)").await.unwrap();
    for number in 1..=20 {
        execute(&mut cluster.client(0), &format!("insert into t values ({number})")).await.unwrap();
    }
    cluster.wait_until_level().await;
    let recover = ["cluster", "recover"];
    let (good, text) = resqlite(&cluster, 0, &recover);
    assert!(!good && text.contains("another raftd is using"), "{text}");
    cluster.kill_all();
    wipe(&cluster, 1);
    wipe(&cluster, 2);

    let (good, text) = resqlite(&cluster, 0, &["cluster", "recover", "--show"]);
    assert!(good && text.contains("applied index"), "{text}");
    let (good, text) = resqlite(&cluster, 0, &recover);
    assert!(!good && text.contains("still describes the cluster that is lost"), "{text}");

    // Alone.
    reconfigure(&cluster, 0, "alone", &[1]);
    let (good, text) = resqlite(&cluster, 0, &recover);
    assert!(!good && text.contains("Lost: whatever") && text.contains("nothing was changed"), "{text}");
    let (good, text) = resqlite(&cluster, 0, &["cluster", "recover", "--yes"]);
    assert!(good && text.contains("serves alone"), "{text}");
    cluster.launch(0);
    eventually("the survivor serves", || async { query(&mut cluster.client(0), "select 1").await.ok() })
        .await;
    assert_eq!(numbers(&cluster, 0).await, (1..=20).collect());
    execute(&mut cluster.client(0), "insert into t values (21)").await.unwrap();
    kill(&mut cluster, 0);

    // And from there with two empty nodes, which are up first and a majority.
    for node in 0..3 {
        reconfigure(&cluster, node, "three", &[1, 2, 3]);
    }
    let (good, text) = resqlite(&cluster, 0, &["cluster", "recover", "--yes"]);
    assert!(good && text.contains("waits until all of them are there"), "{text}");
    cluster.launch(1);
    cluster.launch(2);
    wait_for_role(&cluster, 1, &["new"]).await;
    wait_for_role(&cluster, 2, &["new"]).await;
    cluster.launch(0);
    cluster.wait_until_serving().await;
    execute(&mut cluster.client(2), "insert into t values (22)").await.unwrap();
    cluster.wait_until_level().await;
    for node in 0..3 {
        assert_eq!(numbers(&cluster, node).await, (1..=22).collect(), "node {}", node + 1);
    }
}
