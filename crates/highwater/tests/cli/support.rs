//! Running programs, and servers that end with their test.

use serde_json::Value;
use std::ffi::OsStr;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::time::Duration;

/// How a program ended.
#[derive(Debug)]
pub(crate) struct Ended {
    pub(crate) code: Option<i32>,
    pub(crate) out: String,
    pub(crate) err: String,
}

impl Ended {
    #[track_caller]
    pub(crate) fn ok(self) -> Self {
        assert_eq!(self.code, Some(0), "{self:?}");
        self
    }

    #[track_caller]
    pub(crate) fn code(self, code: i32) -> Self {
        assert_eq!(self.code, Some(code), "{self:?}");
        self
    }

    #[track_caller]
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.out).unwrap_or_else(|e| panic!("{e}: {self:?}"))
    }
}

/// A directory of one test, and programs run in it.
pub(crate) struct Place(tempfile::TempDir);

impl Place {
    pub(crate) fn new() -> Self {
        Self(tempfile::tempdir().expect("a temporary directory"))
    }

    pub(crate) fn dir(&self) -> &Path {
        self.0.path()
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir().join(name)
    }

    pub(crate) fn run<A: AsRef<OsStr>>(&self, program: impl AsRef<OsStr>, args: impl IntoIterator<Item = A>) -> Ended {
        let program = program.as_ref();
        let output = Command::new(program)
            .args(args)
            .current_dir(self.dir())
            .env("XDG_RUNTIME_DIR", self.dir())
            .env("XDG_STATE_HOME", self.dir())
            .env("XDG_CONFIG_HOME", self.path("config"))
            .env("XDG_CACHE_HOME", self.path("cache"))
            .stdin(Stdio::null())
            .output()
            .unwrap_or_else(|e| panic!("{}: {e}", program.display()));
        Ended {
            code: output.status.code(),
            out: String::from_utf8(output.stdout).expect("text"),
            err: String::from_utf8(output.stderr).expect("text"),
        }
    }

    /// Runs highwater with the words of a line.
    pub(crate) fn hw(&self, line: &str) -> Ended {
        self.run(env!("CARGO_BIN_EXE_highwater"), line.split_whitespace())
    }

    /// Starts highwater with the words of a line, and does not wait.
    pub(crate) fn spawn(&self, line: &str) -> Child {
        Command::new(env!("CARGO_BIN_EXE_highwater"))
            .args(line.split_whitespace())
            .current_dir(self.dir())
            .env("XDG_RUNTIME_DIR", self.dir())
            .env("XDG_STATE_HOME", self.dir())
            .env("XDG_CONFIG_HOME", self.path("config"))
            .env("XDG_CACHE_HOME", self.path("cache"))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("highwater starts")
    }

    /// Runs another program with the words of a line.
    pub(crate) fn tool(&self, line: &str) -> Ended {
        let mut words = line.split_whitespace();
        let program = words.next().expect("a program");
        self.run(program, words)
    }

    /// Runs `qemu-io` commands on an image.
    #[track_caller]
    pub(crate) fn qemu_io(&self, format: &str, image: &str, commands: &[&str]) -> Ended {
        let mut args = vec!["-f", format];
        for command in commands {
            args.extend(["-c", command]);
        }
        args.push(image);
        let ended = self.run("qemu-io", args);
        assert!(!ended.out.contains("failed") && !ended.out.contains("error"), "{ended:?}");
        ended.ok()
    }

    /// A raw file with data, holes and zeroes.
    pub(crate) fn raw(&self, name: &str, size: u64) {
        use std::os::unix::fs::FileExt;
        let file = std::fs::File::create(self.path(name)).expect("create");
        file.set_len(size).expect("size");
        let mut random = 88172645463325252u64;
        let mut noise = |len: usize| -> Vec<u8> {
            (0..len)
                .map(|_| {
                    random ^= random << 13;
                    random ^= random >> 7;
                    random ^= random << 17;
                    random as u8
                })
                .collect()
        };
        for (part, len) in [(0u64, 70_000usize), (3, 1 << 20), (5, 512), (9, 300_000)] {
            file.write_all_at(&noise(len), part * size / 10).expect("write");
        }
        // Zeroes as data, data that compresses, and the last bytes.
        file.write_all_at(&vec![0; 400_000], 4 * size / 10).expect("write");
        file.write_all_at(&b"highwater ".repeat(60_000), 7 * size / 10).expect("write");
        file.write_all_at(&noise(777), size - 777).expect("write");
    }

    /// Starts a server and waits for its line of JSON.
    #[track_caller]
    pub(crate) fn start(&self, line: &str) -> Server {
        let mut child = Command::new(env!("CARGO_BIN_EXE_highwater"))
            .args(line.split_whitespace())
            .arg("--json")
            .current_dir(self.dir())
            .env("XDG_RUNTIME_DIR", self.dir())
            .env("XDG_STATE_HOME", self.dir())
            .env("XDG_CONFIG_HOME", self.path("config"))
            .env("XDG_CACHE_HOME", self.path("cache"))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("highwater starts");
        let mut out = BufReader::new(child.stdout.take().expect("piped"));
        let (send, receive) = mpsc::channel();
        std::thread::spawn(move || {
            let mut first = String::new();
            let _ = out.read_line(&mut first);
            let _ = send.send(first);
            let _ = out.read_to_string(&mut String::new());
        });
        let first = receive.recv_timeout(Duration::from_secs(60)).unwrap_or_default();
        let mut server = Server { child, ready: Value::Null };
        match serde_json::from_str(&first) {
            Ok(ready) => server.ready = ready,
            Err(_) => panic!("no line that says ready: {first:?}, {}", server.errors()),
        }
        server
    }
}

/// Sends a process a signal by its name.
pub(crate) fn send_signal(child: &Child, name: &str) {
    let status = Command::new("kill").args([&format!("-{name}"), &child.id().to_string()]).status();
    assert!(status.expect("kill").success());
}

/// Waits for what a process that was started by [`Place::spawn`] ends with.
pub(crate) fn ended(child: Child) -> Ended {
    let output = child.wait_with_output().expect("the process ends");
    Ended {
        code: output.status.code(),
        out: String::from_utf8(output.stdout).expect("text"),
        err: String::from_utf8(output.stderr).expect("text"),
    }
}

/// Waits until something is so, for half a minute at most.
#[track_caller]
pub(crate) fn until(what: &str, mut so: impl FnMut() -> bool) {
    for _ in 0..600 {
        if so() {
            return;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    panic!("waited in vain until {what}");
}

/// A server; killed when dropped.
pub(crate) struct Server {
    child: Child,
    pub(crate) ready: Value,
}

impl Server {
    pub(crate) fn uri(&self) -> &str {
        self.ready["uris"][0].as_str().expect("an export")
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    fn errors(&mut self) -> String {
        let _ = self.child.kill();
        let mut text = String::new();
        if let Some(mut err) = self.child.stderr.take() {
            let _ = err.read_to_string(&mut text);
        }
        text
    }

    /// Sends a signal by its name.
    pub(crate) fn signal(&self, name: &str) {
        send_signal(&self.child, name);
    }

    /// Ends it with SIGTERM and waits.
    pub(crate) fn end(self) -> ExitStatus {
        self.end_by("TERM")
    }

    /// Ends it with that signal and waits.
    pub(crate) fn end_by(mut self, signal: &str) -> ExitStatus {
        self.signal(signal);
        self.child.wait().expect("the server ends")
    }

    /// Waits until it ends, and gives what it has written to standard error.
    #[track_caller]
    pub(crate) fn errors_at_end(mut self) -> String {
        let mut text = String::new();
        let mut err = self.child.stderr.take().expect("piped");
        err.read_to_string(&mut text).expect("text");
        assert!(self.child.wait().expect("the server ends").success(), "{text}");
        text
    }

    /// Ends it with SIGKILL and waits.
    pub(crate) fn kill(mut self) {
        self.child.kill().expect("kill");
        self.child.wait().expect("the server ends");
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
