//! Up: what the layer below the top holds comes into the top, which then stands on what is below that.
//!
//! Crash: what was brought up shows the same as what it was read from. Then one change of the top's header names the other
//! parent; before it the layer is still there, after it nobody needs it.

use super::plan::other_children;
use super::{ConsolidateReport, Neighbour};
use crate::images::stack::Stack;
use crate::linkage;
use crate::promotion::JobControl;
use crate::snapshots::exchange::{Exchange, Exchanged};
use crate::snapshots::open_layer;
use crate::{EngineError, Format, chain_text};
use chain::{CopyPass, LayerInfo};
use disk::StorageHandle;
use formats::qcow2::{self, BackingRef};
use std::fs;
use std::path::Path;
use std::rc::Rc;
use std::time::Instant;

/// Growth that comes late is looked at again; so often at most.
const TRIES: u32 = 8;

/// Brings the layer below the top up into it.
pub(super) async fn merge(stack: &Rc<Stack>, control: &Rc<JobControl>) -> Result<ConsolidateReport, EngineError> {
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
    Ok(ConsolidateReport {
        disk: String::new(),
        snapshot: None,
        into: Neighbour::Child,
        removed: Some(gone),
        file: stack.image(),
        moved,
        mirrored: 0,
        pause_us: u64::try_from(pause.as_micros()).unwrap_or(u64::MAX),
    })
}

async fn switch(stack: &Rc<Stack>, infill: &Rc<chain::Infill>) -> Result<(), EngineError> {
    let kept = stack.kept().ok();
    stack
        .exchange(Exchanged::Infill(infill), async |layers: Rc<[LayerInfo]>| {
            let files = stack.files();
            layers[0].handle.close().await?;
            let storage = StorageHandle::new(files[0].clone());
            let backing = layers.get(2).map(|below| backing_of(&layers[0].path, below)).transpose()?;
            let link = match layers.get(2) {
                Some(below) => Some(linkage::link_to_layer(below, &files[2]).await?),
                None => None,
            };
            // A fresh one, as the old one is closed. Of the parent's name in its header it keeps the old one in mind, which
            // only reports tell.
            let handle = open_layer(files[0].clone(), Format::from(layers[0].format), false).await?;
            let marked = match kept {
                Some(kept) => Some(kept.prepare_switch(&handle).await?),
                None => None,
            };
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

/// How the child names a layer: by its name alone where both are in one directory.
pub(super) fn backing_of(child: &Path, layer: &LayerInfo) -> Result<BackingRef, EngineError> {
    let name = if layer.path.parent() == child.parent() { layer.path.file_name() } else { None };
    let name = name.unwrap_or(layer.path.as_os_str()).to_str().ok_or_else(|| {
        EngineError::Invalid(format!("{}: an image cannot record a name that is no UTF-8", layer.path.display()))
    })?;
    Ok(BackingRef { name: name.to_owned(), format: Some(Format::from(layer.format).name().to_owned()) })
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
