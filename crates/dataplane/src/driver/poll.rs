//! Operations without io_uring: sockets by `poll(2)` on the I/O thread, files by blocking workers.

use crate::blocking;
use crate::executor::{Core, Injected, Shared};
use crate::op::{Request, SocketRequest};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::cell::RefCell;
use std::collections::{HashMap, VecDeque};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

/// A socket operation that waits for its descriptor.
struct Waiting {
    key: usize,
    fd: Arc<OwnedFd>,
    events: PollFlags,
}

pub(crate) struct Poller {
    shared: Arc<Shared>,
    waiting: RefCell<Vec<Waiting>>,
    /// By descriptor, files that workers are busy with.
    files: RefCell<HashMap<i32, Busy>>,
}

/// What workers have to do with one file.
#[derive(Default)]
struct Busy {
    at_work: usize,
    /// Keys of operations that wait for those at work.
    waiting: VecDeque<usize>,
}

/// What trying a socket operation led to.
enum Tried {
    Done(i32),
    WouldBlock(Arc<OwnedFd>, PollFlags),
}

fn attempt(request: &mut SocketRequest) -> Tried {
    let (result, fd, events) = match request {
        SocketRequest::Receive { socket, buf, flags } => {
            (crate::net::receive_now(socket, buf, *flags), socket, PollFlags::IN)
        }
        SocketRequest::Send { socket, message } => (crate::net::send_now(socket, message), socket, PollFlags::OUT),
        SocketRequest::Ready { fd, events } => {
            let flags = PollFlags::from_bits_retain(events.cast_unsigned());
            let mut one = [PollFd::new(fd, flags)];
            let result = match poll(&mut one, Some(&Timespec::default())) {
                Ok(0) => -libc::EAGAIN,
                Ok(_) => i32::from(one[0].revents().bits()),
                Err(error) => -error.raw_os_error(),
            };
            (result, fd, flags)
        }
    };
    if result == -libc::EAGAIN || result == -libc::EINTR {
        return Tried::WouldBlock(Arc::clone(fd), events);
    }
    Tried::Done(result)
}

impl Poller {
    pub(crate) fn new(shared: &Arc<Shared>) -> Self {
        Self { shared: Arc::clone(shared), waiting: RefCell::default(), files: RefCell::default() }
    }

    pub(crate) fn submit(&self, core: &Core, key: usize) {
        let descriptor = core.ops.with_request(key, |request| match request {
            Request::File(request) => Some(request.descriptor()),
            Request::Socket(_) => None,
        });
        if let Some(descriptor) = descriptor.flatten() {
            let mut files = self.files.borrow_mut();
            let busy = files.entry(descriptor).or_default();
            if busy.at_work >= blocking::PER_FILE {
                busy.waiting.push_back(key);
                return;
            }
            busy.at_work += 1;
            drop(files);
            return self.hand_over(core, key);
        }
        if let Some(waiting) = self.attempt(core, key) {
            self.waiting.borrow_mut().push(waiting);
        }
    }

    /// Gives a file operation to a worker.
    fn hand_over(&self, core: &Core, key: usize) {
        let mut request = core.ops.take_file(key).expect("a file operation that no worker has");
        let shared = Arc::clone(&self.shared);
        blocking::FILES.run(Box::new(move || {
            let result = request.perform();
            shared.inject(Injected::Complete(key, result, request));
        }));
    }

    /// A worker has brought back an operation on the file with this descriptor.
    pub(crate) fn file_done(&self, core: &Core, descriptor: i32) {
        let next = {
            let mut files = self.files.borrow_mut();
            let Some(busy) = files.get_mut(&descriptor) else { return };
            let next = busy.waiting.pop_front();
            if next.is_none() {
                busy.at_work -= 1;
                if busy.at_work == 0 {
                    files.remove(&descriptor);
                }
            }
            next
        };
        if let Some(key) = next {
            self.hand_over(core, key);
        }
    }

    /// Tries a socket operation; completes it, or says what it waits for.
    fn attempt(&self, core: &Core, key: usize) -> Option<Waiting> {
        let tried = core.ops.with_request(key, |request| match request {
            Request::Socket(request) => attempt(request),
            Request::File(_) => unreachable!("file requests go to the workers"),
        })?;
        match tried {
            Tried::Done(result) => {
                core.ops.complete(key, result);
                None
            }
            Tried::WouldBlock(fd, events) => Some(Waiting { key, fd, events }),
        }
    }

    pub(crate) fn cancel(&self, core: &Core, key: usize) {
        let found = {
            let mut waiting = self.waiting.borrow_mut();
            let at = waiting.iter().position(|w| w.key == key);
            at.map(|at| waiting.swap_remove(at))
        };
        if found.is_some() {
            core.ops.complete(key, -libc::ECANCELED);
        }
    }

    pub(crate) fn turn(&self, core: &Core, wait: Option<Option<Duration>>) {
        let ready: Vec<usize> = {
            let waiting = self.waiting.borrow();
            if waiting.is_empty() && wait.is_none() {
                return;
            }
            let mut fds = Vec::with_capacity(waiting.len() + 1);
            fds.push(PollFd::from_borrowed_fd(self.shared.eventfd.as_fd(), PollFlags::IN));
            fds.extend(waiting.iter().map(|w| PollFd::from_borrowed_fd(as_borrowed(&w.fd), w.events)));
            let timeout = match wait {
                None => Some(Timespec::default()),
                Some(None) => None,
                // A duration beyond what the kernel can express is as good as none.
                Some(Some(timeout)) => Timespec::try_from(timeout).ok(),
            };
            match poll(&mut fds, timeout.as_ref()) {
                Ok(0) => return,
                Ok(_) => {}
                Err(rustix::io::Errno::INTR | rustix::io::Errno::AGAIN | rustix::io::Errno::NOMEM) => return,
                Err(error) => panic!("poll: {error}"),
            }
            if !fds[0].revents().is_empty() {
                let mut count = [0; 8];
                // Empty already when two wakes met; nothing to do then.
                let _ = rustix::io::read(&self.shared.eventfd, &mut count);
            }
            let pairs = waiting.iter().zip(&fds[1..]);
            pairs.filter(|(_, fd)| !fd.revents().is_empty()).map(|(w, _)| w.key).collect()
        };
        for key in ready {
            let entry = {
                let mut waiting = self.waiting.borrow_mut();
                // An operation that ended meanwhile may have been cancelled by what it woke.
                let Some(at) = waiting.iter().position(|w| w.key == key) else { continue };
                waiting.swap_remove(at)
            };
            drop(entry);
            if let Some(waiting) = self.attempt(core, key) {
                self.waiting.borrow_mut().push(waiting);
            }
        }
    }
}

fn as_borrowed(fd: &Arc<OwnedFd>) -> BorrowedFd<'_> {
    fd.as_fd()
}
