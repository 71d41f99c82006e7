//! QEMU's persistent bitmaps: the directory and the tables. Specification: "Bitmaps".

use super::extensions::{BitmapsExtension, be16, be32, be64};
use super::{AUTOCLEAR_BITMAPS, Corruption, Header};
use disk::{Buf, DiskError, ErrorKind, Result, StorageHandle};

/// Most bitmaps (QEMU's bound).
const MAX_BITMAPS: u32 = 65535;
/// Largest directory in bytes (QEMU's bound): 65535 entries of the fixed part and a name of 1023 bytes.
const MAX_DIRECTORY_BYTES: u64 = MAX_BITMAPS as u64 * (FIXED as u64 + 1024);
/// Largest bitmap table in entries (QEMU's bound).
const MAX_TABLE_ENTRIES: u32 = 0x0800_0000;
/// Bytes of an entry's fixed part.
const FIXED: usize = 24;
/// Where an entry's flags stand.
const FLAGS_AT: usize = 12;

/// The bitmap was not saved correctly and may be inconsistent.
const FLAG_IN_USE: u32 = 1 << 0;
/// The bitmap records all changes.
const FLAG_AUTO: u32 = 1 << 1;
/// Extra data may be ignored.
const FLAG_EXTRA_COMPATIBLE: u32 = 1 << 2;
const FLAGS_KNOWN: u32 = FLAG_IN_USE | FLAG_AUTO | FLAG_EXTRA_COMPATIBLE;

/// One persistent bitmap.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bitmap {
    /// Its name as stored.
    pub name: Vec<u8>,
    /// Where its table begins; a multiple of the cluster size.
    pub table_offset: u64,
    /// Entries of its table.
    pub table_entries: u32,
    /// Logarithm of the guest bytes that one bit stands for, 0..=63.
    pub granularity_bits: u8,
    /// It was not saved correctly and must not be trusted.
    pub in_use: bool,
    /// It records all changes to the disk.
    pub auto: bool,
    /// Bytes of extra data, whose meaning is unknown.
    pub extra_size: u32,
    /// Where its directory entry stands within the directory.
    entry_at: usize,
}

impl Bitmap {
    /// The name for people.
    pub fn name_text(&self) -> std::borrow::Cow<'_, str> {
        String::from_utf8_lossy(&self.name)
    }
}

/// The bitmap directory.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BitmapDirectory {
    /// The bitmaps, in the order of the directory.
    pub bitmaps: Vec<Bitmap>,
    /// The directory as stored.
    bytes: Vec<u8>,
}

/// Checks the extension's fields against the bounds and each other.
pub(super) fn validate_extension(
    extension: &BitmapsExtension,
    cluster_size: u64,
) -> std::result::Result<(), Corruption> {
    let least = u64::from(extension.count) * (FIXED as u64 + 8);
    let valid = (1..=MAX_BITMAPS).contains(&extension.count)
        && (least..=MAX_DIRECTORY_BYTES).contains(&extension.directory_size)
        && extension.directory_offset != 0
        && extension.directory_offset & (cluster_size - 1) == 0
        && extension.directory_offset.checked_add(extension.directory_size).is_some_and(|e| e <= i64::MAX as u64);
    if valid { Ok(()) } else { Err(extension.invalid()) }
}

impl BitmapDirectory {
    /// Reads the directory that the header names; empty when there is none. Memory is bounded by the
    /// directory's size, which the file's size and 68 MiB bound.
    ///
    /// # Errors
    /// `Corrupt` when the directory contradicts the format.
    pub async fn read(storage: &StorageHandle, header: &Header) -> Result<Self> {
        let Some(extension) = &header.bitmaps else { return Ok(Self::default()) };
        let corrupt = |e: Corruption| DiskError::from(e).on(storage.name());
        validate_extension(extension, header.cluster_size()).map_err(corrupt)?;
        if extension.directory_offset + extension.directory_size > storage.size() {
            return Err(corrupt(extension.invalid()));
        }
        let bytes = storage.read_new(extension.directory_offset, extension.directory_size as usize).await?;
        Self::parse(&bytes, extension, header.cluster_size()).map_err(corrupt)
    }

    fn parse(bytes: &[u8], extension: &BitmapsExtension, cluster_size: u64) -> std::result::Result<Self, Corruption> {
        let mut bitmaps = Vec::new();
        let mut names = std::collections::HashSet::new();
        let mut at = 0usize;
        for index in 0..extension.count {
            let invalid = |what| Corruption::BitmapEntry { index, what };
            let entry =
                bytes.get(at..).filter(|e| e.len() >= FIXED).ok_or(invalid("it reaches beyond the directory"))?;
            let flags = be32(entry, FLAGS_AT);
            let (name_len, extra_size) = (usize::from(be16(entry, 18)), be32(entry, 20));
            let name_at = FIXED as u64 + u64::from(extra_size);
            let end = name_at + name_len as u64;
            let padded = end.next_multiple_of(8);
            if padded > entry.len() as u64 {
                return Err(invalid("it reaches beyond the directory"));
            }
            let bitmap = Bitmap {
                name: entry[name_at as usize..end as usize].to_vec(),
                table_offset: be64(entry, 0),
                table_entries: be32(entry, 8),
                granularity_bits: entry[17],
                in_use: flags & FLAG_IN_USE != 0,
                auto: flags & FLAG_AUTO != 0,
                extra_size,
                entry_at: at,
            };
            if flags & !FLAGS_KNOWN != 0 {
                return Err(invalid("reserved flags are set"));
            }
            if entry[16] != 1 {
                return Err(invalid("its type is not that of a dirty tracking bitmap"));
            }
            if bitmap.granularity_bits > 63 {
                return Err(invalid("its granularity is out of range"));
            }
            if name_len == 0 || name_len > 1023 {
                return Err(invalid("its name is empty or longer than 1023 bytes"));
            }
            if bitmap.table_offset == 0 || bitmap.table_offset & (cluster_size - 1) != 0 {
                return Err(invalid("its table is not aligned to a cluster"));
            }
            if bitmap.table_entries == 0 || bitmap.table_entries > MAX_TABLE_ENTRIES {
                return Err(invalid("its table is empty or too large"));
            }
            if !names.insert(bitmap.name.clone()) {
                return Err(invalid("another bitmap has the same name"));
            }
            bitmaps.push(bitmap);
            at += padded as usize;
        }
        if at != bytes.len() {
            return Err(Corruption::BitmapDirectorySize { size: bytes.len() as u64, used: at as u64 });
        }
        Ok(Self { bitmaps, bytes: bytes.to_vec() })
    }

    /// The directory as stored, with these bitmaps marked as not to be trusted; `None` when they all are.
    fn marked(&self, which: Invalidate) -> Option<Buf> {
        let stale = |b: &&Bitmap| !b.in_use && (b.auto || which == Invalidate::All);
        let mut bytes = Buf::copy_of(&self.bytes);
        let mut changed = false;
        for bitmap in self.bitmaps.iter().filter(stale) {
            let at = bitmap.entry_at + FLAGS_AT;
            let flags = be32(&bytes, at) | FLAG_IN_USE;
            bytes[at..at + 4].copy_from_slice(&flags.to_be_bytes());
            changed = true;
        }
        changed.then_some(bytes)
    }
}

/// Which bitmaps a change makes untrue.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Invalidate {
    /// Those that record changes (`auto`): what a write does that nobody records. The others are frozen and stay
    /// true.
    Recording,
    /// All: what a change of the disk's size does, as no bitmap has the new size.
    All,
}

/// Makes QEMU's bitmaps honest before somebody writes to the disk who does not keep them. Durable when it returns;
/// returns whether anything had to be written. Call it before the first write of the guest's, and with
/// [`Invalidate::All`] before a resize.
///
/// Bitmaps get the `in_use` flag in the directory: the format's word for "not saved correctly". QEMU sets it
/// itself while it writes, so its tools show such a bitmap as inconsistent, refuse to use it, and let it be removed;
/// `qemu-img check` still finds its clusters. (Clearing the autoclear bit instead would lose the bitmaps and
/// leak their clusters.) Only a directory that contradicts the format, and so cannot be marked, loses that bit.
///
/// Crash: flags change in place, each within a sector, before the first guest write; a bitmap that is
/// marked without need is merely not used.
///
/// # Errors
/// Those of the storage.
pub async fn invalidate_bitmaps(storage: &StorageHandle, header: &mut Header, which: Invalidate) -> Result<bool> {
    let Some(extension) = header.bitmaps.filter(|_| header.autoclear & AUTOCLEAR_BITMAPS != 0) else {
        return Ok(false);
    };
    match BitmapDirectory::read(storage, header).await {
        Ok(directory) => {
            let Some(marked) = directory.marked(which) else { return Ok(false) };
            storage.write(extension.directory_offset, marked).await?;
        }
        Err(error) if error.kind() == ErrorKind::Corrupt => {
            header.autoclear &= !AUTOCLEAR_BITMAPS;
            header.write(storage).await?;
        }
        Err(error) => return Err(error),
    }
    storage.sync().await?;
    Ok(true)
}
