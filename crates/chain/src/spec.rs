//! Which images make up a disk, as plain data.

use formats::Format;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// A disk's images: what the API accepts and the catalogue stores.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StackSpec {
    /// The image file; a relative path is taken as the gate takes it.
    pub path: PathBuf,
    /// Its format. Always said, never guessed from the image's bytes: a guest that can write to a raw
    /// image could otherwise make it look like another format.
    #[serde(with = "format_name")]
    pub format: Format,
    /// Name or id of an internal snapshot to show instead of the present state; read-only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub snapshot: Option<String>,
    /// Refuse writes.
    #[serde(default)]
    pub read_only: bool,
    /// What lies below.
    #[serde(default)]
    pub parent: ParentSpec,
    /// The external data file, instead of the one that the image names.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub data_file: Option<PathBuf>,
}

/// What lies below an image.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ParentSpec {
    /// What the image itself names, if the gate lets it pass.
    #[default]
    FromImage,
    /// Nothing, whatever the image names.
    None,
    /// This, whatever the image names.
    Explicit(Box<StackSpec>),
}

impl StackSpec {
    /// An image with the parent that it names itself.
    pub fn new(path: impl Into<PathBuf>, format: Format) -> Self {
        Self {
            path: path.into(),
            format,
            snapshot: None,
            read_only: false,
            parent: ParentSpec::FromImage,
            data_file: None,
        }
    }
}

/// Formats as their names.
mod format_name {
    use formats::Format;
    use serde::de::{Deserialize, Deserializer, Error};
    use serde::ser::Serializer;

    pub(super) fn serialize<S: Serializer>(format: &Format, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(format.name())
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Format, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(D::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_it_writes() {
        let mut base = StackSpec::new("/golden/base.raw", Format::Raw);
        base.parent = ParentSpec::None;
        let mut spec = StackSpec::new("/vms/disk.qcow2", Format::Qcow2);
        spec.snapshot = Some("before".into());
        spec.parent = ParentSpec::Explicit(Box::new(base));
        let text = serde_json::to_string(&spec).unwrap();
        assert_eq!(serde_json::from_str::<StackSpec>(&text).unwrap(), spec, "{text}");
    }

    #[test]
    fn short_form_and_refusals() {
        let spec: StackSpec = serde_json::from_str(r#"{"path":"a.raw","format":"raw"}"#).unwrap();
        assert_eq!(spec, StackSpec::new("a.raw", Format::Raw));
        assert!(serde_json::from_str::<StackSpec>(r#"{"path":"a.raw"}"#).is_err(), "the format is always said");
        assert!(serde_json::from_str::<StackSpec>(r#"{"path":"a","format":"raw","parnet":"none"}"#).is_err());
        let error = serde_json::from_str::<StackSpec>(r#"{"path":"a","format":"vdi"}"#).unwrap_err().to_string();
        assert!(error.contains("expected raw or qcow2"), "{error}");
    }
}
