//! `highwater audit`.

use super::{Outcome, jobs, target};
use crate::args::{AuditArgs, Global};
use crate::exit;
use crate::output;
use crate::progress;
use crate::size::human;
use api::JobKind;
use engine::backup::PointSpec;
use engine::history::{AuditReport, AuditSpec};
use engine::images::Progress;
use engine::images::request::SourceSpec;

pub(crate) async fn run(global: &Global, args: AuditArgs) -> Outcome {
    let options = target::history_options(&args.of);
    let (daemon, source) = target::source(global, &args.disk, SourceSpec::of("", args.of.format), &options).await?;
    let against = args.against.map(|copy| SourceSpec::of(copy, args.against_format));
    let point = match &args.repository {
        None => None,
        Some(place) => {
            let repository = args.key.spec(place)?;
            Some(PointSpec { repository, point: args.point, machine: args.vm, disk: args.point_disk })
        }
    };
    let history_file = args.of.history_file.as_deref().map(target::absolute).transpose()?;
    let spec = AuditSpec { source, history_file, since: args.since, against, point, sample: args.sample };
    let report: AuditReport = match daemon {
        Some(client) => {
            let source = target::from_the_root(spec.source)?;
            let against = spec.against.map(target::from_the_root).transpose()?;
            jobs::perform(global, &client, &JobKind::Audit(AuditSpec { source, against, ..spec }), None).await?
        }
        None => {
            let workshop = target::workshop()?;
            let progress = Progress::new();
            progress::watch(progress.clone(), global.quiet, workshop.audit(spec, progress.clone())).await?
        }
    };
    if global.wants_json() {
        output::json(&report)?;
    } else if !global.quiet {
        output::line(&text(&report))?;
    }
    Ok(if report.proved { exit::OK } else { exit::DIFFERENT })
}

fn text(report: &AuditReport) -> String {
    let looked = format!(
        "{} of {} called unchanged compared, {} called zero read",
        human(report.checked),
        human(report.unchanged),
        human(report.zero)
    );
    if report.proved {
        return format!("proved: {looked}");
    }
    let places: Vec<String> =
        report.failures.iter().map(|(offset, length)| format!("    {offset:#x}+{length:#x}")).collect();
    format!(
        "WRONG: {} differ from what the history says ({looked}):\n{}\ndo not rely on marks up to this one; make a full backup, and report this",
        human(report.wrong),
        places.join("\n")
    )
}
