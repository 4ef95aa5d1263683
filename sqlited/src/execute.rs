//! Executes one request inside the open transaction: statements, conditions, limits, savepoints.
//!
//! A request ends in a reply, or says why it has none yet: the transaction is gone, it has to run
//! without one, or this node is in trouble. Groups, sessions and the applied index are not its concern.

mod statement;

use std::{collections::BTreeMap, sync::Arc};

use resqlite::api::{
    LogEntry, LoggedRequest, ReplyClass, SqlError, Statement as SourceStatement, StatementResult,
    StoredReply, logged_request::Body,
};
use rusqlite::ffi;

use crate::{
    classify::{self, Failure, Nature},
    connection::{LazyStatement, Writer},
    determinism::authorizer::{Phase, StatementFacts},
    sqlite_ffi,
    users::Rights,
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
    /// What is known of the statements that changed something, or may have.
    pub wrote: Vec<Arc<StatementFacts>>,
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

/// Our own statements around each request, prepared at most once for each group.
pub(crate) struct Savepoints<'c> {
    change_nothing: LazyStatement<'c>,
    save: LazyStatement<'c>,
    release: LazyStatement<'c>,
    rollback_to: LazyStatement<'c>,
}

impl<'c> Savepoints<'c> {
    pub fn on(writer: &'c Writer) -> Self {
        let own = |sql| LazyStatement::new(&writer.connection, sql);
        Self {
            change_nothing: own("DELETE FROM _resqlite_meta WHERE 0"),
            save: own("SAVEPOINT request"),
            release: own("RELEASE request"),
            rollback_to: own("ROLLBACK TO request"),
        }
    }

    /// Makes `changes()` 0, which a request could otherwise learn from the one before, or from our own writes.
    fn reset_changes(&mut self) -> rusqlite::Result<()> {
        self.change_nothing.run()
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
fn run_own(statement: &mut LazyStatement<'_>) -> Result<(), Halt> {
    statement.run().map_err(|error| Halt::Stopped(Stop::Environment(error)))
}

/// One request while it is executed.
pub(crate) struct Execution<'a, 'c> {
    pub writer: &'c Writer,
    pub savepoints: &'a mut Savepoints<'c>,
    pub request: &'a LoggedRequest,
    pub remedies: &'a Remedies,
    /// What its author may do.
    rights: &'a Rights,
    steps_left: u64,
    result_bytes_left: u64,
    /// Of all statements so far that have not been tidied up after.
    facts: Effects,
    wrote: Vec<Arc<StatementFacts>>,
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
        rights: &'a Rights,
        entry: &LogEntry,
        remedies: &'a Remedies,
    ) -> Result<Executed, Stop> {
        savepoints.reset_changes().map_err(Stop::Environment)?;
        writer.begin_request(entry.timestamp_ms, &request.seed);
        let mut execution = Self {
            writer,
            savepoints,
            request,
            remedies,
            rights,
            steps_left: request.step_budget.min(MAX_STEP_BUDGET),
            result_bytes_left: request.result_limit_bytes,
            facts: Effects::default(),
            wrote: Vec::new(),
            ends_group: false,
        };
        let mut results = Vec::new();
        let ended = match &request.body {
            Some(Body::Atomic(list)) => execution.atomic(&list.statements, &mut results),
            Some(Body::Script(list)) => execution.script(&list.statements, &mut results),
            // These are no business of SQLite's; they do not come here.
            Some(Body::Verify(_) | Body::Report(_) | Body::Restore(_) | Body::Users(_)) => Ok(()),
            None => {
                Err(Failure::new(ReplyClass::Invalid, ffi::SQLITE_ERROR, 0, "the request is empty").into())
            }
        };
        let error = match ended {
            Ok(()) | Err(Halt::EndOfScript) => None,
            Err(Halt::Failed(failure)) => Some(*failure),
            Err(Halt::Stopped(stop)) => return Err(stop),
        };
        let Self { wrote, ends_group, .. } = execution;
        Ok(Executed { reply: reply(entry.index, results, error), wrote, ends_group })
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
                self.wrote.clear();
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
            let wrote_before = self.wrote.len();
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
                    self.wrote.truncate(wrote_before);
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
            self.writer.reset_deferred_violations()?;
            if effects.statistics || effects.virtual_tables {
                self.writer.reload_schema()?;
            } else if effects.schema {
                self.writer.forget_statements();
            }
            Ok(())
        };
        tidy().map_err(|error| Halt::Stopped(Stop::Environment(error)))
    }
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
        Some(Body::Verify(_) | Body::Report(_) | Body::Restore(_) | Body::Users(_)) | None => &[],
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
