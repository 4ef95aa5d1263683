//! What a statement expands to while SQLite prepares it, measured before SQLite does it.
//!
//! SQLite copies the body of a view or of a common table expression for every reference to it, and those of what that
//! one refers to, again and again; and it puts the expression of a subquery's column in the place of every use of that
//! column. A text of a few hundred bytes can so take minutes and gigabytes to prepare, and a chain of some thousand
//! views overflows the stack. No budget of steps stops that: nothing runs yet, and neither the progress handler nor an
//! interrupt is asked. So the expansion is counted beforehand, from the text and the schema alone. The count decides
//! what becomes of a write, so it depends on nothing else; it may come out too high, never much too low.
//!
//! It reads SQL only as far as that needs: names, parentheses, and where a select list begins and ends.

mod schema;
mod tokens;

use std::{
    cell::RefCell,
    collections::{BTreeMap, HashMap},
    ops::Range,
    rc::Rc,
};

use resqlite::api::{ReplyClass, SqlError};
use rusqlite::ffi;

pub use self::schema::Schema;
use self::tokens::{Token, tokens};
use crate::classify::Failure;

/// So many tokens may be copied for one statement. Preparing what comes near takes about half a second and 50 MB.
pub const MAX_EXPANSION: u64 = 50_000;

/// So deep may subqueries, common table expressions and views lie in one another.
pub const MAX_DEPTH: usize = 200;

/// Why a statement is not prepared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TooComplex {
    /// Too many copies.
    #[error(
        "views, common table expressions and subqueries expand to more than {MAX_EXPANSION} tokens: refer to each of \
         them, and to their computed columns, less often, or keep what they compute in a table"
    )]
    Expansion,
    /// Too deep a nesting.
    #[error(
        "views, common table expressions and subqueries lie more than {MAX_DEPTH} deep in one another: keep what some \
         of them compute in a table"
    )]
    Depth,
}

impl From<TooComplex> for SqlError {
    fn from(error: TooComplex) -> Self {
        Failure::from(error).error
    }
}

impl From<TooComplex> for Failure {
    fn from(error: TooComplex) -> Self {
        Self::new(ReplyClass::Invalid, ffi::SQLITE_ERROR, 1, error.to_string())
    }
}

/// Refuses a text that expands too far. `schema`: what its names may mean.
pub fn check(sql: &str, schema: &Schema) -> Result<(), TooComplex> {
    let names_a_query = contains(sql, "select");
    // Most writes name no subquery, and most schemas have no triggers: nothing can be copied then.
    if !names_a_query && schema.has_no_triggers() {
        return Ok(());
    }
    let tokens = tokens(sql);
    let check = Check { schema, views: RefCell::default() };
    let mut copied = check.text(&tokens)?;
    // A definition sets nothing off, whatever its program will.
    if !tokens.first().is_some_and(|first| first.is("create")) {
        copied = copied.saturating_add(check.triggered_by(&tokens)?);
    }
    if copied > MAX_EXPANSION {
        return Err(TooComplex::Expansion);
    }
    match schema.with_view_of(sql, &tokens) {
        Some(schema) => Check { schema: &schema, views: RefCell::default() }.all_definitions(),
        None => Ok(()),
    }
}

/// Whether a text may expand at all, whatever the schema: so that this is looked up only for one that may.
pub fn may_expand(sql: &str) -> bool {
    ["select", "insert", "replace", "update", "delete"].iter().any(|word| contains(sql, word))
}

fn contains(text: &str, word: &str) -> bool {
    text.as_bytes().windows(word.len()).any(|found| found.eq_ignore_ascii_case(word.as_bytes()))
}

/// One check. What it has learnt of a view holds for it alone: which of two limits a statement exceeds first must not
/// depend on the statements before.
struct Check<'s> {
    schema: &'s Schema,
    views: RefCell<HashMap<String, Rc<RefCell<State>>>>,
}

impl Check<'_> {
    /// What a text expands to beyond itself. A trigger's program is several statements.
    fn text(&self, tokens: &[Token<'_>]) -> Result<u64, TooComplex> {
        let (mut total, mut start) = (0u64, 0);
        for part in tokens.split(|token| *token == Token::Semicolon) {
            let range = start..start + part.len();
            start = range.end + 1;
            let source = Measure { tokens, check: self }.group(range, None, 0)?;
            total = total.saturating_add(source.copied);
        }
        Ok(total)
    }

    /// What a view expands to; None if no view has this name.
    fn view(&self, name: &str, depth: usize) -> Result<Option<Rc<Source>>, TooComplex> {
        let Some(sql) = self.schema.view(name) else { return Ok(None) };
        let state = Rc::clone(self.views.borrow_mut().entry(name.to_owned()).or_default());
        let expand = || {
            let tokens = tokens(sql);
            // CREATE VIEW name (columns) AS …
            let body = tokens.iter().position(|token| token.is("as")).unwrap_or(0);
            let columns = match tokens[..body].iter().position(|token| matches!(token, Token::Open(_))) {
                Some(open) => tokens[open..body].iter().filter_map(Token::owned_name).collect(),
                None => Vec::new(),
            };
            let source =
                Measure { tokens: &tokens, check: self }.group(body..tokens.len(), None, depth + 1)?;
            Ok(source.renamed(&columns))
        };
        once(&state, expand).map(Some)
    }

    /// What the triggers expand to that a statement may set off: those of the tables that it changes, of the tables
    /// that these change, and so on. SQLite compiles each of them once for a statement.
    fn triggered_by(&self, statement: &[Token<'_>]) -> Result<u64, TooComplex> {
        let mut total = 0u64;
        for sql in self.schema.triggers_set_off_by(statement) {
            total = total.saturating_add(self.text(&tokens(sql))?);
        }
        Ok(total)
    }

    /// Every view and every trigger must stay preparable: ALTER TABLE prepares them all.
    fn all_definitions(&self) -> Result<(), TooComplex> {
        for view in self.schema.view_names() {
            self.view(view, 0)?;
        }
        for trigger in self.schema.triggers() {
            if self.text(&tokens(trigger))? > MAX_EXPANSION {
                return Err(TooComplex::Expansion);
            }
        }
        Ok(())
    }
}

/// What can be named in FROM, expanded.
#[derive(Clone, Debug, Default)]
struct Source {
    /// Tokens that are copied into it.
    copied: u64,
    /// Its own.
    own: u64,
    /// Of what lies in it.
    height: usize,
    /// The sizes of its columns' expressions, in order; a star makes the order unknown.
    columns: Vec<(Option<String>, u64)>,
    has_star: bool,
    /// Names that may be those of columns outside, and how often they are used.
    free: BTreeMap<String, u64>,
}

impl Source {
    /// With other names for its columns, where they are given.
    fn renamed(mut self, names: &[String]) -> Self {
        let largest = self.columns.iter().map(|(_, size)| *size).max().unwrap_or(1);
        if !names.is_empty() {
            let size = |at: usize| {
                self.columns.get(at).filter(|_| !self.has_star).map_or(largest, |(_, size)| *size)
            };
            self.columns =
                names.iter().enumerate().map(|(at, name)| (Some(name.clone()), size(at))).collect();
        }
        self.free.clear();
        self
    }
}

/// Whether a definition has been expanded.
#[derive(Debug, Default)]
enum State {
    #[default]
    Unseen,
    /// Who refers to it now is recursive, and SQLite copies nothing more.
    UnderWay,
    Known(Result<Rc<Source>, TooComplex>),
}

/// Expands a definition once.
fn once(
    state: &RefCell<State>,
    expand: impl FnOnce() -> Result<Source, TooComplex>,
) -> Result<Rc<Source>, TooComplex> {
    match &*state.borrow() {
        State::Known(known) => return known.clone(),
        State::UnderWay => return Ok(Rc::default()),
        State::Unseen => {}
    }
    *state.borrow_mut() = State::UnderWay;
    let known = expand().map(Rc::new);
    *state.borrow_mut() = State::Known(known.clone());
    known
}

/// A common table expression.
struct Cte {
    name: String,
    columns: Vec<String>,
    body: Range<usize>,
    state: RefCell<State>,
}

/// Those of one WITH, and what is known around it.
struct Scope<'s> {
    ctes: Vec<Cte>,
    outer: Option<&'s Scope<'s>>,
}

/// One text that is measured.
#[derive(Clone, Copy)]
struct Measure<'m, 't> {
    tokens: &'m [Token<'t>],
    check: &'m Check<'m>,
}

/// One SELECT of a compound, as far as it has been read.
#[derive(Default)]
struct Arm {
    /// Names in the select list, item by item.
    items: Vec<Item>,
    in_items: bool,
    /// Names elsewhere.
    rest: BTreeMap<String, u64>,
    /// The columns of all that it selects from, by name.
    known: HashMap<String, u64>,
}

#[derive(Default)]
struct Item {
    uses: BTreeMap<String, u64>,
    /// The last name in it, which may be that of the column.
    name: Option<String>,
    star: bool,
}

impl<'m, 't> Measure<'m, 't> {
    /// Measures a query, or any other text: whatever stands between two parentheses, or all.
    fn group(
        self,
        range: Range<usize>,
        scope: Option<&Scope<'_>>,
        depth: usize,
    ) -> Result<Source, TooComplex> {
        if depth > MAX_DEPTH {
            return Err(TooComplex::Depth);
        }
        let mut source = Source { own: range.len() as u64, ..Source::default() };
        let mut arm = Arm::default();
        let (mut at, mut flat_depth) = (range.start, 0usize);
        while at < range.end {
            let token = &self.tokens[at];
            match token {
                Token::Word(word) if word == "with" => {
                    let (ctes, after) = self.ctes(at, range.end);
                    if !ctes.is_empty() {
                        // The rest of the group lies in the new scope.
                        let inner = Scope { ctes, outer: scope };
                        let rest = self.group(after..range.end, Some(&inner), depth + 1)?;
                        source.take(&rest)?;
                        source.columns = rest.columns;
                        source.has_star = rest.has_star;
                        source.free = rest.free;
                        return source.checked();
                    }
                }
                Token::Word(word) if word == "select" => {
                    arm.end(&mut source);
                    arm = Arm { in_items: true, items: vec![Item::default()], ..Arm::default() };
                    flat_depth = 0;
                }
                Token::Word(word) if word == "from" && flat_depth == 0 && !self.is_distinct_from(at) => {
                    arm.in_items = false;
                }
                Token::Open(close) if self.begins_query(at + 1) => {
                    let close = (*close).min(range.end);
                    let inner = self.group(at + 1..close, scope, depth + 1)?;
                    source.take(&inner)?;
                    arm.know(&inner);
                    arm.uses(&inner.free);
                    at = close + 1;
                    continue;
                }
                Token::Open(_) => flat_depth += 1,
                Token::Close => flat_depth = flat_depth.saturating_sub(1),
                Token::Comma if arm.in_items && flat_depth == 0 => arm.items.push(Item::default()),
                Token::Star if arm.in_items && self.is_all_columns(at) => {
                    arm.items.last_mut().expect("a select list has an item").star = true;
                }
                _ => {}
            }
            if let Some(name) = token.name() {
                match self.reference(at, scope, depth)? {
                    Some(referred) => {
                        source.copied = source.copied.saturating_add(referred.own);
                        source.take(&referred)?;
                        arm.know(&referred);
                    }
                    None => arm.name(name, self.is_use(at), flat_depth),
                }
            }
            at += 1;
        }
        arm.end(&mut source);
        source.checked()
    }

    /// The expressions that a WITH defines, and where what follows them begins.
    fn ctes(self, with: usize, end: usize) -> (Vec<Cte>, usize) {
        let token = |at: usize| self.tokens[..end].get(at);
        let is = |at: usize, keyword: &str| token(at).is_some_and(|token| token.is(keyword));
        let mut ctes = Vec::new();
        let mut at = with + 1 + usize::from(is(with + 1, "recursive"));
        loop {
            let Some(name) = token(at).and_then(Token::name) else { return (ctes, at) };
            let mut next = at + 1;
            let mut columns = Vec::new();
            if let Some(Token::Open(close)) = token(next) {
                let named = self.tokens[next + 1..(*close).min(end)].iter();
                columns = named.filter_map(Token::owned_name).collect();
                next = close.saturating_add(1);
            }
            if !is(next, "as") {
                return (ctes, at);
            }
            next += 1;
            next += usize::from(is(next, "not"));
            next += usize::from(is(next, "materialized"));
            let Some(Token::Open(close)) = token(next) else { return (ctes, at) };
            let close = (*close).min(end);
            ctes.push(Cte {
                name: name.to_owned(),
                columns,
                body: next + 1..close,
                state: RefCell::default(),
            });
            at = close + 1;
            if token(at) != Some(&Token::Comma) {
                return (ctes, at.min(end));
            }
            at += 1;
        }
    }

    /// What the name at this place refers to, if it stands where a table may and is no table.
    fn reference(
        self,
        at: usize,
        scope: Option<&Scope<'_>>,
        depth: usize,
    ) -> Result<Option<Rc<Source>>, TooComplex> {
        let before = |at: usize| at.checked_sub(1).and_then(|at| self.tokens.get(at));
        let Some(name) = self.tokens[at].name() else { return Ok(None) };
        if matches!(self.tokens.get(at + 1), Some(Token::Dot | Token::Open(_))) {
            return Ok(None);
        }
        let qualified = before(at) == Some(&Token::Dot);
        let place = if qualified { before(at - 1) } else { before(at) };
        let may_be_table = match place {
            Some(Token::Comma | Token::Open(_)) => true,
            Some(Token::Word(word)) => matches!(&**word, "from" | "join" | "in" | "update" | "into"),
            _ => false,
        };
        if !may_be_table {
            return Ok(None);
        }
        let mut scopes = scope.filter(|_| !qualified);
        while let Some(scope) = scopes {
            if let Some(cte) = scope.ctes.iter().find(|cte| cte.name == name) {
                let expand = || {
                    let body = self.group(cte.body.clone(), Some(scope), depth + 1)?;
                    Ok(body.renamed(&cte.columns))
                };
                return once(&cte.state, expand).map(Some);
            }
            scopes = scope.outer;
        }
        self.check.view(name, depth)
    }

    fn begins_query(self, at: usize) -> bool {
        let keyword = |token: &Token<'_>| ["select", "with", "values"].iter().any(|word| token.is(word));
        self.tokens.get(at).is_some_and(keyword)
    }

    /// `IS DISTINCT FROM` ends no select list.
    fn is_distinct_from(self, from: usize) -> bool {
        from >= 2
            && self.tokens[from - 1].is("distinct")
            && (self.tokens[from - 2].is("is") || self.tokens[from - 2].is("not"))
    }

    /// Whether a star stands for columns, and is no multiplication.
    fn is_all_columns(self, at: usize) -> bool {
        match at.checked_sub(1).map(|before| &self.tokens[before]) {
            Some(Token::Word(word)) => matches!(&**word, "select" | "distinct" | "all"),
            Some(Token::Comma | Token::Dot) => true,
            _ => false,
        }
    }

    /// Whether a name may use a column: it is neither a qualifier nor a function, nor a new name for something.
    fn is_use(self, at: usize) -> bool {
        if matches!(self.tokens.get(at + 1), Some(Token::Dot | Token::Open(_))) {
            return false;
        }
        match at.checked_sub(1).map(|before| &self.tokens[before]) {
            Some(Token::Word(word)) => word != "as" && is_keyword_before_operand(word),
            Some(Token::Quoted(_) | Token::Literal | Token::Close) => false,
            _ => true,
        }
    }
}

/// After these words an operand follows; after any other a name can only be an alias.
fn is_keyword_before_operand(word: &str) -> bool {
    const WORDS: [&str; 31] = [
        "select",
        "distinct",
        "all",
        "and",
        "or",
        "not",
        "is",
        "in",
        "like",
        "glob",
        "regexp",
        "match",
        "between",
        "case",
        "when",
        "then",
        "else",
        "where",
        "on",
        "having",
        "by",
        "limit",
        "offset",
        "escape",
        "from",
        "join",
        "filter",
        "set",
        "returning",
        "using",
        "null",
    ];
    WORDS.contains(&word)
}

impl Source {
    /// Counts in what lies in it.
    fn take(&mut self, inner: &Source) -> Result<(), TooComplex> {
        self.copied = self.copied.saturating_add(inner.copied);
        self.height = self.height.max(inner.height + 1);
        if self.height > MAX_DEPTH {
            return Err(TooComplex::Depth);
        }
        if self.copied > MAX_EXPANSION { Err(TooComplex::Expansion) } else { Ok(()) }
    }

    fn checked(self) -> Result<Self, TooComplex> {
        if self.copied > MAX_EXPANSION { Err(TooComplex::Expansion) } else { Ok(self) }
    }
}

impl Arm {
    /// The columns of something that it selects from.
    fn know(&mut self, source: &Source) {
        for (name, size) in &source.columns {
            let Some(name) = name else { continue };
            let known = self.known.entry(name.clone()).or_default();
            *known = (*known).max(*size);
        }
    }

    fn name(&mut self, name: &str, is_use: bool, flat_depth: usize) {
        if let Some(item) = self.items.last_mut().filter(|_| self.in_items) {
            if flat_depth == 0 {
                item.name = Some(name.to_owned());
            }
            if is_use {
                *item.uses.entry(name.to_owned()).or_default() += 1;
            }
        } else if is_use {
            *self.rest.entry(name.to_owned()).or_default() += 1;
        }
    }

    /// What a subquery uses that is not its own may be ours.
    fn uses(&mut self, free: &BTreeMap<String, u64>) {
        let uses = match self.items.last_mut().filter(|_| self.in_items) {
            Some(item) => &mut item.uses,
            None => &mut self.rest,
        };
        for (name, count) in free {
            *uses.entry(name.clone()).or_default() += count;
        }
    }

    /// Adds its columns, and what is copied into its expressions, to the query that it is part of.
    fn end(&mut self, source: &mut Source) {
        let Self { items, rest, known, .. } = std::mem::take(self);
        let mut free = |name: &String, count: u64| {
            let free = source.free.entry(name.clone()).or_default();
            *free = free.saturating_add(count);
        };
        let mut copied = 0u64;
        let mut columns = Vec::new();
        for Item { uses, name, star } in items {
            // What is only passed on is as large as it was; so is a constant.
            let (mut size, mut before) = (0u64, 0u64);
            for (used, count) in &uses {
                before = before.saturating_add(*count);
                match known.get(used) {
                    Some(of_column) => size = size.saturating_add(of_column.saturating_mul(*count)),
                    None => {
                        size = size.saturating_add(*count);
                        free(used, *count);
                    }
                }
            }
            if star {
                columns.extend(known.iter().map(|(name, size)| (Some(name.clone()), *size)));
                source.has_star = true;
            } else {
                copied = copied.saturating_add(size.saturating_sub(before));
                columns.push((name, size.max(1)));
            }
        }
        for (used, count) in &rest {
            match known.get(used) {
                Some(size) => copied = copied.saturating_add((size - 1).saturating_mul(*count)),
                None => free(used, *count),
            }
        }
        source.copied = source.copied.saturating_add(copied);
        for (at, (name, size)) in columns.into_iter().enumerate() {
            match source.columns.get_mut(at) {
                Some((_, of_earlier_arm)) => *of_earlier_arm = (*of_earlier_arm).max(size),
                None => source.columns.push((name, size)),
            }
        }
    }
}
