//! Writes that are answered while their intents are on the way to the journal.
//!
//! The first write to a granule in an epoch must not reach the image before its intent is durable, and that takes a
//! sync: milliseconds, where the write itself takes microseconds. A guest need not wait for it, for a write that was
//! answered is not durable before a flush anyway. So the bytes are put into a **parking lot**, the write is answered,
//! and goes to the image when the intent is durable.
//!
//! The lot is memory that outlives this process, but not the machine: exactly as long as the page cache would keep a write.
//! So a guest that lives on when this process is killed finds its writes again: whoever opens the disk next puts
//! them back ([`Tracked::put_back`]).
//!
//! What touches a parked range waits until it has left: reads, writes, zeroes, questions. A flush waits for all.
//!
//! Kill: a record that is whole was perhaps not written to the image, or not all of it; putting it back writes the same
//! bytes once more. A later write to the same bytes is issued only when the record is gone.
//! Power cut: the lot is gone, and with it what no flush had made durable.

use super::Tracked;
use crate::HistoryError;
use disk::{Buf, ByteRange, Disk, LocalFuture, Result, WriteFlags};
use event_listener::Event;
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;

/// Memory that outlives the process: slots for one write each.
pub trait ParkingLot: 'static {
    /// How many slots there are.
    fn slots(&self) -> usize;
    /// Bytes of the longest write that a slot takes.
    fn slot_bytes(&self) -> usize;
    /// Keeps a write; it outlives the process when this returns. `false`: it does not.
    fn put(&self, slot: usize, offset: u64, bytes: &[u8]) -> bool;
    /// The bytes in a slot.
    fn get(&self, slot: usize) -> Option<Vec<u8>>;
    /// Forgets what is in a slot. `false`: it is still there.
    fn clear(&self, slot: usize) -> bool;
    /// Something else is written to the disk while writes are parked: how old the lot is tells whether somebody else did.
    fn sign(&self) {}
}

/// Starts a task on the disk's thread.
pub type Spawn = Rc<dyn Fn(LocalFuture<'static, ()>)>;

/// A parked write.
#[derive(Clone, Copy, Debug)]
struct Parked {
    end: u64,
    slot: usize,
    /// It could not be written to the image.
    failed: bool,
}

/// A parked write that waits for its intent.
struct Waiting {
    range: ByteRange,
    slot: usize,
    /// Of the request, which is under way until the bytes are in the image.
    key: usize,
    buf: Buf,
}

/// The parked writes of one disk.
#[derive(Default)]
pub(super) struct Parking {
    waiting: RefCell<Vec<Waiting>>,
    /// Whether a task sees to those that wait.
    attended: Cell<bool>,
    pub(super) lot: RefCell<Option<(Rc<dyn ParkingLot>, Spawn)>>,
    pub(super) free: RefCell<Vec<usize>>,
    /// By their offsets; they do not overlap.
    parked: RefCell<BTreeMap<u64, Parked>>,
    any: Cell<bool>,
    any_failed: Cell<bool>,
    left: Event,
}

impl Parking {
    /// Whether any write is parked. The hot path's question.
    pub(super) fn any(&self) -> bool {
        self.any.get()
    }

    /// The disk is being written to, or was just now.
    pub(super) fn sign(&self) {
        if self.any()
            && let Some((lot, _)) = &*self.lot.borrow()
        {
            lot.sign();
        }
    }

    fn overlapping(&self, range: ByteRange) -> Option<(u64, Parked)> {
        let parked = self.parked.borrow();
        let (offset, found) = parked.range(..range.end()).next_back()?;
        (found.end > range.offset()).then_some((*offset, *found))
    }

    fn remove(&self, offset: u64) {
        let mut parked = self.parked.borrow_mut();
        let gone = parked.remove(&offset);
        self.any.set(!parked.is_empty());
        self.any_failed.set(parked.values().any(|p| p.failed));
        drop(parked);
        if let Some(Parked { slot, .. }) = gone {
            self.free.borrow_mut().push(slot);
        }
        self.left.notify(usize::MAX);
    }
}

impl<D: Disk> Tracked<D> {
    /// Answers first writes to a granule early from now on.
    pub fn park_in(&self, lot: Rc<dyn ParkingLot>, spawn: Spawn) {
        *self.parking.free.borrow_mut() = (0..lot.slots()).rev().collect();
        *self.parking.lot.borrow_mut() = Some((lot, spawn));
    }

    /// Writes what an earlier process had parked, and makes it durable. Before the disk is used.
    ///
    /// # Errors
    /// When the disk cannot be written; then the lot is to be kept.
    pub async fn put_back(&self, parked: Vec<(u64, Vec<u8>)>) -> std::result::Result<(), HistoryError> {
        let size = self.inner.geometry().size;
        for (offset, bytes) in parked {
            if ByteRange::checked(offset, bytes.len() as u64)
                .is_some_and(|range| range.end() <= size && !bytes.is_empty())
            {
                Disk::write(self, offset, Buf::copy_of(&bytes), WriteFlags::default()).await?;
            }
        }
        Ok(Disk::flush(self).await?)
    }

    /// Parks a write whose intent is still to be made durable, and has it done; gives the bytes back where that is not
    /// possible. Nothing parked overlaps the range.
    pub(super) fn park(self: &Rc<Self>, range: ByteRange, key: usize, buf: Buf) -> std::result::Result<(), Buf> {
        let Some((lot, spawn)) = self.parking.lot.borrow().clone() else { return Err(buf) };
        if buf.len() > lot.slot_bytes() || self.parking.any_failed.get() || self.history.is_stopped() {
            return Err(buf);
        }
        let Some(slot) = self.parking.free.borrow_mut().pop() else { return Err(buf) };
        if !lot.put(slot, range.offset(), &buf) {
            self.parking.free.borrow_mut().push(slot);
            return Err(buf);
        }
        self.parking.parked.borrow_mut().insert(range.offset(), Parked { end: range.end(), slot, failed: false });
        self.parking.any.set(true);
        self.parking.waiting.borrow_mut().push(Waiting { range, slot, key, buf });
        if !self.parking.attended.replace(true) {
            let this = Rc::clone(self);
            spawn(Box::pin(async move { this.attend().await }));
        }
        Ok(())
    }

    /// Makes the intents of all that wait durable, sends them to the image, and looks again: what came meanwhile shares the
    /// next sync.
    async fn attend(self: Rc<Self>) {
        loop {
            let batch = std::mem::take(&mut *self.parking.waiting.borrow_mut());
            let lot = self.parking.lot.borrow().clone();
            let Some((_, spawn)) = lot.filter(|_| !batch.is_empty()) else {
                return self.parking.attended.set(false);
            };
            let ranges: Vec<ByteRange> = batch.iter().map(|write| write.range).collect();
            // A failure is found again by each write, which keeps it.
            if let Err(error) = self.history.declare_all(&ranges, true).await {
                tracing::debug!(%error, "parked writes could not be declared");
            }
            for Waiting { range, slot, key, buf } in batch {
                let this = Rc::clone(&self);
                spawn(Box::pin(async move {
                    let _request = this.owned_request(key);
                    let written = this.write_parked(range, buf).await;
                    this.leave(range, slot, written);
                }));
            }
        }
    }

    async fn write_parked(&self, range: ByteRange, buf: Buf) -> Result<()> {
        self.history.declare(range).await?;
        if self.views.any() {
            self.preserve(range).await;
        }
        self.inner.write(range.offset(), buf, WriteFlags::default()).await
    }

    /// Ends a parked write: forgets it, or notes that it could not be written.
    fn leave(&self, range: ByteRange, slot: usize, written: Result<()>) {
        let Some((lot, _)) = self.parking.lot.borrow().clone() else { return };
        let failed = match written {
            Ok(()) if lot.clear(slot) => return self.parking.remove(range.offset()),
            Ok(()) => {
                tracing::error!("a parked write cannot be forgotten; the disk takes no more writes to these bytes");
                true
            }
            Err(error) => {
                tracing::error!(%error, %range, "a write that was answered cannot be done yet; it is kept and tried again");
                true
            }
        };
        if let Some(parked) = self.parking.parked.borrow_mut().get_mut(&range.offset()) {
            parked.failed = failed;
        }
        self.parking.any_failed.set(true);
        self.parking.left.notify(usize::MAX);
    }

    /// Tries again to write what could not be written.
    async fn retry(&self, offset: u64, parked: Parked) -> Result<()> {
        let Some((lot, _)) = self.parking.lot.borrow().clone() else { return Ok(()) };
        let range = ByteRange::between(offset, parked.end);
        let Some(bytes) = lot.get(parked.slot) else {
            let reason = "the bytes of a write that was answered before are gone from the memory where they were kept";
            return Err(disk::DiskError::new(disk::ErrorKind::Io, disk::Operation::Write)
                .at(range)
                .because(reason.to_owned()));
        };
        // Nobody else is to try at the same time, and a mark waits: the caller is a request itself, or holds all requests.
        let key = self.under_way.borrow_mut().insert(range);
        let _request = self.owned_request(key);
        if let Some(entry) = self.parking.parked.borrow_mut().get_mut(&offset) {
            entry.failed = false;
        }
        let written = self.write_parked(range, Buf::copy_of(&bytes)).await;
        let told = match &written {
            Ok(()) => Ok(()),
            Err(error) => Err(disk::DiskError::new(error.kind(), error.operation())
                .at(range)
                .because(format!("a write that was answered before could not be done: {error}"))),
        };
        self.leave(range, parked.slot, written);
        told
    }

    /// Waits until nothing parked overlaps the range, for who is no request that changes bytes. What cannot be written is
    /// tried again, so no instant may pass meanwhile.
    ///
    /// # Errors
    /// As [`Tracked::wait_for_parked`].
    pub(super) async fn wait_for_parked_to_read(&self, range: ByteRange) -> Result<()> {
        let _request = self.enter(ByteRange::new(range.offset(), 0)).await;
        self.wait_for_parked(range).await
    }

    /// Waits until nothing parked overlaps the range. Within a request, or while requests are held.
    ///
    /// # Errors
    /// When a parked write there cannot be done.
    pub(super) async fn wait_for_parked(&self, range: ByteRange) -> Result<()> {
        while let Some((offset, parked)) = self.parking.overlapping(range) {
            if parked.failed {
                self.retry(offset, parked).await?;
                continue;
            }
            let left = self.parking.left.listen();
            if self.parking.overlapping(range).is_some_and(|(at, p)| at == offset && !p.failed) {
                left.await;
            }
        }
        Ok(())
    }

    /// Waits until all that is parked now has been written. Within a request, or while requests are held.
    ///
    /// # Errors
    /// When a parked write cannot be done.
    pub(super) async fn wait_for_all_parked(&self) -> Result<()> {
        let mut result = Ok(());
        let now: Vec<(u64, u64)> = self.parking.parked.borrow().iter().map(|(offset, p)| (*offset, p.end)).collect();
        for (offset, end) in now {
            result = result.and(self.wait_for_parked(ByteRange::between(offset, end)).await);
        }
        result
    }
}
