//! The `galleonfs` program. It parses, builds and runs; what it can do is in the library beside it.

use std::process::ExitCode;

use clap::Parser;
use galleonfs_cli::{Arguments, run};

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match run(arguments) {
        Ok(code) => code,
        Err(error) => {
            // `{:#}` puts the chain of causes on one line: what was being done first, why it failed last.
            eprintln!("galleonfs: {error:#}");
            ExitCode::FAILURE
        }
    }
}
