//! New refcount structures for an image whose own are unsound.

use super::compare::Analysis;
use super::counts::{Counts, PAGE};
use super::report::Progress;
use super::walk::{Walk, WalkMode};
use crate::qcow2::{Header, MAX_REFCOUNT_TABLE_BYTES, refcount_bits};
use disk::{Buf, DiskError, ErrorKind, Operation, Result, StorageHandle};
use std::collections::BTreeSet;
use std::ops::Range;

/// Where new structures go, in clusters: the table, then the blocks.
struct Place {
    table: Range<u64>,
    /// Which blocks exist, in their order.
    blocks: Vec<u64>,
}

impl Place {
    fn all(&self) -> Range<u64> {
        self.table.start..self.table.end + self.blocks.len() as u64
    }
}

/// Writes a new refcount table and new blocks for what the image refers to, and returns the header that
/// leads to them. The old ones become free space. `analysis` is of the image as it is.
pub(super) async fn rebuild(analysis: &Analysis<'_>, progress: Progress<'_>) -> Result<Header> {
    let Walk { storage, data_file, header, .. } = analysis.walk;
    let mut rebuilt = header.clone();
    rebuilt.refcount_table_clusters = 0;
    // Once more without the old structures, which stay intact until the switch.
    let walk = Walk::run(storage, data_file, &rebuilt, &[], WalkMode::Look, progress).await?;
    let counts = &walk.counts;
    let inside = (!storage.limits().grows_zeroed).then_some(&analysis.walk.counts);
    let place = find_place(counts, inside, header, walk.file_clusters())?;
    write_blocks(storage, header, counts, &place).await?;
    let mut table = Buf::zeroed(((place.table.end - place.table.start) * header.cluster_size()) as usize);
    for (index, block) in place.blocks.iter().enumerate() {
        let offset = (place.table.end + index as u64) << header.cluster_bits;
        let at = 8 * *block as usize;
        table[at..at + 8].copy_from_slice(&offset.to_be_bytes());
    }
    storage.write(place.table.start << header.cluster_bits, table).await?;
    storage.sync().await?;
    rebuilt.refcount_table_offset = place.table.start << header.cluster_bits;
    rebuilt.refcount_table_clusters = (place.table.end - place.table.start) as u32;
    rebuilt.write(storage).await?;
    storage.sync().await?;
    Ok(rebuilt)
}

/// Blocks that hold a count, and enough for the new structures themselves. They go behind the file's end, or, where
/// the storage cannot grow, into space that nothing `inside` refers to.
fn find_place(counts: &Counts, inside: Option<&Counts>, header: &Header, end: u64) -> Result<Place> {
    let bits = header.refcount_block_bits();
    let mut blocks = BTreeSet::new();
    let mut cluster = 0;
    while cluster < counts.clusters() {
        if counts.page_is_empty(cluster) {
            cluster = (cluster / PAGE + 1) * PAGE;
            continue;
        }
        if counts.get(cluster) == 0 {
            cluster += 1;
        } else {
            blocks.insert(cluster >> bits);
            cluster = ((cluster >> bits) + 1) << bits;
        }
    }
    let mut table_clusters = 1;
    let mut start;
    loop {
        let known = (blocks.len(), table_clusters);
        let needed = table_clusters + blocks.len() as u64;
        start = match inside {
            None => end,
            Some(occupied) => free_run(occupied, needed, end)?,
        };
        blocks.extend(start >> bits..=(start + needed - 1) >> bits);
        let last = blocks.last().copied().unwrap_or(0);
        table_clusters = table_clusters.max((8 * (last + 1)).div_ceil(header.cluster_size()));
        if (blocks.len(), table_clusters) == known {
            break;
        }
    }
    if table_clusters * header.cluster_size() > MAX_REFCOUNT_TABLE_BYTES {
        return Err(DiskError::new(ErrorKind::NoSpace, Operation::Check)
            .because("the image is too large for a refcount table of 8 MiB; convert it to larger clusters"));
    }
    Ok(Place { table: start..start + table_clusters, blocks: blocks.into_iter().collect() })
}

/// The first run of `needed` clusters in front of `end` to which nothing refers.
fn free_run(occupied: &Counts, needed: u64, end: u64) -> Result<u64> {
    let mut start = 0;
    for cluster in 0..end {
        if occupied.get(cluster) != 0 {
            start = cluster + 1;
        } else if cluster + 1 - start >= needed {
            return Ok(start);
        }
    }
    Err(DiskError::new(ErrorKind::NoSpace, Operation::Check)
        .because(format!("new reference counts need {needed} free clusters in a row, and the device has no such room")))
}

async fn write_blocks(storage: &StorageHandle, header: &Header, counts: &Counts, place: &Place) -> Result<()> {
    let (bits, order) = (header.refcount_block_bits(), header.refcount_order);
    let new = place.all();
    let mut buf = Buf::new(header.cluster_size() as usize);
    for (index, block) in place.blocks.iter().enumerate() {
        buf.fill(0);
        for cluster in block << bits..(block + 1) << bits {
            let count = if new.contains(&cluster) { 1 } else { counts.get(cluster) };
            if count > 0 {
                refcount_bits::set(&mut buf, order, (cluster - (block << bits)) as usize, count);
            }
        }
        buf = storage.write((place.table.end + index as u64) << header.cluster_bits, buf).await?;
    }
    Ok(())
}
