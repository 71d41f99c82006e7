//! A running `highwater serve`.

use crate::highwater_command;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};
use tempfile::TempDir;

/// One served image. Killed when dropped.
pub struct Server {
    child: Child,
    // Kept open, for the server's last lines must not meet a closed pipe.
    _stdout: BufReader<ChildStdout>,
    /// The first address of the export.
    pub uri: String,
    _directory: TempDir,
}

impl Server {
    /// Serves `image` on a unix socket of its own, with further arguments of `serve`, and waits until it is ready.
    ///
    /// # Panics
    /// When the server does not come up.
    pub fn start(image: &Path, args: &[&str]) -> Self {
        let directory = tempfile::tempdir().expect("a directory for the socket");
        let socket = directory.path().join("nbd.sock");
        let image = image.to_str().expect("a path in UTF-8");
        let mut all = vec!["--json", "serve", image, "--socket", socket.to_str().expect("a path in UTF-8")];
        all.extend(args);
        Self::spawn(directory, &all)
    }

    /// Serves `image` on a free port of the loopback interface.
    ///
    /// # Panics
    /// When the server does not come up.
    pub fn start_tcp(image: &Path, args: &[&str]) -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        let image = image.to_str().expect("a path in UTF-8");
        let free = std::net::TcpListener::bind("127.0.0.1:0").and_then(|socket| socket.local_addr());
        let address = free.expect("a free port").to_string();
        let mut all = vec!["--json", "serve", image, "--listen", &address];
        all.extend(args);
        Self::spawn(directory, &all)
    }

    fn spawn(directory: TempDir, args: &[&str]) -> Self {
        let mut command = highwater_command(args);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().expect("highwater starts");
        let mut stdout = BufReader::new(child.stdout.take().expect("a pipe"));
        let mut line = String::new();
        stdout.read_line(&mut line).expect("a line of UTF-8");
        let ready: Option<serde_json::Value> = serde_json::from_str(&line).ok();
        let uri = ready.as_ref().and_then(|event| event["uris"][0].as_str()).map(str::to_owned);
        let Some(uri) = uri else {
            let mut said = String::new();
            let _ = child.kill();
            let _ = child.stderr.take().expect("a pipe").read_to_string(&mut said);
            let _ = child.wait();
            panic!("highwater {args:?} is not ready: it printed {line:?} and said {said:?}");
        };
        // What it says from now on belongs to the test's output.
        let mut stderr = child.stderr.take().expect("a pipe");
        std::thread::spawn(move || std::io::copy(&mut stderr, &mut std::io::stderr()));
        Self { child, _stdout: stdout, uri, _directory: directory }
    }

    /// The server's process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// SIGTERM: the server must finish, and well.
    ///
    /// # Panics
    /// When it ends with an error.
    pub fn stop(mut self) {
        let pid = self.pid().to_string();
        assert!(Command::new("kill").args(["-TERM", &pid]).status().expect("kill runs").success());
        let status = self.child.wait().expect("the server is our child");
        assert!(status.success(), "after SIGTERM the server ended with {status}");
    }

    /// SIGKILL: the server has no chance to finish anything.
    pub fn kill(mut self) {
        self.child.kill().expect("the server runs");
        self.child.wait().expect("the server is our child");
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
