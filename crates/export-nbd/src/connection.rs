//! What is known of a connection beyond its bytes: who it is, and whether it is to end.

use futures_util::task::AtomicWaker;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex};
use std::task::Waker;
use std::time::SystemTime;

/// A connection, for people.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConnectionInfo {
    /// Unique in the server's life.
    pub id: u64,
    /// Address and port, or the process at the other end of a unix socket.
    pub peer: String,
    /// When it was accepted.
    pub since: SystemTime,
    /// The export's name, once it is known.
    pub export: Option<String>,
    /// Whether the connection is encrypted.
    pub encrypted: bool,
}

/// How a connection is to go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub(crate) enum Course {
    Run = 0,
    /// Take no more requests, finish those under way, end.
    Drain = 1,
    /// End at once; what is under way is finished, but nobody is told.
    Abort = 2,
}

/// The server's grip on a connection; any thread.
pub(crate) struct Control {
    course: AtomicU8,
    waker: AtomicWaker,
    info: Mutex<ConnectionInfo>,
}

impl Control {
    pub(crate) fn new(id: u64, peer: String) -> Arc<Self> {
        let info = ConnectionInfo { id, peer, since: SystemTime::now(), export: None, encrypted: false };
        Arc::new(Self { course: AtomicU8::new(0), waker: AtomicWaker::new(), info: Mutex::new(info) })
    }

    pub(crate) fn info(&self) -> ConnectionInfo {
        self.info.lock().expect("no panic while the lock is held").clone()
    }

    pub(crate) fn update(&self, change: impl FnOnce(&mut ConnectionInfo)) {
        change(&mut self.info.lock().expect("no panic while the lock is held"));
    }

    /// Changes the course; never back.
    pub(crate) fn set(&self, course: Course) {
        self.course.fetch_max(course as u8, Ordering::AcqRel);
        self.waker.wake();
    }

    pub(crate) fn course(&self) -> Course {
        match self.course.load(Ordering::Acquire) {
            0 => Course::Run,
            1 => Course::Drain,
            _ => Course::Abort,
        }
    }

    /// As [`Control::course`]; the one waker is woken when that changes.
    pub(crate) fn poll_course(&self, waker: &Waker) -> Course {
        self.waker.register(waker);
        self.course()
    }
}
