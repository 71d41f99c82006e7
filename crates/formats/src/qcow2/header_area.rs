//! Putting an extension into the header of an image in use, in steps of which each is one sector or out of reach.
//! Specification: "Header extensions".
//!
//! An area of extensions ends at the mark of type 0; what stands between it and the backing file's name, or the first
//! cluster's end, has no meaning. So the new extension is written there first, with another end mark behind it, and
//! then 8 bytes turn the present mark into the new extension's type and length.
//!
//! | # | step, each followed by a sync | power fails after it |
//! |---|---|---|
//! | 1 | if the backing file's name is in the way: a copy of it further back | bytes without meaning behind the name |
//! | 2 | the header's field for the name's place (8 bytes at offset 8) leads to the copy | the name is found, in the old or in the new place; the area still ends at the same mark |
//! | 3 | data and end mark behind the present end mark | bytes without meaning |
//! | 4 | type and length over the present end mark | the old extensions, or one more; either way an end mark behind |

use super::extensions::{self, Area, Extension, Parsed, be32, be64};
use super::header::FIRST_READ;
use super::image::Image;
use super::{Corruption, Header};
use disk::{Buf, DiskError, Result, StorageHandle};

/// Bytes of an extension's type and length, and of an end mark.
const HEAD: usize = 8;

/// Bytes that reach the disk whole or not at all.
const SECTOR: u64 = 512;

/// Whether so many bytes reach the disk whole or not at all.
pub(super) fn in_one_sector(offset: u64, len: usize) -> bool {
    offset % SECTOR + len as u64 <= SECTOR
}

/// What stands in an image's first cluster behind the fixed fields, as it is on the storage.
pub(super) struct HeaderArea {
    area: Area,
    /// Offset of the backing file's name, 0 where the field says that there is none.
    name_at: usize,
    name: Vec<u8>,
    /// The header may use bytes up to here.
    cluster_end: usize,
}

/// Whether an extension can be added.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Room {
    /// There is no room in the first cluster.
    No,
    /// There is.
    Here,
    /// There is, now that the backing file's name has moved to this offset.
    NameMoved(u64),
}

impl HeaderArea {
    /// Reads the area anew. `header` is the image's, as far as the cluster size and the length of the fields.
    ///
    /// Memory: the first cluster at most, 2 MiB.
    ///
    /// # Errors
    /// `Corrupt` when the extensions contradict the format; those of the storage.
    pub(super) async fn read(storage: &StorageHandle, header: &Header) -> Result<Self> {
        let cluster_end = header.cluster_size().min(storage.size()) as usize;
        let start = header.header_length as usize;
        let mut bytes = storage.read_new(0, cluster_end.min(FIRST_READ)).await?;
        if let Some(found) = Self::parse(&bytes, start, cluster_end)? {
            return Ok(found);
        }
        bytes = storage.read_new(0, cluster_end).await?;
        Self::parse(&bytes, start, cluster_end)?
            .ok_or_else(|| Corruption::HeaderTruncated { needed: cluster_end as u64 + 8, size: storage.size() }.into())
    }

    /// `None`: the area, or the name, reaches beyond `bytes`.
    fn parse(bytes: &[u8], start: usize, cluster_end: usize) -> Result<Option<Self>> {
        let (offset, len) = (be64(bytes, 8), be32(bytes, 16) as usize);
        let invalid = || DiskError::from(Corruption::BackingName { offset, len: len as u64 });
        let name_at = usize::try_from(offset).map_err(|_| invalid())?;
        let limit = if name_at == 0 { cluster_end } else { name_at };
        if limit > cluster_end || limit < start {
            return Err(invalid());
        }
        let Parsed::All(area) = extensions::parse(bytes, start, limit)? else { return Ok(None) };
        let name = if name_at == 0 { 0..0 } else { name_at..name_at + len };
        if name.end > cluster_end {
            return Err(invalid());
        }
        let Some(name) = bytes.get(name) else { return Ok(None) };
        Ok(Some(Self { area, name_at, name: name.to_vec(), cluster_end }))
    }

    /// The extension of that type, and where its data begins.
    pub(super) fn find(&self, kind: u32) -> Option<(u64, &Extension)> {
        let at = self.area.extensions.iter().position(|e| e.kind == kind)?;
        Some((self.area.starts[at] as u64 + HEAD as u64, &self.area.extensions[at]))
    }

    /// Where the data of an extension that is added begins.
    pub(super) fn data_at(&self) -> u64 {
        (self.area.end + HEAD) as u64
    }

    /// Whether an end mark keeps what follows from being read, so that the area may reach further.
    pub(super) fn can_grow(&self) -> bool {
        self.area.has_end_mark
    }

    /// Where another name of `len` bytes can stand beside the present one.
    pub(super) fn place_for_name(&self, len: usize) -> Option<u64> {
        // An area without an end mark ends at the present name.
        let begin = (self.area.end + if self.area.has_end_mark { HEAD } else { 0 }).next_multiple_of(8);
        let behind = match self.name_at {
            0 => begin,
            at => begin.max((at + self.name.len()).next_multiple_of(8)),
        };
        let before_present = self.area.has_end_mark && begin + len <= self.name_at;
        if before_present {
            return Some(begin as u64);
        }
        (self.area.has_end_mark && behind + len <= self.cluster_end).then_some(behind as u64)
    }

    /// Makes room for an extension with `len` bytes of data, a multiple of 8: steps 1 and 2. The caller enters the name's
    /// new place into what it holds of the header.
    pub(super) async fn make_room(&mut self, image: &Image, len: usize) -> Result<Room> {
        debug_assert!(len.is_multiple_of(8));
        // Without an end mark (the area is full to its last 8 bytes) there is nothing to turn into an extension.
        if !self.area.has_end_mark {
            return Ok(Room::No);
        }
        let end = self.area.end + HEAD + len + HEAD;
        let limit = if self.name_at == 0 { self.cluster_end } else { self.name_at };
        if end <= limit {
            return Ok(Room::Here);
        }
        if self.name_at == 0 {
            return Ok(Room::No);
        }
        // Behind the old name, so that it is whole until the field leads to the new one.
        let moved = end.max((self.name_at + self.name.len()).next_multiple_of(8));
        if moved + self.name.len() > self.cluster_end {
            return Ok(Room::No);
        }
        // Crash: the copy stands in space without meaning.
        image.storage.write(moved as u64, Buf::copy_of(&self.name)).await?;
        image.sync_header().await?;
        // Crash: 8 bytes in the first sector, so the old or the new place; the name stands in both.
        image.storage.write(8, Buf::copy_of(&(moved as u64).to_be_bytes())).await?;
        image.sync_header().await?;
        self.name_at = moved;
        Ok(Room::NameMoved(moved as u64))
    }

    /// Adds an extension behind all others, durably: steps 3 and 4. `make_room` has found room for its data.
    pub(super) async fn append(&self, image: &Image, kind: u32, data: &[u8]) -> Result<()> {
        let mut body = data.to_vec();
        body.resize(data.len() + HEAD, 0); // The next end mark.
        // Crash: all of it is behind the present end mark.
        image.storage.write(self.data_at(), Buf::copy_of(&body)).await?;
        image.sync_header().await?;
        let mut head = kind.to_be_bytes().to_vec();
        head.extend((data.len() as u32).to_be_bytes());
        // Crash: extensions are aligned to 8, so these 8 bytes are in one sector: the end mark, or the extension.
        image.storage.write(self.area.end as u64, Buf::copy_of(&head)).await?;
        image.sync_header().await
    }
}
