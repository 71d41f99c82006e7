//! `highwater check`.

use super::{Outcome, target};
use crate::args::{CheckArgs, Global};
use crate::exit;
use crate::output;
use crate::progress;
use engine::ErrorClass;
use engine::images::Progress;
use engine::images::report::CheckReport;
use engine::images::request::CheckSpec;

pub(crate) async fn run(global: &Global, args: CheckArgs) -> Outcome {
    let spec = CheckSpec { file: args.file, format: args.format, repair: args.repair, force_share: args.force_share };
    let workshop = target::workshop()?;
    let progress = Progress::new();
    let result = progress::watch(progress.clone(), global.quiet, workshop.check(spec, progress.clone())).await;
    let report = match result {
        Ok(report) => report,
        Err(error) => {
            let code = if error.class() == ErrorClass::Unsupported { exit::CHECK_UNSUPPORTED } else { exit::FAILED };
            return Err(exit::Failure::from(error).with_code(code));
        }
    };
    if global.wants_json() {
        output::json(&report)?;
    } else if !global.quiet {
        print(&report)?;
    }
    Ok(report.exit_code())
}

fn print(report: &CheckReport) -> anyhow::Result<()> {
    for finding in &report.findings {
        output::line(finding)?;
    }
    if report.corruptions_fixed + report.leaks_fixed > 0 {
        output::line(&format!(
            "mended: {} corruptions, {} leaked clusters",
            report.corruptions_fixed, report.leaks_fixed
        ))?;
    }
    if report.corruptions == 0 && report.leaks == 0 && report.check_errors == 0 {
        output::line("no errors were found")?;
    } else {
        output::line(&format!(
            "{} corruptions, {} leaked clusters, {} places that could not be checked",
            report.corruptions, report.leaks, report.check_errors
        ))?;
        if report.corruptions > 0 {
            output::line("data may be wrong; make a copy, then mend with --repair all")?;
        } else if report.leaks > 0 {
            output::line("space is lost, data is not; mend with --repair leaks")?;
        }
    }
    if let (Some(allocated), Some(total)) = (report.allocated_clusters, report.total_clusters)
        && total > 0
    {
        let part = |n: u64, of: u64| if of == 0 { 0.0 } else { n as f64 * 100.0 / of as f64 };
        output::line(&format!(
            "{allocated}/{total} = {:.2}% allocated, {:.2}% fragmented, {:.2}% compressed clusters",
            part(allocated, total),
            part(report.fragmented_clusters.unwrap_or(0), allocated),
            part(report.compressed_clusters.unwrap_or(0), allocated)
        ))?;
    }
    if let Some(end) = report.image_end_offset {
        output::line(&format!("image end offset: {end}"))?;
    }
    Ok(())
}
