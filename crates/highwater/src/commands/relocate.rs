//! `highwater promote`, `move`, `commit` and `snapshot delete`: the images under a disk change while its guest writes on.

use super::target::{self, Target};
use super::{Outcome, jobs};
use crate::args::{CommitArgs, Global, PromoteArgs};
use crate::exit::{self, Failure};
use crate::output;
use crate::progress;
use crate::size::{RateArg, human};
use api::{ConsolidateReport, ConsolidateSpec, JobKind, PromoteReport, PromoteSpec};
use engine::format_policy;
use engine::images::Progress;

/// `promote` and `move`, which are one.
pub(crate) async fn promote(global: &Global, args: PromoteArgs) -> Outcome {
    let rate = args.rate.and_then(|RateArg(rate)| rate);
    let format = args.output_format.unwrap_or_else(|| format_policy::of_new(&args.target));
    let spec = PromoteSpec {
        disk: String::new(),
        target: target::absolute(&args.target)?,
        format,
        options: target::options(&args.options)?,
        remove_source: args.remove_source,
    };
    let report: PromoteReport = match target::find(global, &args.disk).await? {
        Target::Disk(client, disk) => {
            target::refuse_file_options(&disk, &target::history_options(&args.of))?;
            jobs::perform(global, &client, &JobKind::Promote(PromoteSpec { disk, ..spec }), rate).await?
        }
        Target::File(file) => {
            let spec = PromoteSpec { disk: file.display().to_string(), ..spec };
            let progress = Progress::new();
            progress.set_rate_limit(rate);
            let workshop = target::workshop()?;
            let work = workshop.promote(target::history_source(&file, &args.of)?, spec, progress.clone());
            progress::watch(progress, global.quiet, work).await?
        }
    };
    if global.wants_json() {
        output::json(&report)?;
    } else if !global.quiet {
        let PromoteReport { disk, file, copied, mirrored, pause_us, .. } = report;
        let (copied, mirrored) = (human(copied), human(mirrored));
        output::line(&format!(
            "{disk}: is {} now; {copied} copied, {mirrored} written by the guest meanwhile, its writes waited {:.1} ms",
            file.display(),
            pause_us as f64 / 1000.0
        ))?;
    }
    Ok(exit::OK)
}

/// `commit`.
pub(crate) async fn commit(global: &Global, args: CommitArgs) -> Outcome {
    let spec = ConsolidateSpec { disk: String::new(), snapshot: None, into: None };
    consolidate(global, args, spec).await
}

/// `snapshot delete` and `commit`.
pub(crate) async fn consolidate(global: &Global, args: CommitArgs, spec: ConsolidateSpec) -> Outcome {
    let rate = args.rate.and_then(|RateArg(rate)| rate);
    let report: ConsolidateReport = match target::find(global, &args.disk).await? {
        Target::Disk(client, disk) => {
            target::refuse_file_options(&disk, &target::history_options(&args.of))?;
            jobs::perform(global, &client, &JobKind::Consolidate(ConsolidateSpec { disk, ..spec }), rate).await?
        }
        Target::File(file) => {
            let spec = ConsolidateSpec { disk: file.display().to_string(), ..spec };
            let progress = Progress::new();
            progress.set_rate_limit(rate);
            let workshop = target::workshop()?;
            let work = workshop.consolidate(target::history_source(&file, &args.of)?, spec, progress.clone());
            progress::watch(progress, global.quiet, work).await?
        }
    };
    show(global, &report)?;
    Ok(exit::OK)
}

fn show(global: &Global, report: &ConsolidateReport) -> Result<(), Failure> {
    if global.wants_json() {
        output::json(report)?;
    } else if !global.quiet {
        let gone = report.removed.as_ref().map_or_else(String::new, |file| format!("{} is gone; ", file.display()));
        output::line(&format!(
            "{}: {gone}{} moved, {} written by the guest meanwhile, its writes waited {:.1} ms",
            report.disk,
            human(report.moved),
            human(report.mirrored),
            report.pause_us as f64 / 1000.0
        ))?;
    }
    Ok(())
}
