//! Bringing the tables to the storage, in an order that survives a loss of power.
//!
//! A flush copies everything that it will write before its first wait: the changed L2 slices, the changed
//! L1 entries, the list of unlinked clusters. Then:
//!
//! | step | writes | if power fails after it |
//! |---|---|---|
//! | 1 | refcount pages; sync; refcount table entries (only after new refcount blocks) | new blocks count themselves; clusters with a count that nothing refers to: leaks |
//! | 2 | sync: the guest's bytes and the counts | as above |
//! | 3 | L2 slices and L1 entries | any part of them: each 8-byte entry is old or new (16-byte extended entries do not cross a sector), and whatever a new one refers to was synced in step 2 |
//! | 4 | sync | all is there; unlinked clusters still count: leaks |
//! | – | unlinked clusters lose their reference in memory, and on the storage with the next flush | leaks |
//!
//! So the storage never shows a table that refers to a cluster without a count, to bytes that were not
//! written, or to a cluster that was given to somebody else meanwhile: clusters are reused only after step 4 of
//! the flush that unlinked them. A new L2 table needs no write of its own: its space reads as zero, or
//! holds the synced copy of a shared one, before an L1 entry leads there.
//!
//! With lazy reference counts step 1 is left out: the dirty bit stands in the header, and whoever opens the
//! image after a crash counts anew.
//!
//! When no table has changed, a flush is one sync. Concurrent flushes share one run.

use super::image::Image;
use disk::{Buf, Result, StorageHandle};
use futures_util::future::join_all;
use std::cell::Cell;

/// Largest write that neighbouring pieces are joined to.
const JOIN_MAX: usize = 1 << 20;

/// Flushes under way.
#[derive(Debug, Default)]
pub(super) struct Flushes {
    one: async_lock::Mutex<()>,
    started: Cell<u64>,
    /// Number of the last run that succeeded.
    completed: Cell<u64>,
}

/// Writes pieces of metadata, neighbours joined, all at the same time. Not durable before a sync.
pub(super) async fn write_all(storage: &StorageHandle, mut pieces: Vec<(u64, Buf)>) -> Result<()> {
    pieces.sort_by_key(|(offset, _)| *offset);
    let mut joined: Vec<(u64, Vec<Buf>, usize)> = Vec::new();
    for (offset, buf) in pieces {
        match joined.last_mut() {
            Some((start, bufs, len)) if *start + *len as u64 == offset && *len + buf.len() <= JOIN_MAX => {
                *len += buf.len();
                bufs.push(buf);
            }
            _ => {
                let len = buf.len();
                joined.push((offset, vec![buf], len));
            }
        }
    }
    let writes = joined.into_iter().map(|(offset, mut bufs, len)| {
        let whole = if bufs.len() == 1 {
            bufs.remove(0)
        } else {
            let mut whole = Buf::new(len);
            let mut at = 0;
            for buf in bufs {
                whole[at..at + buf.len()].copy_from_slice(&buf);
                at += buf.len();
            }
            whole
        };
        storage.write(offset, whole)
    });
    join_all(writes).await.into_iter().try_for_each(|written| written.map(drop))
}

impl Image {
    /// Makes everything durable that was complete before the call, and all tables clean. One run that starts after
    /// this call, shared with everybody else who waits.
    pub(super) async fn flush_all(&self) -> Result<()> {
        self.refuse_if_poisoned()?;
        let wanted = self.flushes.started.get() + 1;
        let _one = self.flushes.one.lock().await;
        if self.flushes.completed.get() >= wanted {
            return Ok(());
        }
        self.refuse_if_poisoned()?;
        let run = self.flushes.started.get() + 1;
        self.flushes.started.set(run);
        let done = self.run().await;
        self.poison_on_error(done)?;
        self.flushes.completed.set(run);
        Ok(())
    }

    async fn run(&self) -> Result<()> {
        // No waiting from here …
        // Held to the end: a slice that was dropped now would be read again before it is written.
        let taken = self.slices.take_dirty();
        let slices: Vec<(u64, Buf)> = taken
            .iter()
            .map(|slice| {
                let table = self.l2_table(slice.index)?.expect("a changed slice has its table");
                Ok((table + self.slices.geometry.offset_in_table(slice.index), slice.encode()))
            })
            .collect::<Result<_>>()?;
        let l1_offset = self.header.borrow().l1_offset;
        let l1_sectors = std::mem::take(&mut *self.dirty_l1.borrow_mut());
        let l1: Vec<(u64, Buf)> = {
            let table = self.l1.borrow();
            l1_sectors
                .into_iter()
                .map(|sector| {
                    let mut buf = Buf::zeroed(512);
                    for (bytes, entry) in buf.as_chunks_mut::<8>().0.iter_mut().zip(&table[sector * 64..]) {
                        *bytes = entry.to_be_bytes();
                    }
                    (l1_offset + sector as u64 * 512, buf)
                })
                .collect()
        };
        let unlinked = std::mem::take(&mut *self.unlinked.borrow_mut());
        // … to here.

        let tables_changed = !slices.is_empty() || !l1.is_empty();
        // Clusters of writes that were given up are unlinked without any table's change.
        let work = tables_changed || !unlinked.is_empty();
        let Some(allocator) = self.allocator.as_ref().filter(|a| work || a.refcounts.has_dirty() || a.has_limbo())
        else {
            return self.sync_both().await;
        };
        if !self.has_lazy_refcounts() || allocator.refcounts.needs_flush() {
            // The table must not move while entries of it are written.
            let _tables = allocator.hold_tables().await;
            allocator.refcounts.write_pages().await?;
            if allocator.refcounts.has_dirty_table() {
                self.storage.sync().await?;
                allocator.refcounts.write_table().await?;
            }
        }
        self.sync_both().await?;
        if tables_changed {
            write_all(&self.storage, slices).await?;
            write_all(&self.storage, l1).await?;
            self.storage.sync().await?;
        }
        drop(taken);
        if !unlinked.is_empty() {
            allocator.retire(unlinked, &self.epochs);
        }
        if allocator.has_limbo() {
            allocator.drain_limbo(&self.epochs).await?;
            allocator.punch_stale().await?;
        }
        Ok(())
    }

    /// Makes written bytes durable, in the data file first: tables refer to it.
    async fn sync_both(&self) -> Result<()> {
        if let Some(data) = &self.data_file {
            data.sync().await?;
        }
        self.storage.sync().await
    }

    /// Whether anything waits to be written.
    pub(super) fn is_dirty(&self) -> bool {
        self.slices.has_dirty()
            || !self.dirty_l1.borrow().is_empty()
            || !self.unlinked.borrow().is_empty()
            || self.allocator.as_ref().is_some_and(|a| a.has_limbo() || a.refcounts.has_dirty())
    }
}
