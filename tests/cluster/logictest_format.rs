//! The format of sqllogictest's files: what a record says, and how a result is written down.
//!
//! As described at <https://sqlite.org/sqllogictest/doc/trunk/about.wiki>. It knows nothing of who executes a record.

use std::fmt::Write as _;

use md5::{Digest, Md5};
use resqlite::client::Value;
use rusqlite::{Connection, types::ToSqlOutput};

/// The name by which `skipif` and `onlyif` know us.
const ENGINE: &str = "sqlite";

/// One record of a file.
#[derive(Clone, Debug, PartialEq)]
pub struct Record {
    /// Where it begins, from 1.
    pub line: usize,
    pub sql: String,
    pub kind: Kind,
}

#[derive(Clone, Debug, PartialEq)]
pub enum Kind {
    Statement { succeeds: bool },
    Query { types: Vec<char>, sort: Sort, label: Option<String>, expected: Vec<String> },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sort {
    None,
    Rows,
    Values,
}

/// Reads a file. Records for other engines, and what follows a `halt`, are left out.
pub fn parse(text: &str) -> Result<Vec<Record>, String> {
    let mut records = Vec::new();
    let mut lines = text.lines().enumerate().map(|(number, line)| (number + 1, line.trim_end())).peekable();
    let mut skip = false;
    while let Some((number, line)) = lines.next() {
        let words: Vec<&str> = line.split_whitespace().take_while(|word| !word.starts_with('#')).collect();
        match words[..] {
            [] | ["hash-threshold", _] => {}
            ["skipif", engine] => skip |= engine == ENGINE,
            ["onlyif", engine] => skip |= engine != ENGINE,
            ["halt"] if !skip => break,
            ["halt"] => skip = false,
            ["statement", outcome, ..] | ["query", outcome, ..] => {
                let mut block = Vec::new();
                while let Some((_, line)) = lines.next_if(|(_, line)| !line.is_empty()) {
                    block.push(line);
                }
                let record = match words[0] {
                    "statement" => statement(number, outcome, &block)?,
                    _ => query(number, &words[1..], &block)?,
                };
                records.extend((!skip).then_some(record));
                skip = false;
            }
            _ => return Err(format!("line {number}: not a record: {line}")),
        }
    }
    Ok(records)
}

fn statement(line: usize, outcome: &str, block: &[&str]) -> Result<Record, String> {
    let succeeds = match outcome {
        "ok" => true,
        "error" => false,
        other => return Err(format!("line {line}: a statement is ok or error, not {other}")),
    };
    Ok(Record { line, sql: block.join("\n"), kind: Kind::Statement { succeeds } })
}

fn query(line: usize, words: &[&str], block: &[&str]) -> Result<Record, String> {
    let types: Vec<char> = words[0].chars().collect();
    if !types.iter().all(|kind| "TIR".contains(*kind)) {
        return Err(format!("line {line}: the types of a query's columns are T, I and R, not {}", words[0]));
    }
    let sort = match words.get(1) {
        None | Some(&"nosort") => Sort::None,
        Some(&"rowsort") => Sort::Rows,
        Some(&"valuesort") => Sort::Values,
        Some(other) => return Err(format!("line {line}: no such way of sorting: {other}")),
    };
    let end_of_sql = block.iter().position(|line| *line == "----").unwrap_or(block.len());
    let expected = block.iter().skip(end_of_sql + 1).map(|line| (*line).to_owned()).collect();
    let label = words.get(2).map(|label| (*label).to_owned());
    Ok(Record {
        line,
        sql: block[..end_of_sql].join("\n"),
        kind: Kind::Query { types, sort, label, expected },
    })
}

/// Values in the order in which they are compared.
pub fn sorted(rows: Vec<Vec<String>>, sort: Sort) -> Vec<String> {
    let mut rows = rows;
    if sort == Sort::Rows {
        rows.sort();
    }
    let mut values = rows.concat();
    if sort == Sort::Values {
        values.sort();
    }
    values
}

/// Values as a file may have them instead of listing them all.
pub fn hashed(values: &[String]) -> String {
    let mut hasher = Md5::new();
    for value in values {
        hasher.update(value.as_bytes());
        hasher.update(b"\n");
    }
    let mut text = format!("{} values hashing to ", values.len());
    for byte in hasher.finalize() {
        write!(text, "{byte:02x}").expect("writing to a string succeeds");
    }
    text
}

/// Whether a file's expectation is this result.
pub fn is_as_expected(expected: &[String], values: &[String]) -> bool {
    match expected {
        [only] if only.contains(" values hashing to ") => *only == hashed(values),
        _ => expected == values,
    }
}

/// Writes values as sqllogictest does: SQLite itself converts those of another type than the file asks for.
pub struct Renderer(Connection);

impl Renderer {
    pub fn new() -> Self {
        Self(Connection::open_in_memory().unwrap())
    }

    /// One value of a column of this type.
    pub fn text(&self, kind: char, value: &Value) -> String {
        match (kind, value) {
            (_, Value::Null) => "NULL".into(),
            ('I', Value::Integer(integer)) => integer.to_string(),
            ('I', other) => self.convert("select cast(cast(?1 as integer) as text)", other),
            ('R', Value::Real(real)) if real.is_finite() => format!("{real:.3}"),
            ('R', Value::Integer(integer)) => format!("{:.3}", *integer as f64),
            ('R', other) => self.convert("select printf('%.3f', ?1)", other),
            (_, Value::Text(text)) => printable(text.as_bytes()),
            (_, Value::Blob(bytes) | Value::InvalidText(bytes)) => printable(bytes),
            (_, other) => printable(self.convert("select cast(?1 as text)", other).as_bytes()),
        }
    }

    fn convert(&self, sql: &str, value: &Value) -> String {
        let mut statement = self.0.prepare_cached(sql).unwrap();
        statement.query_row([ToSqlOutput::Owned(owned(value))], |row| row.get(0)).unwrap()
    }
}

fn owned(value: &Value) -> rusqlite::types::Value {
    match value {
        Value::Null => rusqlite::types::Value::Null,
        Value::Integer(integer) => (*integer).into(),
        Value::Real(real) => (*real).into(),
        Value::Text(text) => text.clone().into(),
        Value::Blob(bytes) | Value::InvalidText(bytes) => bytes.to_vec().into(),
    }
}

fn printable(bytes: &[u8]) -> String {
    if bytes.is_empty() {
        return "(empty)".into();
    }
    bytes.iter().map(|byte| if (b' '..=b'~').contains(byte) { char::from(*byte) } else { '@' }).collect()
}

#[test]
fn records_are_read_as_the_format_says() {
    let text = "hash-threshold 8\n\n# a comment\nonlyif mysql\nstatement ok\nselect 1\n\nskipif mysql # why\n\
                statement error\nselect\n  2\n\nquery IT rowsort label-1\nselect a, b\nfrom t\n----\n1\nx y\n\nhalt\nnonsense\n";
    let kind = Kind::Query {
        types: vec!['I', 'T'],
        sort: Sort::Rows,
        label: Some("label-1".into()),
        expected: vec!["1".into(), "x y".into()],
    };
    let expected = [
        Record { line: 9, sql: "select\n  2".into(), kind: Kind::Statement { succeeds: false } },
        Record { line: 13, sql: "select a, b\nfrom t".into(), kind },
    ];
    assert_eq!(parse(text).unwrap(), expected);
    assert!(parse("query X\nselect 1\n").unwrap_err().starts_with("line 1: "));
    assert!(parse("\nnonsense\n").unwrap_err().starts_with("line 2: "));
}

#[test]
fn results_are_written_as_the_format_says() {
    let renderer = Renderer::new();
    for (kind, value, expected) in [
        ('I', Value::Real(2.9), "2"),
        ('I', Value::Text("12abc".into()), "12"),
        ('R', Value::Integer(1), "1.000"),
        ('R', Value::Real(0.0005), "0.001"),
        ('R', Value::Real(f64::INFINITY), "Inf"),
        ('T', Value::Real(1e100), "1.0e+100"),
        ('T', Value::Text(String::new()), "(empty)"),
        ('T', Value::Text("é\t!".into()), "@@@!"),
        ('T', Value::Null, "NULL"),
    ] {
        assert_eq!(renderer.text(kind, &value), expected, "{kind} {value:?}");
    }
    let values = ["1".to_owned(), "2".to_owned()];
    // `printf '1\n2\n' | md5sum`
    assert!(is_as_expected(&["2 values hashing to 6ddb4095eb719e2a9f0a3f95677d24e0".into()], &values));
    assert!(!is_as_expected(&["2 values hashing to 00000000000000000000000000000000".into()], &values));
}
