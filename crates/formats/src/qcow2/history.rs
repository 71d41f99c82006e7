//! The mark of the history that is kept beside an image: who wrote to it last.
//!
//! Highwater can keep, beside an image, which of its bytes changed when. That is worth nothing once somebody else has
//! written to the image. The format has a word for this: bits of the autoclear features that a program does not know, it
//! must clear when it opens the image for writing. So bit 42 says that the extension of type `HWHI` in the header holds;
//! the extension says which history, and which moment of it. Programs that do not know the extension keep it as it is
//! (QEMU does, and may move it within the header), and it has no meaning without the bit.
//!
//! How it is stored: `sector_record.rs`. The record:
//!
//! | byte of the record | what |
//! |---|---|
//! | 0–15 | lineage |
//! | 16–31 | moment |
//!
//! What the mark does not see: QEMU (10.0) clears such bits when it opens an image for writing, but not when it opens one
//! read-only and makes it writable later. That is what it does with a parent into which it commits (`qemu-img commit`,
//! `block-commit`), and `blockdev-reopen` can do it with any image. Whoever relies on the mark compares the file's time of
//! change as well.
//!
//! A mark that is unreadable is no mark: a history must never be what keeps an image from being opened.

use super::extensions;
use super::image::Image;
use super::sector_record::SectorRecord;
use super::{AUTOCLEAR_HISTORY, Header};
use disk::{HistoryMark, Result};

/// Bytes of lineage and moment.
const MARK: usize = 32;

const HISTORY: SectorRecord = SectorRecord { kind: extensions::HISTORY, len: 64, record: MARK, bit: AUTOCLEAR_HISTORY };

fn parse(record: &[u8]) -> Option<HistoryMark> {
    let (lineage, moment) = record.split_at(16);
    Some(HistoryMark { lineage: lineage.try_into().ok()?, moment: moment.try_into().ok()? })
}

fn bytes_of(mark: HistoryMark) -> [u8; MARK] {
    let mut bytes = [0; MARK];
    bytes[..16].copy_from_slice(&mark.lineage);
    bytes[16..].copy_from_slice(&mark.moment);
    bytes
}

impl Header {
    /// The mark of the history that is kept beside the image; `None` when there is none, or somebody has written to
    /// the image who does not know of it.
    pub fn history_mark(&self) -> Option<HistoryMark> {
        if self.autoclear & AUTOCLEAR_HISTORY == 0 {
            return None;
        }
        parse(self.record(&HISTORY)?)
    }
}

impl Image {
    /// Puts the mark into the header, or takes it out; durable when it returns. `false`: there is no room for it, or
    /// version 2 has no autoclear features.
    ///
    /// From here on writes leave the mark, as whoever set it knows of them; see `announce_writing`.
    ///
    /// Crash: a mark in place of a mark is one write within one sector. Everything else happens while the bit is
    /// clear, and so is no mark; the bit is set last, in one sector. How an extension is added: `header_area.rs`.
    ///
    /// # Errors
    /// `ReadOnly`, `Poisoned`, and those of the storage.
    pub(super) async fn mark_history(&self, mark: Option<HistoryMark>) -> Result<bool> {
        self.allocator()?;
        self.refuse_if_poisoned()?;
        // Not while the first write is announced: it asks whether the mark is ours.
        let _one = self.begin_writing.lock().await;
        let Some(mark) = mark else {
            let cleared = self.change_features(|header| header.autoclear &= !AUTOCLEAR_HISTORY).await;
            self.poison_on_error(cleared)?;
            self.tracked.set(false);
            return Ok(self.header.borrow().version >= 3);
        };
        if self.header.borrow().version < 3 {
            return Ok(false);
        }
        let put = self.put_record(&HISTORY, &bytes_of(mark)).await;
        let put = self.poison_on_error(put)?;
        if put {
            let set = self.change_features(|header| header.autoclear |= AUTOCLEAR_HISTORY).await;
            self.poison_on_error(set)?;
            self.tracked.set(true);
        }
        Ok(put)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mark_is_written_and_read() {
        let mark = HistoryMark { lineage: [3; 16], moment: [4; 16] };
        assert_eq!(parse(&bytes_of(mark)), Some(mark));
        assert_eq!(bytes_of(mark)[..16], [3; 16]);
    }
}
