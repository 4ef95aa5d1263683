//! Dot commands, with the names and habits of the sqlite3 program.

use std::io::{self, Write};

use super::{
    render::Mode,
    shell::{Shell, Stop, file_output, output},
    status,
};
use crate::client::{Error, Params};

const HELP: &str = "\
.exit                    Leave the shell
.headers on|off          Turn the display of column names on or off
.help                    Show this
.indexes ?TABLE?         Show names of indexes
.mode MODE               Lay results out as: column csv json line list table
.nodes                   Show the nodes of the cluster
.output ?FILE?           Send results to FILE, or to stdout again
.quit                    Leave the shell
.read FILE               Run the SQL in FILE
.schema ?PATTERN?        Show the CREATE statements matching PATTERN
.tables ?PATTERN?        Show names of tables matching LIKE PATTERN
.timer on|off            Turn the display of the time taken on or off
BEGIN; …; COMMIT;        is gathered here, and sent as one atomic request at COMMIT
";

/// In the order in which abbreviations are resolved.
const NAMES: [&str; 12] = [
    "headers", "help", "indexes", "mode", "nodes", "output", "quit", "exit", "read", "schema", "tables",
    "timer",
];

/// Runs one line that begins with a dot.
pub async fn run(shell: &mut Shell, text: &str, line: usize) -> Result<(), Stop> {
    let words = words(text.trim_start_matches('.'));
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let Some((given, arguments)) = words.split_first() else { return Ok(()) };
    let name = NAMES.iter().find(|name| name.starts_with(given)).copied();
    let outcome = match (name, arguments) {
        (Some("exit" | "quit"), _) => return Err(Stop::Quit),
        (Some("help"), _) => return Ok(shell.out.write_all(HELP.as_bytes())?),
        (Some("headers"), [value]) => on_or_off(value).map(|shown| shell.format.set_headers(shown)),
        (Some("headers"), _) => Err("Usage: .headers on|off".into()),
        (Some("timer"), [value]) => on_or_off(value).map(|shown| shell.timer = shown),
        (Some("timer"), _) => Err("Usage: .timer on|off".into()),
        (Some("mode"), [mode]) => set_mode(shell, mode),
        (Some("mode"), []) => return Ok(writeln!(shell.out, "current output mode: {}", mode_name(shell))?),
        (Some("mode"), _) => Err("Usage: .mode MODE".into()),
        (Some("output"), [] | ["stdout"]) => return Ok(redirect(shell, None)?),
        (Some("output"), [path]) => return redirect(shell, Some(path)).map_err(|error| at(line, error)),
        (Some("output"), _) => Err("Usage: .output ?FILE?".into()),
        (Some("read"), [path]) => shell.read_file(path).await,
        (Some("read"), _) => Err("Usage: .read FILE".into()),
        (Some("nodes"), []) => return show_nodes(shell).await,
        (Some("tables"), [] | [_]) => list(shell, TABLES, arguments, Layout::Columns).await,
        (Some("indexes"), [] | [_]) => list(shell, INDEXES, arguments, Layout::Columns).await,
        (Some("schema"), [] | [_]) => list(shell, SCHEMA, arguments, Layout::Statements).await,
        _ => Err(format!("unknown command or invalid arguments:  \"{given}\". Enter \".help\" for help")),
    };
    outcome.map_err(|message| Stop::at(line, message))
}

fn at(line: usize, error: io::Error) -> Stop {
    Stop::at(line, error)
}

/// Splits as sqlite3 does: at white space, except within quotes.
fn words(text: &str) -> Vec<String> {
    let mut words = Vec::new();
    let mut rest = text.trim_start();
    while let Some(first) = rest.chars().next() {
        let (word, behind) = match first {
            '"' | '\'' => rest[1..].split_once(first).unwrap_or((&rest[1..], "")),
            _ => rest.split_once(char::is_whitespace).unwrap_or((rest, "")),
        };
        words.push(word.to_owned());
        rest = behind.trim_start();
    }
    words
}

fn on_or_off(value: &str) -> Result<bool, String> {
    match value.to_ascii_lowercase().as_str() {
        "on" | "yes" | "1" => Ok(true),
        "off" | "no" | "0" => Ok(false),
        _ => Err(format!("\"{value}\" is neither on nor off")),
    }
}

fn set_mode(shell: &mut Shell, name: &str) -> Result<(), String> {
    let mode = <Mode as clap::ValueEnum>::from_str(name, true).or_else(|_| match name {
        "columns" => Ok(Mode::Column),
        "lines" => Ok(Mode::Line),
        _ => Err("mode should be one of: column csv json line list table".to_owned()),
    })?;
    shell.format.set_mode(mode);
    Ok(())
}

fn mode_name(shell: &Shell) -> &'static str {
    match shell.format.mode() {
        Mode::Table => "table",
        Mode::Csv => "csv",
        Mode::Json => "json",
        Mode::Line => "line",
        Mode::List => "list",
        Mode::Column => "column",
    }
}

fn redirect(shell: &mut Shell, path: Option<&str>) -> io::Result<()> {
    shell.out.flush()?;
    shell.out = match path {
        None => output(Box::new(io::stdout())),
        Some(path) => file_output(path).map_err(io::Error::other)?,
    };
    Ok(())
}

async fn show_nodes(shell: &mut Shell) -> Result<(), Stop> {
    let endpoints: Vec<String> = shell.client.endpoints().map(str::to_owned).collect();
    let nodes = status::gather(&endpoints, &shell.client.sibling()).await;
    Ok(status::write_table(&nodes, &mut shell.out)?)
}

// ReSqlite's own tables are no part of what its users made.
const TABLES: &str = "SELECT name FROM sqlite_schema WHERE type IN ('table','view') \
     AND name NOT LIKE 'sqlite\\_%' ESCAPE '\\' AND name NOT LIKE '\\_resqlite\\_%' ESCAPE '\\' \
     AND name LIKE ?1 ORDER BY 1";
const INDEXES: &str = "SELECT name FROM sqlite_schema WHERE type = 'index' \
     AND tbl_name NOT LIKE '\\_resqlite\\_%' ESCAPE '\\' AND tbl_name LIKE ?1 ORDER BY 1";
const SCHEMA: &str = "SELECT sql FROM sqlite_schema WHERE sql IS NOT NULL \
     AND tbl_name NOT LIKE '\\_resqlite\\_%' ESCAPE '\\' AND tbl_name LIKE ?1 ORDER BY rowid";

enum Layout {
    /// Names, side by side.
    Columns,
    /// SQL, with its semicolon.
    Statements,
}

async fn list(shell: &mut Shell, sql: &str, arguments: &[&str], layout: Layout) -> Result<(), String> {
    let pattern = arguments.first().copied().unwrap_or("%");
    let texts = column_of(shell, sql, [pattern].into()).await.map_err(|error| error.to_string())?;
    let written = match layout {
        Layout::Columns => write_side_by_side(&texts, &mut shell.out),
        Layout::Statements => texts.iter().try_for_each(|text| writeln!(shell.out, "{text};")),
    };
    written.map_err(|error| error.to_string())
}

async fn column_of(shell: &Shell, sql: &str, params: Params) -> Result<Vec<String>, Error> {
    let mut rows = shell.client.query(sql, params).await?;
    let mut texts = Vec::new();
    while let Some(row) = rows.next().await? {
        texts.push(row.get(0)?);
    }
    Ok(texts)
}

/// Column by column, in as many columns as fit into 80 characters.
fn write_side_by_side(names: &[String], out: &mut impl Write) -> io::Result<()> {
    let width = names.iter().map(String::len).max().unwrap_or(0);
    let columns = (80 / (width + 2)).max(1);
    let rows = names.len().div_ceil(columns);
    for row in 0..rows {
        for (position, name) in names[row..].iter().step_by(rows).enumerate() {
            let separator = if position == 0 { "" } else { "  " };
            write!(out, "{separator}{name:width$}")?;
        }
        writeln!(out)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_may_be_quoted() {
        assert_eq!(words("read  \"a b.sql\" 'c d' e"), ["read", "a b.sql", "c d", "e"]);
        assert_eq!(words(" "), [""; 0]);
        assert_eq!(words("output 'unclosed"), ["output", "unclosed"]);
    }

    /// As `.tables` of sqlite3 3.40.1 prints these tables.
    #[test]
    fn names_stand_side_by_side_as_sqlite3_puts_them() {
        let names = ["aaa", "bbbbbbbbbbbb", "c", "e", "f", "g", "h", "i2", "v"].map(String::from);
        let mut out = Vec::new();
        write_side_by_side(&names, &mut out).unwrap();
        let expected = "\
aaa           c             f             h             v           
bbbbbbbbbbbb  e             g             i2          
";
        assert_eq!(String::from_utf8(out).unwrap(), expected);
    }
}
