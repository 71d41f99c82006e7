//! Checking an image's metadata, and mending it.

use super::gate::FileGate;
use super::mended::Mended;
use super::report::CheckReport;
use super::request::{CheckSpec, RepairMode};
use super::stack::{HistoryUse, OpenRequest, Stack};
use super::watched::Watched;
use super::{Progress, ProgressUnit, offload_format};
use crate::linkage::{self, LinkReport};
use crate::{EngineError, Format, history};
use chain::{Access, OpenGate};
use disk::StorageHandle;
use formats::qcow2::Header;
use formats::qcow2::check::{self, Finding, Severity};
use std::path::PathBuf;

/// Has the writes put back that a killed process has left: after a repair they would seem to be of an older image.
async fn put_back_parked(spec: &CheckSpec, format: Format) {
    let request = OpenRequest {
        writable: true,
        history: HistoryUse::IfThere(spec.history_file.clone()),
        ..OpenRequest::reading(spec.file.clone(), format)
    };
    let put_back = match Stack::open(&request).await {
        Ok(stack) => stack.close().await,
        Err(error) => Err(error),
    };
    if let Err(error) = put_back {
        tracing::warn!(image = %spec.file.display(), error = crate::chain_text(&error), "parked writes are not put back before the repair");
    }
}

/// Checks.
pub(crate) async fn check(spec: CheckSpec, progress: &Progress) -> Result<CheckReport, EngineError> {
    let format = offload_format(spec.file.clone(), spec.format).await?;
    if format == Format::Raw {
        return Err(EngineError::Unsupported(format!("{}: raw images have no metadata to check", spec.file.display())));
    }
    if spec.repair.is_some() {
        linkage::refuse_parent(&spec.file).await?;
    }
    if spec.repair.is_some() && history::may_be_parked(spec.file.clone()).await {
        put_back_parked(&spec, format).await;
    }
    let access = if spec.repair.is_some() { Access::ReadWrite } else { Access::ReadOnly };
    let gate = FileGate { force_share: spec.force_share && spec.repair.is_none(), ..FileGate::cached() };
    let file = gate.open_storage(&spec.file, access).await?;
    let mended = match spec.repair {
        Some(_) => Mended::before(&spec.file, format, spec.history_file.clone()).await,
        None => None,
    };
    let report = examine(&spec, format, &gate, &file, progress).await;
    let Some(mended) = mended else { return report };
    match (&report, Header::read_for_check(&file).await) {
        (Ok(report), Ok(header)) => mended.after(report.corruptions_fixed == 0, header.history_mark()).await,
        _ => mended.give_up().await,
    }
    report
}

async fn examine(
    spec: &CheckSpec,
    format: Format,
    gate: &FileGate,
    file: &StorageHandle,
    progress: &Progress,
) -> Result<CheckReport, EngineError> {
    let storage = Watched::stopping(file, progress);
    let header = Header::read_for_check(&storage).await?;
    // A data file that cannot be found takes nothing from the check of the image itself.
    let data_file = match header.data_file.as_deref().filter(|_| header.has_data_file()) {
        None => None,
        Some(name) => {
            let path = spec.file.parent().map_or_else(|| PathBuf::from(name), |dir| dir.join(name));
            gate.open_storage(&path, Access::ReadOnly).await.ok().map(|data| Watched::stopping(&data, progress))
        }
    };
    let mut seen = (0, 0);
    let mut step = |done: u64, total: u64| {
        if total != seen.1 {
            progress.set_total(total);
        }
        progress.advance(done.saturating_sub(seen.0));
        seen = (done, total);
    };
    progress.set_unit(ProgressUnit::Tables);
    let mut before = None;
    let found = match spec.repair {
        None => check::check(&storage, data_file.as_ref(), &mut step).await,
        Some(mode) => {
            // The repair tells what is left, not what it mended.
            let looked = check::check(&storage, data_file.as_ref(), &mut |_, _| {}).await;
            progress.check()?;
            before = Some(looked?);
            let mode = match mode {
                RepairMode::Leaks => check::RepairMode::Leaks,
                RepairMode::All => check::RepairMode::All,
            };
            check::repair(&storage, data_file.as_ref(), mode, &mut step).await
        }
    };
    // What was found after the wish to stop says nothing.
    progress.check()?;
    let found = found?;
    if spec.repair.is_some() {
        file.sync().await?;
    }
    let mut findings: Vec<String> = found.findings.iter().map(words).collect();
    let fixed = found.corruptions_fixed + found.leaks_fixed > 0;
    let mended = match before.filter(|_| fixed) {
        None => Vec::new(),
        Some(before) => before.findings.iter().filter(|f| !found.findings.contains(f)).map(words).collect(),
    };
    if found.findings_omitted > 0 {
        findings.push(format!("and {} more", found.findings_omitted));
    }
    let link = linkage::link_report(&spec.file, &header, spec.force_share).await;
    Ok(CheckReport {
        link_fault: link.and_then(|link: LinkReport| link.text),
        filename: spec.file.display().to_string(),
        format: format.name().to_owned(),
        check_errors: found.check_errors,
        image_end_offset: Some(found.image_end_offset),
        corruptions: found.corruptions,
        leaks: found.leaks,
        corruptions_fixed: found.corruptions_fixed,
        leaks_fixed: found.leaks_fixed,
        total_clusters: Some(found.total_clusters),
        allocated_clusters: Some(found.allocated_clusters),
        fragmented_clusters: Some(found.fragmented_clusters),
        compressed_clusters: Some(found.compressed_clusters),
        marked_corrupt: found.marked_corrupt && !(found.is_clean() && spec.repair.is_some()),
        mended,
        findings,
    })
}

/// A finding as one line.
fn words(finding: &Finding) -> String {
    let word = match finding.severity {
        Severity::Corruption => "corrupt",
        Severity::Leak => "leak",
        Severity::Error => "not checked",
    };
    let what = finding.what.to_string();
    format!("{word}: {}", what.strip_suffix(" (leak)").unwrap_or(&what))
}
