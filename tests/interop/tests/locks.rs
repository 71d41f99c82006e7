//! QEMU's image locks, seen from both sides.

use interop::{Server, highwater, highwater_command, missing, qemu_img, run_for_status};
use std::process::{Child, Command, Stdio};

/// Ends a program when the test ends.
struct Ends(Child);

impl Drop for Ends {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn qemu_refuses_an_image_that_is_served() {
    if missing(&["qemu-img", "qemu-io"]).is_some() {
        return;
    }
    let directory = tempfile::tempdir().expect("a directory");
    for format in ["qcow2", "raw"] {
        let image = directory.path().join(format!("disk.{format}"));
        let name = image.to_str().expect("UTF-8");
        qemu_img(&["create", "-q", "-f", format, name, "4M"]);
        let server = Server::start(&image, &[]);
        let (status, said) = run_for_status("qemu-img", &["resize", "-f", format, name, "8M"]);
        assert!(status != 0 && said.contains("lock"), "qemu-img resized a served disk: {said}");
        if format == "qcow2" {
            // Of a raw file QEMU reads the length alone here, and takes no lock.
            let (status, said) = run_for_status("qemu-img", &["info", "-f", format, name]);
            assert!(status != 0 && said.contains("lock"), "qemu-img read a served disk: {said}");
        }
        let (status, said) = run_for_status("qemu-io", &["-f", format, "-c", "write 0 64k", name]);
        assert!(status != 0 && said.contains("lock"), "qemu-io wrote to a served disk: {said}");
        qemu_img(&["info", "-U", "-f", format, name]);
        server.stop();
        qemu_img(&["info", "-f", format, name]);
    }
}

#[test]
fn readers_share() {
    if missing(&["qemu-img"]).is_some() {
        return;
    }
    let directory = tempfile::tempdir().expect("a directory");
    let image = directory.path().join("disk.qcow2");
    let name = image.to_str().expect("UTF-8");
    qemu_img(&["create", "-q", "-f", "qcow2", name, "4M"]);
    let server = Server::start(&image, &["--read-only"]);
    qemu_img(&["info", "-f", "qcow2", name]);
    highwater(&["info", name]);
    let (status, said) = run_for_status("qemu-img", &["resize", "-f", "qcow2", name, "8M"]);
    assert!(status != 0 && said.contains("lock"), "qemu-img resized a disk that is read: {said}");
    server.stop();
}

#[test]
fn we_refuse_an_image_that_qemu_holds() {
    if missing(&["qemu-img", "qemu-storage-daemon"]).is_some() {
        return;
    }
    let directory = tempfile::tempdir().expect("a directory");
    let image = directory.path().join("disk.qcow2");
    let name = image.to_str().expect("UTF-8");
    qemu_img(&["create", "-q", "-f", "qcow2", name, "4M"]);
    let pid_file = directory.path().join("pid");
    let mut command = Command::new("qemu-storage-daemon");
    command.arg("--blockdev").arg(format!("driver=file,node-name=f,filename={name}"));
    command.args(["--blockdev", "driver=qcow2,node-name=q,file=f"]);
    command.arg("--nbd-server").arg(format!("addr.type=unix,addr.path={}", directory.path().join("s").display()));
    command.args(["--export", "type=nbd,id=e,node-name=q,writable=on", "--pidfile"]).arg(&pid_file);
    let holder = Ends(command.stdin(Stdio::null()).spawn().expect("qemu-storage-daemon starts"));
    while !pid_file.exists() {
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    for args in [vec!["serve", name], vec!["resize", name, "8M"], vec!["check", "-r", "all", name], vec!["info", name]]
    {
        let output = highwater_command(&args).stdin(Stdio::null()).output().expect("highwater runs");
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && said.contains("lock") | said.contains("in use"), "{args:?}: {said}");
        assert!(said.contains("disk.qcow2"), "{args:?} does not name the image: {said}");
    }
    highwater(&["info", "-U", name]);
    drop(holder);
    highwater(&["info", name]);
}
