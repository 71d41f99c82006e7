//! The real guest agent in a Linux guest: what `highwater freeze-guard` freezes is consistent, and goes on afterwards.

use interop::{Server, highwater_command, missing, run};
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

const TOOLS: &[&str] = &["qemu-ga", "qemu-system-x86_64", "busybox", "cpio", "mke2fs", "e2fsck", "dumpe2fs", "debugfs"];

/// Writes without a sync until it is told to stop.
const GUEST: &str = r#"
mount -t ext4 /dev/vda /mnt
while ! [ -e /dev/vport0p1 ]; do usleep 10000; done
/bin/qemu-ga -m virtio-serial -p /dev/vport0p1 -t /tmp -f /tmp/agent.pid -l /tmp/agent.log &
echo "written before the freeze" >/mnt/before
echo "guest: ready"
n=0
while ! [ -e /tmp/stop ]; do n=$((n+1)); echo "$n" >>/mnt/log; usleep 10000; done
umount /mnt && echo "guest: wrote $n lines"
"#;

struct Guard {
    child: Child,
    ask: ChildStdin,
    reports: BufReader<ChildStdout>,
}

impl Guard {
    fn start(socket: &str, limit: &str) -> Self {
        // The agent may still be starting.
        let limits = ["--limit", limit, "--connect-limit", "60000"];
        let mut command = highwater_command(&[&["freeze-guard", socket][..], &limits].concat());
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("the guard starts");
        let (ask, reports) = (child.stdin.take().expect("a pipe"), child.stdout.take().expect("a pipe"));
        Self { child, ask, reports: BufReader::new(reports) }
    }

    fn report(&mut self) -> Value {
        let mut line = String::new();
        self.reports.read_line(&mut line).expect("a line");
        serde_json::from_str(&line).unwrap_or_else(|error| panic!("{line:?}: {error}"))
    }
}

/// Copies the image as it is now; whether its file system would have to replay its journal.
fn copy(image: &Path, to: &Path) -> bool {
    std::fs::copy(image, to).expect("a copy");
    run("dumpe2fs", &["-h", to.to_str().expect("a path in UTF-8")]).contains("needs_recovery")
}

#[test]
fn a_frozen_guest_is_consistent_and_goes_on() {
    if missing(TOOLS).is_some() {
        return;
    }
    let directory = tempfile::tempdir().expect("a directory");
    let (image, taken) = (directory.path().join("guest.raw"), directory.path().join("taken.raw"));
    let socket = directory.path().join("agent.sock");
    let [image_name, taken_name, socket_name] = [&image, &taken, &socket].map(|path| path.to_str().expect("UTF-8"));
    interop::highwater(&["create", "-q", "-f", "raw", image_name, "96M"]);
    run("mke2fs", &["-q", "-t", "ext4", image_name]);

    let server = Server::start(&image, &["-f", "raw"]);
    let drive = format!("file={},format=raw,if=virtio,cache=none", server.uri);
    let chardev = format!("socket,path={socket_name},server=on,wait=off,id=agent");
    let program = Path::new(env!("CARGO_MANIFEST_DIR")).join("boot-guest");
    let mut guest = Command::new(program)
        .args(["-t", "300", "-x", "qemu-ga", "-a", "ext4 virtio_console", "-c", GUEST, "--", "-drive", &drive])
        .args(["-device", "virtio-serial-pci", "-chardev", &chardev])
        .args(["-device", "virtserialport,chardev=agent,name=org.qemu.guest_agent.0"])
        .stdout(Stdio::piped())
        .spawn()
        .expect("the guest starts");
    let mut said = BufReader::new(guest.stdout.take().expect("a pipe")).lines().map(|line| line.expect("text"));
    assert!(said.any(|line| line == "guest: ready"));
    assert!(copy(&image, &taken), "a file system in use looks like one");

    let mut guard = Guard::start(socket_name, "60000");
    assert_eq!(guard.report(), json!({"frozen": 1}));
    assert!(!copy(&image, &taken), "a frozen file system needs no recovery");
    run("e2fsck", &["-f", "-n", taken_name]);
    // Frozen means written out, too.
    assert_eq!(run("debugfs", &["-R", "cat /before", taken_name]), "written before the freeze\n");
    let log = run("debugfs", &["-R", "cat /log", taken_name]);
    guard.ask.write_all(b"thaw\n").expect("the guard listens");
    assert_eq!(guard.report()["thawed"], 1);
    assert!(guard.child.wait().expect("the guard ends").success());

    // Nobody asks: the limit does it.
    let mut guard = Guard::start(socket_name, "200");
    assert_eq!(guard.report(), json!({"frozen": 1}));
    let thawed = guard.report();
    assert_eq!((&thawed["thawed"], &thawed["ended-by"]), (&json!(1), &json!("limit")));
    assert!(guard.child.wait().expect("the guard ends").success());

    let stop = json!({"execute": "guest-exec", "arguments": {"path": "/bin/touch", "arg": ["/tmp/stop"]}});
    let mut agent = UnixStream::connect(&socket).expect("the agent's socket");
    agent.write_all(format!("{stop}\n").as_bytes()).expect("the agent listens");
    let last = said.find(|line| line.starts_with("guest: wrote")).expect("the guest ends its work");
    assert!(guest.wait().expect("the guest ends").success());
    server.stop();
    run("e2fsck", &["-f", "-n", image_name]);
    let whole = run("debugfs", &["-R", "cat /log", image_name]);
    assert_eq!(last, format!("guest: wrote {} lines", whole.lines().count()));
    assert!(whole.starts_with(&log) && whole.len() > log.len(), "the guest went on where it was");
}
