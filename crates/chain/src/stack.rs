//! Layers, top first, as one request sees them.

use crate::LayerInfo;
use disk::{Below, ByteRange, LayerHandle, Presence};

/// The layers of a chain, or those from one of them on: what the request does with bytes is written in terms of this
/// (`read.rs`, `write.rs`, `zero.rs`, `map.rs`), so that it works on any layer and what is below it.
#[derive(Clone, Copy)]
pub(crate) struct Stack<'a> {
    layers: &'a [LayerInfo],
}

impl<'a> Stack<'a> {
    /// Of these layers, top first, of which there is one at least.
    pub(crate) fn new(layers: &'a [LayerInfo]) -> Self {
        Self { layers }
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
    pub(crate) fn below(self, range: ByteRange) -> Below {
        let unit = self.top().geometry().unit;
        match self.is_zero_cached(1, range.align_out(unit)) {
            true => Below::Zeroes,
            false => Below::Parent,
        }
    }

    /// Whether the range is known to read as zero in the layer at `depth` and those below it.
    pub(crate) fn is_zero_cached(self, depth: usize, range: ByteRange) -> bool {
        let Some(layer) = self.layer(depth) else { return true };
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
