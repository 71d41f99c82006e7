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
    /// * Autoclear bits that are unknown here are cleared, as the specification demands; and that of a history, unless
    ///   whoever opened the image keeps it on.
    /// * The content gets another id (`identity.rs`), and the image the link that waits for this.
    /// * With lazy reference counts the dirty bit is set.
    ///
    /// Crash: the header's features are in one sector and durable before the write that they announce. Bitmaps
    /// are marked before that; marked bitmaps of an image that nobody wrote to are merely not used.
    pub(super) async fn announce_writing(&self) -> Result<()> {
        self.invalidate_bitmaps(Invalidate::Recording).await?;
        // An id of another version's, which cannot be changed, is given up like that of a program that is unknown.
        let identified = self.announce_identity().await?;
        let lazy = self.has_lazy_refcounts();
        self.change_features(|header| {
            header.autoclear &= header::AUTOCLEAR_KNOWN;
            if !self.tracked.get() {
                header.autoclear &= !header::AUTOCLEAR_HISTORY;
            }
            match identified {
                true => header.autoclear |= header::AUTOCLEAR_IDENTITY,
                false => header.autoclear &= !header::AUTOCLEAR_IDENTITY,
            }
            if lazy {
                header.incompatible |= header::INCOMPATIBLE_DIRTY;
            }
        })
        .await
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
            let version = self.header.borrow().version;
            if version >= 3 {
                let marked = self.change_features(|header| header.incompatible |= header::INCOMPATIBLE_CORRUPT).await;
                // The error is what the caller must know; that the mark could not be set changes nothing in it.
                if let Err(error) = marked {
                    tracing::error!(image = self.storage.name(), ?error, "the corrupt bit could not be set");
                }
            }
        }
        result
    }

    /// Changes the feature words, and if that makes a difference, writes them and makes them durable. Those in memory
    /// change when they are durable.
    pub(super) async fn change_features(&self, change: impl FnOnce(&mut Header)) -> Result<()> {
        let _one = self.features.lock().await;
        let mut header = self.header.borrow().clone();
        change(&mut header);
        let words_of = |header: &Header| [header.incompatible, header.compatible, header.autoclear];
        let wanted = words_of(&header);
        if wanted == words_of(&self.header.borrow()) {
            return Ok(());
        }
        // Bytes 72–95: incompatible, compatible and autoclear features; only version 3 has any.
        let mut words = Vec::with_capacity(24);
        for word in wanted {
            words.extend_from_slice(&word.to_be_bytes());
        }
        self.storage.write(72, Buf::copy_of(&words)).await?;
        self.sync_header().await?;
        let mut present = self.header.borrow_mut();
        present.incompatible = header.incompatible;
        present.compatible = header.compatible;
        present.autoclear = header.autoclear;
        Ok(())
    }

    /// Makes durable what was written to the header. A sync that failed is never repeated.
    pub(super) async fn sync_header(&self) -> Result<()> {
        self.storage.sync().await.inspect_err(|_| self.poisoned.set(true))
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

    /// Makes all counts durable, and whatever else was written.
    pub(super) async fn write_counts(&self) -> Result<()> {
        let allocator = self.allocator()?;
        let _tables = allocator.hold_tables().await;
        allocator.refcounts.write_pages().await?;
        allocator.sync().await?;
        // Crash: a block that can be found has its counts.
        allocator.refcounts.write_table().await?;
        allocator.sync().await
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
            self.write_counts().await?;
            self.change_features(|header| header.incompatible &= !header::INCOMPATIBLE_DIRTY).await?;
        }
        // Whoever writes again must announce it again.
        self.writing.set(false);
        self.renewed.set(false);
        Ok(())
    }
}
