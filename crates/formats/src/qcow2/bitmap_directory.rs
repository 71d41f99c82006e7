//! QEMU's persistent bitmaps: the directory and the tables. Specification: "Bitmaps".

use super::entry::OFFSET_MASK;
use super::extensions::{BitmapsExtension, be16, be32, be64};
use super::{AUTOCLEAR_BITMAPS, Corruption, Header};
use disk::{Buf, DiskError, ErrorKind, Result, StorageHandle};

/// Most bitmaps (QEMU's bound).
pub(super) const MAX_BITMAPS: u32 = 65535;
/// Largest directory in bytes (QEMU's bound): 65535 entries of the fixed part and a name of 1023 bytes.
pub(super) const MAX_DIRECTORY_BYTES: u64 = MAX_BITMAPS as u64 * (FIXED as u64 + 1024);
/// Largest bitmap table in entries (QEMU's bound).
const MAX_TABLE_ENTRIES: u32 = 0x0800_0000;
/// Longest name in bytes (QEMU's bound).
pub(super) const MAX_NAME: usize = 1023;
/// Reserved bits of bitmap table entries: 1–8 and 56–63.
const TABLE_RESERVED: u64 = 0xff00_0000_0000_01fe;
/// The only type: a dirty tracking bitmap.
const TYPE_DIRTY: u8 = 1;
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
    /// The bitmap may be used by who does not know its extra data.
    pub extra_compatible: bool,
    /// Where its directory entry stands within the directory.
    entry_at: usize,
}

impl Bitmap {
    /// The name for people.
    pub fn name_text(&self) -> std::borrow::Cow<'_, str> {
        String::from_utf8_lossy(&self.name)
    }

    /// The directory entry of a valid bitmap whose table has no place yet.
    pub(super) fn entry(name: &[u8], granularity_bits: u8, auto: bool) -> Vec<u8> {
        let mut entry = vec![0; FIXED];
        let flags = if auto { FLAG_AUTO } else { 0 };
        entry[FLAGS_AT..FLAGS_AT + 4].copy_from_slice(&flags.to_be_bytes());
        entry[16] = TYPE_DIRTY;
        entry[17] = granularity_bits;
        entry[18..20].copy_from_slice(&(name.len() as u16).to_be_bytes());
        entry.extend(name);
        entry.resize(entry.len().next_multiple_of(8), 0);
        entry
    }

    /// The directory entry, now that the table has its place.
    pub(super) fn placed(mut entry: Vec<u8>, table_offset: u64, table_entries: u32) -> Vec<u8> {
        entry[..8].copy_from_slice(&table_offset.to_be_bytes());
        entry[8..12].copy_from_slice(&table_entries.to_be_bytes());
        entry
    }
}

/// What an entry of a bitmap's table says of as many bits as a cluster holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum BitmapPart {
    /// All are clear.
    Clean,
    /// All are set.
    Dirty,
    /// They stand in the cluster at this offset.
    At(u64),
}

impl BitmapPart {
    /// `None` when the entry contradicts the format.
    pub(super) fn decode(entry: u64, cluster_size: u64) -> Option<Self> {
        let offset = entry & OFFSET_MASK;
        match (offset, entry & 1) {
            _ if entry & TABLE_RESERVED != 0 || offset & (cluster_size - 1) != 0 => None,
            (0, 0) => Some(Self::Clean),
            (0, _) => Some(Self::Dirty),
            (_, 0) => Some(Self::At(offset)),
            _ => None,
        }
    }

    pub(super) fn encode(self) -> u64 {
        match self {
            Self::Clean => 0,
            Self::Dirty => 1,
            Self::At(offset) => offset,
        }
    }
}

/// Entries that the table of a bitmap over `size` guest bytes has.
pub(super) fn table_entries(size: u64, granularity_bits: u8, cluster_bits: u32) -> u64 {
    size.div_ceil(1 << granularity_bits).div_ceil(8 << cluster_bits)
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
                extra_compatible: flags & FLAG_EXTRA_COMPATIBLE != 0,
                entry_at: at,
            };
            if flags & !FLAGS_KNOWN != 0 {
                return Err(invalid("reserved flags are set"));
            }
            if entry[16] != TYPE_DIRTY {
                return Err(invalid("its type is not that of a dirty tracking bitmap"));
            }
            if bitmap.granularity_bits > 63 {
                return Err(invalid("its granularity is out of range"));
            }
            if name_len == 0 || name_len > MAX_NAME {
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

    /// The entries as stored of all bitmaps but the one of that name, and how many these are.
    pub(super) fn without(&self, name: &[u8]) -> (Vec<u8>, u32) {
        let ends = self.bitmaps.iter().skip(1).map(|bitmap| bitmap.entry_at).chain([self.bytes.len()]);
        let mut bytes = Vec::with_capacity(self.bytes.len());
        let mut count = 0;
        for (bitmap, end) in self.bitmaps.iter().zip(ends).filter(|(bitmap, _)| bitmap.name != name) {
            bytes.extend(&self.bytes[bitmap.entry_at..end]);
            count += 1;
        }
        (bytes, count)
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
