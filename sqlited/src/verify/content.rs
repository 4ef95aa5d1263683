//! What a database's content comes to: a hash for each table, over every stored value.
//!
//! It knows SQLite's catalogue, and nothing of markers and of other nodes.

use std::time::Instant;

use blake3::Hasher;
use resqlite::api::TableHash;
use rusqlite::{Connection, types::ValueRef};

use crate::limits::SNAPSHOT_MAX;

/// Why there is no hash.
#[derive(Debug, thiserror::Error)]
pub enum Interrupted {
    /// SQLite's reason.
    #[error("the database cannot be read: {0}")]
    Sqlite(#[from] rusqlite::Error),
    /// The view kept the write-ahead log from being written back for too long.
    #[error("hashing took longer than {} s, the longest that a view may be held", SNAPSHOT_MAX.as_secs())]
    TooLong,
}

/// A hash for the schema, under an empty name, and one for each table that is stored, by name. All rows with
/// their rowids; the server's own tables too, but for the one that tells where this node stands.
pub fn content_hashes(connection: &Connection) -> Result<Vec<TableHash>, Interrupted> {
    let began = Instant::now();
    let schema = "SELECT type, name, tbl_name, sql FROM sqlite_schema ORDER BY type, name, tbl_name";
    let mut schema = hash_rows(connection, schema, began)?;
    for pragma in ["SELECT user_version FROM pragma_user_version", "SELECT * FROM pragma_application_id"] {
        schema.update(hash_rows(connection, pragma, began)?.finalize().as_bytes());
    }
    let mut hashes = vec![table_hash("", &schema)];
    let mut tables = connection.prepare(
        "SELECT s.name, l.wr FROM sqlite_schema s JOIN pragma_table_list l ON l.name = s.name AND l.schema = 'main'
         WHERE s.type = 'table' AND s.rootpage > 0 AND s.name <> '_resqlite_meta' ORDER BY s.name",
    )?;
    let tables: Vec<(String, bool)> =
        tables.query_map([], |row| Ok((row.get(0)?, row.get(1)?)))?.collect::<rusqlite::Result<_>>()?;
    for (name, without_rowid) in tables {
        let sql = select_all(connection, &name, without_rowid)?;
        hashes.push(table_hash(&name, &hash_rows(connection, &sql, began)?));
    }
    Ok(hashes)
}

/// One hash for all of them.
pub fn sum(tables: &[TableHash]) -> blake3::Hash {
    let mut hasher = Hasher::new();
    for TableHash { name, hash } in tables {
        add_bytes(&mut hasher, b"t", name.as_bytes());
        add_bytes(&mut hasher, b"h", hash);
    }
    hasher.finalize()
}

fn table_hash(name: &str, hasher: &Hasher) -> TableHash {
    TableHash { name: name.to_owned(), hash: hasher.finalize().as_bytes().to_vec().into() }
}

/// Every stored value of a table, in the order of the table itself and not of an index.
fn select_all(connection: &Connection, table: &str, without_rowid: bool) -> rusqlite::Result<String> {
    // 1: hidden; 2: generated when it is read, from the others.
    let mut columns =
        connection.prepare("SELECT name FROM pragma_table_xinfo(?1) WHERE hidden NOT IN (1, 2)")?;
    let columns: Vec<String> =
        columns.query_map([table], |row| row.get(0))?.collect::<rusqlite::Result<_>>()?;
    // A column may be called rowid, and then is not the rowid.
    let is_free = |name: &&str| !columns.iter().any(|column| column.eq_ignore_ascii_case(name));
    let rowid = ["rowid", "_rowid_", "oid"].into_iter().find(is_free).filter(|_| !without_rowid);
    let quoted = |name: &str| format!("\"{}\"", name.replace('"', "\"\""));
    let selected: Vec<String> =
        rowid.map(str::to_owned).into_iter().chain(columns.iter().map(|column| quoted(column))).collect();
    Ok(format!("SELECT {} FROM {} NOT INDEXED", selected.join(", "), quoted(table)))
}

/// Hashes the rows of a query: each value with its type and length, so that no two contents look alike.
fn hash_rows(connection: &Connection, sql: &str, began: Instant) -> Result<Hasher, Interrupted> {
    let mut hasher = Hasher::new();
    let mut statement = connection.prepare(sql)?;
    let columns = statement.column_count();
    let mut rows = statement.query([])?;
    let mut count = 0u64;
    while let Some(row) = rows.next()? {
        for column in 0..columns {
            match row.get_ref(column)? {
                ValueRef::Null => add_bytes(&mut hasher, b"n", &[]),
                ValueRef::Integer(integer) => add_bytes(&mut hasher, b"i", &integer.to_le_bytes()),
                // The bits, so that -0.0 is not 0.0.
                ValueRef::Real(real) => add_bytes(&mut hasher, b"r", &real.to_bits().to_le_bytes()),
                ValueRef::Text(text) => add_bytes(&mut hasher, b"t", text),
                ValueRef::Blob(blob) => add_bytes(&mut hasher, b"b", blob),
            }
        }
        count += 1;
        if count.is_multiple_of(1_024) && began.elapsed() > SNAPSHOT_MAX {
            return Err(Interrupted::TooLong);
        }
    }
    hasher.update(&count.to_le_bytes());
    Ok(hasher)
}

fn add_bytes(hasher: &mut Hasher, kind: &[u8], bytes: &[u8]) {
    hasher.update(kind).update(&(bytes.len() as u64).to_le_bytes()).update(bytes);
}

#[cfg(test)]
mod tests {
    use super::*;

    const SCHEMA: &str = "CREATE TABLE t(a INTEGER PRIMARY KEY, b, c AS (b || 'x')); CREATE INDEX tb ON t(b);
        CREATE TABLE u(rowid, _rowid_); CREATE TABLE w(a PRIMARY KEY, b) WITHOUT ROWID;
        CREATE TABLE e(a); INSERT INTO t(a, b) VALUES (1, 'one'), (2, x'00'), (3, NULL), (4, 0.5);
        INSERT INTO u(oid, rowid, _rowid_) VALUES (7, 'a', 'b'); INSERT INTO w VALUES (2, 1), (1, 2)";

    fn hashes_after(sql: &str) -> Vec<TableHash> {
        let connection = Connection::open_in_memory().unwrap();
        connection.execute_batch(SCHEMA).unwrap();
        connection.execute_batch(sql).unwrap();
        content_hashes(&connection).unwrap()
    }

    fn differing(sql: &str) -> Vec<String> {
        let (before, after) = (hashes_after(""), hashes_after(sql));
        let changed = after.into_iter().filter(|hash| !before.contains(hash));
        changed.map(|hash| hash.name).collect()
    }

    #[test]
    fn any_change_of_the_content_changes_the_hash_of_its_table() {
        assert_eq!(differing("SELECT 1"), Vec::<String>::new());
        for sql in [
            "UPDATE t SET b = 'one ' WHERE a = 1",
            "UPDATE t SET b = CAST(b AS BLOB) WHERE a = 1",
            "UPDATE t SET b = '' WHERE a = 3",
            "UPDATE t SET a = 9 WHERE a = 4",
            "DELETE FROM t WHERE a = 4",
        ] {
            assert_eq!(differing(sql), ["t"], "{sql}");
        }
        assert_eq!(differing("UPDATE u SET oid = 8"), ["u"]);
        assert_eq!(differing("UPDATE w SET b = 3 WHERE a = 1"), ["w"]);
        assert_eq!(differing("INSERT INTO e VALUES (NULL)"), ["e"]);
        assert_eq!(differing("CREATE INDEX ta ON t(a, b)"), [""]);
        assert_eq!(differing("PRAGMA user_version = 3"), [""]);
    }

    #[test]
    fn what_only_the_file_knows_changes_no_hash() {
        let sql =
            "INSERT INTO e VALUES (1); DELETE FROM e; INSERT INTO t(a) VALUES (9); DELETE FROM t WHERE a = 9";
        assert_eq!(differing(sql), Vec::<String>::new());
    }
}
