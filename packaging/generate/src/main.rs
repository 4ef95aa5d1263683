//! Writes the manual pages and the shell completions of the three programs
//! into a directory, from the definitions that the programs parse with. It
//! knows nothing of what the programs do.

use std::{env, fs, io, path::Path, process::ExitCode};

use clap::{Command, CommandFactory};
use clap_complete::Shell;
use clap_mangen::Man;

fn main() -> ExitCode {
    let Some(directory) = env::args_os().nth(1) else {
        eprintln!("usage: generate DIRECTORY");
        return ExitCode::from(64);
    };
    match generate(Path::new(&directory)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("generate: {}: {error}", directory.display());
            ExitCode::FAILURE
        }
    }
}

/// `man/NAME.SECTION`, and `completions/SHELL/FILE` as each shell names it.
fn generate(directory: &Path) -> io::Result<()> {
    let man = directory.join("man");
    fs::create_dir_all(&man)?;
    let programs = [
        (raftd::arguments::Arguments::command(), "8"),
        (sqlited::arguments::Arguments::command(), "8"),
        (resqlite::cli::command(), "1"),
    ];
    for (mut command, section) in programs {
        // Subcommands know their full names once the whole is built.
        command.build();
        write_pages(&man, &command, section)?;
        write_completions(&directory.join("completions"), command)?;
    }
    Ok(())
}

/// A page for the command and one for each subcommand below it, such as `resqlite-raft-propose`.
fn write_pages(directory: &Path, command: &Command, section: &str) -> io::Result<()> {
    let title = command.get_display_name().unwrap_or_else(|| command.get_name());
    let page = Man::new(command.clone()).title(title.to_uppercase()).section(section);
    let source = concat!("resqlite ", env!("CARGO_PKG_VERSION"));
    page.source(source).manual("ReSqlite").generate_to(directory)?;
    for subcommand in command.get_subcommands().filter(|subcommand| subcommand.get_name() != "help") {
        write_pages(directory, subcommand, section)?;
    }
    Ok(())
}

fn write_completions(directory: &Path, mut command: Command) -> io::Result<()> {
    let name = command.get_name().to_owned();
    for (shell, place) in [(Shell::Bash, "bash"), (Shell::Zsh, "zsh"), (Shell::Fish, "fish")] {
        let file = match shell {
            Shell::Zsh => format!("_{name}"),
            Shell::Fish => format!("{name}.fish"),
            _ => name.clone(),
        };
        let mut text = Vec::new();
        clap_complete::generate(shell, &mut command, &name, &mut text);
        fs::create_dir_all(directory.join(place))?;
        fs::write(directory.join(place).join(file), text)?;
    }
    Ok(())
}
