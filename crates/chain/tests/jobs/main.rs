//! Jobs that work on a disk beside the guest: mirror, commit, infill. Random guests go on all the time; the model knows what
//! they may read, and QEMU's tools judge what is left.

mod commit;
mod crash;
mod infill;
mod mirror;
mod suites;

use chain::{Chain, Control, CopyPass, CopyStats, LayerInfo};
use disk::{
    Buf, ByteRange, DiskError, DiskHandle, ErrorKind, LayerHandle, Operation, StorageHandle, WriteFlags, ZeroMode,
};
use formats::Format;
use formats::qcow2::{self, BackingRef, CreateOptions, Image, OpenOptions};
use formats::raw::{self, RawLayer};
use std::cell::{Cell, RefCell};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use testkit::conformance::{Workload, workload};
use testkit::executor::{self, Join, yield_now};
use testkit::{CrashStorage, MemoryLayer, MemoryLayerOptions, MemoryStorage, ModelDisk, judges};

const NONE: WriteFlags = WriteFlags { fua: false };

/// An image under test.
#[derive(Clone)]
enum Made {
    Memory(Rc<MemoryLayer>),
    /// With the name under which other images know it.
    Stored(Format, CrashStorage, String),
}

impl Made {
    async fn qcow2(random: &mut fastrand::Rng, name: String, size: u64, backing: Option<BackingRef>) -> Self {
        let mut options = CreateOptions::new(size);
        options.extended_l2 = random.u8(..4) == 0;
        options.cluster_size = 1 << if options.extended_l2 { 14 } else { [9, 12, 16][random.usize(..3)] };
        options.version = if options.extended_l2 || random.u8(..4) > 0 { 3 } else { 2 };
        options.lazy_refcounts = options.version == 3 && random.u8(..4) == 0;
        options.backing = backing;
        let storage = CrashStorage::of(MemoryStorage::new(0).named(&name)).yielding(random.u64(..));
        qcow2::create(&storage.handle(), None, &options).await.expect("create");
        Self::Stored(Format::Qcow2, storage, name)
    }

    fn raw(random: &mut fastrand::Rng, name: String, size: u64) -> Self {
        // A storage of whole blocks would be longer than the disk when it is opened again.
        let most = if size.is_multiple_of(4096) { 3 } else { 2 };
        let memory = MemoryStorage::new(size).aligned([1, 512, 4096][random.usize(..most)]).named(&name);
        memory.set_fast_zeroes(random.bool());
        Self::Stored(Format::Raw, CrashStorage::of(memory).yielding(random.u64(..)), name)
    }

    fn memory(random: &mut fastrand::Rng, size: u64) -> Self {
        Self::Memory(Rc::new(MemoryLayer::new(
            size,
            MemoryLayerOptions {
                unit: 1 << random.u32(9..17),
                zero_over_parent: random.u8(..3) > 0,
                erratic: (random.u8(..4) > 0).then(|| random.u64(..)),
                ..Default::default()
            },
        )))
    }

    async fn open(&self) -> LayerInfo {
        match self {
            Self::Memory(layer) => {
                LayerInfo { path: PathBuf::from("memory"), format: Format::Raw, handle: layer.handle() }
            }
            Self::Stored(format, storage, name) => open_stored(*format, storage.handle(), name).await,
        }
    }

    /// Stores a unit in encoded form, where the format can.
    async fn store_encoded(&self, handle: &LayerHandle, random: &mut fastrand::Rng) {
        let geometry = handle.geometry();
        let Some(unit) = geometry.encoded_unit else { return };
        let at = random.u64(..geometry.size / unit + 1) * unit;
        let range = ByteRange::between(at, (at + unit).min(geometry.size));
        let mut bytes = vec![random.u8(1..); unit as usize];
        bytes[range.len() as usize..].fill(0);
        let encoded = match self {
            Self::Memory(_) => Some(MemoryLayer::encode(&bytes[..range.len() as usize])),
            Self::Stored(..) => qcow2::encode_cluster(qcow2::Compression::Zlib, &bytes),
        };
        if let (Some(encoded), false) = (encoded, range.is_empty()) {
            handle.write_encoded(range, &encoded).await.expect("encoded bytes");
        }
    }

    fn storage(&self) -> &MemoryStorage {
        match self {
            Self::Memory(layer) => layer.memory(),
            Self::Stored(_, storage, _) => storage.memory(),
        }
    }

    fn backing(&self) -> Option<BackingRef> {
        match self {
            Self::Memory(_) => None,
            Self::Stored(format, _, name) => {
                Some(BackingRef { name: name.clone(), format: Some(format.name().to_owned()) })
            }
        }
    }
}

async fn open_stored(format: Format, storage: StorageHandle, name: &str) -> LayerInfo {
    let handle = match format {
        Format::Raw => LayerHandle::new(RawLayer::open(storage, raw::OpenOptions::default())),
        Format::Qcow2 => {
            let options = OpenOptions { l2_cache_bytes: 0, ..OpenOptions::default() };
            LayerHandle::from_rc(Image::open(storage, None, options).await.expect("opens"))
        }
    };
    LayerInfo { path: PathBuf::from(name), format, handle }
}

/// A chain of random images with random contents, and what it must read as.
struct Setup {
    /// Top first, as the layers are.
    images: Vec<Made>,
    layers: Vec<LayerInfo>,
    model: ModelDisk,
}

impl Setup {
    /// `depth` layers; `stored`: qcow2 and raw images instead of layers in memory. Sizes differ.
    async fn new(random: &mut fastrand::Rng, depth: usize, stored: bool) -> Self {
        let mut images: Vec<Made> = Vec::new();
        let mut layers: Vec<LayerInfo> = Vec::new();
        let mut visible: Vec<u8> = Vec::new();
        let usual = random.u64(100..900) * 512;
        for below in 0..depth {
            let size = if random.bool() { usual } else { random.u64(100..1200) * 512 };
            let name = format!("image-{below}");
            let made = match (stored, below) {
                (false, _) => Made::memory(random, size),
                (true, 0) if random.bool() => Made::raw(random, name, size),
                (true, _) => Made::qcow2(random, name, size, images.first().and_then(Made::backing)).await,
            };
            layers.insert(0, made.open().await);
            images.insert(0, made);
            visible.resize(size as usize, 0);
            // Each image is filled through a chain that has it on top, and then left alone.
            let disk = DiskHandle::new(Chain::new(layers.clone()));
            let model = ModelDisk::of(&visible);
            let requests = random.u32(0..20);
            let w = Workload { seed: random.u64(..), requests, longest: 100 << 10, ..Workload::default() };
            let w = Workload { alignment: if stored { 512 } else { 1 }, flush: false, ..w };
            workload(&disk, &model, w).await.expect("fill a layer");
            if random.bool() {
                images[0].store_encoded(&layers[0].handle, random).await;
            }
            disk.flush().await.expect("flush");
            visible = bytes_of(&disk).await;
        }
        Self { images, layers, model: ModelDisk::of(&visible) }
    }

    fn chain(&self) -> Rc<Chain> {
        Rc::new(Chain::new(self.layers.clone()))
    }
}

async fn bytes_of(disk: &DiskHandle) -> Vec<u8> {
    disk.read(0, Buf::new(disk.geometry().size as usize)).await.expect("read").to_vec()
}

/// What layers show, read beside a disk that uses them.
async fn shown(layers: &[LayerInfo]) -> Vec<u8> {
    bytes_of(&DiskHandle::new(Chain::new(layers.to_vec()))).await
}

#[track_caller]
fn assert_equal(found: &[u8], expected: &[u8], what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}: size");
    if let Some(at) = found.iter().zip(expected).position(|(a, b)| a != b) {
        panic!("{what}: byte {at:#x} is {:#x} instead of {:#x}", found[at], expected[at]);
    }
}

/// What guests do.
#[derive(Clone, Copy)]
struct Habits {
    alignment: u64,
    longest: u64,
    /// Only this many of the first bytes.
    span: Option<u64>,
    /// Requests that fail are no reason to stop.
    tolerant: bool,
}

impl Default for Habits {
    fn default() -> Self {
        Self { alignment: 512, longest: 40 << 10, span: None, tolerant: false }
    }
}

/// Guests that go on until they are told to stop.
struct Guests {
    disk: DiskHandle,
    model: ModelDisk,
    stop: Rc<Cell<bool>>,
    running: Vec<Join<()>>,
}

impl Guests {
    fn start(disk: &DiskHandle, model: &ModelDisk, random: &mut fastrand::Rng, count: usize, habits: Habits) -> Self {
        let stop: Rc<Cell<bool>> = Rc::default();
        let running = (0..count)
            .map(|_| executor::spawn(guest(disk.clone(), model.clone(), random.fork(), Rc::clone(&stop), habits)))
            .collect();
        Self { disk: disk.clone(), model: model.clone(), stop, running }
    }

    /// Stops them, and judges the disk.
    async fn stop(self) {
        self.stop.set(true);
        for guest in self.running {
            guest.await;
        }
        self.model.check_equal(&self.disk).await.expect("read");
    }
}

fn some_range(random: &mut fastrand::Rng, size: u64, habits: Habits) -> ByteRange {
    let size = habits.span.map_or(size, |span| span.min(size));
    let grain = habits.alignment.max(1 << random.u32(0..17));
    let start = (random.u64(..size) / grain * grain).min(size - 1) / habits.alignment * habits.alignment;
    let len = (random.u64(1..=habits.longest) >> random.u32(..8)).max(1).next_multiple_of(habits.alignment);
    ByteRange::between(start, (start + len).min(size))
}

async fn guest(disk: DiskHandle, model: ModelDisk, mut random: fastrand::Rng, stop: Rc<Cell<bool>>, habits: Habits) {
    while !stop.get() {
        let range = some_range(&mut random, model.size(), habits);
        let flags = WriteFlags { fua: random.u8(..16) == 0 };
        let done = match random.u8(..20) {
            0..10 => {
                let mut buf = Buf::new(range.len() as usize);
                random.fill(&mut buf);
                model.write(&disk, range.offset(), buf, flags).await
            }
            10..13 => model.read(&disk, range.offset(), Buf::new(range.len() as usize)).await.map(drop),
            13..16 => {
                let mode = ZeroMode { unmap: random.bool(), fast_only: random.u8(..4) == 0 };
                match model.write_zeroes(&disk, range, mode, flags).await {
                    Err(error) if error.kind() == ErrorKind::NotFast => Ok(()),
                    other => other,
                }
            }
            16..19 => model.discard(&disk, range, flags).await,
            _ => model.flush(&disk).await,
        };
        if let Err(error) = done {
            assert!(habits.tolerant, "a guest's request failed: {error:?}");
        }
        yield_now().await;
    }
}

/// Lets a random time pass.
async fn pause(random: &mut fastrand::Rng, turns: u32) {
    for _ in 0..random.u32(..turns) {
        yield_now().await;
    }
}

/// A copy's control: takes its time, may stop the work, and sees that what it is told makes sense.
#[derive(Default)]
struct Pace {
    random: RefCell<fastrand::Rng>,
    /// Stops the work after so many calls.
    stop_after: Cell<Option<u32>>,
    calls: Cell<u32>,
    paced: Cell<u64>,
    told: Cell<CopyStats>,
    position: Cell<u64>,
}

impl Pace {
    fn new(random: &mut fastrand::Rng) -> Self {
        Self { random: RefCell::new(random.fork()), ..Self::default() }
    }

    fn stopping_after(self, calls: u32) -> Self {
        self.stop_after.set(Some(calls));
        self
    }
}

const STOPPED: ErrorKind = ErrorKind::NoMemory;

impl Control for Pace {
    type Error = DiskError;

    async fn pace(&self, bytes: u64) -> disk::Result<()> {
        let turns = self.random.borrow_mut().u32(..6);
        for _ in 0..turns {
            yield_now().await;
        }
        self.paced.set(self.paced.get() + bytes);
        self.calls.set(self.calls.get() + 1);
        match self.stop_after.get() {
            Some(calls) if self.calls.get() > calls => {
                Err(DiskError::new(STOPPED, Operation::Write).because("the test has it stop"))
            }
            _ => Ok(()),
        }
    }

    fn progress(&self, position: u64, done: CopyStats) {
        self.position.set(position);
        self.told.set(done);
    }
}

fn some_pass(random: &mut fastrand::Rng) -> CopyPass {
    CopyPass { chunk: 4096 << random.u32(..6), at_once: random.usize(1..5) }
}

/// Writes images into a directory, so that QEMU's tools find them.
fn write_images<'a>(dir: &Path, images: impl IntoIterator<Item = &'a Made>) {
    for image in images {
        let Made::Stored(_, storage, name) = image else { panic!("only images that are stored can be judged") };
        storage.memory().write_to(&dir.join(name)).expect("an image");
    }
}

/// Lets `qemu-img` judge images, top first, each the parent of the one before it (whatever their headers still say), and what
/// the top shows.
fn judge(images: &[Made], truth: &[u8]) {
    let dir = tempfile::tempdir().expect("a temporary directory");
    write_images(dir.path(), images);
    let path = |image: &Made| dir.path().join(image.backing().expect("stored").name);
    for (at, image) in images.iter().enumerate() {
        let Made::Stored(Format::Qcow2, ..) = image else { continue };
        let name = path(image).to_str().expect("UTF-8").to_owned();
        match images.get(at + 1).and_then(Made::backing) {
            Some(BackingRef { name: parent, format }) => {
                let format = format.expect("known");
                judges::qemu_img_ok(["rebase", "-u", "-f", "qcow2", "-b", &parent, "-F", &format, &name]);
            }
            None => drop(judges::qemu_img_ok(["rebase", "-u", "-f", "qcow2", "-b", "", &name])),
        }
    }
    for image in images.iter().filter(|image| matches!(image, Made::Stored(Format::Qcow2, ..))) {
        judges::check(&path(image), "qcow2").assert_clean();
    }
    std::fs::write(dir.path().join("truth"), truth).expect("the truth");
    let format = match &images[0] {
        Made::Stored(format, ..) => format.name(),
        Made::Memory(_) => unreachable!("written above"),
    };
    assert!(judges::equal(&path(&images[0]), format, &dir.path().join("truth"), "raw"), "qemu-img compare");
}
