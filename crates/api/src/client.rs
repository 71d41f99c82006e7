//! The client of the daemon's API, over its unix socket.

use crate::types::{
    ChangesQuery, DiskList, ErrorBody, ExportQuery, ImageChain, JobList, JobQuery, JobRate, MapQuery, MapReply,
    MarkList, ResizeRequest, SnapshotList, VersionInfo, ViewList,
};
use engine::history::report::{ChangesReport, HistoryReport, MarkReport};
use engine::history::{MarkSpec, ViewReport};
use engine::images::report::ImageInfo;
use engine::linkage::ChainReport;
use engine::snapshots::{CloneSpec, SnapshotReport, SnapshotSpec};
use engine::{DiskSpec, DiskStatus, Event, ExportSpec, ExportStatus, JobKind, JobStatus};
use reqwest::{Method, RequestBuilder, Response, StatusCode};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// How long an answer to a question may take. Changes take as long as they take.
const PATIENCE: Duration = Duration::from_secs(30);
/// No event is longer.
const LONGEST_EVENT: usize = 1 << 20;

/// A failed call.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody answers on the socket.
    #[error(
        "no daemon answers on {}; start one with `highwater daemon` or name its socket with --api",
        socket.display()
    )]
    NoDaemon {
        /// The socket.
        socket: PathBuf,
        /// Why.
        #[source]
        source: reqwest::Error,
    },
    /// The daemon refused.
    #[error("{}", body.error)]
    Refused {
        /// HTTP's status code.
        status: u16,
        /// What the daemon said.
        body: ErrorBody,
    },
    /// The socket is there, but nobody answers.
    #[error("no answer on {} within {} seconds; is it a highwater daemon's API socket?", socket.display(), PATIENCE.as_secs())]
    Silent {
        /// The socket.
        socket: PathBuf,
    },
    /// The talk broke off, or the answer was not understood.
    #[error("the daemon's answer on {} was not understood", socket.display())]
    Broken {
        /// The socket.
        socket: PathBuf,
        /// Why.
        #[source]
        source: reqwest::Error,
    },
}

impl ClientError {
    /// The daemon's class of the error, when it gave one.
    pub fn kind(&self) -> Option<&str> {
        match self {
            Self::Refused { body, .. } => Some(&body.kind),
            _ => None,
        }
    }
}

type Result<T> = std::result::Result<T, ClientError>;

/// A client of one daemon.
#[derive(Clone, Debug)]
pub struct Client {
    http: reqwest::Client,
    socket: PathBuf,
}

impl Client {
    /// A client of the daemon on that socket. Does not connect yet.
    ///
    /// # Errors
    /// When the HTTP client cannot be made.
    pub fn new(socket: &Path) -> Result<Self> {
        let http = reqwest::Client::builder()
            .unix_socket(socket)
            .build()
            .map_err(|source| ClientError::Broken { socket: socket.to_owned(), source })?;
        Ok(Self { http, socket: socket.to_owned() })
    }

    /// The daemon's socket.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Who answers.
    pub async fn version(&self) -> Result<VersionInfo> {
        self.get("/v1/version").await
    }

    /// All disks.
    pub async fn disks(&self) -> Result<DiskList> {
        self.get("/v1/disks").await
    }

    /// One disk.
    pub async fn disk(&self, name: &str) -> Result<DiskStatus> {
        self.get(&disk_path(name, "")).await
    }

    /// Adds a disk and opens its exports.
    pub async fn add_disk(&self, spec: &DiskSpec) -> Result<DiskStatus> {
        self.send(self.request(Method::POST, "/v1/disks").json(spec)).await
    }

    /// Closes a disk and forgets it; its image is left.
    pub async fn remove_disk(&self, name: &str) -> Result<()> {
        self.done(self.request(Method::DELETE, &disk_path(name, ""))).await
    }

    /// Opens an export.
    pub async fn add_export(&self, disk: &str, spec: &ExportSpec) -> Result<ExportStatus> {
        self.send(self.request(Method::POST, &disk_path(disk, "/exports")).json(spec)).await
    }

    /// Tries again to open a disk, or its exports, that could not be opened.
    pub async fn open_disk(&self, name: &str) -> Result<DiskStatus> {
        self.send(self.request(Method::POST, &disk_path(name, "/open"))).await
    }

    /// Closes one export of a disk.
    pub async fn remove_export(&self, disk: &str, name: &str) -> Result<()> {
        self.remove_exports(disk, &ExportQuery { name: Some(name.to_owned()), all: false }).await
    }

    /// Closes all exports of a disk.
    pub async fn remove_all_exports(&self, disk: &str) -> Result<()> {
        self.remove_exports(disk, &ExportQuery { name: None, all: true }).await
    }

    async fn remove_exports(&self, disk: &str, query: &ExportQuery) -> Result<()> {
        self.done(self.request(Method::DELETE, &with_query(&disk_path(disk, "/exports"), query))).await
    }

    /// An image's facts.
    pub async fn info(&self, disk: &str) -> Result<ImageInfo> {
        self.get(&disk_path(disk, "/info")).await
    }

    /// The facts of a disk's image and of all images below it, top first.
    pub async fn chain(&self, disk: &str) -> Result<Vec<ImageInfo>> {
        let ImageChain { images } = self.get(&disk_path(disk, "/chain")).await?;
        Ok(images)
    }

    /// The layers of a disk's chain, how they fit, and who else depends on them.
    pub async fn linkage(&self, disk: &str) -> Result<ChainReport> {
        self.get(&disk_path(disk, "/linkage")).await
    }

    /// A part of a disk's map.
    pub async fn map(&self, disk: &str, query: &MapQuery) -> Result<MapReply> {
        self.get(&with_query(&disk_path(disk, "/map"), query)).await
    }

    /// Changes a disk's size.
    pub async fn resize(&self, disk: &str, request: &ResizeRequest) -> Result<DiskStatus> {
        self.send(self.request(Method::POST, &disk_path(disk, "/resize")).json(request)).await
    }

    /// Takes a mark of disks, or of all disks of virtual machines, at one instant.
    pub async fn mark(&self, spec: &MarkSpec) -> Result<Vec<MarkReport>> {
        let MarkList { marks } = self.send(self.request(Method::POST, "/v1/marks").json(spec)).await?;
        Ok(marks)
    }

    /// A disk's history, as it is now.
    pub async fn history(&self, disk: &str) -> Result<HistoryReport> {
        self.get(&disk_path(disk, "/history")).await
    }

    /// All views.
    pub async fn views(&self) -> Result<Vec<ViewReport>> {
        let ViewList { views } = self.get("/v1/views").await?;
        Ok(views)
    }

    /// Closes a view and forgets what it has saved.
    pub async fn close_view(&self, name: &str) -> Result<()> {
        self.done(self.request(Method::DELETE, &format!("/v1/views/{}", percent(name)))).await
    }

    /// A disk's marks, oldest first.
    pub async fn marks(&self, disk: &str) -> Result<Vec<MarkReport>> {
        let MarkList { marks } = self.get(&disk_path(disk, "/marks")).await?;
        Ok(marks)
    }

    /// One mark of a disk.
    pub async fn mark_named(&self, disk: &str, mark: &str) -> Result<MarkReport> {
        self.get(&mark_path(disk, mark)).await
    }

    /// Forgets a mark.
    pub async fn delete_mark(&self, disk: &str, mark: &str) -> Result<()> {
        self.done(self.request(Method::DELETE, &mark_path(disk, mark))).await
    }

    /// Trusts all marks of a disk again, on the user's word that nobody has changed the image unseen.
    pub async fn trust_history(&self, disk: &str) -> Result<Vec<MarkReport>> {
        let MarkList { marks } = self.send(self.request(Method::POST, &disk_path(disk, "/history/trust"))).await?;
        Ok(marks)
    }

    /// Takes a snapshot of disks, or of all disks of virtual machines, at one instant.
    pub async fn snapshot(&self, spec: &SnapshotSpec) -> Result<Vec<SnapshotReport>> {
        let SnapshotList { snapshots } = self.send(self.request(Method::POST, "/v1/snapshots").json(spec)).await?;
        Ok(snapshots)
    }

    /// The snapshots of a disk, oldest first.
    pub async fn snapshots(&self, disk: &str) -> Result<Vec<SnapshotReport>> {
        let SnapshotList { snapshots } = self.get(&disk_path(disk, "/snapshots")).await?;
        Ok(snapshots)
    }

    /// Has a disk that nobody is connected to go back to a snapshot.
    pub async fn revert(&self, disk: &str, snapshot: &str) -> Result<DiskStatus> {
        self.send(self.request(Method::POST, &snapshot_path(disk, snapshot, "/revert"))).await
    }

    /// Makes a new image that begins as a snapshot of a disk.
    pub async fn clone_snapshot(&self, disk: &str, snapshot: &str, spec: &CloneSpec) -> Result<ImageInfo> {
        self.send(self.request(Method::POST, &snapshot_path(disk, snapshot, "/clones")).json(spec)).await
    }

    /// A part of what changed on a disk.
    pub async fn changes(&self, disk: &str, query: &ChangesQuery) -> Result<ChangesReport> {
        self.get(&with_query(&disk_path(disk, "/changes"), query)).await
    }

    /// Starts a job.
    pub async fn start_job(&self, kind: &JobKind, how: &JobQuery) -> Result<JobStatus> {
        self.send(self.request(Method::POST, &with_query("/v1/jobs", how)).json(kind)).await
    }

    /// All jobs.
    pub async fn jobs(&self) -> Result<JobList> {
        self.get("/v1/jobs").await
    }

    /// One job.
    pub async fn job(&self, id: u64) -> Result<JobStatus> {
        self.get(&format!("/v1/jobs/{id}")).await
    }

    /// Asks a running job to stop.
    pub async fn cancel_job(&self, id: u64) -> Result<()> {
        self.done(self.request(Method::POST, &format!("/v1/jobs/{id}/cancel"))).await
    }

    /// Holds a job up.
    pub async fn pause_job(&self, id: u64) -> Result<JobStatus> {
        self.send(self.request(Method::POST, &format!("/v1/jobs/{id}/pause"))).await
    }

    /// Lets a job go on.
    pub async fn resume_job(&self, id: u64) -> Result<JobStatus> {
        self.send(self.request(Method::POST, &format!("/v1/jobs/{id}/resume"))).await
    }

    /// How many bytes a second a job may move, from now on.
    pub async fn set_job_rate(&self, id: u64, rate: &JobRate) -> Result<JobStatus> {
        self.send(self.request(Method::POST, &format!("/v1/jobs/{id}/rate")).json(rate)).await
    }

    /// Forgets a job that has ended.
    pub async fn forget_job(&self, id: u64) -> Result<()> {
        self.done(self.request(Method::DELETE, &format!("/v1/jobs/{id}"))).await
    }

    /// The counters, in OpenMetrics' text format.
    pub async fn metrics(&self) -> Result<String> {
        let answer = self.answer(self.request(Method::GET, "/metrics").timeout(PATIENCE)).await?;
        answer.text().await.map_err(|source| self.broken(source))
    }

    /// What happens from now on.
    pub async fn events(&self) -> Result<EventStream> {
        let response = self.answer(self.request(Method::GET, "/v1/events")).await?;
        Ok(EventStream { response, socket: self.socket.clone(), bytes: Vec::new() })
    }

    fn request(&self, method: Method, path: &str) -> RequestBuilder {
        self.http.request(method, format!("http://highwater{path}"))
    }

    async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T> {
        self.send(self.request(Method::GET, path).timeout(PATIENCE)).await
    }

    async fn send<T: DeserializeOwned>(&self, request: RequestBuilder) -> Result<T> {
        self.answer(request).await?.json().await.map_err(|source| self.broken(source))
    }

    async fn done(&self, request: RequestBuilder) -> Result<()> {
        self.answer(request).await.map(drop)
    }

    async fn answer(&self, request: RequestBuilder) -> Result<Response> {
        let answer = request.send().await.map_err(|source| {
            if source.is_connect() {
                ClientError::NoDaemon { socket: self.socket.clone(), source }
            } else {
                self.broken(source)
            }
        })?;
        let status = answer.status();
        if status.is_success() {
            return Ok(answer);
        }
        let body = answer.json().await.unwrap_or_else(|_| ErrorBody {
            error: format!("the daemon answered {status}"),
            kind: if status == StatusCode::NOT_FOUND { "not-found" } else { "failed" }.to_owned(),
            next_step: None,
        });
        Err(ClientError::Refused { status: status.as_u16(), body })
    }

    fn broken(&self, source: reqwest::Error) -> ClientError {
        if source.is_timeout() {
            return ClientError::Silent { socket: self.socket.clone() };
        }
        ClientError::Broken { socket: self.socket.clone(), source }
    }
}

/// Events as the daemon sends them.
#[derive(Debug)]
pub struct EventStream {
    response: Response,
    socket: PathBuf,
    /// What has arrived and belongs to no whole line yet.
    bytes: Vec<u8>,
}

impl EventStream {
    /// Waits for the next event; `None` when the daemon ends. Events of kinds that this client does not know are
    /// left out.
    pub async fn next(&mut self) -> Result<Option<Event>> {
        loop {
            while let Some(end) = self.bytes.iter().position(|b| *b == b'\n') {
                let line: Vec<u8> = self.bytes.drain(..=end).collect();
                let event = line.strip_prefix(b"data:").and_then(|data| serde_json::from_slice(data).ok());
                if event.is_some() {
                    return Ok(event);
                }
            }
            let broken = |source| ClientError::Broken { socket: self.socket.clone(), source };
            match self.response.chunk().await.map_err(broken)? {
                Some(chunk) if self.bytes.len() + chunk.len() <= LONGEST_EVENT => self.bytes.extend_from_slice(&chunk),
                _ => return Ok(None),
            }
        }
    }
}

/// The path of a disk; what a segment may not hold is encoded.
fn disk_path(name: &str, rest: &str) -> String {
    format!("/v1/disks/{}{rest}", percent(name))
}

fn snapshot_path(disk: &str, snapshot: &str, rest: &str) -> String {
    disk_path(disk, &format!("/snapshots/{}{rest}", percent(snapshot)))
}

fn mark_path(disk: &str, mark: &str) -> String {
    disk_path(disk, &format!("/marks/{}", percent(mark)))
}

fn with_query(path: &str, query: &impl Serialize) -> String {
    let fields = serde_json::to_value(query).unwrap_or_default();
    let pairs: Vec<String> = fields
        .as_object()
        .into_iter()
        .flatten()
        .map(|(name, value)| {
            let text = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
            format!("{name}={}", percent(&text))
        })
        .collect();
    if pairs.is_empty() { path.to_owned() } else { format!("{path}?{}", pairs.join("&")) }
}

fn percent(text: &str) -> String {
    text.bytes()
        .map(|b| match b {
            b if b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-' | b'~') => char::from(b).to_string(),
            b => format!("%{b:02X}"),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths() {
        assert_eq!(disk_path("a/../b", "/map"), "/v1/disks/a%2F..%2Fb/map");
        assert_eq!(mark_path("d", "é /%"), "/v1/disks/d/marks/%C3%A9%20%2F%25");
        let query = ChangesQuery { since: "a b".into(), ..ChangesQuery::default() };
        assert_eq!(with_query("/x", &query), "/x?since=a%20b&start=0");
        assert_eq!(with_query("/x", &MapQuery { start: 5, length: None }), "/x?start=5");
        assert_eq!(with_query("/x", &ExportQuery { name: Some("a&b".into()), all: false }), "/x?name=a%26b");
        assert_eq!(with_query("/x", &ExportQuery { name: None, all: true }), "/x?all=true");
        assert_eq!(with_query("/x", &ExportQuery::default()), "/x");
    }
}
