//! The second contract: one image, which says where the guest's bytes are.

use crate::{
    Buf, ByteRange, ContentId, DiskError, ErrorKind, LayerExtent, LayerIdentity, LocalFuture, Operation, ParentLink,
    Presence, Result, StorageHandle, StorageId, ZeroMode,
};
use std::fmt;
use std::future::Future;
use std::rc::Rc;

/// A layer's immutable or slowly changing facts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LayerGeometry {
    /// Size of the guest's disk in bytes.
    pub size: u64,
    /// Zeroes and discards take whole units of so many bytes (a power of two). 1 where there is none.
    pub unit: u64,
    /// Space is set aside in blocks of so many bytes (a power of two, a multiple of `unit`). In the block that the
    /// disk's end cuts old bytes may stand behind the end. 1 where there is none.
    pub block: u64,
    /// Whether writes are refused.
    pub read_only: bool,
    /// Whether `Data` extents may be holes of the storage, so that its own extents tell more (raw files).
    pub storage_holes: bool,
    /// Whether the layer can hold "zero" and so hide a parent without storing bytes.
    pub zero_over_parent: bool,
    /// What [`Layer::write_encoded`] takes at a time, in bytes (a power of two); `None` where the format
    /// stores no encoded bytes.
    pub encoded_unit: Option<u64>,
}

/// What lies below a layer at the place of a write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Below {
    /// Nothing, or bytes known to be zero: what is absent reads as zero.
    Zeroes,
    /// A parent whose bytes show through where this layer holds none.
    Parent,
}

/// With what the rest of newly allocated blocks around a write must be filled before it is committed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fill {
    /// With nothing: the space is known to read as it should.
    Nothing,
    /// With zero bytes.
    Zeroes,
    /// With the guest's present bytes, read through this layer and what is below it.
    Present,
}

/// Names a prepared write within its layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct TicketId(pub u64);

/// New blocks were set aside for a write and wait for their bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ticket {
    /// Its name.
    pub id: TicketId,
    /// The new blocks, in guest offsets; contains the plan's range and stands in a row in the storage, so
    /// that `blocks.offset()` is at `plan.offset - (plan.range.offset() - blocks.offset())`. May reach
    /// beyond the disk's size.
    pub blocks: ByteRange,
    /// What belongs into the part of `blocks` outside the plan's range.
    pub fill: Fill,
}

/// Where a write's bytes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WritePlan {
    /// The guest's bytes that this plan is about: a prefix of what was asked for, never empty.
    pub range: ByteRange,
    /// Into which storage of the layer.
    pub storage: StorageId,
    /// At which offset the range's first byte goes there.
    pub offset: u64,
    /// `None`: write, and that is all. `Some`: fill, write, then commit.
    pub ticket: Option<Ticket>,
}

/// How much to set aside when an image grows or is made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Preallocation {
    /// Nothing.
    #[default]
    Off,
    /// The format's tables.
    Metadata,
    /// Tables, and space in the file system (`fallocate`).
    Falloc,
    /// Tables, and zeroes written.
    Full,
}

/// What an image records about the history that is kept beside it: which of the guest's bytes changed when.
///
/// An image bears it in such a way that a program which does not know of it and writes to the image takes it away.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HistoryMark {
    /// Which history: constant as long as it goes on without a gap.
    pub lineage: [u8; 16],
    /// Which moment of it: changed at every opening for writing and every clean close.
    pub moment: [u8; 16],
}

/// One image in one format. It answers "where?"; the caller moves the guest's bytes.
///
/// A layer lives on one thread (its disk's home thread), so it needs no locks; requests interleave at
/// every `await`. There are no default bodies. The handle has checked that ranges are not empty and lie
/// inside the disk's size, and that writes do not reach a read-only layer.
///
/// **Stability.** An offset returned by `map*` or `prepare*` is not given to other bytes before the
/// [`IoGuard`] is dropped that was taken before the question.
///
/// **Writes.** `prepare_write` → fill and write → `commit_write`. Until the commit, readers see the old
/// bytes. Requests that touch the same new blocks wait for each other inside the layer. A ticket that is
/// aborted leaves the guest's bytes as they were. A plan without a ticket is in place, or new space that
/// already reads as the old bytes did, so that a crash between cannot show anything else.
///
/// **Durability.** What was written or committed before `flush` began is durable when it returns. Before
/// that a crash may lose it, byte by byte, but leaves the image sound.
///
/// **Poison.** After a failed metadata write or sync every further write and flush fails with
/// [`ErrorKind::Poisoned`]. A metadata write that fails with [`ErrorKind::NoSpace`] was not done: the layer may go on and
/// do it later.
///
/// **History.** Whoever keeps a history of the image sets a mark before the first write. A layer that is written to
/// without [`Layer::set_history_mark`] in this opening loses the mark, durably, before the first write.
///
/// **Identity.** A layer that can bear an id of its content gets another one, durably, before the first write of an opening
/// (and of what follows a [`Layer::close`]) changes anything: never is other content found under an old id.
pub trait Layer: 'static {
    /// The facts.
    fn geometry(&self) -> LayerGeometry;
    /// The storage of that id.
    ///
    /// # Panics
    /// When the layer has none of that id: ids come from its own answers.
    fn storage(&self, id: StorageId) -> &StorageHandle;
    /// Begins a span in which returned offsets stay valid; returns what `end_io` needs.
    fn begin_io(&self) -> u64;
    /// Ends the span.
    fn end_io(&self, epoch: u64);
    /// The first extent of the range, when memory alone can tell.
    fn map_cached(&self, range: ByteRange) -> Option<LayerExtent>;
    /// The first extent of the range.
    fn map(&self, range: ByteRange) -> impl Future<Output = Result<LayerExtent>>;
    /// Fills `buf` with the guest's bytes from `offset`, all of which `map` called `Encoded`.
    fn read_encoded(&self, offset: u64, buf: Buf) -> impl Future<Output = Result<Buf>>;
    /// Plans a write in place, when memory alone can tell that it is in place.
    fn prepare_cached(&self, range: ByteRange) -> Option<WritePlan>;
    /// Plans a write, and sets space aside if need be.
    fn prepare_write(&self, range: ByteRange, below: Below) -> impl Future<Output = Result<WritePlan>>;
    /// Makes the new blocks visible; all their bytes have been written.
    fn commit_write(&self, ticket: TicketId) -> impl Future<Output = Result<()>>;
    /// Gives the new blocks back.
    fn abort_write(&self, ticket: TicketId);
    /// Stores one `encoded_unit` (or the last, shorter one) of the guest's bytes in encoded form, as the format's
    /// encoder made it.
    fn write_encoded(&self, range: ByteRange, encoded: &[u8]) -> impl Future<Output = Result<()>>;
    /// Makes whole units read as zero (the last may be cut by the disk's end).
    /// Fails with [`ErrorKind::Unsupported`] when only written bytes can do that.
    fn write_zeroes(&self, range: ByteRange, below: Below, mode: ZeroMode) -> impl Future<Output = Result<()>>;
    /// Gives back whole units. Afterwards they read as zero; where the format cannot say so over a
    /// parent, they stay as they are.
    fn discard(&self, range: ByteRange, below: Below) -> impl Future<Output = Result<()>>;
    /// Makes everything durable that was complete before the call.
    fn flush(&self) -> impl Future<Output = Result<()>>;
    /// Shows a larger size without making it durable, so that what must not be seen there can be covered first: old
    /// bytes in the last block, and the bytes of a longer parent. After a crash the disk has its old size.
    /// `resize` to the same size follows, or a second call that takes it back.
    fn extend(&self, size: u64) -> impl Future<Output = Result<()>>;
    /// Changes the size of the guest's disk. What is cut off is lost. What is added reads as zero, but for the rest of
    /// the last block, and for what shows through from a parent.
    fn resize(&self, size: u64, preallocation: Preallocation) -> impl Future<Output = Result<()>>;
    /// The mark, if the image bears one and nobody has written to the image who does not know it. No I/O.
    fn history_mark(&self) -> Option<HistoryMark>;
    /// Puts the mark into the image (or takes it out) and makes that durable; the guest's bytes stay as they are.
    /// `false`: this image cannot bear one, and nothing has changed. After a crash the mark is the old one, the new one,
    /// or none.
    fn set_history_mark(&self, mark: Option<HistoryMark>) -> impl Future<Output = Result<bool>>;
    /// What the image says about its content and its parent. No I/O.
    fn identity(&self) -> LayerIdentity;
    /// Puts the link to the parent into the image (or takes it out) and makes that durable; the guest's bytes and the
    /// content's id stay as they are, but for an image that bears none, or one that lapsed, and gets one with it.
    /// `false`: this image cannot bear a link, and nothing has changed. After a crash the link is the old or the new one.
    fn set_parent_link(&self, link: Option<ParentLink>) -> impl Future<Output = Result<bool>>;
    /// The same together with the first write of this opening; nothing happens if there is none, or it has been already.
    fn link_with_first_write(&self, link: ParentLink);
    /// Gives the content that id, durably, ahead of a first write which then leaves it as it is: for who must name the
    /// coming content somewhere else before. `false`: this image cannot bear one.
    fn renew_content_id(&self, id: ContentId) -> impl Future<Output = Result<bool>>;
    /// Flushes, and leaves the image marked as cleanly closed. No request is under way or follows.
    fn close(&self) -> impl Future<Output = Result<()>>;
}

/// [`Layer`] with its futures boxed.
trait ErasedLayer {
    fn geometry(&self) -> LayerGeometry;
    fn storage(&self, id: StorageId) -> &StorageHandle;
    fn begin_io(&self) -> u64;
    fn end_io(&self, epoch: u64);
    fn map_cached(&self, range: ByteRange) -> Option<LayerExtent>;
    fn map(&self, range: ByteRange) -> LocalFuture<'_, Result<LayerExtent>>;
    fn read_encoded(&self, offset: u64, buf: Buf) -> LocalFuture<'_, Result<Buf>>;
    fn prepare_cached(&self, range: ByteRange) -> Option<WritePlan>;
    fn prepare_write(&self, range: ByteRange, below: Below) -> LocalFuture<'_, Result<WritePlan>>;
    fn commit_write(&self, ticket: TicketId) -> LocalFuture<'_, Result<()>>;
    fn abort_write(&self, ticket: TicketId);
    fn write_encoded<'a>(&'a self, range: ByteRange, encoded: &'a [u8]) -> LocalFuture<'a, Result<()>>;
    fn write_zeroes(&self, range: ByteRange, below: Below, mode: ZeroMode) -> LocalFuture<'_, Result<()>>;
    fn discard(&self, range: ByteRange, below: Below) -> LocalFuture<'_, Result<()>>;
    fn flush(&self) -> LocalFuture<'_, Result<()>>;
    fn extend(&self, size: u64) -> LocalFuture<'_, Result<()>>;
    fn resize(&self, size: u64, preallocation: Preallocation) -> LocalFuture<'_, Result<()>>;
    fn history_mark(&self) -> Option<HistoryMark>;
    fn set_history_mark(&self, mark: Option<HistoryMark>) -> LocalFuture<'_, Result<bool>>;
    fn identity(&self) -> LayerIdentity;
    fn set_parent_link(&self, link: Option<ParentLink>) -> LocalFuture<'_, Result<bool>>;
    fn link_with_first_write(&self, link: ParentLink);
    fn renew_content_id(&self, id: ContentId) -> LocalFuture<'_, Result<bool>>;
    fn close(&self) -> LocalFuture<'_, Result<()>>;
}

impl<T: Layer> ErasedLayer for T {
    fn geometry(&self) -> LayerGeometry {
        Layer::geometry(self)
    }
    fn storage(&self, id: StorageId) -> &StorageHandle {
        Layer::storage(self, id)
    }
    fn begin_io(&self) -> u64 {
        Layer::begin_io(self)
    }
    fn end_io(&self, epoch: u64) {
        Layer::end_io(self, epoch);
    }
    fn map_cached(&self, range: ByteRange) -> Option<LayerExtent> {
        Layer::map_cached(self, range)
    }
    fn map(&self, range: ByteRange) -> LocalFuture<'_, Result<LayerExtent>> {
        Box::pin(Layer::map(self, range))
    }
    fn read_encoded(&self, offset: u64, buf: Buf) -> LocalFuture<'_, Result<Buf>> {
        Box::pin(Layer::read_encoded(self, offset, buf))
    }
    fn prepare_cached(&self, range: ByteRange) -> Option<WritePlan> {
        Layer::prepare_cached(self, range)
    }
    fn prepare_write(&self, range: ByteRange, below: Below) -> LocalFuture<'_, Result<WritePlan>> {
        Box::pin(Layer::prepare_write(self, range, below))
    }
    fn commit_write(&self, ticket: TicketId) -> LocalFuture<'_, Result<()>> {
        Box::pin(Layer::commit_write(self, ticket))
    }
    fn abort_write(&self, ticket: TicketId) {
        Layer::abort_write(self, ticket);
    }
    fn write_encoded<'a>(&'a self, range: ByteRange, encoded: &'a [u8]) -> LocalFuture<'a, Result<()>> {
        Box::pin(Layer::write_encoded(self, range, encoded))
    }
    fn write_zeroes(&self, range: ByteRange, below: Below, mode: ZeroMode) -> LocalFuture<'_, Result<()>> {
        Box::pin(Layer::write_zeroes(self, range, below, mode))
    }
    fn discard(&self, range: ByteRange, below: Below) -> LocalFuture<'_, Result<()>> {
        Box::pin(Layer::discard(self, range, below))
    }
    fn flush(&self) -> LocalFuture<'_, Result<()>> {
        Box::pin(Layer::flush(self))
    }
    fn extend(&self, size: u64) -> LocalFuture<'_, Result<()>> {
        Box::pin(Layer::extend(self, size))
    }
    fn resize(&self, size: u64, preallocation: Preallocation) -> LocalFuture<'_, Result<()>> {
        Box::pin(Layer::resize(self, size, preallocation))
    }
    fn history_mark(&self) -> Option<HistoryMark> {
        Layer::history_mark(self)
    }
    fn set_history_mark(&self, mark: Option<HistoryMark>) -> LocalFuture<'_, Result<bool>> {
        Box::pin(Layer::set_history_mark(self, mark))
    }
    fn identity(&self) -> LayerIdentity {
        Layer::identity(self)
    }
    fn set_parent_link(&self, link: Option<ParentLink>) -> LocalFuture<'_, Result<bool>> {
        Box::pin(Layer::set_parent_link(self, link))
    }
    fn link_with_first_write(&self, link: ParentLink) {
        Layer::link_with_first_write(self, link);
    }
    fn renew_content_id(&self, id: ContentId) -> LocalFuture<'_, Result<bool>> {
        Box::pin(Layer::renew_content_id(self, id))
    }
    fn close(&self) -> LocalFuture<'_, Result<()>> {
        Box::pin(Layer::close(self))
    }
}

/// What everybody holds instead of a `Layer`.
#[derive(Clone)]
pub struct LayerHandle(Rc<dyn ErasedLayer>);

impl LayerHandle {
    /// Wraps a layer.
    pub fn new(layer: impl Layer) -> Self {
        Self(Rc::new(layer))
    }

    /// Wraps a layer of which somebody keeps the typed side as well.
    pub fn from_rc(layer: Rc<impl Layer>) -> Self {
        Self(layer)
    }

    /// The facts.
    pub fn geometry(&self) -> LayerGeometry {
        self.0.geometry()
    }

    /// The storage of that id, which the layer's own answers named.
    pub fn storage(&self, id: StorageId) -> &StorageHandle {
        self.0.storage(id)
    }

    /// While the guard lives, offsets returned after it was taken stay valid.
    pub fn guard(&self) -> IoGuard {
        IoGuard { epoch: self.0.begin_io(), layer: self.clone() }
    }

    /// The first extent of the range, when memory alone can tell.
    pub fn map_cached(&self, range: ByteRange) -> Option<LayerExtent> {
        if self.validate(Operation::Map, range).is_err() {
            return None; // `map` will say why.
        }
        let extent = self.0.map_cached(range)?;
        debug_assert!(is_prefix(extent.range, range));
        Some(extent)
    }

    /// The first extent of the range.
    pub async fn map(&self, range: ByteRange) -> Result<LayerExtent> {
        self.validate(Operation::Map, range)?;
        if let Some(extent) = self.0.map_cached(range) {
            return Ok(extent);
        }
        let extent = self.0.map(range).await?;
        debug_assert!(is_prefix(extent.range, range));
        Ok(extent)
    }

    /// Fills `buf` from the encoded bytes at `offset`.
    pub async fn read_encoded(&self, offset: u64, buf: Buf) -> Result<Buf> {
        self.validate(Operation::Read, ByteRange::new(offset, buf.len() as u64))?;
        self.0.read_encoded(offset, buf).await
    }

    /// Plans a write in place, when memory alone can tell that it is in place.
    pub fn prepare_cached(&self, range: ByteRange) -> Option<WritePlan> {
        self.validate_write(Operation::Write, range).ok()?;
        let plan = self.0.prepare_cached(range)?;
        debug_assert!(is_prefix(plan.range, range) && plan.ticket.is_none());
        Some(plan)
    }

    /// Plans a write. When the result is dropped without [`PreparedWrite::commit`], it is rolled back.
    pub async fn prepare_write(&self, range: ByteRange, below: Below) -> Result<PreparedWrite> {
        self.validate_write(Operation::Write, range)?;
        let plan = self.0.prepare_write(range, below).await?;
        debug_assert!(is_prefix(plan.range, range));
        Ok(PreparedWrite { plan, layer: self.clone() })
    }

    /// Stores one unit in encoded form.
    pub async fn write_encoded(&self, range: ByteRange, encoded: &[u8]) -> Result<()> {
        self.validate_write(Operation::Write, range)?;
        let LayerGeometry { encoded_unit, size, .. } = self.geometry();
        let Some(unit) = encoded_unit else {
            return Err(DiskError::new(ErrorKind::Unsupported, Operation::Write)
                .at(range)
                .because("this format does not store compressed bytes"));
        };
        let whole =
            range.offset().is_multiple_of(unit) && (range.len() == unit || range.end() == size && range.len() < unit);
        if !whole {
            return Err(DiskError::new(ErrorKind::Invalid, Operation::Write)
                .at(range)
                .because(format!("compressed bytes are written in whole units of {unit} bytes")));
        }
        self.0.write_encoded(range, encoded).await
    }

    /// Makes whole units read as zero.
    pub async fn write_zeroes(&self, range: ByteRange, below: Below, mode: ZeroMode) -> Result<()> {
        self.validate_write(Operation::WriteZeroes, range)?;
        self.validate_units(Operation::WriteZeroes, range)?;
        self.0.write_zeroes(range, below, mode).await
    }

    /// Gives back whole units.
    pub async fn discard(&self, range: ByteRange, below: Below) -> Result<()> {
        self.validate_write(Operation::Discard, range)?;
        self.validate_units(Operation::Discard, range)?;
        self.0.discard(range, below).await
    }

    /// Makes everything durable that was complete before the call.
    pub async fn flush(&self) -> Result<()> {
        if self.geometry().read_only {
            return Ok(());
        }
        self.0.flush().await
    }

    /// Shows a larger size without making it durable, or takes that back.
    pub async fn extend(&self, size: u64) -> Result<()> {
        if self.geometry().read_only {
            return Err(DiskError::new(ErrorKind::ReadOnly, Operation::Resize));
        }
        self.0.extend(size).await
    }

    /// Changes the size of the guest's disk.
    pub async fn resize(&self, size: u64, preallocation: Preallocation) -> Result<()> {
        if self.geometry().read_only {
            return Err(DiskError::new(ErrorKind::ReadOnly, Operation::Resize));
        }
        self.0.resize(size, preallocation).await
    }

    /// The history's mark, if the image bears one and nobody has written to it who does not know of it. No I/O.
    pub fn history_mark(&self) -> Option<HistoryMark> {
        self.0.history_mark()
    }

    /// Puts the history's mark into the image, or takes it out, durably. `false`: this image cannot bear one.
    pub async fn set_history_mark(&self, mark: Option<HistoryMark>) -> Result<bool> {
        if self.geometry().read_only {
            return Err(DiskError::new(ErrorKind::ReadOnly, Operation::Write));
        }
        self.0.set_history_mark(mark).await
    }

    /// What the image says about its content and its parent. No I/O.
    pub fn identity(&self) -> LayerIdentity {
        self.0.identity()
    }

    /// The id of the image's content; `None` when it bears none, or one that has no meaning any more. No I/O.
    pub fn content_id(&self) -> Option<ContentId> {
        self.0.identity().content
    }

    /// What the image remembers of its parent, if it was bound to one. No I/O.
    pub fn parent_link(&self) -> Option<ParentLink> {
        self.0.identity().link
    }

    /// Puts the link to the parent into the image, or takes it out, durably. `false`: this image cannot bear one.
    pub async fn set_parent_link(&self, link: Option<ParentLink>) -> Result<bool> {
        if self.geometry().read_only {
            return Err(DiskError::new(ErrorKind::ReadOnly, Operation::Write));
        }
        self.0.set_parent_link(link).await
    }

    /// Puts the link into the image together with the first write of this opening. Nothing happens if there is none, or
    /// where the image cannot bear a link.
    pub fn link_with_first_write(&self, link: ParentLink) {
        if !self.geometry().read_only {
            self.0.link_with_first_write(link);
        }
    }

    /// Gives the content that id, durably, ahead of the first write, which leaves it. `false`: this image cannot bear one.
    pub async fn renew_content_id(&self, id: ContentId) -> Result<bool> {
        if self.geometry().read_only {
            return Err(DiskError::new(ErrorKind::ReadOnly, Operation::Write));
        }
        self.0.renew_content_id(id).await
    }

    /// Flushes, and leaves the image marked as cleanly closed.
    pub async fn close(&self) -> Result<()> {
        self.0.close().await
    }

    fn validate(&self, operation: Operation, range: ByteRange) -> Result<()> {
        let size = self.0.geometry().size;
        if range.is_empty() || range.end() > size {
            return Err(out_of_range(operation, range, size));
        }
        Ok(())
    }

    fn validate_write(&self, operation: Operation, range: ByteRange) -> Result<()> {
        let LayerGeometry { size, read_only, .. } = self.0.geometry();
        if read_only {
            return Err(DiskError::new(ErrorKind::ReadOnly, operation).at(range));
        }
        if range.is_empty() || range.end() > size {
            return Err(out_of_range(operation, range, size));
        }
        Ok(())
    }

    fn validate_units(&self, operation: Operation, range: ByteRange) -> Result<()> {
        let LayerGeometry { unit, size, .. } = self.geometry();
        if range.offset().is_multiple_of(unit) && (range.end().is_multiple_of(unit) || range.end() == size) {
            return Ok(());
        }
        Err(DiskError::new(ErrorKind::Invalid, operation).at(range).because(format!("not whole units of {unit} bytes")))
    }
}

#[cold]
fn out_of_range(operation: Operation, range: ByteRange, size: u64) -> DiskError {
    let kind = if range.is_empty() { ErrorKind::Invalid } else { ErrorKind::OutOfRange };
    DiskError::new(kind, operation).at(range).because(format!("the disk has {size} bytes"))
}

fn is_prefix(part: ByteRange, of: ByteRange) -> bool {
    !part.is_empty() && part.offset() == of.offset() && part.len() <= of.len()
}

impl fmt::Debug for LayerHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "LayerHandle({:?})", self.geometry())
    }
}

/// While it lives, offsets that the layer returned after it was taken are not given to other bytes.
pub struct IoGuard {
    layer: LayerHandle,
    epoch: u64,
}

impl Drop for IoGuard {
    fn drop(&mut self) {
        self.layer.0.end_io(self.epoch);
    }
}

/// A planned write; rolled back on drop unless committed.
pub struct PreparedWrite {
    plan: WritePlan,
    layer: LayerHandle,
}

impl PreparedWrite {
    /// What to write where.
    pub fn plan(&self) -> &WritePlan {
        &self.plan
    }

    /// Makes the write visible; its bytes and the fill have been written.
    pub async fn commit(mut self) -> Result<()> {
        match self.plan.ticket.take() {
            Some(ticket) => self.layer.0.commit_write(ticket.id).await,
            None => Ok(()),
        }
    }
}

impl Drop for PreparedWrite {
    fn drop(&mut self) {
        if let Some(ticket) = self.plan.ticket.take() {
            self.layer.0.abort_write(ticket.id);
        }
    }
}

impl LayerExtent {
    /// Whether a caller must look into the parent.
    pub fn is_absent(&self) -> bool {
        self.presence == Presence::Absent
    }
}
