//! Highwater: one binary, the command line and the daemon.

mod args;
mod change_picture;
mod choices;
mod commands;
mod exit;
mod format_options;
mod http;
mod output;
mod progress;
mod repository_args;
mod size;
mod tree_picture;

use args::Cli;
use args::Verb;
use clap::Parser;
use std::ffi::OsString;
use std::io::IsTerminal;
use std::process::ExitCode;

fn main() -> ExitCode {
    let args: Vec<OsString> = std::env::args_os().collect();
    if let Some(list) = format_options::asked_for(&args) {
        return match output::line(&list) {
            Ok(()) => ExitCode::from(exit::OK),
            Err(_) => ExitCode::from(exit::FAILED),
        };
    }
    let cli = match Cli::try_parse_from(&args) {
        Ok(cli) => cli,
        Err(error) => {
            // Help and version are no errors; 2 would mean a corrupt image to who runs `check`, a fault to who runs
            // `chain verify`, and damage to who runs `repo check`.
            let code = match error.use_stderr() {
                false => exit::OK,
                true if is_verdict(&args) => exit::FAILED,
                true => exit::USAGE,
            };
            let _ = error.print();
            return ExitCode::from(code);
        }
    };
    init_log(&cli.verb);
    match commands::run(cli) {
        Ok(code) => ExitCode::from(code),
        Err(failure) => {
            eprintln!("highwater: {}", failure.text());
            ExitCode::from(failure.code())
        }
    }
}

/// Whether the verb is `check`, or of `chain` or `repo`, in a command line that was not understood.
fn is_verdict(args: &[OsString]) -> bool {
    let mut words = args.iter().skip(1).map(|arg| arg.to_string_lossy());
    while let Some(word) = words.next() {
        match &*word {
            "--api" | "--output" => {
                words.next();
            }
            word if word.starts_with('-') => {}
            word => return matches!(word, "check" | "chain" | "repo"),
        }
    }
    false
}

fn init_log(verb: &Verb) {
    use tracing_subscriber::EnvFilter;
    // Work on files ends with one line that says what went wrong; the data path's own words are for servers.
    let usual = match verb {
        Verb::Serve(_) | Verb::Daemon(_) => "warn",
        _ => "warn,formats=off",
    };
    let filter = match std::env::var("HIGHWATER_LOG") {
        Err(_) => EnvFilter::new(usual),
        Ok(wanted) => EnvFilter::try_new(&wanted).unwrap_or_else(|error| {
            eprintln!(
                "highwater: HIGHWATER_LOG={wanted:?} is not understood ({error}): expected a level such as info, or \
                 TARGET=LEVEL,…; logging warnings"
            );
            EnvFilter::new(usual)
        }),
    };
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_target(false)
        .init();
}
