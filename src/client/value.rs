//! Values, parameters and rows, as a Rust program wants them.
//!
//! Knows the messages of [`crate::api`] that carry values, and nothing of connections.

use bytes::Bytes;

use super::error::Error;
use crate::api::{self, value::Kind};

/// A value of one of SQLite's storage classes.
#[derive(Clone, Debug, Default, PartialEq)]
pub enum Value {
    /// NULL.
    #[default]
    Null,
    /// INTEGER.
    Integer(i64),
    /// REAL.
    Real(f64),
    /// TEXT.
    Text(String),
    /// BLOB.
    Blob(Bytes),
    /// TEXT whose bytes are not valid UTF-8, as `CAST(x'ff' AS TEXT)` makes it.
    InvalidText(Bytes),
}

impl From<Value> for api::Value {
    fn from(value: Value) -> Self {
        let kind = match value {
            Value::Null => None,
            Value::Integer(integer) => Some(Kind::Integer(integer)),
            Value::Real(real) => Some(Kind::Real(real)),
            Value::Text(text) => Some(Kind::Text(text)),
            Value::Blob(bytes) => Some(Kind::Blob(bytes)),
            Value::InvalidText(bytes) => Some(Kind::InvalidText(bytes)),
        };
        Self { kind }
    }
}

impl From<api::Value> for Value {
    fn from(value: api::Value) -> Self {
        match value.kind {
            None | Some(Kind::Null(_)) => Self::Null,
            Some(Kind::Integer(integer)) => Self::Integer(integer),
            Some(Kind::Real(real)) => Self::Real(real),
            Some(Kind::Text(text)) => Self::Text(text),
            Some(Kind::Blob(bytes)) => Self::Blob(bytes),
            Some(Kind::InvalidText(bytes)) => Self::InvalidText(bytes),
        }
    }
}

macro_rules! value_from {
    ($($from:ty => |$value:ident| $to:expr;)*) => {
        $(impl From<$from> for Value {
            fn from($value: $from) -> Self {
                $to
            }
        })*
    };
}

value_from! {
    bool => |value| Value::Integer(value.into());
    i8 => |value| Value::Integer(value.into());
    i16 => |value| Value::Integer(value.into());
    i32 => |value| Value::Integer(value.into());
    i64 => |value| Value::Integer(value);
    u8 => |value| Value::Integer(value.into());
    u16 => |value| Value::Integer(value.into());
    u32 => |value| Value::Integer(value.into());
    f32 => |value| Value::Real(value.into());
    f64 => |value| Value::Real(value);
    &str => |value| Value::Text(value.to_owned());
    String => |value| Value::Text(value);
    &[u8] => |value| Value::Blob(Bytes::copy_from_slice(value));
    Vec<u8> => |value| Value::Blob(value.into());
    Bytes => |value| Value::Blob(value);
}

impl<T: Into<Value>> From<Option<T>> for Value {
    fn from(value: Option<T>) -> Self {
        value.map_or(Self::Null, Into::into)
    }
}

/// What stands for a statement's `?`, `?1`, `:name`, `@name` and `$name`.
///
/// Tuples and arrays convert into positional parameters, `()` into none:
///
/// ```
/// use resqlite::client::{Params, Value};
/// let positional = Params::from((1, "two", 3.0, Value::Null));
/// let named = Params::named([("id", 1.into()), ("name", "two".into())]);
/// # assert_ne!(positional, named);
/// ```
#[derive(Clone, Debug, Default, PartialEq)]
pub enum Params {
    /// The statement has no parameters.
    #[default]
    None,
    /// `?1`, `?2`, … in order.
    Positional(Vec<Value>),
    /// By name; the prefix (`:`, `@` or `$`) may be left out.
    Named(Vec<(String, Value)>),
}

impl Params {
    /// Parameters by name.
    pub fn named<N: Into<String>>(params: impl IntoIterator<Item = (N, Value)>) -> Self {
        Self::Named(params.into_iter().map(|(name, value)| (name.into(), value)).collect())
    }

    /// As the two fields that the API's requests have for them.
    pub(super) fn into_fields(self) -> (Vec<api::Value>, std::collections::HashMap<String, api::Value>) {
        match self {
            Self::None => Default::default(),
            Self::Positional(values) => (values.into_iter().map(Into::into).collect(), Default::default()),
            Self::Named(values) => {
                let named = values.into_iter().map(|(name, value)| (name, value.into())).collect();
                (Vec::new(), named)
            }
        }
    }
}

impl From<()> for Params {
    fn from((): ()) -> Self {
        Self::None
    }
}

impl<T: Into<Value>> From<Vec<T>> for Params {
    fn from(values: Vec<T>) -> Self {
        Self::Positional(values.into_iter().map(Into::into).collect())
    }
}

impl<T: Into<Value>, const N: usize> From<[T; N]> for Params {
    fn from(values: [T; N]) -> Self {
        Self::Positional(values.into_iter().map(Into::into).collect())
    }
}

macro_rules! params_from_tuple {
    ($(($($name:ident)+))*) => {
        $(impl<$($name: Into<Value>),+> From<($($name,)+)> for Params {
            #[allow(non_snake_case, reason = "the type parameters' names serve as the fields'")]
            fn from(($($name,)+): ($($name,)+)) -> Self {
                Self::Positional(vec![$($name.into()),+])
            }
        })*
    };
}

params_from_tuple! {
    (A) (A B) (A B C) (A B C D) (A B C D E) (A B C D E F) (A B C D E F G) (A B C D E F G H)
}

/// One row of a result.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Row(pub(crate) api::Row);

impl Row {
    /// How many values it has.
    pub fn len(&self) -> usize {
        self.0.values.len()
    }

    /// Whether it has no values at all.
    pub fn is_empty(&self) -> bool {
        self.0.values.is_empty()
    }

    /// The value of a column, counted from 0. Fails if there is no such column, or if the value
    /// cannot be had in that type without loss.
    pub fn get<T: FromValue>(&self, column: usize) -> Result<T, Error> {
        let Some(value) = self.0.values.get(column) else {
            return Err(Error::Invalid(format!("the row has {} columns, not one at {column}", self.len())));
        };
        T::from_value(value).ok_or_else(|| {
            let (found, wanted) = (storage_class(value), std::any::type_name::<T>());
            Error::Invalid(format!("column {column} is {found}, which is not a {wanted}"))
        })
    }

    /// All of them, in order.
    pub fn into_values(self) -> Vec<Value> {
        self.0.values.into_iter().map(Into::into).collect()
    }
}

fn storage_class(value: &api::Value) -> &'static str {
    match &value.kind {
        None | Some(Kind::Null(_)) => "NULL",
        Some(Kind::Integer(_)) => "INTEGER",
        Some(Kind::Real(_)) => "REAL",
        Some(Kind::Text(_)) => "TEXT",
        Some(Kind::Blob(_)) => "BLOB",
        Some(Kind::InvalidText(_)) => "TEXT that is not UTF-8",
    }
}

/// Types that a value of a row can be had in.
pub trait FromValue: Sized {
    /// `None` if the value is not of that type.
    fn from_value(value: &api::Value) -> Option<Self>;
}

impl FromValue for Value {
    fn from_value(value: &api::Value) -> Option<Self> {
        Some(value.clone().into())
    }
}

impl<T: FromValue> FromValue for Option<T> {
    fn from_value(value: &api::Value) -> Option<Self> {
        match &value.kind {
            None | Some(Kind::Null(_)) => Some(None),
            Some(_) => T::from_value(value).map(Some),
        }
    }
}

impl FromValue for f64 {
    fn from_value(value: &api::Value) -> Option<Self> {
        match value.kind {
            Some(Kind::Real(real)) => Some(real),
            _ => None,
        }
    }
}

impl FromValue for String {
    fn from_value(value: &api::Value) -> Option<Self> {
        match &value.kind {
            Some(Kind::Text(text)) => Some(text.clone()),
            _ => None,
        }
    }
}

impl FromValue for Bytes {
    fn from_value(value: &api::Value) -> Option<Self> {
        match &value.kind {
            Some(Kind::Blob(bytes)) => Some(bytes.clone()),
            _ => None,
        }
    }
}

impl FromValue for Vec<u8> {
    fn from_value(value: &api::Value) -> Option<Self> {
        Bytes::from_value(value).map(Into::into)
    }
}

impl FromValue for bool {
    fn from_value(value: &api::Value) -> Option<Self> {
        i64::from_value(value).map(|integer| integer != 0)
    }
}

impl FromValue for i64 {
    fn from_value(value: &api::Value) -> Option<Self> {
        match value.kind {
            Some(Kind::Integer(integer)) => Some(integer),
            _ => None,
        }
    }
}

macro_rules! integer_from_value {
    ($($to:ty)*) => {
        $(impl FromValue for $to {
            fn from_value(value: &api::Value) -> Option<Self> {
                i64::from_value(value)?.try_into().ok()
            }
        })*
    };
}

integer_from_value! { i8 i16 i32 u8 u16 u32 u64 usize }
