//! The engine's jobs: what each kind does, with the engine's disks or with files alone.

use super::Engine;
use crate::consolidation::{ConsolidateSpec, Consolidation};
use crate::images::live::LiveDisk;
use crate::jobs::{JobWork, validate_rate};
use crate::promotion::{PromoteSpec, Promotion};
use crate::snapshots::instant::NewTop;
use crate::{EngineError, Event, JobHandle, JobKind, JobState, JobStatus, Jobs, chain_text};
use serde_json::Value;
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

/// How long jobs are waited for when the daemon ends, and how often they are looked at.
const JOBS_GRACE: Duration = Duration::from_secs(20);
const JOBS_LOOK: Duration = Duration::from_millis(10);

/// What a job does, with what comes out.
type Work = Pin<Box<dyn Future<Output = Result<Value, EngineError>> + Send>>;

impl Engine {
    /// The jobs. What changes one is told as an event when it is done here, and not there.
    pub fn jobs(&self) -> &Jobs {
        &self.jobs
    }

    /// Enters a job that may move so many bytes a second, or as many as it can.
    ///
    /// # Errors
    /// When the description makes no sense, a file in it is the image of an open disk, or too many are running.
    pub fn begin_job(
        self: &Arc<Self>,
        kind: JobKind,
        rate_limit: Option<u64>,
    ) -> Result<(JobStatus, JobWork), EngineError> {
        validate_rate(rate_limit)?;
        let ready = self.prepare_job(kind.clone())?;
        let (status, work) = self.jobs.begin(kind, rate_limit, |handle| self.work(ready, handle))?;
        Ok((status.clone(), self.told(status, work)))
    }

    /// Begins an interrupted job again.
    fn begin_job_again(self: &Arc<Self>, id: u64) -> Result<(JobStatus, JobWork), EngineError> {
        let ready = self.jobs.show(id).and_then(|job| self.prepare_job(job.kind))?;
        let (status, work) = self.jobs.begin_again(id, |handle| self.work(ready, handle))?;
        Ok((status.clone(), self.told(status, work)))
    }

    /// Begins all jobs again that the daemon's end has interrupted and that can go on. One whose disk is not open, or whose
    /// file is somebody's, stays interrupted; [`resume_job`](Self::resume_job) tries again.
    pub fn resume_jobs(self: &Arc<Self>) -> Vec<(JobStatus, JobWork)> {
        let mut begun = Vec::new();
        for id in self.jobs.to_begin_again() {
            match self.begin_job_again(id) {
                Ok(job) => begun.push(job),
                Err(error) => tracing::warn!(job = id, error = chain_text(&error), "this job could not go on"),
            }
        }
        begun
    }

    /// Holds a job up before its next piece of work.
    ///
    /// # Errors
    /// As [`Jobs::pause`].
    pub fn pause_job(&self, id: u64) -> Result<JobStatus, EngineError> {
        let status = self.jobs.pause(id)?;
        self.tell(Event::Job { id, state: status.state });
        Ok(status)
    }

    /// Lets a paused job go on, or an interrupted one, which then is work to be run to its end.
    ///
    /// # Errors
    /// As [`Jobs::resume`], and as [`Jobs::begin_again`] for a job that was interrupted.
    pub fn resume_job(self: &Arc<Self>, id: u64) -> Result<(JobStatus, Option<JobWork>), EngineError> {
        if self.jobs.show(id)?.state == JobState::Interrupted {
            let (status, work) = self.begin_job_again(id)?;
            return Ok((status, Some(work)));
        }
        let status = self.jobs.resume(id)?;
        self.tell(Event::Job { id, state: status.state });
        Ok((status, None))
    }

    /// Has the job tell that it has begun, and when it has ended.
    fn told(self: &Arc<Self>, status: JobStatus, work: JobWork) -> JobWork {
        let (id, this) = (status.id, Arc::clone(self));
        self.tell(Event::Job { id, state: status.state });
        Box::pin(async move {
            work.await;
            if let Ok(end) = this.jobs.show(id) {
                this.tell(Event::Job { id, state: end.state });
            }
        })
    }

    /// Looks whether a job can be done, and finds the disks that it reads.
    fn prepare_job(&self, mut kind: JobKind) -> Result<JobKind, EngineError> {
        kind.validate()?;
        for file in kind.files_to_lock() {
            match (self.refuse_image_of_a_disk(file, false), &kind) {
                // The daemon ended after the promotion's last step: the target is the disk's image.
                (Err(EngineError::HeldByDisk { disk, .. }), JobKind::Promote(spec)) if spec.disk == disk => {}
                (refused, _) => refused?,
            }
        }
        for source in kind.sources_mut() {
            if let Some(name) = &source.disk {
                let (home, facts) = self.home(name)?;
                let file = self.disk(name)?.spec.image.file;
                source.live = Some(LiveDisk { home, name: name.clone(), file, size: facts.size });
            }
        }
        if let JobKind::Promote(PromoteSpec { disk, .. }) | JobKind::Consolidate(ConsolidateSpec { disk, .. }) = &kind {
            self.home(disk)?;
        }
        Ok(kind)
    }

    /// What a job does. Kinds that need more of the engine than a disk to read get an arm of their own here; the part
    /// that moves bytes runs on an I/O thread (`Home::with`), where [`Progress::pace`](crate::images::Progress::pace) can
    /// wait.
    fn work(self: &Arc<Self>, kind: JobKind, job: JobHandle) -> Work {
        match kind {
            JobKind::Create(_)
            | JobKind::Convert(_)
            | JobKind::Compare(_)
            | JobKind::Audit(_)
            | JobKind::Check(_)
            | JobKind::Measure(_)
            | JobKind::Resize(_)
            | JobKind::Restore(_) => {
                let workshop = self.workshop();
                Box::pin(async move { workshop.perform(kind, job.progress().clone()).await })
            }
            JobKind::Promote(spec) => {
                let this = Arc::clone(self);
                Box::pin(async move { this.promote(spec, job).await })
            }
            JobKind::Backup(spec) => {
                let this = Arc::clone(self);
                Box::pin(async move { this.backup(spec, job).await })
            }
            JobKind::Consolidate(spec) => {
                let this = Arc::clone(self);
                Box::pin(async move { this.consolidate(spec, job).await })
            }
        }
    }

    async fn promote(self: Arc<Self>, spec: PromoteSpec, job: JobHandle) -> Result<Value, EngineError> {
        let (home, _) = self.home(&spec.disk)?;
        let cache = self.disk(&spec.disk)?.spec.cache;
        let (this, disk) = (Arc::clone(&self), spec.disk.clone());
        let enter = Box::new(move |image: &Path, format, history| {
            this.enter_tops(&[NewTop { disk, image: image.to_owned(), format, history }])
        });
        let promotion = Promotion { spec, cache, job, enter };
        let report = home.with(move |stack| promotion.run(stack)).await?;
        self.look_at_history(&report.disk).await;
        self.tell(Event::DiskMoved { disk: report.disk.clone(), file: report.file.clone() });
        serde_json::to_value(report).map_err(|e| EngineError::Invalid(e.to_string()))
    }

    async fn consolidate(self: Arc<Self>, spec: ConsolidateSpec, job: JobHandle) -> Result<Value, EngineError> {
        let (home, _) = self.home(&spec.disk)?;
        let (this, disk) = (Arc::clone(&self), spec.disk.clone());
        let enter = Box::new(move |image: &Path, format, history| {
            this.enter_tops(&[NewTop { disk, image: image.to_owned(), format, history }])
        });
        let consolidation = Consolidation { spec, job, enter };
        let report = home.with(move |stack| consolidation.run(stack)).await?;
        self.look_at_history(&report.disk).await;
        if let Some(snapshot) = &report.snapshot {
            self.tell(Event::SnapshotRemoved { disk: report.disk.clone(), snapshot: snapshot.clone() });
        }
        serde_json::to_value(report).map_err(|e| EngineError::Invalid(e.to_string()))
    }

    /// Tells how far a job is, unless it is paused; `false` when it has ended.
    pub fn tell_job_progress(&self, id: u64) -> bool {
        let Ok(job) = self.jobs.show(id) else { return false };
        if job.state == JobState::Running && job.total > 0 {
            let JobStatus { percent, done, total, unit, rate, seconds_left, .. } = job;
            self.tell(Event::JobProgress { id, percent, done, total, unit, rate, seconds_left });
        }
        !job.state.has_ended()
    }

    /// Stops all jobs and waits until they have ended, or for 20 seconds.
    pub(super) async fn end_jobs(&self) {
        self.jobs.interrupt_all();
        let mut waited = Duration::ZERO;
        while self.jobs.running() > 0 && waited < JOBS_GRACE {
            // In the blocking pool, because a job may keep an I/O thread busy.
            dataplane::offload(|| std::thread::sleep(JOBS_LOOK)).await;
            waited += JOBS_LOOK;
        }
        for job in self.jobs.all().iter().filter(|job| !job.state.has_ended()) {
            tracing::warn!(job = job.id, "this job did not stop in time");
        }
    }
}
