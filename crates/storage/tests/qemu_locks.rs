//! Image locks, against QEMU's own programs, in both directions.

use disk::ErrorKind;
use std::io::Read;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use storage::{FileStorage, LockMode, OpenOptions};

fn run(program: &str, args: &[&str]) -> Output {
    Command::new(program).args(args).output().unwrap_or_else(|e| panic!("{program} (apt install qemu-utils): {e}"))
}

fn text(path: &Path) -> &str {
    path.to_str().expect("a temporary path is UTF-8")
}

/// A directory with an image in it.
fn image(format: &str) -> (tempfile::TempDir, std::path::PathBuf) {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("disk");
    let made = run("qemu-img", &["create", "-q", "-f", format, text(&path), "1M"]);
    assert!(made.status.success(), "{made:?}");
    (dir, path)
}

fn refused_by_lock(output: &Output, lock: &str) {
    let message = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success(), "{output:?}");
    assert!(message.contains("Failed to get") && message.contains(lock), "{message}");
}

/// A qemu-storage-daemon that holds an image.
struct Holder(Child);

impl Holder {
    fn start(path: &Path, format: &str, read_only: bool) -> Self {
        let read_only = if read_only { "on" } else { "off" };
        let file = format!("driver=file,node-name=f,filename={},read-only={read_only}", text(path));
        let disk = format!("driver={format},node-name=d,file=f,read-only={read_only}");
        let export = format!("type=nbd,id=e,node-name=d,writable={}", if read_only == "on" { "off" } else { "on" });
        let server = format!("addr.type=unix,addr.path={}.sock", text(path));
        let args =
            ["--chardev", "stdio,id=m", "--blockdev", &file, "--blockdev", &disk, "--nbd-server", &server, "--export"];
        let mut child = Command::new("qemu-storage-daemon")
            .args(args)
            .args([&export, "--monitor", "chardev=m"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("qemu-storage-daemon (apt install qemu-utils)");
        // The monitor greets when everything before it on the command line is done.
        let mut greeting = [0; 1];
        child.stdout.as_mut().expect("piped").read_exact(&mut greeting).expect("the monitor greets");
        Self(child)
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        self.0.kill().and_then(|()| self.0.wait()).expect("it is ours to kill");
    }
}

#[test]
fn qemu_refuses_what_we_write() {
    for format in ["raw", "qcow2"] {
        let (_dir, path) = image(format);
        let ours = FileStorage::open(&path, &OpenOptions::default()).expect("open");
        if format == "qcow2" {
            // A reader of a raw image bears a writer, also when both are QEMU.
            refused_by_lock(&run("qemu-img", &["info", text(&path)]), "\"write\" lock");
        }
        refused_by_lock(&run("qemu-img", &["resize", "-f", format, text(&path), "2M"]), "lock");
        refused_by_lock(&run("qemu-io", &["-f", format, "-c", "write 0 512", text(&path)]), "lock");
        let shared = run("qemu-img", &["info", "-U", text(&path)]);
        assert!(shared.status.success(), "{shared:?}");
        drop(ours);
        let after = run("qemu-img", &["info", text(&path)]);
        assert!(after.status.success(), "the lock ends with the storage: {after:?}");
    }
}

#[test]
fn qemu_shares_what_we_read() {
    let (_dir, path) = image("qcow2");
    let first = FileStorage::open(&path, &OpenOptions::read_only()).expect("open");
    let second = FileStorage::open(&path, &OpenOptions::read_only()).expect("readers share");
    let info = run("qemu-img", &["info", text(&path)]);
    assert!(info.status.success(), "{info:?}");
    refused_by_lock(&run("qemu-io", &["-f", "qcow2", "-c", "write 0 512", text(&path)]), "\"write\" lock");
    let holder = Holder::start(&path, "qcow2", true);
    let third = FileStorage::open(&path, &OpenOptions::read_only()).expect("readers share with QEMU");
    let error = FileStorage::open(&path, &OpenOptions::default()).expect_err("somebody reads");
    assert_eq!(error.kind(), ErrorKind::InUse);
    drop((first, second, third, holder));
    FileStorage::open(&path, &OpenOptions::default()).expect("nobody is left");
}

#[test]
fn we_refuse_what_qemu_writes() {
    for format in ["raw", "qcow2"] {
        let (_dir, path) = image(format);
        let holder = Holder::start(&path, format, false);
        for options in [OpenOptions::default(), OpenOptions::read_only()] {
            let error = FileStorage::open(&path, &options).expect_err("QEMU writes");
            assert_eq!(error.kind(), ErrorKind::InUse);
            let message = error.to_string();
            assert!(message.contains(text(&path)), "names the file: {message}");
            assert!(message.contains(&holder.0.id().to_string()), "names the holder: {message}");
        }
        let beside = OpenOptions { lock: LockMode::ForceShare, ..OpenOptions::read_only() };
        FileStorage::open(&path, &beside).expect("a reader who bears a writer");
        FileStorage::open(&path, &OpenOptions { lock: LockMode::Off, ..OpenOptions::default() }).expect("unlocked");
        drop(holder);
        FileStorage::open(&path, &OpenOptions::default()).expect("QEMU is gone");
    }
}

#[test]
fn we_refuse_ourselves() {
    let (_dir, path) = image("raw");
    let first = FileStorage::open(&path, &OpenOptions::default()).expect("open");
    let error = FileStorage::open(&path, &OpenOptions::default()).expect_err("two writers");
    assert_eq!(error.kind(), ErrorKind::InUse);
    assert!(error.to_string().contains("this process"), "{error}");
    let emptied = OpenOptions { create_new: Some(5), replace: true, ..OpenOptions::default() };
    assert_eq!(FileStorage::open(&path, &emptied).expect_err("in use").kind(), ErrorKind::InUse);
    assert_eq!(std::fs::metadata(&path).expect("metadata").len(), 1 << 20, "not emptied before it was locked");
    drop(first);
    FileStorage::open(&path, &emptied).expect("replaced");
    assert_eq!(std::fs::metadata(&path).expect("metadata").len(), 5);
}
