//! The engine: disks by name, each with its home thread and its exports.

mod backup;
mod history;
mod jobs;
mod snapshots;

use crate::exports::{DefaultSocket, OpenExport, Servers};
use crate::history::report::HistoryReport;
use crate::history::views::OpenView;
use crate::home::{DiskId, Home};
use crate::images::report::{ImageInfo, MapEntry};
use crate::images::request::{NewSize, PreallocationMode, SourceSpec};
use crate::images::stack::{HistoryUse, OpenRequest, Stack};
use crate::images::{self, Progress, Workshop};
use crate::jobs::Jobs;
use crate::linkage::{self, ChainReport, LinkageUse};
use crate::metrics::{self, ExportCounters};
use crate::{
    Catalogue, DiskSpec, DiskState, DiskStatus, EngineError, Event, ExportSpec, ExportStatus, Format, ImageSpec,
    SocketAccess, chain_text, format_policy,
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
    /// Who may connect to it.
    pub nbd_socket_access: SocketAccess,
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
    /// Whether the catalogue has it, or is to have it: not before it has been opened once.
    listed: bool,
    /// Whether it stays as long as the process lives.
    pinned: bool,
    /// Its history as it was when the disk was opened.
    history: Option<HistoryReport>,
}

impl Entry {
    fn opening(spec: DiskSpec, listed: bool) -> Self {
        Self { spec, phase: Phase::Opening, exports: Vec::new(), listed, pinned: false, history: None }
    }

    fn set_format(&mut self, format: Format) {
        if let Phase::Open { facts, .. } = &mut self.phase {
            facts.format = format;
        }
    }

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
            history: self.history.clone().filter(|_| facts.is_some()),
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
    subscribers: Mutex<Vec<mpsc::Sender<Event>>>,
    jobs: Jobs,
    views: Mutex<BTreeMap<String, OpenView>>,
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
        let jobs = match &config.state {
            Some(directory) => Jobs::open(directory)?,
            None => Jobs::default(),
        };
        let engine = Arc::new(Self {
            threads,
            catalogue: Mutex::new(catalogue),
            disks: Mutex::default(),
            next_id: AtomicU64::new(1),
            servers: Servers::new(DefaultSocket { path: config.nbd_socket, access: config.nbd_socket_access }),
            subscribers: Mutex::default(),
            views: Mutex::default(),
            jobs,
        });
        // All are listed before the first is opened, so that a change of the catalogue meanwhile keeps them.
        for spec in &specs {
            engine.disks().insert(spec.name.clone(), Entry::opening(spec.clone(), true));
        }
        futures_util::future::join_all(specs.iter().map(|spec| engine.reopen(spec))).await;
        if engine.disks().values().map(|entry| &entry.spec).ne(&specs) {
            // Formats were decided that the catalogue does not have yet.
            engine.save()?;
        }
        Ok(engine)
    }

    /// Brings a disk of the catalogue back.
    async fn reopen(&self, spec: &DiskSpec) {
        let opened = match spec.validate() {
            Ok(()) => self.open_stack(spec).await,
            Err(e) => Err(e),
        };
        let mut history = None;
        let phase = match opened {
            Ok((home, facts, report)) => {
                history = Some(report);
                Phase::Open { home, facts }
            }
            Err(e) => {
                let error = chain_text(&e);
                tracing::info!(disk = spec.name, error, "a disk of the catalogue could not be opened");
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
                        tracing::info!(disk = spec.name, error = chain_text(&e), "an export could not be opened");
                        OpenExport::failed(&spec.name, export, chain_text(&e))
                    }
                });
            }
            self.tell(Event::DiskOpened { disk: spec.name.clone() });
        }
        if let Some(entry) = self.disks().get_mut(&spec.name) {
            if let Phase::Open { facts, .. } = &phase {
                entry.spec.image.format = Some(facts.format);
            }
            entry.phase = phase;
            entry.exports = exports;
            entry.history = history;
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
        let specs = self.disks().values().filter(|entry| entry.listed).map(|entry| entry.spec.clone()).collect();
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

    async fn open_stack(&self, spec: &DiskSpec) -> Result<(Home, Facts, HistoryReport), EngineError> {
        let name = spec.name.clone();
        let home = Home { thread: self.threads.pick(), id: self.new_id() };
        let spec = spec.clone();
        let (facts, history) = home
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
                        history: HistoryUse::Kept(spec.history),
                        linkage: if spec.despite_fault { LinkageUse::Told } else { LinkageUse::Enforced },
                    };
                    Stack::open(&request).await
                },
                |stack| {
                    let geometry = stack.disk().geometry();
                    let facts = Facts { format: stack.format(), size: geometry.size, read_only: geometry.read_only };
                    (facts, stack.history_report())
                },
            )
            .await?;
        if let Some(reason) = &history.reason
            && !facts.read_only
        {
            self.tell(Event::HistoryLost { disk: name, reason: reason.clone() });
        }
        Ok((home, facts, history))
    }

    async fn open_export(&self, disk: &str, spec: &ExportSpec, home: &Home) -> Result<OpenExport, EngineError> {
        self.servers.open(&self.threads, disk, spec, &home.served()).await
    }

    /// Opens a disk and its exports, and enters it into the catalogue. All or nothing.
    ///
    /// # Errors
    /// [`EngineError`] of any class.
    pub async fn add_disk(&self, spec: DiskSpec) -> Result<DiskStatus, EngineError> {
        spec.validate()?;
        let name = spec.name.clone();
        if self.disks().contains_key(&name) {
            return Err(EngineError::DiskExists(name));
        }
        let writable = !spec.read_only && spec.image.snapshot.is_none();
        self.refuse_image_of_a_disk(spec.image.file.clone(), writable)?;
        {
            let mut disks = self.disks();
            if disks.contains_key(&name) {
                return Err(EngineError::DiskExists(name));
            }
            if disks.len() >= MOST_DISKS {
                return Err(EngineError::Invalid(format!("there are {MOST_DISKS} disks, which is the most")));
            }
            disks.insert(name.clone(), Entry::opening(spec.clone(), false));
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
        let (home, facts, history) = self.open_stack(spec).await?;
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
        if let Some(entry) = self.disks().get_mut(&spec.name) {
            // From now on the format is what it was taken for: a guest may write what looks like another one.
            entry.spec.image.format = Some(facts.format);
            entry.listed = true;
        }
        if let Err(e) = self.save() {
            if let Some(entry) = self.disks().get_mut(&spec.name) {
                entry.listed = false;
            }
            self.undo(&home, exports).await;
            return Err(e);
        }
        {
            let mut disks = self.disks();
            let entry = disks.get_mut(&spec.name).ok_or_else(|| EngineError::NoSuchDisk(spec.name.clone()))?;
            if matches!(entry.phase, Phase::Opening) {
                entry.phase = Phase::Open { home, facts };
                entry.exports = exports;
                entry.history = Some(history);
                return Ok(entry.status());
            }
        }
        // The daemon ends. The disk is in the catalogue, and is opened with the others next time.
        self.undo(&home, exports).await;
        Err(EngineError::Busy { name: spec.name.clone(), state: "being closed" })
    }

    /// Tries again to open a disk that could not be opened, or those of its exports that could not be.
    ///
    /// # Errors
    /// [`EngineError::NoSuchDisk`], [`EngineError::Busy`]; when the disk cannot be opened now either.
    pub async fn open_again(&self, name: &str) -> Result<DiskStatus, EngineError> {
        enum Again {
            Disk(DiskSpec),
            Exports(Home, Vec<ExportSpec>),
        }
        let again = {
            let mut disks = self.disks();
            let entry = disks.get_mut(name).ok_or_else(|| EngineError::NoSuchDisk(name.to_owned()))?;
            if let Some(busy) = busy(name, &entry.phase) {
                return Err(busy);
            }
            if let Phase::Open { home, .. } = &entry.phase {
                let failed = entry.exports.iter().filter(|e| e.status.error.is_some());
                Again::Exports(home.clone(), failed.map(|e| e.status.spec.clone()).collect())
            } else {
                entry.phase = Phase::Opening;
                Again::Disk(entry.spec.clone())
            }
        };
        match again {
            Again::Disk(spec) => {
                self.reopen(&spec).await;
                if let Err(e) = self.save() {
                    tracing::warn!(disk = name, error = chain_text(&e), "the decided format is not in the catalogue");
                }
                self.home(name)?;
            }
            Again::Exports(home, specs) => {
                for spec in specs {
                    let export = self.open_export(name, &spec, &home).await?;
                    let mut disks = self.disks();
                    let place = disks.get_mut(name).and_then(|entry| {
                        entry.exports.iter_mut().find(|e| e.status.spec == spec && e.status.error.is_some())
                    });
                    if let Some(place) = place {
                        *place = export;
                    }
                }
            }
        }
        self.disk(name)
    }

    /// Makes a disk stay as long as the process lives.
    pub fn pin(&self, name: &str) {
        if let Some(entry) = self.disks().get_mut(name) {
            entry.pinned = true;
        }
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
            if entry.pinned {
                return Err(EngineError::Pinned(name.to_owned()));
            }
            let home = match std::mem::replace(&mut entry.phase, Phase::Closing) {
                Phase::Open { home, .. } => Some(home),
                _ => None,
            };
            (home, std::mem::take(&mut entry.exports))
        };
        self.close_views_of(Some(name)).await;
        self.servers.close_all(exports).await;
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
            info.history = Some(stack.history_report());
            Ok(info)
        })
        .await
    }

    /// The facts of a disk's image and of all images below it, top first.
    ///
    /// # Errors
    /// [`EngineError::NoSuchDisk`], or when an image cannot be read.
    pub async fn info_of_chain(&self, name: &str) -> Result<Vec<ImageInfo>, EngineError> {
        let (home, facts) = self.home(name)?;
        let image = ImageSpec { format: Some(facts.format), ..self.disk(name)?.spec.image };
        home.with(move |stack| async move {
            let mut all = Vec::new();
            let mut next = Some(&image);
            while let Some(image) = next {
                let source = SourceSpec { force_share: true, ..SourceSpec::of(&image.file, image.format) };
                // A parent that the disk's description names stands in for the one that the image names.
                match &image.parent {
                    Some(_) => all.push(images::info::info(&source).await?),
                    None => all.extend(images::info::chain(&source).await?),
                }
                next = image.parent.as_deref();
            }
            if let Some(top) = all.first_mut() {
                top.virtual_size = stack.disk().geometry().size;
                top.history = Some(stack.history_report());
            }
            Ok(all)
        })
        .await
    }

    /// The layers of the disk's chain, how they fit as their files are now, and who else depends on them.
    ///
    /// # Errors
    /// [`EngineError::NoSuchDisk`], or when an image cannot be read.
    pub async fn linkage(&self, name: &str) -> Result<ChainReport, EngineError> {
        let (home, _) = self.home(name)?;
        let name = name.to_owned();
        home.with(move |stack| async move { linkage::report_of_stack(&stack, &name, true, true).await }).await
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

    /// The disks of these names; a virtual machine's stands for all of its disks.
    fn disks_named(&self, asked: &[String]) -> Result<Vec<String>, EngineError> {
        let mut names: Vec<String> = Vec::new();
        let disks = self.disks();
        for name in asked {
            if disks.contains_key(name) {
                names.push(name.clone());
                continue;
            }
            let of_vm = disks.values().filter(|entry| entry.spec.vm.as_ref() == Some(name));
            let before = names.len();
            names.extend(of_vm.map(|entry| entry.spec.name.clone()));
            if names.len() == before {
                return Err(EngineError::NoSuchDisk(name.clone()));
            }
        }
        names.sort_unstable();
        names.dedup();
        match names.is_empty() {
            true => Err(EngineError::Invalid("no disk is named".to_owned())),
            false => Ok(names),
        }
    }

    fn new_id(&self) -> DiskId {
        DiskId(self.next_id.fetch_add(1, Ordering::Relaxed))
    }

    /// Changes a disk's size in bytes. New connections see it.
    ///
    /// # Errors
    /// When it would shrink without `shrink`, or the image cannot have that size.
    pub async fn resize(
        &self,
        name: &str,
        size: NewSize,
        shrink: bool,
        preallocation: PreallocationMode,
    ) -> Result<DiskStatus, EngineError> {
        let (home, _) = self.home(name)?;
        let id = home.id;
        let size = home
            .with(move |stack| async move {
                images::resize::change(&stack, size, shrink, preallocation, &Progress::new()).await?;
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

    /// Refuses the image of an open disk, unless readers share it.
    fn refuse_image_of_a_disk(&self, file: PathBuf, writable: bool) -> Result<(), EngineError> {
        let Ok(path) = file.canonicalize() else { return Ok(()) };
        let open: Vec<DiskStatus> = self.disks_status().into_iter().filter(|d| d.state == DiskState::Open).collect();
        let holder = open.into_iter().find(|disk| {
            (writable || !disk.read_only) && disk.spec.image.file.canonicalize().is_ok_and(|other| other == path)
        });
        match holder {
            Some(disk) => Err(EngineError::HeldByDisk { file, disk: disk.spec.name }),
            None => Ok(()),
        }
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
        metrics::text(&self.disks_status(), &exports, self.jobs.running(), self.io_threads())
    }

    /// Stops jobs, drains and closes exports, flushes and closes disks. The catalogue keeps them.
    ///
    /// # Errors
    /// When a disk could not be flushed and closed; all others are closed all the same.
    pub async fn shut_down(&self) -> Result<(), EngineError> {
        self.end_jobs().await;
        self.close_views_of(None).await;
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
            self.servers.close_all(exports).await;
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
