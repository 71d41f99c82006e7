//! What is told of a chain.

use super::fault::FaultKind;
use super::identity_file::SnapshotFacts;
use crate::Format;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;
use utoipa::ToSchema;

/// What became of a child that is known of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum ChildState {
    /// It is there and names the image as its parent.
    There,
    /// There is no such file.
    Gone,
    /// It names another parent, or is no image any more.
    NamesAnother,
    /// It cannot be looked at, so it counts as a child.
    Unreadable,
}

/// A child that is known of an image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub struct ChildReport {
    /// Its file.
    #[schema(value_type = String)]
    pub file: PathBuf,
    /// When that was noted, in milliseconds since 1970.
    pub since: u64,
    /// What became of it.
    pub state: ChildState,
}

impl ChildReport {
    /// Whether the image must not be written to because of it.
    pub fn counts(&self) -> bool {
        matches!(self.state, ChildState::There | ChildState::Unreadable)
    }
}

/// How a child and its parent fit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum LinkState {
    /// The child remembers nothing of its parent; it is bound when it is written to.
    Unbound,
    /// The parent is what the child was made over.
    Sound,
    /// It is not.
    Fault,
}

/// The link of a child to its parent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub struct LinkReport {
    /// The parent's file.
    #[schema(value_type = String)]
    pub parent: PathBuf,
    /// How they fit.
    pub state: LinkState,
    /// The parent's content that the child remembers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub content: Option<String>,
    /// A second content of the parent that is right as well.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub second_content: Option<String>,
    /// Bytes of the parent's file that it remembers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size: Option<u64>,
    /// When that file was modified last, in nanoseconds since 1970.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub modified: Option<i64>,
    /// When they were bound, in milliseconds since 1970.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bound: Option<u64>,
    /// By what the parent is not what the child was bound to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fault: Option<FaultKind>,
    /// Bytes of the disk that are read from the parent or from below it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exposed: Option<u64>,
    /// The fault in words.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub text: Option<String>,
    /// What hashing the parent's content has shown.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hash: Option<HashReport>,
}

/// What hashing a parent's content has shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum HashReport {
    /// It is the first one of this content, and was recorded.
    Recorded,
    /// It is the first one of this content, and could not be recorded.
    NotRecorded,
    /// It is the one that was recorded of the content to which the child was bound.
    Same,
    /// It is another.
    Different,
    /// None was recorded of the content to which the child was bound.
    Unknown,
}

/// One image of a chain.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub struct LayerReport {
    /// Its file.
    #[schema(value_type = String)]
    pub file: PathBuf,
    /// Its format.
    pub format: Format,
    /// Bytes of the disk that it shows.
    pub virtual_size: u64,
    /// The id of its content; absent: it bears none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub content: Option<String>,
    /// The id that it bore before a program that does not know of ids opened it for writing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lapsed: Option<String>,
    /// Its link to its parent, which is the next layer; absent for the lowest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub link: Option<LinkReport>,
    /// The children that are known of it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub children: Vec<ChildReport>,
    /// What is known of it if it is a snapshot.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub snapshot: Option<SnapshotFacts>,
    /// The recorded hash of its content.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub content_hash: Option<String>,
    /// Where the disk is now, if it was moved away.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub moved_to: Option<PathBuf>,
    /// Why what is known of it, in the file beside it, cannot be used.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub identity_file_error: Option<String>,
}

/// A chain of images and how they fit, top first.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub struct ChainReport {
    /// The disk, as it was named.
    pub disk: String,
    /// Whether no link has a fault.
    pub sound: bool,
    /// The layers.
    pub layers: Vec<LayerReport>,
}
