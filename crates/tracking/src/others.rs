//! The image, and those below it, are changed by ourselves in ways that the guest does not see: layers are merged.
//!
//! Whether somebody else has changed the lower ones is told from a digest of how they look
//! ([`ImageFacts::others`](crate::ImageFacts)), so while they change none is expected. Of the image itself times and size say
//! so, once it has been closed here; so before it is written to it counts as in use.
//!
//! Crash: whoever changes them is held to be us, until they rest and the next superblock says how they look.

use crate::OTHERS_CHANGE;
use crate::history::History;
use crate::superblock::State;
use disk::{DiskError, ErrorKind, Operation};

impl History {
    /// From here on, and until the close, the image may be written to by ourselves without the writes coming through the
    /// disk that keeps this history. Durable on return.
    ///
    /// # Errors
    /// As [`History::others_change`]: it must not be written to then.
    pub async fn image_changes(&self) -> Result<(), DiskError> {
        if self.tending_ends.get() {
            return Err(DiskError::new(ErrorKind::Closed, Operation::Write));
        }
        self.wake().await
    }

    /// From here on, and until [`History::others_rest`] or the close, the other images do not count as a sign that somebody
    /// else was there. Durable on return.
    ///
    /// # Errors
    /// `Closed` when the disk is being closed; when the image cannot be marked, or the sidecar neither be written nor given
    /// up. They must not be changed then.
    pub async fn others_change(&self) -> Result<(), DiskError> {
        self.image_changes().await?; // For closing it is what takes down how they look in the end.
        self.note_others(OTHERS_CHANGE).await
    }

    /// They stay as they are from now on, and `others` is their digest.
    ///
    /// # Errors
    /// When the sidecar can neither be written nor given up.
    pub async fn others_rest(&self, others: u64) -> Result<(), DiskError> {
        if !self.awake.get() {
            return Ok(()); // Closing it has taken down how they look.
        }
        self.note_others(others).await
    }

    async fn note_others(&self, others: u64) -> Result<(), DiskError> {
        self.tell("of changes to its image's parents", |superblock| {
            // The close may have come first.
            if superblock.state == State::InUse {
                superblock.facts.others = others;
            }
        })
        .await
    }
}
