//! The guard's parent: starts it, and learns from it what becomes of the guest.

use super::FreezeLimits;
use super::guard;
use super::report::{EndedBy, Report, Reports};
use crate::EngineError;
use futures_channel::oneshot;
use std::io::{self, Write};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::time::{Duration, Instant};

/// What the guard may take beyond its limits before it counts as stuck.
const SLACK: Duration = Duration::from_secs(5);
/// What thawing may take until the guard says at least that it does not succeed.
const THAWING: Duration = Duration::from_secs(30);

/// The agent of a guest, and how it is made to freeze.
#[derive(Clone, Debug)]
pub struct GuestAgent {
    /// The unix socket of QEMU that leads to the agent.
    pub socket: PathBuf,
    /// Bounds of a freeze.
    pub limits: FreezeLimits,
    /// The program whose verb `freeze-guard` is the guard. By default the one that runs.
    pub guard: PathBuf,
}

/// A guest whose file systems are frozen. Dropping it thaws them, as does the end of this process, however it comes, and
/// that of the guard.
#[derive(Debug)]
pub struct Frozen {
    agent: GuestAgent,
    file_systems: u64,
    /// The guard thaws when this is closed.
    guard: ChildStdin,
    end: oneshot::Receiver<io::Result<Report>>,
}

/// A guest that was frozen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Thawed {
    /// How many file systems there were.
    pub file_systems: u64,
    /// From the command to freeze to the answer that all is thawed: the longest that any write in the guest waited.
    pub frozen_for: Duration,
}

impl GuestAgent {
    /// The agent behind a socket, with the default limits, and the program that runs as the guard.
    pub fn new(socket: impl Into<PathBuf>) -> Self {
        Self { socket: socket.into(), limits: FreezeLimits::default(), guard: PathBuf::from("/proc/self/exe") }
    }

    /// Freezes the guest. May be awaited on any executor; when the future is dropped, the guest is thawed.
    ///
    /// # Errors
    /// [`EngineError::GuestAgent`] when the guest is not frozen; if it was on the way there, it is being thawed.
    pub async fn freeze(&self) -> Result<Frozen, EngineError> {
        let (send, receive) = oneshot::channel();
        let agent = self.clone();
        let started = std::thread::Builder::new().name("freeze-guard".into()).spawn(move || agent.look_after(send));
        started.map_err(|error| self.failed(format!("no thread can be started: {error}")))?;
        receive.await.unwrap_or_else(|_| Err(self.failed("the thread that waits for the guard has ended")))
    }

    /// The guard's life, on a thread of its own: a process must be waited for.
    fn look_after(self, tell: oneshot::Sender<Result<Frozen, EngineError>>) {
        let (mut child, guard, mut reports) = match self.start() {
            Ok(started) => started,
            Err(error) => {
                let program = self.guard.display();
                let _ = tell.send(Err(self.failed(format!("the guard {program} cannot be started: {error}"))));
                return;
            }
        };
        let FreezeLimits { connect, freeze, frozen: limit } = self.limits;
        let report = reports.next(Instant::now() + connect + freeze + SLACK);
        let socket = self.socket.clone();
        match report {
            Ok(Report::Frozen { frozen: file_systems }) => {
                let (end, ended) = oneshot::channel();
                // Who does not wait any more drops it, and the guard's input with it.
                let _ = tell.send(Ok(Frozen { agent: self, file_systems, guard, end: ended }));
                let report = reports.next(Instant::now() + limit + THAWING);
                if was_killed(&report, &mut child) {
                    stand_in(&socket, |error| drop(end.send(Ok(Report::Error { error }))));
                } else {
                    let _ = end.send(report);
                }
            }
            // It may have begun to freeze.
            report if was_killed(&report, &mut child) => {
                stand_in(&socket, |error| drop(tell.send(Err(self.failed(error)))));
            }
            report => {
                let reason = match report {
                    Ok(Report::Error { error }) => error,
                    Ok(_) => "the guard says that the guest is thawed before it was frozen".to_owned(),
                    Err(error) => guard_failed(&error),
                };
                let _ = tell.send(Err(self.failed(reason)));
                drop(guard);
            }
        }
        let _ = child.wait(); // Fails only when somebody else has waited.
    }

    fn start(&self) -> io::Result<(Child, ChildStdin, Reports<impl io::Read + std::os::fd::AsFd + use<>>)> {
        let millis = |limit: Duration| limit.as_millis().to_string();
        let mut child = Command::new(std::path::absolute(&self.guard)?)
            .arg("freeze-guard")
            .arg(std::path::absolute(&self.socket)?)
            .args(["--connect-limit", &millis(self.limits.connect)])
            .args(["--freeze-limit", &millis(self.limits.freeze)])
            .args(["--limit", &millis(self.limits.frozen)])
            .current_dir("/") // It may outlive us, and shall keep no file system busy.
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            // Whoever reads our errors to their end does not wait for the guard.
            .stderr(Stdio::null())
            .spawn()?;
        let missing = || io::Error::other("a pipe is missing");
        let guard = child.stdin.take().ok_or_else(missing)?;
        let reports = Reports::new(child.stdout.take().ok_or_else(missing)?);
        Ok((child, guard, reports))
    }

    fn failed(&self, reason: impl Into<String>) -> EngineError {
        EngineError::GuestAgent { socket: self.socket.clone(), reason: reason.into() }
    }
}

impl Frozen {
    /// How many file systems are frozen. There may be none: not all can be.
    pub fn file_systems(&self) -> u64 {
        self.file_systems
    }

    /// The agent's socket.
    pub fn socket(&self) -> &Path {
        &self.agent.socket
    }

    /// Thaws the guest, and says whether it was frozen all the time.
    ///
    /// # Errors
    /// [`EngineError::NotFrozenThroughout`] when the limit had struck before, or somebody else had thawed: then what
    /// was made meanwhile must not be called consistent for applications. [`EngineError::GuestAgent`] when the agent
    /// does not confirm that the guest is thawed; the guard goes on trying.
    pub async fn thaw(self) -> Result<Thawed, EngineError> {
        let Self { agent, file_systems, mut guard, end } = self;
        // A guard whose limit struck may be gone, and has left its word. A pipe has room for a line.
        let _ = guard.write_all(b"thaw\n");
        let report = end.await.unwrap_or_else(|_| Err(io::ErrorKind::UnexpectedEof.into()));
        let too_soon = |reason: String| EngineError::NotFrozenThroughout { socket: agent.socket.clone(), reason };
        match report {
            Ok(Report::Thawed { ended_by: EndedBy::Limit, .. }) => {
                let limit = agent.limits.frozen.as_millis();
                Err(too_soon(format!("it was thawed when the limit of {limit} ms struck")))
            }
            Ok(Report::Thawed { thawed, .. }) if thawed < file_systems => {
                Err(too_soon(format!("of {file_systems} file systems {thawed} were still frozen at the end")))
            }
            Ok(Report::Thawed { frozen_ms, .. }) => {
                Ok(Thawed { file_systems, frozen_for: Duration::from_millis(frozen_ms) })
            }
            Ok(Report::Error { error }) => Err(agent.failed(error)),
            Ok(Report::Frozen { .. }) => Err(agent.failed("the guard says twice that the guest is frozen")),
            Err(error) => Err(agent.failed(guard_failed(&error))),
        }
    }
}

/// Whether the guard has ended without a report, and not of its own accord.
fn was_killed(report: &io::Result<Report>, child: &mut Child) -> bool {
    let ended = report.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::UnexpectedEof);
    ended && child.wait().is_ok_and(|status| status.signal().is_some())
}

/// Thaws instead of a guard that was killed, and says once what comes of it.
fn stand_in(socket: &Path, say: impl FnOnce(String)) {
    tracing::error!(socket = %socket.display(), "the guard of a frozen guest was killed; thawing the guest here");
    let mut say = Some(say);
    let mut once = |text: String| {
        if let Some(say) = say.take() {
            say(text);
        }
    };
    if guard::thaw(socket, None, |error| once(format!("the guard process was killed, and {error}"))).is_some() {
        once("the guard process was killed; the guest was thawed instead of it".to_owned());
    }
}

fn guard_failed(error: &io::Error) -> String {
    let what = match error.kind() {
        io::ErrorKind::TimedOut => "does not answer".to_owned(),
        io::ErrorKind::UnexpectedEof => "has ended without an answer".to_owned(),
        _ => format!("cannot be understood: {error}"),
    };
    format!("the guard process {what}; see whether the guest is frozen (guest-fsfreeze-status), and thaw it")
}
