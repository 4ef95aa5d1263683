//! The shell without its prompt: works through input, sends batches, prints results.

use std::{
    fs::File,
    io::{self, BufWriter, IsTerminal, Write},
    path::Path,
    process::ExitCode,
    time::Instant,
};

use indicatif::ProgressBar;

use super::{
    EXIT_BROKEN_PIPE,
    batch::{Batch, Mark},
    dot,
    input::{Input, Piece},
    progress,
    render::{Format, Printer},
};
use crate::client::{Client, Error, Event, Script};

/// Where results go.
pub type Output = BufWriter<Box<dyn Write + Send>>;

/// How deep `.read` may nest; sqlite3 has the same bound.
const MAX_DEPTH: usize = 25;
const OUTPUT_BUFFER_BYTES: usize = 64 << 10;

/// One thing that a shell was started for.
#[derive(Debug)]
pub enum Job<'a> {
    /// SQL from the command line.
    Text(&'a str),
    /// A file of SQL.
    File(&'a Path),
    /// Standard input.
    Input(Input),
}

/// Why a shell does not go on.
#[derive(Debug)]
pub enum Stop {
    /// Something went wrong, on this line of the input.
    Failed {
        /// From 1; 0 when it is not about a line.
        line: usize,
        /// What.
        message: String,
    },
    /// The results cannot be written.
    Output(io::Error),
    /// `.quit`.
    Quit,
}

impl From<io::Error> for Stop {
    fn from(error: io::Error) -> Self {
        Self::Output(error)
    }
}

impl Stop {
    /// A failure that is about a line.
    pub fn at(line: usize, message: impl ToString) -> Self {
        Self::Failed { line, message: message.to_string() }
    }
}

/// A session with a cluster.
pub struct Shell {
    /// The connection to the cluster.
    pub client: Client,
    /// How results are laid out.
    pub format: Format,
    /// Where they go.
    pub out: Output,
    /// Whether each batch's time is shown.
    pub timer: bool,
    /// Whether errors name lines: a person at a prompt has none.
    pub at_prompt: bool,
    batch: Batch,
    /// As the session's last `PRAGMA foreign_keys` left it.
    foreign_keys: Option<bool>,
    depth: usize,
    progress: Option<ProgressBar>,
}

impl Shell {
    /// A session that has not begun; results go to stdout.
    pub fn new(client: Client, format: Format) -> Self {
        Self {
            client,
            format,
            out: output(Box::new(io::stdout())),
            timer: false,
            at_prompt: false,
            batch: Batch::default(),
            foreign_keys: None,
            depth: 0,
            progress: None,
        }
    }

    /// Does everything that it was started for, up to the first error.
    pub async fn run_all<'a>(mut self, jobs: impl IntoIterator<Item = Job<'a>>) -> ExitCode {
        let mut outcome = Ok(());
        for job in jobs {
            outcome = self.run_job(job).await;
            if outcome.is_err() {
                break;
            }
        }
        let unfinished = self.batch.drop_block();
        if let (Ok(()), Some(line)) = (&outcome, unfinished) {
            outcome = Err(Stop::at(line, "BEGIN without COMMIT: nothing of this transaction was applied"));
        }
        self.finish(outcome)
    }

    /// Works through one file, shows a bar for it, and names it in errors.
    pub async fn import(mut self, path: &Path) -> ExitCode {
        let file = path.display();
        let (mut input, length) = match Input::file(path) {
            Ok(opened) => opened,
            Err(error) => return super::fail(&format!("{file} cannot be read: {error}")),
        };
        self.progress = Some(progress::bar(Some(length)));
        let mut outcome = self.run_input(&mut input).await;
        let unfinished = self.batch.drop_block();
        if let (Ok(()), Some(line)) = (&outcome, unfinished) {
            outcome = Err(Stop::at(line, "BEGIN without COMMIT"));
        }
        if let Err(Stop::Failed { line: line @ 1.., message }) = outcome {
            let extent = "what is before this line is applied, except for its own BEGIN … COMMIT";
            outcome = Err(Stop::at(0, format!("{file}:{line}: {message}; {extent}")));
        }
        self.finish(outcome)
    }

    /// Writes what is left, reports what went wrong, and turns it into an exit status.
    pub fn finish(&mut self, outcome: Result<(), Stop>) -> ExitCode {
        if let Some(progress) = self.progress.take() {
            progress.finish_and_clear();
        }
        match (outcome, self.out.flush()) {
            (Ok(()) | Err(Stop::Quit), Ok(())) => ExitCode::SUCCESS,
            (Err(failed @ Stop::Failed { .. }), _) => {
                self.report(&failed);
                ExitCode::FAILURE
            }
            (Err(Stop::Output(error)), _) | (_, Err(error)) if error.kind() == io::ErrorKind::BrokenPipe => {
                ExitCode::from(EXIT_BROKEN_PIPE)
            }
            (Err(Stop::Output(error)), _) | (_, Err(error)) => {
                super::fail(&format!("cannot write results: {error}"))
            }
        }
    }

    /// Prints a failure, behind the results that came before it.
    pub fn report(&mut self, stop: &Stop) {
        if let Some(progress) = &self.progress {
            progress.finish_and_clear();
        }
        // A broken output is reported when the shell ends.
        let _ = self.out.flush();
        match stop {
            Stop::Failed { line: 1.., message } if self.at_prompt && self.depth == 0 => {
                eprintln!("Error: {message}")
            }
            Stop::Failed { line: 0, message } => eprintln!("Error: {message}"),
            Stop::Failed { line, message } => eprintln!("Error: near line {line}: {message}"),
            Stop::Output(error) => eprintln!("Error: cannot write results: {error}"),
            Stop::Quit => {}
        }
    }

    async fn run_job(&mut self, job: Job<'_>) -> Result<(), Stop> {
        match job {
            Job::Text(text) => self.run_input(&mut Input::text(text)).await,
            Job::Input(mut input) => self.run_input(&mut input).await,
            Job::File(path) => {
                let path = path.to_str().ok_or_else(|| Stop::at(0, "the file's name is not valid UTF-8"))?;
                let (mut input, length) = open(path).map_err(|message| Stop::at(0, message))?;
                // On a terminal that shows the results as well, a bar would only be in their way.
                if io::stderr().is_terminal() && !io::stdout().is_terminal() {
                    self.progress = Some(progress::bar(Some(length)));
                }
                self.run_input(&mut input).await
            }
        }
    }

    /// `.read`: works through another file.
    pub async fn read_file(&mut self, path: &str) -> Result<(), String> {
        if self.depth >= MAX_DEPTH {
            return Err(format!("input nesting limit of {MAX_DEPTH} reached"));
        }
        let (mut input, _) = open(path)?;
        self.depth += 1;
        // Boxed because a file may read further files.
        let outcome = Box::pin(self.run_input(&mut input)).await;
        self.depth -= 1;
        match outcome {
            Ok(()) | Err(Stop::Quit) => Ok(()),
            Err(Stop::Failed { line: 0, message }) => Err(format!("{path}: {message}")),
            Err(Stop::Failed { line, message }) => Err(format!("{path}: near line {line}: {message}")),
            Err(Stop::Output(error)) => Err(error.to_string()),
        }
    }

    /// Works through an input to its end.
    pub async fn run_input(&mut self, input: &mut Input) -> Result<(), Stop> {
        loop {
            if self.run_what_is_there(input).await? {
                return self.send().await;
            }
            if !input.has_more_now() {
                // Whoever writes our input may be waiting for the results.
                self.send().await?;
                self.out.flush()?;
            }
            input
                .read_more()
                .await
                .map_err(|error| Stop::at(0, format!("cannot read the input: {error}")))?;
        }
    }

    /// Works through the pieces that have been read. Returns whether that was all there will be.
    pub async fn run_what_is_there(&mut self, input: &mut Input) -> Result<bool, Stop> {
        loop {
            match input.next() {
                Piece::Statement { text, line, end } => {
                    self.batch.push(text, Mark { line, end });
                    if self.batch.is_full() || self.timer {
                        self.send().await?;
                    }
                }
                Piece::Dot { text, line } => {
                    let command = text.to_owned();
                    self.send().await?;
                    dot::run(self, &command, line).await?;
                }
                Piece::More => return Ok(false),
                Piece::End => return Ok(true),
                Piece::Broken { line, reason } => {
                    self.send().await?;
                    return Err(Stop::at(line, reason));
                }
            }
        }
    }

    /// Whether a BEGIN waits for its COMMIT.
    pub fn is_in_block(&self) -> bool {
        self.batch.open_block().is_some()
    }

    /// Forgets statements that were not sent.
    pub fn forget_batch(&mut self) {
        self.batch.clear();
    }

    /// Sends the statements that were gathered, and prints what comes back.
    pub async fn send(&mut self) -> Result<(), Stop> {
        let Some((sql, marks)) = self.batch.take() else { return Ok(()) };
        let begun = Instant::now();
        let outcome = self.run_sql(sql, &marks).await;
        if self.timer && outcome.is_ok() {
            writeln!(self.out, "Run Time: real {:.3}", begun.elapsed().as_secs_f64())?;
        }
        outcome
    }

    async fn run_sql(&mut self, sql: String, marks: &[Mark]) -> Result<(), Stop> {
        let script = Script::new(sql).foreign_keys(self.foreign_keys);
        // Should nothing be said of a statement, it is the first that was not completed.
        let mut completed = 0;
        let mut run = match self.client.run(script).await {
            Ok(run) => run,
            Err(error) => return Err(failure(error, marks, completed)),
        };
        let mut printer: Option<Printer> = None;
        loop {
            let event = run.next().await;
            if !matches!(event, Ok(Some(Event::Row(_))))
                && let Some(printer) = printer.take()
            {
                printer.end(&mut self.out)?;
            }
            match event {
                Ok(Some(Event::Row(row))) => {
                    let Some(printer) = &mut printer else { continue };
                    printer.row(&row, &mut self.out)?;
                }
                Ok(Some(Event::Columns { columns, .. })) => {
                    printer = Some(Printer::new(self.format, columns))
                }
                Ok(Some(Event::Done(done))) => {
                    self.foreign_keys = Some(done.foreign_keys);
                    completed = done.statement as usize;
                    self.show_progress(marks, completed);
                }
                Ok(None) => return Ok(()),
                Err(error) => return Err(failure(error, marks, completed)),
            }
        }
    }

    fn show_progress(&self, marks: &[Mark], completed: usize) {
        let mark = completed.checked_sub(1).and_then(|last| marks.get(last));
        if let (Some(progress), Some(mark)) = (&self.progress, mark) {
            progress.set_position(mark.end);
        }
    }
}

/// An error at the line of its statement.
fn failure(error: Error, marks: &[Mark], completed: usize) -> Stop {
    let named = error.sql_error().map_or(0, |sql| sql.statement as usize);
    let position = if named > 0 { named - 1 } else { completed };
    let mark = marks.get(position).or(marks.last());
    Stop::at(mark.map_or(0, |mark| mark.line), error)
}

/// A writer for results.
pub fn output(to: Box<dyn Write + Send>) -> Output {
    BufWriter::with_capacity(OUTPUT_BUFFER_BYTES, to)
}

/// A writer into a new file.
pub fn file_output(path: &str) -> Result<Output, String> {
    let file = File::create(path).map_err(|error| format!("cannot open \"{path}\": {error}"))?;
    Ok(output(Box::new(file)))
}

fn open(path: &str) -> Result<(Input, u64), String> {
    Input::file(Path::new(path)).map_err(|error| format!("cannot open \"{path}\": {error}"))
}

#[cfg(test)]
mod tests;
