//! Images that are merged: why the links of those that stand on them stay sound.
//!
//! A parent that takes up what its child holds gets another content, but shows the child's readers the same: what is written to
//! it the child hides. And an image that takes another one's place, because it shows the same, is not what that one's children
//! were bound to. Both are noted beside the image, so that no frozen child has to be written to.

use super::children::{self, kept_name};
use super::fault::{FaultKind, judge};
use super::fingerprint::{Fingerprint, modified};
use super::identity_file::{self, IdentityRead, identity_file_of};
use super::verify::link_to;
use super::{forget_child, register_child};
use crate::EngineError;
use chain::LayerInfo;
use disk::{ContentId, LayerIdentity, ParentLink};
use serde::{Deserialize, Serialize};
use std::fs;
use std::io;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use storage::FileStorage;

/// A content as a child knows it, and as it is found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct KnownContent {
    /// Its id, if the image bears one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub content: Option<String>,
    /// Bytes of the file.
    pub size: u64,
    /// When the file was modified last, in nanoseconds since 1970.
    pub modified: i64,
}

impl KnownContent {
    fn of(content: Option<ContentId>, file: &Path) -> io::Result<Self> {
        let facts = fs::metadata(file)?;
        Ok(Self { content: content.map(|id| id.to_string()), size: facts.len(), modified: modified(&facts) })
    }

    fn id(&self) -> Option<ContentId> {
        self.content.as_deref().and_then(ContentId::parse)
    }

    /// Whether this is what is found.
    fn is(&self, content: Option<ContentId>, print: &Fingerprint) -> bool {
        self.id() == content && self.size == print.size && print.same_time(self.modified)
    }

    /// What a child that is bound to this remembers.
    fn as_link(&self) -> ParentLink {
        ParentLink { parent: self.id(), second: None, size: self.size, modified: self.modified, linked: 0 }
    }

    /// Whether a child was bound to this.
    fn is_bound(&self, link: &ParentLink) -> bool {
        self.id() == link.parent && self.size == link.size && self.modified == link.modified
    }
}

/// Bytes that the image is taking up: those of a child, or those of its parent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Absorbing {
    /// The child's file, as children are named; absent when they are the parent's, and no child is to be alarmed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub child: Option<PathBuf>,
    /// The image before.
    pub before: KnownContent,
}

/// An image in whose place this one stands, as it shows the same.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct SameAs {
    /// To which children are bound.
    pub bound: KnownContent,
    /// What stands here instead.
    pub own: KnownContent,
}

/// Judges a parent that was found against what its child remembers, and what is noted of it; `None` when it is sound.
/// `times`: as for [`judge`].
pub(super) async fn fault_of(
    parent: &Path,
    child: &Path,
    link: &ParentLink,
    found: &LayerIdentity,
    print: &Fingerprint,
    times: bool,
) -> Option<FaultKind> {
    let kind = judge(link, found, print, times)?;
    let (parent, child) = (parent.to_owned(), child.to_owned());
    let (link, found, print) = (*link, *found, *print);
    let excused = dataplane::offload(move || is_excused(&parent, &child, &link, &found, &print, times)).await;
    (!excused).then_some(kind)
}

/// Whether a fault is none: the parent is taking up this very child, or stands in the place of what it was bound to.
fn is_excused(
    parent: &Path,
    child: &Path,
    link: &ParentLink,
    found: &LayerIdentity,
    print: &Fingerprint,
    times: bool,
) -> bool {
    let Ok(IdentityRead::There(known)) = identity_file::read_blocking(parent) else { return false };
    let stands_for = |same: &SameAs| same.bound.is_bound(link) && same.own.is(found.content, print);
    if known.same_as.iter().any(stands_for) {
        return true;
    }
    let Some(absorbing) = &known.absorbing else { return false };
    let is_child = |named: &PathBuf| {
        let beside = children::directory_of(&children::real(parent));
        children::real(&beside.join(named)) == children::real(child)
    };
    let same_child = absorbing.child.as_ref().is_none_or(is_child);
    let before = absorbing.before.is_bound(link)
        || known.same_as.iter().any(|same| same.bound.is_bound(link) && same.own == absorbing.before);
    if !same_child || !before {
        return false;
    }
    // The child may be bound to an image in whose place this one stood already; what the merge has done since is judged.
    match judge(&absorbing.before.as_link(), found, print, times) {
        None | Some(FaultKind::WrittenByHighwater | FaultKind::Grown | FaultKind::Truncated | FaultKind::Modified) => {
            true
        }
        // What is written for a merge leaves none of these.
        Some(
            FaultKind::OpenedForWriting
            | FaultKind::OtherImage
            | FaultKind::IdentityGone
            | FaultKind::Older
            | FaultKind::OtherContent,
        ) => false,
    }
}

/// Notes, durably, that an image is about to take up what `child` holds, or what its own parent holds.
///
/// Crash: from here on the parent may be written to.
pub(crate) async fn note_absorbing(image: &LayerInfo, child: Option<&LayerInfo>) -> Result<(), EngineError> {
    let content = image.handle.content_id();
    let (image, child) = (image.path.clone(), child.map(|child| child.path.clone()));
    dataplane::offload(move || {
        let image = children::real(&image);
        let failed = |e| EngineError::file(&image, "look at", e);
        let before = KnownContent::of(content, &image).map_err(failed)?;
        if fs::metadata(&image).map_err(failed)?.file_type().is_block_device() {
            // There is no place beside it. Of a raw one nothing but its size is known, which stays.
            return match content {
                None => Ok(()),
                Some(_) => Err(EngineError::Unsupported(format!(
                    "{}: is a block device with an image that bears an identity, and what is merged into it could not be \
                     noted; promote the disk to another image instead",
                    image.display()
                ))),
            };
        }
        let child = child.map(|child| kept_name(&image, &child));
        identity_file::change_blocking(&image, |known| {
            // What was cut off goes on: the content before is that of its beginning, to which children are bound.
            let before = known.absorbing.take().map_or(before, |noted| noted.before);
            known.absorbing = Some(Absorbing { child, before });
        })
    })
    .await
}

/// Refuses a layer whose content was given up, as it has begun to take up what stands on it.
///
/// # Errors
/// When that was begun and has not come to its end.
pub(crate) async fn refuse_half_merged(image: &Path) -> Result<(), EngineError> {
    let known = identity_file::read(image).await?.or_nothing();
    match known.absorbing {
        Some(Absorbing { child: Some(_), .. }) => Err(EngineError::HalfMerged {
            image: image.to_owned(),
            snapshot: known.snapshot.map(|snapshot| snapshot.name).unwrap_or_default(),
        }),
        _ => Ok(()),
    }
}

/// The parent has taken up the top layer of a disk, and is the disk: under that layer's name, or under its own.
pub(crate) async fn absorbed_top(
    parent: &Path,
    top: &Path,
    grandparent: Option<&Path>,
    renamed: bool,
) -> Result<(), EngineError> {
    if !renamed {
        // Before its excuse goes: whoever looks at it is to find where the disk is.
        identity_file::set_moved_to(top, Some(parent.to_owned())).await?;
        return identity_file::change(parent, |known| {
            known.absorbing = None;
            known.snapshot = None;
        })
        .await;
    }
    renamed_image(parent, top, grandparent).await
}

/// Notes, durably, that `parent` is about to take the place of `layer`, whose bytes it has taken up; both are closed.
pub(crate) async fn takes_place(parent: &LayerInfo, layer: &LayerInfo) -> Result<(), EngineError> {
    let (own, bound) = (parent.handle.content_id(), layer.handle.content_id());
    let (parent, layer) = (parent.path.clone(), layer.path.clone());
    dataplane::offload(move || {
        let failed = |e| EngineError::file(&layer, "look at", e);
        let own = KnownContent::of(own, &parent).map_err(failed)?;
        let bound = KnownContent::of(bound, &layer).map_err(failed)?;
        identity_file::change_blocking(&layer, |known| {
            // What this layer stood for, the other one stands for now; until the rename it still does itself.
            let inherited: Vec<SameAs> = known
                .same_as
                .iter()
                .filter(|same| same.own == bound)
                .map(|same| SameAs { bound: same.bound.clone(), own: own.clone() })
                .collect();
            known.same_as.retain(|same| same.own == bound);
            known.same_as.extend(inherited);
            if let Some(absorbing) = &known.absorbing {
                // It had begun to take up its parent's bytes before: children are bound to what it was then.
                known.same_as.push(SameAs { bound: absorbing.before.clone(), own: own.clone() });
            }
            known.same_as.push(SameAs { bound, own });
        })
    })
    .await
}

/// What a closed image is known by now.
pub(crate) async fn known_now(image: &LayerInfo) -> Result<KnownContent, EngineError> {
    let (content, path) = (image.handle.content_id(), image.path.clone());
    dataplane::offload(move || KnownContent::of(content, &path).map_err(|e| EngineError::file(path, "look at", e)))
        .await
}

/// An image was written to, but shows what it showed when it was known as `before`; it is closed.
pub(crate) async fn shows_the_same(image: &LayerInfo, before: KnownContent) -> Result<(), EngineError> {
    let own = known_now(image).await?;
    identity_file::change(&image.path, move |known| {
        let begun = known.absorbing.take().map(|absorbing| absorbing.before).filter(|begun| *begun != before);
        for same in &mut known.same_as {
            if same.own == before || Some(&same.own) == begun.as_ref() {
                same.own = own.clone();
            }
        }
        known.same_as.extend(begun.into_iter().chain([before]).map(|bound| SameAs { bound, own: own.clone() }));
    })
    .await
}

/// The parent has taken the place of `layer`.
pub(crate) async fn took_place(parent: &Path, layer: &Path, grandparent: Option<&Path>) -> Result<(), EngineError> {
    // Of the layer that is gone; what it stood for is among the images in whose place this one stands.
    identity_file::change(layer, |known| known.absorbing = None).await?;
    renamed_image(parent, layer, grandparent).await
}

/// An image has another name: nothing is known of the old one any more, and its parent knows the new one.
async fn renamed_image(from: &Path, to: &Path, parent: Option<&Path>) -> Result<(), EngineError> {
    let file = identity_file_of(from);
    dataplane::offload(move || match fs::remove_file(&file) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(EngineError::file(file, "remove", error)),
        _ => Ok(()),
    })
    .await?;
    if let Some(parent) = parent {
        register_child(parent, to).await?;
        forget_child(parent, from).await?;
    }
    Ok(())
}

/// The link of a child to a layer that is open and does not change.
pub(crate) async fn link_to_layer(layer: &LayerInfo, file: &FileStorage) -> Result<ParentLink, EngineError> {
    let files = [file.clone()];
    let print = dataplane::offload(move || Fingerprint::of(&files)).await?;
    Ok(link_to(&layer.handle.identity(), &print))
}

#[cfg(test)]
mod tests {
    use super::*;
    use dataplane::{Backend, block_on};

    fn id(byte: u8) -> Option<ContentId> {
        ContentId::from_bytes([byte; 16])
    }

    fn known(byte: u8, size: u64) -> KnownContent {
        KnownContent { content: id(byte).map(|id| id.to_string()), size, modified: 5 }
    }

    /// The id of an image, and of what it holds.
    fn content(image: u8, content: u8) -> Option<ContentId> {
        let mut bytes = [image; 16];
        bytes[8..].fill(content);
        ContentId::from_bytes(bytes)
    }

    fn excused(directory: &Path, child: &str, link: (u8, u64), found: (u8, u8, u64)) -> bool {
        let found_id = LayerIdentity { content: content(found.0, found.1), ..LayerIdentity::default() };
        excused_of(found_id, directory, child, link, found.2)
    }

    fn excused_of(found: LayerIdentity, directory: &Path, child: &str, link: (u8, u64), size: u64) -> bool {
        let link = ParentLink { parent: id(link.0), second: None, size: link.1, modified: 5, linked: 0 };
        let print = Fingerprint { size, modified: 5 };
        let (parent, child) = (directory.join("p.qcow2"), directory.join(child));
        is_excused(&parent, &child, &link, &found, &print, true)
    }

    #[test]
    fn what_is_noted_excuses_that_alone() {
        let directory = tempfile::tempdir().unwrap();
        let directory = directory.path();
        for file in ["p.qcow2", "c.qcow2", "other.qcow2"] {
            fs::write(directory.join(file), "x").unwrap();
        }
        let parent = directory.join("p.qcow2");
        assert!(!excused(directory, "c.qcow2", (1, 10), (1, 2, 20)));
        identity_file::change_blocking(&parent, |known_of| {
            known_of.absorbing = Some(Absorbing { child: Some("c.qcow2".into()), before: known(1, 10) });
            known_of.same_as.push(SameAs { bound: known(3, 30), own: known(4, 40) });
            known_of.same_as.push(SameAs { bound: known(5, 50), own: known(1, 10) });
        })
        .unwrap();
        assert!(excused(directory, "c.qcow2", (1, 10), (1, 2, 20)), "it is being merged");
        assert!(
            excused(directory, "c.qcow2", (5, 50), (1, 2, 20)),
            "it stood for what the child is bound to, and is being merged"
        );
        assert!(!excused(directory, "c.qcow2", (5, 50), (6, 2, 20)), "another image");
        assert!(!excused(directory, "c.qcow2", (1, 10), (6, 2, 20)), "another image");
        let none = LayerIdentity::default();
        for found in
            [none, LayerIdentity { lapsed: content(1, 1), ..none }, LayerIdentity { lapsed: content(1, 2), ..none }]
        {
            assert!(!excused_of(found, directory, "c.qcow2", (1, 10), 20), "no merge leaves that: {found:?}");
        }
        assert!(!excused(directory, "c.qcow2", (1, 11), (1, 2, 20)), "bound to something else");
        assert!(!excused(directory, "other.qcow2", (1, 10), (1, 2, 20)), "another child");
        assert!(excused(directory, "other.qcow2", (3, 30), (4, 4, 40)), "it stands for that");
        assert!(!excused(directory, "other.qcow2", (3, 30), (4, 4, 41)), "and was changed since");
        assert!(!excused(directory, "other.qcow2", (4, 40), (3, 3, 30)));
    }

    #[test]
    fn of_the_layer_that_is_gone_nothing_is_excused() {
        let directory = tempfile::tempdir().unwrap();
        let (parent, layer) = (directory.path().join("p.qcow2"), directory.path().join("l.qcow2"));
        fs::write(&layer, "x").unwrap();
        let begun = Absorbing { child: None, before: known(1, 10) };
        identity_file::change_blocking(&layer, |known| known.absorbing = Some(begun)).unwrap();
        assert!(identity_file_of(&layer).exists());
        let took = layer.clone();
        block_on(Backend::Threads, async move { took_place(&parent, &took, None).await }).unwrap().unwrap();
        assert!(!identity_file_of(&layer).exists());
    }
}
