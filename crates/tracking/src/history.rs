//! The history of one disk: its sidecar, and what is known of it in memory.

use crate::epoch_marks::EpochMarks;
use crate::epoch_marks::Run;
use crate::fields::{begin_block, finish_block, open_block};
use crate::index::{IndexBlock, PageBody, PageEntry, sum_of};
use crate::intents::joined;
use crate::journal_block::JournalBlock;
use crate::layout::{self, BLOCK, GROUP_PAGES, JOURNAL_BLOCKS, PAGE_GRANULES};
use crate::run_map::RunMap;
use crate::streams::Streams;
use crate::superblock::{State, Superblock};
use crate::trust::Found;
use crate::{ChangeKind, Damage, Distrust, HistoryError, Host, Id, ImageFacts, Point, Refusal, points, trust};
use async_lock::Mutex;
use disk::{Buf, ByteRange, StorageHandle, ZeroMode};
use event_listener::Event;
use futures_util::stream::{self, StreamExt, TryStreamExt};
use std::cell::{Cell, RefCell};
use std::rc::Rc;

/// Bytes of memory that the present epoch's marks may take. What is above is forgotten when the table knows it as well.
const MARKS_MEMORY: usize = 2 << 20;
/// Requests to the sidecar at the same time.
pub(crate) const AT_ONCE: usize = 16;
/// Bytes that are declared ahead of sequential writers, unless chosen otherwise.
const OPEN_BYTES: u64 = 64 << 20;

const HEARTBEAT_MAGIC: u32 = 0x4248_5748; // "HWHB"

/// How a new history is made.
#[derive(Clone, Copy, Debug)]
pub struct CreateOptions {
    /// Bytes of a granule: a power of two, 4 KiB to 1 MiB.
    pub granule: u64,
    /// Bytes of the guest's disk.
    pub size: u64,
}

impl CreateOptions {
    /// A history of a disk of so many bytes, with granules of 64 KiB.
    pub fn new(size: u64) -> Self {
        Self { granule: 64 << 10, size }
    }
}

/// What there is to know about a history.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HistoryInfo {
    /// Its name, constant as long as it goes on without a gap.
    pub lineage: Id,
    /// Bytes of a granule.
    pub granule: u64,
    /// The present epoch.
    pub epoch: u32,
    /// How many points there are.
    pub points: usize,
    /// Bytes that a crash at this moment would report beyond what was written.
    pub open_bytes: u64,
    /// The most that this may become.
    pub open_limit: u64,
    /// Bytes of memory.
    pub memory: usize,
    /// Why tracking has stopped, if it has.
    pub stopped: Option<String>,
}

/// A history, open.
///
/// Lives on its disk's home thread. Futures are to be polled to their end.
pub struct History {
    pub(crate) storage: StorageHandle,
    pub(crate) host: Rc<dyn Host>,
    pub(crate) granule_bits: u32,
    pub(crate) open_limit: Cell<u64>,
    pub(crate) state: RefCell<Known>,
    /// Held while the table is written.
    pub(crate) checkpointing: Mutex<()>,
    /// Held while the superblock is written.
    pub(crate) superblock_lock: Mutex<()>,
    /// Held while the first write of a session is announced.
    pub(crate) waking: Mutex<()>,
    /// Whether the sidecar says that somebody writes.
    pub(crate) awake: Cell<bool>,
    /// Whether somebody writes intents.
    pub(crate) committing: Cell<bool>,
    /// Tickets up to this one are durable.
    pub(crate) committed: Cell<u64>,
    /// Blocks of the journal before this one are durable.
    pub(crate) journal_durable: Cell<u64>,
    pub(crate) changed: Event,
    /// Something is to be done by [`History::tend`].
    pub(crate) wanted: Event,
    /// [`History::tend`] ends.
    pub(crate) tending_ends: Cell<bool>,
    /// The image was written to since the last sign of life.
    pub(crate) wrote: Cell<bool>,
    pub(crate) stopped: RefCell<Option<String>>,
    /// Why tracking is to stop, from the moment that this is decided: nothing is recorded any more, and nobody may write
    /// before the sidecar says so.
    pub(crate) giving_up: RefCell<Option<String>>,
    /// Flushes of the image are not waited for.
    pub(crate) flushes_void: Cell<bool>,
    /// The heir that the superblock names has taken the image's place; the next superblock says so.
    pub(crate) heir_succeeds: Cell<bool>,
}

/// What is known in memory.
pub(crate) struct Known {
    /// As it is on disk.
    pub(crate) superblock: Superblock,
    pub(crate) points: Vec<Point>,
    pub(crate) index: Vec<PageEntry>,
    /// The slot of each group's index block that counts.
    pub(crate) group_slots: Vec<u8>,
    /// The generation of each group's index block.
    pub(crate) generations: Vec<u64>,
    pub(crate) current: EpochMarks,
    /// The epoch that a point has ended, until the table has it.
    pub(crate) frozen: Option<EpochMarks>,
    /// Granules declared ahead of sequential writers, with the ticket of the declaration. They have not changed.
    pub(crate) ahead: RunMap<u64>,
    /// How many were forgotten here while the journal still declares them: a crash would report them.
    pub(crate) ahead_forgotten: u64,
    pub(crate) streams: Streams,
    /// Intents that wait for the journal.
    pub(crate) queue: Vec<(u64, u64)>,
    /// The same, of what is declared ahead.
    pub(crate) ahead_queue: Vec<(u64, u64)>,
    pub(crate) tickets: u64,
    /// Of the next journal block.
    pub(crate) next_sequence: u64,
}

/// Pages of a disk.
fn pages_for(size: u64, granule_bits: u8) -> usize {
    size.div_ceil(1 << granule_bits).div_ceil(PAGE_GRANULES) as usize
}

fn groups_for(pages: usize) -> usize {
    (pages as u64).div_ceil(GROUP_PAGES) as usize
}

/// The index as it is on disk.
struct Index {
    /// Of all pages.
    entries: Vec<PageEntry>,
    /// The slot of each group's index block that counts.
    group_slots: Vec<u8>,
    /// The generation of each group's index block.
    generations: Vec<u64>,
}

impl Known {
    /// What is on disk, and nothing beyond it but `current`.
    fn new(superblock: Superblock, points: Vec<Point>, index: Index, current: EpochMarks, next_sequence: u64) -> Self {
        let Index { entries: index, group_slots, generations } = index;
        Self {
            superblock,
            points,
            index,
            group_slots,
            generations,
            current,
            frozen: None,
            ahead: RunMap::default(),
            ahead_forgotten: 0,
            streams: Streams::default(),
            queue: Vec::new(),
            ahead_queue: Vec::new(),
            tickets: 0,
            next_sequence,
        }
    }

    /// Forgets what was declared ahead; the journal declares it until the table is written.
    pub(crate) fn forget_ahead(&mut self) {
        self.ahead_forgotten += self.ahead.total();
        self.ahead.clear();
        self.ahead_queue.clear();
    }

    /// What a superblock says of the index blocks, when these groups have this generation.
    pub(crate) fn index_sum(&self, superblock: &Superblock, written: &[(usize, u8)]) -> u32 {
        let mut generations = self.generations.clone();
        for (group, _) in written {
            generations[*group] = superblock.generation;
        }
        let groups = groups_for(pages_for(superblock.size, superblock.granule_bits));
        sum_of(generations.into_iter().take(groups))
    }

    /// Room for a disk of so many bytes.
    pub(crate) fn grow(&mut self, size: u64) {
        let pages = pages_for(size, self.superblock.granule_bits);
        let groups = groups_for(pages);
        if groups > self.group_slots.len() {
            // The first slot of a group that was never written is the one that does not count.
            self.group_slots.resize(groups, 1);
            self.generations.resize(groups, 0);
            self.index.resize(groups * GROUP_PAGES as usize, PageEntry::NEVER);
        }
        let pages = self.index.len();
        self.current.grow(pages);
        if let Some(frozen) = &mut self.frozen {
            frozen.grow(pages);
        }
    }
}

impl History {
    /// Makes a new history in an empty storage. The image's content at this moment is its beginning.
    ///
    /// Crash: without a valid superblock, which comes last, there is no history.
    ///
    /// # Errors
    /// When the storage cannot be written, the granule is no power of two in its bounds, or the disk is too large.
    pub async fn create(
        storage: StorageHandle,
        host: Rc<dyn Host>,
        options: CreateOptions,
    ) -> Result<Self, HistoryError> {
        let granule_bits = options.granule.trailing_zeros() as u8;
        if !options.granule.is_power_of_two() || !layout::GRANULE_BITS.contains(&granule_bits) {
            return Err(HistoryError::Damaged(Damage::Superblock { field: "granule" }));
        }
        if options.size.div_ceil(options.granule) > layout::MAX_GRANULES {
            return Err(HistoryError::Damaged(Damage::Superblock { field: "size" }));
        }
        if storage.size() > 0 {
            // No part of an older history may be found among the new one's.
            storage.set_size(0).await?;
            storage.sync().await?;
        }
        // Written, not only allocated: later syncs of the journal then have no metadata to write.
        // Block by block: what is written at once the kernel may keep as one large page, whose every later block costs it
        // a walk through all of them.
        for block in 0..JOURNAL_BLOCKS {
            storage.write(layout::journal_block(block), Buf::zeroed(BLOCK as usize)).await?;
        }
        let pages = pages_for(options.size, granule_bits);
        let groups = groups_for(pages);
        for group in 0..groups as u64 {
            let entries = vec![PageEntry::NEVER; GROUP_PAGES as usize];
            let block = IndexBlock { group, generation: 1, entries }.encode();
            storage.write(layout::index_block(group, 0), Buf::copy_of(&block)).await?;
        }
        storage.write_zeroes(ByteRange::new(layout::HEARTBEAT, BLOCK), ZeroMode::default()).await?;
        let points = points::encode(&[]).unwrap_or_default();
        storage.write(layout::POINTS[0], Buf::copy_of(&points)).await?;
        storage.sync().await?;
        let lineage = host.random_id();
        host.let_time_pass().await;
        let marked = host.mark().filter(|mark| mark.lineage == lineage);
        let superblock = Superblock {
            sequence: 2,
            lineage,
            granule_bits,
            state: State::Closed,
            flushes_void: false,
            size: options.size,
            epoch: 1,
            generation: 1,
            journal: host.random_id(),
            journal_start: 0,
            points_slot: 0,
            points_len: points.len() as u32,
            points_sum: crc32c::crc32c(&points),
            index_sum: sum_of((0..groups).map(|_| 1)),
            time: host.now(),
            boot: host.boot().id,
            moment: marked.map_or(Id::NONE, |mark| mark.moment),
            next_moment: Id::NONE,
            facts: host.facts().await?,
            reason: String::new(),
            heir: None,
        };
        storage.write(layout::SUPERBLOCKS[0], Buf::copy_of(&superblock.encode())).await?;
        storage.sync().await?;
        let index = Index {
            entries: vec![PageEntry::NEVER; groups * GROUP_PAGES as usize],
            group_slots: vec![0; groups],
            generations: vec![1; groups],
        };
        let current = EpochMarks::new(1, index.entries.len());
        Ok(Self::with(storage, host, Known::new(superblock, Vec::new(), index, current, 0)))
    }

    fn with(storage: StorageHandle, host: Rc<dyn Host>, known: Known) -> Self {
        Self {
            storage,
            host,
            granule_bits: known.superblock.granule_bits.into(),
            open_limit: Cell::new(OPEN_BYTES),
            state: RefCell::new(known),
            checkpointing: Mutex::default(),
            superblock_lock: Mutex::default(),
            waking: Mutex::default(),
            awake: Cell::new(false),
            committing: Cell::new(false),
            committed: Cell::new(0),
            journal_durable: Cell::new(0),
            changed: Event::new(),
            wanted: Event::new(),
            tending_ends: Cell::new(false),
            wrote: Cell::new(false),
            stopped: RefCell::default(),
            giving_up: RefCell::default(),
            flushes_void: Cell::new(false),
            heir_succeeds: Cell::new(false),
        }
    }

    /// Opens a history, and judges whether the image is still the one that it speaks of. When it is not, all older points
    /// are refused, and the history goes on under another name; for a writable storage that is durable on return.
    ///
    /// # Errors
    /// [`HistoryError::Damaged`] when the sidecar contradicts itself, or when it cannot be read.
    pub async fn open(storage: StorageHandle, host: Rc<dyn Host>) -> Result<(Self, Option<Distrust>), HistoryError> {
        let (mut known, last_sign) = load(&storage).await?;
        if known.superblock.state != State::Closed {
            host.let_time_pass().await; // What is taken down now must not fit a later write.
        }
        let facts = host.facts().await?;
        let distrust = match trust::judge(&known.superblock, &facts, host.mark(), host.boot(), last_sign) {
            Ok(Found::Image) => None,
            Ok(Found::Heir) => {
                if let Some(as_heir) = known.superblock.of_heir() {
                    known.superblock = as_heir;
                }
                None
            }
            Err(distrust) => Some(distrust),
        };
        let unfinished = known.superblock.state != State::Closed;
        let writable = !storage.limits().read_only;
        let history = Self::with(storage, host, known);
        if let Some(distrust) = &distrust {
            history.refuse_points(&distrust.to_string());
        }
        if writable && (unfinished || distrust.is_some()) {
            history.settle(facts, distrust.is_some()).await?;
        }
        Ok((history, distrust))
    }

    /// All points get that reason, unless they have one already.
    pub(crate) fn refuse_points(&self, reason: &str) {
        let since = self.host.now();
        for point in &mut self.state.borrow_mut().points {
            point.refused.get_or_insert_with(|| Refusal { reason: reason.to_owned(), since });
        }
    }

    /// Puts what the journal holds into the table, and calls the image as it is now the history's.
    ///
    /// Crash: until the new superblock is durable the old state counts, and the same is found again.
    async fn settle(&self, facts: ImageFacts, new_lineage: bool) -> Result<(), HistoryError> {
        let lineage = new_lineage.then(|| self.host.random_id());
        let journal = self.host.random_id();
        let ours = self.state.borrow().superblock.lineage;
        let mark = self.host.mark().filter(|mark| mark.lineage == ours);
        let boot = self.host.boot().id;
        self.checkpoint_with(Some(Box::new(|_| {})), |superblock| {
            superblock.state = State::Closed;
            superblock.facts = facts;
            // What was not flushed is still in memory alone, as long as the machine runs.
            superblock.flushes_void &= superblock.boot == boot;
            superblock.boot = boot;
            superblock.journal = journal;
            superblock.journal_start = 0;
            superblock.reason.clear();
            superblock.heir = None;
            match lineage {
                // The image bears no mark of the new lineage until it is written to.
                Some(lineage) => {
                    superblock.lineage = lineage;
                    superblock.moment = Id::NONE;
                }
                None => superblock.moment = mark.map_or(superblock.moment, |mark| mark.moment),
            }
            superblock.next_moment = Id::NONE;
        })
        .await?;
        self.state.borrow_mut().next_sequence = 0;
        Ok(())
    }

    /// The image was changed by somebody who knows of this history, and in no byte that the guest sees, while nobody else
    /// could write to it: the image as it is now becomes the history's. Nothing may have been written through it.
    ///
    /// Crash: until the new superblock is durable the old one counts, and the image is found to be another one.
    ///
    /// # Errors
    /// When the image cannot be looked at, or the sidecar not written: the next opening refuses all points.
    pub async fn reseal(&self) -> Result<(), HistoryError> {
        if self.awake.get() {
            return Ok(()); // Closing it takes down how the image looks.
        }
        self.refuse_if_stopped()?;
        self.host.let_time_pass().await;
        let facts = self.host.facts().await?;
        let boot = self.host.boot().id;
        self.write_superblock(|superblock| {
            superblock.facts = facts;
            superblock.boot = boot;
            superblock.heir = None;
        })
        .await
    }

    /// The image was changed by somebody who knows of this history, but not which bytes of the guest's: all points are
    /// refused for that reason, and the history goes on under another name. Nothing may have been written through it.
    ///
    /// Crash: as with [`History::reseal`].
    ///
    /// # Errors
    /// As with [`History::reseal`].
    pub async fn distrust(&self, reason: &str) -> Result<(), HistoryError> {
        self.host.let_time_pass().await;
        let facts = self.host.facts().await?;
        self.refuse_points(reason);
        self.settle(facts, true).await
    }

    /// Whether these bytes, the first of a file, are those of a history.
    pub fn is_one(first_bytes: &[u8]) -> bool {
        layout::SUPERBLOCKS.iter().any(|slot| {
            first_bytes.get(*slot as usize..).is_some_and(|block| block.starts_with(&crate::superblock::MAGIC))
        })
    }

    /// The user's word that the image holds nothing that the history does not know: all points are trusted again.
    ///
    /// # Errors
    /// When the sidecar cannot be written.
    pub async fn trust(&self) -> Result<(), HistoryError> {
        self.change_points(|points| points.iter_mut().for_each(|point| point.refused = None)).await
    }

    /// What there is to know.
    pub fn info(&self) -> HistoryInfo {
        let known = self.state.borrow();
        let queued: u64 = known.queue.iter().map(|(start, end)| end - start).sum();
        let open = (known.ahead.total() + known.ahead_forgotten + queued) << self.granule_bits;
        HistoryInfo {
            lineage: known.superblock.lineage,
            granule: 1 << self.granule_bits,
            epoch: known.current.epoch,
            points: known.points.len(),
            open_bytes: open,
            open_limit: self.open_limit.get(),
            memory: known.current.bytes()
                + known.frozen.as_ref().map_or(0, EpochMarks::bytes)
                + known.index.len() * size_of::<PageEntry>(),
            stopped: self.stopped.borrow().clone(),
        }
    }

    /// Bounds what is declared ahead of sequential writers, in bytes.
    pub fn set_open_limit(&self, bytes: u64) {
        self.open_limit.set(bytes);
    }

    /// Says whether flushes of the image are not waited for (a cache mode that ignores them).
    pub fn set_flushes_void(&self, void: bool) {
        self.flushes_void.set(void);
    }

    /// The points, oldest first.
    pub fn points(&self) -> Vec<Point> {
        self.state.borrow().points.clone()
    }

    /// The point of that name.
    ///
    /// # Errors
    /// [`HistoryError::NoSuchPoint`].
    pub fn point(&self, name: &str) -> Result<Point, HistoryError> {
        let known = self.state.borrow();
        let found = known.points.iter().find(|point| point.name == name);
        found.cloned().ok_or_else(|| HistoryError::NoSuchPoint { name: name.to_owned() })
    }

    /// Forgets a point.
    ///
    /// # Errors
    /// [`HistoryError::NoSuchPoint`], or when the sidecar cannot be written.
    pub async fn delete_point(&self, name: &str) -> Result<(), HistoryError> {
        let id = self.point(name)?.id;
        self.change_points(move |points| points.retain(|point| point.id != id)).await
    }

    /// Gives a point the granules that its consumer has deliberately not copied.
    ///
    /// # Errors
    /// [`HistoryError::NoSuchPoint`], [`HistoryError::TooManyPoints`] when they do not fit, or when the sidecar cannot be
    /// written.
    pub async fn set_pending(&self, name: &str, pending: Vec<crate::PendingRun>) -> Result<(), HistoryError> {
        let id = self.point(name)?.id;
        let pending = points::in_order(&pending);
        self.change_points(move |points| {
            if let Some(point) = points.iter_mut().find(|point| point.id == id) {
                point.pending = pending;
            }
        })
        .await
    }

    async fn change_points(&self, change: impl FnOnce(&mut Vec<Point>) + 'static) -> Result<(), HistoryError> {
        self.checkpoint_with(Some(Box::new(change)), |_| {}).await
    }

    /// Forgets marks that the table knows as well, if they take too much memory.
    pub(crate) fn shed(&self) {
        self.state.borrow_mut().current.shed(MARKS_MEMORY);
    }

    /// Writes a sign of life, if the image was written to since the last one. It is not synced: after a kill the kernel
    /// has it, and after a power cut `trust` allows for its absence.
    ///
    /// # Errors
    /// When it cannot be written.
    pub async fn give_sign(&self) -> Result<(), HistoryError> {
        if !self.awake.get() || !self.wrote.replace(false) {
            return Ok(());
        }
        let block = {
            let known = self.state.borrow();
            let mut w = begin_block(HEARTBEAT_MAGIC);
            w.bytes(&known.superblock.journal.0);
            w.u64(self.host.now());
            w.u64(self.journal_durable.get());
            finish_block(w)
        };
        self.storage.write(layout::HEARTBEAT, Buf::copy_of(&block)).await?;
        Ok(())
    }
}

async fn read_block(storage: &StorageHandle, offset: u64) -> Result<Buf, HistoryError> {
    Ok(storage.read_new(offset, BLOCK as usize).await?)
}

/// Reads the sidecar, and the last sign of life in it.
async fn load(storage: &StorageHandle) -> Result<(Known, u64), HistoryError> {
    let mut best: Option<Superblock> = None;
    for slot in layout::SUPERBLOCKS {
        let block = read_block(storage, slot).await?;
        if let Some(found) = Superblock::decode(&block).map_err(HistoryError::Damaged)?
            && best.as_ref().is_none_or(|b| b.sequence < found.sequence)
        {
            best = Some(found);
        }
    }
    let superblock = best.ok_or(HistoryError::Damaged(Damage::NoSuperblock))?;
    let groups = groups_for(pages_for(superblock.size, superblock.granule_bits));
    let blocks: Vec<(IndexBlock, u8, bool)> = stream::iter(0..groups as u64)
        .map(|group| load_index(storage, group, superblock.generation))
        .buffered(AT_ONCE)
        .try_collect()
        .await?;
    let mut index = Vec::with_capacity(groups * GROUP_PAGES as usize);
    let mut group_slots = Vec::with_capacity(groups);
    let mut generations = Vec::with_capacity(groups);
    let mut rewrite = Vec::new();
    for (block, slot, aborted) in blocks {
        if aborted {
            rewrite.push(block.group * GROUP_PAGES);
        }
        index.extend(block.entries);
        group_slots.push(slot);
        generations.push(block.generation);
    }
    if sum_of(generations.iter().copied()) != superblock.index_sum {
        return Err(HistoryError::Damaged(Damage::Generations));
    }
    let points = load_points(storage, &superblock).await?;
    let (mut last_sign, mut journal_durable) = (superblock.time, 0);
    let beat = read_block(storage, layout::HEARTBEAT).await?;
    if let Some(mut r) = open_block(&beat, HEARTBEAT_MAGIC) {
        let (journal, time, durable) = (r.array().map(Id), r.u64(), r.u64());
        if journal == Some(superblock.journal) {
            last_sign = last_sign.max(time.unwrap_or(0));
            journal_durable = durable.unwrap_or(0);
        }
    }
    let mut current = EpochMarks::new(superblock.epoch, index.len());
    let next_sequence = match superblock.state {
        State::Closed => superblock.journal_start,
        State::InUse | State::Lost => {
            let next = replay(storage, &superblock, &mut current, &mut last_sign).await?;
            if next < journal_durable {
                return Err(HistoryError::Damaged(Damage::Journal { sequence: next }));
            }
            next
        }
    };
    for page in rewrite {
        // The slot that an unfinished checkpoint left must not be taken for a later one's.
        current.dirty.insert(page as usize);
    }
    let index = Index { entries: index, group_slots, generations };
    Ok((Known::new(superblock, points, index, current, next_sequence), last_sign))
}

/// The index block of the latest generation that counts, its slot, and whether the other slot must be written anew.
async fn load_index(
    storage: &StorageHandle,
    group: u64,
    committed: u64,
) -> Result<(IndexBlock, u8, bool), HistoryError> {
    let both = storage.read_new(layout::index_block(group, 0), 2 * BLOCK as usize).await?;
    let (a, b) = both.split_at(BLOCK as usize);
    let mut best: Option<(IndexBlock, u8)> = None;
    let mut aborted = false;
    for (slot, bytes) in [(0, a), (1, b)] {
        let Some(block) = IndexBlock::decode(bytes, group) else {
            aborted |= bytes.iter().any(|b| *b != 0);
            continue;
        };
        if block.generation > committed {
            aborted = true;
        } else if best.as_ref().is_none_or(|(b, _)| b.generation < block.generation) {
            best = Some((block, slot));
        }
    }
    match best {
        Some((block, slot)) => Ok((block, slot, aborted)),
        None => Err(HistoryError::Damaged(Damage::Index { group })),
    }
}

async fn load_points(storage: &StorageHandle, superblock: &Superblock) -> Result<Vec<Point>, HistoryError> {
    let at = layout::POINTS[usize::from(superblock.points_slot)];
    let bytes = storage.read_new(at, superblock.points_len as usize).await?;
    if crc32c::crc32c(&bytes) != superblock.points_sum {
        return Err(HistoryError::Damaged(Damage::Points));
    }
    points::decode(&bytes).map_err(HistoryError::Damaged)
}

/// Enters what the journal holds, as `Data` of the latest epoch that it speaks of: no point has ended an epoch that the
/// superblock does not know. Returns the next block's sequence.
async fn replay(
    storage: &StorageHandle,
    superblock: &Superblock,
    current: &mut EpochMarks,
    last_sign: &mut u64,
) -> Result<u64, HistoryError> {
    let granules = superblock.size.div_ceil(superblock.granule());
    let ring = storage.read_new(layout::JOURNAL, (JOURNAL_BLOCKS * BLOCK) as usize).await?;
    let blocks: Vec<Option<JournalBlock>> =
        ring.chunks(BLOCK as usize).map(|bytes| JournalBlock::decode(bytes, superblock.journal)).collect();
    let mut runs = Vec::new();
    let mut sequence = superblock.journal_start;
    while sequence - superblock.journal_start < JOURNAL_BLOCKS {
        let Some(block) = &blocks[(sequence % JOURNAL_BLOCKS) as usize] else { break };
        if block.sequence != sequence {
            break;
        }
        current.epoch = current.epoch.max(block.epoch.min(crate::kind::LAST_EPOCH));
        *last_sign = (*last_sign).max(block.time);
        runs.extend(block.runs.iter().map(|(start, end)| ((*start).min(granules), (*end).min(granules))));
        sequence += 1;
    }
    // A power cut takes blocks of the last batch alone. If a later batch is there, this block was durable once.
    if blocks.iter().flatten().any(|block| block.batch > sequence) {
        return Err(HistoryError::Damaged(Damage::Journal { sequence }));
    }
    // Joined first, so that the work has a bound, whatever the journal says.
    for (start, end) in joined(runs) {
        current.set_run(start, end, Run::Kind(ChangeKind::Data));
    }
    Ok(sequence)
}

impl PageEntry {
    /// Whether the whole page is known to have changed, with bytes to be read, after that epoch.
    pub(crate) fn is_all_data_since(&self, epoch: u32) -> bool {
        self.low > epoch
            && match self.body {
                PageBody::Uniform(counter) => counter.kind() == ChangeKind::Data,
                PageBody::Stored { all_data, .. } => all_data,
            }
    }
}
