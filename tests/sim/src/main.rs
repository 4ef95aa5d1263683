//! `sim`: runs many histories, or one again.
//!
//! `sim seeds=100000` runs that many; `sim seed=17 without=3-5` runs one, as a failure report says.

use std::{process::ExitCode, thread, time::Instant};

use sim::{Options, run_many};

fn main() -> ExitCode {
    match simulate(std::env::args().skip(1).collect()) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("sim: {error}");
            ExitCode::from(2)
        }
    }
}

fn simulate(mut words: Vec<String>) -> Result<ExitCode, String> {
    let mut take = |name: &str| -> Result<Option<u64>, String> {
        let Some(at) =
            words.iter().position(|word| word.strip_prefix(name).is_some_and(|rest| rest.starts_with('=')))
        else {
            return Ok(None);
        };
        let word = words.remove(at);
        let value = &word[name.len() + 1..];
        value.parse().map(Some).map_err(|_| format!("{name}: \"{value}\" is not a number"))
    };
    let cores = thread::available_parallelism().map_or(1, usize::from);
    let threads = take("threads")?.map_or(cores, |threads| threads as usize);
    let seeds = take("seeds")?.unwrap_or(1);
    let options = Options::parse(words.iter().map(String::as_str))?;
    let began = Instant::now();
    let summary = run_many(&options, options.seed..options.seed + seeds, threads.max(1));
    for failure in &summary.failures {
        println!("{failure}");
    }
    println!("{summary}; {:.1} s on {threads} threads", began.elapsed().as_secs_f64());
    Ok(if summary.failures.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
