//! A result of any size streams through daemon and client with little memory.

use std::{
    io::Read,
    process::{Command, Stdio},
    time::Instant,
};

use crate::harness::{Cluster, Daemon, execute, peak_resident_bytes, program};

/// What each process may have resident at most, whatever the result's size.
const MEMORY_BYTES: u64 = 150 << 20;
/// How large a row is, nearly, and how many are inserted at once.
const ROW_BYTES: u64 = 32 << 10;
const ROWS_EACH: u64 = 512;

/// `RESQLITE_LARGE_RESULT_BYTES` asks for another size than that of every day.
fn result_bytes() -> u64 {
    let asked = std::env::var("RESQLITE_LARGE_RESULT_BYTES");
    asked.map_or(256 << 20, |bytes| bytes.parse().expect("RESQLITE_LARGE_RESULT_BYTES is a number of bytes"))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_large_result_streams_through_daemon_and_client_with_little_memory() {
    let cluster = Cluster::start(3).await;
    let mut client = cluster.client(0);
    execute(&mut client, "create table large(n integer primary key, v text)").await.unwrap();
    let fill = format!(
        "with recursive n(i) as (select 1 union all select i + 1 from n where i < {ROWS_EACH})
         insert into large(v) select hex(randomblob({})) from n",
        ROW_BYTES / 2
    );
    let rows = result_bytes() / ROW_BYTES / ROWS_EACH * ROWS_EACH;
    for _ in 0..rows / ROWS_EACH {
        execute(&mut client, &fill).await.unwrap();
    }

    for node in 0..2 {
        let began = Instant::now();
        let (bytes, shell_peak_bytes) = read_all(cluster.sql_address(node));
        let server_peak_bytes = cluster.peak_resident_bytes(node, Daemon::Sqlited);
        println!(
            "{} MiB in {:.1} s; at most {} MiB in sqlited, {} MiB in the client",
            bytes >> 20,
            began.elapsed().as_secs_f64(),
            server_peak_bytes >> 20,
            shell_peak_bytes >> 20
        );
        assert!(bytes >= rows * ROW_BYTES, "the whole result arrived: {bytes} bytes");
        assert!(server_peak_bytes < MEMORY_BYTES, "sqlited had {server_peak_bytes} bytes resident");
        assert!(shell_peak_bytes < MEMORY_BYTES, "the client had {shell_peak_bytes} bytes resident");
    }
}

/// Reads the table with the command line, which is the client library in a process of its own. Returns the size of
/// what it printed, and the most memory that it had.
fn read_all(endpoint: &str) -> (u64, u64) {
    let mut shell = Command::new(program("resqlite"))
        .args(["shell", "--endpoints", endpoint, "--mode", "list", "-c", "select * from large"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut output = shell.stdout.take().unwrap();
    let (mut bytes, mut peak_bytes) = (0, 0);
    let mut buffer = vec![0; 1 << 20];
    loop {
        let read = output.read(&mut buffer).unwrap();
        if read == 0 {
            break;
        }
        bytes += read as u64;
        // Looked at while it runs, for a process that has ended has no memory to look at.
        peak_bytes = peak_resident_bytes(shell.id()).unwrap_or(peak_bytes).max(peak_bytes);
    }
    assert!(shell.wait().unwrap().success());
    (bytes, peak_bytes)
}
