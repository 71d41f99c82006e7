//! A store in a directory.

use crate::store::{Object, Store, StoreError, StoreErrorKind, check_name};
use rustix::fs::{RenameFlags, renameat_with};
use std::fs::{self, DirBuilder, File};
use std::io::{self, Write};
use std::ops::Range;
use std::os::unix::fs::{DirBuilderExt, FileExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::UNIX_EPOCH;

/// Objects as files below one directory. Several processes may use it at once.
///
/// Crash: an object is written to `.new-…` beside its place, synced, renamed into it (without replacing, for `put_new`), and the
/// directory is synced. Before the rename nothing has the name; after it the content is whole. What a crash leaves as `.new-…` is no object, and is
/// removed by `open` when it is a day old.
#[derive(Debug)]
pub struct LocalStore {
    root: PathBuf,
    counter: AtomicU64,
}

const STALE_SECONDS: u64 = 24 * 3600;

impl LocalStore {
    /// Opens the directory, and makes it if there is none.
    pub fn open(root: impl Into<PathBuf>) -> Result<LocalStore, StoreError> {
        let root = root.into();
        make_directory(&root).map_err(|e| told(&root, &e))?;
        let store = LocalStore { root, counter: AtomicU64::new(0) };
        store.walk(&store.root, &mut |path, stale| {
            if stale
                && fs::metadata(path)
                    .and_then(|m| m.modified())
                    .is_ok_and(|t| t.elapsed().is_ok_and(|age| age.as_secs() > STALE_SECONDS))
            {
                let _ = fs::remove_file(path); // If it stays, nobody takes it for an object.
            }
            Ok(())
        })?;
        Ok(store)
    }

    fn path(&self, name: &str) -> Result<PathBuf, StoreError> {
        if !check_name(name) {
            return Err(StoreError::new(StoreErrorKind::Other, format!("{name:?} cannot be the name of an object")));
        }
        Ok(self.root.join(name))
    }

    fn write(&self, name: &str, content: &[u8], replace: bool) -> Result<(), StoreError> {
        let path = self.path(name)?;
        let directory = path.parent().unwrap_or(&self.root).to_path_buf();
        let run = || -> io::Result<()> {
            make_directory(&directory)?;
            let number = self.counter.fetch_add(1, Ordering::Relaxed);
            let temporary = directory.join(format!(".new-{}-{number}-{:p}", std::process::id(), self));
            let written = (|| {
                let mut file = File::create_new(&temporary)?;
                file.write_all(content)?;
                file.sync_all()?;
                if replace {
                    return fs::rename(&temporary, &path);
                }
                let here = rustix::fs::CWD;
                match renameat_with(here, &temporary, here, &path, RenameFlags::NOREPLACE) {
                    // File systems without that flag (NFS) have hard links, which do not replace either.
                    Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOSYS) => {
                        fs::hard_link(&temporary, &path)?;
                        fs::remove_file(&temporary)
                    }
                    other => other.map_err(io::Error::from),
                }
            })();
            if written.is_err() {
                let _ = fs::remove_file(&temporary); // Told is the first failure.
            }
            written?;
            File::open(&directory)?.sync_all()
        };
        run().map_err(|e| told(&path, &e))
    }

    fn walk(
        &self,
        directory: &Path,
        each: &mut dyn FnMut(&Path, bool) -> Result<(), StoreError>,
    ) -> Result<(), StoreError> {
        let entries = match fs::read_dir(directory) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
            other => other.map_err(|e| told(directory, &e))?,
        };
        for entry in entries {
            let entry = entry.map_err(|e| told(directory, &e))?;
            let path = entry.path();
            let hidden = entry.file_name().as_encoded_bytes().starts_with(b".");
            match entry.file_type() {
                Ok(kind) if kind.is_dir() && !hidden => self.walk(&path, each)?,
                Ok(kind) if kind.is_file() => each(&path, hidden)?,
                _ => {} // Links and the like are none of ours; what has gone meanwhile is no object.
            }
        }
        Ok(())
    }
}

/// Makes a directory and those above it, each durable in the one above.
fn make_directory(path: &Path) -> io::Result<()> {
    if path.is_dir() {
        return Ok(());
    }
    if let Some(above) = path.parent().filter(|p| !p.as_os_str().is_empty()) {
        make_directory(above)?;
    }
    // For this user alone: what is not encrypted is a disk for all to read.
    match DirBuilder::new().mode(0o700).create(path) {
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
        other => other?,
    }
    let above = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(above)?.sync_all()
}

fn told(path: &Path, error: &io::Error) -> StoreError {
    let kind = match error.kind() {
        io::ErrorKind::NotFound => StoreErrorKind::Missing,
        io::ErrorKind::AlreadyExists => StoreErrorKind::Exists,
        _ => StoreErrorKind::Other,
    };
    StoreError::new(kind, format!("{}: {error}", path.display()))
}

fn told_object(name: &str, metadata: &fs::Metadata) -> Object {
    let put_ms =
        metadata.modified().ok().and_then(|t| t.duration_since(UNIX_EPOCH).ok()).map_or(0, |d| d.as_millis() as u64);
    Object { name: name.to_owned(), length: metadata.len(), put_ms }
}

impl Store for LocalStore {
    fn read(&self, name: &str, range: Range<u64>) -> Result<Vec<u8>, StoreError> {
        let path = self.path(name)?;
        let run = || -> io::Result<Vec<u8>> {
            let file = File::open(&path)?;
            let end = range.end.min(file.metadata()?.len());
            let mut bytes = vec![0; end.saturating_sub(range.start) as usize];
            file.read_exact_at(&mut bytes, range.start)?;
            Ok(bytes)
        };
        run().map_err(|e| told(&path, &e))
    }

    fn read_all(&self, name: &str, limit: u64) -> Result<Vec<u8>, StoreError> {
        let length = self.look(name)?.length;
        if length > limit {
            return Err(StoreError::new(
                StoreErrorKind::TooLarge,
                format!("{name}: {length} bytes, at most {limit} expected"),
            ));
        }
        self.read(name, 0..length)
    }

    fn look(&self, name: &str) -> Result<Object, StoreError> {
        let path = self.path(name)?;
        let metadata = fs::metadata(&path).map_err(|e| told(&path, &e))?;
        if !metadata.is_file() {
            return Err(StoreError::new(StoreErrorKind::Missing, format!("{}: not a file", path.display())));
        }
        Ok(told_object(name, &metadata))
    }

    fn put_new(&self, name: &str, content: &[u8]) -> Result<(), StoreError> {
        self.write(name, content, false)
    }

    fn put(&self, name: &str, content: &[u8]) -> Result<(), StoreError> {
        self.write(name, content, true)
    }

    fn list(&self, prefix: &str, each: &mut dyn FnMut(Object)) -> Result<(), StoreError> {
        let from = match prefix.strip_suffix('/') {
            Some(folder) => self.path(folder)?,
            None => self.root.clone(),
        };
        self.walk(&from, &mut |path, hidden| {
            let name = path.strip_prefix(&self.root).ok().and_then(Path::to_str);
            if let (Some(name), false) = (name, hidden)
                && check_name(name)
                && let Ok(metadata) = fs::metadata(path)
            {
                each(told_object(name, &metadata));
            }
            Ok(())
        })
    }

    fn delete(&self, name: &str) -> Result<(), StoreError> {
        let path = self.path(name)?;
        match fs::remove_file(&path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(e) => Err(told(&path, &e)),
            Ok(()) => {
                path.parent().map_or(Ok(()), |d| File::open(d).and_then(|d| d.sync_all())).map_err(|e| told(&path, &e))
            }
        }
    }

    fn retain(&self, name: &str, _: u64) -> Result<(), StoreError> {
        Err(StoreError::new(StoreErrorKind::Unsupported, format!("{name}: a directory cannot forbid removal")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn objects_are_whole_named_and_new() {
        let folder = tempfile::tempdir().unwrap();
        let store = LocalStore::open(folder.path().join("a/b")).unwrap();
        store.put_new("points/1", b"one").unwrap();
        assert_eq!(store.put_new("points/1", b"two").unwrap_err().kind, StoreErrorKind::Exists);
        assert_eq!(store.read_all("points/1", 3).unwrap(), b"one");
        assert_eq!(store.read_all("points/1", 2).unwrap_err().kind, StoreErrorKind::TooLarge);
        assert_eq!(store.read("points/1", 1..99).unwrap(), b"ne");
        assert_eq!(store.read("points/1", 7..9).unwrap(), b"");
        store.put("points/1", b"two").unwrap();
        assert_eq!(store.read_all("points/1", 3).unwrap(), b"two");
        fs::write(folder.path().join("a/b/points/.new-x"), b"left by a crash").unwrap();
        let mut names = Vec::new();
        store.list("points/", &mut |o| names.push((o.name, o.length))).unwrap();
        assert_eq!(names, [("points/1".to_owned(), 3)]);
        store.list("packs/", &mut |_| panic!("none")).unwrap();
        assert!(store.put("../x", b"").is_err());
        store.delete("points/1").unwrap();
        store.delete("points/1").unwrap();
        assert_eq!(store.look("points/1").unwrap_err().kind, StoreErrorKind::Missing);
        assert_eq!(store.look("points").unwrap_err().kind, StoreErrorKind::Missing);
    }
}
