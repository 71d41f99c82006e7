//! `highwater disk …`.

use super::serve::export_spec;
use super::{Outcome, target};
use crate::args::{DiskAddArgs, DiskVerb, Global};
use crate::exit::{self, Failure};
use crate::output;
use crate::size::human;
use api::{DiskSpec, DiskStatus, ExportStatus, HistoryReport, ImageSpec};
use engine::{DiskState, name_of_file};

pub(crate) async fn run(global: &Global, verb: DiskVerb) -> Outcome {
    let client = target::client(global)?;
    match verb {
        DiskVerb::Add(args) => {
            let status = client.add_disk(&spec(args)?).await?;
            show(global, &status)?;
        }
        DiskVerb::List => {
            let list = client.disks().await?;
            if global.wants_json() {
                output::json(&list)?;
            } else {
                table(&list.disks)?;
            }
        }
        DiskVerb::Show { name } => {
            let status = client.disk(&name).await?;
            show(global, &status)?;
        }
        DiskVerb::Remove { name } => client.remove_disk(&name).await?,
        DiskVerb::Export { disk, export_name, export, read_only } => {
            let status = client.add_export(&disk, &export_spec(&export, export_name, read_only)?).await?;
            if global.wants_json() {
                output::json(&status)?;
            } else if !global.quiet {
                uris(&status)?;
            }
        }
        DiskVerb::Open { name } => {
            let status = client.open_disk(&name).await?;
            show(global, &status)?;
        }
        DiskVerb::Unexport { disk, export: Some(export), .. } => client.remove_export(&disk, &export).await?,
        DiskVerb::Unexport { disk, export: None, .. } => client.remove_all_exports(&disk).await?,
    }
    Ok(exit::OK)
}

fn spec(args: DiskAddArgs) -> Result<DiskSpec, Failure> {
    let exports = match args.no_export {
        true => Vec::new(),
        false => vec![export_spec(&args.export, args.export_name, args.read_only)?],
    };
    Ok(DiskSpec {
        name: args.disk.unwrap_or_else(|| name_of_file(&args.file)),
        image: ImageSpec { snapshot: args.snapshot, ..ImageSpec::of(target::absolute(&args.file)?, args.format) },
        cache: args.cache,
        read_only: args.read_only,
        despite_fault: args.despite_fault,
        history: target::history(&args.history)?,
        vm: args.vm,
        exports,
    })
}

fn show(global: &Global, status: &DiskStatus) -> anyhow::Result<()> {
    if global.wants_json() {
        return output::json(status);
    }
    if global.quiet {
        return Ok(());
    }
    table(std::slice::from_ref(status))?;
    if let Some(HistoryReport { kept, refused, reason: Some(reason), .. }) = &status.history {
        let what = match (kept, refused) {
            (false, _) => "no history is kept",
            (true, 0) => "its history has begun anew",
            (true, _) => "marks are refused",
        };
        output::line(&format!("{}: {what}: {reason}", status.spec.name))?;
    }
    for export in &status.exports {
        uris(export)?;
    }
    Ok(())
}

fn uris(export: &ExportStatus) -> anyhow::Result<()> {
    for uri in &export.uris {
        output::line(uri)?;
    }
    if let Some(error) = &export.error {
        output::line(&format!("export {}: {error}", export.name))?;
    }
    Ok(())
}

fn history_word(history: &HistoryReport) -> String {
    match history {
        HistoryReport { kept: false, .. } => "no".to_owned(),
        HistoryReport { marks: 0, .. } => "kept".to_owned(),
        HistoryReport { marks, refused: 0, .. } => format!("kept, marks: {marks}"),
        HistoryReport { marks, refused, .. } => format!("kept, marks: {marks}, refused: {refused}"),
    }
}

fn table(disks: &[DiskStatus]) -> anyhow::Result<()> {
    let rows = disks.iter().map(|disk| {
        let state = match (disk.state, &disk.error) {
            (DiskState::Failed, Some(error)) => format!("failed: {error}"),
            (DiskState::Open, _) if disk.read_only => "open, read-only".to_owned(),
            (state, _) => state.word().to_owned(),
        };
        vec![
            disk.spec.name.clone(),
            disk.format.map_or_else(String::new, |f| f.to_string()),
            disk.virtual_size.map_or_else(String::new, human),
            disk.exports.len().to_string(),
            disk.history.as_ref().map_or_else(String::new, history_word),
            disk.spec.image.file.display().to_string(),
            state,
        ]
    });
    output::table(&["name", "format", "size", "exports", "history", "file", "state"], rows)
}
