//! How much space a conversion would take.

use super::create::qcow2_options;
use super::report::MeasureReport;
use super::request::{MeasureSpec, SourceSpec};
use super::stack::Stack;
use super::{Progress, closing, open_source};
use crate::{EngineError, Format};
use disk::ByteRange;
use formats::qcow2;

/// Measures.
pub(crate) async fn measure(spec: MeasureSpec, progress: &Progress) -> Result<MeasureReport, EngineError> {
    match (&spec.source, spec.size) {
        (Some(source), None) => {
            let stack = open_source(source).await?;
            let result = of_source(&spec, source, &stack, progress).await;
            closing(&stack, result).await
        }
        (None, Some(size)) => report(&spec, size, &[]),
        _ => Err(EngineError::Invalid("give either an image or a size".to_owned())),
    }
}

async fn of_source(
    spec: &MeasureSpec,
    source: &SourceSpec,
    stack: &Stack,
    progress: &Progress,
) -> Result<MeasureReport, EngineError> {
    let size = stack.disk().geometry().size;
    let mut data: Vec<ByteRange> = Vec::new();
    let mut rest = ByteRange::new(0, size);
    progress.set_total(size);
    while !rest.is_empty() {
        progress.pace(0).await?;
        let extent = stack.disk().map(rest).await?;
        if !extent.zero {
            match data.last_mut() {
                Some(last) if last.end() == extent.range.offset() => {
                    *last = ByteRange::new(last.offset(), last.len() + extent.range.len());
                }
                _ => data.push(extent.range),
            }
        }
        progress.advance(extent.range.len());
        rest = rest.skip(extent.range.len());
    }
    let mut report = report(spec, size, &data)?;
    if spec.format == Format::Qcow2 && stack.format() == Format::Qcow2 && source.snapshot.is_none() {
        report.bitmaps = super::info::bitmap_bytes(stack, &spec.options).await?;
    }
    Ok(report)
}

fn report(spec: &MeasureSpec, size: u64, data: &[ByteRange]) -> Result<MeasureReport, EngineError> {
    match spec.format {
        // As qemu-img: a raw file may have to hold every byte.
        Format::Raw => Ok(MeasureReport { required: size, fully_allocated: size, bitmaps: None }),
        Format::Qcow2 => {
            let options = qcow2_options(size, &spec.options)?;
            let qcow2::Measure { required, fully_allocated } = qcow2::measure(&options, data.iter().copied())?;
            Ok(MeasureReport { required, fully_allocated, bitmaps: None })
        }
    }
}
