//! `highwater points`, `highwater forget` and `highwater diff`: the restore points of a repository.

use super::repo::blocking;
use super::{Outcome, marks};
use crate::args::Global;
use crate::exit;
use crate::output;
use crate::repository_args::{DiffArgs, ForgetArgs, PointsArgs};
use crate::size::human;
use engine::backup::{
    self, DifferenceReport, DifferenceSpec, DiskDifference, DiskPresence, ForgetReport, ForgetSpec, PointReport,
};
use serde_json::json;

pub(crate) async fn points(global: &Global, args: PointsArgs) -> Outcome {
    let spec = args.of.spec()?;
    let points = blocking(move || backup::points(&spec)).await?;
    if global.wants_json() {
        output::json(&json!({ "points": points }))?;
    } else {
        output::table(&["id", "time", "machine", "disks", "consistency"], points.iter().map(row))?;
    }
    Ok(exit::OK)
}

fn row(point: &PointReport) -> Vec<String> {
    let facts = match &point.damaged {
        Some(reason) => ["-".to_owned(), "-".to_owned(), format!("damaged: {reason}")],
        None => [machine(point), disks(point), point.consistency.map_or("-", |c| c.word()).to_owned()],
    };
    [vec![point.id.clone(), marks::date_of(point.time)], facts.to_vec()].concat()
}

fn machine(point: &PointReport) -> String {
    point.machine.clone().unwrap_or_else(|| "-".to_owned())
}

fn disks(point: &PointReport) -> String {
    let of = |disk: &backup::PointDiskReport| format!("{} {} {}", disk.name, human(disk.size), disk.made.word());
    point.disks.iter().map(of).collect::<Vec<_>>().join(", ")
}

pub(crate) async fn forget(global: &Global, args: ForgetArgs) -> Outcome {
    let spec = args.of.spec()?;
    let what = match args.points {
        points if points.is_empty() => ForgetSpec::Policy((&args.keep).into(), args.vm),
        points => ForgetSpec::Points(points),
    };
    let report = blocking(move || backup::forget(&spec, &what, args.dry_run)).await?;
    if global.wants_json() {
        output::json(&report)?;
    } else if !global.quiet {
        forgotten(&report)?;
    }
    Ok(exit::OK)
}

fn forgotten(report: &ForgetReport) -> anyhow::Result<()> {
    let told = if report.dry_run { "would be forgotten" } else { "forgotten" };
    let kept = report.kept.iter().map(|kept| {
        let reasons: Vec<&str> = kept.reasons.iter().map(|reason| reason.word()).collect();
        (&kept.point, format!("kept: {}", reasons.join(", ")))
    });
    let gone = report.forgotten.iter().map(|point| (point, told.to_owned()));
    let mut lines: Vec<(&PointReport, String)> = kept.chain(gone).collect();
    lines.sort_by(|(a, _), (b, _)| (&a.machine, a.time, &a.id).cmp(&(&b.machine, b.time, &b.id)));
    let row = |(point, verdict): (&PointReport, String)| {
        vec![point.id.clone(), marks::date_of(point.time), machine(point), verdict]
    };
    output::table(&["id", "time", "machine", "verdict"], lines.into_iter().map(row))?;
    if !report.dry_run && !report.forgotten.is_empty() {
        output::line("their space is given back by `highwater repo prune`, when the grace is over")?;
    }
    Ok(())
}

pub(crate) async fn diff(global: &Global, args: DiffArgs) -> Outcome {
    let spec = args.of.spec()?;
    let what = DifferenceSpec { old: args.old, new: args.new, disk: args.disk, ranges: global.wants_json() };
    let report = blocking(move || backup::differences(&spec, &what)).await?;
    if global.wants_json() {
        output::json(&report)?;
    } else {
        differences(&report)?;
    }
    Ok(exit::OK)
}

fn differences(report: &DifferenceReport) -> anyhow::Result<()> {
    for (letter, point) in [("A", &report.old), ("B", &report.new)] {
        let (id, time, machine) = (&point.id, marks::date_of(point.time), output::plain(&machine(point)));
        output::line(&format!("{letter}: {id} ({time}) of {machine}"))?;
    }
    output::table(&["disk", "size in A", "size in B", "data", "zero", ""], report.disks.iter().map(difference_row))
}

fn difference_row(disk: &DiskDifference) -> Vec<String> {
    let size = |size: Option<u64>| size.map_or_else(|| "-".to_owned(), human);
    let (amounts, told) = match disk.presence {
        DiskPresence::Added => (["-".to_owned(), "-".to_owned()], "in B alone"),
        DiskPresence::Removed => (["-".to_owned(), "-".to_owned()], "in A alone"),
        DiskPresence::Both => {
            let equal = disk.data + disk.zero == 0 && disk.old_size == disk.new_size;
            ([human(disk.data), human(disk.zero)], if equal { "equal" } else { "" })
        }
    };
    let [data, zero] = amounts;
    vec![disk.disk.clone(), size(disk.old_size), size(disk.new_size), data, zero, told.to_owned()]
}
