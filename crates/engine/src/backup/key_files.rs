//! Where generated keys are kept: one file for each repository, for this user alone.

use super::user_directories;
use crate::{EngineError, durable_file};
use repository::Id;
use std::fs::{self, DirBuilder, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

pub(super) fn directory() -> PathBuf {
    user_directories::config().join("keys")
}

/// The file of a repository's generated key.
pub(super) fn of(id: Id) -> PathBuf {
    directory().join(format!("{id}.key"))
}

/// Writes a new key, durably, so that no repository exists whose key was lost with the machine's power. Blocks.
pub(super) fn write_new(file: &Path, text: &str) -> Result<(), EngineError> {
    let failed = |e| EngineError::file(file, "write the key", e);
    if let Some(directory) = file.parent().filter(|directory| !directory.as_os_str().is_empty()) {
        // Directories that are made for it must be as durable as the key.
        let new: Vec<&Path> = directory.ancestors().take_while(|above| !above.exists()).collect();
        DirBuilder::new().recursive(true).mode(0o700).create(directory).map_err(failed)?;
        new.into_iter().rev().try_for_each(durable_file::sync_directory_of).map_err(failed)?;
    }
    let mut new = OpenOptions::new().write(true).create_new(true).mode(0o600).open(file).map_err(failed)?;
    let written = new.write_all(text.as_bytes()).and_then(|()| new.sync_all());
    written.and_then(|()| durable_file::sync_directory_of(file)).map_err(|e| {
        let _ = fs::remove_file(file); // It opens nothing yet, and would be in the way of the next try.
        failed(e)
    })
}

/// Gives a key its name. Blocks.
pub(super) fn rename(from: &Path, to: &Path) -> Result<(), EngineError> {
    let renamed = fs::rename(from, to).and_then(|()| durable_file::sync_directory_of(to));
    renamed.map_err(|e| EngineError::file(from, "rename the key", e))
}
