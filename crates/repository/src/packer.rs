//! Leaves and nodes into packs: what each thread of a backup does.

use crate::error::Result;
use crate::id::{ContentId, Id};
use crate::index::Index;
use crate::node::{MAX_NODE, Node, Reference};
use crate::pack::{Compressor, FrameKind, PackBuilder, open_frame};
use crate::repository::Inner;
use crate::sealed::put_own;
use crate::tree_builder::Nodes;
use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Arc, PoisonError, RwLock};

/// What became of the leaves of a backup.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Counts {
    /// Leaves that were given.
    pub leaves: u64,
    /// Of them: all zero.
    pub zero: u64,
    /// Of them: as in the predecessor.
    pub unchanged: u64,
    /// Of them: found elsewhere in the repository.
    pub known: u64,
    /// Of them: stored anew.
    pub stored: u64,
    /// Packs put.
    pub packs: u64,
    /// Their bytes.
    pub pack_bytes: u64,
}

impl Counts {
    pub(crate) fn add(&mut self, other: Counts) {
        self.leaves += other.leaves;
        self.zero += other.zero;
        self.unchanged += other.unchanged;
        self.known += other.known;
        self.stored += other.stored;
        self.packs += other.packs;
        self.pack_bytes += other.pack_bytes;
    }
}

/// Leaves that are packed together.
pub(crate) struct Batch {
    pub(crate) number: u64,
    pub(crate) disk: usize,
    pub(crate) bytes: Vec<u8>,
    /// Index of each leaf, and what stands there so far.
    pub(crate) leaves: Vec<(u64, Option<Reference>)>,
}

/// Ranges of leaves and what they become.
pub(crate) type Changes = Vec<(Range<u64>, Option<Reference>)>;

/// Fills packs and puts them.
pub(crate) struct Packer {
    inner: Arc<Inner>,
    index: Arc<RwLock<Index>>,
    pack: Option<PackBuilder>,
    /// Leaves of `pack`: the index knows those of stored packs.
    inside: HashMap<ContentId, Reference>,
    compressor: Compressor,
    /// The room of the last pack, for the next: memory that is new costs about a third of the time.
    room: Vec<u8>,
    pub(crate) counts: Counts,
}

impl Packer {
    pub(crate) fn new(inner: Arc<Inner>, index: Arc<RwLock<Index>>) -> Packer {
        Packer {
            inner,
            index,
            pack: None,
            inside: HashMap::new(),
            compressor: Compressor::new(),
            room: Vec::new(),
            counts: Counts::default(),
        }
    }

    /// Finds or stores every leaf of the batch.
    pub(crate) fn take(&mut self, batch: &Batch) -> Result<Changes> {
        let size = self.inner.settings.leaf_bytes as usize;
        let mut changes = Vec::with_capacity(batch.leaves.len());
        for (leaf, (index, before)) in batch.bytes.chunks_exact(size).zip(&batch.leaves) {
            changes.push((*index..index + 1, self.leaf(leaf, before.as_ref())?));
        }
        Ok(changes)
    }

    fn leaf(&mut self, leaf: &[u8], before: Option<&Reference>) -> Result<Option<Reference>> {
        self.counts.leaves += 1;
        if is_zero(leaf) {
            self.counts.zero += 1;
            return Ok(None);
        }
        let id = self.inner.secret.leaf_id(leaf);
        if let Some(before) = before.filter(|b| b.id == id) {
            self.counts.unchanged += 1;
            return Ok(Some(*before));
        }
        let known = self.inside.get(&id).copied();
        let known = known.or_else(|| self.index.read().unwrap_or_else(PoisonError::into_inner).find(&id));
        if known.is_some() {
            self.counts.known += 1;
            return Ok(known);
        }
        self.counts.stored += 1;
        let reference = self.push(FrameKind::Leaf, id, leaf)?;
        self.inside.insert(id, reference);
        self.put_if_full()?;
        Ok(Some(reference))
    }

    /// Appends a frame to the open pack.
    pub(crate) fn push(&mut self, kind: FrameKind, id: ContentId, plain: &[u8]) -> Result<Reference> {
        if self.pack.is_none() {
            let mut room = std::mem::take(&mut self.room);
            room.clear();
            room.reserve(self.inner.settings.pack_bytes as usize + self.inner.max_stored_leaf() + (64 << 10));
            self.pack = Some(PackBuilder::new(&self.inner.secret, Id::random(&*self.inner.host)?, room));
        }
        let Some(pack) = &mut self.pack else { unreachable!("it has just been made") };
        Ok(Reference { id, location: pack.push(kind, id, plain, &mut self.compressor) })
    }

    pub(crate) fn put_if_full(&mut self) -> Result<()> {
        if self.pack.as_ref().is_some_and(|pack| pack.len() >= self.inner.settings.pack_bytes as usize) {
            self.put()
        } else {
            Ok(())
        }
    }

    /// Puts the open pack, whole. What is in it may be referenced by a point only after that.
    pub(crate) fn put(&mut self) -> Result<()> {
        let Some(pack) = self.pack.take() else { return Ok(()) };
        self.inside.clear();
        let (id, bytes, frames) = pack.seal();
        put_own(&*self.inner.store, &id.pack_name(), &bytes)?;
        self.counts.packs += 1;
        self.counts.pack_bytes += bytes.len() as u64;
        self.room = bytes;
        self.index.write().unwrap_or_else(PoisonError::into_inner).insert(id, &frames)
    }

    /// Continues the pack that another has begun, if it is shorter than the own one.
    pub(crate) fn adopt(&mut self, other: &mut Packer) -> Result<()> {
        if self.pack.is_none() {
            self.pack = other.pack.take();
        }
        other.put()
    }

    pub(crate) fn open_pack(&self) -> Option<&PackBuilder> {
        self.pack.as_ref()
    }
}

impl Nodes for Packer {
    fn load(&mut self, at: &Reference, level: u8) -> Result<Arc<Node>> {
        if let Some(pack) = self.pack.as_ref().filter(|pack| pack.id() == at.location.pack)
            && let Some(stored) = pack.stored(at.location)
        {
            let cipher = self.inner.secret.pack_cipher(at.location.pack);
            let plain = open_frame(&cipher, at.location, FrameKind::Node, stored, MAX_NODE)
                .map_err(|reason| crate::Damage::new(pack.id().pack_name(), at.location.offset.into(), reason))?;
            return self.inner.parse_node(at, level, &plain);
        }
        self.inner.node(at, level)
    }

    fn store(&mut self, node: &Node) -> Result<Reference> {
        let reference = self.push(FrameKind::Node, node.id(&self.inner.secret), &node.to_bytes())?;
        self.put_if_full()?;
        Ok(reference)
    }
}

fn is_zero(bytes: &[u8]) -> bool {
    bytes.chunks(1024).all(|chunk| chunk.iter().fold(0, |all, byte| all | byte) == 0)
}
