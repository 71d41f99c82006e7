//! How large an image will be.

use super::create_options::{CreateOptions, invalid};
use super::header::MAX_L1_BYTES;
use disk::{ByteRange, Preallocation, Result};

/// How many bytes an image takes in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Measure {
    /// For the data that is there now; never too small.
    pub required: u64,
    /// When the guest has written everything.
    pub fully_allocated: u64,
}

/// Measures a new image as `qemu-img measure` does. `data` are the ranges of the source that hold data other
/// than zeroes, in rising order; empty for a new disk. With a backing file, give what the image itself is to hold.
///
/// # Errors
/// `Invalid` when the options contradict each other or the format.
pub fn measure(options: &CreateOptions, data: impl IntoIterator<Item = ByteRange>) -> Result<Measure> {
    options.validate()?;
    let header = options.header();
    let cluster_size = options.cluster_size;
    let size = options
        .size
        .checked_next_multiple_of(cluster_size)
        .filter(|size| *size <= i64::MAX as u64)
        .ok_or_else(|| invalid("the size is too large"))?;
    let l2_bytes = (size / cluster_size).next_multiple_of(header.l2_entries()) * header.l2_entry_size();
    let l1_bytes = (8 * (l2_bytes / cluster_size)).next_multiple_of(cluster_size);
    if 8 * (l2_bytes / cluster_size) > MAX_L1_BYTES {
        return Err(invalid("the image is too large for its cluster size; use larger clusters"));
    }
    let tables = cluster_size + l2_bytes + l1_bytes;
    let counted = (tables + size) / cluster_size;
    let (mut blocks, mut table) = (0, 0);
    loop {
        let needed = (counted + blocks + table).div_ceil(header.refcounts_per_block());
        let table_needed = needed.div_ceil(cluster_size / 8);
        if (needed, table_needed) == (blocks, table) {
            break;
        }
        (blocks, table) = (needed, table_needed);
    }
    let fully_allocated = tables + size + (blocks + table) * cluster_size;
    let present = match options.preallocation {
        Preallocation::Falloc | Preallocation::Full => size,
        Preallocation::Off | Preallocation::Metadata => {
            let (mut present, mut counted_to) = (0, 0);
            for range in data.into_iter().filter(|r| !r.is_empty()) {
                let clusters = range.align_out(cluster_size);
                let start = clusters.offset().max(counted_to);
                let end = clusters.end().min(size);
                present += end.saturating_sub(start);
                counted_to = counted_to.max(end);
            }
            present
        }
    };
    Ok(Measure { required: fully_allocated - size + present, fully_allocated })
}
