//! Another image takes the place of the history's and shows the same: a snapshot's new top layer, or a copy elsewhere.
//!
//! Whether somebody else has changed the image is told from its facts and its mark, and the new image has others. So before
//! the switch the sidecar names the **heir** as a second image that may be there:
//!
//! 1. [`History::mark_for_heir`], and the mark is put into the new image.
//! 2. Writes are held, the old image is flushed and closed. [`History::name_heir`].
//! 3. The switch, in one step (a rename, for example), made durable.
//! 4. [`History::heir_takes_place`], or [`History::forget_heir`] if there was no switch. Writes go on.
//!
//! Crash: before step 2 is durable the old image is the only one, and it is there. After it either is accepted, and until
//! step 4 both show the same bytes, so the history is right for whichever is there. From step 4 on no superblock names two
//! images. So who brings the old image back later is refused, or brings it back to a history whose points are all older than
//! the switch, and that tells at least what changed since.

use crate::history::History;
use crate::superblock::Heir;
use crate::{Id, ImageFacts, ImageMark};
use disk::DiskError;

impl History {
    /// The mark that an heir is to bear. `None` when tracking has stopped: then there is nothing to be done for an heir.
    ///
    /// The image may be written to meanwhile; it gets its own mark first, if this session has not written to it yet.
    ///
    /// # Errors
    /// When the image cannot be marked, or the history neither kept nor given up.
    pub async fn mark_for_heir(&self) -> Result<Option<ImageMark>, DiskError> {
        self.wake().await?;
        if self.is_stopped() {
            return Ok(None);
        }
        let lineage = self.state.borrow().superblock.lineage;
        Ok(Some(ImageMark { lineage, moment: self.host.random_id() }))
    }

    /// The mark that an heir is to bear which is the image's own file, over other parents: the one that it bears, so that the
    /// history knows it before the heir is named, too. `None` when it bears none, or tracking has stopped.
    ///
    /// # Errors
    /// As [`History::mark_for_heir`].
    pub async fn mark_for_same_file(&self) -> Result<Option<ImageMark>, DiskError> {
        self.wake().await?;
        let known = self.state.borrow();
        let mark = ImageMark { lineage: known.superblock.lineage, moment: known.superblock.moment };
        Ok((!self.is_stopped() && !mark.moment.is_none()).then_some(mark))
    }

    /// Takes down which image is about to take the present one's place; durable on return. The heir's file is complete
    /// and its times are durable, nothing is written to it before the switch, and nothing to the image either.
    ///
    /// `mark` is what the heir bears, or `None` if it cannot bear any.
    ///
    /// # Errors
    /// When the sidecar can neither be written nor the history given up: the image must not be switched. If it can be
    /// given up, tracking stops, and the switch is nobody's concern.
    pub async fn name_heir(&self, facts: ImageFacts, mark: Option<ImageMark>) -> Result<(), DiskError> {
        self.heir_succeeds.set(false);
        let moment = mark.map_or(Id::NONE, |mark| mark.moment);
        self.tell_of_heir(Some(Heir { moment, facts })).await
    }

    /// The heir is the image now, and the host speaks of it. Durable on return; but writes may go on as soon as this has
    /// been polled, for no superblock that is written from then on names the old image.
    ///
    /// # Errors
    /// When the sidecar can neither be written nor the history given up.
    pub async fn heir_takes_place(&self) -> Result<(), DiskError> {
        self.heir_succeeds.set(true);
        self.tell_of_heir(None).await
    }

    /// There was no switch, and there will be none. Due before the image is written to again.
    ///
    /// # Errors
    /// When the sidecar can neither be written nor the history given up.
    pub async fn forget_heir(&self) -> Result<(), DiskError> {
        self.heir_succeeds.set(false);
        self.tell_of_heir(None).await
    }

    async fn tell_of_heir(&self, heir: Option<Heir>) -> Result<(), DiskError> {
        self.tell("of the image that takes its image's place", |superblock| superblock.heir = heir).await
    }
}
