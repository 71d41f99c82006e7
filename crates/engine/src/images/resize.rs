//! Another size for an image that nobody uses.

use super::report::ImageInfo;
use super::request::{PreallocationMode, ResizeSpec, SourceSpec};
use super::stack::{OpenRequest, Stack};
use super::{closing, info, offload_format};
use crate::{EngineError, Format};
use disk::Preallocation;

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
pub(crate) async fn resize(spec: ResizeSpec) -> Result<ImageInfo, EngineError> {
    let format = offload_format(spec.file.clone(), spec.format).await?;
    let request = OpenRequest { writable: true, ..OpenRequest::reading(spec.file.clone(), format) };
    let stack = Stack::open(&request).await?;
    let result = change(&stack, &spec, format).await;
    closing(&stack, result).await?;
    drop(stack); // And with it the locks.
    info::info(&SourceSpec::of(spec.file, Some(format))).await
}

async fn change(stack: &Stack, spec: &ResizeSpec, format: Format) -> Result<(), EngineError> {
    let present = stack.disk().geometry().size;
    let size = spec.size.from_present(present).ok_or_else(|| {
        EngineError::Invalid(format!("the new size would be below 0 or too large; the present size is {present}"))
    })?;
    // Formats count in sectors; raw files need not.
    let size = match format {
        Format::Raw => Some(size),
        Format::Qcow2 => size.checked_next_multiple_of(512),
    };
    let size = size.ok_or_else(|| EngineError::Invalid("the new size is too large".to_owned()))?;
    require_shrink_wanted(present, size, spec.shrink)?;
    if size < present && spec.preallocation != PreallocationMode::Off {
        return Err(EngineError::Invalid("nothing can be preallocated when an image shrinks".to_owned()));
    }
    stack.chain().resize_with(size, spec.preallocation.into()).await?;
    Ok(stack.disk().flush().await?)
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
