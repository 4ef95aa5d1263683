//! What a statement is, by examples and against SQLite's own parser.

use proptest::prelude::*;
use rusqlite::fallible_iterator::FallibleIterator;

use super::*;

fn texts(text: &str) -> Vec<&str> {
    statements(text).map(|statement| statement.text).collect()
}

#[test]
fn a_semicolon_ends_a_statement() {
    assert_eq!(texts("select 1; select 2;\nselect 3;"), ["select 1;", "select 2;", "select 3;"]);
}

#[test]
fn pieces_without_a_token_are_skipped() {
    assert_eq!(texts(""), [""; 0]);
    assert_eq!(texts(" \t\r\n\u{c} ;; ; -- nothing ; here\n /* nor ; here */ ;"), [""; 0]);
    assert_eq!(texts("-- to the end"), [""; 0]);
    assert_eq!(texts("/* to the end"), [""; 0]);
    assert_eq!(texts(";;select 1;;"), ["select 1;"]);
    assert_eq!(texts("\u{feff}select 1;"), ["select 1;"]);
}

#[test]
fn a_semicolon_in_quotes_or_comments_ends_nothing() {
    for text in [
        "select ';';",
        "select 'it''s; so';",
        "select \"a;\"\"b\" from t;",
        "select `a;b`;",
        "select [a;'b];",
        "select 1 -- one; more\n;",
        "select 1 /* ; */ + /*;*/ 2;",
        "select 1 /*/ ; */;",
        "select '--;', '/*;';",
        "select 1 - -1 / 2;",
    ] {
        assert_eq!(texts(text), [text]);
        assert_eq!(texts(&format!("{text} select 2;")), [text, "select 2;"]);
    }
}

#[test]
fn a_trigger_ends_with_its_end() {
    for create in [
        "create trigger",
        "CREATE TEMP TRIGGER",
        "create temporary/**/trigger",
        "explain create trigger",
        "explain query plan create trigger",
    ] {
        let text = format!(
            "{create} r after insert on t begin update t set a=1; select case when 1 then 2 end; end;"
        );
        assert_eq!(texts(&format!("{text}select 1;")), [text.as_str(), "select 1;"]);
        let spaced = text.replace("; end;", " ; --\n /* ; */ EnD /**/ ;");
        assert_eq!(texts(&format!("{spaced}select 1;")), [spaced.as_str(), "select 1;"]);
    }
    assert_eq!(texts("create table trigger_end(a); end; x"), ["create table trigger_end(a);", "end;", "x"]);
    let unfinished = "create trigger r begin select 1; end_ ; endless;";
    assert_eq!(texts(unfinished), [unfinished]);
}

#[test]
fn the_last_statement_may_be_incomplete() {
    for text in
        ["select 1", "select ';", "select \"x;", "select [;", "select 1 /* ;", "create trigger t begin x;"]
    {
        let found: Vec<_> = statements(text).collect();
        assert_eq!(found, [Statement { text, offset: 0, line: 1, complete: false }]);
    }
    assert_eq!(texts("select 1 \n\n "), ["select 1"]);
}

#[test]
fn a_statement_knows_its_offset_and_line() {
    let text = "-- one\n\nselect\n1;\n  select 2; /*\n\n*/ select 3";
    let found: Vec<_> = statements(text).map(|statement| (statement.line, statement.offset)).collect();
    assert_eq!(found, [(3, 8), (5, 20), (7, 37)]);
}

/// The cases of SQLite's own `test/main.test`, section main-1, which test `sqlite3_complete()`.
#[test]
fn is_complete_answers_as_sqlite3_complete_does() {
    for text in [
        ";",
        "select 1;",
        "DROP TABLE 'xyz';",
        "DROP TABLE \"xy;z\";",
        "/* ; */ ;",
        "hi; -- x",
        "\n/*\n**\n*/;",
        "DROP TABLE 'xyz' ; -- no\n",
        "create trigger xyz as begin hello; end;",
        "create trigger xyz as begin hello; world; end;",
        "explain select 1;",
        "/* a */ select 1; -- b",
    ] {
        assert!(is_complete(text), "{text}");
    }
    for text in [
        "",
        "  ",
        "-- ;",
        "DROP TABLE xyz",
        "DROP TABLE \"xy;z",
        "DROP TABLE 'xyz",
        "DROP TABLE xyz; /* begin",
        "/* ; */",
        "create trigger xyz as begin hello; world;",
        "create trigger xyz as begin hello; end",
        "select [x;",
    ] {
        assert!(!is_complete(text), "{text}");
    }
}

#[test]
fn the_first_keyword_is_found_behind_comments() {
    assert_eq!(first_keyword(" -- x\n\tBEGIN;"), "BEGIN");
    assert_eq!(first_keyword("commit"), "commit");
    assert_eq!(first_keyword("'begin'"), "");
    assert_eq!(first_keyword("-- begin"), "");
    assert_eq!(first_keyword("select1"), "select");
}

/// Feeds a text piece by piece, as a shell reads it, and returns what was found.
fn fed(text: &str, cuts: &[usize]) -> Vec<(usize, String)> {
    let mut found = Vec::new();
    let (mut scanner, mut held, mut start) = (Scanner::new(), String::new(), None);
    let mut ends: Vec<usize> =
        cuts.iter().map(|cut| text.floor_char_boundary(cut % (text.len() + 1))).collect();
    ends.sort_unstable();
    ends.push(text.len());
    let mut fed = 0;
    for (nth, end) in ends.iter().enumerate() {
        held.push_str(&text[fed..*end]);
        fed = *end;
        let last = nth + 1 == ends.len();
        loop {
            if start.is_none() {
                start = scanner.find_start(&held, last).map(|start| (start, scanner.line()));
            }
            let Some((from, line)) = start else { break };
            let Some(to) = scanner.find_end(&held, last) else { break };
            found.push((line, held[from..to].to_owned()));
            start = None;
            scanner.forget(&held, to);
            held.drain(..to);
        }
    }
    if let Some((from, line)) = start {
        found.push((line, held[from..].trim_end().to_owned()));
    }
    found
}

/// Tokens that matter to the machine, and some that look like them.
fn tokens() -> impl Strategy<Value = String> {
    let token = prop::sample::select(vec![
        ";",
        " ",
        "\n",
        "'",
        "\"",
        "`",
        "[",
        "]",
        "-",
        "--",
        "/",
        "*",
        "/*",
        "*/",
        "create",
        "CREATE ",
        "temp ",
        "temporary ",
        "trigger ",
        "end",
        "end;",
        "explain ",
        "x",
        "é",
        "\u{feff}",
        "$1",
        "_",
        "1",
        "begin",
        ".",
    ]);
    prop::collection::vec(token, 0..40).prop_map(|tokens| tokens.concat())
}

/// Statements that SQLite can prepare, with everything around them that may hide a semicolon.
fn script() -> impl Strategy<Value = String> {
    let piece = prop::sample::select(vec![
        "select 1",
        "select ';' as \"a;b\"",
        "select 'it''s;' as [x;y]",
        "select 1 -- c;\n",
        "select /* ; ' */ 2",
        "explain select `;` from (select 1 as `;`)",
        "create table if not exists t(a, \"b;\")",
        "create trigger if not exists r after insert on t begin select 1; select case a when ';' then 1 end from t; end",
        "create temp trigger if not exists q after insert on t begin delete from t where a = 'end;'; end",
        "begin",
        "end",
    ]);
    let gap = prop::sample::select(vec!["", " ", "\n", "-- x;\n", "/* ;; */", "\n\n/* ' */ "]);
    prop::collection::vec((gap.clone(), piece, gap), 0..20).prop_map(|pieces| {
        pieces.iter().map(|(before, text, after)| format!("{before}{text}{after};")).collect()
    })
}

/// How SQLite itself divides a text: `sqlite3_prepare`'s tail, statement after statement.
fn divided_by_sqlite(text: &str) -> Vec<String> {
    let connection = rusqlite::Connection::open_in_memory().unwrap();
    connection.execute_batch("create table t(a, \"b;\")").unwrap();
    let mut batch = rusqlite::Batch::new(&connection, text);
    let mut found = Vec::new();
    while let Some(statement) = batch.next().unwrap() {
        let sql = statement.expanded_sql().unwrap();
        found.push(statements(&sql).next().unwrap().text.to_owned());
    }
    found
}

proptest! {
    #[test]
    fn a_script_is_divided_as_sqlite_divides_it(text in script()) {
        prop_assert_eq!(texts(&text), divided_by_sqlite(&text));
    }

    #[test]
    fn statements_cover_every_token(text in tokens()) {
        let mut end = 0;
        for statement in statements(&text) {
            prop_assert_eq!(&text[statement.offset..statement.offset + statement.text.len()], statement.text);
            prop_assert_eq!(statement.line, 1 + text[..statement.offset].matches('\n').count());
            prop_assert!(statements(&text[end..statement.offset]).next().is_none());
            end = statement.offset + statement.text.len();
            // Taken by itself, it is one statement, and the same one.
            let alone: Vec<_> = statements(statement.text).map(|alone| (alone.text, alone.complete)).collect();
            prop_assert_eq!(alone, vec![(statement.text, statement.complete)]);
        }
    }

    #[test]
    fn the_pieces_in_which_a_text_arrives_change_nothing(text in tokens(), cuts in prop::collection::vec(0usize..200, 0..10)) {
        let whole: Vec<_> = statements(&text).map(|found| (found.line, found.text.to_owned())).collect();
        prop_assert_eq!(fed(&text, &cuts), whole);
    }
}
