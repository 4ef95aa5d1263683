//! Executes one request inside the open transaction: statements, conditions, limits, savepoints.
//!
//! A request ends in a reply, or says why it has none yet: the transaction is gone, it has to run
//! without one, or this node is in trouble. Groups, sessions and the applied index are not its concern.

use std::{
    collections::BTreeMap,
    ops::{Deref, DerefMut},
    sync::{Arc, atomic::Ordering},
};

use prost::Message;
use resqlite::api::{
    LoggedRequest, ReplyClass, SqlError, Statement as SourceStatement, StatementResult, StoredReply, Value,
    logged_request::Body, value::Kind,
};
use rusqlite::{CachedStatement, Statement, StatementStatus, ffi};

use crate::{
    classify::{self, Failure, Nature},
    connection::Writer,
    determinism::{
        self, Class, PrepareError,
        authorizer::{Phase, RESERVED_PREFIX, StatementFacts},
        random::Sequence,
    },
    sqlite_ffi, value,
};

/// The most steps that a budget may allow: SQLite counts them in 32 bits, and the fuse needs room above.
pub(crate) const MAX_STEP_BUDGET: u64 = 1 << 30;

/// Why a request has no reply yet.
pub(crate) enum Stop {
    /// SQLite rolled back the whole transaction, not only this request. Everything before has to be
    /// executed again; then this statement of the request gets this remedy.
    Lost { statement: u32, remedy: Remedy },
    /// The request is a VACUUM, which runs outside of transactions.
    Vacuum,
    /// This node is in trouble.
    Environment(rusqlite::Error),
}

/// What to do with a statement when its request is executed again.
#[derive(Clone, Debug)]
pub(crate) enum Remedy {
    /// It is known to fail so.
    Fail(Box<Failure>),
    /// It needs this much of a fuse.
    Fuse(u64),
}

/// The remedies of one request, by statement number.
pub(crate) type Remedies = BTreeMap<u32, Remedy>;

/// What an executed request brought about.
pub(crate) struct Executed {
    pub reply: StoredReply,
    /// It wrote a virtual table. Full-text indexes gather changes in memory and may do more work at COMMIT,
    /// so the transaction must end here on every node.
    pub ends_group: bool,
}

/// How a statement, and perhaps its request, ends.
enum Halt {
    /// With a deterministic error.
    Failed(Box<Failure>),
    /// A script ends before a statement that is not its business.
    EndOfScript,
    /// The request has no reply yet.
    Stopped(Stop),
}

impl From<Failure> for Halt {
    fn from(failure: Failure) -> Self {
        Self::Failed(Box::new(failure))
    }
}

/// The statements around each request, prepared once for each group.
pub(crate) struct Savepoints<'c> {
    save: Statement<'c>,
    release: Statement<'c>,
    rollback_to: Statement<'c>,
}

impl<'c> Savepoints<'c> {
    pub fn prepare(writer: &'c Writer) -> rusqlite::Result<Self> {
        let prepare = |sql| writer.connection.prepare(sql);
        Ok(Self {
            save: prepare("SAVEPOINT request")?,
            release: prepare("RELEASE request")?,
            rollback_to: prepare("ROLLBACK TO request")?,
        })
    }

    fn save(&mut self) -> Result<(), Halt> {
        run_own(&mut self.save)
    }

    fn release(&mut self) -> Result<(), Halt> {
        run_own(&mut self.release)
    }

    fn undo(&mut self) -> Result<(), Halt> {
        run_own(&mut self.rollback_to)?;
        run_own(&mut self.release)
    }
}

/// Runs a statement of ours: whatever goes wrong with it is this node's trouble.
fn run_own(statement: &mut Statement<'_>) -> Result<(), Halt> {
    statement.raw_execute().map(drop).map_err(|error| Halt::Stopped(Stop::Environment(error)))
}

/// A statement of the user, ready to run.
enum Prepared<'c> {
    Once(Statement<'c>),
    Cached(CachedStatement<'c>),
}

impl<'c> Deref for Prepared<'c> {
    type Target = Statement<'c>;
    fn deref(&self) -> &Statement<'c> {
        match self {
            Self::Once(statement) => statement,
            Self::Cached(statement) => statement,
        }
    }
}

impl<'c> DerefMut for Prepared<'c> {
    fn deref_mut(&mut self) -> &mut Statement<'c> {
        match self {
            Self::Once(statement) => statement,
            Self::Cached(statement) => statement,
        }
    }
}

/// One request while it is executed.
pub(crate) struct Execution<'a, 'c> {
    pub writer: &'c Writer,
    pub savepoints: &'a mut Savepoints<'c>,
    pub request: &'a LoggedRequest,
    pub index: u64,
    pub timestamp_ms: u64,
    pub remedies: &'a Remedies,
    steps_left: u64,
    result_bytes_left: u64,
    /// Of all statements so far that have not been tidied up after.
    facts: Effects,
    ends_group: bool,
}

/// What has to be tidied up after.
#[derive(Default)]
struct Effects {
    until_request_ends: bool,
    schema: bool,
    virtual_tables: bool,
    statistics: bool,
}

impl<'a, 'c> Execution<'a, 'c> {
    /// Executes a request inside the open transaction.
    pub fn run(
        writer: &'c Writer,
        savepoints: &'a mut Savepoints<'c>,
        request: &'a LoggedRequest,
        index: u64,
        timestamp_ms: u64,
        remedies: &'a Remedies,
    ) -> Result<Executed, Stop> {
        writer.begin_request(timestamp_ms, &request.seed);
        let mut execution = Self {
            writer,
            savepoints,
            request,
            index,
            timestamp_ms,
            remedies,
            steps_left: request.step_budget.min(MAX_STEP_BUDGET),
            result_bytes_left: request.result_limit_bytes,
            facts: Effects::default(),
            ends_group: false,
        };
        let mut results = Vec::new();
        let ended = match &request.body {
            Some(Body::Atomic(list)) => execution.atomic(&list.statements, &mut results),
            Some(Body::Script(list)) => execution.script(&list.statements, &mut results),
            None => {
                Err(Failure::new(ReplyClass::Invalid, ffi::SQLITE_ERROR, 0, "the request is empty").into())
            }
        };
        let ends_group = execution.ends_group;
        let error = match ended {
            Ok(()) | Err(Halt::EndOfScript) => None,
            Err(Halt::Failed(failure)) => Some(*failure),
            Err(Halt::Stopped(stop)) => return Err(stop),
        };
        Ok(Executed { reply: reply(index, results, error), ends_group })
    }

    /// All statements or none.
    fn atomic(
        &mut self,
        statements: &[SourceStatement],
        results: &mut Vec<StatementResult>,
    ) -> Result<(), Halt> {
        self.savepoints.save()?;
        let ended = self.atomic_inside(statements, results);
        match ended {
            Ok(()) => self.savepoints.release()?,
            Err(Halt::Stopped(stop)) => return Err(Halt::Stopped(stop)),
            Err(_) => {
                results.clear();
                self.savepoints.undo()?;
            }
        }
        self.tidy_up()?;
        ended
    }

    fn atomic_inside(
        &mut self,
        statements: &[SourceStatement],
        results: &mut Vec<StatementResult>,
    ) -> Result<(), Halt> {
        for (number, source) in (1..).zip(statements) {
            results.push(self.statement(source, number, false)?);
        }
        // The group's COMMIT would fail otherwise, and with it everybody else's requests.
        self.check_foreign_keys(0)
    }

    /// Each statement on its own, up to the first error or the first that is not a write.
    fn script(
        &mut self,
        statements: &[SourceStatement],
        results: &mut Vec<StatementResult>,
    ) -> Result<(), Halt> {
        for (number, source) in (1..).zip(statements) {
            self.savepoints.save()?;
            let ended = self.statement(source, number, true).and_then(|result| {
                self.check_foreign_keys(number)?;
                Ok(result)
            });
            match ended {
                Ok(result) => {
                    self.savepoints.release()?;
                    results.push(result);
                }
                Err(Halt::Stopped(stop)) => return Err(Halt::Stopped(stop)),
                Err(halt) => {
                    self.savepoints.undo()?;
                    self.tidy_up()?;
                    return Err(halt);
                }
            }
            // As between requests of their own: where a script was cut must not show.
            self.tidy_up()?;
        }
        Ok(())
    }

    fn check_foreign_keys(&self, statement: u32) -> Result<(), Halt> {
        if !sqlite_ffi::has_deferred_violations(&self.writer.connection) {
            return Ok(());
        }
        let (class, code) = (ReplyClass::Failed, ffi::SQLITE_CONSTRAINT_FOREIGNKEY);
        Err(Failure::new(class, code, statement, "FOREIGN KEY constraint failed").into())
    }

    /// Takes back what SQLite would otherwise carry from this request to the next ones on this node only.
    fn tidy_up(&mut self) -> Result<(), Halt> {
        let effects = std::mem::take(&mut self.facts);
        let tidy = || {
            if effects.until_request_ends {
                self.writer.connection.execute_batch("PRAGMA defer_foreign_keys = OFF")?;
            }
            if effects.statistics || effects.virtual_tables {
                self.writer.reload_schema()?;
            } else if effects.schema {
                self.writer.forget_statements();
            }
            Ok(())
        };
        tidy().map_err(|error| Halt::Stopped(Stop::Environment(error)))
    }

    /// Executes one statement.
    fn statement(
        &mut self,
        source: &SourceStatement,
        number: u32,
        in_script: bool,
    ) -> Result<StatementResult, Halt> {
        let remedies = self.remedies;
        let remedy = remedies.get(&number);
        if let Some(Remedy::Fail(failure)) = remedy {
            return Err(Halt::Failed(failure.clone()));
        }
        let (mut statement, facts) = self.prepare(&source.sql, number)?;
        self.check_kind(&statement, &facts, number, in_script)?;
        value::bind(&mut statement, source).map_err(|error| match error {
            value::BindError::Mismatch(message) => {
                Failure::new(ReplyClass::Invalid, ffi::SQLITE_RANGE, number, message).into()
            }
            value::BindError::Sqlite(error) => self.judge(&error, number, true),
        })?;
        let mut fuse = match remedy {
            Some(Remedy::Fuse(steps)) => *steps,
            _ => self.steps_left.saturating_mul(2),
        };
        let random = self.writer.random.position();
        let result = loop {
            match self.step(&mut statement, &facts, number, fuse) {
                Ok(result) => break result,
                Err(Stepped::Halt(halt)) => return Err(halt),
                Err(Stepped::NeedsFuse(steps)) => fuse = steps,
            }
            self.writer.random.set(Sequence::clone(&random));
        };
        drop(statement);
        self.check_definitions(&facts, number)?;
        self.check_conditions(source, &result, number)?;
        Ok(result)
    }

    /// Prepares a statement, or takes it from the cache if it has been seen before.
    fn prepare(&mut self, sql: &str, number: u32) -> Result<(Prepared<'c>, Arc<StatementFacts>), Halt> {
        let writer = self.writer;
        let known = writer.known.borrow_mut().get(sql);
        let Some(known) = known else {
            let (prepared, facts) = determinism::prepare_single(&writer.connection, &writer.guard, sql);
            // Even if it fails now: some PRAGMAs have their effect while they are prepared.
            self.note(&facts);
            let statement = prepared.map_err(|error| self.judge_prepare(error, &facts, number))?;
            let Some(statement) = statement else {
                let failure =
                    Failure::new(ReplyClass::Invalid, ffi::SQLITE_ERROR, number, "the statement is empty");
                return Err(failure.into());
            };
            let facts = Arc::new(facts);
            if !facts.until_request_ends {
                writer.known.borrow_mut().insert(sql, Arc::clone(&facts));
            }
            return Ok((Prepared::Once(statement), facts));
        };
        writer.guard.begin(Phase::Prepare);
        let prepared = writer.connection.prepare_cached(sql);
        let seen = writer.guard.end();
        // If nothing was asked, it came prepared; else the schema may have changed since the last time.
        let facts = if seen.asked { Arc::new(seen) } else { known };
        self.note(&facts);
        let statement =
            prepared.map_err(|error| self.judge_prepare(PrepareError::Sqlite(error), &facts, number))?;
        if facts.asked {
            writer.known.borrow_mut().insert(sql, Arc::clone(&facts));
        }
        Ok((Prepared::Cached(statement), facts))
    }

    /// Whether a statement of this kind may be part of the request.
    fn check_kind(
        &self,
        statement: &Statement<'_>,
        facts: &StatementFacts,
        number: u32,
        in_script: bool,
    ) -> Result<(), Halt> {
        let refuse = |reason: &str| Err(Failure::refused(number, reason).into());
        match determinism::class_of_prepared(statement, facts) {
            Class::ReadOnly if in_script => return Err(Halt::EndOfScript),
            Class::Transaction(_) => {
                return refuse(
                    "BEGIN, COMMIT, ROLLBACK and SAVEPOINT are not statements of a request: \
                     the statements of an atomic request are one transaction",
                );
            }
            _ => {}
        }
        if statement.is_explain() != 0 {
            return refuse("EXPLAIN shows this node's plan: it belongs in a read of its own");
        }
        if let Some(what) = &facts.node_local {
            return refuse(&determinism::node_local_reason(what));
        }
        if facts.may_be_vacuum() && !statement.readonly() {
            return match (number, in_script, &self.request.body) {
                (1, true, _) => Err(Halt::Stopped(Stop::Vacuum)),
                (_, true, _) => Err(Halt::EndOfScript),
                (1, false, Some(Body::Atomic(list))) if list.statements.len() == 1 => {
                    Err(Halt::Stopped(Stop::Vacuum))
                }
                _ => refuse("VACUUM cannot be part of a transaction"),
            };
        }
        Ok(())
    }

    fn note(&mut self, facts: &StatementFacts) {
        self.facts.until_request_ends |= facts.until_request_ends;
        self.facts.schema |= facts.changes_schema;
        self.facts.virtual_tables |= facts.changes_virtual_tables;
        self.facts.statistics |= facts.changes_statistics;
        self.ends_group |= facts.writes_virtual_table;
    }

    /// Runs a prepared statement to its end.
    fn step(
        &mut self,
        statement: &mut Prepared<'c>,
        facts: &StatementFacts,
        number: u32,
        fuse: u64,
    ) -> Result<StatementResult, Stepped> {
        let writer = self.writer;
        statement.reset_status(StatementStatus::VmStep);
        writer.highest_rowid_used.store(false, Ordering::Relaxed);
        writer.files.clear_disk_full();
        writer.guard.begin(Phase::Step);
        writer.fuse.set(fuse);
        let rows = collect_rows(statement, self.result_bytes_left);
        writer.fuse.remove();
        let seen = writer.guard.end();
        self.note(&seen);
        // SQLite counts in 32 bits, without a sign.
        let steps = u64::from(statement.get_status(StatementStatus::VmStep) as u32);
        let over_budget = steps > self.steps_left;
        let rows = match rows {
            Ok(_) | Err(RowsError::TooLarge) if over_budget => return Err(self.over_budget(number).into()),
            Ok(rows) => rows,
            Err(RowsError::TooLarge) => return Err(self.result_too_large(number).into()),
            Err(RowsError::Sqlite(error)) => {
                return Err(self.step_failed(&error, &seen, number, fuse, over_budget));
            }
        };
        if writer.highest_rowid_used.load(Ordering::Relaxed) {
            let message = "the highest rowid cannot be used: later rows would get random ones";
            return Err(Failure::new(ReplyClass::Failed, ffi::SQLITE_FULL, number, message).into());
        }
        if writer.connection.is_autocommit() {
            // Nothing that succeeds may end the transaction: our own invariant is broken.
            return Err(Stepped::Halt(Halt::Stopped(Stop::Environment(broken_transaction()))));
        }
        self.steps_left -= steps;
        self.result_bytes_left = self.result_bytes_left.saturating_sub(rows.bytes);
        let changed = facts.changes_rows && !facts.changes_schema;
        Ok(StatementResult {
            columns: if statement.column_count() > 0 { value::columns(statement) } else { Vec::new() },
            rows: rows.rows,
            rows_affected: if changed { writer.connection.changes() } else { 0 },
            last_insert_rowid: writer.connection.last_insert_rowid(),
        })
    }

    /// What a statement that failed while it ran comes to.
    fn step_failed(
        &self,
        error: &rusqlite::Error,
        seen: &StatementFacts,
        number: u32,
        fuse: u64,
        over_budget: bool,
    ) -> Stepped {
        let writer = self.writer;
        let fused = classify::extended_code(error) == ffi::SQLITE_INTERRUPT && writer.fuse.is_blown();
        if fused && !over_budget {
            // What other statements did on its behalf blew the fuse; it may need more by at most as much again.
            let larger = fuse.saturating_add(self.steps_left.saturating_mul(2)).saturating_add(1 << 20);
            if writer.connection.is_autocommit() {
                return Halt::Stopped(Stop::Lost { statement: number, remedy: Remedy::Fuse(larger) }).into();
            }
            return Stepped::NeedsFuse(larger);
        }
        let halt = if over_budget {
            self.over_budget(number).into()
        } else if let Some(reason) = &seen.refused {
            Failure::refused(number, reason.clone()).into()
        } else {
            self.judge(error, number, false)
        };
        match halt {
            Halt::Failed(failure) if writer.connection.is_autocommit() => {
                Halt::Stopped(Stop::Lost { statement: number, remedy: Remedy::Fail(failure) }).into()
            }
            halt => halt.into(),
        }
    }

    fn over_budget(&self, number: u32) -> Failure {
        let budget = self.request.step_budget.min(MAX_STEP_BUDGET);
        let message = format!("the request needs more than its budget of {budget} virtual machine steps");
        Failure::new(ReplyClass::Limit, ffi::SQLITE_INTERRUPT, number, message)
    }

    fn result_too_large(&self, number: u32) -> Failure {
        let limit = self.request.result_limit_bytes;
        let message = format!("the results of the request are larger than {limit} bytes");
        Failure::new(ReplyClass::Limit, ffi::SQLITE_TOOBIG, number, message)
    }

    /// What tables are called and refer to is known only once they exist: ALTER TABLE does not tell the
    /// authorizer the new name, and a foreign key on our tables would make our own writes fail.
    fn check_definitions(&self, facts: &StatementFacts, number: u32) -> Result<(), Halt> {
        if facts.defined_tables.is_empty() {
            return Ok(());
        }
        let connection = &self.writer.connection;
        let check = || -> rusqlite::Result<bool> {
            let mut names = connection.prepare(
                "SELECT count(*) FROM sqlite_schema WHERE lower(substr(name, 1, 10)) = ?1
                 AND name NOT IN ('_resqlite_meta', '_resqlite_sessions')",
            )?;
            let mut found: i64 = names.query_row([RESERVED_PREFIX], |row| row.get(0))?;
            let mut parents = connection.prepare(
                "SELECT count(*) FROM pragma_foreign_key_list(?1) WHERE lower(substr(\"table\", 1, 10)) = ?2",
            )?;
            for table in &facts.defined_tables {
                found += parents.query_row([table.as_str(), RESERVED_PREFIX], |row| row.get::<_, i64>(0))?;
            }
            Ok(found > 0)
        };
        match check() {
            Ok(false) => Ok(()),
            Ok(true) => {
                let reason = format!("names that begin with {RESERVED_PREFIX} are the server's own");
                Err(Failure::refused(number, reason).into())
            }
            Err(error) => Err(self.judge(&error, number, false)),
        }
    }

    fn check_conditions(
        &self,
        source: &SourceStatement,
        result: &StatementResult,
        number: u32,
    ) -> Result<(), Halt> {
        let abort =
            |message| Err(Failure::new(ReplyClass::Aborted, ffi::SQLITE_ABORT, number, message).into());
        if let Some(expected) = source.expect_rows_affected
            && expected != result.rows_affected
        {
            return abort(format!(
                "statement {number} was expected to change {expected} rows, but changed {}",
                result.rows_affected
            ));
        }
        if source.guard {
            let first = result.rows.first().and_then(|row| row.values.first());
            if !self.is_true(first)? {
                return abort(format!("the guard, statement {number}, does not hold"));
            }
        }
        Ok(())
    }

    /// SQLite's own idea of truth.
    fn is_true(&self, value: Option<&Value>) -> Result<bool, Halt> {
        let bytes: &[u8] = match value.and_then(|value| value.kind.as_ref()) {
            None | Some(Kind::Null(_)) => return Ok(false),
            Some(Kind::Integer(integer)) => return Ok(*integer != 0),
            Some(Kind::Real(real)) => return Ok(*real != 0.0),
            Some(Kind::Text(text)) => text.as_bytes(),
            Some(Kind::Blob(bytes) | Kind::InvalidText(bytes)) => bytes,
        };
        let ask = || self.writer.connection.query_row("SELECT ?1 IS TRUE", [bytes], |row| row.get(0));
        ask().map_err(|error| Halt::Stopped(Stop::Environment(error)))
    }

    fn judge_prepare(&self, error: PrepareError, facts: &StatementFacts, number: u32) -> Halt {
        let with_number = |error: SqlError| {
            Failure { class: ReplyClass::Invalid, error: SqlError { statement: number, ..error } }.into()
        };
        if let Some(reason) = &facts.refused {
            return Failure::refused(number, reason.clone()).into();
        }
        if facts.foreign_keys.is_some() {
            let reason = "PRAGMA foreign_keys cannot be one of a request's statements: \
                          the setting belongs to the request as a whole";
            return Failure::refused(number, reason).into();
        }
        match error {
            PrepareError::Sqlite(error) => self.judge(&error, number, true),
            PrepareError::Several => with_number(determinism::several()),
            PrepareError::Nul => with_number(determinism::nul()),
        }
    }

    /// Whether an error is the request's result or this node's trouble.
    fn judge(&self, error: &rusqlite::Error, number: u32, preparing: bool) -> Halt {
        let code = classify::extended_code(error);
        match classify::nature(code, self.writer.files.disk_was_full()) {
            Nature::Deterministic => {
                let class = classify::class_of(code, preparing);
                Failure { class, error: classify::sql_error(error, number) }.into()
            }
            Nature::Environmental => Halt::Stopped(Stop::Environment(clone_error(error))),
        }
    }
}

/// How stepping a statement can end other than well.
enum Stepped {
    Halt(Halt),
    /// Start it again with this much of a fuse.
    NeedsFuse(u64),
}

impl From<Halt> for Stepped {
    fn from(halt: Halt) -> Self {
        Self::Halt(halt)
    }
}

impl From<Failure> for Stepped {
    fn from(failure: Failure) -> Self {
        Self::Halt(failure.into())
    }
}

/// The rows of a statement, and their size.
struct Rows {
    rows: Vec<resqlite::api::Row>,
    bytes: u64,
}

enum RowsError {
    TooLarge,
    Sqlite(rusqlite::Error),
}

/// Runs a statement to its end. The size counts whole encoded rows, so it is the same on every node.
fn collect_rows(statement: &mut Statement<'_>, limit_bytes: u64) -> Result<Rows, RowsError> {
    let mut collected = Rows { rows: Vec::new(), bytes: 0 };
    let mut rows = statement.raw_query();
    while let Some(row) = rows.next().map_err(RowsError::Sqlite)? {
        // Asked for each row: SQLite may have prepared the statement anew at its first step.
        let columns = row.as_ref().column_count();
        let row = value::row(row, columns).map_err(RowsError::Sqlite)?;
        collected.bytes += row.encoded_len() as u64;
        if collected.bytes > limit_bytes {
            return Err(RowsError::TooLarge);
        }
        collected.rows.push(row);
    }
    Ok(collected)
}

/// Executes a request that is a VACUUM, outside of transactions. It may run twice if the node is killed before
/// the entry is recorded; the content is the same.
pub(crate) fn vacuum(
    writer: &Writer,
    request: &LoggedRequest,
    index: u64,
    timestamp_ms: u64,
) -> rusqlite::Result<StoredReply> {
    writer.begin_request(timestamp_ms, &request.seed);
    let statements = match &request.body {
        Some(Body::Atomic(list) | Body::Script(list)) => &list.statements[..],
        None => &[],
    };
    let Some(source) = statements.first() else { return Ok(reply(index, Vec::new(), None)) };
    let ended = vacuum_statement(writer, source);
    writer.reload_schema()?;
    match ended {
        Ok(()) => Ok(reply(index, vec![StatementResult::default()], None)),
        Err(Halt::Failed(failure)) => Ok(reply(index, Vec::new(), Some(*failure))),
        Err(Halt::Stopped(Stop::Environment(error))) => Err(error),
        Err(Halt::EndOfScript | Halt::Stopped(_)) => Err(broken_transaction()),
    }
}

fn vacuum_statement(writer: &Writer, source: &SourceStatement) -> Result<(), Halt> {
    let environment = |error| Halt::Stopped(Stop::Environment(error));
    let mut statement = writer.connection.prepare(&source.sql).map_err(environment)?;
    if !source.params.is_empty() || !source.named_params.is_empty() {
        let message = "VACUUM has no parameters";
        return Err(Failure::new(ReplyClass::Invalid, ffi::SQLITE_RANGE, 1, message).into());
    }
    writer.files.clear_disk_full();
    writer.guard.begin(Phase::Vacuum);
    let ended = statement.raw_execute();
    let seen = writer.guard.end();
    let Err(error) = ended else { return Ok(()) };
    if let Some(reason) = seen.refused {
        return Err(Failure::refused(1, reason).into());
    }
    let code = classify::extended_code(&error);
    match classify::nature(code, writer.files.disk_was_full()) {
        Nature::Deterministic => {
            let class = classify::class_of(code, false);
            Err(Failure { class, error: classify::sql_error(&error, 1) }.into())
        }
        Nature::Environmental => Err(environment(error)),
    }
}

/// The reply of a request, with the log index filled in.
pub(crate) fn reply(index: u64, results: Vec<StatementResult>, failure: Option<Failure>) -> StoredReply {
    let class = failure.as_ref().map_or(ReplyClass::Ok, |failure| failure.class);
    let error = failure.map(|failure| SqlError { log_index: index, ..failure.error });
    StoredReply { results, error, class: class.into(), log_index: index }
}

fn broken_transaction() -> rusqlite::Error {
    let message = "a statement ended the transaction without an error".to_owned();
    rusqlite::Error::SqliteFailure(ffi::Error::new(ffi::SQLITE_INTERNAL), Some(message))
}

/// rusqlite's errors cannot be cloned; code and message are what we need of them.
fn clone_error(error: &rusqlite::Error) -> rusqlite::Error {
    let code = classify::extended_code(error);
    rusqlite::Error::SqliteFailure(ffi::Error::new(code), Some(classify::sql_error(error, 0).message))
}
