//! `resqlite backup` and `resqlite dump`: one moment of the history, for any SQLite to read.

use std::{
    fs,
    path::Path,
    process::{Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use resqlite::api::{BackupRequest, ExecuteRequest};

use crate::harness::{Cluster, eventually, execute, program, sqlite3, statement};

/// Everything that a dump has to cope with.
pub const EVERYTHING: &str = "
    create table bag(a, b text, g as (a || b));
    insert into bag(rowid, a, b) values(9, 1, 'one'), (4, x'00ff', null), (700, 0.1, 'it''s'), (701, -0.0, '');
    insert into bag(a, b) values(1e300, 'e'), ('two
lines', char(13, 10)), (9007199254740993, '.quit');
    create table kept(id integer primary key autoincrement, t text collate nocase unique, p references kept(id));
    insert into kept(t) values('a'), ('b'), ('c'); delete from kept where t = 'c';
    create table pairs(a, b, primary key(b, a)) without rowid; insert into pairs values(1, 2), (2, 1);
    create table strictly(id integer primary key, v any) strict; insert into strictly values(1, 'v'), (2, 2.5);
    create virtual table words using fts5(text, other unindexed, prefix='2 3');
    insert into words(rowid, text, other) values(3, 'some words', 1), (8, 'more of them', x'01');
    create virtual table over using fts5(t, content='kept', content_rowid='id');
    insert into over(over) values('rebuild');
    create virtual table old using fts4(body); insert into old values('an older module');
    create virtual table boxes using rtree(id, x0, x1); insert into boxes values(1, 0.1, 0.2);
    create index kept_t on kept(t) where id > 1;
    create view both as select kept.id, bag.a from kept, bag;
    create trigger added after insert on kept begin insert into bag(a) values(new.id); end;
    create trigger through instead of insert on both begin insert into kept(t) values(new.a); end;
    analyze;
    pragma user_version = 77; pragma application_id = 1234;";

/// Runs the command line; whether it succeeded, and all that it printed.
pub fn resqlite(cluster: &Cluster, arguments: &[&str]) -> (bool, String) {
    let mut command = Command::new(program("resqlite"));
    command.args(arguments).args(["--endpoints", &cluster.endpoints()]).stdin(Stdio::null());
    let output = command.output().unwrap();
    let text =
        [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).concat();
    (output.status.success(), text)
}

/// Runs the command line, which must succeed.
pub fn resqlite_ok(cluster: &Cluster, arguments: &[&str]) -> String {
    let (succeeded, text) = resqlite(cluster, arguments);
    assert!(succeeded, "{arguments:?}: {text}\n{}", cluster.logs());
    text
}

/// A path as an argument.
pub fn argument(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_under_load_is_one_moment_of_the_history() {
    let cluster = Cluster::start(3).await;
    let mut node = cluster.client(0);
    execute(&mut node, "create table journal(writer, sequence)").await.unwrap();
    execute(&mut node, "create table totals(rows)").await.unwrap();
    execute(&mut node, "insert into totals values(0)").await.unwrap();
    let done = Arc::new(AtomicBool::new(false));
    let writers: Vec<_> = (0..3usize)
        .map(|writer| {
            let (mut node, done) = (cluster.client(writer), done.clone());
            tokio::spawn(async move {
                let mut indexes = Vec::new();
                while !done.load(Ordering::Relaxed) {
                    let insert = format!("insert into journal values({writer}, {})", indexes.len());
                    let statements =
                        [insert.as_str(), "update totals set rows = rows + 1"].map(statement).to_vec();
                    let request = ExecuteRequest { statements, ..Default::default() };
                    indexes.push(node.execute(request).await.unwrap().into_inner().log_index);
                }
                indexes
            })
        })
        .collect();
    let mut backups = Vec::new();
    for number in 0..4 {
        let acknowledged =
            execute(&mut node, "insert into journal values('before', null)").await.unwrap().log_index;
        let file = cluster.path().join(format!("{number}.db"));
        // Whichever node it is.
        let address = cluster.sql_address(number % 3).to_owned();
        let (program, path) = (program("resqlite"), file.clone());
        let run =
            move || Command::new(program).arg("backup").arg(path).args(["--endpoints", &address]).output();
        let output = tokio::task::spawn_blocking(run).await.unwrap().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
        let index: u64 = text.trim().rsplit(' ').next().unwrap().parse().unwrap();
        assert!(index >= acknowledged, "{index} is before {acknowledged}, which was acknowledged");
        backups.push((index, file));
    }
    done.store(true, Ordering::Relaxed);
    let mut histories = Vec::new();
    for writer in writers {
        histories.push(writer.await.unwrap());
    }
    for (index, file) in backups {
        assert_eq!(sqlite3(&file, "pragma integrity_check; pragma journal_mode"), "ok\ndelete\n");
        assert_eq!(sqlite3(&file, "select name from sqlite_schema"), "journal\ntotals\n");
        let consistent = "select rows = (select count(*) from journal where writer <> 'before') from totals";
        assert_eq!(sqlite3(&file, consistent), "1\n");
        for (writer, history) in histories.iter().enumerate() {
            let expected = history.iter().filter(|at| **at <= index).count();
            let found =
                format!("select count(*) || ' ' || (max(sequence) + 1) from journal where writer = {writer}");
            assert_eq!(
                sqlite3(&file, &found),
                format!("{expected} {expected}\n"),
                "writer {writer} at {index}"
            );
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_keeps_what_vacuum_would_not_and_replaces_nothing_unasked() {
    let cluster = Cluster::start(1).await;
    let mut node = cluster.client(0);
    execute(&mut node, "create table bag(a)").await.unwrap();
    execute(&mut node, "insert into bag(rowid, a) values(5, 'five'), (900, 'x'), (7, zeroblob(6000000))")
        .await
        .unwrap();
    execute(&mut node, "delete from bag where rowid = 5").await.unwrap();
    let file = cluster.path().join("kept.db");
    resqlite_ok(&cluster, &["backup", argument(&file)]);
    assert_eq!(sqlite3(&file, "select rowid from bag"), "7\n900\n");

    let before = fs::read(&file).unwrap();
    let (succeeded, text) = resqlite(&cluster, &["backup", argument(&file)]);
    assert!(!succeeded && text.contains("exists: choose another name, or say --force"), "{text}");
    assert_eq!(fs::read(&file).unwrap(), before);
    execute(&mut node, "insert into bag values('later')").await.unwrap();
    resqlite_ok(&cluster, &["backup", "--force", argument(&file)]);
    assert_eq!(sqlite3(&file, "select count(*) from bag"), "3\n");
    let leftover = cluster.path().join("kept.db-wal");
    fs::write(&leftover, "of another file").unwrap();
    let (succeeded, text) = resqlite(&cluster, &["backup", "--force", argument(&file)]);
    assert!(!succeeded && text.contains("kept.db-wal belongs to another database"), "{text}");

    // One at a time: this one is not taken any further.
    let mut slow = node.backup(BackupRequest::default()).await.unwrap().into_inner();
    slow.message().await.unwrap().unwrap();
    let other = cluster.path().join("other.db");
    let (succeeded, text) = resqlite(&cluster, &["backup", argument(&other)]);
    assert!(!succeeded && text.contains("another backup is under way"), "{text}");
    drop(slow);
    eventually("a client that has gone stands in nobody's way", || async {
        resqlite(&cluster, &["backup", argument(&other)]).0.then_some(())
    })
    .await;
    let names = fs::read_dir(cluster.path().join("node1/sql")).unwrap();
    let names: Vec<String> = names.map(|name| name.unwrap().file_name().into_string().unwrap()).collect();
    assert!(!names.iter().any(|name| name.contains("outgoing")), "{names:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dump_makes_an_equal_database_in_sqlite3_and_in_a_cluster() {
    let cluster = Cluster::start(1).await;
    resqlite_ok(&cluster, &["shell", "-c", EVERYTHING]);
    resqlite_ok(&cluster, &["shell", "-c", "insert into bag(b) values(cast(x'ff0041' as text))"]);
    let first = cluster.path().join("first.sql");
    resqlite_ok(&cluster, &["dump", argument(&first)]);
    let dump = fs::read_to_string(&first).unwrap();
    assert_eq!(resqlite_ok(&cluster, &["dump"]), dump);

    let plain = cluster.path().join("plain.db");
    let mut sqlite3_program = Command::new("sqlite3");
    sqlite3_program.args(["-bail", argument(&plain)]).stdin(fs::File::open(&first).unwrap());
    let loaded = sqlite3_program.output().unwrap();
    assert!(loaded.status.success(), "{}", String::from_utf8_lossy(&loaded.stderr));
    assert_eq!(
        sqlite3(&plain, "pragma integrity_check; pragma user_version; pragma application_id"),
        "ok\n77\n1234\n"
    );
    let backup = cluster.path().join("backup.db");
    resqlite_ok(&cluster, &["backup", argument(&backup)]);
    for query in [
        "select rowid, quote(a), typeof(b), hex(b), hex(g) from bag",
        "select * from kept; select * from sqlite_sequence; select * from sqlite_stat1",
        "select rowid, * from words where words match 'wor*'; select rowid from over where over match 'b'",
        "select * from pairs; select * from strictly; select * from boxes; select docid, * from old",
        "select type, name, sql from sqlite_schema where sql is not null and name not like 'words\\_%' escape '\\'
         order by name",
    ] {
        assert_eq!(sqlite3(&plain, query), sqlite3(&backup, query), "{query}");
    }

    let other = Cluster::start(1).await;
    resqlite_ok(&other, &["shell", "-f", argument(&first)]);
    assert_eq!(resqlite_ok(&other, &["dump"]), dump);
}
