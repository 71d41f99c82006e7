//! Ranges of the disk that one at a time works on, while a job works beside the guest.

use disk::ByteRange;
use event_listener::Event;
use std::cell::{Cell, RefCell};
use std::collections::VecDeque;

/// Hands out ranges in the order in which they were asked for: nobody passes somebody who waits for a part of the same
/// range, so neither a guest nor a job is kept waiting for ever.
///
/// Whoever takes a lock has registered its request already (`requests.rs`), and takes one lock at a time.
#[derive(Default)]
pub(crate) struct RangeLocks {
    /// Held, or waited for, in the order of arrival.
    asked: RefCell<VecDeque<(u64, ByteRange)>>,
    next: Cell<u64>,
    released: Event,
}

/// A range that only its holder works on.
pub(crate) struct RangeLock<'a> {
    locks: &'a RangeLocks,
    number: u64,
}

impl RangeLocks {
    /// Waits until nobody who asked earlier has a part of the range.
    pub(crate) async fn lock(&self, range: ByteRange) -> RangeLock<'_> {
        let number = self.next.get();
        self.next.set(number + 1);
        self.asked.borrow_mut().push_back((number, range));
        let lock = RangeLock { locks: self, number };
        while self.waits(number, range) {
            self.released.listen().await;
        }
        lock
    }

    fn waits(&self, number: u64, range: ByteRange) -> bool {
        let asked = self.asked.borrow();
        asked.iter().take_while(|(other, _)| *other != number).any(|(_, other)| other.overlaps(range))
    }
}

impl Drop for RangeLock<'_> {
    fn drop(&mut self) {
        let mut asked = self.locks.asked.borrow_mut();
        if let Some(at) = asked.iter().position(|(number, _)| *number == self.number) {
            asked.remove(at);
        }
        drop(asked);
        self.locks.released.notify(usize::MAX);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::future::Future;
    use std::pin::pin;
    use std::task::{Context, Poll, Waker};

    #[test]
    fn who_waits_is_not_passed() {
        let locks = RangeLocks::default();
        let mut context = Context::from_waker(Waker::noop());
        let Poll::Ready(first) = pin!(locks.lock(ByteRange::new(0, 10))).poll(&mut context) else { panic!("free") };
        let mut second = pin!(locks.lock(ByteRange::new(5, 10)));
        assert!(second.as_mut().poll(&mut context).is_pending());
        {
            let mut third = pin!(locks.lock(ByteRange::new(12, 1)));
            assert!(third.as_mut().poll(&mut context).is_pending(), "the second came first");
        }
        assert!(pin!(locks.lock(ByteRange::new(15, 1))).poll(&mut context).is_ready(), "apart from all");
        drop(first);
        let Poll::Ready(second) = second.as_mut().poll(&mut context) else { panic!("its turn") };
        drop(second);
        assert!(locks.asked.borrow().is_empty(), "who gave up waiting is gone as well");
    }
}
