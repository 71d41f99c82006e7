//! Block devices: what files do by `fallocate` they do by ioctl.
#![allow(unsafe_code)] // One ioctl; argued at its block.

use disk::ByteRange;
use std::io;
use std::os::fd::AsRawFd;

/// `_IO(0x12, 119)`, linux/fs.h: two 64-bit numbers, start and length in bytes.
const BLKDISCARD: libc::c_ulong = 0x1277;

/// Tells the device that the range is not needed; what is read there afterwards is the device's choice.
pub(crate) fn discard(file: &std::fs::File, range: ByteRange) -> io::Result<()> {
    let argument = [range.offset(), range.len()];
    // SAFETY: the ioctl reads two 64-bit numbers, which live across the call.
    match unsafe { libc::ioctl(file.as_raw_fd(), BLKDISCARD, argument.as_ptr()) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}
