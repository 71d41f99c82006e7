//! An open stack of images on the present I/O thread.

use super::gate::{FileGate, FileId, RecordingGate};
use super::live::LiveDisk;
use crate::{CacheMode, EngineError, Format, ImageSpec};
use chain::{Chain, LayerInfo, ParentSpec, StackSpec};
use disk::{DiskHandle, LayerHandle, StorageHandle};
use formats::raw::{self, RawLayer};
use std::path::PathBuf;
use std::rc::Rc;
use storage::FileStorage;

/// What to open, and how.
#[derive(Clone, Debug)]
pub(crate) struct OpenRequest {
    pub(crate) image: ImageSpec,
    /// The top image's format, decided already.
    pub(crate) format: Format,
    pub(crate) writable: bool,
    /// Take no locks: others may write meanwhile.
    pub(crate) force_share: bool,
    pub(crate) cache: CacheMode,
}

impl OpenRequest {
    /// The present state of that file, for reading.
    pub(crate) fn reading(file: PathBuf, format: Format) -> Self {
        Self {
            image: ImageSpec::of(file, Some(format)),
            format,
            writable: false,
            force_share: false,
            cache: CacheMode::default(),
        }
    }
}

/// An open stack.
pub(crate) struct Stack {
    chain: Rc<Chain>,
    disk: DiskHandle,
    format: Format,
    files: Vec<FileStorage>,
}

impl Stack {
    /// Opens it.
    pub(crate) async fn open(request: &OpenRequest) -> Result<Self, EngineError> {
        Self::open_beside(request, &[]).await
    }

    /// Opens it, but none of the `kept` files for writing.
    pub(crate) async fn open_beside(request: &OpenRequest, kept: &[FileId]) -> Result<Self, EngineError> {
        let mut spec = stack_spec(&request.image, Some(request.format))?;
        spec.read_only = !request.writable;
        let gate = FileGate { cache: request.cache, force_share: request.force_share };
        let gate = RecordingGate::new(gate, kept);
        let opened = chain::open(&spec, &gate).await.map_err(|error| {
            let image = &request.image.file;
            match error.object() {
                Some(object) if object != image.display().to_string() => {
                    EngineError::Needed { image: image.clone(), source: error }
                }
                _ => EngineError::Disk(error),
            }
        });
        let chain = Rc::new(opened?);
        Ok(Self {
            disk: DiskHandle::from_rc(Rc::clone(&chain)),
            chain,
            format: request.format,
            files: gate.into_opened(),
        })
    }

    /// A stack that reads a disk of the daemon; closing it leaves that disk alone.
    pub(crate) fn live(live: &LiveDisk) -> Self {
        let layer = RawLayer::open(live.storage(), raw::OpenOptions { read_only: true, size: None });
        let layer =
            LayerInfo { path: live.file.clone(), format: formats::Format::Raw, handle: LayerHandle::new(layer) };
        let chain = Rc::new(Chain::new(vec![layer]));
        Self { disk: DiskHandle::from_rc(Rc::clone(&chain)), chain, format: Format::Raw, files: Vec::new() }
    }

    pub(crate) fn disk(&self) -> &DiskHandle {
        &self.disk
    }

    pub(crate) fn chain(&self) -> &Chain {
        &self.chain
    }

    /// All open files of the stack: images, parents and data files.
    pub(crate) fn files(&self) -> &[FileStorage] {
        &self.files
    }

    /// The file behind a storage of this stack, if it can be read and written at any offset by plain system calls.
    pub(crate) fn plain_file(&self, storage: &StorageHandle) -> Option<FileStorage> {
        if storage.limits().alignment != 1 {
            return None; // Direct I/O is the storage's business.
        }
        let mut found = self.files.iter().filter(|file| disk::Storage::name(*file) == storage.name());
        match (found.next(), found.next()) {
            (Some(file), None) => Some(file.clone()),
            _ => None, // Two names that look alike, as they are no UTF-8.
        }
    }

    pub(crate) fn format(&self) -> Format {
        self.format
    }

    /// Flushes and closes all layers.
    pub(crate) async fn close(&self) -> Result<(), EngineError> {
        Ok(self.disk.close().await?)
    }
}

/// The chain's words for an image and its explicit parents.
fn stack_spec(image: &ImageSpec, format: Option<Format>) -> Result<StackSpec, EngineError> {
    let format = format.or(image.format).ok_or_else(|| EngineError::FormatUnknown { file: image.file.clone() })?;
    let parent = match &image.parent {
        None => ParentSpec::FromImage,
        Some(parent) => ParentSpec::Explicit(Box::new(stack_spec(parent, None)?)),
    };
    let mut spec = StackSpec::new(image.file.clone(), format.into());
    spec.snapshot = image.snapshot.clone();
    spec.data_file = image.data_file.clone();
    spec.parent = parent;
    Ok(spec)
}
