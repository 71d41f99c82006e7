//! Keeps requests and changes of size or of layers apart.

use disk::{DiskError, ErrorKind, Operation, Result};
use event_listener::Event;
use std::cell::Cell;

/// Counts requests under way, so that a change of size or of layers can wait for them and hold off new ones.
///
/// Costs a request two counter updates on plain cells: a chain lives on one thread.
#[derive(Default)]
pub(crate) struct Requests {
    active: Cell<usize>,
    /// Of them, those that change bytes.
    writing: Cell<usize>,
    /// No request that changes bytes begins.
    held: Cell<bool>,
    exclusive: Cell<bool>,
    /// No request begins any more.
    closed: Cell<bool>,
    changed: Event,
}

/// A request under way.
pub(crate) struct Request<'a> {
    requests: &'a Requests,
    writes: bool,
}

/// No request is under way, and none begins while it lives.
pub(crate) struct Exclusive<'a>(&'a Requests);

impl Requests {
    /// Registers a request; waits while the size or the layers change, and while it is held.
    ///
    /// # Errors
    /// `Closed` when the disk is being closed.
    pub(crate) async fn enter(&self, operation: Operation) -> Result<Request<'_>> {
        let writes = matches!(operation, Operation::Write | Operation::WriteZeroes | Operation::Discard);
        while (self.exclusive.get() || writes && self.held.get()) && !self.closed.get() {
            // Nothing else runs between the check and the listening, as all is on one thread.
            self.changed.listen().await;
        }
        if self.closed.get() {
            return Err(DiskError::new(ErrorKind::Closed, operation));
        }
        self.active.set(self.active.get() + 1);
        self.writing.set(self.writing.get() + usize::from(writes));
        Ok(Request { requests: self, writes })
    }

    /// Whether the disk is closed, or about to be.
    pub(crate) fn is_closed(&self) -> bool {
        self.closed.get()
    }

    /// From now on no request begins.
    pub(crate) fn close(&self) {
        self.closed.set(true);
        self.changed.notify(usize::MAX);
    }

    /// Holds off requests that change bytes, and waits for those under way; until [`Requests::release`].
    ///
    /// # Errors
    /// `Closed` when the disk is being closed.
    pub(crate) async fn hold_writes(&self) -> Result<()> {
        while self.held.get() && !self.closed.get() {
            self.changed.listen().await;
        }
        if self.closed.get() {
            return Err(DiskError::new(ErrorKind::Closed, Operation::Write));
        }
        self.held.set(true);
        let unless_dropped = Released(self);
        // A change of size may be under way.
        while self.writing.get() > 0 || self.exclusive.get() {
            self.changed.listen().await;
        }
        std::mem::forget(unless_dropped);
        Ok(())
    }

    /// Ends what [`Requests::hold_writes`] began.
    pub(crate) fn release(&self) {
        self.held.set(false);
        self.changed.notify(usize::MAX);
    }

    /// Holds off new requests and waits for those under way.
    pub(crate) async fn exclude(&self) -> Exclusive<'_> {
        while self.exclusive.get() {
            self.changed.listen().await;
        }
        self.exclusive.set(true);
        let exclusive = Exclusive(self);
        while self.active.get() > 0 {
            self.changed.listen().await;
        }
        exclusive
    }

    /// As [`Requests::exclude`], for what changes bytes: waits while such requests are held.
    pub(crate) async fn exclude_to_change(&self) -> Exclusive<'_> {
        loop {
            while self.held.get() && !self.closed.get() {
                self.changed.listen().await;
            }
            let exclusive = self.exclude().await;
            if !self.held.get() || self.closed.get() {
                return exclusive;
            }
        }
    }
}

impl Drop for Request<'_> {
    fn drop(&mut self) {
        let requests = self.requests;
        let active = requests.active.get() - 1;
        requests.active.set(active);
        let writing = requests.writing.get() - usize::from(self.writes);
        requests.writing.set(writing);
        if active == 0 && requests.exclusive.get() || self.writes && writing == 0 && requests.held.get() {
            requests.changed.notify(usize::MAX);
        }
    }
}

impl Drop for Exclusive<'_> {
    fn drop(&mut self) {
        self.0.exclusive.set(false);
        self.0.changed.notify(usize::MAX);
    }
}

struct Released<'a>(&'a Requests);

impl Drop for Released<'_> {
    fn drop(&mut self) {
        self.0.release();
    }
}
