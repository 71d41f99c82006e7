//! The layers are exchanged while requests run.

use chain::{Chain, LayerInfo};
use disk::{
    Buf, ByteRange, Disk, DiskError, DiskHandle, ErrorKind, LayerHandle, Operation, Result, WriteFlags, ZeroMode,
};
use formats::Format;
use formats::qcow2::{self, BackingRef, CreateOptions, Header, Image, OpenOptions};
use formats::raw::{self, RawLayer};
use futures_util::future::join;
use std::cell::{Cell, RefCell};
use std::path::PathBuf;
use std::rc::Rc;
use testkit::conformance::{Workload, workload};
use testkit::executor::{self, yield_now};
use testkit::{CrashStorage, MemoryLayer, MemoryLayerOptions, MemoryStorage, ModelDisk, judges, seeds};

const NONE: WriteFlags = WriteFlags { fua: false };

fn memory_info(layer: &Rc<MemoryLayer>) -> LayerInfo {
    LayerInfo { path: PathBuf::from("memory"), format: Format::Raw, handle: layer.handle() }
}

fn raw_info(storage: &MemoryStorage) -> LayerInfo {
    let handle = LayerHandle::new(RawLayer::open(storage.handle(), raw::OpenOptions::default()));
    LayerInfo { path: PathBuf::from("disk.raw"), format: Format::Raw, handle }
}

async fn qcow2_info(name: &str, storage: disk::StorageHandle) -> LayerInfo {
    let options = OpenOptions { l2_cache_bytes: 0, ..OpenOptions::default() };
    let image = Image::open(storage, None, options).await.expect("opens");
    LayerInfo { path: PathBuf::from(name), format: Format::Qcow2, handle: LayerHandle::from_rc(image) }
}

fn refusal(message: &str) -> DiskError {
    DiskError::new(ErrorKind::Io, Operation::Create).because(message)
}

/// Overlays are put on top under load, some of them in vain. While the layers change no request is under way.
#[test]
fn overlays_under_load() {
    seeds::each(60, |seed| {
        executor::run(seed, async {
            let mut random = fastrand::Rng::with_seed(seed);
            let size = random.u64(100..1200) * 512;
            let layers: Rc<RefCell<Vec<Rc<MemoryLayer>>>> = Rc::default();
            let make = |random: &mut fastrand::Rng| {
                let options = MemoryLayerOptions {
                    unit: 1 << random.u32(9..17),
                    zero_over_parent: random.u8(..3) > 0,
                    erratic: (random.u8(..4) > 0).then(|| random.u64(..)),
                    ..Default::default()
                };
                let layer = Rc::new(MemoryLayer::new(size, options));
                layers.borrow_mut().push(Rc::clone(&layer));
                layer
            };
            let base = make(&mut random);
            let chain = Rc::new(Chain::new(vec![memory_info(&base)]));
            let disk = DiskHandle::from_rc(Rc::clone(&chain));
            let model = ModelDisk::new(size);
            let w = Workload { seed, requests: 60, workers: 6, ..Workload::default() };
            let switching = async {
                for _ in 0..6 {
                    for _ in 0..random.u32(..40) {
                        yield_now().await;
                    }
                    let overlay = make(&mut random);
                    let fails = random.u8(..3) == 0;
                    let before = chain.layers();
                    let counters = || layers.borrow().iter().map(|layer| layer.memory().counters()).collect::<Vec<_>>();
                    let switched = chain
                        .switch(async |old| {
                            assert_eq!(old.len(), before.len());
                            let quiet = counters();
                            for _ in 0..20 {
                                yield_now().await;
                            }
                            assert_eq!(quiet, counters(), "a request ran while the layers changed");
                            old[0].handle.flush().await?;
                            match fails {
                                true => Err(refusal("no overlay today")),
                                false => Ok([memory_info(&overlay)].into_iter().chain(old.iter().cloned()).collect()),
                            }
                        })
                        .await;
                    assert_eq!(switched.is_err(), fails);
                    assert_eq!(chain.layers().len(), before.len() + usize::from(!fails));
                    if fails {
                        layers.borrow_mut().pop();
                    }
                }
            };
            let (worked, ()) = join(workload(&disk, &model, w), switching).await;
            worked.unwrap();
            model.check_equal(&disk).await.unwrap();
            assert!(layers.borrow().iter().all(|layer| layer.open_tickets() == 0));
            disk.close().await.unwrap();
        });
    });
}

#[test]
fn what_is_refused_leaves_the_layers_as_they_were() {
    executor::run(0, async {
        let layer = |size| Rc::new(MemoryLayer::new(size, MemoryLayerOptions::default()));
        let (base, longer) = (layer(1 << 20), layer(2 << 20));
        let chain = Chain::new(vec![memory_info(&base)]);
        Disk::write(&chain, 0, Buf::copy_of(&[7; 4096]), NONE).await.unwrap();
        let none = chain.switch(async |_| Ok::<_, DiskError>(Vec::new())).await.unwrap_err();
        let other_size = chain
            .switch(async |old| {
                Ok::<_, DiskError>([memory_info(&longer)].into_iter().chain(old.iter().cloned()).collect())
            })
            .await
            .unwrap_err();
        for (error, words) in [(none, "without any layer"), (other_size, "resize it first")] {
            assert_eq!(error.kind(), ErrorKind::Invalid);
            assert!(error.to_string().contains(words), "{error}");
        }
        assert_eq!(chain.layers().len(), 1);
        assert_eq!(Disk::read(&chain, 0, Buf::new(1)).await.unwrap()[0], 7);
    });
}

/// The caller's own error comes through as it is.
#[test]
fn an_error_of_another_kind() {
    #[derive(Debug, PartialEq)]
    enum Failure {
        Disk(ErrorKind),
        Theirs(u32),
    }
    impl From<DiskError> for Failure {
        fn from(error: DiskError) -> Self {
            Self::Disk(error.kind())
        }
    }
    executor::run(0, async {
        let chain = Chain::new(vec![memory_info(&Rc::new(MemoryLayer::new(4096, MemoryLayerOptions::default())))]);
        let theirs = chain.switch(async |_| Err(Failure::Theirs(7))).await;
        assert_eq!(theirs, Err(Failure::Theirs(7)));
        Disk::close(&chain).await.unwrap();
        let called = Cell::new(false);
        let closed = chain
            .switch(async |old| {
                called.set(true);
                Ok::<_, Failure>(old.to_vec())
            })
            .await;
        assert_eq!((closed, called.get()), (Err(Failure::Disk(ErrorKind::Closed)), false));
    });
}

#[test]
fn the_alignment_is_that_of_the_new_layers() {
    executor::run(0, async {
        let (coarse, fine) = (MemoryStorage::new(1 << 20).aligned(4096), MemoryStorage::new(1 << 20));
        let chain = Chain::new(vec![raw_info(&coarse)]);
        assert_eq!(Disk::geometry(&chain).preferred_alignment, 4096);
        chain.switch(async |_| Ok::<_, DiskError>(vec![raw_info(&fine)])).await.unwrap();
        assert_eq!(Disk::geometry(&chain).preferred_alignment, 1);
        chain.switch(async |old| Ok::<_, DiskError>(vec![old[0].clone(), raw_info(&coarse)])).await.unwrap();
        assert_eq!(Disk::geometry(&chain).preferred_alignment, 4096);
    });
}

/// A close at the same time closes the layers from before or those from after, and nothing is lost either way.
#[test]
fn switch_and_close() {
    let (mut before, mut after) = (0, 0);
    seeds::each(100, |seed| {
        executor::run(seed, async {
            let options = MemoryLayerOptions { erratic: Some(seed), ..Default::default() };
            let (base, overlay) =
                (Rc::new(MemoryLayer::new(1 << 20, options)), Rc::new(MemoryLayer::new(1 << 20, options)));
            let chain = Rc::new(Chain::new(vec![memory_info(&base)]));
            let disk = DiskHandle::from_rc(Rc::clone(&chain));
            disk.write(4096, Buf::copy_of(&[1; 4096]), NONE).await.unwrap();
            let (theirs, top) = (Rc::clone(&chain), memory_info(&overlay));
            let switching = executor::spawn(async move {
                theirs
                    .switch(async |old| {
                        yield_now().await;
                        Ok::<_, DiskError>([top].into_iter().chain(old.iter().cloned()).collect())
                    })
                    .await
            });
            let theirs = Rc::clone(&chain);
            let closing = executor::spawn(async move { Disk::close(&*theirs).await });
            closing.await.unwrap();
            let switched = switching.await;
            match &switched {
                Ok(()) => after += 1,
                Err(error) => {
                    assert_eq!(error.kind(), ErrorKind::Closed);
                    before += 1;
                }
            }
            assert_eq!(chain.layers().len(), 1 + usize::from(switched.is_ok()));
            let syncs = overlay.memory().counters().syncs;
            assert_eq!(syncs, u64::from(switched.is_ok()), "the overlay was closed if it was there");
            assert_eq!(disk.flush().await.unwrap_err().kind(), ErrorKind::Closed);
        });
    });
    assert!(before > 0 && after > 0 || std::env::var_os("HIGHWATER_SEED").is_some());
}

/// A chain of qcow2 images in memory, the base first, each naming the one before.
struct Images {
    size: u64,
    options: Vec<CreateOptions>,
    storages: Vec<MemoryStorage>,
}

impl Images {
    fn name(at: usize) -> String {
        format!("image-{at}.qcow2")
    }

    async fn add(&mut self, random: &mut fastrand::Rng) -> LayerInfo {
        let at = self.storages.len();
        let mut options = CreateOptions::new(self.size);
        options.extended_l2 = random.u8(..4) == 0;
        options.cluster_size = 1 << if options.extended_l2 { 14 } else { [9, 12, 16][random.usize(..3)] };
        options.version = if options.extended_l2 || random.u8(..4) > 0 { 3 } else { 2 };
        options.lazy_refcounts = options.version == 3 && random.u8(..3) == 0;
        options.backing =
            at.checked_sub(1).map(|below| BackingRef { name: Self::name(below), format: Some("qcow2".into()) });
        let storage = MemoryStorage::new(0).named(&Self::name(at)).yielding(random.u64(..));
        qcow2::create(&storage.handle(), None, &options).await.expect("create");
        let info = qcow2_info(&Self::name(at), storage.handle()).await;
        self.options.push(options);
        self.storages.push(storage);
        info
    }

    /// Lets QEMU's tools judge every image, and the bytes that the last one shows.
    fn judge(&self, truth: &[u8]) {
        let dir = tempfile::tempdir().expect("a temporary directory");
        for (at, storage) in self.storages.iter().enumerate() {
            storage.write_to(&dir.path().join(Self::name(at))).expect("an image");
        }
        for at in 0..self.storages.len() {
            judges::check(&dir.path().join(Self::name(at)), "qcow2").assert_clean();
        }
        std::fs::write(dir.path().join("truth"), truth).expect("the truth");
        let top = dir.path().join(Self::name(self.storages.len() - 1));
        assert!(judges::equal(&top, "qcow2", &dir.path().join("truth"), "raw"), "qemu-img compare");
    }
}

/// What a live snapshot does: the top is closed, and an overlay put on it, while requests run. Every image that is left is
/// whole in QEMU's eyes.
#[test]
fn qcow2_overlays_under_load() {
    seeds::each(25, |seed| {
        executor::run(seed, async {
            let mut random = fastrand::Rng::with_seed(seed);
            let size = random.u64(200..3000) * 512;
            let mut images = Images { size, options: Vec::new(), storages: Vec::new() };
            let chain = Rc::new(Chain::new(vec![images.add(&mut random).await]));
            let disk = DiskHandle::from_rc(Rc::clone(&chain));
            let model = ModelDisk::new(size);
            let w = Workload { seed, requests: 60, workers: 5, alignment: 512, ..Workload::default() };
            let switching = async {
                for _ in 0..3 {
                    for _ in 0..random.u32(..2000) {
                        yield_now().await;
                    }
                    let overlay = images.add(&mut random).await;
                    let fails = random.u8(..3) == 0;
                    let switched = chain
                        .switch(async |old| {
                            old[0].handle.close().await?;
                            match fails {
                                true => Err(refusal("the top stays, though it was closed")),
                                false => Ok([overlay.clone()].into_iter().chain(old.iter().cloned()).collect()),
                            }
                        })
                        .await;
                    assert_eq!(switched.is_err(), fails);
                    if fails {
                        overlay.handle.close().await.unwrap();
                        images.storages.pop();
                        images.options.pop();
                    }
                }
            };
            let (worked, ()) = join(workload(&disk, &model, w), switching).await;
            worked.unwrap();
            model.check_equal(&disk).await.unwrap();
            let truth = disk.read(0, Buf::new(size as usize)).await.unwrap();
            disk.close().await.unwrap();
            images.judge(&truth);
        });
    });
}

async fn header_of(storage: &CrashStorage) -> Header {
    Header::read(&storage.handle()).await.expect("a header")
}

/// A layer that was closed can be read, and written again; the first write after it is announced like the first one.
#[test]
fn a_closed_image_is_written_again() {
    seeds::each(120, |seed| {
        let mut random = fastrand::Rng::with_seed(seed);
        let size = 400 * 512;
        let mut options = CreateOptions::new(size);
        options.cluster_size = [512, 4096, 65536][random.usize(..3)];
        options.version = if random.u8(..4) == 0 { 2 } else { 3 };
        options.lazy_refcounts = options.version == 3 && random.bool();
        let lazy = options.lazy_refcounts;
        let storage = CrashStorage::new(0).yielding(seed);
        let model = ModelDisk::new(size);
        executor::run(seed, async {
            qcow2::create(&storage.handle(), None, &options).await.unwrap();
            let top = qcow2_info("image", storage.handle()).await;
            let chain = Rc::new(Chain::new(vec![top.clone()]));
            let disk = DiskHandle::from_rc(Rc::clone(&chain));
            for life in 0..3 {
                let w = Workload { seed: seed + life, requests: 15, workers: 3, ..Workload::default() };
                let w = Workload { alignment: 512, longest: 20_000, ..w };
                workload(&disk, &model, w).await.unwrap();
                model.write(&disk, 0, Buf::copy_of(&[life as u8; 512]), NONE).await.unwrap();
                assert_eq!(header_of(&storage).await.is_dirty(), lazy, "announced in life {life}");
                let issued = model.issue_flush();
                top.handle.close().await.unwrap();
                model.end_flush(issued);
                assert!(!header_of(&storage).await.is_dirty(), "closed in life {life}");
                let left = storage.memory().to_vec();
                assert_eq!(storage.crash(seed).to_vec(), left, "a close is durable");
                let report = qcow2::check::check(&storage.handle(), None, &mut |_, _| {}).await.unwrap();
                assert!(report.is_clean(), "life {life}: {report:?}");
                model.check_equal(&disk).await.unwrap();
            }
            // And the power fails after some of the next writes.
            let range = ByteRange::new(0, 64 * 512);
            model.write_zeroes(&disk, range, ZeroMode { unmap: true, fast_only: false }, NONE).await.unwrap();
            let w = Workload { seed, requests: random.u32(..8), workers: 2, alignment: 512, ..Workload::default() };
            workload(&disk, &model, w).await.unwrap();
        });
        let left = storage.crash(seed);
        executor::run(seed, async {
            let reopened = DiskHandle::new(Chain::new(vec![qcow2_info("image", left.handle()).await]));
            model.check_after_crash(&reopened).await.unwrap();
            reopened.close().await.unwrap();
            let report = qcow2::check::check(&left.handle(), None, &mut |_, _| {}).await.unwrap();
            assert_eq!((report.corruptions, report.check_errors), (0, 0), "{report:?}");
        });
    });
}

#[test]
fn a_closed_raw_image_is_written_again() -> Result<()> {
    executor::run(0, async {
        let storage = MemoryStorage::new(1 << 20);
        let chain = Chain::new(vec![raw_info(&storage)]);
        Disk::write(&chain, 0, Buf::copy_of(&[1; 512]), NONE).await?;
        chain.top().close().await?;
        assert_eq!(Disk::read(&chain, 0, Buf::new(1)).await?[0], 1);
        Disk::write(&chain, 0, Buf::copy_of(&[2; 512]), NONE).await?;
        Disk::close(&chain).await?;
        assert_eq!(storage.to_vec()[0], 2);
        Ok(())
    })
}
