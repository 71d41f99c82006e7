//! What the engine tells about its disks.

use crate::history::report::HistoryReport;
use crate::images::ProgressUnit;
use crate::{DiskSpec, ExportSpec, Format, JobState};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;
use utoipa::ToSchema;

/// Where a disk is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum DiskState {
    /// On its way in.
    Opening,
    /// In service.
    Open,
    /// Could not be opened; `error` says why.
    Failed,
    /// On its way out.
    Closing,
}

impl DiskState {
    /// The word for people.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Opening => "opening",
            Self::Open => "open",
            Self::Failed => "failed",
            Self::Closing => "closing",
        }
    }
}

/// One disk, as it is now.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub struct DiskStatus {
    /// As it was asked for.
    pub spec: DiskSpec,
    /// Where it is in its life.
    pub state: DiskState,
    /// Why it is not open.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// The image's format.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub format: Option<Format>,
    /// Size of the guest's disk in bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub virtual_size: Option<u64>,
    /// Whether writes are refused.
    pub read_only: bool,
    /// Its history, when the disk is open.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub history: Option<HistoryReport>,
    /// The ways in that are open.
    pub exports: Vec<ExportStatus>,
}

/// One export, as it is now.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub struct ExportStatus {
    /// Its name.
    pub name: String,
    /// As it was asked for.
    pub spec: ExportSpec,
    /// NBD URIs of it, one per address.
    pub uris: Vec<String>,
    /// Why it is not open.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// Something that happened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub enum Event {
    /// A disk is in service.
    DiskOpened {
        /// Which.
        disk: String,
    },
    /// A disk could not be opened.
    DiskFailed {
        /// Which.
        disk: String,
        /// Why.
        error: String,
    },
    /// A disk was closed and forgotten.
    DiskRemoved {
        /// Which.
        disk: String,
    },
    /// A disk has another size.
    DiskResized {
        /// Which.
        disk: String,
        /// Bytes.
        size: u64,
    },
    /// The marks that a disk has cannot be trusted any more, or no changes are recorded.
    HistoryLost {
        /// Which.
        disk: String,
        /// Why.
        reason: String,
    },
    /// A mark was taken.
    MarkAdded {
        /// Of which disk.
        disk: String,
        /// Which.
        mark: String,
    },
    /// A mark was forgotten.
    MarkRemoved {
        /// Of which disk.
        disk: String,
        /// Which.
        mark: String,
    },
    /// A disk has another image, which holds the same.
    DiskMoved {
        /// Which.
        disk: String,
        /// The image.
        #[schema(value_type = String)]
        file: PathBuf,
    },
    /// A snapshot was taken.
    SnapshotAdded {
        /// Of which disk.
        disk: String,
        /// Which.
        snapshot: String,
    },
    /// A disk went back to a snapshot.
    SnapshotReverted {
        /// Which disk.
        disk: String,
        /// To which snapshot.
        snapshot: String,
    },
    /// A snapshot was merged into its neighbour.
    SnapshotRemoved {
        /// Of which disk.
        disk: String,
        /// Which.
        snapshot: String,
    },
    /// A view of a disk at a mark was closed.
    ViewClosed {
        /// Which: the disk's and the mark's names with `@` between.
        view: String,
    },
    /// An export was opened.
    ExportAdded {
        /// Of which disk.
        disk: String,
        /// Which.
        export: String,
    },
    /// An export was closed.
    ExportRemoved {
        /// Of which disk.
        disk: String,
        /// Which.
        export: String,
    },
    /// A job began, was paused, goes on, or ended.
    Job {
        /// Which.
        id: u64,
        /// Where it is in its life.
        state: JobState,
    },
    /// How far a running job is; at most twice a second for each.
    JobProgress {
        /// Which.
        id: u64,
        /// Part done, 0 to 100.
        percent: u8,
        /// How much is done.
        done: u64,
        /// How much there is to do in all.
        total: u64,
        /// What `done` and `total` count.
        unit: ProgressUnit,
        /// How much is done in a second, of late.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        rate: Option<u64>,
        /// Seconds until it is done if it goes on at that rate.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        seconds_left: Option<u64>,
    },
}
