//! Declaring changes before they happen.
//!
//! A write waits until the change of its granules is durable, as `Data`, in the journal. Writes that wait at the same time
//! share one sync: the first that finds nobody at work does it for all that are queued.

use crate::epoch_marks::Run;
use crate::history::{History, Known};
use crate::journal_block::{ENTRIES, JournalBlock};
use crate::layout::{self, JOURNAL_BLOCKS};
use crate::superblock::{State, Superblock};
use crate::{ChangeKind, HistoryError};
use disk::{Buf, ByteRange, DiskError, ErrorKind, Operation};

/// Most bytes that are declared ahead of one writer.
const AHEAD_OF_ONE: u64 = 16 << 20;
/// When so many blocks of the journal are in use, the table is due.
pub(crate) const JOURNAL_DUE: u64 = JOURNAL_BLOCKS / 2;

/// What a granule needs before it may be written to.
enum Need {
    /// Nothing any more.
    Nothing,
    /// The ticket's durability.
    Ticket(u64),
    /// An intent of its own.
    Intent,
}

impl Known {
    /// What the granules from `at` need; and where that changes, at `end` at the latest.
    fn need(&self, at: u64, end: u64, committed: u64) -> (Need, u64) {
        if self.current.is_marked(at) {
            let marked = (at..end).find(|granule| !self.current.is_marked(*granule)).unwrap_or(end);
            return (Need::Nothing, marked);
        }
        let wait = |ticket| if ticket <= committed { Need::Nothing } else { Need::Ticket(ticket) };
        if let Some((run_end, run)) = self.current.runs.get(at) {
            let need = match run {
                Run::Intended(ticket) => wait(ticket),
                Run::Zeroing(_) | Run::Kind(ChangeKind::Data) => Need::Nothing,
                Run::Kind(ChangeKind::Zero | ChangeKind::Discarded) => Need::Intent,
            };
            return (need, run_end.min(end));
        }
        let until = self.current.runs.next_start(at).unwrap_or(u64::MAX).min(end);
        if let Some((run_end, ticket)) = self.ahead.get(at) {
            return (wait(ticket), run_end.min(until));
        }
        let until = self.ahead.next_start(at).unwrap_or(u64::MAX).min(until);
        // Up to the next granule that has its bit.
        let free = (at + 1..until).find(|granule| self.current.is_marked(*granule)).unwrap_or(until);
        (Need::Intent, free)
    }
}

impl History {
    /// The granules that a range touches: first and one past the last.
    pub(crate) fn granules(&self, range: ByteRange) -> (u64, u64) {
        let last = (range.end() - 1) >> self.granule_bits;
        (range.offset() >> self.granule_bits, last + 1)
    }

    /// Whether the range may be written to at once. The write path's only question in a disk's ordinary life.
    pub(crate) fn is_marked(&self, range: ByteRange) -> bool {
        self.wrote.set(true);
        let (start, end) = self.granules(range);
        self.state.borrow().current.all_marked(start, end)
    }

    pub(crate) fn is_stopped(&self) -> bool {
        self.stopped.borrow().is_some()
    }

    /// Returns when the range may be written to: when its granules' change is durable, or tracking has stopped.
    ///
    /// # Errors
    /// When neither could be achieved; the write must not be issued then.
    pub(crate) async fn declare(&self, range: ByteRange) -> Result<(), DiskError> {
        self.declare_all(&[range], true).await
    }

    /// The same for many ranges at once, which may be a part of sequential `streams`.
    pub(crate) async fn declare_all(&self, ranges: &[ByteRange], streams: bool) -> Result<(), DiskError> {
        self.wake().await?;
        loop {
            if self.is_stopped() {
                return Ok(());
            }
            let tickets = ranges.iter().filter_map(|range| {
                let (start, end) = self.granules(*range);
                self.queue_intents(start, end, streams)
            });
            match tickets.max() {
                Some(ticket) => self.durable(ticket).await?,
                None => return Ok(()),
            }
        }
    }

    /// Queues what is missing, and returns the ticket to wait for; with `None` the granules' bits are set.
    fn queue_intents(&self, start: u64, end: u64, streams: bool) -> Option<u64> {
        let committed = self.committed.get();
        let mut known = self.state.borrow_mut();
        let known = &mut *known;
        let mut wait = 0;
        let next_ticket = known.tickets + 1;
        let mut missing: Option<(u64, u64)> = None;
        let mut at = start;
        while at < end {
            let (need, until) = known.need(at, end, committed);
            match need {
                Need::Nothing => {}
                Need::Ticket(ticket) => wait = wait.max(ticket),
                Need::Intent => {
                    known.current.set_run(at, until, Run::Intended(next_ticket));
                    known.queue.push((at, until));
                    missing = Some((missing.map_or(at, |(first, _)| first), until));
                }
            }
            at = until;
        }
        if let Some((first, last)) = missing {
            known.tickets = next_ticket;
            wait = next_ticket;
            if streams {
                self.declare_ahead(known, first, last, next_ticket);
            }
        }
        if wait > 0 {
            return Some(wait);
        }
        if let Some((run_end, _)) = known.ahead.get(end - 1) {
            self.go_further_ahead(known, end, run_end);
        }
        known.ahead.remove(start, end);
        known.current.mark(start, end);
        None
    }

    /// A sequential writer has reached `at` of what was declared for it up to `until`: declares more in time, without
    /// waiting.
    fn go_further_ahead(&self, known: &mut Known, at: u64, until: u64) {
        let Some(window) = known.streams.window_up_to(until) else { return };
        if (until - at) * 2 > window {
            return;
        }
        known.tickets += 1;
        let ticket = known.tickets;
        self.declare_ahead(known, until, until, ticket);
        self.wanted.notify(1);
    }

    /// Declares what a sequential writer will probably write next, as far as the bound allows.
    fn declare_ahead(&self, known: &mut Known, start: u64, end: u64, ticket: u64) {
        let left =
            (self.open_limit.get() >> self.granule_bits).saturating_sub(known.ahead.total() + known.ahead_forgotten);
        let most = left.min(AHEAD_OF_ONE >> self.granule_bits);
        let ahead = known.streams.ahead_of(start, end, most);
        let disk_end = known.superblock.size.div_ceil(1 << self.granule_bits);
        let mut at = end;
        let until = (end + ahead).min(disk_end);
        while at < until {
            let (need, next) = known.need(at, until, 0);
            if matches!(need, Need::Intent) && known.current.runs.get(at).is_none() {
                known.ahead.insert(at, next, ticket);
                known.ahead_queue.push((at, next));
            }
            at = next;
        }
    }

    /// Waits until the ticket's intents are durable, or tracking has stopped.
    async fn durable(&self, ticket: u64) -> Result<(), DiskError> {
        while self.committed.get() < ticket && !self.is_stopped() {
            if self.committing.get() {
                self.changed.listen().await;
                continue;
            }
            self.committing.set(true);
            let work = self.begin_work(true);
            let result = self.commit_queue().await;
            work.finish();
            result?;
        }
        Ok(())
    }

    /// Writes all queued intents into the journal and syncs.
    ///
    /// Crash: a block that is torn or missing ends the journal. Nobody has written to the image yet who waits for it.
    async fn commit_queue(&self) -> Result<(), DiskError> {
        self.go_on_giving_up().await?;
        if self.is_stopped() {
            return Ok(());
        }
        let (runs, ticket) = {
            let mut known = self.state.borrow_mut();
            let mut runs = std::mem::take(&mut known.queue);
            runs.append(&mut known.ahead_queue);
            (runs, known.tickets)
        };
        if runs.is_empty() {
            self.committed.set(ticket);
            return Ok(());
        }
        let runs = joined(runs);
        let blocks = runs.len().div_ceil(ENTRIES) as u64;
        if self.journal_in_use() + blocks > JOURNAL_BLOCKS {
            // The table takes these as well, as they are entered already, and the journal begins anew. What was only
            // declared ahead is forgotten by it.
            return match self.checkpoint().await {
                Ok(()) => {
                    self.committed.set(ticket);
                    Ok(())
                }
                Err(error) => self.stop(&format!("the table of changes could not be written: {error}")).await,
            };
        }
        // No waiting up to the first write: the blocks' numbers are this batch's.
        let (blocks, places, next) = {
            let mut known = self.state.borrow_mut();
            let (journal, epoch, time) = (known.superblock.journal, known.current.epoch, self.host.now());
            let mut blocks = Vec::new();
            let mut places = Vec::new();
            let batch = known.next_sequence;
            for part in runs.chunks(ENTRIES) {
                let sequence = known.next_sequence;
                known.next_sequence += 1;
                blocks.push(JournalBlock { journal, sequence, batch, epoch, time, runs: part.to_vec() }.encode());
                places.push(layout::journal_block(sequence));
            }
            (blocks, places, known.next_sequence)
        };
        for (block, place) in blocks.iter().zip(places) {
            if let Err(error) = self.storage.write(place, Buf::copy_of(block)).await {
                return self.stop(&format!("the journal of changes could not be written: {error}")).await;
            }
        }
        if let Err(error) = self.storage.sync().await {
            return self.stop(&format!("the journal of changes could not be made durable: {error}")).await;
        }
        self.journal_durable.set(next);
        self.committed.set(ticket);
        if self.journal_in_use() >= JOURNAL_DUE {
            self.wanted.notify(1);
        }
        Ok(())
    }

    /// Makes all queued intents durable, for which nobody waits yet.
    pub(crate) async fn commit_queued(&self) -> Result<(), DiskError> {
        let (ticket, nothing) = {
            let known = self.state.borrow();
            (known.tickets, known.queue.is_empty() && known.ahead_queue.is_empty())
        };
        if nothing { Ok(()) } else { self.durable(ticket).await }
    }

    pub(crate) fn journal_in_use(&self) -> u64 {
        let known = self.state.borrow();
        known.next_sequence - known.superblock.journal_start
    }

    /// Gives up recording changes, and makes that durable before anybody may write unrecorded.
    ///
    /// Crash: the old state counts, and nothing was written unrecorded yet.
    ///
    /// # Errors
    /// When neither the sidecar could be marked nor removed: then nobody may write.
    pub(crate) async fn stop(&self, reason: &str) -> Result<(), DiskError> {
        if self.is_stopped() {
            return Ok(());
        }
        tracing::error!(history = self.storage.name(), reason, "tracking stops; older points are lost");
        let reason = self.giving_up.borrow_mut().get_or_insert_with(|| reason.to_owned()).clone();
        let lost = |superblock: &mut Superblock| {
            superblock.state = State::Lost;
            superblock.reason.clone_from(&reason);
        };
        let marked = self.put_superblock(false, lost).await;
        if marked.is_ok()
            && let Err(error) = self.put_superblock(false, lost).await
        {
            // Both slots are to say so, lest one that goes bad brings the history back; one is enough to go on.
            tracing::warn!(history = self.storage.name(), %error, "the history is marked as lost in one place only");
        }
        if let Err(error) = marked {
            tracing::error!(history = self.storage.name(), %error, "the history cannot be marked as lost");
            self.host.remove_sidecar().await.map_err(|error| {
                DiskError::new(ErrorKind::Io, Operation::Write)
                    .on(self.storage.name())
                    .because("changes can neither be recorded nor the history given up; remove its file, or open the disk without history")
                    .caused_by(error)
            })?;
        }
        self.refuse_points(&reason);
        *self.stopped.borrow_mut() = Some(reason);
        self.changed.notify(usize::MAX);
        Ok(())
    }

    /// Writes a superblock that what follows relies on; where that fails, the history is given up, and nothing relies on it.
    /// `of` is what it was to be told of.
    ///
    /// # Errors
    /// As [`History::stop`].
    pub(crate) async fn tell(&self, of: &str, change: impl FnOnce(&mut Superblock)) -> Result<(), DiskError> {
        if self.is_stopped() {
            return Ok(());
        }
        match self.write_superblock(change).await {
            Ok(()) => Ok(()),
            Err(HistoryError::Stopped { reason }) => self.stop(&reason).await,
            Err(error) => self.stop(&format!("the history could not be told {of}: {error}")).await,
        }
    }

    /// Tries again to give up, if that was decided and could not be done.
    ///
    /// # Errors
    /// As [`History::stop`].
    pub(crate) async fn go_on_giving_up(&self) -> Result<(), DiskError> {
        let reason = self.giving_up.borrow().clone();
        match reason {
            Some(reason) => self.stop(&reason).await,
            None => Ok(()),
        }
    }

    /// Writes the superblock into the slot that does not count.
    ///
    /// Crash: a torn slot has no valid checksum, and the other one, with the lower sequence, counts.
    ///
    /// # Errors
    /// When it cannot be written, or tracking stops meanwhile: that a history is lost is never overwritten.
    pub(crate) async fn write_superblock(&self, change: impl FnOnce(&mut Superblock)) -> Result<(), HistoryError> {
        self.put_superblock(true, change).await
    }

    async fn put_superblock(&self, kept: bool, change: impl FnOnce(&mut Superblock)) -> Result<(), HistoryError> {
        let _one = self.superblock_lock.lock().await;
        if kept && let Some(reason) = self.giving_up.borrow().clone() {
            return Err(HistoryError::Stopped { reason });
        }
        let work = self.begin_work(false);
        let mut next = self.state.borrow().superblock.clone();
        if self.heir_succeeds.get()
            && let Some(as_heir) = next.of_heir()
        {
            next = as_heir;
        }
        change(&mut next);
        next.sequence += 1;
        next.time = self.host.now();
        let place = layout::SUPERBLOCKS[(next.sequence & 1) as usize];
        let written = match self.storage.write(place, Buf::copy_of(&next.encode())).await {
            Ok(_) => self.storage.sync().await,
            Err(error) => Err(error),
        };
        work.finish();
        written?;
        self.state.borrow_mut().superblock = next;
        Ok(())
    }

    /// Work that must be polled to its end.
    pub(crate) fn begin_work(&self, commits: bool) -> Work<'_> {
        Work { history: self, commits, finished: false }
    }
}

/// Work on the sidecar. When it is dropped half-way, its requests go on to their ends at some time, and nobody knows what
/// they overwrite: then the history is given up.
#[must_use]
pub(crate) struct Work<'a> {
    history: &'a History,
    /// It commits intents, for others as well.
    commits: bool,
    finished: bool,
}

impl Work<'_> {
    pub(crate) fn finish(mut self) {
        self.finished = true;
    }
}

impl Drop for Work<'_> {
    fn drop(&mut self) {
        if !self.finished {
            self.history.giving_up.borrow_mut().get_or_insert_with(|| "work on the history was abandoned".to_owned());
        }
        if self.commits {
            self.history.committing.set(false);
            self.history.changed.notify(usize::MAX);
        }
    }
}

/// Runs in order, without overlaps, those that meet put together; empty ones are left out. A run has at most
/// `u32::MAX` granules, as many as a block of the journal can say.
pub(crate) fn joined(mut runs: Vec<(u64, u64)>) -> Vec<(u64, u64)> {
    const MOST: u64 = u32::MAX as u64;
    runs.sort_unstable();
    let mut joined: Vec<(u64, u64)> = Vec::with_capacity(runs.len());
    for (mut start, end) in runs {
        if let Some(last) = joined.last_mut().filter(|last| start <= last.1) {
            last.1 = last.1.max(end.min(last.0 + MOST));
            start = last.1;
        }
        while start < end {
            let part = end.min(start + MOST);
            joined.push((start, part));
            start = part;
        }
    }
    joined
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_joined() {
        assert_eq!(joined(vec![(5, 6), (1, 2), (2, 4), (3, 5), (8, 9)]), [(1, 6), (8, 9)]);
        let most = u64::from(u32::MAX);
        assert_eq!(joined(vec![(0, most + 1)]), [(0, most), (most, most + 1)]);
        assert_eq!(joined(vec![(0, most - 1), (7, most + 9), (5, 5), (most, most + 1)]), [(0, most), (most, most + 9)]);
    }
}
