//! Growth of the reference counts themselves: new blocks, and a larger table.

use super::Allocator;
use crate::qcow2::fault::Fault;
use crate::qcow2::refcounts::TABLE_BYTES_MAX;
use disk::{Buf, DiskError, ErrorKind, Operation, Result};

impl Allocator {
    /// Sees to it that refcount blocks for these clusters at the end exist and their first page is in memory.
    /// May move the end. Callers hold `slow`.
    pub(super) async fn ensure_counted(&self, first: u64, count: u64) -> Result<()> {
        let mut block = self.refcounts.block_of(first);
        // The blocks themselves take space at the end, too.
        while block <= self.refcounts.block_of(self.end.get() + count) {
            if block as usize >= self.refcounts.table_len() {
                Box::pin(self.grow_table(block as usize + 1)).await?;
            }
            let first_of_block = block << (self.cluster_bits + 3 - self.order());
            if self.refcounts.block_offset(first_of_block).is_none() {
                self.add_block(block).await?;
            }
            block += 1;
        }
        self.refcounts.page(self.end.get()).await?;
        Ok(())
    }

    fn order(&self) -> u32 {
        // From the two widths that `Refcounts` offers.
        self.cluster_bits.min(12) + 3 - self.refcounts.page_bits()
    }

    /// Sets up the refcount block with that number in a cluster at the end.
    ///
    /// Crash: the block's space reads as zero; the table's entry is written after a sync of the block's
    /// bytes (`flush.rs`), so a block that can be found counts itself.
    async fn add_block(&self, block: u64) -> Result<()> {
        loop {
            let cluster = self.end.get();
            let counts_itself = self.refcounts.block_of(cluster) == block;
            if !counts_itself {
                // Blocks are made lowest first, so the end is counted by one that exists, unless the end is
                // in a higher block still: then begin there.
                let page = self.refcounts.page(cluster).await?.ok_or(Fault::RefcountMissing { cluster })?;
                if self.end.get() != cluster {
                    continue;
                }
                self.end.set(cluster + 1);
                if self.refcounts.get(&page, cluster) != 0 {
                    continue;
                }
                self.claim(&page, cluster, 1)?;
            } else {
                self.end.set(cluster + 1);
            }
            self.metadata.borrow_mut().insert(cluster);
            if let Err(error) = self.settle_table(cluster, 1).await {
                if counts_itself {
                    // Nothing counts it, so nobody else has moved the end meanwhile.
                    self.metadata.borrow_mut().remove(&cluster);
                    self.end.set(cluster);
                } else {
                    self.give_up_table(cluster, 1);
                }
                return Err(error);
            }
            self.refcounts.add_block(block, cluster << self.cluster_bits);
            return Ok(());
        }
    }

    /// Moves the refcount table to a larger place.
    ///
    /// Crash: the new table and all it leads to are synced before the header's 12 bytes (one sector)
    /// switch to it; before the switch the old table is whole, apart from blocks for clusters that
    /// nothing on the storage refers to yet.
    ///
    /// When space runs out before the switch, the table in memory becomes what it was: an entry behind its old
    /// end would be written over whatever stands there.
    async fn grow_table(&self, entries: usize) -> Result<()> {
        let per_cluster = 1usize << (self.cluster_bits - 3);
        let wanted = entries.max(self.refcounts.table_len() * 3 / 2 + 1).div_ceil(per_cluster) * per_cluster;
        if wanted as u64 * 8 > TABLE_BYTES_MAX {
            return Err(DiskError::new(ErrorKind::NoSpace, Operation::Write).because(format!(
                "the image file cannot grow beyond {} bytes: its refcount table would exceed {TABLE_BYTES_MAX} bytes",
                self.end_offset()
            )));
        }
        let old = (self.refcounts.table_offset(), self.refcounts.table_len() / per_cluster);
        let (old_len, old_end) = (self.refcounts.table_len(), self.end.get());
        self.growing.set(true);
        self.refcounts.grow_table(wanted);
        let clusters = (wanted / per_cluster) as u64;
        let mut taken = None;
        let switched = self.switch_table(clusters, &mut taken).await;
        if let Err(error) = switched {
            match error.kind() {
                ErrorKind::NoSpace => self.undo_growth(old_len, old_end, taken.map(|first| (first, clusters))),
                _ => self.poisoned.set(true),
            }
            self.growing.set(false);
            return Err(error);
        }
        self.growing.set(false);
        let old_first = old.0 >> self.cluster_bits;
        for cluster in old_first..old_first + old.1 as u64 {
            self.metadata.borrow_mut().remove(&cluster);
            self.release(cluster).await?;
        }
        Ok(())
    }

    /// Writes the table in memory to a new place, which goes into `taken`, and has the header lead there.
    async fn switch_table(&self, clusters: u64, taken: &mut Option<u64>) -> Result<()> {
        let first = self.allocate_table_locked(clusters).await?;
        *taken = Some(first);
        let offset = first << self.cluster_bits;
        self.refcounts.write_pages().await?;
        self.storage.write(offset, self.refcounts.encode_table()).await?;
        self.sync().await?;
        // Header bytes 48–59: refcount_table_offset, refcount_table_clusters.
        let mut fields = Vec::with_capacity(12);
        fields.extend_from_slice(&offset.to_be_bytes());
        fields.extend_from_slice(&(clusters as u32).to_be_bytes());
        self.storage.write(48, Buf::copy_of(&fields)).await?;
        self.refcounts.moved_table(offset);
        self.sync().await
    }

    /// Forgets what a growth of the refcount table added that could not be finished: blocks behind the old table's
    /// reach, and the place of the new table. Nobody else took clusters meanwhile (`growing`).
    fn undo_growth(&self, old_len: usize, old_end: u64, taken: Option<(u64, u64)>) {
        self.refcounts.shrink_table(old_len);
        if let Some((first, count)) = taken {
            self.give_up_table(first, count);
        }
        let reach = self.refcounts.first_of_block(old_len as u64);
        for cluster in old_end..self.end.get() {
            let lost = !self.refcounts.is_block(cluster) && self.metadata.borrow_mut().remove(&cluster);
            if lost {
                self.given_up.borrow_mut().push(cluster);
            }
        }
        // What the old table does not reach has lost its count already.
        self.given_up.borrow_mut().retain(|cluster| *cluster < reach);
        self.end.set(self.end.get().min(reach).max(old_end));
    }
}
