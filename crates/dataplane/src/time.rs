//! Timers of an executor.

use crate::executor;
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

/// Timers by deadline; the number tells those of one moment apart.
#[derive(Default)]
pub(crate) struct Timers {
    queue: RefCell<BTreeMap<(Instant, u64), Waker>>,
    count: Cell<u64>,
}

impl Timers {
    /// The next deadline.
    pub(crate) fn next(&self) -> Option<Instant> {
        self.queue.borrow().first_key_value().map(|((at, _), _)| *at)
    }

    /// Wakes whose time has come.
    pub(crate) fn fire(&self) {
        if self.queue.borrow().is_empty() {
            return;
        }
        let now = Instant::now();
        loop {
            let waker = {
                let mut queue = self.queue.borrow_mut();
                match queue.first_entry() {
                    Some(first) if first.key().0 <= now => first.remove(),
                    _ => break,
                }
            };
            waker.wake();
        }
    }
}

struct Sleep {
    at: Instant,
    /// Entry in the queue of timers.
    entered: Option<(std::rc::Rc<executor::Core>, u64)>,
}

impl Future for Sleep {
    type Output = ();
    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        if Instant::now() >= self.at {
            return Poll::Ready(());
        }
        let at = self.at;
        let (core, number) = self.entered.get_or_insert_with(|| {
            let core = executor::current_core().expect("timer outside of an I/O thread");
            let number = core.timers.count.get();
            core.timers.count.set(number + 1);
            (core, number)
        });
        core.timers.queue.borrow_mut().insert((at, *number), cx.waker().clone());
        Poll::Pending
    }
}

impl Drop for Sleep {
    fn drop(&mut self) {
        if let Some((core, number)) = &self.entered {
            let entry = core.timers.queue.borrow_mut().remove(&(self.at, *number));
            drop(entry);
        }
    }
}

/// Waits for `duration` at least (forever if the clock cannot express the end).
pub async fn sleep(duration: Duration) {
    match Instant::now().checked_add(duration) {
        Some(at) => Sleep { at, entered: None }.await,
        None => std::future::pending().await,
    }
}

/// Lets other tasks, and completions, have a turn.
pub async fn yield_now() {
    let mut yielded = false;
    poll_fn(|cx| {
        if yielded {
            return Poll::Ready(());
        }
        yielded = true;
        cx.waker().wake_by_ref();
        Poll::Pending
    })
    .await;
}

/// The future's output, or `None` when it takes longer than `duration`; it is dropped then.
pub async fn timeout<F: Future>(duration: Duration, future: F) -> Option<F::Output> {
    let mut future = pin!(future);
    let mut end = pin!(sleep(duration));
    poll_fn(|cx| {
        if let Poll::Ready(output) = future.as_mut().poll(cx) {
            return Poll::Ready(Some(output));
        }
        end.as_mut().poll(cx).map(|()| None)
    })
    .await
}
