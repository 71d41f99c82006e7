//! What work on images finds out, under the field names of `qemu-img … --output=json`.

use crate::Format;
use crate::history::report::HistoryReport;
use crate::linkage::LinkReport;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Facts of an image, as `qemu-img info` shows them.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub struct ImageInfo {
    /// The file as it was named.
    pub filename: String,
    /// Its format.
    pub format: Format,
    /// Size of the guest's disk in bytes.
    pub virtual_size: u64,
    /// Bytes that the file occupies.
    pub actual_size: u64,
    /// Allocation unit in bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cluster_size: Option<u64>,
    /// Whether the image was not closed cleanly and needs its refcounts repaired.
    pub dirty_flag: bool,
    /// Whether the guest's bytes are encrypted.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub encrypted: bool,
    /// The backing file as the image names it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub backing_filename: Option<String>,
    /// The backing file's path, seen from here.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub full_backing_filename: Option<String>,
    /// The backing file's format as the image names it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub backing_filename_format: Option<String>,
    /// Internal snapshots.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub snapshots: Vec<SnapshotInfo>,
    /// What only this format has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub format_specific: Option<FormatSpecific>,
    /// The history that is kept beside it, if there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub history: Option<HistoryReport>,
    /// The id of its content, if it bears one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub content: Option<String>,
    /// How it fits its parent, if it has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub link: Option<LinkReport>,
}

/// What only one format has.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(tag = "type", content = "data", rename_all = "lowercase")]
pub enum FormatSpecific {
    /// qcow2's.
    Qcow2(Qcow2Info),
}

/// qcow2's own facts.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub struct Qcow2Info {
    /// `0.10` for version 2, `1.1` for version 3.
    pub compat: String,
    /// `zlib` or `zstd`.
    pub compression_type: String,
    /// Whether refcounts may be behind after a crash.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lazy_refcounts: Option<bool>,
    /// Bits of one reference count.
    pub refcount_bits: u32,
    /// Whether the image was marked corrupt.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub corrupt: Option<bool>,
    /// Whether clusters have subclusters.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub extended_l2: Option<bool>,
    /// The external data file, if there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub data_file: Option<String>,
    /// Whether the external data file can be read as a raw image.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub data_file_raw: Option<bool>,
    /// Persistent dirty bitmaps.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub bitmaps: Vec<BitmapInfo>,
}

/// A persistent dirty bitmap.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub struct BitmapInfo {
    /// `in-use` (not valid), `auto`.
    pub flags: Vec<String>,
    /// Its name.
    pub name: String,
    /// Bytes that one bit stands for.
    pub granularity: u64,
}

/// An internal snapshot.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub struct SnapshotInfo {
    /// Its id.
    pub id: String,
    /// Its name.
    pub name: String,
    /// Bytes of saved machine state.
    pub vm_state_size: u64,
    /// When, in seconds since 1970.
    pub date_sec: u64,
    /// And nanoseconds.
    pub date_nsec: u32,
    /// The guest's clock in seconds.
    pub vm_clock_sec: u64,
    /// And nanoseconds.
    pub vm_clock_nsec: u32,
    /// The guest's instruction count, where it was recorded.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub icount: Option<u64>,
}

/// A run of bytes in one state, as `qemu-img map` shows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct MapEntry {
    /// First byte in the guest's disk.
    pub start: u64,
    /// Bytes.
    pub length: u64,
    /// Which image of the chain holds it, 0 for the top.
    pub depth: u32,
    /// Whether an image of the chain holds it.
    pub present: bool,
    /// Whether it reads as zero.
    pub zero: bool,
    /// Whether it stands in a file as data.
    pub data: bool,
    /// Whether it is stored compressed.
    pub compressed: bool,
    /// Where in its file, when it stands there as it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub offset: Option<u64>,
    /// Which file, when that is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub filename: Option<String>,
}

/// What a check found, as `qemu-img check` shows it.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub struct CheckReport {
    /// The file as it was named.
    pub filename: String,
    /// Its format.
    pub format: String,
    /// Places that could not be checked.
    pub check_errors: u64,
    /// One past the last byte in use.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image_end_offset: Option<u64>,
    /// Contradictions that put data at risk.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub corruptions: u64,
    /// Space that nothing refers to.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub leaks: u64,
    /// Contradictions that were mended.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub corruptions_fixed: u64,
    /// Leaks that were given back.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub leaks_fixed: u64,
    /// Units of the guest's disk.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub total_clusters: Option<u64>,
    /// Those that are allocated.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub allocated_clusters: Option<u64>,
    /// Those that do not follow their predecessor.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fragmented_clusters: Option<u64>,
    /// Those that are compressed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub compressed_clusters: Option<u64>,
    /// Whether the image is marked as corrupt. Nobody writes to it until a repair takes the mark away.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub marked_corrupt: bool,
    /// What was mended, in words, up to a bound.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub mended: Vec<String>,
    /// What is wrong, in words, up to a bound.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub findings: Vec<String>,
    /// That its parent is not what it was bound to, in words; it is no matter of the image's own metadata.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub link_fault: Option<String>,
}

fn is_zero(n: &u64) -> bool {
    *n == 0
}

impl CheckReport {
    /// The exit code that `qemu-img check` would give: 0 clean, 1 not checked whole, 2 corrupt, 3 leaks.
    pub fn exit_code(&self) -> u8 {
        if self.corruptions > 0 {
            2
        } else if self.leaks > 0 {
            3
        } else if self.check_errors > 0 {
            1
        } else {
            0
        }
    }
}

/// The space that an image would take, as `qemu-img measure` shows it.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub struct MeasureReport {
    /// Bytes for the data there is.
    pub required: u64,
    /// Bytes when every byte of the disk is data.
    pub fully_allocated: u64,
    /// Bytes more for the source's persistent bitmaps.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bitmaps: Option<u64>,
}

/// What a conversion did.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub struct ConvertReport {
    /// The new image.
    pub filename: String,
    /// Size of the guest's disk in bytes.
    pub virtual_size: u64,
    /// Bytes read and written.
    pub copied: u64,
    /// Bytes that were found to be zero and not written.
    pub zero: u64,
}

/// What a comparison found.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub struct CompareReport {
    /// Whether both show the same bytes.
    pub identical: bool,
    /// Where they differ first, if they do.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub first_difference: Option<u64>,
    /// Where a strict comparison has met bytes that the images hold in different ways (allocated, zero, compressed, in
    /// a place of their own), if it has and no difference comes before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub status_mismatch: Option<u64>,
    /// Whether the sizes differ; what the longer one has more must be zero to be called identical.
    pub sizes_differ: bool,
}
