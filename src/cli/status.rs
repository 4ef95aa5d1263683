//! `resqlite status`: every node of the cluster, as it sees itself.

use std::{
    collections::BTreeMap,
    io::{self, IsTerminal, Write},
    process::ExitCode,
    time::Duration,
};

use serde::Serialize;
use tokio::{task::JoinSet, time::MissedTickBehavior};

use super::{
    EXIT_BROKEN_PIPE, Endpoints, fail,
    render::{Format, Mode, Printer},
    screen::Screen,
};
use crate::{
    api::{self, Member, NodeStatus, StatusResponse, value::Kind},
    client::{Builder, Column, Error, Row},
};

/// A node that does not answer within this time counts as unreachable.
const ANSWER_WITHIN: Duration = Duration::from_secs(2);

#[derive(Debug, clap::Args)]
pub struct Arguments {
    #[command(flatten)]
    cluster: Endpoints,
    /// Print a JSON array
    #[arg(long, conflicts_with = "watch")]
    json: bool,
    /// Ask again and again, and redraw, until Ctrl-C
    #[arg(long)]
    watch: bool,
    /// How often, with --watch
    #[arg(long, value_name = "S", default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=3600))]
    interval: u64,
}

/// Runs the command: fails if no node answers.
pub async fn run(arguments: Arguments) -> ExitCode {
    if arguments.watch {
        let Endpoints { endpoints, tls } = &arguments.cluster;
        return watch(endpoints, &tls.builder(), Duration::from_secs(arguments.interval)).await;
    }
    let nodes = gather(&arguments.cluster.endpoints, &arguments.cluster.tls.builder()).await;
    let mut out = io::stdout().lock();
    let written = match arguments.json {
        true => serde_json::to_writer_pretty(&mut out, &nodes)
            .map_err(io::Error::from)
            .and_then(|()| writeln!(out)),
        false => write_table(&nodes, &mut out),
    };
    if written.and_then(|()| out.flush()).is_err() || nodes.iter().all(|node| !node.reachable) {
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
}

/// Redraws until Ctrl-C, or until nobody looks any more.
async fn watch(endpoints: &[String], builder: &Builder, interval: Duration) -> ExitCode {
    let stdout = io::stdout();
    let is_terminal = stdout.is_terminal();
    // It lives outside of what Ctrl-C drops, and puts the terminal back when it goes itself.
    let mut screen = Screen::new(stdout, is_terminal);
    let mut ticks = tokio::time::interval(interval);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let redraw = async {
        loop {
            ticks.tick().await;
            let nodes = gather(endpoints, builder).await;
            let drawn = live_view(&nodes).and_then(|picture| screen.draw(&picture));
            if let Err(error) = drawn {
                return error;
            }
        }
    };
    tokio::select! {
        interrupted = tokio::signal::ctrl_c() => match interrupted {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => fail(&format!("cannot wait for Ctrl-C: {error}")),
        },
        error = redraw => match error.kind() {
            io::ErrorKind::BrokenPipe => ExitCode::from(EXIT_BROKEN_PIPE),
            _ => fail(&error.to_string()),
        },
    }
}

/// The line above the table says what there is of a quorum.
fn live_view(nodes: &[Node]) -> io::Result<String> {
    let reachable = nodes.iter().filter(|node| node.reachable).count();
    let name = nodes.iter().find_map(|node| node.cluster_name.as_deref()).unwrap_or("unknown");
    let leader = nodes.iter().find(|node| node.leads()).and_then(|node| node.id);
    let leader = leader.map_or("none reachable".to_owned(), |id| format!("node {id}"));
    let mut picture =
        format!("cluster {name}: {reachable} of {} nodes answer, leader: {leader}\n\n", nodes.len());
    let mut table = Vec::new();
    write_table(nodes, &mut table)?;
    picture.push_str(&String::from_utf8_lossy(&table));
    Ok(picture)
}

/// One node, as `--json` prints it. What is not known is null.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Node {
    id: Option<u64>,
    address: String,
    reachable: bool,
    cluster_name: Option<String>,
    role: Option<String>,
    term: Option<u64>,
    leader_id: Option<u64>,
    commit_index: Option<u64>,
    applied_index: Option<u64>,
    lag_entries: Option<u64>,
    database_bytes: Option<u64>,
    log_bytes: Option<u64>,
    database_free_bytes: Option<u64>,
    log_free_bytes: Option<u64>,
    sqlited_version: Option<String>,
    raftd_version: Option<String>,
    sqlite_version: Option<String>,
    /// "ok", or what is wrong.
    health: String,
    /// What wants doing before it becomes a problem.
    warnings: Vec<String>,
}

impl Node {
    fn answered(address: String, status: NodeStatus) -> Self {
        let known = |text: String| Some(text).filter(|text| !text.is_empty());
        let raftd_known = !status.raftd_version.is_empty();
        let no_room = |why: String| format!("takes no new writes: {why}");
        let health = known(status.unhealthy)
            .or_else(|| known(status.alarm))
            .or_else(|| known(status.writes_refused).map(no_room));
        Self {
            id: Some(status.id),
            address,
            reachable: true,
            cluster_name: known(status.cluster_name),
            role: known(status.role),
            term: Some(status.term),
            leader_id: Some(status.leader_id).filter(|id| *id != 0),
            commit_index: Some(status.commit_index),
            applied_index: Some(status.applied_index),
            lag_entries: Some(status.lag_entries),
            database_bytes: Some(status.database_bytes),
            log_bytes: Some(status.log_bytes),
            database_free_bytes: Some(status.database_free_bytes),
            log_free_bytes: Some(status.log_free_bytes).filter(|_| raftd_known),
            sqlited_version: known(status.sqlited_version),
            raftd_version: known(status.raftd_version),
            sqlite_version: known(status.sqlite_version),
            health: health.unwrap_or_else(|| "ok".into()),
            warnings: status.warnings,
        }
    }

    /// Its id, where it is known.
    pub fn id(&self) -> Option<u64> {
        self.id
    }

    /// Where it was asked.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// Whether it answered.
    pub fn is_reachable(&self) -> bool {
        self.reachable
    }

    /// Whether it says that it leads.
    pub fn leads(&self) -> bool {
        self.role.as_deref() == Some("leader")
    }

    /// The term that it is in.
    pub fn term(&self) -> Option<u64> {
        self.term
    }

    /// Whom it follows.
    pub fn leader_id(&self) -> Option<u64> {
        self.leader_id
    }

    fn silent(id: Option<u64>, address: String, error: &Error) -> Self {
        Self { id, address, health: format!("unreachable: {error}"), ..Self::default() }
    }
}

/// Asks the given endpoints, and the members that they know of. In the order of their ids.
pub async fn gather(endpoints: &[String], builder: &Builder) -> Vec<Node> {
    let mut answers = ask_all(endpoints.to_vec(), builder).await;
    let members: BTreeMap<u64, Member> = answers
        .iter()
        .filter_map(|(_, answer)| answer.as_ref().ok())
        .flat_map(|status| status.members.iter().map(|member| (member.id, member.clone())))
        .collect();
    // An endpoint may be another name of a member's address: its id tells.
    let answered = |id: &u64, answers: &[Answer]| {
        let ids = answers.iter().filter_map(|(_, answer)| answer.as_ref().ok()?.node.as_ref());
        ids.into_iter().any(|node| node.id == *id)
    };
    let asked = |address: &str, answers: &[Answer]| answers.iter().any(|(endpoint, _)| endpoint == address);
    let missing: Vec<String> = members
        .values()
        .filter(|member| !answered(&member.id, &answers) && !asked(&member.sql_address, &answers))
        .map(|member| member.sql_address.clone())
        .collect();
    answers.extend(ask_all(missing, builder).await);

    let id_of =
        |address: &str| members.values().find(|member| member.sql_address == address).map(|member| member.id);
    let mut nodes: Vec<Node> = Vec::new();
    for (address, answer) in answers {
        let node = match answer.map(|status| status.node) {
            Ok(Some(status)) => Node::answered(address, status),
            Ok(None) => Node::silent(id_of(&address), address, &Error::Internal("an empty answer".into())),
            Err(error) => Node::silent(id_of(&address), address, &error),
        };
        if node.id.is_none() || !nodes.iter().any(|known| known.id == node.id) {
            nodes.push(node);
        }
    }
    nodes.sort_by_key(|node| (node.id.is_none(), node.id));
    nodes
}

type Answer = (String, Result<StatusResponse, Error>);

/// All at the same time; the answers in the order of the addresses.
async fn ask_all(addresses: Vec<String>, builder: &Builder) -> Vec<Answer> {
    let mut asking = JoinSet::new();
    for (position, address) in addresses.into_iter().enumerate() {
        let builder = builder.clone();
        asking.spawn(async move {
            let answer = ask(&address, builder).await;
            (position, (address, answer))
        });
    }
    let mut answers = asking.join_all().await;
    answers.sort_by_key(|(position, _)| *position);
    answers.into_iter().map(|(_, answer)| answer).collect()
}

/// Asks one node what it says of itself.
pub async fn ask(address: &str, builder: Builder) -> Result<StatusResponse, Error> {
    let builder = builder.endpoints([address]).connect_for(ANSWER_WITHIN).retry_for(Duration::ZERO);
    builder.deadline(Some(ANSWER_WITHIN)).connect().await?.status().await
}

/// The table that people read.
pub fn write_table(nodes: &[Node], out: &mut impl Write) -> io::Result<()> {
    const NAMES: [&str; 12] = [
        "id",
        "address",
        "role",
        "term",
        "leader",
        "commit",
        "applied",
        "lag",
        "database bytes",
        "log bytes",
        "version",
        "health",
    ];
    let columns = NAMES.map(|name| Column { name: name.into(), declared_type: String::new() });
    let mut printer = Printer::new(Format::option(Mode::Table), columns.to_vec());
    for node in nodes {
        let number =
            |number: Option<u64>| number.map_or_else(|| text("-"), |number| text(&number.to_string()));
        let values = vec![
            number(node.id),
            text(&node.address),
            text(node.role.as_deref().unwrap_or("unreachable")),
            number(node.term),
            number(node.leader_id),
            number(node.commit_index),
            number(node.applied_index),
            number(node.lag_entries),
            number(node.database_bytes),
            number(node.log_bytes),
            text(&versions(node)),
            text(&node.health),
        ];
        printer.row(&Row(api::Row { values }), out)?;
    }
    printer.end(out)?;
    for node in nodes {
        for warning in &node.warnings {
            writeln!(out, "warning: node {}: {warning}", node.id.unwrap_or_default())?;
        }
    }
    Ok(())
}

fn text(text: &str) -> api::Value {
    api::Value { kind: Some(Kind::Text(text.to_owned())) }
}

/// One version where both daemons agree, which is the rule.
fn versions(node: &Node) -> String {
    let daemons = match (&node.sqlited_version, &node.raftd_version) {
        (Some(sqlited), Some(raftd)) if sqlited == raftd => sqlited.clone(),
        (sqlited, raftd) => {
            let known = [("sqlited", sqlited), ("raftd", raftd)];
            let known =
                known.iter().filter_map(|(name, version)| Some(format!("{name} {}", version.as_ref()?)));
            known.collect::<Vec<_>>().join(", ")
        }
    };
    match &node.sqlite_version {
        Some(sqlite) => format!("{daemons} (SQLite {sqlite})"),
        None if daemons.is_empty() => "-".into(),
        None => daemons,
    }
}
