//! The plainest disk over one layer.

use crate::SparseBytes;
use disk::{
    Below, Buf, ByteRange, Disk, DiskExtent, DiskGeometry, Fill, LayerHandle, Preallocation, PreparedWrite, Presence,
    Result, WriteFlags, ZeroMode,
};

/// A disk over one layer and a parent in memory, as plain as the layer's contract allows: one piece after the
/// other, no cached answers. It serves to test layers without the real thing above them.
pub struct LayerDisk {
    layer: LayerHandle,
    parent: Option<SparseBytes>,
}

impl LayerDisk {
    /// A disk over `layer`, with a parent or without.
    pub fn new(layer: LayerHandle, parent: Option<SparseBytes>) -> Self {
        Self { layer, parent }
    }

    fn below(&self) -> Below {
        if self.parent.is_some() { Below::Parent } else { Below::Zeroes }
    }

    /// Reads a range that may reach beyond the disk's end.
    async fn read_present(&self, range: ByteRange) -> Result<Buf> {
        let mut whole = Buf::new(0);
        let mut rest = range.intersect(ByteRange::new(0, self.layer.geometry().size));
        let beyond = range.len() - rest.len();
        while !rest.is_empty() {
            let _guard = self.layer.guard();
            let extent = self.layer.map(rest).await?;
            rest = rest.skip(extent.range.len());
            let mut piece = Buf::zeroed(extent.range.len() as usize);
            match extent.presence {
                Presence::Data { storage, offset } => piece = self.layer.storage(storage).read(offset, piece).await?,
                Presence::Encoded { .. } => piece = self.layer.read_encoded(extent.range.offset(), piece).await?,
                Presence::Zero { .. } => {}
                Presence::Absent => {
                    if let Some(parent) = &self.parent {
                        parent.read(extent.range.offset(), &mut piece);
                    }
                }
            }
            whole = whole.join(piece);
        }
        Ok(whole.join(Buf::zeroed(beyond as usize)))
    }

    /// Carries out one plan for the first bytes of `bytes`, up to the commit.
    pub(super) async fn fill_piece(&self, offset: u64, bytes: &[u8]) -> Result<PreparedWrite> {
        let range = ByteRange::new(offset, bytes.len() as u64);
        let prepared = self.layer.prepare_write(range, self.below()).await?;
        let plan = *prepared.plan();
        let storage = self.layer.storage(plan.storage);
        let bytes = &bytes[..plan.range.len() as usize];
        if let Some(ticket) = plan.ticket {
            let blocks = ticket.blocks;
            assert!(blocks.contains(plan.range), "a ticket's blocks contain the range that is written");
            let start = plan.offset - (plan.range.offset() - blocks.offset());
            for part in [
                ByteRange::between(blocks.offset(), plan.range.offset()),
                ByteRange::between(plan.range.end(), blocks.end()),
            ] {
                let fill = match ticket.fill {
                    Fill::Nothing => continue,
                    Fill::Zeroes => Buf::zeroed(part.len() as usize),
                    Fill::Present => self.read_present(part).await?,
                };
                storage.write(start + (part.offset() - blocks.offset()), fill).await?;
            }
        }
        storage.write(plan.offset, Buf::copy_of(bytes)).await?;
        Ok(prepared)
    }

    async fn write_bytes(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        let mut done = 0;
        while done < bytes.len() {
            let _guard = self.layer.guard();
            let filled = self.fill_piece(offset + done as u64, &bytes[done..]).await?;
            done += filled.plan().range.len() as usize;
            filled.commit().await?;
        }
        Ok(())
    }

    fn units(&self, range: ByteRange) -> ByteRange {
        let geometry = self.layer.geometry();
        let unit = geometry.unit;
        let end = if range.end() == geometry.size { range.end() } else { range.end() / unit * unit };
        ByteRange::between(range.offset().next_multiple_of(unit), end)
    }

    async fn durable(&self, flags: WriteFlags) -> Result<()> {
        if flags.fua { self.layer.flush().await } else { Ok(()) }
    }
}

impl Disk for LayerDisk {
    fn geometry(&self) -> DiskGeometry {
        let layer = self.layer.geometry();
        DiskGeometry { size: layer.size, preferred_alignment: 1, unit: layer.unit, read_only: layer.read_only }
    }

    async fn read(&self, offset: u64, buf: Buf) -> Result<Buf> {
        self.read_present(ByteRange::new(offset, buf.len() as u64)).await
    }

    async fn write(&self, offset: u64, buf: Buf, flags: WriteFlags) -> Result<()> {
        self.write_bytes(offset, &buf).await?;
        self.durable(flags).await
    }

    async fn write_zeroes(&self, range: ByteRange, mode: ZeroMode, flags: WriteFlags) -> Result<()> {
        let whole = self.units(range);
        if whole.is_empty() {
            self.write_bytes(range.offset(), &vec![0; range.len() as usize]).await?;
            return self.durable(flags).await;
        }
        match self.layer.write_zeroes(whole, self.below(), mode).await {
            Err(error) if error.kind() == disk::ErrorKind::Unsupported => {
                self.write_bytes(whole.offset(), &vec![0; whole.len() as usize]).await?;
            }
            other => other?,
        }
        for edge in [ByteRange::between(range.offset(), whole.offset()), ByteRange::between(whole.end(), range.end())] {
            self.write_bytes(edge.offset(), &vec![0; edge.len() as usize]).await?;
        }
        self.durable(flags).await
    }

    async fn discard(&self, range: ByteRange, flags: WriteFlags) -> Result<()> {
        let whole = self.units(range);
        if !whole.is_empty() {
            self.layer.discard(whole, self.below()).await?;
        }
        self.durable(flags).await
    }

    async fn flush(&self) -> Result<()> {
        self.layer.flush().await
    }

    async fn map(&self, range: ByteRange) -> Result<DiskExtent> {
        let extent = self.layer.map(range).await?;
        let zero = match extent.presence {
            Presence::Zero { .. } => true,
            Presence::Absent => self.parent.is_none(),
            Presence::Data { .. } | Presence::Encoded { .. } => false,
        };
        Ok(DiskExtent { range: extent.range, allocated: !zero, zero, compressed: false, depth: None, source: None })
    }

    async fn resize(&self, size: u64) -> Result<()> {
        self.layer.resize(size, Preallocation::Off).await
    }

    async fn close(&self) -> Result<()> {
        self.layer.close().await
    }
}
