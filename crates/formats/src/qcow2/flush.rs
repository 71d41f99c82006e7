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
//!
//! When space runs out, what could not be written goes back on the lists and the flush fails with `NoSpace`; the next
//! one begins anew at step 1. Any part of step 3 that was written is as after a crash there: what it refers to was
//! synced, and nothing that it unlinked is given to anybody. Every other failure stops the image.

use super::allocator::Allocator;
use super::image::Image;
use super::slices::Slice;
use disk::{Buf, ErrorKind, Result, StorageHandle};
use futures_util::future::join_all;
use std::cell::Cell;
use std::collections::BTreeSet;
use std::rc::Rc;

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

/// What a flush has taken upon itself to write.
struct Changes {
    /// Held to the end: a slice that was dropped meanwhile would be read again before it is written.
    slices: Vec<Rc<Slice>>,
    l1_sectors: BTreeSet<usize>,
    unlinked: Vec<u64>,
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
        let done = self.mark_if_corrupt(done).await;
        self.poison_on_error(done)?;
        self.flushes.completed.set(run);
        Ok(())
    }

    async fn run(&self) -> Result<()> {
        let changes = Changes {
            slices: self.slices.take_dirty(),
            l1_sectors: std::mem::take(&mut *self.dirty_l1.borrow_mut()),
            unlinked: std::mem::take(&mut *self.unlinked.borrow_mut()),
        };
        // Copies what it writes before it waits, so that changes and copies are of one instant.
        match self.write_changes(&changes).await {
            Ok(None) => Ok(()),
            Ok(Some(allocator)) => self.free_unlinked(allocator, changes).await,
            Err(error) => {
                if error.kind() == ErrorKind::NoSpace {
                    self.put_back(changes);
                }
                Err(error)
            }
        }
    }

    /// Steps 1 to 4. Returns the allocator if it has something to do afterwards.
    async fn write_changes(&self, changes: &Changes) -> Result<Option<&Allocator>> {
        // No waiting from here …
        let slices: Vec<(u64, Buf)> = changes
            .slices
            .iter()
            .map(|slice| {
                let table = self.l2_table(slice.index)?.expect("a changed slice has its table");
                Ok((table + self.slices.geometry.offset_in_table(slice.index), slice.encode()))
            })
            .collect::<Result<_>>()?;
        let l1_offset = self.header.borrow().l1_offset;
        let l1: Vec<(u64, Buf)> = {
            let table = self.l1.borrow();
            changes
                .l1_sectors
                .iter()
                .map(|&sector| {
                    let mut buf = Buf::zeroed(512);
                    for (bytes, entry) in buf.as_chunks_mut::<8>().0.iter_mut().zip(&table[sector * 64..]) {
                        *bytes = entry.to_be_bytes();
                    }
                    (l1_offset + sector as u64 * 512, buf)
                })
                .collect()
        };
        // … to here.

        let tables_changed = !slices.is_empty() || !l1.is_empty();
        // Clusters of writes that were given up are unlinked without any table's change.
        let work = tables_changed || !changes.unlinked.is_empty();
        let Some(allocator) = self.allocator.as_ref().filter(|a| work || a.refcounts.has_dirty() || a.has_limbo())
        else {
            self.sync_both().await?;
            return Ok(None);
        };
        if !self.has_lazy_refcounts() || allocator.refcounts.needs_flush() {
            // The table must not move while entries of it are written.
            let _tables = allocator.hold_tables().await;
            allocator.refcounts.write_pages().await?;
            if allocator.refcounts.has_dirty_table() {
                allocator.sync().await?;
                allocator.refcounts.write_table().await?;
            }
        }
        self.sync_both().await?;
        if tables_changed {
            write_all(&self.storage, slices).await?;
            write_all(&self.storage, l1).await?;
            allocator.sync().await?;
        }
        Ok(Some(allocator))
    }

    /// Step 5: the unlinking is durable.
    async fn free_unlinked(&self, allocator: &Allocator, changes: Changes) -> Result<()> {
        if !changes.unlinked.is_empty() {
            allocator.retire(changes.unlinked, &self.epochs);
        }
        if allocator.has_limbo() {
            allocator.drain_limbo(&self.epochs).await?;
            allocator.punch_stale().await;
        }
        Ok(())
    }

    /// Has the next flush write what this one could not.
    fn put_back(&self, changes: Changes) {
        for slice in &changes.slices {
            self.slices.mark_dirty(slice);
        }
        self.dirty_l1.borrow_mut().extend(changes.l1_sectors);
        self.unlinked.borrow_mut().extend(changes.unlinked);
    }

    /// Makes written bytes durable, in the data file first: tables refer to it. A sync that failed is never repeated.
    async fn sync_both(&self) -> Result<()> {
        if let Some(data) = &self.data_file {
            data.sync().await.inspect_err(|_| self.poisoned.set(true))?;
        }
        self.storage.sync().await.inspect_err(|_| self.poisoned.set(true))
    }

    /// Whether anything waits to be written.
    pub(super) fn is_dirty(&self) -> bool {
        self.slices.has_dirty()
            || !self.dirty_l1.borrow().is_empty()
            || !self.unlinked.borrow().is_empty()
            || self.allocator.as_ref().is_some_and(|a| a.has_limbo() || a.refcounts.has_dirty())
    }
}
