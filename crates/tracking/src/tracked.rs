//! The decorator: a disk whose changes are recorded.

mod mark;
mod parking;
mod requests;
mod still;
mod view;
mod zeroing;

pub use mark::{Held, NewPoint, UncommittedPoint};
pub use parking::{ParkingLot, Pause, Spawn};
pub use still::Still;
pub use view::View;

use crate::epoch_marks::Run;
use crate::history::History;
use crate::{ChangeKind, HistoryError};
use disk::{
    Buf, ByteRange, Disk, DiskError, DiskExtent, DiskGeometry, ErrorKind, Operation, Result, WriteFlags, ZeroMode,
};
use event_listener::Event;
use futures_util::future::Either;
use parking::Parking;
use requests::UnderWay;
use std::cell::{Cell, RefCell};
use std::rc::{Rc, Weak};
use view::Views;
use zeroing::Settled;

/// A disk whose changes are recorded in a [`History`].
pub struct Tracked<D> {
    inner: Rc<D>,
    history: Rc<History>,
    under_way: RefCell<UnderWay>,
    /// No request that changes bytes begins.
    held: Cell<bool>,
    /// A point is being taken.
    marking: Cell<bool>,
    moved: Event,
    /// Zeroes and discards so far.
    zeroings: Cell<u64>,
    /// Zeroes and discards that are done, but not yet durable.
    settled: RefCell<Vec<Settled>>,
    views: Views,
    parking: Parking,
    /// Itself, for tasks that outlive a request.
    this: Weak<Self>,
}

impl<D: Disk> Tracked<D> {
    /// A disk that is recorded from now on. When its size is not the one that the history knows, the difference counts
    /// as changed.
    ///
    /// # Errors
    /// When the sidecar cannot be written.
    pub async fn new(inner: Rc<D>, history: Rc<History>) -> std::result::Result<Rc<Self>, HistoryError> {
        let geometry = inner.geometry();
        let known = history.state.borrow().superblock.size;
        if known != geometry.size && !geometry.read_only {
            history.change_size(known, geometry.size).await?;
        }
        Ok(Rc::new_cyclic(|this| Self {
            inner,
            history,
            under_way: RefCell::default(),
            held: Cell::new(false),
            marking: Cell::new(false),
            moved: Event::new(),
            zeroings: Cell::new(0),
            settled: RefCell::default(),
            views: Views::default(),
            parking: Parking::default(),
            this: Weak::clone(this),
        }))
    }

    /// The history.
    pub fn history(&self) -> &Rc<History> {
        &self.history
    }

    /// The disk below.
    pub fn inner(&self) -> &Rc<D> {
        &self.inner
    }

    /// Records a range as changed by now, durably on return, though nothing is written: another tracker knows of the change.
    ///
    /// # Errors
    /// When the range lies outside the disk, or the sidecar cannot be written.
    pub async fn record(&self, range: ByteRange) -> Result<()> {
        let size = self.inner.geometry().size;
        if range.is_empty() || range.end() > size {
            return Err(DiskError::new(ErrorKind::OutOfRange, Operation::Write).at(range));
        }
        let _request = self.enter(range).await;
        self.history.declare(range).await
    }

    /// What was zeroed or discarded, and is durable now, is so in the history as well.
    fn settle(&self, settled: Vec<Settled>) {
        for Settled { number, parts } in settled {
            self.history.settle_zeroing(number, &parts);
        }
    }

    /// Changes the size with `resize`, which changes that of the disk below; no other request is under way meanwhile.
    ///
    /// Crash: what is added counts as changed, durably, before the disk grows: as `Data`, until a flush. What is cut off
    /// is beyond the end.
    ///
    /// # Errors
    /// What `resize` reports, and when the sidecar cannot be written.
    pub async fn resize_with<F: Future<Output = Result<()>>>(
        &self,
        size: u64,
        resize: impl FnOnce(Rc<D>) -> F,
    ) -> Result<()> {
        let _held = self.hold_requests().await;
        self.wait_for_all_parked().await?;
        let old = self.inner.geometry().size;
        if size < old && self.views.any() {
            self.preserve(ByteRange::between(size, old)).await;
        }
        self.history.wake().await?;
        let recorded = async |size| match self.history.change_size(old, size).await {
            Err(error) if !self.history.is_stopped() => Err(self.history.not_recorded(&error)),
            _ => Ok(()),
        };
        if size > old {
            recorded(size).await?;
        }
        let result = resize(Rc::clone(&self.inner)).await;
        self.history.wrote.set(true);
        let now = self.inner.geometry().size;
        if now != size.max(old) {
            recorded(now).await?;
        }
        // What was added is zero for certain when nothing can bring back what a shrink had cut off.
        if result.is_ok() && now > old && !self.history.is_stopped() && self.inner.flush().await.is_ok() {
            self.history.settle_growth(old, now);
        }
        result
    }
}

impl<D: Disk> Disk for Tracked<D> {
    fn geometry(&self) -> DiskGeometry {
        self.inner.geometry()
    }

    fn read(&self, offset: u64, buf: Buf) -> impl Future<Output = Result<Buf>> {
        let range = ByteRange::new(offset, buf.len() as u64);
        if !self.parking.overlaps(range) {
            return Either::Left(self.inner.read(offset, buf));
        }
        Either::Right(async move {
            self.wait_for_parked_to_read(range).await?;
            self.inner.read(offset, buf).await
        })
    }

    async fn write(&self, offset: u64, buf: Buf, flags: WriteFlags) -> Result<()> {
        let range = ByteRange::new(offset, buf.len() as u64);
        let request = self.enter(range).await;
        if self.parking.overlaps(range) {
            Box::pin(self.wait_for_parked(range)).await?;
        }
        let mut buf = buf;
        if !self.history.is_marked(range) {
            // No waiting since nothing parked overlaps.
            if let (Some(this), false) = (self.this.upgrade(), flags.fua) {
                match this.park(range, request.key(), buf) {
                    Ok(()) => {
                        request.hand_over();
                        return Ok(());
                    }
                    Err(back) => buf = back,
                }
            }
            Box::pin(self.history.declare(range)).await?;
        }
        if self.views.any() {
            Box::pin(self.preserve(range)).await;
        }
        // A zeroing that begins from here on finds this write under way.
        self.parking.sign();
        let result = self.inner.write(offset, buf, flags).await;
        self.parking.sign();
        result
    }

    async fn write_zeroes(&self, range: ByteRange, mode: ZeroMode, flags: WriteFlags) -> Result<()> {
        self.zero_with(range, ChangeKind::Zero, flags, || self.inner.write_zeroes(range, mode, flags)).await
    }

    async fn discard(&self, range: ByteRange, flags: WriteFlags) -> Result<()> {
        self.zero_with(range, ChangeKind::Discarded, flags, || self.inner.discard(range, flags)).await
    }

    async fn flush(&self) -> Result<()> {
        if self.parking.any() {
            let _request = self.enter(ByteRange::new(0, 0)).await;
            Box::pin(self.wait_for_all_parked()).await?;
        }
        let settled = std::mem::take(&mut *self.settled.borrow_mut());
        // An image may write what it has kept in memory.
        self.history.wrote.set(true);
        let flushed = self.inner.flush().await;
        self.history.wrote.set(true);
        flushed?;
        self.settle(settled);
        Ok(())
    }

    fn map(&self, range: ByteRange) -> impl Future<Output = Result<DiskExtent>> {
        if !self.parking.overlaps(range) {
            return Either::Left(self.inner.map(range));
        }
        Either::Right(async move {
            self.wait_for_parked_to_read(range).await?;
            self.inner.map(range).await
        })
    }

    async fn resize(&self, size: u64) -> Result<()> {
        self.resize_with(size, |inner| async move { inner.resize(size).await }).await
    }

    async fn close(&self) -> Result<()> {
        self.history.end_tending();
        let _held = self.hold_requests().await;
        // What cannot be written stays parked, for whoever opens the disk next.
        let parked = self.wait_for_all_parked().await;
        self.views.end_all("the disk was closed");
        if self.history.awake.get() {
            let settled = std::mem::take(&mut *self.settled.borrow_mut());
            let prepared = match self.inner.flush().await {
                Ok(()) => {
                    self.settle(settled);
                    self.history.prepare_close().await
                }
                Err(error) => Err(error),
            };
            // Closed whatever happened; after a failure the next opening sees a crash.
            self.inner.close().await?;
            prepared?;
            parked?;
            if let Err(error) = self.history.finish_close().await {
                tracing::warn!(%error, "the history was not closed; the next opening sees a crash");
            }
            return Ok(());
        }
        self.inner.close().await
    }
}

impl History {
    /// Puts what a zeroing has left in the place of what was expected of it, where nobody has written since.
    fn settle_zeroing(&self, number: u64, parts: &[(u64, u64, ChangeKind)]) {
        let mut known = self.state.borrow_mut();
        let known = &mut *known;
        for marks in known.frozen.iter_mut().chain([&mut known.current]) {
            for (start, end, kind) in parts {
                for (start, end) in marks.left_to_zeroing(number, *start, *end) {
                    marks.set_run(start, end, Run::Kind(*kind));
                }
            }
        }
    }

    /// The disk had `from` bytes and has, or is about to have, `size`. What is added counts as changed; durable on return.
    ///
    /// The history may know of more bytes than the disk has, when a shrink could not be recorded.
    pub(crate) async fn change_size(&self, from: u64, size: u64) -> std::result::Result<(), HistoryError> {
        self.refuse_if_stopped()?;
        if size.div_ceil(1 << self.granule_bits) > crate::layout::MAX_GRANULES {
            let reason = "the disk is larger than what can be tracked; choose a larger granule";
            return Ok(self.stop(reason).await?);
        }
        {
            let mut known = self.state.borrow_mut();
            let known = &mut *known;
            let old = known.superblock.size.min(from);
            known.grow(size);
            if size > old {
                let granule = 1u64 << self.granule_bits;
                let (first_whole, end) = (old.div_ceil(granule), size.div_ceil(granule));
                known.forget_ahead();
                if first_whole * granule > old {
                    // Within the present disk, so that it may be written to even if the table cannot be written now.
                    known.tickets += 1;
                    known.current.set_run(first_whole - 1, first_whole, Run::Intended(known.tickets));
                    known.queue.push((first_whole - 1, first_whole));
                }
                if first_whole < end {
                    known.current.set_run(first_whole, end, Run::Kind(ChangeKind::Data));
                }
            }
        }
        self.checkpoint_with(None, |superblock| superblock.size = size).await
    }

    /// What a growth has added reads as zero, durably; nobody has written to it yet.
    fn settle_growth(&self, old: u64, size: u64) {
        let granule = 1u64 << self.granule_bits;
        let mut known = self.state.borrow_mut();
        known.current.set_run(old.div_ceil(granule), size.div_ceil(granule), Run::Kind(ChangeKind::Zero));
    }
}
