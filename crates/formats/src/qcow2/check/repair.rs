//! Mending an image.
//!
//! Order, and what a crash between leaves:
//! 1. Entries that contradict the format are mended in place, each within a sector, but not in tables whose clusters are
//!    used for something else as well: an image with fewer contradictions. An incomplete snapshot table is written anew into fresh space, made durable, and then
//!    the header's first sector leads to it: the old or the new table.
//! 2. Reference counts. Where the table and blocks are sound, wrong counts are set in place: no allocation takes
//!    place meanwhile, so every mix of old and new counts is no worse than the old ones. Otherwise a new table and
//!    new blocks are written into fresh space behind everything in use, made durable, and then the header's
//!    first sector leads to them: the old or the new ones, whole.
//! 3. Copied flags are set to what was counted.
//! 4. Everything is durable and checked again; only when nothing is wrong, the dirty and the corrupt bit are
//!    cleared, in one sector.

use super::compare::{Analysis, CopiedBy};
use super::report::{CheckReport, Progress};
use super::walk::WalkMode;
use super::{RepairMode, examine, rebuild::rebuild};
use crate::qcow2::{
    AUTOCLEAR_BITMAPS, AUTOCLEAR_HISTORY, AUTOCLEAR_IDENTITY, BitmapDirectory, Header, INCOMPATIBLE_CORRUPT,
    INCOMPATIBLE_DIRTY, SnapshotTable, refcount_bits,
};
use disk::{Buf, ErrorKind, Result, StorageHandle};
use std::rc::Rc;

/// Bytes of a refcount block changed at a time.
const PIECE: u64 = 64 << 10;

pub(super) async fn repair(
    storage: &StorageHandle,
    data_file: Option<&StorageHandle>,
    mode: RepairMode,
    progress: Progress<'_>,
) -> Result<CheckReport> {
    let mut header = Header::read_for_check(storage).await?;
    let mut before = examine(storage, data_file, &header, progress).await?;
    if mode == RepairMode::Leaks && before.needs_rebuild {
        // As `qemu-img` does: without sound counts nobody knows what is a leak.
        before.report.check_errors += 1;
        return Ok(before.report);
    }
    drop_bitmaps(storage, &mut header, mode).await?;
    if !before.complete && !examine(storage, data_file, &header, progress).await?.complete {
        // What cannot be found must not be taken for unused.
        return Ok(before.report);
    }
    if mode == RepairMode::All {
        complete_snapshots(storage, &mut header).await?;
        let look = Analysis::run(storage, data_file, &header, WalkMode::Look, progress).await?;
        let mends_mapping = look.walk.mends_mapping;
        let mend = WalkMode::Mend(Rc::new(look.walk.shared));
        let ours = AUTOCLEAR_HISTORY | AUTOCLEAR_IDENTITY;
        if mends_mapping && header.autoclear & ours != 0 {
            // Which of the guest's bytes change is not recorded, so a history kept beside the image ends here, and so does
            // the id of what it held.
            // Crash: one sector, durable before the first entry changes.
            header.autoclear &= !ours;
            header.write(storage).await?;
            storage.sync().await?;
        }
        Analysis::run(storage, data_file, &header, mend, progress).await?;
        storage.sync().await?;
    }
    let mut analysis = Analysis::run(storage, data_file, &header, WalkMode::Look, progress).await?;
    if mode == RepairMode::All && analysis.needs_rebuild {
        let rebuilt = rebuild(&analysis, progress).await?;
        drop(analysis);
        header = rebuilt;
        analysis = Analysis::run(storage, data_file, &header, WalkMode::Look, progress).await?;
    }
    set_counts(&analysis, mode).await?;
    storage.sync().await?;
    // With leaks alone, freed references may have left clusters with one owner: these flags follow the counts.
    if mode == RepairMode::All || before.report.corruptions == 0 {
        analysis.judge_copied(CopiedBy::References, true).await?;
    }
    drop(analysis);
    storage.sync().await?;

    let mut after = examine(storage, data_file, &header, progress).await?.report;
    after.corruptions_fixed = before.report.corruptions.saturating_sub(after.corruptions);
    after.leaks_fixed = before.report.leaks.saturating_sub(after.leaks);
    let marks = INCOMPATIBLE_DIRTY | INCOMPATIBLE_CORRUPT;
    if after.corruptions == 0 && after.check_errors == 0 && header.incompatible & marks != 0 {
        header.incompatible &= !marks;
        header.write(storage).await?;
        storage.sync().await?;
        after.dirty = false;
        after.marked_corrupt = false;
    }
    Ok(after)
}

/// Removes a bitmaps extension that nobody may use: its bit is cleared, so that its clusters count as leaks; or,
/// when everything is to be repaired, its directory contradicts the format.
async fn drop_bitmaps(storage: &StorageHandle, header: &mut Header, mode: RepairMode) -> Result<()> {
    if header.bitmaps.is_none() {
        return Ok(());
    }
    let dropped = header.autoclear & AUTOCLEAR_BITMAPS == 0;
    let broken = mode == RepairMode::All
        && BitmapDirectory::read(storage, header).await.is_err_and(|e| e.kind() == ErrorKind::Corrupt);
    if dropped || broken {
        header.bitmaps = None;
        header.autoclear &= !AUTOCLEAR_BITMAPS;
        header.write(storage).await?;
        storage.sync().await?;
    }
    Ok(())
}

/// Writes the snapshot table anew when entries lack what version 3 demands.
async fn complete_snapshots(storage: &StorageHandle, header: &mut Header) -> Result<()> {
    if header.version < 3 || header.snapshot_count == 0 {
        return Ok(());
    }
    let mut table = SnapshotTable::read(storage, header).await?;
    if table.incomplete_entries().next().is_none() {
        return Ok(());
    }
    table.complete_entries(header.size);
    let mut bytes = table.encode()?;
    bytes.resize(bytes.len().next_multiple_of(header.cluster_size() as usize), 0);
    let offset = storage.size().next_multiple_of(header.cluster_size());
    storage.write(offset, Buf::copy_of(&bytes)).await?;
    storage.sync().await?;
    header.snapshots_offset = offset;
    header.write(storage).await?;
    storage.sync().await
}

/// Sets wrong counts in place; for leaks only those that are too high.
async fn set_counts(analysis: &Analysis<'_>, mode: RepairMode) -> Result<()> {
    let (storage, header) = (analysis.walk.storage, analysis.walk.header);
    let (order, per_block) = (header.refcount_order, header.refcounts_per_block());
    let per_piece = ((PIECE << 3) >> order).min(per_block);
    for block in &analysis.wrong_blocks {
        let entry = analysis.table[*block as usize];
        let first = block * per_block;
        let end = (first + per_block).min(analysis.walk.file_clusters());
        let mut from = first;
        while from < end {
            let to = (from + per_piece).min(end);
            let at = entry + (((from - first) << order) >> 3);
            let mut bytes = storage.read_new(at, ((to - from) << order).div_ceil(8) as usize).await?;
            let mut changed = false;
            for cluster in from..to {
                let index = (cluster - from) as usize;
                let (count, references) = (refcount_bits::get(&bytes, order, index), analysis.walk.counts.get(cluster));
                if count > references || (count < references && mode == RepairMode::All) {
                    refcount_bits::set(&mut bytes, order, index, references);
                    changed = true;
                }
            }
            if changed {
                storage.write(at, bytes).await?;
            }
            from = to;
        }
    }
    Ok(())
}
