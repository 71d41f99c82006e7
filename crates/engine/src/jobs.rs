//! Long work that the daemon does on request: a bounded list of jobs with progress and cancel.

use crate::images::request::{CheckSpec, CompareSpec, ConvertSpec, CreateSpec, MeasureSpec, ResizeSpec};
use crate::images::{Progress, Workshop};
use crate::{EngineError, ErrorClass, chain_text};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};
use utoipa::ToSchema;

/// Jobs that have ended and are remembered.
const REMEMBERED: usize = 256;
/// Jobs that run at the same time.
const RUNNING: usize = 16;

/// What a job is to do. Paths are absolute.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "job", rename_all = "kebab-case")]
pub enum JobKind {
    /// Make an image.
    Create(CreateSpec),
    /// Copy an image.
    Convert(ConvertSpec),
    /// Compare two images.
    Compare(CompareSpec),
    /// Check an image's metadata, and mend it if that is asked for.
    Check(CheckSpec),
    /// Find out how much space a conversion would take.
    Measure(MeasureSpec),
    /// Change the size of an image that nobody uses.
    Resize(ResizeSpec),
}

/// Where a job is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum JobState {
    /// At work.
    Running,
    /// Ended well; `result` says what came out.
    Done,
    /// Ended badly; `error` says why.
    Failed,
    /// Stopped on request.
    Cancelled,
}

/// One job, as it is now.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub struct JobStatus {
    /// Its number.
    pub id: u64,
    /// What it is to do.
    pub kind: JobKind,
    /// Where it is in its life.
    pub state: JobState,
    /// Part done, 0 to 100.
    pub percent: u8,
    /// What came out, as the command of the same name shows it with `--json`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Object>)]
    pub result: Option<serde_json::Value>,
    /// Why it failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

struct Job {
    kind: JobKind,
    progress: Progress,
    end: Option<(JobState, Result<serde_json::Value, String>)>,
}

impl Job {
    fn status(&self, id: u64) -> JobStatus {
        let kind = self.kind.clone();
        match &self.end {
            None => JobStatus {
                id,
                kind,
                state: JobState::Running,
                percent: self.progress.percent(),
                result: None,
                error: None,
            },
            Some((state, end)) => JobStatus {
                id,
                kind,
                state: *state,
                percent: if *state == JobState::Done { 100 } else { self.progress.percent() },
                result: end.as_ref().ok().cloned(),
                error: end.as_ref().err().cloned(),
            },
        }
    }
}

#[derive(Default)]
struct List {
    last: u64,
    jobs: BTreeMap<u64, Job>,
}

/// The jobs of one daemon.
#[derive(Clone, Default)]
pub struct Jobs(Arc<Mutex<List>>);

impl Jobs {
    fn list(&self) -> MutexGuard<'_, List> {
        self.0.lock().expect("no panic while the list is locked")
    }

    /// Enters a job; the returned future does it, and is to be run to its end.
    ///
    /// # Errors
    /// When too many are running.
    pub fn begin(
        &self,
        kind: JobKind,
        workshop: Workshop,
    ) -> Result<(JobStatus, impl Future<Output = ()> + Send + use<>), EngineError> {
        let progress = Progress::new();
        let id = {
            let mut list = self.list();
            if list.jobs.values().filter(|j| j.end.is_none()).count() >= RUNNING {
                return Err(EngineError::Invalid(format!(
                    "{RUNNING} jobs are running, which is the most; try again when one has ended"
                )));
            }
            let ended: Vec<u64> = list.jobs.iter().filter(|(_, j)| j.end.is_some()).map(|(id, _)| *id).collect();
            for id in ended.iter().take((ended.len() + 1).saturating_sub(REMEMBERED)) {
                list.jobs.remove(id);
            }
            list.last += 1;
            let id = list.last;
            list.jobs.insert(id, Job { kind: kind.clone(), progress: progress.clone(), end: None });
            id
        };
        let status = self.show(id)?;
        let this = self.clone();
        Ok((status, async move {
            let result = workshop.perform(kind, progress).await;
            let end = match result {
                Ok(value) => (JobState::Done, Ok(value)),
                Err(error) => {
                    let cancelled = error.class() == ErrorClass::Cancelled;
                    (if cancelled { JobState::Cancelled } else { JobState::Failed }, Err(chain_text(&error)))
                }
            };
            if let Some(job) = this.list().jobs.get_mut(&id) {
                job.end = Some(end);
            }
        }))
    }

    /// All jobs, oldest first.
    pub fn all(&self) -> Vec<JobStatus> {
        self.list().jobs.iter().map(|(id, job)| job.status(*id)).collect()
    }

    /// One job.
    ///
    /// # Errors
    /// [`EngineError::NoSuchJob`].
    pub fn show(&self, id: u64) -> Result<JobStatus, EngineError> {
        self.list().jobs.get(&id).map(|job| job.status(id)).ok_or(EngineError::NoSuchJob(id))
    }

    /// Asks a running job to stop, or forgets one that has ended.
    ///
    /// # Errors
    /// [`EngineError::NoSuchJob`].
    pub fn cancel(&self, id: u64) -> Result<(), EngineError> {
        let mut list = self.list();
        let job = list.jobs.get(&id).ok_or(EngineError::NoSuchJob(id))?;
        job.progress.cancel();
        if job.end.is_some() {
            list.jobs.remove(&id);
        }
        Ok(())
    }

    /// Asks all to stop.
    pub fn cancel_all(&self) {
        for job in self.list().jobs.values() {
            job.progress.cancel();
        }
    }

    /// How many are running.
    pub fn running(&self) -> usize {
        self.list().jobs.values().filter(|j| j.end.is_none()).count()
    }
}
