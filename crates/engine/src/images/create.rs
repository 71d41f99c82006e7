//! Making images.
//!
//! As qemu-img does, a file that stands there is replaced. Everything that can be said against the request is said
//! before that: options, parent and sizes are judged and the locks of all files are taken while the old file is
//! still whole. What was made newly is removed again when the work fails or is stopped.

use super::Progress;
use super::gate::FileGate;
use super::request::{BackingSpec, CreateSpec, Options, PreallocationMode};
use super::stack::{OpenRequest, Stack};
use super::watched::Watched;
use crate::{EngineError, Format, history, linkage};
use chain::{Access, OpenGate};
use disk::{Buf, ByteRange, DiskError, ErrorKind, Operation, Preallocation, StorageHandle};
use formats::qcow2::{self, BackingRef, CreateOptions};
use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

/// Bytes of zeroes written at a time.
const PIECE: u64 = 1 << 20;

/// What is known of a new image.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Created {
    /// Whether all its own bytes read as zero.
    pub(crate) reads_zero: bool,
}

/// The image that was asked for, judged.
enum Plan {
    Raw(PreallocationMode),
    Qcow2(Box<CreateOptions>),
}

/// Makes an image.
pub(crate) async fn create(spec: &CreateSpec) -> Result<Created, EngineError> {
    create_watched(spec, &Progress::new()).await
}

/// Makes an image; `progress` counts what is set aside, and may stop the work.
pub(crate) async fn create_watched(spec: &CreateSpec, progress: &Progress) -> Result<Created, EngineError> {
    refuse_options_with_a_place_of_their_own(spec)?;
    linkage::refuse_parent(&spec.file).await?;
    let size = decide_size(spec).await?;
    let plan = match spec.format {
        Format::Raw => Plan::Raw(raw_preallocation(spec)?),
        Format::Qcow2 => Plan::Qcow2(Box::new(qcow2_plan(spec, size)?)),
    };
    let image = Target::open(&spec.file).await?;
    let data_file = match &plan {
        Plan::Qcow2(options) if options.data_file.is_some() => match open_data_file(spec, options).await {
            Ok(data_file) => Some(data_file),
            Err(error) => {
                image.discard().await;
                return Err(error);
            }
        },
        _ => None,
    };
    let result = match &plan {
        Plan::Raw(preallocation) => fill_raw(&image.storage, size, *preallocation, progress).await,
        Plan::Qcow2(options) => {
            fill_qcow2(&image.storage, data_file.as_ref().map(|d| &d.storage), options, progress).await
        }
    };
    let result = match result {
        Ok(created) => bind(spec, &image, data_file.as_ref()).await.map(|()| created),
        failed => failed,
    };
    match result {
        Ok(created) => {
            if image.made.is_none() {
                history::forget_parked(spec.file.clone()).await;
                remove_history_of_replaced(&spec.file).await;
            }
            // Of one that was removed by hand, too: what it was, and what stood on it, is not true of this one.
            linkage::remove_of_replaced(spec.file.clone()).await;
            Ok(created)
        }
        Err(error) => {
            image.discard().await;
            if let Some(data_file) = data_file {
                data_file.discard().await;
            }
            Err(if progress.is_cancelled() { EngineError::Cancelled } else { error })
        }
    }
}

/// Binds a new image to its parent, unless that is not to be opened: then it is bound when it is first written to.
async fn bind(spec: &CreateSpec, image: &Target, data_file: Option<&Target>) -> Result<(), EngineError> {
    let Some(backing) = spec.backing.as_ref().filter(|_| !spec.unsafe_backing) else { return Ok(()) };
    let parent = seen_from(&spec.file, &backing.file);
    let data_file = data_file.map(|data_file| &data_file.storage);
    linkage::bind_new_child(&spec.file, &image.storage, data_file, &parent, backing.format).await
}

/// Removes the history of an image that is no more, if it has one beside it.
///
/// Crash: before that, the new image is found to be another one than the history's, and its marks are refused.
async fn remove_history_of_replaced(image: &Path) {
    let sidecar = history::sidecar_of(image);
    if !history::is_history(sidecar.clone()).await {
        return; // None, or nothing of ours, or too damaged to be anything.
    }
    dataplane::offload(move || {
        if let Err(error) = fs::remove_file(&sidecar) {
            tracing::warn!(history = %sidecar.display(), %error, "the history of the replaced image is left; its marks will be refused");
        }
    })
    .await;
}

fn invalid(spec: &CreateSpec, why: impl std::fmt::Display) -> EngineError {
    EngineError::Invalid(format!("{}: {why}", spec.file.display()))
}

fn refuse_options_with_a_place_of_their_own(spec: &CreateSpec) -> Result<(), EngineError> {
    for (name, option) in [("size", "SIZE"), ("backing_file", "-b"), ("backing_fmt", "-F")] {
        if spec.options.contains_key(name) {
            return Err(invalid(spec, format_args!("give {option} instead of the option {name}")));
        }
    }
    if spec.format == Format::Raw && spec.backing.is_some() {
        return Err(invalid(spec, "a raw image has no parent; give -f qcow2"));
    }
    Ok(())
}

async fn decide_size(spec: &CreateSpec) -> Result<u64, EngineError> {
    let size = match (&spec.backing, spec.size) {
        (None, None) => return Err(invalid(spec, "an image without a parent needs a SIZE")),
        (None, Some(size)) => size,
        (Some(backing), size) => {
            let parent = seen_from(&spec.file, &backing.file);
            if is_same_file(&spec.file, &parent) {
                return Err(invalid(spec, "an image cannot be its own parent"));
            }
            match size {
                Some(size) if spec.unsafe_backing => size,
                None if spec.unsafe_backing => {
                    return Err(invalid(spec, "the parent is not to be opened (-u), so the image needs a SIZE"));
                }
                size => {
                    let found = backing_size(parent, backing).await?;
                    size.unwrap_or(found)
                }
            }
        }
    };
    if size > i64::MAX as u64 {
        return Err(invalid(spec, "the size is more than a file can hold"));
    }
    Ok(size)
}

/// A backing file's size; opening it also shows that it can be used.
async fn backing_size(parent: PathBuf, backing: &BackingSpec) -> Result<u64, EngineError> {
    let stack = Stack::open(&OpenRequest::reading(parent, backing.format)).await?;
    let size = stack.disk().geometry().size;
    stack.close().await?;
    Ok(size)
}

/// A name that an image records, as a path.
fn seen_from(image: &Path, name: &str) -> PathBuf {
    image.parent().map_or_else(|| PathBuf::from(name), |dir| dir.join(name))
}

fn is_same_file(a: &Path, b: &Path) -> bool {
    let identity = |path: &Path| fs::metadata(path).map(|facts| (facts.dev(), facts.ino()));
    matches!((identity(a), identity(b)), (Ok(a), Ok(b)) if a == b)
}

fn raw_preallocation(spec: &CreateSpec) -> Result<PreallocationMode, EngineError> {
    let mut preallocation = PreallocationMode::Off;
    for (name, value) in &spec.options {
        match name.as_str() {
            "preallocation" => preallocation = value.parse().map_err(|e: String| invalid(spec, e))?,
            _ => return Err(invalid(spec, format_args!("raw has no option {name:?}; it has: preallocation"))),
        }
    }
    if preallocation == PreallocationMode::Metadata {
        return Err(invalid(spec, "raw images have no metadata to preallocate: expected off, falloc or full"));
    }
    Ok(preallocation)
}

/// qcow2's options from their names.
pub(crate) fn qcow2_options(size: u64, options: &Options) -> Result<CreateOptions, EngineError> {
    Ok(CreateOptions::parse(size, options.iter().map(|(name, value)| (name.as_str(), value.as_str())))?)
}

fn qcow2_plan(spec: &CreateSpec, size: u64) -> Result<CreateOptions, EngineError> {
    let named = |error| match error {
        EngineError::Disk(error) => EngineError::Disk(error.on(spec.file.display().to_string())),
        other => other,
    };
    let mut options = qcow2_options(size, &spec.options).map_err(named)?;
    if let Some(backing) = &spec.backing {
        options.backing =
            Some(BackingRef { name: backing.file.clone(), format: Some(backing.format.name().to_owned()) });
    }
    options.validate().map_err(|error| named(error.into()))?;
    Ok(options)
}

async fn open_data_file(spec: &CreateSpec, options: &CreateOptions) -> Result<Target, EngineError> {
    let path = seen_from(&spec.file, options.data_file.as_deref().unwrap_or_default());
    if is_same_file(&spec.file, &path) {
        return Err(invalid(spec, "an image cannot be its own data file"));
    }
    if let Some(backing) = &spec.backing
        && is_same_file(&seen_from(&spec.file, &backing.file), &path)
    {
        return Err(invalid(spec, format_args!("{} cannot be both parent and data file", path.display())));
    }
    let target = Target::open(&path).await?;
    if let Err(error) = require_room(&target.storage, options.size).await {
        target.discard().await;
        return Err(error);
    }
    Ok(target)
}

/// Whether a storage can have that size; it has the old one afterwards.
async fn require_room(storage: &StorageHandle, size: u64) -> Result<(), EngineError> {
    let present = storage.size();
    if present >= size {
        return Ok(());
    }
    if !storage.limits().grows_zeroed {
        return Err(EngineError::Disk(
            DiskError::new(ErrorKind::NoSpace, Operation::Create)
                .on(storage.name())
                .because(format!("the block device has {present} bytes, {size} are needed")),
        ));
    }
    storage.set_size(size).await?;
    Ok(storage.set_size(present).await?)
}

async fn fill_raw(
    storage: &StorageHandle,
    size: u64,
    preallocation: PreallocationMode,
    progress: &Progress,
) -> Result<Created, EngineError> {
    // Before anything is emptied.
    require_room(storage, size).await?;
    if !storage.limits().grows_zeroed {
        // A block device stays as it is.
        return Ok(Created { reads_zero: false });
    }
    storage.set_size(0).await?;
    storage.set_size(size).await?;
    if preallocation != PreallocationMode::Off {
        progress.set_total(size);
    }
    let watched = Watched::counting(storage, progress);
    match preallocation {
        PreallocationMode::Off | PreallocationMode::Metadata => {}
        PreallocationMode::Falloc => watched.allocate(ByteRange::new(0, size)).await?,
        PreallocationMode::Full => {
            let mut zeroes = Buf::zeroed(PIECE.min(size) as usize);
            let mut at = 0;
            while at < size {
                if size - at < zeroes.len() as u64 {
                    zeroes = Buf::zeroed((size - at) as usize);
                }
                let len = zeroes.len() as u64;
                zeroes = watched.write(at, zeroes).await?;
                at += len;
            }
        }
    }
    watched.sync().await?;
    Ok(Created { reads_zero: true })
}

async fn fill_qcow2(
    storage: &StorageHandle,
    data_file: Option<&StorageHandle>,
    options: &CreateOptions,
    progress: &Progress,
) -> Result<Created, EngineError> {
    if options.preallocation != Preallocation::Off {
        let tables = qcow2::measure(options, std::iter::empty())?.fully_allocated.saturating_sub(options.size);
        let data = if options.preallocation == Preallocation::Metadata { 0 } else { options.size };
        progress.set_total(tables.saturating_add(data));
    }
    let image = Watched::counting(storage, progress);
    let data = data_file.map(|data| Watched::counting(data, progress));
    qcow2::create(&image, data.as_ref(), options).await?;
    image.sync().await?;
    if let Some(data) = &data {
        data.sync().await?;
    }
    // A raw data file on a block device holds what was there.
    let reads_zero = data.is_none_or(|data| !options.data_file_raw || data.limits().grows_zeroed);
    Ok(Created { reads_zero })
}

/// A file that becomes an image or a part of one: open and locked, and not changed yet.
struct Target {
    path: PathBuf,
    storage: StorageHandle,
    /// Which file it is, when it was not there before.
    made: Option<(u64, u64)>,
}

impl Target {
    async fn open(path: &Path) -> Result<Self, EngineError> {
        let gate = FileGate::cached();
        let path = path.to_owned();
        let looked_at = path.clone();
        let there = dataplane::offload(move || look_at(&looked_at)).await?;
        if there {
            let storage = gate.open_storage(&path, Access::ReadWrite).await?;
            return Ok(Self { path, storage, made: None });
        }
        let storage = gate.create(&path).await?;
        let made = fs::metadata(&path).map(|facts| (facts.dev(), facts.ino())).ok();
        Ok(Self { path, storage, made })
    }

    /// Removes the file if it was not there before.
    async fn discard(self) {
        let Self { path, storage, made } = self;
        drop(storage);
        let Some(made) = made else { return };
        dataplane::offload(move || {
            let same = fs::metadata(&path).is_ok_and(|facts| (facts.dev(), facts.ino()) == made);
            if same && let Err(error) = fs::remove_file(&path) {
                tracing::warn!(path = %path.display(), %error, "an incomplete image could not be removed");
            }
        })
        .await;
    }
}

/// Whether something stands there that an image can replace.
fn look_at(path: &Path) -> Result<bool, EngineError> {
    match fs::metadata(path) {
        Ok(facts) if facts.is_file() || facts.file_type().is_block_device() => Ok(true),
        Ok(facts) => Err(EngineError::NotAnImageFile { file: path.to_owned(), found: facts.file_type().into() }),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(e) => Err(EngineError::file(path, "create", e)),
    }
}
