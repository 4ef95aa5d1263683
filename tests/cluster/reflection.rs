//! A client in another language that knows nothing but server reflection.

use std::{path::Path, process::Command};

use crate::harness::{Cluster, execute};

#[tokio::test]
async fn a_python_client_needs_no_proto_file() {
    let python = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/python/bin/python");
    assert!(python.exists(), "{} is missing: `make test` sets it up", python.display());
    let cluster = Cluster::start(3).await;
    execute(&mut cluster.client(0), "create table t(id integer primary key, name text, raw blob)")
        .await
        .unwrap();
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/cluster/reflection_client.py");
    let address = cluster.sql_address(1).to_owned();
    let run = move || Command::new(python).arg(script).arg(address).output().unwrap();
    let output = tokio::task::spawn_blocking(run).await.unwrap();
    let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{stdout}\n{stderr}");
    assert_eq!(stdout.trim_end().lines().last(), Some("ok"), "{stdout}\n{stderr}");
}
