//! A storage that long work goes through: it counts what is written, and fails when the work was asked to stop. It waits
//! where the work is paused, and keeps to its rate.
//!
//! So work that knows nothing of progress (the formats' create, check and repair) stops between two requests, and
//! nothing is written after the wish was heard: what is left on the disk is what a crash at that moment would leave.

use super::Progress;
use disk::{
    Buf, ByteRange, DiskError, ErrorKind, Operation, Result, Storage, StorageExtent, StorageHandle, StorageLimits,
    ZeroMode,
};

/// Bytes that are set aside between two looks at the wish to stop.
const STEP: u64 = 256 << 20;

/// The storage in question, watched.
pub(crate) struct Watched {
    inner: StorageHandle,
    progress: Progress,
    /// Whether what is written counts as progress.
    counts: bool,
}

impl Watched {
    /// Fails after the wish to stop.
    pub(crate) fn stopping(inner: &StorageHandle, progress: &Progress) -> StorageHandle {
        StorageHandle::new(Self { inner: inner.clone(), progress: progress.clone(), counts: false })
    }

    /// Fails after the wish to stop, and counts what is written.
    pub(crate) fn counting(inner: &StorageHandle, progress: &Progress) -> StorageHandle {
        StorageHandle::new(Self { inner: inner.clone(), progress: progress.clone(), counts: true })
    }

    /// To be awaited before so many bytes are moved.
    async fn go_on(&self, operation: Operation, bytes: u64) -> Result<()> {
        let paced = self.progress.pace(bytes).await;
        paced.map_err(|_| DiskError::new(ErrorKind::Closed, operation).because("cancelled"))
    }

    fn count(&self, bytes: u64) {
        if self.counts {
            self.progress.advance(bytes);
        }
    }
}

impl Storage for Watched {
    fn name(&self) -> &str {
        self.inner.name()
    }

    fn limits(&self) -> StorageLimits {
        self.inner.limits()
    }

    fn size(&self) -> u64 {
        self.inner.size()
    }

    async fn read(&self, offset: u64, buf: Buf) -> Result<Buf> {
        self.go_on(Operation::Read, buf.len() as u64).await?;
        self.inner.read(offset, buf).await
    }

    async fn write(&self, offset: u64, buf: Buf) -> Result<Buf> {
        let len = buf.len() as u64;
        self.go_on(Operation::Write, len).await?;
        let buf = self.inner.write(offset, buf).await?;
        self.count(len);
        Ok(buf)
    }

    async fn write_zeroes(&self, range: ByteRange, mode: ZeroMode) -> Result<()> {
        self.go_on(Operation::WriteZeroes, 0).await?;
        self.inner.write_zeroes(range, mode).await
    }

    async fn discard(&self, range: ByteRange) -> Result<()> {
        self.go_on(Operation::Discard, 0).await?;
        self.inner.discard(range).await
    }

    async fn allocate(&self, range: ByteRange) -> Result<()> {
        let mut rest = range;
        while !rest.is_empty() {
            self.go_on(Operation::Write, 0).await?;
            let part = rest.prefix(STEP);
            self.inner.allocate(part).await?;
            self.count(part.len());
            rest = rest.skip(part.len());
        }
        Ok(())
    }

    async fn sync(&self) -> Result<()> {
        self.go_on(Operation::Flush, 0).await?;
        self.inner.sync().await
    }

    async fn set_size(&self, size: u64) -> Result<()> {
        self.go_on(Operation::Resize, 0).await?;
        self.inner.set_size(size).await
    }

    async fn extent(&self, range: ByteRange) -> Result<StorageExtent> {
        self.go_on(Operation::Map, 0).await?;
        self.inner.extent(range).await
    }
}
