//! Requests that change bytes, while they are under way.

use super::Tracked;
use disk::{ByteRange, Disk};
use event_listener::Event;
use slab::Slab;
use std::cell::{Cell, RefCell};

/// The ranges of requests under way.
pub(super) type UnderWay = Slab<ByteRange>;

/// A request under way.
pub(super) struct Request<'a> {
    under_way: &'a RefCell<UnderWay>,
    held: &'a Cell<bool>,
    moved: &'a Event,
    wrote: &'a Cell<bool>,
    key: usize,
}

impl Request<'_> {
    pub(super) fn key(&self) -> usize {
        self.key
    }

    /// Leaves the end of the request to whoever has its key: [`Tracked::owned_request`].
    pub(super) fn hand_over(self) {
        std::mem::forget(self);
    }
}

impl Drop for Request<'_> {
    fn drop(&mut self) {
        let mut under_way = self.under_way.borrow_mut();
        under_way.remove(self.key);
        self.wrote.set(true); // A sign of life may have passed since it began.
        if self.held.get() && under_way.is_empty() {
            self.moved.notify(usize::MAX);
        }
    }
}

/// No request is under way, and none begins while it lives.
pub(super) struct HeldRequests<'a, D: Disk>(&'a Tracked<D>);

impl<D: Disk> Drop for HeldRequests<'_, D> {
    fn drop(&mut self) {
        self.0.release();
    }
}

impl<D: Disk> Tracked<D> {
    /// Registers a request; waits while requests are held.
    pub(super) async fn enter(&self, range: ByteRange) -> Request<'_> {
        while self.held.get() {
            self.moved.listen().await;
        }
        let key = self.under_way.borrow_mut().insert(range);
        self.owned_request(key)
    }

    /// The request of that key, which was handed over.
    pub(super) fn owned_request(&self, key: usize) -> Request<'_> {
        Request { under_way: &self.under_way, held: &self.held, moved: &self.moved, wrote: &self.history.wrote, key }
    }

    /// Holds off new requests, and waits for those under way.
    pub(super) async fn hold_requests(&self) -> HeldRequests<'_, D> {
        self.hold_off().await;
        let held = HeldRequests(self);
        self.drained().await;
        held
    }

    /// Holds off new requests, as soon as nobody else does; until [`Tracked::release`].
    pub(super) async fn hold_off(&self) {
        while self.held.get() {
            self.moved.listen().await;
        }
        self.held.set(true);
    }

    /// Ends what [`Tracked::hold_off`] began.
    pub(super) fn release(&self) {
        self.held.set(false);
        self.moved.notify(usize::MAX);
    }

    /// Waits until no request is under way.
    pub(super) async fn drained(&self) {
        while !self.under_way.borrow().is_empty() {
            // A parked write is a request under way.
            self.parking.hurry();
            self.moved.listen().await;
        }
    }
}
