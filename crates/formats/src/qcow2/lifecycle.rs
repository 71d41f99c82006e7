//! The first write and the close: what an image says about whether somebody is at work on it.

use super::image::Image;
use super::{Header, Invalidate, header};
use disk::{Buf, ErrorKind, Result};

impl Image {
    /// Whether reference counts are written at the close only.
    pub(super) fn has_lazy_refcounts(&self) -> bool {
        self.header.borrow().compatible & header::COMPATIBLE_LAZY_REFCOUNTS != 0
    }

    /// What is due before the first write reaches the image:
    /// * Bitmaps of QEMU's are marked as not to be trusted, since nobody keeps them from here on.
    /// * Autoclear bits that are unknown here are cleared, as the specification demands.
    /// * With lazy reference counts the dirty bit is set.
    ///
    /// Crash: the header's features are in one sector and durable before the write that they announce. Bitmaps
    /// are marked before that; marked bitmaps of an image that nobody wrote to are merely not used.
    pub(super) async fn announce_writing(&self) -> Result<()> {
        self.invalidate_bitmaps(Invalidate::Recording).await?;
        let mut header = self.header.borrow().clone();
        header.autoclear &= header::AUTOCLEAR_KNOWN;
        if self.has_lazy_refcounts() {
            header.incompatible |= header::INCOMPATIBLE_DIRTY;
        }
        self.write_features(header).await
    }

    /// Passes a write's result on; when the image turned out to contradict the format, sets its corrupt bit and stops
    /// all further writing, so that nobody makes it worse before it is repaired.
    pub(super) async fn mark_if_corrupt<T>(&self, result: Result<T>) -> Result<T> {
        let result = result.map_err(|error| error.on(self.storage.name()));
        if let Err(error) = &result
            && error.kind() == ErrorKind::Corrupt
            && !self.poisoned.replace(true)
        {
            tracing::error!(image = self.storage.name(), ?error, "the image is corrupt and takes no more writes");
            let mut header = self.header.borrow().clone();
            if header.version >= 3 {
                header.incompatible |= header::INCOMPATIBLE_CORRUPT;
                // The error is what the caller must know; that the mark could not be set changes nothing in it.
                if let Err(error) = self.write_features(header).await {
                    tracing::error!(image = self.storage.name(), ?error, "the corrupt bit could not be set");
                }
            }
        }
        result
    }

    /// Writes the feature words, if they changed, and makes them durable.
    async fn write_features(&self, header: Header) -> Result<()> {
        if header == *self.header.borrow() {
            return Ok(());
        }
        // Bytes 72–95: incompatible, compatible and autoclear features; only version 3 has any.
        let mut words = Vec::with_capacity(24);
        for word in [header.incompatible, header.compatible, header.autoclear] {
            words.extend_from_slice(&word.to_be_bytes());
        }
        self.storage.write(72, Buf::copy_of(&words)).await?;
        self.storage.sync().await?;
        let mut present = self.header.borrow_mut();
        present.incompatible = header.incompatible;
        present.compatible = header.compatible;
        present.autoclear = header.autoclear;
        Ok(())
    }

    /// Writes all tables, gives back what was given up, and takes the dirty bit away.
    ///
    /// Crash: before the last step the image is as after a crash at work; the dirty bit goes after the counts are
    /// durable.
    pub(super) async fn close_cleanly(&self) -> Result<()> {
        if self.allocator.is_none() {
            return Ok(());
        }
        self.refuse_if_poisoned()?;
        let closed = self.close_tables().await;
        self.poison_on_error(closed)
    }

    async fn close_tables(&self) -> Result<()> {
        let allocator = self.allocator()?;
        let given_up = std::mem::take(&mut *allocator.given_up.borrow_mut());
        self.unlinked.borrow_mut().extend(given_up);
        // The first round unlinks, the second writes the counts of what was unlinked; with requests still
        // under way (against the contract) clusters stay in limbo, as leaks.
        for _ in 0..3 {
            self.flush_all().await?;
            if !self.is_dirty() {
                break;
            }
        }
        if !self.writing.get() {
            return Ok(());
        }
        allocator.trim_file().await?;
        if !self.has_lazy_refcounts() {
            self.storage.sync().await?;
        } else {
            {
                let _tables = allocator.hold_tables().await;
                allocator.refcounts.write_pages().await?;
                self.storage.sync().await?;
                allocator.refcounts.write_table().await?;
                self.storage.sync().await?;
            }
            let mut header = self.header.borrow().clone();
            header.incompatible &= !header::INCOMPATIBLE_DIRTY;
            self.write_features(header).await?;
        }
        // Whoever writes again must announce it again.
        self.writing.set(false);
        Ok(())
    }
}
