//! Telling of a chain: its layers, how they fit, and who else depends on them.

use super::children::known_children;
use super::content_hash;
use super::identity_file::{self, IdentityRead};
use super::report::{ChainReport, HashReport, LayerReport, LinkReport, LinkState};
use super::verify::{Checked, verify_stack};
use super::{LinkageUse, accept};
use crate::images::request::SourceSpec;
use crate::images::stack::{OpenRequest, Stack};
use crate::images::{Progress, Workshop, closing, offload_format};
use crate::{EngineError, chain_text};
use chain::Chain;
use disk::{DiskHandle, ParentLink};
use std::path::PathBuf;
use std::rc::Rc;

impl LinkReport {
    /// Of a link that has no fault.
    pub(super) fn of(parent: PathBuf, link: Option<&ParentLink>) -> Self {
        Self {
            parent,
            state: if link.is_some() { LinkState::Sound } else { LinkState::Unbound },
            content: link.and_then(|link| link.parent).map(|id| id.to_string()),
            second_content: link.and_then(|link| link.second).map(|id| id.to_string()),
            size: link.map(|link| link.size),
            modified: link.map(|link| link.modified),
            bound: link.map(|link| link.linked),
            fault: None,
            exposed: None,
            text: None,
            hash: None,
        }
    }

    fn of_checked(checked: &Checked) -> Self {
        let mut report = Self::of(checked.parent.clone(), checked.link.as_ref());
        if let Some(fault) = &checked.fault {
            report.state = LinkState::Fault;
            fault.report(&mut report);
        }
        report
    }
}

/// The report of an open chain. `times`: whether sizes and times count; `fresh`: whether headers are read anew.
pub(crate) async fn report_of_stack(
    stack: &Stack,
    disk: &str,
    times: bool,
    fresh: bool,
) -> Result<ChainReport, EngineError> {
    let checked = verify_stack(stack.chain(), &stack.files(), times, fresh).await?;
    report_of(stack, disk, &checked).await
}

async fn report_of(stack: &Stack, disk: &str, checked: &[Checked]) -> Result<ChainReport, EngineError> {
    let layers = stack.chain().layers();
    let mut all = Vec::with_capacity(layers.len());
    for (n, layer) in layers.iter().enumerate() {
        // A parent's present state is that of its file, if its header was read anew.
        let identity = match n.checked_sub(1).and_then(|above| checked.get(above)) {
            Some(above) => above.found,
            None => layer.handle.identity(),
        };
        let mut report = LayerReport {
            file: layer.path.clone(),
            format: layer.format.into(),
            virtual_size: layer.handle.geometry().size,
            content: identity.content.map(|id| id.to_string()),
            lapsed: identity.lapsed.map(|id| id.to_string()),
            link: checked.get(n).map(LinkReport::of_checked),
            children: Vec::new(),
            snapshot: None,
            content_hash: None,
            moved_to: None,
            identity_file_error: None,
        };
        match identity_file::read(&layer.path).await {
            Ok(IdentityRead::Missing) => {}
            Ok(IdentityRead::There(known)) => {
                report.snapshot = known.snapshot;
                report.content_hash = known.content_hash.map(|hash| hash.blake3);
                report.moved_to = known.moved_to;
                report.children = known_children(&layer.path).await?;
            }
            Ok(IdentityRead::Damaged(reason)) => report.identity_file_error = Some(reason),
            Err(error) => report.identity_file_error = Some(chain_text(&error)),
        }
        all.push(report);
    }
    let sound = checked.iter().all(|checked| checked.fault.is_none());
    Ok(ChainReport { disk: disk.to_owned(), sound, layers: all })
}

/// Hashes what each parent shows; compares it with what was recorded, or records it.
async fn prove(stack: &Stack, checked: &mut [Checked], progress: &Progress) -> Result<Vec<HashReport>, EngineError> {
    let layers = stack.chain().layers().to_vec();
    let sizes = layers.iter().skip(1).map(|layer| layer.handle.geometry().size);
    progress.set_total(sizes.fold(0, u64::saturating_add));
    let mut all = Vec::with_capacity(checked.len());
    for (n, pair) in checked.iter_mut().enumerate() {
        let disk = DiskHandle::from_rc(Rc::new(Chain::new(layers[n + 1..].to_vec())));
        let size = disk.geometry().size;
        let taken = content_hash::hash(&disk, progress).await?;
        let known = identity_file::read(&pair.parent).await?.or_nothing();
        let present = super::verify::link_to(&pair.found, &pair.print);
        // What the child was bound to; for a child that is not bound, what is there.
        let bound = pair.link.unwrap_or(present);
        let report = match known.content_hash.filter(|hash| hash.is_of(&bound)) {
            Some(hash) if (&hash.blake3, hash.disk_size) == (&taken, size) => HashReport::Same,
            Some(_) => HashReport::Different,
            None if pair.fault.is_some() => HashReport::Unknown,
            None => {
                let record = content_hash::record(taken, size, &pair.found, &pair.print);
                match identity_file::change(&pair.parent, |known| known.content_hash = Some(record)).await {
                    Ok(()) => HashReport::Recorded,
                    Err(error) => {
                        tracing::warn!(parent = %pair.parent.display(), error = chain_text(&error), "its hash is not recorded");
                        HashReport::NotRecorded
                    }
                }
            }
        };
        if report == HashReport::Different && pair.fault.is_none() {
            pair.note_other_content(&layers, n).await;
        }
        all.push(report);
    }
    Ok(all)
}

impl Workshop {
    /// The layers of a chain, how they fit, and who else depends on them.
    ///
    /// # Errors
    /// When an image of the chain cannot be opened.
    pub async fn show_chain(&self, source: SourceSpec) -> Result<ChainReport, EngineError> {
        self.run(move || async move { accept::report(&source).await }).await
    }

    /// The same, with the hashes of what all parents show: compared with what was recorded of them, or recorded.
    ///
    /// # Errors
    /// When an image of the chain cannot be opened or read.
    pub async fn prove_chain(&self, source: SourceSpec, progress: Progress) -> Result<ChainReport, EngineError> {
        self.run(move || async move {
            let format = offload_format(source.file.clone(), source.format).await?;
            let request =
                OpenRequest { linkage: LinkageUse::Ignored, ..OpenRequest::reading(source.file.clone(), format) };
            let stack = Stack::open(&request).await?;
            let proven = async {
                let mut checked = verify_stack(stack.chain(), &stack.files(), true, false).await?;
                let hashes = prove(&stack, &mut checked, &progress).await?;
                let mut report = report_of(&stack, &source.file.display().to_string(), &checked).await?;
                for (layer, hash) in report.layers.iter_mut().zip(hashes) {
                    if let Some(link) = &mut layer.link {
                        link.hash = Some(hash);
                    }
                }
                Ok(report)
            };
            let proven = proven.await;
            closing(&stack, proven).await
        })
        .await
    }
}
