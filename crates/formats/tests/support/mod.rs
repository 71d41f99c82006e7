//! Judges and images for the tests of this crate.
#![allow(dead_code)] // Each test file uses its part.

use disk::StorageHandle;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use testkit::MemoryStorage;

/// Runs `qemu-img` in `dir`.
pub(crate) fn qemu_img(dir: &Path, args: &[&str]) -> Output {
    Command::new("qemu-img").current_dir(dir).args(args).output().expect("qemu-img is installed")
}

/// Runs `qemu-img`, which must succeed, and returns what it printed.
pub(crate) fn qemu_img_ok(dir: &Path, args: &[&str]) -> String {
    let output = qemu_img(dir, args);
    let text = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "qemu-img {args:?}: {text}");
    text
}

/// Runs `qemu-io` commands on a qcow2 image; all must succeed.
pub(crate) fn qemu_io(dir: &Path, image: &str, commands: &[&str]) {
    let mut command = Command::new("qemu-io");
    command.current_dir(dir).args(["-f", "qcow2", image]);
    for c in commands {
        command.args(["-c", c]);
    }
    let output = command.output().expect("qemu-io is installed");
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && !text.contains("failed"), "qemu-io {commands:?}: {text}");
}

/// The JSON that a `qemu-img` call prints on its standard output, and its exit status.
pub(crate) fn qemu_img_json(dir: &Path, args: &[&str]) -> (serde_json::Value, i32) {
    let output = qemu_img(dir, args);
    let value = serde_json::from_slice(&output.stdout).unwrap_or_else(|e| {
        panic!("qemu-img {args:?}: {e}: {}", String::from_utf8_lossy(&output.stderr));
    });
    (value, output.status.code().expect("not killed"))
}

/// Runs a future to its end.
pub(crate) fn run<T>(future: impl Future<Output = T>) -> T {
    testkit::executor::run(1, future)
}

/// An image file in memory.
pub(crate) fn load(path: &Path) -> (MemoryStorage, StorageHandle) {
    let memory = MemoryStorage::from_file(path).expect("image can be read");
    let handle = memory.handle();
    (memory, handle)
}

/// A directory for a test's images, removed at its end.
pub(crate) struct Place(tempfile::TempDir);

impl Place {
    pub(crate) fn new() -> Self {
        Self(tempfile::Builder::new().prefix("highwater-formats-").tempdir().expect("temporary directory"))
    }
    pub(crate) fn dir(&self) -> &Path {
        self.0.path()
    }
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }
}
