//! A disk that stands still, so that what is below it can be exchanged.

use super::Tracked;
use disk::{Disk, DiskError, ErrorKind, Operation, Result};
use std::rc::Rc;

/// A disk on which no byte changes; released when dropped.
#[must_use = "the disk goes on when this is dropped"]
pub struct Still<D: Disk>(Rc<Tracked<D>>);

impl<D: Disk> Drop for Still<D> {
    fn drop(&mut self) {
        self.0.release();
    }
}

impl<D: Disk> Still<D> {
    /// Waits until nothing is parked any more. To be polled to its end: a parked write that could not be done before is
    /// written again here.
    ///
    /// # Errors
    /// When a parked write cannot be done.
    pub async fn wait_for_parked(&self) -> Result<()> {
        self.0.wait_for_all_parked().await
    }
}

impl<D: Disk> Tracked<D> {
    /// Holds off requests that change bytes, and waits until those under way have ended. Reads go on. What is still parked
    /// then could not be written: [`Still::wait_for_parked`].
    ///
    /// May be dropped half-way: the disk goes on.
    pub async fn hold_still(self: &Rc<Self>) -> Still<D> {
        self.hold_off().await;
        let still = Still(Rc::clone(self));
        self.drained().await;
        still
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
