//! Changes of a header by which an image's children must not be alarmed.
//!
//! To bind an image to its parent changes its own file, so its size and time are others, and the links of its own children
//! would not fit any more. So who does that finds out before which of them are sound, and binds these again afterwards; their
//! files change by it, so the same is done for their children.
//!
//! Crash: a child that was not bound again yet finds its parent modified: an alarm too many, and never one too few.

use super::accept::Probed;
use super::children;
use super::identity_file;
use super::merging::fault_of;
use super::verify::link_with;
use crate::images::gate::FileGate;
use crate::images::mended::Mended;
use crate::{EngineError, Format, chain_text};
use chain::{Access, OpenGate};
use disk::{LayerHandle, LocalFuture, ParentLink, StorageHandle};
use formats::qcow2::{Header, Image, OpenOptions};
use std::path::{Path, PathBuf};

/// Images above which a chain has too many, and children of children are not followed.
const DEEPEST: usize = chain::MAX_DEPTH;

/// An image, and its children that are sound.
pub(super) struct Followed {
    image: PathBuf,
    before: Option<Probed>,
    sound: Vec<PathBuf>,
    depth: usize,
}

impl Followed {
    /// Looks at an image before its header is changed. `except`: a child that the caller binds itself.
    async fn at_depth(image: &Path, format: Format, except: Option<&Path>, depth: usize) -> Self {
        let mut followed = Self { image: image.to_owned(), before: None, sound: Vec::new(), depth };
        let Ok(before) = Probed::look(image, format, true).await else { return followed };
        for child in children(image).await.unwrap_or_default() {
            if except.is_some_and(|except| children::real(except) == children::real(&child)) {
                continue;
            }
            if let Some(link) = link_of(&child).await
                && fault_of(image, &child, &link, &before.identity, &before.print, true).await.is_none()
            {
                followed.sound.push(child);
            }
        }
        followed.before = Some(before);
        followed
    }

    /// The header was changed: binds the children again.
    pub(super) async fn after(self, format: Format) {
        let Self { image, before: Some(before), sound, depth } = self else { return };
        let after = match Probed::look(&image, format, true).await {
            Ok(after) => after,
            Err(error) => {
                tracing::warn!(image = %image.display(), error = chain_text(&error), "its children are not bound to it anew");
                return;
            }
        };
        if (after.print, after.identity.content) == (before.print, before.identity.content) {
            return;
        }
        after.print.let_time_pass().await;
        keep_hash(&image, &before, &after).await;
        for child in sound {
            let (content, print) = (after.identity.content, after.print);
            let bound = set_link(&child, depth + 1, None, move |link| {
                let second = link.and_then(|link| link.second);
                Some(ParentLink { second, ..link_with(content, &print) })
            });
            if let Err(error) = bound.await {
                tracing::warn!(
                    child = %child.display(), error = chain_text(&error),
                    "a child was not bound anew after a change of its parent's header; it will find its parent modified"
                );
            }
        }
    }
}

/// A hash that was recorded of the image is still that of its content.
async fn keep_hash(image: &Path, before: &Probed, after: &Probed) {
    let before = link_with(before.identity.content, &before.print);
    let after = link_with(after.identity.content, &after.print);
    let kept = identity_file::change(image, move |known| {
        if let Some(hash) = known.content_hash.as_mut().filter(|hash| hash.is_of(&before)) {
            hash.content = after.parent.map(|id| id.to_string());
            hash.size = after.size;
            hash.modified = after.modified;
        }
    });
    // Most images have no such file, and it is not made by this.
    if let Err(error) = kept.await {
        tracing::debug!(image = %image.display(), error = chain_text(&error), "its hash counts no more");
    }
}

/// What an image remembers of its parent.
async fn link_of(child: &Path) -> Option<ParentLink> {
    let gate = FileGate { force_share: true, ..FileGate::cached() };
    let storage = gate.open_storage(child, Access::ReadOnly).await.ok()?;
    Header::read(&storage).await.ok()?.identity().link
}

/// Opens an image's layer for a change of its header alone.
pub(super) async fn open_image(storage: &StorageHandle, file: &Path) -> Result<LayerHandle, EngineError> {
    let header = Header::read(storage).await?;
    let data_file = match header.data_file.as_deref().filter(|_| header.has_data_file()) {
        None => None,
        Some(name) => Some(FileGate::cached().open_storage(&children::seen_from(file, name), Access::ReadWrite).await?),
    };
    let options = OpenOptions::default();
    Ok(LayerHandle::from_rc(Image::open(storage.clone(), data_file, options).await?))
}

/// Changes the link of an image that nobody uses, and keeps its history and its children. `false`: it cannot bear one.
pub(super) fn set_link<'a>(
    file: &'a Path,
    depth: usize,
    except: Option<&'a Path>,
    change: impl FnOnce(Option<ParentLink>) -> Option<ParentLink> + 'a,
) -> LocalFuture<'a, Result<bool, EngineError>> {
    Box::pin(async move {
        if depth > DEEPEST {
            return Err(EngineError::Invalid(format!("{}: its children have no end", file.display())));
        }
        let storage = FileGate::cached().open_storage(file, Access::ReadWrite).await?;
        let followed = Followed::at_depth(file, Format::Qcow2, except, depth).await;
        // The change is one of the header, and of no byte that a guest sees.
        let mended = Mended::before(file, Format::Qcow2, None).await;
        let set = async {
            let layer = open_image(&storage, file).await?;
            let set = layer.set_parent_link(change(layer.parent_link())).await?;
            layer.close().await?;
            Ok::<_, EngineError>(set)
        };
        let set = set.await;
        if let Some(mended) = mended {
            match Header::read(&storage).await {
                Ok(header) if set.is_ok() => mended.after(true, header.history_mark()).await,
                _ => mended.give_up().await,
            }
        }
        drop(storage);
        followed.after(Format::Qcow2).await;
        set
    })
}
