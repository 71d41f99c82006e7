//! Tasks: futures that an executor drives, and the handles that await them.
#![allow(unsafe_code)] // One structural pin, argued at its block.

use crate::executor::{self, Core};
use std::cell::RefCell;
use std::future::Future;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Wake, Waker};

/// A task as the executor sees it.
pub(crate) trait Runnable {
    /// Polls once; true when the task has ended.
    fn run(&self, cx: &mut Context<'_>) -> bool;
    /// Drops the future, ended or not.
    fn abandon(&self);
}

enum Outcome<T> {
    Running,
    Ready(T),
    /// The future panicked or was abandoned, or the value was taken.
    Gone,
}

struct Join<T> {
    outcome: Outcome<T>,
    waiter: Option<Waker>,
    detached: bool,
}

/// Future and output in one allocation that never moves.
struct Task<F: Future> {
    future: RefCell<Option<F>>,
    join: RefCell<Join<F::Output>>,
}

impl<F: Future> Task<F> {
    fn finish(&self, outcome: Outcome<F::Output>) {
        let mut join = self.join.borrow_mut();
        let waiter = join.waiter.take();
        let unwanted = if join.detached { outcome } else { std::mem::replace(&mut join.outcome, outcome) };
        drop(join);
        drop(unwanted); // Outside the borrow: an output that nobody awaits may have a destructor.
        if let Some(waiter) = waiter {
            waiter.wake();
        }
    }
}

impl<F: Future> Runnable for Task<F> {
    fn run(&self, cx: &mut Context<'_>) -> bool {
        let polled = catch_unwind(AssertUnwindSafe(|| {
            let mut slot = self.future.borrow_mut();
            let Some(future) = slot.as_mut() else { return Poll::Ready(()) };
            // SAFETY: the future lies inside an `Rc` allocation, is never moved out of it, and is dropped in
            // place (`*slot = None`) before the allocation is freed.
            let future = unsafe { Pin::new_unchecked(future) };
            future.poll(cx).map(|output| {
                *slot = None;
                drop(slot);
                self.finish(Outcome::Ready(output));
            })
        }));
        match polled {
            Ok(Poll::Pending) => return false,
            Ok(Poll::Ready(())) => {}
            Err(panic) => {
                tracing::error!(message = panic_message(&*panic), "a task panicked");
                self.abandon();
            }
        }
        true
    }

    fn abandon(&self) {
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| *self.future.borrow_mut() = None)) {
            tracing::error!(message = panic_message(&*panic), "a task panicked while it was dropped");
        }
        self.finish(Outcome::Gone);
    }
}

/// The text of a panic, if it has one.
pub(crate) fn panic_message(panic: &(dyn std::any::Any + Send)) -> &str {
    panic
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("no message")
}

trait Joinable<T> {
    fn poll_join(&self, cx: &mut Context<'_>) -> Poll<T>;
    fn detach(&self);
}

impl<F: Future> Joinable<F::Output> for Task<F> {
    fn poll_join(&self, cx: &mut Context<'_>) -> Poll<F::Output> {
        let mut join = self.join.borrow_mut();
        match std::mem::replace(&mut join.outcome, Outcome::Gone) {
            Outcome::Ready(output) => Poll::Ready(output),
            Outcome::Running => {
                join.outcome = Outcome::Running;
                join.waiter = Some(cx.waker().clone());
                Poll::Pending
            }
            Outcome::Gone => panic!("the awaited task panicked, was abandoned or has given its output already"),
        }
    }

    fn detach(&self) {
        let mut join = self.join.borrow_mut();
        join.detached = true;
        let waiter = join.waiter.take();
        let output = match join.outcome {
            Outcome::Running => None,
            _ => Some(std::mem::replace(&mut join.outcome, Outcome::Gone)),
        };
        drop(join);
        drop((waiter, output));
    }
}

/// A task on this thread: await it for its output, or drop it to let the task run on alone.
///
/// Awaiting a task that panicked panics too.
pub struct LocalTask<T>(Rc<dyn Joinable<T>>);

impl<T> Future for LocalTask<T> {
    type Output = T;
    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<T> {
        self.0.poll_join(cx)
    }
}

impl<T> Drop for LocalTask<T> {
    fn drop(&mut self) {
        self.0.detach();
    }
}

/// Starts a task on the current I/O thread; it runs when the present task awaits something.
///
/// # Panics
/// Outside of an I/O thread and [`block_on`](crate::block_on).
pub fn spawn_local<F: Future + 'static>(future: F) -> LocalTask<F::Output> {
    let core = executor::current_core().expect("spawn_local outside of an I/O thread");
    spawn_on(&core, future)
}

/// Starts a task by polling it at once, before this returns: what need not wait is done then, without a turn through the
/// queue. Counts against the present task's share of the thread. True when it has ended.
///
/// # Panics
/// Outside of an I/O thread and [`block_on`](crate::block_on).
pub fn start_local<F: Future<Output = ()> + 'static>(future: F) -> bool {
    let core = executor::current_core().expect("start_local outside of an I/O thread");
    let join = Join { outcome: Outcome::Running, waiter: None, detached: true };
    core.start_task(Rc::new(Task { future: RefCell::new(Some(future)), join: RefCell::new(join) }))
}

pub(crate) fn spawn_on<F: Future + 'static>(core: &Rc<Core>, future: F) -> LocalTask<F::Output> {
    let task = Rc::new(Task {
        future: RefCell::new(Some(future)),
        join: RefCell::new(Join { outcome: Outcome::Running, waiter: None, detached: false }),
    });
    core.add_task(Rc::clone(&task) as Rc<dyn Runnable>);
    LocalTask(task)
}

/// What a waker points to. Belongs to a slot of the task table and outlives the tasks in it: a waker kept
/// too long wakes a stranger, which every future must bear.
pub(crate) struct WakeHandle {
    pub(crate) slot: usize,
    /// Stands in a queue already.
    pub(crate) scheduled: AtomicBool,
    pub(crate) shared: Arc<executor::Shared>,
}

impl Wake for WakeHandle {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        if !self.scheduled.swap(true, Ordering::AcqRel) {
            executor::schedule(&self.shared, self.slot);
        }
    }
}
