//! Naming another backing file in an image that nobody uses. Specification: "Header", "Header extensions".
//!
//! | # | step, each followed by a sync | power fails after it |
//! |---|---|---|
//! | 1 | where no format was ever recorded: the extension that names it (`header_area.rs`) | an extension without meaning, as no file is named |
//! | 2 | the new name in space that nothing uses | bytes without meaning |
//! | 3 | the first sector: the fields that lead to the name, and the format | the old name with its format, or the new one with its own |

use super::extensions;
use super::header_area::{HeaderArea, Room};
use super::image::Image;
use super::{BackingRef, Header, MAX_BACKING_NAME, OpenOptions};
use disk::{Buf, DiskError, ErrorKind, Operation, Result, StorageHandle};

/// Bytes that reach the disk whole or not at all.
const SECTOR: usize = 512;

/// Has the image name that backing file, or none, durably. What the image holds stays as it is, so what shows through
/// is the caller's to know.
///
/// # Errors
/// `Invalid` for a name that is too long or lacks its format, `Unsupported` where the header has no room, or where it
/// cannot be done in one step; `Corrupt`, and those of the storage.
pub async fn rename_backing(storage: &StorageHandle, backing: Option<&BackingRef>) -> Result<()> {
    change(storage, backing).await.map_err(|error| error.on(storage.name()))
}

async fn change(storage: &StorageHandle, backing: Option<&BackingRef>) -> Result<()> {
    let refused = |kind, why: &str| Err(DiskError::new(kind, Operation::Write).because(why));
    let header = Header::read(storage).await?;
    header.require_writable()?;
    let Some(BackingRef { name, format }) = backing else {
        if !HeaderArea::read(storage, &header).await?.can_grow() {
            return refused(ErrorKind::Unsupported, "the header is full; convert the image to a new one instead");
        }
        return switch(storage, 0, 0, None).await;
    };
    let Some(format) = format else {
        return refused(ErrorKind::Invalid, "a backing file needs its format, which is never guessed");
    };
    if name.is_empty() || name.len() as u64 > MAX_BACKING_NAME {
        return refused(ErrorKind::Invalid, "the backing file's name must have 1 to 1023 bytes");
    }
    if header.backing.as_ref().is_some_and(|old| old.format.is_none()) {
        return refused(
            ErrorKind::Unsupported,
            "the image names a backing file without its format; record that first with qemu-img rebase -u",
        );
    }
    let mut area = HeaderArea::read(storage, &header).await?;
    if area.find(extensions::BACKING_FORMAT).is_none() {
        // Through the open image, as the space may have to be made. It names no file, so the format has no meaning yet.
        let image = Image::open(storage.clone(), None, OpenOptions::default()).await?;
        let len = format.len().next_multiple_of(8);
        if area.make_room(&image, len).await? == Room::No {
            return refused(ErrorKind::Unsupported, "the header is full; convert the image to a new one instead");
        }
        area.append(&image, extensions::BACKING_FORMAT, format.as_bytes()).await?;
        area = HeaderArea::read(storage, &header).await?;
    }
    let Some((at, extension)) = area.find(extensions::BACKING_FORMAT) else {
        return refused(ErrorKind::Corrupt, "the extension that was added is not there");
    };
    let same = extension.data == format.as_bytes();
    let room = extension.data.len().next_multiple_of(8);
    // The next extension begins where this one's length says.
    if !same && (format.len().next_multiple_of(8) != room || at as usize + room > SECTOR) {
        return refused(
            ErrorKind::Unsupported,
            "name and format of its backing file cannot be changed in one step; convert the image to a new one instead",
        );
    }
    let Some(place) = area.place_for_name(name.len()) else {
        return refused(ErrorKind::Unsupported, "the header has no room for that name; name it in a shorter way");
    };
    // Crash: the place holds nothing that has a meaning.
    storage.write(place, Buf::copy_of(name.as_bytes())).await?;
    storage.sync().await?;
    switch(storage, place, name.len(), (!same).then_some((at as usize, format, room))).await
}

/// Step 3. `format`: where the extension's data stands, what it is to be, and bytes that it may take.
async fn switch(
    storage: &StorageHandle,
    place: u64,
    len: usize,
    format: Option<(usize, &String, usize)>,
) -> Result<()> {
    let mut sector = storage.read_new(0, SECTOR).await?;
    sector[8..16].copy_from_slice(&place.to_be_bytes());
    sector[16..20].copy_from_slice(&(len as u32).to_be_bytes());
    if let Some((at, format, room)) = format {
        sector[at - 4..at].copy_from_slice(&(format.len() as u32).to_be_bytes());
        sector[at..at + room].fill(0);
        sector[at..at + format.len()].copy_from_slice(format.as_bytes());
    }
    // Crash: one sector.
    storage.write(0, sector).await?;
    storage.sync().await
}
