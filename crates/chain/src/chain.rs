//! The chain itself, and its face as a disk.

use crate::background::Background;
use crate::guest::Guest;
use crate::requests::Requests;
use crate::stack::Stack;
use disk::{
    Buf, ByteRange, Disk, DiskExtent, DiskGeometry, LayerHandle, Operation, Preallocation, Result, StorageId,
    WriteFlags, ZeroMode,
};
use formats::Format;
use std::cell::{Cell, RefCell};
use std::path::PathBuf;
use std::rc::Rc;

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
/// everything behind the end of a parent that is shorter than its child. A guest writes to the top layer alone.
///
/// The layers can be exchanged for others while the disk is in use ([`Chain::switch`]). Whoever asks for them gets what
/// they are at that moment, and does not keep it over a switch.
///
/// Its futures are to be polled to their end: a write that is dropped half-way gives its new blocks back
/// while the storage may still be writing to them.
pub struct Chain {
    layers: RefCell<Rc<[LayerInfo]>>,
    pub(crate) requests: Requests,
    pub(crate) background: RefCell<Option<Background>>,
    guest: Guest,
    preferred_alignment: Cell<u32>,
}

impl Chain {
    /// A disk of these layers, top first.
    ///
    /// # Panics
    /// When there is no layer.
    pub fn new(layers: Vec<LayerInfo>) -> Self {
        assert!(!layers.is_empty(), "a chain has at least one layer");
        Self {
            preferred_alignment: Cell::new(preferred_alignment(&layers)),
            layers: RefCell::new(layers.into()),
            requests: Requests::default(),
            background: RefCell::default(),
            guest: Guest::default(),
        }
    }

    /// The layers as they are now, top first.
    pub fn layers(&self) -> Rc<[LayerInfo]> {
        Rc::clone(&self.layers.borrow())
    }

    /// The top layer as it is now: the one that is written.
    pub fn top(&self) -> LayerHandle {
        self.layers.borrow()[0].handle.clone()
    }

    /// How many requests have asked to move bytes so far: who works beside the guest sees by it whether the guest is at work.
    pub fn served(&self) -> u64 {
        self.guest.asked()
    }

    /// Waits until none of the guest's requests that move bytes is under way.
    pub async fn guest_rests(&self) {
        self.guest.rests().await;
    }

    /// Puts other layers in place; no request is under way.
    pub(crate) fn replace_layers(&self, layers: Vec<LayerInfo>) {
        self.preferred_alignment.set(preferred_alignment(&layers));
        *self.layers.borrow_mut() = layers.into();
    }

    /// Changes the size, and sets space aside. Waits until requests under way have ended.
    ///
    /// # Errors
    /// What the top layer reports. When a grow fails half-way the old size is restored as far as possible.
    pub async fn resize_with(&self, size: u64, preallocation: Preallocation) -> Result<()> {
        self.change_size(size, preallocation).await
    }
}

fn preferred_alignment(layers: &[LayerInfo]) -> u32 {
    let alignment = |layer: &LayerInfo| layer.handle.storage(StorageId::IMAGE).limits().alignment;
    layers.iter().map(alignment).max().unwrap_or(1)
}

impl Disk for Chain {
    fn geometry(&self) -> DiskGeometry {
        let top = self.layers.borrow()[0].handle.geometry();
        DiskGeometry {
            size: top.size,
            preferred_alignment: self.preferred_alignment.get(),
            unit: top.unit,
            read_only: top.read_only,
        }
    }

    async fn read(&self, offset: u64, buf: Buf) -> Result<Buf> {
        let _at_work = self.guest.asks();
        let _request = self.requests.enter(Operation::Read).await?;
        Stack::new(&self.layers()).read_through(offset, buf).await
    }

    async fn write(&self, offset: u64, buf: Buf, flags: WriteFlags) -> Result<()> {
        let _at_work = self.guest.asks();
        let _request = self.requests.enter(Operation::Write).await?;
        if let Some(job) = self.background() {
            return Box::pin(self.write_beside(job, offset, buf, flags)).await;
        }
        let layers = self.layers();
        let stack = self.stack(&layers);
        stack.write_top(offset, buf).await?;
        stack.finish_write(flags).await
    }

    async fn write_zeroes(&self, range: ByteRange, mode: ZeroMode, flags: WriteFlags) -> Result<()> {
        let _at_work = self.guest.asks();
        let _request = self.requests.enter(Operation::WriteZeroes).await?;
        if let Some(job) = self.background() {
            return Box::pin(self.zero_beside(job, range, mode, flags)).await;
        }
        let layers = self.layers();
        let stack = self.stack(&layers);
        stack.zero_top(range, mode).await?;
        stack.finish_write(flags).await
    }

    async fn discard(&self, range: ByteRange, flags: WriteFlags) -> Result<()> {
        let _at_work = self.guest.asks();
        let _request = self.requests.enter(Operation::Discard).await?;
        if let Some(job) = self.background() {
            return Box::pin(self.discard_beside(job, range, flags)).await;
        }
        let layers = self.layers();
        let stack = self.stack(&layers);
        stack.discard_top(range).await?;
        stack.finish_write(flags).await
    }

    async fn flush(&self) -> Result<()> {
        // A request like any other: no layer is flushed while layers are switched.
        let _request = self.requests.enter(Operation::Flush).await?;
        self.top().flush().await
    }

    async fn map(&self, range: ByteRange) -> Result<DiskExtent> {
        let _request = self.requests.enter(Operation::Map).await?;
        Stack::new(&self.layers()).map_merged(range).await
    }

    async fn resize(&self, size: u64) -> Result<()> {
        self.change_size(size, Preallocation::Off).await
    }

    async fn close(&self) -> Result<()> {
        // A change of size or of layers may be under way that no connection waits for; whoever comes later is refused.
        let _exclusive = self.requests.exclude().await;
        self.requests.close();
        // What it has brought about so far is in the layers, or at its target, which is the job's to close.
        self.background.replace(None);
        // All are closed, also when one fails: the first failure is what the caller gets to know.
        let mut result = Ok(());
        for layer in self.layers().iter() {
            result = result.and(layer.handle.close().await);
        }
        result
    }
}
