//! Aligned columns: every value, cut into display lines, and then the widths.
//!
//! Follows `exec_prepared_stmt_columnar` and `translateForDisplayAndDup` of
//! sqlite3's `shell.c`: widths count code points, a control character ends a
//! line, a tab goes to the next multiple of eight.

use std::io::{self, Write};

use super::write_text;
use crate::api::Value;

/// The display lines of a result.
#[derive(Debug)]
pub(super) struct Grid {
    wrap: usize,
    header: Vec<Vec<u8>>,
    lines: Vec<Line>,
    has_multi_line_row: bool,
}

#[derive(Debug)]
struct Line {
    cells: Vec<Vec<u8>>,
    ends_row: bool,
}

impl Grid {
    pub fn new<'a>(wrap: usize, names: impl Iterator<Item = &'a [u8]>) -> Self {
        let header = names.map(|name| first_line(name, wrap).0).collect();
        Self { wrap, header, lines: Vec::new(), has_multi_line_row: false }
    }

    pub fn push(&mut self, values: &[Value]) -> io::Result<()> {
        let mut texts = Vec::with_capacity(values.len());
        for value in values {
            let mut text = Vec::new();
            write_text(value, &mut text)?;
            texts.push(text);
        }
        let mut rests: Vec<Option<&[u8]>> = texts.iter().map(|text| Some(&text[..])).collect();
        loop {
            let mut cells = Vec::with_capacity(rests.len());
            for rest in &mut rests {
                let (cell, following) = rest.map_or((Vec::new(), None), |text| first_line(text, self.wrap));
                *rest = following;
                cells.push(cell);
            }
            let ends_row = rests.iter().all(Option::is_none);
            self.has_multi_line_row |= !ends_row;
            self.lines.push(Line { cells, ends_row });
            if ends_row {
                return Ok(());
            }
        }
    }

    fn widths(&self) -> Vec<usize> {
        let mut widths: Vec<usize> = self.header.iter().map(|name| characters(name)).collect();
        for line in &self.lines {
            for (width, cell) in widths.iter_mut().zip(&line.cells) {
                *width = characters(cell).max(*width);
            }
        }
        widths
    }

    pub fn write_columns(&self, with_header: bool, out: &mut impl Write) -> io::Result<()> {
        let widths = self.widths();
        if with_header {
            let dashes: Vec<_> = widths.iter().map(|width| vec![b'-'; *width]).collect();
            write_line(&self.header, &widths, ["", "  ", "\n"], out)?;
            write_line(&dashes, &widths, ["", "  ", "\n"], out)?;
        }
        for (nth, line) in self.lines.iter().enumerate() {
            write_line(&line.cells, &widths, ["", "  ", "\n"], out)?;
            if self.divides_after(nth) {
                out.write_all(b"\n")?;
            }
        }
        Ok(())
    }

    pub fn write_table(&self, out: &mut impl Write) -> io::Result<()> {
        let widths = self.widths();
        let mut divider: Vec<u8> = Vec::new();
        for width in &widths {
            divider.push(b'+');
            divider.resize(divider.len() + width + 2, b'-');
        }
        divider.extend(b"+\n");

        out.write_all(&divider)?;
        let centred: Vec<_> =
            self.header.iter().zip(&widths).map(|(name, width)| centre(name, *width)).collect();
        write_line(&centred, &widths, ["| ", " | ", " |\n"], out)?;
        out.write_all(&divider)?;
        for (nth, line) in self.lines.iter().enumerate() {
            write_line(&line.cells, &widths, ["| ", " | ", " |\n"], out)?;
            if self.divides_after(nth) {
                out.write_all(&divider)?;
            }
        }
        out.write_all(&divider)
    }

    /// Rows are set apart once one of them has several lines.
    fn divides_after(&self, nth: usize) -> bool {
        self.has_multi_line_row && self.lines[nth].ends_row && nth + 1 < self.lines.len()
    }
}

fn write_line(
    cells: &[Vec<u8>],
    widths: &[usize],
    [begin, between, end]: [&str; 3],
    out: &mut impl Write,
) -> io::Result<()> {
    for (position, (cell, width)) in cells.iter().zip(widths).enumerate() {
        out.write_all(if position == 0 { begin.as_bytes() } else { between.as_bytes() })?;
        out.write_all(cell)?;
        for _ in characters(cell)..*width {
            out.write_all(b" ")?;
        }
    }
    out.write_all(end.as_bytes())
}

fn centre(name: &[u8], width: usize) -> Vec<u8> {
    let mut centred = vec![b' '; (width - characters(name)) / 2];
    centred.extend(name);
    centred
}

fn characters(text: &[u8]) -> usize {
    text.iter().filter(|byte| !is_continuation(**byte)).count()
}

fn is_continuation(byte: u8) -> bool {
    byte & 0xc0 == 0x80
}

/// What of a text fits on one line of `wrap` characters (0: no bound), and what follows, if anything.
fn first_line(text: &[u8], wrap: usize) -> (Vec<u8>, Option<&[u8]>) {
    let bound = if wrap == 0 { 1_000_000 } else { wrap };
    let byte = |at: usize| text.get(at).copied().unwrap_or(0);
    let (mut line, mut at, mut width) = (Vec::new(), 0, 0);
    while width < bound {
        match byte(at) {
            b'\t' => {
                // At least one column, then up to the next tab stop.
                loop {
                    line.push(b' ');
                    width += 1;
                    if width % 8 == 0 || width >= bound {
                        break;
                    }
                }
                at += 1;
            }
            ..b' ' => break,
            _ => {
                width += 1;
                line.push(byte(at));
                at += 1;
                while is_continuation(byte(at)) {
                    line.push(byte(at));
                    at += 1;
                }
            }
        }
    }
    let following = match (byte(at), byte(at + 1)) {
        (b' '.., _) if width >= bound => at,
        (b'\r', b'\n') => at + 2,
        _ => at + 1,
    };
    (line, text.get(following..).filter(|rest| !rest.is_empty()))
}
