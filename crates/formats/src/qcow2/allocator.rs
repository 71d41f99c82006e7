//! Which clusters of the image file are free, and who gets them.
//!
//! New clusters come, in this order, from space that was freed and is known to read as zero, from space
//! that was freed (after a hole was punched where the storage can), and from the end of the file. Space
//! that reads as zero matters: a small write into it needs no filling of the rest of its cluster, and no
//! wait before it is linked (see `write.rs`).
//!
//! The life of a cluster that is freed:
//! 1. *unlinked*: no table in memory refers to it any more; tables on the storage may (`flush.rs` keeps
//!    the list).
//! 2. *limbo*: the unlinking is durable. Requests that began before may still use the offset; its
//!    reference still counts.
//! 3. *free*: these requests have ended; the reference is gone (in memory first; a crash leaves a leak).

use super::epochs::Epochs;
use super::fault::Fault;
use super::refcounts::{Page, Refcounts, TABLE_BYTES_MAX};
use disk::{Buf, ByteRange, DiskError, ErrorKind, Operation, Result, StorageHandle, ZeroMode};
use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, HashSet, VecDeque};
use std::rc::Rc;

/// Clusters in a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Run {
    /// Number of the first cluster (host offset divided by the cluster size).
    pub(super) first: u64,
    pub(super) count: u64,
    /// The space reads as zero, and nobody has a request on its way to it.
    pub(super) zeroed: bool,
}

/// Free clusters by their number, joined to runs.
#[derive(Debug, Default)]
struct FreeRuns(BTreeMap<u64, u64>);

impl FreeRuns {
    fn add(&mut self, first: u64, count: u64) {
        let (mut first, mut count) = (first, count);
        if let Some((&before, &len)) = self.0.range(..first).next_back()
            && before + len == first
        {
            self.0.remove(&before);
            (first, count) = (before, count + len);
        }
        if let Some(len) = self.0.remove(&(first + count)) {
            count += len;
        }
        self.0.insert(first, count);
    }

    /// Up to `max` clusters in a row, the lowest first.
    fn take(&mut self, max: u64) -> Option<(u64, u64)> {
        let (first, len) = self.0.pop_first()?;
        let count = len.min(max);
        if count < len {
            self.0.insert(first + count, len - count);
        }
        Some((first, count))
    }
}

/// How many clusters at most are freed of old bytes and made ready in one go.
const PUNCH_CLUSTERS: u64 = 256;
/// By how many bytes the file is made longer than needed: an eighth, within these bounds.
const GROW_MIN: u64 = 64 << 10;
const GROW_MAX: u64 = 64 << 20;
/// Refcount pages looked through for free clusters per allocation that finds none ready.
const SCAN_PAGES: u64 = 64;

/// Gives out and takes back the clusters of one image file.
#[derive(Debug)]
pub(super) struct Allocator {
    pub(super) refcounts: Refcounts,
    storage: StorageHandle,
    cluster_bits: u32,
    /// Clusters from here on were never in use.
    end: Cell<u64>,
    /// The file is long enough for clusters below this number. It is made longer ahead of need: checkers object to
    /// references beyond its end, and a write that need not make the file longer is cheaper.
    covered: Cell<u64>,
    /// Clusters below this number may have been freed by an earlier opener, and from `scanned` on nobody has looked.
    scan_end: u64,
    scanned: Cell<u64>,
    /// Time for another portion of the scan: one per refcount page of new space.
    scan_due: Cell<bool>,
    zeroed: RefCell<FreeRuns>,
    stale: RefCell<FreeRuns>,
    /// Stamped with the epoch that must be over.
    limbo: RefCell<VecDeque<(u64, u64)>>,
    /// Clusters whose write was given up; a late request may still be on its way to them, so they wait for
    /// the close.
    pub(super) given_up: RefCell<Vec<u64>>,
    /// Clusters of the header and of all tables: never data.
    pub(super) metadata: RefCell<HashSet<u64>>,
    /// Taken for everything that waits for the storage.
    slow: async_lock::Mutex<()>,
}

impl Allocator {
    pub(super) fn new(refcounts: Refcounts, storage: StorageHandle, cluster_bits: u32, metadata: HashSet<u64>) -> Self {
        let end = storage.size().div_ceil(1 << cluster_bits);
        Self {
            refcounts,
            storage,
            cluster_bits,
            end: Cell::new(end),
            covered: Cell::new(end),
            scan_end: end,
            scanned: Cell::new(0),
            scan_due: Cell::new(true),
            zeroed: RefCell::default(),
            stale: RefCell::default(),
            limbo: RefCell::default(),
            given_up: RefCell::default(),
            metadata: RefCell::new(metadata),
            slow: async_lock::Mutex::new(()),
        }
    }

    /// One past the last byte that is in use, or may be.
    pub(super) fn end_offset(&self) -> u64 {
        self.end.get() << self.cluster_bits
    }

    /// Up to `max` clusters in a row for the guest's bytes, counted as referenced once.
    pub(super) async fn allocate(&self, max: u64, epochs: &Epochs) -> Result<Run> {
        if let Some(run) = self.allocate_cached(max)? {
            return Ok(run);
        }
        let _slow = self.slow.lock().await;
        loop {
            if let Some(run) = self.allocate_cached(max)? {
                return Ok(run);
            }
            self.drain_limbo(epochs).await?;
            if self.zeroed.borrow().0.is_empty() && self.stale.borrow().0.is_empty() {
                self.scan().await?;
            }
            let stale = self.stale.borrow_mut().take(PUNCH_CLUSTERS);
            if let Some((first, count)) = stale {
                let page = self.refcounts.page(first).await?;
                debug_assert!(page.is_some(), "what was freed has been counted");
                self.punch(first, count).await?;
                continue;
            }
            if let Some(first) = self.first_zeroed() {
                self.refcounts.page(first).await?;
                continue;
            }
            self.ensure_counted(self.end.get(), 1).await?;
            self.cover(self.end.get() + max.min(self.left_in_page(self.end.get()))).await?;
        }
    }

    fn first_zeroed(&self) -> Option<u64> {
        self.zeroed.borrow().0.first_key_value().map(|(first, _)| *first)
    }

    /// As [`Allocator::allocate`], when memory alone can tell.
    pub(super) fn allocate_cached(&self, max: u64) -> Result<Option<Run>> {
        if let Some(first) = self.first_zeroed() {
            let Some(page) = self.refcounts.cached(first) else { return Ok(None) };
            let in_page = self.left_in_page(first);
            let (first, count) = self.zeroed.borrow_mut().take(max.min(in_page)).expect("the first was just seen");
            self.claim(&page, first, count)?;
            return Ok(Some(Run { first, count, zeroed: self.storage.limits().grows_zeroed }));
        }
        if !self.stale.borrow().0.is_empty() || self.scan_is_due() {
            return Ok(None);
        }
        let first = self.end.get();
        let Some(page) = self.refcounts.cached(first) else { return Ok(None) };
        let limit = max.min(self.left_in_page(first)).min(self.covered.get().saturating_sub(first));
        if limit == 0 {
            return Ok(None);
        }
        let mut count = 0;
        while count < limit && self.refcounts.get(&page, first + count) == 0 {
            count += 1;
        }
        if count == 0 {
            // Counted beyond the end of the file (space that another program had set aside): pass over it.
            self.end.set(first + 1);
            return self.allocate_cached(max);
        }
        self.end.set(first + count);
        if self.left_in_page(first) == count {
            self.scan_due.set(true);
        }
        self.claim(&page, first, count)?;
        Ok(Some(Run { first, count, zeroed: self.storage.limits().grows_zeroed }))
    }

    fn scan_is_due(&self) -> bool {
        self.scan_due.get() && self.scanned.get() < self.scan_end
    }

    fn left_in_page(&self, cluster: u64) -> u64 {
        let per_page = 1 << self.refcounts.page_bits();
        per_page - (cluster & (per_page - 1))
    }

    fn claim(&self, page: &Rc<Page>, first: u64, count: u64) -> Result<()> {
        let metadata = self.metadata.borrow();
        for cluster in first..first + count {
            if metadata.contains(&cluster) {
                return Err(Fault::MetadataUncounted { cluster }.into());
            }
            self.refcounts.set(page, cluster, 1);
        }
        Ok(())
    }

    /// Clusters in a row at the end of the file for a table. Their space reads as zero.
    pub(super) async fn allocate_table(&self, count: u64) -> Result<u64> {
        let _slow = self.slow.lock().await;
        self.allocate_table_locked(count).await
    }

    async fn allocate_table_locked(&self, count: u64) -> Result<u64> {
        // One cluster may come from what was freed, as long as it reads as zero.
        if count == 1
            && self.storage.limits().grows_zeroed
            && let Some(first) = self.first_zeroed()
        {
            let page = self.refcounts.page(first).await?.ok_or(Fault::RefcountMissing { cluster: first })?;
            // Nobody else takes clusters but under `slow`, or by `allocate_cached`, which may have been faster.
            let taken = self.zeroed.borrow_mut().take(1);
            if let Some((first, _)) = taken {
                let page = if page_holds(&self.refcounts, first, &page) {
                    page
                } else {
                    self.refcounts.page(first).await?.ok_or(Fault::RefcountMissing { cluster: first })?
                };
                self.claim(&page, first, 1)?;
                self.metadata.borrow_mut().insert(first);
                return Ok(first);
            }
        }
        loop {
            let first = self.end.get();
            self.ensure_counted(first, count).await?;
            let mut pages = Vec::new();
            for cluster in first..first + count {
                if pages.last().is_none_or(|page| !page_holds(&self.refcounts, cluster, page)) {
                    pages.push(self.refcounts.page(cluster).await?.ok_or(Fault::RefcountMissing { cluster })?);
                }
            }
            if self.end.get() != first {
                continue; // Somebody took the clusters while the pages were loaded.
            }
            let in_use = (first..first + count).rev().find(|&cluster| {
                let page = pages.iter().find(|page| page_holds(&self.refcounts, cluster, page));
                page.is_none_or(|page| self.refcounts.get(page, cluster) != 0)
            });
            if let Some(cluster) = in_use {
                self.end.set(cluster + 1);
                continue;
            }
            self.end.set(first + count);
            for cluster in first..first + count {
                let page = pages.iter().find(|page| page_holds(&self.refcounts, cluster, page));
                self.claim(page.expect("loaded above"), cluster, 1)?;
                self.metadata.borrow_mut().insert(cluster);
            }
            self.cover(first + count).await?;
            self.zero_table(first, count).await?;
            return Ok(first);
        }
    }

    /// Has a new table's clusters read as zero.
    async fn zero_table(&self, first: u64, count: u64) -> Result<()> {
        if self.storage.limits().grows_zeroed {
            return Ok(());
        }
        self.storage
            .write(first << self.cluster_bits, Buf::zeroed((count << self.cluster_bits) as usize))
            .await
            .map(drop)
    }

    /// Makes the file long enough for clusters below `end`, and for some more. Callers hold `slow`.
    ///
    /// Nothing is ever written beyond the end of the file but in its last, incomplete cluster, so this cannot cut
    /// off what a write is adding at the same time.
    async fn cover(&self, end: u64) -> Result<()> {
        if end <= self.covered.get() {
            return Ok(());
        }
        let ahead = (self.end_offset() / 8).clamp(GROW_MIN, GROW_MAX);
        let wanted = ((end << self.cluster_bits) + ahead).next_multiple_of(1 << self.cluster_bits);
        if !self.storage.limits().grows_zeroed {
            return Err(DiskError::new(ErrorKind::NoSpace, Operation::Write)
                .on(self.storage.name())
                .because("the device is full: all its clusters are in use"));
        }
        self.storage.set_size(wanted).await?;
        self.covered.set(wanted >> self.cluster_bits);
        Ok(())
    }

    /// Cuts off what the file was made longer than it needs to be. No request is under way.
    pub(super) async fn trim_file(&self) -> Result<()> {
        let needed = self.end_offset();
        if self.covered.get() << self.cluster_bits > needed && self.storage.size() > needed {
            let _slow = self.slow.lock().await;
            self.storage.set_size(needed).await?;
            self.covered.set(self.end.get());
        }
        Ok(())
    }

    /// Sees to it that refcount blocks for these clusters at the end exist and their first page is in memory.
    /// May move the end. Callers hold `slow`.
    async fn ensure_counted(&self, first: u64, count: u64) -> Result<()> {
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
            self.cover(cluster + 1).await?;
            self.zero_table(cluster, 1).await?;
            self.refcounts.add_block(block, cluster << self.cluster_bits);
            if counts_itself {
                let page = self.refcounts.page(cluster).await?.expect("the block was just made");
                self.refcounts.set(&page, cluster, 1);
            }
            return Ok(());
        }
    }

    /// Moves the refcount table to a larger place.
    ///
    /// Crash: the new table and all it leads to are synced before the header's 12 bytes (one sector)
    /// switch to it; before the switch the old table is whole, apart from blocks for clusters that
    /// nothing on the storage refers to yet.
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
        self.refcounts.grow_table(wanted);
        let clusters = (wanted / per_cluster) as u64;
        let first = self.allocate_table_locked(clusters).await?;
        let offset = first << self.cluster_bits;
        self.refcounts.write_pages().await?;
        self.storage.write(offset, self.refcounts.encode_table()).await?;
        self.storage.sync().await?;
        // Header bytes 48–59: refcount_table_offset, refcount_table_clusters.
        let mut fields = Vec::with_capacity(12);
        fields.extend_from_slice(&offset.to_be_bytes());
        fields.extend_from_slice(&(clusters as u32).to_be_bytes());
        self.storage.write(48, Buf::copy_of(&fields)).await?;
        self.storage.sync().await?;
        self.refcounts.moved_table(offset);
        let old_first = old.0 >> self.cluster_bits;
        for cluster in old_first..old_first + old.1 as u64 {
            self.metadata.borrow_mut().remove(&cluster);
            self.release(cluster).await?;
        }
        Ok(())
    }

    /// Held while the refcount table is written or moved.
    pub(super) async fn hold_tables(&self) -> async_lock::MutexGuard<'_, ()> {
        self.slow.lock().await
    }

    /// Puts clusters whose unlinking is durable into limbo.
    pub(super) fn retire(&self, clusters: impl IntoIterator<Item = u64>, epochs: &Epochs) {
        let mut limbo = self.limbo.borrow_mut();
        let before = limbo.len();
        let stamp = epochs.advance();
        limbo.extend(clusters.into_iter().map(|cluster| (stamp, cluster)));
        debug_assert!(limbo.len() >= before);
    }

    /// Whether clusters wait in limbo.
    pub(super) fn has_limbo(&self) -> bool {
        !self.limbo.borrow().is_empty()
    }

    /// Frees what nobody uses any more.
    pub(super) async fn drain_limbo(&self, epochs: &Epochs) -> Result<()> {
        loop {
            let next = {
                let mut limbo = self.limbo.borrow_mut();
                match limbo.front() {
                    Some(&(stamp, cluster)) if epochs.is_over(stamp) => {
                        limbo.pop_front();
                        cluster
                    }
                    _ => return Ok(()),
                }
            };
            self.release(next).await?;
        }
    }

    /// Takes a reference away; nobody uses the offset for that reference any more.
    ///
    /// Never the last one of a table that is in use: an image that leads there as if to data would have it punched.
    pub(super) async fn release(&self, cluster: u64) -> Result<()> {
        if self.metadata.borrow().contains(&cluster) && self.refcounts.count(cluster).await? <= 1 {
            return Err(Fault::MetadataUncounted { cluster }.into());
        }
        let left = self.refcounts.decrement(cluster).await?;
        // What lies in the part that nobody has looked through yet is found there.
        let to_be_scanned = cluster >= self.scanned.get() && cluster < self.scan_end;
        if left == 0 && !to_be_scanned {
            self.stale.borrow_mut().add(cluster, 1);
        }
        Ok(())
    }

    /// Punches holes into free space, so that it is given back and reads as zero.
    ///
    /// Crash: a hole that is lost shows old bytes in space that no durable table refers to; a flush syncs the
    /// hole before any table that refers to it.
    pub(super) async fn punch_stale(&self) -> Result<()> {
        loop {
            let next = self.stale.borrow_mut().take(u64::MAX);
            let Some((first, count)) = next else { return Ok(()) };
            self.punch(first, count).await?;
        }
    }

    async fn punch(&self, first: u64, count: u64) -> Result<()> {
        let range = ByteRange::new(first << self.cluster_bits, count << self.cluster_bits);
        if self.storage.limits().grows_zeroed {
            // Not `discard`, which leaves what is less than the storage's own block.
            self.storage.write_zeroes(range, ZeroMode { unmap: true, fast_only: false }).await?;
        }
        // On other storage the space is `zeroed` in name only: `Run::zeroed` says so.
        self.zeroed.borrow_mut().add(first, count);
        Ok(())
    }

    /// Looks through some pages of reference counts for clusters that an earlier opener freed.
    async fn scan(&self) -> Result<()> {
        self.scan_due.set(false);
        let per_page = 1 << self.refcounts.page_bits();
        for _ in 0..SCAN_PAGES {
            let first = self.scanned.get();
            if first >= self.scan_end {
                return Ok(());
            }
            let end = ((first / per_page + 1) * per_page).min(self.scan_end);
            let page = self.refcounts.page(first).await?;
            // No waiting between the look and the mark, or a cluster freed meanwhile would be added twice.
            let mut found = false;
            if let Some(page) = page {
                let metadata = self.metadata.borrow();
                let mut stale = self.stale.borrow_mut();
                for cluster in first..end {
                    if self.refcounts.get(&page, cluster) == 0 && !metadata.contains(&cluster) {
                        stale.add(cluster, 1);
                        found = true;
                    }
                }
            }
            self.scanned.set(end);
            if found {
                return Ok(());
            }
        }
        Ok(())
    }
}

fn page_holds(refcounts: &Refcounts, cluster: u64, page: &Rc<Page>) -> bool {
    refcounts.cached(cluster).is_some_and(|held| Rc::ptr_eq(&held, page))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn free_runs_join() {
        let mut runs = FreeRuns::default();
        runs.add(5, 1);
        runs.add(7, 2);
        runs.add(6, 1);
        assert_eq!(runs.0.len(), 1);
        assert_eq!(runs.take(3), Some((5, 3)));
        assert_eq!(runs.take(3), Some((8, 1)));
        assert_eq!(runs.take(3), None);
    }
}
