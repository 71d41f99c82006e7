//! Backups: disks into restore points of a repository, and back.
//!
//! The repository (`crates/repository`) knows no disks and blocks; here are the disks, on I/O threads, and calls to it go through
//! the blocking pool.

mod care;
mod difference;
mod find;
mod forget;
mod init;
mod key_files;
mod keys;
mod pass;
mod place;
mod plan;
mod points;
mod proof;
mod restore;
pub(crate) mod run;
pub(crate) mod session;
mod spec;
mod user_directories;

pub use care::{CareReport, FindingReport, PruneReport, StatsReport, check, prune, stats, verify};
pub use difference::{
    DifferenceKind, DifferenceReport, DifferenceSpec, DifferingRange, DiskDifference, DiskPresence, differences,
};
pub use forget::{ForgetReport, ForgetSpec, KeepSpec, KeptPoint, KeptReason, forget};
pub use init::{FirstKey, InitReport, InitSpec, init};
pub use keys::{KeyChangeReport, KeyOpenedBy, KeyReport, NewKey, add_key, keys, revoke_key, rotate_key};
pub use place::RepositorySpec;
pub use points::{PointConsistency, PointDiskReport, PointReport, points};
pub use proof::PointSpec;
pub(crate) use proof::Proof;
pub use restore::read_in_order;
pub use spec::{
    BackedUpDisk, BackupHow, BackupKind, BackupReport, BackupSpec, RestoreReport, RestoreSpec, RestoredParent,
};
