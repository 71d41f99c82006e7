//! `highwater check`.

use super::target::{self, Target};
use super::{Outcome, jobs};
use crate::args::{CheckArgs, Global};
use crate::exit;
use crate::output;
use crate::progress;
use anyhow::anyhow;
use api::{Client, Format, JobKind};
use engine::EngineError;
use engine::images::Progress;
use engine::images::report::CheckReport;
use engine::images::request::CheckSpec;

pub(crate) async fn run(global: &Global, args: CheckArgs) -> Outcome {
    let report: CheckReport = match target::find(global, &args.disk).await? {
        Target::Disk(client, name) => {
            let kind = JobKind::Check(spec_of_disk(&client, &name, &args).await?);
            jobs::perform(global, &client, &kind, None).await?
        }
        Target::File(file) => {
            let spec = CheckSpec {
                file,
                format: args.format,
                repair: args.repair,
                force_share: args.force_share,
                history_file: args.history_file.as_deref().map(target::absolute).transpose()?,
            };
            let workshop = target::workshop()?;
            let progress = Progress::new();
            let work = workshop.check(spec, progress.clone());
            progress::watch(progress, global.quiet, work).await.map_err(|error| {
                // An image that could not be checked, of whatever kind, is no format that has nothing to check.
                let nothing_to_check = matches!(error, EngineError::Unsupported(_));
                exit::Failure::from(error).with_code(match nothing_to_check {
                    true => exit::CHECK_UNSUPPORTED,
                    false => exit::FAILED,
                })
            })?
        }
    };
    if global.wants_json() {
        output::json(&report)?;
    } else if !global.quiet {
        print(&report)?;
    }
    Ok(report.exit_code())
}

/// What the daemon is to check for a disk of its own. One that is written to changes under the check's eyes, which
/// would report what is none, so it is refused.
async fn spec_of_disk(client: &Client, name: &str, args: &CheckArgs) -> Result<CheckSpec, exit::Failure> {
    target::refuse_file_options(
        name,
        &[("-f", args.format.is_some()), ("-U", args.force_share), ("--history-file", args.history_file.is_some())],
    )?;
    let disk = client.disk(name).await?;
    let file = disk.spec.image.file;
    if disk.format == Some(Format::Raw) {
        let failure = anyhow!("{name}: raw images have no metadata to check");
        return Err(exit::Failure::from(failure).with_code(exit::CHECK_UNSUPPORTED));
    }
    let what = if args.repair.is_some() {
        "is in use, so its metadata cannot be mended"
    } else {
        "is written to, so its metadata cannot be checked"
    };
    if args.repair.is_some() || !disk.read_only {
        return Err(anyhow!(
            "disk {name:?} {what} meanwhile; close it with `highwater disk remove {name}`, check {}, and add it again",
            file.display()
        )
        .into());
    }
    Ok(CheckSpec { file, format: disk.format, repair: None, force_share: false, history_file: None })
}

fn print(report: &CheckReport) -> anyhow::Result<()> {
    for mended in &report.mended {
        output::line(&format!("mended: {mended}"))?;
    }
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
    if report.marked_corrupt {
        output::line(
            "the image is marked as corrupt: nobody writes to it until the mark is taken away with --repair all",
        )?;
    }
    if let Some(fault) = &report.link_fault {
        output::line(&format!("its metadata aside: {fault}"))?;
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
