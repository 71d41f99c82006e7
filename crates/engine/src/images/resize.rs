//! Another size for an image that nobody uses.

use super::report::ImageInfo;
use super::request::{NewSize, PreallocationMode, ResizeSpec, SourceSpec};
use super::stack::{HistoryUse, OpenRequest, Stack};
use super::{Progress, closing, info, offload_format};
use crate::{EngineError, Format};
use disk::Preallocation;

/// Bytes that are set aside between two looks at the wish to stop, and the same for tables alone.
const STEP: u64 = 256 << 20;
const STEP_TABLES: u64 = 64 << 30;

impl From<PreallocationMode> for Preallocation {
    fn from(mode: PreallocationMode) -> Self {
        match mode {
            PreallocationMode::Off => Self::Off,
            PreallocationMode::Metadata => Self::Metadata,
            PreallocationMode::Falloc => Self::Falloc,
            PreallocationMode::Full => Self::Full,
        }
    }
}

/// Changes the size.
pub(crate) async fn resize(spec: ResizeSpec, progress: &Progress) -> Result<ImageInfo, EngineError> {
    let format = offload_format(spec.file.clone(), spec.format).await?;
    let request = OpenRequest {
        writable: true,
        history: HistoryUse::IfThere(spec.history_file),
        ..OpenRequest::reading(spec.file.clone(), format)
    };
    let stack = Stack::open(&request).await?;
    let result = change(&stack, spec.size, spec.shrink, spec.preallocation, progress).await;
    closing(&stack, result).await?;
    drop(stack); // And with it the locks.
    info::info(&SourceSpec::of(spec.file, Some(format))).await
}

/// Changes the size of an open disk.
pub(crate) async fn change(
    stack: &Stack,
    size: NewSize,
    shrink: bool,
    preallocation: PreallocationMode,
    progress: &Progress,
) -> Result<(), EngineError> {
    let present = stack.disk().geometry().size;
    let size = size.from_present(present).ok_or_else(|| {
        EngineError::Invalid(format!("the new size would be below 0 or too large; the present size is {present}"))
    })?;
    // Formats count in sectors; raw files need not.
    let size = match stack.format() {
        Format::Raw => Some(size),
        Format::Qcow2 => size.checked_next_multiple_of(512),
    };
    let size = size.ok_or_else(|| EngineError::Invalid("the new size is too large".to_owned()))?;
    require_shrink_wanted(present, size, shrink)?;
    if size < present && preallocation != PreallocationMode::Off {
        return Err(EngineError::Invalid("nothing can be preallocated when an image shrinks".to_owned()));
    }
    if preallocation == PreallocationMode::Off || size == present {
        stack.resize(size, Preallocation::Off).await?;
    } else {
        grow(stack, present, size, preallocation, progress).await?;
    }
    Ok(stack.disk().flush().await?)
}

/// Grows step by step, so that the work can be stopped; then, and after a failure, the disk has its old size again.
async fn grow(
    stack: &Stack,
    present: u64,
    size: u64,
    preallocation: PreallocationMode,
    progress: &Progress,
) -> Result<(), EngineError> {
    if preallocation == PreallocationMode::Metadata && stack.format() == Format::Raw {
        return Err(EngineError::Invalid(
            "raw images have no metadata to preallocate: expected off, falloc or full".to_owned(),
        ));
    }
    let step = if preallocation == PreallocationMode::Metadata { STEP_TABLES } else { STEP };
    // Only a full preallocation writes the bytes.
    let moved = |bytes| if preallocation == PreallocationMode::Full { bytes } else { 0 };
    progress.set_total(size - present);
    let mut at = present;
    while at < size {
        let next = (at.saturating_add(step) / 512 * 512).min(size);
        let grown = match progress.pace(moved(next - at)).await {
            Ok(()) => stack.resize(next, preallocation.into()).await,
            stop => stop,
        };
        if let Err(error) = grown {
            if at > present && stack.resize(present, Preallocation::Off).await.is_err() {
                return Err(EngineError::Invalid(format!(
                    "{error}; the disk has {at} bytes now and could not be given its old size of {present} again"
                )));
            }
            return Err(error);
        }
        progress.advance(next - at);
        at = next;
    }
    Ok(())
}

/// Refuses to cut off bytes that nobody said may go.
pub(crate) fn require_shrink_wanted(present: u64, size: u64, wanted: bool) -> Result<(), EngineError> {
    if size < present && !wanted {
        return Err(EngineError::Invalid(format!(
            "the disk would lose the bytes behind {size} (it has {present}); give --shrink if that is meant"
        )));
    }
    Ok(())
}
