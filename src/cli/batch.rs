//! Statements gathered into one request.
//!
//! A `BEGIN … COMMIT` block is never divided, for it is one atomic request;
//! everything else is sent in batches of about a mebibyte. Knows SQL only by
//! its first keywords.

use crate::sql_text::{first_keyword, statements};

/// A batch that has grown to this size is sent.
const FULL_BYTES: usize = 1 << 20;
/// Or to so many statements: servers have a bound on those, too.
const FULL_STATEMENTS: usize = 50_000;
/// Or to so many statements that may divide it: the server makes a write of its own of what lies between two of them,
/// and keeps a bounded number of replies for one client.
const FULL_DIVIDERS: usize = 500;

/// What is certain to be written together with its like.
const PLAIN_WRITES: [&str; 7] = ["insert", "update", "delete", "replace", "create", "drop", "alter"];

/// Whole statements on their way to the server.
#[derive(Debug, Default)]
pub struct Batch {
    sql: String,
    marks: Vec<Mark>,
    dividers: usize,
    block: Option<Block>,
}

/// Where a statement came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mark {
    /// Its line in the input.
    pub line: usize,
    /// How many bytes of the input it and everything before it take.
    pub end: u64,
}

/// A transaction that was begun in the batch and not yet ended.
#[derive(Clone, Copy, Debug)]
struct Block {
    line: usize,
    sql_bytes: usize,
    statements: usize,
}

impl Batch {
    /// Adds a statement.
    pub fn push(&mut self, text: &str, mark: Mark) {
        let keyword = first_keyword(text);
        let is =
            |candidates: &[&str]| candidates.iter().any(|candidate| keyword.eq_ignore_ascii_case(candidate));
        if let Some(block) = self.block
            && is(&["rollback"])
            && !goes_back_to_savepoint(text)
        {
            self.sql.truncate(block.sql_bytes);
            self.marks.truncate(block.statements);
            self.block = None;
            return;
        }
        if self.block.is_none() && is(&["begin"]) {
            let (sql_bytes, statements) = (self.sql.len(), self.marks.len());
            self.block = Some(Block { line: mark.line, sql_bytes, statements });
            self.dividers += 1;
        } else if is(&["commit", "end"]) {
            self.block = None;
        } else if self.block.is_none() && !is(&PLAIN_WRITES) {
            self.dividers += 1;
        }
        self.sql.push_str(text);
        self.sql.push('\n');
        self.marks.push(mark);
    }

    /// The line of a BEGIN whose COMMIT has not been seen.
    pub fn open_block(&self) -> Option<usize> {
        self.block.map(|block| block.line)
    }

    /// Gives up the block that was begun; returns the line on which it was.
    pub fn drop_block(&mut self) -> Option<usize> {
        let block = self.block.take()?;
        self.sql.truncate(block.sql_bytes);
        self.marks.truncate(block.statements);
        Some(block.line)
    }

    /// Whether it should be sent before it grows further.
    pub fn is_full(&self) -> bool {
        let full = self.sql.len() >= FULL_BYTES
            || self.marks.len() >= FULL_STATEMENTS
            || self.dividers >= FULL_DIVIDERS;
        full && self.block.is_none()
    }

    /// Takes the statements that can be sent: an open block stays.
    pub fn take(&mut self) -> Option<(String, Vec<Mark>)> {
        let (sql_bytes, count) = self
            .block
            .map_or((self.sql.len(), self.marks.len()), |block| (block.sql_bytes, block.statements));
        if count == 0 {
            return None;
        }
        let rest = (self.sql.split_off(sql_bytes), self.marks.split_off(count));
        if let Some(block) = &mut self.block {
            (block.sql_bytes, block.statements) = (0, 0);
        }
        let whole = (std::mem::take(&mut self.sql), std::mem::take(&mut self.marks));
        (self.sql, self.marks) = rest;
        self.dividers = usize::from(self.block.is_some());
        Some(whole)
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        *self = Self::default();
    }
}

/// `ROLLBACK [TRANSACTION] TO …` leaves the transaction open.
fn goes_back_to_savepoint(rollback: &str) -> bool {
    let mut rest = statements(rollback).next().map_or("", |statement| statement.text);
    for _ in 0..3 {
        let keyword = first_keyword(rest);
        if keyword.eq_ignore_ascii_case("to") {
            return true;
        }
        let behind = rest.find(keyword).map_or(rest.len(), |at| at + keyword.len());
        rest = &rest[behind..];
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    fn push(batch: &mut Batch, texts: &[&str]) {
        for (position, text) in texts.iter().enumerate() {
            batch.push(text, Mark { line: position + 1, end: 0 });
        }
    }

    #[test]
    fn a_block_stays_until_it_is_committed() {
        let mut batch = Batch::default();
        push(&mut batch, &["select 1;", "begin immediate;", "select 2;"]);
        assert_eq!(batch.open_block(), Some(2));
        assert_eq!(batch.take().unwrap().0, "select 1;\n");
        assert_eq!(batch.take().map(|(sql, _)| sql), None);
        batch.push("COMMIT;", Mark { line: 4, end: 0 });
        let (sql, marks) = batch.take().unwrap();
        assert_eq!(sql, "begin immediate;\nselect 2;\nCOMMIT;\n");
        assert_eq!(marks.iter().map(|mark| mark.line).collect::<Vec<_>>(), [2, 3, 4]);
    }

    #[test]
    fn a_rollback_drops_its_block_and_no_more() {
        let mut batch = Batch::default();
        push(&mut batch, &["select 1;", "begin;", "select 2;", "rollback;", "select 3;"]);
        assert_eq!(batch.take().unwrap().0, "select 1;\nselect 3;\n");
        push(&mut batch, &["begin;", "rollback /**/ transaction to x;", "end;", "rollback;"]);
        assert_eq!(batch.take().unwrap().1.len(), 4);
        push(&mut batch, &["begin;", "select 4;"]);
        assert_eq!(batch.drop_block(), Some(1));
        assert_eq!(batch.take(), None);
    }

    #[test]
    fn a_batch_is_full_only_outside_a_block() {
        let mut batch = Batch::default();
        let large = format!("select '{}';", "x".repeat(FULL_BYTES));
        push(&mut batch, &["begin;", &large]);
        assert!(!batch.is_full());
        push(&mut batch, &["commit;"]);
        assert!(batch.is_full());
    }

    #[test]
    fn reads_between_writes_fill_a_batch_long_before_writes_do() {
        let mut batch = Batch::default();
        for _ in 0..FULL_DIVIDERS {
            assert!(!batch.is_full());
            push(&mut batch, &["insert into t values(1);", "begin;", "select 1;", "commit;"]);
        }
        assert!(batch.is_full());
        batch.clear();
        for _ in 0..10 * FULL_DIVIDERS {
            push(&mut batch, &["insert into t values(1);"]);
        }
        assert!(!batch.is_full());
    }
}
