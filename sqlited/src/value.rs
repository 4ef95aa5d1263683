//! SQLite's values, rows and parameters to and from their form on the wire.
//!
//! It knows rusqlite's statements and the protocol's messages, nothing of the log or of connections.

use bytes::Bytes;
use resqlite::api::{self, value::Kind};
use rusqlite::{
    Row, Statement,
    types::{ToSql, ToSqlOutput, ValueRef},
};

/// Why parameters could not be bound.
#[derive(Debug)]
pub enum BindError {
    /// Their number or a name does not fit the statement.
    Mismatch(String),
    /// SQLite refused the value, such as one that is too big.
    Sqlite(rusqlite::Error),
}

/// A protocol value as SQLite binds it.
struct Bound<'a>(&'a api::Value);

impl ToSql for Bound<'_> {
    fn to_sql(&self) -> rusqlite::Result<ToSqlOutput<'_>> {
        Ok(ToSqlOutput::Borrowed(match &self.0.kind {
            None | Some(Kind::Null(_)) => ValueRef::Null,
            Some(Kind::Integer(integer)) => ValueRef::Integer(*integer),
            // sqlite3_bind_double() stores NaN as NULL.
            Some(Kind::Real(real)) => ValueRef::Real(*real),
            Some(Kind::Text(text)) => ValueRef::Text(text.as_bytes()),
            Some(Kind::InvalidText(bytes)) => ValueRef::Text(bytes),
            Some(Kind::Blob(bytes)) => ValueRef::Blob(bytes),
        }))
    }
}

/// Binds the parameters of `source` to `statement`. Every parameter of the statement must be given,
/// and every one that is given must exist.
pub fn bind(statement: &mut Statement<'_>, source: &api::Statement) -> Result<(), BindError> {
    let expected = statement.parameter_count();
    let given = source.params.len();
    if source.named_params.is_empty() {
        if given != expected {
            return Err(BindError::Mismatch(format!(
                "the statement has {expected} parameters, but {given} were given"
            )));
        }
    } else if given > expected {
        return Err(BindError::Mismatch(format!(
            "the statement has {expected} parameters, but {given} were given by position"
        )));
    }
    for (position, value) in source.params.iter().enumerate() {
        statement.raw_bind_parameter(position + 1, Bound(value)).map_err(BindError::Sqlite)?;
    }
    if source.named_params.is_empty() { Ok(()) } else { bind_named(statement, source, given) }
}

/// Binds the parameters that are given by name; the first `by_position` are bound already.
fn bind_named(
    statement: &mut Statement<'_>,
    source: &api::Statement,
    by_position: usize,
) -> Result<(), BindError> {
    let mut bound = vec![false; statement.parameter_count()];
    bound[..by_position].fill(true);
    // A hash map's order differs from run to run: sorted, so that the first error is always the same one.
    let mut names: Vec<&String> = source.named_params.keys().collect();
    names.sort_unstable();
    for name in names {
        let index = parameter_index(statement, name)
            .ok_or_else(|| BindError::Mismatch(format!("the statement has no parameter named \"{name}\"")))?;
        if std::mem::replace(&mut bound[index - 1], true) {
            return Err(BindError::Mismatch(format!("parameter {index} (\"{name}\") was given twice")));
        }
        statement.raw_bind_parameter(index, Bound(&source.named_params[name])).map_err(BindError::Sqlite)?;
    }
    let Some(missing) = bound.iter().position(|is_bound| !is_bound) else { return Ok(()) };
    let name = statement.parameter_name(missing + 1).unwrap_or("without a name").to_owned();
    Err(BindError::Mismatch(format!("parameter {} ({name}) was not given", missing + 1)))
}

/// Finds a parameter by its name, with or without its prefix.
fn parameter_index(statement: &Statement<'_>, name: &str) -> Option<usize> {
    // A NUL byte cannot be in a name; rusqlite would call it an error of its own.
    if name.contains('\0') {
        return None;
    }
    if name.starts_with([':', '@', '$']) {
        return statement.parameter_index(name).ok().flatten();
    }
    [':', '@', '$']
        .iter()
        .find_map(|prefix| statement.parameter_index(&format!("{prefix}{name}")).ok().flatten())
}

/// The statement's columns: their names and declared types. Empty if it returns no rows.
pub fn columns(statement: &Statement<'_>) -> Vec<api::Column> {
    let declared = statement.columns();
    declared
        .iter()
        .map(|column| api::Column {
            name: column.name().to_owned(),
            declared_type: column.decl_type().unwrap_or("").to_owned(),
        })
        .collect()
}

/// One row of a statement that has `columns` columns.
pub fn row(row: &Row<'_>, columns: usize) -> rusqlite::Result<api::Row> {
    let mut values = Vec::with_capacity(columns);
    for index in 0..columns {
        values.push(value(row.get_ref(index)?));
    }
    Ok(api::Row { values })
}

/// One value.
pub fn value(value: ValueRef<'_>) -> api::Value {
    let kind = match value {
        ValueRef::Null => Kind::Null(true),
        ValueRef::Integer(integer) => Kind::Integer(integer),
        ValueRef::Real(real) => Kind::Real(real),
        ValueRef::Text(bytes) => match str::from_utf8(bytes) {
            Ok(text) => Kind::Text(text.to_owned()),
            Err(_) => Kind::InvalidText(Bytes::copy_from_slice(bytes)),
        },
        ValueRef::Blob(bytes) => Kind::Blob(Bytes::copy_from_slice(bytes)),
    };
    api::Value { kind: Some(kind) }
}
