//! Up: what the layer below the top holds comes into the top, which then stands on what is below that.
//!
//! Crash: what was brought up shows the same as what it was read from. Then the top's link is taken out of its header, one
//! change names the other parent, and the link to that is put in: before the change the layer is still there, after it nobody
//! needs it; and in between the top is not bound, over a parent with which it shows the same.

use super::plan::other_children;
use super::spec::Merged;
use crate::images::stack::Stack;
use crate::linkage;
use crate::promotion::{JobControl, TRIES};
use crate::snapshots::exchange::{Exchange, Exchanged};
use crate::snapshots::{open_layer, parent_name};
use crate::{EngineError, Format, chain_text};
use chain::{CopyPass, LayerInfo};
use disk::{LayerHandle, ParentLink, StorageHandle};
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
    if let Ok(kept) = stack.kept() {
        kept.top_changes().await?;
    }
    let infill = stack.chain().begin_infill(1..2).await?;
    let writing_behind = stack.files()[0].write_behind();
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
    let done = done.await;
    drop(writing_behind);
    let (moved, pause) = match done {
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
            let marked = stack.mark_same_top(&handle).await?;
            let mut now = layers.to_vec();
            now.remove(1);
            now[0].handle = handle.clone();
            let mut new_files = files.clone();
            new_files.remove(1);
            let last = Box::pin(async move {
                // Of the layer that goes: over another parent it would be a fault.
                handle.set_parent_link(None).await?;
                qcow2::rename_backing(&storage, backing.as_ref()).await?;
                // From here on the layer below is not needed, and must not be missed by what the chain goes on with.
                tell_link(&handle, link).await;
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

/// Has a child record its link. One without it is not checked against its parent; that is told of, and no reason to fail.
pub(super) async fn tell_link(child: &LayerHandle, link: Option<ParentLink>) {
    match child.set_parent_link(link).await {
        Ok(true) => {}
        Ok(false) => tracing::debug!("the image cannot bear a link"),
        Err(error) => tracing::warn!(error = chain_text(&error), "what the image records of its parent is old"),
    }
}

/// The layer is not needed by this disk any more; it is removed unless others stand on it.
pub(super) async fn leave(gone: &Path, top: &Path) {
    let left = async {
        if !other_children(gone, top).await?.is_empty() {
            linkage::forget_child(gone, top).await?;
            return Ok(());
        }
        remove(gone).await
    };
    if let Err(error) = left.await {
        tracing::warn!(image = %gone.display(), error = chain_text(&error), "a layer that is not needed any more is left");
    }
}

/// Removes an image on which nothing stands, and what is known of it.
pub(super) async fn remove(gone: &Path) -> Result<(), EngineError> {
    let file = gone.to_owned();
    // What is known of it is beside the image itself, which a link no longer leads to once it is gone.
    let itself = dataplane::offload(move || {
        let itself = file.canonicalize().unwrap_or_else(|_| file.clone());
        fs::remove_file(&file).map_err(|e| EngineError::file(file, "remove", e)).map(|()| itself)
    });
    linkage::remove_of_replaced(itself.await?).await;
    Ok(())
}
