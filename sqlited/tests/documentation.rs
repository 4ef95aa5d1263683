//! What the manual says of determinism is what the program does, and the tests that it names exist.

#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

use std::{
    fmt::Write,
    fs,
    path::{Path, PathBuf},
};

use sqlited::determinism::pragma::{PRAGMAS, Rule};

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn manual() -> String {
    fs::read_to_string(repository().join("docs/determinism.md")).unwrap()
}

fn in_words(rule: Rule) -> String {
    match rule {
        Rule::Read => "read".into(),
        Rule::NodeLocalRead => "read, not in a write".into(),
        Rule::Replicated => "replicated".into(),
        Rule::Request => "until its request ends".into(),
        Rule::ForeignKeys => "travels with the request".into(),
        Rule::Refused(reason) => format!("refused: {reason}"),
    }
}

#[test]
fn the_manual_lists_every_pragma_and_what_becomes_of_it() {
    let mut expected = String::from("| PRAGMA | without a value | with a value |\n| --- | --- | --- |\n");
    for pragma in PRAGMAS {
        let (plain, with_value) = (in_words(pragma.plain), in_words(pragma.with_value));
        writeln!(expected, "| `{}` | {plain} | {with_value} |", pragma.name).unwrap();
    }
    let manual = manual();
    let (_, section) = manual.split_once("## PRAGMAs").unwrap();
    let table = &section[section.find("| PRAGMA |").unwrap()..];
    assert_eq!(table, expected);
}

/// The Rust sources of a directory and below.
fn sources(directory: &Path) -> Vec<String> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(sources(&path));
        } else if path.extension().is_some_and(|ending| ending == "rs") {
            found.push(fs::read_to_string(path).unwrap());
        }
    }
    found
}

#[test]
fn every_test_that_the_manual_names_exists() {
    let mut texts = sources(&repository().join("sqlited"));
    texts.extend(sources(&repository().join("tests/cluster")));
    let manual = manual();
    // A test's name is a sentence; nothing else between backquotes has so many words.
    let names: Vec<&str> = manual
        .split('`')
        .skip(1)
        .step_by(2)
        .filter(|name| name.matches('_').count() >= 3 && !name.contains('/'))
        .collect();
    assert!(names.len() > 50, "{} names", names.len());
    for name in names {
        let function = format!("fn {name}()");
        assert!(texts.iter().any(|text| text.contains(&function)), "no test is called {name}");
    }
}
