//! The shell with its prompt: line editing, history, and Ctrl-C.

use std::{
    env, fs,
    io::{self, Write},
    path::PathBuf,
    process::ExitCode,
};

use rustyline::{Config, DefaultEditor, error::ReadlineError};

use super::{
    input::Input,
    shell::{Shell, Stop},
};

const HISTORY_LINES: usize = 10_000;

/// Talks with a person until they leave.
pub async fn run(mut shell: Shell) -> ExitCode {
    shell.at_prompt = true;
    let mut editor = match editor() {
        Ok(editor) => editor,
        Err(error) => return super::fail(&format!("cannot use the terminal: {error}")),
    };
    let history = history_path();
    if let Some(path) = &history {
        // Nobody has a history the first time.
        let _ = editor.load_history(path);
    }
    println!(
        "ReSqlite {}, connected to {}",
        env!("CARGO_PKG_VERSION"),
        shell.client.endpoints().collect::<Vec<_>>().join(", ")
    );
    println!("Enter \".help\" for usage hints.");

    let (editor, outcome) = talk(&mut shell, editor).await;
    if let (Some(mut editor), Some(path)) = (editor, history)
        && let Err(error) = save_history(&mut editor, &path)
    {
        eprintln!("cannot save the history in {}: {error}", path.display());
    }
    shell.finish(outcome)
}

/// Reads lines and runs what they hold. Gives the editor back, unless reading failed badly.
async fn talk(shell: &mut Shell, mut editor: DefaultEditor) -> (Option<DefaultEditor>, Result<(), Stop>) {
    let mut input = Input::typed();
    loop {
        let prompt = match (input.is_in_statement(), shell.is_in_block()) {
            (true, _) => "     ...> ",
            // The statements wait for COMMIT.
            (false, true) => "resqlite*> ",
            (false, false) => "resqlite> ",
        };
        // On a thread of its own, so that the connection stays alive meanwhile.
        let reading = tokio::task::spawn_blocking(move || {
            let line = editor.readline(prompt);
            (editor, line)
        });
        let line = match reading.await {
            Ok((returned, line)) => {
                editor = returned;
                line
            }
            Err(error) => return (None, Err(Stop::at(0, format!("cannot read the terminal: {error}")))),
        };
        match line {
            Ok(line) => input.push_line(&line),
            Err(ReadlineError::Interrupted) => {
                forget(shell, &mut input);
                continue;
            }
            Err(ReadlineError::Eof) => return (Some(editor), Ok(())),
            Err(error) => {
                return (Some(editor), Err(Stop::at(0, format!("cannot read the terminal: {error}"))));
            }
        }
        match run_typed(shell, &mut input).await {
            Ok(()) => {}
            Err(Stop::Failed { line, message }) => {
                shell.report(&Stop::Failed { line, message });
                forget(shell, &mut input);
            }
            Err(stop) => return (Some(editor), Err(stop)),
        }
    }
}

/// What was typed on the line of an error, and a block that was begun, must be typed again.
fn forget(shell: &mut Shell, input: &mut Input) {
    if shell.is_in_block() {
        eprintln!("The transaction that was begun is dropped.");
    }
    shell.forget_batch();
    *input = Input::typed();
}

async fn run_typed(shell: &mut Shell, input: &mut Input) -> Result<(), Stop> {
    let work = async {
        shell.run_what_is_there(input).await?;
        shell.send().await?;
        shell.out.flush().map_err(Stop::from)
    };
    tokio::select! {
        outcome = work => outcome,
        _ = tokio::signal::ctrl_c() => {
            Err(Stop::at(0, "interrupted; whether a write that was under way is applied is not known"))
        }
    }
}

fn editor() -> rustyline::Result<DefaultEditor> {
    let config = Config::builder().auto_add_history(true).max_history_size(HISTORY_LINES)?.build();
    DefaultEditor::with_config(config)
}

/// As the XDG base directory specification has it for state.
fn history_path() -> Option<PathBuf> {
    let state = env::var_os("XDG_STATE_HOME").map(PathBuf::from).filter(|path| path.is_absolute());
    let state = state.or_else(|| Some(PathBuf::from(env::var_os("HOME")?).join(".local/state")))?;
    Some(state.join("resqlite").join("history"))
}

fn save_history(editor: &mut DefaultEditor, path: &PathBuf) -> io::Result<()> {
    if let Some(directory) = path.parent() {
        fs::create_dir_all(directory)?;
    }
    editor.save_history(path).map_err(io::Error::other)
}
