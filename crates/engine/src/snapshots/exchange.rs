//! Exchanging the images of an open disk for others that show the same, with all that hangs on the top one.

use crate::EngineError;
use crate::history::PreparedTop;
use crate::images::stack::Stack;
use chain::{Infill, LayerInfo, Mirror};
use disk::{LayerHandle, LocalFuture};
use std::rc::Rc;
use storage::FileStorage;

/// What the disk is made of afterwards.
pub(crate) struct Exchange {
    /// The layers, top first.
    pub(crate) layers: Vec<LayerInfo>,
    /// All their files, in the same order.
    pub(crate) files: Vec<FileStorage>,
    /// The new top, if the top is exchanged and a history is kept.
    pub(crate) marked: Option<PreparedTop>,
    /// The one step after which whoever opens the disk finds the new images; durable on return. After an error the old ones
    /// are found.
    pub(crate) last: LocalFuture<'static, Result<(), EngineError>>,
}

/// What has made the new images show the same.
pub(crate) enum Exchanged<'a> {
    /// They hold nothing of their own, or the same bytes.
    Layers,
    /// A mirror, whose target takes the place.
    Mirror(&'a Rc<Mirror>),
    /// An infill, whose layers vanish.
    Infill(&'a Rc<Infill>),
}

impl Stack {
    /// Has an image that is about to become the top one bear the mark of the disk's history, if one is kept.
    ///
    /// # Errors
    /// As [`Kept::prepare_switch`](crate::history::Kept::prepare_switch).
    pub(crate) async fn mark_new_top(&self, new_top: &LayerHandle) -> Result<Option<PreparedTop>, EngineError> {
        match self.kept() {
            Ok(kept) => Ok(Some(kept.prepare_switch(new_top).await?)),
            Err(_) => Ok(None),
        }
    }

    /// The same for the top's own file, which was opened again and gets other parents.
    ///
    /// # Errors
    /// As [`Kept::prepare_same_file`](crate::history::Kept::prepare_same_file).
    pub(crate) async fn mark_same_top(&self, reopened: &LayerHandle) -> Result<Option<PreparedTop>, EngineError> {
        match self.kept() {
            Ok(kept) => Ok(Some(kept.prepare_same_file(reopened).await?)),
            Err(_) => Ok(None),
        }
    }

    /// Exchanges images. The guest's changes are held meanwhile when the top one is among them.
    /// `change` gets the present layers and closes what must be whole.
    ///
    /// Crash: `change` changes nothing that the guest sees. The history names the new image beside the old one before the
    /// last step, so that it is trusted whichever is found.
    ///
    /// # Errors
    /// What any step reports: the disk is as it was.
    pub(crate) async fn exchange(
        &self,
        what: Exchanged<'_>,
        change: impl AsyncFnOnce(Rc<[LayerInfo]>) -> Result<Exchange, EngineError>,
    ) -> Result<(), EngineError> {
        let mut new_files = None;
        let steps = async |layers: Rc<[LayerInfo]>| {
            let size = layers[0].handle.geometry().size;
            let Exchange { layers, files, marked, last } = change(layers).await?;
            // The chain would refuse it, too, but after the last step.
            if layers.first().is_none_or(|top| top.handle.geometry().size != size) {
                return Err(EngineError::Invalid(format!(
                    "{}: was resized while another image was to take its place; it stays as it was, try again",
                    self.image().display()
                )));
            }
            let named = match self.kept().ok().zip(marked) {
                Some((kept, marked)) => {
                    kept.before_switch(marked, &files).await?;
                    Some(kept)
                }
                None => None,
            };
            if let Err(error) = last.await {
                if let Some(kept) = named {
                    kept.without_switch().await?;
                }
                return Err(error);
            }
            if let Some(kept) = named
                && let Err(error) = kept.after_switch(files.clone()).await
            {
                // The switch is made, and what is written from here on must reach the new image.
                let error = crate::chain_text(&error);
                tracing::error!(image = %self.image().display(), error, "the history may be lost");
            }
            new_files = Some(files);
            Ok::<_, EngineError>(layers)
        };
        match what {
            Exchanged::Layers => self.chain().switch(steps).await?,
            Exchanged::Mirror(mirror) => self.chain().switch_to_mirror(mirror, steps).await?,
            Exchanged::Infill(infill) => self.chain().switch_after_infill(infill, steps).await?,
        }
        if let Some(files) = new_files {
            self.set_files(files);
        }
        Ok(())
    }
}
