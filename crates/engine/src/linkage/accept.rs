//! Binding children to their parents.

use super::fingerprint::Fingerprint;
use super::merging::fault_of;
use super::report::{ChainReport, LinkReport, LinkState};
use super::restamp::set_link;
use super::show::report_of_stack;
use super::verify::{Checked, link_to, verify_stack};
use super::{LinkFault, LinkageUse, children, content_hash, identity_file, register_child};
use crate::images::gate::FileGate;
use crate::images::request::SourceSpec;
use crate::images::stack::{OpenRequest, Stack};
use crate::images::{Progress, Workshop, closing, offload_format};
use crate::{EngineError, Format, chain_text};
use chain::{Access, Chain};
use disk::{DiskHandle, LayerHandle, LayerIdentity, StorageHandle};
use formats::qcow2::{Header, Image, OpenOptions};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use storage::FileStorage;

/// An image that may be a parent, looked at. While it lives the image has a reader's lock, unless it was taken without.
pub(super) struct Probed {
    pub(super) identity: LayerIdentity,
    pub(super) print: Fingerprint,
    _files: Vec<FileStorage>,
}

impl Probed {
    /// Looks at an image. `unlocked`: though somebody may write to it.
    pub(super) async fn look(file: &Path, format: Format, unlocked: bool) -> Result<Self, EngineError> {
        let gate = FileGate { force_share: unlocked, ..FileGate::cached() };
        let image = gate.open_file(file, Access::ReadOnly).await?;
        let mut files = vec![image.clone()];
        let mut identity = LayerIdentity::default();
        if format == Format::Qcow2 {
            let header = Header::read(&StorageHandle::new(image)).await?;
            identity = header.identity();
            if let Some(name) = header.data_file.as_deref().filter(|_| header.has_data_file()) {
                files.push(gate.open_file(&children::seen_from(file, name), Access::ReadOnly).await?);
            }
        }
        let of = files.clone();
        let print = dataplane::offload(move || Fingerprint::of(&of)).await?;
        Ok(Self { identity, print, _files: files })
    }
}

/// Binds a new image, which is still open, to the parent that it was made over.
pub(crate) async fn bind_new_child(
    child: &Path,
    storage: &StorageHandle,
    data_file: Option<&StorageHandle>,
    parent: &Path,
    format: Format,
) -> Result<(), EngineError> {
    let found = Probed::look(parent, format, false).await?;
    found.print.let_time_pass().await;
    let image = Image::open(storage.clone(), data_file.cloned(), OpenOptions::default()).await?;
    let layer = LayerHandle::from_rc(image);
    // Where there is no room it is not bound; all else is as it should be.
    layer.set_parent_link(Some(link_to(&found.identity, &found.print))).await?;
    layer.close().await?;
    note_child(parent, child).await;
    Ok(())
}

/// Notes a child with its parent; that it cannot be is no reason not to go on.
async fn note_child(parent: &Path, child: &Path) {
    if let Err(error) = register_child(parent, child).await {
        tracing::warn!(
            parent = %parent.display(), child = %child.display(), error = chain_text(&error),
            "the child cannot be noted beside its parent, which is not protected from being written to"
        );
    }
}

/// A chain was opened for writing, and its links are sound: binds the top if it is not, with its first write, and notes the
/// children with their parents.
pub(crate) async fn bind_opened(chain: &Chain, checked: &[Checked]) {
    for pair in checked {
        note_child(&pair.parent, &pair.child).await;
    }
    if let Some(top) = checked.first().filter(|top| top.link.is_none()) {
        top.print.let_time_pass().await;
        let layers = chain.layers();
        layers[0].handle.link_with_first_write(link_to(&top.found, &top.print));
    }
}

/// The link of an image, as far as it can be told without opening its chain.
pub(crate) async fn link_report(file: &Path, header: &Header, force_share: bool) -> Option<LinkReport> {
    let backing = header.backing.as_ref()?;
    let parent = children::seen_from(file, &backing.name);
    let mut report = LinkReport::of(parent.clone(), header.identity().link.as_ref());
    let Some(link) = header.identity().link else { return Some(report) };
    let format = backing.format.as_deref()?.parse().ok()?;
    let found = Probed::look(&parent, format, true).await.ok()?;
    if let Some(kind) = fault_of(&parent, file, &link, &found.identity, &found.print, !force_share).await {
        let fault = LinkFault {
            child: file.to_owned(),
            parent,
            kind,
            link,
            found: found.identity,
            print: found.print,
            exposed: None,
            size: header.size,
        };
        report.state = LinkState::Fault;
        fault.report(&mut report);
    }
    Some(report)
}

/// A chain at rest, looked at.
struct AtRest {
    files: Vec<(PathBuf, Format)>,
    checked: Vec<Checked>,
    /// For each link: `Some(true)`: the hash that was recorded of what the child was bound to is that of what is there.
    proven: Vec<Option<bool>>,
}

async fn look(source: &SourceSpec, prove: Option<&Progress>) -> Result<AtRest, EngineError> {
    let format = offload_format(source.file.clone(), source.format).await?;
    let request = OpenRequest { linkage: LinkageUse::Ignored, ..OpenRequest::reading(source.file.clone(), format) };
    let stack = Stack::open(&request).await?;
    let looked = async {
        let checked = verify_stack(stack.chain(), &stack.files(), true, false).await?;
        let layers = stack.chain().layers();
        let files = layers.iter().map(|layer| (layer.path.clone(), layer.format.into())).collect();
        let mut proven = vec![None; checked.len()];
        for (n, pair) in checked.iter().enumerate() {
            let (Some(progress), Some(fault)) = (prove, &pair.fault) else { continue };
            let known = identity_file::read(&pair.parent).await?.or_nothing();
            let Some(hash) = known.content_hash.filter(|hash| hash.is_of(&fault.link)) else { continue };
            let disk = DiskHandle::from_rc(Rc::new(Chain::new(layers[n + 1..].to_vec())));
            let same =
                disk.geometry().size == hash.disk_size && content_hash::hash(&disk, progress).await? == hash.blake3;
            proven[n] = Some(same);
        }
        Ok(AtRest { files, checked, proven })
    };
    let looked = looked.await;
    closing(&stack, looked).await
}

/// Binds the links that `which` says, and those whose parent's file is changed by that, from the bottom up.
async fn bind(at_rest: &AtRest, which: impl Fn(usize, &Checked) -> bool) -> Result<(), EngineError> {
    let mut changed = false;
    for (n, pair) in at_rest.checked.iter().enumerate().rev() {
        note_child(&pair.parent, &pair.child).await;
        if !(changed || which(n, pair)) {
            continue;
        }
        let (parent, format) = &at_rest.files[n + 1];
        let found = Probed::look(parent, *format, false).await?;
        if !changed && (found.identity, found.print) != (pair.found, pair.print) {
            return Err(EngineError::Invalid(format!("{}: was changed meanwhile; begin again", parent.display())));
        }
        found.print.let_time_pass().await;
        let link = link_to(&found.identity, &found.print);
        let above = n.checked_sub(1).map(|above| at_rest.files[above].0.clone());
        let bears = set_link(&pair.child, 0, above.as_deref(), move |_| Some(link)).await?;
        if !bears {
            return Err(EngineError::Unsupported(format!(
                "{}: cannot bear a link to its parent: it is of version 2, or its header is full",
                pair.child.display()
            )));
        }
        changed = true;
    }
    Ok(())
}

/// The report of a chain at rest.
pub(super) async fn report(source: &SourceSpec) -> Result<ChainReport, EngineError> {
    let format = offload_format(source.file.clone(), source.format).await?;
    let request = OpenRequest {
        linkage: LinkageUse::Ignored,
        force_share: source.force_share,
        ..OpenRequest::reading(source.file.clone(), format)
    };
    let stack = Stack::open(&request).await?;
    let report = report_of_stack(&stack, &source.file.display().to_string(), !source.force_share, false).await;
    closing(&stack, report).await
}

impl Workshop {
    /// Binds every faulty or unbound link of a chain to the parent as it is now. What the children show is what their
    /// parents hold now: whoever asks for this says that it is right.
    ///
    /// # Errors
    /// When an image is in use, cannot be opened, or cannot bear a link.
    pub async fn accept_chain(&self, source: SourceSpec) -> Result<ChainReport, EngineError> {
        self.run(move || async move {
            let at_rest = look(&source, None).await?;
            bind(&at_rest, |_, pair| pair.fault.is_some() || pair.link.is_none()).await?;
            report(&source).await
        })
        .await
    }

    /// Binds the faulty links of a chain to the parents as they are now, if recorded hashes prove that what they show is what
    /// their children were bound to.
    ///
    /// # Errors
    /// [`EngineError::Unproven`] when a link cannot be proven sound; nothing is changed then. Else as
    /// [`Workshop::accept_chain`].
    pub async fn repair_chain(&self, source: SourceSpec, progress: Progress) -> Result<ChainReport, EngineError> {
        self.run(move || async move {
            let at_rest = look(&source, Some(&progress)).await?;
            for (pair, proven) in at_rest.checked.iter().zip(&at_rest.proven) {
                if let Some(fault) = pair.fault.as_ref().filter(|_| *proven != Some(true)) {
                    return Err(EngineError::Unproven { fault: Box::new(fault.clone()), differs: proven.is_some() });
                }
            }
            bind(&at_rest, |_, pair| pair.fault.is_some()).await?;
            report(&source).await
        })
        .await
    }

    /// Forgets that an image was made over another, so that the parent can be written to. The child will find out.
    ///
    /// # Errors
    /// [`EngineError::Invalid`] when no such child is known; when the file beside the parent cannot be written.
    pub async fn forget_child(&self, parent: PathBuf, child: PathBuf) -> Result<(), EngineError> {
        self.run(move || async move {
            match super::forget_child(&parent, &child).await? {
                true => Ok(()),
                false => Err(EngineError::Invalid(format!(
                    "{}: no child {} is known; `highwater chain show` lists all",
                    parent.display(),
                    child.display()
                ))),
            }
        })
        .await
    }
}
