//! Which jobs were at work, in the state directory: after a restart they are listed as interrupted.
//!
//! Entered before a job begins and taken out when it has ended, so that a crash leaves the entry.

use crate::{EngineError, JobKind, durable_file};
use serde::{Deserialize, Serialize};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// The layout that this version writes.
const VERSION: u32 = 1;

/// A job that was begun.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) struct JobRecord {
    pub(crate) id: u64,
    /// When, in seconds since 1970.
    pub(crate) started: u64,
    pub(crate) kind: JobKind,
}

fn understood(bytes: &[u8]) -> Result<Recorded, String> {
    let recorded: Recorded = serde_json::from_slice(bytes).map_err(|e| e.to_string())?;
    match recorded.version {
        VERSION => Ok(recorded),
        other => Err(format!("expected version {VERSION}, found {other}")),
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
