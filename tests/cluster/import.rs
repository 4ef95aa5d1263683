//! `resqlite import`: the rows of a CSV file as sqlite3 takes them, and SQL files, each row once.

use std::{
    fmt::Write as _,
    fs,
    io::Write as _,
    path::PathBuf,
    process::{Command, Stdio},
};

use crate::{
    backup::{argument, resqlite, resqlite_ok},
    harness::{Cluster, Daemon, eventually, execute, only_integer, program, query, sqlite3},
};

fn write(cluster: &Cluster, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
    let path = cluster.path().join(name);
    fs::write(&path, content).unwrap();
    path
}

/// What sqlite3 makes of the file in a database of its own, after this SQL.
fn imported_by_sqlite3(cluster: &Cluster, before: &str, options: &str, file: &std::path::Path) -> PathBuf {
    let database = cluster.path().join("expected.db");
    sqlite3(&database, before);
    let mut command = Command::new("sqlite3");
    command.arg(&database).arg(format!(".import --csv {options} \"{}\" t", argument(file)));
    assert!(command.output().unwrap().status.success());
    database
}

/// Every value with its rowid and type, and the columns.
const CONTENT: &str = "select name, type from pragma_table_info('t');
                       select rowid, quote(a), quote(b), quote(c), typeof(a), typeof(b), typeof(c) from t";

async fn assert_like_sqlite3(cluster: &Cluster, expected: &std::path::Path) {
    cluster.wait_until_level().await;
    for node in 0..cluster.size() {
        assert_eq!(sqlite3(&cluster.database(node), CONTENT), sqlite3(expected, CONTENT));
    }
}

async fn count(cluster: &Cluster, table: &str) -> i64 {
    let sql = format!("select count(*) from {table}");
    only_integer(&query(&mut cluster.client(0), &sql).await.unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_csv_file_makes_the_same_table_as_in_sqlite3() {
    let cluster = Cluster::start(3).await;
    let mut content = String::from("\u{feff}a,b,c\n1,2.0,x\n4,5\n6,7,8,9\n\n,\"\",x\n");
    content.push_str("\"x \"\"q\"\" y\",\"one\ntwo\",é\r\n  s , 5\" , 🦀\r\n'; drop table t; --,?1,NULL\r\n");
    // Enough for several requests, by their number and by their size.
    for row in 0..2_500 {
        let value = if row % 100 == 0 { "long, ".repeat(5_000) } else { format!("row {row}") };
        writeln!(content, "{row},\"{value}\",{}", row * 3).unwrap();
    }
    content.push_str("the,last,line");
    let file = write(&cluster, "t.csv", &content);
    let text = resqlite_ok(&cluster, &["import", argument(&file)]);
    assert!(text.contains("t.csv: 2509 rows imported into t"), "{text}");
    assert!(text.contains("t.csv:3: expected 3 columns but found 2 - filling the rest with NULL"), "{text}");
    assert!(text.contains("t.csv:4: expected 3 columns but found 4 - extras ignored"), "{text}");
    assert!(text.contains("t.csv:5: expected 3 columns but found 1 - filling the rest with NULL"), "{text}");
    assert_like_sqlite3(&cluster, &imported_by_sqlite3(&cluster, "", "", &file)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_table_that_is_there_takes_values_by_position_and_affinity() {
    let cluster = Cluster::start(3).await;
    let table = "create table t(c integer, b real, a, total as (c + b))";
    execute(&mut cluster.client(0), table).await.unwrap();
    let file = write(&cluster, "some rows.csv", "a,b,c\n1,2,3\n07,1e3,7\nx,,\n");
    // As there, a header is a row if nobody says otherwise.
    let text = resqlite_ok(&cluster, &["import", argument(&file), "--table", "t", "--skip", "1"]);
    assert!(text.contains("3 rows imported into t"), "{text}");
    // This sqlite3 counts generated columns as well, and then has too few values for them.
    let expected = imported_by_sqlite3(&cluster, "create table t(c integer, b real, a)", "--skip 1", &file);
    assert_like_sqlite3(&cluster, &expected).await;
    let rows = sqlite3(&cluster.database(0), "select * from t");
    assert_eq!(rows, "1|2.0|3|3.0\n7|1000.0|7|1007.0\nx|||0\n");

    // The file's name is the table's, and needs no care.
    resqlite_ok(&cluster, &["import", argument(&file)]);
    assert_eq!(count(&cluster, "\"some rows\"").await, 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bad_row_ends_it_and_the_rest_goes_in_later() {
    let cluster = Cluster::start(3).await;
    execute(&mut cluster.client(0), "create table t(id integer primary key, v not null)").await.unwrap();
    let good: String = (1..=2_500).fold("id,v\n".to_owned(), |text, id| text + &format!("{id},v{id}\n"));
    let file = write(&cluster, "t.csv", good.replace("\n1700,", "\n1600,"));
    let import = |skip: &str| resqlite(&cluster, &["import", argument(&file), "--skip", skip]);
    let (succeeded, text) = import("1");
    assert!(!succeeded && text.contains("t.csv:1701: UNIQUE constraint failed: t.id; 1000 rows"), "{text}");
    assert!(text.contains("1000 rows are imported, the rest goes in with --skip 1001"), "{text}");
    assert_eq!(count(&cluster, "t").await, 1_000);

    fs::write(&file, good.replace("v2200\n", "\"v2200\n")).unwrap();
    let (succeeded, text) = import("1001");
    assert!(!succeeded && text.contains("t.csv:2201: a quoted field is never closed; 1000 rows"), "{text}");
    assert!(text.contains("--skip 2001"), "{text}");
    fs::write(&file, good).unwrap();
    let (succeeded, text) = import("2001");
    assert!(succeeded && text.contains(" 500 rows imported"), "{text}");
    let wrong = "select count(*) - 2500 + count(*) filter (where v <> 'v' || id) from t";
    assert_eq!(only_integer(&query(&mut cluster.client(1), wrong).await.unwrap()), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_imported_is_refused_with_the_reason() {
    let cluster = Cluster::start(1).await;
    execute(&mut cluster.client(0), "create view v as select 1 as a").await.unwrap();
    let refused = |arguments: &[&str], reason: &str| {
        let (succeeded, text) = resqlite(&cluster, &[&["import"], arguments].concat());
        assert!(!succeeded && text.contains(reason), "{arguments:?}: {text}");
    };
    let missing = cluster.path().join("missing.csv");
    refused(&[argument(&missing)], "missing.csv cannot be read: No such file or directory");
    refused(
        &[argument(&missing.with_extension("sql"))],
        "missing.sql cannot be read: No such file or directory",
    );
    refused(&[argument(&missing.with_extension("txt"))], "the name should end in .csv or .sql");
    let directory = cluster.path().join("directory.csv");
    fs::create_dir(&directory).unwrap();
    refused(&[argument(&directory)], "directory.csv cannot be read: is a directory");
    let file = write(&cluster, "file.csv", "");
    refused(&[argument(&file)], "file.csv: the file is empty, and there is no table file to take");
    fs::write(&file, "a,b,A\n1,2,3\n").unwrap();
    refused(&[argument(&file)], "file.csv:1: duplicate column name: A; nothing is imported");
    refused(&[argument(&file), "--table", "v"], "file.csv:1: cannot modify v because it is a view; nothing");
    fs::write(&file, b"a,b\n1,2\n3,\xe9\n").unwrap();
    refused(
        &[argument(&file)],
        "file.csv:3: the row is not valid UTF-8; 0 rows are imported, the rest goes in with --skip 1",
    );
    let script = write(&cluster, "script.sql", "select 1;");
    refused(&[argument(&script), "--table", "t"], "--table and --skip are for .csv files");
    assert_eq!(count(&cluster, "file").await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_sql_file_is_run_up_to_its_first_error() {
    let cluster = Cluster::start(3).await;
    let script = "create table t(a unique);\ninsert into t values(1);\nbegin;\ninsert into t values(2);\n\
                  insert into t values(1);\ncommit;\ninsert into t values(3);\n";
    let file = write(&cluster, "script.sql", script);
    let (succeeded, text) = resqlite(&cluster, &["import", argument(&file)]);
    assert!(
        !succeeded && text.contains("script.sql:5: UNIQUE constraint failed: t.a; what is before"),
        "{text}"
    );
    assert_eq!(count(&cluster, "t").await, 1);
    fs::write(&file, "insert into t values(2);\nbegin;\ninsert into t values(3);").unwrap();
    let (succeeded, text) = resqlite(&cluster, &["import", argument(&file)]);
    assert!(!succeeded && text.contains("script.sql:2: BEGIN without COMMIT; what is before"), "{text}");
    assert_eq!(count(&cluster, "t").await, 2);
    fs::write(&file, "insert into t values(3); select sum(a) from t").unwrap();
    assert_eq!(resqlite_ok(&cluster, &["import", argument(&file)]), "6\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn every_row_is_there_once_after_kill_nine_of_the_leader() {
    let mut cluster = Cluster::start(3).await;
    let rows = 40_000;
    let content = (0..rows).fold("n,text\n".to_owned(), |text, row| text + &format!("{row},a row\n"));
    let (before, after) = content.split_at(content.len() / 2);
    // A pipe, so that the import cannot be over before the leader is.
    let file = cluster.path().join("t.csv");
    assert!(Command::new("mkfifo").arg(&file).status().unwrap().success());
    let client = Command::new(program("resqlite"))
        .args(["import", argument(&file), "--endpoints", &cluster.endpoints()])
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut pipe = fs::OpenOptions::new().write(true).open(&file).unwrap();
    pipe.write_all(before.as_bytes()).unwrap();
    let leader = cluster.leader().await;
    let other = cluster.database((leader + 1) % 3);
    eventually("some rows", || async {
        let there = sqlite3(&other, "select count(*) from sqlite_schema where name = 't'") == "1\n";
        (there && sqlite3(&other, "select count(*) from t") != "0\n").then_some(())
    })
    .await;
    cluster.kill(leader, Daemon::Raftd);
    cluster.kill(leader, Daemon::Sqlited);
    pipe.write_all(after.as_bytes()).unwrap();
    drop(pipe);
    let output = tokio::task::spawn_blocking(move || client.wait_with_output().unwrap()).await.unwrap();
    assert!(output.status.success(), "{}\n{}", String::from_utf8_lossy(&output.stderr), cluster.logs());
    cluster.launch(leader);
    cluster.wait_until_level().await;
    for node in 0..3 {
        let found = sqlite3(&cluster.database(node), "select count(*), count(distinct n) from t");
        assert_eq!(found, format!("{rows}|{rows}\n"));
    }
}
