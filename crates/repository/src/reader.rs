//! Reading a disk of a restore point: every byte proven on the way, by the tag of its frame and by its content id.

use crate::error::{RepositoryError, Result};
use crate::id::ContentId;
use crate::node::{Reference, Shape};
use crate::point::{Point, PointDisk};
use crate::repository::{Inner, Repository, lock};
use crate::tree::{Differences, Step, Walk};
use std::collections::{HashMap, VecDeque};
use std::ops::Range;
use std::sync::{Arc, Mutex};

/// Leaves that are fetched together.
const READ_LEAVES: usize = 16;

/// A disk of a point, for reading. Several threads may use one.
pub struct DiskReader {
    inner: Arc<Inner>,
    root: Option<Reference>,
    shape: Shape,
    size: u64,
    cache: Mutex<LeafCache>,
}

struct LeafCache {
    leaves: HashMap<ContentId, Arc<Vec<u8>>>,
    order: VecDeque<ContentId>,
    most: usize,
}

/// What a range of a disk holds.
#[derive(Debug)]
pub enum Extent {
    /// Zeroes.
    Zero(Range<u64>),
    /// One leaf, with the id of its content.
    Data(Range<u64>, ContentId),
    /// It cannot be told, because the tree is damaged there.
    Lost(Range<u64>, RepositoryError),
}

impl Repository {
    /// Opens a disk of a point for reading, with a cache of at most `cache_bytes` of leaves.
    #[must_use]
    pub fn disk(&self, disk: &PointDisk, cache_bytes: usize) -> DiskReader {
        let most = cache_bytes / self.inner.settings.leaf_bytes as usize;
        DiskReader {
            inner: self.inner.clone(),
            root: disk.root,
            shape: Shape::of(disk.size, self.inner.leaf_bytes()),
            size: disk.size,
            cache: Mutex::new(LeafCache { leaves: HashMap::new(), order: VecDeque::new(), most }),
        }
    }

    /// The ranges of bytes in which `new` differs from `old`, in order, each within one leaf and cut to the larger disk, and whether `new` is zero there.
    /// Subtrees that are equal are not read.
    pub fn differences<'a>(
        &'a self,
        old: &PointDisk,
        new: &PointDisk,
    ) -> impl Iterator<Item = Result<(Range<u64>, bool)>> + use<'a> {
        let leaf = self.inner.leaf_bytes();
        let size = old.size.max(new.size);
        let side = |disk: &PointDisk| (disk.root, Shape::of(disk.size, leaf));
        Differences::new(&self.inner, side(old), side(new))
            .map(move |step| step.map(|(index, to)| (index * leaf..((index + 1) * leaf).min(size), to.is_none())))
    }

    /// The name that a leaf of this content has: what resynchronising compares. A disk's last leaf may be shorter, as it is named with
    /// zeroes up to its end.
    #[must_use]
    pub fn leaf_id(&self, leaf: &[u8]) -> ContentId {
        let whole = self.inner.settings.leaf_bytes as usize;
        if leaf.iter().all(|byte| *byte == 0) {
            return ContentId::ZERO;
        }
        if leaf.len() >= whole {
            return self.inner.secret.leaf_id(leaf);
        }
        let mut padded = leaf.to_vec();
        padded.resize(whole, 0);
        self.inner.secret.leaf_id(&padded)
    }

    /// Finds a point by `latest`, or by the beginning of its name.
    pub fn find_point(&self, name: &str) -> Result<Point> {
        let ids = self.point_ids()?;
        let fitting: Vec<_> = match name {
            "latest" => ids.into_iter().next_back().into_iter().collect(),
            _ => ids.into_iter().filter(|id| id.to_string().starts_with(name)).collect(),
        };
        match fitting[..] {
            [id] => self.point(id),
            [] => Err(RepositoryError::NoPoint { name: name.to_owned() }),
            _ => Err(RepositoryError::Invalid(format!(
                "{} points begin with {name}; write more of the name",
                fitting.len()
            ))),
        }
    }
}

impl DiskReader {
    /// Bytes of the disk.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size
    }

    /// What the disk holds in a range of bytes, leaf by leaf, in order; zeroes as long as they go. Reads nodes alone.
    pub fn extents(&self, range: Range<u64>) -> impl Iterator<Item = Extent> + '_ {
        let leaf = self.inner.leaf_bytes();
        let size = self.size;
        let bytes = move |leaves: Range<u64>| leaves.start * leaf..(leaves.end * leaf).min(size);
        let leaves = range.start / leaf..range.end.min(self.size).div_ceil(leaf);
        Walk::new(&self.inner, self.root, self.shape, leaves).map(move |step| match step {
            Step::Zero(leaves) => Extent::Zero(bytes(leaves)),
            Step::Leaf(index, at) => Extent::Data(bytes(index..index + 1), at.id),
            Step::Lost(leaves, e) => Extent::Lost(bytes(leaves), e),
        })
    }

    /// Fills `out` with the disk's bytes from `offset` on. The range must be within the disk.
    pub fn read(&self, offset: u64, out: &mut [u8]) -> Result<()> {
        let end = offset.checked_add(out.len() as u64).filter(|end| *end <= self.size).ok_or_else(|| {
            RepositoryError::Invalid(format!("{} bytes at {offset} are not within the disk's {}", out.len(), self.size))
        })?;
        if out.is_empty() {
            return Ok(());
        }
        let leaf = self.inner.leaf_bytes();
        let mut wanted = Vec::new();
        for step in Walk::new(&self.inner, self.root, self.shape, offset / leaf..end.div_ceil(leaf)) {
            match step {
                Step::Zero(leaves) => {
                    let from = (leaves.start * leaf).max(offset) - offset;
                    let to = (leaves.end * leaf).min(end) - offset;
                    out[from as usize..to as usize].fill(0);
                }
                Step::Leaf(index, at) => wanted.push((index, at)),
                Step::Lost(_, e) => return Err(e),
            }
            if wanted.len() == READ_LEAVES {
                self.read_leaves(&wanted, offset, out)?;
                wanted.clear();
            }
        }
        self.read_leaves(&wanted, offset, out)
    }

    fn read_leaves(&self, wanted: &[(u64, Reference)], offset: u64, out: &mut [u8]) -> Result<()> {
        let leaf = self.inner.leaf_bytes();
        let mut place = |index: u64, content: &[u8]| {
            let begin = index * leaf;
            let (from, to) = (begin.max(offset), (begin + leaf).min(offset + out.len() as u64));
            out[(from - offset) as usize..(to - offset) as usize]
                .copy_from_slice(&content[(from - begin) as usize..(to - begin) as usize]);
        };
        let mut missing = Vec::new();
        for (index, at) in wanted {
            let cached = lock(&self.cache).leaves.get(&at.id).cloned();
            match cached {
                Some(content) => place(*index, &content),
                None => missing.push((*index, *at)),
            }
        }
        let references: Vec<Reference> = missing.iter().map(|(_, at)| *at).collect();
        for ((index, at), content) in missing.iter().zip(self.inner.leaves(&references)) {
            let content = content?;
            place(*index, &content);
            lock(&self.cache).keep(at.id, content);
        }
        Ok(())
    }
}

impl LeafCache {
    fn keep(&mut self, id: ContentId, content: Vec<u8>) {
        if self.most == 0 {
            return;
        }
        if self.leaves.insert(id, Arc::new(content)).is_none() {
            self.order.push_back(id);
        }
        while self.order.len() > self.most
            && let Some(oldest) = self.order.pop_front()
        {
            self.leaves.remove(&oldest);
        }
    }
}
