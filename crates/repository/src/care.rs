//! Looking after a repository: is all there (`check`), is all readable (`verify`), how much is it (`stats`).

use crate::error::{Damage, DamageReason, RepositoryError, Result};
use crate::id::Id;
use crate::node::{MAX_NODE, Node, Reference, Shape};
use crate::pack::{FrameKind, Location, read_table};
use crate::records::{self, Relocation, relocation_name};
use crate::repository::{Inner, Repository, lock};
use crate::tree::{Step, Walk};
use std::collections::{HashMap, HashSet};
use std::ops::Range;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

/// Leaves that a thread verifies at once.
const VERIFY_LEAVES: usize = 16;
/// Leaves that are remembered to be good, about 128 MiB: with more, some are read again for the next point.
const MAX_GOOD: usize = 3 << 20;
/// Findings that are listed; more are counted.
const MAX_FINDINGS: usize = 10_000;

/// Something that is wrong, and whom it hits.
#[derive(Debug)]
pub struct Finding {
    /// The point, if it is one's content.
    pub point: Option<Id>,
    /// The disk's name, if it is one's content.
    pub disk: Option<String>,
    /// Which bytes of the disk.
    pub range: Range<u64>,
    /// What is wrong.
    pub error: RepositoryError,
}

/// What `check` and `verify` saw.
#[derive(Debug, Default)]
pub struct Report {
    /// Points looked at.
    pub points: u64,
    /// Nodes or leaves looked at, each once.
    pub frames: u64,
    /// Plain bytes that were read and proven.
    pub bytes: u64,
    /// What is wrong; empty if all is well.
    pub findings: Vec<Finding>,
    /// How many more than are listed.
    pub more_findings: u64,
}

impl Report {
    fn found(&mut self, finding: Finding) {
        if self.findings.len() < MAX_FINDINGS { self.findings.push(finding) } else { self.more_findings += 1 }
    }
}

/// How much there is.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Stats {
    /// Points that are not forgotten.
    pub points: u64,
    /// Sizes of their disks added up.
    pub disk_bytes: u64,
    /// Packs, and their bytes.
    pub packs: u64,
    /// Bytes of the packs.
    pub pack_bytes: u64,
    /// Packs that wait for their deletion.
    pub tombstoned_packs: u64,
    /// Leases of sessions at work, or that broke off less than their expiry ago.
    pub leases: u64,
}

/// What a verification reads.
#[derive(Debug, Clone, Copy)]
pub struct VerifyOptions {
    /// One in how many leaves; 1: all.
    pub one_in: u64,
    /// Which of them.
    pub seed: u64,
    /// Threads that read.
    pub threads: usize,
}

impl Default for VerifyOptions {
    fn default() -> VerifyOptions {
        VerifyOptions { one_in: 1, seed: 0, threads: 2 }
    }
}

/// Takes a node's reference, its level, its first leaf, and the node.
pub(crate) type See<'a> = dyn FnMut(&Reference, u8, u64, Result<&Node>) + 'a;

/// Every node of a tree that was not visited before, root first. Memory: 16 bytes for each visited node, and the pending ones.
pub(crate) fn each_node(inner: &Inner, root: Reference, depth: u8, visited: &mut HashSet<u128>, see: &mut See<'_>) {
    let mut pending = vec![(root, depth, 0_u64)];
    while let Some((at, level, first)) = pending.pop() {
        if !visited.insert(short(&at.location)) {
            continue;
        }
        match inner.node(&at, level) {
            Ok(node) => {
                see(&at, level, first, Ok(&node));
                if level > 1 {
                    let step = crate::node::covered(level - 1);
                    let below = node.children.iter().enumerate().rev();
                    pending.extend(below.filter_map(|(n, c)| Some(((*c)?, level - 1, first + n as u64 * step))));
                }
            }
            Err(e) => {
                visited.remove(&short(&at.location)); // So that it is found for every point that it hits.
                see(&at, level, first, Err(e));
            }
        }
    }
}

/// 128 bits for a place: random by the pack's name.
pub(crate) fn short(at: &Location) -> u128 {
    u128::from_le_bytes(at.pack.0) ^ u128::from(at.offset)
}

impl Repository {
    /// Whether every point's tree is whole, down to packs that exist and have frames where leaves are said to be. Reads points, nodes, and the tables of packs
    /// that are referenced, not the data.
    pub fn check(&self) -> Result<Report> {
        let report = self.check_points(true)?;
        // Points share most of their trees, and each node is looked at once: what is wrong is told for the first point that has it. To tell all
        // whom it hits, each point is looked at alone, which only damage makes worth its time.
        if report.findings.is_empty() { Ok(report) } else { self.check_points(false) }
    }

    fn check_points(&self, shared: bool) -> Result<Report> {
        let inner = &*self.inner;
        let mut report = Report::default();
        let mut packs: HashMap<Id, u64> = HashMap::new();
        let named = |name: &str| name.rsplit('/').next().and_then(Id::parse);
        inner
            .store
            .list("packs/", &mut |object| packs.extend(named(&object.name).map(|id| (id, object.length))))
            .map_err(RepositoryError::store("packs/", "list"))?;
        let mut tables = Tables { inner, packs, cache: HashMap::new() };
        let mut visited = HashSet::new();
        let ids: HashSet<Id> = self.point_ids()?.into_iter().collect();
        for (id, point) in self.points()? {
            report.points += 1;
            let point = match point {
                Ok(point) => point,
                Err(error) => {
                    report.found(Finding { point: Some(id), disk: None, range: 0..0, error });
                    continue;
                }
            };
            if let Some((before, digest)) = point.predecessor
                && ids.contains(&before)
                && let Ok(predecessor) = self.point(before)
                && inner.digest(&predecessor) != digest
            {
                let error = Damage::new(crate::point::name_of(before), 0, DamageReason::Identity).into();
                report.found(Finding { point: Some(id), disk: None, range: 0..0, error });
            }
            for disk in &point.disks {
                if !shared {
                    visited.clear();
                }
                let leaf = inner.leaf_bytes();
                let shape = Shape::of(disk.size, leaf);
                let Some(root) = disk.root else { continue };
                each_node(inner, root, shape.depth, &mut visited, &mut |at, level, first, node| {
                    report.frames += 1;
                    let mut lost = |first: u64, leaves: u64, error| {
                        let end = (first + leaves).saturating_mul(leaf).min(disk.size);
                        let range = (first * leaf).min(end)..end;
                        report.found(Finding { point: Some(id), disk: Some(disk.name.clone()), range, error });
                    };
                    let node = match node {
                        Ok(node) => node,
                        Err(error) => return lost(first, crate::node::covered(level), error),
                    };
                    // It has been read; but whoever rebuilds the index or packs anew needs its line in the table.
                    if let Some(error) = tables.wrong(at, FrameKind::Node) {
                        lost(0, 0, error);
                    }
                    let leaves = node.children.iter().enumerate().filter(|_| level == 1);
                    for (n, child) in leaves {
                        if let Some(error) = child.as_ref().and_then(|child| tables.wrong(child, FrameKind::Leaf)) {
                            lost(first + n as u64, 1, error);
                        }
                    }
                });
            }
        }
        Ok(report)
    }

    /// Reads leaves of all points, each once, and proves them; goes on after damage. With `one_in` above 1, a sample that `seed` chooses.
    pub fn verify(&self, options: VerifyOptions) -> Result<Report> {
        let inner = &*self.inner;
        let report = Mutex::new(Report::default());
        let (frames, bytes) = (AtomicU64::new(0), AtomicU64::new(0));
        // Leaves that were good once need not be read for another point; bad ones are told for each.
        let good = Mutex::new(HashSet::new());
        let (jobs, queue) =
            std::sync::mpsc::sync_channel::<(Id, String, u64, Vec<(u64, Reference)>)>(options.threads.max(1) * 2);
        let queue = Mutex::new(queue);
        let one_in = u128::from(options.one_in.max(1));
        let chosen = |at: &Location| {
            let mixed = (short(at) ^ u128::from(options.seed)).wrapping_mul(0x2d35_8dcc_aa6c_78a5_8bb8_4b93_962e_acc9);
            (mixed >> 64).is_multiple_of(one_in)
        };
        std::thread::scope(|scope| -> Result<()> {
            for _ in 0..options.threads.max(1) {
                scope.spawn(|| {
                    loop {
                        let next = lock(&queue).recv();
                        let Ok((point, disk, size, leaves)) = next else { return };
                        let references: Vec<Reference> = leaves.iter().map(|(_, at)| *at).collect();
                        for ((index, at), content) in leaves.iter().zip(inner.leaves(&references)) {
                            frames.fetch_add(1, Ordering::Relaxed);
                            match content {
                                Ok(content) => {
                                    bytes.fetch_add(content.len() as u64, Ordering::Relaxed);
                                    let mut good = lock(&good);
                                    if good.len() >= MAX_GOOD {
                                        good.clear();
                                    }
                                    good.insert(short(&at.location));
                                }
                                Err(error) => {
                                    let leaf = inner.leaf_bytes();
                                    let range = index * leaf..((index + 1) * leaf).min(size);
                                    let disk = Some(disk.clone());
                                    lock(&report).found(Finding { point: Some(point), disk, range, error });
                                }
                            }
                        }
                    }
                });
            }
            let jobs = jobs; // Dropped at the end of this block, which ends the threads.
            for (id, point) in self.points()? {
                lock(&report).points += 1;
                let point = match point {
                    Ok(point) => point,
                    Err(error) => {
                        lock(&report).found(Finding { point: Some(id), disk: None, range: 0..0, error });
                        continue;
                    }
                };
                for disk in &point.disks {
                    let shape = Shape::of(disk.size, inner.leaf_bytes());
                    let mut batch = Vec::new();
                    let send = |batch: &mut Vec<_>| {
                        let job = (id, disk.name.clone(), disk.size, std::mem::take(batch));
                        let _ = jobs.send(job); // The threads outlive this.
                    };
                    for step in Walk::new(inner, disk.root, shape, 0..shape.leaves) {
                        match step {
                            Step::Zero(_) => {}
                            Step::Leaf(index, at) => {
                                if chosen(&at.location) && !lock(&good).contains(&short(&at.location)) {
                                    batch.push((index, at));
                                }
                            }
                            Step::Lost(leaves, error) => {
                                let leaf = inner.leaf_bytes();
                                let range = leaves.start * leaf..(leaves.end * leaf).min(disk.size);
                                let disk = Some(disk.name.clone());
                                lock(&report).found(Finding { point: Some(id), disk, range, error });
                            }
                        }
                        if batch.len() == VERIFY_LEAVES {
                            send(&mut batch);
                        }
                    }
                    send(&mut batch);
                }
            }
            Ok(())
        })?;
        let mut report = report.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
        (report.frames, report.bytes) = (frames.into_inner(), bytes.into_inner());
        Ok(report)
    }

    /// How much there is.
    pub fn stats(&self) -> Result<Stats> {
        let inner = &*self.inner;
        let mut stats = Stats::default();
        for (_, point) in self.points()? {
            stats.points += 1;
            if let Ok(point) = point {
                stats.disk_bytes = point.disks.iter().fold(stats.disk_bytes, |sum, disk| sum.saturating_add(disk.size));
            }
        }
        inner
            .store
            .list("packs/", &mut |object| {
                stats.packs += 1;
                stats.pack_bytes += object.length;
            })
            .map_err(RepositoryError::store("packs/", "list"))?;
        let state = crate::prune::read_state(inner)?;
        stats.tombstoned_packs =
            state.tombstones.iter().filter(|t| t.processed_ms == 0).map(|t| t.packs.len() as u64).sum();
        stats.leases = state.leases.iter().filter(|l| !l.done).count() as u64;
        Ok(stats)
    }
}

/// Offset, length and kind of each frame of a pack.
type Table = Vec<(u32, u32, u8)>;

/// Tables of packs, read when a reference leads there.
struct Tables<'a> {
    inner: &'a Inner,
    packs: HashMap<Id, u64>,
    cache: HashMap<Id, Result<Table, Damage>>,
}

impl Tables<'_> {
    /// What is wrong with a reference to a leaf or a node.
    fn wrong(&mut self, at: &Reference, kind: FrameKind) -> Option<RepositoryError> {
        let mut location = at.location;
        for _ in 0..32 {
            let pack = location.pack;
            if self.packs.contains_key(&pack) {
                return self.wrong_in(&location, kind);
            }
            let name = relocation_name(pack);
            match records::read(&*self.inner.store, &self.inner.secret, &name, pack, Relocation::parse) {
                Ok(Some(moved)) => match moved.find(location.offset) {
                    Some(to) => location = to,
                    None => break,
                },
                Ok(None) => break,
                Err(e) => return Some(e),
            }
        }
        Some(Damage::new(at.location.pack.pack_name(), 0, DamageReason::Missing).into())
    }

    fn wrong_in(&mut self, at: &Location, kind: FrameKind) -> Option<RepositoryError> {
        // Packs come in the order of the disk, so few tables are enough.
        if self.cache.len() > 256 {
            self.cache.clear();
        }
        let inner = self.inner;
        let mut failure = None;
        let table =
            self.cache.entry(at.pack).or_insert_with(|| match read_table(&*inner.store, &inner.secret, at.pack) {
                Ok(frames) => Ok(frames.iter().map(|f| (f.offset, f.length, f.kind as u8)).collect()),
                Err(e) => {
                    let damage = e.damage().cloned();
                    let unreadable = Damage::new(at.pack.pack_name(), 0, DamageReason::Missing);
                    failure = damage.is_none().then_some(e);
                    Err(damage.unwrap_or(unreadable))
                }
            });
        let wrong = match table {
            Err(damage) => Some(damage.clone().into()),
            Ok(frames) => match frames.binary_search(&(at.offset, at.length, kind as u8)) {
                Ok(_) => None,
                Err(_) => Some(Damage::new(at.pack.pack_name(), at.offset.into(), DamageReason::Reference).into()),
            },
        };
        if failure.is_some() {
            self.cache.remove(&at.pack);
        }
        failure.or(wrong)
    }
}

const _: () = assert!(MAX_NODE < crate::pack::MAX_PLAIN);
