//! The words of the house: byte ranges, buffers, extents, errors, and the three contracts that every
//! virtual disk is built from.
//!
//! ```text
//! Storage   a container of bytes           "read and write at this offset"
//!   Layer   one image, of some format      "where are the guest's bytes?"
//!     Disk  what a guest sees              "read and write the guest's bytes"
//! ```
//!
//! Each contract is a trait that authors implement with plain `async fn`, and a cheap, clonable
//! handle that everybody else holds. The handle erases the type and validates every call once, where
//! nobody can pass by it: an implementation may rely on the bounds that its trait documents.
//!
//! Invariant: nothing in this crate does I/O, knows a clock or spawns a task.

mod buf;
mod disk;
mod error;
mod extent;
mod identity;
mod layer;
mod range;
mod storage;

pub use buf::{BUF_ALIGNMENT, Buf};
pub use disk::{Disk, DiskGeometry, DiskHandle, WriteFlags};
pub use error::{DiskError, ErrorKind, Operation, Result};
pub use extent::{DiskExtent, ExtentSource, LayerExtent, Presence, StorageId};
pub use identity::{ContentId, LayerIdentity, ParentLink};
pub use layer::{
    Below, Fill, HistoryMark, IoGuard, Layer, LayerGeometry, LayerHandle, Preallocation, PreparedWrite, Ticket,
    TicketId, WritePlan,
};
pub use range::ByteRange;
pub use storage::{Storage, StorageExtent, StorageHandle, StorageLimits, ZeroMode};

/// A boxed future that stays on its thread, as the handles return it.
pub type LocalFuture<'a, T> = std::pin::Pin<Box<dyn std::future::Future<Output = T> + 'a>>;
