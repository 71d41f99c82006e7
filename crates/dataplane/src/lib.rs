//! I/O threads: a single-threaded executor each, over one io_uring or, where that is forbidden, a pool of
//! blocking threads; files, sockets and timers on it.
//!
//! ```text
//! IoThreads ── IoThread (Send handle: spawn) ── executor: tasks, timers
//!                                                  └─ driver: io_uring │ poll + pool
//! ```
//!
//! A task stays on the thread it was spawned on; its future need not be `Send`. One turn of a thread runs all
//! tasks that are ready, then enters the kernel once: to submit what they queued, and to wait if nothing is
//! ready.
//!
//! Operations own their buffers and descriptors until the kernel is done with them. A future that is dropped
//! leaves its operation to run to its end.
//!
//! Invariant: tokio does not appear here, and nothing here knows of disks, images or protocols.

mod blocking;
mod driver;
mod executor;
pub mod file;
mod io_thread;
pub mod net;
mod op;
mod task;
mod time;

pub use blocking::{offload, offload_remote};
pub use driver::Backend;
pub use executor::block_on;
pub use io_thread::{IoThread, IoThreads, IoThreadsConfig, Remote, Stopped, current};
pub use task::{LocalTask, spawn_local, start_local};
pub use time::{sleep, timeout, yield_now};
