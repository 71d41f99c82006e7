//! The reference counts in memory (specification: "Host cluster management").
//!
//! The refcount table is always in memory; refcount blocks are read, kept and written in pages of up to
//! 4 KiB. Changes stay in memory until a flush writes them (see `flush.rs` for the order and why).

use super::fault::Fault;
use super::refcount_bits;
use disk::{Buf, Result, StorageHandle};
use std::cell::{Cell, RefCell};
use std::collections::{BTreeSet, HashMap};
use std::rc::Rc;

/// Largest page in bytes.
const PAGE_BYTES: u64 = 4096;
/// Pages kept in memory, about; 2,048 of them count 256 GiB of an image with default geometry.
const PAGES_MAX: usize = 2048;
/// Largest refcount table in bytes, as QEMU has it.
pub(super) const TABLE_BYTES_MAX: u64 = 8 << 20;

/// Part of a refcount block in memory.
#[derive(Debug)]
pub(super) struct Page {
    index: u64,
    bytes: RefCell<Box<[u8]>>,
    dirty: Cell<bool>,
}

/// The reference counts of an image.
#[derive(Debug)]
pub(super) struct Refcounts {
    storage: StorageHandle,
    cluster_bits: u32,
    order: u32,
    /// Entries are host offsets of refcount blocks, 0 where there is none.
    table: RefCell<Vec<u64>>,
    table_offset: Cell<u64>,
    dirty_entries: RefCell<BTreeSet<usize>>,
    pages: RefCell<HashMap<u64, Rc<Page>>>,
    dirty_pages: RefCell<Vec<Rc<Page>>>,
    loading: async_lock::Mutex<()>,
}

impl Refcounts {
    pub(super) fn new(
        storage: StorageHandle,
        cluster_bits: u32,
        order: u32,
        table: Vec<u64>,
        table_offset: u64,
    ) -> Self {
        Self {
            storage,
            cluster_bits,
            order,
            table: RefCell::new(table),
            table_offset: Cell::new(table_offset),
            dirty_entries: RefCell::default(),
            pages: RefCell::default(),
            dirty_pages: RefCell::default(),
            loading: async_lock::Mutex::new(()),
        }
    }

    /// Largest count that an entry can hold.
    pub(super) fn max(&self) -> u64 {
        if self.order == 6 { u64::MAX } else { (1 << (1 << self.order)) - 1 }
    }

    /// log2 of the entries per refcount block.
    fn block_bits(&self) -> u32 {
        self.cluster_bits + 3 - self.order
    }

    /// log2 of the entries per page.
    pub(super) fn page_bits(&self) -> u32 {
        self.cluster_bits.min(PAGE_BYTES.trailing_zeros()) + 3 - self.order
    }

    fn page_bytes(&self) -> usize {
        1 << self.cluster_bits.min(PAGE_BYTES.trailing_zeros())
    }

    /// Which refcount block counts a cluster.
    pub(super) fn block_of(&self, cluster: u64) -> u64 {
        cluster >> self.block_bits()
    }

    /// The first cluster that a block counts.
    pub(super) fn first_of_block(&self, block: u64) -> u64 {
        block << self.block_bits()
    }

    /// Whether a refcount block stands in the cluster. Looks through the whole table.
    pub(super) fn is_block(&self, cluster: u64) -> bool {
        self.table.borrow().contains(&(cluster << self.cluster_bits))
    }

    /// Number of table entries.
    pub(super) fn table_len(&self) -> usize {
        self.table.borrow().len()
    }

    /// Where the table stands.
    pub(super) fn table_offset(&self) -> u64 {
        self.table_offset.get()
    }

    /// Host offset of the refcount block for a cluster; `None` where there is none.
    pub(super) fn block_offset(&self, cluster: u64) -> Option<u64> {
        let at = usize::try_from(self.block_of(cluster)).ok()?;
        self.table.borrow().get(at).copied().filter(|offset| *offset != 0)
    }

    /// Host offset of a page; `None` where its block does not exist.
    fn page_offset(&self, page: u64) -> Option<u64> {
        let block = self.block_offset(page << self.page_bits())?;
        let within = page & ((1 << (self.block_bits() - self.page_bits())) - 1);
        Some(block + within * self.page_bytes() as u64)
    }

    /// Enters a new refcount block into the table. Its bytes on the storage are zero, but if it is to count itself it
    /// does so from the first moment.
    pub(super) fn add_block(&self, block: u64, offset: u64) {
        let at = block as usize;
        self.table.borrow_mut()[at] = offset;
        self.dirty_entries.borrow_mut().insert(at);
        let cluster = offset >> self.cluster_bits;
        if self.block_of(cluster) == block {
            let page = self.insert(cluster >> self.page_bits(), vec![0; self.page_bytes()].into());
            self.set(&page, cluster, 1);
        }
    }

    fn insert(&self, index: u64, bytes: Box<[u8]>) -> Rc<Page> {
        let page = Rc::new(Page { index, bytes: RefCell::new(bytes), dirty: Cell::new(false) });
        let mut pages = self.pages.borrow_mut();
        if pages.len() >= PAGES_MAX {
            pages.retain(|_, page| page.dirty.get() || Rc::strong_count(page) > 1);
        }
        pages.insert(index, Rc::clone(&page));
        page
    }

    /// Makes the table in memory longer; the caller moves it to a new place.
    pub(super) fn grow_table(&self, len: usize) {
        self.table.borrow_mut().resize(len, 0);
    }

    /// The table as it is to be written to its new place.
    pub(super) fn encode_table(&self) -> Buf {
        let table = self.table.borrow();
        let mut buf = Buf::new(table.len() * 8);
        for (bytes, entry) in buf.as_chunks_mut::<8>().0.iter_mut().zip(table.iter()) {
            *bytes = entry.to_be_bytes();
        }
        buf
    }

    /// Undoes [`Refcounts::grow_table`] before the table moved: forgets entries from `len` on, and the blocks behind
    /// them. Nothing that anybody holds is counted there.
    pub(super) fn shrink_table(&self, len: usize) {
        self.table.borrow_mut().truncate(len);
        self.dirty_entries.borrow_mut().retain(|entry| *entry < len);
        let is_kept = |page: u64| self.block_of(page << self.page_bits()) < len as u64;
        self.pages.borrow_mut().retain(|index, _| is_kept(*index));
        self.dirty_pages.borrow_mut().retain(|page| is_kept(page.index));
    }

    /// The table was written whole at its new place.
    pub(super) fn moved_table(&self, offset: u64) {
        self.table_offset.set(offset);
        self.dirty_entries.borrow_mut().clear();
    }

    /// The page that counts a cluster, if it is in memory.
    pub(super) fn cached(&self, cluster: u64) -> Option<Rc<Page>> {
        self.pages.borrow().get(&(cluster >> self.page_bits())).cloned()
    }

    /// The page that counts a cluster; `None` where no refcount block does.
    pub(super) async fn page(&self, cluster: u64) -> Result<Option<Rc<Page>>> {
        if let Some(page) = self.cached(cluster) {
            return Ok(Some(page));
        }
        // One at a time, so that a page cannot be loaded, changed, written and dropped while another load
        // of it, begun before, is still on its way.
        let _one = self.loading.lock().await;
        if let Some(page) = self.cached(cluster) {
            return Ok(Some(page));
        }
        let index = cluster >> self.page_bits();
        let Some(offset) = self.page_offset(index) else { return Ok(None) };
        if offset & ((1 << self.cluster_bits.min(12)) - 1) != 0 {
            return Err(Fault::RefcountBlockUnaligned { offset }.into());
        }
        let bytes = self.storage.read_new(offset, self.page_bytes()).await?;
        Ok(Some(self.insert(index, bytes.to_vec().into())))
    }

    fn index_in_page(&self, cluster: u64) -> usize {
        (cluster & ((1 << self.page_bits()) - 1)) as usize
    }

    /// A cluster's count, from its page.
    pub(super) fn get(&self, page: &Page, cluster: u64) -> u64 {
        debug_assert_eq!(page.index, cluster >> self.page_bits());
        refcount_bits::get(&page.bytes.borrow(), self.order, self.index_in_page(cluster))
    }

    /// Changes a cluster's count in its page; the next flush writes it.
    pub(super) fn set(&self, page: &Rc<Page>, cluster: u64, count: u64) {
        debug_assert_eq!(page.index, cluster >> self.page_bits());
        debug_assert!(count <= self.max());
        refcount_bits::set(&mut page.bytes.borrow_mut(), self.order, self.index_in_page(cluster), count);
        self.mark_dirty(page);
    }

    fn mark_dirty(&self, page: &Rc<Page>) {
        if !page.dirty.replace(true) {
            self.dirty_pages.borrow_mut().push(Rc::clone(page));
        }
    }

    /// The highest cluster with a count other than 0; `None` when there is none.
    pub(super) async fn last_counted(&self) -> Result<Option<u64>> {
        for block in (0..self.table_len() as u64).rev() {
            let first = block << self.block_bits();
            if self.block_offset(first).is_none() {
                continue;
            }
            let pages = 1u64 << (self.block_bits() - self.page_bits());
            for page in (0..pages).rev() {
                let first = first + (page << self.page_bits());
                let Some(page) = self.page(first).await? else { continue };
                let counted = (first..first + (1 << self.page_bits())).rev().find(|c| self.get(&page, *c) != 0);
                if counted.is_some() {
                    return Ok(counted);
                }
            }
        }
        Ok(None)
    }

    /// A cluster's count; 0 where no refcount block counts it.
    pub(super) async fn count(&self, cluster: u64) -> Result<u64> {
        Ok(self.page(cluster).await?.map_or(0, |page| self.get(&page, cluster)))
    }

    /// Takes one reference away; returns those left.
    pub(super) async fn decrement(&self, cluster: u64) -> Result<u64> {
        let page = self.page(cluster).await?.ok_or(Fault::RefcountMissing { cluster })?;
        let count = self.get(&page, cluster);
        if count == 0 {
            return Err(Fault::RefcountMissing { cluster }.into());
        }
        self.set(&page, cluster, count - 1);
        Ok(count - 1)
    }

    /// Whether pages or table entries wait to be written.
    pub(super) fn has_dirty(&self) -> bool {
        !self.dirty_pages.borrow().is_empty() || self.has_dirty_table()
    }

    /// Whether table entries wait to be written.
    pub(super) fn has_dirty_table(&self) -> bool {
        !self.dirty_entries.borrow().is_empty()
    }

    /// More dirty pages than half the bound.
    pub(super) fn needs_flush(&self) -> bool {
        self.dirty_pages.borrow().len() > PAGES_MAX / 2
    }

    /// Writes the changed pages. Not durable before a sync. Pages whose write failed wait for the next call.
    pub(super) async fn write_pages(&self) -> Result<()> {
        let dirty = std::mem::take(&mut *self.dirty_pages.borrow_mut());
        let mut writes = Vec::with_capacity(dirty.len());
        for page in &dirty {
            page.dirty.set(false);
            let offset = self.page_offset(page.index).expect("a page in memory has its block");
            let bytes = Buf::copy_of(&page.bytes.borrow());
            writes.push((offset, bytes));
        }
        let written = super::flush::write_all(&self.storage, writes).await;
        if written.is_err() {
            for page in &dirty {
                self.mark_dirty(page);
            }
        }
        drop(dirty); // Held so far: a page that was dropped would be read again before it is written.
        written
    }

    /// Writes the changed table entries, in whole sectors. Not durable before a sync. What failed waits for the next
    /// call.
    pub(super) async fn write_table(&self) -> Result<()> {
        let dirty = std::mem::take(&mut *self.dirty_entries.borrow_mut());
        let sectors: BTreeSet<usize> = dirty.iter().map(|entry| entry / 64).collect();
        let mut writes = Vec::with_capacity(sectors.len());
        {
            let table = self.table.borrow();
            for sector in sectors {
                let mut buf = Buf::zeroed(512);
                for (bytes, entry) in buf.as_chunks_mut::<8>().0.iter_mut().zip(&table[sector * 64..]) {
                    *bytes = entry.to_be_bytes();
                }
                writes.push((self.table_offset.get() + sector as u64 * 512, buf));
            }
        }
        let written = super::flush::write_all(&self.storage, writes).await;
        if written.is_err() {
            self.dirty_entries.borrow_mut().extend(dirty);
        }
        written
    }
}
