//! Reading a persistent bitmap: which of the guest's bytes it calls dirty. Specification: "Bitmap table", "Bitmap data".

use super::bitmap_directory::{Bitmap, BitmapDirectory, BitmapPart, table_entries};
use super::extensions::be64;
use super::{AUTOCLEAR_BITMAPS, Corruption, Header, Table};
use disk::{ByteRange, DiskError, ErrorKind, Operation, Result, StorageHandle};
use std::collections::VecDeque;

/// Bytes of a bitmap's data that are looked at in one go; their ranges are kept until they are asked for.
const PIECE: u64 = 4096;
/// Entries of a bitmap's table in memory.
const TABLE_PIECE: u64 = 512;
/// Most ranges that [`read_bitmap`] returns: 64 MiB of them.
const MAX_RANGES: usize = 4 << 20;

/// The dirty ranges of one bitmap, one after the other: ascending, neighbours merged, within the disk.
///
/// Memory: less than 1 MiB, whatever the image says.
#[derive(Debug)]
pub struct BitmapRanges {
    storage: StorageHandle,
    bitmap: Bitmap,
    cluster_bits: u32,
    /// Guest bytes of the disk.
    size: u64,
    /// Bits of the bitmap.
    bits: u64,
    /// The next bit to be looked at; a multiple of 8, or the end.
    at: u64,
    /// Some entries of the table, from that index on.
    table: (u64, Vec<u64>),
    /// Set bits that the next ones may go on.
    open: Option<(u64, u64)>,
    /// Runs of set bits, as first bit and end.
    found: VecDeque<(u64, u64)>,
}

impl BitmapRanges {
    /// Opens the bitmap of that name in an image to which nobody writes.
    ///
    /// # Errors
    /// * `NotFound`: there is none, or a program that does not know bitmaps has written to the image since.
    /// * `Invalid`: it is marked as in use, so it was not saved correctly.
    /// * `Unsupported`: it has extra data without which it must not be used.
    /// * `Corrupt` with a [`Corruption`] as its source, and those of the storage.
    pub async fn open(storage: &StorageHandle, header: &Header, name: impl AsRef<[u8]>) -> Result<Self> {
        let name = name.as_ref();
        let refuse = |kind, why: &str| {
            let text = String::from_utf8_lossy(name);
            let error = DiskError::new(kind, Operation::Read).on(storage.name());
            Err(error.because(format!("bitmap {:?} {why}", text.escape_debug().to_string())))
        };
        if header.autoclear & AUTOCLEAR_BITMAPS == 0 {
            return refuse(ErrorKind::NotFound, "is not there: the image has no bitmaps that hold");
        }
        let mut directory = BitmapDirectory::read(storage, header).await?;
        let Some(at) = directory.bitmaps.iter().position(|bitmap| bitmap.name == name) else {
            return refuse(ErrorKind::NotFound, "is not there");
        };
        let bitmap = directory.bitmaps.swap_remove(at);
        if bitmap.in_use {
            return refuse(ErrorKind::Invalid, "was not saved correctly, and nobody knows what changed since");
        }
        if bitmap.extra_size > 0 && !bitmap.extra_compatible {
            return refuse(ErrorKind::Unsupported, "has extra data that is unknown here, and must not be used without");
        }
        let corrupt = |what: Corruption| Err(what.during(Operation::Read).on(storage.name()));
        let needed = table_entries(header.size, bitmap.granularity_bits, header.cluster_bits);
        if needed != u64::from(bitmap.table_entries) {
            let entries = bitmap.table_entries;
            return corrupt(Corruption::BitmapTableSize { table: bitmap.table_offset, entries, needed });
        }
        let (offset, size, end) = (bitmap.table_offset, 8 * needed, storage.size());
        if offset.checked_add(size).is_none_or(|table_end| table_end > end) {
            return corrupt(Corruption::TableBeyondEnd { table: Table::BitmapTable, offset, size, end });
        }
        Ok(Self {
            storage: storage.clone(),
            cluster_bits: header.cluster_bits,
            size: header.size,
            bits: header.size.div_ceil(1 << bitmap.granularity_bits),
            bitmap,
            at: 0,
            table: (0, Vec::new()),
            open: None,
            found: VecDeque::new(),
        })
    }

    /// Its entry in the directory.
    pub fn bitmap(&self) -> &Bitmap {
        &self.bitmap
    }

    /// The next range; `None` behind the last.
    ///
    /// # Errors
    /// `Corrupt` where a table entry contradicts the format, and those of the storage.
    pub async fn next(&mut self) -> Result<Option<ByteRange>> {
        while self.found.is_empty() && self.at < self.bits {
            self.step().await.map_err(|e| e.on(self.storage.name()))?;
        }
        let run = self.found.pop_front().or_else(|| self.open.take());
        Ok(run.map(|(first, end)| {
            let bytes = |bit: u64| (u128::from(bit) << self.bitmap.granularity_bits).min(u128::from(self.size)) as u64;
            ByteRange::between(bytes(first), bytes(end))
        }))
    }

    /// Looks at the next bits: a table entry's, or a piece of its cluster.
    async fn step(&mut self) -> Result<()> {
        let bits_per_cluster = 8u64 << self.cluster_bits;
        let index = self.at / bits_per_cluster;
        let end = ((index + 1) * bits_per_cluster).min(self.bits);
        match self.part(index).await? {
            BitmapPart::Clean => self.at = end,
            BitmapPart::Dirty => {
                self.add(self.at, end);
                self.at = end;
            }
            BitmapPart::At(offset) => {
                let end = end.min(self.at + 8 * PIECE);
                let within = self.at % bits_per_cluster / 8;
                let bytes = self.storage.read_new(offset + within, (end - self.at).div_ceil(8) as usize).await?;
                self.scan(&bytes, end);
                self.at = end;
            }
        }
        Ok(())
    }

    /// What the table says of one cluster of bits.
    async fn part(&mut self, index: u64) -> Result<BitmapPart> {
        let (first, entries) = &self.table;
        if index < *first || index >= first + entries.len() as u64 {
            let count = TABLE_PIECE.min(u64::from(self.bitmap.table_entries) - index);
            let bytes = self.storage.read_new(self.bitmap.table_offset + 8 * index, 8 * count as usize).await?;
            self.table = (index, bytes.chunks_exact(8).map(|entry| be64(entry, 0)).collect());
        }
        let entry = self.table.1[(index - self.table.0) as usize];
        let corrupt = |what: Corruption| what.during(Operation::Read);
        let part = BitmapPart::decode(entry, 1 << self.cluster_bits)
            .ok_or_else(|| corrupt(Corruption::BitmapTableEntry { table: self.bitmap.table_offset, index, entry }))?;
        if let BitmapPart::At(offset) = part
            && offset >= self.storage.size()
        {
            let (size, end) = (1 << self.cluster_bits, self.storage.size());
            return Err(corrupt(Corruption::TableBeyondEnd { table: Table::BitmapData, offset, size, end }));
        }
        Ok(part)
    }

    /// Adds the set bits of `bytes`, which stand for those from `self.at` to `end`.
    fn scan(&mut self, bytes: &[u8], end: u64) {
        let start = self.at;
        let mut run = None;
        for (n, byte) in bytes.iter().enumerate() {
            let first = start + 8 * n as u64;
            match byte {
                0 if run.is_none() => continue,
                0xff if run.is_some() => continue,
                _ => {}
            }
            for bit in 0..8 {
                match (byte & (1 << bit) != 0, run) {
                    (true, None) => run = Some(first + bit),
                    (false, Some(from)) => {
                        self.add(from, (first + bit).min(end));
                        run = None;
                    }
                    _ => {}
                }
            }
        }
        if let Some(from) = run {
            self.add(from, end);
        }
    }

    /// Adds a run of set bits behind all others. Bits behind the end mean nothing.
    fn add(&mut self, first: u64, end: u64) {
        if first >= end {
            return;
        }
        match &mut self.open {
            Some((_, open_end)) if *open_end == first => *open_end = end,
            open => {
                if let Some(done) = open.replace((first, end)) {
                    self.found.push_back(done);
                }
            }
        }
    }
}

/// All dirty ranges of the bitmap of that name: ascending, neighbours merged, within the disk.
///
/// Memory: 64 MiB at most; [`BitmapRanges`] needs next to none.
///
/// # Errors
/// Those of [`BitmapRanges`], and `NoMemory` when there are more than 4,194,304.
pub async fn read_bitmap(storage: &StorageHandle, header: &Header, name: impl AsRef<[u8]>) -> Result<Vec<ByteRange>> {
    let mut ranges = BitmapRanges::open(storage, header, name).await?;
    let mut all = Vec::new();
    while let Some(range) = ranges.next().await? {
        if all.len() == MAX_RANGES {
            return Err(DiskError::new(ErrorKind::NoMemory, Operation::Read)
                .on(storage.name())
                .because(format!("the bitmap has more than {MAX_RANGES} dirty ranges")));
        }
        all.push(range);
    }
    Ok(all)
}
