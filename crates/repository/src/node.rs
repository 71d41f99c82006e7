//! Nodes of the trees: 256 children, each nothing (zero) or a reference to a leaf or to a node one level below.

use crate::error::DamageReason;
use crate::fields::Fields;
use crate::id::{ContentId, Id};
use crate::pack::{Location, possible};
use crate::secret::Secret;
use std::ops::Range;

/// Children of one node.
pub(crate) const FAN: u64 = 256;
/// The most plain bytes of a node: head, 256 packs, bitmap, 256 references.
pub(crate) const MAX_NODE: usize = 8 + 256 * 16 + 32 + 256 * 41;

/// A child: what it holds, and where that stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Reference {
    pub(crate) id: ContentId,
    pub(crate) location: Location,
}

/// A node as it is stored: never changed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Node {
    pub(crate) level: u8,
    pub(crate) children: Vec<Option<Reference>>,
}

pub(crate) fn id_of(child: Option<&Reference>) -> ContentId {
    child.map_or(ContentId::ZERO, |r| r.id)
}

impl Node {
    pub(crate) fn id(&self, secret: &Secret) -> ContentId {
        secret.node_id(self.level, self.children.iter().map(|c| id_of(c.as_ref())))
    }

    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        let mut packs: Vec<Id> = self.children.iter().flatten().map(|r| r.location.pack).collect();
        packs.sort_unstable();
        packs.dedup();
        let mut out = Vec::with_capacity(64 + packs.len() * 16 + self.children.len() * 41);
        out.push(self.level);
        out.push(0);
        out.extend((packs.len() as u16).to_le_bytes());
        packs.iter().for_each(|pack| out.extend(pack.0));
        let mut map = [0_u8; 32];
        for (n, _) in self.children.iter().enumerate().filter(|(_, c)| c.is_some()) {
            map[n / 8] |= 1 << (n % 8);
        }
        out.extend(map);
        for child in self.children.iter().flatten() {
            let pack = packs.binary_search(&child.location.pack).unwrap_or(0); // It is there: made from the same list.
            out.push(pack as u8);
            out.extend(child.location.offset.to_le_bytes());
            out.extend(child.location.length.to_le_bytes());
            out.extend(child.id.0);
        }
        out
    }

    /// Parses a node that must be of this level, with children that can be.
    pub(crate) fn parse(bytes: &[u8], level: u8) -> Result<Node, DamageReason> {
        let mut fields = Fields::of(bytes);
        if fields.u8()? != level || fields.u8()? != 0 {
            return Err(DamageReason::Field);
        }
        let count = fields.u16()?;
        if count > 256 {
            return Err(DamageReason::Field);
        }
        let packs = (0..count).map(|_| fields.array().map(Id)).collect::<Result<Vec<_>, _>>()?;
        let map: [u8; 32] = fields.array()?;
        let mut children = vec![None; FAN as usize];
        for (n, child) in children.iter_mut().enumerate().filter(|(n, _)| map[n / 8] >> (n % 8) & 1 == 1) {
            let pack = fields.u8()?;
            let pack = *packs.get(pack as usize).ok_or(DamageReason::Field)?;
            let (offset, length) = (fields.u32()?, fields.u32()?);
            let id = ContentId(fields.array()?);
            if !possible(offset, length) || id == ContentId::ZERO {
                return Err(DamageReason::Reference);
            }
            let _ = n;
            *child = Some(Reference { id, location: Location { pack, offset, length } });
        }
        fields.end()?;
        Ok(Node { level, children })
    }
}

/// How large a tree is: from the disk's size and the leaf's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Shape {
    pub(crate) leaves: u64,
    /// Levels of nodes, at least 1. The root has this level, and the nodes above leaves level 1.
    pub(crate) depth: u8,
}

impl Shape {
    /// `size` is at most `MAX_DISK`, `leaf` a power of two.
    pub(crate) fn of(size: u64, leaf: u64) -> Shape {
        let leaves = size.div_ceil(leaf);
        let mut depth = 1;
        while covered(depth) < leaves {
            depth += 1;
        }
        Shape { leaves, depth }
    }
}

/// Leaves below one node of this level.
pub(crate) fn covered(level: u8) -> u64 {
    1 << (8 * u32::from(level.min(7)))
}

/// Which children of the node that begins at leaf `first` touch the range of leaves.
pub(crate) fn children_in(level: u8, first: u64, range: &Range<u64>) -> Range<usize> {
    let step = covered(level - 1);
    let from = range.start.saturating_sub(first) / step;
    let to = range.end.saturating_sub(first).div_ceil(step).min(FAN);
    from.min(FAN) as usize..to.max(from.min(FAN)) as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_comes_back_and_anything_else_is_refused() {
        let mut random = fastrand::Rng::with_seed(1);
        for _ in 0..50 {
            let children = (0..256)
                .map(|_| {
                    random.bool().then(|| Reference {
                        id: ContentId([random.u8(1..); 32]),
                        location: Location {
                            pack: Id([random.u8(..9); 16]),
                            offset: random.u32(32..9999),
                            length: random.u32(17..9999),
                        },
                    })
                })
                .collect();
            let node = Node { level: 2, children };
            let bytes = node.to_bytes();
            assert!(bytes.len() <= MAX_NODE);
            assert_eq!(Node::parse(&bytes, 2), Ok(node));
            assert!(Node::parse(&bytes, 1).is_err());
            for _ in 0..20 {
                let cut = random.usize(..bytes.len());
                assert!(Node::parse(&bytes[..cut], 2).is_err());
                let mut other = bytes.clone();
                other[cut] ^= 1 << random.u8(..8);
                let _ = Node::parse(&other, 2); // Whatever it says, it does not panic.
            }
        }
    }

    #[test]
    fn depth_follows_from_the_size() {
        assert_eq!(Shape::of(0, 65536), Shape { leaves: 0, depth: 1 });
        assert_eq!(Shape::of(256 * 65536, 65536), Shape { leaves: 256, depth: 1 });
        assert_eq!(Shape::of(256 * 65536 + 1, 65536), Shape { leaves: 257, depth: 2 });
        assert_eq!(Shape::of(1 << 56, 1 << 14).depth, 6);
        assert_eq!(children_in(2, 0, &(255..257)), 0..2);
        assert_eq!(children_in(1, 256, &(0..300)), 0..44);
        assert_eq!(children_in(1, 256, &(600..900)), 256..256);
    }
}
