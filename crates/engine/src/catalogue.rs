//! The list of disks that survives a restart: one JSON file in the state directory, replaced as a whole.

use crate::{DiskSpec, EngineError, durable_file};
use rustix::fs::{FlockOperation, Mode, OFlags, flock, open};
use serde::{Deserialize, Serialize};
use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

/// The layout that this version writes.
const VERSION: u32 = 1;
/// No honest catalogue is larger: 64 MiB are some 200,000 disks.
const LARGEST: u64 = 64 << 20;

#[derive(Serialize, Deserialize)]
struct Contents {
    version: u32,
    disks: Vec<DiskSpec>,
}

/// The catalogue of one daemon.
#[derive(Debug)]
pub struct Catalogue {
    file: PathBuf,
    /// Held while the daemon lives, so that two daemons never share a catalogue.
    _lock: OwnedFd,
}

impl Catalogue {
    /// Opens the catalogue in `directory`, which is made if need be, and returns the disks it lists.
    ///
    /// # Errors
    /// When another daemon uses the directory, or the file is there but cannot be understood: it is never
    /// taken for an empty one.
    pub fn open(directory: &Path) -> Result<(Self, Vec<DiskSpec>), EngineError> {
        let failed = |doing| move |e: io::Error| EngineError::file(directory, doing, e);
        fs::create_dir_all(directory).map_err(failed("make the state directory"))?;
        let lock_file = directory.join("lock");
        let lock = open(&lock_file, OFlags::CREATE | OFlags::RDWR | OFlags::CLOEXEC, Mode::RUSR | Mode::WUSR)
            .map_err(|e| EngineError::file(&lock_file, "open the lock", e.into()))?;
        flock(&lock, FlockOperation::NonBlockingLockExclusive).map_err(|e| match e {
            rustix::io::Errno::WOULDBLOCK => EngineError::Catalogue {
                file: directory.to_owned(),
                reason: "another daemon uses this state directory; stop it or give another with --state".to_owned(),
            },
            other => EngineError::file(&lock_file, "lock", other.into()),
        })?;
        let catalogue = Self { file: directory.join("catalogue.json"), _lock: lock };
        let disks = catalogue.read()?;
        Ok((catalogue, disks))
    }

    fn read(&self) -> Result<Vec<DiskSpec>, EngineError> {
        let refuse = |reason: String| EngineError::Catalogue { file: self.file.clone(), reason };
        match fs::metadata(&self.file) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(e) => return Err(EngineError::file(&self.file, "read the catalogue", e)),
            Ok(facts) if facts.len() > LARGEST => {
                return Err(refuse(format!("expected at most {LARGEST} bytes, found {}", facts.len())));
            }
            Ok(_) => {}
        }
        let bytes = fs::read(&self.file).map_err(|e| EngineError::file(&self.file, "read the catalogue", e))?;
        #[derive(Deserialize)]
        struct Versioned {
            version: u32,
        }
        let broken = |e: serde_json::Error| refuse(format!("not understood ({e}); restore it or move it away"));
        let Versioned { version } = serde_json::from_slice(&bytes).map_err(broken)?;
        if version != VERSION {
            return Err(refuse(format!("expected version {VERSION}, found {version}; use the newer highwater")));
        }
        let contents: Contents = serde_json::from_slice(&bytes).map_err(broken)?;
        Ok(contents.disks)
    }

    /// Replaces the list. Durable when it returns; on failure the old list stands.
    ///
    /// # Errors
    /// When the operating system cannot write, sync or rename.
    pub fn replace(&self, disks: Vec<DiskSpec>) -> Result<(), EngineError> {
        self.try_replace(disks).map_err(|e| EngineError::file(&self.file, "replace the catalogue", e))
    }

    fn try_replace(&self, disks: Vec<DiskSpec>) -> io::Result<()> {
        let mut bytes = serde_json::to_vec_pretty(&Contents { version: VERSION, disks })?;
        bytes.push(b'\n');
        durable_file::replace(&self.file, &bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(name: &str) -> DiskSpec {
        serde_json::from_value(serde_json::json!({"name": name, "image": {"file": format!("/x/{name}.raw")}})).unwrap()
    }

    #[test]
    fn survives_reopening() {
        let dir = tempfile::tempdir().unwrap();
        let state = dir.path().join("a/b");
        let (catalogue, disks) = Catalogue::open(&state).unwrap();
        assert!(disks.is_empty());
        catalogue.replace(vec![spec("one"), spec("two")]).unwrap();
        assert!(
            matches!(Catalogue::open(&state), Err(EngineError::Catalogue { .. })),
            "a second daemon got the same state directory"
        );
        drop(catalogue);
        let (_catalogue, disks) = Catalogue::open(&state).unwrap();
        assert_eq!(disks, vec![spec("one"), spec("two")]);
    }

    #[test]
    fn what_is_not_understood_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        for (text, word) in [
            ("", "not understood"),
            ("{\"version\":1}", "not understood"),
            ("{\"version\":2,\"disks\":[]}", "found 2"),
            ("{\"version\":1,\"disks\":[{\"name\":\"a\"}]}", "image"),
        ] {
            fs::write(dir.path().join("catalogue.json"), text).unwrap();
            let error = Catalogue::open(dir.path()).unwrap_err().to_string();
            assert!(error.contains(word), "{text:?}: {error}");
        }
    }
}
