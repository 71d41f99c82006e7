//! The same for images that nobody serves.

use super::{ConsolidateReport, ConsolidateSpec, Consolidation};
use crate::history::HistorySource;
use crate::images::stack::Stack;
use crate::images::{Progress, Workshop, closing};
use crate::promotion::{note_at, take_history_along};
use crate::{EngineError, JobHandle};
use std::rc::Rc;

impl Workshop {
    /// Merges a layer of an image that nobody serves into its neighbour.
    ///
    /// # Errors
    /// When the image or the layer is in use, or others stand on it: the image shows what it showed before.
    pub async fn consolidate(
        &self,
        source: HistorySource,
        spec: ConsolidateSpec,
        progress: Progress,
    ) -> Result<ConsolidateReport, EngineError> {
        spec.validate()?;
        self.run(move || async move {
            let stack = Stack::open_at_rest(&source).await?;
            let job = JobHandle::of_no_job(progress);
            let consolidation = Consolidation { spec, job, enter: note_at(source.file.clone()) };
            let done = closing(&stack, consolidation.run(Rc::clone(&stack)).await).await?;
            if source.history.file.is_none() {
                take_history_along(source.file, done.file.clone()).await;
            }
            Ok(done)
        })
        .await
    }
}
