//! What the manual says of security is tried by the tests that it names.

use std::{
    fs,
    path::{Path, PathBuf},
};

/// The Rust sources of a directory and below, by their files.
fn files(directory: &Path) -> Vec<(PathBuf, String)> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory).unwrap() {
        let path: PathBuf = entry.unwrap().path();
        if path.is_dir() {
            found.extend(files(&path));
        } else if path.extension().is_some_and(|ending| ending == "rs") {
            let text = fs::read_to_string(&path).unwrap();
            found.push((path, text));
        }
    }
    found
}

fn sources(directory: &Path) -> String {
    files(directory).into_iter().map(|(_, text)| text).collect()
}

#[test]
fn unsafe_code_is_in_one_file_and_each_block_says_why_it_is_sound() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let manifest = fs::read_to_string(root.join("Cargo.toml")).unwrap();
    assert!(manifest.contains("unsafe_code = \"deny\""), "the compiler refuses it everywhere else");
    let mut blocks = 0;
    for (path, text) in ["src", "raftd", "sqlited", "packaging", "tests"]
        .iter()
        .flat_map(|directory| files(&root.join(directory)))
        .filter(|(path, _)| !path.ends_with("tests/cluster/documentation.rs"))
    {
        if !path.ends_with("sqlited/src/sqlite_ffi.rs") {
            assert!(!text.contains("(unsafe_code"), "{} allows unsafe code", path.display());
            continue;
        }
        let lines: Vec<&str> = text.lines().map(str::trim).collect();
        for (number, line) in lines.iter().enumerate().filter(|(_, line)| line.contains("unsafe {")) {
            let above = lines[..number].iter().rev().take_while(|above| !above.is_empty()).take(8);
            let said = above.into_iter().any(|above| above.contains("SAFETY"));
            assert!(said || line.contains("SAFETY"), "{}:{}: no SAFETY note", path.display(), number + 1);
            blocks += 1;
        }
    }
    assert!(blocks > 10, "{blocks} blocks");
}

#[test]
fn every_threat_in_the_security_manual_has_a_test() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let manual = fs::read_to_string(root.join("docs/security.md")).unwrap();
    let texts: String = ["src", "raftd/src", "raftd/tests", "sqlited/src", "sqlited/tests", "tests/cluster"]
        .map(|directory| sources(&root.join(directory)))
        .concat();
    let mut rows = 0;
    for table in manual.split("| Threat |").skip(1) {
        // The header's rest and the line below it are no rows.
        for row in table.lines().skip(2).take_while(|line| line.starts_with('|')) {
            let test = row.trim_end_matches(" |").rsplit("| ").next().unwrap().trim_matches('`');
            assert!(texts.contains(&format!("fn {test}()")), "no test is called {test}: {row}");
            rows += 1;
        }
    }
    assert!(rows >= 19, "{rows} rows");
}
