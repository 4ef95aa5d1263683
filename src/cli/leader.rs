//! `resqlite leader transfer`: hands leadership over, before a host is taken down or because it is slow.
//!
//! Only the leader can hand over, so it is looked for first: any node of the cluster may be named.

use std::{
    process::ExitCode,
    time::{Duration, Instant},
};

use tokio::time::sleep;

use super::{
    Endpoints, fail,
    status::{Node, gather},
};
use crate::client::{Builder, Error};

/// How long the other nodes may take to learn who leads.
const LEARN_WITHIN: Duration = Duration::from_secs(10);
/// How long the handing over may take.
const TRANSFER_WITHIN: Duration = Duration::from_secs(60);
/// The pause before the nodes are asked again.
const ASK_EVERY: Duration = Duration::from_millis(50);

#[derive(Debug, clap::Subcommand)]
pub enum Command {
    /// Hand leadership over; wait until it is done and say who leads
    Transfer {
        #[command(flatten)]
        cluster: Endpoints,
        /// The id of the member that is to lead [default: the most advanced one]
        #[arg(long, value_name = "ID", value_parser = clap::value_parser!(u64).range(1..))]
        to: Option<u64>,
    },
}

/// Runs the command.
pub async fn run(Command::Transfer { cluster, to }: Command) -> ExitCode {
    match transfer(&cluster.endpoints, &cluster.tls.builder(), to).await {
        Ok(said) => {
            println!("{said}");
            ExitCode::SUCCESS
        }
        Err(why) => fail(&why),
    }
}

async fn transfer(endpoints: &[String], builder: &Builder, to: Option<u64>) -> Result<String, String> {
    let nodes = gather(endpoints, builder).await;
    let leader = leader_of(&nodes)?;
    let before = leader.id().unwrap_or_default();
    if to == Some(before) {
        return Ok(format!("node {before} leads already, in term {}", leader.term().unwrap_or_default()));
    }
    let new =
        ask(leader.address(), builder.clone(), to.unwrap_or(0)).await.map_err(|error| error.to_string())?;
    until_known(endpoints, builder, new, before).await
}

/// The node that says that it leads, in the highest term.
fn leader_of(nodes: &[Node]) -> Result<&Node, String> {
    if nodes.iter().all(|node| !node.is_reachable()) {
        return Err("no node answers: see whether the addresses are right, and the daemons run".into());
    }
    nodes.iter().filter(|node| node.leads()).max_by_key(|node| node.term()).ok_or_else(|| {
        "no reachable node leads: `resqlite status` says what each of them lacks; try again when one does"
            .into()
    })
}

async fn ask(address: &str, builder: Builder, to: u64) -> Result<u64, Error> {
    let builder = builder.endpoints([address]).retry_for(Duration::ZERO);
    builder.deadline(Some(TRANSFER_WITHIN)).connect().await?.move_leader(to).await
}

/// Waits until every node that answers follows the new leader, or yet another one: leadership may move on meanwhile.
async fn until_known(
    endpoints: &[String],
    builder: &Builder,
    new: u64,
    before: u64,
) -> Result<String, String> {
    let until = Instant::now() + LEARN_WITHIN;
    loop {
        let nodes = gather(endpoints, builder).await;
        if let Ok(leader) = leader_of(&nodes)
            && nodes.iter().filter(|node| node.is_reachable()).all(|node| node.leader_id() == leader.id())
        {
            let (id, term) = (leader.id().unwrap_or_default(), leader.term().unwrap_or_default());
            return Ok(format!("node {id} leads in term {term}; before it was node {before}"));
        }
        if Instant::now() >= until {
            return Err(format!(
                "node {new} has taken over, but not every node has learnt so within {} s: look at `resqlite status`",
                LEARN_WITHIN.as_secs()
            ));
        }
        sleep(ASK_EVERY).await;
    }
}
