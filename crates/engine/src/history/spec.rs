//! Whether and how a disk's history is kept, as plain data.

use crate::EngineError;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;
use std::str::FromStr;
use utoipa::ToSchema;

/// Whether a disk's history is kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum HistoryMode {
    /// Kept where that is possible; where not, the disk is opened without, and says so.
    #[default]
    Auto,
    /// Kept; a disk that cannot have a history is not opened.
    On,
    /// Not kept. A history that is there is lost with the first write.
    Off,
}

impl FromStr for HistoryMode {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        match name {
            "auto" => Ok(Self::Auto),
            "on" => Ok(Self::On),
            "off" => Ok(Self::Off),
            _ => Err(format!("unknown history mode {name:?}: expected auto, on or off")),
        }
    }
}

/// How a disk's history is kept.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct HistorySpec {
    /// Whether it is kept.
    #[serde(default)]
    pub mode: HistoryMode,
    /// Absolute path of the sidecar; beside the image, with `.history` behind its name, when absent. Block devices need one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub file: Option<PathBuf>,
    /// Bytes of a granule of a new history: a power of two, 4 KiB to 1 MiB; 64 KiB when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub granule: Option<u64>,
    /// The most bytes that a crash may report beyond what was written; 64 MiB when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub open_limit: Option<u64>,
}

impl HistorySpec {
    /// No history.
    pub fn off() -> Self {
        Self { mode: HistoryMode::Off, ..Self::default() }
    }

    /// Checks what can be checked without touching a file.
    ///
    /// # Errors
    /// [`EngineError::Invalid`].
    pub fn validate(&self) -> Result<(), EngineError> {
        if let Some(file) = &self.file
            && !file.is_absolute()
        {
            return Err(EngineError::Invalid(format!("the history's path {} is not absolute", file.display())));
        }
        if let Some(granule) = self.granule
            && !(granule.is_power_of_two() && (4096..=1 << 20).contains(&granule))
        {
            return Err(EngineError::Invalid(format!(
                "a granule of {granule} bytes is not possible: expected a power of two from 4096 to 1048576"
            )));
        }
        Ok(())
    }
}
