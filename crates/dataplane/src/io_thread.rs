//! I/O threads and the handles that other threads hold.

use crate::driver::Backend;
use crate::executor::{self, Injected, Shared};
use crate::task::spawn_on;
use futures_channel::oneshot;
use std::fmt;
use std::future::{Future, poll_fn};
use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, mpsc};
use std::task::{Context, Poll, Wake, Waker};
use std::thread::{self, JoinHandle, Thread};

/// How many I/O threads, and on what.
#[derive(Clone, Copy, Debug)]
pub struct IoThreadsConfig {
    /// Number of threads, at least 1; 0 takes one per processor.
    pub threads: usize,
    /// What they use.
    pub backend: Backend,
}

impl Default for IoThreadsConfig {
    fn default() -> Self {
        Self { threads: 0, backend: Backend::Auto }
    }
}

/// A set of I/O threads. Stops and joins them when dropped: tasks under way are dropped, operations under way
/// are waited for.
pub struct IoThreads {
    handles: Vec<IoThread>,
    joins: Vec<JoinHandle<()>>,
    stop: Arc<Stop>,
    next: AtomicUsize,
    backend: Backend,
}

/// Tells all threads of a set to end.
struct Stop {
    requested: AtomicBool,
    wakers: std::sync::Mutex<Vec<Waker>>,
}

impl Stop {
    fn request(&self) {
        self.requested.store(true, Ordering::SeqCst);
        for waker in self.wakers.lock().expect("no panic while the list is locked").drain(..) {
            waker.wake();
        }
    }

    async fn requested(&self) {
        poll_fn(|cx| {
            let mut wakers = self.wakers.lock().expect("no panic while the list is locked");
            if self.requested.load(Ordering::SeqCst) {
                return Poll::Ready(());
            }
            if !wakers.iter().any(|waker| waker.will_wake(cx.waker())) {
                wakers.push(cx.waker().clone());
            }
            Poll::Pending
        })
        .await;
    }
}

impl IoThreads {
    /// Starts the threads.
    ///
    /// # Errors
    /// When a thread cannot be started, or `Backend::Uring` is asked for and refused by the kernel.
    pub fn start(config: IoThreadsConfig) -> io::Result<Self> {
        let threads = match config.threads {
            0 => thread::available_parallelism().map_or(1, usize::from),
            n => n,
        };
        // Resolved once, so that all threads are alike.
        let backend = config.backend.resolve()?;
        let mut this = Self {
            handles: Vec::new(),
            joins: Vec::new(),
            stop: Arc::new(Stop { requested: AtomicBool::new(false), wakers: std::sync::Mutex::default() }),
            next: AtomicUsize::new(0),
            backend,
        };
        for n in 0..threads {
            let (send, receive) = mpsc::channel();
            let stop = Arc::clone(&this.stop);
            this.joins.push(thread::Builder::new().name(format!("io-{n}")).spawn(move || {
                let started = send.clone();
                let tell = |core: &std::rc::Rc<executor::Core>| {
                    let _ = started.send(Ok(Arc::clone(&core.shared)));
                    Ok(())
                };
                if let Err(error) = executor::enter(backend, tell, stop.requested()) {
                    let _ = send.send(Err(error));
                }
            })?);
            let shared = receive.recv().map_err(|_| io::Error::other("an I/O thread ended at once"))??;
            this.handles.push(IoThread { shared });
        }
        Ok(this)
    }

    /// All threads.
    pub fn all(&self) -> &[IoThread] {
        &self.handles
    }

    /// The thread with the fewest tasks spawned from outside; in turn among equals.
    pub fn pick(&self) -> IoThread {
        let count = self.handles.len();
        let first = self.next.fetch_add(1, Ordering::Relaxed) % count;
        let best = (0..count)
            .map(|n| &self.handles[(first + n) % count])
            .min_by_key(|thread| thread.shared.load.load(Ordering::Relaxed));
        best.expect("there is at least one thread").clone()
    }

    /// What the threads use: `Uring` or `Threads`.
    pub fn backend(&self) -> Backend {
        self.backend
    }

    /// Stops and joins the threads.
    pub fn shutdown(self) {}
}

impl Drop for IoThreads {
    fn drop(&mut self) {
        self.stop.request();
        for join in self.joins.drain(..) {
            // A thread that drops its own set cannot wait for itself.
            if join.thread().id() != thread::current().id() && join.join().is_err() {
                tracing::error!("an I/O thread panicked");
            }
        }
    }
}

impl fmt::Debug for IoThreads {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "IoThreads({} × {:?})", self.handles.len(), self.backend)
    }
}

/// A handle to one I/O thread.
#[derive(Clone)]
pub struct IoThread {
    shared: Arc<Shared>,
}

impl IoThread {
    /// Starts a task on the thread: `f` is called there, and the future that it makes stays there.
    ///
    /// Dropping the [`Remote`] lets the task run on alone.
    pub fn spawn<F, Fut>(&self, f: F) -> Remote<Fut::Output>
    where
        F: FnOnce() -> Fut + Send + 'static,
        Fut: Future + 'static,
        Fut::Output: Send + 'static,
    {
        let (send, receive) = oneshot::channel();
        let load = Load::new(&self.shared);
        self.shared.inject(Injected::Job(Box::new(move |core| {
            let future = f();
            drop(spawn_on(core, async move {
                let output = future.await;
                drop(load); // Before anybody learns of the end.
                let _ = send.send(output); // Nobody may wait any more.
            }));
        })));
        Remote { receive }
    }

    /// Whether the calling thread is this one.
    pub fn is_current(&self) -> bool {
        executor::current_core().is_some_and(|core| Arc::ptr_eq(&core.shared, &self.shared))
    }
}

impl PartialEq for IoThread {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.shared, &other.shared)
    }
}

impl Eq for IoThread {}

impl fmt::Debug for IoThread {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "IoThread({:p})", Arc::as_ptr(&self.shared))
    }
}

/// The I/O thread that the caller runs on.
pub fn current() -> Option<IoThread> {
    executor::current_core().map(|core| IoThread { shared: Arc::clone(&core.shared) })
}

/// Counts one task spawned from outside.
struct Load(Arc<Shared>);

impl Load {
    fn new(shared: &Arc<Shared>) -> Self {
        shared.load.fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(shared))
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.0.load.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The thread stopped before the task ended, or the task panicked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stopped;

impl fmt::Display for Stopped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the I/O thread stopped before the task ended, or the task panicked")
    }
}

impl std::error::Error for Stopped {}

/// The output of a task on an I/O thread. Any executor may await it; dropping it detaches the task.
#[derive(Debug)]
#[must_use = "await it, call `wait`, or drop it to detach the task"]
pub struct Remote<T> {
    receive: oneshot::Receiver<T>,
}

impl<T> Future for Remote<T> {
    type Output = Result<T, Stopped>;
    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        Pin::new(&mut self.receive).poll(cx).map_err(|_| Stopped)
    }
}

impl<T> Remote<T> {
    /// Blocks the calling thread until the task has ended. Not for I/O threads: they would stand still, and
    /// for ever if the task is on the same one.
    pub fn wait(mut self) -> Result<T, Stopped> {
        struct Unpark(Thread);
        impl Wake for Unpark {
            fn wake(self: Arc<Self>) {
                self.0.unpark();
            }
        }
        let waker = Waker::from(Arc::new(Unpark(thread::current())));
        let mut cx = Context::from_waker(&waker);
        loop {
            match Pin::new(&mut self).poll(&mut cx) {
                Poll::Ready(result) => return result,
                Poll::Pending => thread::park(),
            }
        }
    }
}
