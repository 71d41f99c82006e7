//! Work on image files as plain data.

pub use super::live::LiveDisk;
use crate::{CacheMode, EngineError, Format};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use utoipa::ToSchema;

/// Format options, `K=V`; the names are those of `qemu-img create -o`.
pub type Options = BTreeMap<String, String>;

/// An image to read: a file, or a disk of the daemon that does the work.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct SourceSpec {
    /// The file or block device. Empty when `disk` is given.
    #[serde(default, skip_serializing_if = "is_empty")]
    #[schema(value_type = String)]
    pub file: PathBuf,
    /// A disk of the daemon, as guests see it now; in jobs only. What guests write meanwhile may or may not be seen.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk: Option<String>,
    /// Its format; by the file's extension when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub format: Option<Format>,
    /// An internal snapshot (name or id) instead of the present state.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub snapshot: Option<String>,
    /// Read though somebody writes to it.
    #[serde(default)]
    pub force_share: bool,
    /// Read though a parent is not what its child was bound to, so that what is read may be wrong.
    #[serde(default)]
    pub despite_fault: bool,
    /// How the host's cache is used.
    #[serde(default)]
    pub cache: CacheMode,
    /// Where the disk that `disk` names is; filled in by the daemon.
    #[serde(skip)]
    #[schema(ignore)]
    pub live: Option<LiveDisk>,
}

fn is_empty(path: &Path) -> bool {
    path.as_os_str().is_empty()
}

impl SourceSpec {
    /// The present state of that file.
    pub fn of(file: impl Into<PathBuf>, format: Option<Format>) -> Self {
        Self {
            file: file.into(),
            disk: None,
            format,
            snapshot: None,
            force_share: false,
            despite_fault: false,
            cache: CacheMode::default(),
            live: None,
        }
    }

    /// The present state of a disk of the daemon.
    pub fn of_disk(name: impl Into<String>) -> Self {
        Self { disk: Some(name.into()), ..Self::of(PathBuf::new(), None) }
    }

    /// Checks what can be checked without opening anything.
    ///
    /// # Errors
    /// [`EngineError::Invalid`].
    pub fn validate(&self) -> Result<(), EngineError> {
        match &self.disk {
            None => require_absolute(&self.file),
            Some(disk) if !is_empty(&self.file) => {
                Err(EngineError::Invalid(format!("a source is a file or a disk, not both: found disk {disk:?} too")))
            }
            Some(disk) if self.format.is_some() || self.snapshot.is_some() => Err(EngineError::Invalid(format!(
                "disk {disk:?} is read as guests see it: give neither format nor snapshot"
            ))),
            Some(_) => Ok(()),
        }
    }
}

/// Refuses paths that mean something else in the daemon than to who asks.
pub(crate) fn require_absolute(path: &Path) -> Result<(), EngineError> {
    if path.is_absolute() {
        return Ok(());
    }
    Err(EngineError::Invalid(format!(
        "the path {:?} is not absolute; name it from the root, as the daemon has its own working directory",
        path.display().to_string()
    )))
}

/// A backing file of a new image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct BackingSpec {
    /// As the image is to name it: relative names are seen from the image's directory.
    pub file: String,
    /// Its format.
    pub format: Format,
}

/// A new image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct CreateSpec {
    /// Where.
    #[schema(value_type = String)]
    pub file: PathBuf,
    /// In which format.
    pub format: Format,
    /// Size of the guest's disk in bytes; the backing file's when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size: Option<u64>,
    /// Format options.
    #[serde(default)]
    #[schema(value_type = BTreeMap<String, String>)]
    pub options: Options,
    /// What shows through where the new image holds nothing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub backing: Option<BackingSpec>,
    /// Do not open the backing file; the size must be given then.
    #[serde(default)]
    pub unsafe_backing: bool,
}

/// A copy of an image, perhaps in another format.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct ConvertSpec {
    /// What to copy.
    pub source: SourceSpec,
    /// Where to.
    #[schema(value_type = String)]
    pub target: PathBuf,
    /// In which format.
    pub format: Format,
    /// Options of the target's format.
    #[serde(default)]
    #[schema(value_type = BTreeMap<String, String>)]
    pub options: Options,
    /// The target's backing file; what equals it there is not copied when it is the source's too.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub backing: Option<BackingSpec>,
    /// Store clusters compressed.
    #[serde(default)]
    pub compress: bool,
    /// The target is there already and large enough; what is behind the source's size stays as it is.
    #[serde(default)]
    pub no_create: bool,
    /// The target, which is there already, reads as zero everywhere.
    #[serde(default)]
    pub target_is_zero: bool,
    /// Let the kernel copy plain data, or share it where the file system can; nothing is searched for zeroes then.
    #[serde(default)]
    pub copy_range: bool,
    /// Bytes of zeroes in a row, as data, that become a hole; 0 allocates everything. 4096 when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sparse_size: Option<u64>,
    /// How the host's cache is used for the target.
    #[serde(default)]
    pub cache: CacheMode,
}

/// A comparison of two images.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct CompareSpec {
    /// One.
    pub first: SourceSpec,
    /// The other.
    pub second: SourceSpec,
    /// Different sizes or different allocation count as a difference.
    #[serde(default)]
    pub strict: bool,
}

/// What a check may mend.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum RepairMode {
    /// Give back what nothing refers to.
    Leaks,
    /// Everything that can be mended.
    All,
}

impl FromStr for RepairMode {
    type Err = String;

    fn from_str(word: &str) -> Result<Self, String> {
        match word {
            "leaks" => Ok(Self::Leaks),
            "all" => Ok(Self::All),
            _ => Err(format!("unknown repair mode {word:?}: expected leaks or all")),
        }
    }
}

/// A check of an image's metadata.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct CheckSpec {
    /// The image.
    #[schema(value_type = String)]
    pub file: PathBuf,
    /// Its format; by the file's extension when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub format: Option<Format>,
    /// What to mend.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub repair: Option<RepairMode>,
    /// Check though somebody writes to it; what is found may have been passing.
    #[serde(default)]
    pub force_share: bool,
    /// Its history, when that is not beside it; an absolute path.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub history_file: Option<PathBuf>,
}

/// How much space a conversion would take.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct MeasureSpec {
    /// The image that would be converted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<SourceSpec>,
    /// Or the size of an empty one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size: Option<u64>,
    /// Into which format.
    pub format: Format,
    /// Options of that format.
    #[serde(default)]
    #[schema(value_type = BTreeMap<String, String>)]
    pub options: Options,
}

/// How much to set aside when an image grows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum PreallocationMode {
    /// Nothing.
    #[default]
    Off,
    /// The format's tables.
    Metadata,
    /// Tables and file system space.
    Falloc,
    /// Tables, and zeroes written.
    Full,
}

impl FromStr for PreallocationMode {
    type Err = String;

    fn from_str(word: &str) -> Result<Self, String> {
        match word {
            "off" => Ok(Self::Off),
            "metadata" => Ok(Self::Metadata),
            "falloc" => Ok(Self::Falloc),
            "full" => Ok(Self::Full),
            _ => Err(format!("unknown preallocation {word:?}: expected off, metadata, falloc or full")),
        }
    }
}

/// A new size.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum NewSize {
    /// That many bytes.
    To(u64),
    /// That many bytes more.
    Grow(u64),
    /// That many bytes less.
    Shrink(u64),
}

impl NewSize {
    /// In bytes, given the present size; `None` below 0 or beyond all numbers.
    pub fn from_present(self, present: u64) -> Option<u64> {
        match self {
            Self::To(size) => Some(size),
            Self::Grow(by) => present.checked_add(by),
            Self::Shrink(by) => present.checked_sub(by),
        }
    }
}

/// Another size for an image that nobody uses.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct ResizeSpec {
    /// The image.
    #[schema(value_type = String)]
    pub file: PathBuf,
    /// Its format; by the file's extension when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub format: Option<Format>,
    /// The new size.
    pub size: NewSize,
    /// Whether the image may lose bytes at its end.
    #[serde(default)]
    pub shrink: bool,
    /// How much to set aside.
    #[serde(default)]
    pub preallocation: PreallocationMode,
    /// Its history, when that is not beside it; an absolute path.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub history_file: Option<PathBuf>,
}
