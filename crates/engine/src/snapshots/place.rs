//! Where the files of a snapshot are, and the one step that puts them there.

use crate::{EngineError, Format, durable_file};
use rustix::fs::{CWD, RenameFlags, renameat_with};
use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// The files of one snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    /// The disk before.
    pub(crate) disk: PathBuf,
    /// The frozen layer.
    pub(crate) frozen: PathBuf,
    /// The disk afterwards.
    pub(crate) top: PathBuf,
    /// The overlay while it is being made.
    pub(crate) fresh: PathBuf,
}

/// The file of that name with something behind it.
pub(super) fn beside(file: &Path, add: &str) -> PathBuf {
    let mut name = file.file_name().unwrap_or_default().to_owned();
    name.push(add);
    file.with_file_name(name)
}

/// `disk.qcow2` and `s1` give `disk@s1.qcow2`.
fn frozen_name(disk: &Path, snapshot: &str) -> PathBuf {
    let mut name: OsString = disk.file_stem().unwrap_or_default().to_owned();
    name.push("@");
    name.push(snapshot);
    if let Some(extension) = disk.extension() {
        name.push(".");
        name.push(extension);
    }
    disk.with_file_name(name)
}

fn is_same(a: &Path, b: &Path) -> bool {
    let identity = |path: &Path| fs::symlink_metadata(path).map(|facts| (facts.dev(), facts.ino()));
    matches!((identity(a), identity(b)), (Ok(a), Ok(b)) if a == b)
}

/// Puts a durable file in another one's place. Blocks.
///
/// The other one keeps a second name until the first is durable, so that there is a way back.
///
/// Crash: one rename, so the old file or the new one; and perhaps the second name, which the next exchange removes.
///
/// # Errors
/// When the name cannot be given, or made durable: then it leads to the old file again.
pub(crate) fn replace(fresh: &Path, file: &Path) -> Result<(), EngineError> {
    let failed = |error| EngineError::file(file, "exchange", error);
    let old = beside(file, ".old");
    match fs::remove_file(&old) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(error)),
        _ => fs::hard_link(file, &old).map_err(failed)?,
    }
    if let Err(error) = fs::rename(fresh, file) {
        let _gone = fs::remove_file(&old);
        return Err(failed(error));
    }
    let durable = durable_file::sync_directory_of(file);
    if durable.is_err()
        && let Err(error) = fs::rename(file, fresh).and_then(|()| fs::rename(&old, file))
    {
        tracing::error!(file = %file.display(), %error, "the old file is not back in its place");
    }
    let _gone = fs::remove_file(&old);
    durable.map_err(failed)
}

impl Place {
    /// Of a snapshot of that name, of a disk in that file (by its canonical path).
    pub(crate) fn of(disk: &Path, format: Format, snapshot: &str) -> Self {
        let (frozen, top) = match format {
            Format::Qcow2 => (frozen_name(disk, snapshot), disk.to_owned()),
            Format::Raw => (disk.to_owned(), disk.with_extension("qcow2")),
        };
        let fresh = beside(&top, ".new");
        Self { disk: disk.to_owned(), frozen, top, fresh }
    }

    /// Whether the disk keeps its file's name.
    pub(crate) fn keeps_name(&self) -> bool {
        self.top == self.disk
    }

    /// The name by which the overlay finds the frozen layer, which is in the same directory.
    ///
    /// # Errors
    /// When it is no UTF-8, as qcow2 has names.
    pub(crate) fn frozen_file_name(&self) -> Result<String, EngineError> {
        let name = self.frozen.file_name().and_then(|name| name.to_str());
        // A colon in the first part of a name would be read as a protocol's.
        match name.filter(|name| !name.contains(':')) {
            Some(name) => Ok(name.to_owned()),
            None => Err(EngineError::Invalid(format!(
                "{}: an overlay cannot record this name: it has a colon or is no UTF-8; rename the disk first",
                self.frozen.display()
            ))),
        }
    }

    /// Refuses a name that is taken. A second name of the disk's own file is what a crash has left of an earlier attempt.
    /// Blocks.
    ///
    /// # Errors
    /// When something else stands there.
    pub(crate) fn refuse_if_taken(&self) -> Result<(), EngineError> {
        let taken = match self.keeps_name() {
            true => &self.frozen,
            false => &self.top,
        };
        match fs::symlink_metadata(taken) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(EngineError::file(taken, "look for", error)),
            Ok(_) if self.keeps_name() && is_same(taken, &self.disk) => Ok(()),
            Ok(_) if self.keeps_name() => Err(EngineError::Taken {
                file: taken.clone(),
                what: "there is a file of this snapshot's name already; choose another name",
            }),
            Ok(_) => Err(EngineError::Taken {
                file: taken.clone(),
                what: "a raw disk goes on in a file of this name after its first snapshot, but there is one already; move it",
            }),
        }
    }

    /// Puts the overlay in the disk's place. Blocks.
    ///
    /// The overlay is durable, and the disk's file closed cleanly. First the disk's file gets its second name; then one
    /// rename takes the first name from it.
    ///
    /// Crash: before the rename reaches the disk, the name leads to the old file, of which nothing was written since;
    /// after it to the overlay, whose parent's name is durable with it (one directory) or before.
    ///
    /// # Errors
    /// When a name cannot be given, or made durable: then the disk's name leads to the old file again.
    pub(crate) fn enter(&self) -> Result<(), EngineError> {
        if !self.keeps_name() {
            // Nobody else may have come between.
            renameat_with(CWD, &self.fresh, CWD, &self.top, RenameFlags::NOREPLACE)
                .map_err(|e| EngineError::file(&self.top, "make", e.into()))?;
            return durable_file::sync_directory_of(&self.top).map_err(|error| {
                let _back = fs::remove_file(&self.top);
                EngineError::file(&self.top, "make its name durable", error)
            });
        }
        match fs::hard_link(&self.disk, &self.frozen) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists && is_same(&self.disk, &self.frozen) => {}
            linked => linked.map_err(|e| EngineError::file(&self.frozen, "make", e))?,
        }
        let renamed = durable_file::sync_directory_of(&self.disk).and_then(|()| fs::rename(&self.fresh, &self.disk));
        if let Err(error) = renamed {
            let _gone = fs::remove_file(&self.frozen);
            return Err(EngineError::file(&self.disk, "put the overlay in its place", error));
        }
        durable_file::sync_directory_of(&self.disk).map_err(|error| {
            // What is written to the overlay would be lost with its name.
            if let Err(error) = self.leave() {
                tracing::error!(disk = %self.disk.display(), %error, "the disk's old file is not back in its place");
            }
            EngineError::file(&self.disk, "make its name durable", error)
        })
    }

    /// Puts the old file back in its place; what was written to the overlay is lost. Blocks.
    ///
    /// Crash: one rename, so the overlay or the old file.
    ///
    /// # Errors
    /// When the system refuses.
    pub(crate) fn leave(&self) -> io::Result<()> {
        match self.keeps_name() {
            true => fs::rename(&self.frozen, &self.disk)?,
            false => fs::remove_file(&self.top)?,
        }
        durable_file::sync_directory_of(&self.disk)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_files() {
        let place = Place::of(Path::new("/vms/web.qcow2"), Format::Qcow2, "before-update");
        assert_eq!(place.frozen, Path::new("/vms/web@before-update.qcow2"));
        assert_eq!(place.fresh, Path::new("/vms/web.qcow2.new"));
        assert!(place.keeps_name());
        assert_eq!(Place::of(Path::new("/vms/disk"), Format::Qcow2, "a.b").frozen, Path::new("/vms/disk@a.b"));
        let raw = Place::of(Path::new("/vms/web.raw"), Format::Raw, "s");
        assert_eq!((raw.frozen.as_path(), raw.top.as_path()), (Path::new("/vms/web.raw"), Path::new("/vms/web.qcow2")));
        assert!(!raw.keeps_name());
        assert!(Place::of(Path::new("/vms/a:b.qcow2"), Format::Qcow2, "s").frozen_file_name().is_err());
    }

    #[test]
    fn a_file_takes_the_place_of_another() {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        fs::write(at("d"), "old").unwrap();
        fs::write(at("new"), "new").unwrap();
        fs::write(at("d.old"), "left by a crash").unwrap();
        replace(&at("new"), &at("d")).unwrap();
        assert_eq!(fs::read_to_string(at("d")).unwrap(), "new");
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1, "one file, under one name");
        assert!(replace(&at("missing"), &at("d")).is_err());
        assert_eq!(fs::read_to_string(at("d")).unwrap(), "new");
        assert!(!at("d.old").exists());
    }

    #[test]
    fn the_overlay_takes_the_place_and_gives_it_back() {
        let directory = std::env::temp_dir().join(format!("highwater-place-{}", std::process::id()));
        fs::create_dir(&directory).unwrap();
        let disk = directory.join("d.qcow2");
        let place = Place::of(&disk, Format::Qcow2, "s");
        let read = |path: &Path| fs::read_to_string(path).unwrap_or_default();
        fs::write(&disk, "old").unwrap();
        fs::write(&place.fresh, "overlay").unwrap();
        // As a crash leaves it after the first of two steps.
        fs::hard_link(&disk, &place.frozen).unwrap();
        place.refuse_if_taken().unwrap();
        place.enter().unwrap();
        assert_eq!((read(&disk).as_str(), read(&place.frozen).as_str()), ("overlay", "old"));
        assert!(!place.fresh.exists());
        assert!(matches!(place.refuse_if_taken(), Err(EngineError::Taken { .. })));
        place.leave().unwrap();
        assert_eq!(read(&disk), "old");
        assert!(!place.frozen.exists());
        fs::remove_dir_all(directory).unwrap();
    }
}
