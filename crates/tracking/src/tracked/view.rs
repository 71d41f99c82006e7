//! A disk as it was at one instant, while its guest writes on.
//!
//! Before the first change of a granule after the instant its old bytes are copied into a store that has a bound. Readers of the view
//! find them there, and everything else on the disk itself. The guest waits for that copy, and never for a reader; when the
//! store is full, or fails, the view ends and the guest goes on.
//!
//! Why a reader sees no new byte: a granule is called saved before the change is issued. A reader that has read the disk
//! looks again whether the granule was saved meanwhile; if not, no change of it had been issued when it looked.

use super::Tracked;
use crate::run_map::RunMap;
use disk::{
    Buf, ByteRange, Disk, DiskError, DiskExtent, DiskGeometry, DiskHandle, ErrorKind, Operation, Result, StorageHandle,
    WriteFlags, ZeroMode,
};
use event_listener::Event;
use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::rc::{Rc, Weak};

/// Granules that one answer looks at, at most.
const RUN: u64 = 1024;

/// The store of a view, and what is in it.
pub(super) struct Preserved {
    store: StorageHandle,
    /// Most bytes in the store.
    limit: u64,
    /// Bytes of the disk at the instant.
    size: u64,
    granule_bits: u32,
    /// Where a granule's old bytes are; `None` while they are being copied.
    slots: RefCell<HashMap<u64, Option<u64>>>,
    /// Granules that were zero.
    zero: RefCell<RunMap<()>>,
    next_slot: Cell<u64>,
    copied: Event,
    ended: RefCell<Option<String>>,
}

/// Where a granule's old bytes are.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Place {
    /// On the disk still.
    Disk,
    /// In the store, from there.
    Store(u64),
    /// Nowhere: they are zero.
    Zero,
}

impl Preserved {
    fn granule(&self) -> u64 {
        1 << self.granule_bits
    }

    /// The bytes of a granule, as far as the disk had them.
    fn range_of(&self, granule: u64) -> ByteRange {
        ByteRange::new(granule << self.granule_bits, self.granule()).intersect(ByteRange::new(0, self.size))
    }

    fn place(&self, granule: u64) -> Place {
        if self.zero.borrow().get(granule).is_some() {
            return Place::Zero;
        }
        match self.slots.borrow().get(&granule) {
            Some(Some(offset)) => Place::Store(*offset),
            // A change waits for the copy: it has not been issued.
            Some(None) | None => Place::Disk,
        }
    }

    fn end(&self, reason: String) {
        if self.ended.borrow().is_none() {
            tracing::warn!(reason, "a view of an instant ends");
            *self.ended.borrow_mut() = Some(reason);
        }
        self.slots.borrow_mut().clear();
        self.zero.borrow_mut().clear();
        self.copied.notify(usize::MAX);
    }

    fn has_ended(&self) -> bool {
        self.ended.borrow().is_some()
    }

    fn refuse_if_ended(&self, operation: Operation) -> Result<()> {
        match &*self.ended.borrow() {
            Some(reason) => Err(DiskError::new(ErrorKind::Io, operation)
                .because(format!("the view has ended: {reason}; take a new mark"))),
            None => Ok(()),
        }
    }

    /// Saves what the disk holds in a range that is about to change.
    async fn save<D: Disk>(&self, disk: &D, range: ByteRange) {
        let range = range.intersect(ByteRange::new(0, self.size));
        if range.is_empty() || self.has_ended() {
            return;
        }
        let (mut at, end) = (range.offset() >> self.granule_bits, ((range.end() - 1) >> self.granule_bits) + 1);
        while at < end && !self.has_ended() {
            if let Some((until, ())) = self.zero.borrow().get(at) {
                at = until;
                continue;
            }
            let known = self.slots.borrow().get(&at).copied();
            match known {
                Some(Some(_)) => at += 1,
                Some(None) => {
                    let copied = self.copied.listen();
                    if self.slots.borrow().get(&at) == Some(&None) {
                        copied.await;
                    }
                }
                None => at = self.save_from(disk, at, end).await,
            }
        }
    }

    /// Saves a granule, or a run of granules that are zero; returns where to go on.
    async fn save_from<D: Disk>(&self, disk: &D, granule: u64, end: u64) -> u64 {
        // Others wait for this granule from here on.
        self.slots.borrow_mut().insert(granule, None);
        let result = self.copy(disk, granule, end).await;
        let next = match result {
            Ok(next) => next,
            Err(reason) => {
                self.end(reason);
                end
            }
        };
        self.copied.notify(usize::MAX);
        next
    }

    async fn copy<D: Disk>(&self, disk: &D, granule: u64, end: u64) -> std::result::Result<u64, String> {
        let failed = |error: DiskError| format!("the old bytes could not be saved ({error})");
        let range = self.range_of(granule);
        let wanted = ByteRange::between(range.offset(), (end << self.granule_bits).min(self.size));
        let extent = disk.map(wanted).await.map_err(failed)?;
        if extent.zero && extent.range.contains(range) {
            let until = match extent.range.end() == self.size {
                true => end,
                false => extent.range.end() >> self.granule_bits,
            };
            let mut slots = self.slots.borrow_mut();
            let mut zero = self.zero.borrow_mut();
            slots.remove(&granule);
            // Granules that others have saved, or are saving, stay as they are.
            let mut at = granule;
            while at < until && !slots.contains_key(&at) {
                at += 1;
            }
            zero.insert(granule, at, ());
            return Ok(at);
        }
        let slot = self.next_slot.get();
        if slot + self.granule() > self.limit {
            return Err(format!("its store of {} bytes is full", self.limit));
        }
        self.next_slot.set(slot + self.granule());
        let bytes = disk.read(range.offset(), Buf::new(range.len() as usize)).await.map_err(failed)?;
        self.store.write(slot, bytes).await.map_err(failed)?;
        if !self.has_ended() {
            self.slots.borrow_mut().insert(granule, Some(slot));
        }
        Ok(granule + 1)
    }
}

/// The disk as it was at one instant; read-only.
pub struct View<D> {
    disk: Rc<D>,
    preserved: Rc<Preserved>,
}

impl<D: Disk> View<D> {
    /// Why it has ended, if it has.
    pub fn ended(&self) -> Option<String> {
        self.preserved.ended.borrow().clone()
    }

    /// Bytes in the store.
    pub fn stored(&self) -> u64 {
        self.preserved.next_slot.get()
    }

    /// Most bytes in the store.
    pub fn limit(&self) -> u64 {
        self.preserved.limit
    }

    fn read_only<T>(&self, operation: Operation) -> Result<T> {
        Err(DiskError::new(ErrorKind::ReadOnly, operation))
    }

    /// The first run of granules in one place, within the range, and the place.
    fn run(&self, range: ByteRange) -> (ByteRange, Place) {
        let bits = self.preserved.granule_bits;
        let mut granule = range.offset() >> bits;
        let place = self.preserved.place(granule);
        let mut end = (granule + 1) << bits;
        let last = granule + RUN;
        while end < range.end() && granule < last {
            granule += 1;
            let next = self.preserved.place(granule);
            let goes_on = match (place, next) {
                (Place::Disk, Place::Disk) | (Place::Zero, Place::Zero) => true,
                // Slots are read one by one.
                _ => false,
            };
            if !goes_on {
                break;
            }
            end = (granule + 1) << bits;
        }
        (ByteRange::between(range.offset(), end.min(range.end())), place)
    }

    /// Whether all of the range is on the disk still.
    fn is_on_disk(&self, range: ByteRange) -> bool {
        let (run, place) = self.run(range);
        place == Place::Disk && run == range
    }
}

impl<D: Disk> Disk for View<D> {
    fn geometry(&self) -> DiskGeometry {
        DiskGeometry { size: self.preserved.size, read_only: true, ..self.disk.geometry() }
    }

    async fn read(&self, offset: u64, buf: Buf) -> Result<Buf> {
        let mut rest = ByteRange::new(offset, buf.len() as u64);
        let mut left = buf;
        let mut done: Option<Buf> = None;
        while !rest.is_empty() {
            self.preserved.refuse_if_ended(Operation::Read)?;
            let (run, place) = self.run(rest);
            let after = left.split_off(run.len() as usize);
            let mut piece = left;
            left = after;
            piece = match place {
                Place::Zero => {
                    piece.fill(0);
                    piece
                }
                Place::Store(slot) => {
                    let within = run.offset() & (self.preserved.granule() - 1);
                    self.preserved.store.read(slot + within, piece).await?
                }
                Place::Disk => {
                    let read = self.disk.read(run.offset(), piece).await?;
                    if !self.is_on_disk(run) {
                        // Some of it was saved meanwhile, and what was read may be new: once more.
                        left = if left.is_empty() { read } else { read.join(left) };
                        continue;
                    }
                    read
                }
            };
            rest = rest.skip(run.len());
            done = Some(match done {
                Some(front) => front.join(piece),
                None => piece,
            });
        }
        // What was read before the end of the view may be of any time.
        self.preserved.refuse_if_ended(Operation::Read)?;
        Ok(done.unwrap_or_else(|| Buf::new(0)))
    }

    async fn write(&self, _offset: u64, _buf: Buf, _flags: WriteFlags) -> Result<()> {
        self.read_only(Operation::Write)
    }

    async fn write_zeroes(&self, _range: ByteRange, _mode: ZeroMode, _flags: WriteFlags) -> Result<()> {
        self.read_only(Operation::WriteZeroes)
    }

    async fn discard(&self, _range: ByteRange, _flags: WriteFlags) -> Result<()> {
        self.read_only(Operation::Discard)
    }

    async fn flush(&self) -> Result<()> {
        Ok(())
    }

    async fn map(&self, range: ByteRange) -> Result<DiskExtent> {
        loop {
            self.preserved.refuse_if_ended(Operation::Map)?;
            let (run, place) = self.run(range);
            let told = |zero: bool| DiskExtent {
                range: run,
                allocated: !zero,
                zero,
                compressed: false,
                depth: Some(0),
                source: None,
            };
            return match place {
                Place::Zero => Ok(told(true)),
                Place::Store(_) => Ok(told(false)),
                Place::Disk => {
                    let extent = self.disk.map(run).await?;
                    if !self.is_on_disk(extent.range) {
                        continue;
                    }
                    self.preserved.refuse_if_ended(Operation::Map)?;
                    Ok(DiskExtent { source: None, ..extent })
                }
            };
        }
    }

    async fn resize(&self, _size: u64) -> Result<()> {
        self.read_only(Operation::Resize)
    }

    async fn close(&self) -> Result<()> {
        self.preserved.end("it was closed".to_owned());
        Ok(())
    }
}

/// The views of one disk.
#[derive(Default)]
pub(super) struct Views {
    list: RefCell<Vec<Weak<Preserved>>>,
    any: Cell<bool>,
}

impl Views {
    /// Whether a change must look at views at all.
    pub(super) fn any(&self) -> bool {
        self.any.get()
    }

    fn alive(&self) -> Vec<Rc<Preserved>> {
        let mut list = self.list.borrow_mut();
        list.retain(|view| view.upgrade().is_some_and(|view| !view.has_ended()));
        self.any.set(!list.is_empty());
        list.iter().filter_map(Weak::upgrade).collect()
    }

    /// Ends all: the disk is closed.
    pub(super) fn end_all(&self, reason: &str) {
        self.alive().iter().for_each(|view| view.end(reason.to_owned()));
    }
}

impl<D: Disk> Tracked<D> {
    /// A view of this instant, into that store. No request is under way.
    pub(super) fn view_now(&self, store: StorageHandle, limit: u64) -> View<D> {
        let preserved = Rc::new(Preserved {
            store,
            limit,
            size: self.inner.geometry().size,
            granule_bits: self.history.granule_bits,
            slots: RefCell::default(),
            zero: RefCell::default(),
            next_slot: Cell::new(0),
            copied: Event::new(),
            ended: RefCell::default(),
        });
        self.views.list.borrow_mut().push(Rc::downgrade(&preserved));
        self.views.any.set(true);
        View { disk: Rc::clone(&self.inner), preserved }
    }

    /// Saves for all views what a range holds that is about to change.
    pub(super) async fn preserve(&self, range: ByteRange) {
        for view in self.views.alive() {
            view.save(&*self.inner, range).await;
        }
    }
}

/// A view behind a handle, for servers of disks.
impl<D: Disk> From<View<D>> for DiskHandle {
    fn from(view: View<D>) -> Self {
        Self::new(view)
    }
}
