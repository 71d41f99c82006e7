//! The qcow2 format, versions 2 and 3. Specification: QEMU's `docs/interop/qcow2.rst`.

mod allocator;
mod bitmap_directory;
pub mod check;
mod codec;
mod corruption;
mod create;
mod create_options;
mod encoded;
mod entry;
mod epochs;
mod extensions;
mod fault;
mod flush;
mod header;
mod image;
mod lifecycle;
mod map;
mod measure;
mod refcount_bits;
mod refcounts;
mod resize;
mod slices;
mod snapshot_table;
mod write;
mod zero;

pub use bitmap_directory::{Bitmap, BitmapDirectory, Invalidate, invalidate_bitmaps};
pub use codec::encode_cluster;
pub use corruption::{Corruption, L2Rule, Table};
pub use create::create;
pub use create_options::CreateOptions;
pub use extensions::{BitmapsExtension, Extension, FeatureSet};
pub use fault::Fault;
pub use header::*;
pub use image::{Image, OpenOptions};
pub use measure::{Measure, measure};
pub use snapshot_table::{Snapshot, SnapshotTable};
