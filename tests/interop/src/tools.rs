//! Other people's programs: clients and judges.

use std::ffi::OsStr;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

/// What is not there for a test; `None` when all is. `python3-libnbd` stands for Python's module `nbd`.
///
/// A test returns at once when something is missing, and the reason goes to standard error.
///
/// # Panics
/// When the tool is not on the list of allowed skips.
pub fn missing(tools: &[&str]) -> Option<String> {
    let tool = tools.iter().find(|tool| !is_there(tool))?;
    let test = std::thread::current().name().unwrap_or("test").to_owned();
    let reason = format!("SKIPPED {test}: {tool} is not installed (scripts/setup-tests installs it)");
    let allowed = include_str!("../allowed-skips.txt");
    let listed = allowed.lines().map(str::trim).any(|line| !line.starts_with('#') && line == *tool);
    assert!(listed, "{reason}, and tests/interop/allowed-skips.txt does not list it");
    // Past the capture of the test runner, which shows nothing of tests that pass.
    let _ = writeln!(std::io::stderr().lock(), "\n{reason}");
    Some(reason)
}

fn is_there(tool: &str) -> bool {
    if tool == "python3-libnbd" {
        return find_python().is_some();
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    let system = [PathBuf::from("/usr/sbin"), PathBuf::from("/sbin")];
    std::env::split_paths(&path).chain(system).any(|directory| directory.join(tool).is_file())
}

/// A Python that has libnbd: the distribution's first, for its packages are made for it.
fn find_python() -> Option<&'static str> {
    ["/usr/bin/python3", "python3"].into_iter().find(|python| {
        let mut command = Command::new(python);
        command.args(["-c", "import nbd"]).stderr(Stdio::null());
        command.status().is_ok_and(|status| status.success())
    })
}

/// Runs one of `tests/scripts` in Python and returns what it prints.
///
/// # Panics
/// When it fails.
pub fn python(name: &str, args: &[&str]) -> String {
    succeed(script(name, args))
}

/// One of `tests/scripts`, to be run in Python.
///
/// # Panics
/// When no Python has libnbd.
pub fn script(name: &str, args: &[&str]) -> Command {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/scripts").join(name);
    let mut command = Command::new(find_python().expect("a Python with libnbd"));
    command.arg(path).args(args);
    command
}

/// Runs a program and returns what it prints.
///
/// # Panics
/// When it fails.
pub fn run<S: AsRef<OsStr>>(program: &str, args: &[S]) -> String {
    let mut command = Command::new(program);
    command.args(args);
    succeed(command)
}

/// Runs a program and returns its exit status with all that it prints.
///
/// # Panics
/// When it cannot be started, or a signal ends it.
pub fn run_for_status<S: AsRef<OsStr>>(program: &str, args: &[S]) -> (i32, String) {
    let mut command = Command::new(program);
    command.args(args);
    let output = output_of(&mut command);
    let status = output.status.code().unwrap_or_else(|| panic!("{command:?} ended with {}", output.status));
    (status, printed(&output))
}

pub(crate) fn succeed(mut command: Command) -> String {
    let output = output_of(&mut command);
    assert!(output.status.success(), "{command:?} ended with {}:\n{}", output.status, printed(&output));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn output_of(command: &mut Command) -> Output {
    // e2fsprogs live where not every user looks.
    let path = std::env::var("PATH").unwrap_or_default();
    command.env("PATH", format!("{path}:/usr/sbin:/sbin")).stdin(Stdio::null());
    command.output().unwrap_or_else(|error| panic!("{command:?} cannot be started: {error}"))
}

fn printed(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
}

/// Runs qemu-img.
pub fn qemu_img(args: &[&str]) -> String {
    run("qemu-img", args)
}

/// Runs qemu-io's commands on an image or an NBD address.
///
/// # Panics
/// When one fails: qemu-io itself ends with 0 after some failures.
pub fn qemu_io(format: &str, image: &str, commands: &[&str]) -> String {
    let mut args = vec!["-f", format, image];
    for command in commands {
        args.extend(["-c", command]);
    }
    let (status, text) = run_for_status("qemu-io", &args);
    let failed = text.contains("failed") || text.contains("rror");
    assert!(status == 0 && !failed, "qemu-io {args:?} ended with {status}:\n{text}");
    text
}

/// `qemu-img check` finds nothing at all, not even leaks.
pub fn assert_sound(image: &Path) {
    let (status, text) = check(image);
    assert!(status == 0, "qemu-img check of {} ended with {status}:\n{text}", image.display());
}

/// `qemu-img check` finds nothing worse than leaked clusters.
pub fn assert_no_worse_than_leaks(image: &Path) {
    let (status, text) = check(image);
    assert!(status == 0 || status == 3, "qemu-img check of {} ended with {status}:\n{text}", image.display());
}

/// After a kill the kernel holds a process's files, and so their locks, until its last direct requests have ended.
fn check(image: &Path) -> (i32, String) {
    let end = Instant::now() + Duration::from_secs(10);
    loop {
        let (status, text) =
            run_for_status("qemu-img", &["check", "-f", "qcow2", image.to_str().expect("a path in UTF-8")]);
        if !text.contains("lock") || Instant::now() > end {
            return (status, text);
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// `qemu-img compare` sees the same bytes and the same size.
pub fn assert_equal(image: &Path, format: &str, raw: &Path) {
    let (a, b) = (image.to_str().expect("a path in UTF-8"), raw.to_str().expect("a path in UTF-8"));
    let (status, text) = run_for_status("qemu-img", &["compare", "-f", format, "-F", "raw", a, b]);
    // Not `-s`, which compares what is allocated as well.
    assert!(status == 0 && !text.contains("size mismatch"), "qemu-img compare {a} {b} ended with {status}:\n{text}");
}

/// A raw file with runs of zeroes, of bytes that compress, and of bytes that do not.
///
/// # Panics
/// When it cannot be written.
pub fn pattern_file(path: &Path, size: usize, seed: u64) {
    let mut random = fastrand::Rng::with_seed(seed);
    let mut bytes = vec![0u8; size];
    let mut at = 0;
    while at < size {
        let end = size.min(at + random.usize(1..64) * 4096);
        match random.u8(0..3) {
            0 => {}
            1 => bytes[at..end].fill(random.u8(1..=255)),
            _ => random.fill(&mut bytes[at..end]),
        }
        at = end;
    }
    std::fs::write(path, bytes).expect("the pattern can be written");
}
