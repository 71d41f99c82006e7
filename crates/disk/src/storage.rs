//! The first contract: a container of bytes.

use crate::{Buf, ByteRange, DiskError, ErrorKind, LocalFuture, Operation, Result};
use event_listener::Event;
use std::fmt;
use std::future::Future;
use std::sync::{Arc, Mutex};

/// How zeroes may be made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ZeroMode {
    /// Space may be given back (a hole reads as zero).
    pub unmap: bool,
    /// Fail with [`ErrorKind::NotFast`] rather than write zero bytes.
    pub fast_only: bool,
}

/// What a storage demands of requests; constant while it is open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StorageLimits {
    /// Offset, length and memory address of reads and writes, offset and length of zeroes and discards,
    /// are multiples of this power of two (1: anything goes). Implementations may rely on it; callers of
    /// the handle need not care, but aligned requests are faster.
    pub alignment: u32,
    /// Whether writes are refused.
    pub read_only: bool,
    /// Whether bytes that were never written since the storage grew over them read as zero (files: yes;
    /// block devices: no, and they do not grow).
    pub grows_zeroed: bool,
}

/// A run of one kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StorageExtent {
    /// Begins where the question began, is never empty and never longer.
    pub range: ByteRange,
    /// No space is set aside; reads as zero.
    pub hole: bool,
}

/// A container of bytes: a file, a block device, memory, a simulated disk.
///
/// There are no default bodies, so that a decorator which forgets a method does not compile. Authors
/// write `async fn`; everybody else holds a [`StorageHandle`], which has checked that
/// * ranges are not empty and end at or below `i64::MAX`,
/// * requests are aligned as [`StorageLimits::alignment`] says,
/// * writes do not reach a read-only storage.
///
/// Futures stay on the thread that polls them first, but different threads may use one storage at the
/// same time. A request owns its buffer; a future that is dropped lets the request run on to its end.
pub trait Storage: Send + Sync + 'static {
    /// The name for messages (a path).
    fn name(&self) -> &str;
    /// What requests must satisfy.
    fn limits(&self) -> StorageLimits;
    /// Present size in bytes.
    fn size(&self) -> u64;
    /// Fills `buf` with the bytes from `offset`; those beyond the end read as zero.
    fn read(&self, offset: u64, buf: Buf) -> impl Future<Output = Result<Buf>>;
    /// Writes all of `buf` from `offset`; grows the storage if need be. Durable after [`Storage::sync`].
    fn write(&self, offset: u64, buf: Buf) -> impl Future<Output = Result<Buf>>;
    /// Makes the range read as zero; grows the storage if need be.
    fn write_zeroes(&self, range: ByteRange, mode: ZeroMode) -> impl Future<Output = Result<()>>;
    /// Gives back the range's space, where that is possible; afterwards the range reads as zero if
    /// the storage says `grows_zeroed`, otherwise as old bytes or zeroes. Never grows the storage.
    fn discard(&self, range: ByteRange) -> impl Future<Output = Result<()>>;
    /// Sets space aside without changing what is read; grows the storage if need be.
    fn allocate(&self, range: ByteRange) -> impl Future<Output = Result<()>>;
    /// Makes everything durable whose request was complete before this call, the size included.
    /// After a failure nothing is known about those writes: never retry and go on.
    fn sync(&self) -> impl Future<Output = Result<()>>;
    /// Grows (with zeroes) or shrinks to `size` bytes.
    fn set_size(&self, size: u64) -> impl Future<Output = Result<()>>;
    /// The first run of data or hole of the range; all data where that is not known.
    fn extent(&self, range: ByteRange) -> impl Future<Output = Result<StorageExtent>>;
}

/// [`Storage`] with its futures boxed.
trait ErasedStorage: Send + Sync {
    fn name(&self) -> &str;
    fn size(&self) -> u64;
    fn read(&self, offset: u64, buf: Buf) -> LocalFuture<'_, Result<Buf>>;
    fn write(&self, offset: u64, buf: Buf) -> LocalFuture<'_, Result<Buf>>;
    fn write_zeroes(&self, range: ByteRange, mode: ZeroMode) -> LocalFuture<'_, Result<()>>;
    fn discard(&self, range: ByteRange) -> LocalFuture<'_, Result<()>>;
    fn allocate(&self, range: ByteRange) -> LocalFuture<'_, Result<()>>;
    fn sync(&self) -> LocalFuture<'_, Result<()>>;
    fn set_size(&self, size: u64) -> LocalFuture<'_, Result<()>>;
    fn extent(&self, range: ByteRange) -> LocalFuture<'_, Result<StorageExtent>>;
}

impl<T: Storage> ErasedStorage for T {
    fn name(&self) -> &str {
        Storage::name(self)
    }
    fn size(&self) -> u64 {
        Storage::size(self)
    }
    fn read(&self, offset: u64, buf: Buf) -> LocalFuture<'_, Result<Buf>> {
        Box::pin(Storage::read(self, offset, buf))
    }
    fn write(&self, offset: u64, buf: Buf) -> LocalFuture<'_, Result<Buf>> {
        Box::pin(Storage::write(self, offset, buf))
    }
    fn write_zeroes(&self, range: ByteRange, mode: ZeroMode) -> LocalFuture<'_, Result<()>> {
        Box::pin(Storage::write_zeroes(self, range, mode))
    }
    fn discard(&self, range: ByteRange) -> LocalFuture<'_, Result<()>> {
        Box::pin(Storage::discard(self, range))
    }
    fn allocate(&self, range: ByteRange) -> LocalFuture<'_, Result<()>> {
        Box::pin(Storage::allocate(self, range))
    }
    fn sync(&self) -> LocalFuture<'_, Result<()>> {
        Box::pin(Storage::sync(self))
    }
    fn set_size(&self, size: u64) -> LocalFuture<'_, Result<()>> {
        Box::pin(Storage::set_size(self, size))
    }
    fn extent(&self, range: ByteRange) -> LocalFuture<'_, Result<StorageExtent>> {
        Box::pin(Storage::extent(self, range))
    }
}

/// What everybody holds instead of a `Storage`: validates each call, and widens requests that are less
/// aligned than the storage demands (the one place where alignment is handled).
#[derive(Clone)]
pub struct StorageHandle(Arc<Shared>);

struct Shared {
    limits: StorageLimits,
    /// Writes under way; kept only when `limits.alignment` is above 1.
    writes: Mutex<Writes>,
    finished: Event,
    storage: Box<dyn ErasedStorage>,
}

/// A widened write reads a block, changes a part and writes it back; a write by somebody else to the rest of
/// that block must not fall between. Plain writes may overlap each other: their order is the callers' matter.
#[derive(Default)]
struct Writes {
    plain: Vec<ByteRange>,
    widened: Vec<ByteRange>,
}

/// Entry in [`Writes`] until dropped.
struct WriteEntry<'a> {
    shared: &'a Shared,
    range: ByteRange,
    widened: bool,
}

impl Drop for WriteEntry<'_> {
    fn drop(&mut self) {
        let mut writes = self.shared.writes.lock().expect("no panic while the list is locked");
        let list = if self.widened { &mut writes.widened } else { &mut writes.plain };
        let at = list.iter().position(|r| *r == self.range).expect("entered when made");
        list.swap_remove(at);
        drop(writes);
        self.shared.finished.notify(usize::MAX);
    }
}

/// Largest end of a range: file offsets are signed.
const MAX_END: u64 = i64::MAX as u64;

impl StorageHandle {
    /// Wraps a storage.
    pub fn new(storage: impl Storage) -> Self {
        let limits = Storage::limits(&storage);
        assert!(limits.alignment.is_power_of_two(), "alignment is a power of two");
        Self(Arc::new(Shared { limits, writes: Mutex::default(), finished: Event::new(), storage: Box::new(storage) }))
    }

    /// The name for messages.
    pub fn name(&self) -> &str {
        self.0.storage.name()
    }

    /// What the storage demands and offers.
    pub fn limits(&self) -> StorageLimits {
        self.0.limits
    }

    /// Present size in bytes.
    pub fn size(&self) -> u64 {
        self.0.storage.size()
    }

    /// Fills `buf` from `offset`; bytes beyond the end are zero.
    pub async fn read(&self, offset: u64, buf: Buf) -> Result<Buf> {
        if buf.is_empty() {
            return Ok(buf);
        }
        let range = self.validate(Operation::Read, offset, buf.len() as u64)?;
        let alignment = u64::from(self.0.limits.alignment);
        if range.is_aligned(alignment) && buf.is_aligned(alignment as usize) {
            return self.0.storage.read(offset, buf).await.map_err(|e| e.on(self.name()));
        }
        let mut buf = buf;
        let wide = range.align_out(alignment);
        let block = Buf::new(wide.len() as usize);
        let block = self.0.storage.read(wide.offset(), block).await.map_err(|e| e.on(self.name()))?;
        let skip = (offset - wide.offset()) as usize;
        let len = buf.len();
        buf.copy_from_slice(&block[skip..skip + len]);
        Ok(buf)
    }

    /// Reads `len` bytes from `offset` into a new buffer.
    pub async fn read_new(&self, offset: u64, len: usize) -> Result<Buf> {
        self.read(offset, Buf::new(len)).await
    }

    /// Writes all of `buf` from `offset`, and returns it.
    pub async fn write(&self, offset: u64, buf: Buf) -> Result<Buf> {
        if buf.is_empty() {
            return Ok(buf);
        }
        let range = self.validate_write(Operation::Write, offset, buf.len() as u64)?;
        let alignment = u64::from(self.0.limits.alignment);
        if alignment == 1 {
            return self.0.storage.write(offset, buf).await.map_err(|e| e.on(self.name()));
        }
        let aligned = range.is_aligned(alignment);
        let _entry = self.enter_write(range.align_out(alignment), !aligned).await;
        if aligned && buf.is_aligned(alignment as usize) {
            return self.0.storage.write(offset, buf).await.map_err(|e| e.on(self.name()));
        }
        self.write_widened(range, &buf).await.map_err(|e| e.on(self.name()))?;
        Ok(buf)
    }

    /// Reads the blocks at both ends, puts `bytes` between, writes all. The range is entered as widened.
    async fn write_widened(&self, range: ByteRange, bytes: &[u8]) -> Result<()> {
        let alignment = u64::from(self.0.limits.alignment);
        let wide = range.align_out(alignment);
        let storage = &self.0.storage;
        let mut block = Buf::new(wide.len() as usize);
        if !range.is_aligned(alignment) {
            let rest = block.split_off(alignment as usize);
            let first = storage.read(wide.offset(), block).await?;
            block = if rest.is_empty() {
                first
            } else {
                let mut middle = rest;
                let last = middle.split_off(middle.len() - alignment as usize);
                let last = storage.read(wide.end() - alignment, last).await?;
                first.join(middle).join(last)
            };
        }
        let skip = (range.offset() - wide.offset()) as usize;
        block[skip..skip + bytes.len()].copy_from_slice(bytes);
        storage.write(wide.offset(), block).await.map(drop)
    }

    /// Makes the range read as zero.
    pub async fn write_zeroes(&self, range: ByteRange, mode: ZeroMode) -> Result<()> {
        if range.is_empty() {
            return Ok(());
        }
        self.validate_write(Operation::WriteZeroes, range.offset(), range.len())?;
        let alignment = u64::from(self.0.limits.alignment);
        let middle = range.align_in(alignment);
        if middle.is_empty() {
            return self.write(range.offset(), Buf::zeroed(range.len() as usize)).await.map(drop);
        }
        for edge in [ByteRange::between(range.offset(), middle.offset()), ByteRange::between(middle.end(), range.end())]
        {
            self.write(edge.offset(), Buf::zeroed(edge.len() as usize)).await?;
        }
        let _entry = match alignment {
            1 => None,
            _ => Some(self.enter_write(middle, false).await),
        };
        self.0.storage.write_zeroes(middle, mode).await.map_err(|e| e.on(self.name()))
    }

    /// Gives back the range's space where that is possible. Blocks that the range covers in part are left.
    pub async fn discard(&self, range: ByteRange) -> Result<()> {
        if range.is_empty() {
            return Ok(());
        }
        self.validate_write(Operation::Discard, range.offset(), range.len())?;
        let alignment = u64::from(self.0.limits.alignment);
        let middle = range.align_in(alignment);
        if middle.is_empty() {
            return Ok(());
        }
        let _entry = match alignment {
            1 => None,
            _ => Some(self.enter_write(middle, false).await),
        };
        self.0.storage.discard(middle).await.map_err(|e| e.on(self.name()))
    }

    /// Sets space aside without changing what is read.
    pub async fn allocate(&self, range: ByteRange) -> Result<()> {
        if range.is_empty() {
            return Ok(());
        }
        self.validate_write(Operation::Write, range.offset(), range.len())?;
        self.0.storage.allocate(range).await.map_err(|e| e.on(self.name()))
    }

    /// Makes every completed write durable.
    pub async fn sync(&self) -> Result<()> {
        self.0.storage.sync().await.map_err(|e| e.on(self.name()))
    }

    /// Grows with zeroes or shrinks.
    pub async fn set_size(&self, size: u64) -> Result<()> {
        self.validate_write(Operation::Resize, 0, size)?;
        self.0.storage.set_size(size).await.map_err(|e| e.on(self.name()))
    }

    /// The first run of data or hole of a range that is not empty.
    pub async fn extent(&self, range: ByteRange) -> Result<StorageExtent> {
        self.validate(Operation::Map, range.offset(), range.len())?;
        let extent = self.0.storage.extent(range).await.map_err(|e| e.on(self.name()))?;
        debug_assert!(
            !extent.range.is_empty() && extent.range.offset() == range.offset() && range.contains(extent.range)
        );
        Ok(extent)
    }

    fn validate(&self, operation: Operation, offset: u64, len: u64) -> Result<ByteRange> {
        match ByteRange::checked(offset, len) {
            Some(range) if range.end() <= MAX_END => Ok(range),
            _ => Err(DiskError::new(ErrorKind::OutOfRange, operation)
                .on(self.name())
                .because(format!("{len} bytes from offset {offset} are beyond what a file can hold"))),
        }
    }

    fn validate_write(&self, operation: Operation, offset: u64, len: u64) -> Result<ByteRange> {
        if self.0.limits.read_only {
            return Err(DiskError::new(ErrorKind::ReadOnly, operation).on(self.name()));
        }
        self.validate(operation, offset, len)
    }

    /// Waits until no write that must not meet this one is under way, and enters this one.
    async fn enter_write(&self, range: ByteRange, widened: bool) -> WriteEntry<'_> {
        loop {
            let listener = {
                let mut writes = self.0.writes.lock().expect("no panic while the list is locked");
                let meets = |list: &[ByteRange]| list.iter().any(|r| r.overlaps(range));
                let must_wait = meets(&writes.widened) || widened && meets(&writes.plain);
                if !must_wait {
                    let list = if widened { &mut writes.widened } else { &mut writes.plain };
                    list.push(range);
                    return WriteEntry { shared: &self.0, range, widened };
                }
                self.0.finished.listen() // Inside the lock, so that no end is missed.
            };
            listener.await;
        }
    }
}

impl fmt::Debug for StorageHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "StorageHandle({})", self.name())
    }
}
