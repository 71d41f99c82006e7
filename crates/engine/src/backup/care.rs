//! Looking after a repository: whether all is there, whether all is readable, how much it is, and what may go.

use super::place::RepositorySpec;
use crate::{EngineError, chain_text};
use repository::{Finding, Host, PruneOptions, Report, RepositoryError, SystemHost, VerifyOptions};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Something that is wrong in a repository, and whom it hits.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub struct FindingReport {
    /// The point; absent if it is nothing of one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub point: Option<String>,
    /// The disk in it; absent if all of the point is hit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk: Option<String>,
    /// First byte of the disk that is hit.
    pub start: u64,
    /// Bytes of it; 0 if no content is lost by it.
    pub length: u64,
    /// The object that is not as it was written.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub object: Option<String>,
    /// What is wrong.
    pub reason: String,
}

impl FindingReport {
    fn of(finding: Finding) -> Self {
        let Finding { point, disk, range, error } = finding;
        Self {
            point: point.map(|id| id.to_string()),
            disk,
            start: range.start,
            length: range.end.saturating_sub(range.start),
            object: error.damage().map(|damage| damage.object.clone()),
            reason: reason(&error),
        }
    }
}

/// What is wrong, without the next step, which is one for all findings.
pub(super) fn reason(error: &RepositoryError) -> String {
    let text = chain_text(error);
    match (error.damage(), text.rsplit_once("; ")) {
        (Some(_), Some((what, _))) => what.to_owned(),
        _ => text,
    }
}

/// What a check or a verification has found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub struct CareReport {
    /// Whether nothing is wrong.
    pub sound: bool,
    /// Points looked at.
    pub points: u64,
    /// Nodes (check) or leaves (verify) looked at, each once.
    pub frames: u64,
    /// Bytes of disks that were read and proven.
    pub bytes: u64,
    /// One in how many leaves was read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub one_in: Option<u64>,
    /// What is wrong.
    pub findings: Vec<FindingReport>,
    /// How many more findings there are.
    pub more_findings: u64,
}

impl CareReport {
    fn of(report: Report, one_in: Option<u64>) -> Self {
        let Report { points, frames, bytes, findings, more_findings } = report;
        Self {
            sound: findings.is_empty() && more_findings == 0,
            points,
            frames,
            bytes,
            one_in,
            findings: findings.into_iter().map(FindingReport::of).collect(),
            more_findings,
        }
    }
}

/// Looks whether every point's trees are whole, down to packs that have what is said of them, and whether every key is; reads no data. Blocks.
///
/// # Errors
/// When it cannot be looked at. What is wrong is in the report.
pub fn check(spec: &RepositorySpec) -> Result<CareReport, EngineError> {
    let repository = spec.open()?;
    let looked = || -> Result<CareReport, RepositoryError> {
        let mut report = CareReport::of(repository.check()?, None);
        let damaged = repository.keys()?.into_iter().filter_map(Result::err);
        let damaged = damaged.map(|error| FindingReport::of(Finding { point: None, disk: None, range: 0..0, error }));
        report.findings.extend(damaged);
        report.sound &= report.findings.is_empty();
        Ok(report)
    };
    looked().map_err(|e| spec.failed(e))
}

/// Reads the data of all points and proves it. With `sample`, about so many percent of it or more, other ones each time. Blocks.
///
/// # Errors
/// When it cannot be begun. What is wrong is in the report.
pub fn verify(spec: &RepositorySpec, sample: Option<u8>, threads: Option<usize>) -> Result<CareReport, EngineError> {
    let repository = spec.open()?;
    let one_in = sample.map(|percent| 100 / u64::from(percent.clamp(1, 100)));
    let mut seed = [0; 8];
    // Without randomness it is the clock that chooses: any choice proves as much.
    if !SystemHost.random(&mut seed) {
        seed = SystemHost.now_ms().to_le_bytes();
    }
    let threads = threads.unwrap_or_else(|| std::thread::available_parallelism().map_or(2, usize::from));
    let options = VerifyOptions { one_in: one_in.unwrap_or(1), seed: u64::from_le_bytes(seed), threads };
    let report = repository.verify(options).map_err(|e| spec.failed(e))?;
    Ok(CareReport::of(report, one_in))
}

/// How much is in a repository.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub struct StatsReport {
    /// The repository's random name.
    pub id: String,
    /// Whether it is encrypted.
    pub encrypted: bool,
    /// Bytes of a leaf.
    pub leaf_size: u64,
    /// Bytes at which a pack is full.
    pub pack_size: u64,
    /// Points.
    pub points: u64,
    /// Sizes of their disks added up.
    pub disk_bytes: u64,
    /// Packs.
    pub packs: u64,
    /// Bytes of the packs.
    pub pack_bytes: u64,
    /// Packs that a later prune deletes.
    pub tombstoned_packs: u64,
    /// Sessions at work, or that broke off lately.
    pub sessions: u64,
}

/// Counts what there is. Blocks.
///
/// # Errors
/// When the repository cannot be opened or read.
pub fn stats(spec: &RepositorySpec) -> Result<StatsReport, EngineError> {
    let repository = spec.open()?;
    let settings = repository.settings();
    let stats = repository.stats().map_err(|e| spec.failed(e))?;
    Ok(StatsReport {
        id: repository.id().to_string(),
        encrypted: settings.encrypted,
        leaf_size: settings.leaf_bytes.into(),
        pack_size: settings.pack_bytes.into(),
        points: stats.points,
        disk_bytes: stats.disk_bytes,
        packs: stats.packs,
        pack_bytes: stats.pack_bytes,
        tombstoned_packs: stats.tombstoned_packs,
        sessions: stats.leases,
    })
}

/// What a prune did.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub struct PruneReport {
    /// Forgotten points that are gone.
    pub points: u64,
    /// Packs that were deleted.
    pub packs: u64,
    /// Packs that a later prune deletes, when the grace is over.
    pub tombstoned: u64,
    /// Packs whose few needed parts were packed anew, so that they can go.
    pub repacked: u64,
    /// Sessions that were taken for dead.
    pub expired_sessions: Vec<String>,
    /// Sessions at work, for the end of which packs wait.
    pub waiting_for: Vec<String>,
}

/// Deletes what nothing needs any more, in two steps with a grace between them; backups go on meanwhile. Blocks.
///
/// # Errors
/// When another prune is at work, or something cannot be read: then nothing goes.
pub fn prune(spec: &RepositorySpec, grace_ms: Option<u64>) -> Result<PruneReport, EngineError> {
    let repository = spec.open()?;
    let usual = PruneOptions::default();
    let grace_ms = grace_ms.unwrap_or(usual.grace_ms);
    // Who wants the space sooner than in a day wants that of young packs, too. Nothing rests on their age: docs/repository.md.
    let options = PruneOptions { grace_ms, young_ms: usual.young_ms.min(grace_ms), ..usual };
    let pruned = repository.prune(&options).map_err(|e| spec.failed(e))?;
    let names = |ids: Vec<repository::Id>| ids.iter().map(ToString::to_string).collect();
    Ok(PruneReport {
        points: pruned.points,
        packs: pruned.packs,
        tombstoned: pruned.tombstoned,
        repacked: pruned.repacked,
        expired_sessions: names(pruned.expired),
        waiting_for: names(pruned.waiting_for),
    })
}
