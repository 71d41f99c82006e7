//! Operations under way: who owns what until the kernel is done.

use crate::executor::Core;
use crate::file::File;
use disk::Buf;
use slab::Slab;
use std::cell::{Cell, RefCell};
use std::future::Future;
use std::os::fd::OwnedFd;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

/// What is asked of a file. Owns all that the kernel touches meanwhile.
pub(crate) enum FileRequest {
    Read { file: File, offset: u64, buf: Buf },
    Write { file: File, offset: u64, buf: Buf },
    DataSync { file: File },
    Allocate { file: File, mode: i32, offset: u64, len: u64 },
}

/// What is asked of a socket.
pub(crate) enum SocketRequest {
    Receive {
        socket: Arc<OwnedFd>,
        buf: Buf,
        flags: i32,
    },
    Send {
        socket: Arc<OwnedFd>,
        message: Box<crate::net::Message>,
    },
    /// Wait until one of the poll events shows.
    Ready {
        fd: Arc<OwnedFd>,
        events: i16,
    },
}

pub(crate) enum Request {
    File(FileRequest),
    Socket(SocketRequest),
}

enum State {
    Waiting(Option<Waker>),
    Done(i32),
    /// Nobody waits for the result any more.
    Orphaned,
}

struct Entry {
    state: State,
    /// Away while a blocking worker has it.
    request: Option<Request>,
}

/// The table of operations of one executor. A key stays taken until the kernel's answer has arrived.
#[derive(Default)]
pub(crate) struct Operations {
    table: RefCell<Slab<Entry>>,
    in_flight: Cell<usize>,
}

impl Operations {
    /// Operations that the kernel or a worker still has.
    pub(crate) fn in_flight(&self) -> usize {
        self.in_flight.get()
    }

    fn insert(&self, request: Request) -> usize {
        self.in_flight.set(self.in_flight.get() + 1);
        self.table.borrow_mut().insert(Entry { state: State::Waiting(None), request: Some(request) })
    }

    /// Looks at a request that is under way.
    pub(crate) fn with_request<R>(&self, key: usize, look: impl FnOnce(&mut Request) -> R) -> Option<R> {
        self.table.borrow_mut().get_mut(key)?.request.as_mut().map(look)
    }

    /// Takes a file request away, for a worker.
    pub(crate) fn take_file(&self, key: usize) -> Option<FileRequest> {
        let mut table = self.table.borrow_mut();
        let entry = table.get_mut(key)?;
        match entry.request.take() {
            Some(Request::File(request)) => Some(request),
            other => {
                entry.request = other;
                None
            }
        }
    }

    /// A worker brings a file request back.
    pub(crate) fn complete_file(&self, key: usize, result: i32, request: FileRequest) {
        if let Some(entry) = self.table.borrow_mut().get_mut(key) {
            entry.request = Some(Request::File(request));
        }
        self.complete(key, result);
    }

    /// The kernel is done with the operation.
    pub(crate) fn complete(&self, key: usize, result: i32) {
        let mut table = self.table.borrow_mut();
        let Some(entry) = table.get_mut(key) else {
            debug_assert!(false, "completion of an operation that nobody started");
            return;
        };
        self.in_flight.set(self.in_flight.get() - 1);
        match std::mem::replace(&mut entry.state, State::Done(result)) {
            State::Waiting(waker) => {
                drop(table);
                if let Some(waker) = waker {
                    waker.wake();
                }
            }
            State::Orphaned => {
                let entry = table.remove(key);
                drop(table);
                drop(entry); // Gives back the buffer and the descriptor.
            }
            State::Done(_) => debug_assert!(false, "an operation completed twice"),
        }
    }

    /// Keys of what waits for a peer, for cancelling at the end.
    pub(crate) fn socket_keys(&self) -> Vec<usize> {
        let table = self.table.borrow();
        let waits =
            |entry: &Entry| matches!(entry.request, Some(Request::Socket(_))) && !matches!(entry.state, State::Done(_));
        table.iter().filter(|(_, entry)| waits(entry)).map(|(key, _)| key).collect()
    }
}

/// One operation: a future of its result (negative: an errno) and of what it owned.
///
/// Dropped early, it leaves the operation to the table; what waits for a peer is cancelled then.
pub(crate) struct Op {
    core: Rc<Core>,
    key: Option<usize>,
}

impl Op {
    /// Starts an operation on this thread's executor.
    ///
    /// # Panics
    /// Outside of an executor.
    pub(crate) fn start(request: Request) -> Self {
        let core = crate::executor::current_core().expect("I/O outside of an I/O thread");
        Self::start_on(core, request)
    }

    pub(crate) fn start_on(core: Rc<Core>, request: Request) -> Self {
        let key = core.ops.insert(request);
        core.driver.submit(&core, key);
        Self { core, key: Some(key) }
    }
}

impl Future for Op {
    type Output = (i32, Request);

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let key = self.key.expect("an operation is not polled after its end");
        let finished = {
            let mut table = self.core.ops.table.borrow_mut();
            let entry = &mut table[key];
            match &mut entry.state {
                State::Done(result) => {
                    let result = *result;
                    let entry = table.remove(key);
                    (result, entry.request.expect("a finished operation has its request back"))
                }
                State::Waiting(Some(waker)) if waker.will_wake(cx.waker()) => return Poll::Pending,
                state => {
                    *state = State::Waiting(Some(cx.waker().clone()));
                    return Poll::Pending;
                }
            }
        };
        self.key = None;
        Poll::Ready(finished)
    }
}

impl Drop for Op {
    fn drop(&mut self) {
        let Some(key) = self.key else { return };
        let mut table = self.core.ops.table.borrow_mut();
        let Some(entry) = table.get_mut(key) else { return };
        match entry.state {
            State::Done(_) => {
                let entry = table.remove(key);
                drop(table);
                drop(entry);
            }
            _ => {
                entry.state = State::Orphaned;
                let waits_for_peer = matches!(entry.request, Some(Request::Socket(_)));
                drop(table);
                if waits_for_peer {
                    self.core.driver.cancel(&self.core, key);
                }
            }
        }
    }
}

/// The result of a system call that reports errors as negative numbers.
pub(crate) fn io_result(result: i32) -> std::io::Result<usize> {
    usize::try_from(result).map_err(|_| std::io::Error::from_raw_os_error(result.saturating_neg()))
}
