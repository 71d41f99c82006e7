//! A disk of the daemon, as a storage that work on images can read while guests use it.
//!
//! Requests go to the disk's home thread, as a guest's do, so they see what was written last, in memory or not. What is
//! written during the work may or may not be seen.

use crate::home::Home;
use crate::{EngineError, chain_text};
use disk::{
    Buf, ByteRange, DiskError, ErrorKind, Operation, Result, Storage, StorageExtent, StorageHandle, StorageLimits,
    ZeroMode,
};
use std::path::PathBuf;

/// A disk of this process, for work that reads it. Only the engine makes these.
#[derive(Clone, Debug)]
pub struct LiveDisk {
    pub(crate) home: Home,
    pub(crate) name: String,
    /// Its image.
    pub(crate) file: PathBuf,
    /// Bytes, when the work began.
    pub(crate) size: u64,
}

impl PartialEq for LiveDisk {
    fn eq(&self, other: &Self) -> bool {
        self.home.id == other.home.id
    }
}

impl Eq for LiveDisk {}

impl LiveDisk {
    pub(crate) fn storage(&self) -> StorageHandle {
        StorageHandle::new(self.clone())
    }

    /// The data path's error in an engine's error.
    fn failed(&self, error: EngineError, operation: Operation) -> DiskError {
        match error {
            EngineError::Disk(error) => error,
            EngineError::ThreadGone => {
                DiskError::new(ErrorKind::Closed, operation).because("the disk was closed meanwhile")
            }
            other => DiskError::new(ErrorKind::Io, operation).because(chain_text(&other)),
        }
    }

    fn refuse<T>(&self, operation: Operation) -> Result<T> {
        Err(DiskError::new(ErrorKind::ReadOnly, operation))
    }
}

impl Storage for LiveDisk {
    fn name(&self) -> &str {
        &self.name
    }

    fn limits(&self) -> StorageLimits {
        StorageLimits { alignment: 1, read_only: true, grows_zeroed: true }
    }

    fn size(&self) -> u64 {
        self.size
    }

    async fn read(&self, offset: u64, buf: Buf) -> Result<Buf> {
        let mut buf = buf;
        let inside = self.size.saturating_sub(offset).min(buf.len() as u64) as usize;
        let mut behind = buf.split_off(inside);
        behind.fill(0);
        let read = self.home.with(move |stack| async move { Ok(stack.disk().read(offset, buf).await?) }).await;
        let read = read.map_err(|e| self.failed(e, Operation::Read))?;
        Ok(if behind.is_empty() { read } else { read.join(behind) })
    }

    async fn write(&self, _offset: u64, _buf: Buf) -> Result<Buf> {
        self.refuse(Operation::Write)
    }

    async fn write_zeroes(&self, _range: ByteRange, _mode: ZeroMode) -> Result<()> {
        self.refuse(Operation::WriteZeroes)
    }

    async fn discard(&self, _range: ByteRange) -> Result<()> {
        self.refuse(Operation::Discard)
    }

    async fn allocate(&self, _range: ByteRange) -> Result<()> {
        self.refuse(Operation::Write)
    }

    async fn sync(&self) -> Result<()> {
        Ok(())
    }

    async fn set_size(&self, _size: u64) -> Result<()> {
        self.refuse(Operation::Resize)
    }

    async fn extent(&self, range: ByteRange) -> Result<StorageExtent> {
        let inside = range.intersect(ByteRange::new(0, self.size));
        if inside.is_empty() {
            return Ok(StorageExtent { range, hole: true });
        }
        let mapped = self.home.with(move |stack| async move { Ok(stack.disk().map(inside).await?) }).await;
        let extent = mapped.map_err(|e| self.failed(e, Operation::Map))?;
        Ok(StorageExtent { range: extent.range, hole: extent.zero })
    }
}
