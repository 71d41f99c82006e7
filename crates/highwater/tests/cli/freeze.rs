//! Freezing a guest: whatever happens to whoever froze it, it is thawed.

use crate::scripted_agent::{Answer, FILE_SYSTEMS, ScriptedAgent, State};
use crate::support::{Place, send_signal, until};
use engine::EngineError;
use engine::guest_agent::{FreezeLimits, Frozen, GuestAgent};
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

/// Tells the test that is run as a process to be killed where its agent is.
const VICTIM: &str = "FREEZE_TEST_SOCKET";

fn guest(socket: &Path) -> GuestAgent {
    let limits = FreezeLimits {
        connect: Duration::from_secs(10),
        freeze: Duration::from_secs(10),
        frozen: Duration::from_secs(60),
    };
    GuestAgent { limits, guard: env!("CARGO_BIN_EXE_highwater").into(), ..GuestAgent::new(socket) }
}

fn wait<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().build().expect("a runtime").block_on(future)
}

#[track_caller]
fn freeze(guest: &GuestAgent) -> Frozen {
    wait(guest.freeze()).unwrap_or_else(|error| panic!("{error}"))
}

#[track_caller]
fn refused(guest: &GuestAgent) -> String {
    match wait(guest.freeze()) {
        Err(error @ EngineError::GuestAgent { .. }) => error.to_string(),
        other => panic!("{other:?}"),
    }
}

fn agent(place: &Place, script: impl FnOnce(&mut State)) -> (ScriptedAgent, GuestAgent) {
    let socket = place.path("agent.sock");
    (ScriptedAgent::listen(&socket, script), guest(&socket))
}

#[test]
fn freezes_and_thaws() {
    let place = Place::new();
    let (agent, guest) = agent(&place, |state| {
        // Answers to others, one of them with a sentinel, and the half of one.
        state.stale = b"{\"return\": {}}\n\xFF{\"return\": 12345}\n{\"return\": \"fro".to_vec();
        state.freezes = vec![Answer::After(Duration::from_millis(100))];
    });
    let frozen = freeze(&guest);
    assert_eq!(frozen.file_systems(), FILE_SYSTEMS);
    assert!(agent.is_frozen());
    std::thread::sleep(Duration::from_millis(100));
    let thawed = wait(frozen.thaw()).unwrap();
    assert!(!agent.is_frozen());
    assert_eq!(thawed.file_systems, FILE_SYSTEMS);
    assert!(thawed.frozen_for >= Duration::from_millis(200), "{thawed:?}");
    let expected = ["status", "freeze", "thaw", "status"].map(|word| format!("guest-fsfreeze-{word}"));
    assert_eq!(agent.state().commands, expected);
}

#[test]
fn who_does_not_wait_thaws() {
    let place = Place::new();
    let (agent, guest) = agent(&place, |_| {});
    drop(freeze(&guest));
    agent.until_thawed();

    // The same before it is frozen.
    agent.state().freezes = vec![Answer::After(Duration::from_millis(300))];
    agent.state().commands.clear();
    let soon = async { tokio::time::timeout(Duration::from_millis(100), guest.freeze()).await };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    assert!(runtime.block_on(soon).is_err(), "it takes longer");
    until("the guest was frozen, or nothing came of it", || {
        let state = agent.state();
        !state.frozen && state.freezes.is_empty()
    });
    agent.until_thawed();
}

#[test]
fn the_limit_strikes() {
    let place = Place::new();
    let (agent, mut guest) = agent(&place, |_| {});
    guest.limits.frozen = Duration::from_millis(300);
    let began = Instant::now();
    let frozen = freeze(&guest);
    agent.until_thawed();
    assert!(began.elapsed() >= Duration::from_millis(300));
    match wait(frozen.thaw()) {
        Err(error @ EngineError::NotFrozenThroughout { .. }) => {
            assert!(error.to_string().contains("the limit of 300 ms"), "{error}");
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn somebody_else_thaws() {
    let place = Place::new();
    let (agent, guest) = agent(&place, |_| {});
    let frozen = freeze(&guest);
    agent.state().frozen = false;
    let error = wait(frozen.thaw()).unwrap_err();
    assert!(matches!(error, EngineError::NotFrozenThroughout { .. }), "{error}");
    assert!(error.to_string().contains("of 3 file systems 0 were still frozen"), "{error}");
}

#[test]
fn a_freeze_that_takes_too_long_is_undone() {
    let place = Place::new();
    for answer in [Answer::After(Duration::from_secs(1)), Answer::Silence] {
        let (agent, mut guest) = agent(&place, |state| state.freezes = vec![answer]);
        guest.limits.freeze = Duration::from_millis(200);
        let error = refused(&guest);
        assert!(error.contains("not frozen within 200 ms"), "{error}");
        agent.until_thawed();
        std::fs::remove_file(&guest.socket).unwrap();
    }
}

#[test]
fn a_freeze_that_fails_is_undone() {
    let place = Place::new();
    for (answer, words) in [
        (Answer::No("failed to freeze /mnt: busy"), "failed to freeze /mnt: busy"),
        (Answer::HangUp, "the connection was closed during guest-fsfreeze-freeze"),
    ] {
        let (agent, guest) = agent(&place, |state| state.freezes = vec![answer]);
        let error = refused(&guest);
        assert!(error.contains(words) && error.contains("agent.sock"), "{error}");
        agent.until_thawed();
        std::fs::remove_file(&guest.socket).unwrap();
    }
}

#[test]
fn thawing_is_tried_until_it_succeeds() {
    let place = Place::new();
    let (agent, guest) = agent(&place, |state| {
        state.thaws = vec![Answer::No("not now"), Answer::No("not now either"), Answer::HangUp];
    });
    let frozen = freeze(&guest);
    let thawed = wait(frozen.thaw());
    assert!(!agent.is_frozen());
    // The answer of the attempt that thawed was lost: that nobody else had thawed before is not known.
    assert!(matches!(thawed, Err(EngineError::NotFrozenThroughout { .. })), "{thawed:?}");
    assert!(agent.state().clients >= 2);
    let thaws = agent.state().commands.iter().filter(|command| *command == "guest-fsfreeze-thaw").count();
    assert_eq!(thaws, 4);
}

#[test]
fn who_has_frozen_before_is_not_disturbed() {
    let place = Place::new();
    let (agent, guest) = agent(&place, |state| state.frozen = true);
    let error = refused(&guest);
    assert!(error.contains("frozen already, by somebody else"), "{error}");
    assert!(agent.is_frozen());
    assert_eq!(agent.state().commands, ["guest-fsfreeze-status"]);
}

#[test]
fn nobody_answers() {
    let place = Place::new();
    let (agent, mut guest) = agent(&place, |state| state.mute = true);
    guest.limits.connect = Duration::from_millis(300);
    let error = refused(&guest);
    assert!(error.contains("no answer to guest-sync-delimited in time"), "{error}");
    assert!(agent.state().commands.is_empty());

    // Another client is connected: the next one is accepted by the kernel alone.
    agent.state().mute = false;
    let other = UnixStream::connect(&guest.socket).unwrap();
    until("the other client is served", || agent.state().clients == 2);
    assert!(refused(&guest).contains("whether another client"), "no answer either");
    drop(other);

    // Nor by the kernel.
    guest.socket = place.path("full.sock");
    let listener =
        rustix::net::socket(rustix::net::AddressFamily::UNIX, rustix::net::SocketType::STREAM, None).unwrap();
    rustix::net::bind(&listener, &rustix::net::SocketAddrUnix::new(&guest.socket).unwrap()).unwrap();
    rustix::net::listen(&listener, 0).unwrap();
    let _first = UnixStream::connect(&guest.socket).unwrap();
    assert!(refused(&guest).contains("too many others wait"), "the queue is full");

    // Nobody is there.
    guest.socket = place.path("none.sock");
    assert!(refused(&guest).contains("cannot connect: No such file"), "no socket");
    guest.guard = place.path("no-program");
    assert!(refused(&guest).contains("cannot be started"), "no guard");
}

/// Run as a process of its own by the next test: freezes, says so, and waits for its end.
#[test]
#[ignore = "the victim of another test"]
fn victim() {
    let Some(socket) = std::env::var_os(VICTIM) else { return };
    let _frozen = freeze(&guest(Path::new(&socket)));
    std::fs::write(Path::new(&socket).with_extension("frozen"), "").unwrap();
    std::thread::sleep(Duration::from_secs(600));
}

#[test]
fn the_parent_is_killed() {
    let place = Place::new();
    let (agent, guest) = agent(&place, |_| {});
    let mut victim = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "freeze::victim", "--ignored"])
        .env(VICTIM, &guest.socket)
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    until("the guest is frozen", || place.path("agent.frozen").exists());
    assert!(agent.is_frozen());
    send_signal(&victim, "KILL");
    victim.wait().unwrap();
    agent.until_thawed();
}

#[test]
fn the_guard_is_killed() {
    let place = Place::new();
    let (agent, guest) = agent(&place, |_| {});
    let words = "the guard process was killed; the guest was thawed instead of it";
    let kill_guard = || {
        let guard = std::fs::read_dir("/proc").unwrap().map(|entry| entry.unwrap().path()).find(|process| {
            let words = std::fs::read_to_string(process.join("cmdline")).unwrap_or_default();
            words.contains("freeze-guard") && words.contains(guest.socket.to_str().unwrap())
        });
        let pid = guard.unwrap().file_name().unwrap().to_owned();
        assert!(Command::new("kill").arg("-KILL").arg(pid).status().unwrap().success());
    };
    let frozen = freeze(&guest);
    kill_guard();
    agent.until_thawed();
    let error = wait(frozen.thaw()).unwrap_err().to_string();
    assert!(error.contains(words), "{error}");

    // While the agent is still freezing.
    agent.state().freezes = vec![Answer::After(Duration::from_millis(500))];
    agent.state().commands.clear();
    std::thread::scope(|scope| {
        let freezing = scope.spawn(|| refused(&guest));
        until("the agent freezes", || agent.state().commands.iter().any(|command| command == "guest-fsfreeze-freeze"));
        kill_guard();
        assert!(freezing.join().unwrap().contains(words));
    });
    agent.until_thawed();
}

/// A guard that a test talks to itself.
struct Guard {
    child: Child,
    ask: Option<ChildStdin>,
    reports: BufReader<ChildStdout>,
}

impl Guard {
    fn start(socket: &Path, more: &[&str]) -> Self {
        let mut child = Command::new(env!("CARGO_BIN_EXE_highwater"))
            .arg("freeze-guard")
            .arg(socket)
            .args(more)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let ask = child.stdin.take();
        let reports = BufReader::new(child.stdout.take().unwrap());
        Self { child, ask, reports }
    }

    fn report(&mut self) -> Value {
        let mut line = String::new();
        self.reports.read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap_or_else(|error| panic!("{line:?}: {error}"))
    }
}

#[test]
fn signals_do_not_end_the_guard() {
    let place = Place::new();
    let (agent, guest) = agent(&place, |state| state.thaws = vec![Answer::After(Duration::from_millis(300))]);
    let mut guard = Guard::start(&guest.socket, &[]);
    assert_eq!(guard.report(), json!({"frozen": FILE_SYSTEMS}));
    let status = std::fs::read_to_string(format!("/proc/{}/stat", guard.child.id())).unwrap();
    let session = status.rsplit(") ").next().unwrap().split(' ').nth(3).unwrap();
    assert_eq!(session, guard.child.id().to_string(), "it has a session of its own");
    let signals = ["TERM", "INT", "HUP", "QUIT", "USR1", "TERM"];
    for signal in signals {
        send_signal(&guard.child, signal);
    }
    std::thread::sleep(Duration::from_millis(200));
    assert!(guard.child.try_wait().unwrap().is_none() && agent.is_frozen());
    guard.ask.as_mut().unwrap().write_all(b"thaw\n").unwrap();
    for signal in signals {
        send_signal(&guard.child, signal);
    }
    let thawed = guard.report();
    assert_eq!((&thawed["thawed"], &thawed["ended-by"]), (&json!(FILE_SYSTEMS), &json!("request")));
    assert!(thawed["frozen-ms"].as_u64().unwrap() >= 500, "{thawed}");
    assert!(guard.child.wait().unwrap().success());
    assert!(!agent.is_frozen());
}

#[test]
fn the_guard_tells_how_it_ended() {
    let place = Place::new();
    let (agent, guest) = agent(&place, |_| {});
    let mut guard = Guard::start(&guest.socket, &["--limit", "50"]);
    guard.report();
    assert_eq!(guard.report()["ended-by"], "limit");
    assert!(guard.child.wait().unwrap().success());
    let mut guard = Guard::start(&guest.socket, &[]);
    guard.report();
    guard.ask = None;
    assert_eq!(guard.report()["ended-by"], "end-of-input");
    assert!(guard.child.wait().unwrap().success());
    assert!(!agent.is_frozen());

    // Nobody reads what it says.
    let mut guard = Guard::start(&guest.socket, &["--limit", "400"]);
    guard.report();
    drop(guard.reports);
    agent.until_thawed();
    assert!(guard.child.wait().unwrap().success());

    let mut guard = Guard::start(&place.path("none.sock"), &[]);
    assert!(guard.report()["error"].as_str().unwrap().contains("cannot connect"));
    assert_eq!(guard.child.wait().unwrap().code(), Some(1));
    assert!(!place.hw("--help").ok().out.contains("freeze-guard"), "the verb is not for people");
}
