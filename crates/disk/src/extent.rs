//! Answers to "where are these bytes?".

use crate::ByteRange;

/// Which of a layer's storages: 0 is the image file itself, 1 an external data file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct StorageId(pub u8);

impl StorageId {
    /// The image file itself.
    pub const IMAGE: Self = Self(0);
    /// The external data file of an image that has one.
    pub const DATA: Self = Self(1);
}

/// How a layer holds a range of the guest's bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Presence {
    /// The bytes stand in a storage, in a row from `offset`.
    Data {
        /// Which storage of the layer.
        storage: StorageId,
        /// Where the extent's first byte stands there.
        offset: u64,
    },
    /// The bytes are zero, whatever a parent holds.
    Zero {
        /// Whether space is set aside for them.
        allocated: bool,
    },
    /// The layer does not hold the bytes: the parent shows through, or zeroes when there is none.
    Absent,
    /// The bytes are stored in another form (compressed); `Layer::read_encoded` brings them.
    Encoded {
        /// Where the stored form begins; informative.
        offset: u64,
    },
}

/// A range of the guest's disk that one layer holds in one way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LayerExtent {
    /// The guest's bytes; begins where the question began, is never empty and never longer.
    pub range: ByteRange,
    /// How they are held.
    pub presence: Presence,
}

/// Where a disk's bytes come from, for `map`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExtentSource {
    /// Which storage of the layer.
    pub storage: StorageId,
    /// Where the extent's first byte stands there.
    pub offset: u64,
}

/// A range of a disk in one state, as NBD's block status and `map` show it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DiskExtent {
    /// The guest's bytes; begins where the question began, is never empty and never longer.
    pub range: ByteRange,
    /// Space is set aside for the bytes somewhere in the chain (NBD: not `STATE_HOLE`).
    pub allocated: bool,
    /// The bytes are known to read as zero (NBD: `STATE_ZERO`).
    pub zero: bool,
    /// The bytes are stored compressed.
    pub compressed: bool,
    /// Which layer holds the bytes, 0 for the top; `None` when no layer does.
    pub depth: Option<u32>,
    /// Where, when they stand as they are in a storage of that layer.
    pub source: Option<ExtentSource>,
}
