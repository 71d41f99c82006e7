//! `highwater snapshot …`: frozen states of disks with names.

use super::marks::date_of;
use super::target::{self, Group, Target};
use super::{Outcome, relocate};
use crate::args::{CommitArgs, Global, SnapshotVerb};
use crate::exit::{self, Failure};
use crate::output;
use crate::size::human;
use anyhow::anyhow;
use api::{CloneSpec, ConsolidateSpec, FreezeSpec, SnapshotConsistency, SnapshotList, SnapshotReport, SnapshotSpec};
use engine::history::refuse_freeze;
use std::path::PathBuf;

pub(crate) async fn run(global: &Global, verb: SnapshotVerb) -> Outcome {
    match verb {
        SnapshotVerb::Create { disks_and_name, of, freeze, freeze_limit } => {
            let (disks, name) = split(&disks_and_name)?;
            let freeze = match freeze {
                None => None,
                Some(socket) => Some(FreezeSpec { socket: target::absolute(&socket)?, limit_ms: freeze_limit }),
            };
            let snapshots = match target::find_all(global, disks).await? {
                Group::Daemon(client, disks) => {
                    target::refuse_file_options(&disks[0], &target::history_options(&of))?;
                    client.snapshot(&SnapshotSpec { disks, name, freeze }).await?
                }
                Group::Files(files) => {
                    refuse_freeze(freeze.as_ref())?;
                    let sources = target::history_sources(&files, &of)?;
                    target::workshop()?.snapshot(sources, name).await?
                }
            };
            if global.wants_json() {
                output::json(&SnapshotList { snapshots })?;
            } else if !global.quiet {
                let rows = snapshots.iter().map(|snapshot| {
                    let pause =
                        snapshot.pause_us.map_or_else(String::new, |us| format!("{:.1} ms", us as f64 / 1000.0));
                    vec![snapshot.disk.clone(), snapshot.name.clone(), snapshot.file.display().to_string(), pause]
                });
                output::table(&["disk", "name", "file", "pause"], rows)?;
            }
        }
        SnapshotVerb::List { disk, format } => {
            let snapshots = match target::find(global, &disk).await? {
                Target::Disk(client, disk) => {
                    target::refuse_file_options(&disk, &[("-f", format.is_some())])?;
                    client.snapshots(&disk).await?
                }
                Target::File(file) => target::workshop()?.snapshots(file, format).await?,
            };
            if global.wants_json() {
                output::json(&SnapshotList { snapshots })?;
            } else {
                output::table(
                    &["name", "time", "size", "stored", "consistency", "in use", "file"],
                    snapshots.iter().map(row),
                )?;
            }
        }
        SnapshotVerb::Revert { disk, name, of } => {
            match target::find(global, &disk).await? {
                Target::Disk(client, disk) => {
                    target::refuse_file_options(&disk, &target::history_options(&of))?;
                    client.revert(&disk, &name).await?;
                }
                Target::File(file) => {
                    target::workshop()?.revert(target::history_source(&file, &of)?, name.clone()).await?;
                }
            }
            if !global.quiet && !global.wants_json() {
                output::line(&format!("{}: back at {name:?}", disk.display()))?;
            }
        }
        SnapshotVerb::Delete { disk, name, into, of, rate } => {
            let args = CommitArgs { disk, of, rate };
            let spec =
                ConsolidateSpec { disk: String::new(), snapshot: Some(name), into: into.map(|into| into.into()) };
            return relocate::consolidate(global, args, spec).await;
        }
        SnapshotVerb::Clone { disk, name, target: clone, format } => {
            let target = target::absolute(&clone)?;
            let info = match target::find(global, &disk).await? {
                Target::Disk(client, disk) => {
                    target::refuse_file_options(&disk, &[("-f", format.is_some())])?;
                    client.clone_snapshot(&disk, &name, &CloneSpec { target }).await?
                }
                Target::File(file) => target::workshop()?.clone_snapshot(file, format, name.clone(), target).await?,
            };
            if global.wants_json() {
                output::json(&info)?;
            } else if !global.quiet {
                output::line(&format!("{}: clone of {name:?}, {}", clone.display(), human(info.virtual_size)))?;
            }
        }
    }
    Ok(exit::OK)
}

fn split(disks_and_name: &[PathBuf]) -> Result<(&[PathBuf], String), Failure> {
    let Some((name, disks)) = disks_and_name.split_last().filter(|(_, disks)| !disks.is_empty()) else {
        return Err(Failure::from(anyhow!("nothing to take a snapshot of: expected DISK… NAME")).with_code(exit::USAGE));
    };
    match name.to_str() {
        Some(name) => Ok((disks, name.to_owned())),
        None => Err(anyhow!("{}: a snapshot's name is UTF-8 text", name.display()).into()),
    }
}

fn row(snapshot: &SnapshotReport) -> Vec<String> {
    vec![
        snapshot.name.clone(),
        snapshot.time.map_or_else(String::new, date_of),
        human(snapshot.size),
        human(snapshot.stored),
        match snapshot.consistency {
            Some(SnapshotConsistency::Crash) => "crash",
            Some(SnapshotConsistency::Frozen) => "frozen",
            Some(SnapshotConsistency::Offline) => "offline",
            None => "",
        }
        .to_owned(),
        if snapshot.current { "yes" } else { "no" }.to_owned(),
        snapshot.file.display().to_string(),
    ]
}
