//! The asynchronous client library.
//!
//! A [`Client`] speaks to any node of a cluster, goes to another one when that
//! one fails, and tries again what is safe to try again. Writes are: each
//! carries an id, so that the cluster applies it once however often it is sent.
//!
//! ```no_run
//! # async fn example() -> Result<(), resqlite::client::Error> {
//! use resqlite::client::{Client, Statement};
//!
//! let client = Client::connect(["10.0.0.1:50051", "10.0.0.2:50051", "10.0.0.3:50051"]).await?;
//! client.execute("create table account(id integer primary key, balance integer)", ()).await?;
//! client.execute("insert into account values (?, ?), (?, ?)", (1, 100, 2, 0)).await?;
//!
//! // All or nothing, and nothing if the money is not there.
//! client
//!     .execute_all([
//!         Statement::new("update account set balance = balance - ?1 where id = ?2 and balance >= ?1", (70, 1))
//!             .expect_rows_affected(1),
//!         Statement::new("update account set balance = balance + ? where id = ?", (70, 2)),
//!     ])
//!     .await?;
//!
//! let mut rows = client.query("select id, balance from account order by id", ()).await?;
//! while let Some(row) = rows.next().await? {
//!     println!("{}: {}", row.get::<i64>(0)?, row.get::<i64>(1)?);
//! }
//! # Ok(())
//! # }
//! ```
//!
//! Nothing here knows how a cluster replicates; it is all in the API.

mod backup;
mod endpoints;
pub(crate) mod error;
mod ids;
mod restore;
mod stream;
mod transaction;
mod users;
mod value;
mod verify;

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use tonic::{Request, Status};

pub use self::{
    backup::Backup,
    error::Error,
    restore::RestoreProgress,
    stream::{Event, Rows, Run},
    transaction::Transaction,
    users::{Change, Credentials, Rights, Role, User},
    value::{FromValue, Params, Row, Value},
};
use self::{
    endpoints::{Attempts, Endpoints, Patience},
    ids::{Ids, Ticket},
    users::Sign,
};
use crate::api::{
    self, ExecuteRequest, ExecuteResponse, QueryRequest, ReadOptions, RunRequest, StatusRequest,
    StatusResponse,
};
use crate::tls::{ClientTls, Reloading};
pub use crate::{
    api::{Column, SqlError},
    tls::clients::ClientTlsFiles,
};

/// What a read must have seen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Consistency {
    /// Every write that was acknowledged, anywhere, before the read began.
    #[default]
    Linearizable,
    /// Everything that this client has seen; never waits for a quorum.
    Sequential,
    /// What the asked node has, however old.
    Stale {
        /// Fail rather than read what is older than this.
        max_staleness: Option<Duration>,
    },
}

/// One statement of several that are applied together.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Statement(api::Statement);

impl Statement {
    /// A statement with its parameters; `()` for none.
    pub fn new(sql: impl Into<String>, params: impl Into<Params>) -> Self {
        let (params, named_params) = params.into().into_fields();
        Self(api::Statement { sql: sql.into(), params, named_params, ..Default::default() })
    }

    /// Nothing at all is applied, and the call is [`Error::Aborted`], unless this statement changes exactly so many rows.
    pub fn expect_rows_affected(mut self, rows: u64) -> Self {
        self.0.expect_rows_affected = Some(rows);
        self
    }

    /// Nothing at all is applied, and the call is [`Error::Aborted`], unless the first column of
    /// this statement's first row is true.
    pub fn guard(mut self) -> Self {
        self.0.guard = true;
        self
    }
}

/// What a statement did.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Outcome {
    /// The columns of `rows`.
    pub columns: Vec<Column>,
    /// What a RETURNING clause, or a SELECT among the statements, returned.
    pub rows: Vec<Row>,
    /// How many rows it inserted, changed or deleted.
    pub rows_affected: u64,
    /// The rowid of the request's last insert, or 0.
    pub last_insert_rowid: i64,
}

impl From<api::StatementResult> for Outcome {
    fn from(result: api::StatementResult) -> Self {
        Self {
            columns: result.columns,
            rows: result.rows.into_iter().map(Row).collect(),
            rows_affected: result.rows_affected,
            last_insert_rowid: result.last_insert_rowid,
        }
    }
}

/// SQL text for [`Client::run`].
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Script(RunRequest);

impl Script {
    /// A text of one statement or many.
    pub fn new(sql: impl Into<String>) -> Self {
        Self(RunRequest { sql: sql.into(), ..Default::default() })
    }

    /// Parameters, for a single statement only.
    pub fn params(mut self, params: impl Into<Params>) -> Self {
        (self.0.params, self.0.named_params) = params.into().into_fields();
        self
    }

    /// Whether foreign keys are enforced at the start: what the `foreign_keys` of the last
    /// [`api::RunDone`] said, to carry a `PRAGMA foreign_keys` from one text to the next.
    pub fn foreign_keys(mut self, enforced: Option<bool>) -> Self {
        self.0.foreign_keys = enforced;
        self
    }
}

impl<T: Into<String>> From<T> for Script {
    fn from(sql: T) -> Self {
        Self::new(sql)
    }
}

/// How to reach a cluster, and how long to try. Made by [`Client::builder`].
#[derive(Clone, Debug)]
pub struct Builder {
    endpoints: Vec<String>,
    consistency: Consistency,
    patience: Patience,
    connect_for: Duration,
    tls: Option<ClientTlsFiles>,
    credentials: Option<Credentials>,
}

impl Builder {
    /// The addresses of nodes, `host:port` each; or a socket of this host, `unix:` and its path. The first is asked first; the others when it fails.
    pub fn endpoints<T: Into<String>>(mut self, endpoints: impl IntoIterator<Item = T>) -> Self {
        self.endpoints = endpoints.into_iter().map(Into::into).collect();
        self
    }

    /// Speak TLS with these files; plain text, which is the default, with `None`. They are read again for each new
    /// connection once they have changed.
    pub fn tls(mut self, files: impl Into<Option<ClientTlsFiles>>) -> Self {
        self.tls = files.into();
        self
    }

    /// Say who this is, in every call; nobody in particular, which is the default, with `None`.
    pub fn credentials(mut self, credentials: impl Into<Option<Credentials>>) -> Self {
        self.credentials = credentials.into();
        self
    }

    /// What reads must have seen; linearizable unless said otherwise.
    pub fn consistency(mut self, consistency: Consistency) -> Self {
        self.consistency = consistency;
        self
    }

    /// How long a call may take until its answer begins; 30 s unless said otherwise, `None` is for ever.
    pub fn deadline(mut self, deadline: Option<Duration>) -> Self {
        self.patience.deadline = deadline;
        self
    }

    /// For how long a call is tried again while no node can serve it, within its deadline; 30 s unless said otherwise.
    pub fn retry_for(mut self, duration: Duration) -> Self {
        self.patience.retry_for = duration;
        self
    }

    /// For how long [`connect`](Self::connect) tries to reach a node; 5 s unless said otherwise.
    pub fn connect_for(mut self, duration: Duration) -> Self {
        self.connect_for = duration;
        self
    }

    /// Reaches one of the nodes.
    pub async fn connect(self) -> Result<Client, Error> {
        let mut client_id = [0; 16];
        getrandom::fill(&mut client_id)
            .map_err(|error| Error::Internal(format!("no random numbers: {error}")))?;
        let connect_timeout = self.connect_for.min(Duration::from_secs(3));
        let tls = self.tls.map(Reloading::<ClientTls>::load).transpose();
        let tls = tls.map_err(|error| Error::Invalid(error.to_string()))?;
        let sign = Sign::new(self.credentials.as_ref())?;
        let shared = Shared {
            endpoints: Arc::new(Endpoints::new(&self.endpoints, tls.as_ref(), &sign, connect_timeout)?),
            tls,
            ids: Arc::new(Ids::new(client_id)),
            seen_index: AtomicU64::new(0),
        };
        let mut client =
            Client { shared: Arc::new(shared), consistency: self.consistency, patience: self.patience };
        client.patience = Patience { deadline: Some(self.connect_for), retry_for: self.connect_for };
        client.status().await?;
        client.patience = self.patience;
        Ok(client)
    }
}

/// A client of a cluster. Clones share the connections and are cheap.
#[derive(Clone, Debug)]
pub struct Client {
    shared: Arc<Shared>,
    consistency: Consistency,
    patience: Patience,
}

#[derive(Debug)]
struct Shared {
    endpoints: Arc<Endpoints>,
    tls: Option<Reloading<ClientTls>>,
    ids: Arc<Ids>,
    /// The highest log index that any answer named.
    seen_index: AtomicU64,
}

impl Client {
    /// Reaches a cluster through any of its nodes (`host:port`), with the defaults of [`Builder`].
    pub async fn connect<T: Into<String>>(endpoints: impl IntoIterator<Item = T>) -> Result<Self, Error> {
        Self::builder().endpoints(endpoints).connect().await
    }

    /// To choose more than the endpoints.
    pub fn builder() -> Builder {
        let patience =
            Patience { deadline: Some(Duration::from_secs(30)), retry_for: Duration::from_secs(30) };
        Builder {
            endpoints: Vec::new(),
            consistency: Consistency::default(),
            patience,
            connect_for: Duration::from_secs(5),
            tls: None,
            credentials: None,
        }
    }

    /// The beginning of another client of the same cluster, for one of its nodes perhaps: it has the same TLS.
    pub fn sibling(&self) -> Builder {
        Self::builder().tls(self.shared.tls.as_ref().map(|tls| tls.source().clone()))
    }

    /// The same client, reading with another consistency.
    pub fn with_consistency(&self, consistency: Consistency) -> Self {
        Self { consistency, ..self.clone() }
    }

    /// The same client with another deadline; see [`Builder::deadline`].
    pub fn with_deadline(&self, deadline: Option<Duration>) -> Self {
        Self { patience: Patience { deadline, ..self.patience }, ..self.clone() }
    }

    /// The endpoints that it was given.
    pub fn endpoints(&self) -> impl Iterator<Item = &str> {
        self.shared.endpoints.addresses()
    }

    /// The highest log index that any answer named: what a sequential read will see at least.
    pub fn seen_index(&self) -> u64 {
        self.shared.seen_index.load(Ordering::Acquire)
    }

    /// Changes the database with one statement.
    pub async fn execute(&self, sql: impl Into<String>, params: impl Into<Params>) -> Result<Outcome, Error> {
        let outcome = self.execute_all([Statement::new(sql, params)]).await?.pop();
        outcome.ok_or_else(|| Error::Internal("the server sent no result".into()))
    }

    /// Changes the database with several statements, all or none of them. One outcome for each.
    pub async fn execute_all(
        &self,
        statements: impl IntoIterator<Item = Statement>,
    ) -> Result<Vec<Outcome>, Error> {
        let statements = statements.into_iter().map(|statement| statement.0).collect();
        self.write(ExecuteRequest { statements, ..Default::default() }).await
    }

    /// Changes the database with a text of statements, each applied on its own, in order. The first
    /// error ends it; the statements before that stand.
    pub async fn execute_script(&self, sql: impl Into<String>) -> Result<Vec<Outcome>, Error> {
        self.write(ExecuteRequest { script: sql.into(), ..Default::default() }).await
    }

    /// Reads with one statement. Its rows arrive as they are taken.
    pub async fn query(&self, sql: impl Into<String>, params: impl Into<Params>) -> Result<Rows, Error> {
        let (params, named_params) = params.into().into_fields();
        let request = QueryRequest {
            sql: sql.into(),
            params,
            named_params,
            read: Some(self.read_options()),
            ..Default::default()
        };
        // A node may answer with headers first and fail afterwards, so an attempt includes the first message.
        let call = |mut connection: endpoints::Connection, _| {
            let request = request.clone();
            async move {
                let mut stream = connection.query(request).await?.into_inner();
                let first = stream.message().await?;
                Ok((first.ok_or_else(|| Status::internal("the server sent no columns"))?, stream))
            }
        };
        let (first, stream) = self.attempts(false).call(call).await?;
        self.saw(first.log_index);
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
        // Nearly always this takes the stream's end. Dropping the stream before it resets it, and a server takes many
        // resets for an attack (CVE-2023-44487) and closes the connection under everybody else's requests.
        rows.next().await?;
        Ok(first)
    }

    /// Runs any SQL, reads and writes mixed, in order, up to the first error. Each statement stands
    /// on its own, except that `BEGIN; …; COMMIT` within the text is all or nothing.
    pub async fn run(&self, script: impl Into<Script>) -> Result<Run, Error> {
        let ticket = self.ticket().await?;
        let request = RunRequest { read: Some(self.read_options()), ..script.into().0 };
        Ok(Run::new(self.clone(), request, ticket))
    }

    /// What the asked node says of itself, and where the others are.
    pub async fn status(&self) -> Result<StatusResponse, Error> {
        let call = |mut connection: endpoints::Connection, _| async move {
            connection.status(StatusRequest {}).await
        };
        let status = self.attempts(false).call(call).await?.into_inner();
        if let Some(node) = &status.node {
            self.saw(node.commit_index.max(node.applied_index));
        }
        Ok(status)
    }

    async fn write(&self, mut request: ExecuteRequest) -> Result<Vec<Outcome>, Error> {
        let ticket = self.ticket().await?;
        request.id = Some(ticket.id.clone());
        let call = |mut connection: endpoints::Connection, left: Option<Duration>| {
            let mut request = Request::new(request.clone());
            if let Some(left) = left {
                request.set_timeout(left);
            }
            async move { connection.execute(request).await }
        };
        let response: ExecuteResponse = self.attempts(true).call(call).await?.into_inner();
        self.saw(response.log_index);
        Ok(response.results.into_iter().map(Into::into).collect())
    }

    /// A new id for a write. It names a log index, so that servers can tell when it is too old to be remembered.
    async fn ticket(&self) -> Result<Ticket, Error> {
        if self.seen_index() == 0 {
            self.status().await?;
        }
        Ok(self.shared.ids.ticket(self.seen_index()))
    }

    fn attempts(&self, changes_something: bool) -> Attempts {
        Attempts::new(self.shared.endpoints.clone(), self.patience, changes_something)
    }

    fn saw(&self, log_index: u64) {
        self.shared.seen_index.fetch_max(log_index, Ordering::AcqRel);
    }

    fn read_options(&self) -> ReadOptions {
        let (consistency, max_staleness) = match self.consistency {
            Consistency::Linearizable => (api::Consistency::Linearizable, None),
            Consistency::Sequential => (api::Consistency::Sequential, None),
            Consistency::Stale { max_staleness } => (api::Consistency::Stale, max_staleness),
        };
        ReadOptions {
            consistency: consistency.into(),
            min_index: self.seen_index(),
            // 0 would mean that there is no bound.
            max_staleness_ms: max_staleness.map_or(0, |bound| (bound.as_millis() as u64).max(1)),
        }
    }
}

#[cfg(test)]
mod tests;
