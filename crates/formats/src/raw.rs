//! The raw format: the guest's bytes stand in the storage at their own offsets.

use disk::{
    Below, Buf, ByteRange, ContentId, DiskError, ErrorKind, HistoryMark, Layer, LayerExtent, LayerGeometry,
    LayerIdentity, Operation, ParentLink, Preallocation, Presence, Result, StorageHandle, StorageId, TicketId,
    WritePlan, ZeroMode,
};
use std::cell::Cell;

/// How a raw image is opened.
#[derive(Clone, Copy, Debug, Default)]
pub struct OpenOptions {
    /// Refuse writes, even where the storage would take them.
    pub read_only: bool,
    /// The disk's size in bytes; `None`: the storage's present size.
    pub size: Option<u64>,
}

/// A raw image in one storage.
///
/// The disk's size is taken when the image is opened and changes by [`Layer::resize`] alone. It may exceed
/// the storage's: what is missing there reads as zero. Space that the storage holds none for shows only in
/// the storage's own extents. On a storage that does not promise zeroes behind a discard (a block device),
/// discarded bytes read as zero or as before.
pub struct RawLayer {
    storage: StorageHandle,
    size: Cell<u64>,
    read_only: bool,
    /// Set by a failed sync: the kernel may have dropped what it could not write, and a later sync would
    /// report success all the same.
    poisoned: Cell<bool>,
}

/// Zeroes that are written at a time, in bytes, when space is to be filled.
const FILL_STEP: u64 = 1 << 20;

impl RawLayer {
    /// Opens the image.
    pub fn open(storage: StorageHandle, options: OpenOptions) -> Self {
        let size = options.size.unwrap_or_else(|| storage.size());
        let read_only = options.read_only || storage.limits().read_only;
        Self { storage, size: Cell::new(size), read_only, poisoned: Cell::new(false) }
    }

    fn alive(&self, operation: Operation) -> Result<()> {
        match self.poisoned.get() {
            true => Err(DiskError::new(ErrorKind::Poisoned, operation).on(self.storage.name())),
            false => Ok(()),
        }
    }

    async fn fill_with_zeroes(&self, range: ByteRange) -> Result<()> {
        let mut rest = range;
        let mut zeroes = Buf::zeroed(rest.prefix(FILL_STEP).len() as usize);
        while !rest.is_empty() {
            let now = rest.prefix(FILL_STEP);
            zeroes.truncate(now.len() as usize);
            zeroes = self.storage.write(now.offset(), zeroes).await?;
            rest = rest.skip(now.len());
        }
        Ok(())
    }
}

impl Layer for RawLayer {
    fn geometry(&self) -> LayerGeometry {
        LayerGeometry {
            size: self.size.get(),
            unit: 1,
            block: 1,
            read_only: self.read_only,
            storage_holes: true,
            zero_over_parent: true,
            encoded_unit: None,
        }
    }

    fn storage(&self, id: StorageId) -> &StorageHandle {
        assert_eq!(id, StorageId::IMAGE, "a raw image has one storage");
        &self.storage
    }

    fn begin_io(&self) -> u64 {
        0 // Offsets never change their meaning.
    }

    fn end_io(&self, _epoch: u64) {}

    fn map_cached(&self, range: ByteRange) -> Option<LayerExtent> {
        let presence = Presence::Data { storage: StorageId::IMAGE, offset: range.offset() };
        Some(LayerExtent { range, presence })
    }

    async fn map(&self, range: ByteRange) -> Result<LayerExtent> {
        Ok(self.map_cached(range).expect("a raw image always knows"))
    }

    async fn read_encoded(&self, offset: u64, buf: Buf) -> Result<Buf> {
        Err(DiskError::new(ErrorKind::Unsupported, Operation::Read)
            .at(ByteRange::new(offset, buf.len() as u64))
            .because("raw images hold no encoded bytes"))
    }

    fn prepare_cached(&self, range: ByteRange) -> Option<WritePlan> {
        let plan = WritePlan { range, storage: StorageId::IMAGE, offset: range.offset(), ticket: None };
        (!self.poisoned.get()).then_some(plan)
    }

    async fn prepare_write(&self, range: ByteRange, _below: Below) -> Result<WritePlan> {
        self.alive(Operation::Write)?;
        Ok(WritePlan { range, storage: StorageId::IMAGE, offset: range.offset(), ticket: None })
    }

    async fn commit_write(&self, ticket: TicketId) -> Result<()> {
        Err(DiskError::new(ErrorKind::Invalid, Operation::Write)
            .because(format!("raw images give out no tickets, found {ticket:?}")))
    }

    fn abort_write(&self, _ticket: TicketId) {}

    async fn write_encoded(&self, range: ByteRange, _encoded: &[u8]) -> Result<()> {
        Err(DiskError::new(ErrorKind::Unsupported, Operation::Write)
            .at(range)
            .because("raw images hold no encoded bytes"))
    }

    async fn write_zeroes(&self, range: ByteRange, _below: Below, mode: ZeroMode) -> Result<()> {
        self.alive(Operation::WriteZeroes)?;
        self.storage.write_zeroes(range, mode).await
    }

    async fn discard(&self, range: ByteRange, _below: Below) -> Result<()> {
        self.alive(Operation::Discard)?;
        self.storage.discard(range).await
    }

    async fn flush(&self) -> Result<()> {
        self.alive(Operation::Flush)?;
        self.storage.sync().await.inspect_err(|_| self.poisoned.set(true))
    }

    async fn extend(&self, size: u64) -> Result<()> {
        // Nothing can be put behind the end of a file without making it longer, and nothing old is there: a raw image
        // has no parent, and `resize` removes what another program left.
        Layer::resize(self, size, Preallocation::Off).await
    }

    async fn resize(&self, size: u64, preallocation: Preallocation) -> Result<()> {
        self.alive(Operation::Resize)?;
        let old = self.size.get();
        let grown = ByteRange::between(old, size);
        if !grown.is_empty() && self.storage.size() > old {
            self.storage.set_size(old).await?; // Bytes behind the disk's end are not the guest's.
        }
        self.storage.set_size(size).await?;
        match preallocation {
            Preallocation::Off | Preallocation::Metadata => {}
            Preallocation::Falloc => self.storage.allocate(grown).await?,
            Preallocation::Full => self.fill_with_zeroes(grown).await?,
        }
        self.size.set(size);
        Ok(())
    }

    fn history_mark(&self) -> Option<HistoryMark> {
        None // All of the storage is the guest's.
    }

    async fn set_history_mark(&self, _mark: Option<HistoryMark>) -> Result<bool> {
        Ok(false)
    }

    fn identity(&self) -> LayerIdentity {
        LayerIdentity::default()
    }

    async fn set_parent_link(&self, _link: Option<ParentLink>) -> Result<bool> {
        Ok(false)
    }

    fn link_with_first_write(&self, _link: ParentLink) {}

    async fn renew_content_id(&self, _id: ContentId) -> Result<bool> {
        Ok(false)
    }

    async fn close(&self) -> Result<()> {
        match self.read_only {
            true => Ok(()),
            false => Layer::flush(self).await,
        }
    }
}
