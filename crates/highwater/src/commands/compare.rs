//! `highwater compare`.

use super::{Outcome, jobs, target};
use crate::args::{CompareArgs, Global};
use crate::exit;
use crate::output;
use crate::progress;
use api::JobKind;
use engine::images::Progress;
use engine::images::report::CompareReport;
use engine::images::request::{CompareSpec, SourceSpec};

pub(crate) async fn run(global: &Global, args: CompareArgs) -> Outcome {
    compare(global, args).await.map_err(|failure| failure.with_code(exit::COMPARE_FAILED))
}

async fn compare(global: &Global, args: CompareArgs) -> Outcome {
    let how = |format| SourceSpec {
        force_share: args.force_share,
        despite_fault: args.despite_fault,
        cache: args.cache.unwrap_or_default(),
        ..SourceSpec::of("", format)
    };
    let (first_format, second_format) = (args.first_format, args.second_format);
    let (daemon, first) =
        target::source(global, &args.first, how(first_format), &[("-f", first_format.is_some())]).await?;
    let (other, second) =
        target::source(global, &args.second, how(second_format), &[("-F", second_format.is_some())]).await?;
    let report = match daemon.or(other) {
        Some(client) => {
            let (first, second) = (target::from_the_root(first)?, target::from_the_root(second)?);
            let kind = JobKind::Compare(CompareSpec { first, second, strict: args.strict });
            jobs::perform(global, &client, &kind, None).await?
        }
        None => {
            let spec = CompareSpec { first, second, strict: args.strict };
            let workshop = target::workshop()?;
            let progress = Progress::new();
            progress::watch(progress.clone(), global.quiet, workshop.compare(spec, progress.clone())).await?
        }
    };
    if global.wants_json() {
        output::json(&report)?;
    } else if !global.quiet {
        output::line(&text(&report))?;
    }
    Ok(if report.identical { exit::OK } else { exit::DIFFERENT })
}

fn text(report: &CompareReport) -> String {
    if let Some(offset) = report.status_mismatch {
        return format!("Strict mode: Offset {offset} block status mismatch!"); // In qemu-img's words.
    }
    match (report.identical, report.first_difference) {
        (true, _) if report.sizes_differ => "identical but for the size: the longer image ends in zeroes".to_owned(),
        (true, _) => "identical".to_owned(),
        (false, Some(offset)) => format!("content differs first at offset {offset}"),
        (false, None) => "the sizes differ".to_owned(),
    }
}
