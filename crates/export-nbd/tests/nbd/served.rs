//! A disk in memory, served in this process on a temporary unix socket.

use crate::memory_disk::MemoryDisk;
use dataplane::{Backend, IoThread, IoThreads, IoThreadsConfig};
use disk::DiskHandle;
use export_nbd::{Export, ExportStats, Server, ServerConfig, Tls};
use std::cell::RefCell;
use std::collections::HashMap;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use tempfile::TempDir;

thread_local! {
    static DISKS: RefCell<HashMap<u64, Rc<MemoryDisk>>> = RefCell::default();
}

static NEXT: AtomicU64 = AtomicU64::new(0);

pub(crate) const MIB: u64 = 1 << 20;

/// How to serve.
pub(crate) struct Setup {
    pub(crate) size: u64,
    pub(crate) backend: Backend,
    pub(crate) config: ServerConfig,
    pub(crate) tls: Tls,
    /// Changes the disk before it is served.
    pub(crate) prepare: fn(&mut MemoryDisk),
    /// Changes the export before it is added.
    pub(crate) export: fn(&mut Export),
}

impl Default for Setup {
    fn default() -> Self {
        Self {
            size: 64 * MIB,
            backend: Backend::Auto,
            config: ServerConfig::default(),
            tls: Tls::Off,
            prepare: |_| {},
            export: |_| {},
        }
    }
}

/// A server with the export "disk". Ends when dropped.
pub(crate) struct Served {
    pub(crate) server: Server,
    pub(crate) stats: Arc<ExportStats>,
    pub(crate) home: IoThread,
    number: u64,
    directory: TempDir,
    _threads: IoThreads,
}

impl Served {
    pub(crate) fn new(setup: Setup) -> Self {
        // Two threads, so that connections move from one to the other.
        let threads = IoThreads::start(IoThreadsConfig { threads: 2, backend: setup.backend }).unwrap();
        let home = threads.all()[1].clone();
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let Setup { size, prepare, .. } = setup;
        let put = home.spawn(move || async move {
            let mut disk = MemoryDisk::new(size);
            prepare(&mut disk);
            DISKS.with_borrow_mut(|disks| disks.insert(number, Rc::new(disk)));
        });
        put.wait().unwrap();
        let server = Server::new(setup.config, threads.all());
        let mut export = Export::new("disk", home.clone(), Arc::new(move || find(number).map(DiskHandle::from_rc)));
        (setup.export)(&mut export);
        let stats = Arc::clone(&export.stats);
        server.add_export(export).unwrap();
        let directory = tempfile::tempdir().unwrap();
        server.listen_unix(&directory.path().join("socket"), setup.tls).unwrap();
        Self { server, stats, home, number, directory, _threads: threads }
    }

    /// A server with nothing special.
    pub(crate) fn plain() -> Self {
        Self::new(Setup::default())
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.directory.path().join("socket")
    }

    /// A path for a file of the test.
    pub(crate) fn file(&self, name: &str) -> String {
        self.directory.path().join(name).to_str().unwrap().to_owned()
    }

    pub(crate) fn uri(&self) -> String {
        format!("nbd+unix:///disk?socket={}", self.socket().display())
    }

    /// Looks at the disk, on its thread.
    pub(crate) fn with_disk<R: Send + 'static>(&self, look: impl FnOnce(&MemoryDisk) -> R + Send + 'static) -> R {
        let number = self.number;
        self.home.spawn(move || async move { look(&find(number).unwrap()) }).wait().unwrap()
    }

    /// Finds the disk, on its thread.
    pub(crate) fn disk_source(&self) -> impl Fn() -> Option<DiskHandle> + Send + use<> {
        let number = self.number;
        move || find(number).map(DiskHandle::from_rc)
    }

    /// Closes the disk as far as clients are concerned.
    pub(crate) fn forget_disk(&self) {
        let number = self.number;
        let forget = self.home.spawn(move || async move { DISKS.with_borrow_mut(|disks| drop(disks.remove(&number))) });
        forget.wait().unwrap();
    }

    /// Waits until `condition` holds; the test's runner ends a test that waits for ever.
    pub(crate) fn wait_until(&self, mut condition: impl FnMut(&Self) -> bool) {
        while !condition(self) {
            std::thread::sleep(std::time::Duration::from_millis(2));
        }
    }
}

fn find(number: u64) -> Option<Rc<MemoryDisk>> {
    DISKS.with_borrow(|disks| disks.get(&number).cloned())
}
