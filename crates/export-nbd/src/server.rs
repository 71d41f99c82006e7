//! The server: listeners, exports, connections, and their end.

use crate::connection::{ConnectionInfo, Control, Course};
use crate::execute::Target;
use crate::export::Export;
use crate::handshake::{Negotiated, negotiate};
use crate::negotiation::ExportFacts;
use crate::occasional::Occasional;
use crate::session::{self, End, Limits};
use crate::stream::Stream;
use crate::tls::Tls;
use crate::wire::MAX_STRING;
use dataplane::net::{Listener, Socket};
use dataplane::{IoThread, Remote};
use disk::DiskError;
use event_listener::Event;
use futures_util::future::{Either, select};
use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, RwLock};
use std::time::{Duration, Instant};

/// How long requests may go on after their connection was ended by force.
const AFTER_ABORT: Duration = Duration::from_secs(2);
/// Shortest time that the flush at the end is given.
const FLUSH_AT_LEAST: Duration = Duration::from_secs(5);
/// Pause after an accept that failed for want of something (descriptors, memory).
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Bounds of a server.
#[derive(Clone, Copy, Debug)]
pub struct ServerConfig {
    /// Time from a connection's arrival to its transmission phase.
    pub handshake_timeout: Duration,
    /// Connections at once, those in the handshake included; more are closed at once.
    pub max_connections: usize,
    /// Requests of one connection under way.
    pub max_requests: usize,
    /// Bytes of payloads and replies that one connection holds, unless a single request has more.
    pub max_bytes: u64,
    /// Bytes that all connections hold together: with many of them each may hold its share only, but 1 MiB, or one
    /// request, in any case.
    pub max_bytes_together: u64,
}

impl Default for ServerConfig {
    fn default() -> Self {
        Self {
            handshake_timeout: Duration::from_secs(30),
            max_connections: 1024,
            max_requests: 256,
            max_bytes: 64 << 20,
            max_bytes_together: 2 << 30,
        }
    }
}

/// Why an export could not be added or removed.
#[derive(Debug, PartialEq, Eq)]
pub enum ExportError {
    /// There is one of that name.
    Exists(String),
    /// There is none of that name.
    Unknown(String),
    /// The name is longer than 4096 bytes or contains NUL.
    BadName,
    /// The server is shutting down.
    ShuttingDown,
}

impl fmt::Display for ExportError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exists(name) => write!(f, "export {name:?}: exists already; choose another name"),
            Self::Unknown(name) => write!(f, "export {name:?}: not found"),
            Self::BadName => f.write_str("export name: expected at most 4096 bytes and no NUL"),
            Self::ShuttingDown => f.write_str("server is shutting down"),
        }
    }
}

impl std::error::Error for ExportError {}

/// How a drain went.
#[derive(Debug, Default)]
pub struct Drained {
    /// Connections that were ended by force when the time was over.
    pub aborted: usize,
    /// Connections whose requests did not finish even then.
    pub stuck: usize,
    /// Exports whose disk could not be flushed.
    pub failed_flushes: Vec<(String, DiskError)>,
}

/// An NBD server. Clones are handles to the same one; it lives until [`Server::shutdown`], and its
/// connections until they end, whether or not handles remain.
#[derive(Clone)]
pub struct Server(Arc<Shared>);

pub(crate) struct Shared {
    config: ServerConfig,
    threads: Vec<IoThread>,
    next_thread: AtomicUsize,
    next_id: AtomicU64,
    exports: RwLock<BTreeMap<String, Arc<Listed>>>,
    connections: Mutex<BTreeMap<u64, Arc<Control>>>,
    /// As many as there are in `connections`.
    count: Arc<AtomicUsize>,
    refusals: Occasional,
    violations: Occasional,
    /// A connection ended.
    ended: Event,
    stopping: AtomicBool,
    stop: Event,
    listeners: Mutex<Vec<Remote<()>>>,
}

/// An export in the list, and its connections.
pub(crate) struct Listed {
    pub(crate) export: Export,
    users: Mutex<Users>,
    /// That contexts are not shown for there are too many.
    hidden_contexts: Occasional,
}

#[derive(Default)]
struct Users {
    /// No more connections.
    removed: bool,
    connections: BTreeMap<u64, Arc<Control>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().expect("no panic while the lock is held")
}

impl Listed {
    fn new(export: Export) -> Self {
        Self { export, users: Mutex::default(), hidden_contexts: Occasional::default() }
    }

    /// What clients may learn, as it is now; `None` when the disk is gone.
    pub(crate) async fn facts(self: &Arc<Self>, with_contexts: bool) -> Option<ExportFacts> {
        let this = Arc::clone(self);
        let facts = self.export.home.spawn(move || async move {
            let disk = (this.export.disk)()?;
            Some(this.export.facts(&disk, with_contexts))
        });
        let facts = facts.await.ok().flatten()?;
        let left_out = facts.contexts.as_ref().map_or(0, |collected| collected.left_out);
        if left_out > 0
            && let Some(unsaid) = self.hidden_contexts.due()
        {
            tracing::warn!(export = self.export.name, left_out, unsaid, "metadata contexts are not shown: too many");
        }
        Some(facts)
    }

    /// Makes completed writes durable; on any I/O thread.
    async fn flush(self: &Arc<Self>) -> disk::Result<()> {
        let this = Arc::clone(self);
        let flush = self.export.home.spawn(move || async move {
            match (this.export.disk)() {
                Some(disk) if !disk.geometry().read_only => disk.flush().await,
                _ => Ok(()),
            }
        });
        flush.await.unwrap_or(Ok(())) // The thread is gone, and the disk with it.
    }
}

impl Server {
    /// A server without listeners and exports, whose handshakes run on `threads` (at least one).
    pub fn new(config: ServerConfig, threads: &[IoThread]) -> Self {
        assert!(!threads.is_empty(), "a server needs an I/O thread");
        Self(Arc::new(Shared {
            config,
            threads: threads.to_vec(),
            next_thread: AtomicUsize::new(0),
            next_id: AtomicU64::new(1),
            exports: RwLock::default(),
            connections: Mutex::default(),
            count: Arc::default(),
            refusals: Occasional::default(),
            violations: Occasional::default(),
            ended: Event::new(),
            stopping: AtomicBool::new(false),
            stop: Event::new(),
            listeners: Mutex::default(),
        }))
    }

    /// Listens at a path; a stale socket file is replaced, and the file is removed at the end.
    pub fn listen_unix(&self, path: &Path, tls: Tls) -> io::Result<()> {
        self.listen(Listener::bind_unix(path)?, tls)
    }

    /// Listens on a TCP address; returns the one in use (port 0 lets the system choose).
    pub fn listen_tcp(&self, address: SocketAddr, tls: Tls) -> io::Result<SocketAddr> {
        let listener = Listener::bind_tcp(address)?;
        let bound = listener.local_addr()?;
        self.listen(listener, tls)?;
        Ok(bound)
    }

    /// Takes over a listener, say one that was handed over by systemd.
    pub fn listen(&self, listener: Listener, tls: Tls) -> io::Result<()> {
        let shared = Arc::clone(&self.0);
        let mut listeners = lock(&self.0.listeners);
        if self.0.stopping.load(Ordering::Acquire) {
            return Err(io::Error::other("the NBD server is shutting down"));
        }
        listeners.push(self.0.pick().spawn(move || accept(shared, listener, tls)));
        Ok(())
    }

    /// Adds an export; clients find it at once.
    pub fn add_export(&self, export: Export) -> Result<(), ExportError> {
        if export.name.len() > MAX_STRING || export.name.contains('\0') {
            return Err(ExportError::BadName);
        }
        let mut exports = self.0.exports.write().expect("no panic while the lock is held");
        if self.0.stopping.load(Ordering::Acquire) {
            return Err(ExportError::ShuttingDown);
        }
        if exports.contains_key(&export.name) {
            return Err(ExportError::Exists(export.name));
        }
        exports.insert(export.name.clone(), Arc::new(Listed::new(export)));
        Ok(())
    }

    /// Removes an export: clients do not find it any more at once; its connections finish what is under way,
    /// for at most `grace`, and end; then its disk is flushed. The disk may be closed afterwards.
    pub fn remove_export(&self, name: &str, grace: Duration) -> Result<Remote<Drained>, ExportError> {
        let removed = self.0.exports.write().expect("no panic while the lock is held").remove(name);
        let Some(listed) = removed else {
            return Err(ExportError::Unknown(name.to_owned()));
        };
        lock(&listed.users).removed = true;
        let shared = Arc::clone(&self.0);
        Ok(self.0.pick().spawn(move || async move {
            let of_export = || lock(&listed.users).connections.values().cloned().collect::<Vec<_>>();
            let mut drained = shared.drain(grace, of_export).await;
            shared.flush(std::slice::from_ref(&listed), &mut drained, FLUSH_AT_LEAST.max(grace)).await;
            drained
        }))
    }

    /// Whether both are handles to the same server.
    pub fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    /// Names of all exports.
    pub fn exports(&self) -> Vec<String> {
        self.0.exports.read().expect("no panic while the lock is held").keys().cloned().collect()
    }

    /// All connections, those in the handshake included.
    pub fn connections(&self) -> Vec<ConnectionInfo> {
        lock(&self.0.connections).values().map(|control| control.info()).collect()
    }

    /// Ends one connection when its requests under way are done. False when there is none of that number.
    pub fn disconnect(&self, id: u64) -> bool {
        let control = lock(&self.0.connections).get(&id).cloned();
        control.map(|control| control.set(Course::Drain)).is_some()
    }

    /// Ends the server: no more connections are taken; those there are finish what is under way, for at most
    /// `grace`, and end; then all disks are flushed (they are not closed).
    ///
    /// The result may be awaited on any executor. The I/O threads must go on meanwhile.
    pub fn shutdown(&self, grace: Duration) -> Remote<Drained> {
        let shared = Arc::clone(&self.0);
        self.0.pick().spawn(move || async move {
            let listeners = {
                let mut listeners = lock(&shared.listeners);
                shared.stopping.store(true, Ordering::Release);
                std::mem::take(&mut *listeners)
            };
            shared.stop.notify(usize::MAX);
            for listener in listeners {
                let _ = listener.await; // Fails when its thread is gone: it has stopped listening.
            }
            let everybody = || lock(&shared.connections).values().cloned().collect::<Vec<_>>();
            let mut drained = shared.drain(grace, everybody).await;
            let exports = shared.list();
            shared.flush(&exports, &mut drained, FLUSH_AT_LEAST.max(grace)).await;
            drained
        })
    }
}

impl fmt::Debug for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Server").field("exports", &self.exports()).finish_non_exhaustive()
    }
}

impl Shared {
    fn pick(&self) -> &IoThread {
        &self.threads[self.next_thread.fetch_add(1, Ordering::Relaxed) % self.threads.len()]
    }

    /// All exports, by name.
    pub(crate) fn list(&self) -> Vec<Arc<Listed>> {
        self.exports.read().expect("no panic while the lock is held").values().cloned().collect()
    }

    /// The export that a client means.
    pub(crate) fn find(&self, name: &str) -> Option<Arc<Listed>> {
        let exports = self.exports.read().expect("no panic while the lock is held");
        match exports.get(name) {
            None if name.is_empty() && exports.len() == 1 => exports.values().next().cloned(),
            found => found.cloned(),
        }
    }

    /// Drains the connections that `whose` names, until it names none.
    async fn drain(&self, grace: Duration, whose: impl Fn() -> Vec<Arc<Control>>) -> Drained {
        let end = Instant::now() + grace;
        self.steer(Course::Drain, end, &whose).await;
        let late = whose().len();
        if late > 0 {
            self.steer(Course::Abort, Instant::now() + AFTER_ABORT, &whose).await;
        }
        Drained { aborted: late, stuck: whose().len(), failed_flushes: Vec::new() }
    }

    /// Sets the course of all that `whose` names until there are none, or it is `end`.
    async fn steer(&self, course: Course, end: Instant, whose: &impl Fn() -> Vec<Arc<Control>>) {
        loop {
            let ended = self.ended.listen(); // Before the look, so that no end is missed.
            let connections = whose();
            connections.iter().for_each(|control| control.set(course));
            let left = end.saturating_duration_since(Instant::now());
            if connections.is_empty() || left.is_zero() || dataplane::timeout(left, ended).await.is_none() {
                return;
            }
        }
    }

    async fn flush(&self, exports: &[Arc<Listed>], drained: &mut Drained, limit: Duration) {
        for listed in exports {
            let name = || listed.export.name.clone();
            match dataplane::timeout(limit, listed.flush()).await {
                Some(Ok(())) => {}
                Some(Err(error)) => drained.failed_flushes.push((name(), error)),
                None => {
                    let error = DiskError::new(disk::ErrorKind::Io, disk::Operation::Flush);
                    drained.failed_flushes.push((name(), error.because("not done in time")));
                }
            }
        }
    }
}

/// Takes connections until the server stops.
async fn accept(shared: Arc<Shared>, listener: Listener, tls: Tls) {
    loop {
        let stop = shared.stop.listen();
        if shared.stopping.load(Ordering::Acquire) {
            return;
        }
        let accepted = match select(pin!(listener.accept()), stop).await {
            Either::Left((accepted, _)) => accepted,
            Either::Right(_) => return,
        };
        match accepted {
            Ok(socket) => begin(&shared, socket, &tls),
            Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
            Err(error) => {
                tracing::warn!(%error, ?listener, "accepting a connection");
                dataplane::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// Enters a connection and starts its handshake.
fn begin(shared: &Arc<Shared>, socket: Socket, tls: &Tls) {
    let id = shared.next_id.fetch_add(1, Ordering::Relaxed);
    let control = Control::new(id, socket.peer());
    {
        let mut connections = lock(&shared.connections);
        if connections.len() >= shared.config.max_connections {
            if let Some(unsaid) = shared.refusals.due() {
                let limit = shared.config.max_connections;
                tracing::warn!(peer = socket.peer(), limit, unsaid, "too many connections");
            }
            return;
        }
        connections.insert(id, Arc::clone(&control));
        shared.count.store(connections.len(), Ordering::Relaxed);
    }
    keep_alive(&socket);
    let entry = Entry { shared: Arc::clone(shared), id, control, export: None };
    let tls = tls.clone();
    drop(shared.pick().spawn(move || connection(entry, socket, tls)));
}

/// Notices in the end when a peer's host is gone (2 minutes, then 4 probes).
fn keep_alive(socket: &Socket) {
    use rustix::net::sockopt;
    // Fails on unix sockets, which need it not.
    let _ = sockopt::set_socket_keepalive(socket, true)
        .and_then(|()| sockopt::set_tcp_keepidle(socket, Duration::from_secs(120)))
        .and_then(|()| sockopt::set_tcp_keepintvl(socket, Duration::from_secs(30)))
        .and_then(|()| sockopt::set_tcp_keepcnt(socket, 4));
}

/// A connection's place in the lists, until dropped.
struct Entry {
    shared: Arc<Shared>,
    id: u64,
    control: Arc<Control>,
    export: Option<Arc<Listed>>,
}

impl Entry {
    /// Enters the connection with its export; false when that was removed meanwhile.
    fn join(&mut self, listed: &Arc<Listed>) -> bool {
        let mut users = lock(&listed.users);
        if users.removed {
            return false;
        }
        users.connections.insert(self.id, Arc::clone(&self.control));
        drop(users);
        self.export = Some(Arc::clone(listed));
        self.control.update(|info| info.export = Some(listed.export.name.clone()));
        true
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        if let Some(listed) = &self.export {
            lock(&listed.users).connections.remove(&self.id);
        }
        let mut connections = lock(&self.shared.connections);
        connections.remove(&self.id);
        self.shared.count.store(connections.len(), Ordering::Relaxed);
        drop(connections);
        self.shared.ended.notify(usize::MAX);
    }
}

/// A connection from its first byte to its last.
async fn connection(mut entry: Entry, socket: Socket, tls: Tls) {
    let peer = socket.peer();
    let limit = entry.shared.config.handshake_timeout;
    let stream = Stream::plain(socket);
    let negotiated = dataplane::timeout(limit, negotiate(&entry.shared, stream, &tls, &entry.control)).await;
    let Negotiated { stream, agreement, export, early } = match negotiated {
        Some(Ok(negotiated)) => negotiated,
        Some(Err(end)) => return tracing::debug!(peer, ?end, "connection ended in the handshake"),
        None => return tracing::debug!(peer, "handshake took too long"),
    };
    if !entry.join(&export) {
        return;
    }
    let home = export.export.home.clone();
    let config = entry.shared.config;
    drop(home.spawn(move || async move {
        let Some(disk) = (export.export.disk)() else {
            return tracing::info!(peer, export = export.export.name, "disk was closed during a handshake");
        };
        tracing::info!(peer, export = export.export.name, encrypted = stream.is_encrypted(), "client connected");
        let limits = Limits {
            requests: config.max_requests,
            bytes: config.max_bytes,
            total_bytes: config.max_bytes_together,
            sharers: Arc::clone(&entry.shared.count),
        };
        let target = Target::new(disk, agreement);
        let stats = Arc::clone(&export.export.stats);
        let end = session::serve(stream, early, target, stats, Arc::clone(&entry.control), limits).await;
        match end {
            End::Orderly | End::Closed => tracing::info!(peer, export = export.export.name, "client disconnected"),
            End::Violation(reason) => {
                if let Some(unsaid) = entry.shared.violations.due() {
                    tracing::warn!(peer, export = export.export.name, reason, unsaid, "client broke the protocol");
                }
            }
            End::Failed(error) => tracing::info!(peer, export = export.export.name, %error, "connection failed"),
        }
        drop(entry);
    }));
}
