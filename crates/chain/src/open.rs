//! Opening a stack of images through a gate.

use crate::parent_name::resolve;
use crate::{Chain, LayerInfo, ParentSpec, StackSpec};
use disk::{DiskError, ErrorKind, LayerHandle, LocalFuture, Operation, Result, StorageHandle};
use formats::{Format, qcow2, raw};
use std::path::{Path, PathBuf};

/// Layers that a chain may have.
pub const MAX_DEPTH: usize = 256;

/// What a storage is opened for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Reading; others may read too.
    ReadOnly,
    /// Reading and writing, as the only one.
    ReadWrite,
}

/// What an image names another file for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReferenceKind {
    /// It shows through where the image holds nothing.
    Parent,
    /// It holds the image's data.
    DataFile,
}

/// A file that an image names.
#[derive(Clone, Copy, Debug)]
pub struct Reference<'a> {
    /// What it is named for.
    pub kind: ReferenceKind,
    /// The image that names it.
    pub child: &'a Path,
    /// The name as recorded.
    pub name: &'a str,
    /// The file that the name means.
    pub path: &'a Path,
    /// The format that the image records for a parent; data files are raw.
    pub format: Format,
}

/// Opens storages, and decides which files an image may pull in: what a guest can write to must not be
/// able to name any file of the host.
pub trait OpenGate {
    /// Opens a file (or device).
    fn open_storage<'a>(&'a self, path: &'a Path, access: Access) -> LocalFuture<'a, Result<StorageHandle>>;
    /// Whether a file that an image names may be opened. Files that the spec names are not asked about.
    ///
    /// # Errors
    /// The refusal, with its reason.
    fn allow(&self, reference: &Reference<'_>) -> Result<()>;
    /// What is equal for two paths of one file (its canonical path, for example); finds loops.
    fn identity(&self, path: &Path) -> PathBuf;
    /// Who does what takes long (decompression); by default the thread that asks.
    fn workers(&self) -> qcow2::Workers {
        qcow2::Workers::default()
    }
}

/// An image of which the file is open and the header read, but nothing was changed yet.
struct Found {
    spec: StackSpec,
    storage: StorageHandle,
    data_file: Option<StorageHandle>,
}

/// Opens all layers of a stack.
///
/// Files are opened and headers read from the top down; then layers are opened from the bottom up, so that a
/// parent that cannot be opened leaves the top image untouched.
///
/// # Errors
/// Whatever a file, a header or the gate reports; [`ErrorKind::Invalid`] for a loop, a chain that is too
/// deep, or a combination that makes no sense; [`ErrorKind::Unsupported`] for a parent that is no file or
/// of a format that is unknown or not recorded.
pub async fn open(spec: &StackSpec, gate: &dyn OpenGate) -> Result<Chain> {
    let mut found: Vec<Found> = Vec::new();
    let mut identities: Vec<PathBuf> = Vec::new();
    let mut next = Some(spec.clone());
    while let Some(mut spec) = next {
        // Below the top nothing is written, whatever the spec says.
        spec.read_only |= !found.is_empty() || spec.snapshot.is_some();
        let identity = gate.identity(&spec.path);
        if identities.contains(&identity) {
            return Err(refused(ErrorKind::Invalid, &spec.path, "the chain of parents comes back to this file"));
        }
        identities.push(identity);
        if found.len() == MAX_DEPTH {
            return Err(refused(
                ErrorKind::Invalid,
                &spec.path,
                format!("the chain has more than {MAX_DEPTH} layers; commit or convert some of them"),
            ));
        }
        let (image, parent) = find(spec, gate).await?;
        found.push(image);
        next = parent;
    }
    let mut layers = Vec::with_capacity(found.len());
    while let Some(image) = found.pop() {
        match open_layer(image, gate.workers()).await {
            Ok(layer) => layers.push(layer),
            Err(error) => {
                for layer in &layers {
                    let LayerInfo { path, handle, .. } = layer;
                    if let Err(error) = handle.close().await {
                        tracing::warn!(path = %path.display(), %error, "closing a parent again failed");
                    }
                }
                return Err(error);
            }
        }
    }
    layers.reverse();
    Ok(Chain::new(layers))
}

/// Opens the image's files, and says what lies below.
async fn find(spec: StackSpec, gate: &dyn OpenGate) -> Result<(Found, Option<StackSpec>)> {
    let access = if spec.read_only { Access::ReadOnly } else { Access::ReadWrite };
    let storage = gate.open_storage(&spec.path, access).await?;
    match spec.format {
        Format::Raw => {
            let surplus = if spec.snapshot.is_some() {
                Some("snapshots")
            } else if spec.data_file.is_some() {
                Some("data files")
            } else if matches!(spec.parent, ParentSpec::Explicit(_)) {
                Some("parents")
            } else {
                None
            };
            if let Some(surplus) = surplus {
                return Err(refused(ErrorKind::Invalid, &spec.path, format!("raw images have no {surplus}")));
            }
            Ok((Found { spec, storage, data_file: None }, None))
        }
        Format::Qcow2 => {
            let header = qcow2::Header::read(&storage).await?;
            let data_file = find_data_file(&spec, &header, gate, access).await?;
            let parent = match &spec.parent {
                ParentSpec::None => None,
                ParentSpec::Explicit(parent) => Some((**parent).clone()),
                ParentSpec::FromImage => match &header.backing {
                    Some(backing) => Some(parent_of(&spec.path, &backing.name, backing.format.as_deref(), gate)?),
                    None => None,
                },
            };
            Ok((Found { spec, storage, data_file }, parent))
        }
    }
}

async fn find_data_file(
    spec: &StackSpec,
    header: &qcow2::Header,
    gate: &dyn OpenGate,
    access: Access,
) -> Result<Option<StorageHandle>> {
    if !header.has_data_file() {
        return match &spec.data_file {
            Some(_) => {
                Err(refused(ErrorKind::Invalid, &spec.path, "the image holds its data itself; name no data file"))
            }
            None => Ok(None),
        };
    }
    let path = match (&spec.data_file, &header.data_file) {
        (Some(path), _) => path.clone(),
        (None, Some(name)) => {
            let path = resolve(&spec.path, name)
                .map_err(|bad| refused(ErrorKind::Unsupported, &spec.path, format!("data file: {bad}")))?;
            let kind = ReferenceKind::DataFile;
            gate.allow(&Reference { kind, child: &spec.path, name, path: &path, format: Format::Raw })?;
            path
        }
        (None, None) => {
            return Err(refused(
                ErrorKind::Invalid,
                &spec.path,
                "the image keeps its data in another file but does not name it; name it when opening",
            ));
        }
    };
    if gate.identity(&path) == gate.identity(&spec.path) {
        return Err(refused(ErrorKind::Invalid, &spec.path, "the image names itself as its data file"));
    }
    gate.open_storage(&path, access).await.map(Some)
}

/// The parent that an image names.
fn parent_of(child: &Path, name: &str, format: Option<&str>, gate: &dyn OpenGate) -> Result<StackSpec> {
    let path = resolve(child, name).map_err(|bad| refused(ErrorKind::Unsupported, child, format!("parent: {bad}")))?;
    let Some(format) = format else {
        return Err(refused(
            ErrorKind::Unsupported,
            child,
            format!(
                "the image names the parent {name:?} without its format, and formats are not guessed; record it with: \
                 qemu-img rebase -u -b {name} -F FORMAT {}",
                child.display()
            ),
        ));
    };
    let format: Format = format
        .parse()
        .map_err(|unknown| refused(ErrorKind::Unsupported, child, format!("the parent {name:?}: {unknown}")))?;
    gate.allow(&Reference { kind: ReferenceKind::Parent, child, name, path: &path, format })?;
    Ok(StackSpec { read_only: true, ..StackSpec::new(path, format) })
}

async fn open_layer(image: Found, workers: qcow2::Workers) -> Result<LayerInfo> {
    let Found { spec: StackSpec { path, format, snapshot, read_only, .. }, storage, data_file } = image;
    let handle = match format {
        Format::Raw => LayerHandle::new(raw::RawLayer::open(storage, raw::OpenOptions { read_only, size: None })),
        Format::Qcow2 => {
            let options = qcow2::OpenOptions { snapshot, read_only, workers, ..qcow2::OpenOptions::default() };
            LayerHandle::from_rc(qcow2::Image::open(storage, data_file, options).await?)
        }
    };
    Ok(LayerInfo { path, format, handle })
}

fn refused(kind: ErrorKind, path: &Path, reason: impl Into<String>) -> DiskError {
    DiskError::new(kind, Operation::Open).on(path.display().to_string()).because(reason)
}
