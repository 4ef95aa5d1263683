//! A real dump goes in as it is and comes out as plain SQLite would have it.

use std::{
    fs,
    io::Write,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use crate::harness::{Cluster, program, sqlite3, without_own_tables};

/// A dump of an ordinary small shop, made by sqlite3 itself: foreign keys off, AUTOINCREMENT, an index, ANALYZE.
fn made_up_dump(directory: &Path) -> PathBuf {
    let source = directory.join("source.db");
    let setup = "
        create table artists(ArtistId integer primary key autoincrement not null, Name nvarchar(120));
        create table albums(AlbumId integer primary key autoincrement not null, Title nvarchar(160) not null,
            ArtistId integer not null references artists(ArtistId) on delete no action);
        create table tags(album integer, tag text);
        create index albums_by_artist on albums(ArtistId);
        with recursive n(i) as (select 1 union all select i + 1 from n where i < 400)
            insert into artists(Name) select 'Artist ''' || i || ''' ; -- not a comment' from n;
        with recursive n(i) as (select 1 union all select i + 1 from n where i < 4000)
            insert into albums(Title, ArtistId) select 'Album ' || i, 1 + i % 400 from n;
        with recursive n(i) as (select 1 union all select i + 1 from n where i < 4000)
            insert into tags select i, case i % 5 when 0 then null when 1 then i * 0.37 else 'tag
 over two lines' end from n;
        create trigger albums_tagged after insert on albums begin
            insert into tags values(new.AlbumId, 'new; by trigger'); end;
        analyze;";
    sqlite3(&source, setup);
    let dump = sqlite3(&source, ".dump");
    let path = directory.join("dump.sql");
    fs::write(&path, dump).unwrap();
    path
}

/// Runs the shell on a file, or on standard input, and returns what it prints.
fn shell(cluster: &Cluster, mode: &str, input: &Path) -> String {
    let mut command = Command::new(program("resqlite"));
    command.args(["shell", "--mode", mode, "--endpoints", &cluster.endpoints(), "-f"]).arg(input);
    let output = command.stdin(Stdio::null()).output().unwrap();
    assert!(output.status.success(), "{}\n{}", String::from_utf8_lossy(&output.stderr), cluster.logs());
    String::from_utf8(output.stdout).unwrap()
}

/// What the sqlite3 program prints for a file, in list mode.
fn plain_sqlite(database: &Path, input: &Path) -> String {
    let mut child = Command::new("sqlite3")
        .args(["-batch", "-list"])
        .arg(database)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let text = fs::read(input).unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let feeder = std::thread::spawn(move || stdin.write_all(&text));
    let output = child.wait_with_output().unwrap();
    feeder.join().unwrap().unwrap();
    assert!(output.status.success());
    String::from_utf8(output.stdout).unwrap()
}

async fn loads_like_plain_sqlite(cluster: &Cluster, writes: &Path, reads: &Path) {
    let plain = cluster.path().join("plain.db");
    plain_sqlite(&plain, writes);
    shell(cluster, "list", writes);
    cluster.wait_until_level().await;
    let expected = without_own_tables(&sqlite3(&plain, ".dump"));
    for node in 0..cluster.size() {
        assert!(cluster.dump(node) == expected, "node {} differs from plain SQLite", node + 1);
    }
    assert!(shell(cluster, "list", reads) == plain_sqlite(&plain, reads), "the queries print something else");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dump_of_sqlite3_loads_as_it_is() {
    let cluster = Cluster::start(3).await;
    let dump = made_up_dump(cluster.path());
    let reads = cluster.path().join("reads.sql");
    let queries = "select * from artists;\nselect tag, count(*) as n from tags group by tag;\n\
                   select Name from artists where ArtistId=(select ArtistId from albums where AlbumId=1);\n";
    fs::write(&reads, queries.repeat(200)).unwrap();
    loads_like_plain_sqlite(&cluster, &dump, &reads).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn fifteen_thousand_real_statements_load_as_they_are() {
    let shared = Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/fig3");
    if !shared.exists() {
        // The files are not part of this repository; the test above covers the rule without them.
        return;
    }
    let cluster = Cluster::start(3).await;
    loads_like_plain_sqlite(&cluster, &shared.join("wOnly.sql"), &shared.join("rOnly.sql")).await;
}
