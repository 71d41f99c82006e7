//! Disks on their home threads.
//!
//! A stack of layers is not `Send`: it is made on one I/O thread and stays there, in that thread's registry,
//! under the id that the engine gave it. Other threads reach it by sending a task there.

use crate::EngineError;
use crate::exports::Served;
use crate::history::contexts;
use crate::images::stack::Stack;
use dataplane::IoThread;
use disk::{DiskError, ErrorKind, Operation};
use export_nbd::DiskSource;
use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

/// How long a disk's storage may take for the last flush.
const CLOSE_LIMIT: Duration = Duration::from_secs(30);

/// Names a disk for as long as the process lives; never used twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct DiskId(pub(crate) u64);

thread_local! {
    static DISKS: RefCell<HashMap<DiskId, Rc<Stack>>> = RefCell::default();
}

/// Where a disk lives.
#[derive(Clone, Debug)]
pub(crate) struct Home {
    pub(crate) thread: IoThread,
    pub(crate) id: DiskId,
}

/// The disk, for somebody who is on its thread.
pub(crate) fn stack_here(id: DiskId) -> Option<Rc<Stack>> {
    DISKS.with_borrow(|disks| disks.get(&id).cloned())
}

impl Home {
    /// Runs `f` beside the disk.
    pub(crate) async fn with<T, F, Fut>(&self, f: F) -> Result<T, EngineError>
    where
        F: FnOnce(Rc<Stack>) -> Fut + Send + 'static,
        Fut: Future<Output = Result<T, EngineError>> + 'static,
        T: Send + 'static,
    {
        let id = self.id;
        self.thread
            .spawn(move || async move {
                let stack = DISKS.with_borrow(|disks| disks.get(&id).cloned()).ok_or(EngineError::ThreadGone)?;
                f(stack).await
            })
            .await
            .map_err(|_| EngineError::ThreadGone)?
    }

    /// Opens the disk with `open`, keeps it, and returns what `tell` says about it.
    pub(crate) async fn open<T, F, Fut>(
        &self,
        open: F,
        tell: impl FnOnce(&Stack) -> T + Send + 'static,
    ) -> Result<T, EngineError>
    where
        F: FnOnce() -> Fut + Send + 'static,
        Fut: Future<Output = Result<Stack, EngineError>> + 'static,
        T: Send + 'static,
    {
        let id = self.id;
        self.thread
            .spawn(move || async move {
                let stack = open().await?;
                let told = tell(&stack);
                DISKS.with_borrow_mut(|disks| disks.insert(id, Rc::new(stack)));
                Ok(told)
            })
            .await
            .map_err(|_| EngineError::ThreadGone)?
    }

    /// What an export of the disk shows.
    pub(crate) fn served(&self) -> Served {
        let contexts = contexts::of_disk(self.id);
        Served { thread: self.thread.clone(), disk: self.disk_source(), contexts }
    }

    /// The way to the disk for somebody who is on its thread.
    fn disk_source(&self) -> DiskSource {
        let id = self.id;
        Arc::new(move || DISKS.with_borrow(|disks| disks.get(&id).map(|stack| stack.disk().clone())))
    }

    /// Flushes and closes the disk; it is gone afterwards, even when that failed.
    pub(crate) async fn close(&self) -> Result<(), EngineError> {
        let id = self.id;
        self.thread
            .spawn(move || async move {
                match DISKS.with_borrow_mut(|disks| disks.remove(&id)) {
                    Some(stack) => match dataplane::timeout(CLOSE_LIMIT, stack.close()).await {
                        Some(closed) => closed,
                        None => Err(DiskError::new(ErrorKind::Io, Operation::Close)
                            .because(format!(
                                "not done within {} s: its storage does not answer; what was not flushed may be lost",
                                CLOSE_LIMIT.as_secs()
                            ))
                            .into()),
                    },
                    None => Ok(()),
                }
            })
            .await
            .map_err(|_| EngineError::ThreadGone)?
    }
}
