//! `highwater mark` and `highwater marks …`.

use super::target::{self, Group, Target};
use super::{Outcome, info};
use crate::args::{Global, HistoryOfArgs, MarkArgs, MarksVerb};
use crate::exit::{self, Failure};
use crate::output;
use crate::size::human;
use anyhow::anyhow;
use api::{FreezeSpec, HistoryReport, MarkConsistency, MarkList, MarkReport, MarkSpec, ViewSpec};
use engine::history::refuse_freeze;
use serde_json::json;
use std::path::Path;

pub(crate) async fn mark(global: &Global, args: MarkArgs) -> Outcome {
    let Some((name, disks)) = args.disks_and_name.split_last().filter(|(_, disks)| !disks.is_empty()) else {
        return Err(Failure::from(anyhow!("nothing to mark: expected DISK… NAME")).with_code(exit::USAGE));
    };
    let Some(name) = name.to_str().map(str::to_owned) else {
        return Err(anyhow!("{}: a mark's name is UTF-8 text", name.display()).into());
    };
    let freeze = match args.freeze {
        None => None,
        Some(socket) => Some(FreezeSpec { socket: target::absolute(&socket)?, limit_ms: args.freeze_limit }),
    };
    let view = match args.view {
        false => None,
        true => Some(ViewSpec {
            limit: args.view_limit,
            directory: args.view_directory.as_deref().map(target::absolute).transpose()?,
        }),
    };
    let marks = match target::find_all(global, disks).await? {
        Group::Daemon(client, disks) => {
            target::refuse_file_options(&disks[0], &target::history_options(&args.of))?;
            client.mark(&MarkSpec { disks, name, view, freeze }).await?
        }
        Group::Files(files) => {
            refuse_freeze(freeze.as_ref())?;
            if view.is_some() {
                return Err(anyhow!(
                    "--view is for disks that the daemon serves; an image at rest can be read as it is"
                )
                .into());
            }
            let sources = target::history_sources(&files, &args.of)?;
            target::workshop()?.mark(sources, name).await?
        }
    };
    if global.wants_json() {
        output::json(&MarkList { marks })?;
    } else if !global.quiet {
        let rows = marks.iter().map(|mark| [vec![mark.disk.clone()], row(mark)].concat());
        output::table(&[&["disk"], HEADING.as_slice()].concat(), rows)?;
    }
    Ok(exit::OK)
}

pub(crate) async fn run(global: &Global, verb: MarksVerb) -> Outcome {
    match verb {
        MarksVerb::List { disk, of, verbose } => {
            let (history, marks) = all(global, &disk, &of).await?;
            if global.wants_json() {
                output::json(&json!({ "history": history, "marks": marks }))?;
            } else {
                if verbose {
                    output::line(info::history_text(&history).trim_end())?;
                }
                output::table(&HEADING, marks.iter().map(row))?;
            }
        }
        MarksVerb::Import { file, bitmap, mark, of } => {
            let (source, name) = (target::history_source(&file, &of)?, mark.unwrap_or_else(|| bitmap.clone()));
            let mark = target::workshop()?.import_bitmap(source, bitmap, name).await?;
            if global.wants_json() {
                output::json(&mark)?;
            } else if !global.quiet {
                output::table(&HEADING, [row(&mark)])?;
            }
        }
        MarksVerb::Export { file, name, bitmap, of } => {
            let bitmap = bitmap.unwrap_or_else(|| name.clone());
            target::workshop()?.export_bitmap(target::history_source(&file, &of)?, name, bitmap.clone()).await?;
            if !global.wants_json() && !global.quiet {
                output::line(&format!("{}: bitmap {bitmap:?} stored", file.display()))?;
            }
        }
        MarksVerb::Show { disk, name, of } => {
            let mark = match target::find(global, &disk).await? {
                Target::Disk(client, disk) => {
                    target::refuse_file_options(&disk, &target::history_options(&of))?;
                    client.mark_named(&disk, &name).await?
                }
                Target::File(file) => target::workshop()?.mark_named(target::history_source(&file, &of)?, name).await?,
            };
            if global.wants_json() {
                output::json(&mark)?;
            } else {
                output::line(text(&mark).trim_end())?;
            }
        }
        MarksVerb::Delete { disk, name, of } => match target::find(global, &disk).await? {
            Target::Disk(client, disk) => {
                target::refuse_file_options(&disk, &target::history_options(&of))?;
                client.delete_mark(&disk, &name).await?;
            }
            Target::File(file) => {
                target::workshop()?.delete_mark(target::history_source(&file, &of)?, name).await?;
            }
        },
        MarksVerb::Trust { disk, of } => trust(global, &disk, &of).await?,
    }
    Ok(exit::OK)
}

async fn all(global: &Global, disk: &Path, of: &HistoryOfArgs) -> Result<(HistoryReport, Vec<MarkReport>), Failure> {
    Ok(match target::find(global, disk).await? {
        Target::Disk(client, disk) => {
            target::refuse_file_options(&disk, &target::history_options(of))?;
            (client.history(&disk).await?, client.marks(&disk).await?)
        }
        Target::File(file) => target::workshop()?.marks(target::history_source(&file, of)?).await?,
    })
}

async fn trust(global: &Global, disk: &Path, of: &HistoryOfArgs) -> Result<(), Failure> {
    let (before, marks) = match target::find(global, disk).await? {
        Target::Disk(client, disk) => {
            target::refuse_file_options(&disk, &target::history_options(of))?;
            (client.marks(&disk).await?, client.trust_history(&disk).await?)
        }
        Target::File(file) => {
            let (source, workshop) = (target::history_source(&file, of)?, target::workshop()?);
            (workshop.marks(source.clone()).await?.1, workshop.trust_history(source).await?)
        }
    };
    if global.wants_json() {
        output::json(&MarkList { marks })?;
    } else if !global.quiet {
        let refused: Vec<&MarkReport> = before.iter().filter(|mark| mark.refused.is_some()).collect();
        for mark in &refused {
            let reason = mark.refused.as_deref().unwrap_or_default();
            output::line(&format!("mark {:?} is trusted again, on your word; it was refused: {reason}", mark.name))?;
        }
        if refused.is_empty() {
            output::line("no mark was refused; nothing is changed")?;
        } else {
            output::line("what another program changed in the image is in none of their changes")?;
        }
    }
    Ok(())
}

const HEADING: [&str; 5] = ["name", "time", "size", "consistency", "trust"];

fn row(mark: &MarkReport) -> Vec<String> {
    vec![
        mark.name.clone(),
        date_of(mark.time),
        human(mark.size),
        consistency(mark),
        mark.refused.as_ref().map_or_else(|| "trusted".to_owned(), |reason| format!("refused: {reason}")),
    ]
}

fn consistency(mark: &MarkReport) -> String {
    match (mark.consistency, mark.frozen_ms) {
        (MarkConsistency::Crash, _) => "crash".to_owned(),
        (MarkConsistency::Application, None) => "application".to_owned(),
        (MarkConsistency::Application, Some(ms)) => format!("application, frozen for {ms} ms"),
    }
}

fn text(mark: &MarkReport) -> String {
    let mut lines = vec![
        ("mark", mark.name.clone()),
        ("disk", mark.disk.clone()),
        ("id", mark.id.clone()),
        ("set", mark.set.clone()),
        ("time", date_of(mark.time)),
        ("size", format!("{} ({} bytes)", human(mark.size), mark.size)),
        ("consistency", consistency(mark)),
    ];
    if mark.pending > 0 {
        lines.push(("not copied then", format!("{} ({} bytes)", human(mark.pending), mark.pending)));
    }
    match &mark.refused {
        None => lines.push(("trust", "trusted".to_owned())),
        Some(reason) => {
            lines.push(("trust", format!("refused: {reason}")));
            lines.extend(mark.refused_since.map(|since| ("refused since", date_of(since))));
        }
    }
    lines.into_iter().map(|(name, value)| format!("{name}: {value}\n")).collect()
}

/// A moment, given in milliseconds since 1970, in UTC.
pub(crate) fn date_of(ms: u64) -> String {
    engine::utc_text(ms / 1000)
}
