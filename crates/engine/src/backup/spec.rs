//! What is asked of a backup and of a restore, and what came out, as plain data.

use super::{PointSpec, RepositorySpec};
use crate::history::FreezeSpec;
use crate::images::request::{Options, require_absolute};
use crate::{EngineError, Format};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;
use utoipa::ToSchema;

/// Disks of the daemon that are to be backed up at one instant.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct BackupSpec {
    /// Disks by their names, or virtual machines, which stand for all of their disks.
    pub disks: Vec<String>,
    /// Where to.
    pub repository: RepositorySpec,
    /// How.
    #[serde(default)]
    pub how: BackupHow,
    /// The guest to freeze for the instant.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub freeze: Option<FreezeSpec>,
}

/// What a backup is to be.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct BackupHow {
    /// Name of the machine in the repository: the virtual machine's, or the first disk's, when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub machine: Option<String>,
    /// Reads all of the disks and stores it anew, whatever the repository has: what is damaged there is not built upon.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub full: bool,
    /// Reads all of the disks, and compares it with the last point, though the history says what has changed.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub compare: bool,
    /// Absolute paths of files to keep with the disks: the machine's configuration.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schema(value_type = Vec<String>)]
    pub attach: Vec<PathBuf>,
    /// Free text.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub note: String,
}

impl BackupSpec {
    /// Checks what can be checked without opening anything.
    ///
    /// # Errors
    /// [`EngineError::Invalid`].
    pub fn validate(&self) -> Result<(), EngineError> {
        self.repository.validate()?;
        self.how.attach.iter().try_for_each(|file| require_absolute(file))?;
        self.freeze.as_ref().map_or(Ok(()), FreezeSpec::validate)
    }
}

/// How it was known what to store.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum BackupKind {
    /// Everything was read, as the repository had no point of this disk.
    Full,
    /// The history told what has changed since the last point, and only that was read.
    Incremental,
    /// Everything was read and compared with the last point.
    Compared,
}

impl BackupKind {
    /// The word for people.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Full => "full",
            Self::Incremental => "incremental",
            Self::Compared => "compared",
        }
    }
}

/// One disk of a new point.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub struct BackedUpDisk {
    /// Its name.
    pub name: String,
    /// Bytes of the disk.
    pub size: u64,
    /// How it was known what to store.
    pub kind: BackupKind,
    /// Why it was not incremental, when there was a point to build upon.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Bytes that were read.
    pub read: u64,
}

/// A new point.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub struct BackupReport {
    /// Its id.
    pub point: String,
    /// The machine's name in the repository.
    pub machine: String,
    /// The instant, in milliseconds since 1970.
    pub time: u64,
    /// The disks.
    pub disks: Vec<BackedUpDisk>,
    /// Leaves that were looked at.
    pub leaves: u64,
    /// Of them those that the repository did not have.
    pub new_leaves: u64,
    /// Bytes by which the repository's packs have grown.
    pub stored: u64,
}

/// A disk of a point that is to be an image again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct RestoreSpec {
    /// From where.
    pub repository: RepositorySpec,
    /// The point: its id, as many of its first digits as tell it from others, or `latest`.
    pub point: String,
    /// Of which machine, when `latest` could be of several.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub machine: Option<String>,
    /// Which disk of the point, if it has several.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk: Option<String>,
    /// Absolute path of the image or block device.
    #[schema(value_type = String)]
    pub target: PathBuf,
    /// Its format.
    pub format: Format,
    /// The format's options, by the names that qemu-img has for them.
    #[serde(default, skip_serializing_if = "Options::is_empty")]
    #[schema(value_type = Object)]
    pub options: Options,
    /// The target is there, and what differs is overwritten.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub in_place: bool,
    /// Holds only what differs from this image, which is what the point `since` was restored to: it becomes the parent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub over: Option<RestoredParent>,
}

/// A parent of a restored image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct RestoredParent {
    /// The point that it holds.
    pub since: String,
    /// Its file, as the new image is to name it.
    pub backing: String,
    /// Its format.
    pub format: Format,
}

impl RestoreSpec {
    /// What is restored.
    pub(super) fn source(&self) -> PointSpec {
        let Self { repository, point, machine, disk, .. } = self.clone();
        PointSpec { repository, point, machine, disk }
    }

    /// Checks what can be checked without opening anything.
    ///
    /// # Errors
    /// [`EngineError::Invalid`].
    pub fn validate(&self) -> Result<(), EngineError> {
        self.repository.validate()?;
        if self.in_place && self.over.is_some() {
            return Err(EngineError::Invalid("an image over a parent is a new one: not in place".to_owned()));
        }
        if self.in_place && !self.options.is_empty() {
            return Err(EngineError::Invalid(
                "-o says how the target is made, but it is there already: leave one out".to_owned(),
            ));
        }
        // It would need all that is said here of the target for itself.
        if self.options.contains_key("data_file") {
            return Err(EngineError::Unsupported(
                "a restored image holds its data itself; give it an external data file with `highwater convert`"
                    .to_owned(),
            ));
        }
        require_absolute(&self.target)
    }
}

/// What a restore has done.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub struct RestoreReport {
    /// The point.
    pub point: String,
    /// Its machine.
    pub machine: String,
    /// The disk.
    pub disk: String,
    /// The image.
    #[schema(value_type = String)]
    pub target: PathBuf,
    /// Its format.
    pub format: Format,
    /// Bytes of the disk.
    pub size: u64,
    /// Bytes that were written as data.
    pub written: u64,
    /// Bytes that were left as they were, as the target held them already.
    pub same: u64,
}
