//! What an operator does with leadership, through the program: hands it over, and watches who has it.

use std::{
    io::{BufRead, BufReader},
    process::{Command, Output, Stdio},
};

use resqlite::api::MoveLeaderRequest;
use tonic::Code;

use crate::harness::{Cluster, Daemon, execute, program};

/// Runs `resqlite leader transfer` at these endpoints; whether it succeeded, and all that it said.
async fn transfer(endpoints: &str, to: Option<usize>) -> (bool, String) {
    let mut command = Command::new(program("resqlite"));
    command.args(["leader", "transfer", "--endpoints", endpoints]);
    if let Some(node) = to {
        command.args(["--to", &node.to_string()]);
    }
    let Output { status, stdout, stderr } =
        tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap();
    (status.success(), [stdout, stderr].map(|bytes| String::from_utf8(bytes).unwrap()).concat())
}

#[tokio::test(flavor = "multi_thread")]
async fn leadership_goes_where_the_operator_says_whichever_node_is_asked() {
    let cluster = Cluster::start(3).await;
    execute(&mut cluster.client(0), "create table t(x)").await.unwrap();
    let first = cluster.leader().await;
    let (second, asked) = ((first + 1) % 3, (first + 2) % 3);

    let (done, said) = transfer(cluster.sql_address(asked), Some(second + 1)).await;
    assert!(done && said.starts_with(&format!("node {} leads in term ", second + 1)), "{said}");
    assert!(said.contains(&format!("before it was node {}", first + 1)), "{said}");
    assert_eq!(cluster.leader().await, second);

    let (done, said) = transfer(&cluster.endpoints(), Some(second + 1)).await;
    assert!(done && said.contains("leads already"), "{said}");
    let (done, said) = transfer(&cluster.endpoints(), None).await;
    assert!(done, "{said}");
    assert_ne!(cluster.leader().await, second);
    execute(&mut cluster.client(0), "insert into t values (1)").await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_handed_over_is_refused_with_what_to_do() {
    let mut cluster = Cluster::start(3).await;
    let (done, said) = transfer(&cluster.endpoints(), Some(9)).await;
    assert!(!done && said.contains("9 is not a member of the cluster (members: 1, 2, 3)"), "{said}");

    let leader = cluster.leader().await;
    let follower = (leader + 1) % 3;
    let refused = cluster.client(follower).move_leader(MoveLeaderRequest { to: 0 }).await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition);
    let hint = format!("ask node {}, which does, at {}", leader + 1, cluster.sql_address(leader));
    assert!(refused.message().contains(&hint), "{}", refused.message());

    // A member that is away cannot take over; the leader leads on.
    cluster.kill(follower, Daemon::Raftd);
    let (done, said) = transfer(&cluster.endpoints(), Some(follower + 1)).await;
    assert!(!done && said.contains("resqlite status"), "{said}");
    assert_eq!(cluster.leader().await, leader);

    for node in (0..3).filter(|node| *node != follower) {
        cluster.kill(node, Daemon::Sqlited);
    }
    cluster.kill(follower, Daemon::Sqlited);
    let (done, said) = transfer(&cluster.endpoints(), None).await;
    assert!(!done && said.contains("no node answers"), "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_live_view_goes_on_until_it_is_interrupted() {
    let cluster = Cluster::start(3).await;
    let endpoints = cluster.endpoints();
    let watched = tokio::task::spawn_blocking(move || {
        let mut command = Command::new(program("resqlite"));
        command.args(["status", "--watch", "--endpoints", &endpoints]);
        let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines().map(Result::unwrap);
        let (first, second) = (headline(&mut lines), headline(&mut lines));
        let interrupt = Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
        assert!(interrupt.success());
        let rest: Vec<String> = lines.collect();
        (first, second, rest, child.wait().unwrap())
    });
    let (first, second, rest, status) = watched.await.unwrap();
    assert!(first.starts_with("cluster test: 3 of 3 nodes answer, leader: node "), "{first}");
    assert_eq!(first, second);
    assert!(rest.iter().any(|line| line.contains("leader")), "{rest:?}");
    assert!(status.success(), "{status}");
}

/// The first line of the next picture.
fn headline(lines: &mut impl Iterator<Item = String>) -> String {
    lines.find(|line| line.starts_with("cluster test: ")).unwrap()
}
