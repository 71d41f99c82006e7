//! The tree of a point that is being made: its predecessor's, with changes. Nodes that change are in memory until they are written; the others
//! are references, and are read only on the way to a change.

use crate::error::Result;
use crate::node::{FAN, Node, Reference, Shape, children_in, covered};
use std::ops::Range;
use std::sync::Arc;

/// Changing nodes in memory before all are written: 512 of 16 KiB.
const MAX_OPEN: usize = 512;

/// Where nodes come from and go to.
pub(crate) trait Nodes {
    fn load(&mut self, at: &Reference, level: u8) -> Result<Arc<Node>>;
    fn store(&mut self, node: &Node) -> Result<Reference>;
}

enum Slot {
    Nothing,
    Stored(Reference),
    Open(Box<OpenNode>),
}

struct OpenNode {
    children: Vec<Slot>,
    /// The stored node that this one was, for as long as nothing changes.
    origin: Option<Reference>,
}

/// A tree that changes.
pub(crate) struct TreeBuilder {
    shape: Shape,
    root: Slot,
    open: usize,
}

fn slot_of(child: Option<Reference>) -> Slot {
    child.map_or(Slot::Nothing, Slot::Stored)
}

impl TreeBuilder {
    /// The tree at `root`, of `old` shape, brought to `new` shape.
    pub(crate) fn new(root: Option<Reference>, old: Shape, new: Shape, nodes: &mut dyn Nodes) -> Result<TreeBuilder> {
        let mut tree = TreeBuilder { shape: old, root: slot_of(root), open: 0 };
        if new.leaves < old.leaves {
            tree.set(new.leaves..old.leaves, None, nodes)?;
        }
        while tree.shape.depth < new.depth {
            // A higher root, whose first child is the old one.
            if !matches!(tree.root, Slot::Nothing) {
                let mut children: Vec<Slot> = (0..FAN).map(|_| Slot::Nothing).collect();
                children[0] = std::mem::replace(&mut tree.root, Slot::Nothing);
                tree.root = Slot::Open(Box::new(OpenNode { children, origin: None }));
                tree.open += 1;
            }
            tree.shape.depth += 1;
        }
        while tree.shape.depth > new.depth {
            // All that was not below the first child is gone already.
            if !matches!(tree.root, Slot::Nothing) {
                let node = open(&mut tree.root, tree.shape.depth, &mut tree.open, nodes)?;
                let child = std::mem::replace(&mut node.children[0], Slot::Nothing);
                tree.root = child;
                tree.open -= 1;
            }
            tree.shape.depth -= 1;
        }
        tree.shape = new;
        Ok(tree)
    }

    /// What stands at a leaf now.
    pub(crate) fn get(&mut self, index: u64, nodes: &mut dyn Nodes) -> Result<Option<Reference>> {
        let mut slot = &mut self.root;
        let mut first = 0;
        for level in (1..=self.shape.depth).rev() {
            if matches!(slot, Slot::Nothing) {
                return Ok(None);
            }
            let node = open(slot, level, &mut self.open, nodes)?;
            let n = (index - first) / covered(level - 1);
            first += n * covered(level - 1);
            slot = &mut node.children[n as usize];
        }
        Ok(match slot {
            Slot::Stored(reference) => Some(*reference),
            _ => None,
        })
    }

    /// Sets leaves: to one reference, or to zero.
    pub(crate) fn set(&mut self, range: Range<u64>, to: Option<Reference>, nodes: &mut dyn Nodes) -> Result<()> {
        edit(&mut self.root, self.shape.depth, 0, &range, to, &mut self.open, nodes)?;
        if self.open > MAX_OPEN {
            self.write(nodes)?;
        }
        Ok(())
    }

    /// Writes all nodes that have changed, lowest first, and gives the root.
    pub(crate) fn write(&mut self, nodes: &mut dyn Nodes) -> Result<Option<Reference>> {
        let root = write(&mut self.root, self.shape.depth, nodes)?;
        self.open = 0;
        Ok(root)
    }
}

fn open<'a>(slot: &'a mut Slot, level: u8, count: &mut usize, nodes: &mut dyn Nodes) -> Result<&'a mut OpenNode> {
    let fresh = match slot {
        Slot::Open(_) => None,
        Slot::Nothing => Some(OpenNode { children: (0..FAN).map(|_| Slot::Nothing).collect(), origin: None }),
        Slot::Stored(at) => {
            let node = nodes.load(at, level)?;
            Some(OpenNode { children: node.children.iter().map(|c| slot_of(*c)).collect(), origin: Some(*at) })
        }
    };
    if let Some(fresh) = fresh {
        *slot = Slot::Open(Box::new(fresh));
        *count += 1;
    }
    match slot {
        Slot::Open(node) => Ok(node),
        _ => unreachable!("it has just been opened"),
    }
}

fn opened_below(slot: &Slot) -> usize {
    match slot {
        Slot::Open(node) => 1 + node.children.iter().map(opened_below).sum::<usize>(),
        _ => 0,
    }
}

/// Sets the leaves of `range` below `slot`, whose first leaf is `first`; tells whether anything changed.
fn edit(
    slot: &mut Slot,
    level: u8,
    first: u64,
    range: &Range<u64>,
    to: Option<Reference>,
    count: &mut usize,
    nodes: &mut dyn Nodes,
) -> Result<bool> {
    if level == 0 {
        // Equal content stays where it is.
        let same = match (&*slot, &to) {
            (Slot::Stored(old), Some(new)) => old.id == new.id,
            (Slot::Nothing, None) => true,
            _ => false,
        };
        if !same {
            *slot = slot_of(to);
        }
        return Ok(!same);
    }
    if to.is_none() {
        if matches!(slot, Slot::Nothing) {
            return Ok(false);
        }
        if range.start <= first && first + covered(level) <= range.end {
            *count -= opened_below(slot);
            *slot = Slot::Nothing;
            return Ok(true);
        }
    }
    let node = open(slot, level, count, nodes)?;
    let mut changed = false;
    for n in children_in(level, first, range) {
        changed |=
            edit(&mut node.children[n], level - 1, first + n as u64 * covered(level - 1), range, to, count, nodes)?;
    }
    if changed {
        node.origin = None;
    }
    Ok(changed)
}

fn write(slot: &mut Slot, level: u8, nodes: &mut dyn Nodes) -> Result<Option<Reference>> {
    let reference = match slot {
        Slot::Nothing => None,
        Slot::Stored(at) => Some(*at),
        Slot::Open(node) => {
            let mut children = Vec::with_capacity(FAN as usize);
            for child in &mut node.children {
                children.push(match child {
                    Slot::Stored(at) => Some(*at),
                    child => write(child, level - 1, nodes)?,
                });
            }
            match node.origin {
                Some(origin) => Some(origin),
                None if children.iter().all(Option::is_none) => None,
                None => Some(nodes.store(&Node { level, children })?),
            }
        }
    };
    *slot = slot_of(reference);
    Ok(reference)
}
