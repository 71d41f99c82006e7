//! A backup session: leaves in, a restore point out.
//!
//! ```text
//! put_leaf ─► batches ─► threads: hash, known?, compress, seal ─► packs ─► store
//!                          │ references, applied in the order of the calls
//!                          ▼
//!                  trees (only what changes) ─► node frames ─► the point, by put_new
//! ```
//! Crash anywhere before the point is put: packs that nothing references, found again by the next session through the index, or removed by
//! a prune. After it: the point, whole. No other state.

use crate::error::{RepositoryError, Result};
use crate::id::Id;
use crate::index::Index;
use crate::lease::Held;
use crate::node::Shape;
use crate::packer::{Batch, Changes, Counts, Packer};
use crate::point::{Consistency, MAX_DISK, Made, Point, PointDisk, name_of};
use crate::records::{self, Tombstone, forgotten_name, tombstone_name};
use crate::repository::{Inner, Repository};
use crate::store::StoreErrorKind;
use crate::tree_builder::TreeBuilder;
use std::collections::{BTreeMap, HashSet};
use std::ops::Range;
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::thread::JoinHandle;

/// Bytes of leaves that a thread takes at once.
const BATCH_BYTES: usize = 2 << 20;
/// Results that wait for an earlier one before the session waits too.
const MAX_WAITING: usize = 1024;

/// A disk that is to be backed up.
#[derive(Debug, Clone)]
pub struct DiskPlan {
    /// Its name within the machine.
    pub name: String,
    /// Its size in bytes, at most 2^56.
    pub size: u64,
    /// Whether what is not mentioned stays as in the predecessor's disk of this name. If not, it is zero.
    pub inherit: bool,
    /// How the caller knows what changed; recorded.
    pub made: Made,
    /// What the caller wants to find again; recorded.
    pub identity: Vec<(String, String)>,
}

/// How a session works.
#[derive(Debug, Clone)]
pub struct BackupOptions {
    /// The point that is built upon.
    pub predecessor: Option<Id>,
    /// Threads that compress and put packs; 0: the caller's own. Each has one pack in memory.
    pub threads: usize,
    /// Whether leaves are looked for in the whole repository. Without it only what the predecessor has at the same place is found: right for an
    /// increment, where looking elsewhere seldom pays.
    pub search: bool,
    /// Directory for the index that `search` uses; without one, a million leaves are found again.
    pub cache: Option<PathBuf>,
}

impl Default for BackupOptions {
    fn default() -> BackupOptions {
        BackupOptions { predecessor: None, threads: 2, search: true, cache: None }
    }
}

/// What is recorded beside the disks.
#[derive(Debug, Clone)]
pub struct PointFacts {
    /// Name of the machine.
    pub machine: String,
    /// The instant that the disks show, in milliseconds since 1970.
    pub created_ms: u64,
    /// How consistent the disks are.
    pub consistency: Consistency,
    /// Names and contents of what belongs to the machine besides, each at most 16 MiB.
    pub attachments: Vec<(String, Vec<u8>)>,
    /// Free text, at most 4 KiB.
    pub note: String,
}

struct Disk {
    plan: DiskPlan,
    shape: Shape,
    tree: TreeBuilder,
}

type Outcome = (u64, usize, Result<Changes>);

struct Threads {
    jobs: SyncSender<Batch>,
    outcomes: Receiver<Outcome>,
    handles: Vec<JoinHandle<Packer>>,
    under_way: u64,
}

/// A session that makes one restore point. Dropped without `finish`, it makes none, and what it stored is found by the next.
pub struct Backup {
    inner: Arc<Inner>,
    lease: Held,
    predecessor: Option<Point>,
    disks: Vec<Disk>,
    index: Arc<RwLock<Index>>,
    threads: Option<Threads>,
    /// Packs nodes, and leaves too when there are no threads.
    packer: Packer,
    batch: Option<Batch>,
    next_number: u64,
    next_applied: u64,
    waiting: BTreeMap<u64, (usize, Changes)>,
    poisoned: bool,
}

impl Backup {
    /// Begins a session.
    pub fn begin(repository: &Repository, options: &BackupOptions, plans: Vec<DiskPlan>) -> Result<Backup> {
        let inner = repository.inner.clone();
        if let Some(plan) = plans.iter().find(|p| p.size > MAX_DISK) {
            let text = format!("disk {}: {} bytes, at most {MAX_DISK} can be kept", plan.name, plan.size);
            return Err(RepositoryError::Invalid(text));
        }
        // The order matters, and the proof in docs/repository.md rests on it: first the lease, which stops every deletion; then what is
        // inherited from, and the tombstones; then the lease says both; then what packs there are.
        let mut lease = Held::take(inner.clone(), false)?;
        let (predecessor, disks, index, packer) = Backup::prepare(&inner, &mut lease, options, plans)?;
        let threads = (options.threads > 0).then(|| Threads::start(&inner, &index, options.threads));
        Ok(Backup {
            inner,
            lease,
            predecessor,
            disks,
            index,
            threads,
            packer,
            batch: None,
            next_number: 0,
            next_applied: 0,
            waiting: BTreeMap::new(),
            poisoned: false,
        })
    }

    #[allow(clippy::type_complexity)]
    fn prepare(
        inner: &Arc<Inner>,
        lease: &mut Held,
        options: &BackupOptions,
        plans: Vec<DiskPlan>,
    ) -> Result<(Option<Point>, Vec<Disk>, Arc<RwLock<Index>>, Packer)> {
        let store = &*inner.store;
        let predecessor = options.predecessor.map(|id| usable_point(inner, id)).transpose()?;
        let mut dying = HashSet::new();
        let mut seen = Vec::new();
        for id in records::ids(store, "tombstones/")? {
            // One that cannot be read is not said to be seen, so it deletes nothing while this lease lasts.
            if let Ok(Some(tombstone)) = records::read(store, &inner.secret, &tombstone_name(id), id, Tombstone::parse)
            {
                seen.push(id);
                dying.extend(tombstone.packs);
            }
        }
        let mut roots = Vec::new();
        let mut bases = Vec::new();
        for plan in &plans {
            let base = match &predecessor {
                Some(point) if plan.inherit => Some(point.disk(&plan.name).ok_or_else(|| {
                    let text = format!(
                        "point {} has no disk {} to inherit from; back it up as a full one",
                        point.id, plan.name
                    );
                    RepositoryError::Invalid(text)
                })?),
                _ if plan.inherit => {
                    let text = format!(
                        "disk {} is to inherit, and no predecessor is named; name one, or back it up in full",
                        plan.name
                    );
                    return Err(RepositoryError::Invalid(text));
                }
                _ => None,
            };
            let old = Shape::of(base.map_or(plan.size, |b| b.size), inner.leaf_bytes());
            let root = base.and_then(|b| b.root);
            roots.extend(root.map(|root| (old.depth, root)));
            bases.push((root, old, base.map_or(plan.size, |b| b.size)));
        }
        lease.settle(roots, seen)?;
        let mut index = Index::open(inner, options.cache.as_deref().filter(|_| options.search))?;
        if options.search {
            index.refresh(inner, &dying)?;
        }
        let index = Arc::new(RwLock::new(index));
        let mut packer = Packer::new(inner.clone(), index.clone());
        let mut disks = Vec::new();
        for (plan, (root, old, old_size)) in plans.into_iter().zip(bases) {
            let shape = Shape::of(plan.size, inner.leaf_bytes());
            let mut tree = TreeBuilder::new(root, old, shape, &mut packer)?;
            cut_last_leaf(inner, &mut packer, &mut tree, plan.size, old_size)?;
            disks.push(Disk { plan, shape, tree });
        }
        Ok((predecessor, disks, index, packer))
    }

    /// Gives one leaf of a disk: `bytes` are a whole leaf, or up to the disk's end.
    pub fn put_leaf(&mut self, disk: usize, index: u64, bytes: &[u8]) -> Result<()> {
        self.guard()?;
        let leaf = self.inner.leaf_bytes();
        let plan = self.disks.get(disk).ok_or_else(|| no_disk(disk))?;
        let expected = plan.plan.size.saturating_sub(index.saturating_mul(leaf)).min(leaf);
        if bytes.len() as u64 != expected || expected == 0 {
            let text =
                format!("leaf {index} of disk {}: {expected} bytes expected, {} given", plan.plan.name, bytes.len());
            return Err(RepositoryError::Invalid(text));
        }
        self.run(|session| session.put_valid_leaf(disk, index, bytes))
    }

    fn put_valid_leaf(&mut self, disk: usize, index: u64, bytes: &[u8]) -> Result<()> {
        self.lease.renew_if_due()?;
        if self.batch.as_ref().is_some_and(|b| b.disk != disk) {
            self.submit()?;
        }
        let before = self.disks[disk].tree.get(index, &mut self.packer)?;
        let leaf = self.inner.settings.leaf_bytes as usize;
        let number = self.next_number;
        let batch = self.batch.get_or_insert_with(|| Batch {
            number,
            disk,
            bytes: Vec::with_capacity(BATCH_BYTES.max(leaf)),
            leaves: Vec::new(),
        });
        batch.bytes.extend_from_slice(bytes);
        // What is behind the disk's end is zero, so that a disk that grows later shows no old bytes.
        batch.bytes.resize((batch.leaves.len() + 1) * leaf, 0);
        batch.leaves.push((index, before));
        if batch.bytes.len() + leaf > BATCH_BYTES { self.submit() } else { Ok(()) }
    }

    /// Says that leaves are zero. The range is cut to the disk.
    pub fn zero(&mut self, disk: usize, leaves: Range<u64>) -> Result<()> {
        self.guard()?;
        let plan = self.disks.get(disk).ok_or_else(|| no_disk(disk))?;
        let range = leaves.start.min(plan.shape.leaves)..leaves.end.min(plan.shape.leaves);
        if range.is_empty() {
            return Ok(());
        }
        self.run(|session| {
            session.lease.renew_if_due()?;
            session.submit()?;
            let number = session.next_number;
            session.next_number += 1;
            session.waiting.insert(number, (disk, vec![(range, None)]));
            session.apply()
        })
    }

    /// Renews the lease if it is time to. Every call that gives data does; call this when there is none for minutes.
    pub fn keep_alive(&mut self) -> Result<()> {
        self.guard()?;
        self.run(|session| session.lease.renew_if_due())
    }

    /// Stores what is left, and makes the point.
    pub fn finish(mut self, facts: PointFacts) -> Result<(Point, Counts)> {
        self.guard()?;
        self.submit()?;
        let mut counts = Counts::default();
        if let Some(threads) = self.threads.take() {
            self.settle_threads(threads, &mut counts)?;
        }
        self.apply()?;
        let mut disks = Vec::new();
        for disk in &mut self.disks {
            let root = disk.tree.write(&mut self.packer)?;
            let DiskPlan { name, size, made, identity, .. } = disk.plan.clone();
            disks.push(PointDisk { name, size, made, identity, root });
        }
        self.packer.put()?;
        counts.add(self.packer.counts);
        let Inner { store, host, secret, .. } = &*self.inner;
        let id = Id::timed(&**host, facts.created_ms)?;
        let predecessor = self.predecessor.as_ref().map(|p| (p.id, self.inner.digest(p)));
        let PointFacts { machine, created_ms, consistency, attachments, note } = facts;
        let point = Point { id, created_ms, machine, disks, consistency, attachments, predecessor, note };
        if !point.fits() {
            let text = "a name, a value or the note has more than 4 KiB, or an attachment more than 16 MiB; shorten it"
                .to_owned();
            return Err(RepositoryError::Invalid(text));
        }
        // Everything that the point names is durable. Crash: before the put there is no point, after it there is, whole.
        self.lease.lease.point = Some(id);
        self.lease.renew()?;
        records::put_new(&**store, &**host, secret, &name_of(id), point.to_bytes())?;
        // A prune that took the lease for expired said so before it looked for points. So either it has seen this one, or this sees what it said,
        // and the point is taken back: packs that it names may be gone.
        if let Err(lost) = self.lease.check() {
            let mark = records::forgotten_bytes(id, host.now_ms());
            records::put_new(&**store, &**host, secret, &forgotten_name(id), mark)?;
            return Err(lost);
        }
        // The point is made: a lease that is left runs out, and an index that cannot be saved is built again.
        let _ = self.lease.end();
        let _ = self.index.write().unwrap_or_else(PoisonError::into_inner).save();
        Ok((point, counts))
    }

    /// Ends the session without a point. What was stored stays for the next one.
    pub fn abandon(mut self) -> Result<()> {
        if let Some(threads) = self.threads.take() {
            let _ = self.settle_threads(threads, &mut Counts::default()); // What fails now was not needed.
        }
        let _ = self.packer.put();
        let _ = self.index.write().unwrap_or_else(PoisonError::into_inner).save();
        self.lease.end()
    }

    fn guard(&self) -> Result<()> {
        if self.poisoned { Err(RepositoryError::Poisoned) } else { Ok(()) }
    }

    fn run(&mut self, call: impl FnOnce(&mut Backup) -> Result<()>) -> Result<()> {
        let result = call(self);
        self.poisoned |= result.is_err();
        result
    }

    /// Hands the batch to a thread, or packs it here.
    fn submit(&mut self) -> Result<()> {
        let Some(batch) = self.batch.take() else { return Ok(()) };
        self.next_number += 1;
        match &mut self.threads {
            None => {
                let changes = self.packer.take(&batch)?;
                self.waiting.insert(batch.number, (batch.disk, changes));
            }
            Some(threads) => {
                threads.jobs.send(batch).map_err(|_| RepositoryError::Poisoned)?;
                threads.under_way += 1;
                while let Ok((number, disk, changes)) = threads.outcomes.try_recv() {
                    threads.under_way -= 1;
                    self.waiting.insert(number, (disk, changes?));
                }
            }
        }
        self.apply()?;
        while self.waiting.len() > MAX_WAITING
            && let Some(threads) = &mut self.threads
        {
            let (number, disk, changes) = threads.outcomes.recv().map_err(|_| RepositoryError::Poisoned)?;
            threads.under_way -= 1;
            self.waiting.insert(number, (disk, changes?));
            self.apply()?;
        }
        Ok(())
    }

    /// Enters results into the trees, in the order of the calls that caused them.
    fn apply(&mut self) -> Result<()> {
        while let Some((disk, changes)) = self.waiting.remove(&self.next_applied) {
            self.next_applied += 1;
            for (range, to) in changes {
                self.disks[disk].tree.set(range, to, &mut self.packer)?;
            }
        }
        Ok(())
    }

    /// Waits for the threads, and puts their open packs but for one, which takes the nodes: a small increment is one pack.
    fn settle_threads(&mut self, threads: Threads, counts: &mut Counts) -> Result<()> {
        let Threads { jobs, outcomes, handles, .. } = threads;
        drop(jobs);
        let mut failure = None;
        for (number, disk, changes) in outcomes {
            match changes {
                Ok(changes) => drop(self.waiting.insert(number, (disk, changes))),
                Err(e) => drop(failure.get_or_insert(e)),
            }
        }
        let mut packers: Vec<Packer> = handles.into_iter().filter_map(|handle| handle.join().ok()).collect();
        packers.sort_by_key(|p| p.open_pack().map_or(usize::MAX, |pack| pack.len()));
        for packer in &mut packers {
            if failure.is_none() {
                failure = self.packer.adopt(packer).err();
            }
            counts.add(packer.counts);
        }
        self.apply()?;
        match failure {
            Some(e) => Err(e),
            None if self.next_applied == self.next_number => Ok(()),
            None => Err(RepositoryError::Poisoned), // A thread panicked.
        }
    }
}

impl Threads {
    fn start(inner: &Arc<Inner>, index: &Arc<RwLock<Index>>, count: usize) -> Threads {
        let (jobs, queue) = sync_channel::<Batch>(count);
        let queue = Arc::new(Mutex::new(queue));
        let (done, outcomes): (Sender<Outcome>, _) = channel();
        let handles = (0..count)
            .map(|_| {
                let (queue, done) = (queue.clone(), done.clone());
                let mut packer = Packer::new(inner.clone(), index.clone());
                std::thread::spawn(move || {
                    loop {
                        let next = crate::repository::lock(&queue).recv();
                        let Ok(batch) = next else { return packer };
                        let changes = packer.take(&batch);
                        if done.send((batch.number, batch.disk, changes)).is_err() {
                            return packer;
                        }
                    }
                })
            })
            .collect();
        Threads { jobs, outcomes, handles, under_way: 0 }
    }
}

fn no_disk(disk: usize) -> RepositoryError {
    RepositoryError::Invalid(format!("the session has no disk number {disk}"))
}

/// A point that may be built upon: there, and not forgotten.
fn usable_point(inner: &Inner, id: Id) -> Result<Point> {
    let point = inner.point(id)?.ok_or_else(|| RepositoryError::NoPoint { name: id.to_string() })?;
    let mark = forgotten_name(id);
    match inner.store.look(&mark) {
        Err(e) if e.kind == StoreErrorKind::Missing => Ok(point),
        Err(e) => Err(RepositoryError::store(&mark, "look at")(e)),
        Ok(_) => Err(RepositoryError::NoPoint { name: format!("{id} (it is forgotten)") }),
    }
}

/// The last leaf of a disk that has shrunk: what is behind the new end becomes zero.
fn cut_last_leaf(inner: &Inner, packer: &mut Packer, tree: &mut TreeBuilder, size: u64, old_size: u64) -> Result<()> {
    let leaf = inner.leaf_bytes();
    let (last, rest) = (size / leaf, size % leaf);
    if size >= old_size || rest == 0 {
        return Ok(());
    }
    let Some(before) = tree.get(last, packer)? else { return Ok(()) };
    let mut bytes = inner.leaves(&[before]).swap_remove(0)?;
    bytes[rest as usize..].fill(0);
    let batch = Batch { number: 0, disk: 0, bytes, leaves: vec![(last, Some(before))] };
    for (range, to) in packer.take(&batch)? {
        tree.set(range, to, packer)?;
    }
    // Not one of the caller's leaves.
    packer.counts = Counts { leaves: 0, zero: 0, unchanged: 0, known: 0, ..packer.counts };
    Ok(())
}
