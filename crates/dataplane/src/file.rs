//! Files: positioned reads and writes, and what makes them durable.
#![allow(unsafe_code)] // System calls on a buffer that the caller owns; argued at each block.

use crate::executor::current_core;
use crate::op::{FileRequest, Op, Request, io_result};
use disk::Buf;
use std::fmt;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// Longest transfer of one operation; longer ones are done in part, as short transfers.
pub(crate) const MAX_TRANSFER: usize = 1 << 30;

/// An open file: cheap to clone, and closed when the last clone and the last operation on it are gone.
#[derive(Clone)]
pub struct File(Arc<Inner>);

struct Inner {
    file: std::fs::File,
    direct: bool,
    /// Writes to the page cache that are still to be left to the driver after one that waited for a device.
    writes_deferred: AtomicU32,
    /// Operations under way that hold the inode's lock for long: a write beside them would wait on the I/O thread.
    changing: AtomicU32,
    /// The file system cannot say what its page cache holds, so it is no use to ask.
    not_askable: AtomicBool,
}

/// Counts an operation that holds the inode's lock.
struct Changing(File);

impl Changing {
    fn new(file: &File) -> Self {
        file.0.changing.fetch_add(1, Ordering::Relaxed);
        Self(file.clone())
    }
}

impl Drop for Changing {
    fn drop(&mut self) {
        self.0.0.changing.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Longest write that is copied into the page cache on the I/O thread.
const INLINE_WRITE: usize = 128 << 10;
/// Of the page cache.
const PAGE: u64 = 4096;
/// A copy into the page cache that takes longer has waited for a device.
const SLOW_WRITE: Duration = Duration::from_millis(2);
/// How many writes go through the driver after a slow one.
const DEFERRED_WRITES: u32 = 4096;

impl File {
    /// Takes over `file`. `direct` says that it was opened with `O_DIRECT`, so that it is no use to try
    /// the page cache first.
    pub fn new(file: std::fs::File, direct: bool) -> Self {
        Self(Arc::new(Inner {
            file,
            direct,
            writes_deferred: AtomicU32::new(0),
            changing: AtomicU32::new(0),
            not_askable: AtomicBool::new(false),
        }))
    }

    /// Whether a call that needs the inode's lock may wait for an operation under way.
    pub fn is_changing(&self) -> bool {
        self.0.changing.load(Ordering::Relaxed) > 0
    }

    /// The standard library's view of it, for blocking calls.
    pub fn std(&self) -> &std::fs::File {
        &self.0.file
    }

    pub(crate) fn raw(&self) -> i32 {
        self.0.file.as_raw_fd()
    }
}

impl AsFd for File {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.file.as_fd()
    }
}

impl fmt::Debug for File {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "File({:?})", self.0.file)
    }
}

fn last_error() -> i32 {
    io::Error::last_os_error().raw_os_error().map_or(-libc::EIO, i32::wrapping_neg)
}

/// A count that a system call returned, or the error it left.
fn counted(n: libc::ssize_t) -> i32 {
    if n < 0 { last_error() } else { i32::try_from(n).unwrap_or(i32::MAX) }
}

fn offset_of(offset: u64) -> Result<libc::off_t, i32> {
    libc::off_t::try_from(offset).map_err(|_| -libc::EINVAL)
}

/// What the page cache holds of it, without waiting for a device; negative when that is nothing.
fn read_cached(file: &File, offset: u64, buf: &mut Buf) -> i32 {
    let Ok(offset) = offset_of(offset) else { return -libc::EINVAL };
    let part = libc::iovec { iov_base: buf.as_mut_ptr().cast(), iov_len: buf.len().min(MAX_TRANSFER) };
    // SAFETY: one iovec that covers `buf`, which is borrowed mutably for the call.
    counted(unsafe { libc::preadv2(file.raw(), &raw const part, 1, offset, libc::RWF_NOWAIT) })
}

/// Copies `buf` into the page cache, on this thread: several file systems refuse to do that without waiting,
/// and io_uring then takes a worker thread for it, at many times the cost. It can wait for a device when the
/// cache is full of what is not written yet; after that, writes are left to the workers for a while. `None`
/// when this one is to be left to them.
fn write_cached(file: &File, offset: u64, buf: &Buf) -> Option<i32> {
    if file.0.direct || buf.len() > INLINE_WRITE || file.is_changing() {
        return None;
    }
    if !offset.is_multiple_of(PAGE) || !(buf.len() as u64).is_multiple_of(PAGE) {
        return None; // The rest of a page may have to be read first.
    }
    if !current_core().is_some_and(|core| core.take_inline(buf.len())) {
        return None;
    }
    let deferred = &file.0.writes_deferred;
    let left = deferred.load(Ordering::Relaxed);
    if left > 0 {
        deferred.store(left - 1, Ordering::Relaxed); // An estimate: threads may count over each other.
        return None;
    }
    let Ok(offset) = offset_of(offset) else { return Some(-libc::EINVAL) };
    let start = Instant::now();
    // SAFETY: `buf` is borrowed for the call and holds `len` bytes.
    let result = counted(unsafe { libc::pwrite(file.raw(), buf.as_ptr().cast(), buf.len(), offset) });
    if start.elapsed() > SLOW_WRITE {
        deferred.store(DEFERRED_WRITES, Ordering::Relaxed);
    }
    Some(result)
}

impl FileRequest {
    /// The number of the file's descriptor, which stays open as long as the request is there.
    pub(crate) fn descriptor(&self) -> i32 {
        match self {
            Self::Read { file, .. }
            | Self::Write { file, .. }
            | Self::DataSync { file }
            | Self::Allocate { file, .. } => file.raw(),
        }
    }

    /// Does it with blocking system calls.
    pub(crate) fn perform(&mut self) -> i32 {
        match self {
            Self::Read { file, offset, buf } => {
                let Ok(offset) = offset_of(*offset) else { return -libc::EINVAL };
                // SAFETY: `buf` is borrowed mutably for the call and holds `len` bytes.
                counted(unsafe {
                    libc::pread(file.raw(), buf.as_mut_ptr().cast(), buf.len().min(MAX_TRANSFER), offset)
                })
            }
            Self::Write { file, offset, buf } => {
                let Ok(offset) = offset_of(*offset) else { return -libc::EINVAL };
                // SAFETY: `buf` is borrowed for the call and holds `len` bytes.
                counted(unsafe { libc::pwrite(file.raw(), buf.as_ptr().cast(), buf.len().min(MAX_TRANSFER), offset) })
            }
            // SAFETY: a call on an open descriptor, without memory.
            Self::DataSync { file } => match unsafe { libc::fdatasync(file.raw()) } {
                0 => 0,
                _ => last_error(),
            },
            Self::Allocate { file, mode, offset, len } => {
                let (Ok(offset), Ok(len)) = (offset_of(*offset), offset_of(*len)) else { return -libc::EINVAL };
                // SAFETY: a call on an open descriptor, without memory.
                match unsafe { libc::fallocate(file.raw(), *mode, offset, len) } {
                    0 => 0,
                    _ => last_error(),
                }
            }
        }
    }
}

fn transferred(result: i32, request: Request) -> (io::Result<usize>, Buf) {
    match request {
        Request::File(FileRequest::Read { buf, .. } | FileRequest::Write { buf, .. }) => (io_result(result), buf),
        _ => unreachable!("an operation returns the request it was started with"),
    }
}

/// Reads into `buf` from `offset`; returns how many bytes, which may be fewer than asked for (0: at the end).
pub async fn read_at(file: &File, offset: u64, mut buf: Buf) -> (io::Result<usize>, Buf) {
    let askable = !file.0.direct && !file.0.not_askable.load(Ordering::Relaxed);
    if askable && current_core().is_some_and(|core| core.take_inline(buf.len())) {
        let n = read_cached(file, offset, &mut buf);
        if n >= 0 {
            return (io_result(n), buf);
        }
        if n == -libc::EOPNOTSUPP {
            file.0.not_askable.store(true, Ordering::Relaxed);
        }
    }
    let (result, request) = Op::start(Request::File(FileRequest::Read { file: file.clone(), offset, buf })).await;
    transferred(result, request)
}

/// Writes `buf` from `offset`; returns how many bytes, which may be fewer than there are.
pub async fn write_at(file: &File, offset: u64, buf: Buf) -> (io::Result<usize>, Buf) {
    if let Some(result) = write_cached(file, offset, &buf) {
        return (io_result(result), buf);
    }
    let (result, request) = Op::start(Request::File(FileRequest::Write { file: file.clone(), offset, buf })).await;
    transferred(result, request)
}

/// Makes the file's data durable, and what of its metadata is needed to read them.
pub async fn fdatasync(file: &File) -> io::Result<()> {
    let (result, _) = Op::start(Request::File(FileRequest::DataSync { file: file.clone() })).await;
    io_result(result).map(drop)
}

/// `fallocate(2)` with its mode bits (`libc::FALLOC_FL_*`).
pub async fn fallocate(file: &File, mode: i32, offset: u64, len: u64) -> io::Result<()> {
    let request = FileRequest::Allocate { file: file.clone(), mode, offset, len };
    let changing = Changing::new(file);
    let (result, _) = Op::start(Request::File(request)).await;
    drop(changing);
    io_result(result).map(drop)
}

/// Starts to write back what the page cache holds of the range, so that a later [`fdatasync`] is short. Waits only where
/// the device's queue is full; promises nothing about durability. Blocks: not for I/O threads.
pub fn start_writeback(file: &std::fs::File, offset: u64, len: u64) -> io::Result<()> {
    let (Ok(offset), Ok(len)) = (libc::off64_t::try_from(offset), libc::off64_t::try_from(len)) else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    // SAFETY: a call on an open descriptor, without memory.
    match unsafe { libc::sync_file_range(file.as_raw_fd(), offset, len, libc::SYNC_FILE_RANGE_WRITE) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn is_retried(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EINTR | libc::EAGAIN))
}

/// Fills `buf` from `offset`, through short transfers and interruptions; returns how many bytes there were
/// before the file's end. Reading goes on at multiples of `alignment` only (a power of two, 1 for files that
/// are not direct): a transfer that ends between them has met the file's end.
pub async fn read_full(file: &File, offset: u64, buf: Buf, alignment: u32) -> (io::Result<usize>, Buf) {
    let (mut done, mut rest) = (Buf::new(0), buf);
    let mut at = offset;
    let result = loop {
        let wanted = rest.len();
        let (result, mut buf) = read_at(file, at, rest).await;
        match result {
            Ok(n) if n == wanted => {
                rest = buf;
                break Ok(at - offset + n as u64);
            }
            Ok(n) if n == 0 || !(at + n as u64).is_multiple_of(u64::from(alignment)) => {
                rest = buf;
                break Ok(at - offset + n as u64);
            }
            Ok(n) => {
                let front = buf.split_to(n);
                done = done.join(front);
                at += n as u64;
                rest = buf;
            }
            Err(error) if is_retried(&error) => {
                rest = buf;
                crate::yield_now().await;
            }
            Err(error) => {
                rest = buf;
                break Err(error);
            }
        }
    };
    let whole = done.join(rest);
    (result.map(|n| n as usize), whole)
}

/// Writes all of `buf` from `offset`, through short transfers and interruptions.
pub async fn write_full(file: &File, offset: u64, buf: Buf) -> (io::Result<()>, Buf) {
    let (mut done, mut rest) = (Buf::new(0), buf);
    let mut at = offset;
    let result = loop {
        let wanted = rest.len();
        let (result, mut buf) = write_at(file, at, rest).await;
        match result {
            Ok(n) if n == wanted => {
                rest = buf;
                break Ok(());
            }
            Ok(0) => {
                rest = buf;
                break Err(io::ErrorKind::WriteZero.into());
            }
            Ok(n) => {
                let front = buf.split_to(n);
                done = done.join(front);
                at += n as u64;
                rest = buf;
            }
            Err(error) if is_retried(&error) => {
                rest = buf;
                crate::yield_now().await;
            }
            Err(error) => {
                rest = buf;
                break Err(error);
            }
        }
    };
    let whole = done.join(rest);
    (result, whole)
}
