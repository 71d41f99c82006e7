//! Regular files and block devices as [`Storage`].

use crate::{CacheMode, LockMode, OpenOptions, block_device, lock, write_behind};
use dataplane::file::{self, File};
use disk::{Buf, ByteRange, DiskError, ErrorKind, Operation, Result, Storage, StorageExtent, StorageLimits, ZeroMode};
use futures_util::FutureExt;
use rustix::fs::SeekFrom;
use std::fmt;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// Zero bytes are written in pieces of this size where the file system has no faster way.
const ZERO_PIECE: usize = 1 << 20;

/// Ranges that are multiples of this are whole sectors of every device.
const WHOLE_SECTORS: u64 = 4096;

/// A regular file or a block device.
///
/// A cheap clone: all clones are one open file. Works on I/O threads (`dataplane`) only.
///
/// Direct I/O on a file whose size is not a multiple of the alignment: writing into its last block extends the
/// file to the block's end, with zeroes. When the storage is dropped the old size is restored, if nobody has
/// grown the file or put anything but zeroes there meanwhile; after a crash the zeroes remain.
#[derive(Clone)]
pub struct FileStorage(Arc<Inner>);

struct Inner {
    file: File,
    name: String,
    limits: StorageLimits,
    block_device: bool,
    sync_is_void: bool,
    size: AtomicU64,
    /// The size before its last block was completed by a direct write; 0 when that did not happen.
    ragged: AtomicU64,
    /// A sync has failed: what was written before may be lost, whatever later ones say.
    poisoned: AtomicBool,
    /// `fallocate` modes that the file system has turned out not to have.
    no_punch: AtomicBool,
    no_zero_range: AtomicBool,
    write_behind: write_behind::OfFile,
}

/// While it lives, what is written to a file is written back soon ([`FileStorage::write_behind`]).
#[must_use]
pub struct WritingBehind(FileStorage);

impl Drop for WritingBehind {
    fn drop(&mut self) {
        self.0.0.write_behind.want(false);
    }
}

fn is_unsupported(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::ENOTTY | libc::EINVAL | libc::ENODEV))
}

impl FileStorage {
    pub(crate) fn new(
        std: std::fs::File,
        name: &str,
        options: &OpenOptions,
        alignment: u32,
        block_device: bool,
    ) -> io::Result<Self> {
        let file = File::new(std, alignment > 1);
        let inner = Inner {
            name: name.to_owned(),
            limits: StorageLimits { alignment, read_only: options.read_only, grows_zeroed: !block_device },
            block_device,
            sync_is_void: options.cache == CacheMode::Unsafe,
            size: AtomicU64::new(rustix::fs::seek(&file, SeekFrom::End(0))?),
            ragged: AtomicU64::new(0),
            poisoned: AtomicBool::new(false),
            no_punch: AtomicBool::new(false),
            no_zero_range: AtomicBool::new(false),
            write_behind: write_behind::OfFile::default(),
            file,
        };
        Ok(Self(Arc::new(inner)))
    }

    /// Looks at the size again, for files that others grow; returns it.
    ///
    /// # Errors
    /// When the system does not tell.
    pub fn refresh(&self) -> Result<u64> {
        let size = self.0.real_size().map_err(|e| self.error(e, Operation::Open))?;
        self.0.size.store(size, Ordering::Release);
        Ok(size)
    }

    /// Gives a file the size back that it had before direct writes completed its last block, if nothing but zeroes is
    /// there; done anyway when the storage is dropped. No request is under way. Blocks.
    ///
    /// # Errors
    /// When the system refuses.
    pub fn restore_ragged_size(&self) -> Result<()> {
        match self.0.ragged.swap(0, Ordering::AcqRel) {
            0 => Ok(()),
            ragged => self.0.restore_size(ragged).map_err(|e| self.error(e, Operation::Resize)),
        }
    }

    /// Has the writeback of what is written be started soon, for jobs that end with a sync, until the guard is dropped; not
    /// where writes do not go through the page cache, or syncs are void.
    pub fn write_behind(&self) -> WritingBehind {
        self.0.write_behind.want(self.0.limits.alignment == 1 && !self.0.sync_is_void);
        WritingBehind(self.clone())
    }

    /// Only a help: the sync at the end reports what goes wrong.
    fn start_writeback(&self, range: ByteRange) {
        let this = self.clone();
        let start = dataplane::offload(move || {
            if let Err(error) = dataplane::file::start_writeback(this.file(), range.offset(), range.len()) {
                tracing::debug!(file = this.0.name, %error, "writeback was not started early");
            }
            this.0.write_behind.started();
        });
        // Polled once it runs to its end.
        let _under_way = start.now_or_never();
    }

    /// Whether this is a block device.
    pub fn is_block_device(&self) -> bool {
        self.0.block_device
    }

    /// The open file, for blocking calls and for comparing identities.
    pub fn file(&self) -> &std::fs::File {
        self.0.file.std()
    }

    /// The same open file under another name, for reading only; it shares locks with this one.
    ///
    /// # Errors
    /// When the system refuses another descriptor.
    pub fn renamed_for_reading(&self, name: &str) -> Result<Self> {
        let file = self.file().try_clone().map_err(|e| self.error(e, Operation::Open))?;
        let cache = if self.0.sync_is_void { CacheMode::Unsafe } else { CacheMode::Writeback };
        Self::from_file(
            file,
            name,
            &OpenOptions { read_only: true, cache, lock: LockMode::Off, ..OpenOptions::default() },
        )
    }

    /// Changes which locks are held, from now on those of `demand`.
    ///
    /// # Errors
    /// `InUse` when somebody else holds the opposite: the file has the locks that it could get then.
    pub fn relock(&self, demand: lock::Demand) -> Result<()> {
        lock::change(self.file(), demand).map_err(|error| match error {
            lock::LockError::Held(held) => {
                DiskError::new(ErrorKind::InUse, Operation::Open).on(&self.0.name).because(held.to_string())
            }
            lock::LockError::Io(error) => self.error(error, Operation::Open),
        })
    }

    fn error(&self, error: io::Error, operation: Operation) -> DiskError {
        DiskError::from_io(error, operation).on(&self.0.name)
    }

    fn error_at(&self, error: io::Error, operation: Operation, range: ByteRange) -> DiskError {
        self.error(error, operation).at(range)
    }

    fn is_usable(&self, operation: Operation) -> Result<()> {
        if self.0.poisoned.load(Ordering::Acquire) {
            return Err(DiskError::new(ErrorKind::Poisoned, operation).on(&self.0.name));
        }
        Ok(())
    }

    /// Bytes up to `end` have been written.
    fn wrote_to(&self, end: u64) {
        let inner = &*self.0;
        let before = inner.size.load(Ordering::Acquire);
        if end <= before || inner.block_device {
            return;
        }
        let alignment = u64::from(inner.limits.alignment);
        if !before.is_multiple_of(alignment) && end - before < alignment {
            // Perhaps the handle widened the write to the whole block.
            let _ = inner.ragged.compare_exchange(0, before, Ordering::AcqRel, Ordering::Relaxed);
        }
        inner.size.fetch_max(end, Ordering::AcqRel);
    }

    /// Grows the file to `end` at least, without ever shrinking it, whoever else grows it at the same time.
    async fn grow(&self, end: u64) -> io::Result<()> {
        let inner = &*self.0;
        if end <= inner.size.load(Ordering::Acquire) || inner.block_device {
            return Ok(());
        }
        let alignment = u64::from(inner.limits.alignment);
        match file::fallocate(&inner.file, 0, end - 1, 1).await {
            Err(error) if is_unsupported(&error) => {
                if end - alignment < inner.size.load(Ordering::Acquire) {
                    // The block has bytes of the file in it.
                    inner.file.std().set_len(end)?;
                } else {
                    let zero = Buf::zeroed(alignment as usize);
                    file::write_full(&inner.file, end - alignment, zero).await.0?;
                }
            }
            other => other?,
        }
        self.wrote_to(end);
        Ok(())
    }

    /// A `fallocate` mode that some file systems do not have: whether it was done. A device refuses ranges that are not
    /// whole sectors of its own with the same error, which says nothing about others.
    async fn try_allocate(&self, missing: &AtomicBool, mode: i32, range: ByteRange) -> io::Result<bool> {
        if missing.load(Ordering::Relaxed) {
            return Ok(false);
        }
        match file::fallocate(&self.0.file, mode, range.offset(), range.len()).await {
            Ok(()) => Ok(true),
            Err(error) if is_unsupported(&error) => {
                if !self.0.block_device || range.is_aligned(WHOLE_SECTORS) {
                    missing.store(true, Ordering::Relaxed);
                }
                Ok(false)
            }
            Err(error) => Err(error),
        }
    }

    async fn punch(&self, range: ByteRange) -> io::Result<bool> {
        let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        self.try_allocate(&self.0.no_punch, mode, range).await
    }

    async fn zero_range(&self, range: ByteRange) -> io::Result<bool> {
        // Block devices do not grow, and insist on being told so.
        let keep = if self.0.block_device { libc::FALLOC_FL_KEEP_SIZE } else { 0 };
        self.try_allocate(&self.0.no_zero_range, libc::FALLOC_FL_ZERO_RANGE | keep, range).await
    }

    async fn write_zero_bytes(&self, range: ByteRange) -> io::Result<()> {
        let mut zeroes = Buf::zeroed(range.len().min(ZERO_PIECE as u64) as usize);
        let mut rest = range;
        while !rest.is_empty() {
            zeroes.truncate(rest.len().min(ZERO_PIECE as u64) as usize);
            let len = zeroes.len() as u64;
            let (result, back) = file::write_full(&self.0.file, rest.offset(), zeroes).await;
            result?;
            zeroes = back;
            rest = rest.skip(len);
        }
        Ok(())
    }

    /// Zeroes by the fastest means there is; false when there is none but writing.
    async fn zero_fast(&self, range: ByteRange, unmap: bool) -> io::Result<bool> {
        if unmap && self.punch(range).await? {
            self.grow(range.end()).await?;
            return Ok(true);
        }
        if self.zero_range(range).await? {
            self.wrote_to(range.end());
            return Ok(true);
        }
        if !unmap && !self.0.block_device && self.punch(range).await? {
            // A hole made and filled with space again reads as zero.
            match file::fallocate(&self.0.file, 0, range.offset(), range.len()).await {
                Ok(()) => {}
                Err(error) if is_unsupported(&error) => self.grow(range.end()).await?,
                Err(error) => return Err(error),
            }
            self.wrote_to(range.end());
            return Ok(true);
        }
        Ok(false)
    }
}

impl Inner {
    fn real_size(&self) -> io::Result<u64> {
        Ok(rustix::fs::seek(&self.file, SeekFrom::End(0))?)
    }

    /// The first run of data or hole of the range.
    fn seek_extent(&self, range: ByteRange) -> io::Result<StorageExtent> {
        let whole = |hole| Ok(StorageExtent { range, hole });
        let data = match rustix::fs::seek(&self.file, SeekFrom::Data(range.offset())) {
            Ok(data) => data,
            Err(rustix::io::Errno::NXIO) => return whole(true),
            Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOTSUP) => return whole(false),
            Err(error) => return Err(error.into()),
        };
        if data > range.offset() {
            return Ok(StorageExtent { range: range.prefix(data - range.offset()), hole: true });
        }
        match rustix::fs::seek(&self.file, SeekFrom::Hole(range.offset())) {
            // Somebody made a hole between the two questions.
            Ok(hole) if hole <= range.offset() => whole(false),
            Ok(hole) => Ok(StorageExtent { range: range.prefix(hole - range.offset()), hole: false }),
            Err(_) => whole(false),
        }
    }

    /// Undoes the completion of a ragged last block, if it has remained that.
    fn restore_size(&self, ragged: u64) -> io::Result<()> {
        use std::os::unix::fs::FileExt;
        let alignment = u64::from(self.limits.alignment);
        let end = ragged.next_multiple_of(alignment);
        if self.real_size()? != end {
            return Ok(());
        }
        let mut block = Buf::new(alignment as usize);
        self.file.std().read_exact_at(&mut block, end - alignment)?;
        let from = (ragged - (end - alignment)) as usize;
        if block[from..].iter().all(|byte| *byte == 0) {
            self.file.std().set_len(ragged)?;
            self.size.store(ragged, Ordering::Release);
        }
        Ok(())
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        let ragged = *self.ragged.get_mut();
        if ragged != 0
            && let Err(error) = self.restore_size(ragged)
        {
            tracing::warn!(%error, file = self.name, "the file's size could not be restored");
        }
    }
}

impl Storage for FileStorage {
    fn name(&self) -> &str {
        &self.0.name
    }

    fn limits(&self) -> StorageLimits {
        self.0.limits
    }

    fn size(&self) -> u64 {
        self.0.size.load(Ordering::Acquire)
    }

    async fn read(&self, offset: u64, buf: Buf) -> Result<Buf> {
        let range = ByteRange::new(offset, buf.len() as u64);
        let (result, mut buf) = file::read_full(&self.0.file, offset, buf, self.0.limits.alignment).await;
        match result {
            Ok(n) => {
                buf[n..].fill(0);
                Ok(buf)
            }
            Err(error) => Err(self.error_at(error, Operation::Read, range)),
        }
    }

    async fn write(&self, offset: u64, buf: Buf) -> Result<Buf> {
        self.is_usable(Operation::Write)?;
        let range = ByteRange::new(offset, buf.len() as u64);
        let (result, buf) = file::write_full(&self.0.file, offset, buf).await;
        result.map_err(|e| self.error_at(e, Operation::Write, range))?;
        self.wrote_to(range.end());
        if let Some(due) = self.0.write_behind.wrote(range) {
            self.start_writeback(due);
        }
        Ok(buf)
    }

    async fn write_zeroes(&self, range: ByteRange, mode: ZeroMode) -> Result<()> {
        self.is_usable(Operation::WriteZeroes)?;
        let failed = |e| self.error_at(e, Operation::WriteZeroes, range);
        if self.0.block_device && range.end() > self.size() {
            return Err(failed(io::Error::from_raw_os_error(libc::ENOSPC)));
        }
        if self.zero_fast(range, mode.unmap).await.map_err(failed)? {
            return Ok(());
        }
        if mode.fast_only {
            return Err(DiskError::new(ErrorKind::NotFast, Operation::WriteZeroes).on(&self.0.name).at(range));
        }
        self.write_zero_bytes(range).await.map_err(failed)?;
        self.wrote_to(range.end());
        Ok(())
    }

    async fn discard(&self, range: ByteRange) -> Result<()> {
        self.is_usable(Operation::Discard)?;
        let range = range.intersect(ByteRange::new(0, self.size()));
        if range.is_empty() {
            return Ok(());
        }
        let failed = |e| self.error_at(e, Operation::Discard, range);
        if self.0.block_device {
            let this = self.clone();
            return match dataplane::offload(move || block_device::discard(this.file(), range)).await {
                Err(error) if !is_unsupported(&error) => Err(failed(error)),
                _ => Ok(()), // Old bytes may be read after a discard of a device.
            };
        }
        if !self.punch(range).await.map_err(failed)? {
            self.write_zero_bytes(range).await.map_err(failed)?;
        }
        Ok(())
    }

    async fn allocate(&self, range: ByteRange) -> Result<()> {
        self.is_usable(Operation::Write)?;
        let failed = |e| self.error_at(e, Operation::Write, range);
        if self.0.block_device {
            if range.end() > self.size() {
                return Err(failed(io::Error::from_raw_os_error(libc::ENOSPC)));
            }
            return Ok(());
        }
        match file::fallocate(&self.0.file, 0, range.offset(), range.len()).await {
            Err(error) if is_unsupported(&error) => self.grow(range.end()).await.map_err(failed)?,
            other => other.map_err(failed)?,
        }
        self.wrote_to(range.end());
        Ok(())
    }

    async fn sync(&self) -> Result<()> {
        if self.0.sync_is_void || self.0.limits.read_only {
            return Ok(());
        }
        self.is_usable(Operation::Flush)?;
        file::fdatasync(&self.0.file).await.map_err(|error| {
            self.0.poisoned.store(true, Ordering::Release);
            self.error(error, Operation::Flush)
        })
    }

    async fn set_size(&self, size: u64) -> Result<()> {
        self.is_usable(Operation::Resize)?;
        if self.0.block_device {
            let found = self.refresh()?; // It may have been made longer under us (a logical volume, say).
            if size <= found {
                return Ok(());
            }
            return Err(DiskError::new(ErrorKind::NoSpace, Operation::Resize)
                .on(&self.0.name)
                .because(format!("a block device of {found} bytes cannot grow to {size}")));
        }
        let this = self.clone();
        let done = dataplane::offload(move || this.file().set_len(size)).await;
        done.map_err(|e| self.error(e, Operation::Resize))?;
        self.0.ragged.store(0, Ordering::Release);
        self.0.size.store(size, Ordering::Release);
        Ok(())
    }

    async fn extent(&self, range: ByteRange) -> Result<StorageExtent> {
        if self.0.block_device {
            return Ok(StorageExtent { range, hole: false });
        }
        // From the inode's extents: too short a call to be worth another thread, unless it has to wait for the inode.
        let found = if self.0.file.is_changing() {
            let this = self.clone();
            dataplane::offload(move || this.0.seek_extent(range)).await
        } else {
            self.0.seek_extent(range)
        };
        found.map_err(|error| self.error_at(error, Operation::Map, range))
    }
}

impl fmt::Debug for FileStorage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "FileStorage({})", self.0.name)
    }
}
