//! `random()` and `randomblob()` from the request's own seed instead of the process's entropy.
//!
//! It knows nothing of requests but their seed.

use std::sync::{Arc, Mutex, PoisonError};

use rand_chacha::{
    ChaCha8Rng,
    rand_core::{Rng, SeedableRng},
};
use rusqlite::{
    Connection, Error, ffi,
    functions::{Context, FunctionFlags},
    types::ValueRef,
};

/// Where the writer's random numbers come from. Clones share one sequence.
#[derive(Clone)]
pub struct RandomSource(Arc<Mutex<Sequence>>);

/// A position in a sequence of random numbers.
#[derive(Clone)]
pub struct Sequence {
    key: [u8; 32],
    // Made at the first use: few requests draw random numbers.
    generator: Option<ChaCha8Rng>,
}

impl Sequence {
    /// The start of the sequence that belongs to a request's seed.
    pub fn seeded(seed: &[u8]) -> Self {
        let mut key = [0; 32];
        match key.get_mut(..seed.len()) {
            Some(start) => start.copy_from_slice(seed),
            None => key = *blake3::hash(seed).as_bytes(),
        }
        Self { key, generator: None }
    }

    fn generator(&mut self) -> &mut ChaCha8Rng {
        let key = self.key;
        self.generator.get_or_insert_with(|| ChaCha8Rng::from_seed(key))
    }
}

impl RandomSource {
    /// Replaces `random()` and `randomblob()` on this connection.
    pub fn install(connection: &Connection, limit_bytes: i64) -> rusqlite::Result<Self> {
        let source = Self(Arc::new(Mutex::new(Sequence::seeded(&[]))));
        // Innocuous, as SQLite's own are: they may be used in triggers, views and defaults.
        let flags = FunctionFlags::SQLITE_UTF8 | FunctionFlags::SQLITE_INNOCUOUS;
        let shared = source.clone();
        connection.create_scalar_function("random", 0, flags, move |_| Ok(shared.next_integer()))?;
        let shared = source.clone();
        connection.create_scalar_function("randomblob", 1, flags, move |context| {
            let bytes = integer_argument(context).max(1);
            if bytes > limit_bytes {
                return Err(Error::SqliteFailure(ffi::Error::new(ffi::SQLITE_TOOBIG), None));
            }
            Ok(shared.next_bytes(bytes as usize))
        })?;
        Ok(source)
    }

    /// Goes on from this position.
    pub fn set(&self, sequence: Sequence) {
        *self.lock() = sequence;
    }

    /// The current position, to go back to.
    pub fn position(&self) -> Sequence {
        self.lock().clone()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Sequence> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn next_integer(&self) -> i64 {
        let integer = self.lock().generator().next_u64() as i64;
        // As SQLite's own random(): never the one integer whose abs() overflows.
        if integer < 0 { -(integer & i64::MAX) } else { integer }
    }

    fn next_bytes(&self, bytes: usize) -> Vec<u8> {
        let mut blob = vec![0; bytes];
        self.lock().generator().fill_bytes(&mut blob);
        blob
    }
}

/// The argument as an integer, as `sqlite3_value_int64` reads it.
fn integer_argument(context: &Context<'_>) -> i64 {
    match context.get_raw(0) {
        ValueRef::Null => 0,
        ValueRef::Integer(integer) => integer,
        // Rust's cast saturates, as SQLite's does.
        ValueRef::Real(real) => real as i64,
        ValueRef::Text(bytes) | ValueRef::Blob(bytes) => {
            let text = String::from_utf8_lossy(bytes);
            let text = text.trim_start();
            let digits = text.strip_prefix(['-', '+']).unwrap_or(text);
            let end = text.len() - digits.trim_start_matches(|digit: char| digit.is_ascii_digit()).len();
            text[..end].parse().unwrap_or(if text.starts_with('-') || end == 0 { 0 } else { i64::MAX })
        }
    }
}
