//! An open stack of images on the present I/O thread.

use super::gate::FileGate;
use super::live::LiveDisk;
use crate::{CacheMode, EngineError, Format, ImageSpec};
use chain::{Chain, LayerInfo, ParentSpec, StackSpec};
use disk::{DiskHandle, LayerHandle, StorageId};
use formats::qcow2::Header;
use formats::raw::{self, RawLayer};
use std::path::PathBuf;
use std::rc::Rc;

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
    data_file: Option<PathBuf>,
}

impl Stack {
    /// Opens it.
    pub(crate) async fn open(request: &OpenRequest) -> Result<Self, EngineError> {
        let mut spec = stack_spec(&request.image, Some(request.format))?;
        spec.read_only = !request.writable;
        let gate = FileGate { cache: request.cache, force_share: request.force_share };
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
        let data_file = match request.format {
            Format::Raw => None,
            Format::Qcow2 => data_file_of(&chain).await?,
        };
        Ok(Self { disk: DiskHandle::from_rc(Rc::clone(&chain)), chain, format: request.format, data_file })
    }

    /// A stack that reads a disk of the daemon; closing it leaves that disk alone.
    pub(crate) fn live(live: &LiveDisk) -> Self {
        let layer = RawLayer::open(live.storage(), raw::OpenOptions { read_only: true, size: None });
        let layer =
            LayerInfo { path: live.file.clone(), format: formats::Format::Raw, handle: LayerHandle::new(layer) };
        let chain = Rc::new(Chain::new(vec![layer]));
        Self { disk: DiskHandle::from_rc(Rc::clone(&chain)), chain, format: Format::Raw, data_file: None }
    }

    pub(crate) fn disk(&self) -> &DiskHandle {
        &self.disk
    }

    pub(crate) fn chain(&self) -> &Chain {
        &self.chain
    }

    /// The top image's external data file, if there is one.
    pub(crate) fn data_file(&self) -> Option<PathBuf> {
        self.data_file.clone()
    }

    pub(crate) fn format(&self) -> Format {
        self.format
    }

    /// Flushes and closes all layers.
    pub(crate) async fn close(&self) -> Result<(), EngineError> {
        Ok(self.disk.close().await?)
    }
}

/// The name of the storage that holds the top image's data, if that is not the image itself.
async fn data_file_of(chain: &Chain) -> Result<Option<PathBuf>, EngineError> {
    let has = Header::read(chain.top().storage(StorageId::IMAGE)).await?.has_data_file();
    Ok(has.then(|| PathBuf::from(chain.top().storage(StorageId::DATA).name())))
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
