//! The refcount table and blocks: are they sound, and do they say what was counted?

use super::counts::{Bytes, PAGE};
use super::report::Progress;
use super::walk::{Walk, WalkMode, read_l2};
use crate::qcow2::entry::{COPIED, L2Entry, OFFSET_MASK, ZERO};
use crate::qcow2::extensions::be64;
use crate::qcow2::{Corruption, Header, Table, refcount_bits};
use disk::{Buf, ByteRange, Result, StorageHandle};

/// Reserved bits of refcount table entries.
const RESERVED: u64 = 0x1ff;
/// Bytes of a refcount block read at a time.
const PIECE: u64 = 64 << 10;

/// An image's references as counted, compared with its reference counts.
pub(super) struct Analysis<'a> {
    pub(super) walk: Walk<'a>,
    /// The refcount table as stored.
    pub(super) table: Vec<u64>,
    /// Blocks in which counts differ from the references.
    pub(super) wrong_blocks: Vec<u64>,
    /// The refcount table or blocks are themselves unsound, or blocks are missing.
    pub(super) needs_rebuild: bool,
    /// Clusters of which exactly one of "one reference" and "count 1" is true.
    ones_differ: Bytes,
}

/// Reads the refcount table.
pub(super) async fn read_refcount_table(storage: &StorageHandle, header: &Header) -> Result<Vec<u64>> {
    let len = header.refcount_table_clusters as usize * header.cluster_size() as usize;
    if len == 0 {
        return Ok(Vec::new());
    }
    let bytes = storage.read_new(header.refcount_table_offset, len).await?;
    Ok(bytes.chunks_exact(8).map(|entry| be64(entry, 0)).collect())
}

impl<'a> Analysis<'a> {
    /// Walks the image, judges the refcount structures, and compares.
    pub(super) async fn run(
        storage: &'a StorageHandle,
        data_file: Option<&'a StorageHandle>,
        header: &'a Header,
        mode: WalkMode,
        progress: Progress<'_>,
    ) -> Result<Self> {
        let table = read_refcount_table(storage, header).await?;
        let sound: Vec<u64> = table.iter().copied().filter(|e| is_sound(*e, header)).collect();
        let walk = Walk::run(storage, data_file, header, &sound, mode, progress).await?;
        let ones_differ = Bytes::new(walk.counts.clusters())?;
        let mut analysis = Self { walk, table, wrong_blocks: Vec::new(), needs_rebuild: false, ones_differ };
        analysis.judge_structures()?;
        analysis.compare().await?;
        analysis.judge_overlaps();
        Ok(analysis)
    }

    /// Counts the refcount table and blocks, and judges them.
    fn judge_structures(&mut self) -> Result<()> {
        let header = self.walk.header;
        let size = u64::from(header.refcount_table_clusters) * header.cluster_size();
        if !self.walk.refer(Table::RefcountTable, header.refcount_table_offset, size, 1)? || size == 0 {
            self.needs_rebuild = true;
        }
        if header.refcount_table_offset == 0 && size > 0 {
            self.needs_rebuild = true;
        }
        for index in 0..self.table.len() {
            let entry = self.table[index];
            if entry == 0 {
                continue;
            }
            let index = index as u64;
            if !is_sound(entry, header) {
                let what = if entry & RESERVED != 0 {
                    Corruption::RefcountTableReserved { index, entry }
                } else {
                    Corruption::RefcountBlockUnaligned { index, entry }
                };
                self.walk.report.corruption(1, what);
                self.needs_rebuild = true;
                continue;
            }
            if entry >> header.cluster_bits >= self.walk.file_clusters() {
                let (offset, size, end) = (entry, header.cluster_size(), self.walk.storage.size());
                let what = Corruption::TableBeyondEnd { table: Table::RefcountBlock, offset, size, end };
                self.walk.report.corruption(1, what);
                self.needs_rebuild = true;
                continue;
            }
            self.walk.refer(Table::RefcountBlock, entry, header.cluster_size(), 1)?;
            let cluster = entry >> header.cluster_bits;
            let references = self.walk.counts.get(cluster);
            if references != 1 {
                self.walk.overlaps.remove(&cluster);
                let what = Corruption::RefcountBlockShared { index, offset: entry, references };
                self.walk.report.corruption(1, what);
                self.needs_rebuild = true;
            }
        }
        Ok(())
    }

    /// Compares the counts of all clusters of the file.
    async fn compare(&mut self) -> Result<()> {
        let header = self.walk.header;
        let (clusters, per_block) = (self.walk.file_clusters(), header.refcounts_per_block());
        let mut last_used = 0;
        for block in 0..clusters.div_ceil(per_block) {
            let (first, end) = (block * per_block, ((block + 1) * per_block).min(clusters));
            // Reserved bits are reported, and otherwise make no difference.
            let entry = self.table.get(block as usize).copied().unwrap_or(0) & !RESERVED;
            let outside = entry >> header.cluster_bits >= clusters;
            let wrong_before = self.wrong();
            if entry != 0 && !is_sound(entry, header) {
                let what =
                    Corruption::RefcountsUnreadable { offset: first << header.cluster_bits, clusters: end - first };
                self.walk.report.error(end - first, what);
                continue;
            } else if entry == 0 || outside {
                // No block: all counts are 0.
                let mut cluster = first;
                while cluster < end {
                    if self.walk.counts.page_is_empty(cluster) {
                        cluster = (cluster / PAGE + 1) * PAGE;
                        continue;
                    }
                    self.compare_one(cluster, 0, &mut last_used)?;
                    cluster += 1;
                }
                self.needs_rebuild |= self.wrong() != wrong_before;
            } else {
                let per_piece = ((PIECE << 3) >> header.refcount_order).min(per_block);
                let mut from = first;
                while from < end {
                    let to = (from + per_piece).min(end);
                    let at = entry + (((from - first) << header.refcount_order) >> 3);
                    let len = ((to - from) << header.refcount_order).div_ceil(8);
                    let bytes = self.walk.storage.read_new(at, len as usize).await?;
                    self.compare_piece(from, to, &bytes, &mut last_used)?;
                    from = to;
                }
                if self.wrong() != wrong_before {
                    self.wrong_blocks.push(block);
                }
            }
        }
        self.walk.report.image_end_offset = (last_used + 1) << header.cluster_bits;
        Ok(())
    }

    fn wrong(&self) -> u64 {
        self.walk.report.corruptions + self.walk.report.leaks
    }

    /// Compares the counts in `bytes` with the references of the clusters `from..to`.
    fn compare_piece(&mut self, from: u64, to: u64, bytes: &[u8], last_used: &mut u64) -> Result<()> {
        let order = self.walk.header.refcount_order;
        let mut cluster = from;
        while cluster < to {
            let page_end = ((cluster / PAGE + 1) * PAGE).min(to);
            let range = (((cluster - from) << order) / 8) as usize..((page_end - from) << order).div_ceil(8) as usize;
            if self.walk.counts.page_is_empty(cluster) && bytes[range].iter().all(|b| *b == 0) {
                cluster = page_end;
                continue;
            }
            while cluster < page_end {
                let count = refcount_bits::get(bytes, order, (cluster - from) as usize);
                self.compare_one(cluster, count, last_used)?;
                cluster += 1;
            }
        }
        Ok(())
    }

    fn compare_one(&mut self, cluster: u64, count: u64, last_used: &mut u64) -> Result<()> {
        let references = self.walk.counts.get(cluster);
        if count > 0 || references > 0 {
            *last_used = cluster;
        }
        if count == references {
            return Ok(());
        }
        let offset = cluster << self.walk.header.cluster_bits;
        if count < references {
            let report = &mut self.walk.report;
            report.corruption(1, Corruption::RefcountTooLow { offset, count, references });
            if let Some((first, second)) = self.walk.overlaps.remove(&cluster) {
                report.list(super::Severity::Corruption, Corruption::Overlap { offset, first, second });
            }
        } else {
            self.walk.report.leak(Corruption::RefcountTooHigh { offset, count, references });
        }
        if (count == 1) != (references == 1) {
            self.ones_differ.set(cluster, 1)?;
        }
        Ok(())
    }

    /// Reports the overlaps that no wrong count has shown.
    fn judge_overlaps(&mut self) {
        let mut left: Vec<_> = self.walk.overlaps.iter().map(|(cluster, tables)| (*cluster, *tables)).collect();
        left.sort_unstable_by_key(|(cluster, _)| *cluster);
        for (cluster, (first, second)) in left {
            let offset = cluster << self.walk.header.cluster_bits;
            self.walk.report.corruption(1, Corruption::Overlap { offset, first, second });
        }
    }

    /// Whether a cluster's reference count is 1 as the image says, or as counted.
    async fn is_one(&self, offset: u64, by: CopiedBy) -> Result<bool> {
        let header = self.walk.header;
        let cluster = offset >> header.cluster_bits;
        if cluster < self.walk.file_clusters() || by == CopiedBy::References {
            let one = self.walk.counts.get(cluster) == 1;
            return Ok(one != (by == CopiedBy::Counts && self.ones_differ.get(cluster) != 0));
        }
        // Beyond the file's end only the image itself can tell.
        let entry = self.table.get((cluster >> header.refcount_block_bits()) as usize).copied().unwrap_or(0);
        if entry == 0 || !is_sound(entry, header) {
            return Ok(false);
        }
        let index = cluster & (header.refcounts_per_block() - 1);
        let bit = index << header.refcount_order;
        let bytes = self.walk.storage.read_new(entry + bit / 8 / 8 * 8, 8).await?;
        let within = index - ((bit / 64 * 64) >> header.refcount_order);
        Ok(refcount_bits::get(&bytes, header.refcount_order, within as usize) == 1)
    }

    /// Judges the copied flags of the active tables, and with `mend` sets them right.
    pub(super) async fn judge_copied(&mut self, by: CopiedBy, mend: bool) -> Result<()> {
        let storage = self.walk.storage;
        let header = self.walk.header;
        let mut l1 = std::mem::take(&mut self.walk.l1);
        let mut changed = false;
        for (index, entry) in l1.iter_mut().enumerate() {
            let offset = *entry & OFFSET_MASK;
            if offset != 0 && self.is_one(offset, by).await? != (*entry & COPIED != 0) {
                let what = Corruption::CopiedL1 { index: index as u64, entry: *entry };
                self.walk.report.corruption(1, what);
                *entry ^= COPIED;
                changed = true;
            }
        }
        let free = |walk: &Walk<'_>, offset, len: usize| {
            !walk.shared.touches(ByteRange::new(offset, len as u64), walk.header.cluster_bits)
        };
        if changed && mend && free(&self.walk, header.l1_offset, 8 * l1.len()) {
            let bytes: Vec<u8> = l1.iter().flat_map(|entry| entry.to_be_bytes()).collect();
            storage.write(header.l1_offset, Buf::copy_of(&bytes)).await?;
        }
        self.walk.l1 = l1;
        // Each table once, however many entries lead to it.
        for (offset, times) in std::mem::take(&mut self.walk.active_l2) {
            let Some(mut table) = read_l2(storage, offset, header.cluster_size()).await? else { continue };
            let changed = self.judge_copied_l2(offset, times, &mut table, by).await?;
            if changed && mend && free(&self.walk, offset, table.len()) {
                storage.write(offset, table).await?;
            }
        }
        Ok(())
    }

    /// Judges one L2 table and sets its flags right in memory; returns whether that changed any.
    async fn judge_copied_l2(&mut self, table: u64, times: u64, bytes: &mut Buf, by: CopiedBy) -> Result<bool> {
        let header = self.walk.header;
        let width = header.l2_entry_size() as usize;
        let mut changed = false;
        for index in 0..header.l2_entries() {
            let at = index as usize * width;
            let entry = L2Entry { descriptor: be64(bytes, at), bitmap: 0 };
            let zero_plain = entry.descriptor & ZERO != 0 && !header.extended_l2() && entry.host() == 0;
            let unallocated = entry.host() == 0 && !(header.has_data_file() && entry.is_copied());
            if entry.is_compressed() || zero_plain || unallocated {
                continue;
            }
            // Clusters of an external data file belong to one guest cluster each.
            let one = header.has_data_file() || self.is_one(entry.host(), by).await?;
            if one != entry.is_copied() {
                let what = Corruption::CopiedL2 { table, index, entry: entry.descriptor };
                self.walk.report.corruption(times, what);
                bytes[at..at + 8].copy_from_slice(&(entry.descriptor ^ COPIED).to_be_bytes());
                changed = true;
            }
        }
        Ok(changed)
    }
}

/// What decides whether a cluster is referenced once.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum CopiedBy {
    /// The image's reference counts.
    Counts,
    /// The references as counted.
    References,
}

fn is_sound(entry: u64, header: &Header) -> bool {
    entry & (header.cluster_size() - 1) == 0
}
