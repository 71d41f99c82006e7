//! An open stack of images on the present I/O thread.

use super::gate::{FileGate, FileId, RecordingGate};
use super::live::LiveDisk;
use crate::history::{HistorySpec, Kept};
use crate::linkage::{self, LinkageUse};
use crate::snapshots::rearranging::Rearranging;
use crate::snapshots::take::Taking;
use crate::{CacheMode, EngineError, Format, ImageSpec, chain_text, history};
use chain::{Chain, LayerInfo, ParentSpec, StackSpec};
use disk::{Disk, DiskHandle, LayerHandle, Preallocation, StorageHandle};
use formats::raw::{self, RawLayer};
use std::cell::{Cell, RefCell};
use std::path::PathBuf;
use std::rc::Rc;
use storage::FileStorage;
use tracking::{Held, UncommittedPoint};

/// What is done about the image's history.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) enum HistoryUse {
    /// It is not kept. Who opens an image for writing like this has what lies beside it brought to an end first (the sidecar
    /// takes down how the image looks, and parked writes are put back); so the next opening sees that somebody has written
    /// since, and refuses the marks.
    #[default]
    None,
    /// It is kept if there is one; in that file, or beside the image.
    IfThere(Option<PathBuf>),
    /// The same, and it can be written though the image is only read: by who changes the image in another way.
    Mended(Option<PathBuf>),
    /// It is kept as the spec says.
    Kept(HistorySpec),
}

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
    pub(crate) history: HistoryUse,
    pub(crate) linkage: LinkageUse,
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
            history: HistoryUse::None,
            linkage: LinkageUse::default(),
        }
    }
}

/// An open stack.
pub(crate) struct Stack {
    chain: Rc<Chain>,
    disk: DiskHandle,
    /// The top image's.
    format: Cell<Format>,
    /// All open files, the top image's first.
    files: RefCell<Vec<FileStorage>>,
    image: RefCell<PathBuf>,
    /// Whether what is opened is what the image says: its present state, over the parent that it names, with its own data.
    plain: bool,
    /// The history that is kept, or why none is.
    history: Result<Kept, String>,
    /// While a mark is being taken.
    pub(crate) holding: RefCell<Option<Held<Chain>>>,
    pub(crate) uncommitted: RefCell<Option<UncommittedPoint<Chain>>>,
    /// While a snapshot is being taken.
    pub(crate) snapshot: RefCell<Option<Taking>>,
    pub(crate) rearranging: Cell<Rearranging>,
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
        if request.writable && request.linkage != LinkageUse::Ignored {
            linkage::refuse_parent(&request.image.file).await?;
        }
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
        let files = gate.into_opened();
        if let Err(error) = verify(request, &chain, &files).await {
            chain.close().await?;
            return Err(error);
        }
        let history = match open_history(request, &chain, &files).await {
            Ok(history) => history,
            Err(error) => {
                chain.close().await?;
                return Err(error);
            }
        };
        let disk = match &history {
            Ok(kept) => DiskHandle::from_rc(Rc::clone(&kept.disk)),
            Err(_) => DiskHandle::from_rc(Rc::clone(&chain)),
        };
        Ok(Self {
            disk,
            chain,
            format: Cell::new(request.format),
            files: RefCell::new(files),
            image: RefCell::new(request.image.file.clone()),
            plain: request.image == ImageSpec::of(&request.image.file, request.image.format),
            history,
            holding: RefCell::default(),
            uncommitted: RefCell::default(),
            snapshot: RefCell::default(),
            rearranging: Cell::default(),
        })
    }

    /// A stack that reads a disk of the daemon; closing it leaves that disk alone.
    pub(crate) fn live(live: &LiveDisk) -> Self {
        let layer = RawLayer::open(live.storage(), raw::OpenOptions { read_only: true, size: None });
        let layer =
            LayerInfo { path: live.file.clone(), format: formats::Format::Raw, handle: LayerHandle::new(layer) };
        let chain = Rc::new(Chain::new(vec![layer]));
        Self {
            disk: DiskHandle::from_rc(Rc::clone(&chain)),
            chain,
            format: Cell::new(Format::Raw),
            files: RefCell::default(),
            image: RefCell::new(live.file.clone()),
            plain: false,
            history: Err("it is read through another disk".to_owned()),
            holding: RefCell::default(),
            uncommitted: RefCell::default(),
            snapshot: RefCell::default(),
            rearranging: Cell::default(),
        }
    }

    /// The top image's file.
    pub(crate) fn image(&self) -> PathBuf {
        self.image.borrow().clone()
    }

    /// Whether what is opened is what the image says, and not what somebody said in its stead.
    pub(crate) fn is_plain(&self) -> bool {
        self.plain
    }

    /// Another image is the top one from now on.
    pub(crate) fn set_top(&self, image: PathBuf, format: Format) {
        self.image.replace(image);
        self.format.set(format);
    }

    /// The disk is made of other files from now on.
    pub(crate) fn set_files(&self, files: Vec<FileStorage>) {
        if let Ok(kept) = &self.history {
            kept.set_files(files.clone());
        }
        self.files.replace(files);
    }

    /// The history that is kept, or why none is.
    pub(crate) fn history(&self) -> Result<&Kept, &str> {
        self.history.as_ref().map_err(String::as_str)
    }

    /// Changes the size, and sets space aside.
    pub(crate) async fn resize(&self, size: u64, preallocation: Preallocation) -> Result<(), EngineError> {
        let change = |chain: Rc<Chain>| async move { chain.resize_with(size, preallocation).await };
        match &self.history {
            Ok(kept) => kept.disk.resize_with(size, change).await?,
            Err(_) => change(Rc::clone(&self.chain)).await?,
        }
        Ok(())
    }

    pub(crate) fn disk(&self) -> &DiskHandle {
        &self.disk
    }

    pub(crate) fn chain(&self) -> &Rc<Chain> {
        &self.chain
    }

    /// All open files of the stack: images, parents and data files.
    pub(crate) fn files(&self) -> Vec<FileStorage> {
        self.files.borrow().clone()
    }

    /// The file behind a storage of this stack, if it can be read and written at any offset by plain system calls.
    pub(crate) fn plain_file(&self, storage: &StorageHandle) -> Option<FileStorage> {
        if storage.limits().alignment != 1 {
            return None; // Direct I/O is the storage's business.
        }
        let files = self.files.borrow();
        let mut found = files.iter().filter(|file| disk::Storage::name(*file) == storage.name());
        match (found.next(), found.next()) {
            (Some(file), None) => Some(file.clone()),
            _ => None, // Two names that look alike, as they are no UTF-8.
        }
    }

    pub(crate) fn format(&self) -> Format {
        self.format.get()
    }

    /// Flushes and closes all layers.
    pub(crate) async fn close(&self) -> Result<(), EngineError> {
        self.release();
        if let Ok(kept) = &self.history {
            kept.end_tending().await;
        }
        Ok(self.disk.close().await?)
    }
}

/// Verifies the links of a chain that has just been opened. Nothing is written to it before.
async fn verify(request: &OpenRequest, chain: &Chain, files: &[FileStorage]) -> Result<(), EngineError> {
    if request.linkage == LinkageUse::Ignored {
        return Ok(());
    }
    if request.writable {
        // Once more, as from here on the lock keeps others from making a child.
        linkage::refuse_parent(&request.image.file).await?;
    }
    // Beside a writer times may be any.
    let checked = linkage::verify_stack(chain, files, !request.force_share, false).await?;
    match linkage::refuse_faults(&checked) {
        Ok(()) => {}
        Err(fault) if request.linkage == LinkageUse::Told => {
            tracing::warn!("{}", chain_text(&fault));
            return Ok(());
        }
        Err(fault) => return Err(fault),
    }
    // A parent that the description names instead is one for this opening.
    if request.writable && request.image.parent.is_none() {
        linkage::bind_opened(chain, &checked).await;
    }
    Ok(())
}

/// The history of a stack that has just been opened, or why it has none.
async fn open_history(
    request: &OpenRequest,
    chain: &Rc<Chain>,
    files: &[FileStorage],
) -> Result<Result<Kept, String>, EngineError> {
    let spec = match &request.history {
        HistoryUse::None if !request.writable => {
            if !request.force_share {
                history::tell_of_parked(request.image.file.clone()).await;
            }
            return Ok(Err("it was not opened".to_owned()));
        }
        HistoryUse::None => HistorySpec::off(),
        HistoryUse::Kept(spec) => spec.clone(),
        HistoryUse::IfThere(file) | HistoryUse::Mended(file) => {
            let sidecar = file.clone().unwrap_or_else(|| history::sidecar_of(&request.image.file));
            match dataplane::offload(move || sidecar.exists()).await {
                true => HistorySpec { file: file.clone(), ..HistorySpec::default() },
                false => HistorySpec::off(),
            }
        }
    };
    let OpenRequest { image, writable, cache, .. } = request;
    let writable = *writable || matches!(request.history, HistoryUse::Mended(_));
    let asked = history::HistoryRequest { spec: &spec, image: &image.file, writable, cache: *cache };
    history::open(asked, Rc::clone(chain), files).await
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
