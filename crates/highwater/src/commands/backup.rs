//! `highwater backup`, `restore` and `export`: disks into restore points, and back.

use super::target::{self, Group};
use super::{Outcome, jobs};
use crate::args::{BackupArgs, ExportPointArgs, Global, RestoreArgs};
use crate::exit::{self, Failure};
use crate::output;
use crate::progress;
use crate::size::{RateArg, human};
use anyhow::anyhow;
use api::{BackupReport, BackupSpec, FreezeSpec, JobKind, RestoreReport, RestoreSpec};
use engine::backup::{BackupHow, PointSpec, RestoredParent, read_in_order};
use engine::history::refuse_freeze;
use engine::images::Progress;
use engine::{Format, format_policy};
use std::io::{self, Write};
use std::path::Path;

/// `backup`.
pub(crate) async fn backup(global: &Global, args: BackupArgs) -> Outcome {
    let Some((place, disks)) = args.disks_and_repository.split_last().filter(|(_, disks)| !disks.is_empty()) else {
        return Err(Failure::from(anyhow!("nothing to back up: expected DISK… REPO")).with_code(exit::USAGE));
    };
    let repository = args.key.spec(place)?;
    let how = BackupHow {
        machine: args.vm,
        compare: args.compare,
        full: args.full,
        attach: args.attach.iter().map(|file| target::absolute(file)).collect::<Result<_, _>>()?,
        note: args.note,
    };
    let freeze = match args.freeze {
        None => None,
        Some(socket) => Some(FreezeSpec { socket: target::absolute(&socket)?, limit_ms: args.freeze_limit }),
    };
    let rate = args.rate.and_then(|RateArg(rate)| rate);
    let report: BackupReport = match target::find_all(global, disks).await? {
        Group::Daemon(client, disks) => {
            target::refuse_file_options(&disks[0], &target::history_options(&args.of))?;
            let kind = JobKind::Backup(BackupSpec { disks, repository, how, freeze });
            jobs::perform(global, &client, &kind, rate).await?
        }
        Group::Files(files) => {
            refuse_freeze(freeze.as_ref())?;
            let sources = target::history_sources(&files, &args.of)?;
            let progress = Progress::new();
            progress.set_rate_limit(rate);
            let workshop = target::workshop()?;
            let work = workshop.backup(sources, repository, how, progress.clone());
            progress::watch(progress, global.quiet, work).await?
        }
    };
    if global.wants_json() {
        output::json(&report)?;
    } else if !global.quiet {
        output::table(
            &["disk", "size", "how", "read", "why not incremental"],
            report.disks.iter().map(|disk| {
                vec![
                    disk.name.clone(),
                    human(disk.size),
                    disk.kind.word().to_owned(),
                    human(disk.read),
                    disk.reason.clone().unwrap_or_default(),
                ]
            }),
        )?;
        output::line(&format!("point {} of {}: {} stored", report.point, report.machine, human(report.stored)))?;
    }
    Ok(exit::OK)
}

/// `restore`.
pub(crate) async fn restore(global: &Global, args: RestoreArgs) -> Outcome {
    let format = args.output_format.unwrap_or_else(|| format_policy::of_new(&args.target));
    let PointSpec { repository, point, machine, disk } = args.of.spec()?;
    let spec = RestoreSpec {
        repository,
        point,
        machine,
        disk,
        target: target::absolute(&args.target)?,
        format,
        options: target::options(&args.options)?,
        in_place: args.in_place,
        over: None,
    };
    make(global, spec, args.rate.and_then(|RateArg(rate)| rate)).await
}

/// `export`.
pub(crate) async fn export(global: &Global, args: ExportPointArgs) -> Outcome {
    let source = args.of.spec()?;
    if args.target == Path::new("-") {
        if args.since.is_some() || args.output_format.is_some_and(|format| format != Format::Raw) {
            return Err(
                anyhow!("standard output takes raw bytes alone: leave --since and -O out, or name a file").into()
            );
        }
        let written = tokio::task::spawn_blocking(move || {
            let mut out = io::stdout().lock();
            read_in_order(&source, |bytes| out.write_all(bytes))?;
            out.flush().map_err(|e| engine::EngineError::file("-", "write to standard output", e))
        });
        written.await.map_err(|e| anyhow!(e))??;
        return Ok(exit::OK);
    }
    let by_name = match args.target.extension().is_some() {
        true => format_policy::of_new(&args.target),
        false => Format::Qcow2,
    };
    let over = args.since.zip(args.backing).map(|(since, backing)| RestoredParent {
        since,
        backing,
        format: args.backing_format.unwrap_or(Format::Qcow2),
    });
    let PointSpec { repository, point, machine, disk } = source;
    let spec = RestoreSpec {
        repository,
        point,
        machine,
        disk,
        target: target::absolute(&args.target)?,
        format: args.output_format.unwrap_or(by_name),
        options: target::options(&[])?,
        in_place: false,
        over,
    };
    make(global, spec, None).await
}

async fn make(global: &Global, spec: RestoreSpec, rate: Option<u64>) -> Outcome {
    let workshop = target::workshop()?;
    let progress = Progress::new();
    progress.set_rate_limit(rate);
    let work = workshop.restore(spec, progress.clone());
    let report: RestoreReport = progress::watch(progress, global.quiet, work).await?;
    if global.wants_json() {
        output::json(&report)?;
    } else if !global.quiet {
        let RestoreReport { point, machine, disk, target, written, same, size, .. } = report;
        output::line(&format!(
            "{}: disk {disk} of {machine}, point {point}, {}; {} written, {} there already",
            target.display(),
            human(size),
            human(written),
            human(same)
        ))?;
    }
    Ok(exit::OK)
}
