//! Answers that come piece by piece: the rows of a query, the events of a script.

use std::vec;

use tonic::Streaming;

use super::{
    Client, Row,
    endpoints::Attempts,
    error::{Error, Verdict, describe, verdict},
    ids::Ticket,
};
use crate::api::{self, Column, QueryResponse, RunRequest, RunResponse, run_event};

/// The rows of a query, as they arrive. The server waits while nobody takes them.
#[derive(Debug)]
pub struct Rows {
    columns: Vec<Column>,
    log_index: u64,
    ready: vec::IntoIter<api::Row>,
    stream: Streaming<QueryResponse>,
}

impl Rows {
    pub(super) fn new(first: QueryResponse, stream: Streaming<QueryResponse>) -> Self {
        Self { columns: first.columns, log_index: first.log_index, ready: first.rows.into_iter(), stream }
    }

    /// The result's columns.
    pub fn columns(&self) -> &[Column] {
        &self.columns
    }

    /// The log index that the read saw.
    pub fn log_index(&self) -> u64 {
        self.log_index
    }

    /// The next row; `None` after the last one.
    ///
    /// Fails with [`Error::Unavailable`] if the connection breaks in the middle: another query
    /// might see other rows, so it is the caller who begins again.
    pub async fn next(&mut self) -> Result<Option<Row>, Error> {
        loop {
            if let Some(row) = self.ready.next() {
                return Ok(Some(Row(row)));
            }
            match self.stream.message().await {
                Ok(Some(message)) => self.ready = message.rows.into_iter(),
                Ok(None) => return Ok(None),
                Err(status) if verdict(&status) == Verdict::Final => return Err(status.into()),
                Err(status) => return Err(Error::Unavailable(broke_off(&describe(&status)))),
            }
        }
    }
}

fn broke_off(reason: &str) -> String {
    format!("the answer broke off in the middle: {reason}")
}

/// What happens while SQL runs, in the order of its statements.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// A statement that returns rows begins.
    Columns {
        /// Its number within the text, from 1.
        statement: u32,
        /// Its result's columns.
        columns: Vec<Column>,
    },
    /// A row of the statement that began last.
    Row(Row),
    /// Statements were completed.
    Done(api::RunDone),
}

/// The events of a running text.
///
/// When its node fails, the request is sent to another one under the same id. What was completed
/// is not done again, and its events are not repeated; only a result whose rows have begun to
/// arrive cannot be continued elsewhere.
#[derive(Debug)]
pub struct Run {
    client: Client,
    request: RunRequest,
    attempts: Attempts,
    ready: vec::IntoIter<api::RunEvent>,
    stream: Option<Streaming<RunResponse>>,
    /// The last statement that the caller knows to be completed.
    done: u32,
    /// The statement whose result the caller has begun to get.
    open: Option<u32>,
    /// The events being received are repetitions.
    repeating: bool,
    /// Keeps the request's id under way as long as it may be sent again.
    _ticket: Ticket,
}

impl Run {
    pub(super) fn new(client: Client, mut request: RunRequest, ticket: Ticket) -> Self {
        request.id = Some(ticket.id.clone());
        Self {
            attempts: client.attempts(true),
            client,
            request,
            ready: Vec::new().into_iter(),
            stream: None,
            done: 0,
            open: None,
            repeating: false,
            _ticket: ticket,
        }
    }

    /// The next event; `None` after the last statement was completed.
    ///
    /// After an error nothing more will come; [`Error::sql_error`] names the statement that failed. Those before it stand.
    pub async fn next(&mut self) -> Result<Option<Event>, Error> {
        loop {
            while let Some(event) = self.ready.next() {
                if let Some(event) = self.take(event) {
                    return Ok(Some(event));
                }
            }
            if !self.receive().await? {
                return Ok(None);
            }
        }
    }

    /// Gets more events. `false`: there are none.
    async fn receive(&mut self) -> Result<bool, Error> {
        let failure = match &mut self.stream {
            None => None,
            Some(stream) => match stream.message().await {
                Ok(Some(message)) => {
                    self.ready = message.events.into_iter();
                    return Ok(true);
                }
                Ok(None) => return Ok(false),
                Err(status) if self.open.is_some() && verdict(&status) != Verdict::Final => {
                    return Err(Error::Unavailable(broke_off(&describe(&status))));
                }
                Err(status) => Some(status),
            },
        };
        self.stream = None;
        if let Some(status) = failure {
            self.attempts.failed(status).await?;
        }
        let request = &self.request;
        // The server may answer with headers first and fail afterwards, so an attempt includes the first message.
        let (first, stream) = self
            .attempts
            .call(|mut connection, _| {
                let request = request.clone();
                async move {
                    let mut stream = connection.run(request).await?.into_inner();
                    Ok((stream.message().await?, stream))
                }
            })
            .await?;
        let Some(first) = first else { return Ok(false) };
        self.ready = first.events.into_iter();
        self.stream = Some(stream);
        Ok(true)
    }

    /// Keeps account of what the caller has been told, and drops what it has been told before.
    fn take(&mut self, event: api::RunEvent) -> Option<Event> {
        let event = match event.event? {
            run_event::Event::Columns(begun) => {
                self.repeating = begun.statement <= self.done;
                self.open = (!self.repeating).then_some(begun.statement);
                Event::Columns { statement: begun.statement, columns: begun.columns }
            }
            run_event::Event::Row(row) => Event::Row(Row(row)),
            run_event::Event::Done(done) => {
                self.client.saw(done.log_index);
                self.repeating = done.statement <= self.done;
                self.done = self.done.max(done.statement);
                self.open = None;
                Event::Done(done)
            }
        };
        if self.repeating {
            return None;
        }
        self.attempts.progressed();
        Some(event)
    }
}
