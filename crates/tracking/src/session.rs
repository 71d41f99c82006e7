//! From the first write to the close: what the sidecar says about whether somebody is at work on the image.

use crate::history::History;
use crate::intents::JOURNAL_DUE;
use crate::superblock::State;
use crate::{HistoryError, Id, ImageMark};
use disk::{DiskError, ErrorKind, Operation};
use futures_util::future::{Either, select};
use std::pin::pin;

impl History {
    /// Says in the sidecar, and in the image if it can bear that, that somebody writes. Due before the first write.
    ///
    /// Crash: the sidecar names both the mark that the image bears and the one that it gets, so that either is right.
    /// Nothing was written to the image yet.
    pub(crate) async fn wake(&self) -> Result<(), DiskError> {
        if self.awake.get() && self.giving_up.borrow().is_none() || self.is_stopped() {
            return Ok(());
        }
        let _one = self.waking.lock().await;
        self.go_on_giving_up().await?;
        if self.awake.get() || self.is_stopped() {
            return Ok(());
        }
        let (journal, moment, boot) = (self.host.random_id(), self.next_moment(), self.host.boot().id);
        let flushes_void = self.flushes_void.get();
        let mut lineage = Id::NONE;
        // A checkpoint that began before would cut the new journal where the old one ended.
        let table = self.checkpointing.lock().await;
        let announced = self
            .write_superblock(|superblock| {
                superblock.state = State::InUse;
                superblock.boot = boot;
                superblock.flushes_void = flushes_void;
                superblock.journal = journal;
                superblock.journal_start = 0;
                superblock.next_moment = moment;
                superblock.heir = None;
                lineage = superblock.lineage;
            })
            .await;
        if let Err(error) = announced {
            return self.stop(&format!("the history could not be opened for writing: {error}")).await;
        }
        self.state.borrow_mut().next_sequence = 0;
        self.journal_durable.set(0);
        drop(table);
        self.put_mark(lineage, moment).await?;
        self.awake.set(true);
        Ok(())
    }

    /// The next mark of the image: the one that the sidecar has named already, if putting it there failed, as it may be
    /// there nevertheless.
    fn next_moment(&self) -> Id {
        let known = self.state.borrow();
        let named = known.superblock.next_moment;
        if named.is_none() || named == known.superblock.moment { self.host.random_id() } else { named }
    }

    /// Puts the mark into the image, and says in the sidecar which one it bears.
    async fn put_mark(&self, lineage: Id, moment: Id) -> Result<(), DiskError> {
        let marked = self.host.set_mark(ImageMark { lineage, moment }).await?;
        // The sidecar has named it as the next one; only an image without a mark, of which none is expected, gets its
        // first by this.
        let told = self.write_superblock(|superblock| superblock.moment = if marked { moment } else { Id::NONE }).await;
        match told {
            Ok(()) => Ok(()),
            Err(error) => self.stop(&format!("the history could not be written: {error}")).await,
        }
    }

    /// What is due while the image can still be written to, before it is closed: another mark, and the table.
    ///
    /// # Errors
    /// When the image cannot be marked. A failing sidecar stops the tracking instead.
    pub(crate) async fn prepare_close(&self) -> Result<(), DiskError> {
        if !self.awake.get() || self.is_stopped() {
            return Ok(());
        }
        let moment = self.next_moment();
        let mut lineage = Id::NONE;
        let told = self
            .write_superblock(|superblock| {
                superblock.next_moment = moment;
                lineage = superblock.lineage;
            })
            .await;
        if let Err(error) = told {
            return self.stop(&format!("the history could not be written: {error}")).await;
        }
        self.put_mark(lineage, moment).await?;
        if let Err(error) = self.checkpoint().await
            && !self.is_stopped()
        {
            tracing::warn!(history = self.storage.name(), %error, "the table of changes is left to the journal");
        }
        Ok(())
    }

    /// The image is closed: takes down how it looks now.
    ///
    /// Crash: before this is durable the image counts as in use, and what the journal holds as changed.
    ///
    /// # Errors
    /// When the image cannot be looked at or the sidecar cannot be written: the next opening sees a crash.
    pub(crate) async fn finish_close(&self) -> Result<(), HistoryError> {
        if !self.awake.get() || self.is_stopped() {
            return Ok(());
        }
        if self.journal_in_use() > 0 {
            return Ok(()); // The table could not be written; the next opening reads the journal.
        }
        self.host.let_time_pass().await;
        let facts = self.host.facts().await?;
        let boot = self.host.boot().id;
        self.write_superblock(|superblock| {
            superblock.state = State::Closed;
            superblock.facts = facts;
            superblock.boot = boot;
            superblock.next_moment = Id::NONE;
            superblock.heir = None;
        })
        .await?;
        self.awake.set(false);
        Ok(())
    }

    /// Does what is due beside the guest's requests, until the disk is closed, tracking stops or
    /// [`History::end_tending`]: intents ahead of sequential writers, signs of life, and the
    /// table when the journal is half full or `idle` rounds have passed since something changed. `tick` waits for about
    /// a second.
    ///
    /// To be polled to its end: if it is dropped while it works on the sidecar, the history is given up.
    pub async fn tend<F: Future<Output = ()>>(&self, tick: impl Fn() -> F) {
        /// Rounds after which the table is written though the journal has room.
        const ROUNDS: u32 = 10;
        let mut rounds = 0;
        while !self.tending_ends.get() {
            let woken = {
                let wanted = self.wanted.listen();
                matches!(select(pin!(wanted), pin!(tick())).await, Either::Left(_))
            };
            if self.is_stopped() || self.tending_ends.get() {
                return;
            }
            if !woken {
                rounds += 1;
            }
            if !self.awake.get() {
                continue; // Not yet, or no more: the sidecar may be somebody else's.
            }
            if let Err(error) = self.commit_queued().await {
                tracing::warn!(history = self.storage.name(), %error, "intents could not be written ahead");
            }
            if let Err(error) = self.give_sign().await {
                tracing::warn!(history = self.storage.name(), %error, "no sign of life could be written");
            }
            let due = self.journal_in_use() >= JOURNAL_DUE;
            if due || rounds >= ROUNDS && self.journal_in_use() > 0 {
                rounds = 0;
                if let Err(error) = self.checkpoint().await {
                    tracing::warn!(history = self.storage.name(), %error, "the table of changes could not be written; it is tried again");
                }
            }
        }
    }

    /// Ends [`History::tend`], after what it is doing now.
    pub fn end_tending(&self) {
        self.tending_ends.set(true);
        self.wanted.notify(usize::MAX);
    }

    /// Refuses what needs a history that is kept.
    pub(crate) fn refuse_if_stopped(&self) -> Result<(), HistoryError> {
        match &*self.stopped.borrow() {
            Some(reason) => Err(HistoryError::Stopped { reason: reason.clone() }),
            None => Ok(()),
        }
    }

    /// The failure of something that must not have been issued.
    pub(crate) fn not_recorded(&self, error: &HistoryError) -> DiskError {
        DiskError::new(ErrorKind::Io, Operation::Write).on(self.storage.name()).because(error.to_string())
    }
}
