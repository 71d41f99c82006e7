//! The files of this host, as the chain opens them.

use crate::CacheMode;
use chain::{Access, OpenGate, Reference};
use disk::{ErrorKind, LocalFuture, Result, StorageHandle};
use std::path::{Path, PathBuf};
use std::time::Duration;
use storage::{FileStorage, LockMode, OpenOptions};

/// Opens files and block devices with QEMU-compatible locks.
///
/// What an image names is opened as well, when it says of which format: guests cannot write to the header of
/// a qcow2 image, and raw images, to which they can, name nothing, as formats are never guessed.
#[derive(Clone, Copy, Debug)]
pub(crate) struct FileGate {
    pub(crate) cache: CacheMode,
    /// Take no locks.
    pub(crate) force_share: bool,
}

impl FileGate {
    /// Opens with locks as usual.
    pub(crate) const fn cached() -> Self {
        Self { cache: CacheMode::Writeback, force_share: false }
    }

    /// Makes an empty file, in place of one that is there and not in use; block devices stay as they are.
    pub(crate) async fn create(&self, path: &Path) -> Result<StorageHandle> {
        open(path, OpenOptions { cache: self.cache.into(), replace: true, ..OpenOptions::create_new(0) }).await
    }
}

impl From<CacheMode> for storage::CacheMode {
    fn from(mode: CacheMode) -> Self {
        match mode {
            CacheMode::None => Self::None,
            CacheMode::Writeback => Self::Writeback,
            CacheMode::Unsafe => Self::Unsafe,
        }
    }
}

/// How often an image that is in use is tried again, and the pause between. The kernel takes down a killed
/// process's io_uring a moment after the process is gone, and its locks only then.
const TRIES: u32 = 10;
const PAUSE: Duration = Duration::from_millis(50);

/// Opening blocks, so it is done beside the I/O thread.
async fn open(path: &Path, options: OpenOptions) -> Result<StorageHandle> {
    let mut tries = 0;
    loop {
        let path = path.to_owned();
        match dataplane::offload(move || FileStorage::open(path, &options)).await {
            Err(error) if error.kind() == ErrorKind::InUse && tries < TRIES => {
                tries += 1;
                dataplane::sleep(PAUSE).await;
            }
            result => return result.map(StorageHandle::new),
        }
    }
}

impl OpenGate for FileGate {
    fn open_storage<'a>(&'a self, path: &'a Path, access: Access) -> LocalFuture<'a, Result<StorageHandle>> {
        let options = OpenOptions {
            read_only: access == Access::ReadOnly,
            cache: self.cache.into(),
            lock: if self.force_share { LockMode::ForceShare } else { LockMode::Qemu },
            ..OpenOptions::default()
        };
        Box::pin(open(path, options))
    }

    fn allow(&self, _reference: &Reference<'_>) -> Result<()> {
        Ok(())
    }

    fn identity(&self, path: &Path) -> PathBuf {
        path.canonicalize().unwrap_or_else(|_| path.to_owned())
    }
}
