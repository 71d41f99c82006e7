//! Naming another parent.
//!
//! | # | step, each durable before the next | power fails after it |
//! |---|---|---|
//! | 1 | (not with `-u`) what would show differently over the new parent is copied into the child | the child shows the same over the old parent, and over the new one as far as it got |
//! | 2 | the link is taken out | a child that is not bound names the old parent, over which it is right |
//! | 3 | the header names the new parent (`formats::qcow2::rename_backing`) | a child that is not bound names the new parent, over which it is right |
//! | 4 | the link to the new parent | all is done, but for what is noted beside the parents |

use super::accept::{Probed, report};
use super::children::{real, refuse_parent, seen_from};
use super::report::ChainReport;
use super::restamp::set_link;
use super::verify::link_to;
use super::{LinkageUse, forget_child, register_child};
use crate::images::gate::{FileGate, FileId};
use crate::images::request::SourceSpec;
use crate::images::stack::{HistoryUse, OpenRequest, Stack};
use crate::images::{Progress, Workshop, closing, offload_format};
use crate::{EngineError, Format, chain_text};
use chain::{Access, OpenGate};
use disk::{Below, Buf, ByteRange, DiskError, ErrorKind, Operation, WriteFlags, ZeroMode};
use formats::qcow2::{self, BackingRef, Header};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// Bytes that are compared at a time, and bytes of which a difference is copied as a whole.
const PIECE: u64 = 1 << 20;
const BLOCK: usize = 64 << 10;

/// Which parent an image is to have.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RebaseSpec {
    /// The image.
    pub file: PathBuf,
    /// Its format; by its extension when absent.
    pub format: Option<Format>,
    /// The parent's name as the image is to record it, with its format; relative names are relative to the image's directory.
    /// `None`: no parent.
    pub parent: Option<(String, Format)>,
    /// Whether the name alone is changed, whatever shows through then.
    pub name_only: bool,
}

/// Names another parent.
async fn rebase(spec: &RebaseSpec, progress: &Progress) -> Result<(), EngineError> {
    let invalid = |why: String| EngineError::Invalid(format!("{}: {why}", spec.file.display()));
    if offload_format(spec.file.clone(), spec.format).await? != Format::Qcow2 {
        return Err(invalid("a raw image has no parent".to_owned()));
    }
    let parent = spec.parent.as_ref().map(|(name, format)| (seen_from(&spec.file, name), *format));
    let old = match spec.name_only {
        true => named_parent(&spec.file).await?,
        false => copy_differences(spec, parent.as_ref(), progress).await?,
    };
    refuse_parent(&spec.file).await?;
    let found = match &parent {
        None => None,
        Some((file, format)) => Some(Probed::look(file, *format, false).await?),
    };
    let trusted = history_is_trusted(&spec.file).await;
    set_link(&spec.file, 0, None, |_| None).await?;
    {
        let storage = FileGate::cached().open_storage(&spec.file, Access::ReadWrite).await?;
        let backing = spec
            .parent
            .as_ref()
            .map(|(name, format)| BackingRef { name: name.clone(), format: Some(format.name().to_owned()) });
        // Crash: the table above.
        qcow2::rename_backing(&storage, backing.as_ref()).await?;
    }
    if let Some(found) = &found {
        found.print.let_time_pass().await;
        let link = link_to(&found.identity, &found.print);
        set_link(&spec.file, 0, None, move |_| Some(link)).await?;
    }
    note(&spec.file, old.as_deref(), parent.as_ref().map(|(file, _)| file.as_path())).await;
    if trusted && !spec.name_only {
        keep_history(&spec.file).await;
    }
    Ok(())
}

/// What is noted beside the parents.
async fn note(child: &Path, old: Option<&Path>, new: Option<&Path>) {
    let same = matches!((old, new), (Some(old), Some(new)) if real(old) == real(new));
    if let Some(old) = old.filter(|_| !same)
        && let Err(error) = forget_child(old, child).await
    {
        tracing::warn!(parent = %old.display(), error = chain_text(&error), "the child is still noted beside its old parent");
    }
    if let Some(new) = new
        && let Err(error) = register_child(new, child).await
    {
        tracing::warn!(parent = %new.display(), error = chain_text(&error), "the child cannot be noted beside its parent");
    }
}

/// The parent that the image names.
async fn named_parent(file: &Path) -> Result<Option<PathBuf>, EngineError> {
    let storage = FileGate::cached().open_storage(file, Access::ReadOnly).await?;
    let header = Header::read(&storage).await?;
    Ok(header.backing.map(|backing| seen_from(file, &backing.name)))
}

fn history_of(file: &Path) -> OpenRequest {
    OpenRequest {
        force_share: true,
        linkage: LinkageUse::Ignored,
        history: HistoryUse::Mended(None),
        ..OpenRequest::reading(file.to_owned(), Format::Qcow2)
    }
}

/// Whether the image has a history of which every mark can be used.
async fn history_is_trusted(file: &Path) -> bool {
    let Ok(stack) = Stack::open(&history_of(file)).await else { return false };
    let trusted = stack.history().is_ok_and(|kept| kept.history().points().iter().all(|point| point.refused.is_none()));
    if let Err(error) = stack.close().await {
        tracing::warn!(image = %file.display(), error = chain_text(&error), "its history was not closed");
    }
    trusted
}

/// What the image shows is as it was, though its parent is another.
async fn keep_history(file: &Path) {
    let kept = async {
        let stack = Stack::open(&history_of(file)).await?;
        let trusted = match stack.history() {
            Ok(_) => stack.trust_history().await,
            Err(_) => Ok(()),
        };
        closing(&stack, trusted).await
    };
    if let Err(error) = kept.await {
        tracing::warn!(image = %file.display(), error = chain_text(&error), "marks of its history will be refused");
    }
}

/// Copies into the image what would show differently over the new parent; returns the old one.
async fn copy_differences(
    spec: &RebaseSpec,
    parent: Option<&(PathBuf, Format)>,
    progress: &Progress,
) -> Result<Option<PathBuf>, EngineError> {
    let request = OpenRequest {
        writable: true,
        history: HistoryUse::IfThere(None),
        ..OpenRequest::reading(spec.file.clone(), Format::Qcow2)
    };
    let child = Stack::open(&request).await?;
    let old = child.chain().layers().get(1).map(|layer| layer.path.clone());
    let copied = async {
        let new = match parent {
            None => None,
            Some((file, format)) => Some(Stack::open(&OpenRequest::reading(file.clone(), *format)).await?),
        };
        let copied = match refuse_loop(&child, new.as_ref()).await {
            Ok(()) => copy(&child, new.as_ref(), progress).await,
            refused => refused,
        };
        match &new {
            Some(new) => closing(new, copied).await,
            None => copied,
        }
    };
    let copied = copied.await;
    closing(&child, copied).await?;
    Ok(old)
}

async fn refuse_loop(child: &Stack, new: Option<&Stack>) -> Result<(), EngineError> {
    let id = |file: &storage::FileStorage| file.file().metadata().ok().map(|facts| FileId::of(&facts));
    let own = child.files().first().and_then(id);
    match new.is_some_and(|new| new.files().iter().any(|file| id(file) == own)) {
        false => Ok(()),
        true => Err(EngineError::Invalid(format!("{}: would be below itself", child.image().display()))),
    }
}

async fn copy(child: &Stack, new: Option<&Stack>, progress: &Progress) -> Result<(), EngineError> {
    let size = child.disk().geometry().size;
    let below = new.map_or(0, |new| new.disk().geometry().size);
    progress.set_total(size);
    let mut rest = ByteRange::new(0, size);
    while !rest.is_empty() {
        progress.check()?;
        let layers = child.chain().layers();
        let extent = layers[0].handle.map(rest).await?;
        let mut part = extent.range;
        if extent.is_absent() {
            part = part.prefix(PIECE);
            let (shown, old_zero) = zeroes_from(child, part).await?;
            part = part.prefix(shown);
            let covered = part.intersect(ByteRange::new(0, below));
            let new_zero = match new {
                Some(new) if !covered.is_empty() => {
                    let (shown, zero) = zeroes_from(new, covered).await?;
                    part = part.prefix(shown);
                    zero
                }
                _ => true,
            };
            if !(old_zero && new_zero) {
                copy_part(child, new, below, part).await?;
            }
        }
        progress.advance(part.len());
        rest = rest.skip(part.len());
    }
    Ok(child.disk().flush().await?)
}

/// The length of the first run in one state, and whether it is zero.
async fn zeroes_from(stack: &Stack, range: ByteRange) -> Result<(u64, bool), EngineError> {
    let extent = stack.disk().map(range).await?;
    Ok((extent.range.len(), extent.zero))
}

/// Copies the blocks of the part that would show differently.
async fn copy_part(child: &Stack, new: Option<&Stack>, below: u64, part: ByteRange) -> Result<(), EngineError> {
    let old = child.disk().read(part.offset(), Buf::new(part.len() as usize)).await?;
    let mut shown = vec![0; old.len()];
    let covered = part.intersect(ByteRange::new(0, below));
    if let Some(new) = new.filter(|_| !covered.is_empty()) {
        let bytes = new.disk().read(covered.offset(), Buf::new(covered.len() as usize)).await?;
        shown[..bytes.len()].copy_from_slice(&bytes);
    }
    let mut at = 0;
    for (old, shown) in old.chunks(BLOCK).zip(shown.chunks(BLOCK)) {
        let range = ByteRange::new(part.offset() + at, old.len() as u64);
        at += old.len() as u64;
        if old == shown {
            continue;
        }
        match old.iter().all(|byte| *byte == 0) {
            true => zero(child, range).await?,
            false => child.disk().write(range.offset(), Buf::copy_of(old), WriteFlags::default()).await?,
        }
    }
    Ok(())
}

/// Has the image itself say that the range is zero, whatever is below it.
async fn zero(child: &Stack, range: ByteRange) -> Result<(), EngineError> {
    let mode = ZeroMode { unmap: true, fast_only: false };
    child.disk().write_zeroes(range, mode, WriteFlags::default()).await?;
    // Where nothing but zeroes is below, the disk leaves it at that; but something else is to come there.
    let layers = child.chain().layers();
    let layer = &layers[0].handle;
    let (unit, size) = (layer.geometry().unit, layer.geometry().size);
    let mut rest = range;
    while !rest.is_empty() {
        let part = layer.map(rest).await?;
        rest = rest.skip(part.range.len());
        if !part.is_absent() {
            continue;
        }
        let whole = |at: u64| at.is_multiple_of(unit) || at == size;
        let zeroed = match whole(part.range.offset()) && whole(part.range.end()) {
            true => layer.write_zeroes(part.range, Below::Parent, mode).await,
            false => Err(DiskError::new(ErrorKind::Unsupported, Operation::WriteZeroes)),
        };
        match zeroed {
            Err(error) if error.kind() == ErrorKind::Unsupported => {
                let zeroes = Buf::zeroed(part.range.len() as usize);
                child.disk().write(part.range.offset(), zeroes, WriteFlags::default()).await?;
            }
            other => other?,
        }
    }
    Ok(())
}

impl Workshop {
    /// Names another parent in an image. Unless the name alone is to be changed, what would show differently is copied into
    /// the image before, so that the disk is as it was.
    ///
    /// # Errors
    /// When the image is in use, has children, or its chain is faulty; when a parent cannot be opened.
    pub async fn rebase(&self, spec: RebaseSpec, progress: Progress) -> Result<ChainReport, EngineError> {
        self.run(move || async move {
            rebase(&spec, &progress).await?;
            report(&SourceSpec::of(spec.file.clone(), spec.format)).await
        })
        .await
    }
}
