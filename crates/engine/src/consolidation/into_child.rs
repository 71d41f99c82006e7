//! Up: what the layer below the top holds comes into the top, which then stands on what is below that.
//!
//! Crash: what was brought up shows the same as what it was read from. Then one change of the top's header names the other
//! parent; before it the layer is still there, after it nobody needs it.

use super::plan::other_children;
use super::spec::Merged;
use crate::images::stack::Stack;
use crate::linkage;
use crate::promotion::{JobControl, TRIES};
use crate::snapshots::exchange::{Exchange, Exchanged};
use crate::snapshots::{open_layer, parent_name};
use crate::{EngineError, Format, chain_text};
use chain::{CopyPass, LayerInfo};
use disk::{ParentLink, StorageHandle};
use formats::qcow2::{self, BackingRef};
use std::fs;
use std::path::Path;
use std::rc::Rc;
use std::time::Instant;
use storage::FileStorage;

/// Brings the layer below the top up into it.
pub(super) async fn merge(stack: &Rc<Stack>, control: &Rc<JobControl>) -> Result<Merged, EngineError> {
    let layers = stack.chain().layers();
    let (top, gone) = (layers[0].path.clone(), layers[1].path.clone());
    drop(layers);
    let infill = stack.chain().begin_infill(1..2).await?;
    let done = async {
        let mut moved = 0;
        for _ in 0..TRIES {
            moved += stack.chain().infill(&infill, CopyPass::default(), control).await?.written;
            // What is not durable yet is made so while the guest goes on.
            stack.disk().flush().await?;
            let began = Instant::now();
            let held = stack.hold_changes("the layer was not merged").await?;
            if infill.position() < stack.disk().geometry().size {
                continue;
            }
            switch(stack, &infill).await?;
            drop(held);
            return Ok((moved, began.elapsed()));
        }
        Err(EngineError::Invalid(format!("{}: the disk grows all the time; try again", top.display())))
    };
    let (moved, pause) = match done.await {
        Ok(done) => done,
        Err(error) => {
            stack.chain().end_infill(&infill).await;
            return Err(error);
        }
    };
    leave(&gone, &top).await;
    Ok(Merged { removed: Some(gone), moved, mirrored: 0, pause })
}

async fn switch(stack: &Rc<Stack>, infill: &Rc<chain::Infill>) -> Result<(), EngineError> {
    stack
        .exchange(Exchanged::Infill(infill), async |layers: Rc<[LayerInfo]>| {
            let files = stack.files();
            layers[0].handle.close().await?;
            let storage = StorageHandle::new(files[0].clone());
            let (backing, link) = stand_on(&layers[0], layers.get(2).zip(files.get(2))).await?;
            // A fresh one, as the old one is closed. Of the parent's name in its header it keeps the old one in mind, which
            // only reports tell.
            let handle = open_layer(files[0].clone(), Format::from(layers[0].format), false).await?;
            let marked = stack.mark_new_top(&handle).await?;
            let mut now = layers.to_vec();
            now.remove(1);
            now[0].handle = handle.clone();
            let mut new_files = files.clone();
            new_files.remove(1);
            let last = Box::pin(async move {
                qcow2::rename_backing(&storage, backing.as_ref()).await?;
                if !handle.set_parent_link(link).await? {
                    tracing::debug!("the image cannot bear a link");
                }
                Ok(())
            });
            Ok(Exchange { layers: now, files: new_files, marked, last })
        })
        .await
}

/// What a child records of the layer that it stands on once the one between has gone: name and link.
pub(super) async fn stand_on(
    child: &LayerInfo,
    below: Option<(&LayerInfo, &FileStorage)>,
) -> Result<(Option<BackingRef>, Option<ParentLink>), EngineError> {
    let Some((layer, file)) = below else { return Ok((None, None)) };
    let name = parent_name(&child.path, &layer.path)?;
    let backing = BackingRef { name, format: Some(Format::from(layer.format).name().to_owned()) };
    Ok((Some(backing), Some(linkage::link_to_layer(layer, file).await?)))
}

/// The layer is not needed by this disk any more; it is removed unless others stand on it.
pub(super) async fn leave(gone: &Path, top: &Path) {
    let left = async {
        if !other_children(gone, top).await?.is_empty() {
            linkage::forget_child(gone, top).await?;
            return Ok(());
        }
        let file = gone.to_owned();
        dataplane::offload(move || fs::remove_file(&file).map_err(|e| EngineError::file(file, "remove", e))).await?;
        linkage::remove_of_replaced(gone.to_owned()).await;
        Ok::<_, EngineError>(())
    };
    if let Err(error) = left.await {
        tracing::warn!(image = %gone.display(), error = chain_text(&error), "a layer that is not needed any more is left");
    }
}
