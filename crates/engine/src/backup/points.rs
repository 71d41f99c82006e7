//! The restore points of a repository.

use super::care::reason;
use super::place::RepositorySpec;
use super::spec::BackupKind;
use crate::EngineError;
use repository::{Consistency, Id, Made, Point, PointDisk, Repository, RepositoryError};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// How consistent the disks of a point are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum PointConsistency {
    /// As after a power cut.
    Crash,
    /// The guest's file systems were frozen.
    Application,
    /// Nothing was running.
    Off,
}

impl PointConsistency {
    /// The word for people.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Crash => "crash",
            Self::Application => "application",
            Self::Off => "off",
        }
    }
}

impl From<Consistency> for PointConsistency {
    fn from(consistency: Consistency) -> Self {
        match consistency {
            Consistency::Crash => Self::Crash,
            Consistency::FileSystem => Self::Application,
            Consistency::Off => Self::Off,
        }
    }
}

/// One disk of a point.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub struct PointDiskReport {
    /// Its name.
    pub name: String,
    /// Its size in bytes.
    pub size: u64,
    /// How it was known what to store.
    pub made: BackupKind,
    /// The hash of its content: equal for equal content of equally large disks in one repository.
    pub content: String,
}

impl PointDiskReport {
    fn of(disk: &PointDisk) -> Self {
        let content = disk.content().to_string();
        Self { name: disk.name.clone(), size: disk.size, made: kind(disk.made), content }
    }
}

fn kind(made: Made) -> BackupKind {
    match made {
        Made::Full => BackupKind::Full,
        Made::Incremental => BackupKind::Incremental,
        Made::Compared => BackupKind::Compared,
    }
}

/// A restore point.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub struct PointReport {
    /// Its name.
    pub id: String,
    /// When it was taken, in milliseconds since 1970; of a damaged one what its name says.
    pub time: u64,
    /// The machine; absent when the point is damaged.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub machine: Option<String>,
    /// How consistent its disks are; absent when it is damaged.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub consistency: Option<PointConsistency>,
    /// Its disks.
    pub disks: Vec<PointDiskReport>,
    /// The point on which it was built.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub predecessor: Option<String>,
    /// Free text.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub note: String,
    /// Why it cannot be restored, if that is known of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub damaged: Option<String>,
}

impl PointReport {
    pub(crate) fn of(point: &Point) -> Self {
        Self {
            id: point.id.to_string(),
            time: point.created_ms,
            machine: Some(point.machine.clone()),
            consistency: Some(point.consistency.into()),
            disks: point.disks.iter().map(PointDiskReport::of).collect(),
            predecessor: point.predecessor.map(|(id, _)| id.to_string()),
            note: point.note.clone(),
            damaged: None,
        }
    }

    fn damaged(id: Id, error: &RepositoryError) -> Self {
        Self {
            id: id.to_string(),
            time: time_of(id),
            machine: None,
            consistency: None,
            disks: Vec::new(),
            predecessor: None,
            note: String::new(),
            damaged: Some(reason(error)),
        }
    }
}

/// The time in a point's name: its first 48 bits, in milliseconds since 1970.
fn time_of(id: Id) -> u64 {
    id.0[..6].iter().fold(0, |ms, byte| ms << 8 | u64::from(*byte))
}

/// All points that are not forgotten, oldest first; those that cannot be read are among them, with the reason. Blocks.
///
/// # Errors
/// When the repository cannot be opened or listed.
pub fn points(spec: &RepositorySpec) -> Result<Vec<PointReport>, EngineError> {
    reports(&spec.open()?).map_err(|e| spec.failed(e))
}

pub(super) fn reports(repository: &Repository) -> Result<Vec<PointReport>, RepositoryError> {
    let mut reports = Vec::new();
    // One by one, as each brings its attachments with it.
    for id in repository.point_ids()? {
        match repository.point(id) {
            Ok(point) => reports.push(PointReport::of(&point)),
            Err(RepositoryError::NoPoint { .. }) => {} // Forgotten and pruned since the names were listed.
            Err(error) => reports.push(PointReport::damaged(id, &error)),
        }
    }
    Ok(reports)
}
