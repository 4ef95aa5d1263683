//! Executes one statement of a request: prepare, judge, bind, step, check.
//!
//! Savepoints and what statements mean to each other are its caller's concern.

use std::{
    ops::{Deref, DerefMut},
    sync::{Arc, atomic::Ordering},
};

use prost::Message;
use resqlite::api::{
    ReplyClass, Row, SqlError, Statement as SourceStatement, StatementResult, Value, logged_request::Body,
    value::Kind,
};
use rusqlite::{CachedStatement, Statement, StatementStatus, ffi};

use super::{Execution, Halt, MAX_STEP_BUDGET, Remedy, Stop, broken_transaction};
use crate::{
    classify::{self, Failure, Nature},
    determinism::{
        self, Class, PrepareError,
        authorizer::{Phase, RESERVED_PREFIX, StatementFacts},
        random::Sequence,
    },
    users::{Actor, Where},
    value,
};

/// How far the fuse lies above the budget at least.
const FUSE_SLACK_STEPS: u64 = 1 << 16;

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

impl<'c> Execution<'_, 'c> {
    /// Executes one statement.
    pub(super) fn statement(
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
        self.check_rights(&facts, number)?;
        self.check_kind(&source.sql, &statement, &facts, number, in_script)?;
        value::bind(&mut statement, source).map_err(|error| match error {
            value::BindError::Mismatch(message) => {
                Failure::new(ReplyClass::Invalid, ffi::SQLITE_RANGE, number, message).into()
            }
            value::BindError::Sqlite(error) => self.judge(&error, number, true),
        })?;
        let mut fuse = match remedy {
            Some(Remedy::Fuse(steps)) => *steps,
            // A little more than the budget: it is looked at every few thousand steps only, and whatever passes
            // between the budget and the fuse is time in which nothing else is applied.
            _ => self.steps_left.saturating_add(self.steps_left / 8).saturating_add(FUSE_SLACK_STEPS),
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
        // The same one over and over, as a load of rows does it, counts once.
        let may_write = facts.pragma_writes || !statement.readonly();
        if may_write && self.wrote.last().is_none_or(|last| !Arc::ptr_eq(last, &facts)) {
            self.wrote.push(Arc::clone(&facts));
        }
        drop(statement);
        self.after_schema_change()?;
        self.check_definitions(&facts, number)?;
        self.check_conditions(source, &result, number)?;
        Ok(result)
    }

    /// Prepares a statement, or takes it from the cache if it has been seen before.
    fn prepare(&mut self, sql: &str, number: u32) -> Result<(Prepared<'c>, Arc<StatementFacts>), Halt> {
        let writer = self.writer;
        let known = writer.known.borrow_mut().get(sql);
        let Some(known) = known else {
            let expansion = writer.check_expansion(sql).map_err(|error| self.judge(&error, number, true))?;
            if let Err(too_complex) = expansion {
                let Failure { class, error } = too_complex.into();
                return Err(Failure { class, error: SqlError { statement: number, ..error } }.into());
            }
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
            // What acts while it is prepared must be prepared each time; and rusqlite's cache trims texts as
            // Unicode does, which is not what SQLite takes for blanks.
            if !facts.until_request_ends && sql.trim() == sql {
                writer.known.borrow_mut().insert(sql, Arc::clone(&facts));
            }
            return Ok((Prepared::Once(statement), facts));
        };
        writer.guard.begin(Phase::Prepare);
        let prepared = writer.connection.prepare_cached(sql);
        let seen = writer.guard.end();
        self.note(&known);
        let statement =
            prepared.map_err(|error| self.judge_prepare(PrepareError::Sqlite(error), &seen, number))?;
        Ok((Prepared::Cached(statement), known))
    }

    /// Whether the author of the request may do what the statement does. Asked each time: what is known of a
    /// statement holds for everybody, what somebody may do with it does not.
    fn check_rights(&self, facts: &StatementFacts, number: u32) -> Result<(), Halt> {
        match self.rights.excess(facts, &self.writer.connection, Where::Log) {
            Ok(None) => Ok(()),
            Ok(Some(excess)) => Err(self.denied(&excess, number).into()),
            Err(error) => Err(Halt::Stopped(Stop::Environment(error))),
        }
    }

    fn denied(&self, excess: &str, number: u32) -> Failure {
        let message = format!("user {} {excess}", Actor::of(self.request.authority.as_ref()).name());
        Failure::new(ReplyClass::Denied, ffi::SQLITE_AUTH, number, message)
    }

    /// Whether a statement of this kind may be part of the request.
    fn check_kind(
        &self,
        sql: &str,
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
        let (connection, guard) = (&self.writer.connection, &self.writer.guard);
        let is_vacuum = determinism::is_vacuum(connection, guard, statement, facts, sql);
        if is_vacuum.map_err(|error| self.judge(&error, number, true))? {
            // SQLite's authorizer is not asked about it, so the facts say nothing.
            if !self.rights.writes_everything() {
                return Err(self.denied("may not VACUUM: that takes the role write", number).into());
            }
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

    /// What is known of statements holds for one schema only, also within a request: a statement that is
    /// cached would otherwise be judged, and its steps counted, differently from a fresh one.
    fn after_schema_change(&self) -> Result<(), Halt> {
        if self.facts.virtual_tables {
            let learnt = self.writer.guard.learn_virtual_tables(&self.writer.connection);
            learnt.map_err(|error| Halt::Stopped(Stop::Environment(error)))?;
        }
        if self.facts.schema {
            self.writer.forget_statements();
        }
        Ok(())
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
        let changed =
            facts.changes_rows && !facts.changes_schema && !facts.pragma_writes && !statement.readonly();
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
                 AND name NOT IN ('_resqlite_meta', '_resqlite_sessions', '_resqlite_versions', '_resqlite_users',
                                  '_resqlite_authentication', '_resqlite_restore', '_resqlite_restore_chunks')",
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
            Ok(false) => self.check_column_names(facts, number),
            Ok(true) => {
                let reason = format!("names that begin with {RESERVED_PREFIX} are the server's own");
                Err(Failure::refused(number, reason).into())
            }
            Err(error) => Err(self.judge(&error, number, false)),
        }
    }

    /// CREATE TABLE … AS gives columns of one name the names `a`, `a:1`, `a:2`, `a:3` and then `a:` with a random number
    /// (sqlite3ColumnsFromExprList), which would be another one on each node.
    fn check_column_names(&self, facts: &StatementFacts, number: u32) -> Result<(), Halt> {
        let connection = &self.writer.connection;
        let check = || -> rusqlite::Result<bool> {
            let mut columns = connection.prepare("SELECT name FROM pragma_table_xinfo(?1)")?;
            for table in &facts.defined_tables {
                let mut names = columns.query([table.as_str()])?;
                while let Some(row) = names.next()? {
                    let name: String = row.get(0)?;
                    let suffix = name.rsplit_once(':').and_then(|(_, suffix)| suffix.parse::<u64>().ok());
                    if suffix.is_some_and(|suffix| suffix > 3) {
                        return Ok(true);
                    }
                }
            }
            Ok(false)
        };
        match check() {
            Ok(false) => Ok(()),
            Ok(true) => {
                let reason = "SQLite would give columns of one name random names here: give each its own";
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
    rows: Vec<Row>,
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

/// rusqlite's errors cannot be cloned; code and message are what we need of them.
fn clone_error(error: &rusqlite::Error) -> rusqlite::Error {
    let code = classify::extended_code(error);
    rusqlite::Error::SqliteFailure(ffi::Error::new(code), Some(classify::sql_error(error, 0).message))
}
