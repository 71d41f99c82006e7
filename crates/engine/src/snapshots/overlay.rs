//! Empty overlays.

use crate::images::gate::FileGate;
use crate::{CacheMode, EngineError, Format};
use chain::OpenGate;
use disk::{DiskError, LayerHandle, Operation, StorageHandle};
use formats::{qcow2, raw};
use std::fs;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use storage::{FileStorage, OpenOptions};

/// An overlay that is to be made.
pub(super) struct NewOverlay {
    /// Where; a file that is there and not in use is replaced.
    pub(super) fresh: PathBuf,
    /// The name that it will have, for messages.
    pub(super) name: String,
    /// How it names its parent.
    pub(super) parent: String,
    pub(super) parent_format: Format,
    /// Bytes of the guest's disk.
    pub(super) size: u64,
    /// Whether it is to be used past the page cache.
    pub(super) direct: bool,
}

impl NewOverlay {
    /// Makes it, durably but for its name.
    pub(super) async fn make(&self) -> Result<FileStorage, EngineError> {
        let mut options = qcow2::CreateOptions::new(self.size);
        options.backing =
            Some(qcow2::BackingRef { name: self.parent.clone(), format: Some(self.parent_format.name().to_owned()) });
        options.validate()?;
        let (fresh, name, direct) = (self.fresh.clone(), self.name.clone(), self.direct);
        let file = dataplane::offload(move || open_fresh(&fresh, &name, direct)).await?;
        let storage = StorageHandle::new(file.clone());
        qcow2::create(&storage, None, &options).await?;
        storage.sync().await?;
        Ok(file)
    }
}

fn open_fresh(path: &Path, name: &str, direct: bool) -> Result<FileStorage, DiskError> {
    let mut how = fs::File::options();
    how.read(true).write(true).create(true).truncate(false);
    if direct {
        how.custom_flags(rustix::fs::OFlags::DIRECT.bits().cast_signed());
    }
    let failed = |e| DiskError::from_io(e, Operation::Create).on(path.display().to_string());
    let file = how.open(path).map_err(failed)?;
    let cache = if direct { CacheMode::None } else { CacheMode::Writeback };
    let options = OpenOptions { cache: cache.into(), replace: true, ..OpenOptions::create_new(0) };
    FileStorage::from_file(file, name, &options)
}

/// How a child names its parent: by its name alone where both are in one directory, so that they may be moved together.
///
/// # Errors
/// When that is no UTF-8, as qcow2 has names.
pub(crate) fn parent_name(child: &Path, parent: &Path) -> Result<String, EngineError> {
    let name = if parent.parent() == child.parent() { parent.file_name() } else { None };
    name.unwrap_or(parent.as_os_str()).to_str().map(str::to_owned).ok_or_else(|| {
        EngineError::Invalid(format!("{}: an image cannot record a name that is no UTF-8", parent.display()))
    })
}

/// Opens a qcow2 image without a data file.
pub(super) async fn open_qcow2(file: FileStorage, read_only: bool) -> Result<LayerHandle, EngineError> {
    let options =
        qcow2::OpenOptions { read_only, workers: FileGate::cached().workers(), ..qcow2::OpenOptions::default() };
    Ok(LayerHandle::from_rc(qcow2::Image::open(StorageHandle::new(file), None, options).await?))
}

/// Opens an image without a data file.
pub(crate) async fn open_layer(file: FileStorage, format: Format, read_only: bool) -> Result<LayerHandle, EngineError> {
    match format {
        Format::Raw => {
            let options = raw::OpenOptions { read_only, size: None };
            Ok(LayerHandle::new(raw::RawLayer::open(StorageHandle::new(file), options)))
        }
        Format::Qcow2 => open_qcow2(file, read_only).await,
    }
}

/// Removes what was made in vain.
pub(super) async fn remove(file: PathBuf) {
    dataplane::offload(move || {
        if let Err(error) = fs::remove_file(&file)
            && error.kind() != std::io::ErrorKind::NotFound
        {
            tracing::warn!(file = %file.display(), %error, "an overlay that is not needed is left");
        }
    })
    .await;
}
