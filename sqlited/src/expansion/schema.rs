//! The definitions that a statement's names may mean: views, and the triggers that it sets off.

use std::collections::{BTreeMap, BTreeSet};

use rusqlite::Connection;

use super::{
    contains,
    tokens::{Token, tokens},
};

/// What `sqlite_schema` says at one moment.
#[derive(Clone, Debug, Default)]
pub struct Schema {
    views: BTreeMap<String, String>,
    /// By the table, or view, that they watch.
    triggers: BTreeMap<String, Vec<String>>,
    /// By the table that is referred to: those whose foreign keys do. Their actions are writes of their own.
    children: BTreeMap<String, Vec<String>>,
}

impl Schema {
    /// Reads it.
    pub fn read(connection: &Connection) -> rusqlite::Result<Self> {
        let mut schema = Self::default();
        let mut rows = connection.prepare(
            "SELECT type, lower(name), lower(tbl_name), sql FROM sqlite_schema
             WHERE type IN ('view', 'trigger') OR type = 'table' AND sql LIKE '%references%' ORDER BY name",
        )?;
        let mut rows = rows.query([])?;
        while let Some(row) = rows.next()? {
            let (kind, name, table, sql): (String, String, String, String) =
                (row.get(0)?, row.get(1)?, row.get(2)?, row.get(3)?);
            match kind.as_str() {
                "view" => drop(schema.views.insert(name, sql)),
                "trigger" => schema.triggers.entry(table).or_default().push(sql),
                _ => {
                    let tokens = tokens(&sql);
                    let parents = tokens.windows(2).filter(|pair| pair[0].is("references"));
                    for parent in parents.filter_map(|pair| pair[1].name()) {
                        schema.children.entry(parent.to_owned()).or_default().push(name.clone());
                    }
                }
            }
        }
        Ok(schema)
    }

    pub(super) fn has_no_triggers(&self) -> bool {
        self.triggers.is_empty()
    }

    /// The text that defined the view of this name.
    pub(super) fn view(&self, name: &str) -> Option<&str> {
        self.views.get(name).map(String::as_str)
    }

    pub(super) fn view_names(&self) -> impl Iterator<Item = &str> {
        self.views.keys().map(String::as_str)
    }

    pub(super) fn triggers(&self) -> impl Iterator<Item = &str> {
        self.triggers.values().flatten().map(String::as_str)
    }

    /// The schema after a CREATE VIEW, if definitions that are there already name the view; else None.
    pub(super) fn with_view_of(&self, sql: &str, statement: &[Token<'_>]) -> Option<Self> {
        let view = statement.iter().take(4).position(|token| token.is("view"))?;
        if !statement[0].is("create") {
            return None;
        }
        let if_not_exists = if statement.get(view + 1)?.is("if") { 3 } else { 0 };
        let mut name = view + 1 + if_not_exists;
        if statement.get(name + 1) == Some(&Token::Dot) {
            name += 2;
        }
        let name = statement.get(name)?.name()?;
        if !self.views.values().map(String::as_str).chain(self.triggers()).any(|text| contains(text, name)) {
            return None;
        }
        let mut after = self.clone();
        after.views.insert(name.to_owned(), sql.to_owned());
        Some(after)
    }

    /// The triggers of the tables that a statement changes, of the tables that these change, and so on.
    pub(super) fn triggers_set_off_by(&self, statement: &[Token<'_>]) -> Vec<&str> {
        let mut found = Vec::new();
        if self.triggers.is_empty() {
            return found;
        }
        let mut due = targets(statement);
        let mut seen = BTreeSet::new();
        while let Some((table, removes)) = due.pop() {
            if !seen.insert((table.clone(), removes)) {
                continue;
            }
            if removes {
                let children = self.children.get(&table).into_iter().flatten();
                due.extend(children.map(|child| (child.clone(), true)));
            }
            for sql in self.triggers.get(&table).into_iter().flatten() {
                due.extend(targets(&tokens(sql)));
                found.push(sql.as_str());
            }
        }
        found
    }
}

/// What a text inserts into, updates or deletes from: names after INTO, UPDATE [OR …] and DELETE FROM; and whether rows
/// may go, or be changed, which is what sets the actions of foreign keys off.
fn targets(tokens: &[Token<'_>]) -> Vec<(String, bool)> {
    let removes =
        tokens.iter().any(|token| ["update", "delete", "replace"].iter().any(|word| token.is(word)));
    let mut found = Vec::new();
    for (at, token) in tokens.iter().enumerate() {
        let next_is = |word: &str| tokens.get(at + 1).is_some_and(|next| next.is(word));
        let name = match token {
            Token::Word(word) if word == "into" => at + 1,
            Token::Word(word) if word == "update" && next_is("or") => at + 3,
            Token::Word(word) if word == "update" => at + 1,
            Token::Word(word) if word == "delete" && next_is("from") => at + 2,
            _ => continue,
        };
        let qualified = tokens.get(name + 1) == Some(&Token::Dot);
        let name = tokens.get(if qualified { name + 2 } else { name }).and_then(Token::owned_name);
        found.extend(name.map(|name| (name, removes)));
    }
    found
}
