//! Up, between two frozen layers: the upper one takes up what the lower one holds, and then stands on what is below that.
//!
//! The upper one is written to, so its content has another id afterwards, though it shows the same: that is noted beside
//! it, before and after, for those that stand on it.
//!
//! Crash: as of the top (`into_child.rs`).

use super::into_child::{leave, stand_on, tell_link};
use super::into_parent::rest;
use super::reopened::Reopened;
use super::spec::Merged;
use crate::images::stack::Stack;
use crate::linkage;
use crate::promotion::JobControl;
use crate::snapshots::open_layer;
use crate::{EngineError, chain_text};
use chain::{CopyPass, Infill, LayerInfo};
use disk::StorageHandle;
use formats::qcow2;
use std::rc::Rc;
use std::time::{Duration, Instant};

/// Brings the layer below the one at `upper` up into it.
pub(super) async fn merge(stack: &Rc<Stack>, upper: usize, control: &Rc<JobControl>) -> Result<Merged, EngineError> {
    let layers = stack.chain().layers();
    let (child, gone) = (layers[upper].clone(), layers[upper + 1].path.clone());
    drop(layers);
    let bound = linkage::known_now(&child).await?;
    let reopened = Reopened::for_writing(stack, upper).await?;
    let done = async {
        if let Ok(kept) = stack.kept() {
            kept.lower_images_change().await?;
        }
        linkage::note_absorbing(&child, None).await?;
        let infill = stack.chain().begin_infill(upper + 1..upper + 2).await?;
        let moved = async {
            let moved = stack.chain().infill(&infill, CopyPass::default(), control).await?.written;
            Ok::<_, EngineError>((moved, switch(stack, &infill, upper, &reopened, bound).await?))
        };
        let moved = moved.await;
        if moved.is_err() {
            stack.chain().end_infill(&infill).await;
        }
        moved
    };
    let (moved, pause) = match done.await {
        Ok(done) => done,
        Err(error) => {
            // The note stays: the layer may have been written to.
            reopened.for_reading(stack).await;
            rest(stack).await;
            return Err(error);
        }
    };
    reopened.rest();
    rest(stack).await;
    leave(&gone, &child.path).await;
    Ok(Merged { removed: Some(gone), moved, mirrored: 0, pause })
}

async fn switch(
    stack: &Rc<Stack>,
    infill: &Rc<Infill>,
    upper: usize,
    reopened: &Reopened,
    bound: linkage::KnownContent,
) -> Result<Duration, EngineError> {
    let began = Instant::now();
    let mut files = stack.files();
    stack
        .chain()
        .switch_after_infill(infill, async |layers: Rc<[LayerInfo]>| {
            layers[upper].handle.close().await?;
            let (backing, link) = stand_on(&layers[upper], layers.get(upper + 2).zip(files.get(upper + 2))).await?;
            let frozen = reopened.file.renamed_for_reading(&reopened.path.display().to_string())?;
            let storage = StorageHandle::new(reopened.file.clone());
            let written = open_layer(reopened.file.clone(), reopened.format, false).await?;
            written.set_parent_link(None).await?;
            qcow2::rename_backing(&storage, backing.as_ref()).await?;
            // The layer below is not needed any more.
            tell_link(&written, link).await;
            written.close().await?;
            let handle = open_layer(frozen.clone(), reopened.format, true).await?;
            let mut now = layers.to_vec();
            now.remove(upper + 1);
            now[upper].handle = handle;
            if let Err(error) = linkage::shows_the_same(&now[upper], bound).await {
                tracing::warn!(error = chain_text(&error), "what stands on the layer will be alarmed");
            }
            files.remove(upper + 1);
            files[upper] = frozen;
            Ok::<_, EngineError>(now)
        })
        .await?;
    stack.set_files(files);
    Ok(began.elapsed())
}
