//! Loss of power at any moment under a qcow2 image: never more than leaks, never a byte that is neither what was
//! last made durable nor issued later.

use chain::{Chain, LayerInfo};
use disk::{
    Buf, ByteRange, DiskHandle, HistoryMark, LayerHandle, LocalFuture, Preallocation, StorageHandle, WriteFlags,
    ZeroMode,
};
use formats::Format;
use formats::qcow2::check::{CheckReport, check};
use formats::qcow2::{self, BackingRef, Compression, CreateOptions, Image, OpenOptions, encode_cluster};
use formats::raw;
use std::process::Command;
use std::rc::Rc;
use testkit::executor::{Executor, run};
use testkit::{CrashStorage, MemoryStorage, ModelDisk, seeds};

/// Which images crash.
struct Setup {
    options: CreateOptions,
    parent: Option<MemoryStorage>,
    alignment: u32,
    /// The guest's bytes stand in a file of their own.
    data_file: bool,
}

fn setup(rng: &mut fastrand::Rng) -> Setup {
    let cluster_bits = [9, 9, 10, 12, 16][rng.usize(..5)];
    let extended = rng.u8(..5) == 0;
    let cluster_bits = if extended { 14 } else { cluster_bits };
    let size = rng.u64(64..2000) * 512;
    let mut options = CreateOptions::new(size);
    options.cluster_size = 1 << cluster_bits;
    options.extended_l2 = extended;
    options.refcount_bits = [1, 8, 16, 64][rng.usize(..4)];
    options.lazy_refcounts = rng.u8(..4) == 0;
    let parent = (rng.u8(..3) == 0).then(|| {
        let parent = MemoryStorage::new(size);
        parent.tamper(|bytes| {
            for at in (0..size).step_by(512).filter(|_| rng.bool()) {
                bytes.write(at, &[0x77; 512]);
            }
        });
        parent
    });
    options.backing = parent.as_ref().map(|_| BackingRef { name: "parent.raw".into(), format: Some("raw".into()) });
    let data_file = parent.is_none() && rng.u8(..6) == 0;
    if data_file {
        options.data_file = Some("data".into());
        options.data_file_raw = rng.bool();
    }
    options.compression = [Compression::Zlib, Compression::Zstd][rng.usize(..2)];
    Setup { options, parent, alignment: [1, 512][rng.usize(..2)], data_file }
}

async fn open(storage: StorageHandle, data: Option<StorageHandle>, setup: &Setup) -> (DiskHandle, Rc<Chain>) {
    let options = OpenOptions { l2_cache_bytes: 0, ..OpenOptions::default() };
    let image = Image::open(storage, data, options).await.expect("opens after a crash");
    let layer = |format, handle| LayerInfo { path: "image".into(), format, handle };
    let mut layers = vec![layer(Format::Qcow2, LayerHandle::from_rc(image))];
    if let Some(parent) = &setup.parent {
        let parent = raw::RawLayer::open(parent.read_only().handle(), raw::OpenOptions::default());
        layers.push(layer(Format::Raw, LayerHandle::new(parent)));
    }
    let chain = Rc::new(Chain::new(layers));
    (DiskHandle::from_rc(Rc::clone(&chain)), chain)
}

fn random_range(rng: &mut fastrand::Rng, size: u64) -> ByteRange {
    let offset = rng.u64(..size / 512) * 512;
    let max = [4096, 4096, 16384, 65536 * 2][rng.usize(..4)];
    ByteRange::new(offset, rng.u64(1..=max / 512) * 512).intersect(ByteRange::new(0, size))
}

/// Stores a whole cluster in compressed form.
async fn write_compressed(chain: &Chain, model: &ModelDisk, at: u64, how: Compression, stamp: u8) {
    let geometry = chain.top().geometry();
    let Some(unit) = geometry.encoded_unit.filter(|unit| *unit <= 16384) else { return };
    let range = ByteRange::new(at / unit * unit, unit).intersect(ByteRange::new(0, geometry.size));
    let mut cluster = vec![0; unit as usize];
    cluster[..range.len() as usize].fill(stamp);
    let Some(encoded) = encode_cluster(how, &cluster) else { return };
    let issued = model.issue_write(range.offset(), &cluster[..range.len() as usize]);
    chain.top().write_encoded(range, &encoded).await.expect("compressed write");
    model.end(issued, false, false);
}

/// A guest that goes on until the power fails.
async fn guest(disk: DiskHandle, chain: Rc<Chain>, model: ModelDisk, how: Compression, seed: u64) {
    let mut rng = fastrand::Rng::with_seed(seed);
    let size = disk.geometry().size;
    for _ in 0..200 {
        let range = random_range(&mut rng, size);
        let flags = WriteFlags { fua: rng.u8(..10) == 0 };
        match rng.u8(..12) {
            11 => {
                let mark = HistoryMark { lineage: [1; 16], moment: [rng.u8(..); 16] };
                chain.top().set_history_mark((rng.u8(..4) > 0).then_some(mark)).await.map(drop).expect("mark");
            }
            10 => write_compressed(&chain, &model, range.offset(), how, rng.u8(1..)).await,
            0 => model.flush(&disk).await.expect("flush"),
            1 => model.discard(&disk, range, flags).await.expect("discard"),
            2 => {
                let mode = ZeroMode { unmap: rng.bool(), fast_only: false };
                model.write_zeroes(&disk, range, mode, flags).await.expect("zero");
            }
            _ => {
                let stamp = rng.u8(1..);
                let bytes: Vec<u8> = (0..range.len()).map(|i| stamp.wrapping_add((i / 512) as u8)).collect();
                model.write(&disk, range.offset(), Buf::copy_of(&bytes), flags).await.expect("write");
            }
        }
    }
}

fn assert_no_corruption(report: &CheckReport, lazy: bool) {
    // With lazy reference counts the dirty bit announces that they are to be made anew.
    if !(lazy && report.dirty) {
        assert_eq!((report.corruptions, report.check_errors), (0, 0), "{:#?}", report.findings);
    }
}

fn judge_with_qemu_img(image: &MemoryStorage, setup: &Setup) {
    let dir = tempfile::tempdir().expect("temporary directory");
    let path = dir.path().join("image.qcow2");
    image.write_to(&path).expect("image");
    if let Some(parent) = &setup.parent {
        parent.write_to(&dir.path().join("parent.raw")).expect("parent");
    }
    let output = Command::new("qemu-img").args(["check", "-f", "qcow2"]).arg(&path).output().expect("qemu-img");
    // 0: clean, 3: leaks.
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(matches!(output.status.code(), Some(0 | 3)), "qemu-img check: {text} {:?}", output);
}

fn one_history(seed: u64) {
    let mut rng = fastrand::Rng::with_seed(seed);
    let setup = setup(&mut rng);
    let mut memory = MemoryStorage::new(0).aligned(setup.alignment);
    let mut data = setup.data_file.then(|| MemoryStorage::new(0).aligned(setup.alignment));
    run(seed, async {
        let data = data.as_ref().map(MemoryStorage::handle);
        qcow2::create(&memory.handle(), data.as_ref(), &setup.options).await.expect("create");
    });
    let mut model = match &setup.parent {
        Some(parent) => ModelDisk::of(&parent.to_vec()),
        None => ModelDisk::new(setup.options.size),
    };
    for life in 0..rng.u64(1..4) {
        let storage = CrashStorage::of(memory.clone()).yielding(seed + life);
        let data_storage = data.as_ref().map(|data| CrashStorage::of(data.clone()).yielding(seed + life + 1));
        let data_handle = data_storage.as_ref().map(CrashStorage::handle);
        let (disk, chain) = run(seed, open(storage.handle(), data_handle, &setup));
        let mut executor = Executor::new(seed ^ life);
        for n in 0..rng.u64(1..6) {
            let (how, seed) = (setup.options.compression, seed * 31 + life * 7 + n);
            executor.spawn(guest(disk.clone(), Rc::clone(&chain), model.clone(), how, seed));
        }
        let steps = 1u64 << rng.u32(2..13);
        executor.run_steps(rng.u64(..steps));
        memory = storage.crash(seed * 3 + life);
        data = data_storage.as_ref().map(|data| data.crash(seed * 5 + life));
        // Nobody drops requests at a loss of power; here their futures must go somewhere.
        drop(executor);
        let data_handle = || data.as_ref().map(MemoryStorage::handle);
        let report = run(seed, check(&memory.handle(), data_handle().as_ref(), &mut |_, _| {})).expect("check");
        assert_no_corruption(&report, setup.options.lazy_refcounts);
        if seed.is_multiple_of(25) && !setup.options.lazy_refcounts && data.is_none() {
            judge_with_qemu_img(&memory, &setup);
        }
        let (disk, chain) = run(seed, open(memory.handle(), data_handle(), &setup));
        model = run(seed, model.check_after_crash(&disk)).expect("read after a crash");
        run(seed, disk::Disk::close(&*chain)).expect("close");
    }
}

#[test]
fn loss_of_power_leaves_leaks_at_most() {
    seeds::each(3000, one_history);
}

/// Loss of power while the disk grows and shrinks: the size is the old or the new one, and what was added is zero though
/// a longer parent has bytes there.
#[test]
fn loss_of_power_during_a_resize() {
    seeds::each(1000, |seed| {
        let mut rng = fastrand::Rng::with_seed(seed);
        let setup = setup(&mut rng);
        let mut options = CreateOptions { lazy_refcounts: false, ..setup.options.clone() };
        (options.data_file, options.data_file_raw) = (None, false);
        if setup.parent.is_some() {
            options.size = options.size / 1024 * 512;
        }
        let memory = MemoryStorage::new(0).aligned(setup.alignment);
        run(seed, async {
            qcow2::create(&memory.handle(), None, &options).await.expect("create");
        });
        let (old, new) = (options.size, [rng.u64(1..64), rng.u64(2000..80000)][rng.usize(..2)] * 512);
        let storage = CrashStorage::of(memory).yielding(seed);
        let (disk, chain) = run(seed, open(storage.handle(), None, &setup));
        let kept = ByteRange::new(0, old.min(new).min(8192));
        run(seed, async {
            disk.write(0, Buf::copy_of(&vec![0xab; kept.len() as usize]), WriteFlags { fua: true })
                .await
                .expect("write");
        });
        let mut executor = Executor::new(seed);
        let resize: LocalFuture<'static, ()> = Box::pin(async move {
            let how = if new > old && seed % 3 == 0 { Preallocation::Metadata } else { Preallocation::Off };
            chain.resize_with(new, how).await.expect("resize");
        });
        executor.spawn(resize);
        executor.run_steps(rng.u64(..400));
        let memory = storage.crash(seed);
        drop(executor);
        let report = run(seed, check(&memory.handle(), None, &mut |_, _| {})).expect("check");
        assert_no_corruption(&report, false);
        let (disk, _) = run(seed, open(memory.handle(), None, &setup));
        let size = disk.geometry().size;
        assert!(size == old || size == new, "size {size} is neither {old} nor {new}");
        let bytes = run(seed, disk.read(0, Buf::new(kept.len() as usize))).expect("read");
        assert!(bytes.iter().all(|b| *b == 0xab), "synced bytes are lost");
        let mut added = ByteRange::between(old, size);
        while !added.is_empty() {
            let part = added.prefix(1 << 20);
            let bytes = run(seed, disk.read(part.offset(), Buf::new(part.len() as usize))).expect("read");
            let shows = bytes.iter().position(|b| *b != 0);
            assert_eq!(shows, None, "something shows in what was added at {}", part.offset());
            added = added.skip(part.len());
        }
    });
}
