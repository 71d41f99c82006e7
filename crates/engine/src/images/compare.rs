//! Comparing what two images show.
//!
//! Each I/O thread opens both images for itself and takes the next piece of the disk when it is done with
//! one. Ranges that both maps call zero are not read, and where a piece is one, all threads go on behind the
//! run of zeroes that it belongs to, however long that is.

use super::report::CompareReport;
use super::request::CompareSpec;
use super::stack::Stack;
use super::{Progress, closing, open_source, zeroes};
use crate::EngineError;
use dataplane::IoThread;
use disk::{Buf, ByteRange, DiskExtent};
use futures_util::future::{join, join_all};
use futures_util::stream::{self, StreamExt};
use std::cell::Cell;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Bytes of one request: little enough that both images' bytes are still in the processor's cache when they are
/// compared.
const REQUEST: u64 = 128 << 10;
/// Requests under way at the same time on each thread and image.
const UNDER_WAY: usize = 4;
/// Bytes that a thread takes at a time.
const PIECE: u64 = 32 << 20;

/// What the threads share.
struct Work {
    /// Where the next piece begins.
    next: AtomicU64,
    /// The first difference found so far; `u64::MAX`: none. What lies behind it need not be looked at.
    first: AtomicU64,
    /// The first place where the images hold their bytes in different ways, if that counts.
    status: AtomicU64,
    progress: Progress,
}

impl Work {
    fn take(&self, end: u64) -> Option<ByteRange> {
        let at = self.next.fetch_add(PIECE, Ordering::Relaxed);
        (at < end.min(self.bound())).then(|| ByteRange::between(at, at.saturating_add(PIECE).min(end)))
    }

    /// What lies behind it need not be looked at any more.
    fn bound(&self) -> u64 {
        self.first.load(Ordering::Relaxed).min(self.status.load(Ordering::Relaxed))
    }

    /// Nothing up to `to` is left to do; returns how many bytes nobody has taken yet.
    fn skip_to(&self, to: u64) -> u64 {
        to.saturating_sub(self.next.fetch_max(to, Ordering::Relaxed))
    }

    fn differ(&self, at: u64) {
        self.first.fetch_min(at, Ordering::Relaxed);
    }
}

/// What of an extent counts when allocation is compared: the same as for qemu-img.
fn status(extent: &DiskExtent) -> (bool, bool, bool, bool, bool) {
    (extent.depth.is_some(), extent.allocated, extent.zero, extent.compressed, extent.source.is_some())
}

/// An image, and how far it is known to read as zero from where somebody looked last.
struct Side<'a> {
    stack: &'a Stack,
    zeroes: Cell<Option<DiskExtent>>,
}

impl Side<'_> {
    fn size(&self) -> u64 {
        self.stack.disk().geometry().size
    }

    /// The run of zeroes that begins at `at`: up to where, and in which state. `None` when a part of `piece` is data.
    async fn zeroes(&self, piece: ByteRange) -> Result<Option<DiskExtent>, EngineError> {
        let at = piece.offset();
        let known = self.zeroes.get().filter(|known| known.range.offset() <= at && piece.end() <= known.range.end());
        if let Some(known) = known {
            return Ok(Some(known));
        }
        // The piece alone first: data would be mapped far ahead for nothing.
        let found = self.stack.disk().map(piece).await?;
        if !found.zero || found.range != piece {
            return Ok(None);
        }
        let all = self.stack.disk().map(ByteRange::between(at, self.size())).await?;
        self.zeroes.set(Some(all));
        Ok((all.zero && piece.end() <= all.range.end()).then_some(all))
    }
}

/// Compares both images.
pub(crate) async fn compare(
    threads: &[IoThread],
    spec: CompareSpec,
    progress: Progress,
) -> Result<CompareReport, EngineError> {
    let work = Arc::new(Work {
        next: AtomicU64::new(0),
        first: AtomicU64::new(u64::MAX),
        status: AtomicU64::new(u64::MAX),
        progress,
    });
    let spec = Arc::new(spec);
    let all = threads.iter().map(|thread| {
        let (work, spec) = (Arc::clone(&work), Arc::clone(&spec));
        thread.spawn(move || async move { on_thread(&work, &spec).await })
    });
    let mut sizes = None;
    for result in join_all(all).await {
        let found = result.map_err(|_| EngineError::ThreadGone)??;
        if *sizes.get_or_insert(found) != found {
            return Err(EngineError::Invalid("an image has changed its size meanwhile".to_owned()));
        }
    }
    let (first_size, second_size) = sizes.ok_or(EngineError::ThreadGone)?;
    let sizes_differ = first_size != second_size;
    let (first, status) = (work.first.load(Ordering::Relaxed), work.status.load(Ordering::Relaxed));
    // As with qemu-img the status is looked at before the bytes, and what comes first is told.
    let status_mismatch = Some(status).filter(|at| *at != u64::MAX && *at <= first);
    let first_difference = Some(first).filter(|at| *at != u64::MAX && status_mismatch.is_none());
    let identical = first == u64::MAX && status == u64::MAX && !(spec.strict && sizes_differ);
    Ok(CompareReport { identical, first_difference, status_mismatch, sizes_differ })
}

async fn on_thread(work: &Work, spec: &CompareSpec) -> Result<(u64, u64), EngineError> {
    let first = open_source(&spec.first).await?;
    let second = match open_source(&spec.second).await {
        Ok(second) => second,
        Err(e) => return closing(&first, Err(e)).await,
    };
    let sides = [&first, &second].map(|stack| Side { stack, zeroes: Cell::default() });
    let result = pieces(work, spec.strict, &sides[0], &sides[1]).await;
    let result = closing(&second, result).await;
    closing(&first, result).await
}

async fn pieces(work: &Work, strict: bool, first: &Side<'_>, second: &Side<'_>) -> Result<(u64, u64), EngineError> {
    let sizes = (first.size(), second.size());
    let common = sizes.0.min(sizes.1);
    // Without --strict what one has more must be zero; with it, different sizes end the matter.
    if strict && sizes.0 != sizes.1 {
        return Ok(sizes);
    }
    let all = sizes.0.max(sizes.1);
    let longer = if sizes.0 > sizes.1 { first } else { second };
    work.progress.set_total(all);
    while let Some(piece) = work.take(all) {
        work.progress.pace(0).await?;
        if let Some(end) = zero_run(work, strict, (first, second, longer), common, piece).await? {
            let skipped = work.skip_to(end);
            work.progress.advance(piece.len() + skipped);
            continue;
        }
        let requests = (0..piece.len().div_ceil(REQUEST)).map(|n| piece.skip(n * REQUEST).prefix(REQUEST));
        let mut results = stream::iter(requests)
            .map(|range| async move {
                work.progress.pace(0).await?;
                if range.offset() < work.bound() {
                    let both = range.intersect(ByteRange::new(0, common));
                    same(work, strict, first.stack, second.stack, both).await?;
                    only_zero(work, longer.stack, range.skip(both.len())).await?;
                }
                work.progress.advance(range.len());
                Ok::<_, EngineError>(())
            })
            .buffer_unordered(UNDER_WAY);
        while let Some(result) = results.next().await {
            result?;
        }
    }
    Ok(sizes)
}

/// Where the zeroes end that `piece` consists of in both images, or in the longer one behind the shorter one's end.
async fn zero_run(
    work: &Work,
    strict: bool,
    (first, second, longer): (&Side<'_>, &Side<'_>, &Side<'_>),
    common: u64,
    piece: ByteRange,
) -> Result<Option<u64>, EngineError> {
    if piece.offset() >= common {
        return Ok(longer.zeroes(piece).await?.map(|run| run.range.end()));
    }
    if piece.end() > common {
        return Ok(None);
    }
    let Some(a) = first.zeroes(piece).await? else { return Ok(None) };
    let Some(b) = second.zeroes(piece).await? else { return Ok(None) };
    if strict && status(&a) != status(&b) {
        work.status.fetch_min(piece.offset(), Ordering::Relaxed);
    }
    Ok(Some(a.range.end().min(b.range.end())))
}

/// Notes the first difference in the range, if there is one.
async fn same(work: &Work, strict: bool, first: &Stack, second: &Stack, range: ByteRange) -> Result<(), EngineError> {
    let mut rest = range;
    while !rest.is_empty() {
        let (a, b) = join(first.disk().map(rest), second.disk().map(rest)).await;
        let (a, b) = (a?, b?);
        let part = rest.prefix(a.range.len().min(b.range.len()));
        rest = rest.skip(part.len());
        if strict && status(&a) != status(&b) {
            work.status.fetch_min(part.offset(), Ordering::Relaxed);
            return Ok(());
        }
        match (a.zero, b.zero) {
            (true, true) => {}
            (true, false) => only_zero_data(work, second, part).await?,
            (false, true) => only_zero_data(work, first, part).await?,
            (false, false) => {
                work.progress.pace(part.len()).await?;
                let (at, len) = (part.offset(), part.len() as usize);
                let (a, b) = join(first.disk().read(at, Buf::new(len)), second.disk().read(at, Buf::new(len))).await;
                let (a, b) = (a?, b?);
                if a[..] != b[..] {
                    let same = a.iter().zip(b.iter()).take_while(|(a, b)| a == b).count();
                    work.differ(at + same as u64);
                    return Ok(());
                }
            }
        }
    }
    Ok(())
}

async fn only_zero(work: &Work, stack: &Stack, range: ByteRange) -> Result<(), EngineError> {
    let mut rest = range;
    while !rest.is_empty() {
        let extent = stack.disk().map(rest).await?;
        if !extent.zero {
            only_zero_data(work, stack, extent.range).await?;
        }
        rest = rest.skip(extent.range.len());
    }
    Ok(())
}

async fn only_zero_data(work: &Work, stack: &Stack, range: ByteRange) -> Result<(), EngineError> {
    work.progress.pace(range.len()).await?;
    let bytes = stack.disk().read(range.offset(), Buf::new(range.len() as usize)).await?;
    if !zeroes::is_zero(&bytes) {
        let same = bytes.iter().take_while(|b| **b == 0).count();
        work.differ(range.offset() + same as u64);
    }
    Ok(())
}
