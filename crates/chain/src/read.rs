//! Reading through the layers.

use crate::stack::Stack;
use disk::{Buf, ByteRange, LayerExtent, LayerHandle, LocalFuture, Presence, Result};
use futures_util::stream::{FuturesOrdered, StreamExt};

/// Pieces of one request and layer that are read at the same time.
const PIECES_AT_ONCE: usize = 32;

impl<'a> Stack<'a> {
    /// Fills `buf` with the guest's bytes from `offset`.
    pub(crate) async fn read_through(self, offset: u64, mut buf: Buf) -> Result<Buf> {
        let range = ByteRange::new(offset, buf.len() as u64);
        // The hot path of the product: one row of bytes, and every layer's answer is in memory.
        for layer in self.layers() {
            let layer = &layer.handle;
            let guard = layer.guard();
            match layer.map_cached(range) {
                Some(LayerExtent { range: found, presence }) if found == range => match presence {
                    Presence::Data { storage, offset } => {
                        let result = layer.storage(storage).read(offset, buf).await;
                        drop(guard);
                        return result;
                    }
                    Presence::Absent => {}
                    Presence::Zero { .. } => {
                        buf.fill(0);
                        return Ok(buf);
                    }
                    Presence::Encoded { .. } => break,
                },
                _ => break, // In several pieces, beyond a parent's end, or not in memory.
            }
        }
        self.read_layers(0, offset, buf).await
    }

    /// Fills `buf` from the layer at `depth` and those below it.
    pub(crate) fn read_layers(self, depth: usize, offset: u64, mut buf: Buf) -> LocalFuture<'a, Result<Buf>> {
        Box::pin(async move {
            let Some(layer) = self.layer(depth) else {
                buf.fill(0);
                return Ok(buf);
            };
            let inside = layer.geometry().size.saturating_sub(offset).min(buf.len() as u64);
            let mut beyond = buf.split_off(inside as usize);
            beyond.fill(0);
            let range = ByteRange::new(offset, inside);
            if range.is_empty() {
                return Ok(beyond);
            }
            let guard = layer.guard();
            let result = self.read_layer(layer, depth, range, buf).await;
            drop(guard);
            Ok(result?.join(beyond))
        })
    }

    /// Fills `buf` with a range that lies inside the layer's size. A guard of the layer is held.
    async fn read_layer(self, layer: &LayerHandle, depth: usize, range: ByteRange, mut buf: Buf) -> Result<Buf> {
        let first = layer.map(range).await?;
        if first.range == range {
            return self.read_extent(layer, depth, first, buf).await;
        }
        // Pieces are read at the same time. After a failure those that were begun are awaited before it is
        // reported: nothing goes on behind the caller's back.
        let mut pieces = FuturesOrdered::new();
        let mut whole: Option<Buf> = None;
        let mut failure = None;
        let mut rest = range;
        loop {
            while !rest.is_empty() && failure.is_none() && pieces.len() < PIECES_AT_ONCE {
                match layer.map(rest).await {
                    Ok(extent) => {
                        let piece = buf.split_to(extent.range.len() as usize);
                        pieces.push_back(self.read_extent(layer, depth, extent, piece));
                        rest = rest.skip(extent.range.len());
                    }
                    Err(error) => failure = Some(error),
                }
            }
            match pieces.next().await {
                Some(Ok(piece)) => {
                    whole = Some(match whole {
                        Some(front) => front.join(piece),
                        None => piece,
                    });
                }
                Some(Err(error)) => failure = failure.or(Some(error)),
                None => break,
            }
        }
        match failure {
            Some(error) => Err(error),
            None => Ok(whole.expect("a range that is not empty has a piece")),
        }
    }

    /// Fills `buf` with one extent.
    async fn read_extent(self, layer: &LayerHandle, depth: usize, extent: LayerExtent, mut buf: Buf) -> Result<Buf> {
        match extent.presence {
            Presence::Data { storage, offset } => layer.storage(storage).read(offset, buf).await,
            Presence::Zero { .. } => {
                buf.fill(0);
                Ok(buf)
            }
            Presence::Absent => self.read_layers(depth + 1, extent.range.offset(), buf).await,
            Presence::Encoded { .. } => layer.read_encoded(extent.range.offset(), buf).await,
        }
    }
}
