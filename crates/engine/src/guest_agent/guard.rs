//! The guard: a process that freezes a guest and is certain to thaw it.

use super::FreezeLimits;
use super::bounded::ready;
use super::conversation::{Agent, AgentError};
use super::report::{EndedBy, Report};
use rustix::event::PollFlags;
use std::io::Write;
use std::os::fd::AsFd;
use std::path::Path;
use std::time::{Duration, Instant};

/// One attempt to thaw.
const ATTEMPT: Duration = Duration::from_secs(5);
/// Pause between two attempts.
const PAUSE: Duration = Duration::from_millis(250);
/// Who waits is told after this time that thawing does not succeed; it is tried further.
const TELL_AFTER: Duration = Duration::from_secs(12);
/// No more attempts. An agent that is to answer again will have done so: the guest is gone, or needs a person.
const GIVE_UP_AFTER: Duration = Duration::from_secs(15 * 60);

/// Freezes the guest behind the agent's socket; waits for a line or the end of `input`, or for the limit; thaws.
/// Everything that happens is said on `output`, one line of JSON each (`{"frozen":N}`,
/// `{"thawed":N,"frozen-ms":M,"ended-by":"request"|"limit"|"end-of-input"}`, `{"error":"…"}`).
///
/// True when the guest was frozen and is thawed again. The caller sees to it that signals do not end the process.
pub fn run_guard(socket: &Path, limits: FreezeLimits, input: impl AsFd, output: impl Write + AsFd) -> bool {
    let mut guard = Guard { socket, limits, output };
    match guard.reach(&input) {
        Ok(agent) => guard.freeze(agent, &input),
        Err(error) => {
            guard.fail(error);
            false
        }
    }
}

struct Guard<'a, W> {
    socket: &'a Path,
    limits: FreezeLimits,
    output: W,
}

impl<W: Write + AsFd> Guard<'_, W> {
    fn fail(&mut self, error: String) {
        Report::Error { error }.say(&mut self.output);
    }

    /// An agent that answers, of a guest that is not frozen.
    fn reach(&self, input: &impl AsFd) -> Result<Agent, String> {
        let deadline = Instant::now() + self.limits.connect;
        let reached = Agent::connect(self.socket, deadline).and_then(|mut agent| {
            agent.sync(deadline)?;
            let frozen = agent.is_frozen(deadline)?;
            Ok((agent, frozen))
        });
        match reached {
            Err(error) => Err(error.to_string()),
            Ok((_, true)) => Err("the guest is frozen already, by somebody else; thaw it first \
                                  (guest-fsfreeze-thaw)"
                .to_owned()),
            Ok(_) if wait_for_word(input, Instant::now()) != EndedBy::Limit => {
                Err("who asked for it does not wait for it any more; nothing was frozen".to_owned())
            }
            Ok((agent, false)) => Ok(agent),
        }
    }

    fn freeze(&mut self, mut agent: Agent, input: &impl AsFd) -> bool {
        let begun = Instant::now();
        let frozen = match agent.freeze(begun + self.limits.freeze) {
            Ok(frozen) => frozen,
            Err(error) => {
                // Whatever the agent has done, or will have done by the time it gets there, is undone.
                self.fail(match &error {
                    AgentError::Silent { .. } => {
                        let limit = self.limits.freeze.as_millis();
                        format!("the guest was not frozen within {limit} ms; it is being thawed")
                    }
                    error => format!("the guest was not frozen: {error}"),
                });
                let _ = self.thaw(error.leaves_connection().then_some(agent));
                return false;
            }
        };
        let end = Instant::now() + self.limits.frozen;
        Report::Frozen { frozen }.say(&mut self.output);
        let ended_by = wait_for_word(input, end);
        let Some(thawed) = self.thaw(Some(agent)) else { return false };
        let frozen_ms = u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX);
        Report::Thawed { thawed, frozen_ms, ended_by }.say(&mut self.output);
        true
    }

    fn thaw(&mut self, agent: Option<Agent>) -> Option<u64> {
        thaw(self.socket, agent, |error| Report::Error { error }.say(&mut self.output))
    }
}

/// Thaws, and has the agent confirm it; again and again, over new connections when `agent` is of no use. How many file
/// systems were thawed; `None` when all was in vain. `tell` is told when it is, and before, when it takes long.
pub(super) fn thaw(socket: &Path, mut agent: Option<Agent>, mut tell: impl FnMut(String)) -> Option<u64> {
    let begun = Instant::now();
    let mut told = false;
    let mut thawed = 0;
    loop {
        let error = match try_thaw(socket, &mut agent, &mut thawed) {
            Ok(()) => return Some(thawed),
            Err(error) => error,
        };
        if begun.elapsed() >= GIVE_UP_AFTER {
            tell(format!("the guest could not be thawed: {error}; thaw it by hand (guest-fsfreeze-thaw)"));
            return None;
        }
        if begun.elapsed() >= TELL_AFTER && !told {
            told = true;
            let minutes = GIVE_UP_AFTER.as_secs() / 60;
            tell(format!(
                "the guest is not thawed yet: {error}; process {} goes on trying for {minutes} minutes",
                std::process::id()
            ));
        }
        std::thread::sleep(PAUSE);
    }
}

/// One attempt. Leaves the connection if another attempt may use it; `thawed` grows by the file systems that it thawed,
/// also when it fails afterwards.
fn try_thaw(socket: &Path, connection: &mut Option<Agent>, thawed: &mut u64) -> Result<(), String> {
    let deadline = Instant::now() + ATTEMPT;
    let text = |error: AgentError| error.to_string();
    let mut agent = match connection.take() {
        Some(agent) => agent,
        None => Agent::connect(socket, deadline).map_err(text)?,
    };
    match agent.thaw(deadline) {
        Ok(here) => *thawed = thawed.saturating_add(here),
        Err(error) => {
            // One that is silent may be so because the connection is dead: the next is new.
            if matches!(error, AgentError::Refused { .. }) {
                *connection = Some(agent);
            }
            return Err(error.to_string());
        }
    }
    match agent.is_frozen(deadline).map_err(text)? {
        false => Ok(()),
        true => Err("the agent says that file systems are still frozen".to_owned()),
    }
}

/// Waits for a line, or for the end of the input, until `end`.
fn wait_for_word(input: &impl AsFd, end: Instant) -> EndedBy {
    let mut bytes = [0; 64];
    loop {
        match ready(input, PollFlags::IN, end) {
            Ok(false) => return EndedBy::Limit,
            // Something is wrong with the input: nobody can be heard any more.
            Err(_) => return EndedBy::EndOfInput,
            Ok(true) => {}
        }
        match rustix::io::read(input, &mut bytes) {
            Ok(0) => return EndedBy::EndOfInput,
            Ok(n) if bytes[..n].contains(&b'\n') => return EndedBy::Request,
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            // Shared with somebody who does not block, and who was faster.
            Err(rustix::io::Errno::AGAIN) if Instant::now() < end => std::thread::sleep(Duration::from_millis(1)),
            Err(rustix::io::Errno::AGAIN) => return EndedBy::Limit,
            Err(_) => return EndedBy::EndOfInput,
        }
    }
}
