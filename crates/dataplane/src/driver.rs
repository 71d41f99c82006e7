//! What carries operations out: io_uring, or a poll loop with blocking workers.

mod poll;
mod uring;

use crate::executor::{Core, Shared};
use std::io;
use std::sync::Arc;
use std::time::Duration;

/// What I/O threads use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Backend {
    /// io_uring where the kernel allows it, threads otherwise.
    #[default]
    Auto,
    /// One io_uring per I/O thread.
    Uring,
    /// `poll(2)` for sockets, a bounded pool of blocking threads for files: where io_uring is forbidden, as in
    /// most containers.
    Threads,
}

impl Backend {
    /// `Uring` or `Threads`: what this becomes on this machine.
    ///
    /// # Errors
    /// When `Uring` is demanded and the kernel refuses it.
    pub fn resolve(self) -> io::Result<Self> {
        match self {
            Self::Threads => Ok(Self::Threads),
            Self::Uring => uring::Uring::probe().map(|()| Self::Uring).map_err(|error| {
                let hint = "io_uring is refused here (a container's seccomp filter, or sysctl \
                            kernel.io_uring_disabled); use the threads backend";
                io::Error::new(error.kind(), format!("{hint}: {error}"))
            }),
            Self::Auto => match uring::Uring::probe() {
                Ok(()) => Ok(Self::Uring),
                Err(error) => {
                    tracing::info!(%error, "io_uring is refused here; using threads");
                    Ok(Self::Threads)
                }
            },
        }
    }
}

pub(crate) enum Driver {
    Uring(Box<uring::Uring>),
    Poll(poll::Poller),
}

impl Driver {
    pub(crate) fn new(backend: Backend, shared: &Arc<Shared>) -> io::Result<Self> {
        Ok(match backend.resolve()? {
            Backend::Threads => Self::Poll(poll::Poller::new(shared)),
            Backend::Uring | Backend::Auto => Self::Uring(Box::new(uring::Uring::new(shared)?)),
        })
    }

    /// Starts the operation with this key.
    pub(crate) fn submit(&self, core: &Core, key: usize) {
        match self {
            Self::Uring(uring) => uring.submit(core, key),
            Self::Poll(poller) => poller.submit(core, key),
        }
    }

    /// A worker has brought back an operation on the file with this descriptor.
    pub(crate) fn file_done(&self, core: &Core, descriptor: i32) {
        if let Self::Poll(poller) = self {
            poller.file_done(core, descriptor);
        }
    }

    /// Asks the kernel to give the operation up; it completes in any case.
    pub(crate) fn cancel(&self, core: &Core, key: usize) {
        match self {
            Self::Uring(uring) => uring.cancel(core, key),
            Self::Poll(poller) => poller.cancel(core, key),
        }
    }

    /// Gives up everything that waits for a peer.
    pub(crate) fn cancel_all(&self, core: &Core) {
        for key in core.ops.socket_keys() {
            self.cancel(core, key);
        }
    }

    /// Hands over what is queued and takes what has completed; waits for something to happen if `wait` is
    /// given, no longer than its duration.
    pub(crate) fn turn(&self, core: &Core, wait: Option<Option<Duration>>) {
        match self {
            Self::Uring(uring) => uring.turn(core, wait),
            Self::Poll(poller) => poller.turn(core, wait),
        }
    }
}
