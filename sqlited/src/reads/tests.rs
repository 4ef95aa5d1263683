//! What the pool promises.

use super::*;
use crate::apply::{Applier, ApplySettings};
use tokio::time::timeout;
use tokio_stream::StreamExt;
use tonic::Code;

const ENDLESS: &str = "with recursive n(x) as (select 1 union all select x + 1 from n) select x from n";
const BUSY: &str = "with recursive n(x) as (select 1 union all select x + 1 from n) select count(*) from n";
const LONG: Duration = Duration::from_secs(60);

/// A pool of one reader on an empty database.
struct Pool {
    readers: Readers,
    _writer: Applier,
    _directory: tempfile::TempDir,
}

impl Pool {
    fn new(patience: Patience) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("test.db");
        let writer = Applier::open(&path, ApplySettings::default()).unwrap();
        let readers = Readers::start(&writer.file(), 1, patience, &runtime::Handle::current()).unwrap();
        Self { readers, _writer: writer, _directory: directory }
    }

    fn read(&self, sql: &str) -> Batches {
        self.readers.read(Author::anybody(), statement(sql), None).unwrap()
    }

    async fn stop(self) {
        self.readers.stop();
        tokio::task::spawn_blocking(move || self.readers.join()).await.unwrap();
    }
}

fn statement(sql: &str) -> Statement {
    Statement { sql: sql.to_owned(), ..Statement::default() }
}

async fn end_of(mut batches: Batches) -> Status {
    loop {
        match timeout(LONG, batches.next()).await.unwrap() {
            Some(Ok(_)) => {}
            Some(Err(status)) => return status,
            None => panic!("the read ended well"),
        }
    }
}

#[tokio::test]
async fn a_snapshot_is_held_for_a_bounded_time() {
    let pool = Pool::new(Patience { snapshot: Duration::from_millis(50), stalled_client: LONG });
    let status = end_of(pool.read(BUSY)).await;
    assert_eq!(status.code(), Code::Aborted);
    assert!(status.message().contains("held its snapshot"), "{status}");
    pool.stop().await;
}

#[tokio::test]
async fn a_client_that_takes_nothing_gives_its_reader_back_and_its_result_looks_cut_short() {
    let pool = Pool::new(Patience { snapshot: LONG, stalled_client: Duration::from_millis(50) });
    let stalled = pool.read(ENDLESS);
    // Answered by the same reader, after it has given up on the other client.
    let mut next = pool.read("select 1");
    assert!(timeout(LONG, next.next()).await.unwrap().unwrap().unwrap().last);
    let status = end_of(stalled).await;
    assert_eq!(status.code(), Code::Aborted);
    assert!(status.message().contains("took no rows"), "{status}");
    pool.stop().await;
}

#[tokio::test]
async fn a_read_ends_when_its_client_has_gone() {
    let pool = Pool::new(Patience::default());
    drop(pool.read(BUSY));
    drop(pool.read(ENDLESS));
    let mut next = pool.read("select 1");
    assert!(timeout(LONG, next.next()).await.unwrap().unwrap().unwrap().last);
    pool.stop().await;
}

#[tokio::test]
async fn more_reads_than_may_wait_are_refused_and_a_stop_answers_those_that_do() {
    let pool = Pool::new(Patience::default());
    let mut waiting = vec![pool.read(BUSY)];
    let refused = loop {
        match pool.readers.read(Author::anybody(), statement("select 1"), None) {
            Ok(batches) => waiting.push(batches),
            Err(status) => break status,
        }
    };
    assert_eq!(refused.code(), Code::ResourceExhausted);
    assert!(waiting.len() >= limits::MAX_READS_QUEUED_PER_READER);
    pool.readers.stop();
    for batches in waiting {
        assert_eq!(end_of(batches).await.code(), Code::Unavailable);
    }
    let late = pool.readers.read(Author::anybody(), statement("select 1"), None);
    assert_eq!(late.unwrap_err().code(), Code::Unavailable);
    pool.stop().await;
}

#[tokio::test]
async fn statements_that_depend_on_the_schema_are_proposed_and_the_rest_is_sorted_here() {
    let pool = Pool::new(Patience::default());
    let texts = [
        "select 1",
        "explain insert into t values (1)",
        "create table t(a)",
        "insert into unseen values (1)",
        "select * from unseen",
        "drop table if exists unseen",
        "drop trigger if exists unseen",
        "drop view if exists unseen",
        "drop index if exists unseen",
        "begin immediate",
        "end",
        "rollback",
        "pragma foreign_keys",
        "pragma foreign_keys = 0",
    ];
    let statements: Arc<[Statement]> = texts.iter().map(|sql| statement(sql)).collect();
    let kinds = pool.readers.classify(&statements, 0..statements.len()).await.unwrap();
    use Kind::{Begin, Commit, ForeignKeys, Read, Rollback, Write};
    let expected = [
        Read,
        // Its table is unknown here.
        Write,
        Write,
        Write,
        Write,
        Write,
        Write,
        Write,
        Write,
        Begin,
        Commit,
        Rollback,
        ForeignKeys(None),
        ForeignKeys(Some(false)),
    ];
    for ((text, kind), expected) in texts.iter().zip(kinds).zip(expected) {
        assert_eq!(kind, expected, "{text}");
    }
    let statements: Arc<[Statement]> =
        ["savepoint a", "selec", "attach 'x' as y"].iter().map(|sql| statement(sql)).collect();
    let kinds = pool.readers.classify(&statements, 0..3).await.unwrap();
    assert!(kinds.iter().all(|kind| matches!(kind, Kind::Refused(_))), "{kinds:?}");
    pool.stop().await;
}
