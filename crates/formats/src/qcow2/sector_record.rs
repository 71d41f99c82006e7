//! A record of ours in the header that changes in one step: an extension whose data leaves it a choice of places, of which
//! one at least lies within a sector wherever the extension is.
//!
//! | byte of the extension's data | what |
//! |---|---|
//! | 0–3 | version, 1 |
//! | 4–7 | where the record stands in the data, a multiple of 8 from 8 on |
//! | there | the record |
//!
//! The format lets a program that does not know an extension keep it as it is, and move it within the header (QEMU does).
//! After that the record may lie across a sector's end: it is then written to another place first.
//!
//! What is unreadable, or of another version, is no record: nothing of ours keeps an image from being opened.

use super::Header;
use super::extensions::{Extension, be32};
use super::header_area::{HeaderArea, Room, in_one_sector};
use super::image::Image;
use disk::{Buf, Result};

/// Bytes before the first place of a record.
pub(super) const FRONT: usize = 8;
/// The version of the extensions' data.
const VERSION: u32 = 1;

/// One kind of record.
#[derive(Clone, Copy, Debug)]
pub(super) struct SectorRecord {
    /// The extension's type.
    pub(super) kind: u32,
    /// Bytes of the extension's data as it is made here: at least `FRONT` + 2 records − 8, and with a record more the
    /// record can move without a moment at which there is none.
    pub(super) len: usize,
    /// Bytes of the record, a multiple of 8, 512 at most.
    pub(super) record: usize,
    /// The autoclear bit that says that it holds.
    pub(super) bit: u64,
}

impl SectorRecord {
    /// Where the record stands in the extension's data; `None` when that is not readable.
    pub(super) fn place_of(&self, data: &[u8]) -> Option<usize> {
        if data.len() < FRONT + self.record || be32(data, 0) != VERSION {
            return None;
        }
        let at = be32(data, 4) as usize;
        (at >= FRONT && at.is_multiple_of(8) && at <= data.len() - self.record).then_some(at)
    }

    /// The record in the extension's data.
    pub(super) fn parse<'a>(&self, data: &'a [u8]) -> Option<&'a [u8]> {
        let place = self.place_of(data)?;
        data.get(place..place + self.record)
    }

    /// The places that lie within a sector, when the extension's data of `len` bytes stands at `data_at`.
    fn whole_places(&self, data_at: u64, len: usize) -> impl Iterator<Item = usize> {
        let record = self.record;
        (FRONT..=len - record).step_by(8).filter(move |place| in_one_sector(data_at + *place as u64, record))
    }

    /// The extension's data of `len` bytes (a record and its front at least), when it stands at `data_at`.
    pub(super) fn encode(&self, record: &[u8], data_at: u64, len: usize) -> Vec<u8> {
        let place = self.whole_places(data_at, len).next().unwrap_or(FRONT);
        let mut data = vec![0; len];
        data[..4].copy_from_slice(&VERSION.to_be_bytes());
        data[4..8].copy_from_slice(&(place as u32).to_be_bytes());
        data[place..place + self.record].copy_from_slice(record);
        data
    }
}

impl Header {
    /// The record of that kind, whether its bit is set or not.
    pub(super) fn record(&self, kind: &SectorRecord) -> Option<&[u8]> {
        kind.parse(&self.unknown_extensions.iter().find(|e| e.kind == kind.kind)?.data)
    }

    /// Enters what the extension's data has become.
    fn set_record_data(&mut self, kind: u32, data: Vec<u8>) {
        match self.unknown_extensions.iter_mut().find(|e| e.kind == kind) {
            Some(extension) => extension.data = data,
            None => {
                self.order.push(kind);
                self.unknown_extensions.push(Extension { kind, data });
            }
        }
    }
}

impl Image {
    /// Has the header hold the record, durably. `false`: there is no room for it, or another version of us made the
    /// extension that is there. The bit is the caller's: if it is set afterwards, it was set before, and the record
    /// changed in one step.
    ///
    /// Crash: a record in place of a record is one write within one sector. A record that has to move stands whole in
    /// its new place before 4 bytes of one sector lead there. Everything else happens while the bit is clear. How an
    /// extension is added: `header_area.rs`.
    pub(super) async fn put_record(&self, kind: &SectorRecord, record: &[u8]) -> Result<bool> {
        if self.header.borrow().record(kind) == Some(record) {
            return Ok(true);
        }
        let header = self.header();
        let mut area = HeaderArea::read(&self.storage, &header).await?;
        let found = area.find(kind.kind).map(|(data_at, extension)| (data_at, extension.data.clone()));
        let Some((data_at, mut data)) = found else {
            self.change_features(|header| header.autoclear &= !kind.bit).await?;
            match area.make_room(self, kind.len).await? {
                Room::No => return Ok(false),
                Room::Here => {}
                Room::NameMoved(to) => self.header.borrow_mut().backing_offset = to,
            }
            let data = kind.encode(record, area.data_at(), kind.len);
            area.append(self, kind.kind, &data).await?;
            self.header.borrow_mut().set_record_data(kind.kind, data);
            return Ok(true);
        };
        let present = kind.place_of(&data);
        let apart = |place: &usize| present.is_some_and(|at| *place + kind.record <= at || at + kind.record <= *place);
        if let Some(place) = present.filter(|place| in_one_sector(data_at + *place as u64, kind.record)) {
            // Crash: one sector, so the old record or the new one.
            data[place..place + kind.record].copy_from_slice(record);
            self.storage.write(data_at + place as u64, Buf::copy_of(record)).await?;
        } else if let Some(place) = kind.whole_places(data_at, data.len().max(kind.record)).find(apart) {
            // Another program has moved it across a sector's end.
            // Crash: nothing leads there yet.
            self.storage.write(data_at + place as u64, Buf::copy_of(record)).await?;
            self.sync_header().await?;
            // Crash: the data begins at a multiple of 8, so these 4 bytes are in one sector.
            let leads = (place as u32).to_be_bytes();
            data[place..place + kind.record].copy_from_slice(record);
            data[4..8].copy_from_slice(&leads);
            self.storage.write(data_at + 4, Buf::copy_of(&leads)).await?;
        } else if data.len() >= FRONT + kind.record {
            // There is no place beside the one that it has, or it is not readable.
            self.change_features(|header| header.autoclear &= !kind.bit).await?;
            data = kind.encode(record, data_at, data.len());
            // Crash: without the bit this has no meaning.
            self.storage.write(data_at, Buf::copy_of(&data)).await?;
        } else {
            return Ok(false);
        }
        self.sync_header().await?;
        self.header.borrow_mut().set_record_data(kind.kind, data);
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMALL: SectorRecord = SectorRecord { kind: 1, len: 64, record: 32, bit: 1 };
    const ROOMY: SectorRecord = SectorRecord { kind: 2, len: 240, record: 80, bit: 2 };

    #[test]
    fn a_record_lies_in_one_sector_wherever_the_extension_is() {
        for kind in [SMALL, ROOMY] {
            let record: Vec<u8> = (1..=kind.record as u8).collect();
            for data_at in (0..1024).step_by(8) {
                let data = kind.encode(&record, data_at, kind.len);
                assert_eq!((data.len(), kind.parse(&data)), (kind.len, Some(&record[..])));
                let place = kind.place_of(&data).expect("readable");
                assert!(in_one_sector(data_at + place as u64, kind.record), "{data_at}");
            }
            let least = FRONT + kind.record;
            assert_eq!(kind.parse(&kind.encode(&record, 500, least)), Some(&record[..]), "no choice, but readable");
        }
    }

    #[test]
    fn a_roomy_record_can_move_to_a_place_of_its_own() {
        for data_at in (0..1024).step_by(8) {
            for at in (FRONT..=ROOMY.len - ROOMY.record).step_by(8) {
                let apart = |place: &usize| place + ROOMY.record <= at || at + ROOMY.record <= *place;
                let crossing = !in_one_sector(data_at + at as u64, ROOMY.record);
                let place = ROOMY.whole_places(data_at, ROOMY.len).find(apart);
                assert!(!crossing || place.is_some(), "data at {data_at}, record at {at}");
            }
        }
    }

    #[test]
    fn what_is_unreadable_is_no_record() {
        for kind in [SMALL, ROOMY] {
            let record = vec![3; kind.record];
            let good = kind.encode(&record, 0, kind.len);
            let beyond = (kind.len - kind.record + 8) as u8;
            for (at, byte) in [(3, 2), (7, 0), (7, 12), (7, beyond), (4, 1), (4, 0xff)] {
                let mut bad = good.clone();
                bad[at] = byte;
                assert_eq!(kind.parse(&bad), None, "byte {at}");
            }
            assert!((0..FRONT + kind.record).all(|len| kind.parse(&good[..len]).is_none()));
        }
    }
}
