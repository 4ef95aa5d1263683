//! `resqlite bench`: a closed loop of clients against a cluster, and what it cost.
//!
//! Each client sends its next request when the last one is answered, so that
//! the figures say what a cluster does under so many clients, not how long a
//! queue can become. One second of warm-up is not counted.

use std::{
    fs,
    process::ExitCode,
    sync::Arc,
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use serde_json::json;
use tokio::time::{Instant, sleep_until};

use super::{TlsFiles, fail, playground};
use crate::client::{Builder, Client, Error, Params, Script, Value};

const WARM_UP: Duration = Duration::from_secs(1);
const VALUE_BYTES: usize = 256;
/// The rows that reads choose from.
const ROWS: i64 = 10_000;
/// The statements of one request of the script workload.
const SCRIPT_STATEMENTS: i64 = 100;
/// The kernel counts CPU time in this unit, everywhere (proc(5), USER_HZ).
const TICKS_PER_SECOND: f64 = 100.0;

#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// Addresses of nodes [default: a playground of its own]
    #[arg(long, env = "RESQLITE_ENDPOINTS", value_name = "HOST:PORT,…", value_delimiter = ',')]
    endpoints: Vec<String>,
    #[command(flatten)]
    tls: TlsFiles,
    /// How many clients, each with one request under way
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u16).range(1..))]
    clients: u16,
    /// How long to measure
    #[arg(long, value_name = "S", default_value_t = 8, value_parser = clap::value_parser!(u64).range(1..=3600))]
    seconds: u64,
    /// What the clients do
    #[arg(long, value_enum, default_value = "insert")]
    workload: Workload,
    /// How many connections the clients share
    #[arg(long, value_name = "C", default_value_t = 4, value_parser = clap::value_parser!(u16).range(1..))]
    connections: u16,
    /// One line of JSON
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Workload {
    /// Insert one row of 256 bytes
    Insert,
    /// Select one row by its key, linearizable
    Read,
    /// Every second request an insert, the others reads
    Mixed,
    /// Run a script of 100 inserts
    Script,
}

/// Runs the command.
pub async fn run(arguments: Arguments) -> ExitCode {
    if arguments.endpoints.is_empty() {
        let endpoints = playground::temporary().await;
        return match endpoints {
            Ok(cluster) => {
                let code = measure_and_print(&arguments, cluster.endpoints(), &Client::builder()).await;
                cluster.stop().await;
                code
            }
            Err(message) => fail(&message),
        };
    }
    measure_and_print(&arguments, &arguments.endpoints, &arguments.tls.builder()).await
}

async fn measure_and_print(arguments: &Arguments, endpoints: &[String], builder: &Builder) -> ExitCode {
    match measure(arguments, endpoints, builder).await {
        Ok(report) => {
            report.print(arguments);
            ExitCode::SUCCESS
        }
        Err(error) => fail(&error.to_string()),
    }
}

async fn measure(arguments: &Arguments, endpoints: &[String], builder: &Builder) -> Result<Report, Error> {
    let endpoints = leader_first(endpoints, builder).await?;
    let mut connections = Vec::new();
    for _ in 0..arguments.connections.min(arguments.clients) {
        connections.push(builder.clone().endpoints(&endpoints).connect().await?);
    }
    prepare(&connections[0]).await?;

    let begin = Instant::now() + WARM_UP;
    let end = begin + Duration::from_secs(arguments.seconds);
    let next_id = Arc::new(AtomicU64::new(first_id()));
    let loops: Vec<_> = (0..arguments.clients)
        .map(|number| ClosedLoop {
            client: connections[usize::from(number) % connections.len()].clone(),
            workload: arguments.workload,
            next_id: next_id.clone(),
            begin,
            end,
        })
        .map(|closed_loop| tokio::spawn(closed_loop.run()))
        .collect();
    sleep_until(begin).await;
    let cpu_before = cpu_seconds();
    sleep_until(end).await;
    let cpu_after = cpu_seconds();

    let mut report = Report::default();
    for closed_loop in loops {
        let (latencies_us, errors) = closed_loop.await.map_err(|error| Error::Internal(error.to_string()))?;
        report.latencies_us.extend(latencies_us);
        report.errors += errors;
    }
    report.latencies_us.sort_unstable();
    report.seconds = arguments.seconds as f64;
    report.cpu = cpu_after
        .into_iter()
        .map(|(name, pid, after)| {
            let before = cpu_before.iter().find(|(_, other, _)| *other == pid).map_or(0.0, |(_, _, s)| *s);
            (name, after - before)
        })
        .collect();
    Ok(report)
}

/// Where the other systems' drivers go as well: to the leader.
async fn leader_first(endpoints: &[String], builder: &Builder) -> Result<Vec<String>, Error> {
    let mut sorted = endpoints.to_vec();
    for (position, endpoint) in endpoints.iter().enumerate() {
        let status = builder.clone().endpoints([endpoint]).connect().await?.status().await?;
        if status.node.is_some_and(|node| node.role == "leader") {
            sorted.swap(0, position);
        }
    }
    Ok(sorted)
}

async fn prepare(client: &Client) -> Result<(), Error> {
    client.execute("CREATE TABLE IF NOT EXISTS kv(id INTEGER PRIMARY KEY, v TEXT)", ()).await?;
    let fill = format!(
        "INSERT OR IGNORE INTO kv WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {ROWS}) \
         SELECT i, ? FROM n"
    );
    client.execute(fill, Params::Positional(vec![Value::Text("x".repeat(VALUE_BYTES))])).await?;
    Ok(())
}

/// Above all ids of earlier runs on the same data.
fn first_id() -> u64 {
    let micros = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_micros());
    u64::try_from(micros).unwrap_or(u64::MAX / 4)
}

struct ClosedLoop {
    client: Client,
    workload: Workload,
    next_id: Arc<AtomicU64>,
    begin: Instant,
    end: Instant,
}

impl ClosedLoop {
    /// The latencies of the requests that were answered while measuring, and how many failed.
    async fn run(self) -> (Vec<u32>, u64) {
        let value = Value::Text("x".repeat(VALUE_BYTES));
        let (mut latencies_us, mut errors) = (Vec::new(), 0);
        let mut sent_at = Instant::now();
        while sent_at < self.end {
            let result = self.request(&value).await;
            let answered_at = Instant::now();
            if (self.begin..self.end).contains(&answered_at) {
                match result {
                    Ok(()) => {
                        let latency = (answered_at - sent_at).as_micros();
                        latencies_us.push(u32::try_from(latency).unwrap_or(u32::MAX));
                    }
                    Err(_) => errors += 1,
                }
            }
            sent_at = answered_at;
        }
        (latencies_us, errors)
    }

    async fn request(&self, value: &Value) -> Result<(), Error> {
        let number = self.next_id.fetch_add(SCRIPT_STATEMENTS as u64, Ordering::Relaxed).cast_signed();
        match self.workload {
            Workload::Insert => self.insert(number, value).await,
            Workload::Read => self.read(number).await,
            Workload::Mixed if number / SCRIPT_STATEMENTS % 2 == 0 => self.insert(number, value).await,
            Workload::Mixed => self.read(number).await,
            Workload::Script => self.script(number).await,
        }
    }

    async fn insert(&self, id: i64, value: &Value) -> Result<(), Error> {
        let params = Params::Positional(vec![Value::Integer(id), value.clone()]);
        self.client.execute("INSERT INTO kv(id, v) VALUES(?, ?)", params).await.map(drop)
    }

    async fn read(&self, number: i64) -> Result<(), Error> {
        // A stride prime to the number of rows visits them all.
        let params = Params::Positional(vec![Value::Integer(1 + number / SCRIPT_STATEMENTS * 7_919 % ROWS)]);
        match self.client.query_one("SELECT v FROM kv WHERE id = ?", params).await? {
            Some(_) => Ok(()),
            None => Err(Error::Internal("a row that was inserted is not there".into())),
        }
    }

    async fn script(&self, first_id: i64) -> Result<(), Error> {
        let statement = |id| format!("INSERT INTO kv(id, v) VALUES({id}, 'x');\n");
        let text: String = (first_id..first_id + SCRIPT_STATEMENTS).map(statement).collect();
        let mut run = self.client.run(Script::new(text)).await?;
        while run.next().await?.is_some() {}
        Ok(())
    }
}

/// Name, process id and CPU seconds of every daemon on this machine, and of this program.
fn cpu_seconds() -> Vec<(String, u32, f64)> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        let Ok(stat) = fs::read_to_string(entry.path().join("stat")) else { continue };
        // The name stands in parentheses and may contain anything (proc(5)).
        let (Some(open), Some(close)) = (stat.find('('), stat.rfind(')')) else { continue };
        let name = &stat[open + 1..close];
        if pid != std::process::id() && !["raftd", "sqlited"].contains(&name) {
            continue;
        }
        let fields: Vec<&str> = stat[close + 1..].split_whitespace().collect();
        let ticks = |field: usize| fields.get(field).and_then(|text| text.parse::<f64>().ok()).unwrap_or(0.0);
        found.push((name.to_owned(), pid, (ticks(11) + ticks(12)) / TICKS_PER_SECOND));
    }
    found
}

#[derive(Default)]
struct Report {
    latencies_us: Vec<u32>,
    errors: u64,
    seconds: f64,
    /// CPU seconds by process.
    cpu: Vec<(String, f64)>,
}

impl Report {
    fn operations(&self) -> f64 {
        self.latencies_us.len() as f64
    }

    fn percentile_ms(&self, share: f64) -> f64 {
        let last = self.latencies_us.len().saturating_sub(1);
        let position = (last as f64 * share) as usize;
        self.latencies_us.get(position).map_or(0.0, |micros| f64::from(*micros) / 1_000.0)
    }

    fn per_10k(&self, cpu_seconds: f64) -> f64 {
        cpu_seconds / self.operations().max(1.0) * 10_000.0
    }

    fn print(&self, arguments: &Arguments) {
        let ops_s = self.operations() / self.seconds;
        let [p50, p99, p999] = [0.5, 0.99, 0.999].map(|share| self.percentile_ms(share));
        let cpu: Vec<_> = self.cpu.iter().map(|(name, s)| (name, self.per_10k(*s))).collect();
        if arguments.json {
            let cpu: Vec<_> =
                cpu.iter().map(|(name, s)| json!({ "process": name, "cpu_s_per_10k": s })).collect();
            println!(
                "{}",
                json!({ "ops_s": ops_s, "p50_ms": p50, "p99_ms": p99, "p999_ms": p999, "errors": self.errors,
                        "clients": arguments.clients, "cpu": cpu })
            );
            return;
        }
        println!("{ops_s:.0} requests/s, {} errors", self.errors);
        println!("latency: p50 {p50:.2} ms, p99 {p99:.2} ms, p99.9 {p999:.2} ms");
        for (name, seconds) in cpu {
            println!("{seconds:8.3} CPU seconds per 10,000 requests: {name}");
        }
    }
}
