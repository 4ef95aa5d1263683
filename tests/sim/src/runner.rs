//! Runs histories: one, or many on several threads; and makes a failing one smaller.

use std::{
    cell::RefCell,
    fmt,
    ops::Range,
    panic::{self, AssertUnwindSafe},
    path::{Path, PathBuf},
    sync::{
        Once,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
};

use crate::{
    cluster::{Cluster, Figures},
    options::Options,
};

/// Where files cost no disk: histories open thousands of databases.
const MEMORY: &str = "/dev/shm";

/// A history in which a promise was broken.
#[derive(Clone, Debug)]
pub struct Failure {
    /// What brings it about again.
    pub options: Options,
    /// Which promise, and where.
    pub reason: String,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}\n  again: cargo run -p sim -- {}", self.reason, self.options)
    }
}

/// What many histories came to.
#[derive(Clone, Debug, Default)]
pub struct Summary {
    /// How many were run to their end.
    pub histories: u64,
    /// Their figures, added up.
    pub total: Figures,
    /// The first ones that failed, by thread.
    pub failures: Vec<Failure>,
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Figures { operations, faults, entries, elections, duplicates, .. } = self.total;
        let Figures { starts, snapshots, comparisons, refusals, simulated_ms, .. } = self.total;
        let struck: Vec<String> =
            self.total.strikes.each().map(|(kind, times)| format!("{kind:?} {times}")).collect();
        writeln!(f, "faults by kind: {}", struck.join(", "))?;
        let missing = self.total.strikes.missing();
        if !missing.is_empty() {
            writeln!(f, "NEVER TRIED: {missing:?}")?;
        }
        write!(
            f,
            "{} histories, {} violations; {operations} operations, {faults} faults, {entries} entries, {elections} \
             elections, {starts} starts, {snapshots} snapshots installed, {duplicates} repeated requests, \
             {comparisons} whole databases compared, {refusals} damaged nodes that refused to start, {} simulated \
             minutes",
            self.histories,
            self.failures.len(),
            simulated_ms / 60_000
        )
    }
}

impl Figures {
    fn add(&mut self, other: &Self) {
        let pairs = [
            (&mut self.operations, other.operations),
            (&mut self.faults, other.faults),
            (&mut self.entries, other.entries),
            (&mut self.elections, other.elections),
            (&mut self.duplicates, other.duplicates),
            (&mut self.starts, other.starts),
            (&mut self.snapshots, other.snapshots),
            (&mut self.comparisons, other.comparisons),
            (&mut self.refusals, other.refusals),
            (&mut self.events, other.events),
            (&mut self.simulated_ms, other.simulated_ms),
        ];
        self.strikes.add(&other.strikes);
        for (sum, figure) in pairs {
            *sum += figure;
        }
    }
}

thread_local! {
    /// While a history runs on this thread: what a panic in it said.
    static LAST_PANIC: RefCell<Option<String>> = const { RefCell::new(None) };
}

/// Runs one history.
pub fn run(options: &Options) -> Result<Figures, Failure> {
    catch_panics();
    let directory = scratch();
    let run = || Cluster::new(options, directory.path()).run();
    LAST_PANIC.set(Some(String::new()));
    let result = panic::catch_unwind(AssertUnwindSafe(run));
    let reason = LAST_PANIC.take().unwrap_or_default();
    result.map_err(|_| Failure { options: options.clone(), reason })
}

/// A panic is how a broken promise shows; it becomes the failure's reason instead of noise.
fn catch_panics() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let before = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            let in_history = LAST_PANIC
                .with_borrow_mut(|last| last.as_mut().map(|last| *last = info.to_string()).is_some());
            if !in_history {
                before(info);
            }
        }));
    });
}

fn scratch() -> tempfile::TempDir {
    let memory = PathBuf::from(MEMORY);
    let parent = if Path::is_dir(&memory) { memory } else { std::env::temp_dir() };
    tempfile::Builder::new()
        .prefix("resqlite-sim-")
        .tempdir_in(parent)
        .expect("there is room for a simulation")
}

/// Runs the histories of these seeds, all alike but for the seed, on so many threads. A thread that finds a failure
/// makes it smaller, and all stop.
pub fn run_many(like: &Options, seeds: Range<u64>, threads: usize) -> Summary {
    let next = AtomicU64::new(seeds.start);
    let stop = AtomicBool::new(false);
    let work = || {
        let mut summary = Summary::default();
        while !stop.load(Ordering::Relaxed) {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed >= seeds.end {
                break;
            }
            match run(&Options { seed, ..like.clone() }) {
                Ok(figures) => {
                    summary.histories += 1;
                    summary.total.add(&figures);
                }
                Err(failure) => {
                    stop.store(true, Ordering::Relaxed);
                    eprintln!("{failure}\nmaking it smaller");
                    summary.failures.push(shrink(failure));
                }
            }
        }
        summary
    };
    thread::scope(|scope| {
        let running: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        let mut all = Summary::default();
        for thread in running {
            let part = thread.join().expect("panics in histories are caught");
            all.histories += part.histories;
            all.total.add(&part.total);
            all.failures.extend(part.failures);
        }
        all
    })
}

/// Leaves out operations and faults as long as what is left fails. A smaller history is another history, so this
/// finds a small one, not the smallest.
pub fn shrink(mut failure: Failure) -> Failure {
    let smaller = |options: Options, failure: &mut Failure| match run(&options) {
        Ok(_) => false,
        Err(found) => {
            *failure = found;
            true
        }
    };
    // Fewer faults: halves, then quarters, and so on down to single ones.
    let all = failure.options.faults;
    let mut chunk = all.div_ceil(2);
    while chunk > 0 {
        for first in (0..all).step_by(chunk as usize) {
            let mut options = failure.options.clone();
            options.without.extend(first..(first + chunk).min(all));
            if options != failure.options {
                smaller(options, &mut failure);
            }
        }
        chunk = if chunk == 1 { 0 } else { chunk.div_ceil(2) };
    }
    // Fewer operations. The faults move with them.
    while failure.options.operations > 10 {
        let operations = failure.options.operations * 3 / 4;
        let options = Options { operations, ..failure.options.clone() };
        if !smaller(options, &mut failure) {
            break;
        }
    }
    failure
}
