//! Results as text, in the modes of the sqlite3 program and byte for byte as it prints them.
//!
//! Rows are written as they arrive, except in the two modes that align columns
//! and must first see every value. Knows nothing of where results come from.

mod grid;

use std::io::{self, Write};

use self::grid::Grid;
use super::number::{JSON_DIGITS, TEXT_DIGITS, write_real};
use crate::{
    api::{Value, value::Kind},
    client::{Column, Row},
};

/// How results are laid out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Mode {
    /// ASCII art
    Table,
    /// Comma-separated values
    Csv,
    /// An array of objects
    Json,
    /// One value per line
    Line,
    /// Values delimited by "|"
    List,
    /// Aligned columns
    Column,
}

/// The wrap that `.mode` gives to aligned columns, in characters.
const DEFAULT_WRAP: usize = 60;

/// A mode and what else shapes the output.
#[derive(Clone, Copy, Debug)]
pub struct Format {
    mode: Mode,
    headers: bool,
    /// Whether `.headers` was said, which `.mode column` then respects.
    headers_chosen: bool,
    row_end: &'static str,
    /// Aligned values longer than this continue on the next line; 0 is no bound.
    wrap: usize,
}

impl Format {
    /// What sqlite3's command line options (`-csv`, `-table`, …) set.
    pub fn option(mode: Mode) -> Self {
        Self { mode, headers: false, headers_chosen: false, row_end: "\n", wrap: 0 }
    }

    /// What `.mode` sets: it differs from the options in CSV's line ends, wrap, and `column`'s headers.
    pub fn set_mode(&mut self, mode: Mode) {
        self.mode = mode;
        self.wrap = DEFAULT_WRAP;
        self.row_end = if mode == Mode::Csv { "\r\n" } else { "\n" };
        if mode == Mode::Column && !self.headers_chosen {
            self.headers = true;
        }
    }

    /// What `.headers` sets.
    pub fn set_headers(&mut self, shown: bool) {
        self.headers = shown;
        self.headers_chosen = true;
    }

    /// The mode.
    pub fn mode(&self) -> Mode {
        self.mode
    }
}

/// Writes one result.
#[derive(Debug)]
pub struct Printer {
    format: Format,
    columns: Vec<Column>,
    rows: u64,
    /// The values so far, in the modes that align columns.
    grid: Grid,
    /// The width that line mode gives to names, in bytes.
    name_width: usize,
}

impl Printer {
    /// A result with these columns begins.
    pub fn new(format: Format, columns: Vec<Column>) -> Self {
        let longest = columns.iter().map(|column| column.name.len()).max();
        let name_width = longest.unwrap_or(0).max(5);
        let grid = Grid::new(format.wrap, columns.iter().map(|column| column.name.as_bytes()));
        Self { format, columns, rows: 0, grid, name_width }
    }

    /// Writes a row, or remembers it until [`end`](Self::end).
    pub fn row(&mut self, row: &Row, out: &mut impl Write) -> io::Result<()> {
        let values = &row.0.values[..];
        match self.format.mode {
            Mode::List => self.list_row(values, out)?,
            Mode::Csv => self.csv_row(values, out)?,
            Mode::Json => self.json_row(values, out)?,
            Mode::Line => self.line_row(values, out)?,
            Mode::Column | Mode::Table => self.grid.push(values)?,
        }
        self.rows += 1;
        Ok(())
    }

    /// Writes what is still to be written. A result without rows leaves no trace, as in sqlite3.
    pub fn end(self, out: &mut impl Write) -> io::Result<()> {
        if self.rows == 0 {
            return Ok(());
        }
        match self.format.mode {
            Mode::List | Mode::Csv | Mode::Line => Ok(()),
            Mode::Json => out.write_all(b"]\n"),
            Mode::Column => self.grid.write_columns(self.format.headers, out),
            Mode::Table => self.grid.write_table(out),
        }
    }

    fn list_row(&self, values: &[Value], out: &mut impl Write) -> io::Result<()> {
        if self.rows == 0 && self.format.headers {
            for (position, column) in self.columns.iter().enumerate() {
                let separator: &[u8] = if position == 0 { b"" } else { b"|" };
                out.write_all(separator)?;
                out.write_all(column.name.as_bytes())?;
            }
            out.write_all(self.format.row_end.as_bytes())?;
        }
        for (position, value) in values.iter().enumerate() {
            if position > 0 {
                out.write_all(b"|")?;
            }
            write_text(value, out)?;
        }
        out.write_all(self.format.row_end.as_bytes())
    }

    fn csv_row(&self, values: &[Value], out: &mut impl Write) -> io::Result<()> {
        if self.rows == 0 && self.format.headers {
            for (position, column) in self.columns.iter().enumerate() {
                let separator: &[u8] = if position == 0 { b"" } else { b"," };
                out.write_all(separator)?;
                write_csv(column.name.as_bytes(), out)?;
            }
            out.write_all(self.format.row_end.as_bytes())?;
        }
        for (position, value) in values.iter().enumerate() {
            if position > 0 {
                out.write_all(b",")?;
            }
            match text_bytes(value) {
                Some(text) => write_csv(text, out)?,
                None => write_text(value, out)?,
            }
        }
        out.write_all(self.format.row_end.as_bytes())
    }

    fn json_row(&self, values: &[Value], out: &mut impl Write) -> io::Result<()> {
        out.write_all(if self.rows == 0 { b"[{" } else { b",\n{" })?;
        for (position, (column, value)) in self.columns.iter().zip(values).enumerate() {
            if position > 0 {
                out.write_all(b",")?;
            }
            write_json_string(column.name.as_bytes(), out)?;
            out.write_all(b":")?;
            match &value.kind {
                None | Some(Kind::Null(_)) => out.write_all(b"null")?,
                Some(Kind::Integer(integer)) => write!(out, "{integer}")?,
                // JSON has no infinity; a reader takes this for one.
                Some(Kind::Real(real)) if real.is_infinite() => {
                    out.write_all(if *real > 0.0 { b"1e999" } else { b"-1e999" })?;
                }
                Some(Kind::Real(real)) => write_real(out, *real, JSON_DIGITS)?,
                Some(Kind::Text(text)) => write_json_string(until_nul(text.as_bytes()), out)?,
                Some(Kind::InvalidText(bytes)) => write_json_string(until_nul(bytes), out)?,
                Some(Kind::Blob(bytes)) => write_json_string(bytes, out)?,
            }
        }
        out.write_all(b"}")
    }

    fn line_row(&self, values: &[Value], out: &mut impl Write) -> io::Result<()> {
        if self.rows > 0 {
            out.write_all(b"\n")?;
        }
        for (column, value) in self.columns.iter().zip(values) {
            for _ in column.name.len()..self.name_width {
                out.write_all(b" ")?;
            }
            out.write_all(column.name.as_bytes())?;
            out.write_all(b" = ")?;
            write_text(value, out)?;
            out.write_all(b"\n")?;
        }
        Ok(())
    }
}

/// A value as sqlite3 prints it: as TEXT, and that as a C string, which ends at the first NUL.
fn write_text(value: &Value, out: &mut impl Write) -> io::Result<()> {
    match &value.kind {
        None | Some(Kind::Null(_)) => Ok(()),
        Some(Kind::Integer(integer)) => write!(out, "{integer}"),
        Some(Kind::Real(real)) => write_real(out, *real, TEXT_DIGITS),
        Some(Kind::Text(text)) => out.write_all(until_nul(text.as_bytes())),
        Some(Kind::Blob(bytes) | Kind::InvalidText(bytes)) => out.write_all(until_nul(bytes)),
    }
}

/// The bytes of what is not a number or NULL.
fn text_bytes(value: &Value) -> Option<&[u8]> {
    match &value.kind {
        Some(Kind::Text(text)) => Some(until_nul(text.as_bytes())),
        Some(Kind::Blob(bytes) | Kind::InvalidText(bytes)) => Some(until_nul(bytes)),
        _ => None,
    }
}

fn until_nul(bytes: &[u8]) -> &[u8] {
    bytes.iter().position(|byte| *byte == 0).map_or(bytes, |end| &bytes[..end])
}

/// sqlite3 quotes more than RFC 4180 demands (`needCsvQuote` in its `shell.c`).
fn write_csv(text: &[u8], out: &mut impl Write) -> io::Result<()> {
    let needs_quotes = |byte: &u8| matches!(byte, 0..=b' ' | b'"' | b'\'' | b',' | 0x7f..);
    if !text.is_empty() && !text.iter().any(needs_quotes) {
        return out.write_all(text);
    }
    out.write_all(b"\"")?;
    for (nth, piece) in text.split(|byte| *byte == b'"').enumerate() {
        let doubled: &[u8] = if nth == 0 { b"" } else { b"\"\"" };
        out.write_all(doubled)?;
        out.write_all(piece)?;
    }
    out.write_all(b"\"")
}

fn write_json_string(text: &[u8], out: &mut impl Write) -> io::Result<()> {
    out.write_all(b"\"")?;
    let mut rest = text;
    while let Some(at) = rest.iter().position(|byte| matches!(byte, 0..0x20 | b'"' | b'\\')) {
        out.write_all(&rest[..at])?;
        match rest[at] {
            0x08 => out.write_all(b"\\b")?,
            0x0c => out.write_all(b"\\f")?,
            b'\n' => out.write_all(b"\\n")?,
            b'\r' => out.write_all(b"\\r")?,
            b'\t' => out.write_all(b"\\t")?,
            escaped @ (b'"' | b'\\') => out.write_all(&[b'\\', escaped])?,
            control => write!(out, "\\u{control:04x}")?,
        }
        rest = &rest[at + 1..];
    }
    out.write_all(rest)?;
    out.write_all(b"\"")
}

#[cfg(test)]
mod tests;
