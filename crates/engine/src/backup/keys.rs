//! The keys of a repository: listed, added, rotated, revoked.

use super::init::{generate, passphrase};
use super::key_files;
use super::place::{RepositorySpec, read_secret};
use crate::EngineError;
use repository::{Id, KeyInfo, KeyKind, Repository, RepositoryError, Stretch, SystemHost, Unlock};
use serde::{Deserialize, Serialize};
use std::fs;
use std::path::PathBuf;
use std::sync::Arc;
use utoipa::ToSchema;

/// What opens a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum KeyOpenedBy {
    /// Nothing is needed: the repository is not encrypted.
    Nothing,
    /// A key file.
    KeyFile,
    /// A passphrase.
    Passphrase,
}

impl KeyOpenedBy {
    /// The word for people.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Nothing => "nothing",
            Self::KeyFile => "key file",
            Self::Passphrase => "passphrase",
        }
    }
}

impl From<KeyKind> for KeyOpenedBy {
    fn from(kind: KeyKind) -> Self {
        match kind {
            KeyKind::Open => Self::Nothing,
            KeyKind::KeyFile => Self::KeyFile,
            KeyKind::Passphrase => Self::Passphrase,
        }
    }
}

/// A key of a repository.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub struct KeyReport {
    /// Its name.
    pub id: String,
    /// What opens it; absent when it is damaged.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub opened_by: Option<KeyOpenedBy>,
    /// What people call it.
    pub label: String,
    /// When it was made, in milliseconds since 1970; absent when it is damaged.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub time: Option<u64>,
    /// Why it opens nothing any more, if so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub damaged: Option<String>,
}

impl KeyReport {
    fn of(key: Result<KeyInfo, RepositoryError>) -> Result<Self, RepositoryError> {
        match key {
            Ok(KeyInfo { id, kind, label, created_ms }) => Ok(Self {
                id: id.to_string(),
                opened_by: Some(kind.into()),
                label,
                time: Some(created_ms),
                damaged: None,
            }),
            Err(RepositoryError::Damaged(damage)) => Ok(Self {
                id: damage.object.strip_prefix("keys/").unwrap_or_default().to_owned(),
                opened_by: None,
                label: String::new(),
                time: None,
                damaged: Some(super::care::reason(&RepositoryError::Damaged(damage))),
            }),
            Err(error) => Err(error),
        }
    }
}

/// What is to open a repository besides.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NewKey {
    /// A generated key, in this file, which must not exist yet.
    KeyFile(PathBuf),
    /// The first line of this file.
    Passphrase(PathBuf),
}

/// What became of a repository's keys.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub struct KeyChangeReport {
    /// The new key.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub added: Option<KeyReport>,
    /// The file that was made for it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub key_file: Option<PathBuf>,
    /// The key that is gone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub revoked: Option<String>,
    /// The file in which the key is looked for when none is named, if that opens nothing any more.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub lapsed_file: Option<PathBuf>,
}

/// All keys. Blocks.
///
/// # Errors
/// When the repository cannot be opened or read.
pub fn keys(spec: &RepositorySpec) -> Result<Vec<KeyReport>, EngineError> {
    list(spec, &spec.open()?)
}

/// Adds a key. Blocks.
///
/// # Errors
/// When the repository cannot be opened, the key's file exists, or the store fails.
pub fn add_key(spec: &RepositorySpec, new: &NewKey, label: &str) -> Result<KeyChangeReport, EngineError> {
    let repository = spec.open()?;
    let (added, key_file) = put(spec, &repository, new, |key| repository.add_key(key, Stretch::default(), label))?;
    Ok(KeyChangeReport { added: Some(added), key_file, revoked: None, lapsed_file: None })
}

/// Puts a new key in the place of `old`, which may be given by its first digits; the label stays unless there is a new one. Blocks.
///
/// Crash: the new key's file is durable before its object is, and the old key goes last: either opens until then.
///
/// # Errors
/// When the repository cannot be opened, there is no such key, the new key's file exists, or the store fails.
pub fn rotate_key(
    spec: &RepositorySpec,
    old: &str,
    new: &NewKey,
    label: Option<&str>,
) -> Result<KeyChangeReport, EngineError> {
    let repository = spec.open()?;
    let (old, report) = find(spec, &repository, old)?;
    let label = label.unwrap_or(&report.label);
    let rotate = |key: &Unlock| repository.rotate_key(old, key, Stretch::default(), label);
    let (added, key_file) = put(spec, &repository, new, rotate)?;
    let lapsed_file = lapsed_file(&repository, spec);
    Ok(KeyChangeReport { added: Some(added), key_file, revoked: Some(old.to_string()), lapsed_file })
}

/// Removes a key, which may be given by its first digits; never the last whole one. Blocks.
///
/// # Errors
/// When the repository cannot be opened, there is no such key, it is the last one, or the store fails.
pub fn revoke_key(spec: &RepositorySpec, id: &str) -> Result<KeyChangeReport, EngineError> {
    let repository = spec.open()?;
    let (id, _) = find(spec, &repository, id)?;
    repository.revoke_key(id).map_err(|e| spec.failed(e))?;
    let lapsed_file = lapsed_file(&repository, spec);
    Ok(KeyChangeReport { added: None, key_file: None, revoked: Some(id.to_string()), lapsed_file })
}

fn list(spec: &RepositorySpec, repository: &Repository) -> Result<Vec<KeyReport>, EngineError> {
    let listed = || repository.keys()?.into_iter().map(KeyReport::of).collect::<Result<_, _>>();
    listed().map_err(|e| spec.failed(e))
}

fn find(spec: &RepositorySpec, repository: &Repository, name: &str) -> Result<(Id, KeyReport), EngineError> {
    let mut fitting: Vec<KeyReport> = list(spec, repository)?;
    fitting.retain(|key| !name.is_empty() && key.id.starts_with(name));
    let invalid = |text| Err(EngineError::Invalid(format!("repository {}: {text}", spec.directory.display())));
    match (fitting.len(), fitting.pop()) {
        (1, Some(key)) => match Id::parse(&key.id) {
            Some(id) => Ok((id, key)),
            None => invalid(format!("{} is not the name of a key", key.id)),
        },
        (0, _) => invalid(format!("there is no key {name}; `highwater repo key list` shows all")),
        (n, _) => invalid(format!("the names of {n} keys begin with {name}; give more of it")),
    }
}

/// Makes the secret, and the key of it.
fn put(
    spec: &RepositorySpec,
    repository: &Repository,
    new: &NewKey,
    put: impl FnOnce(&Unlock) -> Result<KeyInfo, RepositoryError>,
) -> Result<(KeyReport, Option<PathBuf>), EngineError> {
    if !repository.settings().encrypted {
        return Err(EngineError::Invalid(format!(
            "repository {} is not encrypted, so a key would open nothing; make another one, and back up into it",
            spec.directory.display()
        )));
    }
    let (key, file) = match new {
        NewKey::KeyFile(file) => generate(spec, file.clone())?,
        NewKey::Passphrase(file) => (Unlock::Passphrase(passphrase(file)?), None),
    };
    put(&key).and_then(|info| Ok((KeyReport::of(Ok(info))?, file.clone()))).map_err(|error| {
        // Only where it is certain that it opens nothing: the key may have been put before the failure, and the old one be gone.
        if let Some(file) = file
            && opens(spec, &key) == Some(false)
        {
            let _ = fs::remove_file(file);
        }
        spec.failed(error)
    })
}

/// Whether a key opens the repository, if that can be told.
fn opens(spec: &RepositorySpec, key: &Unlock) -> Option<bool> {
    match Repository::open(spec.store().ok()?, Arc::new(SystemHost), key) {
        Ok(_) => Some(true),
        Err(RepositoryError::WrongKey { .. }) => Some(false),
        Err(_) => None,
    }
}

/// The file in which the key is looked for when none is named, if it is there and opens nothing any more.
fn lapsed_file(repository: &Repository, spec: &RepositorySpec) -> Option<PathBuf> {
    let file = key_files::of(repository.id());
    let text = read_secret(&file).ok()?;
    (opens(spec, &Unlock::KeyFile(text)) == Some(false)).then_some(file)
}
