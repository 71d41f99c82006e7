//! Layers, top first, as one request sees them.

use crate::LayerInfo;
use disk::{Below, ByteRange, LayerHandle, Presence};

/// The layers of a chain, or those from one of them on: what the request does with bytes is written in terms of this
/// (`read.rs`, `write.rs`, `zero.rs`, `map.rs`), so that it works on any layer and what is below it.
#[derive(Clone, Copy)]
pub(crate) struct Stack<'a> {
    layers: &'a [LayerInfo],
    /// Layers from 1 up to (not including) this are about to vanish: an infill brings what they hold into the top.
    vanishing_end: usize,
    /// The place of the first layer whose zeroes may not be durable.
    changing: usize,
}

/// What some layers hold of a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Held {
    /// Nothing.
    Absent,
    /// Zeroes.
    Zero,
    /// Bytes, stored in whatever form.
    Data,
}

impl<'a> Stack<'a> {
    /// Of these layers, top first, of which there is one at least.
    pub(crate) fn new(layers: &'a [LayerInfo]) -> Self {
        Self { layers, vanishing_end: 1, changing: usize::MAX }
    }

    /// As before, but the layers from `depth` on are being written to: what they show is not durable.
    pub(crate) fn with_changing(self, depth: usize) -> Self {
        Self { changing: depth, ..self }
    }

    /// As before, but the layers from 1 up to (not including) `end` are about to vanish.
    pub(crate) fn with_vanishing(self, end: usize) -> Self {
        Self { vanishing_end: end, ..self }
    }

    /// The layer at `depth` and those below it; they are not written to.
    pub(crate) fn from(self, depth: usize) -> Self {
        Self::new(&self.layers[depth..])
    }

    /// The layer at `depth`, 0 for the top.
    pub(crate) fn layer(self, depth: usize) -> Option<&'a LayerHandle> {
        self.layers.get(depth).map(|layer| &layer.handle)
    }

    /// All layers, top first.
    pub(crate) fn layers(self) -> &'a [LayerInfo] {
        self.layers
    }

    /// The one that is written.
    pub(crate) fn top(self) -> &'a LayerHandle {
        &self.layers[0].handle
    }

    /// What shows through at `range` where the top layer holds nothing, as far as memory alone can tell.
    ///
    /// "Zeroes" means to the layer that it may forget a zero: what it leaves absent must read as zero also when the
    /// layers that are about to vanish have gone, and when the power has failed.
    pub(crate) fn below(self, range: ByteRange) -> Below {
        let unit = self.top().geometry().unit;
        let range = range.align_out(unit);
        let zero = self.is_zero_cached(1, range)
            && (self.vanishing_end == 1 || self.is_zero_cached(self.vanishing_end, range));
        if zero { Below::Zeroes } else { Below::Parent }
    }

    /// Whether the range is known to read as zero in the layer at `depth` and those below it.
    pub(crate) fn is_zero_cached(self, depth: usize, range: ByteRange) -> bool {
        let Some(layer) = self.layer(depth) else { return true };
        if depth >= self.changing {
            return false;
        }
        let mut rest = range.intersect(ByteRange::new(0, layer.geometry().size));
        while !rest.is_empty() {
            let Some(extent) = layer.map_cached(rest) else { return false };
            let zero = match extent.presence {
                Presence::Zero { .. } => true,
                Presence::Absent => self.is_zero_cached(depth + 1, extent.range),
                Presence::Data { .. } | Presence::Encoded { .. } => false,
            };
            if !zero {
                return false;
            }
            rest = rest.skip(extent.range.len());
        }
        true
    }
}
