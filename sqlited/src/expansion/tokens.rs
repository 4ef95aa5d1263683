//! SQL text as tokens, as far as the measure of expansion needs them (<https://sqlite.org/src/file/src/tokenize.c>).
//! It knows no grammar, except which parenthesis closes which.

use std::borrow::Cow;

/// One token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Token<'t> {
    /// A keyword or a name, in lower case.
    Word(Cow<'t, str>),
    /// A name in quotes of any kind, in lower case; a string may stand for one.
    Quoted(String),
    /// `(`, with the place of what closes it, or of the text's end.
    Open(usize),
    Close,
    Comma,
    Dot,
    Star,
    Semicolon,
    /// A number, a blob or a parameter.
    Literal,
    Operator,
}

impl Token<'_> {
    /// The name that this may be.
    pub fn name(&self) -> Option<&str> {
        match self {
            Self::Word(word) => Some(word),
            Self::Quoted(name) => Some(name),
            _ => None,
        }
    }

    /// The same, to keep.
    pub fn owned_name(&self) -> Option<String> {
        self.name().map(str::to_owned)
    }

    /// Whether this is the keyword, which is given in lower case.
    pub fn is(&self, keyword: &str) -> bool {
        matches!(self, Self::Word(word) if word == keyword)
    }
}

/// The tokens of a text, without blanks and comments. What SQLite does not know as a token is an operator here.
pub fn tokens(text: &str) -> Vec<Token<'_>> {
    let bytes = text.as_bytes();
    let (mut tokens, mut open, mut at) = (Vec::new(), Vec::new(), 0);
    while at < bytes.len() {
        let start = at;
        at = end_of_token(bytes, start);
        let token = match bytes[start] {
            b'-' if at > start + 1 => continue,
            b'/' if at > start + 1 => continue,
            byte if byte.is_ascii_whitespace() => continue,
            b'(' => {
                open.push(tokens.len());
                Token::Open(usize::MAX)
            }
            b')' => {
                if let Some(opened) = open.pop() {
                    tokens[opened] = Token::Open(tokens.len());
                }
                Token::Close
            }
            b',' => Token::Comma,
            b'.' if at == start + 1 => Token::Dot,
            b'*' => Token::Star,
            b';' => Token::Semicolon,
            b'x' | b'X' if bytes.get(start + 1) == Some(&b'\'') => Token::Literal,
            quote @ (b'\'' | b'"' | b'`' | b'[') => Token::Quoted(unquoted(&text[start..at], quote)),
            byte if byte.is_ascii_digit() || matches!(byte, b'.' | b'?' | b':' | b'@' | b'$' | b'#') => {
                Token::Literal
            }
            byte if is_name_byte(byte) => {
                let word = &text[start..at];
                let lower = word.bytes().any(|byte| byte.is_ascii_uppercase());
                Token::Word(if lower { word.to_ascii_lowercase().into() } else { word.into() })
            }
            _ => Token::Operator,
        };
        tokens.push(token);
    }
    for opened in open {
        tokens[opened] = Token::Open(tokens.len());
    }
    tokens
}

/// Where the token that begins here ends; blanks and comments count as tokens.
fn end_of_token(bytes: &[u8], start: usize) -> usize {
    let rest = &bytes[start..];
    let while_in = |from: usize, is_in: fn(u8) -> bool| {
        from + rest[from..].iter().take_while(|byte| is_in(**byte)).count()
    };
    let length = match rest[0] {
        b'-' if rest.starts_with(b"--") => while_in(0, |byte| byte != b'\n'),
        b'/' if rest.starts_with(b"/*") => {
            let end = rest[2..].windows(2).position(|pair| pair == b"*/");
            end.map_or(rest.len(), |end| end + 4)
        }
        byte if byte.is_ascii_whitespace() => while_in(1, |byte| byte.is_ascii_whitespace()),
        quote @ (b'\'' | b'"' | b'`') => end_of_quoted(rest, 0, quote),
        b'[' => rest.iter().position(|byte| *byte == b']').map_or(rest.len(), |end| end + 1),
        b'x' | b'X' if rest.get(1) == Some(&b'\'') => end_of_quoted(rest, 1, b'\''),
        b'.' if !rest.get(1).is_some_and(u8::is_ascii_digit) => 1,
        byte if byte.is_ascii_digit() || byte == b'.' => {
            while_in(1, |byte| is_name_byte(byte) || byte == b'.')
        }
        b'?' | b':' | b'@' | b'$' | b'#' => while_in(1, is_name_byte),
        byte if is_name_byte(byte) => while_in(1, is_name_byte),
        _ => 1,
    };
    start + length
}

/// A doubled quote stands for one inside.
fn end_of_quoted(rest: &[u8], opening: usize, quote: u8) -> usize {
    let mut at = opening + 1;
    while let Some(found) = rest[at..].iter().position(|byte| *byte == quote) {
        at += found + 1;
        if rest.get(at) != Some(&quote) {
            return at;
        }
        at += 1;
    }
    rest.len()
}

fn unquoted(text: &str, quote: u8) -> String {
    let closing = if quote == b'[' { ']' } else { char::from(quote) };
    let inner = text[1..].strip_suffix(closing).unwrap_or(&text[1..]);
    let doubled = format!("{closing}{closing}");
    inner.replace(&doubled, &closing.to_string()).to_ascii_lowercase()
}

fn is_name_byte(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'$' || byte >= 0x80
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(text: &str) -> Vec<String> {
        tokens(text).iter().filter_map(|token| token.name().map(str::to_owned)).collect()
    }

    #[test]
    fn names_are_found_however_they_are_written() {
        assert_eq!(
            names("SELECT Aa, \"B\"\"b\", [C c], `d`, 'e' FROM é$1"),
            ["select", "aa", "b\"b", "c c", "d", "e", "from", "é$1"]
        );
        assert_eq!(names("a -- b\n c /* d ' */ e x'ff' ?1 :f @g $h 1e5 .5 a.b"), ["a", "c", "e", "a", "b"]);
    }

    #[test]
    fn a_parenthesis_knows_what_closes_it() {
        let found = tokens("(a (b) c");
        assert_eq!(found[0], Token::Open(6));
        assert_eq!((&found[2], &found[4]), (&Token::Open(4), &Token::Close));
        assert_eq!(tokens("a)"), [Token::Word("a".into()), Token::Close]);
    }

    #[test]
    fn texts_that_end_in_the_middle_of_something_end_it() {
        for text in ["'a", "\"a''", "[a", "`a", "/* a", "-- a", "x'0", "(", "'", "$", "/", "-"] {
            tokens(text);
        }
        assert_eq!(names("'a"), ["a"]);
    }
}
