//! The third contract: what a guest sees.

use crate::{Buf, ByteRange, DiskError, DiskExtent, ErrorKind, LocalFuture, Operation, Result, ZeroMode};
use std::fmt;
use std::future::Future;
use std::rc::Rc;

/// A disk's facts. The size may grow while the disk is in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DiskGeometry {
    /// Bytes.
    pub size: u64,
    /// Requests that are multiples of this (a power of two) are served without widening.
    pub preferred_alignment: u32,
    /// Allocation unit in bytes (a power of two); 1 where there is none.
    pub unit: u64,
    /// Whether writes are refused.
    pub read_only: bool,
}

/// How a write is to be done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WriteFlags {
    /// Durable when it returns (force unit access).
    pub fua: bool,
}

/// What a guest sees: a row of bytes that can be read, written and made durable.
///
/// A disk lives on one thread; requests interleave at every `await`. There are no default bodies, so
/// that a decorator which forgets a method does not compile. The handle has checked that ranges are not
/// empty and lie inside the disk's size, and that writes do not reach a read-only disk.
///
/// Requests under way at the same time have no order. Of two overlapping writes either may win, byte by byte.
pub trait Disk: 'static {
    /// The facts, as they are now.
    fn geometry(&self) -> DiskGeometry;
    /// Fills `buf` with the bytes from `offset`.
    fn read(&self, offset: u64, buf: Buf) -> impl Future<Output = Result<Buf>>;
    /// Writes all of `buf` from `offset`.
    fn write(&self, offset: u64, buf: Buf, flags: WriteFlags) -> impl Future<Output = Result<()>>;
    /// Makes the range read as zero.
    fn write_zeroes(&self, range: ByteRange, mode: ZeroMode, flags: WriteFlags) -> impl Future<Output = Result<()>>;
    /// The guest no longer needs these bytes: afterwards they read as zero or as before.
    fn discard(&self, range: ByteRange, flags: WriteFlags) -> impl Future<Output = Result<()>>;
    /// Makes every write durable that was complete before the call.
    fn flush(&self) -> impl Future<Output = Result<()>>;
    /// The first run of bytes in one state.
    fn map(&self, range: ByteRange) -> impl Future<Output = Result<DiskExtent>>;
    /// Changes the size.
    fn resize(&self, size: u64) -> impl Future<Output = Result<()>>;
    /// Flushes and closes every part. No request is under way or follows.
    fn close(&self) -> impl Future<Output = Result<()>>;
}

/// [`Disk`] with its futures boxed.
trait ErasedDisk {
    fn geometry(&self) -> DiskGeometry;
    fn read(&self, offset: u64, buf: Buf) -> LocalFuture<'_, Result<Buf>>;
    fn write(&self, offset: u64, buf: Buf, flags: WriteFlags) -> LocalFuture<'_, Result<()>>;
    fn write_zeroes(&self, range: ByteRange, mode: ZeroMode, flags: WriteFlags) -> LocalFuture<'_, Result<()>>;
    fn discard(&self, range: ByteRange, flags: WriteFlags) -> LocalFuture<'_, Result<()>>;
    fn flush(&self) -> LocalFuture<'_, Result<()>>;
    fn map(&self, range: ByteRange) -> LocalFuture<'_, Result<DiskExtent>>;
    fn resize(&self, size: u64) -> LocalFuture<'_, Result<()>>;
    fn close(&self) -> LocalFuture<'_, Result<()>>;
}

impl<T: Disk> ErasedDisk for T {
    fn geometry(&self) -> DiskGeometry {
        Disk::geometry(self)
    }
    fn read(&self, offset: u64, buf: Buf) -> LocalFuture<'_, Result<Buf>> {
        Box::pin(Disk::read(self, offset, buf))
    }
    fn write(&self, offset: u64, buf: Buf, flags: WriteFlags) -> LocalFuture<'_, Result<()>> {
        Box::pin(Disk::write(self, offset, buf, flags))
    }
    fn write_zeroes(&self, range: ByteRange, mode: ZeroMode, flags: WriteFlags) -> LocalFuture<'_, Result<()>> {
        Box::pin(Disk::write_zeroes(self, range, mode, flags))
    }
    fn discard(&self, range: ByteRange, flags: WriteFlags) -> LocalFuture<'_, Result<()>> {
        Box::pin(Disk::discard(self, range, flags))
    }
    fn flush(&self) -> LocalFuture<'_, Result<()>> {
        Box::pin(Disk::flush(self))
    }
    fn map(&self, range: ByteRange) -> LocalFuture<'_, Result<DiskExtent>> {
        Box::pin(Disk::map(self, range))
    }
    fn resize(&self, size: u64) -> LocalFuture<'_, Result<()>> {
        Box::pin(Disk::resize(self, size))
    }
    fn close(&self) -> LocalFuture<'_, Result<()>> {
        Box::pin(Disk::close(self))
    }
}

/// What everybody holds instead of a `Disk`.
#[derive(Clone)]
pub struct DiskHandle(Rc<dyn ErasedDisk>);

impl DiskHandle {
    /// Wraps a disk.
    pub fn new(disk: impl Disk) -> Self {
        Self(Rc::new(disk))
    }

    /// Wraps a disk of which somebody keeps the typed side as well.
    pub fn from_rc(disk: Rc<impl Disk>) -> Self {
        Self(disk)
    }

    /// The facts, as they are now.
    pub fn geometry(&self) -> DiskGeometry {
        self.0.geometry()
    }

    /// Fills `buf` with the bytes from `offset`.
    pub async fn read(&self, offset: u64, buf: Buf) -> Result<Buf> {
        if buf.is_empty() {
            return Ok(buf);
        }
        self.validate(Operation::Read, ByteRange::checked(offset, buf.len() as u64))?;
        self.0.read(offset, buf).await
    }

    /// Writes all of `buf` from `offset`.
    pub async fn write(&self, offset: u64, buf: Buf, flags: WriteFlags) -> Result<()> {
        if buf.is_empty() {
            return Ok(());
        }
        self.validate_write(Operation::Write, ByteRange::checked(offset, buf.len() as u64))?;
        self.0.write(offset, buf, flags).await
    }

    /// Makes the range read as zero.
    pub async fn write_zeroes(&self, range: ByteRange, mode: ZeroMode, flags: WriteFlags) -> Result<()> {
        if range.is_empty() {
            return Ok(());
        }
        self.validate_write(Operation::WriteZeroes, Some(range))?;
        self.0.write_zeroes(range, mode, flags).await
    }

    /// Gives back what the guest no longer needs.
    pub async fn discard(&self, range: ByteRange, flags: WriteFlags) -> Result<()> {
        if range.is_empty() {
            return Ok(());
        }
        self.validate_write(Operation::Discard, Some(range))?;
        self.0.discard(range, flags).await
    }

    /// Makes every completed write durable.
    pub async fn flush(&self) -> Result<()> {
        self.0.flush().await
    }

    /// The first run of bytes in one state; the range is not empty.
    pub async fn map(&self, range: ByteRange) -> Result<DiskExtent> {
        self.validate(Operation::Map, Some(range))?;
        let extent = self.0.map(range).await?;
        debug_assert!(
            !extent.range.is_empty() && extent.range.offset() == range.offset() && range.contains(extent.range)
        );
        Ok(extent)
    }

    /// Changes the size in bytes.
    pub async fn resize(&self, size: u64) -> Result<()> {
        if self.geometry().read_only {
            return Err(DiskError::new(ErrorKind::ReadOnly, Operation::Resize));
        }
        self.0.resize(size).await
    }

    /// Flushes and closes every part.
    pub async fn close(&self) -> Result<()> {
        self.0.close().await
    }

    fn validate(&self, operation: Operation, range: Option<ByteRange>) -> Result<()> {
        check_range(operation, range, self.0.geometry().size)
    }

    fn validate_write(&self, operation: Operation, range: Option<ByteRange>) -> Result<()> {
        let DiskGeometry { size, read_only, .. } = self.0.geometry();
        if read_only {
            return Err(DiskError::new(ErrorKind::ReadOnly, operation));
        }
        check_range(operation, range, size)
    }
}

fn check_range(operation: Operation, range: Option<ByteRange>, size: u64) -> Result<()> {
    match range {
        Some(range) if range.is_empty() => Err(DiskError::new(ErrorKind::Invalid, operation).at(range)),
        Some(range) if range.end() <= size => Ok(()),
        _ => {
            let error = DiskError::new(ErrorKind::OutOfRange, operation).because(format!("the disk has {size} bytes"));
            Err(match range {
                Some(range) => error.at(range),
                None => error,
            })
        }
    }
}

impl fmt::Debug for DiskHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DiskHandle({:?})", self.geometry())
    }
}
