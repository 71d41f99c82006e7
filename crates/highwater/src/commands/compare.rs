//! `highwater compare`.

use super::{Outcome, target};
use crate::args::{CompareArgs, Global};
use crate::exit;
use crate::output;
use crate::progress;
use engine::images::Progress;
use engine::images::report::CompareReport;
use engine::images::request::{CompareSpec, SourceSpec};

pub(crate) async fn run(global: &Global, args: CompareArgs) -> Outcome {
    compare(global, args).await.map_err(|failure| failure.with_code(exit::COMPARE_FAILED))
}

async fn compare(global: &Global, args: CompareArgs) -> Outcome {
    let source = |file, format| SourceSpec {
        file,
        format,
        snapshot: None,
        force_share: args.force_share,
        cache: args.cache.unwrap_or_default(),
    };
    let spec = CompareSpec {
        first: source(args.first, args.first_format),
        second: source(args.second, args.second_format),
        strict: args.strict,
    };
    let workshop = target::workshop()?;
    let progress = Progress::new();
    let report = progress::watch(progress.clone(), global.quiet, workshop.compare(spec, progress.clone())).await?;
    if global.wants_json() {
        output::json(&report)?;
    } else if !global.quiet {
        output::line(&text(&report))?;
    }
    Ok(if report.identical { exit::OK } else { exit::DIFFERENT })
}

fn text(report: &CompareReport) -> String {
    match (report.identical, report.first_difference) {
        (true, _) if report.sizes_differ => "identical but for the size: the longer image ends in zeroes".to_owned(),
        (true, _) => "identical".to_owned(),
        (false, Some(offset)) => format!("content differs first at offset {offset}"),
        (false, None) => "the sizes differ".to_owned(),
    }
}
