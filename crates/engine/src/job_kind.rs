//! What jobs there are.

use crate::EngineError;
use crate::backup::{BackupSpec, RestoreSpec};
use crate::consolidation::ConsolidateSpec;
use crate::history::AuditSpec;
use crate::images::request::{
    CheckSpec, CompareSpec, ConvertSpec, CreateSpec, MeasureSpec, ResizeSpec, SourceSpec, require_absolute,
};
use crate::promotion::PromoteSpec;
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use utoipa::openapi::schema::{ObjectBuilder, OneOfBuilder, Type};
use utoipa::openapi::{RefOr, Schema};
use utoipa::{PartialSchema, ToSchema};

/// What a job is to do. Paths are absolute.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "job", rename_all = "kebab-case")]
pub enum JobKind {
    /// Make an image.
    Create(CreateSpec),
    /// Copy an image.
    Convert(ConvertSpec),
    /// Compare two images.
    Compare(CompareSpec),
    /// Prove what a history calls unchanged.
    Audit(AuditSpec),
    /// Check an image's metadata, and mend it if that is asked for.
    Check(CheckSpec),
    /// Find out how much space a conversion would take.
    Measure(MeasureSpec),
    /// Change the size of an image that nobody uses.
    Resize(ResizeSpec),
    /// Give a disk of the daemon a new image that holds all of it, while its guest writes on.
    Promote(PromoteSpec),
    /// Merge a layer of a disk of the daemon into its neighbour, while its guest writes on.
    Consolidate(ConsolidateSpec),
    /// Make a restore point of disks of the daemon, while their guests write on.
    Backup(BackupSpec),
    /// Make an image of a disk of a restore point.
    Restore(RestoreSpec),
}

impl JobKind {
    /// The word in `job`.
    pub const fn word(&self) -> &'static str {
        match self {
            Self::Create(_) => "create",
            Self::Convert(_) => "convert",
            Self::Compare(_) => "compare",
            Self::Audit(_) => "audit",
            Self::Check(_) => "check",
            Self::Measure(_) => "measure",
            Self::Resize(_) => "resize",
            Self::Promote(_) => "promote",
            Self::Consolidate(_) => "consolidate",
            Self::Backup(_) => "backup",
            Self::Restore(_) => "restore",
        }
    }

    /// Whether the daemon begins such a job again when it starts, after it ended while the job was at work. The work finds the
    /// position that it saved last ([`JobHandle::position`](crate::JobHandle::position)) and goes on from there.
    pub const fn is_resumable(&self) -> bool {
        match self {
            Self::Create(_)
            | Self::Convert(_)
            | Self::Compare(_)
            | Self::Audit(_)
            | Self::Check(_)
            | Self::Measure(_)
            | Self::Resize(_)
            | Self::Restore(_) => false,
            // A backup takes another instant; what was stored is not stored again.
            Self::Promote(_) | Self::Consolidate(_) | Self::Backup(_) => true,
        }
    }

    /// Checks what can be checked without opening anything.
    ///
    /// # Errors
    /// [`EngineError::Invalid`].
    pub fn validate(&self) -> Result<(), EngineError> {
        self.sources().into_iter().try_for_each(SourceSpec::validate)?;
        match self {
            Self::Audit(spec) => spec.point.iter().try_for_each(|point| point.repository.validate())?,
            Self::Promote(spec) => spec.validate()?,
            Self::Consolidate(spec) => spec.validate()?,
            Self::Backup(spec) => spec.validate()?,
            Self::Restore(spec) => spec.validate()?,
            _ => {}
        }
        let history = match self {
            Self::Check(spec) => spec.history_file.as_deref(),
            Self::Resize(spec) => spec.history_file.as_deref(),
            Self::Audit(spec) => spec.history_file.as_deref(),
            _ => None,
        };
        self.own_files().into_iter().chain(history).try_for_each(require_absolute)
    }

    /// The images that are only read.
    fn sources(&self) -> Vec<&SourceSpec> {
        match self {
            Self::Convert(spec) => vec![&spec.source],
            Self::Compare(spec) => vec![&spec.first, &spec.second],
            Self::Audit(spec) => [&spec.source].into_iter().chain(&spec.against).collect(),
            Self::Measure(spec) => spec.source.iter().collect(),
            Self::Create(_)
            | Self::Check(_)
            | Self::Resize(_)
            | Self::Promote(_)
            | Self::Consolidate(_)
            | Self::Backup(_)
            | Self::Restore(_) => Vec::new(),
        }
    }

    /// The same, to be filled in.
    pub(crate) fn sources_mut(&mut self) -> Vec<&mut SourceSpec> {
        match self {
            Self::Convert(spec) => vec![&mut spec.source],
            Self::Compare(spec) => vec![&mut spec.first, &mut spec.second],
            Self::Audit(spec) => [&mut spec.source].into_iter().chain(&mut spec.against).collect(),
            Self::Measure(spec) => spec.source.iter_mut().collect(),
            Self::Create(_)
            | Self::Check(_)
            | Self::Resize(_)
            | Self::Promote(_)
            | Self::Consolidate(_)
            | Self::Backup(_)
            | Self::Restore(_) => Vec::new(),
        }
    }

    /// The other files.
    fn own_files(&self) -> Vec<&Path> {
        match self {
            Self::Create(spec) => vec![&spec.file],
            Self::Convert(spec) => vec![&spec.target],
            Self::Check(spec) => vec![&spec.file],
            Self::Resize(spec) => vec![&spec.file],
            Self::Promote(spec) => vec![&spec.target],
            Self::Restore(spec) => vec![&spec.target],
            Self::Compare(_) | Self::Audit(_) | Self::Measure(_) | Self::Consolidate(_) | Self::Backup(_) => Vec::new(),
        }
    }

    /// All files that must not be in use.
    pub(crate) fn files_to_lock(&self) -> Vec<PathBuf> {
        let shared = matches!(self, Self::Check(spec) if spec.force_share && spec.repair.is_none());
        let own = self.own_files().into_iter().filter(|_| !shared);
        let sources = self.sources().into_iter().filter(|s| s.disk.is_none() && !s.force_share);
        own.map(Path::to_owned).chain(sources.map(|s| s.file.clone())).collect()
    }
}

/// Each kind as one flat object: a description made of parts would contradict the parts' `additionalProperties`.
impl PartialSchema for JobKind {
    fn schema() -> RefOr<Schema> {
        let kinds = [
            ("create", CreateSpec::schema()),
            ("convert", ConvertSpec::schema()),
            ("compare", CompareSpec::schema()),
            ("audit", AuditSpec::schema()),
            ("check", CheckSpec::schema()),
            ("measure", MeasureSpec::schema()),
            ("resize", ResizeSpec::schema()),
            ("promote", PromoteSpec::schema()),
            ("consolidate", ConsolidateSpec::schema()),
            ("backup", BackupSpec::schema()),
            ("restore", RestoreSpec::schema()),
        ];
        let mut one_of = OneOfBuilder::new().description(Some("What a job is to do. Paths are absolute."));
        for (word, schema) in kinds {
            let RefOr::T(Schema::Object(mut object)) = schema else { continue };
            let tag = ObjectBuilder::new().schema_type(Type::String).enum_values(Some([word]));
            object.properties.insert("job".to_owned(), tag.into());
            object.required.insert(0, "job".to_owned());
            one_of = one_of.item(Schema::Object(object));
        }
        one_of.into()
    }
}

impl ToSchema for JobKind {
    fn schemas(schemas: &mut Vec<(String, RefOr<Schema>)>) {
        CreateSpec::schemas(schemas);
        ConvertSpec::schemas(schemas);
        CompareSpec::schemas(schemas);
        AuditSpec::schemas(schemas);
        CheckSpec::schemas(schemas);
        MeasureSpec::schemas(schemas);
        ResizeSpec::schemas(schemas);
        PromoteSpec::schemas(schemas);
        ConsolidateSpec::schemas(schemas);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_in_jobs_are_absolute() {
        for (job, good) in [
            (r#"{"job":"create","file":"/x/a.raw","format":"raw","size":1}"#, true),
            (r#"{"job":"create","file":"a.raw","format":"raw","size":1}"#, false),
            (r#"{"job":"convert","source":{"file":"/x/a.raw"},"target":"b.raw","format":"raw"}"#, false),
            (r#"{"job":"convert","source":{"file":"a.raw"},"target":"/x/b.raw","format":"raw"}"#, false),
            (r#"{"job":"convert","source":{"disk":"d"},"target":"/x/b.raw","format":"raw"}"#, true),
            (r#"{"job":"convert","source":{"disk":"d","file":"/x"},"target":"/x/b.raw","format":"raw"}"#, false),
            (r#"{"job":"convert","source":{},"target":"/x/b.raw","format":"raw"}"#, false),
            (r#"{"job":"compare","first":{"file":"/a"},"second":{"file":"b"}}"#, false),
            (r#"{"job":"measure","source":{"file":"b"},"format":"raw"}"#, false),
            (r#"{"job":"check","file":"b"}"#, false),
            (r#"{"job":"resize","file":"b","size":{"to":1}}"#, false),
        ] {
            let kind: JobKind = serde_json::from_str(job).unwrap_or_else(|e| panic!("{job}: {e}"));
            assert_eq!(kind.validate().is_ok(), good, "{job}");
        }
    }
}
