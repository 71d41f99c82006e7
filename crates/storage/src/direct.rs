//! What direct I/O demands of a file.

use disk::{DiskError, ErrorKind, Operation, Result};
use rustix::fs::{AtFlags, OFlags, StatxFlags, fcntl_getfl, statx};
use std::fs::File;
use std::io;

/// Where the kernel does not say what it demands: enough for every device in use.
const SAFE_ALIGNMENT: u32 = 4096;
/// Beyond this, buffers would not be aligned enough.
const MAX_ALIGNMENT: u32 = disk::BUF_ALIGNMENT as u32;
/// The least: sectors.
const MIN_ALIGNMENT: u32 = 512;

/// Whether the file was opened with `O_DIRECT`.
pub(crate) fn is_direct(file: &File) -> io::Result<bool> {
    Ok(fcntl_getfl(file)?.contains(OFlags::DIRECT))
}

/// The error of a file system without direct I/O.
pub(crate) fn refused(operation: Operation) -> DiskError {
    DiskError::new(ErrorKind::Unsupported, operation)
        .because("the file system refuses direct I/O; use `--cache writeback`")
}

/// Multiples of this many bytes are what offset, length and memory of every transfer have to be.
///
/// Never less than the file system's block (up to 4 KiB): where holes and the file's end cut a block, the kernel zeroes
/// its rest through the page cache, which a direct write into the same block at the same time collides with; the next
/// sync then fails.
pub(crate) fn alignment(file: &File, name: &str) -> Result<u32> {
    let Ok(found) = statx(file, c"", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN | StatxFlags::BASIC_STATS) else {
        return Ok(SAFE_ALIGNMENT);
    };
    if found.stx_mask & StatxFlags::DIOALIGN.bits() == 0 {
        return Ok(SAFE_ALIGNMENT); // Linux before 6.1, or a file system that does not tell.
    }
    let needed = found.stx_dio_offset_align.max(found.stx_dio_mem_align);
    if found.stx_dio_offset_align == 0 {
        return Err(refused(Operation::Open).on(name));
    }
    if !needed.is_power_of_two() || needed > MAX_ALIGNMENT {
        return Err(DiskError::new(ErrorKind::Unsupported, Operation::Open).on(name).because(format!(
            "direct I/O needs an alignment of {needed} bytes, at most {MAX_ALIGNMENT} are supported; \
             use `--cache writeback`"
        )));
    }
    let block = match file.metadata() {
        Ok(metadata) if metadata.is_file() => found.stx_blksize.min(MAX_ALIGNMENT),
        _ => MIN_ALIGNMENT, // Devices have no holes.
    };
    Ok(needed.max(MIN_ALIGNMENT).max(if block.is_power_of_two() { block } else { MIN_ALIGNMENT }))
}
