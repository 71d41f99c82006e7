//! Checking an image's metadata, and mending it.

use super::gate::FileGate;
use super::report::CheckReport;
use super::request::{CheckSpec, RepairMode};
use super::{Progress, offload_format};
use crate::{EngineError, Format};
use chain::{Access, OpenGate};
use formats::qcow2::Header;
use formats::qcow2::check::{self, Severity};
use std::path::PathBuf;

/// Checks.
pub(crate) async fn check(spec: CheckSpec, progress: &Progress) -> Result<CheckReport, EngineError> {
    let format = offload_format(spec.file.clone(), spec.format).await?;
    if format == Format::Raw {
        return Err(EngineError::Unsupported(format!("{}: raw images have no metadata to check", spec.file.display())));
    }
    let access = if spec.repair.is_some() { Access::ReadWrite } else { Access::ReadOnly };
    let gate = FileGate { force_share: spec.force_share && spec.repair.is_none(), ..FileGate::cached() };
    let storage = gate.open_storage(&spec.file, access).await?;
    let header = Header::read_for_check(&storage).await?;
    // A data file that cannot be found takes nothing from the check of the image itself.
    let data_file = match header.data_file.as_deref().filter(|_| header.has_data_file()) {
        None => None,
        Some(name) => {
            let path = spec.file.parent().map_or_else(|| PathBuf::from(name), |dir| dir.join(name));
            gate.open_storage(&path, Access::ReadOnly).await.ok()
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
    let found = match spec.repair {
        None => check::check(&storage, data_file.as_ref(), &mut step).await?,
        Some(mode) => {
            let mode = match mode {
                RepairMode::Leaks => check::RepairMode::Leaks,
                RepairMode::All => check::RepairMode::All,
            };
            let found = check::repair(&storage, data_file.as_ref(), mode, &mut step).await?;
            storage.sync().await?;
            found
        }
    };
    let mut findings: Vec<String> = found
        .findings
        .iter()
        .map(|finding| {
            let word = match finding.severity {
                Severity::Corruption => "corrupt",
                Severity::Leak => "leak",
                Severity::Error => "not checked",
            };
            format!("{word}: {}", finding.what)
        })
        .collect();
    if found.findings_omitted > 0 {
        findings.push(format!("and {} more", found.findings_omitted));
    }
    Ok(CheckReport {
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
        findings,
    })
}
