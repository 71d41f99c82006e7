//! Whether the guest is at work: who works beside it gives way by that.

use event_listener::Event;
use std::cell::Cell;

/// Counts the guest's requests that move bytes. Costs a request a few updates of plain cells: a chain lives on one thread.
#[derive(Default)]
pub(crate) struct Guest {
    asked: Cell<u64>,
    under_way: Cell<usize>,
    /// Somebody waits until none is under way.
    awaited: Cell<bool>,
    at_rest: Event,
}

/// A request of the guest's that is under way.
pub(crate) struct AtWork<'a>(&'a Guest);

impl Guest {
    /// A request begins.
    pub(crate) fn asks(&self) -> AtWork<'_> {
        self.asked.set(self.asked.get().wrapping_add(1));
        self.under_way.set(self.under_way.get() + 1);
        AtWork(self)
    }

    /// How many requests there have been.
    pub(crate) fn asked(&self) -> u64 {
        self.asked.get()
    }

    /// Waits until no request is under way.
    pub(crate) async fn rests(&self) {
        while self.under_way.get() > 0 {
            self.awaited.set(true);
            self.at_rest.listen().await;
        }
    }
}

impl Drop for AtWork<'_> {
    fn drop(&mut self) {
        let Guest { under_way, awaited, at_rest, .. } = self.0;
        under_way.set(under_way.get() - 1);
        if under_way.get() == 0 && awaited.take() {
            at_rest.notify(usize::MAX);
        }
    }
}
