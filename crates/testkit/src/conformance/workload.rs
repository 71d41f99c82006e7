//! Random requests under the eyes of a model.

use crate::ModelDisk;
use disk::{Buf, ByteRange, DiskHandle, Result, WriteFlags, ZeroMode};
use futures_util::future::join_all;

/// What random requests are like.
#[derive(Clone, Copy, Debug)]
pub struct Workload {
    /// Decides everything.
    pub seed: u64,
    /// Requests for each worker.
    pub requests: u32,
    /// Workers that issue requests at the same time.
    pub workers: u32,
    /// Offsets and lengths are multiples of this.
    pub alignment: u64,
    /// Longest request in bytes.
    pub longest: u64,
    /// Only this many of the disk's first bytes are touched; `None`: all.
    pub span: Option<u64>,
    /// Whether to discard.
    pub discard: bool,
    /// Whether to flush, and write with FUA.
    pub flush: bool,
}

impl Default for Workload {
    fn default() -> Self {
        Self {
            seed: 0,
            requests: 100,
            workers: 1,
            alignment: 1,
            longest: 64 << 10,
            span: None,
            discard: true,
            flush: true,
        }
    }
}

/// Issues random requests; every read is judged by the model.
///
/// # Errors
/// The first that the disk reports to any worker.
///
/// # Panics
/// At a wrong byte.
pub async fn workload(disk: &DiskHandle, model: &ModelDisk, workload: Workload) -> Result<()> {
    let workers = (0..workload.workers).map(|worker| {
        let seed = workload.seed.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(u64::from(worker));
        work(disk, model, workload, fastrand::Rng::with_seed(seed))
    });
    join_all(workers).await.into_iter().collect()
}

async fn work(disk: &DiskHandle, model: &ModelDisk, workload: Workload, mut random: fastrand::Rng) -> Result<()> {
    for _ in 0..workload.requests {
        let size = workload.span.map_or(model.size(), |span| span.min(model.size()));
        let range = some_range(&mut random, size, workload.alignment, workload.longest);
        let flags = WriteFlags { fua: workload.flush && random.u8(..16) == 0 };
        match random.u8(..20) {
            0..8 => {
                let mut buf = Buf::new(range.len() as usize);
                random.fill(&mut buf);
                model.write(disk, range.offset(), buf, flags).await?;
            }
            8..15 => drop(model.read(disk, range.offset(), Buf::new(range.len() as usize)).await?),
            15..17 => {
                let mode = ZeroMode { unmap: random.bool(), fast_only: false };
                model.write_zeroes(disk, range, mode, flags).await?;
            }
            17..19 if workload.discard => model.discard(disk, range, flags).await?,
            _ if workload.flush => model.flush(disk).await?,
            _ => {}
        }
    }
    Ok(())
}

/// A range of a disk; often at a border where something begins or ends.
pub(crate) fn some_range(random: &mut fastrand::Rng, size: u64, alignment: u64, longest: u64) -> ByteRange {
    let mut border = || {
        let grain = alignment.max(1 << random.u32(0..17));
        (random.u64(..=size) / grain * grain).min(size)
    };
    let (a, b) = (border(), border());
    let (start, mut end) = (a.min(b), a.max(b));
    let short = random.u64(1..=longest.max(1)) >> random.u32(..10);
    end = end.min(start + short.max(1).next_multiple_of(alignment).min(longest.max(alignment)));
    if start / alignment * alignment >= end {
        let start = start.min(size.saturating_sub(alignment)) / alignment * alignment;
        return ByteRange::between(start, (start + alignment).min(size));
    }
    ByteRange::between(start / alignment * alignment, end)
}
