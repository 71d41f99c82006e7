//! Linked clones: new disks that begin as a snapshot and share its bytes.

use super::overlay::parent_name;
use super::{SnapshotReport, list};
use crate::images::Workshop;
use crate::images::report::ImageInfo;
use crate::images::request::{BackingSpec, CreateSpec};
use crate::{EngineError, Format, linkage};
use std::fs;
use std::path::{Path, PathBuf};

/// What is to be made: an overlay over the snapshot, at `target` (an absolute path).
pub(crate) fn plan(snapshot: &SnapshotReport, target: &Path) -> Result<CreateSpec, EngineError> {
    if fs::symlink_metadata(target).is_ok() {
        return Err(EngineError::Taken {
            file: target.to_owned(),
            what: "a clone is a new file, but there is one already; choose another name",
        });
    }
    let parent = snapshot.file.canonicalize().map_err(|e| EngineError::file(&snapshot.file, "find", e))?;
    let directory = target.parent().and_then(|directory| directory.canonicalize().ok()).unwrap_or_default();
    let name = parent_name(&directory.join(target.file_name().unwrap_or_default()), &parent)?;
    Ok(CreateSpec {
        file: target.to_owned(),
        format: Format::Qcow2,
        size: None,
        options: Default::default(),
        backing: Some(BackingSpec { file: name, format: snapshot.format }),
        unsafe_backing: false,
    })
}

impl Workshop {
    /// Makes a new image at `target` (an absolute path) that begins as a snapshot of an image.
    ///
    /// # Errors
    /// When there is no such snapshot, or something stands at `target`.
    pub async fn clone_snapshot(
        &self,
        file: PathBuf,
        format: Option<Format>,
        name: String,
        target: PathBuf,
    ) -> Result<ImageInfo, EngineError> {
        let spec = self
            .run(move || async move {
                let snapshot = list::named(list::of_file(&file, format).await?, &file.display().to_string(), &name)?;
                linkage::refuse_half_merged(&snapshot.file).await?;
                dataplane::offload(move || plan(&snapshot, &target)).await
            })
            .await?;
        self.create(spec, crate::images::Progress::new()).await
    }
}
