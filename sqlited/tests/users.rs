//! Users in the replicated state: what their rights let through, decided alike wherever an entry is executed.

#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

mod machine;

use std::fs;

use machine::{Machine, atomic, content, list, statement};
use resqlite::api::{
    Authority, LogEntry, LoggedPassword, LoggedRequest, LoggedToken, LoggedUser, Operator, ReplyClass,
    Rights, RightsChange, Role, StoredReply, TableHash, UserChange, authority::Who, logged_request::Body,
    user_change::Change,
};
use rusqlite::{Connection, ffi};
use sqlited::{apply::ApplySettings, backup::remove_own_tables, users::Directory, verify::content_hashes};

const HASH: &str = "$argon2id$v=19$m=19456,t=2,p=1$c29tZXNhbHQ$aGFzaA";

fn authority(user: &str) -> Option<Authority> {
    Some(Authority { who: Some(Who::User(user.into())) })
}

fn operator() -> Option<Authority> {
    Some(Authority { who: Some(Who::Operator(Operator {})) })
}

fn roles(roles: &[Role]) -> Rights {
    Rights { roles: roles.iter().map(|role| (*role).into()).collect(), ..Rights::default() }
}

fn on_tables(read: &[&str], write: &[&str]) -> Rights {
    let names = |tables: &[&str]| tables.iter().map(|table| (*table).to_owned()).collect();
    Rights { roles: Vec::new(), read_tables: names(read), write_tables: names(write) }
}

fn user(name: &str, rights: Rights) -> Change {
    Change::Add(LoggedUser { name: name.into(), password_hash: HASH.into(), rights: Some(rights) })
}

fn change_of(name: &str, rights: Rights) -> RightsChange {
    RightsChange { name: name.into(), rights: Some(rights) }
}

/// What tests do with users.
trait UsersOf {
    fn request_change(&self, by: Option<Authority>, change: Change) -> LoggedRequest;
    fn change(&mut self, by: Option<Authority>, change: Change) -> StoredReply;
    fn allow(&mut self, change: Change);
    fn request_as(&self, user: &str, sql: &[&str]) -> LoggedRequest;
    fn run_as(&mut self, user: &str, sql: &[&str]) -> StoredReply;
    fn may(&mut self, user: &str, sql: &str);
    fn may_not(&mut self, user: &str, sql: &str) -> String;
}

impl UsersOf for Machine {
    fn request_change(&self, by: Option<Authority>, change: Change) -> LoggedRequest {
        let body = Body::Users(UserChange { change: Some(change) });
        LoggedRequest { authority: by, body: Some(body), ..self.request_atomic(&[]) }
    }

    fn change(&mut self, by: Option<Authority>, change: Change) -> StoredReply {
        let request = self.request_change(by, change);
        self.apply(request)
    }

    fn allow(&mut self, change: Change) {
        let reply = self.change(operator(), change);
        assert_eq!(reply.error, None);
    }

    fn request_as(&self, user: &str, sql: &[&str]) -> LoggedRequest {
        LoggedRequest { authority: authority(user), ..self.request_atomic(sql) }
    }

    fn run_as(&mut self, user: &str, sql: &[&str]) -> StoredReply {
        let request = self.request_as(user, sql);
        self.apply(request)
    }

    fn may(&mut self, user: &str, sql: &str) {
        // Twice: the second time the statement is known already.
        for _ in 0..2 {
            assert_eq!(self.run_as(user, &[sql]).error, None, "{user}: {sql}");
        }
    }

    fn may_not(&mut self, user: &str, sql: &str) -> String {
        let before = content(&self.path());
        let mut messages = Vec::new();
        for _ in 0..2 {
            let reply = self.run_as(user, &[sql]);
            assert_eq!(reply.class(), ReplyClass::Denied, "{user}: {sql}: {reply:?}");
            messages.push(reply.error.unwrap().message);
        }
        assert_eq!(messages[0], messages[1], "a statement that is known gets the same answer");
        assert_eq!(before, content(&self.path()), "{user}: {sql}");
        messages.remove(0)
    }
}

/// The hashes of every table, the server's own among them.
fn everything(machine: &Machine) -> Vec<TableHash> {
    content_hashes(machine.reader().connection()).unwrap()
}

const SCHEMA: &[&str] = &[
    "CREATE TABLE t(id INTEGER PRIMARY KEY, a)",
    "CREATE INDEX ta ON t(a)",
    "CREATE TABLE secret(a, b)",
    "CREATE TABLE audit(x)",
    "CREATE TABLE watched(a)",
    "CREATE TRIGGER watch AFTER INSERT ON watched BEGIN INSERT INTO audit VALUES (new.a); END",
    "CREATE TABLE peeks(a)",
    "CREATE TRIGGER peek AFTER INSERT ON peeks BEGIN UPDATE peeks SET a = (SELECT max(a) FROM secret); END",
    "CREATE VIEW shown AS SELECT a FROM secret",
    "CREATE VIEW door AS SELECT a FROM t",
    "CREATE TRIGGER through INSTEAD OF INSERT ON door BEGIN INSERT INTO secret VALUES (new.a, 0); END",
    "CREATE TABLE parent(id INTEGER PRIMARY KEY)",
    "CREATE TABLE child(p REFERENCES parent(id) ON DELETE CASCADE)",
    "CREATE VIRTUAL TABLE words USING fts5(text)",
    "CREATE VIRTUAL TABLE boxes USING rtree(id, low, high)",
    "INSERT INTO secret VALUES (42, 'top')",
    "INSERT INTO parent VALUES (1)",
    "INSERT INTO child VALUES (1)",
    "INSERT INTO t VALUES (1, 1)",
    "INSERT INTO words VALUES ('some words')",
    "INSERT INTO boxes VALUES (1, 0, 1)",
];

fn machine_with(users: &[(&str, Rights)]) -> Machine {
    let mut machine = Machine::new();
    machine.ok(SCHEMA);
    for (name, rights) in users {
        machine.allow(user(name, rights.clone()));
    }
    machine
}

#[test]
fn a_read_role_that_writes_is_refused_whichever_way_it_tries() {
    let mut machine = machine_with(&[("reader", roles(&[Role::Read]))]);
    machine.may("reader", "SELECT * FROM secret");
    for sql in [
        "INSERT INTO t(a) VALUES (1)",
        "INSERT INTO t(a) VALUES (1) RETURNING id",
        "INSERT INTO t(a) SELECT a FROM secret",
        "UPDATE t SET a = 2",
        "DELETE FROM t",
        "REPLACE INTO t VALUES (1, 2)",
        "WITH gone AS (SELECT id FROM t) DELETE FROM t WHERE id IN gone",
        "INSERT INTO watched VALUES (1)",
        "INSERT INTO door VALUES (1)",
        "DELETE FROM parent",
        "INSERT INTO words VALUES ('x')",
        "INSERT INTO words(words) VALUES ('rebuild')",
        "DELETE FROM boxes",
        "PRAGMA user_version = 3",
        "PRAGMA defer_foreign_keys = ON",
        "CREATE TABLE x(a)",
        "CREATE TRIGGER x AFTER INSERT ON t BEGIN DELETE FROM secret; END",
        "CREATE VIEW x AS SELECT 1",
        "CREATE VIRTUAL TABLE x USING fts5(y)",
        "CREATE INDEX x ON t(a)",
        "DROP TABLE t",
        "ALTER TABLE t RENAME TO x",
        "ANALYZE",
        "REINDEX",
        "VACUUM",
    ] {
        machine.may_not("reader", sql);
    }
    // What nobody may do is refused as that.
    for sql in ["ATTACH 'x' AS y", "PRAGMA writable_schema = ON", "SELECT load_extension('x')"] {
        let reply = machine.run_as("reader", &[sql]);
        assert_ne!(reply.class(), ReplyClass::Ok, "{sql}");
    }
    assert_eq!(machine.read("SELECT count(*), max(b) FROM secret"), "1|top");
}

#[test]
fn rights_on_single_tables_reach_as_far_as_their_names() {
    let mut machine = machine_with(&[("bob", on_tables(&["audit"], &["t", "WATCHED"]))]);
    for sql in [
        "SELECT * FROM audit",
        "SELECT count(*) FROM audit",
        "INSERT INTO t(a) VALUES (1)",
        "INSERT INTO T(a) VALUES (1) RETURNING *",
        "UPDATE t SET a = (SELECT count(*) FROM audit)",
        "WITH few AS (SELECT id FROM t) SELECT count(*) FROM few",
        "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n LIMIT 3) SELECT count(*) FROM n",
        "SELECT value FROM json_each('[1, 2]')",
        "SELECT name FROM sqlite_schema",
        "DELETE FROM t WHERE id > 100",
    ] {
        machine.may("bob", sql);
    }
    for sql in [
        "SELECT a FROM secret",
        "SELECT count(*) FROM secret",
        "SELECT EXISTS (SELECT 1 FROM secret)",
        "SELECT 1 FROM t WHERE (SELECT max(a) FROM secret) > 1",
        "INSERT INTO t(a) SELECT a FROM secret",
        "UPDATE t SET a = s.a FROM secret AS s",
        "DELETE FROM t WHERE id IN (SELECT a FROM secret)",
        "INSERT INTO audit VALUES (1)",
        "INSERT INTO words VALUES ('x')",
        "SELECT * FROM words",
        "SELECT * FROM words_content",
        "SELECT * FROM boxes_node",
        "SELECT * FROM pragma_foreign_key_check",
        "PRAGMA table_info(t)",
        "PRAGMA user_version",
        "CREATE TABLE x(a)",
        "DROP TABLE t",
        "VACUUM",
        "REINDEX t",
        "ANALYZE t",
    ] {
        machine.may_not("bob", sql);
    }
}

#[test]
fn views_triggers_and_foreign_keys_give_no_rights_of_their_own() {
    let mut machine = machine_with(&[
        ("bob", on_tables(&["shown", "door"], &["t", "door", "watched", "peeks", "parent"])),
        ("eve", on_tables(&["secret"], &["watched", "audit", "parent", "child"])),
    ]);
    for sql in [
        "SELECT a FROM shown",
        "SELECT count(*) FROM shown",
        // SQLite gives a CTE's name where it gives a view's.
        "WITH shown AS (SELECT a FROM secret) SELECT a FROM shown",
        "WITH watch AS (SELECT a FROM secret) INSERT INTO t(a) SELECT a FROM watch",
        "INSERT INTO watched VALUES (1)",
        "INSERT INTO peeks VALUES (1)",
        "INSERT INTO door VALUES (1)",
        "DELETE FROM parent",
    ] {
        machine.may_not("bob", sql);
    }
    machine.may("bob", "SELECT a FROM door");
    machine.may("eve", "SELECT a FROM shown");
    machine.may("eve", "INSERT INTO watched VALUES (1)");
    machine.may("eve", "DELETE FROM parent");
}

#[test]
fn a_write_role_may_change_the_schema_and_everything_but_the_servers_own_tables() {
    let mut machine = machine_with(&[("writer", roles(&[Role::Write]))]);
    for sql in ["CREATE TABLE IF NOT EXISTS x(a)", "PRAGMA user_version = 3", "ANALYZE", "VACUUM"] {
        machine.may("writer", sql);
    }
    for who in [authority("writer"), operator(), None] {
        for sql in [
            "SELECT state FROM _resqlite_users",
            "SELECT count(*) FROM _RESQLITE_USERS",
            "INSERT INTO x SELECT state FROM _resqlite_users",
            "UPDATE _resqlite_authentication SET required = 0",
            "DELETE FROM _resqlite_users",
            "CREATE TRIGGER g AFTER INSERT ON _resqlite_users BEGIN INSERT INTO x VALUES (new.state); END",
            "CREATE INDEX g ON _resqlite_users(state)",
            "ALTER TABLE _resqlite_users RENAME TO mine",
            "DROP TABLE _resqlite_users",
        ] {
            let request = LoggedRequest { authority: who.clone(), ..machine.request_atomic(&[sql]) };
            let reply = machine.apply(request);
            let error = reply.error.clone().unwrap_or_else(|| panic!("{sql} is refused"));
            assert!(error.message.contains("server's own"), "{sql}: {}", error.message);
            assert!(!format!("{reply:?}").contains("argon2"));
        }
    }
    // By way of a view, or of a full-text index over another table's content.
    machine.ok(&["CREATE VIEW around AS SELECT state FROM _resqlite_users"]);
    assert!(machine.refusal("INSERT INTO x SELECT * FROM around").1.contains("server's own"));
    machine.ok(&["CREATE VIRTUAL TABLE beneath USING fts5(required, content='_resqlite_authentication')"]);
    let (_, message) = machine.refusal("INSERT INTO x SELECT required FROM beneath");
    assert!(message.contains("server's own"), "{message}");
}

#[test]
fn what_is_queued_behind_a_revocation_is_refused_wherever_the_groups_are_cut() {
    let run = |settings: ApplySettings| {
        let mut machine = Machine::with(settings);
        machine.ok(SCHEMA);
        machine.allow(user("bob", on_tables(&[], &["t"])));
        let insert = |machine: &Machine| machine.request_as("bob", &["INSERT INTO t(a) VALUES (7)"]);
        let revoke = Change::Revoke(change_of("bob", on_tables(&[], &["t"])));
        let mut entries: Vec<LogEntry> = Vec::new();
        for step in 0..5 {
            let request = match step {
                1 => machine.request_change(operator(), revoke.clone()),
                3 => machine.request_change(operator(), Change::Remove("bob".into())),
                _ => insert(&machine),
            };
            entries.push(machine.entry(request));
        }
        let applied = machine.try_apply(&entries).unwrap();
        let classes: Vec<ReplyClass> = applied.iter().map(|applied| applied.reply.class()).collect();
        (classes, everything(&machine))
    };
    let together = run(ApplySettings::default());
    use ReplyClass::{Denied, Ok};
    assert_eq!(together.0, [Ok, Ok, Denied, Ok, Denied]);
    assert_eq!(together, run(ApplySettings { group_entries: 1, ..ApplySettings::default() }));
}

#[test]
fn a_group_that_is_executed_again_does_not_change_the_users_twice() {
    let mut machine = machine_with(&[]);
    // The last request rolls back the whole transaction, so all of them are executed again.
    let requests = [
        |machine: &Machine| machine.request_change(operator(), user("bob", on_tables(&[], &["t"]))),
        |machine: &Machine| machine.request_as("bob", &["INSERT INTO t VALUES (9, 9)"]),
        |machine: &Machine| machine.request_as("bob", &["INSERT OR ROLLBACK INTO t VALUES (9, 9)"]),
    ];
    let entries: Vec<LogEntry> = requests
        .iter()
        .map(|make| {
            let request = make(&machine);
            machine.entry(request)
        })
        .collect();
    let applied = machine.try_apply(&entries).unwrap();
    let classes: Vec<ReplyClass> = applied.iter().map(|applied| applied.reply.class()).collect();
    assert_eq!(classes, [ReplyClass::Ok, ReplyClass::Ok, ReplyClass::Failed]);
}

#[test]
fn a_node_that_has_just_started_decides_as_one_that_has_run_for_long() {
    let users = [
        ("words", on_tables(&["boxes"], &["words"])),
        ("none", on_tables(&["t"], &[])),
        ("reader", roles(&[Role::Read])),
    ];
    let statements = [
        "INSERT INTO words VALUES ('x')",
        "SELECT count(*) FROM words WHERE words MATCH 'x'",
        "DELETE FROM words WHERE rowid = 1",
        "SELECT count(*) FROM boxes",
        "INSERT INTO boxes VALUES (7, 0, 1)",
        "SELECT count(*) FROM words_data",
        "SELECT count(*) FROM old",
        "INSERT INTO old VALUES ('x')",
        "PRAGMA table_info(words)",
        "SELECT a FROM t",
    ];
    let all = statements.iter().flat_map(|sql| users.iter().map(move |(name, _)| (*name, *sql)));
    let all: Vec<(&str, &str)> = all.collect();
    let run = |restarts: bool| {
        let mut machine = machine_with(&users);
        machine.ok(&["CREATE VIRTUAL TABLE old USING fts4(text)", "ANALYZE"]);
        let mut replies = Vec::new();
        for (name, sql) in &all {
            if restarts {
                machine = machine.reopen();
            }
            replies.push(machine.run_as(name, &[sql]));
        }
        (replies, everything(&machine))
    };
    let (fresh, live) = (run(true), run(false));
    for ((fresh, live), (name, sql)) in fresh.0.iter().zip(&live.0).zip(&all) {
        assert_eq!(fresh, live, "{name}: {sql}");
    }
    assert_eq!(fresh.1, live.1);
    let denied = live.0.iter().filter(|reply| reply.class() == ReplyClass::Denied).count();
    assert!(denied > 8 && denied < live.0.len(), "{denied}");
}

#[test]
fn only_an_administrator_changes_users_and_everybody_their_own_password() {
    let mut machine =
        machine_with(&[("root", roles(&[Role::Admin])), ("bob", roles(&[Role::Write, Role::Backup]))]);
    let password = |name: &str| {
        Change::Password(LoggedPassword { name: name.into(), password_hash: "$argon2id$other".into() })
    };
    let everything = || change_of("bob", roles(&[Role::Admin]));
    for change in [
        user("eve", roles(&[])),
        password("root"),
        Change::Grant(everything()),
        Change::Remove("root".into()),
        Change::RequireAuthentication(true),
        Change::Token(LoggedToken { user: "root".into(), hash: vec![7; 32].into(), lifetime_ms: 1_000 }),
    ] {
        assert_eq!(machine.change(authority("bob"), change).class(), ReplyClass::Denied);
    }
    assert_eq!(machine.change(authority("bob"), password("bob")).error, None);
    assert_eq!(machine.change(authority("root"), Change::Grant(everything())).error, None);
    assert_eq!(machine.change(authority("bob"), user("eve", roles(&[]))).error, None);
    assert_eq!(machine.change(authority("nobody"), user("x", roles(&[]))).class(), ReplyClass::Denied);
}

#[test]
fn changes_that_make_no_sense_are_refused_and_change_nothing() {
    let mut machine = machine_with(&[("bob", roles(&[]))]);
    let users = |machine: &Machine| {
        everything(machine).into_iter().find(|table| table.name == "_resqlite_users").unwrap()
    };
    let before = users(&machine);
    for (change, class, words) in [
        (user("bob", roles(&[])), ReplyClass::Failed, "already"),
        (user("", roles(&[])), ReplyClass::Invalid, "cannot be a user's name"),
        (user("a b", roles(&[])), ReplyClass::Invalid, "cannot be a user's name"),
        (user(&"x".repeat(65), roles(&[])), ReplyClass::Invalid, "cannot be a user's name"),
        (user("eve", on_tables(&["_resqlite_users"], &[])), ReplyClass::Invalid, "server's own"),
        (user("eve", on_tables(&[""], &[])), ReplyClass::Invalid, "1 to 255 bytes"),
        (user("eve", Rights { roles: vec![99], ..Rights::default() }), ReplyClass::Invalid, "no role 99"),
        (Change::Remove("eve".into()), ReplyClass::Failed, "there is no user \"eve\""),
        (Change::Grant(change_of("eve", roles(&[Role::Read]))), ReplyClass::Failed, "there is no user"),
        (Change::RequireAuthentication(true), ReplyClass::Failed, "nobody could get in"),
    ] {
        let reply = machine.change(operator(), change);
        assert_eq!(reply.class(), class, "{words}");
        let message = reply.error.unwrap().message;
        assert!(message.contains(words), "{message}");
    }
    let many: Vec<String> = (0..1_001).map(|number| format!("t{number}")).collect();
    let many = Rights { read_tables: many, ..Rights::default() };
    assert_eq!(machine.change(operator(), Change::Grant(change_of("bob", many))).class(), ReplyClass::Limit);
    assert_eq!(users(&machine), before);
}

#[test]
fn while_authentication_is_required_nobody_unnamed_is_served_and_an_administrator_stays() {
    let mut machine = machine_with(&[("root", roles(&[Role::Admin])), ("bob", roles(&[Role::Write]))]);
    assert_eq!(machine.atomic(&["INSERT INTO t(a) VALUES (1)"]).error, None);
    assert_eq!(machine.change(None, Change::RequireAuthentication(true)).error, None);
    let mut machine = machine.reopen();
    assert_eq!(machine.atomic(&["INSERT INTO t(a) VALUES (1)"]).class(), ReplyClass::Denied);
    assert_eq!(machine.change(None, user("eve", roles(&[Role::Admin]))).class(), ReplyClass::Denied);
    machine.may("bob", "INSERT INTO t(a) VALUES (1)");

    let no_password = LoggedPassword { name: "root".into(), password_hash: String::new() };
    for change in [
        Change::Remove("root".into()),
        Change::Revoke(change_of("root", roles(&[Role::Admin]))),
        Change::Password(no_password),
    ] {
        let reply = machine.change(operator(), change);
        assert_eq!(reply.class(), ReplyClass::Failed);
        assert!(reply.error.unwrap().message.contains("last administrator"));
    }
    machine.allow(user("second", roles(&[Role::Admin])));
    machine.allow(Change::Remove("root".into()));
    machine.allow(Change::RequireAuthentication(false));
    assert_eq!(machine.atomic(&["INSERT INTO t(a) VALUES (1)"]).error, None);
}

#[test]
fn a_stored_reply_is_given_to_its_own_user_only() {
    let mut machine = machine_with(&[("bob", roles(&[Role::Write])), ("eve", roles(&[Role::Write]))]);
    let insert = "INSERT INTO secret VALUES (1, 'for bob') RETURNING b";
    let as_user = |machine: &Machine, user: &str| {
        let mut request = machine.request_as(user, &[insert]);
        let id = request.id.as_mut().unwrap();
        (id.client_id, id.sequence, id.acknowledged_below) = (vec![5; 16].into(), 1, 1);
        LoggedRequest { server_made_id: false, ..request }
    };
    // Nobody said who they were at first: whoever repeats it by name is known, and owns it from then on.
    let first = LoggedRequest { authority: None, ..as_user(&machine, "bob") };
    let first = machine.apply(first);
    assert_eq!(first.results[0].rows.len(), 1);
    let mut machine = machine;
    for (user, expected) in [("bob", ReplyClass::Ok), ("eve", ReplyClass::Denied), ("bob", ReplyClass::Ok)] {
        let request = as_user(&machine, user);
        let reply = machine.apply(request);
        assert_eq!(reply.class(), expected, "{user}");
        assert_eq!(reply.results.is_empty(), expected == ReplyClass::Denied);
        machine = machine.reopen();
    }
    // What was applied before a right was revoked was applied: the answer stays the same.
    machine.allow(Change::Remove("bob".into()));
    let request = as_user(&machine, "bob");
    assert_eq!(machine.apply(request), first);
    assert_eq!(machine.read("SELECT count(*) FROM secret WHERE b = 'for bob'"), "1");
}

#[test]
fn tokens_expire_by_the_logs_time_are_bounded_and_end_with_the_password() {
    let directory = Directory::new(false);
    let settings = ApplySettings { directory: directory.clone(), ..ApplySettings::default() };
    let mut machine = Machine::with(settings);
    machine.allow(user("bob", roles(&[Role::Read])));
    let token = |number: u8| {
        Change::Token(LoggedToken { user: "bob".into(), hash: vec![number; 32].into(), lifetime_ms: 60_000 })
    };
    let is_good = |number: u8, at_ms: u64| directory.current().user_of_token(&[number; 32], at_ms).is_some();
    let given_ms = machine.applier.position().applied_timestamp_ms + 1_000;
    assert_eq!(machine.change(authority("bob"), token(1)).error, None);
    assert!(is_good(1, given_ms) && is_good(1, given_ms + 59_999) && !is_good(1, given_ms + 60_000));
    assert!(!is_good(2, given_ms));
    // One a second: when the last is given, the first has made room for it.
    for number in 2..=17 {
        machine.allow(token(number));
    }
    assert!(!is_good(1, given_ms) && is_good(2, given_ms) && is_good(17, given_ms));
    let set = LoggedPassword { name: "bob".into(), password_hash: HASH.into() };
    machine.allow(Change::Password(set));
    assert!((1..=17).all(|number| !is_good(number, given_ms)));
    let wrong = LoggedToken { user: "bob".into(), hash: vec![1; 31].into(), lifetime_ms: 1 };
    assert_eq!(machine.change(operator(), Change::Token(wrong)).class(), ReplyClass::Invalid);
}

#[test]
fn what_is_published_is_what_is_committed() {
    let directory = Directory::new(false);
    let settings = ApplySettings { directory: directory.clone(), ..ApplySettings::default() };
    let mut machine = Machine::with(settings.clone());
    machine.allow(user("bob", roles(&[Role::Read])));
    let files = machine.applier.files();
    let request = machine.request_change(operator(), Change::Remove("bob".into()));
    let entry = machine.entry(request);
    files.fail_after(0, ffi::SQLITE_IOERR_WRITE);
    assert!(machine.try_apply(std::slice::from_ref(&entry)).is_err());
    assert!(directory.current().user("bob").is_some(), "nothing was committed");
    files.heal();
    machine.try_apply(&[entry]).unwrap();
    assert!(directory.current().user("bob").is_none());
}

#[test]
fn a_transaction_of_a_user_stops_at_what_they_may_not_do() {
    let mut machine = machine_with(&[("bob", on_tables(&[], &["t"]))]);
    let reply = machine.run_as("bob", &["INSERT INTO t(a) VALUES (1)", "INSERT INTO secret VALUES (1, 2)"]);
    assert_eq!((reply.class(), reply.error.unwrap().statement), (ReplyClass::Denied, 2));
    assert_eq!(machine.read("SELECT count(*) FROM t"), "1");
    let script = LoggedRequest {
        body: Some(Body::Script(list(&["INSERT INTO t(a) VALUES (1)", "DELETE FROM secret"]))),
        ..machine.request_as("bob", &[])
    };
    let reply = machine.apply(script);
    assert_eq!((reply.class(), reply.results.len()), (ReplyClass::Denied, 1));
    let guard = resqlite::api::Statement { guard: true, ..statement("SELECT max(a) > 40 FROM secret", []) };
    let body = Some(atomic(vec![guard, statement("INSERT INTO t(a) VALUES (1)", [])]));
    let request = LoggedRequest { body, ..machine.request_as("bob", &[]) };
    assert_eq!(machine.apply(request).class(), ReplyClass::Denied);
}

#[test]
fn no_backup_and_no_free_page_holds_a_password_hash() {
    let mut machine = machine_with(&[]);
    let name = |number| format!("user{number}");
    (0..200).for_each(|number| machine.allow(user(&name(number), roles(&[Role::Read]))));
    (0..150).for_each(|number| machine.allow(Change::Remove(name(number))));
    // Closing it writes the write-ahead log back.
    let machine = machine.reopen();
    let holds_hash = |bytes: &[u8]| bytes.windows(10).any(|window| window == b"$argon2id$");
    let database = fs::read(machine.path()).unwrap();
    assert!(holds_hash(&database), "those who are left are in the database");
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("copy.db");
    fs::write(&path, database).unwrap();
    let copy = Connection::open(&path).unwrap();
    let free: i64 = copy.query_row("PRAGMA freelist_count", [], |row| row.get(0)).unwrap();
    assert!(free > 1, "those who are not have left {free} free pages");
    remove_own_tables(&copy).unwrap();
    copy.close().unwrap();
    assert!(!holds_hash(&fs::read(&path).unwrap()));
}
