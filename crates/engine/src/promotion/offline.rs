//! The same for images that nobody serves.

use super::{Enter, PromoteReport, PromoteSpec, Promotion};
use crate::history::{HistorySource, sidecar_of};
use crate::images::stack::{HistoryUse, OpenRequest, Stack};
use crate::images::{Progress, Workshop, closing, offload_format};
use crate::{CacheMode, EngineError, JobHandle, chain_text, durable_file, linkage};
use std::fs;
use std::path::{Path, PathBuf};
use std::rc::Rc;

impl Stack {
    /// Opens an image that nobody uses, to exchange its layers; its history is kept if there is one.
    pub(crate) async fn open_at_rest(source: &HistorySource) -> Result<Rc<Self>, EngineError> {
        let format = offload_format(source.file.clone(), source.format).await?;
        let history = HistoryUse::IfThere(source.history.file.clone());
        let request = OpenRequest { writable: true, history, ..OpenRequest::reading(source.file.clone(), format) };
        Ok(Rc::new(Self::open(&request).await?))
    }
}

impl Workshop {
    /// Gives an image that nobody serves another place or format: all of it is copied, and its history goes along.
    ///
    /// # Errors
    /// When the image is in use, or the target cannot be made: the image is as it was.
    pub async fn promote(
        &self,
        source: HistorySource,
        spec: PromoteSpec,
        progress: Progress,
    ) -> Result<PromoteReport, EngineError> {
        spec.validate()?;
        self.run(move || async move {
            let stack = Stack::open_at_rest(&source).await?;
            let target = spec.target.clone();
            let promotion = Promotion {
                spec,
                cache: CacheMode::default(),
                job: JobHandle::of_no_job(progress),
                enter: note_at(source.file.clone()),
            };
            let promoted = promotion.run(Rc::clone(&stack)).await;
            let promoted = closing(&stack, promoted).await?;
            if source.history.file.is_none() {
                take_history_along(source.file, target).await;
            }
            Ok(promoted)
        })
        .await
    }
}

/// Where no catalogue names a disk's image, the old image says which one it is now.
///
/// Crash: before that the history speaks of the old image, and of the new one as its heir; after it, of the new one.
pub(crate) fn note_at(old: PathBuf) -> Enter {
    Box::new(move |image, _, _| linkage::change_blocking(&old, |known| known.moved_to = Some(image.to_owned())))
}

/// Gives the history that lies beside an image its place beside the one that the disk goes on in.
///
/// Crash: a copy is whole before the old one is removed; until then none is found beside the new image, which is told as
/// that.
pub(crate) async fn take_history_along(from: PathBuf, to: PathBuf) {
    let moved = dataplane::offload(move || {
        let (from, to) = (sidecar_of(&from), sidecar_of(&to));
        if !from.exists() || is_same(&from, &to) {
            return Ok(());
        }
        fs::rename(&from, &to)
            .or_else(|_| {
                // Another file system.
                fs::copy(&from, &to)?;
                fs::File::open(&to)?.sync_all()?;
                durable_file::sync_directory_of(&to)?;
                fs::remove_file(&from)
            })
            .and_then(|()| durable_file::sync_directory_of(&to))
            .map_err(|error| EngineError::file(from, "move the history", error))
    });
    if let Err(error) = moved.await {
        tracing::warn!(error = chain_text(&error), "name it with --history-file from now on");
    }
}

/// Whether two paths lead to one place.
pub(super) fn is_same(a: &Path, b: &Path) -> bool {
    matches!((a.canonicalize(), b.canonicalize()), (Ok(a), Ok(b)) if a == b)
}
