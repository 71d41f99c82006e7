//! Where the guest's bytes come from, over all layers.

use crate::stack::Stack;
use disk::{ByteRange, DiskExtent, ExtentSource, LocalFuture, Presence, Result};

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
            let geometry = layer.geometry();
            let inside = range.intersect(ByteRange::new(0, geometry.size));
            if inside.is_empty() {
                return Ok(nothing);
            }
            let _guard = layer.guard();
            let extent = layer.map(inside).await?;
            let here = DiskExtent { range: extent.range, depth: Some(depth as u32), ..nothing };
            Ok(match extent.presence {
                Presence::Absent => self.map_layers(depth + 1, extent.range).await?,
                Presence::Zero { allocated } => DiskExtent { allocated, ..here },
                Presence::Encoded { .. } => DiskExtent { allocated: true, zero: false, compressed: true, ..here },
                Presence::Data { storage, offset } => {
                    let source = Some(ExtentSource { storage, offset });
                    let data = DiskExtent { allocated: true, zero: false, source, ..here };
                    if !geometry.storage_holes {
                        return Ok(data);
                    }
                    let storage = layer.storage(storage);
                    let stored = ByteRange::new(offset, extent.range.len());
                    let held = stored.intersect(ByteRange::new(0, storage.size()));
                    if held.is_empty() {
                        return Ok(DiskExtent { allocated: false, zero: true, ..data });
                    }
                    let found = storage.extent(held).await?;
                    let range = extent.range.prefix(found.range.len());
                    match found.hole {
                        true => DiskExtent { range, allocated: false, zero: true, ..data },
                        false => DiskExtent { range, ..data },
                    }
                }
            })
        })
    }
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
