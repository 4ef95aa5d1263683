//! What a CREATE VIRTUAL TABLE statement says: the module and its arguments.
//!
//! It reads text only, as `sqlite_schema` holds it.

/// A virtual table's definition.
#[derive(Debug, PartialEq, Eq)]
pub struct VirtualTable {
    /// The module, in lower case.
    pub module: String,
    arguments: Vec<String>,
}

impl VirtualTable {
    /// Reads a statement of `sqlite_schema`. None: it is none of this kind.
    pub fn parse(sql: &str) -> Option<Self> {
        let mut tokens = Tokens { rest: sql };
        for keyword in ["create", "virtual", "table"] {
            tokens.next().filter(|token| token.eq_ignore_ascii_case(keyword))?;
        }
        tokens.next()?;
        tokens.next().filter(|token| token.eq_ignore_ascii_case("using"))?;
        let module = unquoted(tokens.next()?).to_lowercase();
        let mut arguments = Vec::new();
        if tokens.next() == Some("(") {
            let (mut depth, mut argument) = (0, String::new());
            for token in tokens {
                match token {
                    ")" if depth == 0 => break,
                    "," if depth == 0 => {
                        arguments.push(std::mem::take(&mut argument));
                        continue;
                    }
                    "(" => depth += 1,
                    ")" => depth -= 1,
                    _ => {}
                }
                if !argument.is_empty() {
                    argument.push(' ');
                }
                argument.push_str(token);
            }
            arguments.push(argument);
        }
        Some(Self { module, arguments })
    }

    /// The value of an option such as `content=…`, without its quotes. FTS5 takes any beginning of its options' names
    /// for them (`fts5ConfigParseSpecial`).
    pub fn option(&self, name: &str) -> Option<String> {
        self.arguments.iter().find_map(|argument| {
            let (key, value) = argument.split_once('=')?;
            let key = key.trim().to_lowercase();
            let is_it =
                if self.module == "fts5" { !key.is_empty() && name.starts_with(&key) } else { key == name };
            is_it.then(|| unquoted(value.trim()))
        })
    }
}

/// Splits SQL text into words, quoted names and strings, and single characters.
struct Tokens<'s> {
    rest: &'s str,
}

impl<'s> Iterator for Tokens<'s> {
    type Item = &'s str;

    fn next(&mut self) -> Option<&'s str> {
        loop {
            self.rest = self.rest.trim_start();
            let end = match self.rest {
                comment if comment.starts_with("--") => comment.find('\n'),
                comment if comment.starts_with("/*") => comment.find("*/").map(|at| at + 2),
                _ => break,
            };
            self.rest = &self.rest[end.unwrap_or(self.rest.len())..];
        }
        let first = self.rest.chars().next()?;
        let is_word = |c: char| c.is_alphanumeric() || c == '_' || c == '$' || !c.is_ascii();
        let length = match first {
            '"' | '\'' | '`' => quoted_length(self.rest, first),
            '[' => self.rest.find(']').map_or(self.rest.len(), |at| at + 1),
            first if is_word(first) => self.rest.find(|c| !is_word(c)).unwrap_or(self.rest.len()),
            first => first.len_utf8(),
        };
        let (token, rest) = self.rest.split_at(length);
        self.rest = rest;
        Some(token)
    }
}

/// How long a quoted text is; within it, its quote is doubled.
fn quoted_length(text: &str, quote: char) -> usize {
    let mut characters = text.char_indices().skip(1).peekable();
    while let Some((at, c)) = characters.next() {
        if c == quote && characters.next_if(|(_, next)| *next == quote).is_none() {
            return at + 1;
        }
    }
    text.len()
}

fn unquoted(token: &str) -> String {
    let Some(first) = token.chars().next() else { return String::new() };
    let last = if first == '[' { ']' } else { first };
    if !"\"'`[".contains(first) || token.len() < 2 || !token.ends_with(last) {
        return token.to_owned();
    }
    let inner = &token[1..token.len() - 1];
    if first == '[' {
        inner.to_owned()
    } else {
        inner.replace(&format!("{first}{first}"), &first.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(sql: &str) -> VirtualTable {
        VirtualTable::parse(sql).unwrap()
    }

    #[test]
    fn options_are_found_however_they_are_written() {
        let table =
            parse("CREATE VIRTUAL TABLE \"a using (b\" /*x*/ USING FTS5(t, 'u, v', content = '', p='2,3')");
        assert_eq!(table.module, "fts5");
        assert_eq!(table.option("content"), Some(String::new()));
        assert_eq!(table.option("prefix"), Some("2,3".into()));
        assert_eq!(table.option("locale"), None);
        let table = parse("CREATE VIRTUAL TABLE [x] using fts4(a, content=\"it''s \"\"it\"\"\")");
        assert_eq!(table.option("content"), Some("it''s \"it\"".into()));
        let table = parse("CREATE VIRTUAL TABLE x USING fts4(c, con='a column with an equals sign?')");
        assert_eq!(table.option("content"), None);
    }

    #[test]
    fn a_module_may_have_no_arguments() {
        assert_eq!(
            parse("CREATE VIRTUAL TABLE t USING rtree_i32"),
            VirtualTable { module: "rtree_i32".into(), arguments: vec![] }
        );
        assert_eq!(VirtualTable::parse("CREATE TABLE t(a)"), None);
        assert_eq!(VirtualTable::parse("CREATE VIRTUAL TABLE t"), None);
    }
}
