//! Our output beside that of the sqlite3 program.

use std::{io::Write, process::Command};

use proptest::prelude::*;

use super::*;

/// Creates a table of everything that is printed in some special way. Its REALs are such that sqlite3 3.40, which
/// computes in long double, gets all of the twenty digits right that JSON shows.
const SPECIAL: &str = "\
create table t(a, \"b c\", d);
insert into t values(1,'x',2.0),(null,'it''s \"q\", z',1e20),('','a b',-1.5e-7),
 (9223372036854775807,'a,b',123456789012345678.0),(100000000000000.0,1e15,1e16),(0.0001,0.00000762939453125,-0.0),
 (x'6162','é'||char(10)||'two',0.5),('tab\tx',char(13)||char(10)||'q','\\'),
 ('a very long text that does not fit into sixty characters, and is continued on the next line','é','');
";
const SELECTS: [&str; 4] = [
    "select * from t",
    "select 1 as one, 2 as \"a long name\"",
    "select * from t where 0",
    "select 'y' as \"o\"\"ne\", null as two",
];

const MODES: [(Mode, &str); 6] = [
    (Mode::List, "list"),
    (Mode::Csv, "csv"),
    (Mode::Json, "json"),
    (Mode::Line, "line"),
    (Mode::Column, "column"),
    (Mode::Table, "table"),
];

/// What the sqlite3 program prints. `make test` installs it.
fn sqlite3(option: Option<&str>, script: &str) -> String {
    let mut command = Command::new("sqlite3");
    command.args(["-batch", "-init", "/dev/null"]).args(option).arg(":memory:");
    command.stdin(std::process::Stdio::piped()).stdout(std::process::Stdio::piped());
    let mut child = command.spawn().expect("the sqlite3 program is installed");
    child.stdin.take().unwrap().write_all(script.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{script}");
    String::from_utf8(output.stdout).unwrap()
}

/// What we print for the same statements, executed by the SQLite that is linked into this test.
fn ours(format: Format, setup: &str, selects: &[&str]) -> String {
    let connection = rusqlite::Connection::open_in_memory().unwrap();
    connection.execute_batch(setup).unwrap();
    let mut out = Vec::new();
    for select in selects {
        let mut statement = connection.prepare(select).unwrap();
        let names: Vec<_> = statement.column_names().iter().map(|name| (*name).to_owned()).collect();
        let columns = names.iter().map(|name| Column { name: name.clone(), declared_type: String::new() });
        let mut printer = Printer::new(format, columns.collect());
        let mut rows = statement.query(()).unwrap();
        while let Some(row) = rows.next().unwrap() {
            let values = (0..names.len()).map(|column| value(row.get_ref(column).unwrap())).collect();
            printer.row(&Row(crate::api::Row { values }), &mut out).unwrap();
        }
        printer.end(&mut out).unwrap();
    }
    String::from_utf8(out).unwrap()
}

fn value(value: rusqlite::types::ValueRef<'_>) -> Value {
    use rusqlite::types::ValueRef;
    let kind = match value {
        ValueRef::Null => None,
        ValueRef::Integer(integer) => Some(Kind::Integer(integer)),
        ValueRef::Real(real) => Some(Kind::Real(real)),
        ValueRef::Text(text) => Some(Kind::Text(String::from_utf8(text.to_vec()).unwrap())),
        ValueRef::Blob(bytes) => Some(Kind::Blob(bytes.to_vec().into())),
    };
    Value { kind }
}

fn dotted(mode: Mode, headers: Option<bool>) -> Format {
    let mut format = Format::option(Mode::List);
    if let Some(shown) = headers {
        format.set_headers(shown);
    }
    format.set_mode(mode);
    format
}

#[test]
fn each_mode_prints_as_sqlite3_does_with_its_option() {
    let script = format!("{SPECIAL}{};", SELECTS.join(";"));
    for (mode, name) in MODES {
        let theirs = sqlite3(Some(&format!("-{name}")), &script);
        assert_eq!(ours(Format::option(mode), SPECIAL, &SELECTS), theirs, "{name}");
    }
}

#[test]
fn each_mode_prints_as_sqlite3_does_after_the_dot_command() {
    for (mode, name) in MODES {
        for (headers, said) in [(None, ""), (Some(true), ".headers on\n"), (Some(false), ".headers off\n")] {
            let script = format!("{SPECIAL}{said}.mode {name}\n{};", SELECTS.join(";"));
            assert_eq!(
                ours(dotted(mode, headers), SPECIAL, &SELECTS),
                sqlite3(None, &script),
                "{name} {said}"
            );
        }
    }
}

/// Captured from sqlite3 3.40.1; later versions show control characters in other ways.
#[test]
fn control_characters_and_nul_print_as_sqlite3_3_40_prints_them() {
    let setup = "create table t(a, b); insert into t values(x'61620063', char(1)||'\\'), (char(9), 'c'||char(0)||'d');";
    for (mode, expected) in [
        (Mode::List, "ab|\u{1}\\\n\t|c\n"),
        (Mode::Csv, "ab,\"\u{1}\\\"\n\"\t\",c\n"),
        (Mode::Json, "[{\"a\":\"ab\\u0000c\",\"b\":\"\\u0001\\\\\"},\n{\"a\":\"\\t\",\"b\":\"c\"}]\n"),
        (Mode::Line, "    a = ab\n    b = \u{1}\\\n\n    a = \t\n    b = c\n"),
        (Mode::Column, "ab         \n          \\\n\n          c\n"),
    ] {
        assert_eq!(ours(Format::option(mode), setup, &["select * from t"]), expected, "{mode:?}");
    }
}

/// Values as SQL literals, of every storage class that has readable ones.
fn literal() -> impl Strategy<Value = String> {
    prop_oneof![
        Just("null".to_owned()),
        any::<i64>()
            .prop_filter("SQLite has no literal for it", |value| *value != i64::MIN)
            .prop_map(|value| value.to_string()),
        // Of at most twelve digits: at the edge of the fifteenth, sqlite3 3.40 does not always round correctly.
        (-1_000_000_000_000i64..1_000_000_000_000, -20..20).prop_map(|(digits, e)| format!("{digits}e{e}")),
        (-100_000i32..100_000).prop_map(|value| format!("{:?}", f64::from(value) / 64.0)),
        "[ -~é€\n\t]{0,30}".prop_map(|text| format!("'{}'", text.replace('\'', "''"))),
    ]
}

proptest! {
    // Each case starts six processes.
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn random_rows_print_as_sqlite3_prints_them(rows in prop::collection::vec((literal(), literal(), literal()), 1..8)) {
        let rows: Vec<_> = rows.iter().map(|(a, b, c)| format!("({a},{b},{c})")).collect();
        let setup = format!("create table t(a, b, c); insert into t values{};", rows.join(","));
        // See SPECIAL: of JSON's twenty digits sqlite3 3.40 gets the last ones wrong.
        let select = "select * from t";
        for (mode, name) in MODES.into_iter().filter(|(mode, _)| *mode != Mode::Json) {
            let theirs = sqlite3(Some(&format!("-{name}")), &format!("{setup}{select};"));
            prop_assert_eq!(ours(Format::option(mode), &setup, &[select]), theirs, "{}", name);
        }
    }
}
