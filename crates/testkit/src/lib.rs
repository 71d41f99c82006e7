//! What tests are made of: memory and crash storage, a model disk, conformance suites, a seeded executor.

pub mod conformance;
mod crash_storage;
pub mod executor;
pub mod judges;
mod memory_layer;
mod memory_storage;
mod model_disk;
pub mod seeds;
mod sparse_bytes;

pub use crash_storage::CrashStorage;
pub use memory_layer::{MemoryLayer, MemoryLayerOptions};
pub use memory_storage::{Counters, MemoryStorage};
pub use model_disk::{Issued, ModelDisk};
pub use sparse_bytes::SparseBytes;
