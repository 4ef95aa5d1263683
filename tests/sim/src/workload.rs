//! What the clients ask for: a register with compare-and-swap, counters, inserts, and a bank.
//!
//! It knows SQL and the form of requests; what ought to come of them is the model's business.

use bytes::Bytes;
use prost::Message;
use resqlite::api::{
    LoggedRequest, RequestId, Statement, StatementList, Value, logged_request::Body, value::Kind,
};
use sqlited::{apply::REQUEST_FORMAT, version};

use crate::random::Random;

/// Registers, counters and accounts there are.
pub const REGISTERS: u64 = 2;
/// See [`REGISTERS`].
pub const COUNTERS: u64 = 2;
/// See [`REGISTERS`].
pub const ACCOUNTS: u64 = 3;
/// What is on each account at first.
pub const OPENING_BALANCE: i64 = 20;

/// A write that a client wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Write {
    /// Makes the tables.
    CreateTables,
    /// Sets a register if it has this value.
    CompareAndSwap {
        /// Which one.
        register: u64,
        /// What it must be.
        old: i64,
        /// What it is to be.
        new: i64,
    },
    /// Adds one.
    Add {
        /// To which.
        counter: u64,
    },
    /// Adds a row, with the log's time and a random number in it.
    Insert {
        /// Whose it is.
        client: u64,
        /// Its number among the client's requests.
        sequence: u64,
    },
    /// Moves money; fails if there is not enough.
    Transfer {
        /// From whom.
        from: u64,
        /// To whom.
        to: u64,
        /// How much.
        amount: i64,
    },
}

impl Write {
    /// Some write of a client.
    pub fn draw(random: &mut Random, client: u64, sequence: u64) -> Self {
        match random.below(4) {
            // Few values, so that some hit.
            0 => Self::CompareAndSwap {
                register: random.below(REGISTERS),
                old: random.below(3) as i64,
                new: random.below(3) as i64,
            },
            1 => Self::Add { counter: random.below(COUNTERS) },
            2 => Self::Insert { client, sequence },
            _ => {
                let from = random.below(ACCOUNTS);
                let to = (from + random.between(1, ACCOUNTS - 1)) % ACCOUNTS;
                Self::Transfer { from, to, amount: random.between(1, 15) as i64 }
            }
        }
    }

    fn statements(self) -> Vec<Statement> {
        match self {
            Self::CreateTables => [
                "CREATE TABLE register(id INTEGER PRIMARY KEY, value INTEGER NOT NULL)".to_owned(),
                "CREATE TABLE counter(id INTEGER PRIMARY KEY, n INTEGER NOT NULL)".to_owned(),
                // Without a key of its own: a row that is inserted twice is there twice.
                "CREATE TABLE event(client INTEGER, sequence INTEGER, at TEXT DEFAULT CURRENT_TIMESTAMP, \
                 noise INTEGER DEFAULT (random()))"
                    .to_owned(),
                "CREATE TABLE account(id INTEGER PRIMARY KEY, balance INTEGER CHECK (balance >= 0))"
                    .to_owned(),
                format!("INSERT INTO register SELECT value, 0 FROM ({})", numbers(REGISTERS)),
                format!("INSERT INTO counter SELECT value, 0 FROM ({})", numbers(COUNTERS)),
                format!("INSERT INTO account SELECT value, {OPENING_BALANCE} FROM ({})", numbers(ACCOUNTS)),
            ]
            .iter()
            .map(|sql| statement(sql, &[]))
            .collect(),
            Self::CompareAndSwap { register, old, new } => {
                let sql = "UPDATE register SET value = ?1 WHERE id = ?2 AND value = ?3";
                let update = statement(sql, &[new, register as i64, old]);
                vec![Statement { expect_rows_affected: Some(1), ..update }]
            }
            Self::Add { counter } => {
                vec![statement("UPDATE counter SET n = n + 1 WHERE id = ?1 RETURNING n", &[counter as i64])]
            }
            Self::Insert { client, sequence } => {
                let sql = "INSERT INTO event(client, sequence) VALUES (?1, ?2)";
                vec![statement(sql, &[client as i64, sequence as i64])]
            }
            Self::Transfer { from, to, amount } => vec![
                statement("UPDATE account SET balance = balance + ?1 WHERE id = ?2", &[amount, to as i64]),
                statement("UPDATE account SET balance = balance - ?1 WHERE id = ?2", &[amount, from as i64]),
            ],
        }
    }
}

/// The reading statement: everything that can change, in one row of text.
pub const READ: &str = "SELECT (SELECT group_concat(value ORDER BY id) FROM register) || ' ' || \
     (SELECT group_concat(n ORDER BY id) FROM counter) || ' ' || \
     (SELECT group_concat(balance ORDER BY id) FROM account) || ' ' || (SELECT count(*) FROM event)";

/// A client's name for its requests.
pub fn client_id(client: u64) -> [u8; 16] {
    u128::from(client + 1).to_be_bytes()
}

/// The log entry of a write.
pub fn payload(write: Write, id: RequestId, seed: [u64; 2]) -> Bytes {
    let request = LoggedRequest {
        format: REQUEST_FORMAT,
        execution_version: version::execution_version(),
        id: Some(id),
        server_made_id: false,
        seed: seed.iter().flat_map(|half| half.to_be_bytes()).collect(),
        foreign_keys: true,
        step_budget: 1_000_000,
        result_limit_bytes: 1 << 20,
        body: Some(Body::Atomic(StatementList { statements: write.statements() })),
        // What is of no use here, such as the tables that an optimistic transaction has read.
        ..LoggedRequest::default()
    };
    request.encode_to_vec().into()
}

fn numbers(count: u64) -> String {
    let numbers: Vec<String> = (0..count).map(|number| format!("SELECT {number} AS value")).collect();
    numbers.join(" UNION ALL ")
}

fn statement(sql: &str, params: &[i64]) -> Statement {
    let params = params.iter().map(|param| Value { kind: Some(Kind::Integer(*param)) }).collect();
    Statement { sql: sql.to_owned(), params, ..Statement::default() }
}
