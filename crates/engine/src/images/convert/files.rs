//! Bytes from file to file by plain system calls, for worker threads: everything here blocks.

use crate::EngineError;
use disk::{Buf, ByteRange, DiskError, Operation, Storage};
use rustix::io::Errno;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use storage::{FileStorage, WriteBehind};

/// The error of a call on a file, which names the file and the range.
fn failed(file: &FileStorage, operation: Operation, offset: u64, len: u64, error: io::Error) -> EngineError {
    DiskError::from_io(error, operation).on(file.name()).at(ByteRange::new(offset, len)).into()
}

/// Fills `buf` from a file; what is behind the file's end is zero. Blocks.
pub(in crate::images) fn read_file(file: &FileStorage, offset: u64, buf: &mut [u8]) -> Result<(), EngineError> {
    let mut done = 0;
    while done < buf.len() {
        match file.file().read_at(&mut buf[done..], offset + done as u64) {
            Ok(0) => {
                buf[done..].fill(0);
                break;
            }
            Ok(n) => done += n,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(failed(file, Operation::Read, offset, buf.len() as u64, error)),
        }
    }
    Ok(())
}

/// Writes into a file, inside its size. Blocks.
pub(super) fn write_file(
    file: &FileStorage,
    offset: u64,
    bytes: &[u8],
    writeback: &Writeback,
) -> Result<(), EngineError> {
    let len = bytes.len() as u64;
    let one = (!file.is_block_device()).then(|| writeback.one.lock().expect("no panic while it is locked"));
    let written = file.file().write_all_at(bytes, offset);
    drop(one);
    written.map_err(|e| failed(file, Operation::Write, offset, len, e))?;
    writeback.wrote(file, offset, len);
    Ok(())
}

/// Has the kernel copy from file to file, and copies by reading and writing what it does not. Blocks.
pub(super) fn copy_range(
    from: (&FileStorage, u64),
    to: (&FileStorage, u64),
    len: u64,
    refused: &AtomicBool,
    writeback: &Writeback,
) -> Result<(), EngineError> {
    let mut done = 0;
    while done < len && !refused.load(Ordering::Relaxed) {
        let (mut at, mut place) = (from.1 + done, to.1 + done);
        let left = (len - done) as usize;
        match rustix::fs::copy_file_range(from.0.file(), Some(&mut at), to.0.file(), Some(&mut place), left) {
            Ok(0) => break, // The source file ends here: what follows reads as zero.
            Ok(n) => done += n as u64,
            Err(Errno::INTR) => {}
            // Not between these files. Whatever else is wrong, reading and writing will tell.
            Err(_) => refused.store(true, Ordering::Relaxed),
        }
    }
    writeback.wrote(to.0, to.1, done);
    if done < len {
        let mut buf = Buf::new((len - done) as usize);
        read_file(from.0, from.1 + done, &mut buf)?;
        write_file(to.0, to.1 + done, &buf, writeback)?;
    }
    Ok(())
}

/// Has the result be written back while it is made.
pub(super) struct Writeback {
    wanted: bool,
    /// File systems let one writer at a time into a regular file, and the others spin. Here they sleep.
    one: Mutex<()>,
    behind: WriteBehind,
}

impl Writeback {
    /// `wanted` says whether the result is to be made durable at all.
    pub(super) fn new(wanted: bool) -> Self {
        Self { wanted, one: Mutex::default(), behind: WriteBehind::default() }
    }

    /// Bytes were written.
    pub(super) fn wrote(&self, file: &FileStorage, offset: u64, len: u64) {
        if !self.wanted {
            return;
        }
        let Some(due) = self.behind.wrote(ByteRange::new(offset, len)) else { return };
        // Only a help: the sync at the end reports what goes wrong.
        if let Err(error) = dataplane::file::start_writeback(file.file(), due.offset(), due.len()) {
            tracing::debug!(file = file.name(), %error, "writeback was not started early");
        }
    }
}
