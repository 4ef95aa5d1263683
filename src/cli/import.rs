//! `resqlite import`: rows from a CSV file, or the statements of an SQL file.
//!
//! CSV goes in as with sqlite3's `.import --csv`: a table that is not there is made from the first row, every value is
//! text until its column's affinity makes something else of it, values that are missing are NULL. Unlike there, the
//! first row that cannot be inserted ends it. Rows are inserted in requests that are all or nothing, so that what is
//! in already can be told exactly. Knows CSV only as records.

use std::{
    fs::File,
    io::{self, BufReader},
    path::{Path, PathBuf},
    process::ExitCode,
};

use indicatif::ProgressBar;

use super::{
    Endpoints, connect,
    csv::{Problem, Record, Records},
    fail, format_of, progress, shell,
};
use crate::client::{Client, Error, Statement, Value};

/// Rows are inserted in requests of at most so many …
const BATCH_ROWS: usize = 1_000;
/// … and about so many bytes.
const BATCH_BYTES: usize = 512 << 10;
/// After so many warnings the others are only counted.
const MAX_WARNINGS: u64 = 10;
const READ_BYTES: usize = 256 << 10;

#[derive(Debug, clap::Args)]
pub struct Arguments {
    #[command(flatten)]
    cluster: Endpoints,
    /// A file of comma-separated values (.csv), or of SQL (.sql)
    #[arg(value_name = "FILE")]
    file: PathBuf,
    /// The table for the rows of a .csv [default: the file's name]
    #[arg(long, value_name = "TABLE")]
    table: Option<String>,
    /// Leave out so many rows at the beginning of a .csv; a header is one
    #[arg(long, value_name = "ROWS", default_value_t = 0)]
    skip: u64,
}

/// Why an import ended early.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error(transparent)]
    Cluster(#[from] Error),
    #[error("{} cannot be read: {error}", .file.display())]
    Unreadable { file: PathBuf, error: io::Error },
    #[error("{}: the file is empty, and there is no table {table} to take the columns from", .file.display())]
    Empty { file: PathBuf, table: String },
    /// Everything before these rows is in, and nothing from there on.
    #[error("{}:{line}: {reason}; {extent}", .file.display())]
    Row { file: PathBuf, line: u64, reason: String, extent: Extent },
    /// A request was answered by nobody.
    #[error("{}:{first}: {error}: the rows of the lines {first} to {last} are in, all of them, or none is; {extent}", .file.display())]
    Unknown { file: PathBuf, first: u64, last: u64, error: Error, extent: Extent },
}

/// What is in.
#[derive(Clone, Copy, Debug, Default)]
struct Extent {
    imported: u64,
    /// How many rows of the file are dealt with: those, what was skipped, and the header.
    done: u64,
}

impl std::fmt::Display for Extent {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self { imported: 0, done: 0 } => write!(f, "nothing is imported"),
            Self { imported, done } => {
                write!(f, "{imported} rows are imported, the rest goes in with --skip {done}")
            }
        }
    }
}

/// Runs the command.
pub async fn run(arguments: Arguments) -> ExitCode {
    let extension = arguments.file.extension().unwrap_or_default().to_ascii_lowercase();
    match extension.to_str() {
        Some("csv") => match import_csv(&arguments).await {
            Ok((table, rows)) => {
                println!("{}: {rows} rows imported into {table}", arguments.file.display());
                ExitCode::SUCCESS
            }
            Err(failure) => fail(&failure.to_string()),
        },
        Some("sql") if arguments.table.is_some() || arguments.skip > 0 => {
            fail("--table and --skip are for .csv files: an .sql file says itself what goes where")
        }
        Some("sql") => match connect(arguments.cluster.builder()).await {
            Ok(client) => shell::Shell::new(client, format_of(None, false)).import(&arguments.file).await,
            Err(error) => fail(&error.to_string()),
        },
        _ => fail(&format!("{}: the name should end in .csv or .sql", arguments.file.display())),
    }
}

/// Returns the table and how many rows went in.
async fn import_csv(arguments: &Arguments) -> Result<(String, u64), Failure> {
    let path = &arguments.file;
    let unreadable = |error| Failure::Unreadable { file: path.clone(), error };
    let source = File::open(path).map_err(unreadable)?;
    let metadata = source.metadata().map_err(unreadable)?;
    if metadata.is_dir() {
        return Err(unreadable(io::ErrorKind::IsADirectory.into()));
    }
    let name = || path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
    let table = arguments.table.clone().unwrap_or_else(name);
    let client = connect(arguments.cluster.builder()).await?;
    let mut import = Import {
        file: path,
        client,
        records: Records::new(BufReader::with_capacity(READ_BYTES, source)),
        extent: Extent::default(),
        warnings: 0,
        bar: progress::bar(Some(metadata.len())),
    };
    let outcome = import.run(&table, arguments.skip).await;
    import.bar.finish_and_clear();
    if import.warnings > MAX_WARNINGS {
        eprintln!("{}: {} rows had too few or too many values", path.display(), import.warnings);
    }
    outcome?;
    Ok((table, import.extent.imported))
}

/// Where the rows go.
struct Target {
    insert: String,
    columns: usize,
}

impl Target {
    fn new(table: &str, columns: usize) -> Self {
        let places = vec!["?"; columns].join(", ");
        Self { insert: format!("INSERT INTO {} VALUES ({places})", quote(table)), columns }
    }

    fn statement(&self, record: Record) -> Statement {
        let given = record.fields.into_iter().map(Value::Text);
        let values: Vec<Value> = given.chain(std::iter::repeat(Value::Null)).take(self.columns).collect();
        Statement::new(&self.insert, values)
    }
}

/// Rows that wait to be inserted together.
#[derive(Default)]
struct Batch {
    statements: Vec<Statement>,
    lines: Vec<u64>,
    bytes: usize,
}

impl Batch {
    fn is_full(&self) -> bool {
        self.lines.len() >= BATCH_ROWS || self.bytes >= BATCH_BYTES
    }
}

struct Import<'a> {
    file: &'a Path,
    client: Client,
    records: Records<BufReader<File>>,
    extent: Extent,
    warnings: u64,
    bar: ProgressBar,
}

impl Import<'_> {
    async fn run(&mut self, table: &str, skip: u64) -> Result<(), Failure> {
        for _ in 0..skip {
            self.next()?;
        }
        let target = self.target(table).await?;
        self.extent.done += skip;
        let mut batch = Batch::default();
        while let Some(record) = self.next()? {
            self.check(&record, target.columns);
            batch.lines.push(record.line);
            batch.bytes += target.insert.len() + record.fields.iter().map(String::len).sum::<usize>();
            batch.statements.push(target.statement(record));
            if batch.is_full() {
                self.send(std::mem::take(&mut batch)).await?;
            }
        }
        self.send(batch).await
    }

    fn next(&mut self) -> Result<Option<Record>, Failure> {
        self.records.next().map_err(|Problem { line, reason }| self.row_failure(line, reason))
    }

    /// Finds the table, or makes it from the next row.
    async fn target(&mut self, table: &str) -> Result<Target, Failure> {
        // Neither generated columns nor the hidden ones of virtual tables take values.
        let sql = "SELECT count(*) FROM pragma_table_xinfo(?1) WHERE hidden = 0";
        let found = self.client.query_one(sql, (table,)).await?;
        let columns = found.map_or(Ok(0), |row| row.get::<i64>(0))? as usize;
        if columns > 0 {
            return Ok(Target::new(table, columns));
        }
        let Some(header) = self.next()? else {
            return Err(Failure::Empty { file: self.file.to_owned(), table: table.to_owned() });
        };
        let created = self.client.execute(create_table(table, &header.fields), ()).await;
        created.map_err(|error| self.row_failure(header.line, error.to_string()))?;
        self.extent.done = 1;
        Ok(Target::new(table, header.fields.len()))
    }

    fn check(&mut self, record: &Record, expected: usize) {
        let found = record.fields.len();
        if found == expected {
            return;
        }
        self.warnings += 1;
        if self.warnings <= MAX_WARNINGS {
            let consequence = if found < expected { "filling the rest with NULL" } else { "extras ignored" };
            let (file, line) = (self.file.display(), record.line);
            let warn =
                || eprintln!("{file}:{line}: expected {expected} columns but found {found} - {consequence}");
            self.bar.suspend(warn);
        }
    }

    /// Inserts all of these rows, or none.
    async fn send(&mut self, Batch { statements, lines, .. }: Batch) -> Result<(), Failure> {
        let (Some(&first), Some(&last)) = (lines.first(), lines.last()) else { return Ok(()) };
        match self.client.execute_all(statements).await {
            Ok(_) => {
                self.extent.imported += lines.len() as u64;
                self.extent.done += lines.len() as u64;
                self.bar.set_position(self.records.position());
                Ok(())
            }
            Err(error @ (Error::OutcomeUnknown(_) | Error::Internal(_))) => {
                let (file, extent) = (self.file.to_owned(), self.extent);
                Err(Failure::Unknown { file, first, last, error, extent })
            }
            Err(error) => {
                let statement = error.sql_error().map_or(0, |sql| sql.statement as usize);
                let named = statement.checked_sub(1).and_then(|at| lines.get(at));
                Err(self.row_failure(*named.unwrap_or(&first), error.to_string()))
            }
        }
    }

    fn row_failure(&self, line: u64, reason: String) -> Failure {
        Failure::Row { file: self.file.to_owned(), line, reason, extent: self.extent }
    }
}

/// Every column is text; one without a name is called `?`, as sqlite3 calls it.
fn create_table(table: &str, header: &[String]) -> String {
    let column = |name: &String| format!("{} TEXT", quote(if name.is_empty() { "?" } else { name }));
    let columns: Vec<String> = header.iter().map(column).collect();
    format!("CREATE TABLE {}({})", quote(table), columns.join(", "))
}

fn quote(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_quoted_whatever_they_hold() {
        let header = ["a", "", "x\" INT); --"].map(str::to_owned);
        assert_eq!(
            create_table("a \"table\"", &header),
            r#"CREATE TABLE "a ""table"""("a" TEXT, "?" TEXT, "x"" INT); --" TEXT)"#
        );
    }

    #[test]
    fn missing_values_are_null_and_superfluous_ones_left_out() {
        let target = Target::new("t", 2);
        assert_eq!(target.insert, "INSERT INTO \"t\" VALUES (?, ?)");
        let statement = |fields: &[&str]| {
            let fields = fields.iter().map(|&field| field.to_owned()).collect();
            target.statement(Record { line: 1, fields })
        };
        let expected = |values: [Value; 2]| Statement::new(&target.insert, Vec::from(values));
        let text = |text: &str| Value::Text(text.to_owned());
        assert_eq!(statement(&["", "1"]), expected([text(""), text("1")]));
        assert_eq!(statement(&["1"]), expected([text("1"), Value::Null]));
        assert_eq!(statement(&["1", "2", "3"]), expected([text("1"), text("2")]));
    }

    #[test]
    fn an_early_end_says_how_to_go_on() {
        assert_eq!(Extent::default().to_string(), "nothing is imported");
        let extent = Extent { imported: 5, done: 7 };
        assert_eq!(extent.to_string(), "5 rows are imported, the rest goes in with --skip 7");
    }
}
