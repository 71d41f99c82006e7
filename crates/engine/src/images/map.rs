//! Which ranges of a disk hold data.

use super::report::MapEntry;
use super::stack::Stack;
use crate::EngineError;
use disk::{ByteRange, DiskExtent};

/// Runs of bytes in one state, neighbours alike put together, up to `most`; and where to ask on, when there
/// are more. What lies behind the disk's end is left away.
pub(crate) async fn map(
    stack: &Stack,
    range: ByteRange,
    most: usize,
) -> Result<(Vec<MapEntry>, Option<u64>), EngineError> {
    let mut entries: Vec<MapEntry> = Vec::new();
    let mut rest = range.intersect(ByteRange::new(0, stack.disk().geometry().size));
    while !rest.is_empty() {
        let extent = stack.disk().map(rest).await?;
        let entry = entry(stack, &extent);
        if let Some(last) = entries.last_mut()
            && continues(last, &entry)
        {
            last.length += entry.length;
        } else if entries.len() < most {
            entries.push(entry);
        } else {
            return Ok((entries, Some(entry.start)));
        }
        rest = rest.skip(extent.range.len());
    }
    Ok((entries, None))
}

fn entry(stack: &Stack, extent: &DiskExtent) -> MapEntry {
    let layers = stack.chain().layers();
    // What no layer holds is told of the lowest one, as qemu-img does.
    let depth = extent.depth.unwrap_or(layers.len().saturating_sub(1) as u32);
    let data = !extent.zero;
    let source = extent.source.filter(|_| data || extent.allocated);
    let filename = source.and_then(|source| {
        let layer = layers.get(depth as usize)?;
        Some(layer.handle.storage(source.storage).name().to_owned())
    });
    MapEntry {
        start: extent.range.offset(),
        length: extent.range.len(),
        depth,
        present: extent.depth.is_some(),
        zero: extent.zero,
        data,
        compressed: extent.compressed,
        offset: source.map(|s| s.offset),
        filename,
    }
}

fn continues(last: &MapEntry, next: &MapEntry) -> bool {
    let state = |e: &MapEntry| (e.depth, e.present, e.zero, e.data, e.compressed);
    state(last) == state(next) && last.filename == next.filename && last.offset.map(|o| o + last.length) == next.offset
}
