//! `highwater daemon`, and what it shares with `highwater serve`.

use super::{Outcome, target};
use crate::args::{BackendArg, DaemonArgs, Global, ThreadArgs};
use crate::exit::{self, Failure};
use crate::http::{self, ApiSocket, make_private_directory};
use crate::output;
use anyhow::Context;
use api::default_socket;
use engine::{Backend, DiskState, Engine, EngineConfig, SocketAccess, chain_text};
use serde_json::json;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::watch;

pub(crate) async fn run(global: &Global, args: DaemonArgs) -> Outcome {
    let ends = Ends::new()?;
    let api = target::absolute(&global.api.clone().unwrap_or_else(default_socket))?;
    let socket = ApiSocket::bind(&api).await?;
    let nbd_socket = match args.nbd_socket {
        Some(path) => target::absolute(&path)?,
        None => api.with_file_name("nbd.sock"),
    };
    let state = target::absolute(&args.state.unwrap_or_else(default_state))?;
    make_private_directory(&state)?;
    let access = SocketAccess::parse(args.socket_mode.as_deref(), args.socket_group.as_deref())?;
    let config = config(&args.threads, Some(state), nbd_socket, access);
    let engine = Engine::start(config).await?;
    for disk in engine.disks_status().iter().filter(|d| d.state == DiskState::Failed) {
        eprintln!("highwater: disk {:?}: {}", disk.spec.name, disk.error.as_deref().unwrap_or("not open"));
    }
    for export in engine.disks_status().iter().flat_map(|d| &d.exports) {
        if let Some(error) = &export.error {
            eprintln!("highwater: export {:?}: {error}", export.name);
        }
    }
    http::resume_jobs(&engine);
    if global.wants_json() {
        output::json_line(&json!({
            "event": "ready",
            "api": api,
            "pid": std::process::id(),
            "disks": engine.disks_status(),
        }))?;
    } else if !global.quiet {
        output::line(&format!("ready: API on {}", api.display()))?;
    }
    serve_until_told(engine, Some(socket), ends).await
}

/// Where the catalogue is when nobody says so.
fn default_state() -> PathBuf {
    let set = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    if let Some(state) = set("XDG_STATE_HOME") {
        return state.join("highwater");
    }
    match set("HOME") {
        Some(home) if !rustix::process::geteuid().is_root() => home.join(".local/state/highwater"),
        _ => PathBuf::from("/var/lib/highwater"),
    }
}

/// The engine's configuration from the command line.
pub(crate) fn config(
    threads: &ThreadArgs,
    state: Option<PathBuf>,
    nbd_socket: PathBuf,
    nbd_socket_access: SocketAccess,
) -> EngineConfig {
    EngineConfig {
        threads: threads.threads.map_or(0, usize::from),
        backend: match threads.io_backend {
            BackendArg::Auto => Backend::Auto,
            BackendArg::Uring => Backend::Uring,
            BackendArg::Threads => Backend::Threads,
        },
        state,
        nbd_socket,
        nbd_socket_access,
    }
}

/// The signals that end a daemon, caught from the moment this is made.
pub(crate) struct Ends {
    terminate: Signal,
    interrupt: Signal,
    /// The terminal is gone: nobody is there to end us later.
    hang_up: Signal,
}

impl Ends {
    pub(crate) fn new() -> Result<Self, Failure> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            hang_up: signal(SignalKind::hangup())?,
        })
    }

    /// Waits for one.
    pub(crate) async fn told(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
            _ = self.hang_up.recv() => {}
        }
    }
}

/// Every connection, image and ring takes a file descriptor: as many as the system lets us have.
fn raise_open_files() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit { current: limit.maximum, maximum: limit.maximum };
    if let Err(error) = setrlimit(Resource::Nofile, raised) {
        tracing::warn!(%error, "the limit of open files could not be raised to what the system allows");
    }
}

/// Serves until a signal comes; then drains, flushes and closes. A second signal ends at once.
pub(crate) async fn serve_until_told(engine: Arc<Engine>, socket: Option<ApiSocket>, mut ends: Ends) -> Outcome {
    raise_open_files();
    let (end, ending) = watch::channel(false);
    let state = http::State { engine: Arc::clone(&engine), ending };
    let http = tokio::spawn(async move {
        match socket {
            Some(socket) => http::serve(socket, state).await,
            None => Ok(()),
        }
    });
    ends.told().await;
    let _ = end.send(true);
    tokio::select! {
        closed = engine.shut_down() => {
            if let Err(error) = closed {
                eprintln!("highwater: {}", chain_text(&error));
                return Ok(exit::FAILED);
            }
        }
        () = ends.told() => {
            eprintln!("highwater: told twice to end: not waiting for requests under way");
            // Not by the way of the destructors, which wait for the I/O threads and so perhaps for a storage that hangs.
            std::process::exit(exit::FAILED.into());
        }
    }
    // Answers under way get a moment; nobody can hold the end up.
    match tokio::time::timeout(std::time::Duration::from_secs(2), http).await {
        Ok(Ok(served)) => served.context("the API failed")?,
        Ok(Err(panicked)) => return Err(panicked.into()),
        Err(_) => {}
    }
    Ok(exit::OK)
}

/// A directory for the sockets of one `serve`, removed at its end.
pub(crate) struct SocketDirectory(PathBuf);

impl SocketDirectory {
    pub(crate) fn make() -> Result<Self, Failure> {
        let runtime = api::runtime_directory();
        let path = runtime.join(format!("serve-{}", std::process::id()));
        make_private_directory(&path).context("no place for a socket; give --socket PATH or --listen HOST:PORT")?;
        Ok(Self(path))
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for SocketDirectory {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
