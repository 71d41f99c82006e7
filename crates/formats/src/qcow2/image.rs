//! An open image, and its face as a [`Layer`].

use super::allocator::Allocator;
use super::check::{self, RepairMode};
use super::entry::{COPIED, CompressedAt, L2Entry, OFFSET_MASK, ZERO};
use super::epochs::Epochs;
use super::fault::Fault;
use super::refcounts::Refcounts;
use super::slices::{Slice, SliceGeometry, Slices};
use super::workers::Workers;
use super::write::PendingWrite;
use super::{BackingRef, Header, Invalidate, SnapshotTable, encoded, flush, header};
use disk::{
    Below, Buf, ByteRange, ContentId, DiskError, ErrorKind, HistoryMark, Layer, LayerExtent, LayerGeometry,
    LayerIdentity, Operation, ParentLink, Preallocation, Result, StorageHandle, StorageId, TicketId, WritePlan,
    ZeroMode,
};
use event_listener::Event;
use std::cell::{Cell, RefCell};
use std::collections::{BTreeSet, HashMap, HashSet};
use std::rc::Rc;

/// How to open an image.
#[derive(Clone, Debug)]
pub struct OpenOptions {
    /// Refuse writes, and change nothing.
    pub read_only: bool,
    /// Show the disk as it was at this internal snapshot (by id or name); implies `read_only`.
    pub snapshot: Option<String>,
    /// Bytes of L2 tables kept in memory, about; at least 64 KiB. 32 MiB cover 256 GiB of default geometry.
    pub l2_cache_bytes: u64,
    /// Open for reading though the corrupt bit is set; writing is refused then in any case.
    pub allow_corrupt: bool,
    /// Who decompresses.
    pub workers: Workers,
}

impl Default for OpenOptions {
    fn default() -> Self {
        Self {
            read_only: false,
            snapshot: None,
            l2_cache_bytes: 32 << 20,
            allow_corrupt: true,
            workers: Workers::default(),
        }
    }
}

/// An open qcow2 image.
///
/// All state is on one thread; methods interleave at every `await`. The rules that keep it whole:
/// * An entry of an L2 table is changed only by whoever holds its cluster in `locked`, and without waiting
///   between the look and the change.
/// * What a flush writes it copies before its first wait, so that no table on the storage refers to a
///   cluster whose reference count is not there yet (`flush.rs`).
pub struct Image {
    pub(super) storage: StorageHandle,
    pub(super) data_file: Option<StorageHandle>,
    pub(super) header: RefCell<Header>,
    pub(super) geometry: Cell<LayerGeometry>,
    pub(super) cluster_bits: u32,
    pub(super) extended: bool,
    pub(super) l1: RefCell<Vec<u64>>,
    /// Sectors (64 entries) of the L1 table that wait to be written.
    pub(super) dirty_l1: RefCell<BTreeSet<usize>>,
    pub(super) slices: Slices,
    /// Slices being read; each is read once at a time.
    loading: RefCell<HashSet<u64>>,
    loaded: Event,
    /// Present unless the image is read-only.
    pub(super) allocator: Option<Allocator>,
    pub(super) epochs: Epochs,
    /// Guest clusters whose entry is about to change.
    pub(super) locked: RefCell<HashSet<u64>>,
    pub(super) unlocked: Event,
    pub(super) pending: RefCell<HashMap<TicketId, PendingWrite>>,
    pub(super) next_ticket: Cell<u64>,
    /// Clusters to which no table in memory refers any more, once for each reference.
    pub(super) unlinked: RefCell<Vec<u64>>,
    pub(super) flushes: flush::Flushes,
    /// Shared with the allocator.
    pub(super) poisoned: Rc<Cell<bool>>,
    /// The preparations that the first write owes have been made.
    pub(super) writing: Cell<bool>,
    pub(super) begin_writing: async_lock::Mutex<()>,
    /// Features in the header are changed by one at a time.
    pub(super) features: async_lock::Mutex<()>,
    /// Whoever opened the image keeps a history of it and knows of every write.
    pub(super) tracked: Cell<bool>,
    /// The content's id was given ahead of the first write.
    pub(super) renewed: Cell<bool>,
    /// Goes into the image with the first write.
    pub(super) link_to_set: Cell<Option<ParentLink>>,
    /// The disk shows an internal snapshot.
    is_snapshot: bool,
    pub(super) packing: Cell<encoded::Packing>,
    /// Space for compressed bytes is taken by one at a time.
    pub(super) packing_one: async_lock::Mutex<()>,
    pub(super) decoded: RefCell<encoded::Decoded>,
    pub(super) workers: Workers,
    /// Copying an L2 table that snapshots share, or making a new one.
    pub(super) making_table: async_lock::Mutex<()>,
    /// Some entry in memory failed its check, so all are checked at use.
    pub(super) suspicious: Cell<bool>,
}

impl Image {
    /// Opens an image. `data_file` is what the header names as its external data file, opened by the caller.
    ///
    /// A writable open of an image whose dirty bit is set rebuilds its reference counts first.
    ///
    /// # Errors
    /// `Corrupt`, `Unsupported`, `NotFound` (no such snapshot), and those of the storage.
    pub async fn open(
        storage: StorageHandle,
        data_file: Option<StorageHandle>,
        options: OpenOptions,
    ) -> Result<Rc<Self>> {
        let name = storage.name().to_owned();
        Self::open_unnamed(storage, data_file, options).await.map(Rc::new).map_err(|e| e.on(name))
    }

    async fn open_unnamed(
        storage: StorageHandle,
        data_file: Option<StorageHandle>,
        options: OpenOptions,
    ) -> Result<Self> {
        let read_only = options.read_only || options.snapshot.is_some();
        let mut header = Header::read(&storage).await?;
        if !read_only || header.is_corrupt() && !options.allow_corrupt {
            header.require_writable()?;
        }
        if header.has_data_file() != data_file.is_some() {
            return Err(DiskError::new(ErrorKind::Invalid, Operation::Open).because(if data_file.is_some() {
                "a data file was given, but the image has none".to_owned()
            } else {
                format!(
                    "the image keeps its data in {:?}, which was not given",
                    header.data_file.as_deref().unwrap_or("?")
                )
            }));
        }
        if header.is_dirty() && !read_only {
            let left = check::repair(&storage, data_file.as_ref(), RepairMode::All, &mut |_, _| {}).await?;
            header = Header::read(&storage).await?;
            header.require_writable()?;
            // The repair leaves the bit where it could not make the counts right: new clusters might be somebody's.
            if header.is_dirty() {
                return Err(DiskError::new(ErrorKind::Corrupt, Operation::Open).because(format!(
                    "the image was not closed cleanly, and its reference counts could not be rebuilt: {} corruptions and \
                     {} places that cannot be checked are left; open it read-only and convert it to a new image",
                    left.corruptions, left.check_errors
                )));
            }
        }
        let (l1_offset, l1_entries, size) = match &options.snapshot {
            None => (header.l1_offset, header.l1_entries, header.size),
            Some(wanted) => {
                let table = SnapshotTable::read(&storage, &header).await?;
                let snapshot = table.find(wanted).ok_or_else(|| {
                    let names: Vec<_> = table.snapshots.iter().map(|s| s.name_text().into_owned()).collect();
                    DiskError::new(ErrorKind::NotFound, Operation::Open)
                        .because(format!("no internal snapshot {wanted:?}; there are: {}", names.join(", ")))
                })?;
                snapshot.validate_l1(&header, storage.size())?;
                snapshot.validate_size(&header)?;
                (snapshot.l1_offset, snapshot.l1_entries, snapshot.disk_size_or(header.size))
            }
        };
        let l1 = read_table(&storage, l1_offset, l1_entries as usize).await?;
        let cluster_bits = header.cluster_bits;
        let poisoned = Rc::new(Cell::new(false));
        let allocator = if read_only {
            None
        } else {
            let entries = (u64::from(header.refcount_table_clusters) << cluster_bits) / 8;
            let table = read_table(&storage, header.refcount_table_offset, entries as usize).await?;
            let mut metadata = metadata_clusters(&header, &l1, &table, storage.size())?;
            metadata.extend(other_tables(&storage, &header).await);
            let refcounts = Refcounts::new(
                storage.clone(),
                cluster_bits,
                header.refcount_order,
                table,
                header.refcount_table_offset,
            );
            Some(Allocator::open(refcounts, storage.clone(), cluster_bits, metadata, Rc::clone(&poisoned)).await?)
        };
        let cluster = header.cluster_size();
        let geometry = LayerGeometry {
            size,
            unit: header.subcluster_size(),
            block: cluster,
            read_only,
            storage_holes: header.autoclear & header::AUTOCLEAR_RAW_DATA != 0,
            zero_over_parent: header.version >= 3,
            encoded_unit: (data_file.is_none()).then_some(cluster),
        };
        let extended = header.extended_l2();
        Ok(Self {
            slices: Slices::new(SliceGeometry::new(cluster_bits, extended), l1.len(), options.l2_cache_bytes),
            storage,
            data_file,
            geometry: Cell::new(geometry),
            cluster_bits,
            extended,
            l1: RefCell::new(l1),
            dirty_l1: RefCell::default(),
            loading: RefCell::default(),
            loaded: Event::new(),
            allocator,
            epochs: Epochs::new(),
            locked: RefCell::default(),
            unlocked: Event::new(),
            pending: RefCell::default(),
            next_ticket: Cell::new(0),
            unlinked: RefCell::default(),
            flushes: flush::Flushes::default(),
            poisoned,
            writing: Cell::new(false),
            begin_writing: async_lock::Mutex::new(()),
            features: async_lock::Mutex::new(()),
            tracked: Cell::new(false),
            renewed: Cell::new(false),
            link_to_set: Cell::default(),
            is_snapshot: options.snapshot.is_some(),
            packing: Cell::default(),
            packing_one: async_lock::Mutex::new(()),
            decoded: RefCell::default(),
            workers: options.workers,
            making_table: async_lock::Mutex::new(()),
            suspicious: Cell::new(false),
            header: RefCell::new(header),
        })
    }

    /// The header as it is now.
    pub fn header(&self) -> Header {
        let mut header = self.header.borrow().clone();
        // The allocator moves the refcount table and writes its place into the header by itself.
        if let Some(allocator) = &self.allocator {
            header.refcount_table_offset = allocator.refcounts.table_offset();
            header.refcount_table_clusters = ((allocator.refcounts.table_len() as u64 * 8) >> self.cluster_bits) as u32;
        }
        header
    }

    /// Marks bitmaps that the coming change makes untrue; see `invalidate_bitmaps`.
    pub(super) async fn invalidate_bitmaps(&self, which: Invalidate) -> Result<()> {
        let _features = self.features.lock().await;
        // Held, so that the refcount table stays where this copy of the header says.
        let _tables = self.allocator()?.hold_tables().await;
        let mut header = self.header();
        super::invalidate_bitmaps(&self.storage, &mut header, which).await?;
        self.header.borrow_mut().autoclear = header.autoclear;
        Ok(())
    }

    /// The backing file that the image names.
    pub fn backing(&self) -> Option<BackingRef> {
        self.header.borrow().backing.clone()
    }

    pub(super) fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Where the guest's bytes stand.
    pub(super) fn data_storage(&self) -> (StorageId, &StorageHandle) {
        match &self.data_file {
            Some(data) => (StorageId::DATA, data),
            None => (StorageId::IMAGE, &self.storage),
        }
    }

    pub(super) fn is_raw_data(&self) -> bool {
        self.header.borrow().autoclear & header::AUTOCLEAR_RAW_DATA != 0
    }

    /// The allocator of a writable image.
    pub(super) fn allocator(&self) -> Result<&Allocator> {
        self.allocator
            .as_ref()
            .ok_or_else(|| DiskError::new(ErrorKind::ReadOnly, Operation::Write).on(self.storage.name()))
    }

    /// The slice that maps a guest offset; `None` where the L1 table has no L2 table.
    pub(super) async fn slice(&self, index: u64) -> Result<Option<Rc<Slice>>> {
        loop {
            if let Some(slice) = self.slices.get(index) {
                return Ok(Some(slice));
            }
            if !self.loading.borrow().contains(&index) {
                break;
            }
            let listener = self.loaded.listen();
            listener.await;
        }
        if self.l2_table(index)?.is_none() {
            return Ok(None);
        }
        if self.slices.needs_flush() {
            self.flush_all().await?;
            if let Some(slice) = self.slices.get(index) {
                return Ok(Some(slice));
            }
            if self.loading.borrow().contains(&index) {
                return Box::pin(self.slice(index)).await;
            }
        }
        let Some(table) = self.l2_table(index)? else { return Ok(None) };
        self.loading.borrow_mut().insert(index);
        let _done = Loading { image: self, index };
        let geometry = self.slices.geometry;
        let bytes = self.storage.read_new(table + geometry.offset_in_table(index), geometry.slice_bytes()).await?;
        let slice = Slice::parse(index, self.extended, self.data_file.is_some(), &bytes);
        if let Some(fault) = self.first_fault(&slice) {
            tracing::warn!(image = self.storage.name(), %fault, "found when an L2 table was read");
            self.suspicious.set(true);
        }
        if let Some(allocator) = self.allocator.as_ref().filter(|_| self.data_file.is_none()) {
            let entries = (0..slice.entries()).map(|entry| slice.get(entry));
            let last = entries.filter(|entry| entry.has_host()).map(L2Entry::host).max();
            if let Some(host) = last {
                allocator.note_mapped((host >> self.cluster_bits) + 1);
            }
        }
        Ok(Some(self.slices.insert(slice)))
    }

    /// Host offset of the L2 table that a slice belongs to; `None` where there is none.
    pub(super) fn l2_table(&self, slice: u64) -> Result<Option<u64>> {
        let index = self.slices.geometry.l1_of(slice);
        let Some(entry) = self.l1.borrow().get(index).copied() else { return Ok(None) };
        let offset = entry & OFFSET_MASK;
        if offset == 0 {
            return Ok(None);
        }
        if offset & (self.cluster_size() - 1) != 0 {
            return Err(Fault::L2TableUnaligned { index, offset }.into());
        }
        // Tables made since the last flush may lie behind the end of the file: its space is not written yet.
        let end = self.allocator.as_ref().map_or(0, Allocator::end_offset).max(self.storage.size());
        if offset >= end {
            return Err(Fault::L2TableBeyondEnd { index, offset }.into());
        }
        Ok(Some(offset))
    }

    /// Whether the L2 table of a slice may be changed in place.
    pub(super) fn l2_table_is_own(&self, slice: u64) -> bool {
        self.l1.borrow().get(self.slices.geometry.l1_of(slice)).is_some_and(|entry| entry & COPIED != 0)
    }

    /// What is wrong with an entry that has a host cluster, if anything is.
    pub(super) fn fault_of(&self, guest: u64, entry: L2Entry) -> Option<Fault> {
        if self.extended && entry.bitmap_is_invalid() {
            return Some(Fault::Subclusters { guest });
        }
        if entry.is_compressed() && self.data_file.is_none() {
            let CompressedAt { offset, len } = CompressedAt::decode(entry.descriptor, self.cluster_bits);
            let metadata = self.allocator.as_ref()?.metadata.borrow();
            let mut clusters = (offset >> self.cluster_bits)..=((offset + len - 1) >> self.cluster_bits);
            return clusters.any(|c| metadata.contains(&c)).then_some(Fault::DataInMetadata { guest, offset });
        }
        if self.header.borrow().version == 2 && entry.descriptor & ZERO != 0 {
            return Some(Fault::ZeroInVersion2 { guest });
        }
        if !entry.has_host() {
            return None;
        }
        let offset = entry.host();
        if offset & (self.cluster_size() - 1) != 0 {
            return Some(Fault::DataUnaligned { guest, offset });
        }
        if self.data_file.is_none()
            && let Some(allocator) = &self.allocator
            && allocator.metadata.borrow().contains(&(offset >> self.cluster_bits))
        {
            return Some(Fault::DataInMetadata { guest, offset });
        }
        None
    }

    fn first_fault(&self, slice: &Slice) -> Option<Fault> {
        let guest = self.slices.geometry.guest_of(slice.index);
        (0..slice.entries()).find_map(|i| self.fault_of(guest + ((i as u64) << self.cluster_bits), slice.get(i)))
    }

    /// Fails when an entry must not be used.
    pub(super) fn check_entry(&self, guest: u64, entry: L2Entry) -> Result<()> {
        if self.suspicious.get()
            && let Some(fault) = self.fault_of(guest, entry)
        {
            return Err(DiskError::from(fault).on(self.storage.name()));
        }
        Ok(())
    }

    /// Fails when an entry must not be written to in place: no reference count can be where it leads.
    pub(super) fn check_counted(&self, guest: u64, entry: L2Entry) -> Result<()> {
        let offset = entry.host();
        if entry.has_host()
            && self.data_file.is_none()
            && self.allocator.as_ref().is_some_and(|allocator| !allocator.reaches(offset >> self.cluster_bits))
        {
            return Err(DiskError::from(Fault::DataBeyondCounts { guest, offset }).on(self.storage.name()));
        }
        Ok(())
    }

    /// Passes a result on; a failure stops all further writing, as nobody knows what is on the storage. Not so where
    /// space ran out: such a write was not done, and whoever wanted it has left everything as it was.
    pub(super) fn poison_on_error<T>(&self, result: Result<T>) -> Result<T> {
        if let Err(error) = &result
            && error.kind() != ErrorKind::NoSpace
            && !self.poisoned.replace(true)
        {
            tracing::error!(image = self.storage.name(), ?error, "metadata could not be written: the image is stopped");
        }
        result
    }

    pub(super) fn refuse_if_poisoned(&self) -> Result<()> {
        if self.poisoned.get() {
            return Err(DiskError::new(ErrorKind::Poisoned, Operation::Write).on(self.storage.name()));
        }
        Ok(())
    }

    /// Locks guest clusters `first..first + count`, as soon as none of them is locked.
    pub(super) async fn lock_clusters(&self, first: u64, count: u64) -> ClusterLock<'_> {
        loop {
            let listener = {
                let mut locked = self.locked.borrow_mut();
                if !(first..first + count).any(|cluster| locked.contains(&cluster)) {
                    locked.extend(first..first + count);
                    return ClusterLock { image: self, first, count };
                }
                self.unlocked.listen()
            };
            listener.await;
        }
    }

    pub(super) fn unlock_clusters(&self, first: u64, count: u64) {
        let mut locked = self.locked.borrow_mut();
        for cluster in first..first + count {
            locked.remove(&cluster);
        }
        drop(locked);
        self.unlocked.notify(usize::MAX);
    }
}

/// Ends a load, whether it succeeded or was dropped.
struct Loading<'a> {
    image: &'a Image,
    index: u64,
}

impl Drop for Loading<'_> {
    fn drop(&mut self) {
        self.image.loading.borrow_mut().remove(&self.index);
        self.image.loaded.notify(usize::MAX);
    }
}

/// Guest clusters whose entries only the holder changes.
pub(super) struct ClusterLock<'a> {
    image: &'a Image,
    first: u64,
    count: u64,
}

impl ClusterLock<'_> {
    /// Unlocks all but the first `count`.
    pub(super) fn shorten(&mut self, count: u64) {
        if count < self.count {
            self.image.unlock_clusters(self.first + count, self.count - count);
            self.count = count;
        }
    }

    /// Hands the lock over to a pending write.
    pub(super) fn keep(mut self) {
        self.count = 0;
    }
}

impl Drop for ClusterLock<'_> {
    fn drop(&mut self) {
        if self.count > 0 {
            self.image.unlock_clusters(self.first, self.count);
        }
    }
}

async fn read_table(storage: &StorageHandle, offset: u64, entries: usize) -> Result<Vec<u64>> {
    // Bounded: the header's checks allow at most 32 MiB.
    let bytes = storage.read_new(offset, entries * 8).await?;
    Ok(bytes.as_chunks::<8>().0.iter().map(|entry| u64::from_be_bytes(*entry)).collect())
}

/// All clusters that hold tables, known when the image is opened. Fails where tables overlap or a refcount block cannot
/// be where it is said to be: writing such an image would make it worse.
fn metadata_clusters(header: &Header, l1: &[u64], refcount_table: &[u64], file_size: u64) -> Result<HashSet<u64>> {
    let bits = header.cluster_bits;
    let clusters = |offset: u64, len: u64| (offset >> bits)..(offset + len).div_ceil(1 << bits);
    for &offset in refcount_table.iter().filter(|entry| **entry != 0) {
        if offset & (header.cluster_size() - 1) != 0 {
            return Err(Fault::RefcountBlockUnaligned { offset }.into());
        }
        if offset >= file_size {
            return Err(Fault::RefcountBlockBeyondEnd { offset }.into());
        }
    }
    let tables = clusters(0, 1)
        .chain(clusters(header.l1_offset, header.l1_bytes()))
        .chain(clusters(header.refcount_table_offset, u64::from(header.refcount_table_clusters) << bits))
        .chain(l1.iter().map(|entry| (entry & OFFSET_MASK) >> bits).filter(|cluster| *cluster != 0))
        .chain(refcount_table.iter().map(|entry| entry >> bits).filter(|cluster| *cluster != 0));
    let mut all = HashSet::new();
    for cluster in tables {
        if !all.insert(cluster) {
            return Err(Fault::TablesOverlap { cluster }.into());
        }
    }
    Ok(all)
}

/// Clusters of tables that this engine never writes, but must not give away either: the snapshots' and the bitmaps'
/// directories, and the snapshots' L1 tables. What cannot be read is left out: the checker tells about it.
async fn other_tables(storage: &StorageHandle, header: &Header) -> Vec<u64> {
    let bits = header.cluster_bits;
    let end = storage.size().div_ceil(1 << bits);
    let clusters = |offset: u64, len: u64| (offset >> bits)..offset.saturating_add(len).div_ceil(1 << bits).min(end);
    let mut found = Vec::new();
    if header.snapshot_count > 0
        && let Ok(table) = SnapshotTable::read(storage, header).await
    {
        found.extend(clusters(header.snapshots_offset, table.size));
        for snapshot in &table.snapshots {
            if snapshot.validate_l1(header, storage.size()).is_ok() {
                found.extend(clusters(snapshot.l1_offset, 8 * u64::from(snapshot.l1_entries)));
            }
        }
    }
    if let Some(bitmaps) = &header.bitmaps {
        found.extend(clusters(bitmaps.directory_offset, bitmaps.directory_size));
    }
    found
}

impl Layer for Image {
    fn geometry(&self) -> LayerGeometry {
        self.geometry.get()
    }

    fn storage(&self, id: StorageId) -> &StorageHandle {
        match id {
            StorageId::IMAGE => &self.storage,
            _ => self.data_file.as_ref().expect("only images with a data file name it"),
        }
    }

    fn begin_io(&self) -> u64 {
        self.epochs.begin()
    }

    fn end_io(&self, epoch: u64) {
        self.epochs.end(epoch);
    }

    fn map_cached(&self, range: ByteRange) -> Option<LayerExtent> {
        self.map_in_memory(range)
    }

    async fn map(&self, range: ByteRange) -> Result<LayerExtent> {
        self.map_loading(range).await
    }

    async fn read_encoded(&self, offset: u64, buf: Buf) -> Result<Buf> {
        self.read_compressed(offset, buf).await
    }

    fn prepare_cached(&self, range: ByteRange) -> Option<WritePlan> {
        self.plan_in_place(range)
    }

    async fn prepare_write(&self, range: ByteRange, below: Below) -> Result<WritePlan> {
        let planned = self.plan_write(range, below).await;
        self.mark_if_corrupt(planned).await
    }

    async fn commit_write(&self, ticket: TicketId) -> Result<()> {
        self.commit(ticket)
    }

    fn abort_write(&self, ticket: TicketId) {
        self.abort(ticket);
    }

    async fn write_encoded(&self, range: ByteRange, encoded: &[u8]) -> Result<()> {
        let written = self.write_compressed(range, encoded).await;
        self.mark_if_corrupt(written).await
    }

    async fn write_zeroes(&self, range: ByteRange, below: Below, mode: ZeroMode) -> Result<()> {
        let zeroed = self.zero_units(range, below, mode).await;
        self.mark_if_corrupt(zeroed).await
    }

    async fn discard(&self, range: ByteRange, below: Below) -> Result<()> {
        let discarded = self.discard_units(range, below).await;
        self.mark_if_corrupt(discarded).await
    }

    async fn flush(&self) -> Result<()> {
        self.flush_all().await
    }

    async fn extend(&self, size: u64) -> Result<()> {
        self.show_size(size).await
    }

    async fn resize(&self, size: u64, preallocation: Preallocation) -> Result<()> {
        self.change_size(size, preallocation).await
    }

    fn history_mark(&self) -> Option<HistoryMark> {
        // The mark is about the disk as it is, not about what it was.
        if self.is_snapshot { None } else { self.header.borrow().history_mark() }
    }

    async fn set_history_mark(&self, mark: Option<HistoryMark>) -> Result<bool> {
        self.mark_history(mark).await.map_err(|e| e.on(self.storage.name()))
    }

    fn identity(&self) -> LayerIdentity {
        let identity = self.header.borrow().identity();
        // The id names the disk as it is, not what it was; the parent is the same.
        if self.is_snapshot { LayerIdentity { link: identity.link, ..LayerIdentity::default() } } else { identity }
    }

    async fn set_parent_link(&self, link: Option<ParentLink>) -> Result<bool> {
        let put = self.put_identity(|identity| identity.link = link).await;
        put.inspect(|_| self.link_to_set.set(None)).map_err(|e| e.on(self.storage.name()))
    }

    fn link_with_first_write(&self, link: ParentLink) {
        if !self.writing.get() {
            self.link_to_set.set(Some(link));
        }
    }

    async fn renew_content_id(&self, id: ContentId) -> Result<bool> {
        let put = self.put_identity(|identity| identity.content = Some(id)).await;
        put.inspect(|put| self.renewed.set(*put)).map_err(|e| e.on(self.storage.name()))
    }

    async fn close(&self) -> Result<()> {
        self.close_cleanly().await
    }
}
