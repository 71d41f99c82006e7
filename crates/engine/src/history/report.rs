//! What is told of histories, points and changes.

use serde::{Deserialize, Serialize};
use tracking::{ChangeKind, Consistency, HistoryInfo, Point};
use utoipa::ToSchema;

/// A disk's history.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub struct HistoryReport {
    /// Whether changes are recorded.
    pub kept: bool,
    /// Why not, or why marks are refused, or why the history has begun anew.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// The sidecar.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub file: Option<String>,
    /// Name of the history, constant as long as it goes on without a gap.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lineage: Option<String>,
    /// Bytes that changes are told apart by.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub granule: Option<u64>,
    /// How many marks there are.
    #[serde(default)]
    pub marks: usize,
    /// How many of them are refused.
    #[serde(default)]
    pub refused: usize,
    /// Bytes that a crash at this moment would report beyond what was written.
    #[serde(default)]
    pub open_bytes: u64,
    /// The most that this may become.
    #[serde(default)]
    pub open_limit: u64,
    /// Bytes of memory.
    #[serde(default)]
    pub memory: usize,
}

impl HistoryReport {
    /// No history, and why.
    pub fn none(reason: impl Into<String>) -> Self {
        Self {
            kept: false,
            reason: Some(reason.into()),
            file: None,
            lineage: None,
            granule: None,
            marks: 0,
            refused: 0,
            open_bytes: 0,
            open_limit: 0,
            memory: 0,
        }
    }

    pub(crate) fn of(info: HistoryInfo, points: &[Point], file: String, distrust: Option<String>) -> Self {
        let refused = || points.iter().filter_map(|point| point.refused.as_ref());
        // What was found when the disk was opened says nothing of marks that are trusted since.
        let distrust = distrust.filter(|_| points.is_empty() || refused().next().is_some());
        let earlier = || refused().next().map(|refusal| refusal.reason.clone());
        Self {
            kept: info.stopped.is_none(),
            reason: info.stopped.or(distrust).or_else(earlier),
            file: Some(file),
            lineage: Some(info.lineage.to_string()),
            granule: Some(info.granule),
            marks: info.points,
            refused: refused().count(),
            open_bytes: info.open_bytes,
            open_limit: info.open_limit,
            memory: info.memory,
        }
    }
}

/// What the instant of a mark is worth.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum MarkConsistency {
    /// As after a power cut.
    Crash,
    /// The guest's file systems were frozen.
    Application,
}

/// A mark of one disk: the name of an instant, without any data.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub struct MarkReport {
    /// The disk: its name in the daemon, or its file.
    pub disk: String,
    /// The mark's name.
    pub name: String,
    /// What consumers remember: names may be given again, this is not.
    pub id: String,
    /// Shared by the marks of several disks that were taken at one instant.
    pub set: String,
    /// When, in milliseconds since 1970.
    pub time: u64,
    /// Bytes of the guest's disk at the instant.
    pub size: u64,
    /// What the instant is worth.
    pub consistency: MarkConsistency,
    /// For how long the guest was frozen, in milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub frozen_ms: Option<u32>,
    /// Why the mark cannot be trusted, if so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refused: Option<String>,
    /// Since when, in milliseconds since 1970.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refused_since: Option<u64>,
    /// Bytes that had changed at the mark, but were deliberately not copied by its consumer.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub pending: u64,
}

fn is_zero(n: &u64) -> bool {
    *n == 0
}

impl MarkReport {
    pub(crate) fn of(disk: &str, point: &Point, granule: u64) -> Self {
        let (consistency, frozen_ms) = match point.consistency {
            Consistency::Crash => (MarkConsistency::Crash, None),
            Consistency::Application { frozen_ms } => (MarkConsistency::Application, Some(frozen_ms)),
        };
        Self {
            disk: disk.to_owned(),
            name: point.name.clone(),
            id: point.id.to_string(),
            set: point.set.to_string(),
            time: point.time,
            size: point.size,
            consistency,
            frozen_ms,
            refused: point.refused.as_ref().map(|r| r.reason.clone()),
            refused_since: point.refused.as_ref().map(|r| r.since),
            pending: point.pending.iter().map(|run| run.end - run.start).sum::<u64>() * granule,
        }
    }
}

/// What a changed range holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum KindOfChange {
    /// Bytes that must be read to know them.
    Data,
    /// Zeroes.
    Zero,
    /// Given back by the guest; reads as zero.
    Discarded,
}

impl KindOfChange {
    /// The word for people.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Data => "data",
            Self::Zero => "zero",
            Self::Discarded => "discarded",
        }
    }
}

impl From<ChangeKind> for KindOfChange {
    fn from(kind: ChangeKind) -> Self {
        match kind {
            ChangeKind::Data => Self::Data,
            ChangeKind::Zero => Self::Zero,
            ChangeKind::Discarded => Self::Discarded,
        }
    }
}

/// A changed range of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ChangedRange {
    /// First byte.
    pub start: u64,
    /// Bytes.
    pub length: u64,
    /// What it holds.
    pub kind: KindOfChange,
}

/// What changed on a disk. When `next` is there, this is a part: ask again from there.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub struct ChangesReport {
    /// The disk: its name in the daemon, or its file.
    pub disk: String,
    /// After this mark.
    pub since: MarkReport,
    /// Up to this one; up to now when absent. Ranges that changed again after it are told as well, as data: too much may
    /// be told, never too little.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub until: Option<MarkReport>,
    /// Name of the history.
    pub lineage: String,
    /// Bytes of the disk that the answer speaks of.
    pub size: u64,
    /// Bytes that changes are told apart by.
    pub granule: u64,
    /// In order, without overlaps.
    pub ranges: Vec<ChangedRange>,
    /// Where to ask on, if not all was looked at.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next: Option<u64>,
}

impl ChangesReport {
    /// Bytes of one kind.
    pub fn bytes(&self, kind: KindOfChange) -> u64 {
        self.ranges.iter().filter(|range| range.kind == kind).map(|range| range.length).sum()
    }
}
