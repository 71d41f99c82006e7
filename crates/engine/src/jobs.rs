//! Long work that the daemon does on request: a bounded list of jobs that can be watched, paused, slowed down and stopped, and
//! that is remembered over restarts.
//!
//! What a job does is a future that whoever begins it makes ([`Jobs::begin`]); it gets a [`JobHandle`]. Kinds that are
//! resumable are begun again after the daemon's end, with the position that their work saved last.

use crate::images::{Progress, ProgressUnit, percent};
use crate::job_handle::JobHandle;
use crate::job_position::{JobPosition, remove_leftovers};
use crate::job_records::{EndRecord, JobRecord, JobRecords, recorded_result};
use crate::{EngineError, ErrorClass, JobKind, JobState, JobStatus, chain_text};
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{SystemTime, UNIX_EPOCH};

/// Jobs that have ended and are remembered.
const REMEMBERED: usize = 256;
/// Jobs that run at the same time, paused ones among them.
const RUNNING: usize = 16;

/// Does a job; to be run to its end, on any executor.
pub type JobWork = Pin<Box<dyn Future<Output = ()> + Send>>;

struct End {
    state: JobState,
    result: Result<Option<Value>, String>,
    /// When; not known of what a crash ended.
    at: Option<u64>,
    done: (u64, u64),
    unit: ProgressUnit,
}

struct Job {
    kind: JobKind,
    progress: Progress,
    position: Arc<JobPosition>,
    started: u64,
    end: Option<End>,
}

impl Job {
    fn state(&self) -> JobState {
        match &self.end {
            Some(end) => end.state,
            None if self.progress.is_paused() => JobState::Paused,
            None => JobState::Running,
        }
    }

    fn status(&self, id: u64) -> JobStatus {
        let (state, end) = (self.state(), self.end.as_ref());
        let (done, total) = end.map_or_else(|| self.progress.now(), |end| end.done);
        JobStatus {
            id,
            kind: self.kind.clone(),
            state,
            percent: if state == JobState::Done { 100 } else { percent((done, total)) },
            done,
            total,
            unit: end.map_or_else(|| self.progress.unit(), |end| end.unit),
            rate: if end.is_none() { self.progress.rate() } else { None },
            seconds_left: if end.is_none() { self.progress.seconds_left() } else { None },
            rate_limit: self.progress.rate_limit(),
            started: self.started,
            ended: end.and_then(|end| end.at),
            result: end.and_then(|end| end.result.as_ref().ok().cloned().flatten()),
            error: end.and_then(|end| end.result.as_ref().err().cloned()),
        }
    }

    /// Whether the state directory has it as work that has not come to its end.
    fn is_unfinished(&self) -> bool {
        self.end.as_ref().is_none_or(|end| end.state == JobState::Interrupted)
    }

    fn is_to_be_cancelled(&self) -> bool {
        self.progress.is_cancelled() && !self.progress.is_interrupted()
    }

    fn record(&self, id: u64) -> JobRecord {
        JobRecord {
            id,
            started: self.started,
            kind: self.kind.clone(),
            paused: self.progress.is_paused(),
            cancelled: self.is_unfinished() && self.is_to_be_cancelled(),
            rate_limit: self.progress.rate_limit(),
            end: self.end.as_ref().filter(|end| end.state != JobState::Interrupted).map(|end| EndRecord {
                state: end.state,
                at: end.at,
                done: end.done.0,
                total: end.done.1,
                unit: end.unit,
                result: end.result.as_ref().ok().and_then(Option::as_ref).and_then(recorded_result),
                error: end.result.as_ref().err().cloned(),
            }),
        }
    }

    fn handle(&self, id: u64, begun_again: bool, resumable: bool) -> JobHandle {
        JobHandle { id, progress: self.progress.clone(), position: Arc::clone(&self.position), begun_again, resumable }
    }
}

struct List {
    last: u64,
    jobs: BTreeMap<u64, Job>,
    /// The daemon ends: what is stopped now counts as interrupted.
    ending: bool,
    directory: Option<PathBuf>,
    records: Option<JobRecords>,
    /// [`JobKind::is_resumable`], but in tests.
    is_resumable: fn(&JobKind) -> bool,
}

impl List {
    fn new() -> Self {
        Self {
            last: 0,
            jobs: BTreeMap::new(),
            ending: false,
            directory: None,
            records: None,
            is_resumable: JobKind::is_resumable,
        }
    }

    /// Blocks for an fsync.
    fn save(&self) -> Result<(), EngineError> {
        let Some(records) = &self.records else { return Ok(()) };
        records.replace(self.last, self.jobs.iter().map(|(id, job)| job.record(*id)).collect())
    }

    fn at_work(&self) -> usize {
        self.jobs.values().filter(|job| job.end.is_none()).count()
    }

    /// Whether another job may begin.
    fn refuse_another(&self) -> Result<(), EngineError> {
        match self {
            Self { ending: true, .. } => Err(EngineError::DaemonEnds),
            _ if self.at_work() >= RUNNING => Err(EngineError::TooManyJobs(RUNNING)),
            _ => Ok(()),
        }
    }

    /// A job that has not ended.
    fn unended(&self, id: u64) -> Result<&Job, EngineError> {
        match self.jobs.get(&id) {
            None => Err(EngineError::NoSuchJob(id)),
            Some(job) if job.end.is_some() => Err(EngineError::JobEnded(id)),
            Some(job) => Ok(job),
        }
    }

    /// How a job stands that the end of a daemon has interrupted.
    fn interrupted(&self, job: &Job, at: Option<u64>) -> End {
        let text = if (self.is_resumable)(&job.kind) { WILL_GO_ON } else { INTERRUPTED };
        let (done, unit) = (job.progress.now(), job.progress.unit());
        End { state: JobState::Interrupted, result: Err(text.to_owned()), at, done, unit }
    }
}

/// The jobs of one daemon.
#[derive(Clone)]
pub struct Jobs(Arc<Mutex<List>>);

impl Default for Jobs {
    fn default() -> Self {
        Self(Arc::new(Mutex::new(List::new())))
    }
}

const INTERRUPTED: &str = "the daemon ended while this was at work; start it again";
const WILL_GO_ON: &str = "the daemon ended while this was at work; it goes on when the daemon starts, or is resumed";

impl Jobs {
    /// The jobs of a daemon with that state directory: what was at work when it ended last is listed as interrupted.
    ///
    /// # Errors
    /// When the record in the directory cannot be read.
    pub(crate) fn open(directory: &Path) -> Result<Self, EngineError> {
        Self::open_with(directory, JobKind::is_resumable)
    }

    fn open_with(directory: &Path, is_resumable: fn(&JobKind) -> bool) -> Result<Self, EngineError> {
        let (records, recorded) = JobRecords::open(directory)?;
        let understood = recorded.is_some();
        let recorded = recorded.unwrap_or_default();
        let mut list = List { is_resumable, directory: Some(directory.to_owned()), ..List::new() };
        for JobRecord { id, started, kind, paused, cancelled, rate_limit, end } in recorded.jobs {
            let progress = Progress::new();
            progress.set_rate_limit(rate_limit);
            if paused {
                progress.pause();
            }
            if cancelled {
                progress.cancel();
            }
            let position = Arc::new(match end {
                None => JobPosition::read(directory, id),
                Some(_) => JobPosition::new(Some(directory), id),
            });
            let mut job = Job { kind, progress, position, started, end: None };
            job.end = Some(match end {
                None => list.interrupted(&job, None),
                Some(end) => End {
                    state: end.state,
                    result: end.error.map_or(Ok(end.result), Err),
                    at: end.at,
                    done: (end.done, end.total),
                    unit: end.unit,
                },
            });
            list.jobs.insert(id, job);
        }
        let unfinished = list.jobs.iter().filter(|(_, job)| job.is_unfinished()).map(|(id, _)| *id).collect();
        // Positions that a list speaks of which was not understood are nobody's leftovers.
        if understood {
            remove_leftovers(directory, &unfinished);
        }
        list.last = recorded.last.max(list.jobs.keys().last().copied().unwrap_or(0));
        list.records = Some(records);
        Ok(Self(Arc::new(Mutex::new(list))))
    }

    fn list(&self) -> MutexGuard<'_, List> {
        self.0.lock().expect("no panic while the list is locked")
    }

    /// Enters a job that may move so many bytes a second. `make_work` is told which one it is and makes what it does, which
    /// is begun when the returned future is polled; that one is to be run to its end.
    ///
    /// # Errors
    /// When too many are running, the daemon ends, or the state directory cannot be written to.
    pub fn begin<W>(
        &self,
        kind: JobKind,
        rate_limit: Option<u64>,
        make_work: impl FnOnce(JobHandle) -> W,
    ) -> Result<(JobStatus, JobWork), EngineError>
    where
        W: Future<Output = Result<Value, EngineError>> + Send + 'static,
    {
        let progress = Progress::new();
        progress.set_rate_limit(rate_limit);
        let (id, handle) = {
            let mut list = self.list();
            list.refuse_another()?;
            // What is to go on later is no history yet.
            let is_resumable = list.is_resumable;
            let stays = |job: &Job| job.end.is_none() || (job.is_unfinished() && is_resumable(&job.kind));
            let ended: Vec<u64> = list.jobs.iter().filter(|(_, job)| !stays(job)).map(|(id, _)| *id).collect();
            let pruned = (ended.len() + 1).saturating_sub(REMEMBERED);
            let pruned: Vec<_> = ended.iter().take(pruned).filter_map(|id| list.jobs.remove_entry(id)).collect();
            list.last += 1;
            let id = list.last;
            let position = Arc::new(JobPosition::new(list.directory.as_deref(), id));
            let resumable = is_resumable(&kind);
            let job = Job { kind, progress, position, started: now(), end: None };
            let handle = job.handle(id, false, resumable);
            list.jobs.insert(id, job);
            if let Err(error) = list.save() {
                list.jobs.remove(&id);
                list.jobs.extend(pruned);
                return Err(error);
            }
            (id, handle)
        };
        Ok((self.show(id)?, self.do_work(id, make_work(handle))))
    }

    /// Begins a job again that the daemon's end has interrupted: as [`begin`](Self::begin), with the position that was
    /// saved last, and with its pause and its limit.
    ///
    /// # Errors
    /// As [`begin`](Self::begin); [`EngineError::NoSuchJob`], [`EngineError::JobEnded`]; [`EngineError::JobNotResumable`] for
    /// the kinds that are not.
    pub fn begin_again<W>(
        &self,
        id: u64,
        make_work: impl FnOnce(JobHandle) -> W,
    ) -> Result<(JobStatus, JobWork), EngineError>
    where
        W: Future<Output = Result<Value, EngineError>> + Send + 'static,
    {
        let handle = {
            let mut list = self.list();
            let is_resumable = list.is_resumable;
            list.refuse_another()?;
            let job = list.jobs.get_mut(&id).ok_or(EngineError::NoSuchJob(id))?;
            if job.state() != JobState::Interrupted {
                return Err(EngineError::JobEnded(id));
            }
            if !is_resumable(&job.kind) {
                return Err(EngineError::JobNotResumable { id, kind: job.kind.word() });
            }
            let before = std::mem::take(&mut job.progress);
            job.progress.set_rate_limit(before.rate_limit());
            if before.is_paused() {
                job.progress.pause();
            }
            // A crash came between the wish and the end: the work takes away what it has made.
            if before.is_cancelled() && !before.is_interrupted() {
                job.progress.cancel();
            }
            job.end = None;
            // The record has it as unfinished already.
            job.handle(id, true, true)
        };
        Ok((self.show(id)?, self.do_work(id, make_work(handle))))
    }

    fn do_work<W>(&self, id: u64, work: W) -> JobWork
    where
        W: Future<Output = Result<Value, EngineError>> + Send + 'static,
    {
        let this = self.clone();
        Box::pin(async move {
            let result = work.await;
            this.end(id, result);
        })
    }

    fn end(&self, id: u64, result: Result<Value, EngineError>) {
        let mut list = self.list();
        let ending = list.ending;
        let Some(job) = list.jobs.get(&id) else { return };
        let (done, unit, at) = (job.progress.now(), job.progress.unit(), Some(now()));
        let end = match result {
            Ok(value) => End { state: JobState::Done, result: Ok(Some(value)), at, done, unit },
            // What fails while all is taken down has left what it had made for the next time, if it is to go on then.
            Err(_) if ending && job.progress.is_interrupted() && (list.is_resumable)(&job.kind) => {
                list.interrupted(job, at)
            }
            Err(error) if error.class() != ErrorClass::Cancelled => {
                End { state: JobState::Failed, result: Err(chain_text(&error)), at, done, unit }
            }
            Err(_) if ending && job.progress.is_interrupted() => list.interrupted(job, at),
            Err(error) => End { state: JobState::Cancelled, result: Err(chain_text(&error)), at, done, unit },
        };
        let position = (end.state != JobState::Interrupted).then(|| Arc::clone(&job.position));
        if let Some(job) = list.jobs.get_mut(&id) {
            job.end = Some(end);
        }
        match list.save() {
            // Only now: a crash between the two finds a position without unfinished work, and removes it.
            Ok(()) => position.iter().for_each(|position| position.forget()),
            Err(error) => {
                tracing::warn!(
                    job = id,
                    error = chain_text(&error),
                    "after a restart this job is listed as interrupted"
                );
            }
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

    /// The interrupted jobs that can be begun again, oldest first.
    pub(crate) fn to_begin_again(&self) -> Vec<u64> {
        let list = self.list();
        let waiting = |job: &Job| job.state() == JobState::Interrupted && (list.is_resumable)(&job.kind);
        list.jobs.iter().filter(|(_, job)| waiting(job)).map(|(id, _)| *id).collect()
    }

    /// Holds a job up before its next piece of work; also after a restart of the daemon, if it is one that goes on then.
    ///
    /// # Errors
    /// [`EngineError::NoSuchJob`], [`EngineError::JobEnded`], or when the state directory cannot be written to: then it
    /// goes on.
    pub fn pause(&self, id: u64) -> Result<JobStatus, EngineError> {
        let list = self.list();
        let progress = list.unended(id)?.progress.clone();
        if !progress.is_paused() {
            progress.pause();
            list.save().inspect_err(|_| progress.resume())?;
        }
        drop(list);
        self.show(id)
    }

    /// Lets a paused job go on.
    ///
    /// # Errors
    /// [`EngineError::NoSuchJob`], [`EngineError::JobEnded`], or when the state directory cannot be written to: then it
    /// stays paused.
    pub fn resume(&self, id: u64) -> Result<JobStatus, EngineError> {
        let list = self.list();
        let progress = list.unended(id)?.progress.clone();
        if progress.is_paused() {
            progress.resume();
            list.save().inspect_err(|_| progress.pause())?;
        }
        drop(list);
        self.show(id)
    }

    /// How many bytes a second a job may move, from now on; `None`: as many as it can.
    ///
    /// # Errors
    /// [`EngineError::NoSuchJob`], [`EngineError::JobEnded`], [`EngineError::Invalid`] for 0, or when the state directory
    /// cannot be written to: then nothing changes.
    pub fn set_rate_limit(&self, id: u64, bytes_per_second: Option<u64>) -> Result<JobStatus, EngineError> {
        validate_rate(bytes_per_second)?;
        let list = self.list();
        let progress = list.unended(id)?.progress.clone();
        let before = progress.rate_limit();
        if before != bytes_per_second {
            progress.set_rate_limit(bytes_per_second);
            list.save().inspect_err(|_| progress.set_rate_limit(before))?;
        }
        drop(list);
        self.show(id)
    }

    /// Asks a job to stop, paused or not.
    ///
    /// # Errors
    /// [`EngineError::NoSuchJob`], [`EngineError::JobEnded`].
    pub fn cancel(&self, id: u64) -> Result<(), EngineError> {
        let list = self.list();
        let job = list.unended(id)?;
        job.progress.cancel();
        if (list.is_resumable)(&job.kind)
            && let Err(error) = list.save()
        {
            // It stops all the same, if the daemon lives that long.
            tracing::warn!(job = id, error = chain_text(&error), "that this job is to stop is not recorded");
        }
        Ok(())
    }

    /// Forgets a job that has ended, and its result. One that was interrupted does not go on then.
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
        let Some(job) = list.jobs.remove(&id) else { return Ok(()) };
        if let Err(error) = list.save() {
            list.jobs.insert(id, job);
            return Err(error);
        }
        job.position.forget();
        Ok(())
    }

    /// Asks all to stop because the daemon ends.
    pub fn interrupt_all(&self) {
        let mut list = self.list();
        list.ending = true;
        for job in list.jobs.values().filter(|job| job.end.is_none()) {
            job.progress.interrupt();
        }
    }

    /// How many have not ended.
    pub fn running(&self) -> usize {
        self.list().at_work()
    }
}

/// Refuses a rate at which nothing would ever be done.
pub(crate) fn validate_rate(bytes_per_second: Option<u64>) -> Result<(), EngineError> {
    if bytes_per_second == Some(0) {
        return Err(EngineError::Invalid("a rate of 0 bytes a second is a pause: pause the job instead".to_owned()));
    }
    Ok(())
}

/// Seconds since 1970.
fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

#[cfg(test)]
mod tests;
