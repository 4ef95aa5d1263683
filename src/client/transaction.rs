//! Optimistic transactions: read, think, then write, with no lock held meanwhile.
//!
//! A transaction lives at one node, so its calls go there and nowhere else, except the commit, which any
//! node can tell the outcome of: it carries an id like every write.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use tokio::time::{Instant, sleep};
use tonic::{Request, Status};

use super::{
    Client, Params, Row, Rows, Statement,
    endpoints::Connection,
    error::{Error, Verdict, describe, verdict},
};
use crate::api::{BeginRequest, ExecuteRequest, QueryRequest, RollbackRequest};

/// How long to wait before a lost transaction is tried again, at first and at most.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(2), Duration::from_millis(250));
/// SQLITE_BUSY_SNAPSHOT: what was read has changed.
const BUSY_SNAPSHOT: i32 = 517;

/// A transaction under way. Clones are the same one.
#[derive(Clone, Debug)]
pub struct Transaction {
    client: Client,
    connection: Connection,
    /// Which of the client's endpoints that is.
    node: usize,
    token: String,
    log_index: u64,
    writes: Arc<Mutex<Vec<Statement>>>,
}

impl Transaction {
    /// Reads the transaction's snapshot with one statement. One at a time: take the rows to their end, or
    /// drop them, before the next query. The transaction's own writes are not seen.
    pub async fn query(&self, sql: impl Into<String>, params: impl Into<Params>) -> Result<Rows, Error> {
        let (params, named_params) = params.into().into_fields();
        let (sql, transaction) = (sql.into(), self.token.clone());
        let request = QueryRequest { sql, params, named_params, transaction, ..Default::default() };
        let mut connection = self.connection.clone();
        let call = async {
            let mut stream = connection.query(request).await?.into_inner();
            let first = stream.message().await?;
            Ok((first.ok_or_else(|| Status::internal("the server sent no columns"))?, stream))
        };
        let (first, stream) = self.client.within_deadline(call).await?;
        Ok(Rows::new(first, stream))
    }

    /// Reads with one statement, and returns its first row if there is one.
    pub async fn query_one(
        &self,
        sql: impl Into<String>,
        params: impl Into<Params>,
    ) -> Result<Option<Row>, Error> {
        let mut rows = self.query(sql, params).await?;
        let first = rows.next().await?;
        // Its end is waited for, so that the next query need not be.
        while first.is_some() && rows.next().await?.is_some() {}
        Ok(first)
    }

    /// Adds a write, which is applied with the others when the transaction commits.
    pub fn execute(&self, sql: impl Into<String>, params: impl Into<Params>) {
        self.push(Statement::new(sql, params));
    }

    /// Adds a write with a condition of its own.
    pub fn push(&self, statement: Statement) {
        self.writes.lock().unwrap_or_else(PoisonError::into_inner).push(statement);
    }

    /// The log index that its snapshot sees.
    pub fn log_index(&self) -> u64 {
        self.log_index
    }

    fn take_writes(&self) -> Vec<Statement> {
        std::mem::take(&mut *self.writes.lock().unwrap_or_else(PoisonError::into_inner))
    }

    async fn rollback(mut self) {
        let request = RollbackRequest { transaction: self.token };
        // Should it not arrive, then the snapshot expires.
        let _ = self.client.within_deadline(async { self.connection.rollback(request).await }).await;
    }
}

impl Client {
    /// Reads a snapshot, and then writes, all or nothing, only if no table that was read has changed meanwhile.
    ///
    /// Otherwise everything is done again, `run` included, with a newer snapshot and after a pause that grows,
    /// for as long as [`Builder::retry_for`](super::Builder::retry_for) says: so `run` should have no other
    /// effects. Its error ends the transaction without a write. No lock is held.
    ///
    /// ```no_run
    /// # async fn example(client: resqlite::client::Client) -> Result<(), resqlite::client::Error> {
    /// let moved = client
    ///     .transaction(|transaction| async move {
    ///         let row = transaction.query_one("select balance from account where id = ?", (1,)).await?;
    ///         let balance: i64 = row.map_or(Ok(0), |row| row.get(0))?;
    ///         let moved = balance / 2;
    ///         transaction.execute("update account set balance = balance - ? where id = 1", (moved,));
    ///         transaction.execute("update account set balance = balance + ? where id = 2", (moved,));
    ///         Ok(moved)
    ///     })
    ///     .await?;
    /// # let _: i64 = moved;
    /// # Ok(())
    /// # }
    /// ```
    pub async fn transaction<T, F>(&self, mut run: impl FnMut(Transaction) -> F) -> Result<T, Error>
    where
        F: Future<Output = Result<T, Error>>,
    {
        let give_up = Instant::now() + self.patience.retry_for;
        let mut pause = BACKOFF.0;
        loop {
            let transaction = self.begin().await?;
            let error = match run(transaction.clone()).await {
                Ok(value) => match self.commit(transaction).await {
                    Ok(()) => return Ok(value),
                    Err(error) => error,
                },
                Err(error) => {
                    transaction.rollback().await;
                    // Nothing was written: a node that went away, or took the snapshot away, is no more than a delay.
                    error
                }
            };
            if !is_worth_another(&error) || Instant::now() + pause >= give_up {
                return Err(error);
            }
            sleep(jittered(pause)?).await;
            pause = (pause * 2).min(BACKOFF.1);
        }
    }

    async fn begin(&self) -> Result<Transaction, Error> {
        let request = BeginRequest { read: Some(self.read_options()) };
        let mut attempts = self.attempts(false);
        let call = |mut connection: Connection, _| async move { connection.begin(request).await };
        let begun = attempts.call(call).await?.into_inner();
        self.saw(begun.log_index);
        let (node, connection) = attempts.present();
        Ok(Transaction {
            client: self.clone(),
            connection,
            node,
            token: begun.transaction,
            log_index: begun.log_index,
            writes: Arc::default(),
        })
    }

    async fn commit(&self, transaction: Transaction) -> Result<(), Error> {
        let statements = transaction.take_writes();
        if statements.is_empty() {
            transaction.rollback().await;
            return Ok(());
        }
        let ticket = self.ticket().await?;
        let request = ExecuteRequest {
            statements: statements.into_iter().map(|statement| statement.0).collect(),
            id: Some(ticket.id.clone()),
            transaction: transaction.token,
            ..Default::default()
        };
        let call = |mut connection: Connection, left: Option<Duration>| {
            let mut request = Request::new(request.clone());
            if let Some(left) = left {
                request.set_timeout(left);
            }
            async move { connection.execute(request).await }
        };
        let answer = self.attempts(true).starting_at(transaction.node).call(call).await;
        if let Err(Error::Aborted { sql: Some(sql), .. }) = &answer {
            // The next snapshot must see what this one lacked.
            self.saw(sql.log_index);
        }
        self.saw(answer?.into_inner().log_index);
        Ok(())
    }

    /// One attempt of a call that changes nothing.
    async fn within_deadline<T>(&self, call: impl Future<Output = Result<T, Status>>) -> Result<T, Error> {
        let answer = match self.patience.deadline {
            None => call.await,
            Some(deadline) => match tokio::time::timeout(deadline, call).await {
                Ok(answer) => answer,
                Err(_) => return Err(Error::Unavailable("no answer before the deadline".into())),
            },
        };
        answer.map_err(|status| match verdict(&status) {
            Verdict::Final => status.into(),
            _ => Error::Unavailable(describe(&status)),
        })
    }
}

/// Whether the same transaction may succeed with a newer snapshot. Not so if its own condition did not hold.
fn is_worth_another(error: &Error) -> bool {
    match error {
        Error::Aborted { sql, .. } => sql.as_ref().is_none_or(|sql| sql.extended_code == BUSY_SNAPSHOT),
        Error::Unavailable(_) => true,
        // Too many transactions are open, or too many reads wait.
        Error::Limit { sql, .. } => sql.is_none(),
        _ => false,
    }
}

/// Between half of it and all: clients that lost to the same one do not come back together.
fn jittered(pause: Duration) -> Result<Duration, Error> {
    let random = getrandom::u32().map_err(|error| Error::Internal(format!("no random numbers: {error}")))?;
    Ok(pause / 2 + pause.mul_f64(f64::from(random) / f64::from(u32::MAX) / 2.0))
}
