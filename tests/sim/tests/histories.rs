//! Whole clusters under faults: many histories, the ones that once failed, and proof that a history replays.
//!
//! `SIM_HISTORIES=100000 cargo test -p sim --test histories` runs more.

use std::{env, thread};

use sim::{Defect, Options, Summary, run, run_many};

/// Histories that once found a bug, as their reports named them.
const REGRESSIONS: [&str; 0] = [];

/// Enough for every defect that is seeded on purpose to show, with room to spare.
const HISTORIES_TO_CONVICT: u64 = 60;

fn threads() -> usize {
    thread::available_parallelism().map_or(1, usize::from)
}

fn assert_no_violations(summary: &Summary) {
    println!("{summary}");
    let failures: Vec<String> = summary.failures.iter().map(ToString::to_string).collect();
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

#[test]
fn histories_that_once_failed() {
    for words in REGRESSIONS {
        let options = Options::parse(words.split(' ')).expect("a report's options can be read");
        run(&options).unwrap_or_else(|failure| panic!("{failure}"));
    }
}

#[test]
fn the_same_seed_is_the_same_history() {
    for seed in 0..3 {
        let [first, second] = [(), ()].map(|()| run(&Options::new(seed)).expect("no promise is broken"));
        assert_eq!(first, second, "seed {seed}");
    }
}

#[test]
fn a_history_without_faults_keeps_every_promise() {
    let calm = Options { faults: 0, ..Options::new(0) };
    let summary = run_many(&calm, 0..20, threads());
    assert_no_violations(&summary);
    assert_eq!(summary.total.faults, 0);
}

#[test]
fn every_promise_is_kept_under_faults() {
    let histories = env::var("SIM_HISTORIES").map_or(2_000, |number| number.parse().expect("a number"));
    let summary = run_many(&Options::new(0), 0..histories, threads());
    assert_no_violations(&summary);
    // A simulation in which nothing happens would keep every promise, too.
    let Summary { histories, total, .. } = summary;
    assert!(total.operations >= histories * 900, "{total:?}");
    assert!(total.faults >= histories * 49, "{total:?}");
    if histories >= 1_000 {
        assert_eq!(total.strikes.missing(), [], "a kind of fault was never tried");
    }
    for (what, figure) in [
        ("elections", total.elections),
        ("snapshots", total.snapshots),
        ("repeated requests", total.duplicates),
        ("comparisons", total.comparisons),
    ] {
        assert!(figure >= histories, "too few {what}: {total:?}");
    }
}

#[test]
fn what_daemons_must_not_do_is_convicted() {
    for defect in Defect::ALL {
        let seeded = Options { defect: Some(defect), ..Options::new(0) };
        let convicted =
            (0..HISTORIES_TO_CONVICT).find_map(|seed| run(&Options { seed, ..seeded.clone() }).err());
        let failure = convicted.unwrap_or_else(|| panic!("{defect:?} was not noticed"));
        println!("{defect:?}: {failure}");
    }
}

#[test]
fn what_a_report_says_can_be_read_back() {
    let mut options = Options::new(17);
    options.without.extend([0, 3, 4, 5, 9]);
    let text = options.to_string();
    assert_eq!(text, "seed=17 operations=1000 faults=50 without=0,3-5,9");
    assert_eq!(Options::parse(text.split(' ')), Ok(options));
}
