//! Bounded pools of threads for what blocks.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, LazyLock, Mutex};
use std::time::Duration;

type Job = Box<dyn FnOnce() + Send>;

/// Idle workers end after this time.
const IDLE: Duration = Duration::from_secs(10);

struct State {
    jobs: VecDeque<Job>,
    workers: usize,
    idle: usize,
}

/// A pool that grows to its bound under load and shrinks to nothing.
pub(crate) struct Pool {
    name: &'static str,
    bound: usize,
    state: Mutex<State>,
    work: Condvar,
}

/// Blocking file operations of the thread-pool backend, so many threads that one device which hangs (see
/// [`PER_FILE`]) leaves some to the others.
pub(crate) static FILES: LazyLock<Arc<Pool>> = LazyLock::new(|| Pool::new("file-io", 64));
/// Operations of one file that are at work at the same time; further ones wait for these.
pub(crate) const PER_FILE: usize = 16;
/// Long computations and rare system calls.
static OFFLOAD: LazyLock<Arc<Pool>> = LazyLock::new(|| {
    let cores = std::thread::available_parallelism().map_or(2, usize::from);
    Pool::new("offload", cores.max(4))
});

/// Calls to what may be far away and slow, so that they take no thread from those that a guest waits for.
static REMOTE: LazyLock<Arc<Pool>> = LazyLock::new(|| Pool::new("remote", 32));

impl Pool {
    fn new(name: &'static str, bound: usize) -> Arc<Self> {
        let state = Mutex::new(State { jobs: VecDeque::new(), workers: 0, idle: 0 });
        Arc::new(Self { name, bound, state, work: Condvar::new() })
    }

    pub(crate) fn run(self: &Arc<Self>, job: Job) {
        let mut state = self.state.lock().expect("no panic while the pool is locked");
        state.jobs.push_back(job);
        if state.idle >= state.jobs.len() || state.workers >= self.bound {
            drop(state);
            self.work.notify_one();
            return;
        }
        state.workers += 1;
        drop(state);
        let pool = Arc::clone(self);
        if let Err(error) = std::thread::Builder::new().name(self.name.into()).spawn(move || pool.work()) {
            let mut state = self.state.lock().expect("no panic while the pool is locked");
            state.workers -= 1;
            // With at least one worker the job waits for it; without any it is done here, on this thread.
            let job = if state.workers == 0 { state.jobs.pop_back() } else { None };
            drop(state);
            tracing::warn!(%error, "a worker thread could not be started");
            if let Some(job) = job {
                job();
            }
        }
    }

    fn work(&self) {
        let mut state = self.state.lock().expect("no panic while the pool is locked");
        loop {
            if let Some(job) = state.jobs.pop_front() {
                drop(state);
                job();
                state = self.state.lock().expect("no panic while the pool is locked");
                continue;
            }
            state.idle += 1;
            let (after, waited) = self.work.wait_timeout(state, IDLE).expect("no panic while the pool is locked");
            state = after;
            state.idle -= 1;
            if waited.timed_out() && state.jobs.is_empty() {
                state.workers -= 1;
                return;
            }
        }
    }
}

/// Runs `f` on a thread that may block or compute for long, and waits for its result here without blocking.
///
/// Dropping the future does not stop `f`.
///
/// # Panics
/// Passes on a panic of `f`.
pub async fn offload<T: Send + 'static>(f: impl FnOnce() -> T + Send + 'static) -> T {
    run_on(&OFFLOAD, f).await
}

/// The same for calls to what may be far away, slow, or hang: they take no thread from those of [`offload`], for which guests wait.
///
/// # Panics
/// Passes on a panic of `f`.
pub async fn offload_remote<T: Send + 'static>(f: impl FnOnce() -> T + Send + 'static) -> T {
    run_on(&REMOTE, f).await
}

async fn run_on<T: Send + 'static>(pool: &Arc<Pool>, f: impl FnOnce() -> T + Send + 'static) -> T {
    let (send, receive) = futures_channel::oneshot::channel();
    pool.run(Box::new(move || {
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(f));
        let _ = send.send(result); // Nobody may wait any more.
    }));
    match receive.await.expect("the pool runs every job to its end") {
        Ok(output) => output,
        Err(panic) => std::panic::resume_unwind(panic),
    }
}
