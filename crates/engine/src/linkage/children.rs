//! The children of an image: images that were made over it, exist, and still name it.

use super::identity_file::{self, IdentityRead, enter_child};
use super::report::{ChildReport, ChildState};
use crate::images::gate::{FileGate, FileId};
use crate::{EngineError, chain_text};
use chain::{Access, OpenGate};
use disk::ErrorKind;
use formats::qcow2::{BackingRef, Header};
use std::fs;
use std::io;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

/// A path from the root, without what is a link on the way to the file.
fn rooted(path: &Path) -> PathBuf {
    let absolute = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    match (absolute.parent().map(Path::canonicalize), absolute.file_name()) {
        (Some(Ok(directory)), Some(name)) => directory.join(name),
        _ => absolute,
    }
}

/// How a child is kept in its parent's file: relative if it is in the parent's directory or below, so that the directory
/// can be moved.
pub(super) fn kept_name(parent: &Path, child: &Path) -> PathBuf {
    let (parent, child) = (rooted(parent), rooted(child));
    let directory = parent.parent().unwrap_or(Path::new("/"));
    child.strip_prefix(directory).map_or_else(|_| child.clone(), Path::to_owned)
}

/// The directory of an image, from the root.
pub(super) fn directory_of(image: &Path) -> PathBuf {
    rooted(image).parent().unwrap_or(Path::new("/")).to_owned()
}

/// The file that is meant where an image is: links are followed, as what is known is kept beside the image itself.
pub(super) fn real(image: &Path) -> PathBuf {
    image.canonicalize().unwrap_or_else(|_| image.to_owned())
}

/// The file that a name in an image means.
pub(super) fn seen_from(image: &Path, name: &str) -> PathBuf {
    let name = name.strip_prefix("file:").unwrap_or(name);
    image.parent().map_or_else(|| PathBuf::from(name), |directory| directory.join(name))
}

/// Notes that an image was made over another; nothing is noted of a block device's children.
///
/// # Errors
/// When the file beside the parent cannot be written.
pub async fn register_child(parent: &Path, child: &Path) -> Result<(), EngineError> {
    let (parent, child) = (parent.to_owned(), child.to_owned());
    dataplane::offload(move || {
        let parent = real(&parent);
        if fs::metadata(&parent).is_ok_and(|facts| facts.file_type().is_block_device()) {
            return Ok(()); // It has no place beside it.
        }
        let (name, directory) = (kept_name(&parent, &child), directory_of(&parent));
        // Most often it is known already.
        if let Ok(IdentityRead::There(known)) = identity_file::read_blocking(&parent)
            && known.children.iter().any(|child| child.file == name)
        {
            return Ok(());
        }
        identity_file::change_blocking(&parent, |known| enter_child(known, &directory, name))
    })
    .await
}

/// Forgets that an image was made over another. `false`: that was not known.
///
/// # Errors
/// When the file beside the parent cannot be written.
pub async fn forget_child(parent: &Path, child: &Path) -> Result<bool, EngineError> {
    let (parent, child) = (parent.to_owned(), child.to_owned());
    dataplane::offload(move || {
        let parent = real(&parent);
        let (name, mut found) = (kept_name(&parent, &child), false);
        identity_file::change_blocking(&parent, |known| {
            let before = known.children.len();
            known.children.retain(|child| child.file != name);
            found = known.children.len() < before;
        })?;
        Ok(found)
    })
    .await
}

/// What has become of a child that is known.
async fn look_at(parent: &FileId, child: &Path) -> ChildState {
    let gate = FileGate { force_share: true, ..FileGate::cached() };
    let storage = match gate.open_storage(child, Access::ReadOnly).await {
        Ok(storage) => storage,
        Err(error) if error.kind() == ErrorKind::NotFound => return ChildState::Gone,
        // It may be one: what cannot be looked at is not written over.
        Err(_) => return ChildState::Unreadable,
    };
    let named = match Header::read(&storage).await {
        Ok(Header { backing: Some(BackingRef { name, .. }), .. }) => seen_from(child, &name),
        Ok(_) => return ChildState::NamesAnother,
        Err(error) if error.kind() == ErrorKind::Corrupt => return ChildState::NamesAnother, // No image any more.
        Err(_) => return ChildState::Unreadable,
    };
    let named = dataplane::offload(move || fs::metadata(named)).await;
    match named {
        Ok(facts) if FileId::of(&facts) == *parent => ChildState::There,
        Err(error) if error.kind() != io::ErrorKind::NotFound => ChildState::Unreadable,
        _ => ChildState::NamesAnother,
    }
}

/// All children that are known of an image, and what has become of each.
pub(super) async fn known_children(image: &Path) -> Result<Vec<ChildReport>, EngineError> {
    let image = image.to_owned();
    let looked = dataplane::offload(move || {
        let image = real(&image);
        let known = identity_file::read_blocking(&image)?.or_nothing();
        let facts = match known.children.is_empty() {
            true => None,
            false => fs::metadata(&image).ok(),
        };
        Ok::<_, EngineError>((directory_of(&image), known.children, facts))
    });
    let (directory, known, facts) = looked.await?;
    let Some(parent) = facts.map(|facts| FileId::of(&facts)) else { return Ok(Vec::new()) };
    let mut all = Vec::with_capacity(known.len());
    for child in known {
        let file = directory.join(&child.file);
        let state = look_at(&parent, &file).await;
        all.push(ChildReport { file, since: child.since, state });
    }
    Ok(all)
}

/// The children of an image that exist and still name it as their parent. One that cannot be looked at counts.
///
/// # Errors
/// When the file beside the image cannot be read.
pub async fn children(image: &Path) -> Result<Vec<PathBuf>, EngineError> {
    let known = known_children(image).await?;
    Ok(known.into_iter().filter(ChildReport::counts).map(|child| child.file).collect())
}

/// Refuses to write to an image that has children.
pub(crate) async fn refuse_parent(image: &Path) -> Result<(), EngineError> {
    let children = match children(image).await {
        Ok(children) => children,
        Err(error) => {
            // What is known of it must never be what keeps an image from being used.
            tracing::warn!(image = %image.display(), error = chain_text(&error), "its children are not known");
            return Ok(());
        }
    };
    let others = children.len().saturating_sub(1);
    match children.into_iter().next() {
        None => Ok(()),
        Some(child) => Err(EngineError::HasChildren { image: image.to_owned(), child, others }),
    }
}
