//! Bodies and queries that only HTTP has.

use engine::history::ViewReport;
use engine::history::report::MarkReport;
use engine::images::report::{ImageInfo, MapEntry};
use engine::images::request::PreallocationMode;
use engine::snapshots::SnapshotReport;
use engine::{DiskStatus, JobStatus};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;
use utoipa::{IntoParams, ToSchema};

/// The body of every answer that is not a success.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub struct ErrorBody {
    /// What happened, for people: the object, what was expected, what was found, the causes.
    pub error: String,
    /// The class, for programs: `not-found`, `conflict`, `invalid`, `in-use`, `unsupported`, `corrupt`,
    /// `no-space`, `cancelled`, `failed`.
    pub kind: String,
    /// What to do next, where that is known and not part of `error`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next_step: Option<String>,
}

/// Who answers.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub struct VersionInfo {
    /// The daemon's version.
    pub version: String,
    /// The interface's version: the `1` of `/v1`.
    pub api: u32,
    /// Its process id.
    pub pid: u32,
    /// Its I/O threads.
    pub io_threads: usize,
    /// What they run on: `uring` or `threads`.
    pub io_backend: String,
}

/// All disks, by name.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct DiskList {
    /// The disks.
    pub disks: Vec<DiskStatus>,
}

/// All jobs, oldest first.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct JobList {
    /// The jobs.
    pub jobs: Vec<JobStatus>,
}

/// How a job is started.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize, IntoParams)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
#[into_params(parameter_in = Query)]
pub struct JobQuery {
    /// How many bytes a second it may move; as many as it can when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bytes_per_second: Option<u64>,
}

/// How fast a job may go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct JobRate {
    /// How many bytes a second it may move, at least 1; `null`: as many as it can.
    #[serde(deserialize_with = "Option::deserialize")]
    #[schema(required)]
    pub bytes_per_second: Option<u64>,
}

/// Which part of a disk to map.
#[derive(Clone, Debug, Default, Serialize, Deserialize, IntoParams)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
#[into_params(parameter_in = Query)]
pub struct MapQuery {
    /// First byte; 0 when absent.
    #[serde(default)]
    pub start: u64,
    /// Bytes; up to the end when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub length: Option<u64>,
}

/// A part of a disk's map. An answer has a bounded number of entries: when `next` is there, ask again from
/// there.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub struct MapReply {
    /// Runs of bytes in one state, in order, without gaps.
    pub entries: Vec<MapEntry>,
    /// The first byte not spoken of, if there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next: Option<u64>,
}

/// Marks, oldest first; or those that were taken together.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct MarkList {
    /// The marks.
    pub marks: Vec<MarkReport>,
}

/// Snapshots of a disk, oldest first; or those that were taken together.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct SnapshotList {
    /// The snapshots.
    pub snapshots: Vec<SnapshotReport>,
}

/// Which changes of a disk are asked for. An answer has a bounded number of ranges.
#[derive(Clone, Debug, Default, Serialize, Deserialize, IntoParams)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
#[into_params(parameter_in = Query)]
pub struct ChangesQuery {
    /// After this mark.
    pub since: String,
    /// Up to this one; up to now when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub until: Option<String>,
    /// First byte; 0 when absent.
    #[serde(default)]
    pub start: u64,
    /// About as many ranges at most; 16,384 when absent, which is the most.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub most: Option<usize>,
}

/// Which export to close: one by its name, or all, which has to be said.
#[derive(Clone, Debug, Default, Serialize, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct ExportQuery {
    /// The export's name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// All exports of the disk.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub all: bool,
}

/// An image and all below it, top first.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct ImageChain {
    /// The images' facts.
    pub images: Vec<ImageInfo>,
}

/// A new size.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct ResizeRequest {
    /// Bytes; rounded up to a multiple of 512 where the format counts in sectors.
    pub size: u64,
    /// Whether the disk may lose bytes at its end.
    #[serde(default)]
    pub shrink: bool,
    /// How much to set aside when it grows.
    #[serde(default)]
    pub preallocation: PreallocationMode,
}

/// All views.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct ViewList {
    /// The views, by name.
    pub views: Vec<ViewReport>,
}

/// Where sockets of a daemon live that belongs to no user's session.
const SYSTEM_DIRECTORY: &str = "/run/highwater";

/// Where sockets of this user's daemon live: `$XDG_RUNTIME_DIR/highwater`, or `/run/highwater`.
pub fn runtime_directory() -> PathBuf {
    match std::env::var_os("XDG_RUNTIME_DIR") {
        Some(dir) if !dir.is_empty() => PathBuf::from(dir).join("highwater"),
        _ => PathBuf::from(SYSTEM_DIRECTORY),
    }
}

/// The API socket that a daemon makes when none is named.
pub fn default_socket() -> PathBuf {
    runtime_directory().join("api.sock")
}

/// Where a client looks for a daemon when no socket is named: `$HIGHWATER_API`, or this user's daemon, or the system's.
/// The first of these that is there, or the first.
pub fn socket_to_try() -> PathBuf {
    match std::env::var_os("HIGHWATER_API") {
        Some(socket) if !socket.is_empty() => PathBuf::from(socket),
        _ => {
            let own = default_socket();
            let system = PathBuf::from(SYSTEM_DIRECTORY).join("api.sock");
            if !own.exists() && system.exists() { system } else { own }
        }
    }
}
