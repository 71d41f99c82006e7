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
//! A sync costs more than all else that a parked write takes, so writes wait for company: for a pause, or until many wait,
//! or somebody waits for one of them.
//!
//! Kill: a record that is whole was perhaps not written to the image, or not all of it; putting it back writes the same
//! bytes once more. A later write to the same bytes is issued only when the record is gone.
//! Power cut: the lot is gone, and with it what no flush had made durable.

use super::Tracked;
use crate::HistoryError;
use disk::{Buf, ByteRange, Disk, LocalFuture, Result, WriteFlags};
use event_listener::Event;
use futures_util::future::select;
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::future::poll_fn;
use std::rc::Rc;
use std::task::Poll;

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

/// Waits for as long as a parked write may wait for others that share its sync.
pub type Pause = Rc<dyn Fn() -> LocalFuture<'static, ()>>;

/// Parked writes that are started before others have their turn.
const AT_A_TIME: usize = 32;

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
    /// Somebody waits for a parked write, or many writes are parked: no waiting for more.
    hurried: Cell<bool>,
    hurry: Event,
    pub(super) lot: RefCell<Option<Place>>,
    pub(super) free: RefCell<Vec<usize>>,
    /// By their offsets; they do not overlap.
    parked: RefCell<BTreeMap<u64, Parked>>,
    any: Cell<bool>,
    /// How many could not be written.
    failed: Cell<usize>,
    left: Event,
}

/// Where writes are parked, and who sees to them.
#[derive(Clone)]
pub(super) struct Place {
    lot: Rc<dyn ParkingLot>,
    spawn: Spawn,
    pause: Pause,
}

impl Parking {
    /// Whether any write is parked. The hot path's question.
    pub(super) fn any(&self) -> bool {
        self.any.get()
    }

    /// The disk is being written to, or was just now.
    pub(super) fn sign(&self) {
        if self.any()
            && let Some(place) = &*self.lot.borrow()
        {
            place.lot.sign();
        }
    }

    /// Whether anything parked overlaps the range.
    pub(super) fn overlaps(&self, range: ByteRange) -> bool {
        self.any() && self.overlapping(range).is_some()
    }

    /// What is parked is to be written now.
    pub(super) fn hurry(&self) {
        if self.any() && !self.hurried.replace(true) {
            self.hurry.notify(usize::MAX);
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
        drop(parked);
        if let Some(Parked { slot, failed, .. }) = gone {
            self.failed.set(self.failed.get() - usize::from(failed));
            self.free.borrow_mut().push(slot);
        }
        self.left.notify(usize::MAX);
    }

    fn set_failed(&self, offset: u64, failed: bool) {
        if let Some(parked) = self.parked.borrow_mut().get_mut(&offset) {
            let before = std::mem::replace(&mut parked.failed, failed);
            self.failed.set(self.failed.get() + usize::from(failed) - usize::from(before));
        }
    }
}

impl<D: Disk> Tracked<D> {
    /// Answers first writes to a granule early from now on. They wait for `pause` at most before their intents are
    /// written.
    pub fn park_in(&self, lot: Rc<dyn ParkingLot>, spawn: Spawn, pause: Pause) {
        *self.parking.free.borrow_mut() = (0..lot.slots()).rev().collect();
        *self.parking.lot.borrow_mut() = Some(Place { lot, spawn, pause });
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
        let Some(Place { lot, spawn, .. }) = self.parking.lot.borrow().clone() else { return Err(buf) };
        if buf.len() > lot.slot_bytes() || self.parking.failed.get() > 0 || self.history.is_stopped() {
            return Err(buf);
        }
        let slot = self.parking.free.borrow_mut().pop();
        let Some(slot) = slot else {
            self.parking.hurry(); // So that there is room soon.
            return Err(buf);
        };
        if !lot.put(slot, range.offset(), &buf) {
            self.parking.free.borrow_mut().push(slot);
            return Err(buf);
        }
        self.parking.parked.borrow_mut().insert(range.offset(), Parked { end: range.end(), slot, failed: false });
        self.parking.any.set(true);
        self.parking.waiting.borrow_mut().push(Waiting { range, slot, key, buf });
        if self.parking.waiting.borrow().len() * 2 >= lot.slots() {
            self.parking.hurry();
        }
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
            let place = self.parking.lot.borrow().clone();
            let any = !self.parking.waiting.borrow().is_empty();
            let Some(Place { spawn, pause, .. }) = place.filter(|_| any) else {
                return self.parking.attended.set(false);
            };
            self.wait_for_company(&pause).await;
            self.parking.hurried.set(false);
            let batch = std::mem::take(&mut *self.parking.waiting.borrow_mut());
            let ranges: Vec<ByteRange> = batch.iter().map(|write| write.range).collect();
            // A failure is found again by each write, which keeps it.
            if let Err(error) = self.history.declare_all(&ranges, true).await {
                tracing::debug!(%error, "parked writes could not be declared");
            }
            for (n, Waiting { range, slot, key, buf }) in batch.into_iter().enumerate() {
                if n % AT_A_TIME == AT_A_TIME - 1 {
                    give_way().await;
                }
                let this = Rc::clone(&self);
                spawn(Box::pin(async move {
                    let _request = this.owned_request(key);
                    let written = this.write_parked(range, buf).await;
                    this.leave(range, slot, written);
                }));
            }
        }
    }

    /// Waits until more writes have come, if nobody is in a hurry.
    async fn wait_for_company(&self, pause: &Pause) {
        let hurry = self.parking.hurry.listen();
        if !self.parking.hurried.get() {
            select(pause(), hurry).await;
        }
    }

    async fn write_parked(&self, range: ByteRange, buf: Buf) -> Result<()> {
        if !self.history.is_marked(range) {
            self.history.declare(range).await?;
        }
        if self.views.any() {
            self.preserve(range).await;
        }
        self.inner.write(range.offset(), buf, WriteFlags::default()).await
    }

    /// Ends a parked write: forgets it, or notes that it could not be written.
    fn leave(&self, range: ByteRange, slot: usize, written: Result<()>) {
        let Some(Place { lot, .. }) = self.parking.lot.borrow().clone() else { return };
        match written {
            Ok(()) if lot.clear(slot) => return self.parking.remove(range.offset()),
            Ok(()) => {
                tracing::error!("a parked write cannot be forgotten; the disk takes no more writes to these bytes");
            }
            Err(error) => {
                tracing::error!(%error, %range, "a write that was answered cannot be done yet; it is kept and tried again");
            }
        }
        self.parking.set_failed(range.offset(), true);
        self.parking.left.notify(usize::MAX);
    }

    /// Tries again to write what could not be written.
    async fn retry(&self, offset: u64, parked: Parked) -> Result<()> {
        let Some(Place { lot, .. }) = self.parking.lot.borrow().clone() else { return Ok(()) };
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
        self.parking.set_failed(offset, false);
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
            self.parking.hurry();
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

/// Lets others on this thread have their turn.
async fn give_way() {
    let mut gave_way = false;
    poll_fn(|cx| {
        if std::mem::replace(&mut gave_way, true) {
            return Poll::Ready(());
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    })
    .await;
}
