//! Where one SQL statement ends and the next begins.
//!
//! The rules are those of SQLite's `sqlite3_complete()` (<https://sqlite.org/c3ref/complete.html>,
//! `complete.c`): a semicolon ends a statement unless it stands in a string, a
//! quoted identifier, a comment, or the body of a `CREATE TRIGGER`, which only
//! `; END ;` ends. This file knows no grammar beyond that, and nothing of
//! sessions, files or servers.
//!
//! Every byte is looked at a bounded number of times, so a text of any size
//! takes time in proportion to its length.

/// One statement of a text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Statement<'a> {
    /// From its first token to its semicolon; comments and white space before it are left out.
    pub text: &'a str,
    /// Where `text` begins in the whole text, in bytes.
    pub offset: usize,
    /// The line on which it begins, from 1.
    pub line: usize,
    /// Whether it ends with its semicolon; only the last statement may not.
    pub complete: bool,
}

/// Splits a text into its statements. Pieces without a token (only white
/// space, comments, stray semicolons) are skipped.
///
/// ```
/// let text = "create table t(a); -- a table\n\ninsert into t values (';')";
/// let found: Vec<_> = resqlite::sql_text::statements(text).map(|s| (s.line, s.text, s.complete)).collect();
/// assert_eq!(found, [(1, "create table t(a);", true), (3, "insert into t values (';')", false)]);
/// ```
pub fn statements(text: &str) -> Statements<'_> {
    Statements { text, scanner: Scanner::new() }
}

/// The iterator that [`statements`] returns.
#[derive(Clone, Debug)]
pub struct Statements<'a> {
    text: &'a str,
    scanner: Scanner,
}

impl<'a> Iterator for Statements<'a> {
    type Item = Statement<'a>;

    fn next(&mut self) -> Option<Self::Item> {
        let offset = self.scanner.find_start(self.text, true)?;
        let line = self.scanner.line();
        if let Some(end) = self.scanner.find_end(self.text, true) {
            return Some(Statement { text: &self.text[offset..end], offset, line, complete: true });
        }
        let rest = self.text[offset..].trim_end();
        self.scanner.skip_to(self.text, self.text.len());
        Some(Statement { text: rest, offset, line, complete: false })
    }
}

/// Whether a text is one or more complete statements: what `sqlite3_complete()` answers.
pub fn is_complete(text: &str) -> bool {
    let mut scanner = Scanner::new();
    let mut ended = false;
    while scanner.find_start(text, true).is_some() {
        if scanner.find_end(text, true).is_none() {
            return false;
        }
        ended = true;
    }
    !scanner.inside_comment && (ended || scanner.semicolons > 0)
}

/// The first token of a statement if it is a word, as it is written, else "".
///
/// ```
/// use resqlite::sql_text::first_keyword;
/// assert_eq!(first_keyword("/* now */ Begin immediate;"), "Begin");
/// assert_eq!(first_keyword("(select 1)"), "");
/// ```
pub fn first_keyword(text: &str) -> &str {
    let Some(start) = Scanner::new().find_start(text, true) else { return "" };
    let rest = &text[start..];
    let length = rest.bytes().take_while(|byte| byte.is_ascii_alphabetic()).count();
    &rest[..length]
}

/// Finds statements in a text that may still be growing at its end.
///
/// The caller holds the text, and passes the whole of it each time with a
/// promise that what was there before is unchanged; `last` says that nothing
/// will follow. Nothing that was scanned is scanned again.
#[derive(Clone, Debug)]
pub struct Scanner {
    position: usize,
    /// The newlines before `counted` have been counted.
    newlines: usize,
    counted: usize,
    state: State,
    inside: Inside,
    inside_comment: bool,
    semicolons: usize,
}

/// The states of the machine in `complete.c`, less the one for "nothing yet".
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Between statements.
    Start,
    /// In a statement that the next semicolon ends.
    Normal,
    /// After EXPLAIN and what may stand between it and CREATE.
    Explain,
    /// After CREATE, and TEMP or TEMPORARY.
    Create,
    /// In a trigger.
    Trigger,
    /// After a semicolon in a trigger.
    TriggerSemicolon,
    /// After `; END` in a trigger.
    TriggerEnd,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Token {
    Semicolon,
    Explain,
    Create,
    Temp,
    Trigger,
    End,
    Other,
}

/// What the position stands in the middle of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Inside {
    Nothing,
    /// A string or quoted identifier that this byte ends. A doubled quote
    /// looks like two strings in a row, which comes to the same.
    Quoted(u8),
    LineComment,
    BlockComment,
}

impl State {
    /// The transition table of `complete.c`. White space and comments change nothing.
    fn after(self, token: Token) -> Self {
        match (self, token) {
            (Self::Trigger | Self::TriggerSemicolon, Token::Semicolon) => Self::TriggerSemicolon,
            (_, Token::Semicolon) => Self::Start,
            (Self::TriggerSemicolon, Token::End) => Self::TriggerEnd,
            (Self::Trigger | Self::TriggerSemicolon | Self::TriggerEnd, _) => Self::Trigger,
            (Self::Start, Token::Explain) => Self::Explain,
            (Self::Start | Self::Explain, Token::Create) => Self::Create,
            (Self::Explain, Token::Other) => Self::Explain,
            (Self::Create, Token::Temp) => Self::Create,
            (Self::Create, Token::Trigger) => Self::Trigger,
            _ => Self::Normal,
        }
    }

    /// Whether only a semicolon can change this state, so that words need not be read.
    fn waits_for_semicolon(self) -> bool {
        matches!(self, Self::Normal | Self::Trigger)
    }
}

impl Default for Scanner {
    fn default() -> Self {
        Self::new()
    }
}

impl Scanner {
    /// At the beginning of a text.
    pub fn new() -> Self {
        Self {
            position: 0,
            newlines: 0,
            counted: 0,
            state: State::Start,
            inside: Inside::Nothing,
            inside_comment: false,
            semicolons: 0,
        }
    }

    /// The line that the last found position is on, from 1.
    pub fn line(&self) -> usize {
        self.newlines + 1
    }

    /// The line that a later position is on, from 1.
    pub fn line_at(&self, text: &str, position: usize) -> usize {
        self.line() + text.as_bytes()[self.counted..position].iter().filter(|byte| **byte == b'\n').count()
    }

    /// Whether the text scanned so far ends in the middle of a statement.
    pub fn is_in_statement(&self) -> bool {
        self.state != State::Start
    }

    /// Up to where the text has been scanned, in bytes.
    pub fn position(&self) -> usize {
        self.position
    }

    /// Between statements: skips white space, comments and stray semicolons, and returns where the
    /// next statement's first token begins. In the middle of a statement: returns `None`.
    pub fn find_start(&mut self, text: &str, last: bool) -> Option<usize> {
        if self.state != State::Start {
            return None;
        }
        let bytes = text.as_bytes();
        while self.skip_inside(bytes, last) {
            let rest = &bytes[self.position..];
            match rest {
                [] => return None,
                [b';', ..] => {
                    self.semicolons += 1;
                    self.position += 1;
                }
                [b' ' | b'\t' | b'\n' | b'\r' | 0x0c, ..] => self.position += 1,
                // SQLite takes a byte order mark for white space.
                [0xef, 0xbb, 0xbf, ..] => self.position += 3,
                [b'-', b'-', ..] => self.enter(Inside::LineComment, 2),
                [b'/', b'*', ..] => self.enter(Inside::BlockComment, 2),
                [b'-' | b'/'] | [0xef] | [0xef, 0xbb] if !last => return None,
                _ => {
                    self.count_lines(bytes);
                    return Some(self.position);
                }
            }
        }
        None
    }

    /// In a statement: returns the offset behind the semicolon that ends it, or `None` if the text
    /// ends before it does.
    pub fn find_end(&mut self, text: &str, last: bool) -> Option<usize> {
        let bytes = text.as_bytes();
        while self.skip_inside(bytes, last) {
            if self.state.waits_for_semicolon() {
                let plain = bytes[self.position..].iter().position(|byte| SPECIAL[usize::from(*byte)]);
                self.position = plain.map_or(bytes.len(), |length| self.position + length);
            }
            let (token, length) = match &bytes[self.position..] {
                [] => return None,
                [b';', ..] => (Token::Semicolon, 1),
                [b'-', b'-', ..] => {
                    self.enter(Inside::LineComment, 2);
                    continue;
                }
                [b'/', b'*', ..] => {
                    self.enter(Inside::BlockComment, 2);
                    continue;
                }
                [b'-' | b'/'] if !last => return None,
                [quote @ (b'\'' | b'"' | b'`'), ..] => {
                    self.enter(Inside::Quoted(*quote), 1);
                    (Token::Other, 0)
                }
                [b'[', ..] => {
                    self.enter(Inside::Quoted(b']'), 1);
                    (Token::Other, 0)
                }
                [b' ' | b'\t' | b'\n' | b'\r' | 0x0c, ..] => {
                    self.position += 1;
                    continue;
                }
                rest => {
                    let length = rest.iter().take_while(|byte| is_word_byte(**byte)).count();
                    if length == rest.len() && !last {
                        return None;
                    }
                    (keyword(&rest[..length]), length.max(1))
                }
            };
            self.position += length;
            self.state = self.state.after(token);
            if self.state == State::Start {
                return Some(self.position);
            }
        }
        None
    }

    /// Takes everything before `position` for done, for callers that treat some lines on their own.
    pub fn skip_to(&mut self, text: &str, position: usize) {
        self.position = position;
        self.state = State::Start;
        self.inside = Inside::Nothing;
        self.count_lines(text.as_bytes());
    }

    /// Tells that the caller has removed the first `length` bytes, which must have been scanned.
    pub fn forget(&mut self, text: &str, length: usize) {
        assert!(length <= self.position, "only what was scanned may be forgotten");
        self.count_lines(text.as_bytes());
        self.position -= length;
        self.counted = self.counted.saturating_sub(length);
    }

    fn enter(&mut self, inside: Inside, length: usize) {
        self.inside = inside;
        self.position += length;
    }

    /// Leaves a string or a comment. `false`: the text ends within it.
    fn skip_inside(&mut self, bytes: &[u8], last: bool) -> bool {
        let rest = &bytes[self.position..];
        let length = match self.inside {
            Inside::Nothing => return true,
            Inside::Quoted(quote) => rest.iter().position(|byte| *byte == quote).map(|end| end + 1),
            Inside::LineComment => match rest.iter().position(|byte| *byte == b'\n') {
                None if last => Some(rest.len()),
                end => end.map(|end| end + 1),
            },
            Inside::BlockComment => rest.windows(2).position(|pair| pair == b"*/").map(|end| end + 2),
        };
        if let Some(length) = length {
            self.position += length;
            self.inside = Inside::Nothing;
            self.inside_comment = false;
            return true;
        }
        // A star at the end may be the first half of the comment's end.
        let may_end = self.inside == Inside::BlockComment && rest.last() == Some(&b'*');
        self.position = bytes.len() - usize::from(may_end);
        self.inside_comment = self.inside == Inside::BlockComment;
        false
    }

    fn count_lines(&mut self, bytes: &[u8]) {
        let from = self.counted.min(self.position);
        self.newlines += bytes[from..self.position].iter().filter(|byte| **byte == b'\n').count();
        self.counted = self.position;
    }
}

/// Bytes that matter to a state which waits for a semicolon.
const SPECIAL: [bool; 256] = {
    let mut table = [false; 256];
    let bytes = b";'\"`[-/";
    let mut at = 0;
    while at < bytes.len() {
        table[bytes[at] as usize] = true;
        at += 1;
    }
    table
};

/// What SQLite takes for a part of an identifier (`sqlite3IsIdChar`).
fn is_word_byte(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'$' || byte >= 0x80
}

fn keyword(word: &[u8]) -> Token {
    const KEYWORDS: [(&[u8], Token); 6] = [
        (b"explain", Token::Explain),
        (b"create", Token::Create),
        (b"temp", Token::Temp),
        (b"temporary", Token::Temp),
        (b"trigger", Token::Trigger),
        (b"end", Token::End),
    ];
    let found = KEYWORDS.iter().find(|(keyword, _)| word.eq_ignore_ascii_case(keyword));
    found.map_or(Token::Other, |(_, token)| *token)
}

#[cfg(test)]
mod tests;
