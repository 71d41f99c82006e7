//! Verifying the links of a chain, on the files that are open.

use super::fault::{FaultKind, LinkFault};
use super::fingerprint::{Fingerprint, now};
use super::merging::fault_of;
use crate::EngineError;
use chain::{Chain, LayerInfo};
use disk::{ByteRange, ContentId, LayerIdentity, ParentLink, Result, StorageId};
use formats::Format;
use formats::qcow2::Header;
use std::path::PathBuf;
use storage::FileStorage;

/// A child and its parent, verified.
pub(crate) struct Checked {
    /// The child's file.
    pub(crate) child: PathBuf,
    /// The parent's file.
    pub(crate) parent: PathBuf,
    /// What the child remembers.
    pub(crate) link: Option<ParentLink>,
    /// What the parent says of its content.
    pub(crate) found: LayerIdentity,
    /// Size and time of the parent.
    pub(crate) print: Fingerprint,
    /// What is wrong.
    pub(crate) fault: Option<LinkFault>,
}

impl Checked {
    /// The hash of the parent's content is not the one that was recorded, though nothing else tells.
    pub(super) async fn note_other_content(&mut self, layers: &[LayerInfo], depth: usize) {
        let link = self.link.unwrap_or_else(|| link_to(&self.found, &self.print));
        self.fault = Some(LinkFault {
            child: self.child.clone(),
            parent: self.parent.clone(),
            kind: FaultKind::OtherContent,
            link,
            found: self.found,
            print: self.print,
            exposed: exposed(layers, depth).await.ok(),
            size: layers[0].handle.geometry().size,
        });
    }
}

/// The link of a child to a parent as it is now.
pub(crate) fn link_to(found: &LayerIdentity, print: &Fingerprint) -> ParentLink {
    link_with(found.content, print)
}

pub(super) fn link_with(parent: Option<ContentId>, print: &Fingerprint) -> ParentLink {
    ParentLink { parent, second: None, size: print.size, modified: print.modified, linked: now() }
}

/// The files of each layer: its image, then its data file if it has one. In `files` a data file follows its image, as a
/// chain opens them.
pub(crate) fn files_of_layers(layers: &[LayerInfo], files: &[FileStorage]) -> Vec<Vec<FileStorage>> {
    let mut all: Vec<Vec<FileStorage>> = vec![Vec::new(); layers.len()];
    let mut present = None;
    for file in files {
        let name = disk::Storage::name(file);
        let begins = |n: &usize| all[*n].is_empty() && layers[*n].handle.storage(StorageId::IMAGE).name() == name;
        present = (0..layers.len()).find(begins).or(present);
        if let Some(layer) = present {
            all[layer].push(file.clone());
        }
    }
    all
}

/// What a layer says about itself; `fresh`: read from its file anew, as others may have changed it.
async fn identity_of(layer: &LayerInfo, fresh: bool) -> Result<LayerIdentity> {
    if fresh && layer.format == Format::Qcow2 {
        return Ok(Header::read(layer.handle.storage(StorageId::IMAGE)).await?.identity());
    }
    Ok(layer.handle.identity())
}

/// Verifies each layer against the next one, top first. `times`: whether sizes and times count; `fresh`: whether headers
/// are read anew.
pub(crate) async fn verify_stack(
    chain: &Chain,
    files: &[FileStorage],
    times: bool,
    fresh: bool,
) -> std::result::Result<Vec<Checked>, EngineError> {
    let layers = chain.layers().to_vec();
    if layers.len() < 2 {
        return Ok(Vec::new());
    }
    let by_layer = files_of_layers(&layers, files);
    let mut all = Vec::with_capacity(layers.len() - 1);
    for (n, pair) in layers.windows(2).enumerate() {
        let [child, parent] = pair else { continue };
        let link = child.handle.parent_link();
        let found = identity_of(parent, fresh).await?;
        let files = by_layer[n + 1].clone();
        let print = dataplane::offload(move || Fingerprint::of(&files)).await?;
        let mut checked =
            Checked { child: child.path.clone(), parent: parent.path.clone(), link, found, print, fault: None };
        if let Some(link) = link
            && let Some(kind) = fault_of(&parent.path, &child.path, &link, &found, &print, times).await
        {
            checked.fault = Some(LinkFault {
                child: child.path.clone(),
                parent: parent.path.clone(),
                kind,
                link,
                found,
                print,
                exposed: exposed(&layers, n).await.ok(),
                size: layers[0].handle.geometry().size,
            });
        }
        all.push(checked);
    }
    Ok(all)
}

/// The first fault, as a refusal.
pub(crate) fn refuse_faults(checked: &[Checked]) -> std::result::Result<(), EngineError> {
    match checked.iter().find_map(|checked| checked.fault.clone()) {
        None => Ok(()),
        Some(fault) => Err(EngineError::Linkage(Box::new(fault))),
    }
}

/// How many bytes of the disk are read from below the layer at `depth`: those that it and the layers above it do not hold,
/// as far as its parent reaches.
pub(super) async fn exposed(layers: &[LayerInfo], depth: usize) -> Result<u64> {
    let below = layers.get(depth + 1).map_or(0, |parent| parent.handle.geometry().size);
    absent(layers, depth, ByteRange::new(0, layers[0].handle.geometry().size.min(below))).await
}

/// Bytes of the range that the layers up to `depth` do not hold.
async fn absent(layers: &[LayerInfo], depth: usize, range: ByteRange) -> Result<u64> {
    let mut sum: u64 = 0;
    // What is left to look at: from which layer on, and where.
    let mut open = vec![(0, range)];
    while let Some((at, range)) = open.pop() {
        let layer = &layers[at].handle;
        // Behind the end of a layer that is shorter than the one above it everything is zero.
        let mut rest = range.intersect(ByteRange::new(0, layer.geometry().size));
        while !rest.is_empty() {
            let extent = layer.map(rest).await?;
            if extent.is_absent() {
                match at == depth {
                    true => sum = sum.saturating_add(extent.range.len()),
                    false => open.push((at + 1, extent.range)),
                }
            }
            rest = rest.skip(extent.range.len());
        }
    }
    Ok(sum)
}
