//! Real processes, killed at any moment: everything that they called durable is there.

use std::{
    env,
    io::{BufRead, BufReader, Write as _},
    path::Path,
    process::{Command, Stdio},
};

use raft::{HardState, Log};
use raftd::store::Write;

use crate::support::{Running, entries, whole_log};

const CHILD_DIR: &str = "RESQLITE_TEST_CRASH_DIR";
const ROUNDS: u64 = 8;

/// Not a test of its own: what the killed process runs. It writes until it is killed, and says what is durable.
#[test]
fn crash_child() {
    let Ok(dir) = env::var(CHILD_DIR) else { return };
    let mut store = Running::open(Path::new(&dir)).unwrap();
    let mut last = store.reader.last_index().unwrap();
    let mut term = store.hard_state.term;
    let mut out = std::io::stdout().lock();
    for round in 0u64.. {
        // Terms change now and then, with a conflict that replaces a few entries.
        let new_term = round % 5 == 4;
        if new_term {
            term += 1;
            last -= last
                .min(store.reader.base().unwrap().index + 3)
                .min(last - store.reader.base().unwrap().index);
        }
        let hard_state =
            new_term.then_some(HardState { term, voted_for: Some(round % 3 + 1), ..HardState::new(7) });
        let len = [20, 300, 5_000, 90_000][(round % 4) as usize];
        let added = entries(last + 1..=last + 1 + round % 7, term.max(1), len);
        last += added.len() as u64;
        store.submit(Write { hard_state, entries: added, ..Write::default() }).unwrap();
        store.settle();
        writeln!(out, "durable {last} {term}").unwrap();
        out.flush().unwrap();
        if round % 40 == 39 {
            store.writer.compact(last.saturating_sub(50)).unwrap();
        }
    }
}

#[test]
fn a_killed_process_loses_nothing_that_it_called_durable() {
    let dir = tempfile::tempdir().unwrap();
    let mut seed = 0x9E37_79B9_7F4A_7C15_u64;
    for round in 0..ROUNDS {
        // One history, the same every time; where exactly the kill strikes is up to the machine.
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let lines = (seed >> 33) % 120;
        let mut child = Command::new(env::current_exe().unwrap())
            .args(["--exact", "crash::crash_child", "--nocapture"])
            .env(CHILD_DIR, dir.path())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut output = BufReader::new(child.stdout.take().unwrap());
        let mut reported = None;
        let mut line = String::new();
        for _ in 0..lines {
            line.clear();
            assert!(output.read_line(&mut line).unwrap() > 0, "round {round}: the child ended by itself");
            reported = parse(&line).or(reported);
        }
        child.kill().unwrap();
        child.wait().unwrap();
        // What was said before the kill struck counts, too.
        for line in output.lines().map_while(Result::ok) {
            reported = parse(&line).or(reported);
        }

        let store = Running::open(dir.path()).unwrap();
        let log = whole_log(&store.reader);
        if let Some((last, term)) = reported {
            assert!(store.hard_state.term >= term, "round {round}: the term went back");
            // A later term may have begun to replace the end of the log.
            let replaced = store.hard_state.term > term;
            assert!(replaced || store.reader.last_index().unwrap() >= last, "round {round}: {last} is lost");
        }
        for found in log {
            let expected = crate::support::entry(found.index, found.term, found.payload.len());
            assert!(found == expected, "round {round}: index {} differs", found.index);
        }
        store.stop();
    }
}

fn parse(line: &str) -> Option<(u64, u64)> {
    // The test harness writes "test crash::crash_child ... " before the first line.
    let (_, numbers) = line.split_once("durable ")?;
    let (last, term) = numbers.trim().split_once(' ')?;
    Some((last.parse().ok()?, term.parse().ok()?))
}
