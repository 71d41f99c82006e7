//! What is asked about snapshots, and answered, as plain data.

use crate::history::FreezeSpec;
use crate::linkage::SnapshotConsistency;
use crate::{EngineError, Format, validate_name};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;
use utoipa::ToSchema;

/// A snapshot to be taken.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct SnapshotSpec {
    /// Disks by their names, or virtual machines, which stand for all of their disks.
    pub disks: Vec<String>,
    /// The snapshot's name: 1 to 64 of the characters `a-z A-Z 0-9 . _ -`.
    pub name: String,
    /// The guest to freeze.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub freeze: Option<FreezeSpec>,
}

impl SnapshotSpec {
    /// Checks what can be checked without looking at a disk.
    ///
    /// # Errors
    /// [`EngineError::BadName`], [`EngineError::Invalid`].
    pub fn validate(&self) -> Result<(), EngineError> {
        validate_name(&self.name)?;
        self.freeze.as_ref().map_or(Ok(()), FreezeSpec::validate)
    }
}

/// A snapshot of one disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub struct SnapshotReport {
    /// The disk.
    pub disk: String,
    /// The snapshot's name.
    pub name: String,
    /// The frozen layer.
    #[schema(value_type = String)]
    pub file: PathBuf,
    /// Its format.
    pub format: Format,
    /// When it was taken, in milliseconds since 1970; absent when nothing has recorded it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub time: Option<u64>,
    /// Of what sort its content is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub consistency: Option<SnapshotConsistency>,
    /// Shared by snapshots of several disks that were taken at one instant.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub set: Option<String>,
    /// Bytes that the disk had.
    pub size: u64,
    /// Bytes that the layer's file takes.
    pub stored: u64,
    /// Whether the disk's present content stands on it; otherwise it was left by a revert.
    pub current: bool,
    /// For how long the guest's writes waited, in microseconds; told of a new snapshot only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pause_us: Option<u64>,
}

/// A linked clone to be made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct CloneSpec {
    /// Absolute path of the new disk, a qcow2 image.
    #[schema(value_type = String)]
    pub target: PathBuf,
}
