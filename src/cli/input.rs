//! What a shell is fed, in pieces: SQL statements and dot commands, from text,
//! files, pipes or typed lines.
//!
//! Reads no more than it needs and holds no more than one statement, so that
//! input of any length can be worked through. Knows nothing of what is done
//! with the pieces.

use std::{
    fs::File,
    io::{self, Read},
    path::Path,
    thread,
};

use tokio::sync::mpsc;

use crate::sql_text::Scanner;

const CHUNK_BYTES: usize = 256 << 10;
/// No server takes a larger request.
const MAX_PIECE_BYTES: usize = 64 << 20;

/// Where the text comes from.
#[derive(Debug)]
enum Source {
    /// All of it was there at once, or arrives by [`Input::push_line`].
    Given,
    File(File),
    /// Read by a thread of its own, so that statements can run while the next ones arrive.
    Pipe(mpsc::Receiver<io::Result<Vec<u8>>>),
}

/// One thing to do.
#[derive(Debug, PartialEq, Eq)]
pub enum Piece<'a> {
    /// An SQL statement; only the last may lack its semicolon.
    Statement {
        /// The statement.
        text: &'a str,
        /// The line it begins on.
        line: usize,
        /// How many bytes of the input it and everything before it take.
        end: u64,
    },
    /// A dot command, without the line's end.
    Dot {
        /// The line, with its dot.
        text: &'a str,
        /// Which line.
        line: usize,
    },
    /// More must be read first.
    More,
    /// The input cannot be read on from here.
    Broken {
        /// The line that is wrong.
        line: usize,
        /// Why.
        reason: String,
    },
    /// That was all.
    End,
}

/// Text being divided into [`Piece`]s.
#[derive(Debug)]
pub struct Input {
    source: Source,
    text: String,
    scanner: Scanner,
    /// Where the statement began that is being scanned, and on which line.
    begun: Option<(usize, usize)>,
    /// How many bytes were removed from the front of `text`.
    forgotten: u64,
    /// Whether the first byte of `text` stands at the beginning of a line.
    starts_line: bool,
    /// The first bytes of a character whose others have not yet arrived.
    partial: Vec<u8>,
    ended: bool,
    broken: Option<(usize, String)>,
}

impl Input {
    fn new(source: Source) -> Self {
        Self {
            source,
            text: String::new(),
            scanner: Scanner::new(),
            begun: None,
            forgotten: 0,
            starts_line: true,
            partial: Vec::new(),
            ended: false,
            broken: None,
        }
    }

    /// A text that is all there.
    pub fn text(text: &str) -> Self {
        let mut input = Self::new(Source::Given);
        input.append(text.as_bytes());
        input.ended = true;
        input
    }

    /// A file, and its length in bytes.
    pub fn file(path: &Path) -> io::Result<(Self, u64)> {
        let file = File::open(path)?;
        let metadata = file.metadata()?;
        if metadata.is_dir() {
            return Err(io::ErrorKind::IsADirectory.into());
        }
        Ok((Self::new(Source::File(file)), metadata.len()))
    }

    /// Standard input that is not a terminal.
    pub fn stdin() -> Self {
        let (sender, receiver) = mpsc::channel(16);
        thread::spawn(move || {
            let mut stdin = io::stdin().lock();
            let mut chunk = vec![0; CHUNK_BYTES];
            loop {
                let read = match stdin.read(&mut chunk) {
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                    read => read.map(|length| chunk[..length].to_vec()),
                };
                let goes_on = matches!(&read, Ok(chunk) if !chunk.is_empty());
                // The receiver is gone once the shell has ended.
                if sender.blocking_send(read).is_err() || !goes_on {
                    return;
                }
            }
        });
        Self::new(Source::Pipe(receiver))
    }

    /// Lines that somebody types; see [`push_line`](Self::push_line).
    pub fn typed() -> Self {
        Self::new(Source::Given)
    }

    /// Adds a typed line, without its end.
    pub fn push_line(&mut self, line: &str) {
        self.append(line.as_bytes());
        self.append(b"\n");
    }

    /// Whether the next line continues a statement.
    pub fn is_in_statement(&self) -> bool {
        self.begun.is_some()
    }

    /// Whether more can be had without waiting for whoever writes it.
    pub fn has_more_now(&self) -> bool {
        match &self.source {
            Source::Given | Source::File(_) => true,
            Source::Pipe(receiver) => !receiver.is_empty(),
        }
    }

    /// Reads more, waiting if necessary.
    pub async fn read_more(&mut self) -> io::Result<()> {
        self.forget();
        let chunk = match &mut self.source {
            Source::Given => Vec::new(),
            Source::File(file) => {
                let mut chunk = Vec::with_capacity(CHUNK_BYTES);
                file.take(CHUNK_BYTES as u64).read_to_end(&mut chunk)?;
                chunk
            }
            Source::Pipe(receiver) => receiver.recv().await.transpose()?.unwrap_or_default(),
        };
        if chunk.is_empty() {
            self.ended = true;
            if !self.partial.is_empty() {
                self.break_off("invalid UTF-8");
            }
        } else {
            self.append(&chunk);
        }
        Ok(())
    }

    /// The next piece of what has been read.
    pub fn next(&mut self) -> Piece<'_> {
        let last = self.ended && self.broken.is_none();
        if self.begun.is_none() {
            let start = self.scanner.find_start(&self.text, last);
            self.begun = start.map(|start| (start, self.scanner.line()));
        }
        let Some((start, line)) = self.begun else { return self.exhausted() };
        if self.is_dot_command(start) {
            return self.dot_command(start, line);
        }
        let end = match self.scanner.find_end(&self.text, last) {
            Some(end) => end,
            None if last => {
                self.scanner.skip_to(&self.text, self.text.len());
                self.text.len()
            }
            None if self.text.len() - start > MAX_PIECE_BYTES => return too_long(line),
            None => return self.exhausted(),
        };
        self.begun = None;
        Piece::Statement { text: self.text[start..end].trim_end(), line, end: self.forgotten + end as u64 }
    }

    fn exhausted(&self) -> Piece<'static> {
        match &self.broken {
            Some((line, reason)) => Piece::Broken { line: *line, reason: reason.clone() },
            None if self.ended => Piece::End,
            None => Piece::More,
        }
    }

    /// No SQL statement begins with a dot.
    fn is_dot_command(&self, start: usize) -> bool {
        let begins_line = match start.checked_sub(1) {
            None => self.starts_line,
            Some(before) => self.text.as_bytes()[before] == b'\n',
        };
        begins_line && self.text.as_bytes()[start] == b'.'
    }

    fn dot_command(&mut self, start: usize, line: usize) -> Piece<'_> {
        let end = match self.text[start..].find('\n') {
            Some(length) => start + length,
            None if self.ended && self.broken.is_none() => self.text.len(),
            None if self.text.len() - start > MAX_PIECE_BYTES => return too_long(line),
            None => return self.exhausted(),
        };
        self.begun = None;
        self.scanner.skip_to(&self.text, end);
        Piece::Dot { text: self.text[start..end].trim_end(), line }
    }

    /// Removes what nobody will ask for again.
    fn forget(&mut self) {
        let done = self.begun.map_or(self.scanner.position(), |(start, _)| start);
        if let Some(last) = done.checked_sub(1) {
            self.starts_line = self.text.as_bytes()[last] == b'\n';
            self.scanner.forget(&self.text, done);
            self.text.drain(..done);
            self.forgotten += done as u64;
            self.begun = self.begun.map(|(start, line)| (start - done, line));
        }
    }

    fn append(&mut self, chunk: &[u8]) {
        if self.broken.is_some() {
            return;
        }
        let mut held = std::mem::take(&mut self.partial);
        let bytes = if held.is_empty() {
            chunk
        } else {
            held.extend_from_slice(chunk);
            &held[..]
        };
        let valid = match std::str::from_utf8(bytes) {
            Ok(text) => text,
            Err(error) => {
                let (valid, rest) = bytes.split_at(error.valid_up_to());
                if error.error_len().is_none() {
                    self.partial = rest.to_vec();
                }
                std::str::from_utf8(valid).expect("from_utf8 found it valid up to here")
            }
        };
        let invalid = valid.len() + self.partial.len() < bytes.len();
        let nul = valid.find('\0');
        self.text.push_str(&valid[..nul.unwrap_or(valid.len())]);
        if nul.is_some() {
            self.break_off("a NUL character, which no SQL text can hold");
        } else if invalid {
            self.break_off("invalid UTF-8");
        }
    }

    fn break_off(&mut self, reason: &str) {
        let line = self.scanner.line_at(&self.text, self.text.len());
        self.broken = Some((line, reason.to_owned()));
    }
}

fn too_long(line: usize) -> Piece<'static> {
    Piece::Broken { line, reason: format!("a statement of more than {} MiB", MAX_PIECE_BYTES >> 20) }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    /// All pieces, as `line text`.
    async fn pieces(mut input: Input) -> Vec<String> {
        let mut found = Vec::new();
        loop {
            match input.next() {
                Piece::Statement { text, line, .. } => found.push(format!("{line} {text}")),
                Piece::Dot { text, line } => found.push(format!("{line} dot {text}")),
                Piece::Broken { line, reason } => {
                    found.push(format!("{line} broken: {reason}"));
                    return found;
                }
                Piece::End => return found,
                Piece::More => input.read_more().await.unwrap(),
            }
        }
    }

    async fn pieces_of_file(content: &[u8]) -> Vec<String> {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(content).unwrap();
        let (input, length) = Input::file(file.path()).unwrap();
        assert_eq!(length, content.len() as u64);
        pieces(input).await
    }

    #[tokio::test]
    async fn a_line_that_begins_with_a_dot_between_statements_is_a_command() {
        let text = ".mode csv\n-- x\nselect 1;\n.headers on \nselect\n.5; .x\n;\n.quit";
        let expected = [
            "1 dot .mode csv",
            "3 select 1;",
            "4 dot .headers on",
            "5 select\n.5;",
            "6 .x\n;",
            "8 dot .quit",
        ];
        assert_eq!(pieces(Input::text(text)).await, expected);
        assert_eq!(pieces_of_file(text.as_bytes()).await, expected);
    }

    #[tokio::test]
    async fn the_last_statement_needs_no_semicolon() {
        assert_eq!(pieces(Input::text("select 1;select 2 ")).await, ["1 select 1;", "1 select 2"]);
        assert_eq!(pieces(Input::text(" -- nothing")).await, [""; 0]);
    }

    #[tokio::test]
    async fn what_is_no_text_is_named_with_its_line() {
        assert_eq!(
            pieces_of_file(b"select 1;\nselect '\xff';").await,
            ["1 select 1;", "2 broken: invalid UTF-8"]
        );
        assert_eq!(
            pieces_of_file(b"select 1;\n\nselect '\xc3").await,
            ["1 select 1;", "3 broken: invalid UTF-8"]
        );
        let nul = pieces_of_file(b"select 1;\nselect '\0';").await;
        assert_eq!(nul, ["1 select 1;", "2 broken: a NUL character, which no SQL text can hold"]);
    }

    #[tokio::test]
    async fn lines_and_characters_survive_the_chunks_of_a_long_file() {
        let mut content = String::new();
        let mut expected = Vec::new();
        let mut line = 1;
        while content.len() < 3 * CHUNK_BYTES {
            let text = format!("insert into t values('é{line}\n;…');");
            content.push_str(&text);
            content.push('\n');
            expected.push(format!("{line} {text}"));
            line += 2;
        }
        assert_eq!(pieces_of_file(content.as_bytes()).await, expected);
    }
}
