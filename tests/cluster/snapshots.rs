//! A node that the others' logs have left behind is brought up by a snapshot, while everybody else goes on;
//! and the logs stay small.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use bytes::Bytes;
use resqlite::api::{
    ExecuteRequest, LogStatusRequest, LogStatusResponse, RequestId, log_service_client::LogServiceClient,
    re_sqlite_client::ReSqliteClient,
};
use tokio::task::JoinSet;
use tonic::transport::Channel;

use crate::harness::{
    Cluster, DEADLINE, Daemon, eventually, execute, execute_as, only_integer, pursue, query, sqlite3,
    statement,
};

/// So short a tail that a few writes leave a stopped node behind it.
const SHORT_TAIL: &str = "log_tail_entries: 200\nlog_tail_bytes: 1048576";

/// How many clients write at the same time where many writes are wanted quickly.
const CLIENTS: u64 = 64;

/// Executes a statement so often, each time as a request of its own, through these nodes.
async fn execute_many(cluster: &Cluster, nodes: &[usize], count: u64, sql: &str) {
    let mut clients = JoinSet::new();
    for number in 0..CLIENTS {
        let (mut client, sql) = (cluster.client(nodes[number as usize % nodes.len()]), sql.to_owned());
        clients.spawn(async move {
            for _ in 0..count / CLIENTS {
                execute(&mut client, &sql).await.unwrap();
            }
        });
    }
    while let Some(done) = clients.join_next().await {
        done.unwrap();
    }
}

/// Kills a node, and writes until the others' logs begin after what it has.
pub async fn leave_behind(cluster: &mut Cluster, node: usize, writes: u64) {
    cluster.kill(node, Daemon::Raftd);
    cluster.kill(node, Daemon::Sqlited);
    let others: Vec<usize> = (0..3).filter(|other| *other != node).collect();
    let mut has = 0;
    for other in &others {
        // It may have more than it had applied when somebody could still ask it.
        has = has.max(log_status(cluster, *other).await.expect("the others run").last_index);
    }
    execute_many(cluster, &others, writes, "insert into filler default values").await;
    for other in others {
        let what = format!("the log of node {} begins after index {has}", other + 1);
        let begins_after =
            || async { (log_status(cluster, other).await?.first_index > has + 1).then_some(()) };
        eventually(&what, begins_after).await;
    }
}

/// What a node's raftd says of its log.
pub async fn log_status(cluster: &Cluster, node: usize) -> Option<LogStatusResponse> {
    let socket = format!("unix://{}/node{}/raftd.sock", cluster.path().display(), node + 1);
    let mut client = LogServiceClient::connect(socket).await.ok()?;
    Some(client.log_status(LogStatusRequest {}).await.ok()?.into_inner())
}

async fn applied_index(cluster: &Cluster, node: usize) -> u64 {
    cluster.status(node).await.and_then(|status| status.node).map_or(0, |node| node.applied_index)
}

/// How often a node's database was replaced by a snapshot, by its own account.
pub fn installs(cluster: &Cluster, node: usize) -> usize {
    let log = cluster.path().join(format!("node{}/sqlited.log", node + 1));
    let log = fs::read_to_string(log).unwrap_or_default();
    let replaced = |line: &&str| {
        line.contains("the database was replaced by a snapshot")
            || line.contains("has taken the database's place")
    };
    log.lines().filter(replaced).count()
}

fn assert_equal_dumps(cluster: &Cluster) {
    let first = cluster.dump(0);
    for node in 1..cluster.size() {
        // Not assert_eq: megabytes of SQL would help nobody.
        assert!(cluster.dump(node) == first, "node {} differs from node 1", node + 1);
    }
}

/// Keeps writing, each row under its own id, until told to stop; every write is pursued to its acknowledgement.
struct Writer {
    number: u8,
    clients: Vec<ReSqliteClient<Channel>>,
    journal: Arc<Journal>,
}

#[derive(Default)]
struct Journal {
    acknowledged: Mutex<BTreeSet<(u8, u64)>>,
    count: AtomicU64,
    done: AtomicBool,
}

impl Writer {
    async fn run(self) {
        let client_id = Bytes::from(vec![self.number + 1; 16]);
        let mut sequence = 0;
        while !self.journal.done.load(Ordering::Relaxed) {
            sequence += 1;
            let id = RequestId {
                client_id: client_id.clone(),
                sequence,
                acknowledged_below: sequence,
                made_at_index: 1,
            };
            let sql = format!("insert into journal values({}, {sequence})", self.number);
            let request = ExecuteRequest {
                statements: vec![statement(&sql)],
                id: Some(id),
                ..ExecuteRequest::default()
            };
            pursue(&self.clients, self.number.into(), &request).await.unwrap();
            self.journal.acknowledged.lock().unwrap().insert((self.number, sequence));
            self.journal.count.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// Writers in the background.
struct Writers {
    journal: Arc<Journal>,
    tasks: JoinSet<()>,
}

impl Writers {
    fn start(cluster: &Cluster, count: u8) -> Self {
        let journal = Arc::new(Journal::default());
        let mut tasks = JoinSet::new();
        for number in 0..count {
            let clients = (0..cluster.size()).map(|node| cluster.client(node)).collect();
            tasks.spawn(Writer { number, clients, journal: journal.clone() }.run());
        }
        Self { journal, tasks }
    }

    /// Returns once so many more writes are acknowledged.
    async fn progress(&self, more: u64) {
        let before = self.journal.count.load(Ordering::Relaxed);
        eventually("writes go on", || async {
            (self.journal.count.load(Ordering::Relaxed) >= before + more).then_some(())
        })
        .await;
    }

    /// Ends them, and returns what was acknowledged.
    async fn stop(mut self) -> BTreeSet<(u8, u64)> {
        self.journal.done.store(true, Ordering::Relaxed);
        while let Some(done) = self.tasks.join_next().await {
            done.unwrap();
        }
        self.journal.acknowledged.lock().unwrap().clone()
    }
}

async fn create_tables(cluster: &Cluster) {
    let mut client = cluster.client(0);
    for sql in [
        "create table filler(n integer primary key, at default current_timestamp)",
        "create table journal(writer integer, sequence integer)",
        "create table once(n)",
        // Its rowids are not part of its content: whoever copies rows instead of pages renumbers them.
        "create table bag(a text)",
        "insert into bag with recursive n(i) as (values(1) union all select i+1 from n where i<500) select i from n",
        "delete from bag where a % 3 = 0",
    ] {
        execute(&mut client, sql).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_left_behind_is_brought_up_by_a_snapshot_while_writes_go_on() {
    let mut cluster = Cluster::prepare_with(3, SHORT_TAIL, "");
    (0..3).for_each(|node| cluster.launch(node));
    cluster.wait_until_serving().await;
    create_tables(&cluster).await;
    let behind = (cluster.leader().await + 1) % 3;
    let others: Vec<usize> = (0..3).filter(|node| *node != behind).collect();
    cluster.wait_until_level().await;
    leave_behind(&mut cluster, behind, 5_000).await;

    // What the node has never executed, it must know all the same.
    let id = RequestId {
        client_id: Bytes::from(vec![99; 16]),
        sequence: 1,
        acknowledged_below: 1,
        made_at_index: 1,
    };
    let once = "insert into once values(random()) returning n";
    let first = execute_as(&mut cluster.client(others[0]), once, Some(id.clone())).await.unwrap();

    let writers = Writers::start(&cluster, 3);
    cluster.launch(behind);
    let goal = applied_index(&cluster, others[0]).await;
    eventually(&format!("the node catches up\n{}", cluster.logs()), || async {
        (applied_index(&cluster, behind).await >= goal).then_some(())
    })
    .await;
    assert!(installs(&cluster, behind) >= 1, "it was brought up by a snapshot");
    writers.progress(50).await;

    let again = execute_as(&mut cluster.client(behind), once, Some(id)).await.unwrap();
    assert_eq!(again, first, "a request that came in the snapshot is answered with its first reply");
    let acknowledged = writers.stop().await;
    cluster.wait_until_level().await;
    for node in 0..3 {
        let count = query(&mut cluster.client(node), "select count(*) from journal").await.unwrap();
        assert_eq!(only_integer(&count), acknowledged.len() as i64, "node {}", node + 1);
        let rowids = |node| sqlite3(&cluster.database(node), "select rowid, a from bag");
        assert!(rowids(node) == rowids(0), "the rowids of node {} differ", node + 1);
    }
    assert_equal_dumps(&cluster);
}

/// A moment in the life of a snapshot, seen from the files of the node that takes it.
#[derive(Clone, Copy, Debug)]
enum Moment {
    Begun,
    Half,
    Whole,
    Installing,
    Installed,
}

const MOMENTS: [Moment; 5] =
    [Moment::Begun, Moment::Half, Moment::Whole, Moment::Installing, Moment::Installed];

fn with_suffix(database: &Path, suffix: &str) -> PathBuf {
    let mut name = database.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

/// Waits for the moment, or for a later one: what is over in a millisecond may be missed.
async fn moment(cluster: &Cluster, behind: usize, size_bytes: u64, moment: Moment, installs_before: usize) {
    let database = cluster.database(behind);
    let (incoming, record) = (with_suffix(&database, ".incoming"), with_suffix(&database, ".installing"));
    let deadline = Instant::now() + DEADLINE;
    loop {
        let received = fs::metadata(&incoming).map_or(0, |metadata| metadata.len());
        let come = match moment {
            Moment::Begun => received > 0,
            Moment::Half => received >= size_bytes / 2,
            Moment::Whole => received >= size_bytes,
            Moment::Installing => record.exists(),
            Moment::Installed => false,
        };
        if come || installs(cluster, behind) > installs_before {
            return;
        }
        assert!(Instant::now() < deadline, "{moment:?} did not come\n{}", cluster.logs());
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

/// Who dies: of the node that takes the snapshot, or of the one that sends it.
fn victims(round: usize, behind: usize, leader: usize) -> Vec<(usize, Daemon)> {
    match round % 4 {
        0 => vec![(behind, Daemon::Sqlited)],
        1 => vec![(behind, Daemon::Raftd), (behind, Daemon::Sqlited)],
        2 => vec![(leader, Daemon::Sqlited)],
        _ => vec![(leader, Daemon::Raftd), (behind, Daemon::Raftd)],
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn kill_nine_at_any_moment_of_a_snapshot_loses_nothing() {
    // Slow enough to be hit on its way.
    let mut cluster = Cluster::prepare_with(3, SHORT_TAIL, "snapshot_bytes_per_second: 16777216");
    (0..3).for_each(|node| cluster.launch(node));
    cluster.wait_until_serving().await;
    create_tables(&cluster).await;
    for _ in 0..8 {
        let sql = "insert into bag with recursive n(i) as (values(1) union all select i+1 from n where i<1000) \
                   select hex(randomblob(500)) from n";
        execute(&mut cluster.client(0), sql).await.unwrap();
    }
    cluster.wait_until_level().await;
    let writers = Writers::start(&cluster, 3);
    // More by hand: ROUNDS=200.
    let rounds = std::env::var("ROUNDS").ok().and_then(|rounds| rounds.parse().ok()).unwrap_or(20);
    for round in 0..rounds {
        let leader = cluster.leader().await;
        let behind = (leader + 1 + round / 10) % 3;
        leave_behind(&mut cluster, behind, 1_280).await;
        let (installs_before, size) = (installs(&cluster, behind), fs::metadata(cluster.database(leader)));
        cluster.launch(behind);
        moment(&cluster, behind, size.unwrap().len(), MOMENTS[round % MOMENTS.len()], installs_before).await;
        for (node, daemon) in victims(round, behind, leader) {
            cluster.kill(node, daemon);
        }
        (0..3).for_each(|node| cluster.launch(node));
        cluster.wait_until_serving().await;
        writers.progress(5).await;
    }
    let acknowledged = writers.stop().await;
    cluster.wait_until_level().await;
    let installed: usize = (0..3).map(|node| installs(&cluster, node)).sum();
    println!("{installed} installs, {} acknowledged writes", acknowledged.len());
    for node in 0..3 {
        let rows = "select count(*), count(distinct writer * 1000000 + sequence) from journal";
        let expected = format!("{0}|{0}\n", acknowledged.len());
        assert_eq!(sqlite3(&cluster.database(node), rows), expected, "node {}", node + 1);
    }
    assert_equal_dumps(&cluster);
}

fn directory_bytes(directory: &Path) -> u64 {
    let entries = fs::read_dir(directory).unwrap().flatten();
    // A file may go away while we look.
    let size = |entry: fs::DirEntry| match entry.metadata() {
        Ok(metadata) if metadata.is_dir() => directory_bytes(&entry.path()),
        metadata => metadata.map_or(0, |metadata| metadata.len()),
    };
    entries.map(size).sum()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_log_stays_bounded_however_much_is_written() {
    let mut cluster = Cluster::prepare_with(1, "log_tail_entries: 1000\nlog_tail_bytes: 1048576", "");
    cluster.launch(0);
    cluster.wait_until_serving().await;
    create_tables(&cluster).await;
    // The database stays small, too, and the entries are large enough to tell a log that is kept from one that is not.
    let update = format!("insert or replace into filler values(1, '{}')", "x".repeat(500));
    let log = cluster.path().join("node1/raft/log");
    execute_many(&cluster, &[0], 200_000, &update).await;
    let bytes = directory_bytes(&log);
    println!("log directory: {bytes} bytes after 200,000 writes");
    assert!(bytes < 64 << 20, "the log takes {bytes} bytes");
}
