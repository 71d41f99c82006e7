//! Holding the guest's changes for an instant.

use crate::Chain;
use disk::Result;
use std::rc::Rc;

/// While it lives no byte of the disk changes; reads and flushes go on.
#[must_use = "the disk goes on when this is dropped"]
pub struct HeldWrites(Rc<Chain>);

impl Drop for HeldWrites {
    fn drop(&mut self) {
        self.0.requests.release();
    }
}

impl Chain {
    /// Has requests that change bytes, and changes of size, wait, and waits for those under way. One at a time.
    ///
    /// # Errors
    /// `Closed` when the disk is being closed.
    pub async fn hold_writes(self: &Rc<Self>) -> Result<HeldWrites> {
        self.requests.hold_writes().await?;
        Ok(HeldWrites(Rc::clone(self)))
    }
}
