//! What is asked of a consolidation, and what came out, as plain data.

use crate::promotion::microseconds;
use crate::{EngineError, validate_name};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;
use std::time::Duration;
use utoipa::ToSchema;

/// Which way the bytes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Neighbour {
    /// Down, into the layer below.
    Parent,
    /// Up, into the layer above.
    Child,
}

/// A layer that is to go away.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct ConsolidateSpec {
    /// The disk.
    pub disk: String,
    /// The snapshot that is not needed any more; when absent, the disk's top layer is committed into its parent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub snapshot: Option<String>,
    /// Which way the bytes go; the one that moves fewer when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub into: Option<Neighbour>,
}

impl ConsolidateSpec {
    /// Checks what can be checked without opening anything.
    ///
    /// # Errors
    /// [`EngineError::BadName`], [`EngineError::Invalid`].
    pub fn validate(&self) -> Result<(), EngineError> {
        match (&self.snapshot, self.into) {
            (None, Some(Neighbour::Child)) => {
                Err(EngineError::Invalid("the top layer has no child; name the snapshot that is to go".to_owned()))
            }
            (None, _) => Ok(()),
            (Some(name), _) => validate_name(name),
        }
    }
}

/// What a consolidation has done.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub struct ConsolidateReport {
    /// The disk.
    pub disk: String,
    /// The snapshot that is gone, if one was named.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub snapshot: Option<String>,
    /// Which way the bytes went.
    pub into: Neighbour,
    /// The file that is gone; absent when that was so already, before a job was begun again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub removed: Option<PathBuf>,
    /// The disk's image.
    #[schema(value_type = String)]
    pub file: PathBuf,
    /// Bytes of data that the pass has moved.
    pub moved: u64,
    /// Bytes of data that the guest's writes have brought to the other side meanwhile.
    pub mirrored: u64,
    /// For how long the guest's writes waited at the switch, in microseconds.
    pub pause_us: u64,
}

/// What a merge has done.
pub(super) struct Merged {
    /// The file that is gone.
    pub(super) removed: Option<PathBuf>,
    /// Bytes of data that the pass has moved.
    pub(super) moved: u64,
    /// Bytes of data that the guest's writes have brought to the other side meanwhile.
    pub(super) mirrored: u64,
    /// For how long the guest's writes waited.
    pub(super) pause: Duration,
}

impl Merged {
    /// It was done before.
    pub(super) const ALREADY: Self = Self { removed: None, moved: 0, mirrored: 0, pause: Duration::ZERO };

    /// The report of it; the disk's image is `file` now.
    pub(super) fn report(self, spec: ConsolidateSpec, into: Neighbour, file: PathBuf) -> ConsolidateReport {
        let Self { removed, moved, mirrored, pause } = self;
        let ConsolidateSpec { disk, snapshot, .. } = spec;
        ConsolidateReport { disk, snapshot, into, removed, file, moved, mirrored, pause_us: microseconds(pause) }
    }
}
