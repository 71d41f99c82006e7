//! What a history asks of its surroundings.

use crate::Id;
use disk::{LocalFuture, Result};

/// The present run of the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Boot {
    /// Its name; another one after each start of the machine.
    pub id: Id,
    /// When it began, in milliseconds since 1970.
    pub began: u64,
}

/// What can be seen of an image from outside.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct ImageFacts {
    /// The file system.
    pub device: u64,
    /// The file within it.
    pub inode: u64,
    /// Bytes of the file or device.
    pub size: u64,
    /// Last modification, in nanoseconds since 1970; 0 for a block device, which has none.
    pub modified: i64,
    /// Whether it is a block device.
    pub block_device: bool,
    /// Sectors that were written to a block device since the machine was started, as the kernel counts them.
    pub sectors_written: Option<u64>,
    /// A digest of size and modification of the disk's other files (parents, data file): an odd number, 0 where there are
    /// none, or [`OTHERS_CHANGE`].
    pub others: u64,
}

/// Instead of a digest: whoever keeps the history is changing the other files, in ways that the guest does not see.
pub const OTHERS_CHANGE: u64 = 2;

/// What an image itself bears: put there by us, and lost when a program writes to it that does not know it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct ImageMark {
    /// Which history.
    pub lineage: Id,
    /// Which moment of it.
    pub moment: Id,
}

/// Clock, randomness and the image's outside, as parameters.
pub trait Host: 'static {
    /// Now, in milliseconds since 1970.
    fn now(&self) -> u64;
    /// The present run of the machine.
    fn boot(&self) -> Boot;
    /// A new random name, never [`Id::NONE`].
    fn random_id(&self) -> Id;
    /// The image as it is now.
    fn facts(&self) -> LocalFuture<'_, Result<ImageFacts>>;
    /// The mark that the image bears, if nobody has written to it who does not know it.
    fn mark(&self) -> Option<ImageMark>;
    /// Puts a mark into the image, durably. `false` when it cannot bear one.
    fn set_mark(&self, mark: ImageMark) -> LocalFuture<'_, Result<bool>>;
    /// Waits until a write from now on bears another time of modification than one before.
    fn let_time_pass(&self) -> LocalFuture<'_, ()>;
    /// Makes the sidecar unusable for whoever opens it next, when it cannot be written to any more: by removing it.
    fn remove_sidecar(&self) -> LocalFuture<'_, Result<()>>;
}
