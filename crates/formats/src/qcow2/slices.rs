//! The L2 tables in memory, cut into slices.
//!
//! A slice is up to 4 KiB of one L2 table: the unit in which tables are read, kept and written. The active
//! L1 table is always in memory; slices come and go. A slice is reached by two array look-ups, because this
//! happens for every request of the guest.

use super::entry::{COMPRESSED, COPIED, L2Entry, OFFSET_MASK};
use disk::Buf;
use std::cell::{Cell, RefCell};
use std::rc::Rc;

/// Largest slice in bytes.
const SLICE_BYTES: u64 = 4096;

/// The arithmetic of an image's L2 tables.
#[derive(Clone, Copy, Debug)]
pub(super) struct SliceGeometry {
    pub(super) cluster_bits: u32,
    /// Entries are 16 bytes long and carry subcluster bitmaps.
    pub(super) extended: bool,
    /// log2 of the entries per slice.
    pub(super) entries_bits: u32,
    /// log2 of the slices per L2 table.
    pub(super) slices_bits: u32,
}

impl SliceGeometry {
    pub(super) fn new(cluster_bits: u32, extended: bool) -> Self {
        let entry_bits = if extended { 4 } else { 3 };
        let slice_bits = cluster_bits.min(SLICE_BYTES.trailing_zeros());
        Self { cluster_bits, extended, entries_bits: slice_bits - entry_bits, slices_bits: cluster_bits - slice_bits }
    }

    /// Bytes of a slice.
    pub(super) fn slice_bytes(self) -> usize {
        1 << (self.entries_bits + if self.extended { 4 } else { 3 })
    }

    /// Which slice, counted over the whole disk, maps a guest offset.
    pub(super) fn slice_of(self, guest: u64) -> u64 {
        guest >> (self.cluster_bits + self.entries_bits)
    }

    /// Which entry of its slice maps a guest offset.
    pub(super) fn entry_of(self, guest: u64) -> usize {
        (guest >> self.cluster_bits) as usize & ((1 << self.entries_bits) - 1)
    }

    /// Which L1 entry leads to a slice.
    pub(super) fn l1_of(self, slice: u64) -> usize {
        (slice >> self.slices_bits) as usize
    }

    /// The slice's byte offset within its L2 table.
    pub(super) fn offset_in_table(self, slice: u64) -> u64 {
        (slice & ((1 << self.slices_bits) - 1)) * self.slice_bytes() as u64
    }

    /// First guest offset that a slice maps.
    pub(super) fn guest_of(self, slice: u64) -> u64 {
        slice << (self.cluster_bits + self.entries_bits)
    }
}

/// Part of an L2 table in memory.
#[derive(Debug)]
pub(super) struct Slice {
    pub(super) index: u64,
    extended: bool,
    /// Native byte order; extended entries take two words.
    words: Box<[Cell<u64>]>,
    /// Differs from the image, and is on the list of what the next flush writes.
    dirty: Cell<bool>,
    /// Used since the eviction hand passed.
    used: Cell<bool>,
}

impl Slice {
    /// From the bytes of the table. `has_data_file` says whether a cluster can be at offset 0; else an entry that leads
    /// there has none, whatever its COPIED flag says.
    pub(super) fn parse(index: u64, extended: bool, has_data_file: bool, bytes: &[u8]) -> Self {
        let step = if extended { 2 } else { 1 };
        let word = |(n, bytes): (usize, &[u8; 8])| {
            let word = u64::from_be_bytes(*bytes);
            let is_empty = n % step == 0 && !has_data_file && word & (COMPRESSED | OFFSET_MASK) == 0;
            Cell::new(if is_empty { word & !COPIED } else { word })
        };
        let words = bytes.as_chunks::<8>().0.iter().enumerate().map(word).collect();
        Self { index, extended, words, dirty: Cell::new(false), used: Cell::new(true) }
    }

    pub(super) fn encode(&self) -> Buf {
        let mut buf = Buf::new(self.words.len() * 8);
        for (bytes, word) in buf.as_chunks_mut::<8>().0.iter_mut().zip(&self.words) {
            *bytes = word.get().to_be_bytes();
        }
        buf
    }

    pub(super) fn entries(&self) -> usize {
        if self.extended { self.words.len() / 2 } else { self.words.len() }
    }

    #[inline]
    pub(super) fn get(&self, entry: usize) -> L2Entry {
        if self.extended {
            L2Entry { descriptor: self.words[entry * 2].get(), bitmap: self.words[entry * 2 + 1].get() }
        } else {
            L2Entry { descriptor: self.words[entry].get(), bitmap: 0 }
        }
    }
}

/// The slices of one L2 table, those in memory.
type TableSlices = Box<[Option<Rc<Slice>>]>;

/// All slices in memory, bounded.
#[derive(Debug)]
pub(super) struct Slices {
    pub(super) geometry: SliceGeometry,
    /// By L1 index, then by slice within the table.
    by_l1: RefCell<Vec<Option<TableSlices>>>,
    /// The same slices in the order in which the eviction hand goes round.
    ring: RefCell<Vec<Rc<Slice>>>,
    hand: Cell<usize>,
    dirty: RefCell<Vec<Rc<Slice>>>,
    limit: usize,
}

impl Slices {
    /// Keeps up to about `cache_bytes` of slices.
    pub(super) fn new(geometry: SliceGeometry, l1_entries: usize, cache_bytes: u64) -> Self {
        let limit = (cache_bytes / geometry.slice_bytes() as u64).clamp(16, 1 << 24) as usize;
        Self {
            geometry,
            by_l1: RefCell::new((0..l1_entries).map(|_| None).collect()),
            ring: RefCell::default(),
            hand: Cell::new(0),
            dirty: RefCell::default(),
            limit,
        }
    }

    /// Makes room for a changed number of L1 entries; slices beyond are dropped.
    pub(super) fn resize(&self, l1_entries: usize) {
        let mut by_l1 = self.by_l1.borrow_mut();
        by_l1.resize_with(l1_entries, || None);
        let keep = |slice: &Rc<Slice>| self.geometry.l1_of(slice.index) < l1_entries;
        self.ring.borrow_mut().retain(keep);
        self.dirty.borrow_mut().retain(keep);
        self.hand.set(0);
    }

    /// Drops the slices of an L2 table that is gone.
    pub(super) fn forget_table(&self, l1_index: usize) {
        self.by_l1.borrow_mut()[l1_index] = None;
        let keep = |slice: &Rc<Slice>| self.geometry.l1_of(slice.index) != l1_index;
        self.ring.borrow_mut().retain(keep);
        self.dirty.borrow_mut().retain(keep);
    }

    /// The slice, if it is in memory.
    #[inline]
    pub(super) fn with<R>(&self, index: u64, then: impl FnOnce(&Slice) -> R) -> Option<R> {
        let by_l1 = self.by_l1.borrow();
        let table = by_l1.get(self.geometry.l1_of(index))?.as_ref()?;
        let slice = table[index as usize & ((1 << self.geometry.slices_bits) - 1)].as_ref()?;
        slice.used.set(true);
        Some(then(slice))
    }

    /// The slice, if it is in memory, kept there while the caller holds it.
    pub(super) fn get(&self, index: u64) -> Option<Rc<Slice>> {
        let by_l1 = self.by_l1.borrow();
        let table = by_l1.get(self.geometry.l1_of(index))?.as_ref()?;
        let slice = table[index as usize & ((1 << self.geometry.slices_bits) - 1)].as_ref()?;
        slice.used.set(true);
        Some(Rc::clone(slice))
    }

    /// Puts a slice in place; there is none of its index.
    pub(super) fn insert(&self, slice: Slice) -> Rc<Slice> {
        self.evict();
        let slice = Rc::new(slice);
        let mut by_l1 = self.by_l1.borrow_mut();
        let table = by_l1[self.geometry.l1_of(slice.index)]
            .get_or_insert_with(|| (0..1usize << self.geometry.slices_bits).map(|_| None).collect());
        let place = &mut table[slice.index as usize & ((1 << self.geometry.slices_bits) - 1)];
        debug_assert!(place.is_none(), "a slice is loaded once");
        *place = Some(Rc::clone(&slice));
        self.ring.borrow_mut().push(Rc::clone(&slice));
        slice
    }

    /// Changes an entry.
    pub(super) fn set(&self, slice: &Rc<Slice>, entry: usize, to: L2Entry) {
        if slice.extended {
            slice.words[entry * 2].set(to.descriptor);
            slice.words[entry * 2 + 1].set(to.bitmap);
        } else {
            slice.words[entry].set(to.descriptor);
        }
        self.mark_dirty(slice);
    }

    /// Has the next flush write it.
    pub(super) fn mark_dirty(&self, slice: &Rc<Slice>) {
        if !slice.dirty.replace(true) {
            self.dirty.borrow_mut().push(Rc::clone(slice));
        }
    }

    /// Takes the list of what must be written; the slices count as clean from now on.
    pub(super) fn take_dirty(&self) -> Vec<Rc<Slice>> {
        let list = std::mem::take(&mut *self.dirty.borrow_mut());
        for slice in &list {
            slice.dirty.set(false);
        }
        list
    }

    pub(super) fn has_dirty(&self) -> bool {
        !self.dirty.borrow().is_empty()
    }

    /// More dirty slices than half the bound: a flush must make some clean before more are loaded.
    pub(super) fn needs_flush(&self) -> bool {
        self.dirty.borrow().len() > self.limit / 2
    }

    /// Drops clean slices that nobody holds until the bound is kept. Second chance for those used lately.
    fn evict(&self) {
        let mut ring = self.ring.borrow_mut();
        let mut by_l1 = self.by_l1.borrow_mut();
        // Twice round at most: the first round takes the marks off.
        let mut steps = 2 * ring.len();
        while ring.len() >= self.limit && steps > 0 {
            steps -= 1;
            let hand = self.hand.get() % ring.len();
            let slice = &ring[hand];
            // One reference from the table, one from the ring.
            if slice.used.replace(false) || slice.dirty.get() || Rc::strong_count(slice) > 2 {
                self.hand.set(hand + 1);
                continue;
            }
            let slice = ring.swap_remove(hand);
            let l1 = self.geometry.l1_of(slice.index);
            let table = by_l1[l1].as_mut().expect("a slice in the ring is in its table");
            table[slice.index as usize & ((1 << self.geometry.slices_bits) - 1)] = None;
            if table.iter().all(Option::is_none) {
                by_l1[l1] = None;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn slice(index: u64) -> Slice {
        Slice::parse(index, false, false, &[0; 4096])
    }

    #[test]
    fn arithmetic() {
        let g = SliceGeometry::new(16, false);
        assert_eq!((g.slice_bytes(), g.entries_bits, g.slices_bits), (4096, 9, 4));
        let guest = (5 << 29) + (3 << 25) + (7 << 16) + 123;
        assert_eq!(g.l1_of(g.slice_of(guest)), 5);
        assert_eq!(g.offset_in_table(g.slice_of(guest)), 3 * 4096);
        assert_eq!(g.entry_of(guest), 7);
        let g = SliceGeometry::new(9, false);
        assert_eq!((g.slice_bytes(), g.slices_bits), (512, 0));
        let g = SliceGeometry::new(16, true);
        assert_eq!((g.slice_bytes(), g.entries_bits, g.slices_bits), (4096, 8, 4));
    }

    #[test]
    fn eviction_spares_dirty_and_held() {
        let slices = Slices::new(SliceGeometry::new(16, false), 1000, 0);
        let held = slices.insert(slice(0));
        let dirty = slices.insert(slice(1));
        slices.set(&dirty, 5, L2Entry::data(0x10000, 0));
        drop(dirty);
        for index in 2..100 {
            slices.insert(slice(index));
        }
        assert!(slices.ring.borrow().len() <= 17);
        assert!(slices.get(0).is_some() && slices.get(1).is_some());
        assert_eq!(slices.take_dirty().len(), 1);
        assert!(!slices.has_dirty());
        assert_eq!(slices.get(1).map(|s| s.get(5).host()), Some(0x10000));
        drop(held);
    }
}
