//! What those see who watch a cluster: metrics that are documented, and checks
//! that name what is wrong.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
    process::Command,
};

use crate::harness::{Cluster, Daemon, eventually, execute, query};

const DAEMONS: [Daemon; 2] = [Daemon::Raftd, Daemon::Sqlited];

/// A metric's type and its help text, by its name.
type Described = BTreeMap<String, (String, String)>;

/// The families of a scrape, as `# HELP` and `# TYPE` tell of them.
fn scraped(text: &str) -> Described {
    let mut found = Described::new();
    for line in text.lines() {
        let mut words = line.splitn(4, ' ');
        let (Some("#"), Some(kind), Some(name), Some(rest)) =
            (words.next(), words.next(), words.next(), words.next())
        else {
            continue;
        };
        let described = found.entry(name.to_owned()).or_default();
        match kind {
            "TYPE" => described.0 = rest.to_owned(),
            _ => described.1 = rest.to_owned(),
        }
    }
    found
}

/// The rows of the tables in `docs/metrics.md`.
fn documented() -> Described {
    let text = file("docs/metrics.md");
    let rows = text.lines().filter_map(|line| line.strip_prefix("| `resqlite_")?.strip_suffix(" |"));
    let cells = rows.map(|row| row.splitn(4, " | ").map(str::to_owned).collect::<Vec<_>>());
    cells
        .map(|cells| {
            let [name, kind, _labels, help] = cells.as_slice() else { panic!("not four cells: {cells:?}") };
            (format!("resqlite_{}", name.trim_end_matches('`')), (kind.clone(), help.clone()))
        })
        .collect()
}

/// The value of a series, as it is written in a scrape.
fn value(text: &str, series: &str) -> Option<f64> {
    text.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' ')?.parse().ok())
}

async fn metrics(cluster: &Cluster, node: usize, daemon: Daemon) -> String {
    let (status, text) = cluster.watch(node, daemon, "/metrics").await.expect("it answers");
    assert_eq!(status, 200);
    text
}

#[tokio::test]
async fn every_metric_is_documented_and_every_documented_metric_is_there() {
    let cluster = Cluster::start(3).await;
    execute(&mut cluster.client(0), "create table t(x)").await.unwrap();
    let mut found = Described::new();
    for node in 0..cluster.size() {
        for daemon in DAEMONS {
            found.extend(scraped(&metrics(&cluster, node, daemon).await));
        }
    }
    assert_eq!(documented(), found);
}

#[tokio::test]
async fn metrics_follow_what_the_cluster_does() {
    let cluster = Cluster::start(3).await;
    let leader = cluster.leader().await;
    let follower = (leader + 1) % 3;
    let mut client = cluster.client(follower);
    execute(&mut client, "create table t(x not null)").await.unwrap();
    for _ in 0..10 {
        execute(&mut client, "insert into t values (1)").await.unwrap();
    }
    execute(&mut client, "insert into t values (null)").await.unwrap_err();
    cluster.wait_until_level().await;

    let sql = metrics(&cluster, follower, Daemon::Sqlited).await;
    assert_eq!(
        value(&sql, "resqlite_sql_requests_total{code=\"OK\",method=\"Execute\"}"),
        Some(11.0),
        "{sql}"
    );
    assert_eq!(
        value(&sql, "resqlite_sql_requests_total{code=\"FAILED_PRECONDITION\",method=\"Execute\"}"),
        Some(1.0)
    );
    // The refused one was applied, too: everybody agrees that it fails.
    assert_eq!(value(&sql, "resqlite_sql_write_seconds_count"), Some(12.0));
    assert_eq!(value(&sql, "resqlite_sql_lag_entries"), Some(0.0));
    assert_eq!(value(&sql, "resqlite_sql_serving"), Some(1.0));
    assert_eq!(value(&sql, "resqlite_sql_diverged"), Some(0.0));

    let proposer = metrics(&cluster, follower, Daemon::Raftd).await;
    assert!(
        value(&proposer, "resqlite_raft_proposals_total{outcome=\"committed\"}") >= Some(12.0),
        "{proposer}"
    );
    assert!(value(&proposer, "resqlite_raft_fsync_seconds_count") >= Some(12.0));
    assert_eq!(value(&proposer, "resqlite_raft_is_leader"), Some(0.0));
    let raft = metrics(&cluster, leader, Daemon::Raftd).await;
    assert_eq!(value(&raft, "resqlite_raft_is_leader"), Some(1.0));
    assert_eq!(value(&raft, "resqlite_raft_leader_id"), Some(leader as f64 + 1.0));
    for node in (0..3).filter(|node| *node != leader) {
        let lag = format!("resqlite_raft_peer_lag_entries{{peer=\"{}\"}}", node + 1);
        assert_eq!(value(&raft, &lag), Some(0.0), "{raft}");
    }
}

/// The checks of an answer that fail.
fn failures(body: &str) -> BTreeSet<&str> {
    let failed = body.lines().filter_map(|line| line.strip_prefix("[-]"));
    failed.map(|line| line.split(' ').next().unwrap()).collect()
}

/// Waits until this path of a daemon fails exactly these checks.
async fn until_failing(cluster: &Cluster, node: usize, daemon: Daemon, path: &str, checks: &[&str]) {
    let wanted = BTreeSet::from_iter(checks.iter().copied());
    eventually(&format!("{path} of {daemon:?} fails {wanted:?}"), || async {
        let (status, body) = cluster.watch(node, daemon, path).await?;
        let expected = if wanted.is_empty() { 200 } else { 503 };
        (status == expected && failures(&body) == wanted).then_some(())
    })
    .await;
}

#[tokio::test]
async fn readiness_names_what_is_missing_and_comes_back_while_liveness_stays() {
    let mut cluster = Cluster::start(3).await;
    for daemon in DAEMONS {
        until_failing(&cluster, 0, daemon, "/readyz", &[]).await;
        until_failing(&cluster, 0, daemon, "/livez", &[]).await;
    }
    for node in [1, 2] {
        cluster.kill(node, Daemon::Raftd);
    }
    for daemon in DAEMONS {
        until_failing(&cluster, 0, daemon, "/readyz", &["leader"]).await;
        until_failing(&cluster, 0, daemon, "/livez", &[]).await;
    }
    cluster.kill(0, Daemon::Raftd);
    until_failing(&cluster, 0, Daemon::Sqlited, "/readyz", &["leader", "raftd"]).await;
    until_failing(&cluster, 0, Daemon::Sqlited, "/livez", &[]).await;
    for node in 0..3 {
        cluster.launch(node);
    }
    for daemon in DAEMONS {
        until_failing(&cluster, 0, daemon, "/readyz", &[]).await;
    }
    query(&mut cluster.client(0), "select 1").await.unwrap();
}

fn file(path: &str) -> String {
    fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(path)).unwrap()
}

#[test]
fn every_alert_is_explained_and_asks_for_metrics_that_there_are() {
    let rules = file("deploy/monitoring/resqlite.rules.yml");
    let alerts: BTreeSet<&str> =
        rules.lines().filter_map(|line| line.trim().strip_prefix("- alert: ")).collect();
    let operations = file("docs/operations.md");
    let explained: BTreeSet<&str> =
        operations.lines().filter_map(|line| line.strip_prefix("| Resqlite")?.split(' ').next()).collect();
    let explained: BTreeSet<String> = explained.into_iter().map(|name| format!("Resqlite{name}")).collect();
    assert_eq!(alerts.into_iter().map(str::to_owned).collect::<BTreeSet<_>>(), explained);

    let documented = documented();
    for expression in rules.lines().filter_map(|line| line.trim().strip_prefix("expr: ")) {
        let words = expression.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_'));
        for name in words.filter(|word| word.starts_with("resqlite_")) {
            let of_histogram = name.strip_suffix("_bucket").unwrap_or(name);
            assert!(documented.contains_key(of_histogram), "{name} in {expression}");
        }
    }
}

#[test]
fn prometheus_takes_the_example_configuration_and_its_rules() {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR"));
    let promtool = directory.join("target/tools/promtool");
    if !promtool.exists() {
        eprintln!("SKIPPED: there is no {}; tests/install-tools fetches it", promtool.display());
        return;
    }
    for arguments in [
        ["check", "config", "prometheus.yml"],
        ["check", "rules", "resqlite.rules.yml"],
        ["test", "rules", "resqlite.test.yml"],
    ] {
        let mut command = Command::new(&promtool);
        let ran = command.args(arguments).current_dir(directory.join("deploy/monitoring")).output().unwrap();
        let (out, err) = (String::from_utf8_lossy(&ran.stdout), String::from_utf8_lossy(&ran.stderr));
        assert!(ran.status.success(), "{arguments:?}: {out}{err}");
    }
}
