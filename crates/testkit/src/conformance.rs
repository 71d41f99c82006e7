//! Suites that every implementation of a contract runs from its own tests.
//!
//! They are plain futures, so they run on the seeded executor as well as on real I/O. They panic at the first
//! thing that breaks the contract.

mod disk_suite;
mod layer_disk;
mod layer_suite;
mod storage_suite;
mod workload;

pub use disk_suite::disk;
pub use layer_disk::LayerDisk;
pub use layer_suite::{Encode, LayerCaps, layer};
pub use storage_suite::storage;
pub use workload::{Workload, workload};
