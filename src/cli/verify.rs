//! `resqlite verify`: do all nodes hold the same?
//!
//! A marker in the log names the moment; every member says what its content comes to as of that, and what
//! most of them say is taken for right. Writes go on meanwhile.

use std::{collections::BTreeMap, process::ExitCode, time::Duration};

use tokio::task::JoinSet;

use super::{Endpoints, connect, fail};
use crate::{
    api::{Member, TableHash},
    client::{Builder, Error},
};

#[derive(Debug, clap::Args)]
pub struct Arguments {
    #[command(flatten)]
    cluster: Endpoints,
    /// How long to wait for a node to hash its content
    #[arg(long, value_name = "S", default_value_t = 300, value_parser = clap::value_parser!(u64).range(1..=3600))]
    timeout: u64,
}

/// A member, and what its content comes to.
struct Answer {
    member: Member,
    tables: Result<Vec<TableHash>, Error>,
}

/// Runs the command: fails unless every member holds the same.
pub async fn run(arguments: Arguments) -> ExitCode {
    let timeout = Duration::from_secs(arguments.timeout);
    match ask_all(&arguments.cluster, timeout).await {
        Ok((index, answers)) => report(index, &answers),
        Err(error) => fail(&error.to_string()),
    }
}

async fn ask_all(cluster: &Endpoints, timeout: Duration) -> Result<(u64, Vec<Answer>), Error> {
    let client = connect(cluster.builder()).await?;
    let members = client.status().await?.members;
    let index = client.verify().await?;
    let mut asking = JoinSet::new();
    for member in members {
        let builder = client.sibling();
        asking.spawn(async move {
            let tables = ask(&member.sql_address, builder, index, timeout).await;
            Answer { member, tables }
        });
    }
    let mut answers = asking.join_all().await;
    answers.sort_by_key(|answer| answer.member.id);
    Ok((index, answers))
}

async fn ask(
    address: &str,
    builder: Builder,
    index: u64,
    timeout: Duration,
) -> Result<Vec<TableHash>, Error> {
    // A node that does not answer at all is soon given up; one that is still hashing is not.
    let client = builder.endpoints([address]).retry_for(Duration::ZERO).deadline(Some(timeout));
    Ok(client.connect().await?.content_hash(index).await?.tables)
}

/// Says how it stands with every member. Success only if all have answered, and alike.
fn report(index: u64, answers: &[Answer]) -> ExitCode {
    let right = majority(answers);
    let mut good = 0;
    for Answer { member, tables } in answers {
        let (id, address) = (member.id, &member.sql_address);
        match (tables, right) {
            (Err(error), _) => println!("node {id} ({address}): not compared: {error}"),
            (Ok(tables), Some(right)) if tables == right => {
                good += 1;
                println!("node {id} ({address}): the same");
            }
            (Ok(tables), Some(right)) => println!(
                "node {id} ({address}): DIFFERS from most others in {}: it serves no more; rebuild it from its peers \
                 with `resqlite node replace`",
                differences(tables, right)
            ),
            (Ok(_), None) => println!("node {id} ({address}): no content is that of most nodes"),
        }
    }
    if good == answers.len() {
        println!("all {good} nodes hold the same content as of log index {index}");
        return ExitCode::SUCCESS;
    }
    match right {
        Some(_) => {
            fail(&format!("{good} of {} nodes hold the same content as of log index {index}", answers.len()))
        }
        None => fail(&format!(
            "no content is that of most nodes as of log index {index}: compare the nodes by hand, and restore a backup \
             if need be"
        )),
    }
}

/// What more than half of the members say.
fn majority(answers: &[Answer]) -> Option<&[TableHash]> {
    let contents = || answers.iter().filter_map(|answer| answer.tables.as_deref().ok());
    contents().find(|content| 2 * contents().filter(|other| other == content).count() > answers.len())
}

/// The tables that differ, in words.
fn differences(tables: &[TableHash], right: &[TableHash]) -> String {
    let by_name = |tables: &[TableHash]| -> BTreeMap<String, _> {
        tables.iter().map(|table| (table.name.clone(), table.hash.clone())).collect()
    };
    let (own, right) = (by_name(tables), by_name(right));
    let names: std::collections::BTreeSet<&String> = own.keys().chain(right.keys()).collect();
    let differing = names.into_iter().filter(|name| own.get(*name) != right.get(*name));
    let words = differing.map(|name| match name.as_str() {
        "" => "the schema".to_owned(),
        name => format!("the table {name}"),
    });
    words.collect::<Vec<_>>().join(", ")
}
