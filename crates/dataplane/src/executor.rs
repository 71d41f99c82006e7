//! The executor of one thread: ready tasks, timers, operations under way, and the loop over them.

use crate::driver::{Backend, Driver};
use crate::op::Operations;
use crate::task::{Runnable, WakeHandle, panic_message};
use crate::time::Timers;
use rustix::event::{EventfdFlags, eventfd};
use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::future::Future;
use std::io;
use std::os::fd::OwnedFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

/// Polls of tasks before the kernel is asked for completions again.
const POLLS_PER_TURN: usize = 256;
/// and the bytes that they may move without it, about: a task that copies and wakes itself would keep the others' completions
/// waiting for as many polls.
const INLINE_BYTES_PER_TURN: usize = 1 << 20;
/// Operations that one poll of a task may finish without giving way to others,
const INLINE_PER_POLL: u32 = 64;
/// and the bytes that it may move meanwhile, about.
const INLINE_BYTES_PER_POLL: usize = 2 << 20;
/// How long a thread that stops waits for operations that the kernel does not give back.
const DRAIN: Duration = Duration::from_secs(10);
/// Queue entry of the future that `run` was called with.
const MAIN: usize = usize::MAX;

thread_local! {
    static CURRENT: RefCell<Option<Rc<Core>>> = const { RefCell::new(None) };
}

pub(crate) fn current_core() -> Option<Rc<Core>> {
    CURRENT.try_with(|current| current.borrow().clone()).ok().flatten()
}

/// Makes a task on the thread that opens it.
type Job = Box<dyn FnOnce(&Rc<Core>) + Send>;

/// What other threads send.
pub(crate) enum Injected {
    Wake(usize),
    Job(Job),
    /// A blocking worker finished the operation with this key.
    Complete(usize, i32, crate::op::FileRequest),
}

struct Inbox {
    items: Vec<Injected>,
    closed: bool,
}

/// The part of an executor that other threads reach.
pub(crate) struct Shared {
    inbox: Mutex<Inbox>,
    /// The inbox may hold something.
    filled: AtomicBool,
    /// The thread waits in the kernel, or is about to.
    asleep: AtomicBool,
    pub(crate) eventfd: Arc<OwnedFd>,
    /// Tasks spawned from outside that have not ended.
    pub(crate) load: AtomicUsize,
}

impl Shared {
    fn new() -> io::Result<Arc<Self>> {
        let eventfd = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Arc::new(Self {
            inbox: Mutex::new(Inbox { items: Vec::new(), closed: false }),
            filled: AtomicBool::new(false),
            asleep: AtomicBool::new(false),
            eventfd: Arc::new(eventfd),
            load: AtomicUsize::new(0),
        }))
    }

    /// Hands `item` to the thread; drops it when the thread has stopped.
    pub(crate) fn inject(&self, item: Injected) {
        let refused = {
            let mut inbox = self.inbox.lock().expect("no panic while the inbox is locked");
            // What a worker gives back is owed even to a thread that is stopping.
            if inbox.closed && !matches!(item, Injected::Complete(..)) {
                Some(item)
            } else {
                inbox.items.push(item);
                None
            }
        };
        drop(refused); // Its destructors run without the lock.
        self.filled.store(true, Ordering::SeqCst);
        // Pairs with `may_sleep`: either this sees `asleep`, or the thread sees `filled`.
        if self.asleep.swap(false, Ordering::SeqCst) {
            // Fails only when the counter is full, and then the thread wakes anyway.
            let _ = rustix::io::write(&self.eventfd, &1u64.to_ne_bytes());
        }
    }

    fn take(&self) -> Vec<Injected> {
        if !self.filled.swap(false, Ordering::SeqCst) {
            return Vec::new();
        }
        std::mem::take(&mut self.inbox.lock().expect("no panic while the inbox is locked").items)
    }

    fn may_sleep(&self) -> bool {
        self.asleep.store(true, Ordering::SeqCst);
        if self.filled.load(Ordering::SeqCst) {
            self.asleep.store(false, Ordering::SeqCst);
            return false;
        }
        true
    }

    fn awake(&self) {
        self.asleep.store(false, Ordering::SeqCst);
    }

    /// From now on only completions are taken in.
    fn close(&self) {
        self.inbox.lock().expect("no panic while the inbox is locked").closed = true;
    }
}

/// Puts a task's slot into the queue of its thread.
pub(crate) fn schedule(shared: &Arc<Shared>, slot: usize) {
    let local = CURRENT
        .try_with(|current| match &*current.borrow() {
            Some(core) if Arc::ptr_eq(&core.shared, shared) => {
                core.ready.borrow_mut().push_back(slot);
                true
            }
            _ => false,
        })
        .unwrap_or(false);
    if !local {
        shared.inject(Injected::Wake(slot));
    }
}

struct Slot {
    handle: Arc<WakeHandle>,
    waker: Waker,
    task: Option<Rc<dyn Runnable>>,
}

#[derive(Default)]
struct Tasks {
    slots: Vec<Slot>,
    free: Vec<usize>,
}

/// The executor of one thread.
pub(crate) struct Core {
    pub(crate) shared: Arc<Shared>,
    pub(crate) driver: Driver,
    pub(crate) ops: Operations,
    pub(crate) timers: Timers,
    ready: RefCell<VecDeque<usize>>,
    tasks: RefCell<Tasks>,
    /// Operations that the present poll may still finish on the spot,
    inline_left: Cell<u32>,
    /// and bytes.
    inline_bytes_left: Cell<usize>,
}

impl Core {
    fn new(backend: Backend) -> io::Result<Rc<Self>> {
        let shared = Shared::new()?;
        let driver = Driver::new(backend, &shared)?;
        Ok(Rc::new(Self {
            shared,
            driver,
            ops: Operations::default(),
            timers: Timers::default(),
            ready: RefCell::default(),
            tasks: RefCell::default(),
            inline_left: Cell::new(INLINE_PER_POLL),
            inline_bytes_left: Cell::new(INLINE_BYTES_PER_POLL),
        }))
    }

    /// Queues a new task.
    pub(crate) fn add_task(&self, task: Rc<dyn Runnable>) {
        let slot = self.enter_task(task);
        if !self.tasks.borrow().slots[slot].handle.scheduled.swap(true, Ordering::AcqRel) {
            self.ready.borrow_mut().push_back(slot);
        } // Else a stale waker has queued the slot already.
    }

    /// Polls a new task at once, within the poll of the present one and on its account. True when it has ended.
    pub(crate) fn start_task(&self, task: Rc<dyn Runnable>) -> bool {
        let slot = self.enter_task(task);
        self.poll_task(slot)
    }

    fn enter_task(&self, task: Rc<dyn Runnable>) -> usize {
        let mut tasks = self.tasks.borrow_mut();
        let slot = match tasks.free.pop() {
            Some(slot) => slot,
            None => {
                let slot = tasks.slots.len();
                let scheduled = AtomicBool::new(false);
                let handle = Arc::new(WakeHandle { slot, scheduled, shared: Arc::clone(&self.shared) });
                let waker = Waker::from(Arc::clone(&handle));
                tasks.slots.push(Slot { handle, waker, task: None });
                slot
            }
        };
        tasks.slots[slot].task = Some(task);
        slot
    }

    /// Whether an operation that moves so many bytes may be done on the spot rather than through the driver; keeps a task
    /// that never waits from starving the others.
    pub(crate) fn take_inline(&self, bytes: usize) -> bool {
        let (left, bytes_left) = (self.inline_left.get(), self.inline_bytes_left.get());
        self.inline_left.set(left.saturating_sub(1));
        self.inline_bytes_left.set(bytes_left.saturating_sub(bytes));
        left > 0 && bytes_left > 0
    }

    fn refill_inline(&self) {
        self.inline_left.set(INLINE_PER_POLL);
        self.inline_bytes_left.set(INLINE_BYTES_PER_POLL);
    }

    /// Whether a task waits for its turn.
    pub(crate) fn has_ready(&self) -> bool {
        !self.ready.borrow().is_empty()
    }

    fn run_task(&self, slot: usize) {
        self.refill_inline();
        self.poll_task(slot);
    }

    /// True when there is no task there any more.
    fn poll_task(&self, slot: usize) -> bool {
        let (task, waker) = {
            let tasks = self.tasks.borrow();
            let Some(entry) = tasks.slots.get(slot) else { return true };
            // Before the poll, so that a wake during it is not lost.
            entry.handle.scheduled.store(false, Ordering::Release);
            let Some(task) = &entry.task else { return true };
            (Rc::clone(task), entry.waker.clone())
        };
        let ended = task.run(&mut Context::from_waker(&waker));
        if ended {
            let mut tasks = self.tasks.borrow_mut();
            tasks.slots[slot].task = None;
            tasks.free.push(slot);
        }
        ended
    }

    /// A worker brings a file operation back.
    fn complete_file(&self, key: usize, result: i32, request: crate::op::FileRequest) {
        self.driver.file_done(self, request.descriptor());
        self.ops.complete_file(key, result, request);
    }

    fn open_inbox(self: &Rc<Self>) {
        for item in self.shared.take() {
            match item {
                Injected::Wake(slot) => self.ready.borrow_mut().push_back(slot),
                Injected::Job(job) => {
                    if let Err(panic) = catch_unwind(AssertUnwindSafe(|| job(self))) {
                        tracing::error!(message = panic_message(&*panic), "a task panicked while it was made");
                    }
                }
                Injected::Complete(key, result, request) => self.complete_file(key, result, request),
            }
        }
    }

    /// Drives `main`, and all tasks meanwhile, until it is ready.
    fn run<F: Future>(self: &Rc<Self>, mut main: Pin<&mut F>) -> F::Output {
        let handle =
            Arc::new(WakeHandle { slot: MAIN, scheduled: AtomicBool::new(true), shared: Arc::clone(&self.shared) });
        let waker = Waker::from(Arc::clone(&handle));
        self.ready.borrow_mut().push_back(MAIN);
        loop {
            self.open_inbox();
            let mut moved = 0;
            for _ in 0..POLLS_PER_TURN {
                if moved >= INLINE_BYTES_PER_TURN {
                    break;
                }
                let Some(slot) = self.ready.borrow_mut().pop_front() else { break };
                if slot == MAIN {
                    handle.scheduled.store(false, Ordering::Release);
                    self.refill_inline();
                    if let Poll::Ready(output) = main.as_mut().poll(&mut Context::from_waker(&waker)) {
                        return output;
                    }
                } else {
                    self.run_task(slot);
                }
                moved += INLINE_BYTES_PER_POLL - self.inline_bytes_left.get();
            }
            self.turn();
        }
    }

    /// Submits, waits if nothing is ready, and takes what has completed.
    fn turn(&self) {
        let mut wait = None;
        if self.ready.borrow().is_empty() {
            let timeout = self.timers.next().map(|at| at.saturating_duration_since(Instant::now()));
            if timeout != Some(Duration::ZERO) && self.shared.may_sleep() {
                wait = Some(timeout);
            }
        }
        self.driver.turn(self, wait);
        self.shared.awake();
        self.timers.fire();
    }

    /// Drops all tasks and waits until the kernel has given everything back.
    fn close(self: &Rc<Self>) {
        self.shared.close();
        // A destructor may spawn: several rounds.
        for _ in 0..1000 {
            let tasks: Vec<_> = self.tasks.borrow_mut().slots.iter_mut().filter_map(|s| s.task.take()).collect();
            if tasks.is_empty() {
                break;
            }
            for task in tasks {
                task.abandon();
            }
        }
        self.driver.cancel_all(self);
        let end = Instant::now() + DRAIN;
        loop {
            for item in self.shared.take() {
                if let Injected::Complete(key, result, request) = item {
                    self.complete_file(key, result, request);
                }
            }
            if self.ops.in_flight() == 0 {
                break;
            }
            let Some(left) = end.checked_duration_since(Instant::now()) else {
                tracing::error!(
                    operations = self.ops.in_flight(),
                    "the kernel does not give operations back; their memory is leaked"
                );
                std::mem::forget(Rc::clone(self));
                break;
            };
            self.driver.turn(self, Some(Some(left.min(Duration::from_millis(100)))));
        }
    }
}

/// Leaves the executor, also when `main` panics.
struct Entered(Rc<Core>);

impl Drop for Entered {
    fn drop(&mut self) {
        self.0.close();
        CURRENT.with(|current| current.borrow_mut().take());
    }
}

/// Runs an executor on the calling thread until `future` is done: for offline work and tests. Tasks that it
/// spawned and that are still under way are dropped then.
///
/// # Errors
/// When the kernel refuses what the backend needs, and on a thread that runs an executor already.
pub fn block_on<F: Future>(backend: Backend, future: F) -> io::Result<F::Output> {
    enter(backend, |_| Ok(()), future)
}

/// As `block_on`; tells `started` about the executor before it runs.
pub(crate) fn enter<F: Future>(
    backend: Backend,
    started: impl FnOnce(&Rc<Core>) -> io::Result<()>,
    future: F,
) -> io::Result<F::Output> {
    if current_core().is_some() {
        return Err(io::Error::other("this thread runs an executor already"));
    }
    let core = Core::new(backend)?;
    CURRENT.with(|current| *current.borrow_mut() = Some(Rc::clone(&core)));
    let entered = Entered(core);
    started(&entered.0)?;
    let output = entered.0.run(pin!(future));
    Ok(output)
}
