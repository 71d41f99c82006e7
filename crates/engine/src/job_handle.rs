//! What a job's work has of its job.

use crate::EngineError;
use crate::images::Progress;
use crate::job_position::JobPosition;
use serde_json::Value;
use std::sync::Arc;

/// Given to the work of one job; clones are the same job's.
#[derive(Clone, Debug)]
pub struct JobHandle {
    pub(crate) id: u64,
    pub(crate) progress: Progress,
    pub(crate) position: Arc<JobPosition>,
    pub(crate) begun_again: bool,
    pub(crate) resumable: bool,
}

impl JobHandle {
    /// Of work that is no job of a daemon: it is remembered by nobody.
    pub(crate) fn of_no_job(progress: Progress) -> Self {
        let position = Arc::new(JobPosition::new(None, 0));
        Self { id: 0, progress, position, begun_again: false, resumable: false }
    }

    /// The job's number.
    pub fn id(&self) -> u64 {
        self.id
    }

    /// What the work tells how far it is, and asks whether it may go on.
    pub fn progress(&self) -> &Progress {
        &self.progress
    }

    /// Whether the daemon ended while the job was at work, and it was begun again. Then [`position`](Self::position) may be
    /// absent all the same, when none had been saved.
    pub fn is_begun_again(&self) -> bool {
        self.begun_again
    }

    /// What was durable last, in the words of the job's kind.
    pub fn position(&self) -> Option<Value> {
        self.position.get()
    }

    /// Whether a second has passed since a position was saved, or since the job began: time for the next one.
    pub fn is_position_due(&self) -> bool {
        self.position.is_due()
    }

    /// Makes a position durable: after a crash at any moment the job finds the one before or this one. Costs two syncs, so
    /// what is not a step of its own is saved when it [is due](Self::is_position_due).
    ///
    /// What the position says must be durable before: flush first, save then. Without a state directory it is kept in
    /// memory.
    ///
    /// # Errors
    /// When the state directory cannot be written to; the position is the one before then, or, after a failed sync of
    /// the directory, this one.
    pub async fn save_position(&self, position: Value) -> Result<(), EngineError> {
        self.position.save(position).await
    }

    /// Whether the work is to stop because the daemon ends, and will be begun again: then it leaves what it has made, and saves
    /// where it is. In any other case what stops takes away what it has made.
    pub fn will_be_begun_again(&self) -> bool {
        self.resumable && self.progress.is_interrupted()
    }
}
