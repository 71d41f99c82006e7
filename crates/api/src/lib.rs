//! The HTTP interface: the types of its bodies and a client.
//!
//! Bodies that describe disks and images are the engine's own plain data; this crate adds what only HTTP
//! needs. The daemon serves the OpenAPI document of all of it at `/openapi.json`.

mod client;
mod types;

pub use client::{Client, ClientError, EventStream};
pub use engine::backup::{BackupReport, BackupSpec, RepositorySpec, RestoreReport, RestoreSpec};
pub use engine::consolidation::{ConsolidateReport, ConsolidateSpec};
pub use engine::history::report::{
    ChangedRange, ChangesReport, HistoryReport, KindOfChange, MarkConsistency, MarkReport,
};
pub use engine::history::{FreezeSpec, MarkSpec, ViewReport, ViewSpec};
pub use engine::images::report::{
    BitmapInfo, CheckReport, CompareReport, ConvertReport, FormatSpecific, ImageInfo, MapEntry, MeasureReport,
    Qcow2Info, SnapshotInfo,
};
pub use engine::linkage::{
    ChainReport, ChildReport, ChildState, FaultKind, HashReport, LayerReport, LinkReport, LinkState,
    SnapshotConsistency, SnapshotFacts,
};
pub use engine::promotion::{PromoteReport, PromoteSpec};
pub use engine::snapshots::{CloneSpec, SnapshotReport, SnapshotSpec};
pub use engine::{
    CacheMode, DiskSpec, DiskState, DiskStatus, Event, ExportSpec, ExportStatus, Format, ImageSpec, JobKind, JobState,
    JobStatus, TlsSpec,
};
pub use types::{
    ChangesQuery, DiskList, ErrorBody, ExportQuery, ImageChain, JobList, JobQuery, JobRate, MapQuery, MapReply,
    MarkList, ResizeRequest, SnapshotList, VersionInfo, ViewList, default_socket, runtime_directory, socket_to_try,
};
