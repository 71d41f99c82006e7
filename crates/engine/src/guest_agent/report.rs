//! What the guard says on its standard output, one line of JSON for each.

use super::bounded::ready;
use rustix::event::PollFlags;
use serde::{Deserialize, Serialize};
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

/// Longest line that is read.
const MAX_LINE: usize = 16 << 10;
/// Longest that a line may take to be written. Nobody who does not read keeps a guest frozen.
const WRITING: Duration = Duration::from_secs(1);

/// A line.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged, rename_all_fields = "kebab-case")]
pub(super) enum Report {
    /// The guest is frozen.
    Frozen {
        /// File systems.
        frozen: u64,
    },
    /// The guest is thawed, and the agent has confirmed it.
    Thawed {
        /// File systems.
        thawed: u64,
        /// Milliseconds from the command to freeze to the answer that all is thawed.
        frozen_ms: u64,
        ended_by: EndedBy,
    },
    /// Something failed; the text is complete. The guard may still be at work to have the guest thawed.
    Error { error: String },
}

/// Why a guest was thawed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum EndedBy {
    /// Somebody asked.
    Request,
    /// Its time was up.
    Limit,
    /// Who could have asked is gone.
    EndOfInput,
}

impl Report {
    /// Says it, if somebody listens.
    pub(super) fn say(&self, out: &mut (impl Write + AsFd)) {
        let Ok(mut line) = serde_json::to_vec(self) else { return };
        line.push(b'\n');
        if ready(&*out, PollFlags::OUT, Instant::now() + WRITING).is_ok_and(|ready| ready) {
            // Who is gone need not be told.
            let _ = out.write_all(&line).and_then(|()| out.flush());
        }
    }
}

/// The lines of a guard.
pub(super) struct Reports<R> {
    from: R,
    received: Vec<u8>,
}

impl<R: Read + AsFd> Reports<R> {
    pub(super) fn new(from: R) -> Self {
        Self { from, received: Vec::new() }
    }

    /// The next one.
    ///
    /// # Errors
    /// `TimedOut`; `UnexpectedEof` when the guard has ended; `InvalidData` when it says something else.
    pub(super) fn next(&mut self, deadline: Instant) -> io::Result<Report> {
        loop {
            if let Some(end) = self.received.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.received.drain(..=end).collect();
                return Ok(serde_json::from_slice(&line)?);
            }
            if self.received.len() > MAX_LINE {
                return Err(io::ErrorKind::InvalidData.into());
            }
            if !ready(&self.from, PollFlags::IN, deadline)? {
                return Err(io::ErrorKind::TimedOut.into());
            }
            let mut bytes = [0; 1024];
            match self.from.read(&mut bytes) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(n) => self.received.extend_from_slice(&bytes[..n]),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines() {
        let thawed = Report::Thawed { thawed: 2, frozen_ms: 15, ended_by: EndedBy::EndOfInput };
        for (report, text) in [
            (Report::Frozen { frozen: 3 }, r#"{"frozen":3}"#),
            (thawed, r#"{"thawed":2,"frozen-ms":15,"ended-by":"end-of-input"}"#),
            (Report::Error { error: "no".into() }, r#"{"error":"no"}"#),
        ] {
            assert_eq!(serde_json::to_string(&report).unwrap(), text);
            assert_eq!(serde_json::from_str::<Report>(text).unwrap(), report);
        }
    }
}
