//! Opening files and block devices.

use crate::{FileStorage, direct, lock};
use disk::{DiskError, ErrorKind, Operation, Result};
use std::fs::{File, FileType};
use std::io;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;

/// How bytes reach the device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CacheMode {
    /// Around the page cache (`O_DIRECT`).
    None,
    /// Through the page cache; a sync makes writes durable.
    #[default]
    Writeback,
    /// Through the page cache, and a sync does nothing: for what can be made again.
    Unsafe,
}

/// Which of QEMU's image locks to take.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LockMode {
    /// As a QEMU guest's device does: a writer is alone, readers share among themselves.
    #[default]
    Qemu,
    /// A reader that bears a writer beside it and so may see a state in between (`qemu-img -U`).
    ForceShare,
    /// None.
    Off,
}

/// How to open. The default opens an existing file for writing, through the page cache, locked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OpenOptions {
    /// For reading only.
    pub read_only: bool,
    /// How bytes reach the device.
    pub cache: CacheMode,
    /// Which locks to take.
    pub lock: LockMode,
    /// Make a file of so many bytes, all zero.
    pub create_new: Option<u64>,
    /// With `create_new`: a file that is there already is locked and emptied. Without, it is an error.
    pub replace: bool,
}

impl OpenOptions {
    /// For reading only, everything else as by default.
    pub fn read_only() -> Self {
        Self { read_only: true, ..Self::default() }
    }

    /// Makes a new file of `size` bytes.
    pub fn create_new(size: u64) -> Self {
        Self { create_new: Some(size), ..Self::default() }
    }
}

impl FileStorage {
    /// Opens (or makes) the file or block device at `path`. Blocks; the storage works on I/O threads after.
    ///
    /// # Errors
    /// `InUse` when a lock is held by somebody else, who is named as far as `/proc` tells; `Unsupported` when
    /// the file system refuses direct I/O; `NotFound` and others as the system reports them.
    pub fn open(path: impl AsRef<Path>, options: &OpenOptions) -> Result<Self> {
        let path = path.as_ref();
        let name = path.display().to_string();
        open(path, options).and_then(|file| Self::from_file(file, &name, options)).map_err(|error| error.on(name))
    }

    /// Takes over an open file under the name `name`: takes the locks, and with `create_new` sets the size. The
    /// file's own flags say whether it is direct; `CacheMode::None` demands it.
    ///
    /// # Errors
    /// As [`FileStorage::open`].
    pub fn from_file(file: File, name: &str, options: &OpenOptions) -> Result<Self> {
        let operation = if options.create_new.is_some() { Operation::Create } else { Operation::Open };
        let failed = |error: io::Error| DiskError::from_io(error, operation).on(name);
        let kind = file.metadata().map_err(failed)?.file_type();
        refuse_kind(kind, operation).map_err(|error| error.on(name))?;
        lock::acquire(&file, lock::Demand::of(options)).map_err(|error| match error {
            lock::LockError::Held(held) => {
                DiskError::new(ErrorKind::InUse, operation).on(name).because(held.to_string())
            }
            lock::LockError::Io(error) => failed(error),
        })?;
        if let Some(size) = options.create_new {
            if kind.is_block_device() {
                let found = block_size(&file).map_err(failed)?;
                if found < size {
                    return Err(DiskError::new(ErrorKind::NoSpace, operation)
                        .on(name)
                        .because(format!("the block device has {found} bytes, {size} are needed")));
                }
            } else {
                if options.replace {
                    file.set_len(0).map_err(failed)?;
                }
                file.set_len(size).map_err(failed)?;
            }
        }
        let direct = direct::is_direct(&file).map_err(failed)?;
        let alignment = if direct { direct::alignment(&file, name)? } else { 1 };
        Self::new(file, name, options, alignment, kind.is_block_device()).map_err(failed)
    }
}

/// Size of a block device in bytes.
fn block_size(file: &File) -> io::Result<u64> {
    Ok(rustix::fs::seek(file, rustix::fs::SeekFrom::End(0))?)
}

/// Refuses what can be no disk.
fn refuse_kind(kind: FileType, operation: Operation) -> Result<()> {
    if kind.is_file() || kind.is_block_device() {
        return Ok(());
    }
    let what = if kind.is_dir() { "a directory" } else { "neither a regular file nor a block device" };
    Err(DiskError::new(ErrorKind::Unsupported, operation)
        .because(format!("is {what}; a disk needs a regular file or a block device")))
}

fn open(path: &Path, options: &OpenOptions) -> Result<File> {
    let operation = if options.create_new.is_some() { Operation::Create } else { Operation::Open };
    // Before it is opened: a pipe would be waited for until somebody opens its other end.
    if let Ok(found) = std::fs::metadata(path) {
        refuse_kind(found.file_type(), operation)?;
    }
    let mut how = File::options();
    how.read(true).write(!options.read_only);
    if options.create_new.is_some() {
        if options.read_only {
            return Err(DiskError::new(ErrorKind::Invalid, operation).because("a new file cannot be read-only"));
        }
        if options.replace {
            // Emptied only when its lock is ours.
            how.create(true).truncate(false);
        } else {
            how.create_new(true);
        }
    }
    if options.cache == CacheMode::None {
        how.custom_flags(libc::O_DIRECT);
    }
    how.open(path).map_err(|error| {
        if options.cache == CacheMode::None && error.raw_os_error() == Some(libc::EINVAL) {
            return direct::refused(operation).caused_by(error);
        }
        let exists = error.kind() == io::ErrorKind::AlreadyExists;
        let error = DiskError::from_io(error, operation);
        if exists { error.because("exists already; remove it or choose another name") } else { error }
    })
}
