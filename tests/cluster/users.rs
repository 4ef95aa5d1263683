//! Users on whole clusters: what the command line changes holds at every node, through kills and restarts.

use std::{
    io::Write,
    path::PathBuf,
    process::{Command, Output, Stdio},
};

use resqlite::{
    api::{LoginRequest, StatusRequest},
    client::{Client, Credentials, Error, RestoreProgress},
};
use tonic::{Code, Request};

use crate::harness::{Cluster, DEADLINE, Daemon, eventually, program};

const PASSWORD: &str = "correct horse battery";

/// The local socket of a node.
fn local(cluster: &Cluster, node: usize) -> String {
    let directory = cluster.database(node).parent().map(PathBuf::from).unwrap();
    format!("unix:{}", directory.join("admin.sock").display())
}

/// Runs the command line as root of a node, with something on its stdin.
async fn as_operator(cluster: &Cluster, node: usize, arguments: &[&str], stdin: &str) -> (bool, String) {
    let mut command = Command::new(program("resqlite"));
    command.args(arguments).args(["--endpoints", &local(cluster, node)]);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let stdin = stdin.to_owned();
    let run = move || {
        let mut child = command.spawn().unwrap();
        child.stdin.take().unwrap().write_all(stdin.as_bytes()).unwrap();
        child.wait_with_output().unwrap()
    };
    let Output { status, stdout, stderr } = tokio::task::spawn_blocking(run).await.unwrap();
    (status.success(), [stdout, stderr].map(|bytes| String::from_utf8(bytes).unwrap()).concat())
}

async fn add(cluster: &Cluster, name: &str, rights: &[&str]) {
    let arguments = [&["user", "add", name, "--new-password-file", "-"], rights].concat();
    let (done, text) = as_operator(cluster, 0, &arguments, PASSWORD).await;
    assert!(done, "{text}");
}

async fn operate(cluster: &Cluster, arguments: &[&str]) {
    let (done, text) = as_operator(cluster, 0, arguments, "").await;
    assert!(done, "{text}");
}

fn password(user: &str, password: &str) -> Credentials {
    Credentials::Password { user: user.into(), password: password.into() }
}

async fn client(cluster: &Cluster, node: usize, credentials: Credentials) -> Result<Client, Error> {
    Client::builder().endpoints([cluster.sql_address(node)]).credentials(credentials).connect().await
}

fn is_denied<T>(outcome: Result<T, Error>) -> bool {
    match outcome {
        Err(Error::Denied(_)) => true,
        // SQL that was refused says which statement.
        Err(Error::Sql(error)) => error.name == "SQLITE_AUTH",
        _ => false,
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn rights_hold_at_every_node_from_the_moment_that_they_are_changed() {
    let cluster = Cluster::start(3).await;
    let (done, text) = as_operator(&cluster, 0, &["auth", "on"], "").await;
    assert!(!done && text.contains("nobody could get in"), "{text}");
    add(&cluster, "root", &["--role", "admin"]).await;
    add(&cluster, "bob", &["--write-table", "mine", "--read-table", "rate"]).await;
    operate(&cluster, &["auth", "on"]).await;

    let root = client(&cluster, 1, password("root", PASSWORD)).await.unwrap();
    let tables =
        "create table mine(a); create table rate(a); create table secret(a); insert into secret values (1)";
    root.execute_script(tables).await.unwrap();
    for node in 0..3 {
        let nobody = Client::connect([cluster.sql_address(node)]).await;
        assert!(matches!(nobody, Err(Error::Denied(ref why)) if why.contains("authentication is required")));
        assert!(is_denied(client(&cluster, node, password("bob", "wrong password")).await));
        let bob = client(&cluster, node, password("bob", PASSWORD)).await.unwrap();
        bob.execute("insert into mine values (?)", (node as i64,)).await.unwrap();
        assert!(bob.query_one("select count(*) from rate", ()).await.unwrap().is_some());
        for sql in ["select a from secret", "select state from _resqlite_users"] {
            assert!(bob.query_one(sql, ()).await.is_err(), "{sql}");
        }
        let refused = bob.query_one("select count(*) from secret", ()).await.unwrap_err();
        assert!(refused.to_string().contains("the table secret"), "{refused}");
        assert!(is_denied(bob.execute("insert into rate values (1)", ()).await));
        assert!(is_denied(bob.execute("create table other(a)", ()).await));
        let mut run = bob.run("select 1; select a from secret").await.unwrap();
        let mut denied = false;
        loop {
            match run.next().await {
                Ok(Some(_)) => {}
                Ok(None) => break,
                Err(error) => {
                    denied = error.to_string().contains("the table secret");
                    break;
                }
            }
        }
        assert!(denied);
        let read =
            bob.transaction(async |transaction| transaction.query_one("select a from secret", ()).await);
        assert!(read.await.is_err());
        assert!(is_denied(bob.verify().await));
        assert!(is_denied(bob.list_users().await));
    }

    // A read that is held back by nothing but its right.
    let bob = client(&cluster, 2, password("bob", PASSWORD)).await.unwrap();
    assert!(bob.query_one("select count(*) from mine", ()).await.unwrap().is_some());
    operate(&cluster, &["user", "revoke", "bob", "--write-table", "mine"]).await;
    // Linearizable, so it sees the revocation, which node 1 has acknowledged.
    assert!(bob.query_one("select count(*) from mine", ()).await.is_err());
    assert!(is_denied(bob.execute("insert into mine values (9)", ()).await));
    operate(&cluster, &["user", "remove", "bob"]).await;
    assert!(is_denied(bob.execute("insert into mine values (9)", ()).await));
    let (_, users) = as_operator(&cluster, 1, &["user", "list"], "").await;
    assert_eq!(users, "authentication: on\nroot: admin\n");
    for (command, name) in [("backup", "whole.db"), ("dump", "whole.sql")] {
        let file = cluster.path().join(name);
        operate(&cluster, &[command, file.to_str().unwrap()]).await;
        let content = String::from_utf8_lossy(&std::fs::read(file).unwrap()).into_owned();
        assert!(content.contains("secret") && !content.contains("argon2"), "{command}");
    }
    // What an administrator has, whoever has less must not replace.
    let whole = cluster.path().join("whole.db");
    let restore = async |client: &Client| client.restore(&whole, true, RestoreProgress::default()).await;
    add(&cluster, "eve", &["--role", "write", "--role", "backup"]).await;
    assert!(is_denied(restore(&client(&cluster, 1, password("eve", PASSWORD)).await.unwrap()).await));
    restore(&root).await.unwrap();
    assert!(client(&cluster, 2, password("eve", PASSWORD)).await.is_ok());
    assert!(matches!(Client::connect([cluster.sql_address(2)]).await, Err(Error::Denied(_))));
    drop(root);
    for node in 1..=3 {
        let log = std::fs::read_to_string(cluster.path().join(format!("node{node}/sqlited.log"))).unwrap();
        assert!(!log.contains(PASSWORD) && !log.contains("argon2"), "{log}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_is_good_at_every_node_after_a_leader_kill_and_after_a_restart() {
    let mut cluster = Cluster::start(3).await;
    let leader = cluster.leader().await;
    add(&cluster, "root", &["--role", "admin"]).await;
    operate(&cluster, &["auth", "on"]).await;
    let root = client(&cluster, leader, password("root", PASSWORD)).await.unwrap();
    let token = root.login(None).await.unwrap();
    assert!(token.starts_with("rsq_"));
    let with_token = || Credentials::Token(token.clone());
    // A token gives no other token.
    let by_token = client(&cluster, (leader + 1) % 3, with_token()).await.unwrap();
    assert!(is_denied(by_token.login(None).await));

    cluster.kill(leader, Daemon::Raftd);
    cluster.kill(leader, Daemon::Sqlited);
    by_token.execute("create table t(a)", ()).await.unwrap();
    cluster.launch(leader);
    let again = eventually("the node that was killed takes the token", || async {
        client(&cluster, leader, with_token()).await.ok()
    })
    .await;
    assert!(again.query_one("select count(*) from t", ()).await.unwrap().is_some());

    // With the password the tokens end.
    let arguments = ["user", "password", "root", "--new-password-file", "-"];
    let (done, text) = as_operator(&cluster, 0, &arguments, "another password").await;
    assert!(done, "{text}");
    assert!(is_denied(client(&cluster, leader, with_token()).await));
    assert!(is_denied(client(&cluster, leader, password("root", PASSWORD)).await));
    client(&cluster, leader, password("root", "another password")).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flood_of_wrong_passwords_is_held_off_while_others_are_served() {
    let cluster = Cluster::start(1).await;
    add(&cluster, "root", &["--role", "admin"]).await;
    operate(&cluster, &["auth", "on"]).await;
    let root = client(&cluster, 0, password("root", PASSWORD)).await.unwrap();
    root.execute("create table t(a)", ()).await.unwrap();

    let guesses: Vec<_> = (0..400)
        .map(|number| {
            let mut guesser = cluster.client(0);
            tokio::spawn(async move {
                let mut request = Request::new(StatusRequest {});
                let basic = ["Basic cm9vdDp3cm9uZyBwYXNzd29yZA==", "Bearer rsq_unknown"][number % 2];
                request.metadata_mut().insert("authorization", basic.parse().unwrap());
                guesser.status(request).await.unwrap_err().code()
            })
        })
        .collect();
    // Who is in already stays in, from the same address.
    for number in 0..20 {
        root.execute("insert into t values (?)", (number,)).await.unwrap();
    }
    let mut codes = Vec::new();
    for guess in guesses {
        codes.push(tokio::time::timeout(DEADLINE, guess).await.unwrap().unwrap());
    }
    let held_off = codes.iter().filter(|code| **code == Code::ResourceExhausted).count();
    assert!(
        codes.iter().all(|code| [Code::ResourceExhausted, Code::Unauthenticated].contains(code)),
        "{codes:?}"
    );
    assert!(held_off > 200, "only {held_off} of 400 were held off");
    let mut stranger = cluster.client(0);
    let refused = stranger.login(LoginRequest { lifetime_ms: 0 }).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unauthenticated);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cluster_that_asks_from_its_first_start_is_closed_until_root_makes_a_user() {
    let mut cluster = Cluster::prepare(1);
    let file = cluster.path().join("node1/resqlite.yaml");
    let config = std::fs::read_to_string(&file).unwrap();
    std::fs::write(&file, config.replace("  name: test\n", "  name: test\n  require_auth: true\n")).unwrap();
    cluster.launch(0);
    eventually("the local socket is served", || async {
        as_operator(&cluster, 0, &["user", "list"], "").await.0.then_some(())
    })
    .await;
    let nobody = Client::connect([cluster.sql_address(0)]).await.unwrap_err().to_string();
    assert!(nobody.contains("there is no user yet") && nobody.contains("user add"), "{nobody}");
    add(&cluster, "root", &["--role", "admin"]).await;
    let root = client(&cluster, 0, password("root", PASSWORD)).await.unwrap();
    root.execute("create table t(a)", ()).await.unwrap();
}
