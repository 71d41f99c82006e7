//! The mark of the history that is kept beside an image: who wrote to it last.
//!
//! Highwater can keep, beside an image, which of its bytes changed when. That is worth nothing once somebody else has
//! written to the image. The format has a word for this: bits of the autoclear features that a program does not know, it
//! must clear when it opens the image for writing. So bit 42 says that the extension of type `HWHI` in the header holds;
//! the extension says which history, and which moment of it. Programs that do not know the extension keep it as it is
//! (QEMU does, and may move it within the header), and it has no meaning without the bit.
//!
//! | byte of the extension's data | what |
//! |---|---|
//! | 0–3 | version, 1 |
//! | 4–7 | where lineage and moment stand in the data, a multiple of 8 from 8 on |
//! | there, 16 bytes | lineage |
//! | then, 16 bytes | moment |
//!
//! What the mark does not see: QEMU (10.0) clears such bits when it opens an image for writing, but not when it opens one
//! read-only and makes it writable later. That is what it does with a parent into which it commits (`qemu-img commit`,
//! `block-commit`), and `blockdev-reopen` can do it with any image. Whoever relies on the mark compares the file's time of
//! change as well.
//!
//! The 64 bytes leave a choice of four places for the 32 that change, of which one at least lies within a sector, wherever
//! the extension is. A mark that is unreadable is no mark: a history must never be what keeps an image from being opened.

use super::extensions::{self, be32};
use super::header_area::{HeaderArea, Room, in_one_sector};
use super::image::Image;
use super::{AUTOCLEAR_HISTORY, Header};
use disk::{Buf, HistoryMark, Result};

/// Bytes of the extension's data as it is made here.
const LEN: usize = 64;
/// Bytes of lineage and moment.
const MARK: usize = 32;
/// Bytes before the first place of the mark.
const FRONT: usize = 8;
/// The version of the extension's data.
const VERSION: u32 = 1;

/// Where lineage and moment stand in the extension's data; `None` when that is not readable.
fn place_of(data: &[u8]) -> Option<usize> {
    if data.len() < FRONT + MARK || be32(data, 0) != VERSION {
        return None;
    }
    let at = be32(data, 4) as usize;
    (at >= FRONT && at.is_multiple_of(8) && at <= data.len() - MARK).then_some(at)
}

fn parse(data: &[u8]) -> Option<HistoryMark> {
    let (lineage, moment) = data[place_of(data)?..].split_at(16);
    Some(HistoryMark { lineage: lineage.try_into().ok()?, moment: moment[..16].try_into().ok()? })
}

fn bytes_of(mark: HistoryMark) -> [u8; MARK] {
    let mut bytes = [0; MARK];
    bytes[..16].copy_from_slice(&mark.lineage);
    bytes[16..].copy_from_slice(&mark.moment);
    bytes
}

/// The extension's data of `len` bytes (40 at least), when it stands at `data_at`.
fn encode(mark: HistoryMark, data_at: u64, len: usize) -> Vec<u8> {
    let places = (FRONT..=len - MARK).step_by(8);
    let place = places.into_iter().find(|place| in_one_sector(data_at + *place as u64, MARK)).unwrap_or(FRONT);
    let mut data = vec![0; len];
    data[..4].copy_from_slice(&VERSION.to_be_bytes());
    data[4..8].copy_from_slice(&(place as u32).to_be_bytes());
    data[place..place + MARK].copy_from_slice(&bytes_of(mark));
    data
}

impl Header {
    /// The mark of the history that is kept beside the image; `None` when there is none, or somebody has written to
    /// the image who does not know of it.
    pub fn history_mark(&self) -> Option<HistoryMark> {
        if self.autoclear & AUTOCLEAR_HISTORY == 0 {
            return None;
        }
        parse(&self.unknown_extensions.iter().find(|e| e.kind == extensions::HISTORY)?.data)
    }

    /// Enters what the extension's data has become.
    fn set_history_data(&mut self, data: Vec<u8>) {
        match self.unknown_extensions.iter_mut().find(|e| e.kind == extensions::HISTORY) {
            Some(extension) => extension.data = data,
            None => {
                self.order.push(extensions::HISTORY);
                self.unknown_extensions.push(extensions::Extension { kind: extensions::HISTORY, data });
            }
        }
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
        let put = self.put_mark(mark).await;
        let put = self.poison_on_error(put)?;
        if put {
            let set = self.change_features(|header| header.autoclear |= AUTOCLEAR_HISTORY).await;
            self.poison_on_error(set)?;
            self.tracked.set(true);
        }
        Ok(put)
    }

    /// Has the extension hold the mark. If the bit is set afterwards, it was set before and the mark was changed in one
    /// step.
    async fn put_mark(&self, mark: HistoryMark) -> Result<bool> {
        if self.header.borrow().history_mark() == Some(mark) {
            return Ok(true);
        }
        let header = self.header();
        let mut area = HeaderArea::read(&self.storage, &header).await?;
        let (data_at, data) = match area.find(extensions::HISTORY) {
            Some((data_at, extension)) => (data_at, Some(extension.data.clone())),
            None => (area.data_at(), None),
        };
        let Some(mut data) = data else {
            self.change_features(|header| header.autoclear &= !AUTOCLEAR_HISTORY).await?;
            match area.make_room(self, LEN).await? {
                Room::No => return Ok(false),
                Room::Here => {}
                Room::NameMoved(to) => self.header.borrow_mut().backing_offset = to,
            }
            let data = encode(mark, data_at, LEN);
            area.append(self, extensions::HISTORY, &data).await?;
            self.header.borrow_mut().set_history_data(data);
            return Ok(true);
        };
        if let Some(place) = place_of(&data).filter(|place| in_one_sector(data_at + *place as u64, MARK)) {
            // Crash: one sector, so the old mark or the new one.
            let bytes = bytes_of(mark);
            data[place..place + MARK].copy_from_slice(&bytes);
            self.storage.write(data_at + place as u64, Buf::copy_of(&bytes)).await?;
        } else if data.len() >= FRONT + MARK {
            // Another program has moved it across a sector's end, or another version made it.
            self.change_features(|header| header.autoclear &= !AUTOCLEAR_HISTORY).await?;
            data = encode(mark, data_at, data.len());
            // Crash: without the bit this has no meaning.
            self.storage.write(data_at, Buf::copy_of(&data)).await?;
        } else {
            return Ok(false);
        }
        self.sync_header().await?;
        self.header.borrow_mut().set_history_data(data);
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mark_lies_in_one_sector_wherever_the_extension_is() {
        let mark = HistoryMark { lineage: [3; 16], moment: [4; 16] };
        for data_at in (0..1024).step_by(8) {
            let data = encode(mark, data_at, LEN);
            assert_eq!((data.len(), parse(&data)), (LEN, Some(mark)));
            assert!(in_one_sector(data_at + place_of(&data).expect("readable") as u64, MARK), "{data_at}");
        }
        assert_eq!(parse(&encode(mark, 500, FRONT + MARK)), Some(mark), "no choice, but readable");
    }

    #[test]
    fn what_is_unreadable_is_no_mark() {
        let mark = HistoryMark { lineage: [3; 16], moment: [4; 16] };
        let good = encode(mark, 0, LEN);
        for (at, byte) in [(3, 2), (7, 0), (7, 12), (7, 40), (4, 1)] {
            let mut bad = good.clone();
            bad[at] = byte;
            assert_eq!(parse(&bad), None, "byte {at}");
        }
        assert!((0..40).all(|len| parse(&good[..len]).is_none()));
    }
}
