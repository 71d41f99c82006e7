//! How an image can contradict the format.

use super::header::{MAX_CLUSTER_BITS, MIN_CLUSTER_BITS};
use disk::{DiskError, ErrorKind, Operation};
use thiserror::Error;

/// One contradiction of the format, as found at open, by the checker, or by the engine on its way.
///
/// Offsets are bytes in the image file unless they say guest.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum Corruption {
    // --- header ---
    /// The file does not begin with `QFI\xfb`.
    #[error("not a qcow2 image: expected the magic number 0x514649fb at offset 0, found {found:#010x}")]
    Magic {
        /// The first four bytes.
        found: u32,
    },
    /// The file ends inside the header.
    #[error("the header needs {needed} bytes, but the file has {size}")]
    HeaderTruncated {
        /// Bytes that the header's version demands.
        needed: u64,
        /// The file's size.
        size: u64,
    },
    /// `header_length` is below 104, no multiple of 8, or beyond the first cluster.
    #[error("header length {found} is not a multiple of 8 between 104 and the cluster size")]
    HeaderLength {
        /// The field.
        found: u32,
    },
    /// `cluster_bits` outside 9..=21.
    #[error("cluster_bits is {found}, expected {MIN_CLUSTER_BITS} to {MAX_CLUSTER_BITS}")]
    ClusterBits {
        /// The field.
        found: u32,
    },
    /// `refcount_order` above 6.
    #[error("refcount_order is {found}, expected 0 to 6")]
    RefcountOrder {
        /// The field.
        found: u32,
    },
    /// Extended L2 entries need clusters of at least 16 KiB.
    #[error("extended L2 entries need clusters of at least 16384 bytes, but the cluster size is {cluster_size}")]
    ExtendedL2ClusterSize {
        /// Bytes.
        cluster_size: u64,
    },
    /// The compression type field and its incompatible bit contradict each other.
    #[error("compression type {field} contradicts the incompatible feature bit 3, which is {bit}")]
    CompressionBit {
        /// The field.
        field: u8,
        /// Whether bit 3 is set.
        bit: bool,
    },
    /// A table's offset is no multiple of the cluster size.
    #[error("the {table} at {offset:#x} is not aligned to a cluster")]
    TableUnaligned {
        /// Which table.
        table: Table,
        /// Where it is said to begin.
        offset: u64,
    },
    /// A table exceeds its bound.
    #[error("the {table} has {size} bytes, more than the bound of {max}")]
    TableTooLarge {
        /// Which table.
        table: Table,
        /// Its size in bytes.
        size: u64,
        /// The bound in bytes.
        max: u64,
    },
    /// A table lies outside the file.
    #[error("the {table} at {offset:#x} with {size} bytes lies beyond the end of the file at {end:#x}")]
    TableBeyondEnd {
        /// Which table.
        table: Table,
        /// Where it begins.
        offset: u64,
        /// Its size in bytes.
        size: u64,
        /// The file's size.
        end: u64,
    },
    /// A table is said to begin in the header's cluster.
    #[error("the {table} is said to lie in the header's cluster")]
    TableInHeader {
        /// Which table.
        table: Table,
    },
    /// The L1 table does not cover the guest's disk.
    #[error("the L1 table has {entries} entries, but the disk's size needs {needed}")]
    L1TooSmall {
        /// As the header says.
        entries: u64,
        /// For the disk's size.
        needed: u64,
    },
    /// The guest's disk is larger than the largest L1 table covers.
    #[error("the disk's size of {size} bytes is more than an L1 table of 32 MiB covers")]
    DiskTooLarge {
        /// Guest bytes.
        size: u64,
    },
    /// The header names no refcount table.
    #[error("the image has no refcount table; repair it")]
    NoRefcountTable,
    /// More snapshots than the bound.
    #[error("the image is said to have {found} snapshots, more than the bound of 65536")]
    TooManySnapshots {
        /// The field.
        found: u32,
    },
    /// The backing file's name does not lie in the first cluster, or is too long.
    #[error(
        "the backing file's name of {len} bytes at {offset:#x} does not lie in the first cluster, or has more than 1023 bytes"
    )]
    BackingName {
        /// Where.
        offset: u64,
        /// Its length.
        len: u64,
    },
    /// A header extension reaches beyond its area.
    #[error("header extension {kind:#010x} at {offset:#x} with {len} bytes reaches beyond the header's area")]
    ExtensionBeyondArea {
        /// Its type.
        kind: u32,
        /// Where it begins.
        offset: u64,
        /// Length of its data.
        len: u64,
    },
    /// More header extensions than the bound.
    #[error("the header has more than 256 extensions")]
    TooManyExtensions,
    /// A header extension of this type appears twice.
    #[error("header extension {kind:#010x} appears more than once")]
    ExtensionTwice {
        /// Its type.
        kind: u32,
    },
    /// A header extension has a length that its type does not allow.
    #[error("header extension {kind:#010x} has {len} bytes, which its type does not allow")]
    ExtensionLength {
        /// Its type.
        kind: u32,
        /// Length of its data.
        len: u64,
    },
    /// The raw-external-data bit without an external data file.
    #[error("the autoclear bit for raw external data is set, but the image has no external data file")]
    RawDataWithoutFile,
    /// The header's area does not fit into the first cluster.
    #[error(
        "the header with its extensions and names needs {needed} bytes, more than the first cluster's {cluster_size}"
    )]
    HeaderTooLarge {
        /// Bytes.
        needed: u64,
        /// Bytes.
        cluster_size: u64,
    },

    // --- snapshot table ---
    /// An entry reaches beyond the table's bound of 64 MiB, or beyond the end of the file.
    #[error("entry {index} of the snapshot table reaches beyond the end of the file or the bound of 64 MiB")]
    SnapshotEntryBeyondEnd {
        /// Counted from 0.
        index: u32,
    },
    /// A snapshot entry carries more extra data than the bound.
    #[error("entry {index} of the snapshot table has {size} bytes of extra data, more than the bound of 1024")]
    SnapshotExtraTooLarge {
        /// Counted from 0.
        index: u32,
        /// Bytes.
        size: u32,
    },
    /// A version 3 image's snapshot entry lacks extra data that the format demands.
    #[error("entry {index} of the snapshot table has {size} bytes of extra data, but version 3 demands at least 16")]
    SnapshotExtraTooSmall {
        /// Counted from 0.
        index: u32,
        /// Bytes.
        size: u32,
    },

    // --- bitmaps ---
    /// The bitmaps extension's fields contradict each other or a bound.
    #[error("the bitmaps extension is invalid: {count} bitmaps in a directory of {size} bytes at {offset:#x}")]
    BitmapsExtension {
        /// Number of bitmaps.
        count: u32,
        /// Bytes of the directory.
        size: u64,
        /// Where the directory begins.
        offset: u64,
    },
    /// A bitmap directory entry is malformed.
    #[error("entry {index} of the bitmap directory is invalid: {what}")]
    BitmapEntry {
        /// Counted from 0.
        index: u32,
        /// Which rule is broken.
        what: &'static str,
    },
    /// The directory's entries do not fill it.
    #[error("the bitmap directory has {size} bytes, but its entries fill {used}")]
    BitmapDirectorySize {
        /// Bytes that the extension says.
        size: u64,
        /// Bytes that the entries take.
        used: u64,
    },
    /// A bitmap's table does not go with the disk's size.
    #[error("the bitmap table at {table:#x} has {entries} entries, but the disk's size needs {needed}")]
    BitmapTableSize {
        /// Where the bitmap table begins.
        table: u64,
        /// As the directory says.
        entries: u32,
        /// For the disk's size and the granularity.
        needed: u64,
    },
    /// A bitmap table's entry has reserved bits set or an unaligned offset.
    #[error("entry {index} of the bitmap table at {table:#x} is invalid: {entry:#018x}")]
    BitmapTableEntry {
        /// Where the bitmap table begins.
        table: u64,
        /// Counted from 0.
        index: u64,
        /// Its value.
        entry: u64,
    },

    // --- found by the checker ---
    /// An L1 entry has reserved bits set, or flags without an offset.
    #[error("entry {index} of the L1 table at {table:#x} has reserved bits set: {entry:#018x}")]
    L1Reserved {
        /// Where the L1 table begins.
        table: u64,
        /// Counted from 0.
        index: u64,
        /// Its value.
        entry: u64,
    },
    /// An L1 entry's offset is no multiple of the cluster size.
    #[error("entry {index} of the L1 table at {table:#x} is not aligned to a cluster: {entry:#018x}")]
    L2TableUnaligned {
        /// Where the L1 table begins.
        table: u64,
        /// Counted from 0.
        index: u64,
        /// Its value.
        entry: u64,
    },
    /// An L2 entry contradicts the format.
    #[error("entry {index} of the L2 table at {table:#x} is invalid, {rule}: {entry:#018x}")]
    L2Entry {
        /// Where the L2 table begins.
        table: u64,
        /// Counted from 0.
        index: u64,
        /// Its first 8 bytes.
        entry: u64,
        /// Which rule is broken.
        rule: L2Rule,
    },
    /// A cluster is in use by a table and by something else.
    #[error("the cluster at {offset:#x} belongs to a {first} and to a {second}")]
    Overlap {
        /// Where the cluster begins.
        offset: u64,
        /// What was found there first.
        first: Table,
        /// What else claims it.
        second: Table,
    },
    /// A reference count is lower than the number of references: the cluster may be given away while in use.
    #[error("the cluster at {offset:#x} has the reference count {count}, but {references} references")]
    RefcountTooLow {
        /// Where the cluster begins.
        offset: u64,
        /// As the image says.
        count: u64,
        /// As counted.
        references: u64,
    },
    /// A reference count is higher than the number of references: the space is lost (a leak).
    #[error("the cluster at {offset:#x} has the reference count {count}, but {references} references (leak)")]
    RefcountTooHigh {
        /// Where the cluster begins.
        offset: u64,
        /// As the image says.
        count: u64,
        /// As counted.
        references: u64,
    },
    /// A cluster has more references than its count can hold.
    #[error("the cluster at {offset:#x} has more references than a reference count can hold")]
    RefcountOverflow {
        /// Where the cluster begins.
        offset: u64,
    },
    /// An entry of the refcount table has reserved bits set.
    #[error("entry {index} of the refcount table has reserved bits set: {entry:#018x}")]
    RefcountTableReserved {
        /// Counted from 0.
        index: u64,
        /// Its value.
        entry: u64,
    },
    /// An entry of the refcount table is no multiple of the cluster size.
    #[error("entry {index} of the refcount table is not aligned to a cluster: {entry:#018x}")]
    RefcountBlockUnaligned {
        /// Counted from 0.
        index: u64,
        /// Its value.
        entry: u64,
    },
    /// A refcount block's cluster has other references.
    #[error("the refcount block {index} at {offset:#x} has {references} references, expected 1")]
    RefcountBlockShared {
        /// Counted from 0.
        index: u64,
        /// Where the block begins.
        offset: u64,
        /// As counted.
        references: u64,
    },
    /// Reference counts cannot be read, as their block's place is invalid.
    #[error("the reference counts of {clusters} clusters from {offset:#x} cannot be read")]
    RefcountsUnreadable {
        /// Where the first of the clusters begins.
        offset: u64,
        /// How many.
        clusters: u64,
    },
    /// The flag for "referenced once" of an active L1 entry contradicts the reference count.
    #[error("entry {index} of the active L1 table has the wrong copied flag: {entry:#018x}")]
    CopiedL1 {
        /// Counted from 0.
        index: u64,
        /// Its value.
        entry: u64,
    },
    /// The flag for "referenced once" of an L2 entry contradicts the reference count.
    #[error("entry {index} of the L2 table at {table:#x} has the wrong copied flag: {entry:#018x}")]
    CopiedL2 {
        /// Where the L2 table begins.
        table: u64,
        /// Counted from 0.
        index: u64,
        /// Its value.
        entry: u64,
    },
    /// The tables of snapshots or bitmaps together are larger than the file or the bound: they overlap.
    #[error("the tables of snapshots and bitmaps have {size} bytes together, more than the file or the bound of 4 GiB")]
    TablesTooLarge {
        /// Bytes.
        size: u64,
    },
}

/// What can be wrong with an L2 entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum L2Rule {
    /// Reserved bits are set.
    Reserved,
    /// The data cluster is not aligned.
    DataUnaligned,
    /// The cluster set aside for zeroes is not aligned.
    PreallocatedUnaligned,
    /// The zero flag in version 2 or with extended L2 entries.
    ZeroFlag,
    /// A compressed cluster with the copied flag.
    CompressedCopied,
    /// A compressed cluster in an image with an external data file.
    CompressedDataFile,
    /// A compressed cluster with a subcluster bitmap.
    CompressedBitmap,
    /// A subcluster that is both allocated and zero.
    SubclusterBoth,
    /// Allocated subclusters without a cluster.
    SubclusterUnallocated,
    /// In the external data file, a cluster at another offset than the guest's.
    DataFileOffset,
}

impl std::fmt::Display for L2Rule {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Reserved => "reserved bits are set",
            Self::DataUnaligned => "the data cluster is not aligned",
            Self::PreallocatedUnaligned => "the cluster set aside is not aligned",
            Self::ZeroFlag => "the zero flag is not allowed here",
            Self::CompressedCopied => "a compressed cluster has the copied flag",
            Self::CompressedDataFile => "a compressed cluster in an image with an external data file",
            Self::CompressedBitmap => "a compressed cluster has a subcluster bitmap",
            Self::SubclusterBoth => "a subcluster is both allocated and zero",
            Self::SubclusterUnallocated => "subclusters are allocated without a cluster",
            Self::DataFileOffset => "the offset in the external data file is not the guest's",
        })
    }
}

impl Corruption {
    /// As an error of this operation.
    pub fn during(self, operation: Operation) -> DiskError {
        DiskError::new(ErrorKind::Corrupt, operation).caused_by(self)
    }
}

impl From<Corruption> for DiskError {
    fn from(corruption: Corruption) -> Self {
        corruption.during(Operation::Open)
    }
}

/// The tables that a [`Corruption`] can name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Table {
    /// The image's header.
    Header,
    /// The active L1 table.
    L1,
    /// A snapshot's L1 table.
    SnapshotL1,
    /// An L2 table.
    L2,
    /// The refcount table.
    RefcountTable,
    /// A refcount block.
    RefcountBlock,
    /// The snapshot table.
    Snapshots,
    /// The bitmap directory.
    BitmapDirectory,
    /// A bitmap's table.
    BitmapTable,
    /// A bitmap's data.
    BitmapData,
    /// The guest's data.
    Data,
}

impl std::fmt::Display for Table {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Header => "header",
            Self::L1 => "L1 table",
            Self::SnapshotL1 => "snapshot's L1 table",
            Self::L2 => "L2 table",
            Self::RefcountTable => "refcount table",
            Self::RefcountBlock => "refcount block",
            Self::Snapshots => "snapshot table",
            Self::BitmapDirectory => "bitmap directory",
            Self::BitmapTable => "bitmap table",
            Self::BitmapData => "bitmap data",
            Self::Data => "data cluster",
        })
    }
}
