//! Where a repository is, and what opens it.

use super::key_files;
use crate::EngineError;
use repository::{LocalStore, Repository, Store, SystemHost, Unlock};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::{fs, io};
use utoipa::ToSchema;

/// A repository, and where its key is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct RepositorySpec {
    /// Absolute path of its directory.
    #[schema(value_type = String)]
    pub directory: PathBuf,
    /// Absolute path of a key file. Without it and a passphrase, the key that was generated for the repository is looked for where
    /// it was put.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub key_file: Option<PathBuf>,
    /// Absolute path of a file whose first line is a passphrase.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub passphrase_file: Option<PathBuf>,
}

impl RepositorySpec {
    /// Of this directory, with the generated key.
    pub fn of(directory: impl Into<PathBuf>) -> Self {
        Self { directory: directory.into(), key_file: None, passphrase_file: None }
    }

    /// Checks what can be checked without opening anything.
    ///
    /// # Errors
    /// [`EngineError::Invalid`].
    pub fn validate(&self) -> Result<(), EngineError> {
        if self.key_file.is_some() && self.passphrase_file.is_some() {
            return Err(EngineError::Invalid("a key file and a passphrase are given; one of them opens".to_owned()));
        }
        let files = [Some(&self.directory), self.key_file.as_ref(), self.passphrase_file.as_ref()];
        files.into_iter().flatten().try_for_each(|file| crate::images::request::require_absolute(file))
    }

    /// Opens it. Blocks.
    ///
    /// # Errors
    /// When there is none, it is damaged, or the key does not open it.
    pub fn open(&self) -> Result<Repository, EngineError> {
        // Before the store is opened: it tidies up, and that must not be in a directory of another kind.
        let config = self.directory.join("config");
        match fs::symlink_metadata(&config) {
            Ok(_) => {}
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                return Err(EngineError::NoRepository { directory: self.directory.clone() });
            }
            Err(e) => return Err(EngineError::file(config, "look for the repository", e)),
        }
        let store = self.store()?;
        let key = self.key(&*store)?;
        Repository::open(store, Arc::new(SystemHost), &key).map_err(|e| self.failed(e))
    }

    pub(super) fn store(&self) -> Result<Arc<dyn Store>, EngineError> {
        let store = LocalStore::open(&self.directory)
            .map_err(|e| EngineError::file(&self.directory, "open the repository", io::Error::other(e)))?;
        Ok(Arc::new(store))
    }

    /// Its error, with the place.
    pub(crate) fn failed(&self, source: repository::RepositoryError) -> EngineError {
        EngineError::Repository { directory: self.directory.clone(), source: Box::new(source) }
    }

    fn key(&self, store: &dyn Store) -> Result<Unlock, EngineError> {
        if let Some(file) = &self.key_file {
            return Ok(Unlock::KeyFile(read_secret(file)?));
        }
        if let Some(file) = &self.passphrase_file {
            return Ok(Unlock::Passphrase(first_line(&read_secret(file)?)));
        }
        let (id, settings) = Repository::look(store).map_err(|e| self.failed(e))?;
        if !settings.encrypted {
            return Ok(Unlock::Open);
        }
        let file = key_files::of(id);
        match read_secret(&file) {
            Err(EngineError::File { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                Err(EngineError::Invalid(format!(
                    "{}: is encrypted, and its key is not in {}; give --key-file (a file new-….key beside it, if `repo init` was cut \
                     off) or --passphrase-file",
                    self.directory.display(),
                    file.display()
                )))
            }
            read => Ok(Unlock::KeyFile(read?)),
        }
    }
}

/// The text of a file with a secret. Blocks.
pub(super) fn read_secret(file: &Path) -> Result<String, EngineError> {
    const LARGEST: u64 = 64 << 10;
    let failed = |e| EngineError::file(file, "read the key", e);
    if fs::metadata(file).map_err(failed)?.len() > LARGEST {
        return Err(EngineError::Invalid(format!("{}: is no key, it has more than 64 KiB", file.display())));
    }
    fs::read_to_string(file).map_err(failed)
}

pub(super) fn first_line(text: &str) -> String {
    text.lines().next().unwrap_or_default().to_owned()
}
