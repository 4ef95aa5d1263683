//! SQLite's functions whose time grows with the product of their operands, bounded.
//!
//! The step budget cannot see how long a function works within one step: `instr()` of two large
//! operands alone would hold up every node for hours. These do exactly what SQLite's own do, and fail
//! with "string or blob too big" where the product of the operands' lengths passes a bound. (LIKE and
//! GLOB are bounded by SQLite's own limit on patterns.)

use rusqlite::Connection;

use crate::sqlite_ffi::{self, Operand, Outcome};

/// Length of the text times length of what is searched: the search compares whole runs of bytes.
const MAX_SEARCH: usize = 1 << 32;
/// Length of the text times length of the set of characters: they are compared one by one.
const MAX_CHARACTERS: usize = 1 << 28;

/// Replaces the functions on this connection.
pub fn install(connection: &Connection) -> rusqlite::Result<()> {
    let create = sqlite_ffi::create_bytes_function;
    create(connection, c"instr", 2, instr)?;
    create(connection, c"replace", 3, replace)?;
    create(connection, c"trim", 2, |operands| trim(operands, true, true))?;
    create(connection, c"ltrim", 2, |operands| trim(operands, true, false))?;
    create(connection, c"rtrim", 2, |operands| trim(operands, false, true))?;
    create(connection, c"unhex", 2, unhex)
}

fn is_continuation(byte: u8) -> bool {
    byte & 0xc0 == 0x80
}

/// Whether SQLite would go on with bytes of these lengths.
fn within(bound: usize, left: &[u8], right: &[u8]) -> bool {
    left.len().saturating_mul(right.len()) <= bound
}

fn find(text: &[u8], from: usize, pattern: &[u8]) -> Option<usize> {
    let last = text.len().checked_sub(pattern.len())?;
    (from..=last).find(|&at| text[at..].starts_with(pattern))
}

fn instr(operands: &[Operand<'_>]) -> Outcome {
    let [text, pattern] = operands else { return Outcome::Null };
    if text.is_null || pattern.is_null {
        return Outcome::Null;
    }
    let in_characters = !(text.is_blob && pattern.is_blob);
    let (text, pattern) = (text.bytes, pattern.bytes);
    let Some(&first) = pattern.first() else { return Outcome::Integer(1) };
    if !within(MAX_SEARCH, text, pattern) {
        return Outcome::TooBig;
    }
    let found = if in_characters && is_continuation(first) {
        // A search by characters looks at their beginnings only, of which the very first byte is one.
        text.starts_with(pattern).then_some(0)
    } else {
        find(text, 0, pattern)
    };
    Outcome::Integer(match found {
        None => 0,
        Some(at) if in_characters => {
            1 + text[..=at].iter().skip(1).filter(|&&byte| !is_continuation(byte)).count() as i32
        }
        Some(at) => 1 + at as i32,
    })
}

fn replace(operands: &[Operand<'_>]) -> Outcome {
    let [text, pattern, by] = operands else { return Outcome::Null };
    if text.is_null || pattern.is_null {
        return Outcome::Null;
    }
    // SQLite takes a pattern that begins with a NUL byte for an empty one.
    if pattern.bytes.first().is_none_or(|&first| first == 0) {
        return Outcome::Text(text.bytes.to_vec());
    }
    if by.is_null {
        return Outcome::Null;
    }
    if !within(MAX_SEARCH, text.bytes, pattern.bytes) {
        return Outcome::TooBig;
    }
    let mut out = Vec::with_capacity(text.bytes.len());
    let mut from = 0;
    while let Some(at) = find(text.bytes, from, pattern.bytes) {
        out.extend_from_slice(&text.bytes[from..at]);
        out.extend_from_slice(by.bytes);
        from = at + pattern.bytes.len();
        if out.len() > crate::connection::MAX_VALUE_BYTES as usize {
            return Outcome::TooBig;
        }
    }
    out.extend_from_slice(&text.bytes[from..]);
    Outcome::Text(out)
}

/// Splits a set of characters as SQLite's SQLITE_SKIP_UTF8 does, up to a NUL byte.
fn characters(set: &[u8]) -> Vec<&[u8]> {
    let mut rest = set.split(|&byte| byte == 0).next().unwrap_or_default();
    let mut characters = Vec::new();
    while let Some(&first) = rest.first() {
        let more = if first >= 0xc0 {
            rest[1..].iter().take_while(|&&byte| is_continuation(byte)).count()
        } else {
            0
        };
        let (character, later) = rest.split_at(1 + more);
        characters.push(character);
        rest = later;
    }
    characters
}

fn trim(operands: &[Operand<'_>], left: bool, right: bool) -> Outcome {
    let [text, set] = operands else { return Outcome::Null };
    if text.is_null || set.is_null {
        return Outcome::Null;
    }
    if !within(MAX_CHARACTERS, text.bytes, set.bytes) {
        return Outcome::TooBig;
    }
    let set = characters(set.bytes);
    let mut text = text.bytes;
    while left && let Some(character) = set.iter().find(|&&character| text.starts_with(character)) {
        text = &text[character.len()..];
    }
    while right && let Some(character) = set.iter().find(|&&character| text.ends_with(character)) {
        text = &text[..text.len() - character.len()];
    }
    Outcome::Text(text.to_vec())
}

/// SQLite's `sqlite3Utf8Read`, which has an answer for invalid text as well. Bytes beyond the end are NUL.
fn read_character(text: &[u8]) -> (u32, usize) {
    let Some(&first) = text.first() else { return (0, 1) };
    let bits = match first {
        0xc0..=0xdf => first & 0x1f,
        0xe0..=0xef => first & 0x0f,
        0xf0..=0xf7 => first & 0x07,
        0xf8..=0xfb => first & 0x03,
        0xfc..=0xfd => first & 0x01,
        0xfe..=0xff => 0,
        single => return (u32::from(single), 1),
    };
    let more = text[1..].iter().take_while(|&&byte| is_continuation(byte));
    let (character, length) = more.fold((u32::from(bits), 1), |(bits, length), &byte| {
        ((bits << 6) + u32::from(byte & 0x3f), length + 1)
    });
    let is_invalid =
        character < 0x80 || character & 0xffff_f800 == 0xd800 || character & 0xffff_fffe == 0xfffe;
    (if is_invalid { 0xfffd } else { character }, length)
}

fn unhex(operands: &[Operand<'_>]) -> Outcome {
    let [hex, ignored] = operands else { return Outcome::Null };
    if hex.is_null || ignored.is_null {
        return Outcome::Null;
    }
    if !within(MAX_CHARACTERS, hex.bytes, ignored.bytes) {
        return Outcome::TooBig;
    }
    let mut ignored_characters = Vec::new();
    let mut rest = ignored.bytes;
    while !rest.is_empty() {
        let (character, length) = read_character(rest);
        ignored_characters.push(character);
        rest = &rest[length..];
    }
    let digit = |byte: u8| char::from(byte).to_digit(16).map(|digit| digit as u8);
    let mut out = Vec::with_capacity(hex.bytes.len() / 2);
    let mut rest = hex.bytes;
    while let Some(&byte) = rest.first().filter(|&&byte| byte != 0) {
        let Some(high) = digit(byte) else {
            let (character, length) = read_character(rest);
            if !ignored_characters.contains(&character) {
                return Outcome::Null;
            }
            rest = &rest[length..];
            continue;
        };
        let Some(low) = rest.get(1).and_then(|&byte| digit(byte)) else { return Outcome::Null };
        out.push(high << 4 | low);
        rest = &rest[2..];
    }
    Outcome::Blob(out)
}

#[cfg(test)]
mod tests {
    use rand_chacha::{
        ChaCha8Rng,
        rand_core::{Rng, SeedableRng},
    };
    use rusqlite::types::Value;

    use super::*;

    /// A short value of any kind, from few letters, so that they meet; some text is not valid UTF-8.
    fn operand(random: &mut ChaCha8Rng) -> Value {
        let letters: [&[u8]; 9] =
            [b"a", b"A", b"b", b"1", "ü".as_bytes(), "€".as_bytes(), b"\0", b"\xbc", b"\xff"];
        let mut pick = |end: u32| (random.next_u32() % end) as usize;
        let (kind, length) = (pick(10), pick(7));
        let bytes: Vec<u8> = (0..length).flat_map(|_| letters[pick(9)].to_vec()).collect();
        match kind {
            0 => Value::Null,
            1 => Value::Integer(pick(1_000) as i64),
            2 => Value::Real(pick(100) as f64 / 8.0),
            3..=4 => Value::Blob(bytes),
            _ => Value::Text(String::from_utf8_lossy(&bytes).into_owned()),
        }
    }

    #[test]
    fn they_answer_what_sqlites_own_answer() {
        let own = Connection::open_in_memory().unwrap();
        let bounded = Connection::open_in_memory().unwrap();
        install(&bounded).unwrap();
        let mut random = ChaCha8Rng::seed_from_u64(1);
        for _ in 0..60_000 {
            let operands = [operand(&mut random), operand(&mut random), operand(&mut random)];
            // CAST makes text that is not valid UTF-8.
            let (x, y) = if random.next_u32() % 3 == 0 {
                ("CAST(?1 AS TEXT)", "CAST(?2 AS TEXT)")
            } else {
                ("?1", "?2")
            };
            let sql = format!(
                "SELECT instr({x}, {y}), replace({x}, {y}, ?3), trim({x}, {y}), ltrim({x}, {y}), rtrim({x}, {y}),
                 unhex({x}, {y})"
            );
            let answer = |connection: &Connection| -> Vec<String> {
                connection
                    .prepare_cached(&sql)
                    .unwrap()
                    .query_row(operands.clone(), |row| {
                        (0..6).map(|column| Ok(format!("{:?}", row.get_ref(column)?))).collect()
                    })
                    .unwrap()
            };
            assert_eq!(answer(&bounded), answer(&own), "{sql} {operands:?}");
        }
    }

    #[test]
    fn operands_that_would_take_hours_are_too_big() {
        let bounded = Connection::open_in_memory().unwrap();
        install(&bounded).unwrap();
        for sql in [
            "SELECT instr(zeroblob(16000000), CAST(zeroblob(8000000) || x'01' AS BLOB))",
            "SELECT replace(hex(zeroblob(8000000)), hex(zeroblob(4000000)) || '1', '')",
            "SELECT trim(hex(zeroblob(8000000)), replace(hex(zeroblob(500000)), '0', 'x'))",
            "SELECT unhex(hex(zeroblob(8000000)), hex(zeroblob(4000000)))",
        ] {
            let error = bounded.query_row(sql, [], |_| Ok(())).unwrap_err().to_string();
            assert!(error.contains("too big"), "{sql}: {error}");
        }
    }
}
