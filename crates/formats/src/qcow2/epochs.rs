//! Which requests may still use an offset that was handed out.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;

/// Counts requests under way by the epoch in which they began. Freed clusters are stamped with an epoch
/// and given to others only when no request of that epoch or an earlier one is left.
#[derive(Debug)]
pub(super) struct Epochs {
    /// The epoch of the first counter.
    first: Cell<u64>,
    /// Requests under way per epoch, oldest first; never empty, the last is the present epoch.
    under_way: RefCell<VecDeque<u32>>,
}

impl Epochs {
    pub(super) fn new() -> Self {
        Self { first: Cell::new(0), under_way: RefCell::new(VecDeque::from([0])) }
    }

    /// Enters a request; returns its epoch for [`Epochs::end`].
    pub(super) fn begin(&self) -> u64 {
        let mut counts = self.under_way.borrow_mut();
        let last = counts.len() - 1;
        counts[last] += 1;
        self.first.get() + last as u64
    }

    /// Ends a request of that epoch.
    pub(super) fn end(&self, epoch: u64) {
        let mut counts = self.under_way.borrow_mut();
        let at = (epoch - self.first.get()) as usize;
        counts[at] -= 1;
        while counts.len() > 1 && counts[0] == 0 {
            counts.pop_front();
            self.first.set(self.first.get() + 1);
        }
    }

    /// Begins a new epoch; returns the one that ended, which is the stamp for what was freed in it.
    pub(super) fn advance(&self) -> u64 {
        let mut counts = self.under_way.borrow_mut();
        let ended = self.first.get() + counts.len() as u64 - 1;
        counts.push_back(0);
        while counts.len() > 1 && counts[0] == 0 {
            counts.pop_front();
            self.first.set(self.first.get() + 1);
        }
        ended
    }

    /// Whether every request of that epoch and of earlier ones has ended.
    pub(super) fn is_over(&self, epoch: u64) -> bool {
        self.first.get() > epoch
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_epoch_is_over_when_its_last_request_ends() {
        let epochs = Epochs::new();
        let a = epochs.begin();
        let stamp = epochs.advance();
        let b = epochs.begin();
        assert!(!epochs.is_over(stamp));
        epochs.end(a);
        assert!(epochs.is_over(stamp));
        let later = epochs.advance();
        assert!(!epochs.is_over(later));
        epochs.end(b);
        assert!(epochs.is_over(later));
        assert!(epochs.is_over(epochs.advance()));
    }
}
