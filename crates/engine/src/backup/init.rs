//! Making a repository, so that there is never one whose key is lost.

use super::key_files;
use super::place::{RepositorySpec, first_line, read_secret};
use crate::EngineError;
use repository::{Host, Id, Repository, RepositoryError, Settings, Stretch, SystemHost, Unlock, new_key_file};
use serde::{Deserialize, Serialize};
use std::ffi::OsStr;
use std::fs::{self, File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use utoipa::ToSchema;

/// What opens a new repository.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FirstKey {
    /// A generated key, in a file where those of this user are kept.
    Generated,
    /// A generated key, in this file, which must not exist yet.
    KeyFile(PathBuf),
    /// The first line of this file.
    Passphrase(PathBuf),
    /// Nothing: it is not encrypted.
    Open,
}

/// A repository that is to be made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InitSpec {
    /// Absolute path of its directory, which is empty or does not exist.
    pub directory: PathBuf,
    /// What will open it.
    pub key: FirstKey,
    /// Bytes of a leaf: a power of two, 16 KiB to 1 MiB. 64 KiB when absent.
    pub leaf_size: Option<u64>,
    /// Bytes at which a pack is full, at most 64 MiB. 32 MiB when absent.
    pub pack_size: Option<u64>,
}

/// A repository that was made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub struct InitReport {
    /// Its directory.
    #[schema(value_type = String)]
    pub directory: PathBuf,
    /// Its random name.
    pub id: String,
    /// Whether it is encrypted.
    pub encrypted: bool,
    /// Bytes of a leaf.
    pub leaf_size: u64,
    /// Bytes at which a pack is full.
    pub pack_size: u64,
    /// The file with the generated key, if one was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub key_file: Option<PathBuf>,
}

impl InitSpec {
    fn settings(&self) -> Result<Settings, EngineError> {
        let usual = Settings::default();
        let size = |wanted: Option<u64>, usual: u32| match wanted {
            None => Ok(usual),
            Some(bytes) => u32::try_from(bytes).map_err(|_| {
                EngineError::Invalid(format!("{bytes} bytes are too much for a leaf or a pack; choose another size"))
            }),
        };
        Ok(Settings {
            leaf_bytes: size(self.leaf_size, usual.leaf_bytes)?,
            pack_bytes: size(self.pack_size, usual.pack_bytes)?,
            encrypted: self.key != FirstKey::Open,
        })
    }
}

/// Makes a repository. Blocks.
///
/// Crash: the key's file is durable, under the name `new-RANDOM.key`, before anything of the repository is. Before `config` is put there is
/// no repository; the file opens nothing then, and the next `init` removes the key object that may have been put. After it, and before the file is
/// renamed, the repository is there, and `--key-file …/new-RANDOM.key` opens it: the key itself is never written twice and never removed, a rename within
/// one directory loses no file. After the rename it is found by itself. A file that the user has named is not renamed at all.
///
/// # Errors
/// When something is in the directory, or a key cannot be written, or the store fails.
pub fn init(spec: &InitSpec) -> Result<InitReport, EngineError> {
    let settings = spec.settings()?;
    let place = RepositorySpec::of(&spec.directory);
    place.validate()?;
    // Before the store is opened: it tidies up, and that must not be in a directory of another kind.
    remains(&spec.directory)?;
    let passphrase = match &spec.key {
        FirstKey::Passphrase(file) => Some(passphrase(file)?),
        _ => None,
    };
    let store = place.store()?;
    let alone = alone(&spec.directory)?;
    let remains = remains(&spec.directory)?;
    if alone.is_some() {
        // Of an `init` that was cut off. A key that wraps another secret must not be counted among this repository's.
        for file in remains {
            fs::remove_file(&file).map_err(|e| EngineError::file(&file, "remove what `repo init` left", e))?;
        }
    }
    let (key, file) = match &spec.key {
        FirstKey::Open => (Unlock::Open, None),
        FirstKey::Passphrase(_) => (Unlock::Passphrase(passphrase.unwrap_or_default()), None),
        FirstKey::KeyFile(file) => generate(&place, file.clone())?,
        FirstKey::Generated => generate(&place, key_files::directory().join(format!("new-{}.key", random_name()?)))?,
    };
    let made = Repository::init(store.clone(), Arc::new(SystemHost), settings, &key, Stretch::default(), "first");
    let repository = made.map_err(|error| {
        // Only where it is certain that the key opens nothing.
        if let Some(file) = &file
            && matches!(Repository::look(&*store), Err(RepositoryError::NoRepository { .. }))
        {
            let _ = fs::remove_file(file);
        }
        place.failed(error)
    })?;
    let key_file = match (&spec.key, file) {
        (FirstKey::Generated, Some(first)) => {
            let last = key_files::of(repository.id());
            key_files::rename(&first, &last)?;
            Some(last)
        }
        (_, file) => file,
    };
    Ok(InitReport {
        directory: spec.directory.clone(),
        id: repository.id().to_string(),
        encrypted: settings.encrypted,
        leaf_size: settings.leaf_bytes.into(),
        pack_size: settings.pack_bytes.into(),
        key_file,
    })
}

/// Draws a key and writes it into a new file, durably.
pub(super) fn generate(place: &RepositorySpec, file: PathBuf) -> Result<(Unlock, Option<PathBuf>), EngineError> {
    if file.starts_with(&place.directory) {
        return Err(EngineError::Invalid(format!(
            "{}: a key within the repository that it opens protects nothing; name a file in another place",
            file.display()
        )));
    }
    let text = new_key_file(&SystemHost).map_err(|e| place.failed(e))?;
    match key_files::write_new(&file, &text) {
        Err(EngineError::File { source, .. }) if source.kind() == io::ErrorKind::AlreadyExists => {
            Err(EngineError::Taken { file, what: "exists, and is not replaced by a new key; name another file" })
        }
        written => written.map(|()| (Unlock::KeyFile(text), Some(file))),
    }
}

/// A passphrase that somebody chose. Blocks.
pub(super) fn passphrase(file: &Path) -> Result<String, EngineError> {
    let text = first_line(&read_secret(file)?);
    if text.is_empty() {
        return Err(EngineError::Invalid(format!("{}: its first line, the passphrase, is empty", file.display())));
    }
    Ok(text)
}

fn random_name() -> Result<Id, EngineError> {
    let mut bytes = [0; 16];
    if !SystemHost.random(&mut bytes) {
        return Err(EngineError::Invalid("this machine gives no randomness, so there can be no key".to_owned()));
    }
    Ok(Id(bytes))
}

/// Keeps a second `init` out of the directory as long as it is held; `None` where the file system has no such locks.
fn alone(directory: &Path) -> Result<Option<File>, EngineError> {
    let opened = File::open(directory).map_err(|e| EngineError::file(directory, "open the directory", e))?;
    match opened.try_lock() {
        Ok(()) => Ok(Some(opened)),
        Err(TryLockError::WouldBlock) => Err(EngineError::Taken {
            file: directory.to_owned(),
            what: "another `repo init` is at work here; wait for it",
        }),
        Err(TryLockError::Error(_)) => Ok(None),
    }
}

/// The files in a directory for a new repository, which are of an `init` that was cut off: key objects, and what was not renamed yet. Anything else is
/// refused.
fn remains(directory: &Path) -> Result<Vec<PathBuf>, EngineError> {
    let taken = |what| Err(EngineError::Taken { file: directory.to_owned(), what });
    let failed = |e| EngineError::file(directory, "look into the directory", e);
    let mut files = Vec::new();
    let entries = match fs::read_dir(directory) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(files),
        Err(e) if e.kind() == io::ErrorKind::NotADirectory => {
            return taken("is no directory; name one that is empty or does not exist");
        }
        entries => entries.map_err(failed)?,
    };
    let entries: Vec<fs::DirEntry> = entries.collect::<io::Result<_>>().map_err(failed)?;
    if entries.iter().any(|entry| entry.file_name() == "config") {
        return taken("there is a repository here already; use it, or name another directory");
    }
    let mut all_ours = true;
    for entry in entries {
        match entry.file_type().map_err(failed)? {
            kind if kind.is_dir() && entry.file_name() == "keys" => {
                for key in fs::read_dir(entry.path()).map_err(failed)? {
                    let key = key.map_err(failed)?;
                    let name = key.file_name();
                    let is_key = name.to_str().is_some_and(|name| Id::parse(name).is_some());
                    all_ours &= (is_key || is_unfinished(&name)) && key.file_type().map_err(failed)?.is_file();
                    files.push(key.path());
                }
            }
            kind if kind.is_file() && is_unfinished(&entry.file_name()) => files.push(entry.path()),
            _ => all_ours = false,
        }
    }
    if all_ours { Ok(files) } else { taken("is not empty; name a directory that is empty or does not exist") }
}

/// Whether it is what a store in a directory has written and not renamed.
fn is_unfinished(name: &OsStr) -> bool {
    name.as_encoded_bytes().starts_with(b".new-")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(directory: PathBuf, key: FirstKey) -> InitSpec {
        InitSpec { directory, key, leaf_size: None, pack_size: None }
    }

    #[test]
    fn what_a_crash_leaves_is_no_obstacle() {
        let place = tempfile::tempdir().unwrap();
        let (directory, key) = (place.path().join("r"), place.path().join("key"));
        let open = |key_file: &Path| {
            RepositorySpec { key_file: Some(key_file.to_owned()), ..RepositorySpec::of(&directory) }.open()
        };
        init(&spec(directory.clone(), FirstKey::KeyFile(key.clone()))).unwrap();
        open(&key).unwrap();
        // Before `config`: a key that opens nothing.
        fs::remove_file(directory.join("config")).unwrap();
        fs::write(directory.join(".new-1-0-0"), "half of config").unwrap();
        assert!(matches!(open(&key), Err(EngineError::NoRepository { .. })));
        let refused = init(&spec(directory.clone(), FirstKey::KeyFile(key.clone()))).unwrap_err();
        assert!(refused.to_string().contains("not replaced by a new key"), "{refused}");
        let second = place.path().join("second");
        init(&spec(directory.clone(), FirstKey::KeyFile(second.clone()))).unwrap();
        assert_eq!(open(&second).unwrap().keys().unwrap().len(), 1);
        assert!(open(&key).is_err());
        assert!(!directory.join(".new-1-0-0").exists());
    }

    #[test]
    fn only_one_works_in_a_directory() {
        let place = tempfile::tempdir().unwrap();
        let held = alone(place.path()).unwrap().unwrap();
        let key = place.path().join("elsewhere/key");
        let refused = init(&spec(place.path().to_owned(), FirstKey::KeyFile(key.clone()))).unwrap_err();
        assert!(refused.to_string().contains("another `repo init`"), "{refused}");
        assert!(!key.exists());
        drop(held);
        init(&spec(place.path().to_owned(), FirstKey::Open)).unwrap();
    }

    #[test]
    fn nothing_foreign_is_touched() {
        let place = tempfile::tempdir().unwrap();
        for name in ["data", "keys/mine"] {
            let directory = place.path().join(name.replace('/', "-"));
            let file = directory.join(name);
            fs::create_dir_all(file.parent().unwrap()).unwrap();
            fs::write(&file, "x").unwrap();
            let refused = init(&spec(directory, FirstKey::Open)).unwrap_err();
            assert!(refused.to_string().contains("not empty"), "{refused}");
            assert!(file.exists());
        }
        let file = place.path().join("file");
        fs::write(&file, "x").unwrap();
        assert!(init(&spec(file, FirstKey::Open)).unwrap_err().to_string().contains("no directory"));
    }

    #[test]
    fn a_key_of_a_failed_init_does_not_stay() {
        let place = tempfile::tempdir().unwrap();
        let (directory, key) = (place.path().join("r"), place.path().join("key"));
        let within = init(&spec(directory.clone(), FirstKey::KeyFile(directory.join("key")))).unwrap_err();
        assert!(within.to_string().contains("protects nothing"), "{within}");
        let bad = InitSpec { leaf_size: Some(5), ..spec(directory, FirstKey::KeyFile(key.clone())) };
        assert!(init(&bad).is_err());
        assert!(!key.exists());
    }
}
