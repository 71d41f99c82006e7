//! The files of this host, as the chain opens them.

use crate::CacheMode;
use chain::{Access, OpenGate, Reference};
use disk::{DiskError, ErrorKind, LocalFuture, Operation, Result, StorageHandle};
use formats::qcow2::Workers;
use serde::{Deserialize, Serialize};
use std::cell::RefCell;
use std::error::Error;
use std::fs::Metadata;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
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

    /// How a file is opened for writing whose lock is taken over from another descriptor of this process.
    pub(crate) fn unlocked(direct: bool) -> OpenOptions {
        let cache = if direct { storage::CacheMode::None } else { storage::CacheMode::Writeback };
        OpenOptions { cache, lock: LockMode::Off, ..OpenOptions::default() }
    }

    /// Makes an empty file, in place of one that is there and not in use; block devices stay as they are.
    pub(crate) async fn create(&self, path: &Path) -> Result<StorageHandle> {
        open(path, OpenOptions { cache: self.cache.into(), replace: true, ..OpenOptions::create_new(0) })
            .await
            .map(StorageHandle::new)
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
async fn open(path: &Path, options: OpenOptions) -> Result<FileStorage> {
    let mut tries = 0;
    loop {
        let path = path.to_owned();
        match dataplane::offload(move || FileStorage::open(path, &options)).await {
            Err(error) if error.kind() == ErrorKind::InUse && tries < TRIES => {
                tries += 1;
                dataplane::sleep(PAUSE).await;
            }
            result => return result.map_err(|e| with_next_step(e, &options)),
        }
    }
}

/// The same error with the step that helps who opened like this.
fn with_next_step(error: DiskError, options: &OpenOptions) -> DiskError {
    let again = |kind, detail: String| {
        let told = DiskError::new(kind, error.operation()).because(detail);
        match error.object() {
            Some(object) => told.on(object),
            None => told,
        }
    };
    match error.kind() {
        ErrorKind::InUse => {
            let text = error.to_string();
            let Some(at) = text.find("in use by ") else { return error };
            // What follows is said of opening in general.
            let fact = text[at..].split("; end that use first").next().unwrap_or_default();
            let fact = fact.replace("this process (", "this highwater process (");
            let step = match options.read_only {
                true => {
                    "end that use first, or read beside it with -U (info, map, check, convert, compare, measure), perhaps \
                     a state in between"
                }
                false => "end that use first",
            };
            again(ErrorKind::InUse, format!("{fact}; {step}"))
        }
        ErrorKind::Io => {
            let cause = error.source().and_then(|cause| cause.downcast_ref::<io::Error>()).map(io::Error::kind);
            match cause {
                Some(io::ErrorKind::PermissionDenied) if options.read_only => {
                    again(ErrorKind::Io, "permission denied; change who may read the file".to_owned())
                }
                Some(io::ErrorKind::PermissionDenied) => {
                    again(ErrorKind::Io, "permission denied; change who may write to the file, or read only".to_owned())
                }
                Some(io::ErrorKind::IsADirectory) => {
                    again(ErrorKind::Io, "is a directory; an image is a regular file or a block device".to_owned())
                }
                _ => error,
            }
        }
        _ => error,
    }
}

impl FileGate {
    /// Opens a file whose own face is needed as well.
    pub(crate) async fn open_file(&self, path: &Path, access: Access) -> Result<FileStorage> {
        let options = OpenOptions {
            read_only: access == Access::ReadOnly,
            cache: self.cache.into(),
            lock: if self.force_share { LockMode::ForceShare } else { LockMode::Qemu },
            ..OpenOptions::default()
        };
        open(path, options).await
    }
}

impl OpenGate for FileGate {
    fn open_storage<'a>(&'a self, path: &'a Path, access: Access) -> LocalFuture<'a, Result<StorageHandle>> {
        Box::pin(async move { self.open_file(path, access).await.map(StorageHandle::new) })
    }

    fn allow(&self, _reference: &Reference<'_>) -> Result<()> {
        Ok(())
    }

    fn identity(&self, path: &Path) -> PathBuf {
        path.canonicalize().unwrap_or_else(|_| path.to_owned())
    }

    fn workers(&self) -> Workers {
        Workers::new(|job| Box::pin(dataplane::offload(job)))
    }
}

/// Which file it is, whatever name led to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct FileId {
    block_device: bool,
    device: u64,
    inode: u64,
}

impl FileId {
    /// The identity of the file with these metadata; a block device is itself, not the node that names it.
    pub(crate) fn of(metadata: &Metadata) -> Self {
        if metadata.file_type().is_block_device() {
            return Self { block_device: true, device: metadata.rdev(), inode: 0 };
        }
        Self { block_device: false, device: metadata.dev(), inode: metadata.ino() }
    }
}

/// A [`FileGate`] that remembers what it has opened, and opens none of the `kept` files for writing.
pub(crate) struct RecordingGate<'a> {
    gate: FileGate,
    kept: &'a [FileId],
    opened: RefCell<Vec<FileStorage>>,
}

impl<'a> RecordingGate<'a> {
    pub(crate) fn new(gate: FileGate, kept: &'a [FileId]) -> Self {
        Self { gate, kept, opened: RefCell::default() }
    }

    /// All files, in the order in which they were opened.
    pub(crate) fn into_opened(self) -> Vec<FileStorage> {
        self.opened.into_inner()
    }

    fn refuse_kept(&self, path: &Path, metadata: &Metadata) -> Result<()> {
        if self.kept.contains(&FileId::of(metadata)) {
            return Err(DiskError::new(ErrorKind::Invalid, Operation::Open)
                .on(path.display().to_string())
                .because("is both source and target; choose another target"));
        }
        Ok(())
    }
}

impl OpenGate for RecordingGate<'_> {
    fn open_storage<'a>(&'a self, path: &'a Path, access: Access) -> LocalFuture<'a, Result<StorageHandle>> {
        Box::pin(async move {
            if access == Access::ReadWrite
                && !self.kept.is_empty()
                && let Ok(metadata) = path.metadata()
            {
                self.refuse_kept(path, &metadata)?; // Before its lock, which we may hold ourselves, is asked for.
            }
            let file = self.gate.open_file(path, access).await?;
            if access == Access::ReadWrite {
                let metadata = file.file().metadata().map_err(|e| DiskError::from_io(e, Operation::Open))?;
                self.refuse_kept(path, &metadata)?;
            }
            self.opened.borrow_mut().push(file.clone());
            Ok(StorageHandle::new(file))
        })
    }

    fn allow(&self, reference: &Reference<'_>) -> Result<()> {
        self.gate.allow(reference)
    }

    fn identity(&self, path: &Path) -> PathBuf {
        self.gate.identity(path)
    }

    fn workers(&self) -> Workers {
        self.gate.workers()
    }
}
