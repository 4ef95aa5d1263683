//! Random scripts on several nodes that group them differently, at different times, with restarts and
//! with a node restored from a copy: replies and content must be the same everywhere.
//!
//! `SQL_SEEDS=from..to` runs other seeds than the default ones. A failing seed names itself.

#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

mod machine;

use machine::{Machine, content, entry_at, noop_at, request, statement};
use rand_chacha::{
    ChaCha8Rng,
    rand_core::{Rng, SeedableRng},
};
use resqlite::api::{
    LogEntry, LoggedRequest, RequestId, Statement, StatementList, StoredReply, logged_request::Body,
    value::Kind,
};
use sqlited::apply::ApplySettings;

/// What makes the scripts: everything comes from one seed.
struct Author {
    random: ChaCha8Rng,
}

impl Author {
    fn below(&mut self, end: u64) -> u64 {
        self.random.next_u64() % end
    }

    fn one_in(&mut self, chances: u64) -> bool {
        self.below(chances) == 0
    }

    fn pick<'a>(&mut self, from: &[&'a str]) -> &'a str {
        from[self.below(from.len() as u64) as usize]
    }

    /// An expression that any statement may hold.
    fn value(&mut self) -> String {
        let number = self.below(40);
        match self.below(14) {
            0..=4 => number.to_string(),
            5 => format!("'text {number}'"),
            6 => "random()".into(),
            7 => format!("hex(randomblob({}))", number % 9),
            8 => self
                .pick(&[
                    "datetime('now')",
                    "CURRENT_TIMESTAMP",
                    "julianday()",
                    "strftime('%s', 'now', 'localtime')",
                    "unixepoch('subsec')",
                    "date('now', 'weekday 1')",
                ])
                .into(),
            9 => "NULL".into(),
            10 => format!("{number} / 7.0"),
            11 => self.pick(&["last_insert_rowid()", "changes()", "total_changes()"]).into(),
            12 => format!("json_object('k', {number}, 'l', json_array(1, random() % 5))"),
            _ => format!("(SELECT max(a) FROM {})", self.table()),
        }
    }

    fn table(&mut self) -> &'static str {
        self.pick(&["t", "u", "w", "s"])
    }

    fn condition(&mut self) -> String {
        let number = self.below(40);
        match self.below(5) {
            0 => format!("a = {number}"),
            1 => format!("a % 5 = {}", number % 5),
            2 => format!("a IN (SELECT a FROM {} LIMIT 3)", self.table()),
            3 => format!("b LIKE 'text {}%'", number % 4),
            _ => format!("a > {number} AND random() % 3 = 0"),
        }
    }

    fn statement(&mut self) -> String {
        let (table, value, other) = (self.table(), self.value(), self.value());
        let or = self.pick(&["", "", "OR REPLACE", "OR IGNORE", "OR ROLLBACK", "OR FAIL", "OR ABORT"]);
        match self.below(40) {
            0..=7 => format!("INSERT {or} INTO {table}(a, b) VALUES ({value}, {other})"),
            8..=9 => format!("INSERT {or} INTO {table}(a, b) VALUES ({value}, {other}) RETURNING *"),
            10 => format!("INSERT INTO u(a, b) VALUES ({value}, {other}) ON CONFLICT(a) DO UPDATE SET b = excluded.b, n = n + 1"),
            11..=13 => format!("UPDATE {or} {table} SET b = {value} WHERE {}", self.condition()),
            14 => format!("UPDATE {or} {table} SET a = a + 1 WHERE {}", self.condition()),
            15..=16 => format!("DELETE FROM {table} WHERE {}", self.condition()),
            17 => format!("INSERT {or} INTO {table}(a, b) SELECT a + 50, b FROM {} WHERE {} LIMIT 9", self.table(), self.condition()),
            18 => format!(
                "WITH RECURSIVE n(i) AS (VALUES (1) UNION ALL SELECT i + 1 FROM n WHERE i < {}) INSERT {or} INTO {table}(a, b) SELECT i, {value} FROM n",
                self.below(60)
            ),
            19 => "WITH RECURSIVE n(i) AS (VALUES (1) UNION ALL SELECT i + 1 FROM n) INSERT INTO t(a) SELECT i FROM n".into(),
            20..=21 => format!("INSERT INTO c(p) VALUES ({})", self.below(12)),
            22 => format!("INSERT OR IGNORE INTO p(id) VALUES ({})", self.below(12)),
            23 => format!("DELETE FROM p WHERE id = {}", self.below(12)),
            24..=25 => format!("INSERT INTO f(a) VALUES ('word{} word{} text')", self.below(9), self.below(99)),
            26 => format!("DELETE FROM f WHERE f MATCH 'word{}'", self.below(9)),
            27 => format!("INSERT INTO f4(a) VALUES ('word{} {}')", self.below(9), self.below(99)),
            28 => self.pick(&["INSERT INTO f(f) VALUES ('optimize')", "INSERT INTO f(f, rank) VALUES ('automerge', 2)", "INSERT INTO f4(f4) VALUES ('automerge=2')", "INSERT INTO f(f) VALUES ('integrity-check')", "INSERT INTO f4(f4) VALUES ('merge=4,2')"]).into(),
            29 => self.pick(&["ANALYZE", "ANALYZE t", "REINDEX", "UPDATE sqlite_stat1 SET stat = '1000 1' WHERE tbl = 't'", "DELETE FROM sqlite_stat1"]).into(),
            30 => format!("CREATE TABLE IF NOT EXISTS x{}(a PRIMARY KEY, b DEFAULT (random()), c AS (a || b) STORED)", self.below(3)),
            31 => format!("DROP TABLE IF EXISTS x{}", self.below(3)),
            32 => format!("INSERT {or} INTO x{}(a) VALUES ({value})", self.below(3)),
            33 => format!("CREATE INDEX i{} ON {table}({})", self.below(4), self.pick(&["a", "b, a", "a + 1", "lower(b)"])),
            34 => format!("DROP INDEX IF EXISTS i{}", self.below(4)),
            35 => format!("ALTER TABLE {table} ADD COLUMN z{} DEFAULT {}", self.below(6), self.below(9)),
            36 => format!("PRAGMA user_version = {}", self.below(99)),
            37 => "VACUUM".into(),
            38 => format!("INSERT INTO {table}(a) VALUES (-{})", self.below(4)),
            _ => self.pick(&["nonsense", "INSERT INTO nowhere VALUES (1)", "SELECT json('{')", "PRAGMA journal_mode = OFF", "COMMIT", "SELECT 1 / 0"]).into(),
        }
    }

    /// A read, as an atomic request may hold.
    fn read(&mut self) -> String {
        let (table, condition) = (self.table(), self.condition());
        match self.below(5) {
            0 => format!("SELECT rowid, * FROM {table} WHERE {condition} LIMIT 2"),
            1 => format!("SELECT a, sum(a) OVER (PARTITION BY a % 3 ORDER BY a, rowid) FROM {table} LIMIT 5"),
            2 => format!("SELECT count(*), total_changes(), random() FROM {table} WHERE {condition}"),
            3 => "SELECT rowid FROM f WHERE f MATCH 'word1' LIMIT 3".into(),
            _ => format!("SELECT x.a, y.b FROM t x JOIN u y ON x.a = y.a WHERE x.{condition} LIMIT 1"),
        }
    }

    fn request(&mut self, index: u64, earlier: &[LoggedRequest]) -> LoggedRequest {
        // A client that asks again.
        if self.one_in(12) && !earlier.is_empty() {
            return earlier[self.below(earlier.len() as u64) as usize].clone();
        }
        let atomic = self.one_in(2);
        let mut statements: Vec<Statement> = Vec::new();
        for _ in 0..=self.below(5) {
            let sql = if atomic && self.one_in(4) { self.read() } else { self.statement() };
            statements.push(statement(&sql, []));
        }
        if self.one_in(6) {
            let kind = Kind::Integer(self.below(40) as i64);
            let mut conditional = statement("UPDATE t SET b = 'swapped' WHERE a = ?1", [kind]);
            conditional.expect_rows_affected = self.one_in(2).then_some(1);
            statements.push(conditional);
        }
        if atomic && self.one_in(10) {
            statements.insert(0, statement("PRAGMA defer_foreign_keys = ON", []));
        }
        let list = StatementList { statements };
        let mut made = request(index, if atomic { Body::Atomic(list) } else { Body::Script(list) });
        made.foreign_keys = !self.one_in(8);
        made.step_budget = if self.one_in(5) { self.below(3_000) } else { 200_000 };
        if self.one_in(2) {
            made.server_made_id = false;
            made.id = Some(RequestId {
                client_id: vec![self.below(4) as u8; 16].into(),
                sequence: index,
                acknowledged_below: index.saturating_sub(30),
                made_at_index: index - 1,
            });
        }
        made
    }

    fn log(&mut self, entries: u64) -> Vec<LogEntry> {
        let setup = machine::list(&[
            "CREATE TABLE t(a, b DEFAULT CURRENT_TIMESTAMP, g AS (a || '!') STORED)",
            "CREATE TABLE u(a UNIQUE, b, n DEFAULT 0, at DEFAULT (julianday('now')))",
            "CREATE TABLE w(a PRIMARY KEY, b DEFAULT (hex(randomblob(3)))) WITHOUT ROWID",
            "CREATE TABLE s(a INTEGER PRIMARY KEY AUTOINCREMENT, b)",
            "CREATE TABLE p(id INTEGER PRIMARY KEY)",
            "CREATE TABLE c(p REFERENCES p(id) ON DELETE CASCADE DEFERRABLE INITIALLY DEFERRED)",
            "CREATE TABLE log(what, at DEFAULT (datetime('now')), r DEFAULT (random()))",
            "CREATE VIRTUAL TABLE f USING fts5(a)",
            "CREATE VIRTUAL TABLE f4 USING fts4(a)",
            "CREATE VIRTUAL TABLE r USING rtree(id, x0, x1)",
            "CREATE INDEX ta ON t(a)",
            "CREATE INDEX tb ON t(b)",
            "CREATE TRIGGER negative BEFORE INSERT ON t WHEN new.a < 0 BEGIN SELECT RAISE(ROLLBACK, 'negative'); END",
            "CREATE TRIGGER negative_u BEFORE INSERT ON u WHEN new.a < 0 BEGIN SELECT RAISE(FAIL, 'negative'); END",
            "CREATE TRIGGER noted AFTER UPDATE ON t BEGIN INSERT INTO log(what) VALUES (new.a); END",
            "CREATE TRIGGER boxed AFTER INSERT ON s BEGIN INSERT OR REPLACE INTO r VALUES (new.a, new.a, new.a + 1); END",
            "CREATE TRIGGER indexed AFTER DELETE ON t BEGIN INSERT INTO f(a) VALUES (old.b); END",
        ]);
        let mut earlier = vec![request(1, Body::Script(setup))];
        let mut log = vec![entry_at(1, earlier[0].clone())];
        for index in 2..=entries {
            if self.one_in(20) {
                log.push(noop_at(index));
                continue;
            }
            let request = self.request(index, &earlier);
            log.push(entry_at(index, request.clone()));
            earlier.push(request);
        }
        log
    }
}

/// A node, how it groups, and how often it restarts.
struct Node {
    machine: Option<Machine>,
    replies: Vec<StoredReply>,
    settings: fn(u64) -> ApplySettings,
    restarts: bool,
}

impl Node {
    fn apply(&mut self, log: &[LogEntry], author: &mut Author) {
        let mut rest = log;
        while !rest.is_empty() {
            let mut machine = self.machine.take().expect("every path puts it back");
            let length = (1 + author.below(30) as usize).min(rest.len());
            let (now, later) = rest.split_at(length);
            let applied = machine.try_apply(now).expect("nothing is wrong with this node");
            self.replies.extend(applied.iter().map(|applied| (*applied.reply).clone()));
            rest = later;
            let restart = self.restarts && author.one_in(3);
            self.machine =
                Some(if restart { machine.reopen_with((self.settings)(author.below(20))) } else { machine });
        }
    }

    fn content(&self) -> String {
        content(&self.machine.as_ref().expect("it is put back").path())
    }
}

fn first_difference(left: &str, right: &str) -> String {
    let mut table = "";
    for (number, (left, right)) in left.lines().zip(right.lines()).enumerate() {
        if left != right {
            return format!("line {number}, in {table}\n  {left}\n  {right}");
        }
        if left.starts_with("-- ") {
            table = left;
        }
    }
    format!("{} and {} lines", left.lines().count(), right.lines().count())
}

fn assert_alike(seed: u64, log: &[LogEntry], nodes: &[&Node]) {
    let reference = nodes[0];
    for (number, node) in nodes.iter().enumerate().skip(1) {
        for (reply, expected) in node.replies.iter().zip(&reference.replies) {
            let body = || {
                use prost::Message;
                let entry = &log[expected.log_index.max(1) as usize - 1];
                LoggedRequest::decode(entry.payload.clone())
                    .map(|request| format!("{request:?}"))
                    .unwrap_or_default()
            };
            assert!(
                reply == expected,
                "seed {seed}, node {number}:\n{reply:?}\nand not\n{expected:?}\nto {}",
                body()
            );
        }
        assert_eq!(node.replies.len(), reference.replies.len(), "seed {seed}, node {number}");
        let (content, expected) = (node.content(), reference.content());
        assert!(content == expected, "seed {seed}, node {number}: {}", first_difference(&content, &expected));
    }
}

fn run(seed: u64) {
    let mut author = Author { random: ChaCha8Rng::seed_from_u64(seed) };
    let log = author.log(160);
    let one: fn(u64) -> ApplySettings = |_| ApplySettings { group_entries: 1, ..ApplySettings::default() };
    let few: fn(u64) -> ApplySettings = |random| ApplySettings {
        group_entries: 1 + random as usize,
        checkpoint_pages: 1 + random as u32 * 10,
        ..ApplySettings::default()
    };
    let node = |settings: fn(u64) -> ApplySettings, restarts| Node {
        machine: Some(Machine::with(settings(7))),
        replies: Vec::new(),
        settings,
        restarts,
    };
    let mut nodes = [node(one, false), node(few, true), node(|_| ApplySettings::default(), false)];
    let (first, second) = log.split_at(80);
    for node in &mut nodes {
        node.apply(first, &mut author);
    }
    // A fourth node is restored from the third one's file.
    let origin = nodes[2].machine.take().expect("it is put back");
    let (origin, copy) = origin.restored_copy(ApplySettings::default());
    nodes[2].machine = Some(origin);
    let replies = nodes[2].replies.clone();
    let mut restored = Node { machine: Some(copy), replies, settings: few, restarts: true };
    for node in nodes.iter_mut().chain([&mut restored]) {
        node.apply(second, &mut author);
    }
    let [one, few, many] = &nodes;
    assert_alike(seed, &log, &[one, few, many, &restored]);
}

/// Seeds that have found something, or that fail when one of the rules is taken away.
const KEPT_SEEDS: [u64; 5] = [1, 9, 24, 30, 221];

#[test]
fn random_scripts_end_alike_however_they_are_grouped_and_wherever_they_are_executed() {
    let seeds = std::env::var("SQL_SEEDS").unwrap_or_else(|_| "2..14".into());
    let (from, to) = seeds.split_once("..").expect("SQL_SEEDS=from..to");
    let seeds = from.parse::<u64>().unwrap()..to.parse().unwrap();
    KEPT_SEEDS.into_iter().chain(seeds).for_each(run);
}

#[test]
fn random_scripts_mean_something() {
    // The scripts would prove little if most of their statements failed.
    let mut author = Author { random: ChaCha8Rng::seed_from_u64(1) };
    let log = author.log(400);
    let mut machine = Machine::new();
    let applied = machine.try_apply(&log).unwrap();
    let good = applied.iter().filter(|applied| applied.reply.error.is_none()).count();
    let results: usize = applied.iter().map(|applied| applied.reply.results.len()).sum();
    assert!(good * 3 > applied.len() && results > 300, "{good} of {}, {results} results", applied.len());
    assert!(content(&machine.path()).lines().count() > 300);
}
