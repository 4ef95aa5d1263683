//! A database as SQL, as the sqlite3 program's `.dump --preserve-rowids` writes it, with two differences.
//!
//! It stands in transactions of a bounded size, because one transaction is one request to a cluster. And a virtual
//! table is filled through itself, not through the tables beneath it, which need `writable_schema` and which no
//! cluster lets anybody write. What cannot be put so is refused: a dump that lacks something is none.

use std::io::{self, Write};

use rusqlite::{Connection, Row, Statement, types::ValueRef};

use super::virtual_table::VirtualTable;

/// A transaction of the dump is closed at so many bytes …
const BLOCK_BYTES: usize = 512 << 10;
/// … or so many statements.
const BLOCK_STATEMENTS: usize = 5_000;

/// Why there is no dump, or no more of it.
#[derive(Debug, thiserror::Error)]
pub enum DumpError {
    /// SQLite's reason.
    #[error("the content cannot be read: {0}")]
    Sqlite(#[from] rusqlite::Error),
    /// Whoever takes the text takes no more.
    #[error("the text cannot be written: {0}")]
    Io(#[from] io::Error),
    /// There is no SQL that makes this table again.
    #[error("the content of the table {table} cannot be put into SQL: {reason}: use `resqlite backup`")]
    Inexpressible {
        /// The table.
        table: String,
        /// Why.
        reason: &'static str,
    },
}

/// Writes everything in `connection`'s database, which must not change meanwhile.
pub fn dump(connection: &Connection, out: &mut impl Write) -> Result<(), DumpError> {
    let numbers = connection.prepare("SELECT CAST(?1 AS REAL)")?;
    let mut dump = Dump { connection, out, numbers, open: None, rebuilds: Vec::new() };
    dump.write_all()
}

struct Dump<'c, W> {
    connection: &'c Connection,
    out: &'c mut W,
    /// Says what SQLite takes a number's text for.
    numbers: Statement<'c>,
    /// How many bytes and statements the open transaction has.
    open: Option<(usize, usize)>,
    /// What full-text indexes over other tables' content need once all content is there.
    rebuilds: Vec<String>,
}

/// What sort of table it is, in the words of `PRAGMA table_list`.
struct Table {
    name: String,
    kind: String,
    without_rowid: bool,
    sql: String,
}

impl<W: Write> Dump<'_, W> {
    fn write_all(&mut self) -> Result<(), DumpError> {
        self.out.write_all(b"PRAGMA foreign_keys=OFF;\n")?;
        for pragma in ["application_id", "user_version"] {
            let value: i64 = self.connection.query_row(&format!("PRAGMA {pragma}"), [], |row| row.get(0))?;
            if value != 0 {
                writeln!(self.out, "PRAGMA {pragma}={value};")?;
            }
        }
        for table in self.tables()? {
            self.statement(table.sql.as_bytes())?;
            match table.kind.as_str() {
                "virtual" => self.virtual_table(&table)?,
                _ => self.stored_table(&table)?,
            }
        }
        self.sequences()?;
        self.statistics()?;
        for kind in ["view", "index", "trigger"] {
            for sql in
                self.texts("SELECT sql FROM sqlite_schema WHERE type = ?1 AND sql IS NOT NULL", kind)?
            {
                self.statement(sql.as_bytes())?;
            }
        }
        for rebuild in std::mem::take(&mut self.rebuilds) {
            self.statement(rebuild.as_bytes())?;
        }
        self.close()
    }

    fn tables(&self) -> rusqlite::Result<Vec<Table>> {
        let mut tables = self.connection.prepare(
            "SELECT s.name, l.type, l.wr, s.sql FROM sqlite_schema s
             JOIN pragma_table_list l ON l.name = s.name AND l.schema = 'main'
             WHERE s.type = 'table' AND l.type <> 'shadow' AND s.name NOT LIKE 'sqlite\\_%' ESCAPE '\\' ORDER BY s.rowid",
        )?;
        let table = |row: &Row<'_>| {
            Ok(Table { name: row.get(0)?, kind: row.get(1)?, without_rowid: row.get(2)?, sql: row.get(3)? })
        };
        tables.query_map([], table)?.collect()
    }

    fn texts(&self, sql: &str, parameter: &str) -> rusqlite::Result<Vec<String>> {
        self.connection.prepare(sql)?.query_map([parameter], |row| row.get(0))?.collect()
    }

    /// The columns whose values are stored.
    fn columns(&self, table: &str) -> rusqlite::Result<Vec<String>> {
        self.texts("SELECT name FROM pragma_table_xinfo(?1) WHERE hidden = 0", table)
    }

    fn stored_table(&mut self, table: &Table) -> Result<(), DumpError> {
        let columns = self.columns(&table.name)?;
        let name = quoted(&table.name);
        let listed = list(&columns);
        // A column may be called rowid, and then is not the rowid.
        let is_free = |rowid: &&str| !columns.iter().any(|column| column.eq_ignore_ascii_case(rowid));
        let rowid = ["rowid", "_rowid_", "oid"].into_iter().find(is_free);
        match rowid.filter(|_| !table.without_rowid) {
            Some(rowid) if !self.has_integer_primary_key(&table.name)? => self.rows(
                &format!("SELECT {rowid}, {listed} FROM {name} NOT INDEXED"),
                &format!("INSERT INTO {name}({rowid}, {listed}) VALUES("),
            ),
            _ => self.rows(
                &format!("SELECT {listed} FROM {name} NOT INDEXED"),
                &format!("INSERT INTO {name} VALUES("),
            ),
        }
    }

    /// Whether the rowid is one of the columns. `INTEGER PRIMARY KEY DESC` is not, but has an index
    /// (<https://sqlite.org/lang_createtable.html>, section 5).
    fn has_integer_primary_key(&self, table: &str) -> rusqlite::Result<bool> {
        let sql = "SELECT (SELECT count(*) = 1 AND max(upper(type)) = 'INTEGER' FROM pragma_table_info(?1) WHERE pk > 0)
            AND NOT EXISTS (SELECT 1 FROM pragma_index_list(?1) WHERE origin = 'pk')";
        self.connection.query_row(sql, [table], |row| row.get(0))
    }

    fn virtual_table(&mut self, table: &Table) -> Result<(), DumpError> {
        let inexpressible = |reason| DumpError::Inexpressible { table: table.name.clone(), reason };
        let definition =
            VirtualTable::parse(&table.sql).ok_or_else(|| inexpressible("its definition cannot be read"))?;
        let name = quoted(&table.name);
        let mut columns = self.columns(&table.name)?;
        match definition.module.as_str() {
            "rtree" | "rtree_i32" => {
                let listed = list(&columns);
                self.rows(
                    &format!("SELECT {listed} FROM {name} ORDER BY 1"),
                    &format!("INSERT INTO {name}({listed}) VALUES("),
                )
            }
            // They show what other tables hold.
            "fts5vocab" | "fts4aux" | "fts3tokenize" => Ok(()),
            "fts3" | "fts4" | "fts5" => {
                if definition.option("locale").is_some() {
                    return Err(inexpressible("the values' locales cannot be read"));
                }
                self.full_text_settings(&table.name, &name, &definition)?;
                match definition.option("content") {
                    Some(other) if other.is_empty() => {
                        return Err(inexpressible("it is an index that keeps no content"));
                    }
                    Some(_) => {
                        self.rebuilds.push(format!("INSERT INTO {name}({name}) VALUES('rebuild')"));
                        return Ok(());
                    }
                    None => {}
                }
                columns.extend(definition.option("languageid"));
                let listed = list(&columns);
                self.rows(
                    &format!("SELECT rowid, {listed} FROM {name} ORDER BY rowid"),
                    &format!("INSERT INTO {name}(rowid, {listed}) VALUES("),
                )
            }
            _ => Err(inexpressible("its module is not known here")),
        }
    }

    /// What was set by `INSERT INTO t(t, rank) VALUES('automerge', 8)` and the like.
    fn full_text_settings(
        &mut self,
        table: &str,
        name: &str,
        definition: &VirtualTable,
    ) -> Result<(), DumpError> {
        if definition.module != "fts5" {
            return Ok(());
        }
        let settings = quoted(&format!("{table}_config"));
        self.rows(
            &format!("SELECT k, v FROM {settings} WHERE k <> 'version'"),
            &format!("INSERT INTO {name}({name}, rank) VALUES("),
        )
    }

    /// Where AUTOINCREMENT goes on. The tables' rows have left traces there by now.
    fn sequences(&mut self) -> Result<(), DumpError> {
        let sql = "SELECT EXISTS (SELECT 1 FROM sqlite_schema WHERE name = 'sqlite_sequence')
            AND EXISTS (SELECT 1 FROM sqlite_schema WHERE type = 'table' AND sql LIKE '%autoincrement%')";
        if !self.connection.query_row(sql, [], |row| row.get(0))? {
            return Ok(());
        }
        self.statement(b"DELETE FROM sqlite_sequence")?;
        self.rows("SELECT name, seq FROM sqlite_sequence", "INSERT INTO sqlite_sequence VALUES(")
    }

    fn statistics(&mut self) -> Result<(), DumpError> {
        let sql = "SELECT EXISTS (SELECT 1 FROM sqlite_schema WHERE name = 'sqlite_stat1')";
        if !self.connection.query_row(sql, [], |row| row.get(0))? {
            return Ok(());
        }
        // Makes the table, and nothing in it.
        self.close()?;
        self.out.write_all(b"ANALYZE sqlite_schema;\n")?;
        self.rows("SELECT tbl, idx, stat FROM sqlite_stat1", "INSERT INTO sqlite_stat1 VALUES(")
    }

    fn rows(&mut self, select: &str, insert: &str) -> Result<(), DumpError> {
        let mut statement = self.connection.prepare(select)?;
        let columns = statement.column_count();
        let mut rows = statement.query([])?;
        let mut text = Vec::new();
        while let Some(row) = rows.next()? {
            text.clear();
            text.extend_from_slice(insert.as_bytes());
            for column in 0..columns {
                if column > 0 {
                    text.push(b',');
                }
                self.literal(row.get_ref(column)?, &mut text)?;
            }
            text.push(b')');
            self.statement(&text)?;
        }
        Ok(())
    }

    fn statement(&mut self, text: &[u8]) -> Result<(), DumpError> {
        let (mut bytes, mut statements) = match self.open {
            Some(open) => open,
            None => {
                self.out.write_all(b"BEGIN TRANSACTION;\n")?;
                (0, 0)
            }
        };
        self.out.write_all(text)?;
        self.out.write_all(b";\n")?;
        bytes += text.len();
        statements += 1;
        self.open = Some((bytes, statements));
        if bytes >= BLOCK_BYTES || statements >= BLOCK_STATEMENTS {
            self.close()?;
        }
        Ok(())
    }

    fn close(&mut self) -> Result<(), DumpError> {
        if self.open.take().is_some() {
            self.out.write_all(b"COMMIT;\n")?;
        }
        Ok(())
    }

    fn literal(&mut self, value: ValueRef<'_>, text: &mut Vec<u8>) -> rusqlite::Result<()> {
        match value {
            ValueRef::Null => text.extend_from_slice(b"NULL"),
            ValueRef::Integer(integer) => text.extend_from_slice(integer.to_string().as_bytes()),
            ValueRef::Real(real) => text.extend_from_slice(self.real(real)?.as_bytes()),
            ValueRef::Blob(bytes) => hex(bytes, text),
            ValueRef::Text(bytes) => match std::str::from_utf8(bytes) {
                // SQL text ends at a NUL, and the sqlite3 program drops a carriage return at a line's end.
                Ok(_) if !bytes.contains(&0) && !bytes.contains(&b'\r') => {
                    text.push(b'\'');
                    for part in bytes.split_inclusive(|byte| *byte == b'\'') {
                        text.extend_from_slice(part);
                        if part.ends_with(b"'") {
                            text.push(b'\'');
                        }
                    }
                    text.push(b'\'');
                }
                _ => {
                    text.extend_from_slice(b"CAST(");
                    hex(bytes, text);
                    text.extend_from_slice(b" AS TEXT)");
                }
            },
        }
        Ok(())
    }

    /// A number that SQLite reads back bit by bit. Its reading of decimal digits is not always the nearest number.
    fn real(&mut self, real: f64) -> rusqlite::Result<String> {
        if real.is_infinite() {
            return Ok(if real > 0.0 { "1e999" } else { "-1e999" }.to_owned());
        }
        let shortest = format!("{real:?}");
        // Short ones stay readable; of others, more digits than are needed are the safer ones with other versions.
        let digits = shortest.bytes().take_while(|byte| *byte != b'e').filter(u8::is_ascii_digit).count();
        let candidates = if digits <= 15 {
            [shortest, format!("{real:.19e}")]
        } else {
            [format!("{real:.19e}"), shortest]
        };
        for candidate in candidates {
            let read: f64 = self.numbers.query_row([&candidate], |row| row.get(0))?;
            if read.to_bits() == real.to_bits() {
                return Ok(candidate);
            }
        }
        Ok(exact(real))
    }
}

/// A number from integers and powers of two, where every step is exact.
fn exact(real: f64) -> String {
    const STEP: u32 = 62;
    let bits = real.abs().to_bits();
    let (fraction, exponent) = (bits & ((1 << 52) - 1), (bits >> 52) as i32);
    let (mantissa, mut power) =
        if exponent == 0 { (fraction, -1_074) } else { (fraction | 1 << 52, exponent - 1_075) };
    let sign = if real.is_sign_negative() { "-" } else { "" };
    let mut text = format!("({sign}{mantissa}*1.0");
    while power != 0 {
        let step = power.unsigned_abs().min(STEP);
        let operator = if power > 0 { '*' } else { '/' };
        text += &format!("{operator}{}", 1u64 << step);
        power -= step as i32 * power.signum();
    }
    text + ")"
}

fn hex(bytes: &[u8], text: &mut Vec<u8>) {
    const DIGITS: &[u8; 16] = b"0123456789ABCDEF";
    text.extend_from_slice(b"X'");
    for byte in bytes {
        text.push(DIGITS[usize::from(byte >> 4)]);
        text.push(DIGITS[usize::from(byte & 0xf)]);
    }
    text.push(b'\'');
}

fn quoted(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

fn list(columns: &[String]) -> String {
    columns.iter().map(|column| quoted(column)).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dump_of(connection: &Connection) -> String {
        let mut text = Vec::new();
        dump(connection, &mut text).unwrap();
        String::from_utf8(text).unwrap()
    }

    fn made_by(sql: &str) -> Connection {
        let connection = Connection::open_in_memory().unwrap();
        connection.execute_batch(sql).unwrap();
        connection
    }

    #[test]
    fn every_real_number_comes_back_bit_by_bit() {
        let connection = made_by("CREATE TABLE t(a)");
        let mut seed = 1u64;
        let mut random = || {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            f64::from_bits(seed ^ seed >> 29)
        };
        let known = [
            0.0,
            -0.0,
            0.1,
            1e15,
            1e16,
            5e-324,
            f64::MIN_POSITIVE,
            f64::MAX,
            f64::INFINITY,
            -1e300,
            1.0 / 3.0,
        ];
        let reals: Vec<f64> =
            known.into_iter().chain((0..2_000).map(|_| random())).filter(|real| !real.is_nan()).collect();
        let mut insert = connection.prepare("INSERT INTO t VALUES (?1)").unwrap();
        for real in &reals {
            insert.execute([real]).unwrap();
        }
        let bits = |connection: &Connection| -> Vec<u64> {
            let mut statement = connection.prepare("SELECT a FROM t").unwrap();
            statement.query_map([], |row| row.get(0).map(f64::to_bits)).unwrap().map(Result::unwrap).collect()
        };
        assert_eq!(
            bits(&made_by(&dump_of(&connection))),
            reals.iter().map(|real| real.to_bits()).collect::<Vec<_>>()
        );
        // The last resort is exact by itself.
        for real in reals.into_iter().filter(|real| real.is_finite()) {
            let sql = format!("SELECT {}", exact(real));
            let read: f64 = connection.query_row(&sql, [], |row| row.get(0)).unwrap();
            assert_eq!(read, real, "{sql}");
        }
    }

    #[test]
    fn a_dump_of_what_a_dump_made_is_the_same() {
        let connection = made_by(
            "CREATE TABLE \"a\"\"b\"(x, \"y z\" TEXT DEFAULT 'q', g AS (x + 1) STORED);
             INSERT INTO \"a\"\"b\"(rowid, x) VALUES (7, 1), (3, NULL), (-9223372036854775808, -9223372036854775808);
             INSERT INTO \"a\"\"b\"(x, \"y z\") VALUES (x'00ff', 'it''s' || char(10) || '.quit'),
               (CAST(x'ff41' AS TEXT), 'a' || char(0) || 'b'), ('cr' || char(13), 'é');
             CREATE TABLE k(id INTEGER PRIMARY KEY AUTOINCREMENT, t); INSERT INTO k(t) VALUES (1), (2); DELETE FROM k WHERE id = 2;
             CREATE TABLE d(id INTEGER PRIMARY KEY DESC); INSERT INTO d(rowid, id) VALUES (5, 9);
             CREATE TABLE w(a, b, PRIMARY KEY (b, a)) WITHOUT ROWID; INSERT INTO w VALUES (1, 2), (2, 1);
             CREATE VIRTUAL TABLE f USING fts5(t, u); INSERT INTO f(rowid, t, u) VALUES (5, 'some words', 9);
             INSERT INTO f(f, rank) VALUES ('automerge', 8);
             CREATE VIRTUAL TABLE o USING fts5(t, content='k', content_rowid='id'); INSERT INTO o(o) VALUES ('rebuild');
             CREATE VIRTUAL TABLE r USING rtree(id, x0, x1, +note); INSERT INTO r VALUES (3, 0.1, 0.2, 'n');
             CREATE INDEX i ON k(t); CREATE VIEW v AS SELECT * FROM k;
             CREATE TRIGGER tr INSTEAD OF INSERT ON v BEGIN INSERT INTO k(t) VALUES (new.t); END;
             ANALYZE; PRAGMA user_version = 12; PRAGMA application_id = -7;",
        );
        let first = dump_of(&connection);
        let again = made_by(&first);
        assert_eq!(dump_of(&again), first);
        let hits: i64 =
            again.query_row("SELECT count(*) FROM f WHERE f MATCH 'words'", [], |row| row.get(0)).unwrap();
        assert_eq!(hits, 1);
        let text: String =
            again.query_row("SELECT group_concat(rowid) FROM \"a\"\"b\"", [], |row| row.get(0)).unwrap();
        assert_eq!(text, "-9223372036854775808,3,7,8,9,10");
        assert!(first.contains("INSERT INTO sqlite_sequence VALUES('k',2)"), "{first}");
        assert!(first.contains("INSERT INTO \"o\"(\"o\") VALUES('rebuild')"), "{first}");
    }

    #[test]
    fn what_sql_cannot_say_is_refused_by_name() {
        let connection = made_by("CREATE VIRTUAL TABLE words USING fts5(t, content='')");
        let error = dump(&connection, &mut Vec::new()).unwrap_err();
        assert!(
            error.to_string().contains("table words") && error.to_string().contains("resqlite backup"),
            "{error}"
        );
    }

    #[test]
    fn transactions_are_bounded_and_none_stays_open() {
        let connection = made_by(
            "CREATE TABLE t(a); WITH RECURSIVE n(i) AS (VALUES (1) UNION ALL SELECT i + 1 FROM n WHERE i < 12000)
             INSERT INTO t SELECT i FROM n",
        );
        let text = dump_of(&connection);
        assert_eq!(text.matches("BEGIN TRANSACTION;\n").count(), 3);
        assert_eq!(text.matches("COMMIT;\n").count(), 3);
    }
}
