//! How far a job is for certain: what it needs to go on after a crash of the daemon.
//!
//! One file for each job, `job-ID.position` in the state directory. The job's record (`job_records.rs`) is durable before the
//! job begins, so a position without an unfinished job's record is a leftover of a crash right behind the job's end, and
//! is removed when the directory is opened.

use crate::{EngineError, durable_file};
use serde_json::Value;
use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

/// Positions need not be saved more often than this.
const BETWEEN_SAVES: Duration = Duration::from_secs(1);

/// The position of one job.
#[derive(Debug)]
pub(crate) struct JobPosition {
    /// Absent without a state directory: nothing survives the daemon then.
    file: Option<PathBuf>,
    known: Mutex<Known>,
    /// One writes the file at a time, also when nobody waits for it any more.
    writing: Arc<async_lock::Mutex<()>>,
}

#[derive(Debug)]
struct Known {
    value: Option<Value>,
    saved: Instant,
    /// The job has ended: what a late part of it saves is nobody's.
    ended: bool,
}

fn file_of(directory: &Path, id: u64) -> PathBuf {
    directory.join(format!("job-{id}.position"))
}

impl JobPosition {
    /// Of a job that begins.
    pub(crate) fn new(directory: Option<&Path>, id: u64) -> Self {
        Self::with(directory.map(|directory| file_of(directory, id)), None)
    }

    /// Of a job that was at work when the daemon ended. What cannot be read or understood is as if nothing had been
    /// saved: the job then finds out for itself how far it was.
    pub(crate) fn read(directory: &Path, id: u64) -> Self {
        let file = file_of(directory, id);
        let read = match fs::read(&file) {
            Ok(bytes) => serde_json::from_slice(&bytes).map_err(io::Error::other).map(Some),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(e),
        };
        let value = read.unwrap_or_else(|error| {
            tracing::warn!(file = %file.display(), %error, "how far this job was is not known");
            None
        });
        Self::with(Some(file), value)
    }

    fn with(file: Option<PathBuf>, value: Option<Value>) -> Self {
        let known = Mutex::new(Known { value, saved: Instant::now(), ended: false });
        Self { file, known, writing: Arc::default() }
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().expect("no panic while the position is locked")
    }

    /// What was durable last.
    pub(crate) fn get(&self) -> Option<Value> {
        self.known().value.clone()
    }

    /// Whether the last one is old enough for another.
    pub(crate) fn is_due(&self) -> bool {
        self.known().saved.elapsed() >= BETWEEN_SAVES
    }

    /// Makes a position durable. A crash leaves the one before or this one.
    pub(crate) async fn save(self: &Arc<Self>, value: Value) -> Result<(), EngineError> {
        let one = self.writing.lock_arc().await;
        if self.known().ended {
            return Ok(());
        }
        if let Some(file) = self.file.clone() {
            let bytes = serde_json::to_vec(&value).map_err(|e| EngineError::Invalid(e.to_string()))?;
            let this = Arc::clone(self);
            let write = move || {
                let _one = one;
                let written = durable_file::replace(&file, &bytes);
                // The job may have ended meanwhile, if whoever waited here was dropped.
                if this.known().ended {
                    let _ = fs::remove_file(&file);
                }
                written.map_err(|e| EngineError::file(file, "save how far the job is", e))
            };
            dataplane::offload(write).await?;
        }
        let mut known = self.known();
        (known.value, known.saved) = (Some(value), Instant::now());
        Ok(())
    }

    /// The job has ended, and its record says so: nobody needs the position any more.
    pub(crate) fn forget(&self) {
        self.known().ended = true;
        if let Some(file) = &self.file
            && let Err(error) = fs::remove_file(file)
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(file = %file.display(), %error, "a job's position could not be removed");
        }
    }
}

/// Removes the positions of jobs that are not unfinished.
pub(crate) fn remove_leftovers(directory: &Path, unfinished: &BTreeSet<u64>) {
    let Ok(entries) = fs::read_dir(directory) else { return };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let Some(rest) = name.to_str().and_then(|name| name.strip_prefix("job-")) else { continue };
        let number = match rest.strip_suffix(".position") {
            Some(number) => number.parse().ok().filter(|id| !unfinished.contains(id)),
            None => rest.strip_suffix(".position.tmp").and_then(|number| number.parse::<u64>().ok()),
        };
        if number.is_some()
            && let Err(error) = fs::remove_file(entry.path())
        {
            tracing::warn!(file = %entry.path().display(), %error, "a job's position could not be removed");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn save(position: &Arc<JobPosition>, value: Value) -> Result<(), EngineError> {
        dataplane::block_on(dataplane::Backend::Threads, position.save(value)).unwrap()
    }

    #[test]
    fn the_last_position_is_found_again() {
        let dir = tempfile::tempdir().unwrap();
        let position = Arc::new(JobPosition::new(Some(dir.path()), 7));
        assert_eq!((position.get(), position.is_due()), (None, false));
        for at in [1, 2] {
            save(&position, json!({ "at": at })).unwrap();
            assert_eq!(JobPosition::read(dir.path(), 7).get(), Some(json!({ "at": at })));
        }
        assert_eq!(JobPosition::read(dir.path(), 8).get(), None);
        // Half a file, as no crash leaves it.
        fs::write(dir.path().join("job-8.position"), "{\"at").unwrap();
        assert_eq!(JobPosition::read(dir.path(), 8).get(), None);
        // A crash in the middle of a save, and one between the end of job 9 and this.
        fs::write(dir.path().join("job-7.position.tmp"), "{\"at").unwrap();
        fs::write(dir.path().join("job-9.position"), "1").unwrap();
        fs::write(dir.path().join("job-list"), "somebody's").unwrap();
        remove_leftovers(dir.path(), &BTreeSet::from([7, 8]));
        let mut left: Vec<String> =
            fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        left.sort();
        assert_eq!(left, ["job-7.position", "job-8.position", "job-list"]);

        position.forget();
        save(&position, json!(3)).unwrap();
        assert_eq!(JobPosition::read(dir.path(), 7).get(), None, "saved after the end");
        fs::remove_dir_all(dir.path()).unwrap();
        let gone = Arc::new(JobPosition::new(Some(dir.path()), 10));
        assert!(save(&gone, json!(1)).is_err());
        assert_eq!(gone.get(), None, "what was not saved is not durable");
    }
}
