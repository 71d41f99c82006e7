//! The chain itself, and its face as a disk.

use crate::requests::Requests;
use disk::{
    Below, Buf, ByteRange, Disk, DiskExtent, DiskGeometry, LayerHandle, Operation, Preallocation, Presence, Result,
    StorageId, WriteFlags, ZeroMode,
};
use formats::Format;
use std::path::PathBuf;

/// One layer of a chain and where it came from.
#[derive(Clone, Debug)]
pub struct LayerInfo {
    /// The image file.
    pub path: PathBuf,
    /// Its format.
    pub format: Format,
    /// The layer.
    pub handle: LayerHandle,
}

/// A disk made of layers, top first.
///
/// What a layer does not hold shows through from the next one; what no layer holds is zero, and so is
/// everything behind the end of a parent that is shorter than its child. Only the top layer is written.
///
/// Its futures are to be polled to their end: a write that is dropped half-way gives its new blocks back
/// while the storage may still be writing to them.
pub struct Chain {
    pub(crate) layers: Vec<LayerInfo>,
    pub(crate) requests: Requests,
    preferred_alignment: u32,
}

impl Chain {
    /// A disk of these layers, top first.
    ///
    /// # Panics
    /// When there is no layer.
    pub fn new(layers: Vec<LayerInfo>) -> Self {
        assert!(!layers.is_empty(), "a chain has at least one layer");
        let alignment = |layer: &LayerInfo| layer.handle.storage(StorageId::IMAGE).limits().alignment;
        let preferred_alignment = layers.iter().map(alignment).max().unwrap_or(1);
        Self { layers, requests: Requests::default(), preferred_alignment }
    }

    /// The layers, top first.
    pub fn layers(&self) -> &[LayerInfo] {
        &self.layers
    }

    /// The top layer: the one that is written.
    pub fn top(&self) -> &LayerHandle {
        &self.layers[0].handle
    }

    /// Changes the size, and sets space aside. Waits until requests under way have ended.
    ///
    /// # Errors
    /// What the top layer reports. When a grow fails half-way the old size is restored as far as possible.
    pub async fn resize_with(&self, size: u64, preallocation: Preallocation) -> Result<()> {
        self.change_size(size, preallocation).await
    }

    /// What shows through at `range` where the top layer holds nothing, as far as memory alone can tell.
    pub(crate) fn below(&self, range: ByteRange) -> Below {
        let unit = self.top().geometry().unit;
        match self.is_zero_cached(1, range.align_out(unit)) {
            true => Below::Zeroes,
            false => Below::Parent,
        }
    }

    /// Whether the range is known to read as zero in the layer at `depth` and those below it.
    pub(crate) fn is_zero_cached(&self, depth: usize, range: ByteRange) -> bool {
        let Some(layer) = self.layers.get(depth) else { return true };
        let mut rest = range.intersect(ByteRange::new(0, layer.handle.geometry().size));
        while !rest.is_empty() {
            let Some(extent) = layer.handle.map_cached(rest) else { return false };
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

impl Disk for Chain {
    fn geometry(&self) -> DiskGeometry {
        let top = self.top().geometry();
        DiskGeometry {
            size: top.size,
            preferred_alignment: self.preferred_alignment,
            unit: top.unit,
            read_only: top.read_only,
        }
    }

    async fn read(&self, offset: u64, buf: Buf) -> Result<Buf> {
        let _request = self.requests.enter(Operation::Read).await?;
        self.read_through(offset, buf).await
    }

    async fn write(&self, offset: u64, buf: Buf, flags: WriteFlags) -> Result<()> {
        let _request = self.requests.enter(Operation::Write).await?;
        self.write_top(offset, buf).await?;
        self.finish_write(flags).await
    }

    async fn write_zeroes(&self, range: ByteRange, mode: ZeroMode, flags: WriteFlags) -> Result<()> {
        let _request = self.requests.enter(Operation::WriteZeroes).await?;
        self.zero_top(range, mode).await?;
        self.finish_write(flags).await
    }

    async fn discard(&self, range: ByteRange, flags: WriteFlags) -> Result<()> {
        let _request = self.requests.enter(Operation::Discard).await?;
        self.discard_top(range).await?;
        self.finish_write(flags).await
    }

    async fn flush(&self) -> Result<()> {
        self.top().flush().await
    }

    async fn map(&self, range: ByteRange) -> Result<DiskExtent> {
        let _request = self.requests.enter(Operation::Map).await?;
        self.map_merged(range).await
    }

    async fn resize(&self, size: u64) -> Result<()> {
        self.change_size(size, Preallocation::Off).await
    }

    async fn close(&self) -> Result<()> {
        // A change of size may be under way that no connection waits for; whoever comes later is refused.
        let _exclusive = self.requests.exclude().await;
        self.requests.close();
        // All are closed, also when one fails: the first failure is what the caller gets to know.
        let mut result = Ok(());
        for layer in &self.layers {
            result = result.and(layer.handle.close().await);
        }
        result
    }
}
