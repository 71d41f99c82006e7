//! Storage on this host: files and block devices, through the page cache or around it, under locks that QEMU
//! understands.
//!
//! Invariant: every operation that may wait for a device goes through the data plane; only opening blocks.

mod block_device;
mod direct;
mod file;
pub mod lock;
mod open;
mod write_behind;

pub use file::{FileStorage, WritingBehind};
pub use open::{CacheMode, LockMode, OpenOptions};
pub use write_behind::WriteBehind;
