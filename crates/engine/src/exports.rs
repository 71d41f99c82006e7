//! NBD servers by address, and the exports on them.
//!
//! Exports of different disks share an address; it is opened with its first export and closed with its last.

use crate::{EngineError, ExportSpec, ExportStatus, SocketAccess, TlsSpec};
use async_lock::Mutex;
use dataplane::{IoThread, IoThreads};
use export_nbd::{
    ContextSource, DiskSource, Drained, Export, ExportError, ExportStats, Server, ServerConfig, Tls, TlsIdentity,
};
use futures_util::future::join_all;
use std::collections::HashMap;
use std::fmt;
use std::io;
use std::net::{SocketAddr, ToSocketAddrs};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

/// How long requests under way are waited for when an export or the server ends.
const GRACE: Duration = Duration::from_secs(20);
/// How long handshakes are waited for when an address has no export any more.
const GRACE_EMPTY: Duration = Duration::from_secs(1);

/// How often an address in use is tried again, and the pause between.
const TRIES: u32 = 10;
const PAUSE: Duration = Duration::from_millis(50);

/// Something that is listened on.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Endpoint {
    Unix(PathBuf),
    Tcp(SocketAddr),
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "{}", path.display()),
            Self::Tcp(address) => write!(f, "{address}"),
        }
    }
}

struct Listening {
    server: Server,
    tls: Option<TlsSpec>,
    /// Of a unix socket.
    access: SocketAccess,
    /// The address in use; for port 0 the one that the system chose.
    bound: Endpoint,
}

/// All NBD servers.
pub(crate) struct Servers {
    listening: Mutex<HashMap<Endpoint, Listening>>,
    default: DefaultSocket,
}

/// Where exports are that name no address.
pub(crate) struct DefaultSocket {
    pub(crate) path: PathBuf,
    pub(crate) access: SocketAccess,
}

/// What an export shows, and where it lives.
pub(crate) struct Served {
    pub(crate) thread: IoThread,
    pub(crate) disk: DiskSource,
    pub(crate) contexts: ContextSource,
}

/// An export that is open, or could not be opened.
pub(crate) struct OpenExport {
    pub(crate) status: ExportStatus,
    pub(crate) stats: Arc<ExportStats>,
    endpoints: Vec<Endpoint>,
}

impl OpenExport {
    /// An export of the catalogue that could not be opened.
    pub(crate) fn failed(disk: &str, spec: &ExportSpec, error: String) -> Self {
        let name = spec.name_for(disk).to_owned();
        let status = ExportStatus { name, spec: spec.clone(), uris: Vec::new(), error: Some(error) };
        Self { status, stats: Arc::default(), endpoints: Vec::new() }
    }
}

impl Servers {
    /// No server yet.
    pub(crate) fn new(default: DefaultSocket) -> Self {
        Self { listening: Mutex::default(), default }
    }

    /// Opens an export on all its addresses, or on none.
    pub(crate) async fn open(
        &self,
        threads: &IoThreads,
        disk: &str,
        spec: &ExportSpec,
        served: &Served,
    ) -> Result<OpenExport, EngineError> {
        let name = spec.name_for(disk).to_owned();
        let mut endpoints: Vec<(Endpoint, Option<&str>)> = Vec::new();
        let access = match &spec.socket {
            None => self.default.access,
            Some(_) => SocketAccess::parse(spec.socket_mode.as_deref(), spec.socket_group.as_deref())?,
        };
        if let Some(path) = &spec.socket {
            endpoints.push((Endpoint::Unix(path.clone()), None));
        }
        if let Some(listen) = &spec.listen {
            endpoints.push((Endpoint::Tcp(resolve(listen)?), Some(listen)));
        }
        if endpoints.is_empty() {
            endpoints.push((Endpoint::Unix(self.default.path.clone()), None));
        }
        let mut open = OpenExport {
            status: ExportStatus { name: name.clone(), spec: spec.clone(), uris: Vec::new(), error: None },
            stats: Arc::default(),
            endpoints: Vec::new(),
        };
        for (endpoint, listen) in endpoints {
            let result = self.open_on(threads, &endpoint, access, spec, &name, served, &open.stats).await;
            match result {
                Ok(bound) => {
                    open.status.uris.push(uri(&bound, &name, spec.tls.is_some(), listen));
                    open.endpoints.push(endpoint);
                }
                Err(error) => {
                    self.close(open).await;
                    return Err(error);
                }
            }
        }
        Ok(open)
    }

    #[expect(clippy::too_many_arguments, reason = "one caller, which has them all at hand")]
    async fn open_on(
        &self,
        threads: &IoThreads,
        endpoint: &Endpoint,
        access: SocketAccess,
        spec: &ExportSpec,
        name: &str,
        served: &Served,
        stats: &Arc<ExportStats>,
    ) -> Result<Endpoint, EngineError> {
        let mut servers = self.listening.lock().await;
        // Port 0 means another address each time.
        let known = !matches!(endpoint, Endpoint::Tcp(address) if address.port() == 0);
        if !known {
            return Err(EngineError::Invalid("give the port to listen on; 0 cannot be named again later".to_owned()));
        }
        if let Some(listening) = servers.get(endpoint)
            && listening.tls != spec.tls
        {
            return Err(EngineError::TlsDiffers { endpoint: endpoint.to_string() });
        }
        if let (Some(listening), Endpoint::Unix(_)) = (servers.get(endpoint), endpoint)
            && listening.access != access
        {
            return Err(EngineError::SocketDiffers { endpoint: endpoint.to_string() });
        }
        if !servers.contains_key(endpoint) {
            let listening = listen_soon(threads, endpoint, access, spec.tls.as_ref()).await?;
            servers.insert(endpoint.clone(), listening);
        }
        let Some(Listening { server, bound, .. }) = servers.get(endpoint) else {
            return Err(EngineError::ThreadGone);
        };
        let (server, bound) = (server.clone(), bound.clone());
        let export = Export {
            read_only: spec.read_only,
            stats: Arc::clone(stats),
            contexts: Arc::clone(&served.contexts),
            ..Export::new(name, served.thread.clone(), Arc::clone(&served.disk))
        };
        let added = server.add_export(export);
        if added.is_err() && server.exports().is_empty() {
            servers.remove(endpoint);
            let _ = server.shutdown(GRACE_EMPTY).await;
        }
        match added {
            Ok(()) => Ok(bound),
            Err(ExportError::Exists(export)) => {
                Err(EngineError::ExportExists { export, endpoint: endpoint.to_string() })
            }
            Err(other) => Err(EngineError::Invalid(other.to_string())),
        }
    }

    /// Drains and closes exports on all their addresses, all at the same time: the grace is for all together.
    pub(crate) async fn close_all(&self, exports: Vec<OpenExport>) {
        join_all(exports.into_iter().map(|export| self.close(export))).await;
    }

    /// Drains and closes an export on all its addresses.
    pub(crate) async fn close(&self, export: OpenExport) {
        let name = &export.status.name;
        join_all(export.endpoints.iter().map(|endpoint| self.close_at(name, endpoint))).await;
    }

    async fn close_at(&self, name: &str, endpoint: &Endpoint) {
        let server = self.listening.lock().await.get(endpoint).map(|l| l.server.clone());
        let Some(server) = server else { return };
        match server.remove_export(name, GRACE) {
            Ok(drained) => match drained.await {
                Ok(drained) => tell(name, &drained),
                Err(_) => tracing::error!(export = name, "an i/o thread ended while the export was drained"),
            },
            Err(error) => tracing::warn!(export = name, %error, "closing an export"),
        }
        let mut servers = self.listening.lock().await;
        // Somebody else may have closed the server meanwhile, and a third one have opened the address anew.
        let is_still_it = servers.get(endpoint).is_some_and(|listening| listening.server.is(&server));
        if is_still_it && server.exports().is_empty() {
            servers.remove(endpoint);
            // Under the lock, so that nobody opens the address before its socket is gone.
            let _ = server.shutdown(GRACE_EMPTY).await;
        }
    }

    /// Drains and closes all.
    pub(crate) async fn stop(&self) {
        let mut servers = self.listening.lock().await;
        let ends = servers.drain().map(|(endpoint, listening)| async move {
            match listening.server.shutdown(GRACE).await {
                Ok(drained) => tell(&endpoint.to_string(), &drained),
                Err(_) => tracing::error!(%endpoint, "an i/o thread ended while the server was drained"),
            }
        });
        join_all(ends).await;
    }
}

fn tell(what: &str, drained: &Drained) {
    if drained.aborted > 0 || drained.stuck > 0 {
        tracing::warn!(
            export = what,
            aborted = drained.aborted,
            stuck = drained.stuck,
            "connections did not finish in time"
        );
    }
    for (export, error) in &drained.failed_flushes {
        tracing::error!(export, %error, "the last flush failed");
    }
}

/// Listens; an address in use is tried again for a moment: the kernel takes down a killed process's io_uring, and
/// with it its sockets, only when the process is gone already.
async fn listen_soon(
    threads: &IoThreads,
    endpoint: &Endpoint,
    access: SocketAccess,
    tls: Option<&TlsSpec>,
) -> Result<Listening, EngineError> {
    let mut tries = 0;
    loop {
        match listen(threads, endpoint, access, tls) {
            Err(EngineError::Listen { source, .. }) if source.kind() == io::ErrorKind::AddrInUse && tries < TRIES => {
                tries += 1;
                threads.pick().spawn(|| dataplane::sleep(PAUSE)).await.map_err(|_| EngineError::ThreadGone)?;
            }
            result => return result,
        }
    }
}

fn listen(
    threads: &IoThreads,
    endpoint: &Endpoint,
    access: SocketAccess,
    tls_spec: Option<&TlsSpec>,
) -> Result<Listening, EngineError> {
    let tls = match tls_spec {
        None => Tls::Off,
        Some(TlsSpec { dir, required, verify }) => {
            let identity = TlsIdentity::from_directory(dir, *verify)
                .map_err(|e| EngineError::Tls { dir: dir.clone(), reason: e.to_string() })?;
            if *required { Tls::Required(identity) } else { Tls::Optional(identity) }
        }
    };
    let server = Server::new(ServerConfig::default(), threads.all());
    let bound = match endpoint {
        Endpoint::Unix(path) => server.listen_unix(path, tls).map(|()| endpoint.clone()),
        Endpoint::Tcp(address) => server.listen_tcp(*address, tls).map(Endpoint::Tcp),
    };
    let bound = bound.map_err(|source| EngineError::Listen { endpoint: endpoint.to_string(), source })?;
    if let Endpoint::Unix(path) = endpoint {
        access.apply(path).map_err(|e| EngineError::file(path, "set the socket's mode and group", e))?;
    }
    Ok(Listening { server, tls: tls_spec.cloned(), access, bound })
}

/// The address that `HOST:PORT` means.
fn resolve(listen: &str) -> Result<SocketAddr, EngineError> {
    let split = listen.rsplit_once(':').filter(|(host, port)| !host.is_empty() && port.parse::<u16>().is_ok());
    if split.is_none() {
        return Err(EngineError::Invalid(format!(
            "{listen:?} is not an address to listen on: expected HOST:PORT or [IPV6]:PORT, such as 127.0.0.1:10809"
        )));
    }
    let failed = |source| EngineError::Listen { endpoint: listen.to_owned(), source };
    let mut addresses = listen.to_socket_addrs().map_err(failed)?;
    addresses.next().ok_or_else(|| failed(io::Error::from(io::ErrorKind::AddrNotAvailable)))
}

/// The NBD URI of an export.
fn uri(endpoint: &Endpoint, name: &str, tls: bool, listen: Option<&str>) -> String {
    let scheme = if tls { "nbds" } else { "nbd" };
    let name = percent(name, b"");
    match endpoint {
        Endpoint::Unix(path) => {
            format!("{scheme}+unix:///{name}?socket={}", percent(&path.to_string_lossy(), b"/"))
        }
        Endpoint::Tcp(address) => {
            let host = listen.and_then(|l| l.rsplit_once(':')).map(|(host, _)| host);
            let host = match host {
                Some(host) if !address.ip().is_unspecified() && !host.is_empty() => host.to_owned(),
                _ => "localhost".to_owned(),
            };
            format!("{scheme}://{host}:{}/{name}", address.port())
        }
    }
}

/// What a URI may not hold, encoded; `also` may stay.
fn percent(text: &str, also: &[u8]) -> String {
    text.bytes()
        .map(|b| match b {
            b if b.is_ascii_alphanumeric() || b"._-~".contains(&b) || also.contains(&b) => char::from(b).to_string(),
            b => format!("%{b:02X}"),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uris() {
        let unix = Endpoint::Unix("/run/a b.sock".into());
        assert_eq!(uri(&unix, "d", false, None), "nbd+unix:///d?socket=/run/a%20b.sock");
        let tcp = Endpoint::Tcp("127.0.0.1:10809".parse().unwrap());
        assert_eq!(uri(&tcp, "d/1", true, Some("host:10809")), "nbds://host:10809/d%2F1");
        let any = Endpoint::Tcp("0.0.0.0:1".parse().unwrap());
        assert_eq!(uri(&any, "d", false, Some("0.0.0.0:1")), "nbd://localhost:1/d");
    }
}
