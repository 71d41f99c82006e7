//! The history of an image that is being repaired.
//!
//! A repair writes beside the layers that a history is kept of, so it says itself what it did: lost space that was given
//! back is no change that a guest sees, and the marks stay trusted; after anything else they are refused.

use super::stack::{HistoryUse, OpenRequest, Stack};
use crate::linkage::LinkageUse;
use crate::{Format, chain_text};
use disk::HistoryMark;
use std::path::{Path, PathBuf};

/// An image and its history, as they were before.
pub(crate) struct Mended {
    stack: Stack,
    mark: Option<HistoryMark>,
}

impl Mended {
    /// Looks at them; the caller has the image's lock, and keeps it until [`Mended::after`] has ended. `None`: there is no
    /// history, or none that can be kept.
    ///
    /// Crash: what is written to the image from here on makes it another one than the history's, until
    /// [`Mended::after`] says otherwise.
    pub(crate) async fn before(file: &Path, format: Format, history: Option<PathBuf>) -> Option<Self> {
        // Without locks of its own, as the caller's are there.
        let request = OpenRequest {
            force_share: true,
            history: HistoryUse::Mended(history),
            // It is about the image, whatever its parents are.
            linkage: LinkageUse::Ignored,
            ..OpenRequest::reading(file.to_owned(), format)
        };
        let stack = Stack::open(&request).await.inspect_err(|error| {
            tracing::debug!(image = %file.display(), error = chain_text(error), "its history is not looked at");
        });
        let stack = stack.ok()?;
        if stack.history().is_err() {
            close(&stack, file.to_owned()).await;
            return None;
        }
        let mark = stack.chain().top().history_mark();
        Some(Self { stack, mark })
    }

    /// What was done to the image, which bears that mark now: `harmless`, if no byte that a guest sees was changed.
    pub(crate) async fn after(self, harmless: bool, mark: Option<HistoryMark>) {
        let image = self.stack.image();
        if let Ok(kept) = self.stack.history() {
            let history = kept.history();
            let told = match harmless && mark == self.mark {
                true => history.reseal().await,
                false => {
                    let reason = "a repair mended the image, and it is not known which of its bytes changed";
                    if !history.points().is_empty() {
                        tracing::warn!(image = %image.display(), reason, "marks are refused");
                    }
                    history.distrust(reason).await
                }
            };
            if let Err(error) = told {
                tracing::warn!(image = %image.display(), %error, "marks will be refused after this repair");
            }
        }
        close(&self.stack, image).await;
    }

    /// The repair has failed: the image speaks for itself.
    pub(crate) async fn give_up(self) {
        let image = self.stack.image();
        close(&self.stack, image).await;
    }
}

async fn close(stack: &Stack, image: PathBuf) {
    if let Err(error) = stack.close().await {
        tracing::warn!(image = %image.display(), error = chain_text(&error), "its history was not closed");
    }
}
