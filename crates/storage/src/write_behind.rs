//! Starting the writeback of what a job writes while it writes, so that the sync at its end finds little left.
//!
//! Only for jobs: a guest writes the same blocks again and again, and the page cache is there to let it.

use disk::ByteRange;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

/// Bytes that gather before their writeback is started: enough for long extents and requests.
const GATHERED: u64 = 8 << 20;

/// What was written since writeback was started last.
#[derive(Debug, Default)]
pub struct WriteBehind(Mutex<Window>);

#[derive(Clone, Copy, Debug, Default)]
struct Window {
    from: u64,
    to: u64,
    bytes: u64,
}

impl WriteBehind {
    /// Bytes were written. What is to be written back now, if enough has gathered; it is given once.
    pub fn wrote(&self, range: ByteRange) -> Option<ByteRange> {
        self.gather(range, true)
    }

    fn gather(&self, range: ByteRange, take: bool) -> Option<ByteRange> {
        if range.is_empty() {
            return None;
        }
        let (from, to, len) = (range.offset(), range.end(), range.len());
        let mut window = self.0.lock().expect("no panic while the window is locked");
        *window = match window.bytes {
            0 => Window { from, to, bytes: len },
            bytes => Window { from: window.from.min(from), to: window.to.max(to), bytes: bytes.saturating_add(len) },
        };
        if window.bytes < GATHERED || !take {
            return None;
        }
        let due = std::mem::take(&mut *window);
        Some(ByteRange::between(due.from, due.to))
    }
}

/// A file's share of it: whether it is wanted, and whether one is under way.
#[derive(Debug, Default)]
pub(crate) struct OfFile {
    wanted: AtomicBool,
    under_way: AtomicBool,
    gathered: WriteBehind,
}

impl OfFile {
    pub(crate) fn want(&self, wanted: bool) {
        self.wanted.store(wanted, Ordering::Relaxed);
    }

    /// As [`WriteBehind::wrote`]; what comes while an earlier range is still being started gathers until [`OfFile::started`].
    pub(crate) fn wrote(&self, range: ByteRange) -> Option<ByteRange> {
        if !self.wanted.load(Ordering::Relaxed) {
            return None;
        }
        let due = self.gathered.gather(range, !self.under_way.load(Ordering::Acquire))?;
        self.under_way.store(true, Ordering::Release);
        Some(due)
    }

    pub(crate) fn started(&self) {
        self.under_way.store(false, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_has_gathered_is_given_once() {
        let behind = WriteBehind::default();
        assert_eq!(behind.wrote(ByteRange::new(1 << 30, GATHERED / 2)), None);
        assert_eq!(behind.wrote(ByteRange::new(5, 0)), None);
        assert_eq!(
            behind.wrote(ByteRange::new(0, GATHERED / 2)),
            Some(ByteRange::between(0, (1 << 30) + GATHERED / 2))
        );
        assert_eq!(behind.wrote(ByteRange::new(0, GATHERED - 1)), None);
        assert_eq!(behind.wrote(ByteRange::new(0, GATHERED)), Some(ByteRange::new(0, GATHERED)));
    }

    #[test]
    fn one_is_under_way_at_a_time_and_only_where_it_is_wanted() {
        let file = OfFile::default();
        assert_eq!(file.wrote(ByteRange::new(0, GATHERED)), None);
        file.want(true);
        assert!(file.wrote(ByteRange::new(0, GATHERED)).is_some());
        assert_eq!(file.wrote(ByteRange::new(0, GATHERED)), None);
        file.started();
        assert_eq!(file.wrote(ByteRange::new(GATHERED, 1)), Some(ByteRange::new(0, GATHERED + 1)));
    }
}
