//! A sparse disk in memory, for tests and fuzzing.

use disk::{
    Buf, ByteRange, Disk, DiskError, DiskExtent, DiskGeometry, ErrorKind, Operation, Result, WriteFlags, ZeroMode,
};
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::future::poll_fn;
use std::task::{Poll, Waker};

/// Bytes that are allocated together.
pub(crate) const PAGE: u64 = 4096;

/// Holds only pages that were written. Zeroing whole pages is fast, zeroing parts of one is not.
pub(crate) struct MemoryDisk {
    pages: RefCell<BTreeMap<u64, Box<[u8]>>>,
    size: Cell<u64>,
    /// Whether writes are refused.
    pub(crate) read_only: bool,
    /// Reads of this page fail.
    pub(crate) bad_page: Option<u64>,
    /// Calls of `flush`, and writes with FUA.
    pub(crate) flushes: Cell<u64>,
    /// Writes wait while this is set.
    pub(crate) hold: Cell<bool>,
    held: RefCell<Vec<Waker>>,
    waiting: Cell<usize>,
}

impl MemoryDisk {
    /// An empty disk of `size` bytes.
    pub(crate) fn new(size: u64) -> Self {
        Self {
            pages: RefCell::default(),
            size: Cell::new(size),
            read_only: false,
            bad_page: None,
            flushes: Cell::new(0),
            hold: Cell::new(false),
            held: RefCell::default(),
            waiting: Cell::new(0),
        }
    }

    /// Lets writes go on.
    #[allow(dead_code)] // Not everybody who includes this file holds writes.
    pub(crate) fn release(&self) {
        self.hold.set(false);
        self.held.take().into_iter().for_each(Waker::wake);
    }

    /// Allocates a page of zeroes.
    #[allow(dead_code)] // As above.
    pub(crate) fn allocate_page(&self, page: u64) {
        self.pages.borrow_mut().entry(page).or_insert_with(|| vec![0; PAGE as usize].into());
    }

    /// Writes that wait.
    #[allow(dead_code)] // As above.
    pub(crate) fn holding(&self) -> usize {
        self.waiting.get()
    }

    async fn pass(&self) {
        self.waiting.set(self.waiting.get() + 1);
        poll_fn(|cx| {
            if !self.hold.get() {
                return Poll::Ready(());
            }
            self.held.borrow_mut().push(cx.waker().clone());
            Poll::Pending
        })
        .await;
        self.waiting.set(self.waiting.get() - 1);
    }

    fn flushed(&self, flags: WriteFlags) {
        if flags.fua {
            self.flushes.set(self.flushes.get() + 1);
        }
    }
}

/// Calls `part` for each page that the range touches, with the page's number, the offset in it and the
/// offset in the range.
fn by_page(range: ByteRange, mut part: impl FnMut(u64, std::ops::Range<usize>, usize)) {
    let mut rest = range;
    while !rest.is_empty() {
        let inside = rest.offset() % PAGE;
        let piece = rest.prefix(PAGE - inside);
        let end = inside + piece.len();
        part(rest.offset() / PAGE, inside as usize..end as usize, (rest.offset() - range.offset()) as usize);
        rest = rest.skip(piece.len());
    }
}

impl Disk for MemoryDisk {
    fn geometry(&self) -> DiskGeometry {
        DiskGeometry { size: self.size.get(), preferred_alignment: 4096, unit: PAGE, read_only: self.read_only }
    }

    async fn read(&self, offset: u64, mut buf: Buf) -> Result<Buf> {
        let pages = self.pages.borrow();
        let range = ByteRange::new(offset, buf.len() as u64);
        let mut failed = false;
        by_page(range, |page, inside, at| {
            failed |= self.bad_page == Some(page);
            let into = &mut buf[at..at + inside.len()];
            match pages.get(&page) {
                Some(bytes) => into.copy_from_slice(&bytes[inside]),
                None => into.fill(0),
            }
        });
        if failed {
            return Err(DiskError::new(ErrorKind::Io, Operation::Read).at(range));
        }
        Ok(buf)
    }

    async fn write(&self, offset: u64, buf: Buf, flags: WriteFlags) -> Result<()> {
        self.pass().await;
        let mut pages = self.pages.borrow_mut();
        by_page(ByteRange::new(offset, buf.len() as u64), |page, inside, at| {
            let bytes = pages.entry(page).or_insert_with(|| vec![0; PAGE as usize].into());
            let len = inside.len();
            bytes[inside].copy_from_slice(&buf[at..at + len]);
        });
        self.flushed(flags);
        Ok(())
    }

    async fn write_zeroes(&self, range: ByteRange, mode: ZeroMode, flags: WriteFlags) -> Result<()> {
        if mode.fast_only && !range.is_aligned(PAGE) {
            return Err(DiskError::new(ErrorKind::NotFast, Operation::WriteZeroes).at(range));
        }
        let mut pages = self.pages.borrow_mut();
        let whole = range.align_in(PAGE);
        if mode.unmap {
            let numbers: Vec<u64> =
                pages.range(whole.offset() / PAGE..whole.end().div_ceil(PAGE)).map(|(n, _)| *n).collect();
            numbers.iter().filter(|n| *n * PAGE < whole.end()).for_each(|n| drop(pages.remove(n)));
        }
        let zero_page = |page: u64, inside: std::ops::Range<usize>, keep: bool| {
            if let Some(bytes) = pages.get_mut(&page) {
                bytes[inside].fill(0);
            } else if keep {
                pages.insert(page, vec![0; PAGE as usize].into());
            }
        };
        let mut zero_page = zero_page;
        if mode.unmap || range.len() > 1 << 30 {
            // Only the edges and what exists: a terabyte takes no memory.
            for edge in [
                ByteRange::between(range.offset(), whole.offset().min(range.end())),
                ByteRange::between(whole.end().max(range.offset()), range.end()),
            ] {
                by_page(edge, |page, inside, _| zero_page(page, inside, false));
            }
        } else {
            by_page(range, |page, inside, _| zero_page(page, inside, true));
        }
        self.flushed(flags);
        Ok(())
    }

    async fn discard(&self, range: ByteRange, flags: WriteFlags) -> Result<()> {
        let whole = range.align_in(PAGE);
        let mut pages = self.pages.borrow_mut();
        pages.retain(|n, _| !whole.contains(ByteRange::new(n * PAGE, PAGE)));
        self.flushed(flags);
        Ok(())
    }

    async fn flush(&self) -> Result<()> {
        self.flushes.set(self.flushes.get() + 1);
        Ok(())
    }

    async fn map(&self, range: ByteRange) -> Result<DiskExtent> {
        let pages = self.pages.borrow();
        let first = range.offset() / PAGE;
        let allocated = pages.contains_key(&first);
        let end = if allocated {
            let run = pages
                .range(first..range.end().div_ceil(PAGE))
                .zip(first..)
                .take_while(|((n, _), expected)| **n == *expected)
                .count();
            first + run as u64
        } else {
            pages.range(first..).next().map_or(u64::MAX / PAGE, |(n, _)| *n)
        };
        let run = ByteRange::between(range.offset(), range.end().min(end * PAGE));
        Ok(DiskExtent {
            range: run,
            allocated,
            zero: !allocated,
            compressed: false,
            depth: allocated.then_some(0),
            source: None,
        })
    }

    async fn resize(&self, size: u64) -> Result<()> {
        self.size.set(size);
        self.pages.borrow_mut().retain(|n, _| n * PAGE < size);
        Ok(())
    }

    async fn close(&self) -> Result<()> {
        Ok(())
    }
}
