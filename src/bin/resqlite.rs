//! The resqlite program: everything it does is in [`resqlite::cli`].

use std::process::ExitCode;

fn main() -> ExitCode {
    resqlite::cli::main()
}
