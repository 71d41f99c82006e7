//! Operations through io_uring.
#![allow(unsafe_code)] // Hands pointers to the kernel; argued at each block.

use crate::executor::{Core, Shared};
use crate::file::MAX_TRANSFER;
use crate::op::{FileRequest, Request, SocketRequest};
use io_uring::squeue::Entry;
use io_uring::types::{Fd, FsyncFlags, SubmitArgs, Timespec};
use io_uring::{IoUring, opcode};
use std::cell::{Cell, RefCell};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

/// Submissions that can be queued between two calls of the kernel; more make an extra call.
const ENTRIES: u32 = 256;
/// Completions that the ring holds; the kernel keeps further ones itself.
const COMPLETIONS: u32 = 4096;

/// The read of the eventfd that wakes the thread.
const WAKE: u64 = u64::MAX;
/// Cancellations: their own results do not matter.
const CANCEL: u64 = u64::MAX - 1;

pub(crate) struct Uring {
    ring: RefCell<IoUring>,
    eventfd: Arc<OwnedFd>,
    /// A poll of the eventfd is under way.
    armed: Cell<bool>,
}

fn build() -> io::Result<IoUring> {
    let first = IoUring::builder()
        .setup_cqsize(COMPLETIONS)
        .setup_submit_all()
        .setup_coop_taskrun()
        .setup_taskrun_flag()
        .setup_single_issuer()
        .setup_defer_taskrun()
        .build(ENTRIES);
    match first {
        // Older kernels know fewer flags.
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
            IoUring::builder().setup_cqsize(COMPLETIONS).build(ENTRIES)
        }
        other => other,
    }
}

impl Uring {
    /// Whether a ring can be made here that has all operations in use.
    pub(crate) fn probe() -> io::Result<()> {
        let ring = build()?;
        let mut probe = io_uring::Probe::new();
        ring.submitter().register_probe(&mut probe)?;
        let needed = [
            opcode::Read::CODE,
            opcode::Write::CODE,
            opcode::Fsync::CODE,
            opcode::Fallocate::CODE,
            opcode::Recv::CODE,
            opcode::SendMsg::CODE,
            opcode::PollAdd::CODE,
            opcode::AsyncCancel::CODE,
        ];
        let params = ring.params();
        let complete = needed.iter().all(|code| probe.is_supported(*code));
        if complete && params.is_feature_ext_arg() && params.is_feature_nodrop() && params.is_feature_submit_stable() {
            return Ok(());
        }
        Err(io::Error::new(io::ErrorKind::Unsupported, "this kernel's io_uring is too old (Linux 5.11 or later)"))
    }

    pub(crate) fn new(shared: &Arc<Shared>) -> io::Result<Self> {
        Ok(Self { ring: RefCell::new(build()?), eventfd: Arc::clone(&shared.eventfd), armed: Cell::new(false) })
    }

    pub(crate) fn submit(&self, core: &Core, key: usize) {
        let entry = core.ops.with_request(key, entry_of).expect("the request was just put there");
        self.push(core, entry.user_data(key as u64));
    }

    pub(crate) fn cancel(&self, core: &Core, key: usize) {
        // The key cannot have been given to another operation when the kernel sees this: keys are free only
        // after their completion was taken, and whatever uses one again is queued behind.
        self.push(core, opcode::AsyncCancel::new(key as u64).build().user_data(CANCEL));
    }

    fn push(&self, core: &Core, entry: Entry) {
        loop {
            // SAFETY: what the entry points to is owned by the table of operations, at addresses that do not
            // change, until the completion has been taken.
            if unsafe { self.ring.borrow_mut().submission().push(&entry) }.is_ok() {
                return;
            }
            self.enter(None);
            self.reap(core);
        }
    }

    pub(crate) fn turn(&self, core: &Core, wait: Option<Option<Duration>>) {
        let ready = {
            let mut ring = self.ring.borrow_mut();
            !ring.completion().is_empty()
        };
        let mut wait = if ready { None } else { wait };
        if wait.is_some() && !self.armed.replace(true) {
            let wake = opcode::PollAdd::new(Fd(self.eventfd.as_raw_fd()), libc::POLLIN as u32).build();
            self.push(core, wake.user_data(WAKE));
            // A full queue is submitted by the push, and what has completed then has woken tasks already.
            if core.has_ready() {
                wait = None;
            }
        }
        let needed = wait.is_some() || {
            let mut ring = self.ring.borrow_mut();
            let queue = ring.submission();
            !queue.is_empty() || queue.taskrun() || queue.cq_overflow()
        };
        if needed {
            self.enter(wait);
        }
        self.reap(core);
    }

    /// One call of the kernel: submits everything, runs what it deferred, and waits for a completion.
    fn enter(&self, wait: Option<Option<Duration>>) {
        let ring = self.ring.borrow();
        let submitter = ring.submitter();
        let result = match wait {
            None => submitter.submit(),
            Some(None) => submitter.submit_and_wait(1),
            Some(Some(timeout)) => {
                let timeout = Timespec::from(timeout);
                submitter.submit_with_args(1, &SubmitArgs::new().timespec(&timeout))
            }
        };
        match result {
            Ok(_) => {}
            Err(error) => match error.raw_os_error() {
                // Interrupted; time over; the completion queue is full or memory short: the caller takes
                // completions and comes again.
                Some(libc::EINTR | libc::ETIME | libc::EBUSY | libc::EAGAIN) => {}
                _ => panic!("io_uring_enter: {error}"),
            },
        }
    }

    fn reap(&self, core: &Core) {
        loop {
            // One at a time, as a completion may queue new entries.
            let Some(completion) = self.ring.borrow_mut().completion().next() else { return };
            match completion.user_data() {
                CANCEL => {}
                WAKE => {
                    self.armed.set(false);
                    let mut count = [0; 8];
                    // Empty already when two wakes met; nothing to do then.
                    let _ = rustix::io::read(&self.eventfd, &mut count);
                }
                key => core.ops.complete(key as usize, completion.result()),
            }
        }
    }
}

fn transfer(len: usize) -> u32 {
    len.min(MAX_TRANSFER) as u32
}

fn entry_of(request: &mut Request) -> Entry {
    match request {
        Request::File(request) => match request {
            FileRequest::Read { file, offset, buf } => {
                opcode::Read::new(Fd(file.raw()), buf.as_mut_ptr(), transfer(buf.len())).offset(*offset).build()
            }
            FileRequest::Write { file, offset, buf } => {
                opcode::Write::new(Fd(file.raw()), buf.as_ptr(), transfer(buf.len())).offset(*offset).build()
            }
            FileRequest::DataSync { file } => opcode::Fsync::new(Fd(file.raw())).flags(FsyncFlags::DATASYNC).build(),
            FileRequest::Allocate { file, mode, offset, len } => {
                opcode::Fallocate::new(Fd(file.raw()), *len).offset(*offset).mode(*mode).build()
            }
        },
        Request::Socket(request) => match request {
            SocketRequest::Receive { socket, buf, flags } => {
                opcode::Recv::new(Fd(socket.as_raw_fd()), buf.as_mut_ptr(), transfer(buf.len())).flags(*flags).build()
            }
            SocketRequest::Send { socket, message } => opcode::SendMsg::new(Fd(socket.as_raw_fd()), message.header())
                .flags(crate::net::SEND_FLAGS as u32)
                .build(),
            SocketRequest::Ready { fd, events } => {
                opcode::PollAdd::new(Fd(fd.as_raw_fd()), u32::from(events.cast_unsigned())).build()
            }
        },
    }
}
