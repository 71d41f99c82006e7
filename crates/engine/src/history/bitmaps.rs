//! QEMU's persistent bitmaps as beginnings of histories, and marks as such bitmaps. On images that nobody uses.

use super::HistorySource;
use super::offline::{name_of, open, open_with_history};
use super::report::MarkReport;
use crate::images::gate::FileGate;
use crate::images::mended::Mended;
use crate::images::{Workshop, closing, offload_format};
use crate::{EngineError, Format};
use chain::{Access, OpenGate};
use disk::{ByteRange, LayerHandle};
use formats::qcow2::{BitmapRanges, Header, Image, NewBitmap, OpenOptions};
use tracking::{Consistency, NewPoint};

/// Changes that one question brings.
const CHANGES: usize = 4096;
/// QEMU's own choice of a granularity.
const GRANULARITY: u64 = 64 << 10;

impl Workshop {
    /// Takes a mark of an image since which everything has changed that a persistent bitmap of QEMU's calls dirty: whoever
    /// made a backup when the bitmap was cleared goes on with this mark.
    ///
    /// # Errors
    /// When the image is no qcow2 image, has no such bitmap, or one that is not to be trusted.
    pub async fn import_bitmap(
        &self,
        source: HistorySource,
        bitmap: String,
        mark: String,
    ) -> Result<MarkReport, EngineError> {
        self.run(move || async move {
            require_qcow2(&source).await?;
            // Read first: the next write of a guest's makes the bitmap one that is not to be trusted.
            let dirty = {
                let storage = FileGate::cached().open_storage(&source.file, Access::ReadOnly).await?;
                let header = Header::read(&storage).await?;
                let mut ranges = BitmapRanges::open(&storage, &header, &bitmap).await?;
                let mut dirty = Vec::new();
                while let Some(range) = ranges.next().await? {
                    dirty.push(range);
                }
                dirty
            };
            let stack = open(&source, true).await?;
            let imported = import(&stack, &name_of(&source), &mark, &dirty).await;
            closing(&stack, imported).await
        })
        .await
    }

    /// Stores what changed since a mark as a persistent bitmap of QEMU's in the image; one of the same name is replaced. QEMU
    /// records further changes in it when it uses the image.
    ///
    /// # Errors
    /// When the image is no qcow2 image of version 3, the mark is missing or refused, or the bitmap cannot be stored.
    pub async fn export_bitmap(&self, source: HistorySource, mark: String, bitmap: String) -> Result<(), EngineError> {
        self.run(move || async move {
            let format = require_qcow2(&source).await?;
            let stack = open_with_history(&source, true).await?;
            let dirty = dirty_since(&stack, &name_of(&source), &mark).await;
            let dirty = closing(&stack, dirty).await?;
            drop(stack); // And with it the locks.
            let storage = FileGate::cached().open_storage(&source.file, Access::ReadWrite).await?;
            // Storing a bitmap changes the file, and no byte that a guest sees.
            let mended = Mended::before(&source.file, format, source.history.file.clone()).await;
            let stored = store(&storage, &bitmap, &dirty).await;
            let Some(mended) = mended else { return stored };
            match (&stored, Header::read(&storage).await) {
                (Ok(()), Ok(header)) => mended.after(true, header.history_mark()).await,
                _ => mended.give_up().await,
            }
            stored
        })
        .await
    }
}

async fn require_qcow2(source: &HistorySource) -> Result<Format, EngineError> {
    match offload_format(source.file.clone(), source.format).await? {
        Format::Qcow2 => Ok(Format::Qcow2),
        Format::Raw => Err(EngineError::Unsupported(format!(
            "{}: only qcow2 images hold persistent bitmaps, and this is a raw one",
            source.file.display()
        ))),
    }
}

async fn import(
    stack: &crate::images::stack::Stack,
    disk: &str,
    mark: &str,
    dirty: &[ByteRange],
) -> Result<MarkReport, EngineError> {
    stack.hold(mark).await?;
    stack.cut(NewPoint { name: mark.to_owned(), set: super::host::random_id() }, None);
    let report = stack.commit(disk, Consistency::Crash).await?;
    let recorded = record(stack, dirty).await;
    if recorded.is_err() {
        stack.delete_mark(mark).await?;
    }
    recorded.map(|()| report)
}

async fn record(stack: &crate::images::stack::Stack, dirty: &[ByteRange]) -> Result<(), EngineError> {
    let kept = stack.kept()?;
    for range in dirty {
        kept.disk.record(*range).await?;
    }
    Ok(())
}

async fn dirty_since(
    stack: &crate::images::stack::Stack,
    disk: &str,
    mark: &str,
) -> Result<Vec<ByteRange>, EngineError> {
    let mut dirty: Vec<ByteRange> = Vec::new();
    let mut next = Some(0);
    while let Some(from) = next {
        let part = stack.changes(disk, mark, None, from, CHANGES).await?;
        for range in &part.ranges {
            let range = ByteRange::new(range.start, range.length);
            match dirty.last_mut() {
                Some(last) if last.end() == range.offset() => *last = ByteRange::between(last.offset(), range.end()),
                _ => dirty.push(range),
            }
        }
        next = part.next;
    }
    Ok(dirty)
}

async fn store(storage: &disk::StorageHandle, bitmap: &str, dirty: &[ByteRange]) -> Result<(), EngineError> {
    let header = Header::read(storage).await?;
    if header.has_data_file() {
        return Err(EngineError::Unsupported(format!(
            "{}: the image keeps its data in another file, for which bitmaps are not stored here",
            storage.name()
        )));
    }
    let image = Image::open(storage.clone(), None, OpenOptions::default()).await?;
    let stored = image.store_bitmap(&NewBitmap { name: bitmap, granularity: GRANULARITY, auto: true }, dirty).await;
    let closed = LayerHandle::from_rc(image).close().await;
    stored?;
    Ok(closed?)
}
