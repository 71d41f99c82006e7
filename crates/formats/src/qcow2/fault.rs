//! What the engine finds wrong with an image while it runs from it.

use disk::{DiskError, ErrorKind, Operation};
use thiserror::Error;

/// A contradiction met on the way of a request. The checker finds more, and says more about each.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum Fault {
    /// An L1 entry's offset is no multiple of the cluster size.
    #[error("the L1 table's entry {index} leads to {offset:#x}, which is no cluster's beginning")]
    L2TableUnaligned {
        /// Index in the L1 table.
        index: usize,
        /// Where it leads.
        offset: u64,
    },
    /// An L1 entry leads beyond the end of the file.
    #[error("the L1 table's entry {index} leads to {offset:#x}, beyond the end of the file")]
    L2TableBeyondEnd {
        /// Index in the L1 table.
        index: usize,
        /// Where it leads.
        offset: u64,
    },
    /// An L2 entry's offset is no multiple of the cluster size.
    #[error("guest offset {guest:#x} is mapped to {offset:#x}, which is no cluster's beginning")]
    DataUnaligned {
        /// The guest's offset.
        guest: u64,
        /// Where it is mapped.
        offset: u64,
    },
    /// An L2 entry leads into the image's own tables.
    #[error("guest offset {guest:#x} is mapped to {offset:#x}, where the image keeps its own tables")]
    DataInMetadata {
        /// The guest's offset.
        guest: u64,
        /// Where it is mapped.
        offset: u64,
    },
    /// An L2 entry leads to where no reference count can be.
    #[error("guest offset {guest:#x} is mapped to {offset:#x}, beyond what the refcount table can count")]
    DataBeyondCounts {
        /// The guest's offset.
        guest: u64,
        /// Where it is mapped.
        offset: u64,
    },
    /// A version 2 image has an entry with the zero flag, which came with version 3.
    #[error("guest offset {guest:#x} has the zero flag, which images of version 2 do not have")]
    ZeroInVersion2 {
        /// The guest's offset.
        guest: u64,
    },
    /// A subcluster is said to be data and zero at once, or data without a cluster.
    #[error("the subclusters of guest offset {guest:#x} contradict each other")]
    Subclusters {
        /// The guest's offset.
        guest: u64,
    },
    /// A compressed cluster does not decompress to a whole cluster.
    #[error("the compressed cluster of guest offset {guest:#x} at {offset:#x} cannot be decompressed")]
    Compressed {
        /// The guest's offset.
        guest: u64,
        /// Where its bytes stand.
        offset: u64,
    },
    /// A refcount block begins in the middle of a cluster.
    #[error("a refcount block is said to be at {offset:#x}, which is no cluster's beginning")]
    RefcountBlockUnaligned {
        /// Where.
        offset: u64,
    },
    /// A refcount block begins beyond the end of the file.
    #[error("a refcount block is said to be at {offset:#x}, beyond the end of the file")]
    RefcountBlockBeyondEnd {
        /// Where.
        offset: u64,
    },
    /// Two tables of the image (header, L1, L2, refcount table, refcount blocks) share a cluster.
    #[error("host cluster {cluster:#x} is said to hold two of the image's own tables")]
    TablesOverlap {
        /// Host offset divided by the cluster size.
        cluster: u64,
    },
    /// A cluster in use has no reference count, or the count 0.
    #[error("host cluster {cluster:#x} is in use, but has no reference count")]
    RefcountMissing {
        /// Host offset divided by the cluster size.
        cluster: u64,
    },
    /// The reference counts call a cluster free which holds the image's own tables.
    #[error("host cluster {cluster:#x} holds the image's own tables, but its reference count is 0")]
    MetadataUncounted {
        /// Host offset divided by the cluster size.
        cluster: u64,
    },
}

impl From<Fault> for DiskError {
    fn from(fault: Fault) -> Self {
        Self::new(ErrorKind::Corrupt, Operation::Map)
            .because(format!("{fault}; the image is corrupt: check and repair it"))
            .caused_by(fault)
    }
}
