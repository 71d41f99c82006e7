//! Where the guest's bytes come from, over all layers.

use crate::stack::{Held, Stack};
use disk::{ByteRange, DiskExtent, ExtentSource, LayerExtent, LayerHandle, LocalFuture, Presence, Result};
use std::ops::Range;

/// Answers that are put together into one at most, so that a question stays short.
const MERGED_MAX: usize = 256;

impl<'a> Stack<'a> {
    /// The first run of bytes in one state; neighbours in the same state are put together.
    pub(crate) async fn map_merged(self, range: ByteRange) -> Result<DiskExtent> {
        let mut run = self.map_layers(0, range).await?;
        for _ in 1..MERGED_MAX {
            let rest = ByteRange::between(run.range.end(), range.end());
            if rest.is_empty() {
                break;
            }
            // What cannot be looked up ends the run; the next question reports the failure.
            let Ok(next) = self.map_layers(0, rest).await else { break };
            if !continues(&run, &next) {
                break;
            }
            run.range = ByteRange::between(run.range.offset(), next.range.end());
        }
        Ok(run)
    }

    fn map_layers(self, depth: usize, range: ByteRange) -> LocalFuture<'a, Result<DiskExtent>> {
        Box::pin(async move {
            let nothing =
                DiskExtent { range, allocated: false, zero: true, compressed: false, depth: None, source: None };
            let Some(layer) = self.layer(depth) else { return Ok(nothing) };
            let inside = range.intersect(ByteRange::new(0, layer.geometry().size));
            if inside.is_empty() {
                return Ok(nothing);
            }
            let (extent, hole) = look(layer, inside).await?;
            let here = DiskExtent { range: extent.range, depth: Some(depth as u32), ..nothing };
            Ok(match extent.presence {
                Presence::Absent => self.map_layers(depth + 1, extent.range).await?,
                Presence::Zero { allocated } => DiskExtent { allocated, ..here },
                Presence::Encoded { .. } => DiskExtent { allocated: true, zero: false, compressed: true, ..here },
                Presence::Data { storage, offset } => {
                    let source = Some(ExtentSource { storage, offset });
                    DiskExtent { allocated: !hole, zero: hole, source, ..here }
                }
            })
        })
    }

    /// What some of the layers hold of the beginning of the range, whatever is above and below them. What lies behind the
    /// end of one of them is zero for those above it.
    pub(crate) async fn held(self, layers: Range<usize>, range: ByteRange) -> Result<(ByteRange, Held)> {
        let mut range = range;
        for layer in layers.filter_map(|depth| self.layer(depth)) {
            let inside = range.intersect(ByteRange::new(0, layer.geometry().size));
            if inside.is_empty() {
                return Ok((range, Held::Zero));
            }
            let (extent, hole) = look(layer, inside).await?;
            range = extent.range;
            match extent.presence {
                Presence::Absent => {}
                Presence::Data { .. } if hole => return Ok((range, Held::Zero)),
                Presence::Zero { .. } => return Ok((range, Held::Zero)),
                Presence::Data { .. } | Presence::Encoded { .. } => return Ok((range, Held::Data)),
            }
        }
        Ok((range, Held::Absent))
    }

    /// The range in runs of zeroes (`true`) and of bytes that may be anything.
    pub(crate) async fn runs(self, range: ByteRange) -> Result<Vec<(ByteRange, bool)>> {
        let mut runs: Vec<(ByteRange, bool)> = Vec::new();
        let mut rest = range;
        while !rest.is_empty() {
            let extent = self.map_merged(rest).await?;
            match runs.last_mut() {
                Some((run, zero)) if *zero == extent.zero => {
                    *run = ByteRange::between(run.offset(), extent.range.end());
                }
                _ => runs.push((extent.range, extent.zero)),
            }
            rest = rest.skip(extent.range.len());
        }
        Ok(runs)
    }
}

/// The first extent of one layer, and of data whether the storage says that it is a hole.
async fn look(layer: &LayerHandle, range: ByteRange) -> Result<(LayerExtent, bool)> {
    let _guard = layer.guard();
    let extent = layer.map(range).await?;
    let Presence::Data { storage, offset } = extent.presence else { return Ok((extent, false)) };
    if !layer.geometry().storage_holes {
        return Ok((extent, false));
    }
    let storage = layer.storage(storage);
    let stored = ByteRange::new(offset, extent.range.len());
    let held = stored.intersect(ByteRange::new(0, storage.size()));
    if held.is_empty() {
        return Ok((extent, true));
    }
    let found = storage.extent(held).await?;
    Ok((LayerExtent { range: extent.range.prefix(found.range.len()), ..extent }, found.hole))
}

/// Whether `next` goes on where `run` ends, in the same state and place.
fn continues(run: &DiskExtent, next: &DiskExtent) -> bool {
    let place = match (run.source, next.source) {
        (Some(a), Some(b)) => a.storage == b.storage && a.offset.checked_add(run.range.len()) == Some(b.offset),
        (None, None) => true,
        _ => false,
    };
    let state = |e: &DiskExtent| (e.allocated, e.zero, e.compressed, e.depth);
    place && state(run) == state(next)
}
