//! A want of memory stops the node and is no result. In a binary of its own: the limit is the process's.

#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

mod machine;

use machine::{Machine, content};
use sqlited::{
    apply::ApplyError,
    sqlite_ffi::{limit_memory, memory_used},
};

#[test]
fn a_want_of_memory_stops_the_node_and_is_no_result() {
    let setup = ["CREATE TABLE t(id INTEGER PRIMARY KEY, a)", "CREATE INDEX i ON t(a)"];
    let hungry = "WITH RECURSIVE n(i) AS (VALUES (1) UNION ALL SELECT i + 1 FROM n WHERE i < 100)
                  INSERT INTO t(a) SELECT group_concat(hex(randomblob(1000))) OVER (ORDER BY i DESC ROWS 20 PRECEDING) FROM n";
    let mut calm = Machine::new();
    calm.ok(&setup);
    let request = calm.request_atomic(&["INSERT INTO t(a) VALUES (1)", hungry]);
    let log = [calm.entry(request)];
    let expected = calm.try_apply(&log).unwrap().remove(0).reply;
    assert_eq!(expected.error, None);

    let mut failures = 0;
    for spare in [0, 10_000, 50_000, 100_000, 200_000, 500_000] {
        let mut machine = Machine::new();
        machine.ok(&setup);
        limit_memory(memory_used() + spare);
        let mut applied = Vec::new();
        let attempt = machine.applier.apply(&log, &mut applied);
        limit_memory(0);
        if let Err(error) = attempt {
            failures += 1;
            assert!(matches!(&error, ApplyError::Environment { index: 2, .. }), "{error}");
            assert!(applied.is_empty());
            machine.applier.apply(&log, &mut applied).unwrap();
        }
        assert_eq!(applied[0].reply, expected);
        assert!(content(&machine.path()) == content(&calm.path()), "{spare} spare bytes");
    }
    assert!(failures > 2, "only {failures} attempts failed");
}
