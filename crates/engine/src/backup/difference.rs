//! What differs between two restore points.

use super::place::RepositorySpec;
use super::points::PointReport;
use crate::EngineError;
use repository::{PointDisk, Repository, RepositoryError};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// What the later point holds in a range that differs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum DifferenceKind {
    /// Data.
    Data,
    /// Zeroes, or nothing, behind the end of the disk.
    Zero,
}

/// A range that differs: whole leaves of the repository, cut to the larger disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct DifferingRange {
    /// First byte.
    pub start: u64,
    /// Bytes.
    pub length: u64,
    /// What the second point holds there.
    pub kind: DifferenceKind,
}

/// Which of two points has a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum DiskPresence {
    /// Both.
    Both,
    /// The second alone.
    Added,
    /// The first alone.
    Removed,
}

/// How a disk differs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub struct DiskDifference {
    /// The disk's name.
    pub disk: String,
    /// Which of the points has it.
    pub presence: DiskPresence,
    /// Its size in the first point.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub old_size: Option<u64>,
    /// Its size in the second one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub new_size: Option<u64>,
    /// Bytes of ranges that differ and hold data in the second point.
    pub data: u64,
    /// Bytes of ranges that differ and are zero there.
    pub zero: u64,
    /// The ranges, in order, without overlaps; absent unless they were asked for, and for a disk that one of the points has not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ranges: Option<Vec<DifferingRange>>,
}

/// How two points differ.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub struct DifferenceReport {
    /// The first point.
    pub old: PointReport,
    /// The second one.
    pub new: PointReport,
    /// Bytes that differences are told apart by.
    pub leaf_size: u64,
    /// Their disks, by name.
    pub disks: Vec<DiskDifference>,
}

/// Two points that are to be compared: `latest`, names, or the first digits of names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DifferenceSpec {
    /// The first point.
    pub old: String,
    /// The second one.
    pub new: String,
    /// This disk alone.
    pub disk: Option<String>,
    /// Whether the ranges are wanted, or only how much they are.
    pub ranges: bool,
}

/// Compares two points by their trees: reads what differs of those, and no data. Blocks.
///
/// # Errors
/// When the repository cannot be opened, a point or the disk is not there, or a tree is damaged.
pub fn differences(spec: &RepositorySpec, what: &DifferenceSpec) -> Result<DifferenceReport, EngineError> {
    let repository = spec.open()?;
    let find = |name: &str| repository.find_point(name).map_err(|e| spec.failed(e));
    let (old, new) = (find(&what.old)?, find(&what.new)?);
    let mut names: Vec<&str> = old.disks.iter().chain(&new.disks).map(|disk| disk.name.as_str()).collect();
    names.sort_unstable();
    names.dedup();
    if let Some(wanted) = &what.disk {
        let known = names.join(", ");
        names.retain(|name| name == wanted);
        if names.is_empty() {
            return Err(EngineError::Invalid(format!("neither point has a disk {wanted:?}; they have {known}")));
        }
    }
    let disks = names
        .into_iter()
        .map(|name| disk_difference(&repository, name, old.disk(name), new.disk(name), what.ranges))
        .collect::<Result<_, _>>()
        .map_err(|e| spec.failed(e))?;
    let leaf_size = repository.settings().leaf_bytes.into();
    Ok(DifferenceReport { old: PointReport::of(&old), new: PointReport::of(&new), leaf_size, disks })
}

fn disk_difference(
    repository: &Repository,
    name: &str,
    old: Option<&PointDisk>,
    new: Option<&PointDisk>,
    ranges: bool,
) -> Result<DiskDifference, RepositoryError> {
    let mut difference = DiskDifference {
        disk: name.to_owned(),
        presence: match (old, new) {
            (None, _) => DiskPresence::Added,
            (_, None) => DiskPresence::Removed,
            _ => DiskPresence::Both,
        },
        old_size: old.map(|disk| disk.size),
        new_size: new.map(|disk| disk.size),
        data: 0,
        zero: 0,
        ranges: None,
    };
    let (Some(old), Some(new)) = (old, new) else { return Ok(difference) };
    let mut found: Vec<DifferingRange> = Vec::new();
    for step in repository.differences(old, new) {
        let (range, zero) = step?;
        let length = range.end - range.start;
        let kind = if zero { DifferenceKind::Zero } else { DifferenceKind::Data };
        match kind {
            DifferenceKind::Data => difference.data += length,
            DifferenceKind::Zero => difference.zero += length,
        }
        match found.last_mut() {
            _ if !ranges => {}
            Some(last) if last.kind == kind && last.start + last.length == range.start => last.length += length,
            _ => found.push(DifferingRange { start: range.start, length, kind }),
        }
    }
    difference.ranges = ranges.then_some(found);
    Ok(difference)
}
