//! Cuts a script into steps: what is read here, what is proposed together.
//!
//! Writes and statements that cannot be prepared *yet* travel together, as many
//! as fit in one log entry; the execution stops before a statement that turns
//! out to be a read. `BEGIN … COMMIT` becomes one atomic request. This file
//! only looks at the kinds and sizes of statements; it knows nothing of SQLite,
//! of the log or of clients.

use std::ops::Range;

use resqlite::api::SqlError;

use crate::{
    errors::own_sql_error,
    limits::{SCRIPT_PART_BYTES, SCRIPT_PART_STATEMENTS, SCRIPT_READS},
};

/// What a statement is to a script.
#[derive(Clone, Debug, PartialEq)]
pub enum Kind {
    /// Answered here.
    Read,
    /// Proposed: it writes, or only its execution can tell.
    Write,
    /// `BEGIN` in any of its forms.
    Begin,
    /// `COMMIT` or `END`.
    Commit,
    /// `ROLLBACK` of a whole transaction.
    Rollback,
    /// `PRAGMA foreign_keys = …`; without a value it asks for the setting.
    ForeignKeys(Option<bool>),
    /// Neither executed nor proposed: it cannot be parsed, or has no meaning here.
    Refused(Box<SqlError>),
}

/// What to do next. Statements are counted from 0.
#[derive(Clone, Debug, PartialEq)]
pub enum Step {
    /// Nothing is left.
    Done,
    /// Read these here, one after the other.
    Read(Range<usize>),
    /// Change, or tell, the setting that the rest runs under.
    ForeignKeys(usize, Option<bool>),
    /// Propose these, each on its own.
    Write(Range<usize>),
    /// Propose these, all or nothing; if it is not to be committed, drop them.
    Block {
        /// The statements between BEGIN and its end.
        statements: Vec<usize>,
        /// Of the statement that ends the block.
        end: usize,
        /// Whether that is a COMMIT.
        commit: bool,
    },
}

/// The next step from statement `next`, out of `sizes.len()` statements of these
/// sizes in bytes. `kinds` may be known for the first statements only; None says
/// that more of them are needed. An error ends the script at the statement that it names.
pub fn next_step(kinds: &[Kind], sizes: &[usize], next: usize) -> Option<Result<Step, SqlError>> {
    if next >= sizes.len() {
        return Some(Ok(Step::Done));
    }
    let number = next + 1;
    Some(match kinds.get(next)? {
        Kind::Read => Ok(Step::Read(next..end_of_reads(kinds, next))),
        Kind::Write => Ok(Step::Write(next..end_of_writes(kinds, sizes, next))),
        Kind::ForeignKeys(enabled) => Ok(Step::ForeignKeys(next, *enabled)),
        Kind::Begin => return block(kinds, sizes.len(), next),
        Kind::Commit => Err(own_sql_error("cannot commit - no transaction is active", number)),
        Kind::Rollback => Err(own_sql_error("cannot rollback - no transaction is active", number)),
        Kind::Refused(error) => Err(SqlError { statement: number as u32, ..(**error).clone() }),
    })
}

/// Where the statements that one reader answers in one go end.
fn end_of_reads(kinds: &[Kind], first: usize) -> usize {
    let reads = kinds[first..].iter().take(SCRIPT_READS).take_while(|kind| **kind == Kind::Read);
    first + reads.count()
}

/// Where the statements that are proposed together end.
fn end_of_writes(kinds: &[Kind], sizes: &[usize], first: usize) -> usize {
    let mut bytes = sizes[first];
    let mut end = first + 1;
    while end < kinds.len()
        && kinds[end] == Kind::Write
        && end - first < SCRIPT_PART_STATEMENTS
        && bytes + sizes[end] <= SCRIPT_PART_BYTES
    {
        bytes += sizes[end];
        end += 1;
    }
    end
}

/// The transaction that begins at `begin`.
fn block(kinds: &[Kind], count: usize, begin: usize) -> Option<Result<Step, SqlError>> {
    let mut statements = Vec::new();
    for at in begin + 1..count {
        match kinds.get(at)? {
            Kind::Commit => return Some(Ok(Step::Block { statements, end: at, commit: true })),
            Kind::Rollback => return Some(Ok(Step::Block { statements, end: at, commit: false })),
            Kind::Read | Kind::Write => statements.push(at),
            // Without effect inside a transaction (https://sqlite.org/pragma.html#pragma_foreign_keys).
            Kind::ForeignKeys(_) => {}
            Kind::Begin => {
                return Some(Err(own_sql_error("cannot start a transaction within a transaction", at + 1)));
            }
            Kind::Refused(error) => {
                return Some(Err(SqlError { statement: at as u32 + 1, ..(**error).clone() }));
            }
        }
    }
    Some(Err(own_sql_error(
        "this transaction has no COMMIT: BEGIN and its COMMIT must be in the same request, which then is applied as a whole",
        begin + 1,
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    use Kind::{Begin, Commit, ForeignKeys, Read, Rollback, Write};

    fn step(kinds: &[Kind], next: usize) -> Result<Step, SqlError> {
        next_step(kinds, &vec![10; kinds.len()], next).expect("all kinds are known")
    }

    fn message(result: Result<Step, SqlError>) -> (u32, String) {
        let error = result.unwrap_err();
        (error.statement, error.message)
    }

    #[test]
    fn writes_go_together_up_to_the_next_read() {
        let kinds = [Write, Write, Read, Write];
        assert_eq!(step(&kinds, 0), Ok(Step::Write(0..2)));
        assert_eq!(step(&kinds, 2), Ok(Step::Read(2..3)));
        assert_eq!(step(&kinds, 3), Ok(Step::Write(3..4)));
        assert_eq!(step(&kinds, 4), Ok(Step::Done));
    }

    #[test]
    fn reads_go_together_up_to_a_bound() {
        let kinds = [Read, Read, Write, Read];
        assert_eq!(step(&kinds, 0), Ok(Step::Read(0..2)));
        assert_eq!(step(&kinds, 3), Ok(Step::Read(3..4)));
        let many = vec![Read; SCRIPT_READS + 1];
        assert_eq!(step(&many, 0), Ok(Step::Read(0..SCRIPT_READS)));
        assert_eq!(step(&many, SCRIPT_READS), Ok(Step::Read(SCRIPT_READS..SCRIPT_READS + 1)));
    }

    #[test]
    fn a_part_is_bounded_in_bytes_and_in_statements_but_never_empty() {
        let kinds = vec![Write; 3];
        let large = [SCRIPT_PART_BYTES * 2, SCRIPT_PART_BYTES, 1];
        assert_eq!(next_step(&kinds, &large, 0), Some(Ok(Step::Write(0..1))));
        assert_eq!(next_step(&kinds, &large, 1), Some(Ok(Step::Write(1..2))));
        let many = vec![Write; SCRIPT_PART_STATEMENTS + 5];
        assert_eq!(step(&many, 0), Ok(Step::Write(0..SCRIPT_PART_STATEMENTS)));
    }

    #[test]
    fn what_is_not_classified_yet_waits_only_where_it_matters() {
        assert_eq!(next_step(&[Write], &[1, 1], 0), Some(Ok(Step::Write(0..1))));
        assert_eq!(next_step(&[Write], &[1, 1], 1), None);
        assert_eq!(next_step(&[Begin, Write], &[1, 1, 1], 0), None);
    }

    #[test]
    fn a_transaction_is_one_step_with_its_reads() {
        let kinds = [Begin, Write, Read, Commit, Write];
        let block = Step::Block { statements: vec![1, 2], end: 3, commit: true };
        assert_eq!(step(&kinds, 0), Ok(block));
        let kinds = [Begin, Write, Rollback];
        let block = Step::Block { statements: vec![1], end: 2, commit: false };
        assert_eq!(step(&kinds, 0), Ok(block));
    }

    #[test]
    fn foreign_keys_change_between_transactions_and_not_within() {
        let kinds = [ForeignKeys(Some(false)), Begin, ForeignKeys(Some(true)), Write, Commit];
        assert_eq!(step(&kinds, 0), Ok(Step::ForeignKeys(0, Some(false))));
        let block = Step::Block { statements: vec![3], end: 4, commit: true };
        assert_eq!(step(&kinds, 1), Ok(block));
    }

    #[test]
    fn a_transaction_must_end_in_its_request() {
        let (number, text) = message(step(&[Write, Begin, Write], 1));
        assert_eq!(number, 2);
        assert!(text.contains("has no COMMIT"), "{text}");
    }

    #[test]
    fn transaction_statements_out_of_place_fail_as_in_sqlite() {
        assert_eq!(message(step(&[Commit], 0)), (1, "cannot commit - no transaction is active".into()));
        assert_eq!(message(step(&[Rollback], 0)), (1, "cannot rollback - no transaction is active".into()));
        let nested = message(step(&[Begin, Begin, Commit], 0));
        assert_eq!(nested, (2, "cannot start a transaction within a transaction".into()));
    }

    #[test]
    fn what_cannot_be_parsed_ends_the_script_there_and_its_transaction_altogether() {
        let refused = Kind::Refused(Box::new(own_sql_error("near \"x\": syntax error", 0)));
        let kinds = [Write, refused.clone(), Write];
        assert_eq!(step(&kinds, 0), Ok(Step::Write(0..1)));
        assert_eq!(message(step(&kinds, 1)), (2, "near \"x\": syntax error".into()));
        let kinds = [Begin, Write, refused, Commit];
        assert_eq!(message(step(&kinds, 0)), (3, "near \"x\": syntax error".into()));
    }
}
