//! Walking the trees: the leaves of a range, and where two trees differ.

use crate::error::{RepositoryError, Result};
use crate::id::ContentId;
use crate::node::{FAN, Reference, Shape, children_in, covered, id_of};
use crate::repository::Inner;
use std::ops::Range;

/// What stands in a range of leaves.
pub(crate) enum Step {
    /// Zero leaves.
    Zero(Range<u64>),
    /// One leaf that is stored.
    Leaf(u64, Reference),
    /// Leaves that cannot be told, because a node cannot be read.
    Lost(Range<u64>, RepositoryError),
}

/// Visits leaves in order. Memory: 256 pending children for each level.
pub(crate) struct Walk<'a> {
    inner: &'a Inner,
    range: Range<u64>,
    pending: Vec<(u8, u64, Option<Reference>)>,
}

impl<'a> Walk<'a> {
    /// Of the tree at `root`, the leaves of `range` (cut to the tree's).
    pub(crate) fn new(inner: &'a Inner, root: Option<Reference>, shape: Shape, range: Range<u64>) -> Walk<'a> {
        let range = range.start.min(shape.leaves)..range.end.min(shape.leaves);
        let pending = if range.is_empty() { Vec::new() } else { vec![(shape.depth, 0, root)] };
        Walk { inner, range, pending }
    }
}

impl Iterator for Walk<'_> {
    type Item = Step;

    fn next(&mut self) -> Option<Step> {
        loop {
            let (level, first, reference) = self.pending.pop()?;
            let here = first.max(self.range.start)..(first + covered(level)).min(self.range.end);
            let Some(reference) = reference else { return Some(Step::Zero(here)) };
            if level == 0 {
                return Some(Step::Leaf(first, reference));
            }
            let node = match self.inner.node(&reference, level) {
                Ok(node) => node,
                Err(e) => return Some(Step::Lost(here, e)),
            };
            for n in children_in(level, first, &self.range).rev() {
                self.pending.push((level - 1, first + n as u64 * covered(level - 1), node.children[n]));
            }
        }
    }
}

/// One of two trees that are compared: a reference and the level on which it stands.
#[derive(Clone, Copy)]
struct Side {
    reference: Option<Reference>,
    level: u8,
}

impl Side {
    /// What this side has below child `n` of a node of `level`. A tree that is not so high has its root below child 0.
    fn children(self, inner: &Inner, level: u8) -> Result<Vec<Side>> {
        let nothing = Side { reference: None, level: level - 1 };
        if self.level < level {
            let mut children = vec![nothing; FAN as usize];
            children[0] = self;
            return Ok(children);
        }
        let Some(reference) = self.reference else { return Ok(vec![nothing; FAN as usize]) };
        let node = inner.node(&reference, level)?;
        Ok(node.children.iter().map(|child| Side { reference: *child, level: level - 1 }).collect())
    }

    fn id(self) -> ContentId {
        id_of(self.reference.as_ref())
    }
}

/// The leaves in which two trees differ, in order; equal subtrees are not read. Gives the index and what the second tree has there.
pub(crate) struct Differences<'a> {
    inner: &'a Inner,
    pending: Vec<(u8, u64, Side, Side)>,
}

impl<'a> Differences<'a> {
    pub(crate) fn new(
        inner: &'a Inner,
        a: (Option<Reference>, Shape),
        b: (Option<Reference>, Shape),
    ) -> Differences<'a> {
        let side = |(reference, shape): (Option<Reference>, Shape)| Side { reference, level: shape.depth };
        Differences { inner, pending: vec![(a.1.depth.max(b.1.depth), 0, side(a), side(b))] }
    }
}

impl Iterator for Differences<'_> {
    type Item = Result<(u64, Option<Reference>)>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            let (level, first, a, b) = self.pending.pop()?;
            // Ids of different levels are never equal, but for nothing.
            if a.id() == b.id() {
                continue;
            }
            if level == 0 {
                return Some(Ok((first, b.reference)));
            }
            let both = a.children(self.inner, level).and_then(|a| Ok((a, b.children(self.inner, level)?)));
            let (a, b) = match both {
                Ok(both) => both,
                Err(e) => return Some(Err(e)),
            };
            for (n, (a, b)) in a.into_iter().zip(b).enumerate().rev() {
                self.pending.push((level - 1, first + n as u64 * covered(level - 1), a, b));
            }
        }
    }
}
