//! Storing a persistent bitmap in an image of which the guest's bytes stay as they are. Specification: "Bitmaps".
//!
//! | # | step | power fails after it |
//! |---|---|---|
//! | 1 | unknown autoclear bits are cleared; sync | as after the first write of a guest |
//! | 2 | the bitmap's data, its table, and a directory that leads to them and to all bitmaps kept are written into new clusters | bytes without users |
//! | 3 | counts; sync (entries of the refcount table; sync) | leaks |
//! | 4 | the header extension leads to the new directory: 24 bytes in one sector, or a new extension (`header_area.rs`); sync | the old directory or the new one, whole |
//! | 5 | autoclear bit 0, if it is not set; sync | no bitmaps, or the new directory |
//! | 6 | the old directory, and the bitmap that was replaced, lose their counts | leaks |
//!
//! Where the extension's data lies across two sectors (another program can have put it there), the bit is cleared before step
//! 4, so a crash there loses all bitmaps, but nothing else.
//!
//! **Which bitmaps stay true.** A bitmap says which of the guest's bytes changed since some moment. Here none changes, so
//! bitmaps that were valid stay valid, and the history's mark stays as well; those marked as in use stay marked. But the next
//! write of the guest's has to announce itself anew: it marks the new bitmap, too, if that one records changes.

use super::allocator::Allocator;
use super::bitmap_directory::{
    Bitmap, BitmapDirectory, BitmapPart, MAX_BITMAPS, MAX_DIRECTORY_BYTES, MAX_NAME, table_entries,
};
use super::extensions::{self, be64};
use super::header_area::{HeaderArea, Room, in_one_sector};
use super::image::Image;
use super::{AUTOCLEAR_BITMAPS, AUTOCLEAR_KNOWN, BitmapsExtension};
use disk::{Buf, ByteRange, DiskError, ErrorKind, Operation, Result};

/// The granularities that QEMU takes, as logarithms.
const GRANULARITY_BITS: std::ops::RangeInclusive<u32> = 9..=31;
/// Most bits of a bitmap (QEMU's bound).
const MAX_BITS: u64 = 0x2000_0000;
/// Largest table of a bitmap to be replaced whose clusters are given back, in entries: that of the most bits in clusters of
/// 512 bytes.
const MAX_FREED_ENTRIES: u32 = 128 << 10;

/// A bitmap to be stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NewBitmap<'a> {
    /// Its name, 1 to 1023 bytes.
    pub name: &'a str,
    /// Guest bytes that one bit stands for: a power of two, 512 to 2 GiB.
    pub granularity: u64,
    /// Whether QEMU is to record all further changes in it.
    pub auto: bool,
}

/// Clusters taken for a bitmap that nothing leads to yet: first and number.
type Taken = Vec<(u64, u64)>;

impl Image {
    /// Stores a bitmap, durably, in which the granules are dirty that `dirty` touches: ranges within the disk, ascending,
    /// not overlapping. A bitmap of the same name is replaced, others are kept. No request is under way.
    ///
    /// The image is closed cleanly before, but can be used afterwards.
    ///
    /// Memory: 1 MiB for the table, and two clusters.
    ///
    /// # Errors
    /// * `Invalid`: the name, the granularity or the ranges are not as said, or the disk has too many granules.
    /// * `Unsupported`: version 2, no room for the extension in the header, or too many bitmaps.
    /// * `NoSpace`: nothing has changed.
    /// * `Corrupt`: the present directory contradicts the format, and stays as it is.
    /// * `ReadOnly`, `Poisoned`, and those of the storage.
    pub async fn store_bitmap(&self, new: &NewBitmap<'_>, dirty: &[ByteRange]) -> Result<()> {
        let stored = self.judge_and_store(new, dirty).await;
        stored.map_err(|error| error.on(self.storage.name()))
    }

    async fn judge_and_store(&self, new: &NewBitmap<'_>, dirty: &[ByteRange]) -> Result<()> {
        let allocator = self.allocator()?;
        self.judge_bitmap(new, dirty)?;
        // What earlier writes owe is done with; whoever writes next announces it anew.
        self.close_cleanly().await?;
        let _one = self.begin_writing.lock().await;
        let header = self.header();
        let extension = header.bitmaps.filter(|_| header.autoclear & AUTOCLEAR_BITMAPS != 0);
        let old = match extension {
            Some(_) => BitmapDirectory::read(&self.storage, &header).await?,
            None => BitmapDirectory::default(),
        };
        let (mut directory, kept) = old.without(new.name.as_bytes());
        let granularity_bits = new.granularity.trailing_zeros() as u8;
        let entry = Bitmap::entry(new.name.as_bytes(), granularity_bits, new.auto);
        if kept >= MAX_BITMAPS || (directory.len() + entry.len()) as u64 > MAX_DIRECTORY_BYTES {
            return Err(refused(ErrorKind::Unsupported, "the image has as many bitmaps as the format allows"));
        }
        let cleared = self.change_features(|header| header.autoclear &= AUTOCLEAR_KNOWN).await;
        self.poison_on_error(cleared)?;
        let room = self.room_for_directory().await;
        if !self.poison_on_error(room)? {
            return Err(refused(ErrorKind::Unsupported, "there is no room for the bitmaps extension in the header"));
        }

        let mut taken = Taken::new();
        let written = self.write_bitmap(granularity_bits, dirty, &mut taken).await;
        let written = match written {
            Ok((offset, entries)) => {
                directory.extend(Bitmap::placed(entry, offset, entries));
                self.switch_directory(directory, kept + 1, &mut taken).await
            }
            Err(error) => Err(error),
        };
        if written.is_err() {
            for (first, count) in &taken {
                allocator.give_up_table(*first, *count);
            }
        }
        let directory = self.poison_on_error(written)?;
        // As after an open: of the bitmaps, only the directory is known as a table.
        for (first, count) in taken.into_iter().filter(|run| *run != directory) {
            let mut metadata = allocator.metadata.borrow_mut();
            (first..first + count).for_each(|cluster| {
                metadata.remove(&cluster);
            });
        }
        let replaced = old.bitmaps.iter().find(|bitmap| bitmap.name == new.name.as_bytes());
        let freed = self.free_old(extension.as_ref(), replaced).await;
        match self.poison_on_error(freed) {
            // The counts wait in memory for the next flush, the bitmap is stored.
            Err(error) if error.kind() == ErrorKind::NoSpace => Ok(()),
            other => other,
        }
    }

    fn judge_bitmap(&self, new: &NewBitmap<'_>, dirty: &[ByteRange]) -> Result<()> {
        let header = self.header.borrow();
        let invalid = |why: String| Err(refused(ErrorKind::Invalid, why));
        if header.version < 3 {
            return Err(refused(ErrorKind::Unsupported, "images of version 2 hold no bitmaps; convert to version 3"));
        }
        if new.name.is_empty() || new.name.len() > MAX_NAME || new.name.contains('\0') {
            return invalid("a bitmap's name has 1 to 1023 bytes, none of them zero".to_owned());
        }
        let bits = new.granularity.trailing_zeros();
        if !new.granularity.is_power_of_two() || !GRANULARITY_BITS.contains(&bits) {
            let found = new.granularity;
            return invalid(format!("the granularity is {found}, expected a power of two from 512 to 2147483648"));
        }
        if header.size == 0 || header.size > MAX_BITS << bits {
            let size = header.size;
            return invalid(format!("a disk of {size} bytes does not go with a granularity of {}", new.granularity));
        }
        let mut end = 0;
        for range in dirty {
            if range.is_empty() || range.offset() < end || range.end() > header.size {
                return Err(refused(
                    ErrorKind::Invalid,
                    "dirty ranges ascend, do not overlap, and lie within the disk",
                )
                .at(*range));
            }
            end = range.end();
        }
        Ok(())
    }

    /// Sees to it that the header has the extension, or room for it.
    async fn room_for_directory(&self) -> Result<bool> {
        let header = self.header();
        let mut area = HeaderArea::read(&self.storage, &header).await?;
        if area.find(extensions::BITMAPS).is_some() {
            return Ok(true);
        }
        match area.make_room(self, BitmapsExtension::LEN).await? {
            Room::No => return Ok(false),
            Room::Here => {}
            Room::NameMoved(to) => self.header.borrow_mut().backing_offset = to,
        }
        Ok(true)
    }

    /// Writes data and table; returns the table's place and number of entries.
    async fn write_bitmap(&self, granularity_bits: u8, dirty: &[ByteRange], taken: &mut Taken) -> Result<(u64, u32)> {
        let size = self.header.borrow().size;
        let bits = size.div_ceil(1 << granularity_bits);
        let bits_per_cluster = 8u64 << self.cluster_bits;
        let mut table = vec![0u64; table_entries(size, granularity_bits, self.cluster_bits) as usize];
        let mut filling: Option<Filling> = None;
        let mut next = 0;
        for range in dirty {
            // Two ranges may touch one granule.
            let mut at = (range.offset() >> granularity_bits).max(next);
            next = ((range.end() - 1) >> granularity_bits) + 1;
            while at < next {
                let index = at / bits_per_cluster;
                let first = index * bits_per_cluster;
                let end = next.min(first + bits_per_cluster);
                if filling.as_ref().is_none_or(|filling| filling.index != index) {
                    if let Some(done) = filling.take() {
                        self.store_data(done, &mut table, taken).await?;
                    }
                    let clean = bits_per_cluster.min(bits - first);
                    filling = Some(Filling { index, bytes: Buf::zeroed(self.cluster_size() as usize), clean });
                }
                if let Some(filling) = &mut filling {
                    set_bits(&mut filling.bytes, at - first, end - first);
                    filling.clean -= end - at;
                }
                at = end;
            }
        }
        if let Some(done) = filling.take() {
            self.store_data(done, &mut table, taken).await?;
        }
        let bytes: Vec<u8> = table.iter().flat_map(|entry| entry.to_be_bytes()).collect();
        let (first, _) = self.take_clusters_for(bytes.len() as u64, taken).await?;
        let offset = first << self.cluster_bits;
        self.storage.write(offset, Buf::copy_of(&bytes)).await?;
        Ok((offset, table.len() as u32))
    }

    /// Writes a cluster of bits, unless its table entry alone can tell.
    async fn store_data(&self, done: Filling, table: &mut [u64], taken: &mut Taken) -> Result<()> {
        let part = if done.clean == 0 {
            BitmapPart::Dirty
        } else {
            let (cluster, _) = self.take_clusters_for(self.cluster_size(), taken).await?;
            let offset = cluster << self.cluster_bits;
            self.storage.write(offset, done.bytes).await?;
            BitmapPart::At(offset)
        };
        table[done.index as usize] = part.encode();
        Ok(())
    }

    /// New clusters in a row for so many bytes; their space reads as zero.
    async fn take_clusters_for(&self, bytes: u64, taken: &mut Taken) -> Result<(u64, u64)> {
        let allocator = self.allocator()?;
        if allocator.refcounts.needs_flush() {
            self.flush_all().await?;
        }
        let count = bytes.div_ceil(self.cluster_size());
        let run = (allocator.allocate_table(count).await?, count);
        taken.push(run);
        Ok(run)
    }

    /// Writes the directory, and has the header lead to it; returns its clusters.
    async fn switch_directory(&self, directory: Vec<u8>, count: u32, taken: &mut Taken) -> Result<(u64, u64)> {
        let clusters = self.take_clusters_for(directory.len() as u64, taken).await?;
        let directory_offset = clusters.0 << self.cluster_bits;
        let extension = BitmapsExtension { count, directory_size: directory.len() as u64, directory_offset };
        self.storage.write(directory_offset, Buf::copy_of(&directory)).await?;
        // Crash: nothing leads to any of it, now or before; afterwards it is all there, and counted.
        self.write_counts().await?;
        let header = self.header();
        let area = HeaderArea::read(&self.storage, &header).await?;
        let data = extension.encode();
        match area.find(extensions::BITMAPS) {
            Some((at, _)) => {
                if !in_one_sector(at, data.len()) {
                    self.change_features(|header| header.autoclear &= !AUTOCLEAR_BITMAPS).await?;
                }
                // Crash: one sector, so the old directory or the new one; or without meaning, as the bit is clear.
                self.storage.write(at, Buf::copy_of(&data)).await?;
                self.sync_header().await?;
            }
            None => {
                area.append(self, extensions::BITMAPS, &data).await?;
                self.header.borrow_mut().order.push(extensions::BITMAPS);
            }
        }
        self.header.borrow_mut().bitmaps = Some(extension);
        // Crash: the bit is in the feature words' sector, and what it vouches for is durable.
        self.change_features(|header| header.autoclear |= AUTOCLEAR_BITMAPS).await?;
        Ok(clusters)
    }

    /// Takes the counts of what the header led to before, and gives the space back.
    async fn free_old(&self, directory: Option<&BitmapsExtension>, replaced: Option<&Bitmap>) -> Result<()> {
        if let Some(extension) = directory {
            self.free_directory(extension).await?;
        }
        if let Some(bitmap) = replaced {
            self.free_bitmap(bitmap).await?;
        }
        self.write_counts().await?;
        let allocator = self.allocator()?;
        allocator.punch_stale().await;
        allocator.trim_file().await?;
        allocator.sync().await
    }

    /// Takes the counts of a directory to which nothing leads any more.
    async fn free_directory(&self, extension: &BitmapsExtension) -> Result<()> {
        let allocator = self.allocator()?;
        let first = extension.directory_offset >> self.cluster_bits;
        let end = (extension.directory_offset + extension.directory_size).div_ceil(self.cluster_size());
        for cluster in first..end {
            allocator.metadata.borrow_mut().remove(&cluster);
            self.free_if_counted(allocator, cluster).await?;
        }
        Ok(())
    }

    /// Takes the counts of a bitmap's data and table to which nothing leads any more. What contradicts the format is left:
    /// lost space is better than a cluster that is somebody else's.
    async fn free_bitmap(&self, bitmap: &Bitmap) -> Result<()> {
        let allocator = self.allocator()?;
        let size = 8 * u64::from(bitmap.table_entries);
        let beyond = bitmap.table_offset.checked_add(size).is_none_or(|end| end > self.storage.size());
        if bitmap.table_entries > MAX_FREED_ENTRIES || beyond {
            return Ok(());
        }
        let bytes = self.storage.read_new(bitmap.table_offset, size as usize).await?;
        let parts: Option<Vec<BitmapPart>> =
            bytes.chunks_exact(8).map(|entry| BitmapPart::decode(be64(entry, 0), self.cluster_size())).collect();
        let Some(parts) = parts else { return Ok(()) };
        for part in parts {
            if let BitmapPart::At(offset) = part {
                self.free_if_counted(allocator, offset >> self.cluster_bits).await?;
            }
        }
        let first = bitmap.table_offset >> self.cluster_bits;
        for cluster in first..(bitmap.table_offset + size).div_ceil(self.cluster_size()) {
            self.free_if_counted(allocator, cluster).await?;
        }
        Ok(())
    }

    /// Takes a reference away, unless the cluster has none, or is a table in use.
    async fn free_if_counted(&self, allocator: &Allocator, cluster: u64) -> Result<()> {
        if allocator.metadata.borrow().contains(&cluster) || allocator.refcounts.count(cluster).await? == 0 {
            return Ok(());
        }
        allocator.release(cluster).await.map(drop)
    }
}

/// A cluster of bits that is being made.
struct Filling {
    /// Its table entry.
    index: u64,
    bytes: Buf,
    /// How many of its bits within the disk are not set.
    clean: u64,
}

/// Sets the bits `first..end`, counted from the lowest of the first byte.
fn set_bits(bytes: &mut [u8], first: u64, end: u64) {
    let (first_byte, last_byte) = ((first / 8) as usize, ((end - 1) / 8) as usize);
    let (head, tail) = (0xffu8 << (first % 8), 0xffu8 >> (7 - (end - 1) % 8));
    if first_byte == last_byte {
        bytes[first_byte] |= head & tail;
        return;
    }
    bytes[first_byte] |= head;
    bytes[first_byte + 1..last_byte].fill(0xff);
    bytes[last_byte] |= tail;
}

fn refused(kind: ErrorKind, why: impl Into<String>) -> DiskError {
    DiskError::new(kind, Operation::Write).because(why.into())
}

#[cfg(test)]
mod tests {
    use super::set_bits;

    #[test]
    fn bits_are_set_as_asked() {
        for first in 0..40u64 {
            for end in first + 1..=40 {
                let mut bytes = [0; 5];
                set_bits(&mut bytes, first, end);
                for bit in 0..40 {
                    let set = bytes[bit as usize / 8] & 1 << (bit % 8) != 0;
                    assert_eq!(set, (first..end).contains(&bit), "{first}..{end}, bit {bit}");
                }
            }
        }
    }
}
