//! `highwater measure`.

use super::{Outcome, target};
use crate::args::{Global, MeasureArgs};
use crate::exit;
use crate::output;
use engine::images::request::{MeasureSpec, SourceSpec};

pub(crate) async fn run(global: &Global, args: MeasureArgs) -> Outcome {
    let spec = MeasureSpec {
        source: args.file.map(|file| SourceSpec {
            snapshot: args.snapshot,
            force_share: args.force_share,
            ..SourceSpec::of(file, args.format)
        }),
        size: args.size,
        format: args.output_format,
        options: target::options(&args.options)?,
    };
    let report = target::workshop()?.measure(spec).await?;
    if global.wants_json() {
        output::json(&report)?;
    } else {
        output::line(&format!("required size: {}", report.required))?;
        output::line(&format!("fully allocated size: {}", report.fully_allocated))?;
        if let Some(bitmaps) = report.bitmaps {
            output::line(&format!("bitmaps size: {bitmaps}"))?;
        }
    }
    Ok(exit::OK)
}
