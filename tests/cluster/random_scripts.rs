//! Random requests to three real nodes whose daemons come and go, and of which one is left behind and restored by a
//! snapshot: the content is the same everywhere.
//!
//! What runs is grown from a seed, and a failure names it. Which entries share a transaction, what is prepared anew and
//! who dies when is left to chance: whatever it is, it must not show. `RESQLITE_SEEDS=from..to` runs other seeds.

use std::ops::Range;

use bytes::Bytes;
use resqlite::api::{ExecuteRequest, RequestId};
use tokio::task::JoinSet;

use crate::{
    harness::{Cluster, Daemon, eventually, execute, pursue, sqlite3, statement},
    snapshots::{installs, log_status},
};

/// How many markers there are for each seed, and how many requests before each.
const MARKERS: u64 = 3;
const REQUESTS: u64 = 32;

const SCHEMA: &[&str] = &[
    "create table item(id integer primary key, name text default (hex(randomblob(4))), price real, at default (strftime('%Y-%m-%d %H:%M:%f', 'now')),
       gross as (price * 1.19) stored, label as (name || ':' || id) virtual, check(price is null or price < 1000))",
    "create table plain(a, b default current_timestamp)",
    "create table keyed(k text primary key, v any default (random()), n integer default 0) without rowid, strict",
    "create table parent(id integer primary key)",
    "create table child(p references parent(id) on delete set null on update cascade deferrable initially deferred, q)",
    "create table journal(what text, value, at default current_timestamp, r default (random()))",
    "create table counted(id integer primary key autoincrement, v)",
    "create virtual table text_index using fts5(body)",
    "create index item_by_name on item(lower(name), price)",
    "create index item_dear on item(price) where price > 50",
    "create index plain_by_sum on plain(a + 1)",
    "create trigger item_new after insert on item begin insert into journal(what, value) values('new', new.id); insert into text_index(rowid, body) values(new.id, new.name); end",
    "create trigger item_gone after delete on item begin delete from text_index where rowid = old.id; end",
    "create trigger plain_no before insert on plain when new.a = 13 begin select raise(rollback, 'thirteen'); end",
    "create trigger plain_abort before update on plain when new.a = 14 begin select raise(abort, 'fourteen'); end",
    "create trigger keyed_up after update on keyed begin update counted set v = new.v where id = new.n; insert into counted(v) values(new.k); end",
];

/// Writes requests. SplitMix64: small, and the same everywhere.
struct Author(u64);

impl Author {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    fn pick(&mut self, from: &[&'static str]) -> &'static str {
        from[self.below(from.len() as u64) as usize]
    }

    fn value(&mut self) -> String {
        let number = self.below(30);
        match self.below(9) {
            0..=2 => number.to_string(),
            3 => format!("'word{number} and word{}'", number % 7),
            4 => "random() % 100".into(),
            5 => self
                .pick(&[
                    "date('now')",
                    "time()",
                    "datetime('now', '+1 day', 'localtime')",
                    "julianday('now')",
                    "unixepoch('now', 'subsec')",
                    "strftime('%J %f')",
                    "timediff('now', '2000-01-01')",
                    "current_time",
                ])
                .into(),
            6 => format!("json_set('{{\"a\":[1,{number}]}}', '$.b', random())"),
            7 => "null".into(),
            _ => format!("{number}.25"),
        }
    }

    fn statement(&mut self) -> String {
        let (value, number, few) = (self.value(), self.below(60), self.below(8));
        let or = self.pick(&["", "", "", "or replace", "or ignore", "or rollback", "or fail"]);
        match self.below(30) {
            0..=2 => format!("insert {or} into item(id, price) values({number}, {few} * 10.5)"),
            3 => format!("insert {or} into item(name, price) values({value}, {few}) returning id, gross, label, at"),
            4..=5 => format!("insert {or} into plain(a) values({value})"),
            6 => format!("insert into keyed(k, n) values('k{few}', {few}) on conflict(k) do update set n = n + 1, v = excluded.v returning *"),
            7 => format!("insert into keyed(k) select 'k' || value from json_each('[1,2,{few}]') where true on conflict do nothing"),
            8 => format!("update {or} plain set a = a + 1 where a > {number}"),
            9 => format!("update item set price = price * 2, name = {value} where lower(name) > 'word' and price < {number}"),
            // Without ORDER BY: which rows these are depends on the query plan, and so on statistics.
            10 => format!("delete from item where id in (select id from item where price > {few} limit 2)"),
            11 => format!("insert into journal(what, value) select 'some', a from plain where a + 1 > {few} limit 3"),
            12 => "insert into journal(what, value) select 'rank', rank() over (partition by price order by name, id) from item limit 9".into(),
            13 => format!("insert into journal(what, value) select 'sum', sum(price) over (order by id rows {few} preceding) from item"),
            14 => format!("insert into child values({few}, {value})"),
            15 => format!("insert or ignore into parent values({few})"),
            16 => format!("update {or} parent set id = id + 10 where id = {few}"),
            17 => format!("delete from parent where id % 8 = {few}"),
            18 => format!("insert into text_index(body) values('word{few} word{number}')"),
            19 => format!("insert into journal(what, value) select 'found', rowid from text_index where text_index match 'word{few}' order by rowid"),
            20 => self.pick(&["insert into text_index(text_index) values('optimize')", "insert into text_index(text_index) values('rebuild')", "reindex item_by_name"]).into(),
            21 => self.pick(&["analyze", "analyze item", "delete from sqlite_stat1"]).into(),
            22 => format!("create index if not exists late{few} on {}", self.pick(&["item(at)", "plain(b, a)", "journal(value) where what = 'new'", "child(p)"])),
            23 => format!("drop index if exists late{few}"),
            24 => format!("alter table {} add column extra{few} default {few}", self.pick(&["plain", "journal"])),
            25 => format!("create table if not exists made{few} as select * from plain where a > {number}"),
            26 => format!("drop table if exists made{few}"),
            27 => format!("insert into journal(what, value) values('changes', changes() * 100 + total_changes() + last_insert_rowid()), ('json', json_group_array({value}))"),
            28 => self.pick(&["vacuum", "pragma user_version = 7", "insert into counted(v) values(random()) returning id"]).into(),
            _ => self.pick(&["insert into nowhere values(1)", "insert into plain(a) values(13)", "update plain set a = 14", "insert into item(price) values(2000)", "insert into keyed values(1, 2, 'x')", "insert into plain(a) values(abs(-9223372036854775807 - 1))"]).into(),
        }
    }

    fn request(&mut self, client: u64, sequence: u64) -> ExecuteRequest {
        let statements: Vec<String> = (0..=self.below(5)).map(|_| self.statement()).collect();
        let id = RequestId {
            client_id: Bytes::copy_from_slice(&u128::from(client).to_be_bytes()),
            sequence,
            acknowledged_below: sequence.saturating_sub(REQUESTS * MARKERS),
            made_at_index: 1,
        };
        let mut request = ExecuteRequest {
            id: Some(id),
            foreign_keys: (self.below(6) == 0).then_some(false),
            ..ExecuteRequest::default()
        };
        match self.below(2) {
            0 => request.script = statements.join(";\n"),
            _ => request.statements = statements.iter().map(|sql| statement(sql)).collect(),
        }
        request
    }
}

/// Content with rowids, so that two nodes that hold the same rows under other names are told apart.
fn content(cluster: &Cluster, node: usize) -> String {
    sqlite3(&cluster.database(node), ".dump --preserve-rowids")
}

fn first_difference<'a>(left: &'a str, right: &'a str) -> (&'a str, &'a str) {
    let lines = left.lines().zip(right.lines());
    lines
        .into_iter()
        .find(|(left, right)| left != right)
        .unwrap_or(("", "(one goes on where the other ends)"))
}

/// Sends one batch of requests, all at once, through all nodes, while daemons die and come back.
async fn batch(cluster: &mut Cluster, author: &mut Author, seed: u64, marker: u64) -> (usize, usize) {
    let clients: Vec<_> = (0..3).map(|node| cluster.client(node)).collect();
    let (node, gentle) = (author.below(3) as usize, author.below(2) == 0);
    let victims: &[Daemon] = match author.below(4) {
        0 => &[Daemon::Raftd],
        1 | 2 => &[Daemon::Sqlited],
        _ => &[Daemon::Sqlited, Daemon::Raftd],
    };
    let mut sent = JoinSet::new();
    let (mut good, mut bad) = (0, 0);
    for number in 0..REQUESTS {
        let request = author.request(seed, 1 + marker * REQUESTS + number);
        let clients = clients.clone();
        sent.spawn(async move { pursue(&clients, number as usize, &request).await });
        if number == REQUESTS / 2 {
            // Some answers first: then the database is being written when the process dies.
            for _ in 0..3 {
                let ended = sent.join_next().await.expect("more were sent").unwrap();
                *(if ended.is_ok() { &mut good } else { &mut bad }) += 1;
            }
            for &daemon in victims {
                if gentle {
                    assert!(cluster.stop(node, daemon), "seed {seed}: {daemon:?} stops cleanly");
                } else {
                    cluster.kill(node, daemon);
                }
            }
            cluster.launch(node);
        }
    }
    while let Some(ended) = sent.join_next().await {
        match ended.unwrap() {
            Ok(_) => good += 1,
            Err(status) => {
                assert!(!status.details().is_empty(), "seed {seed}: not an answer of SQL: {status:?}");
                bad += 1;
            }
        }
    }
    (good, bad)
}

/// Sends a batch while one node is away for so long that the others' logs begin after what it has: it comes back by a
/// snapshot.
async fn batch_without(cluster: &mut Cluster, author: &mut Author, seed: u64, marker: u64) -> (usize, usize) {
    let away = author.below(3) as usize;
    let others: Vec<usize> = (0..3).filter(|node| *node != away).collect();
    for daemon in [Daemon::Sqlited, Daemon::Raftd] {
        cluster.kill(away, daemon);
    }
    let clients: Vec<_> = others.iter().map(|node| cluster.client(*node)).collect();
    let has = log_status(cluster, others[0]).await.expect("the others run").last_index;
    let mut sent = JoinSet::new();
    for number in 0..REQUESTS {
        let (request, clients) = (author.request(seed, 1 + marker * REQUESTS + number), clients.clone());
        sent.spawn(async move { pursue(&clients, number as usize, &request).await });
    }
    let (mut good, mut bad) = (0, 0);
    while let Some(ended) = sent.join_next().await {
        *(if ended.unwrap().is_ok() { &mut good } else { &mut bad }) += 1;
    }
    for other in others {
        eventually("the log begins after what the absent node has", || async {
            execute(&mut cluster.client(other), "delete from journal where 0").await.ok()?;
            (log_status(cluster, other).await?.first_index > has + 1).then_some(())
        })
        .await;
    }
    let before = installs(cluster, away);
    cluster.launch(away);
    cluster.wait_until_serving().await;
    assert!(installs(cluster, away) > before, "seed {seed}: node {} came back by a snapshot", away + 1);
    (good, bad)
}

async fn run(cluster: &mut Cluster, seeds: &Range<u64>, seed: u64) -> (usize, usize) {
    let mut author = Author(seed);
    let (mut good, mut bad) = (0, 0);
    for marker in 0..MARKERS {
        // Before the last marker, so that there are batches before and after; for every other seed, as it takes long.
        let (succeeded, failed) = match (marker, seed % 2) {
            (1, 0) => batch_without(cluster, &mut author, seed, marker).await,
            _ => batch(cluster, &mut author, seed, marker).await,
        };
        (good, bad) = (good + succeeded, bad + failed);
        cluster.wait_until_serving().await;
        cluster.wait_until_level().await;
        let expected = content(cluster, 0);
        for node in 1..3 {
            let found = content(cluster, node);
            let (left, right) = first_difference(&expected, &found);
            assert!(
                found == expected,
                "RESQLITE_SEEDS={seed}..{} (after those from {}), marker {marker}: nodes 1 and {} differ:\n{left}\n{right}",
                seed + 1,
                seeds.start,
                node + 1
            );
        }
    }
    (good, bad)
}

/// Starts every seed from nothing, on the same cluster.
async fn fresh_schema(cluster: &Cluster) {
    let mut client = cluster.client(0);
    let old = sqlite3(
        &cluster.database(0),
        "select name from sqlite_schema where type = 'table' and name not like 'sqlite_%' and name not like '\\_resqlite\\_%' escape '\\' and name not like 'text_index_%'",
    );
    for table in old.lines() {
        let request = ExecuteRequest {
            statements: vec![statement(&format!("drop table if exists \"{table}\""))],
            foreign_keys: Some(false),
            ..ExecuteRequest::default()
        };
        client.execute(request).await.unwrap();
    }
    for sql in SCHEMA {
        execute(&mut client, sql).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn random_requests_leave_the_same_content_everywhere_whoever_dies_meanwhile() {
    let asked = std::env::var("RESQLITE_SEEDS").unwrap_or_else(|_| "0..10".into());
    let (from, to) = asked.split_once("..").expect("RESQLITE_SEEDS=from..to");
    let seeds: Range<u64> = from.parse().unwrap()..to.parse().unwrap();
    let mut cluster = Cluster::prepare_with(3, "log_tail_entries: 20\nlog_tail_bytes: 1048576", "");
    (0..3).for_each(|node| cluster.launch(node));
    cluster.wait_until_serving().await;
    let (mut good, mut bad) = (0, 0);
    for seed in seeds.clone() {
        fresh_schema(&cluster).await;
        cluster.wait_until_level().await;
        let (succeeded, failed) = run(&mut cluster, &seeds, seed).await;
        (good, bad) = (good + succeeded, bad + failed);
    }
    println!("{good} requests succeeded, {bad} failed with an error of SQL");
    assert!(good > bad / 3, "the requests mean something: {good} succeeded, {bad} failed");
}
