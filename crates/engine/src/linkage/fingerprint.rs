//! What tells that a file was changed, whatever it holds.

use disk::{DiskError, Operation, Result};
use std::fs::Metadata;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use storage::FileStorage;

/// Times of files have steps; a write this long after another bears another time.
const STEP: Duration = Duration::from_millis(20);
const SECOND: i64 = 1_000_000_000;

/// Size and time of an image: of its file, and of its external data file where it has one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Fingerprint {
    /// Bytes, of both files together.
    pub(crate) size: u64,
    /// When it was modified last, in nanoseconds since 1970; the later of both; 0 for a block device, which has no such
    /// time.
    pub(crate) modified: i64,
}

/// When a file was modified last, in nanoseconds since 1970; 0 for a block device.
pub(super) fn modified(facts: &Metadata) -> i64 {
    match facts.file_type().is_block_device() {
        true => 0,
        false => facts.mtime().saturating_mul(SECOND).saturating_add(facts.mtime_nsec()),
    }
}

impl Fingerprint {
    /// Of the open files of one image. Blocks.
    pub(crate) fn of(files: &[FileStorage]) -> Result<Self> {
        let mut all = Self::default();
        for file in files {
            file.restore_ragged_size()?;
            let facts = file.file().metadata().map_err(|e| DiskError::from_io(e, Operation::Open))?;
            // The size of a block device is not among its metadata.
            let size = if facts.file_type().is_block_device() { file.refresh()? } else { facts.len() };
            all.size = all.size.saturating_add(size);
            all.modified = all.modified.max(modified(&facts));
        }
        Ok(all)
    }

    /// Waits until a later change bears another time than this one.
    pub(crate) async fn let_time_pass(&self) {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let changed = Duration::from_nanos(u64::try_from(self.modified).unwrap_or(0));
        // A time in the future is not waited for.
        if let Some(rest) = (changed + STEP).checked_sub(now)
            && rest <= STEP
        {
            dataplane::sleep(rest).await;
        }
    }

    /// Whether the time is the recorded one, in nanoseconds since 1970. Some ways of copying keep whole seconds alone.
    pub(crate) fn same_time(&self, recorded: i64) -> bool {
        let found = self.modified;
        found == 0
            || recorded == 0
            || found == recorded
            || found % SECOND == 0 && found.div_euclid(SECOND) == recorded.div_euclid(SECOND)
    }
}

/// Milliseconds since 1970.
pub(crate) fn now() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times() {
        let found = |modified| Fingerprint { size: 0, modified };
        assert!(found(5 * SECOND + 7).same_time(5 * SECOND + 7));
        assert!(found(5 * SECOND).same_time(5 * SECOND + 7), "scp -p");
        assert!(!found(5 * SECOND + 7).same_time(5 * SECOND), "the copy is what lacks them");
        assert!(!found(6 * SECOND).same_time(5 * SECOND + 7));
        assert!(!found(5 * SECOND + 8).same_time(5 * SECOND + 7));
        assert!(found(0).same_time(7) && found(7).same_time(0), "block devices have none");
    }
}
