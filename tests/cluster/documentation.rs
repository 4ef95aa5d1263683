//! What the manual says of security is tried by the tests that it names.

use std::{
    fs,
    path::{Path, PathBuf},
};

/// The Rust sources of a directory and below.
fn sources(directory: &Path) -> String {
    let mut found = String::new();
    for entry in fs::read_dir(directory).unwrap() {
        let path: PathBuf = entry.unwrap().path();
        if path.is_dir() {
            found.push_str(&sources(&path));
        } else if path.extension().is_some_and(|ending| ending == "rs") {
            found.push_str(&fs::read_to_string(path).unwrap());
        }
    }
    found
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
