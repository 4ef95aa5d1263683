//! The records of a CSV file, one at a time, as sqlite3's `.import --csv` divides them.
//!
//! RFC 4180, with these choices: a line may end in LF, CRLF or CR; an empty line is a record of one empty field; a
//! quote inside an unquoted field is a character like others; a byte order mark at the beginning is skipped. A quote
//! that is never closed is an error, for it would make one field of all the rest. Holds no more than one record.
//! Knows nothing of tables.

use std::io::{self, BufRead};

use csv_core::{ReadRecordResult, Reader};

/// No server takes so large a request.
const MAX_RECORD_BYTES: usize = 64 << 20;
/// More than a table can have columns.
const MAX_FIELDS: usize = 1 << 16;

/// One row of the file.
#[derive(Debug, PartialEq, Eq)]
pub struct Record {
    /// The line it begins on, from 1.
    pub line: u64,
    /// At least one.
    pub fields: Vec<String>,
}

/// Why there is no further record.
#[derive(Debug, thiserror::Error)]
#[error("{reason}")]
pub struct Problem {
    /// The line on which the record begins.
    pub line: u64,
    /// What is wrong with it.
    pub reason: String,
}

/// A file being divided into [`Record`]s.
#[derive(Debug)]
pub struct Records<R> {
    source: R,
    parser: Reader,
    text: Vec<u8>,
    ends: Vec<usize>,
    /// The line of the next byte.
    line: u64,
    /// How many bytes were consumed.
    position: u64,
    last: u8,
}

impl<R: BufRead> Records<R> {
    /// Nothing is read yet.
    pub fn new(source: R) -> Self {
        let (text, ends) = (vec![0; 4 << 10], vec![0; 64]);
        Self { source, parser: Reader::new(), text, ends, line: 1, position: 0, last: 0 }
    }

    /// How many bytes the records so far have taken.
    pub fn position(&self) -> u64 {
        self.position
    }

    /// Reads the next one. `None`: that was all.
    pub fn next(&mut self) -> Result<Option<Record>, Problem> {
        // The parser ends a record at the CR of a CRLF.
        if self.last == b'\r' && self.peek()? == Some(b'\n') {
            self.consume(1, b'\n', 1);
        }
        let line = self.line;
        match self.peek()? {
            None => Ok(None),
            // The parser would skip it.
            Some(end @ (b'\n' | b'\r')) => {
                self.consume(1, end, u64::from(end == b'\n'));
                Ok(Some(Record { line, fields: vec![String::new()] }))
            }
            Some(_) => self.parse(line).map(Some),
        }
    }

    fn parse(&mut self, line: u64) -> Result<Record, Problem> {
        let problem = |reason: String| Problem { line, reason };
        let (mut length, mut count) = (0, 0);
        loop {
            let chunk = self.source.fill_buf().map_err(|error| unreadable(line, &error))?;
            let at_end = chunk.is_empty();
            // The last line's end may be missing. Within quotes, the one that is given to it here ends nothing.
            let input = if at_end { b"\n" } else { chunk };
            let (text, ends) = (&mut self.text[length..], &mut self.ends[count..]);
            let (result, read, written, ended) = self.parser.read_record(input, text, ends);
            let consumed = &input[..read];
            let lines = consumed.iter().filter(|&&byte| byte == b'\n').count() as u64;
            if let (false, Some(&last)) = (at_end, consumed.last()) {
                self.consume(read, last, lines);
            }
            (length, count) = (length + written, count + ended);
            match result {
                ReadRecordResult::Record => return self.record(line, length, count),
                ReadRecordResult::InputEmpty | ReadRecordResult::End if at_end => {
                    return Err(problem("a quoted field is never closed".to_owned()));
                }
                ReadRecordResult::InputEmpty | ReadRecordResult::End => {}
                ReadRecordResult::OutputFull if self.text.len() < MAX_RECORD_BYTES => {
                    self.text.resize(2 * self.text.len(), 0);
                }
                ReadRecordResult::OutputEndsFull if self.ends.len() < MAX_FIELDS => {
                    self.ends.resize(2 * self.ends.len(), 0);
                }
                ReadRecordResult::OutputFull => {
                    let reason = format!("a row of more than {} MiB", MAX_RECORD_BYTES >> 20);
                    return Err(problem(format!("{reason}: is a quote missing?")));
                }
                ReadRecordResult::OutputEndsFull => {
                    return Err(problem(format!("a row of more than {MAX_FIELDS} values")));
                }
            }
        }
    }

    fn record(&self, line: u64, length: usize, count: usize) -> Result<Record, Problem> {
        let text = str::from_utf8(&self.text[..length]);
        let text = text.map_err(|_| Problem { line, reason: "the row is not valid UTF-8".to_owned() })?;
        let mut begin = 0;
        let mut fields = Vec::with_capacity(count);
        for &end in &self.ends[..count] {
            // Two halves of a character in two fields make a text that is valid and fields that are not.
            let field = text.get(begin..end);
            let field =
                field.ok_or_else(|| Problem { line, reason: "a value is not valid UTF-8".to_owned() })?;
            fields.push(field.to_owned());
            begin = end;
        }
        Ok(Record { line, fields })
    }

    fn peek(&mut self) -> Result<Option<u8>, Problem> {
        let chunk = self.source.fill_buf().map_err(|error| unreadable(self.line, &error))?;
        Ok(chunk.first().copied())
    }

    fn consume(&mut self, bytes: usize, last: u8, lines: u64) {
        self.source.consume(bytes);
        self.position += bytes as u64;
        self.line += lines;
        self.last = last;
    }
}

fn unreadable(line: u64, error: &io::Error) -> Problem {
    Problem { line, reason: format!("the file cannot be read: {error}") }
}

#[cfg(test)]
mod tests {
    use std::io::BufReader;

    use super::*;

    /// All records as `line|field|field`, and what ended them; whatever the size of the chunks that are read.
    fn records(content: &[u8]) -> Vec<String> {
        let divided = |chunk_bytes: usize| {
            let mut records = Records::new(BufReader::with_capacity(chunk_bytes, content));
            let mut found = Vec::new();
            loop {
                match records.next() {
                    Ok(Some(record)) => found.push(format!("{}|{}", record.line, record.fields.join("|"))),
                    Ok(None) => {
                        assert_eq!(records.position(), content.len() as u64);
                        return found;
                    }
                    Err(problem) => {
                        found.push(format!("{}: {problem}", problem.line));
                        return found;
                    }
                }
            }
        };
        let found = divided(64 << 10);
        for chunk_bytes in 3..9 {
            assert_eq!(divided(chunk_bytes), found, "in chunks of {chunk_bytes} bytes");
        }
        found
    }

    #[test]
    fn quotes_hold_commas_lines_and_quotes() {
        assert_eq!(records(b"a,\"b,c\",\"d\"\"e\"\n"), ["1|a|b,c|d\"e"]);
        assert_eq!(records(b"\"one\ntwo\",x\ny,z\n"), ["1|one\ntwo|x", "3|y|z"]);
        assert_eq!(records(b"5\" pipe,x\n"), ["1|5\" pipe|x"]);
        assert_eq!(records("é,\"ü\"\n".as_bytes()), ["1|é|ü"]);
    }

    #[test]
    fn lines_end_in_any_of_the_three_ways_and_the_last_in_none() {
        assert_eq!(records(b"a,b\nc,d"), ["1|a|b", "2|c|d"]);
        assert_eq!(records(b"a,b\r\n\"c\",\"d\"\r\ne,f\r\n"), ["1|a|b", "2|c|d", "3|e|f"]);
        assert_eq!(records(b"a\rb\r"), ["1|a", "1|b"]);
        assert_eq!(records(b"a,"), ["1|a|"]);
        assert_eq!(records(b""), [""; 0]);
    }

    #[test]
    fn an_empty_line_is_a_row_of_one_empty_value() {
        assert_eq!(records(b"a\n\nb\n\n"), ["1|a", "2|", "3|b", "4|"]);
        assert_eq!(records(b"a\r\n\r\n\r\nb\r\n"), ["1|a", "2|", "3|", "4|b"]);
        assert_eq!(records(b"\"\"\na\n"), ["1|", "2|a"]);
    }

    #[test]
    fn a_byte_order_mark_is_skipped_and_spaces_are_not() {
        assert_eq!(records(b"\xef\xbb\xbfa, b \n"), ["1|a| b "]);
    }

    #[test]
    fn what_is_no_csv_is_named_with_the_line_on_which_its_row_begins() {
        assert_eq!(records(b"a\n\"b\nc\n"), ["1|a", "2: a quoted field is never closed"]);
        assert_eq!(records(b"a\n\"b"), ["1|a", "2: a quoted field is never closed"]);
        assert_eq!(records(b"a\nx,\xff\n"), ["1|a", "2: the row is not valid UTF-8"]);
        assert_eq!(records(b"\xc3,\xa9\n"), ["1: a value is not valid UTF-8"]);
    }

    #[test]
    fn rows_longer_than_every_buffer_come_whole() {
        let long = "x".repeat(300 << 10);
        let many = vec!["y"; 3_000];
        let content = format!("{long}\n{}\n", many.join(","));
        assert_eq!(records(content.as_bytes()), [format!("1|{long}"), format!("2|{}", many.join("|"))]);
        let too_many = format!("a\n{}\n", ",".repeat(MAX_FIELDS + 1));
        let found = records(too_many.as_bytes());
        assert_eq!(found, ["1|a", "2: a row of more than 65536 values"]);
    }
}
