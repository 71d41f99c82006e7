//! The engine: disks by name, each with its home thread and its exports.

use crate::exports::{OpenExport, Servers};
use crate::home::{DiskId, Home};
use crate::images::report::{ImageInfo, MapEntry};
use crate::images::request::SourceSpec;
use crate::images::stack::{OpenRequest, Stack};
use crate::images::{self, Workshop};
use crate::jobs::{JobKind, JobStatus, Jobs};
use crate::metrics::{self, ExportCounters};
use crate::{
    Catalogue, DiskSpec, DiskState, DiskStatus, EngineError, Event, ExportSpec, ExportStatus, Format, chain_text,
    format_policy,
};
use dataplane::{Backend, IoThreads, IoThreadsConfig};
use disk::ByteRange;
use futures_channel::mpsc;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

/// Events that a reader may fall behind before it is cut off.
const EVENTS_BEHIND: usize = 1024;
/// Disks that one daemon takes.
const MOST_DISKS: usize = 4096;

/// How an engine is started.
#[derive(Clone, Debug)]
pub struct EngineConfig {
    /// I/O threads; 0 takes one per processor.
    pub threads: usize,
    /// What they run on.
    pub backend: Backend,
    /// Directory of the catalogue; without one nothing survives a restart.
    pub state: Option<PathBuf>,
    /// Unix socket of exports that name no address.
    pub nbd_socket: PathBuf,
}

/// A disk's facts since it was opened.
#[derive(Clone, Copy, Debug)]
struct Facts {
    format: Format,
    size: u64,
    read_only: bool,
}

enum Phase {
    Opening,
    Open { home: Home, facts: Facts },
    Failed(String),
    Closing,
}

struct Entry {
    spec: DiskSpec,
    phase: Phase,
    exports: Vec<OpenExport>,
}

impl Entry {
    fn status(&self) -> DiskStatus {
        let (state, error, facts) = match &self.phase {
            Phase::Opening => (DiskState::Opening, None, None),
            Phase::Open { facts, .. } => (DiskState::Open, None, Some(*facts)),
            Phase::Failed(error) => (DiskState::Failed, Some(error.clone()), None),
            Phase::Closing => (DiskState::Closing, None, None),
        };
        DiskStatus {
            spec: self.spec.clone(),
            state,
            error,
            format: facts.map(|f| f.format).or(self.spec.image.format),
            virtual_size: facts.map(|f| f.size),
            read_only: facts.map_or(self.spec.read_only || self.spec.image.snapshot.is_some(), |f| f.read_only),
            exports: self.exports.iter().map(|e| e.status.clone()).collect(),
        }
    }
}

/// Owns I/O threads, disks, NBD servers, catalogue and jobs.
pub struct Engine {
    threads: IoThreads,
    catalogue: Mutex<Option<Catalogue>>,
    disks: Mutex<BTreeMap<String, Entry>>,
    next_id: AtomicU64,
    servers: Servers,
    nbd_socket: PathBuf,
    subscribers: Mutex<Vec<mpsc::Sender<Event>>>,
    jobs: Jobs,
}

impl Engine {
    /// Starts the threads and reopens the catalogue's disks. A disk that cannot be opened is listed with
    /// its error and does not stop the others.
    ///
    /// # Errors
    /// When the threads cannot be started or the catalogue cannot be read.
    pub async fn start(config: EngineConfig) -> Result<Arc<Self>, EngineError> {
        let threads = IoThreads::start(IoThreadsConfig { threads: config.threads, backend: config.backend })
            .map_err(EngineError::Threads)?;
        let (catalogue, specs) = match &config.state {
            Some(directory) => Catalogue::open(directory).map(|(c, specs)| (Some(c), specs))?,
            None => (None, Vec::new()),
        };
        let engine = Arc::new(Self {
            threads,
            catalogue: Mutex::new(catalogue),
            disks: Mutex::default(),
            next_id: AtomicU64::new(1),
            servers: Servers::default(),
            nbd_socket: config.nbd_socket,
            subscribers: Mutex::default(),
            jobs: Jobs::default(),
        });
        // All are listed before the first is opened, so that a change of the catalogue meanwhile keeps them.
        for spec in &specs {
            let entry = Entry { spec: spec.clone(), phase: Phase::Opening, exports: Vec::new() };
            engine.disks().insert(spec.name.clone(), entry);
        }
        futures_util::future::join_all(specs.iter().map(|spec| engine.reopen(spec))).await;
        Ok(engine)
    }

    /// Brings a disk of the catalogue back.
    async fn reopen(&self, spec: &DiskSpec) {
        let opened = match spec.validate() {
            Ok(()) => self.open_stack(spec).await,
            Err(e) => Err(e),
        };
        let phase = match opened {
            Ok((home, facts)) => Phase::Open { home, facts },
            Err(e) => {
                let error = chain_text(&e);
                tracing::error!(disk = spec.name, error, "a disk of the catalogue could not be opened");
                self.tell(Event::DiskFailed { disk: spec.name.clone(), error: error.clone() });
                Phase::Failed(error)
            }
        };
        let home = match &phase {
            Phase::Open { home, .. } => Some(home.clone()),
            _ => None,
        };
        let mut exports = Vec::new();
        if let Some(home) = home {
            for export in &spec.exports {
                exports.push(match self.open_export(&spec.name, export, &home).await {
                    Ok(export) => export,
                    Err(e) => {
                        tracing::error!(disk = spec.name, error = chain_text(&e), "an export could not be opened");
                        OpenExport::failed(&spec.name, export, chain_text(&e))
                    }
                });
            }
            self.tell(Event::DiskOpened { disk: spec.name.clone() });
        }
        if let Some(entry) = self.disks().get_mut(&spec.name) {
            entry.phase = phase;
            entry.exports = exports;
        }
    }

    fn disks(&self) -> MutexGuard<'_, BTreeMap<String, Entry>> {
        self.disks.lock().expect("no panic while the list is locked")
    }

    /// Writes the present list. Blocks for an fsync.
    fn save(&self) -> Result<(), EngineError> {
        let catalogue = self.catalogue.lock().expect("no panic while the catalogue is locked");
        let Some(catalogue) = catalogue.as_ref() else { return Ok(()) };
        // Collected under the catalogue's lock, so that an older list never replaces a newer one.
        let specs = self.disks().values().map(|entry| entry.spec.clone()).collect();
        catalogue.replace(specs)
    }

    fn tell(&self, event: Event) {
        let mut subscribers = self.subscribers.lock().expect("no panic while the list is locked");
        subscribers.retain_mut(|s| s.try_send(event.clone()).is_ok());
    }

    /// What happens from now on. A reader that falls 1,024 events behind is cut off.
    pub fn subscribe(&self) -> mpsc::Receiver<Event> {
        let (send, receive) = mpsc::channel(EVENTS_BEHIND);
        self.subscribers.lock().expect("no panic while the list is locked").push(send);
        receive
    }

    async fn open_stack(&self, spec: &DiskSpec) -> Result<(Home, Facts), EngineError> {
        let home = Home { thread: self.threads.pick(), id: DiskId(self.next_id.fetch_add(1, Ordering::Relaxed)) };
        let spec = spec.clone();
        let facts = home
            .open(
                move || async move {
                    let file = spec.image.file.clone();
                    let format = dataplane::offload(move || format_policy::format_of(&file, spec.image.format)).await?;
                    let request = OpenRequest {
                        writable: !spec.read_only && spec.image.snapshot.is_none(),
                        image: spec.image,
                        format,
                        force_share: false,
                        cache: spec.cache,
                    };
                    Stack::open(&request).await
                },
                |stack| {
                    let geometry = stack.disk().geometry();
                    Facts { format: stack.format(), size: geometry.size, read_only: geometry.read_only }
                },
            )
            .await?;
        Ok((home, facts))
    }

    async fn open_export(&self, disk: &str, spec: &ExportSpec, home: &Home) -> Result<OpenExport, EngineError> {
        self.servers.open(&self.threads, &self.nbd_socket, disk, spec, home).await
    }

    /// Opens a disk and its exports, and enters it into the catalogue. All or nothing.
    ///
    /// # Errors
    /// [`EngineError`] of any class.
    pub async fn add_disk(&self, spec: DiskSpec) -> Result<DiskStatus, EngineError> {
        spec.validate()?;
        let name = spec.name.clone();
        {
            let mut disks = self.disks();
            if disks.contains_key(&name) {
                return Err(EngineError::DiskExists(name));
            }
            if disks.len() >= MOST_DISKS {
                return Err(EngineError::Invalid(format!("there are {MOST_DISKS} disks, which is the most")));
            }
            let entry = Entry { spec: spec.clone(), phase: Phase::Opening, exports: Vec::new() };
            disks.insert(name.clone(), entry);
        }
        match self.try_add(&spec).await {
            Ok(status) => {
                self.tell(Event::DiskOpened { disk: name });
                Ok(status)
            }
            Err(e) => {
                self.disks().remove(&name);
                Err(e)
            }
        }
    }

    async fn try_add(&self, spec: &DiskSpec) -> Result<DiskStatus, EngineError> {
        let (home, facts) = self.open_stack(spec).await?;
        let mut exports: Vec<OpenExport> = Vec::new();
        for export in &spec.exports {
            match self.open_export(&spec.name, export, &home).await {
                Ok(export) => exports.push(export),
                Err(e) => {
                    self.undo(&home, exports).await;
                    return Err(e);
                }
            }
        }
        if let Err(e) = self.save() {
            self.undo(&home, exports).await;
            return Err(e);
        }
        let mut disks = self.disks();
        let entry = disks.get_mut(&spec.name).ok_or_else(|| EngineError::NoSuchDisk(spec.name.clone()))?;
        entry.phase = Phase::Open { home, facts };
        entry.exports = exports;
        Ok(entry.status())
    }

    async fn undo(&self, home: &Home, exports: Vec<OpenExport>) {
        for export in exports {
            self.servers.close(export).await;
        }
        if let Err(e) = home.close().await {
            tracing::warn!(error = chain_text(&e), "closing a disk failed");
        }
    }

    /// All disks, by name.
    pub fn disks_status(&self) -> Vec<DiskStatus> {
        self.disks().values().map(Entry::status).collect()
    }

    /// One disk.
    ///
    /// # Errors
    /// [`EngineError::NoSuchDisk`].
    pub fn disk(&self, name: &str) -> Result<DiskStatus, EngineError> {
        self.disks().get(name).map(Entry::status).ok_or_else(|| EngineError::NoSuchDisk(name.to_owned()))
    }

    /// Drains and closes a disk's exports, closes the disk, and forgets it. Its image is left.
    ///
    /// # Errors
    /// [`EngineError::NoSuchDisk`], [`EngineError::Busy`]; or the failure of the last flush or of the catalogue:
    /// the disk is closed then all the same.
    pub async fn remove_disk(&self, name: &str) -> Result<(), EngineError> {
        let (home, exports) = {
            let mut disks = self.disks();
            let entry = disks.get_mut(name).ok_or_else(|| EngineError::NoSuchDisk(name.to_owned()))?;
            if let Some(busy) = busy(name, &entry.phase) {
                return Err(busy);
            }
            let home = match std::mem::replace(&mut entry.phase, Phase::Closing) {
                Phase::Open { home, .. } => Some(home),
                _ => None,
            };
            (home, std::mem::take(&mut entry.exports))
        };
        for export in exports {
            self.servers.close(export).await;
        }
        let closed = match home {
            Some(home) => home.close().await,
            None => Ok(()),
        };
        self.disks().remove(name);
        self.tell(Event::DiskRemoved { disk: name.to_owned() });
        self.save()?;
        closed
    }

    /// Where an open disk lives.
    fn home(&self, name: &str) -> Result<(Home, Facts), EngineError> {
        let disks = self.disks();
        let entry = disks.get(name).ok_or_else(|| EngineError::NoSuchDisk(name.to_owned()))?;
        match &entry.phase {
            Phase::Open { home, facts } => Ok((home.clone(), *facts)),
            Phase::Failed(error) => Err(EngineError::NotOpen { name: name.to_owned(), error: error.clone() }),
            phase => Err(busy(name, phase).unwrap_or_else(|| EngineError::NoSuchDisk(name.to_owned()))),
        }
    }

    /// Opens one more export and enters it into the catalogue.
    ///
    /// # Errors
    /// [`EngineError`] of any class.
    pub async fn add_export(&self, name: &str, spec: ExportSpec) -> Result<ExportStatus, EngineError> {
        spec.validate()?;
        let (home, _) = self.home(name)?;
        let export = self.open_export(name, &spec, &home).await?;
        let status = export.status.clone();
        let late = {
            let mut disks = self.disks();
            match disks.get_mut(name) {
                Some(entry) if matches!(&entry.phase, Phase::Open { home: now, .. } if now.id == home.id) => {
                    entry.exports.push(export);
                    entry.spec.exports.push(spec.clone());
                    None
                }
                _ => Some(export),
            }
        };
        if let Some(export) = late {
            self.servers.close(export).await;
            return Err(EngineError::NoSuchDisk(name.to_owned()));
        }
        if let Err(e) = self.save() {
            let undone = self.take_exports(name, Some(&status.name))?;
            for export in undone {
                self.servers.close(export).await;
            }
            return Err(e);
        }
        self.tell(Event::ExportAdded { disk: name.to_owned(), export: status.name.clone() });
        Ok(status)
    }

    /// Takes exports out of a disk's lists.
    fn take_exports(&self, name: &str, export: Option<&str>) -> Result<Vec<OpenExport>, EngineError> {
        let mut disks = self.disks();
        let entry = disks.get_mut(name).ok_or_else(|| EngineError::NoSuchDisk(name.to_owned()))?;
        if let Some(busy) = busy(name, &entry.phase) {
            return Err(busy);
        }
        let chosen = |other: &str| export.is_none_or(|e| e == other);
        let (taken, kept): (Vec<_>, Vec<_>) =
            std::mem::take(&mut entry.exports).into_iter().partition(|e| chosen(&e.status.name));
        entry.exports = kept;
        let before = entry.spec.exports.len();
        entry.spec.exports.retain(|spec| !chosen(spec.name_for(name)));
        if let Some(export) = export
            && taken.is_empty()
            && entry.spec.exports.len() == before
        {
            return Err(EngineError::NoSuchExport { disk: name.to_owned(), export: export.to_owned() });
        }
        Ok(taken)
    }

    /// Drains and closes one export, or all of a disk.
    ///
    /// # Errors
    /// [`EngineError::NoSuchDisk`], [`EngineError::NoSuchExport`], or when the catalogue cannot be written.
    pub async fn remove_exports(&self, name: &str, export: Option<&str>) -> Result<(), EngineError> {
        for export in self.take_exports(name, export)? {
            let gone = Event::ExportRemoved { disk: name.to_owned(), export: export.status.name.clone() };
            self.servers.close(export).await;
            self.tell(gone);
        }
        self.save()
    }

    /// The facts of a disk's image.
    ///
    /// # Errors
    /// [`EngineError::NoSuchDisk`], or when the image cannot be read.
    pub async fn info(&self, name: &str) -> Result<ImageInfo, EngineError> {
        let (home, facts) = self.home(name)?;
        let image = self.disk(name)?.spec.image;
        home.with(move |stack| async move {
            let source = SourceSpec { force_share: true, ..SourceSpec::of(image.file, Some(facts.format)) };
            let mut info = images::info::info(&source).await?;
            info.virtual_size = stack.disk().geometry().size;
            Ok(info)
        })
        .await
    }

    /// Runs of bytes of the disk, up to `most`; and where to ask on, when there are more.
    ///
    /// # Errors
    /// [`EngineError::NoSuchDisk`], or when metadata cannot be read.
    pub async fn map(
        &self,
        name: &str,
        range: ByteRange,
        most: usize,
    ) -> Result<(Vec<MapEntry>, Option<u64>), EngineError> {
        let (home, _) = self.home(name)?;
        home.with(move |stack| async move { images::map::map(&stack, range, most).await }).await
    }

    /// Changes a disk's size in bytes. New connections see it.
    ///
    /// # Errors
    /// When it would shrink without `shrink`, or the image cannot have that size.
    pub async fn resize(&self, name: &str, size: u64, shrink: bool) -> Result<DiskStatus, EngineError> {
        let (home, _) = self.home(name)?;
        let id = home.id;
        let size = home
            .with(move |stack| async move {
                images::resize::require_shrink_wanted(stack.disk().geometry().size, size, shrink)?;
                stack.disk().resize(size).await?;
                Ok(stack.disk().geometry().size)
            })
            .await?;
        if let Some(Entry { phase: Phase::Open { home, facts }, .. }) = self.disks().get_mut(name)
            && home.id == id
        {
            facts.size = size;
        }
        self.tell(Event::DiskResized { disk: name.to_owned(), size });
        self.disk(name)
    }

    /// The jobs.
    pub fn jobs(&self) -> &Jobs {
        &self.jobs
    }

    /// Enters a job; the returned future does it, and is to be run to its end.
    ///
    /// # Errors
    /// When too many are running.
    pub fn begin_job(
        self: &Arc<Self>,
        kind: JobKind,
    ) -> Result<(JobStatus, impl Future<Output = ()> + Send + use<>), EngineError> {
        let (status, work) = self.jobs.begin(kind, self.workshop())?;
        let (id, this) = (status.id, Arc::clone(self));
        self.tell(Event::Job { id, state: status.state });
        Ok((status, async move {
            work.await;
            if let Ok(end) = this.jobs.show(id) {
                this.tell(Event::Job { id, state: end.state });
            }
        }))
    }

    /// Work on image files, on this engine's threads.
    pub fn workshop(&self) -> Workshop {
        Workshop::on(self.threads.all())
    }

    /// How many I/O threads there are.
    pub fn io_threads(&self) -> usize {
        self.threads.all().len()
    }

    /// What they run on: `uring` or `threads`.
    pub fn io_backend(&self) -> &'static str {
        match self.threads.backend() {
            Backend::Threads => "threads",
            _ => "uring",
        }
    }

    /// Counters in OpenMetrics' text format.
    pub fn metrics_text(&self) -> String {
        let exports: Vec<ExportCounters> = self
            .disks()
            .iter()
            .flat_map(|(name, entry)| {
                entry.exports.iter().map(|export| ExportCounters {
                    disk: name.clone(),
                    export: export.status.name.clone(),
                    stats: Arc::clone(&export.stats),
                })
            })
            .collect();
        metrics::text(&self.disks_status(), &exports, self.jobs.running())
    }

    /// Drains and closes exports, flushes and closes disks. The catalogue keeps them.
    ///
    /// # Errors
    /// When a disk could not be flushed and closed; all others are closed all the same.
    pub async fn shut_down(&self) -> Result<(), EngineError> {
        self.jobs.cancel_all();
        let entries: Vec<(String, Option<Home>, Vec<OpenExport>)> = self
            .disks()
            .iter_mut()
            .map(|(name, entry)| {
                let home = match std::mem::replace(&mut entry.phase, Phase::Closing) {
                    Phase::Open { home, .. } => Some(home),
                    _ => None,
                };
                (name.clone(), home, std::mem::take(&mut entry.exports))
            })
            .collect();
        let closed = entries.into_iter().map(|(name, home, exports)| async move {
            for export in exports {
                self.servers.close(export).await;
            }
            let Some(home) = home else { return Ok(()) };
            home.close().await.inspect_err(|e| tracing::error!(disk = name, error = chain_text(e), "closing a disk"))
        });
        let closed = futures_util::future::join_all(closed).await;
        self.servers.stop().await;
        closed.into_iter().collect()
    }
}

fn busy(name: &str, phase: &Phase) -> Option<EngineError> {
    let state = match phase {
        Phase::Opening => "being opened",
        Phase::Closing => "being closed",
        Phase::Open { .. } | Phase::Failed(_) => return None,
    };
    Some(EngineError::Busy { name: name.to_owned(), state })
}
