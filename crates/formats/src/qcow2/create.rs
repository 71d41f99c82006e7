//! Making new images.
//!
//! Layout: header, refcount table, refcount blocks, L1 table, and with preallocation all L2 tables and then the
//! guest's clusters in their order. Every cluster in front of the end has the reference count 1, so all tables
//! follow from the numbers of clusters and are written in pieces of bounded size.
//!
//! Crash: the header is written last, after everything else is durable, and what stood in its place is
//! removed first. So the file is no qcow2 image, or a good one.

use super::create_options::{CreateOptions, invalid};
use super::entry::{COPIED, L2Entry, ZERO};
use super::header::{Header, MAX_REFCOUNT_TABLE_BYTES};
use super::refcount_bits;
use disk::{Buf, ByteRange, DiskError, ErrorKind, Operation, Preallocation, Result, StorageHandle, ZeroMode};

/// Bytes written at a time.
const PIECE: u64 = 1 << 20;
/// Host offsets in L2 entries end here.
const MAX_HOST_END: u64 = 1 << 56;

/// Where everything stands in a new image, in clusters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Layout {
    pub(super) table_clusters: u64,
    pub(super) blocks: u64,
    pub(super) l1_clusters: u64,
    pub(super) l2_tables: u64,
    pub(super) data_clusters: u64,
}

impl Layout {
    /// The layout for a header whose size is set.
    pub(super) fn of(header: &Header, preallocated: bool) -> Self {
        let cluster_size = header.cluster_size();
        let l1_clusters = (8 * header.l1_entries_for(header.size).max(1)).div_ceil(cluster_size);
        let l2_tables = if preallocated { header.l1_entries_for(header.size) } else { 0 };
        let in_image = preallocated && !header.has_data_file();
        let data_clusters = if in_image { header.size.div_ceil(cluster_size) } else { 0 };
        let counted = 1 + l1_clusters + l2_tables + data_clusters;
        // Blocks count themselves and the table: grow both until they hold everything.
        let (mut blocks, mut table_clusters) = (1, 1);
        loop {
            let needed = (counted + blocks + table_clusters).div_ceil(header.refcounts_per_block());
            let table_needed = needed.div_ceil(cluster_size / 8);
            if (needed, table_needed) == (blocks, table_clusters) {
                return Self { table_clusters, blocks, l1_clusters, l2_tables, data_clusters };
            }
            (blocks, table_clusters) = (needed.max(blocks), table_needed.max(table_clusters));
        }
    }

    fn table(&self) -> u64 {
        1
    }
    fn first_block(&self) -> u64 {
        self.table() + self.table_clusters
    }
    fn l1(&self) -> u64 {
        self.first_block() + self.blocks
    }
    fn first_l2(&self) -> u64 {
        self.l1() + self.l1_clusters
    }
    fn first_data(&self) -> u64 {
        self.first_l2() + self.l2_tables
    }
    fn end(&self) -> u64 {
        self.first_data() + self.data_clusters
    }
}

/// Makes a new image in `storage`, over whatever is there, and returns its header. `data_file` is the
/// external data file, which gets the guest's size; given if and only if the options name one.
///
/// Memory: a few MiB, whatever the size.
///
/// # Errors
/// `Invalid` when the options contradict each other or the format; `NoSpace` when a storage that cannot grow
/// is too small; those of the storages.
pub async fn create(
    storage: &StorageHandle,
    data_file: Option<&StorageHandle>,
    options: &CreateOptions,
) -> Result<Header> {
    options.validate()?;
    if data_file.is_some() != options.data_file.is_some() {
        return Err(invalid("an image with an external data file needs that file's storage, another must have none"));
    }
    let preallocation = options.effective_preallocation();
    let preallocated = preallocation != Preallocation::Off;
    let mut header = options.header();
    let layout = Layout::of(&header, preallocated);
    let cluster_size = header.cluster_size();
    if layout.table_clusters * cluster_size > MAX_REFCOUNT_TABLE_BYTES || layout.end() > MAX_HOST_END / cluster_size {
        return Err(invalid(format!(
            "preallocating {} bytes with clusters of {cluster_size} bytes needs a refcount table of more than 8 MiB; \
             use larger clusters",
            header.size
        )));
    }
    header.l1_entries = header.l1_entries_for(header.size).max(1) as u32;
    header.l1_offset = layout.l1() * cluster_size;
    header.refcount_table_offset = layout.table() * cluster_size;
    header.refcount_table_clusters = layout.table_clusters as u32;
    let first_cluster = header.encode()?;

    clear(storage, layout.first_data() * cluster_size, layout.end() * cluster_size).await?;
    write_refcounts(storage, &header, layout).await?;
    write_mapping(storage, &header, layout).await?;
    let data = ByteRange::new(layout.first_data() * cluster_size, layout.data_clusters * cluster_size);
    // In version 2 and without zero flags, only the clusters themselves can say that they are zero.
    let zeroed = storage.limits().grows_zeroed || (header.version >= 3);
    set_aside(storage, data, preallocation, zeroed).await?;
    if let Some(data_file) = data_file {
        if data_file.limits().grows_zeroed {
            data_file.set_size(0).await?;
            data_file.set_size(header.size).await?;
        }
        let zeroed = data_file.limits().grows_zeroed || !preallocated;
        set_aside(data_file, ByteRange::new(0, header.size), preallocation, zeroed).await?;
        data_file.sync().await?;
    }
    storage.sync().await?;
    storage.write(0, Buf::copy_of(&first_cluster)).await?;
    storage.sync().await?;
    Ok(header)
}

/// Removes an old header, durably, and makes everything up to `tables_end` zero; the storage then reaches to
/// `end` at least.
async fn clear(storage: &StorageHandle, tables_end: u64, end: u64) -> Result<()> {
    if storage.limits().grows_zeroed {
        if storage.size() > 0 {
            storage.set_size(0).await?;
            storage.sync().await?;
        }
        return storage.set_size(end).await;
    }
    if storage.size() < end {
        return Err(DiskError::new(ErrorKind::NoSpace, Operation::Create).on(storage.name()).because(format!(
            "the image needs {end} bytes, but the device has {}; use a larger one or less preallocation",
            storage.size()
        )));
    }
    storage.write(0, Buf::zeroed(512)).await?;
    storage.sync().await?;
    storage.write_zeroes(ByteRange::new(0, tables_end), ZeroMode { unmap: true, fast_only: false }).await
}

/// Writes the refcount table and blocks.
async fn write_refcounts(storage: &StorageHandle, header: &Header, layout: Layout) -> Result<()> {
    let cluster_size = header.cluster_size();
    let first_block = layout.first_block() * cluster_size;
    write_entries(storage, layout.table() * cluster_size, layout.blocks, |block, out| {
        out.copy_from_slice(&(first_block + block * cluster_size).to_be_bytes());
    })
    .await?;
    // All blocks but the last are full of ones.
    let order = header.refcount_order;
    let full = layout.blocks - 1;
    let last = layout.end() - full * header.refcounts_per_block();
    let per_piece = (PIECE / cluster_size).max(1).min(full);
    let mut piece = Buf::zeroed((per_piece * cluster_size) as usize);
    refcount_bits::fill_with_ones(&mut piece, order, per_piece * header.refcounts_per_block());
    let mut block = 0;
    while block < full {
        let count = per_piece.min(full - block);
        piece.truncate((count * cluster_size) as usize);
        piece = storage.write(first_block + block * cluster_size, piece).await?;
        block += count;
    }
    let mut piece = Buf::zeroed(cluster_size as usize);
    refcount_bits::fill_with_ones(&mut piece, order, last);
    storage.write(first_block + full * cluster_size, piece).await.map(drop)
}

/// Writes the L1 table and, with preallocation, the L2 tables.
async fn write_mapping(storage: &StorageHandle, header: &Header, layout: Layout) -> Result<()> {
    let cluster_size = header.cluster_size();
    let first_l2 = layout.first_l2() * cluster_size;
    write_entries(storage, header.l1_offset, layout.l2_tables, |table, out| {
        out.copy_from_slice(&((first_l2 + table * cluster_size) | COPIED).to_be_bytes());
    })
    .await?;
    if layout.l2_tables == 0 {
        return Ok(());
    }
    let first_data = if header.has_data_file() { 0 } else { layout.first_data() * cluster_size };
    // Where the new clusters may hold old bytes, the entries say that they read as zero. With subclusters
    // an empty bitmap says that the parent shows.
    let zero = !header.has_data_file() && !storage.limits().grows_zeroed && header.version >= 3;
    let flag = if zero && !header.extended_l2() { ZERO } else { 0 };
    let guest_clusters = header.size.div_ceil(cluster_size);
    if header.extended_l2() {
        // A raw data file is all there is: its subclusters are all allocated.
        let bitmap = if header.raw_data_file() { L2Entry::data(0, u64::from(u32::MAX)).bitmap } else { 0 };
        write_entries(storage, first_l2, 2 * guest_clusters, |index, out| {
            let host = first_data + index / 2 * cluster_size;
            let value = if index % 2 == 0 { host | COPIED } else { bitmap };
            out.copy_from_slice(&value.to_be_bytes());
        })
        .await
    } else {
        write_entries(storage, first_l2, guest_clusters, |index, out| {
            out.copy_from_slice(&((first_data + index * cluster_size) | COPIED | flag).to_be_bytes());
        })
        .await
    }
}

/// Writes `count` entries of 8 bytes from `offset` on, in pieces.
async fn write_entries(storage: &StorageHandle, offset: u64, count: u64, entry: impl Fn(u64, &mut [u8])) -> Result<()> {
    let per_piece = PIECE / 8;
    let mut first = 0;
    while first < count {
        let n = per_piece.min(count - first);
        let mut piece = Buf::new((8 * n) as usize);
        for (index, out) in piece.chunks_exact_mut(8).enumerate() {
            entry(first + index as u64, out);
        }
        storage.write(offset + 8 * first, piece).await?;
        first += n;
    }
    Ok(())
}

/// Sets space aside for the guest's bytes. `zeroed`: whatever is there need not be made zero.
async fn set_aside(storage: &StorageHandle, range: ByteRange, how: Preallocation, zeroed: bool) -> Result<()> {
    match how {
        _ if range.is_empty() => {}
        Preallocation::Full => {
            let mut at = range;
            while !at.is_empty() {
                let piece = at.prefix(PIECE);
                storage.write(piece.offset(), Buf::zeroed(piece.len() as usize)).await?;
                at = at.skip(PIECE);
            }
        }
        Preallocation::Off | Preallocation::Metadata | Preallocation::Falloc => {
            if !zeroed {
                storage.write_zeroes(range, ZeroMode::default()).await?;
            }
            if how == Preallocation::Falloc {
                storage.allocate(range).await?;
            }
        }
    }
    Ok(())
}
