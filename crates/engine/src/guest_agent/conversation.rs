//! Talking to the agent: commands and answers, each a line of JSON (QEMU's `qga/qapi-schema.json`).
//!
//! Who connects may find what the agent had to say to somebody else, or the half of it. `guest-sync-delimited` is
//! answered with a byte that no JSON has in front; all that comes before the answer to one's own number is dropped.

use super::bounded::ready;
use rustix::event::PollFlags;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
use serde_json::{Value, json};
use std::hash::{BuildHasher, RandomState};
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

/// In front of a command it has the agent forget the half of another; in front of an answer it marks a new beginning.
const SENTINEL: u8 = 0xFF;
/// Longest answer. The guest says it, and is not trusted.
const MAX_ANSWER: usize = 64 << 10;
/// Characters of an error's text that are passed on.
const MAX_TEXT: usize = 300;
/// Pause before a connection is tried again.
const PAUSE: Duration = Duration::from_millis(20);

/// Why the agent did not do what it was told.
#[derive(Debug, thiserror::Error)]
pub(super) enum AgentError {
    #[error("cannot connect: {0}")]
    Connect(#[source] io::Error),
    #[error("cannot connect: too many others wait for it; end the other client of the agent")]
    Crowded,
    #[error(
        "no answer to {command} in time; see whether qemu-ga runs in the guest, and whether another client of the \
         agent is connected"
    )]
    Silent { command: &'static str },
    #[error("the connection was closed during {command}; see whether the guest runs")]
    Closed { command: &'static str },
    #[error("the connection failed during {command}: {cause}")]
    Failed {
        command: &'static str,
        #[source]
        cause: io::Error,
    },
    #[error("{command} failed: {text}")]
    Refused { command: &'static str, text: String },
    #[error("the answer to {command} is not one: expected {expected}")]
    Nonsense { command: &'static str, expected: &'static str },
}

impl AgentError {
    /// Whether the connection can be used further: what was sent is under way, and a new beginning can be found.
    pub(super) fn leaves_connection(&self) -> bool {
        matches!(self, Self::Silent { .. } | Self::Refused { .. } | Self::Nonsense { .. })
    }
}

/// A connection to the agent.
pub(super) struct Agent {
    stream: UnixStream,
    received: Vec<u8>,
}

impl Agent {
    /// Connects. Whether anybody answers is not known yet.
    pub(super) fn connect(socket: &Path, deadline: Instant) -> Result<Self, AgentError> {
        let failed = |error: Errno| AgentError::Connect(error.into());
        let address = SocketAddrUnix::new(socket).map_err(failed)?;
        loop {
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            let fd = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None).map_err(failed)?;
            match connect(&fd, &address) {
                Ok(()) => return Ok(Self { stream: UnixStream::from(fd), received: Vec::new() }),
                // Others wait to be accepted.
                Err(Errno::AGAIN) if Instant::now() >= deadline => return Err(AgentError::Crowded),
                Err(Errno::AGAIN | Errno::INTR) => std::thread::sleep(PAUSE),
                Err(error) => return Err(failed(error)),
            }
        }
    }

    /// Finds where answers to us begin.
    pub(super) fn sync(&mut self, deadline: Instant) -> Result<(), AgentError> {
        let number = self.send_sync(deadline)?;
        self.await_sync(number, deadline)
    }

    /// Whether file systems are frozen.
    pub(super) fn is_frozen(&mut self, deadline: Instant) -> Result<bool, AgentError> {
        const STATUS: &str = "guest-fsfreeze-status";
        self.send(STATUS, deadline)?;
        match self.answer(STATUS, deadline)?.as_str() {
            Some("frozen") => Ok(true),
            Some("thawed") => Ok(false),
            _ => Err(AgentError::Nonsense { command: STATUS, expected: "frozen or thawed" }),
        }
    }

    /// Freezes all file systems that can be frozen; how many there are.
    pub(super) fn freeze(&mut self, deadline: Instant) -> Result<u64, AgentError> {
        const FREEZE: &str = "guest-fsfreeze-freeze";
        self.send(FREEZE, deadline)?;
        self.count(FREEZE, deadline)
    }

    /// Thaws all file systems; how many were frozen. May be called when it is not known what the agent is doing: the
    /// command is sent without waiting for an answer to anything, for the agent gets at it some time.
    pub(super) fn thaw(&mut self, deadline: Instant) -> Result<u64, AgentError> {
        const THAW: &str = "guest-fsfreeze-thaw";
        let number = self.send_sync(deadline)?;
        self.send(THAW, deadline)?;
        self.await_sync(number, deadline)?;
        self.count(THAW, deadline)
    }

    fn send_sync(&mut self, deadline: Instant) -> Result<u64, AgentError> {
        let number = RandomState::new().hash_one(0) >> 12; // A number that others do not use, and that JSON keeps.
        let mut bytes = vec![SENTINEL];
        bytes.extend(json!({"execute": SYNC, "arguments": {"id": number}}).to_string().bytes());
        bytes.push(b'\n');
        self.send_bytes(SYNC, &bytes, deadline)?;
        Ok(number)
    }

    fn await_sync(&mut self, number: u64, deadline: Instant) -> Result<(), AgentError> {
        loop {
            let line = self.line(SYNC, deadline)?;
            // What stands before the last sentinel was for somebody else, perhaps cut short.
            let Some(at) = line.iter().rposition(|byte| *byte == SENTINEL) else { continue };
            let answer: Value = serde_json::from_slice(&line[at + 1..]).unwrap_or_default();
            if answer["return"].as_u64() == Some(number) {
                return Ok(());
            }
        }
    }

    fn send(&mut self, command: &'static str, deadline: Instant) -> Result<(), AgentError> {
        let line = format!("{}\n", json!({"execute": command}));
        self.send_bytes(command, line.as_bytes(), deadline)
    }

    fn send_bytes(&mut self, command: &'static str, bytes: &[u8], deadline: Instant) -> Result<(), AgentError> {
        let mut rest = bytes;
        while !rest.is_empty() {
            self.wait(command, PollFlags::OUT, deadline)?;
            match self.stream.write(rest) {
                Ok(n) => rest = &rest[n..],
                Err(error) => retry(command, error)?,
            }
        }
        Ok(())
    }

    fn count(&mut self, command: &'static str, deadline: Instant) -> Result<u64, AgentError> {
        let answer = self.answer(command, deadline)?;
        answer.as_u64().ok_or(AgentError::Nonsense { command, expected: "a number of file systems" })
    }

    /// What the agent returns.
    fn answer(&mut self, command: &'static str, deadline: Instant) -> Result<Value, AgentError> {
        let line = self.line(command, deadline)?;
        let mut answer: Value = serde_json::from_slice(&line).unwrap_or_default();
        if let Some(error) = answer.get("error") {
            let text = error["desc"].as_str().or(error["class"].as_str()).unwrap_or("no reason is given");
            let text = text.chars().take(MAX_TEXT).map(|c| if c.is_control() { ' ' } else { c }).collect();
            return Err(AgentError::Refused { command, text });
        }
        match answer.get_mut("return") {
            Some(value) => Ok(value.take()),
            None => Err(AgentError::Nonsense { command, expected: "\"return\" or \"error\"" }),
        }
    }

    /// The next line, without its end. Of one that is longer than [`MAX_ANSWER`] the end.
    fn line(&mut self, command: &'static str, deadline: Instant) -> Result<Vec<u8>, AgentError> {
        loop {
            if let Some(end) = self.received.iter().position(|byte| *byte == b'\n') {
                let mut line: Vec<u8> = self.received.drain(..=end).collect();
                line.pop();
                if line.trim_ascii().is_empty() {
                    continue;
                }
                return Ok(line);
            }
            if self.received.len() > MAX_ANSWER {
                let half = self.received.len() / 2;
                self.received.drain(..half);
            }
            self.wait(command, PollFlags::IN, deadline)?;
            let mut bytes = [0; 4096];
            match self.stream.read(&mut bytes) {
                Ok(0) => return Err(AgentError::Closed { command }),
                Ok(n) => self.received.extend_from_slice(&bytes[..n]),
                Err(error) => retry(command, error)?,
            }
        }
    }

    fn wait(&self, command: &'static str, flags: PollFlags, deadline: Instant) -> Result<(), AgentError> {
        match ready(&self.stream, flags, deadline) {
            // An agent that talks without end never lets the wait come to its own.
            Ok(true) if Instant::now() < deadline => Ok(()),
            Ok(_) => Err(AgentError::Silent { command }),
            Err(cause) => Err(AgentError::Failed { command, cause }),
        }
    }
}

const SYNC: &str = "guest-sync-delimited";

/// Nothing, when the call is to be made again.
fn retry(command: &'static str, error: io::Error) -> Result<(), AgentError> {
    match error.kind() {
        io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock => Ok(()),
        io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => Err(AgentError::Closed { command }),
        _ => Err(AgentError::Failed { command, cause: error }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An agent that has said `said`, and whose other end is open.
    fn agent(said: &[u8]) -> (Agent, UnixStream) {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        theirs.write_all(said).unwrap();
        (Agent { stream: ours, received: Vec::new() }, theirs)
    }

    fn soon() -> Instant {
        Instant::now() + Duration::from_millis(200)
    }

    #[test]
    fn stale_bytes_are_skipped() {
        let mut said =
            b"{\"return\": 7}\n\xFF{\"return\": 41}\n{\"return\": 42}\n{\"ret\xFF{\"return\": 42}\n".to_vec();
        said.extend(b"{\"return\": \"frozen\"}\n");
        let (mut agent, _theirs) = agent(&said);
        agent.await_sync(42, soon()).unwrap();
        assert!(agent.is_frozen(soon()).unwrap());
    }

    #[test]
    fn a_flood_is_neither_kept_nor_waited_for() {
        let (mut agent, mut theirs) = agent(b"");
        let flood = std::thread::spawn(move || while theirs.write_all(&[b'x'; 4096]).is_ok() {});
        assert!(matches!(agent.await_sync(1, soon()), Err(AgentError::Silent { .. })));
        assert!(agent.received.len() <= MAX_ANSWER + 4096);
        drop(agent);
        flood.join().unwrap();
    }

    #[test]
    fn answers_that_are_none() {
        let status = |said: &[u8]| {
            let (mut agent, _theirs) = agent(said);
            agent.is_frozen(soon()).unwrap_err().to_string()
        };
        let disabled = b"{\"error\": {\"class\": \"CommandNotFound\", \"desc\": \"is disabled\\u0007\"}}\n";
        assert_eq!(status(disabled), "guest-fsfreeze-status failed: is disabled ");
        assert!(status(b"{\"return\": 5}\n").ends_with("expected frozen or thawed"));
        assert!(status(b"[]\n").ends_with("expected \"return\" or \"error\""));
        assert!(status(b"").starts_with("no answer to guest-fsfreeze-status in time"));
        let (mut agent, theirs) = agent(b"");
        drop(theirs);
        assert!(matches!(agent.sync(soon()), Err(AgentError::Closed { .. })));
    }
}
