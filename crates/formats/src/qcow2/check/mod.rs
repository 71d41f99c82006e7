//! Checking and repairing images, as thoroughly as `qemu-img check`, and in a few points more.
//!
//! The check counts the references to every cluster by walking everything that refers to clusters (header,
//! all L1 and L2 tables, snapshot table, bitmaps, refcount structures), and compares with the image's own
//! reference counts; on the way it judges every entry. Beyond `qemu-img` it finds:
//! * clusters that belong to a table and to something else, even when their reference count fits;
//! * zero flags where the format has none;
//! * clusters of an external data file that are not at the guest's offset, or beyond the file's end.
//!
//! Memory: 1 byte for each cluster in use, 512 MiB at most; the work is bounded by the size of the file.

mod compare;
mod counts;
mod rebuild;
mod repair;
mod report;
mod walk;

pub use report::{CheckReport, Finding, MAX_FINDINGS, Progress, Severity};

use super::Header;
use compare::{Analysis, CopiedBy};
use disk::{Result, StorageHandle};
use walk::WalkMode;

/// What [`repair`] may change.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RepairMode {
    /// Give lost space back, and nothing else.
    Leaks,
    /// Everything.
    All,
}

/// Checks an image that nobody writes to. `data_file` is its external data file, if it has one and the
/// clusters' places in it are to be checked against its size.
///
/// # Errors
/// When the header cannot be used ([`Header::read`]), the image exceeds the memory bound, or the storage fails.
/// What is wrong with the image otherwise is in the report.
pub async fn check(
    storage: &StorageHandle,
    data_file: Option<&StorageHandle>,
    progress: Progress<'_>,
) -> Result<CheckReport> {
    let header = Header::read_for_check(storage).await?;
    Ok(examine(storage, data_file, &header, progress).await?.report)
}

/// Repairs an image that nobody else uses, and reports what is left. When nothing is, the dirty and corrupt bits
/// are cleared. An open [`Header`] is stale afterwards. See the module `repair` for the order of writes.
///
/// What cannot be repaired stays as it is: unaligned entries that hold data, overlapping tables, reference counts
/// that are too narrow, zero flags in version 2, a snapshot table that cannot be read.
///
/// # Errors
/// As [`check`].
pub async fn repair(
    storage: &StorageHandle,
    data_file: Option<&StorageHandle>,
    mode: RepairMode,
    progress: Progress<'_>,
) -> Result<CheckReport> {
    repair::repair(storage, data_file, mode, progress).await
}

/// What a check found, for the repair.
struct Outcome {
    report: CheckReport,
    /// The refcount structures are to be made anew.
    needs_rebuild: bool,
    /// All references were found.
    complete: bool,
}

async fn examine(
    storage: &StorageHandle,
    data_file: Option<&StorageHandle>,
    header: &Header,
    progress: Progress<'_>,
) -> Result<Outcome> {
    let mut analysis = Analysis::run(storage, data_file, header, WalkMode::Look, progress).await?;
    analysis.judge_copied(CopiedBy::Counts, false).await?;
    let Analysis { walk, needs_rebuild, .. } = analysis;
    Ok(Outcome { report: walk.report, needs_rebuild, complete: walk.complete })
}
