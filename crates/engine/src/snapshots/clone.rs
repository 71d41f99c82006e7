//! Linked clones: new disks that begin as a snapshot and share its bytes.

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
    // In one directory they may be moved together.
    let name = match parent.parent() == target.parent().and_then(|dir| dir.canonicalize().ok()).as_deref() {
        true => parent.file_name().map(PathBuf::from).unwrap_or_default(),
        false => parent,
    };
    let name = name.to_str().ok_or_else(|| {
        EngineError::Invalid(format!("{}: a clone cannot record this name, which is no UTF-8", name.display()))
    })?;
    Ok(CreateSpec {
        file: target.to_owned(),
        format: Format::Qcow2,
        size: None,
        options: Default::default(),
        backing: Some(BackingSpec { file: name.to_owned(), format: snapshot.format }),
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
