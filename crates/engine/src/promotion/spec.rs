//! What is asked of a promotion, and what came out, as plain data.

use crate::images::request::{Options, require_absolute};
use crate::{EngineError, Format};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;
use utoipa::ToSchema;

/// A disk that is to get another image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct PromoteSpec {
    /// The disk.
    pub disk: String,
    /// Absolute path of its new image; nothing stands there.
    #[schema(value_type = String)]
    pub target: PathBuf,
    /// The new image's format.
    pub format: Format,
    /// The format's options, by the names that qemu-img has for them.
    #[serde(default, skip_serializing_if = "Options::is_empty")]
    #[schema(value_type = Object)]
    pub options: Options,
    /// Whether the old image (not what is below it) is removed when the new one has taken its place.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub remove_source: bool,
}

impl PromoteSpec {
    /// Checks what can be checked without opening anything.
    ///
    /// # Errors
    /// [`EngineError::Invalid`].
    pub fn validate(&self) -> Result<(), EngineError> {
        require_absolute(&self.target)
    }
}

/// What a promotion has done.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub struct PromoteReport {
    /// The disk.
    pub disk: String,
    /// Its new image.
    #[schema(value_type = String)]
    pub file: PathBuf,
    /// Its format.
    pub format: Format,
    /// Bytes of data that the pass has copied.
    pub copied: u64,
    /// Bytes of data that the guest's writes have brought to the target meanwhile.
    pub mirrored: u64,
    /// Bytes that were the same on both sides already, as an interrupted job had copied them.
    pub resumed: u64,
    /// For how long the guest's writes waited at the switch, in microseconds.
    pub pause_us: u64,
}
