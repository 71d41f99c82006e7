//! Bringing what memory knows into the table, so that the journal can begin anew.

use crate::epoch_marks::EpochMarks;
use crate::history::{AT_ONCE, History};
use crate::index::{IndexBlock, PageEntry};
use crate::layout::{self, GROUP_PAGES};
use crate::page_set::PageSet;
use crate::superblock::Superblock;
use crate::{HistoryError, Point, points};
use disk::{Buf, DiskError, ErrorKind, Operation};
use futures_util::stream::{self, StreamExt, TryStreamExt};
use std::collections::BTreeMap;

/// A change of the list of points.
pub(crate) type PointsEdit = Box<dyn FnOnce(&mut Vec<Point>)>;

impl History {
    /// Writes the table.
    pub(crate) async fn checkpoint(&self) -> Result<(), HistoryError> {
        self.checkpoint_with(None, |_| {}).await
    }

    /// Writes the table, perhaps with another list of points and other fields of the superblock: all or nothing.
    ///
    /// Crash: everything goes into slots that do not count, and is synced. Then one superblock makes all of it count: the
    /// pages, index blocks and points that it speaks of, and the end of the journal up to the cut. Before it is durable
    /// the old table and the whole journal count, which together say the same: blocks of the journal are not
    /// overwritten before that. Intents that are declared meanwhile stand behind the cut.
    ///
    /// # Errors
    /// `NoSpace` leaves all as it was, to be tried again. Any other failure stops the tracking.
    pub(crate) async fn checkpoint_with(
        &self,
        points: Option<PointsEdit>,
        change: impl FnOnce(&mut Superblock),
    ) -> Result<(), HistoryError> {
        let _one = self.checkpointing.lock().await;
        let work = self.begin_work(false);
        let result = self.checkpoint_alone(points, change).await;
        work.finish();
        result
    }

    async fn checkpoint_alone(
        &self,
        points: Option<PointsEdit>,
        change: impl FnOnce(&mut Superblock),
    ) -> Result<(), HistoryError> {
        if self.storage.limits().read_only {
            // Not a failure that gives the history up: nobody but its reader asked.
            let error = DiskError::new(ErrorKind::ReadOnly, Operation::Write).on(self.storage.name());
            return Err(error.because("the history was opened for reading").into());
        }
        self.go_on_giving_up().await?;
        self.refuse_if_stopped()?;
        // Looked at under the lock, so that no edit is lost.
        let points = points.map(|edit| {
            let mut points = self.state.borrow().points.clone();
            edit(&mut points);
            points
        });
        // No waiting from here: what stands before the cut is entered in the marks whose pages are taken.
        let (cut, pages, forgotten) = {
            let mut known = self.state.borrow_mut();
            // What was only declared ahead is not in the table, so its declaration ends with the journal.
            known.forget_ahead();
            let mut pages = std::mem::take(&mut known.current.dirty);
            if let Some(frozen) = &mut known.frozen {
                pages.add(&std::mem::take(&mut frozen.dirty));
            }
            (known.next_sequence, pages, known.ahead_forgotten)
        };
        // To here.
        let frozen_epoch = self.state.borrow().frozen.as_ref().map(|frozen| frozen.epoch);
        let written = self.write_table(&pages, points.as_deref()).await;
        let written = match written {
            Ok(written) => written,
            Err(error) => {
                self.keep_dirty(&pages, frozen_epoch);
                let no_space = matches!(&error, HistoryError::Disk(e) if e.kind() == ErrorKind::NoSpace)
                    || matches!(&error, HistoryError::TooManyPoints);
                if !no_space {
                    self.stop(&format!("the table of changes could not be written: {error}")).await?;
                }
                return Err(error);
            }
        };
        let Written { entries, groups, points_slot, points_bytes } = written;
        let epoch = self.state.borrow().current.epoch;
        let committed = self
            .write_superblock(|superblock| {
                superblock.generation += 1;
                superblock.journal_start = cut;
                superblock.epoch = epoch;
                if let Some(bytes) = &points_bytes {
                    superblock.points_slot = points_slot;
                    superblock.points_len = bytes.len() as u32;
                    superblock.points_sum = crc32c::crc32c(bytes);
                }
                change(superblock);
                superblock.index_sum = self.state.borrow().index_sum(superblock, &groups);
            })
            .await;
        if let Err(error) = committed {
            // Nobody knows which of the two counts now.
            self.keep_dirty(&pages, frozen_epoch);
            self.stop(&format!("the history's superblock could not be written: {error}")).await?;
            return Err(error);
        }
        {
            let mut known = self.state.borrow_mut();
            for (page, entry) in entries {
                known.index[page] = entry;
            }
            let generation = known.superblock.generation;
            for (group, slot) in groups {
                known.group_slots[group] = slot;
                known.generations[group] = generation;
            }
            if let Some(points) = points {
                known.points = points;
            }
            known.ahead_forgotten -= forgotten;
            if known.frozen.as_ref().map(|frozen| frozen.epoch) == frozen_epoch {
                known.frozen = None;
            }
        }
        self.shed();
        Ok(())
    }

    fn keep_dirty(&self, pages: &PageSet, frozen_epoch: Option<u32>) {
        let mut known = self.state.borrow_mut();
        known.current.dirty.add(pages);
        if let Some(frozen) = &mut known.frozen
            && Some(frozen.epoch) == frozen_epoch
        {
            frozen.dirty.add(pages);
        }
    }

    /// Writes pages, index blocks and points into slots that do not count, and syncs.
    async fn write_table(&self, pages: &PageSet, points: Option<&[Point]>) -> Result<Written, HistoryError> {
        let entries: BTreeMap<usize, PageEntry> = stream::iter(pages.iter().collect::<Vec<_>>())
            .map(|page| async move {
                let counters = self.page(page).await?;
                Ok::<_, HistoryError>((page, self.store_page(page, &counters).await?))
            })
            .buffer_unordered(AT_ONCE)
            .try_collect()
            .await?;
        let mut groups = Vec::new();
        let mut blocks = Vec::new();
        {
            let known = self.state.borrow();
            let generation = known.superblock.generation + 1;
            let mut touched: Vec<usize> = entries.keys().map(|page| page / GROUP_PAGES as usize).collect();
            touched.dedup();
            for group in touched {
                let first = group * GROUP_PAGES as usize;
                let mut all = known.index[first..first + GROUP_PAGES as usize].to_vec();
                for (page, entry) in entries.range(first..first + GROUP_PAGES as usize) {
                    all[page - first] = *entry;
                }
                let slot = 1 - known.group_slots[group];
                let block = IndexBlock { group: group as u64, generation, entries: all }.encode();
                blocks.push((layout::index_block(group as u64, slot), block));
                groups.push((group, slot));
            }
        }
        for (place, block) in blocks {
            self.storage.write(place, Buf::copy_of(&block)).await?;
        }
        let points_slot = 1 - self.state.borrow().superblock.points_slot;
        let points_bytes = match points {
            None => None,
            Some(points) => {
                let bytes = points::encode(points).ok_or(HistoryError::TooManyPoints)?;
                let place = layout::POINTS[usize::from(points_slot)];
                self.storage.write(place, Buf::copy_of(&bytes)).await?;
                Some(bytes)
            }
        };
        self.storage.sync().await?;
        Ok(Written { entries, groups, points_slot, points_bytes })
    }

    /// Whether memory may know more of the page than the table.
    pub(crate) fn memory_speaks_of(&self, page: usize) -> bool {
        let known = self.state.borrow();
        let speaks = |marks: &EpochMarks| marks.speaks_of(page);
        known.frozen.as_ref().is_some_and(speaks) || speaks(&known.current)
    }
}

struct Written {
    entries: BTreeMap<usize, PageEntry>,
    groups: Vec<(usize, u8)>,
    points_slot: u8,
    points_bytes: Option<Vec<u8>>,
}
