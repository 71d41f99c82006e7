//! `highwater measure`.

use super::{Outcome, jobs, target};
use crate::args::{Global, MeasureArgs};
use crate::exit;
use crate::output;
use crate::progress;
use api::{JobKind, MeasureReport};
use engine::images::Progress;
use engine::images::request::{MeasureSpec, SourceSpec};

pub(crate) async fn run(global: &Global, args: MeasureArgs) -> Outcome {
    let (daemon, source) = match &args.file {
        None => (None, None),
        Some(file) => {
            let how = SourceSpec {
                snapshot: args.snapshot.clone(),
                force_share: args.force_share,
                ..SourceSpec::of("", args.format)
            };
            let of_files = [("-f", args.format.is_some()), ("-l", args.snapshot.is_some()), ("-U", args.force_share)];
            let (daemon, source) = target::source(global, file, how, &of_files).await?;
            (daemon, Some(source))
        }
    };
    let spec =
        MeasureSpec { source, size: args.size, format: args.output_format, options: target::options(&args.options)? };
    let report: MeasureReport = match daemon {
        Some(client) => jobs::perform(global, &client, &JobKind::Measure(spec), None).await?,
        None => {
            let workshop = target::workshop()?;
            let progress = Progress::new();
            progress::watch(progress.clone(), global.quiet, workshop.measure(spec, progress.clone())).await?
        }
    };
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
