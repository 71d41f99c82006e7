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

/// The largest number that a job may have: what every reader of JSON keeps exact.
const LARGEST_ID: u64 = 1 << 53;

fn understand(bytes: &[u8]) -> Result<Recorded, String> {
    // Of another version nothing else needs to be as expected.
    #[derive(Deserialize)]
    struct Version {
        version: u32,
    }
    let Version { version } = serde_json::from_slice(bytes).map_err(|e| e.to_string())?;
    if !(1..=VERSION).contains(&version) {
        return Err(format!("expected version 1 to {VERSION}, found {version}"));
    }
    let recorded: Recorded = serde_json::from_slice(bytes).map_err(|e| e.to_string())?;
    let last = recorded.jobs.iter().map(|job| job.id).chain([recorded.last]).max();
    match last {
        Some(LARGEST_ID..) => Err(format!("expected jobs with numbers below {LARGEST_ID}, found {last:?}")),
        _ => Ok(recorded),
    }
}

/// Moves what is not understood out of the way: the positions that it speaks of stay, and so does it.
fn put_aside(file: &Path) -> Result<PathBuf, EngineError> {
    let aside = (0..).map(|n| file.with_extension(format!("json.damaged-{n}"))).find(|aside| !aside.exists());
    let aside = aside.unwrap_or_default();
    let moved = fs::rename(file, &aside).and_then(|()| durable_file::sync_directory_of(file));
    moved.map_err(|e| EngineError::file(file, "move the list of jobs, which is not understood, out of the way", e))?;
    Ok(aside)
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
    /// The file in `directory`, and what it holds; `None`: that was not understood, and is out of the way.
    pub(crate) fn open(directory: &Path) -> Result<(Self, Option<Recorded>), EngineError> {
        let file = directory.join("jobs.json");
        let recorded = match fs::read(&file) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => Some(Recorded::default()),
            Err(e) => return Err(EngineError::file(file, "read the list of jobs", e)),
            Ok(bytes) => match understand(&bytes) {
                Ok(recorded) => Some(recorded),
                // It only tells what was interrupted: no reason not to serve disks.
                Err(reason) => {
                    let aside = put_aside(&file)?;
                    tracing::warn!(file = %aside.display(), reason, "jobs that were interrupted are not known");
                    None
                }
            },
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
