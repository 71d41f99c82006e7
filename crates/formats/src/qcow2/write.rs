//! Planning writes: in place where that is possible, into new clusters otherwise.
//!
//! A new cluster whose space reads as zero, in place of bytes that read as zero, is linked at once and
//! needs no ticket: whatever the storage keeps of the write, the guest sees old or new bytes. Every other
//! new cluster is linked by the commit, after its bytes were written. The tables on the storage follow at the next
//! flush, behind a sync of all bytes written until then (`flush.rs`).

use super::allocator::{Allocator, Run};
use super::entry::{CompressedAt, L2Entry, SUBCLUSTERS, State, bits};
use super::image::Image;
use super::slices::Slice;
use disk::{Below, ByteRange, DiskError, ErrorKind, Fill, Operation, Result, Ticket, TicketId, WritePlan};
use std::rc::Rc;

/// New clusters, or new subclusters of a cluster, that wait for their bytes.
pub(super) struct PendingWrite {
    slice: Rc<Slice>,
    /// Guest cluster number of the first.
    first: u64,
    count: u64,
    /// Host offset of the first.
    host: u64,
    /// Were taken from the allocator (not: were there already, unused).
    allocated: bool,
    /// Only these subclusters of the one cluster become data.
    subclusters: Option<u32>,
}

/// What a run of clusters (or subclusters of one cluster) needs before it can be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Need {
    /// Nothing.
    InPlace,
    /// New clusters for bytes that read as zero.
    NewForZeroes,
    /// New clusters, around the write filled with the present bytes.
    NewForPresent,
    /// The cluster is there, its bytes mean nothing yet.
    Own(Fill),
}

impl Image {
    /// The write's plan, if its beginning is in place.
    #[inline]
    pub(super) fn plan_in_place(&self, range: ByteRange) -> Option<WritePlan> {
        let covers_mapped = self.allocator.as_ref().is_some_and(Allocator::covers_mapped);
        if !self.writing.get() || self.poisoned.get() || self.suspicious.get() || !covers_mapped {
            return None;
        }
        let index = self.slices.geometry.slice_of(range.offset());
        self.slices.with(index, |slice| self.run_in_place(slice, range)).flatten()
    }

    /// The longest beginning of the range that stands in a row in own clusters.
    fn run_in_place(&self, slice: &Slice, range: ByteRange) -> Option<WritePlan> {
        let cluster_size = self.cluster_size();
        let mut at = self.slices.geometry.entry_of(range.offset());
        let first = slice.get(at);
        let mut end = range.offset();
        let mut host = first.host();
        while end < range.end() && at < slice.entries() {
            let entry = slice.get(at);
            if !entry.is_copied() || entry.is_compressed() || entry.host() != host {
                break;
            }
            let cluster_end = (end & !(cluster_size - 1)) + cluster_size;
            if self.extended {
                if entry.bitmap != u64::from(u32::MAX) {
                    end = self.data_subclusters_end(entry, end, cluster_end);
                    if end < cluster_end {
                        break;
                    }
                } else {
                    end = cluster_end;
                }
            } else {
                if entry.state(false, 0) != State::Data {
                    break;
                }
                end = cluster_end;
            }
            at += 1;
            host += cluster_size;
        }
        (end > range.offset()).then(|| WritePlan {
            range: range.prefix(end - range.offset()),
            storage: self.data_storage().0,
            offset: first.host() + (range.offset() & (cluster_size - 1)),
            ticket: None,
        })
    }

    /// Where the data subclusters that begin at `from` end, at most at `cluster_end`.
    fn data_subclusters_end(&self, entry: L2Entry, from: u64, cluster_end: u64) -> u64 {
        let unit_bits = self.cluster_bits - 5;
        let mut end = from;
        while end < cluster_end {
            let sub = (end >> unit_bits) as u32 % SUBCLUSTERS;
            if entry.state(true, sub) != State::Data {
                break;
            }
            end = ((end >> unit_bits) + 1) << unit_bits;
        }
        end
    }

    /// Plans the beginning of a write.
    pub(super) async fn plan_write(&self, range: ByteRange, below: Below) -> Result<WritePlan> {
        self.prepare_for_writing().await?;
        let index = self.slices.geometry.slice_of(range.offset());
        let slice = self.writable_slice(index).await?;
        self.allocator()?.cover_mapped().await?;
        let slice_end = self.slices.geometry.guest_of(index + 1);
        let range = range.prefix(slice_end - range.offset());
        let first = range.offset() >> self.cluster_bits;
        let (mut lock, range) = loop {
            // In place first: what others do to the tables does not matter for it.
            let entry = slice.get(self.slices.geometry.entry_of(range.offset()));
            self.check_entry(range.offset(), entry)?;
            if entry.is_copied() {
                self.check_counted(range.offset(), entry)?;
            }
            if let Some(plan) = self.run_in_place(&slice, range) {
                return Ok(plan);
            }
            if !self.locked.borrow().contains(&first) {
                let last = (range.end() - 1) >> self.cluster_bits;
                let count = {
                    let locked = self.locked.borrow();
                    (first..=last).take_while(|cluster| !locked.contains(cluster)).count() as u64
                };
                let lock = self.lock_clusters(first, count).await; // Nobody holds them: does not wait.
                break (lock, range.prefix(((first + count) << self.cluster_bits) - range.offset()));
            }
            let listener = self.unlocked.listen();
            if self.locked.borrow().contains(&first) {
                listener.await;
            }
        };
        let at = self.slices.geometry.entry_of(range.offset());
        let (need, run) = self.need(&slice, at, range, below);
        let count = ((run.end() - 1) >> self.cluster_bits) - first + 1;
        lock.shorten(count);
        match need {
            Need::InPlace => {
                Err(DiskError::new(ErrorKind::Io, Operation::Write).because("a cluster changed under its lock"))
            }
            Need::Own(fill) => {
                let host = slice.get(at).host();
                let (blocks, subclusters) = self.blocks_of(run);
                let pending = PendingWrite { slice, first, count, host, allocated: false, subclusters };
                lock.keep();
                Ok(self.ticket(pending, run, blocks, fill))
            }
            Need::NewForZeroes | Need::NewForPresent => {
                let found = self.take_clusters(first, count).await?;
                lock.shorten(found.count);
                let whole = ByteRange::new(first << self.cluster_bits, found.count << self.cluster_bits);
                let run = run.intersect(whole);
                let host = found.first << self.cluster_bits;
                if need == Need::NewForZeroes && found.zeroed {
                    let subclusters = self.blocks_of(run).1;
                    for n in 0..found.count {
                        let cluster_host = host + (n << self.cluster_bits);
                        self.link(&slice, first + n, self.written(&slice, first + n, cluster_host, subclusters));
                    }
                    drop(lock);
                    let plan = self.run_in_place(&slice, run);
                    return plan.ok_or_else(|| {
                        DiskError::new(ErrorKind::Io, Operation::Write).because("a linked cluster cannot be written")
                    });
                }
                let old = slice.get(at);
                let whole_clusters = !self.extended || old.is_compressed() || old.has_host();
                let (blocks, subclusters) = if whole_clusters { (whole, None) } else { self.blocks_of(run) };
                let fill = if need == Need::NewForZeroes { Fill::Zeroes } else { Fill::Present };
                let allocated = self.data_file.is_none();
                let pending = PendingWrite { slice, first, count: found.count, host, allocated, subclusters };
                lock.keep();
                Ok(self.ticket(pending, run, blocks, fill))
            }
        }
    }

    /// What the beginning of the range needs, and how far the same need goes (in guest bytes).
    fn need(&self, slice: &Slice, at: usize, range: ByteRange, below: Below) -> (Need, ByteRange) {
        if self.extended {
            return self.need_of_subclusters(slice.get(at), range, below);
        }
        let cluster_size = self.cluster_size();
        let need_of = |entry: L2Entry| match entry.state(false, 0) {
            State::Data if entry.is_copied() => Need::InPlace,
            State::ZeroAllocated if entry.is_copied() => Need::Own(Fill::Zeroes),
            State::ZeroPlain | State::ZeroAllocated => Need::NewForZeroes,
            State::Absent | State::AbsentAllocated if below == Below::Zeroes => Need::NewForZeroes,
            State::Absent | State::AbsentAllocated | State::Data | State::Compressed => Need::NewForPresent,
        };
        let first = slice.get(at);
        let need = need_of(first);
        let mut end = (range.offset() & !(cluster_size - 1)) + cluster_size;
        let mut n = 1;
        while end < range.end() && at + n < slice.entries() {
            let entry = slice.get(at + n);
            let in_row = !matches!(need, Need::Own(_)) || entry.host() == first.host() + n as u64 * cluster_size;
            if need_of(entry) != need || !in_row {
                break;
            }
            n += 1;
            end += cluster_size;
        }
        (need, range.prefix(end - range.offset()))
    }

    fn need_of_subclusters(&self, entry: L2Entry, range: ByteRange, below: Below) -> (Need, ByteRange) {
        let cluster_size = self.cluster_size();
        let cluster_end = (range.offset() & !(cluster_size - 1)) + cluster_size;
        let in_cluster = range.prefix(cluster_end - range.offset());
        let own = entry.has_host() && entry.is_copied() && !entry.is_compressed();
        if entry.is_compressed() || (entry.has_host() && !own) {
            return (Need::NewForPresent, in_cluster);
        }
        let unit_bits = self.cluster_bits - 5;
        let need_of = |guest: u64| match entry.state(true, (guest >> unit_bits) as u32 % SUBCLUSTERS) {
            State::Data => Need::InPlace,
            State::ZeroPlain | State::ZeroAllocated if own => Need::Own(Fill::Zeroes),
            State::ZeroPlain | State::ZeroAllocated => Need::NewForZeroes,
            _ if own && below == Below::Zeroes => Need::Own(Fill::Zeroes),
            _ if own => Need::Own(Fill::Present),
            _ if below == Below::Zeroes => Need::NewForZeroes,
            _ => Need::NewForPresent,
        };
        let need = need_of(range.offset());
        let mut end = range.offset();
        while end < in_cluster.end() && need_of(end) == need {
            end = ((end >> unit_bits) + 1) << unit_bits;
        }
        (need, in_cluster.prefix(end - range.offset()))
    }

    /// The whole units around a run, and for extended entries which subclusters these are.
    fn blocks_of(&self, run: ByteRange) -> (ByteRange, Option<u32>) {
        if !self.extended {
            return (run.align_out(self.cluster_size()), None);
        }
        let unit_bits = self.cluster_bits - 5;
        let blocks = run.align_out(1 << unit_bits);
        let first = (blocks.offset() >> unit_bits) as u32 % SUBCLUSTERS;
        (blocks, Some(bits(first, (blocks.len() >> unit_bits) as u32)))
    }

    pub(super) fn all_subclusters(&self) -> u64 {
        if self.extended { u64::from(u32::MAX) } else { 0 }
    }

    fn ticket(&self, pending: PendingWrite, run: ByteRange, blocks: ByteRange, fill: Fill) -> WritePlan {
        let id = TicketId(self.next_ticket.get());
        self.next_ticket.set(id.0 + 1);
        let offset = pending.host + (run.offset() - (pending.first << self.cluster_bits));
        self.pending.borrow_mut().insert(id, pending);
        let fill = if blocks == run { Fill::Nothing } else { fill };
        WritePlan { range: run, storage: self.data_storage().0, offset, ticket: Some(Ticket { id, blocks, fill }) }
    }

    /// Up to `count` host clusters in a row for the guest clusters from `first` on.
    async fn take_clusters(&self, first: u64, count: u64) -> Result<Run> {
        let Some(data) = &self.data_file else {
            let allocator = self.allocator()?;
            if allocator.refcounts.needs_flush() {
                self.flush_all().await?;
            }
            return allocator.allocate(count, &self.epochs).await;
        };
        // In a data file every cluster has its place: where it is in the guest's disk.
        let range = ByteRange::new(first << self.cluster_bits, count << self.cluster_bits);
        let zeroed = data.limits().grows_zeroed && {
            let present = range.intersect(ByteRange::between(0, data.size()));
            present.is_empty() || {
                let extent = data.extent(present).await?;
                extent.hole && extent.range == present
            }
        };
        Ok(Run { first, count, zeroed })
    }

    /// Gives an entry to a guest cluster; the reference that the old one held is dropped.
    pub(super) fn link(&self, slice: &Rc<Slice>, cluster: u64, entry: L2Entry) {
        let at = self.slices.geometry.entry_of(cluster << self.cluster_bits);
        let old = slice.get(at);
        if old == entry {
            return;
        }
        self.slices.set(slice, at, entry);
        if old.is_compressed() {
            let CompressedAt { offset, len } = CompressedAt::decode(old.descriptor, self.cluster_bits);
            let clusters = (offset >> self.cluster_bits)..=((offset + len - 1) >> self.cluster_bits);
            self.forget_packing(clusters.clone());
            self.unlinked.borrow_mut().extend(clusters);
            self.decoded.borrow_mut().clear();
        } else if self.data_file.is_none() && old.has_host() && old.host() != entry.host() {
            self.unlinked.borrow_mut().push(old.host() >> self.cluster_bits);
        }
    }

    /// The entry of a cluster whose bytes (or only those of some subclusters) stand at `host`.
    fn written(&self, slice: &Slice, cluster: u64, host: u64, subclusters: Option<u32>) -> L2Entry {
        let Some(mask) = subclusters.map(u64::from) else {
            return L2Entry::data(host, self.all_subclusters());
        };
        let old = slice.get(self.slices.geometry.entry_of(cluster << self.cluster_bits)).bitmap;
        L2Entry::data(host, (old | mask) & !(mask << 32))
    }

    /// Links what a ticket stands for; its bytes have been written.
    pub(super) fn commit(&self, ticket: TicketId) -> Result<()> {
        let pending = self.pending.borrow_mut().remove(&ticket).expect("tickets are committed once");
        let PendingWrite { slice, first, count, host, subclusters, .. } = pending;
        for n in 0..count {
            let cluster_host = host + (n << self.cluster_bits);
            let entry = self.written(&slice, first + n, cluster_host, subclusters);
            self.link(&slice, first + n, entry);
        }
        self.unlock_clusters(first, count);
        self.refuse_if_poisoned()
    }

    /// Gives a ticket's clusters up. A request may still be on its way to them, so nobody gets them before
    /// the image is opened anew.
    pub(super) fn abort(&self, ticket: TicketId) {
        let pending = self.pending.borrow_mut().remove(&ticket).expect("tickets are aborted once");
        if pending.allocated
            && let Some(allocator) = &self.allocator
        {
            let first = pending.host >> self.cluster_bits;
            allocator.given_up.borrow_mut().extend(first..first + pending.count);
        }
        self.unlock_clusters(pending.first, pending.count);
    }

    /// The slice, in an L2 table of which nobody else holds a reference; made if there is none.
    pub(super) async fn writable_slice(&self, index: u64) -> Result<Rc<Slice>> {
        loop {
            if self.l2_table_is_own(index)
                && let Some(slice) = self.slice(index).await?
            {
                return Ok(slice);
            }
            // The entry has no offset: made below.
            let _one = self.making_table.lock().await;
            if self.l2_table_is_own(index) && self.l2_table(index)?.is_some() {
                continue; // Somebody else made it meanwhile.
            }
            self.make_table(index).await?;
        }
    }

    /// Makes an own L2 table, empty (its space reads as zero) or as a copy of the one that snapshots share.
    ///
    /// Crash: the new table's bytes (zeroes, or the copy) are written before the flush that writes the L1
    /// entry, and that flush syncs first. Until then the old entry holds.
    async fn make_table(&self, index: u64) -> Result<()> {
        let l1_index = self.slices.geometry.l1_of(index);
        let shared = self.l2_table(index)?;
        let allocator = self.allocator()?;
        let cluster = allocator.allocate_table(1).await?;
        let offset = cluster << self.cluster_bits;
        if let Some(shared) = shared {
            // Nobody changes a shared table, so its slices in memory are clean and stay right.
            let copied = match self.storage.read_new(shared, self.cluster_size() as usize).await {
                Ok(table) => self.storage.write(offset, table).await.map(drop),
                Err(error) => Err(error),
            };
            if let Err(error) = copied {
                allocator.give_up_table(cluster, 1);
                return Err(error);
            }
            // Not ours any more.
            allocator.metadata.borrow_mut().remove(&(shared >> self.cluster_bits));
            self.unlinked.borrow_mut().push(shared >> self.cluster_bits);
        }
        self.set_l1(l1_index, offset | super::entry::COPIED);
        Ok(())
    }

    pub(super) fn set_l1(&self, index: usize, entry: u64) {
        self.l1.borrow_mut()[index] = entry;
        self.dirty_l1.borrow_mut().insert(index / 64);
    }

    /// What the first write owes: see `announce_writing` in `lifecycle.rs`.
    pub(super) async fn prepare_for_writing(&self) -> Result<()> {
        self.refuse_if_poisoned()?;
        if self.writing.get() {
            return Ok(());
        }
        let _one = self.begin_writing.lock().await;
        if !self.writing.get() {
            let announced = self.announce_writing().await;
            self.poison_on_error(announced)?;
            self.writing.set(true);
        }
        Ok(())
    }
}
