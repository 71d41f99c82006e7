//! A disk that stands still, so that what is below it can be exchanged.

use super::{Held, Tracked};
use disk::{Disk, DiskError, ErrorKind, Operation, Result};
use std::rc::Rc;

/// A disk on which no byte changes; released when dropped.
#[must_use = "the disk goes on when this is dropped"]
pub struct Still<D: Disk>(Rc<Tracked<D>>);

impl<D: Disk> Drop for Still<D> {
    fn drop(&mut self) {
        self.0.held.set(false);
        self.0.moved.notify(usize::MAX);
    }
}

impl<D: Disk> Tracked<D> {
    /// Holds off requests that change bytes, and waits until those under way have ended and nothing is parked any more.
    /// Reads go on.
    ///
    /// # Errors
    /// When a parked write cannot be done: the disk goes on.
    pub async fn hold_still(self: &Rc<Self>) -> Result<Still<D>> {
        while self.held.get() {
            self.moved.listen().await;
        }
        self.held.set(true);
        let still = Still(Rc::clone(self));
        self.drained().await;
        self.wait_for_all_parked().await?;
        Ok(still)
    }

    /// Whether first writes are parked in a lot.
    pub fn is_parking(&self) -> bool {
        self.parking.lot.borrow().is_some()
    }

    /// Parks no more writes, until [`Tracked::park_in`] names a lot again: a lot belongs to one image, and another one is
    /// about to take its place. While the disk stands still.
    ///
    /// # Errors
    /// When a write is parked, so that the disk does not stand still. It stays parked, and the image must stay.
    pub fn leave_lot(&self) -> Result<()> {
        if self.parking.any() {
            return Err(DiskError::new(ErrorKind::InUse, Operation::Write)
                .because("a write that was answered is not in the image yet; try again when the disk takes writes"));
        }
        self.parking.lot.borrow_mut().take();
        self.parking.free.borrow_mut().clear();
        Ok(())
    }
}

impl<D: Disk> Held<D> {
    /// Has a disk that is held for a mark stand still: nothing is parked any more on return.
    ///
    /// # Errors
    /// When a parked write cannot be done.
    ///
    /// # Panics
    /// Never: a held disk has its turn until it is cut.
    pub async fn stand_still(&self) -> Result<()> {
        self.tracked().wait_for_all_parked().await
    }
}
