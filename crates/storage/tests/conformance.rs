//! The suite that every storage runs, on files and on a block device.

use dataplane::{Backend, block_on};
use disk::StorageHandle;
use std::cell::Cell;
use std::path::Path;
use std::process::Command;
use storage::{CacheMode, FileStorage, OpenOptions};

const BACKENDS: [Backend; 2] = [Backend::Uring, Backend::Threads];
const CACHES: [CacheMode; 3] = [CacheMode::None, CacheMode::Writeback, CacheMode::Unsafe];

#[test]
fn files() {
    for backend in BACKENDS {
        for cache in CACHES {
            let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a directory");
            let count = Cell::new(0);
            let make = |size| {
                count.set(count.get() + 1);
                let path = dir.path().join(count.get().to_string());
                let options = OpenOptions { cache, ..OpenOptions::create_new(size) };
                async move { StorageHandle::new(FileStorage::open(path, &options).expect("create")) }
            };
            block_on(backend, testkit::conformance::storage(make)).expect("the backend works here");
        }
    }
}

/// A loop device on a sparse file.
struct Loop(String);

impl Loop {
    /// `None` where loop devices cannot be made.
    fn new(file: &Path, size: u64) -> Option<Self> {
        std::fs::File::create(file).and_then(|f| f.set_len(size)).expect("a file");
        match Command::new("losetup").args(["--find", "--show", "--direct-io=on"]).arg(file).output() {
            Ok(made) if made.status.success() => {
                Some(Self(String::from_utf8(made.stdout).expect("a device's name").trim().to_owned()))
            }
            other => {
                println!("skipped: losetup (needs root): {other:?}");
                None
            }
        }
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let detached = Command::new("losetup").args(["--detach", &self.0]).status().expect("losetup");
        assert!(detached.success(), "{} stays", self.0);
    }
}

#[test]
fn block_devices() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a directory");
    for backend in BACKENDS {
        for cache in CACHES {
            let loops = std::cell::RefCell::new(Vec::new());
            let count = Cell::new(0);
            let Some(probe) = Loop::new(&dir.path().join("probe"), 1 << 20) else { return };
            drop(probe);
            let make = |size: u64| {
                count.set(count.get() + 1);
                let file = dir.path().join(format!("{backend:?}{cache:?}{}", count.get()));
                let device = Loop::new(&file, size).expect("the first one worked");
                let options = OpenOptions { cache, ..OpenOptions::default() };
                let storage = FileStorage::open(&device.0, &options).expect("open");
                loops.borrow_mut().push(device);
                async move {
                    assert!(storage.is_block_device());
                    StorageHandle::new(storage)
                }
            };
            block_on(backend, testkit::conformance::storage(make)).expect("the backend works here");
        }
    }
}
