//! Down: what a layer holds goes into its parent, which takes its place.
//!
//! 1. The parent is opened for writing in its place in the chain, and made as large as the layer.
//! 2. It is noted beside the parent that it is taking up this layer: from here on its content is another one, and the layer
//!    that stands on it must not be alarmed.
//! 3. The pass. Of the top layer with a mirror, as the guest writes to it; of a frozen one without.
//! 4. The parent is closed or flushed, and gets the layer's name, by one rename; or becomes the disk under its own name.
//!
//! Crash before step 4: the layer holds all that was written over in the parent, so the chain shows the same; the
//! consolidation is begun anew. After it: the parent holds all.

use super::reopened::Reopened;
use super::spec::Merged;
use crate::images::stack::Stack;
use crate::linkage;
use crate::promotion::{Enter, JobControl, TRIES};
use crate::snapshots::exchange::{Exchange, Exchanged};
use crate::snapshots::{open_layer, replace_file};
use crate::{EngineError, chain_text};
use chain::{Chain, CopyPass, LayerInfo, Mirror};
use disk::{Disk, DiskHandle, Preallocation};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::{Duration, Instant};

/// Merges the layer at `upper` into the one below it.
pub(super) async fn merge(
    stack: &Rc<Stack>,
    upper: usize,
    control: &Rc<JobControl>,
    enter: Enter,
) -> Result<Merged, EngineError> {
    let layers = stack.chain().layers();
    let (layer, parent) = (layers[upper].clone(), layers[upper + 1].clone());
    drop(layers);
    let reopened = Reopened::for_writing(stack, upper + 1).await?;
    let done = async {
        if let Ok(kept) = stack.kept() {
            kept.lower_images_change().await?;
        }
        linkage::note_absorbing(&parent, Some(&layer)).await?;
        match upper {
            0 => merge_top(stack, &layer, &reopened, control, enter).await,
            _ => merge_frozen(stack, upper, &layer, &reopened, control).await,
        }
    };
    let done = done.await;
    if done.is_err() {
        // The note stays: the parent may have been written to.
        reopened.for_reading(stack).await;
    }
    rest(stack).await;
    done
}

/// Nothing below the top changes any more.
pub(super) async fn rest(stack: &Stack) {
    if let Ok(kept) = stack.kept()
        && let Err(error) = kept.lower_images_rest().await
    {
        tracing::warn!(image = %stack.image().display(), error = chain_text(&error), "the history may be lost");
    }
}

/// What a merged layer stands on; `depth` is its place after the merge, and one more.
fn grandparent(stack: &Stack, depth: usize) -> Option<PathBuf> {
    stack.chain().layers().get(depth).map(|layer| layer.path.clone())
}

/// The chain from the layer at `depth` on, as a disk of its own: of the same handles.
fn chain_from(stack: &Stack, depth: usize) -> Rc<Chain> {
    Rc::new(Chain::new(stack.chain().layers()[depth..].to_vec()))
}

/// Makes the parent as large as the layer that goes into it, while nobody reads what is behind its end.
async fn grow_parent(stack: &Stack, depth: usize, size: u64) -> Result<(), EngineError> {
    if stack.chain().layers()[depth].handle.geometry().size >= size {
        return Ok(());
    }
    stack
        .chain()
        .switch(async |layers: Rc<[LayerInfo]>| {
            // As a resize of that disk: nothing old of it, nor of what is below it, may show.
            Chain::new(layers[depth..].to_vec()).resize_with(size, Preallocation::Off).await?;
            Ok::<_, EngineError>(layers.to_vec())
        })
        .await
}

async fn merge_top(
    stack: &Rc<Stack>,
    layer: &LayerInfo,
    parent: &Reopened,
    control: &Rc<JobControl>,
    enter: Enter,
) -> Result<Merged, EngineError> {
    grow_parent(stack, 1, stack.disk().geometry().size).await?;
    let below = chain_from(stack, 1);
    if below.geometry().size > stack.disk().geometry().size {
        // The disk was made smaller after the snapshot; what was cut off does not come back.
        below.resize_with(stack.disk().geometry().size, Preallocation::Off).await?;
    }
    let mirror = Mirror::into_parent(DiskHandle::from_rc(Rc::clone(&below)), 1);
    stack.chain().attach_mirror(&mirror).await?;
    let mut enter = Some(enter);
    let done = async {
        let mut moved = 0;
        for _ in 0..TRIES {
            moved += stack.chain().copy_to_mirror(&mirror, CopyPass::default(), control).await?.written;
            if let Some((file, pause)) = switch_top(stack, &mirror, layer, parent, &mut enter).await? {
                // Its name, that is: the file has the disk's. Where the parent kept its own name, nothing is gone.
                let removed = (file == layer.path).then(|| parent.path.clone());
                return Ok(Merged { removed, moved, mirrored: mirror.mirrored(), pause });
            }
        }
        Err(EngineError::Invalid(format!(
            "{}: the guest discards faster than can be copied; try again when it is at rest",
            layer.path.display()
        )))
    };
    let done = done.await;
    if done.is_err() {
        stack.chain().detach_mirror(&mirror).await;
    }
    done
}

/// Makes the parent the disk; `None`: something is to be copied again before.
async fn switch_top(
    stack: &Rc<Stack>,
    mirror: &Rc<Mirror>,
    layer: &LayerInfo,
    parent: &Reopened,
    enter: &mut Option<Enter>,
) -> Result<Option<(PathBuf, Duration)>, EngineError> {
    // What is not durable yet is made so while the guest goes on.
    stack.disk().flush().await?;
    mirror.flush().await?;
    let below = stack.chain().layers();
    let marked = stack.mark_new_top(&below[1].handle).await?;
    let began = Instant::now();
    let held = stack.hold_changes("the layer was not merged").await?;
    if mirror.position() < stack.disk().geometry().size {
        return Ok(None);
    }
    let Some(enter) = enter.take() else { return Ok(None) };
    let history = stack.kept().ok().map(|kept| kept.file.clone());
    // A layer that was frozen by a snapshot gives the disk its name back.
    let keeps_name = is_frozen_layer_of(&parent.path, &layer.path);
    let file = if keeps_name { layer.path.clone() } else { parent.path.clone() };
    let (from, to) = (parent.path.clone(), file.clone());
    stack
        .exchange(Exchanged::Mirror(mirror), async |layers| {
            layers[0].handle.close().await?;
            let mut now = layers[1..].to_vec();
            let files = stack.files()[1..].to_vec();
            // The handle goes on; in messages its file has its old name until the disk is opened again.
            now[0].path.clone_from(&to);
            let (from, to, top, format) = (from.clone(), to.clone(), layer.path.clone(), parent.format);
            let last = Box::pin(async move {
                if keeps_name {
                    return dataplane::offload(move || replace_file(&from, &to)).await;
                }
                // An image on which another one stands is not written to. While the top is the disk it is noted anew when
                // that is opened.
                linkage::forget_child(&to, &top).await?;
                let entered = dataplane::offload({
                    let to = to.clone();
                    move || enter(&to, format, history)
                });
                if let Err(error) = entered.await {
                    linkage::register_child(&to, &top).await?;
                    return Err(error);
                }
                Ok(())
            });
            Ok(Exchange { layers: now, files, marked, last })
        })
        .await?;
    stack.set_top(file.clone(), parent.format);
    drop(held);
    let pause = began.elapsed();
    if let Err(error) =
        linkage::absorbed_top(&parent.path, &layer.path, grandparent(stack, 1).as_deref(), keeps_name).await
    {
        tracing::warn!(image = %file.display(), error = chain_text(&error), "what is noted beside the image is old");
    }
    Ok(Some((file, pause)))
}

/// Whether `frozen` has the name that a snapshot gives to a layer of `disk`.
fn is_frozen_layer_of(frozen: &Path, disk: &Path) -> bool {
    let name = |path: &Path| path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let stem = disk.file_stem().map(|stem| stem.to_string_lossy().into_owned()).unwrap_or_default();
    frozen.parent() == disk.parent()
        && frozen.extension() == disk.extension()
        && name(frozen).strip_prefix(&stem).is_some_and(|rest| rest.starts_with('@'))
}

async fn merge_frozen(
    stack: &Rc<Stack>,
    upper: usize,
    layer: &LayerInfo,
    parent: &Reopened,
    control: &Rc<JobControl>,
) -> Result<Merged, EngineError> {
    let size = layer.handle.geometry().size;
    grow_parent(stack, upper + 1, size).await?;
    let below = chain_from(stack, upper + 1);
    let target = DiskHandle::from_rc(Rc::clone(&below));
    let layers = stack.chain().layers();
    let copied = CopyPass::default().commit(&layers, upper..upper + 1, &target, 0, control).await?;
    drop(layers);
    if below.geometry().size > size {
        stack
            .chain()
            .switch(async |layers: Rc<[LayerInfo]>| {
                below.resize_with(size, Preallocation::Off).await?;
                Ok::<_, EngineError>(layers.to_vec())
            })
            .await?;
    }
    target.flush().await?;
    let began = Instant::now();
    // Nobody writes to either: what waits are the reads of an instant.
    let mut files = stack.files();
    stack
        .chain()
        .switch(async |layers: Rc<[LayerInfo]>| {
            layers[upper + 1].handle.close().await?;
            linkage::takes_place(&layers[upper + 1], &layers[upper]).await?;
            let frozen = parent.file.renamed_for_reading(&layer.path.display().to_string())?;
            let handle = open_layer(frozen.clone(), parent.format, true).await?;
            let (from, to) = (parent.path.clone(), layer.path.clone());
            dataplane::offload(move || replace_file(&from, &to)).await?;
            let mut now = layers.to_vec();
            now.remove(upper + 1);
            now[upper] = LayerInfo { path: layer.path.clone(), format: layer.format, handle };
            files.remove(upper + 1);
            files[upper] = frozen;
            Ok::<_, EngineError>(now)
        })
        .await?;
    let pause = began.elapsed();
    parent.rest();
    stack.set_files(files);
    if let Err(error) = linkage::took_place(&parent.path, &layer.path, grandparent(stack, upper + 1).as_deref()).await {
        tracing::warn!(image = %layer.path.display(), error = chain_text(&error), "what is noted beside the image is old");
    }
    Ok(Merged { removed: Some(parent.path.clone()), moved: copied.written, mirrored: 0, pause })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_snapshots_give() {
        let is = |frozen: &str, disk: &str| is_frozen_layer_of(Path::new(frozen), Path::new(disk));
        assert!(is("/v/web@a.b.qcow2", "/v/web.qcow2") && is("/v/web@a", "/v/web"));
        assert!(!is("/v/web.qcow2", "/v/web.qcow2") && !is("/w/web@a.qcow2", "/v/web.qcow2"));
        assert!(!is("/v/webs@a.qcow2", "/v/web.qcow2") && !is("/v/web@a.raw", "/v/web.qcow2"));
    }
}
