//! The first command that anybody types.

use std::{
    fs,
    io::{BufRead, BufReader, Write},
    path::Path,
    process::{Child, Command, Output, Stdio},
};

use resqlite::api::{StatusRequest, re_sqlite_client::ReSqliteClient};

use crate::harness::{eventually, free_ports, program};

/// A base port for `nodes` nodes: ten ports each, the first of which are free.
fn free_base_port() -> u16 {
    loop {
        let base = free_ports(1)[0];
        let taken = (0..30).any(|offset| {
            base.checked_add(offset)
                .is_none_or(|port| std::net::TcpListener::bind(("127.0.0.1", port)).is_err())
        });
        if !taken {
            return base;
        }
    }
}

fn playground(arguments: &[&str]) -> Command {
    let mut command = Command::new(program("resqlite"));
    command.arg("playground").args(["--base-port", &free_base_port().to_string()]).args(arguments);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

fn with_input(mut command: Command, input: &str) -> Output {
    let mut child = command.spawn().unwrap();
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    child.wait_with_output().unwrap()
}

/// How many processes were started for this directory and still run.
fn processes_naming(directory: &Path) -> usize {
    let name = directory.to_str().unwrap();
    let names_it = |entry: &fs::DirEntry| {
        let arguments = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let ours = entry.file_name().to_str() == Some(&std::process::id().to_string());
        !ours && String::from_utf8_lossy(&arguments).contains(name)
    };
    fs::read_dir("/proc").unwrap().flatten().filter(names_it).count()
}

#[test]
fn piped_sql_is_run_printed_and_its_status_returned() {
    let output =
        with_input(playground(&[]), "create table t(a); insert into t values(1),(2); select sum(a) from t;");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(String::from_utf8_lossy(&output.stdout).trim(), "3");

    let output = with_input(playground(&["--nodes", "1"]), "select 1;\n\nselec 2;\nselect 3;\n");
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(String::from_utf8_lossy(&output.stdout), "1\n");
    let complaint = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(complaint.contains("Error: near line 3: near \"selec\": syntax error"), "{complaint}");
}

#[test]
fn the_same_directory_starts_again_with_its_data_and_nothing_is_left_behind() {
    let directory = tempfile::tempdir().unwrap();
    let data_dir = directory.path().join("data");
    let data_dir = data_dir.to_str().unwrap();
    let output =
        with_input(playground(&["--data-dir", data_dir]), "create table t(a); insert into t values(41);");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(processes_naming(directory.path()), 0);
    for node in 1..=3 {
        assert!(Path::new(data_dir).join(format!("node{node}/sql/resqlite.db")).exists());
        assert!(Path::new(data_dir).join(format!("node{node}/raft")).is_dir());
    }
    let output =
        with_input(playground(&["--data-dir", data_dir]), "update t set a = a + 1; select a from t;");
    assert_eq!(String::from_utf8_lossy(&output.stdout).trim(), "42");
    assert_eq!(processes_naming(directory.path()), 0);
}

/// A kept playground, once it said that it is ready.
fn kept(data_dir: &Path) -> (Child, Vec<String>) {
    let mut child = playground(&["--keep", "--data-dir", data_dir.to_str().unwrap()]).spawn().unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
    let endpoints = line.trim().strip_prefix("ready endpoints=").unwrap_or_else(|| panic!("{line:?}"));
    (child, endpoints.split(',').map(str::to_owned).collect())
}

#[tokio::test]
async fn a_kept_playground_serves_until_it_is_told_to_stop_or_is_killed() {
    for signal in ["-INT", "-KILL"] {
        let directory = tempfile::tempdir().unwrap();
        let (mut child, endpoints) = kept(directory.path());
        assert_eq!(endpoints.len(), 3);
        for endpoint in &endpoints {
            let mut client = ReSqliteClient::connect(format!("http://{endpoint}")).await.unwrap();
            let status = client.status(StatusRequest {}).await.unwrap().into_inner();
            assert_eq!(status.members.len(), 3);
        }
        assert_eq!(processes_naming(directory.path()), 7, "six daemons and the playground");
        assert!(Command::new("kill").args([signal, &child.id().to_string()]).status().unwrap().success());
        child.wait().unwrap();
        // Even after kill -9 nobody is left: the daemons notice that nobody holds their stdin.
        eventually("no process is left behind", || async {
            (processes_naming(directory.path()) == 0).then_some(())
        })
        .await;
    }
}
