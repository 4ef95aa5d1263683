//! Power cuts: whole clusters on filesystems that lose whatever was never synced, again and again.
//!
//! Every node's data lies on an ext4 image on a loop device, and the images lie in memory. Under load, at a random
//! moment, the power of one node or of all is cut ([`Filesystem::cut`]), its daemons are killed, and it is started
//! from what is on the image. Then nothing acknowledged may be missing, no term may have had two leaders, and every
//! node must have started. `make powercut ROUNDS=200` runs many rounds, `make test` a few; a run prints its seed, and
//! `SEED=…` makes the same choices again, though not the same moments. It needs root; without, it says so and ends.
//!
//! What it cannot show: a drive that loses what it was given. Nothing between the kernel and the image is lost.

#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

#[path = "../cluster/filesystem.rs"]
#[allow(dead_code, reason = "shared with the cluster tests")]
mod filesystem;
#[path = "../cluster/harness.rs"]
#[allow(dead_code, reason = "shared with the cluster tests")]
mod harness;

use std::{
    collections::{BTreeMap, BTreeSet},
    env, fs,
    os::unix::fs::symlink,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use bytes::Bytes;
use filesystem::Filesystem;
use harness::{Cluster, Daemon, eventually, execute, query, statement};
use resqlite::api::{
    ContentHashRequest, ExecuteRequest, RequestId, Row, Value, VerifyRequest,
    re_sqlite_client::ReSqliteClient, value::Kind,
};
use tokio::task::JoinSet;
use tonic::{Request, transport::Channel};

/// So many rounds unless `ROUNDS` says otherwise.
const FEW_ROUNDS: u32 = 4;

const NODES: usize = 3;
const WRITERS: u64 = 4;
const FILESYSTEM_BYTES: u64 = 2 << 30;

/// The smallest and the largest payload of a write.
const PAYLOAD_BYTES: (u64, u64) = (100, 4 << 20);

/// Choices that a seed repeats: SplitMix64 (Steele, Lea, Flood 2014).
struct Choices(u64);

impl Choices {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    /// As many small ones as large ones, for every meaning of small and large.
    fn payload_bytes(&mut self) -> usize {
        let (least, most) = PAYLOAD_BYTES;
        let doublings = (most / least).ilog2() as u64;
        let least = least << self.below(doublings + 1);
        (least + self.below(least)).min(most) as usize
    }
}

/// What clients were told.
#[derive(Default)]
struct Journal {
    /// Each row, and how long its payload is.
    acknowledged: Mutex<BTreeMap<i64, usize>>,
    count: AtomicU64,
    done: AtomicBool,
}

/// Writes rows of its own until told to stop. A write that fails is left alone: it may or may not be there.
async fn write(
    number: u64,
    mut client: ReSqliteClient<Channel>,
    journal: Arc<Journal>,
    mut choices: Choices,
) {
    let client_id = Bytes::copy_from_slice(&[choices.next().to_be_bytes(); 2].concat());
    let mut sequence = 0;
    while !journal.done.load(Ordering::Relaxed) {
        sequence += 1;
        let (row, length) = ((number << 32 | sequence) as i64, choices.payload_bytes());
        let mut insert = statement("insert into t values(?1, ?2)");
        let payload = Bytes::from(vec![choices.next() as u8; length]);
        insert.params =
            vec![Value { kind: Some(Kind::Integer(row)) }, Value { kind: Some(Kind::Blob(payload)) }];
        let id =
            RequestId { client_id: client_id.clone(), sequence, acknowledged_below: 1, made_at_index: 1 };
        let mut request = Request::new(ExecuteRequest {
            statements: vec![insert],
            id: Some(id),
            ..ExecuteRequest::default()
        });
        request.set_timeout(Duration::from_secs(10));
        if client.execute(request).await.is_ok() {
            journal.acknowledged.lock().unwrap().insert(row, length);
            journal.count.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// A cluster, and under each node a filesystem whose power can be cut.
struct Powered {
    // Before the filesystems: its processes have to be gone when they go.
    cluster: Cluster,
    filesystems: Vec<Filesystem>,
    _images: tempfile::TempDir,
}

impl Powered {
    /// None where nothing can be mounted.
    async fn start() -> Option<Self> {
        // A short tail, so that the log is compacted and nodes that were away need snapshots.
        let mut cluster = Cluster::prepare_with(NODES, "log_tail_entries: 200\nlog_tail_bytes: 16777216", "");
        let images = tempfile::Builder::new().prefix("resqlite-powercut-").tempdir_in("/dev/shm").unwrap();
        let mut filesystems = Vec::new();
        for node in 0..NODES {
            let directory = cluster.path().join(format!("node{}", node + 1));
            let image = images.path().join(format!("node{}", node + 1));
            let filesystem = Filesystem::mount(image, directory.join("disk"), FILESYSTEM_BYTES)?;
            for name in ["raft", "sql"] {
                fs::create_dir(filesystem.path().join(name)).unwrap();
                symlink(filesystem.path().join(name), directory.join(name)).unwrap();
            }
            filesystems.push(filesystem);
        }
        (0..NODES).for_each(|node| cluster.launch(node));
        cluster.wait_until_serving().await;
        execute(&mut cluster.client(0), "create table t(id integer primary key, payload blob)")
            .await
            .unwrap();
        cluster.wait_until_level().await;
        Some(Self { cluster, filesystems, _images: images })
    }

    /// Cuts the power of these nodes.
    fn cut(&mut self, victims: &[usize]) {
        Filesystem::cut(&victims.iter().map(|node| &self.filesystems[*node]).collect::<Vec<_>>());
        for node in victims {
            self.cluster.kill(*node, Daemon::Raftd);
            self.cluster.kill(*node, Daemon::Sqlited);
        }
    }

    fn power_on(&mut self, victims: &[usize]) {
        for node in victims {
            self.filesystems[*node].power_on();
            self.cluster.launch(*node);
        }
    }

    /// Every node holds what was acknowledged, and all hold the same.
    async fn check(&self, acknowledged: &BTreeMap<i64, usize>) {
        self.cluster.wait_until_level().await;
        let verify = self.cluster.client(0).verify(VerifyRequest {}).await.unwrap().into_inner();
        let mut contents = Vec::new();
        for node in 0..NODES {
            let rows =
                query(&mut self.cluster.client(node), "select id, length(payload) from t").await.unwrap();
            let found: BTreeMap<i64, usize> =
                rows.iter().map(|row| (integer(row, 0), integer(row, 1) as usize)).collect();
            let lost: Vec<_> = acknowledged.iter().filter(|(row, len)| found.get(row) != Some(len)).collect();
            assert!(lost.is_empty(), "node {} lost {lost:?}\n{}", node + 1, self.cluster.logs());
            let request = ContentHashRequest { log_index: verify.log_index };
            contents.push(self.cluster.client(node).content_hash(request).await.unwrap().into_inner().tables);
        }
        assert!(contents.iter().all(|tables| *tables == contents[0]), "the nodes differ");
    }

    /// No term had two leaders: somebody would have voted twice in it.
    fn check_leaders(&self) -> usize {
        let mut leaders: BTreeMap<u64, BTreeSet<usize>> = BTreeMap::new();
        for node in 0..NODES {
            let log = self.cluster.path().join(format!("node{}/raftd.log", node + 1));
            for line in fs::read_to_string(log).unwrap().lines().filter(|line| line.contains("role=Leader")) {
                let term = line.split("term=").nth(1).and_then(|rest| rest.split_whitespace().next());
                leaders.entry(term.unwrap().parse().unwrap()).or_default().insert(node + 1);
            }
        }
        for (term, leaders) in &leaders {
            assert_eq!(leaders.len(), 1, "in term {term} these nodes led: {leaders:?}");
        }
        assert!(!leaders.is_empty(), "the logs say who leads");
        leaders.len()
    }
}

fn integer(row: &Row, column: usize) -> i64 {
    match row.values[column].kind {
        Some(Kind::Integer(integer)) => integer,
        ref other => panic!("not an integer: {other:?}"),
    }
}

/// One round: load, a cut, sometimes a second one during the start, and a look at everything.
async fn round(powered: &mut Powered, choices: &mut Choices) -> (Vec<usize>, usize) {
    let victims: Vec<usize> = match choices.below(4) {
        0 | 1 => vec![choices.below(NODES as u64) as usize],
        2 => vec![powered.cluster.leader().await],
        _ => (0..NODES).collect(),
    };
    let journal = Arc::new(Journal::default());
    let mut writers = JoinSet::new();
    for number in 0..WRITERS {
        let client = powered.cluster.client(number as usize % NODES);
        writers.spawn(write(number, client, journal.clone(), Choices(choices.next())));
    }
    let moment = choices.below(80);
    eventually(&format!("{moment} writes are acknowledged\n{}", powered.cluster.logs()), || async {
        (journal.count.load(Ordering::Relaxed) >= moment).then_some(())
    })
    .await;
    powered.cut(&victims);
    powered.power_on(&victims);
    if choices.below(3) == 0 {
        // Again, somewhere in the start. A round trip, successful or not, is a moment of varying length.
        for _ in 0..choices.below(60) {
            let _ = powered.cluster.status(victims[0]).await;
        }
        powered.cut(&victims);
        powered.power_on(&victims);
    }
    // Before the wait: a node that catches up on a small machine need not race against megabytes a second.
    journal.done.store(true, Ordering::Relaxed);
    powered.cluster.wait_until_serving().await;
    while let Some(done) = writers.join_next().await {
        done.unwrap();
    }
    let acknowledged = journal.acknowledged.lock().unwrap().clone();
    powered.check(&acknowledged).await;
    execute(&mut powered.cluster.client(0), "delete from t").await.unwrap();
    (victims, acknowledged.len())
}

#[tokio::test(flavor = "multi_thread")]
async fn power_cuts_lose_nothing_that_was_acknowledged() {
    let number = |name: &str| env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    let rounds = number("ROUNDS").map_or(FEW_ROUNDS, |rounds| rounds as u32);
    let mut entropy = [0; 8];
    getrandom::fill(&mut entropy).unwrap();
    let seed = number("SEED").unwrap_or(u64::from_be_bytes(entropy) >> 32);
    println!("{rounds} rounds, SEED={seed}");
    let Some(mut powered) = Powered::start().await else { return };
    let mut choices = Choices(seed);
    let mut cuts_of_all = 0;
    for number in 1..=rounds {
        let began = Instant::now();
        let (victims, acknowledged) = round(&mut powered, &mut choices).await;
        cuts_of_all += u32::from(victims.len() == NODES);
        let terms = powered.check_leaders();
        println!(
            "round {number}: cut {:?}, {acknowledged} acknowledged, {terms} terms so far, {:.1} s",
            victims.iter().map(|node| node + 1).collect::<Vec<_>>(),
            began.elapsed().as_secs_f32()
        );
    }
    println!("{rounds} rounds, {cuts_of_all} of them of all nodes: nothing was lost");
}
