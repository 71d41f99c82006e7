//! The binary under test.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;

/// Where the binary is: `HIGHWATER_BIN`, or built now with the cargo that runs the tests.
fn binary() -> &'static Path {
    static BINARY: OnceLock<PathBuf> = OnceLock::new();
    BINARY.get_or_init(|| match std::env::var_os("HIGHWATER_BIN") {
        Some(path) => path.into(),
        None => build(),
    })
}

fn build() -> PathBuf {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command.args(["build", "--package", "highwater", "--bin", "highwater", "--message-format", "json"]);
    command.current_dir(env!("CARGO_MANIFEST_DIR")).stderr(Stdio::inherit());
    if !cfg!(debug_assertions) {
        command.arg("--release");
    }
    let output = command.output().expect("cargo runs");
    assert!(output.status.success(), "highwater cannot be built");
    let text = String::from_utf8(output.stdout).expect("cargo prints UTF-8");
    let path = text
        .lines()
        .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok())
        .find_map(|message| message["executable"].as_str().map(PathBuf::from));
    path.expect("cargo names the executable that it built")
}

/// A command line of the binary under test.
pub fn highwater_command<S: AsRef<std::ffi::OsStr>>(args: &[S]) -> Command {
    let mut command = Command::new(binary());
    command.args(args);
    command
}

/// Runs the binary under test and returns what it prints.
///
/// # Panics
/// When it fails.
pub fn highwater(args: &[&str]) -> String {
    super::tools::succeed(highwater_command(args))
}
