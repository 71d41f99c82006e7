//! The job that works on the disk beside the guest, if there is one.

use crate::stack::Stack;
use crate::{Chain, Infill, LayerInfo, Mirror};
use disk::{Buf, ByteRange, DiskError, ErrorKind, Operation, Result, WriteFlags, ZeroMode};
use std::rc::Rc;

/// What every change of the guest's has to respect. One at a time: two jobs would each have to know of the other.
#[derive(Clone)]
pub(crate) enum Background {
    /// Changes go to another disk as well.
    Mirror(Rc<Mirror>),
    /// A layer takes up what those below it hold.
    Infill(Rc<Infill>),
}

impl Background {
    fn is_same(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Mirror(a), Self::Mirror(b)) => Rc::ptr_eq(a, b),
            (Self::Infill(a), Self::Infill(b)) => Rc::ptr_eq(a, b),
            _ => false,
        }
    }
}

impl Chain {
    /// The job beside the guest. A mirror that has failed is none any more.
    #[inline]
    pub(crate) fn background(&self) -> Option<Background> {
        self.background.borrow().as_ref().filter(|job| !matches!(job, Background::Mirror(m) if m.has_failed())).cloned()
    }

    /// Whether this very job is attached.
    pub(crate) fn is_attached(&self, job: &Background) -> bool {
        self.background().is_some_and(|attached| attached.is_same(job))
    }

    /// Whether this very job is there, though it may have failed.
    pub(crate) fn has_background(&self, job: &Background) -> bool {
        self.background.borrow().as_ref().is_some_and(|attached| attached.is_same(job))
    }

    /// Attaches a job, when no request is under way: from here on all know of it. `check` sees what the disk is then.
    pub(crate) async fn attach(&self, job: Background, check: impl FnOnce(&[LayerInfo]) -> Result<()>) -> Result<()> {
        let _exclusive = self.requests.exclude().await;
        if self.requests.is_closed() {
            return Err(DiskError::new(ErrorKind::Closed, Operation::Open));
        }
        let layers = self.layers();
        if self.background().is_some() {
            return Err(DiskError::new(ErrorKind::InUse, Operation::Open)
                .on(layers[0].path.display().to_string())
                .because("another job works on this disk; wait for its end, or cancel it"));
        }
        check(&layers)?;
        let failed = self.background.borrow().clone();
        if let Some(Background::Mirror(mirror)) = failed {
            // It was left to keep the top from what is not durable below it.
            mirror.release_parent().await?;
        }
        self.background.replace(Some(job));
        Ok(())
    }

    /// Detaches a job; no request of the guest's goes its way any more when this returns. `false`: it was not attached.
    pub(crate) async fn detach(&self, job: &Background) -> bool {
        let _exclusive = self.requests.exclude().await;
        let attached = self.has_background(job);
        if attached {
            self.background.replace(None);
        }
        attached
    }

    /// The layers as a change of the guest's sees them.
    pub(crate) fn stack<'a>(&self, layers: &'a [LayerInfo]) -> Stack<'a> {
        match &*self.background.borrow() {
            Some(Background::Infill(infill)) => infill.seen_by_guest(Stack::new(layers)),
            Some(Background::Mirror(mirror)) => mirror.seen_by_guest(Stack::new(layers)),
            _ => Stack::new(layers),
        }
    }

    /// A guest's write while a job works beside it.
    pub(crate) async fn write_beside(&self, job: Background, offset: u64, buf: Buf, flags: WriteFlags) -> Result<()> {
        let layers = self.layers();
        let stack = self.stack(&layers);
        match job {
            Background::Mirror(mirror) => mirror.write(stack, offset, buf, flags).await,
            Background::Infill(infill) => {
                let _lock = infill.lock_for_guest(ByteRange::new(offset, buf.len() as u64)).await;
                stack.write_top(offset, buf).await?;
                stack.finish_write(flags).await
            }
        }
    }

    /// A guest's zeroing while a job works beside it.
    pub(crate) async fn zero_beside(
        &self,
        job: Background,
        range: ByteRange,
        mode: ZeroMode,
        flags: WriteFlags,
    ) -> Result<()> {
        let layers = self.layers();
        let stack = self.stack(&layers);
        match job {
            Background::Mirror(mirror) => mirror.write_zeroes(stack, range, mode, flags).await,
            Background::Infill(infill) => {
                let _lock = infill.lock_for_guest(range).await;
                stack.zero_top(range, mode).await?;
                stack.finish_write(flags).await
            }
        }
    }

    /// A guest's discard while a job works beside it.
    pub(crate) async fn discard_beside(&self, job: Background, range: ByteRange, flags: WriteFlags) -> Result<()> {
        let layers = self.layers();
        let stack = self.stack(&layers);
        match job {
            Background::Mirror(mirror) => mirror.discard(stack, range, flags).await,
            Background::Infill(infill) => {
                let _lock = infill.lock_for_guest(range).await;
                stack.discard_top(range).await?;
                stack.finish_write(flags).await
            }
        }
    }
}
