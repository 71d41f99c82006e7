//! Other people's programs that judge our images.

use serde_json::Value;
use std::path::Path;
use std::process::{Command, Output};

/// Whether a program is installed. If it is not, the test fails, unless `HIGHWATER_ALLOW_SKIP=1` allows it to
/// be left out; the reason is printed.
///
/// # Panics
/// When it is absent and skipping is not allowed.
pub fn available(program: &str) -> bool {
    if Command::new(program).arg("--version").output().is_ok_and(|o| o.status.success()) {
        return true;
    }
    let allowed = std::env::var("HIGHWATER_ALLOW_SKIP").is_ok_and(|v| v == "1");
    assert!(allowed, "{program} is not installed; install it, or set HIGHWATER_ALLOW_SKIP=1 to leave this test out");
    eprintln!("skipped: {program} is not installed and HIGHWATER_ALLOW_SKIP=1 is set");
    false
}

/// Runs `qemu-img` with these arguments.
///
/// # Panics
/// When it cannot be started.
pub fn qemu_img<A: AsRef<std::ffi::OsStr>>(arguments: impl IntoIterator<Item = A>) -> Output {
    Command::new("qemu-img").args(arguments).output().expect("qemu-img runs")
}

/// Runs `qemu-img` and returns what it printed.
///
/// # Panics
/// When it fails.
pub fn qemu_img_ok<A: AsRef<std::ffi::OsStr>>(arguments: impl IntoIterator<Item = A>) -> String {
    let arguments: Vec<_> = arguments.into_iter().map(|a| a.as_ref().to_owned()).collect();
    let output = qemu_img(&arguments);
    assert!(output.status.success(), "qemu-img {arguments:?}: {}", text(&output));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

/// What `qemu-img check` found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Checked {
    /// Errors that lose data or may do so.
    pub corruptions: u64,
    /// Clusters that nobody uses.
    pub leaks: u64,
    /// Errors met by the check itself.
    pub check_errors: u64,
    /// All that it printed.
    pub report: String,
}

impl Checked {
    /// No errors; leaks are allowed, as after a crash.
    ///
    /// # Panics
    /// When there are errors.
    pub fn assert_sound(&self) {
        assert_eq!((self.corruptions, self.check_errors), (0, 0), "qemu-img check: {}", self.report);
    }

    /// No errors and no leaks, as after a clean close.
    ///
    /// # Panics
    /// When there is any.
    pub fn assert_clean(&self) {
        self.assert_sound();
        assert_eq!(self.leaks, 0, "qemu-img check: {}", self.report);
    }
}

/// Lets `qemu-img check` judge an image.
///
/// # Panics
/// When it cannot be run or does not answer.
pub fn check(path: &Path, format: &str) -> Checked {
    let output = Command::new("qemu-img")
        .args(["check", "--output=json", "-f", format])
        .arg(path)
        .output()
        .expect("qemu-img runs");
    let report = text(&output);
    let answer: Value = serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|error| panic!("qemu-img check of {}: {error}: {report}", path.display()));
    let number = |name: &str| answer[name].as_u64().unwrap_or(0);
    Checked { corruptions: number("corruptions"), leaks: number("leaks"), check_errors: number("check-errors"), report }
}

/// Whether `qemu-img compare` finds the same contents; differing sizes are equal if the rest is zero.
///
/// # Panics
/// When it cannot compare.
pub fn equal(a: &Path, a_format: &str, b: &Path, b_format: &str) -> bool {
    let output = Command::new("qemu-img")
        .args(["compare", "-f", a_format, "-F", b_format])
        .args([a, b])
        .output()
        .expect("qemu-img runs");
    match output.status.code() {
        Some(0) => true,
        Some(1) => false,
        _ => panic!("qemu-img compare of {} and {}: {}", a.display(), b.display(), text(&output)),
    }
}

/// What `qemu-img info` says.
///
/// # Panics
/// When it fails.
pub fn info(path: &Path, format: &str) -> Value {
    let path = path.to_str().expect("test paths are UTF-8");
    serde_json::from_str(&qemu_img_ok(["info", "--output=json", "-f", format, path])).expect("JSON")
}

/// What `qemu-img map` says: an array of extents.
///
/// # Panics
/// When it fails.
pub fn map(path: &Path, format: &str) -> Vec<Value> {
    let path = path.to_str().expect("test paths are UTF-8");
    let answer: Value = serde_json::from_str(&qemu_img_ok(["map", "--output=json", "-f", format, path])).expect("JSON");
    answer.as_array().expect("an array").clone()
}
