//! Counting the references to every cluster by walking everything that refers to clusters.
//!
//! An L2 table to which several L1 entries refer (snapshots share most) is read once, and what it refers to
//! is counted as often. So the work is bounded by the file's size, whatever its tables say: loops and
//! self-references are references like others.

use super::counts::{Bytes, Counts};
use super::report::{CheckReport, Progress};
use crate::qcow2::bitmap_directory::{BitmapDirectory, BitmapPart, Invalidate, invalidate_bitmaps};
use crate::qcow2::corruption::L2Rule;
use crate::qcow2::entry::{COPIED, CompressedAt, L2Entry, OFFSET_MASK, ZERO};
use crate::qcow2::extensions::be64;
use crate::qcow2::{AUTOCLEAR_BITMAPS, Corruption, Header, MAX_L1_BYTES, SnapshotTable, Table};
use disk::{Buf, ByteRange, DiskError, ErrorKind, Result, StorageHandle};
use futures_util::{StreamExt, stream};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::rc::Rc;

/// Reserved bits of L1 entries: 0–8 and 56–62.
const L1_RESERVED: u64 = 0x7f00_0000_0000_01ff;
/// Reserved bits of standard L2 entries: 1–8 and 56–61.
const L2_RESERVED: u64 = 0x3f00_0000_0000_01fe;
/// Most bytes of all tables of snapshots and bitmaps together.
const MAX_TABLE_BYTES: u64 = 4 << 30;
/// Most L2 tables: as many as 32 TiB have with default geometry, times 32.
const MAX_L2_TABLES: usize = 2 << 20;
/// Most L2 tables in places that are not aligned which are read all the same.
const MAX_UNALIGNED_TABLES: u64 = 64;
/// L2 tables of at least this many bytes are looked for holes before they are read.
const LARGE_TABLE: u64 = 256 << 10;
/// Most overlaps that are remembered.
const MAX_OVERLAPS: usize = 65536;
/// L2 tables read ahead.
const READ_AHEAD: usize = 4;

/// How often an L2 table is referred to.
#[derive(Clone, Copy, Default)]
struct L2Use {
    /// By the active L1 table.
    active: u64,
    /// By all.
    all: u64,
    /// The first entry of the active L1 table that does.
    first_index: u64,
}

/// What a walk does beside counting.
#[derive(Clone)]
pub(super) enum WalkMode {
    /// Nothing.
    Look,
    /// Mends entries that contradict the format by themselves, but for tables in clusters that are also used for something
    /// else: what is mended as one thing may be ruined as the other, the header itself for example.
    Mend(Rc<Shared>),
}

/// Clusters that are used for a table and for something else.
#[derive(Debug, Default)]
pub(super) struct Shared {
    clusters: HashSet<u64>,
    /// There are more than are kept, so that nobody knows which.
    too_many: bool,
}

impl Shared {
    fn insert(&mut self, cluster: u64) {
        if self.clusters.len() < MAX_OVERLAPS {
            self.clusters.insert(cluster);
        } else {
            self.too_many = true;
        }
    }

    /// Whether one of these clusters lies in the range.
    pub(super) fn touches(&self, range: ByteRange, cluster_bits: u32) -> bool {
        let mut clusters = (range.offset() >> cluster_bits)..range.end().div_ceil(1 << cluster_bits);
        self.too_many || clusters.any(|cluster| self.clusters.contains(&cluster))
    }
}

/// The state of a walk, and its result.
pub(super) struct Walk<'a> {
    pub(super) storage: &'a StorageHandle,
    pub(super) data_file: Option<&'a StorageHandle>,
    pub(super) header: &'a Header,
    pub(super) report: CheckReport,
    /// References to each cluster.
    pub(super) counts: Counts,
    /// Which table a cluster belongs to: [`Table`] plus 1.
    kinds: Bytes,
    /// Clusters that belong to a table and to something else.
    pub(super) overlaps: HashMap<u64, (Table, Table)>,
    /// As far as is known by now.
    pub(super) shared: Shared,
    /// The active L1 table as stored.
    pub(super) l1: Vec<u64>,
    /// The L2 tables that it leads to, and how often.
    pub(super) active_l2: Vec<(u64, u64)>,
    /// Snapshots and bitmaps could be read: nothing that is in use is missing from the counts.
    pub(super) complete: bool,
    /// Mending changes entries that lead to the guest's bytes, so what the guest reads may be other than before.
    pub(super) mends_mapping: bool,
    mode: WalkMode,
    file_size: u64,
    table_bytes: u64,
    unaligned_tables: u64,
    l2: BTreeMap<u64, L2Use>,
}

/// All tables in the order of their numbers in `kinds`.
const TABLES: [Table; 11] = [
    Table::Header,
    Table::L1,
    Table::SnapshotL1,
    Table::L2,
    Table::RefcountTable,
    Table::RefcountBlock,
    Table::Snapshots,
    Table::BitmapDirectory,
    Table::BitmapTable,
    Table::BitmapData,
    Table::Data,
];

impl<'a> Walk<'a> {
    /// Counts everything but the refcount table and blocks, whose clusters are only noted.
    pub(super) async fn run(
        storage: &'a StorageHandle,
        data_file: Option<&'a StorageHandle>,
        header: &'a Header,
        refcount_table: &[u64],
        mode: WalkMode,
        progress: Progress<'_>,
    ) -> Result<Self> {
        let file_size = storage.size();
        // One more, as a reference may reach into the cluster in which the file ends.
        let clusters = file_size.div_ceil(header.cluster_size()) + 1;
        let mut walk = Self {
            storage,
            data_file,
            header,
            report: CheckReport {
                total_clusters: header.size.div_ceil(header.cluster_size()),
                dirty: header.is_dirty(),
                marked_corrupt: header.is_corrupt(),
                ..CheckReport::default()
            },
            counts: Counts::new(clusters, header.refcount_max())?,
            kinds: Bytes::new(clusters)?,
            overlaps: HashMap::new(),
            shared: Shared::default(),
            l1: Vec::new(),
            active_l2: Vec::new(),
            complete: true,
            mends_mapping: false,
            mode,
            file_size,
            table_bytes: 0,
            unaligned_tables: 0,
            l2: BTreeMap::new(),
        };
        walk.note_refcount_structures(refcount_table)?;
        walk.refer(Table::Header, 0, header.cluster_size(), 1)?;
        walk.l1 = walk.walk_l1(Table::L1, header.l1_offset, header.l1_entries, 1).await?;
        walk.walk_snapshots().await?;
        walk.walk_bitmaps().await?;
        walk.walk_l2_tables(progress).await?;
        Ok(walk)
    }

    fn mends(&self) -> bool {
        matches!(self.mode, WalkMode::Mend(_))
    }

    /// Whether a table may be mended in place.
    fn may_write(&self, offset: u64, len: usize) -> bool {
        match &self.mode {
            WalkMode::Look => false,
            WalkMode::Mend(shared) => !shared.touches(ByteRange::new(offset, len as u64), self.header.cluster_bits),
        }
    }

    /// Clusters of the file, the one in which it ends included.
    pub(super) fn file_clusters(&self) -> u64 {
        self.file_size.div_ceil(self.header.cluster_size())
    }

    /// Counts `times` references to the clusters of a range; `false` when it lies beyond the file's end.
    pub(super) fn refer(&mut self, table: Table, offset: u64, size: u64, times: u64) -> Result<bool> {
        if size == 0 || times == 0 {
            return Ok(true);
        }
        let cluster_size = self.header.cluster_size();
        let end = offset.saturating_add(size);
        if end > self.file_size && end - self.file_size >= cluster_size {
            let what = Corruption::TableBeyondEnd { table, offset, size, end: self.file_size };
            self.report.corruption(times, what);
            return Ok(false);
        }
        for cluster in offset / cluster_size..=(end - 1) / cluster_size {
            // Tables of the refcounts were noted before; their own references are no overlap.
            if !matches!(table, Table::RefcountTable | Table::RefcountBlock) {
                self.note(table, cluster)?;
            }
            let excess = self.counts.add(cluster, times)?;
            if excess > 0 {
                self.overlaps.remove(&cluster);
                self.report.corruption(excess, Corruption::RefcountOverflow { offset: cluster * cluster_size });
            }
        }
        Ok(true)
    }

    /// Notes what a cluster is used for, and whether it is used for something else.
    fn note(&mut self, table: Table, cluster: u64) -> Result<()> {
        let number = TABLES.iter().position(|t| *t == table).expect("all are listed") as u8 + 1;
        let present = self.kinds.get(cluster);
        // Data clusters are shared by right. L2 tables come here once each.
        if present != 0 {
            self.shared.insert(cluster);
        }
        if present != 0 && self.overlaps.len() < MAX_OVERLAPS {
            self.overlaps.entry(cluster).or_insert((TABLES[usize::from(present) - 1], table));
        }
        if present == 0 && table != Table::Data {
            self.kinds.set(cluster, number)?;
        }
        Ok(())
    }

    fn note_refcount_structures(&mut self, refcount_table: &[u64]) -> Result<()> {
        let header = self.header;
        let bits = header.cluster_bits;
        let first = header.refcount_table_offset >> bits;
        let limit = self.file_clusters();
        for cluster in (first..first + u64::from(header.refcount_table_clusters)).filter(|c| *c < limit) {
            self.note(Table::RefcountTable, cluster)?;
        }
        for offset in refcount_table.iter().filter(|o| **o != 0) {
            if offset >> bits < limit {
                self.note(Table::RefcountBlock, offset >> bits)?;
            }
        }
        Ok(())
    }

    /// Counts an L1 table and notes its L2 tables.
    async fn walk_l1(&mut self, table: Table, offset: u64, entries: u32, times: u64) -> Result<Vec<u64>> {
        if !self.refer(table, offset, 8 * u64::from(entries), times)? {
            return Ok(Vec::new());
        }
        let mut bytes = self.storage.read_new(offset, 8 * entries as usize).await?;
        let mut mended = false;
        let mut l1 = Vec::with_capacity(entries as usize);
        for index in 0..u64::from(entries) {
            let at = 8 * index as usize;
            let mut entry = be64(&bytes, at);
            if entry != 0 {
                let kept = self.note_l1_entry(offset, index, entry, times, table == Table::L1)?;
                self.mends_mapping |= kept != entry;
                if self.mends() && kept != entry {
                    entry = kept;
                    bytes[at..at + 8].copy_from_slice(&entry.to_be_bytes());
                    mended = true;
                }
            }
            l1.push(entry);
        }
        if mended && self.may_write(offset, bytes.len()) {
            self.storage.write(offset, bytes).await?;
        }
        Ok(l1)
    }

    /// Judges one L1 entry and notes its L2 table; returns what the entry should be.
    fn note_l1_entry(&mut self, table: u64, index: u64, entry: u64, times: u64, active: bool) -> Result<u64> {
        let offset = entry & OFFSET_MASK;
        if entry & L1_RESERVED != 0 || offset == 0 {
            self.report.corruption(times, Corruption::L1Reserved { table, index, entry });
        }
        if offset == 0 {
            return Ok(0);
        }
        if offset & (self.header.cluster_size() - 1) != 0 {
            self.report.corruption(times, Corruption::L2TableUnaligned { table, index, entry });
            // Aligned tables are bounded by the file's size; these overlap.
            self.unaligned_tables += 1;
            if self.unaligned_tables > MAX_UNALIGNED_TABLES {
                self.complete = false;
                return Ok(entry);
            }
        }
        // An L2 table's clusters are noted once, with its first reference.
        let known = self.l2.contains_key(&offset);
        if known {
            self.count_only(offset, times)?;
        } else if !self.refer(Table::L2, offset, self.header.cluster_size(), times)? {
            return Ok(0);
        }
        if self.l2.len() >= MAX_L2_TABLES {
            return Err(DiskError::new(ErrorKind::NoMemory, disk::Operation::Check)
                .because("the image has more L2 tables than can be checked"));
        }
        let found = self.l2.entry(offset).or_default();
        if active {
            if found.active == 0 {
                found.first_index = index;
            }
            found.active += times;
        }
        found.all += times;
        Ok(entry & !L1_RESERVED)
    }

    /// Counts further references to an L2 table.
    fn count_only(&mut self, offset: u64, times: u64) -> Result<()> {
        let cluster_size = self.header.cluster_size();
        for cluster in offset / cluster_size..=offset.div_ceil(cluster_size) {
            let excess = self.counts.add(cluster, times)?;
            if excess > 0 {
                self.report.corruption(excess, Corruption::RefcountOverflow { offset: cluster * cluster_size });
            }
        }
        Ok(())
    }

    /// Takes from the budget for tables of snapshots and bitmaps; tables that do not overlap never exceed it.
    fn take_table_bytes(&mut self, size: u64) -> bool {
        self.table_bytes = self.table_bytes.saturating_add(size);
        let allowed = self.table_bytes <= MAX_TABLE_BYTES.min(self.file_size.saturating_add(1 << 20));
        if !allowed && self.complete {
            self.complete = false;
            self.report.error(1, Corruption::TablesTooLarge { size: self.table_bytes });
        }
        allowed
    }

    async fn walk_snapshots(&mut self) -> Result<()> {
        let header = self.header;
        if header.snapshot_count == 0 {
            return Ok(());
        }
        let table = match SnapshotTable::read(self.storage, header).await {
            Ok(table) => table,
            Err(error) => return self.cannot_read(error),
        };
        if header.version >= 3 {
            for what in table.incomplete_entries() {
                self.report.corruption(1, what);
            }
        }
        // Snapshots with one L1 table between them are walked once.
        let mut tables: BTreeMap<(u64, u32), u64> = BTreeMap::new();
        for snapshot in &table.snapshots {
            let (offset, size) = (snapshot.l1_offset, 8 * u64::from(snapshot.l1_entries));
            let wrong = if offset & (header.cluster_size() - 1) != 0 {
                Some(Corruption::TableUnaligned { table: Table::SnapshotL1, offset })
            } else if size > MAX_L1_BYTES {
                Some(Corruption::TableTooLarge { table: Table::SnapshotL1, size, max: MAX_L1_BYTES })
            } else {
                None
            };
            match wrong {
                Some(what) => self.report.corruption(1, what),
                None => *tables.entry((offset, snapshot.l1_entries)).or_default() += 1,
            }
        }
        for ((offset, entries), times) in tables {
            if !self.take_table_bytes(8 * u64::from(entries)) {
                return Ok(());
            }
            self.walk_l1(Table::SnapshotL1, offset, entries, times).await?;
        }
        self.refer(Table::Snapshots, header.snapshots_offset, table.size, 1)?;
        Ok(())
    }

    /// A table that contradicts the format: what it refers to stays unknown.
    fn cannot_read(&mut self, error: DiskError) -> Result<()> {
        use std::error::Error;
        let Some(what) = error.source().and_then(|s| s.downcast_ref::<Corruption>()) else { return Err(error) };
        self.complete = false;
        self.report.error(1, what.clone());
        Ok(())
    }

    async fn walk_bitmaps(&mut self) -> Result<()> {
        let header = self.header;
        let Some(extension) = header.bitmaps.filter(|_| header.autoclear & AUTOCLEAR_BITMAPS != 0) else {
            return Ok(());
        };
        let directory = match BitmapDirectory::read(self.storage, header).await {
            Ok(directory) => directory,
            Err(error) => return self.cannot_read(error),
        };
        self.refer(Table::BitmapDirectory, extension.directory_offset, extension.directory_size, 1)?;
        for bitmap in &directory.bitmaps {
            let size = 8 * u64::from(bitmap.table_entries);
            if !self.take_table_bytes(size) {
                return Ok(());
            }
            if !self.refer(Table::BitmapTable, bitmap.table_offset, size, 1)? {
                continue;
            }
            let mut index = 0;
            while index < u64::from(bitmap.table_entries) {
                let at = bitmap.table_offset + 8 * index;
                let entries = (u64::from(bitmap.table_entries) - index).min(32768);
                let mut bytes = self.storage.read_new(at, 8 * entries as usize).await?;
                let mut mended = false;
                for piece in 0..entries {
                    let entry = be64(&bytes, 8 * piece as usize);
                    if !self.walk_bitmap_entry(bitmap.table_offset, index + piece, entry)? {
                        bytes[8 * piece as usize..8 * piece as usize + 8].fill(0);
                        mended = self.mends();
                    }
                }
                let directory = self.may_write(extension.directory_offset, extension.directory_size as usize);
                if mended && directory && self.may_write(at, bytes.len()) {
                    // Its contents are lost: first nobody may trust it, then it loses the entry.
                    invalidate_bitmaps(self.storage, &mut header.clone(), Invalidate::All).await?;
                    self.storage.write(at, bytes).await?;
                }
                index += entries;
            }
        }
        Ok(())
    }

    /// Counts a bitmap table's entry; `false` when it contradicts the format.
    fn walk_bitmap_entry(&mut self, table: u64, index: u64, entry: u64) -> Result<bool> {
        match BitmapPart::decode(entry, self.header.cluster_size()) {
            None => {
                self.report.corruption(1, Corruption::BitmapTableEntry { table, index, entry });
                Ok(false)
            }
            Some(BitmapPart::Clean | BitmapPart::Dirty) => Ok(true),
            Some(BitmapPart::At(offset)) => self.refer(Table::BitmapData, offset, self.header.cluster_size(), 1),
        }
    }

    async fn walk_l2_tables(&mut self, progress: Progress<'_>) -> Result<()> {
        let tables: Vec<(u64, L2Use)> = std::mem::take(&mut self.l2).into_iter().collect();
        let total = tables.len() as u64;
        self.active_l2 = tables.iter().filter(|(_, u)| u.active > 0).map(|(at, u)| (*at, u.active)).collect();
        let storage = self.storage;
        let size = self.header.cluster_size();
        let mut reads = stream::iter(tables)
            .map(|(offset, uses)| async move { (offset, uses, read_l2(storage, offset, size).await) })
            .buffered(READ_AHEAD);
        let mut done = 0;
        while let Some((offset, uses, bytes)) = reads.next().await {
            if let Some(mut bytes) = bytes?
                && self.walk_l2(offset, uses, &mut bytes)?
                && self.may_write(offset, bytes.len())
            {
                self.storage.write(offset, bytes).await?;
            }
            done += 1;
            progress(done, total);
        }
        Ok(())
    }

    /// Counts what one L2 table refers to; returns whether it was mended.
    fn walk_l2(&mut self, table: u64, uses: L2Use, bytes: &mut Buf) -> Result<bool> {
        let extended = self.header.extended_l2();
        let width = self.header.l2_entry_size() as usize;
        let mut expected = 0;
        let mut mended = false;
        for index in 0..self.header.l2_entries() {
            let at = index as usize * width;
            let entry = L2Entry { descriptor: be64(bytes, at), bitmap: if extended { be64(bytes, at + 8) } else { 0 } };
            if entry == L2Entry::ABSENT {
                continue;
            }
            let better = self.walk_l2_entry(table, index, entry, uses, &mut expected)?;
            self.mends_mapping |= better != entry;
            if self.mends() && better != entry {
                bytes[at..at + 8].copy_from_slice(&better.descriptor.to_be_bytes());
                if extended {
                    bytes[at + 8..at + 16].copy_from_slice(&better.bitmap.to_be_bytes());
                }
                mended = true;
            }
        }
        Ok(mended)
    }

    /// Counts what one L2 entry refers to; returns what the entry should be, as far as that is known.
    /// `expected` is where the next cluster stands when the table is not fragmented.
    fn walk_l2_entry(
        &mut self,
        table: u64,
        index: u64,
        entry: L2Entry,
        uses: L2Use,
        expected: &mut u64,
    ) -> Result<L2Entry> {
        let header = self.header;
        let cluster_size = header.cluster_size();
        let mut better = entry;
        let wrong = |report: &mut CheckReport, rule| {
            report.corruption(uses.all, Corruption::L2Entry { table, index, entry: entry.descriptor, rule });
        };
        if entry.is_compressed() {
            if entry.is_copied() {
                wrong(&mut self.report, L2Rule::CompressedCopied);
                better.descriptor &= !COPIED;
            }
            if header.has_data_file() {
                wrong(&mut self.report, L2Rule::CompressedDataFile);
                return Ok(better);
            }
            if entry.bitmap != 0 {
                wrong(&mut self.report, L2Rule::CompressedBitmap);
                better.bitmap = 0;
                if !self.mends() {
                    return Ok(better);
                }
            }
            self.report.allocated_clusters += uses.active;
            self.report.compressed_clusters += uses.active;
            self.report.fragmented_clusters += uses.active;
            let at = CompressedAt::decode(better.descriptor, header.cluster_bits);
            let exists = self.refer(Table::Data, at.offset, at.len, uses.all)?;
            return Ok(if exists { better } else { self.lost(better) });
        }
        if entry.descriptor & L2_RESERVED != 0 {
            wrong(&mut self.report, L2Rule::Reserved);
            better.descriptor &= !L2_RESERVED;
        }
        if entry.descriptor & ZERO != 0 && (header.version < 3 || header.extended_l2()) {
            wrong(&mut self.report, L2Rule::ZeroFlag);
            if header.extended_l2() {
                better.descriptor &= !ZERO;
            }
        }
        let zero = entry.descriptor & ZERO != 0 && !header.extended_l2();
        let host = entry.host();
        let allocated_bits = entry.bitmap & u64::from(u32::MAX);
        if host == 0 && (zero || !header.has_data_file() || !entry.is_copied()) {
            if allocated_bits != 0 {
                wrong(&mut self.report, L2Rule::SubclusterUnallocated);
                better.bitmap = zeroed_subclusters(entry.bitmap);
            }
            return Ok(better);
        }
        if entry.bitmap >> 32 & allocated_bits != 0 {
            wrong(&mut self.report, L2Rule::SubclusterBoth);
            better.bitmap &= !(entry.bitmap >> 32);
        }
        if host & (cluster_size - 1) != 0 {
            let holds_data = if header.extended_l2() { allocated_bits != 0 } else { !zero };
            if holds_data {
                wrong(&mut self.report, L2Rule::DataUnaligned);
            } else {
                wrong(&mut self.report, L2Rule::PreallocatedUnaligned);
                better = self.lost(better);
                if self.mends() {
                    return Ok(better);
                }
            }
        }
        if uses.active > 0 {
            self.report.allocated_clusters += uses.active;
            if *expected != 0 && host != *expected {
                self.report.fragmented_clusters += uses.active;
            }
            *expected = host.saturating_add(cluster_size);
        }
        if header.has_data_file() {
            self.judge_data_file_entry(table, index, entry, uses);
        } else if !self.refer(Table::Data, host, cluster_size, uses.all)? {
            better = self.lost(better);
        }
        Ok(better)
    }

    /// What an entry becomes whose cluster does not exist: zeroes where the format can say so.
    fn lost(&self, entry: L2Entry) -> L2Entry {
        if self.header.extended_l2() {
            let bitmap =
                if entry.is_compressed() { u64::from(u32::MAX) << 32 } else { zeroed_subclusters(entry.bitmap) };
            L2Entry { descriptor: 0, bitmap }
        } else {
            L2Entry { descriptor: if self.header.version >= 3 { ZERO } else { 0 }, bitmap: 0 }
        }
    }

    /// In the external data file, every cluster has the guest's offset.
    fn judge_data_file_entry(&mut self, table: u64, index: u64, entry: L2Entry, uses: L2Use) {
        if uses.active != 1 {
            return;
        }
        let guest = (uses.first_index << self.header.l2_bits() | index) << self.header.cluster_bits;
        // A data file that is shorter reads as zero there, as QEMU has it, too.
        if entry.host() != guest {
            let rule = L2Rule::DataFileOffset;
            self.report.corruption(1, Corruption::L2Entry { table, index, entry: entry.descriptor, rule });
        }
    }
}

/// Reads an L2 table; `None` when it is a hole, and so empty.
pub(super) async fn read_l2(storage: &StorageHandle, offset: u64, size: u64) -> Result<Option<Buf>> {
    if size >= LARGE_TABLE {
        let range = ByteRange::new(offset, size);
        let extent = storage.extent(range).await?;
        if extent.hole && extent.range == range {
            return Ok(None);
        }
    }
    storage.read_new(offset, size as usize).await.map(Some)
}

/// A subcluster bitmap in which every allocated subcluster reads as zero instead.
fn zeroed_subclusters(bitmap: u64) -> u64 {
    (bitmap | bitmap << 32) & !u64::from(u32::MAX)
}
