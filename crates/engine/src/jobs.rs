//! Long work that the daemon does on request: a bounded list of jobs with progress and cancel.

use crate::history::AuditSpec;
use crate::images::request::{
    CheckSpec, CompareSpec, ConvertSpec, CreateSpec, MeasureSpec, ResizeSpec, SourceSpec, require_absolute,
};
use crate::images::{Progress, ProgressUnit, Workshop};
use crate::job_records::{JobRecord, JobRecords};
use crate::{EngineError, ErrorClass, chain_text};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{SystemTime, UNIX_EPOCH};
use utoipa::openapi::schema::{ObjectBuilder, OneOfBuilder, Type};
use utoipa::openapi::{RefOr, Schema};
use utoipa::{PartialSchema, ToSchema};

/// Jobs that have ended and are remembered.
const REMEMBERED: usize = 256;
/// Jobs that run at the same time.
const RUNNING: usize = 16;

/// What a job is to do. Paths are absolute.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "job", rename_all = "kebab-case")]
pub enum JobKind {
    /// Make an image.
    Create(CreateSpec),
    /// Copy an image.
    Convert(ConvertSpec),
    /// Compare two images.
    Compare(CompareSpec),
    /// Prove what a history calls unchanged.
    Audit(AuditSpec),
    /// Check an image's metadata, and mend it if that is asked for.
    Check(CheckSpec),
    /// Find out how much space a conversion would take.
    Measure(MeasureSpec),
    /// Change the size of an image that nobody uses.
    Resize(ResizeSpec),
}

impl JobKind {
    /// The word in `job`.
    pub const fn word(&self) -> &'static str {
        match self {
            Self::Create(_) => "create",
            Self::Convert(_) => "convert",
            Self::Compare(_) => "compare",
            Self::Audit(_) => "audit",
            Self::Check(_) => "check",
            Self::Measure(_) => "measure",
            Self::Resize(_) => "resize",
        }
    }

    /// Checks what can be checked without opening anything.
    ///
    /// # Errors
    /// [`EngineError::Invalid`].
    pub fn validate(&self) -> Result<(), EngineError> {
        self.sources().into_iter().try_for_each(SourceSpec::validate)?;
        let history = match self {
            Self::Check(spec) => spec.history_file.as_deref(),
            Self::Resize(spec) => spec.history_file.as_deref(),
            Self::Audit(spec) => spec.history_file.as_deref(),
            _ => None,
        };
        self.own_files().into_iter().chain(history).try_for_each(require_absolute)
    }

    /// The images that are only read.
    fn sources(&self) -> Vec<&SourceSpec> {
        match self {
            Self::Convert(spec) => vec![&spec.source],
            Self::Compare(spec) => vec![&spec.first, &spec.second],
            Self::Audit(spec) => vec![&spec.source, &spec.against],
            Self::Measure(spec) => spec.source.iter().collect(),
            Self::Create(_) | Self::Check(_) | Self::Resize(_) => Vec::new(),
        }
    }

    /// The same, to be filled in.
    pub(crate) fn sources_mut(&mut self) -> Vec<&mut SourceSpec> {
        match self {
            Self::Convert(spec) => vec![&mut spec.source],
            Self::Compare(spec) => vec![&mut spec.first, &mut spec.second],
            Self::Audit(spec) => vec![&mut spec.source, &mut spec.against],
            Self::Measure(spec) => spec.source.iter_mut().collect(),
            Self::Create(_) | Self::Check(_) | Self::Resize(_) => Vec::new(),
        }
    }

    /// The other files.
    fn own_files(&self) -> Vec<&Path> {
        match self {
            Self::Create(spec) => vec![&spec.file],
            Self::Convert(spec) => vec![&spec.target],
            Self::Check(spec) => vec![&spec.file],
            Self::Resize(spec) => vec![&spec.file],
            Self::Compare(_) | Self::Audit(_) | Self::Measure(_) => Vec::new(),
        }
    }

    /// All files that must not be in use.
    pub(crate) fn files_to_lock(&self) -> Vec<PathBuf> {
        let shared = matches!(self, Self::Check(spec) if spec.force_share && spec.repair.is_none());
        let own = self.own_files().into_iter().filter(|_| !shared);
        let sources = self.sources().into_iter().filter(|s| s.disk.is_none() && !s.force_share);
        own.map(Path::to_owned).chain(sources.map(|s| s.file.clone())).collect()
    }
}

/// Each kind as one flat object: a description made of parts would contradict the parts' `additionalProperties`.
impl PartialSchema for JobKind {
    fn schema() -> RefOr<Schema> {
        let kinds = [
            ("create", CreateSpec::schema()),
            ("convert", ConvertSpec::schema()),
            ("compare", CompareSpec::schema()),
            ("audit", AuditSpec::schema()),
            ("check", CheckSpec::schema()),
            ("measure", MeasureSpec::schema()),
            ("resize", ResizeSpec::schema()),
        ];
        let mut one_of = OneOfBuilder::new().description(Some("What a job is to do. Paths are absolute."));
        for (word, schema) in kinds {
            let RefOr::T(Schema::Object(mut object)) = schema else { continue };
            let tag = ObjectBuilder::new().schema_type(Type::String).enum_values(Some([word]));
            object.properties.insert("job".to_owned(), tag.into());
            object.required.insert(0, "job".to_owned());
            one_of = one_of.item(Schema::Object(object));
        }
        one_of.into()
    }
}

impl ToSchema for JobKind {
    fn schemas(schemas: &mut Vec<(String, RefOr<Schema>)>) {
        CreateSpec::schemas(schemas);
        ConvertSpec::schemas(schemas);
        CompareSpec::schemas(schemas);
        AuditSpec::schemas(schemas);
        CheckSpec::schemas(schemas);
        MeasureSpec::schemas(schemas);
        ResizeSpec::schemas(schemas);
    }
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
    /// The daemon ended while it was at work. It does not go on by itself; start it again.
    Interrupted,
}

impl JobState {
    /// The word for people.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Done => "done",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
            Self::Interrupted => "interrupted",
        }
    }
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
    /// How much is done.
    #[serde(default)]
    pub done: u64,
    /// How much there is to do in all; 0 while that is not known.
    #[serde(default)]
    pub total: u64,
    /// What `done` and `total` count.
    #[serde(default)]
    pub unit: ProgressUnit,
    /// When it began, in seconds since 1970.
    #[serde(default)]
    pub started: u64,
    /// When it ended, in seconds since 1970.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ended: Option<u64>,
    /// What came out, as the command of the same name shows it with `--json`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Object>)]
    pub result: Option<serde_json::Value>,
    /// Why it failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

struct End {
    state: JobState,
    result: Result<serde_json::Value, String>,
    /// When; not known of what a crash ended.
    at: Option<u64>,
}

struct Job {
    kind: JobKind,
    progress: Progress,
    started: u64,
    end: Option<End>,
}

impl Job {
    fn status(&self, id: u64) -> JobStatus {
        let end = self.end.as_ref();
        let state = end.map_or(JobState::Running, |end| end.state);
        let (done, total) = self.progress.now();
        JobStatus {
            id,
            kind: self.kind.clone(),
            state,
            percent: if state == JobState::Done { 100 } else { self.progress.percent() },
            done,
            total,
            unit: self.progress.unit(),
            started: self.started,
            ended: end.and_then(|end| end.at),
            result: end.and_then(|end| end.result.as_ref().ok().cloned()),
            error: end.and_then(|end| end.result.as_ref().err().cloned()),
        }
    }

    /// Whether the state directory has to remember it.
    fn is_unfinished(&self) -> bool {
        self.end.as_ref().is_none_or(|end| end.state == JobState::Interrupted)
    }
}

#[derive(Default)]
struct List {
    last: u64,
    jobs: BTreeMap<u64, Job>,
    /// The daemon ends: what is stopped now counts as interrupted.
    ending: bool,
    records: Option<JobRecords>,
}

impl List {
    /// Blocks for an fsync.
    fn save(&self) -> Result<(), EngineError> {
        let Some(records) = &self.records else { return Ok(()) };
        let unfinished = self.jobs.iter().filter(|(_, job)| job.is_unfinished());
        let unfinished =
            unfinished.map(|(id, job)| JobRecord { id: *id, started: job.started, kind: job.kind.clone() }).collect();
        records.replace(self.last, unfinished)
    }
}

/// The jobs of one daemon.
#[derive(Clone, Default)]
pub struct Jobs(Arc<Mutex<List>>);

const INTERRUPTED: &str = "the daemon ended while this was at work; start it again";

impl Jobs {
    /// The jobs of a daemon with that state directory: what was at work when it ended last is listed as interrupted.
    ///
    /// # Errors
    /// When the record in the directory cannot be read.
    pub(crate) fn open(directory: &Path) -> Result<Self, EngineError> {
        let (records, recorded) = JobRecords::open(directory)?;
        let jobs = recorded.jobs.into_iter().map(|JobRecord { id, started, kind }| {
            let end = End { state: JobState::Interrupted, result: Err(INTERRUPTED.to_owned()), at: None };
            (id, Job { kind, progress: Progress::new(), started, end: Some(end) })
        });
        let jobs: BTreeMap<u64, Job> = jobs.collect();
        let last = recorded.last.max(jobs.keys().last().copied().unwrap_or(0));
        Ok(Self(Arc::new(Mutex::new(List { last, jobs, ending: false, records: Some(records) }))))
    }

    fn list(&self) -> MutexGuard<'_, List> {
        self.0.lock().expect("no panic while the list is locked")
    }

    /// Enters a job; the returned future does it, and is to be run to its end.
    ///
    /// # Errors
    /// When too many are running, or the state directory cannot be written to.
    pub fn begin(
        &self,
        kind: JobKind,
        workshop: Workshop,
    ) -> Result<(JobStatus, impl Future<Output = ()> + Send + use<>), EngineError> {
        let progress = Progress::new();
        let id = {
            let mut list = self.list();
            if list.jobs.values().filter(|j| j.end.is_none()).count() >= RUNNING {
                return Err(EngineError::TooManyJobs(RUNNING));
            }
            let ended: Vec<u64> = list.jobs.iter().filter(|(_, j)| j.end.is_some()).map(|(id, _)| *id).collect();
            for id in ended.iter().take((ended.len() + 1).saturating_sub(REMEMBERED)) {
                list.jobs.remove(id);
            }
            list.last += 1;
            let id = list.last;
            let job = Job { kind: kind.clone(), progress: progress.clone(), started: now(), end: None };
            list.jobs.insert(id, job);
            if let Err(error) = list.save() {
                list.jobs.remove(&id);
                return Err(error);
            }
            id
        };
        let status = self.show(id)?;
        let this = self.clone();
        Ok((status, async move {
            let result = workshop.perform(kind, progress).await;
            this.end(id, result);
        }))
    }

    fn end(&self, id: u64, result: Result<serde_json::Value, EngineError>) {
        let mut list = self.list();
        let ending = list.ending;
        let Some(job) = list.jobs.get_mut(&id) else { return };
        let at = Some(now());
        job.end = Some(match result {
            Ok(value) => End { state: JobState::Done, result: Ok(value), at },
            Err(error) if error.class() != ErrorClass::Cancelled => {
                End { state: JobState::Failed, result: Err(chain_text(&error)), at }
            }
            Err(_) if ending => End { state: JobState::Interrupted, result: Err(INTERRUPTED.to_owned()), at },
            Err(error) => End { state: JobState::Cancelled, result: Err(chain_text(&error)), at },
        });
        if let Err(error) = list.save() {
            tracing::warn!(job = id, error = chain_text(&error), "after a restart this job is listed as interrupted");
        }
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

    /// Asks a running job to stop.
    ///
    /// # Errors
    /// [`EngineError::NoSuchJob`], [`EngineError::JobEnded`].
    pub fn cancel(&self, id: u64) -> Result<(), EngineError> {
        let list = self.list();
        let job = list.jobs.get(&id).ok_or(EngineError::NoSuchJob(id))?;
        if job.end.is_some() {
            return Err(EngineError::JobEnded(id));
        }
        job.progress.cancel();
        Ok(())
    }

    /// Forgets a job that has ended, and its result.
    ///
    /// # Errors
    /// [`EngineError::NoSuchJob`], [`EngineError::JobRunning`], or when the state directory cannot be written to.
    pub fn forget(&self, id: u64) -> Result<(), EngineError> {
        let mut list = self.list();
        match list.jobs.get(&id) {
            None => return Err(EngineError::NoSuchJob(id)),
            Some(job) if job.end.is_none() => return Err(EngineError::JobRunning(id)),
            Some(_) => {}
        }
        let interrupted = list.jobs.remove(&id).is_some_and(|job| job.is_unfinished());
        if interrupted { list.save() } else { Ok(()) }
    }

    /// Asks all to stop because the daemon ends.
    pub fn interrupt_all(&self) {
        let mut list = self.list();
        list.ending = true;
        for job in list.jobs.values() {
            job.progress.cancel();
        }
    }

    /// How many are running.
    pub fn running(&self) -> usize {
        self.list().jobs.values().filter(|j| j.end.is_none()).count()
    }
}

/// Seconds since 1970.
fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_in_jobs_are_absolute() {
        for (job, good) in [
            (r#"{"job":"create","file":"/x/a.raw","format":"raw","size":1}"#, true),
            (r#"{"job":"create","file":"a.raw","format":"raw","size":1}"#, false),
            (r#"{"job":"convert","source":{"file":"/x/a.raw"},"target":"b.raw","format":"raw"}"#, false),
            (r#"{"job":"convert","source":{"file":"a.raw"},"target":"/x/b.raw","format":"raw"}"#, false),
            (r#"{"job":"convert","source":{"disk":"d"},"target":"/x/b.raw","format":"raw"}"#, true),
            (r#"{"job":"convert","source":{"disk":"d","file":"/x"},"target":"/x/b.raw","format":"raw"}"#, false),
            (r#"{"job":"convert","source":{},"target":"/x/b.raw","format":"raw"}"#, false),
            (r#"{"job":"compare","first":{"file":"/a"},"second":{"file":"b"}}"#, false),
            (r#"{"job":"measure","source":{"file":"b"},"format":"raw"}"#, false),
            (r#"{"job":"check","file":"b"}"#, false),
            (r#"{"job":"resize","file":"b","size":{"to":1}}"#, false),
        ] {
            let kind: JobKind = serde_json::from_str(job).unwrap_or_else(|e| panic!("{job}: {e}"));
            assert_eq!(kind.validate().is_ok(), good, "{job}");
        }
    }

    #[test]
    fn unfinished_jobs_are_interrupted_after_a_restart() {
        let dir = tempfile::tempdir().unwrap();
        let kind: JobKind = serde_json::from_str(r#"{"job":"check","file":"/missing.qcow2"}"#).unwrap();
        let workshop = Workshop::start(dataplane::Backend::Threads).unwrap();
        let jobs = Jobs::open(dir.path()).unwrap();
        let (first, work) = jobs.begin(kind.clone(), workshop.clone()).unwrap();
        let (second, _never_run) = jobs.begin(kind.clone(), workshop.clone()).unwrap();
        drop(work);
        assert!(matches!(jobs.forget(second.id), Err(EngineError::JobRunning(_))));
        jobs.end(first.id, Err(EngineError::Cancelled));
        assert_eq!(jobs.show(first.id).unwrap().state, JobState::Cancelled);
        assert!(matches!(jobs.cancel(first.id), Err(EngineError::JobEnded(_))));
        drop(jobs);

        let jobs = Jobs::open(dir.path()).unwrap();
        let all = jobs.all();
        assert_eq!(all.iter().map(|j| (j.id, j.state)).collect::<Vec<_>>(), [(second.id, JobState::Interrupted)]);
        assert!(all[0].error.as_ref().unwrap().contains("start it again"));
        let (third, _never_run) = jobs.begin(kind, workshop).unwrap();
        assert!(third.id > second.id, "numbers are not used twice");
        jobs.interrupt_all();
        jobs.end(third.id, Err(EngineError::Cancelled));
        jobs.forget(second.id).unwrap();
        let left = Jobs::open(dir.path()).unwrap().all();
        assert_eq!(left.iter().map(|j| j.id).collect::<Vec<_>>(), [third.id]);
    }
}
