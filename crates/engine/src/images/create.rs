//! Making images.
//!
//! As qemu-img does, a file that stands there is replaced; unlike a plain truncation this happens after its
//! locks were taken, so that an image in use is refused and left as it is.

use super::gate::FileGate;
use super::request::{BackingSpec, CreateSpec, Options, PreallocationMode};
use super::stack::{OpenRequest, Stack};
use crate::{EngineError, Format};
use disk::{ByteRange, ZeroMode};
use formats::qcow2::{self, BackingRef, CreateOptions};
use std::path::{Path, PathBuf};

/// What is known of a new image.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Created {
    /// Whether all its own bytes read as zero.
    pub(crate) reads_zero: bool,
}

/// Makes an image.
pub(crate) async fn create(spec: &CreateSpec) -> Result<Created, EngineError> {
    let size = match (&spec.backing, spec.size) {
        (_, Some(size)) if spec.unsafe_backing || spec.backing.is_none() => size,
        (Some(backing), size) => {
            let found = backing_size(&spec.file, backing).await?;
            size.unwrap_or(found)
        }
        (None, None) => return Err(EngineError::Invalid("an image without a parent needs a SIZE".to_owned())),
        (None, Some(size)) => size,
    };
    if size > i64::MAX as u64 {
        return Err(EngineError::Invalid("the size is more than a file can hold".to_owned()));
    }
    match spec.format {
        Format::Raw => raw(spec, size).await,
        Format::Qcow2 => qcow2(spec, size).await,
    }
}

/// A backing file's size; opening it also shows that it can be used.
async fn backing_size(image: &Path, backing: &BackingSpec) -> Result<u64, EngineError> {
    let file = image.parent().map_or_else(|| PathBuf::from(&backing.file), |dir| dir.join(&backing.file));
    if is_same_file(image, &file) {
        return Err(EngineError::Invalid(format!("{} cannot be its own parent", image.display())));
    }
    let stack = Stack::open(&OpenRequest::reading(file, backing.format)).await?;
    let size = stack.disk().geometry().size;
    stack.close().await?;
    Ok(size)
}

fn is_same_file(a: &Path, b: &Path) -> bool {
    matches!((a.canonicalize(), b.canonicalize()), (Ok(a), Ok(b)) if a == b)
}

async fn raw(spec: &CreateSpec, size: u64) -> Result<Created, EngineError> {
    if spec.backing.is_some() {
        return Err(EngineError::Invalid("a raw image has no parent; give -f qcow2".to_owned()));
    }
    let mut preallocation = PreallocationMode::Off;
    for (name, value) in &spec.options {
        match name.as_str() {
            "preallocation" => preallocation = value.parse().map_err(EngineError::Invalid)?,
            _ => return Err(EngineError::Invalid(format!("raw has no option {name:?}; it has: preallocation"))),
        }
    }
    let gate = FileGate::cached();
    let storage = gate.create(&spec.file).await?;
    if !storage.limits().grows_zeroed {
        // A block device stays as it is.
        if storage.size() < size {
            return Err(EngineError::Invalid(format!(
                "{} has {} bytes, {size} are needed",
                spec.file.display(),
                storage.size()
            )));
        }
        return Ok(Created { reads_zero: false });
    }
    storage.set_size(size).await?;
    let whole = ByteRange::new(0, size);
    match preallocation {
        PreallocationMode::Off => {}
        PreallocationMode::Metadata => {
            return Err(EngineError::Invalid(
                "raw images have no metadata to preallocate: expected off, falloc or full".to_owned(),
            ));
        }
        PreallocationMode::Falloc => storage.allocate(whole).await?,
        PreallocationMode::Full => {
            storage.allocate(whole).await?;
            storage.write_zeroes(whole, ZeroMode { unmap: false, fast_only: false }).await?;
        }
    }
    storage.sync().await?;
    Ok(Created { reads_zero: true })
}

/// qcow2's options from their names.
pub(crate) fn qcow2_options(size: u64, options: &Options) -> Result<CreateOptions, EngineError> {
    Ok(CreateOptions::parse(size, options.iter().map(|(name, value)| (name.as_str(), value.as_str())))?)
}

async fn qcow2(spec: &CreateSpec, size: u64) -> Result<Created, EngineError> {
    for (name, option) in [("size", "SIZE"), ("backing_file", "-b"), ("backing_fmt", "-F")] {
        if spec.options.contains_key(name) {
            return Err(EngineError::Invalid(format!("give {option} instead of the option {name}")));
        }
    }
    let mut options = qcow2_options(size, &spec.options)?;
    if let Some(backing) = &spec.backing {
        options.backing =
            Some(BackingRef { name: backing.file.clone(), format: Some(backing.format.name().to_owned()) });
    }
    options.validate()?;
    let gate = FileGate::cached();
    let storage = gate.create(&spec.file).await?;
    let data_file = match &options.data_file {
        None => None,
        Some(name) => {
            let path = spec.file.parent().map_or_else(|| PathBuf::from(name), |dir| dir.join(name));
            if is_same_file(&spec.file, &path) {
                return Err(EngineError::Invalid(format!("{} cannot be its own data file", spec.file.display())));
            }
            Some(gate.create(&path).await?)
        }
    };
    qcow2::create(&storage, data_file.as_ref(), &options).await?;
    storage.sync().await?;
    if let Some(data) = &data_file {
        data.sync().await?;
    }
    // A raw data file on a block device holds what was there.
    let reads_zero = data_file.is_none_or(|data| !options.data_file_raw || data.limits().grows_zeroed);
    Ok(Created { reads_zero })
}
