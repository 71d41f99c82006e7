//! The jobs of a daemon in its state directory: what was at work when it ended, and what came out of the others.
//!
//! Entered before a job begins, and marked as ended when it has, so that a crash leaves an unfinished entry.

use crate::images::ProgressUnit;
use crate::{EngineError, JobKind, JobState, durable_file};
use serde::{Deserialize, Serialize};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// The layout that this version writes; 1 knew unfinished jobs alone, without pause and limit.
const VERSION: u32 = 2;
/// A larger result is not kept over a restart.
const LARGEST_RESULT: usize = 64 << 10;

/// A job that was begun.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) struct JobRecord {
    pub(crate) id: u64,
    /// When, in seconds since 1970.
    pub(crate) started: u64,
    pub(crate) kind: JobKind,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(crate) paused: bool,
    /// It was asked to stop for good, and had not got there.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(crate) cancelled: bool,
    /// Bytes a second.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) rate_limit: Option<u64>,
    /// Absent while it is unfinished.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) end: Option<EndRecord>,
}

/// How a job ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) struct EndRecord {
    pub(crate) state: JobState,
    pub(crate) at: Option<u64>,
    pub(crate) done: u64,
    pub(crate) total: u64,
    pub(crate) unit: ProgressUnit,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) result: Option<serde_json::Value>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) error: Option<String>,
}

/// The result as it is recorded.
pub(crate) fn recorded_result(result: &serde_json::Value) -> Option<serde_json::Value> {
    let size = serde_json::to_vec(result).map_or(usize::MAX, |bytes| bytes.len());
    (size <= LARGEST_RESULT).then(|| result.clone())
}

fn understood(bytes: &[u8]) -> Result<Recorded, String> {
    let recorded: Recorded = serde_json::from_slice(bytes).map_err(|e| e.to_string())?;
    match recorded.version {
        1..=VERSION => Ok(recorded),
        other => Err(format!("expected version 1 to {VERSION}, found {other}")),
    }
}

/// What the file holds.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Recorded {
    version: u32,
    /// The largest number that a job ever had.
    pub(crate) last: u64,
    pub(crate) jobs: Vec<JobRecord>,
}

/// The file.
#[derive(Clone, Debug)]
pub(crate) struct JobRecords(PathBuf);

impl JobRecords {
    /// The file in `directory`, and what it holds.
    pub(crate) fn open(directory: &Path) -> Result<(Self, Recorded), EngineError> {
        let file = directory.join("jobs.json");
        let recorded = match fs::read(&file) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => Recorded::default(),
            Err(e) => return Err(EngineError::file(file, "read the list of jobs", e)),
            // It only tells what was interrupted: no reason not to serve disks.
            Ok(bytes) => understood(&bytes).unwrap_or_else(|reason| {
                tracing::warn!(file = %file.display(), reason, "jobs that were interrupted are not known");
                Recorded::default()
            }),
        };
        Ok((Self(file), recorded))
    }

    /// Replaces what the file holds. Blocks for an fsync.
    pub(crate) fn replace(&self, last: u64, jobs: Vec<JobRecord>) -> Result<(), EngineError> {
        let write = || {
            let bytes = serde_json::to_vec_pretty(&Recorded { version: VERSION, last, jobs })?;
            durable_file::replace(&self.0, &bytes)
        };
        write().map_err(|e| EngineError::file(&self.0, "replace the list of jobs", e))
    }
}
