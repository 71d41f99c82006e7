//! Which clusters of the image file are free, and who gets them.
//!
//! New clusters come, in this order, from space that was freed (after a hole was punched where the storage
//! can), and from the end of the file. Space that reads as zero matters: a small write into it needs no filling of
//! the rest of its cluster, and no wait before it is linked (see `write.rs`).
//!
//! Space may run out at any step. What was taken for a table that could not be made is *given up*: it keeps its
//! count in memory and is freed at the close, so that nothing else changes.
//!
//! The life of a cluster that is freed:
//! 1. *unlinked*: no table in memory refers to it any more; tables on the storage may (`flush.rs` keeps
//!    the list).
//! 2. *limbo*: the unlinking is durable. Requests that began before may still use the offset; its
//!    reference still counts.
//! 3. *free*: these requests have ended; the reference is gone (in memory first; a crash leaves a leak).

mod free_runs;
mod growth;

use self::free_runs::FreeRuns;
use super::epochs::Epochs;
use super::fault::Fault;
use super::refcounts::{Page, Refcounts};
use disk::{Buf, ByteRange, DiskError, ErrorKind, Operation, Result, StorageHandle, ZeroMode};
use std::cell::{Cell, RefCell};
use std::collections::{HashSet, VecDeque};
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
    /// Tables that were read lead to clusters below this number. Beyond `covered` in an image whose file is shorter
    /// than what it maps (after a loss of power, or cut by a copy): such clusters read as zero, and the file must
    /// reach over them before they are written, so that it is never made shorter behind a guest's bytes.
    mapped_end: Cell<u64>,
    /// A table leads to where no count can be, so every write is checked.
    mapped_astray: Cell<bool>,
    /// Clusters below this number may have been freed by an earlier opener, and from `scanned` on nobody has looked.
    scan_end: u64,
    scanned: Cell<u64>,
    /// Time for another portion of the scan: one per refcount page of new space.
    scan_due: Cell<bool>,
    /// Free, and made ready to be given out.
    ready: RefCell<FreeRuns>,
    /// What is in `ready` reads as zero: the storage can make holes.
    ready_is_zeroed: Cell<bool>,
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
    /// The refcount table is being moved; if that fails, what it adds is forgotten, so nobody else may take clusters.
    growing: Cell<bool>,
    /// The image's: nobody knows what is on the storage.
    poisoned: Rc<Cell<bool>>,
}

impl Allocator {
    /// `metadata` are the clusters of all tables; `poisoned` is set when the image must not be written any more.
    pub(super) async fn open(
        refcounts: Refcounts,
        storage: StorageHandle,
        cluster_bits: u32,
        metadata: HashSet<u64>,
        poisoned: Rc<Cell<bool>>,
    ) -> Result<Self> {
        let grows = storage.limits().grows_zeroed;
        let (end, covered) = if grows {
            let end = storage.size().div_ceil(1 << cluster_bits);
            (end, end)
        } else {
            // A device is longer than what is in use of it: only the counts tell how far that goes.
            let counted = refcounts.last_counted().await?.into_iter();
            let end = counted.chain(metadata.iter().copied()).max().map_or(0, |last| last + 1);
            (end, storage.size() >> cluster_bits)
        };
        Ok(Self {
            refcounts,
            storage,
            cluster_bits,
            end: Cell::new(end),
            covered: Cell::new(covered),
            mapped_end: Cell::new(0),
            mapped_astray: Cell::new(false),
            scan_end: end,
            scanned: Cell::new(0),
            scan_due: Cell::new(true),
            ready: RefCell::default(),
            ready_is_zeroed: Cell::new(grows),
            stale: RefCell::default(),
            limbo: RefCell::default(),
            given_up: RefCell::default(),
            metadata: RefCell::new(metadata),
            slow: async_lock::Mutex::new(()),
            growing: Cell::new(false),
            poisoned,
        })
    }

    /// Whether a cluster can have a count, as long as the refcount table does not grow.
    pub(super) fn reaches(&self, cluster: u64) -> bool {
        cluster < self.refcounts.first_of_block(self.refcounts.table_len() as u64)
    }

    /// A table that was read leads to clusters below this number.
    pub(super) fn note_mapped(&self, end: u64) {
        if self.reaches(end - 1) {
            self.mapped_end.set(self.mapped_end.get().max(end));
        } else {
            self.mapped_astray.set(true);
        }
    }

    /// Whether the file is long enough for everything that tables are known to lead to.
    #[inline]
    pub(super) fn covers_mapped(&self) -> bool {
        self.mapped_end.get() <= self.covered.get() && !self.mapped_astray.get()
    }

    /// Makes the file long enough for everything that tables are known to lead to.
    pub(super) async fn cover_mapped(&self) -> Result<()> {
        if self.mapped_end.get() <= self.covered.get() {
            return Ok(());
        }
        let _slow = self.slow.lock().await;
        self.cover(self.mapped_end.get()).await
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
            self.make_ready().await?;
            if let Some(first) = self.first_ready() {
                self.refcounts.page(first).await?;
                continue;
            }
            self.ensure_counted(self.end.get(), 1).await?;
            self.cover(self.end.get() + max.min(self.left_in_page(self.end.get()))).await?;
        }
    }

    /// Makes some freed space ready, if there is none and some can be found. Callers hold `slow`.
    async fn make_ready(&self) -> Result<()> {
        if self.ready.borrow().is_empty() && self.stale.borrow().is_empty() {
            self.scan().await?;
        }
        let stale = self.stale.borrow_mut().take(PUNCH_CLUSTERS);
        if let Some((first, count)) = stale {
            self.punch(first, count).await;
        }
        Ok(())
    }

    fn first_ready(&self) -> Option<u64> {
        self.ready.borrow().first()
    }

    /// As [`Allocator::allocate`], when memory alone can tell.
    pub(super) fn allocate_cached(&self, max: u64) -> Result<Option<Run>> {
        if self.growing.get() {
            return Ok(None);
        }
        if let Some(first) = self.first_ready() {
            let Some(page) = self.refcounts.cached(first) else { return Ok(None) };
            let in_page = self.left_in_page(first);
            let (first, count) = self.ready.borrow_mut().take(max.min(in_page)).expect("the first was just seen");
            self.claim(&page, first, count)?;
            return Ok(Some(Run { first, count, zeroed: self.ready_is_zeroed.get() }));
        }
        if !self.stale.borrow().is_empty() || self.scan_is_due() {
            return Ok(None);
        }
        let (page, first, limit) = loop {
            let first = self.end.get();
            let Some(page) = self.refcounts.cached(first) else { return Ok(None) };
            let limit = self.left_in_page(first).min(self.covered.get().saturating_sub(first));
            if limit == 0 {
                return Ok(None);
            }
            // Counted beyond the end of the file (space that another program had set aside): pass over it.
            match (first..first + limit).find(|cluster| self.refcounts.get(&page, *cluster) == 0) {
                Some(free) => break (page, free, max.min(first + limit - free)),
                None => self.end.set(first + limit),
            }
        };
        let mut count = 1;
        while count < limit && self.refcounts.get(&page, first + count) == 0 {
            count += 1;
        }
        self.end.set(first + count);
        if self.left_in_page(first) == count {
            self.scan_due.set(true);
        }
        self.claim(&page, first, count)?;
        Ok(Some(Run { first, count, zeroed: self.storage.limits().grows_zeroed }))
    }

    fn scan_is_due(&self) -> bool {
        self.scan_due.get() && self.scan_is_unfinished()
    }

    fn scan_is_unfinished(&self) -> bool {
        self.scanned.get() < self.scan_end
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
        // One cluster may come from what was freed; on a device that has been used to its end it must.
        if count == 1 {
            if !self.storage.limits().grows_zeroed && self.end.get() >= self.covered.get() {
                while self.first_ready().is_none() && (self.scan_is_unfinished() || !self.stale.borrow().is_empty()) {
                    self.make_ready().await?;
                }
            }
            if let Some(first) = self.first_ready() {
                let page = self.refcounts.page(first).await?.ok_or(Fault::RefcountMissing { cluster: first })?;
                // Nobody else takes clusters but under `slow`, or by `allocate_cached`, which may have been faster.
                let taken = self.ready.borrow_mut().take(1);
                if let Some((first, _)) = taken {
                    let page = if page_holds(&self.refcounts, first, &page) {
                        page
                    } else {
                        self.refcounts.page(first).await?.ok_or(Fault::RefcountMissing { cluster: first })?
                    };
                    self.claim(&page, first, 1)?;
                    self.metadata.borrow_mut().insert(first);
                    let zeroed = self.zero_table(first, 1, self.ready_is_zeroed.get()).await;
                    return self.given_up_on_error(first, 1, zeroed);
                }
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
            let settled = self.settle_table(first, count).await;
            return self.given_up_on_error(first, count, settled);
        }
    }

    /// Has the file reach over a new table's clusters at its end, and these read as zero.
    async fn settle_table(&self, first: u64, count: u64) -> Result<()> {
        self.cover(first + count).await?;
        self.zero_table(first, count, self.storage.limits().grows_zeroed).await
    }

    /// Passes a new table's place on, or gives it up.
    fn given_up_on_error(&self, first: u64, count: u64, result: Result<()>) -> Result<u64> {
        match result {
            Ok(()) => Ok(first),
            Err(error) => {
                self.give_up_table(first, count);
                Err(error)
            }
        }
    }

    /// Takes a table's clusters back to which nothing leads; their counts fall at the close.
    pub(super) fn give_up_table(&self, first: u64, count: u64) {
        for cluster in first..first + count {
            self.metadata.borrow_mut().remove(&cluster);
            self.given_up.borrow_mut().push(cluster);
        }
    }

    /// Has a new table's clusters read as zero, unless they do already.
    async fn zero_table(&self, first: u64, count: u64, is_zero: bool) -> Result<()> {
        if is_zero {
            return Ok(());
        }
        self.storage
            .write(first << self.cluster_bits, Buf::zeroed((count << self.cluster_bits) as usize))
            .await
            .map(drop)
    }

    /// Makes the file long enough for clusters below `end`, and for some more. Callers hold `slow`.
    ///
    /// Nothing is ever written beyond the end of the file but in its last, incomplete cluster (`mapped_end` sees to
    /// that), so this cannot cut off what a write is adding at the same time. A device does for as long as there is one
    /// cluster left.
    async fn cover(&self, end: u64) -> Result<()> {
        if end <= self.covered.get() {
            return Ok(());
        }
        if !self.storage.limits().grows_zeroed {
            if self.end.get() < self.covered.get() && self.mapped_end.get() <= self.covered.get() {
                return Ok(());
            }
            return Err(DiskError::new(ErrorKind::NoSpace, Operation::Write).on(self.storage.name()).because(format!(
                "the device of {} bytes has no free cluster left; make it larger, or move the image",
                self.storage.size()
            )));
        }
        let ahead = (self.end_offset() / 8).clamp(GROW_MIN, GROW_MAX);
        let whole = (1 << self.cluster_bits).max(u64::from(self.storage.limits().alignment));
        let end = end.max(self.mapped_end.get());
        let wanted = ((end << self.cluster_bits) + ahead).next_multiple_of(whole).max(self.storage.size());
        if wanted > self.storage.size() {
            self.storage.set_size(wanted).await?;
        }
        self.covered.set(wanted >> self.cluster_bits);
        Ok(())
    }

    /// Cuts off what the file was made longer than it needs to be. No request is under way.
    pub(super) async fn trim_file(&self) -> Result<()> {
        let end = self.end.get().max(self.mapped_end.get());
        let needed = end << self.cluster_bits;
        if self.storage.limits().grows_zeroed && self.covered.get() > end && self.storage.size() > needed {
            let _slow = self.slow.lock().await;
            self.storage.set_size(needed).await?;
            self.covered.set(end);
        }
        Ok(())
    }

    /// Makes everything durable that was written. A sync that failed is never repeated.
    pub(super) async fn sync(&self) -> Result<()> {
        self.storage.sync().await.inspect_err(|_| self.poisoned.set(true))
    }

    /// Held while the refcount table is written or moved.
    pub(super) async fn hold_tables(&self) -> async_lock::MutexGuard<'_, ()> {
        self.slow.lock().await
    }

    /// Puts clusters whose unlinking is durable into limbo.
    pub(super) fn retire(&self, clusters: impl IntoIterator<Item = u64>, epochs: &Epochs) {
        let mut limbo = self.limbo.borrow_mut();
        let stamp = epochs.advance();
        limbo.extend(clusters.into_iter().map(|cluster| (stamp, cluster)));
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
        if cluster >= self.end.get() {
            // Beyond the file's end, counted by another program: found when the end comes there.
            return Ok(());
        }
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
    pub(super) async fn punch_stale(&self) {
        loop {
            let next = self.stale.borrow_mut().take(u64::MAX);
            let Some((first, count)) = next else { return };
            self.punch(first, count).await;
        }
    }

    /// Makes freed space ready. Where no hole can be made the space is good all the same: it is filled by whoever
    /// gets it.
    async fn punch(&self, first: u64, count: u64) {
        let range = ByteRange::new(first << self.cluster_bits, count << self.cluster_bits);
        if self.ready_is_zeroed.get() {
            // Not `discard`, which leaves what is less than the storage's own block.
            let mode = ZeroMode { unmap: true, fast_only: true };
            if let Err(error) = self.storage.write_zeroes(range, mode).await {
                tracing::info!(image = self.storage.name(), %error, "freed space is kept: no hole can be made");
                self.ready_is_zeroed.set(false);
            }
        }
        self.ready.borrow_mut().add(first, count);
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
