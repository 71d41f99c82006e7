//! Files that are replaced as a whole.

use rustix::fs::{Mode, OFlags, fsync, open};
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::Path;

/// Replaces a file's content. A new version is written beside the old one, synced, renamed over it, and the directory
/// synced: after a crash the file is the old or the new one, never something between. Blocks.
pub(crate) fn replace(file: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut name = file.file_name().unwrap_or_default().to_owned();
    name.push(".tmp");
    let fresh = file.with_file_name(name);
    let mut new = File::create(&fresh)?;
    new.write_all(bytes)?;
    new.sync_all()?;
    fs::rename(&fresh, file)?;
    sync_directory_of(file)
}

/// Makes the names in a file's directory durable. Blocks.
pub(crate) fn sync_directory_of(file: &Path) -> io::Result<()> {
    let directory = file.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let directory = open(directory, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    Ok(fsync(directory)?)
}
