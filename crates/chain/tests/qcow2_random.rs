//! Random operations on qcow2 images of many geometries, compared with plain memory on the way and judged by
//! `qemu-img` at the end: no errors, no leaks, the same bytes.

use chain::{Chain, LayerInfo};
use disk::{Buf, ByteRange, Disk, DiskHandle, LayerHandle, Preallocation, WriteFlags, ZeroMode};
use formats::Format;
use formats::qcow2::{self, BackingRef, Compression, CreateOptions, Image, OpenOptions};
use formats::raw::RawLayer;
use std::path::Path;
use std::process::Command;
use std::rc::Rc;
use testkit::executor::{run, run_all};
use testkit::{MemoryStorage, seeds};

/// One way to make an image.
#[derive(Clone, Debug)]
struct Geometry {
    options: CreateOptions,
    /// Bytes of a raw parent.
    parent: Option<u64>,
    alignment: u32,
}

fn geometry(rng: &mut fastrand::Rng) -> Geometry {
    let extended = rng.u8(..4) == 0;
    let version = if !extended && rng.u8(..6) == 0 { 2 } else { 3 };
    let cluster_bits = if extended { rng.u32(14..=17) } else { [9, 10, 12, 16, 16, 16, 17, 21][rng.usize(..8)] };
    let size = match cluster_bits {
        9 | 10 => rng.u64(1..1500) * 512,
        21 => rng.u64(1..64) * 512 * 1024,
        _ => rng.u64(1..20000) * 512,
    };
    let parent = (rng.u8(..3) == 0).then(|| rng.u64(0..=size / 512 + 100) * 512);
    let data_file = parent.is_none() && version == 3 && rng.u8(..6) == 0;
    let mut options = CreateOptions::new(size);
    options.version = version;
    options.cluster_size = 1 << cluster_bits;
    options.refcount_bits = if version == 2 { 16 } else { 1 << rng.u32(0..=6) };
    options.extended_l2 = extended;
    options.lazy_refcounts = version == 3 && rng.u8(..5) == 0;
    options.compression = if version == 3 && rng.bool() { Compression::Zstd } else { Compression::Zlib };
    if data_file {
        options.data_file = Some("data".to_owned());
        options.data_file_raw = rng.bool();
    }
    options.backing = parent.map(|_| BackingRef { name: "parent.raw".to_owned(), format: Some("raw".to_owned()) });
    Geometry { options, parent, alignment: [1, 1, 512, 4096][rng.usize(..4)] }
}

/// The files of one image.
#[derive(Clone)]
struct Files {
    image: MemoryStorage,
    data: Option<MemoryStorage>,
    parent: Option<MemoryStorage>,
}

impl Files {
    async fn open(&self) -> (DiskHandle, Rc<Chain>) {
        let data = self.data.as_ref().map(MemoryStorage::handle);
        let options = OpenOptions { l2_cache_bytes: 0, ..OpenOptions::default() };
        let image = Image::open(self.image.handle(), data, options).await.expect("opens");
        let layer = |format, handle| LayerInfo { path: "image".into(), format, handle };
        let mut layers = vec![layer(Format::Qcow2, LayerHandle::from_rc(image))];
        if let Some(parent) = &self.parent {
            let parent = RawLayer::open(parent.read_only().handle(), formats::raw::OpenOptions::default());
            layers.push(layer(Format::Raw, LayerHandle::new(parent)));
        }
        let chain = Rc::new(Chain::new(layers));
        (DiskHandle::from_rc(Rc::clone(&chain)), chain)
    }
}

/// The guest's bytes as they should be.
struct Truth(Vec<u8>);

/// One request.
#[derive(Clone, Debug)]
enum Op {
    Write(ByteRange, u8),
    Zero(ByteRange, bool),
    Discard(ByteRange),
    Compress(u64, u8),
}

fn pattern(range: ByteRange, stamp: u8) -> Vec<u8> {
    (0..range.len()).map(|i| stamp ^ ((range.offset() + i) / 512 % 251) as u8).collect()
}

async fn apply(disk: DiskHandle, chain: Rc<Chain>, op: Op, compression: Compression) {
    match op {
        Op::Write(range, stamp) => {
            disk.write(range.offset(), Buf::copy_of(&pattern(range, stamp)), WriteFlags::default())
                .await
                .expect("write");
        }
        Op::Zero(range, unmap) => {
            let mode = ZeroMode { unmap, fast_only: false };
            disk.write_zeroes(range, mode, WriteFlags::default()).await.expect("zero");
        }
        Op::Discard(range) => disk.discard(range, WriteFlags::default()).await.expect("discard"),
        Op::Compress(at, stamp) => {
            let unit = chain.top().geometry().encoded_unit.expect("compresses");
            let size = disk.geometry().size;
            let range = ByteRange::between(at * unit, ((at + 1) * unit).min(size));
            let mut bytes = pattern(range, stamp);
            bytes.resize(unit as usize, 0);
            match qcow2::encode_cluster(compression, &bytes) {
                Some(encoded) => chain.top().write_encoded(range, &encoded).await.expect("write compressed"),
                None => {
                    bytes.truncate(range.len() as usize);
                    disk.write(range.offset(), Buf::copy_of(&bytes), WriteFlags::default()).await.expect("write");
                }
            }
        }
    }
}

fn random_range(rng: &mut fastrand::Rng, size: u64, cluster: u64) -> ByteRange {
    let sectors = size / 512;
    let max = match rng.u8(..8) {
        0 => 8 * cluster,
        1..3 => 2 * cluster,
        _ => 8192,
    };
    let offset = rng.u64(..sectors) * 512;
    let len = (rng.u64(..max / 512 + 1) + 1) * 512;
    // Some are not even sectors.
    let (offset, len) = if rng.u8(..6) == 0 { (offset + rng.u64(..512), rng.u64(1..1000)) } else { (offset, len) };
    ByteRange::new(offset, len).intersect(ByteRange::new(0, size))
}

/// Operations for one batch: they run at the same time, so their bytes are apart, but not their clusters.
fn batch(rng: &mut fastrand::Rng, geometry: &Geometry, truth: &mut Truth, chain: &Chain) -> Vec<Op> {
    let size = geometry.options.size;
    let cluster = geometry.options.cluster_size;
    let mut taken: Vec<ByteRange> = Vec::new();
    let mut ops = Vec::new();
    for _ in 0..rng.usize(1..12) {
        let compresses = chain.top().geometry().encoded_unit.is_some();
        let op = match rng.u8(..10) {
            0 | 1 => Op::Zero(random_range(rng, size, cluster), rng.bool()),
            2 => Op::Discard(random_range(rng, size, cluster)),
            3 if compresses => Op::Compress(rng.u64(..size.div_ceil(cluster)), rng.u8(..)),
            _ => Op::Write(random_range(rng, size, cluster), rng.u8(..)),
        };
        let range = match &op {
            Op::Write(range, _) | Op::Zero(range, _) | Op::Discard(range) => *range,
            Op::Compress(at, _) => ByteRange::between(at * cluster, ((at + 1) * cluster).min(size)),
        };
        if range.is_empty() || taken.iter().any(|t| t.overlaps(range)) {
            continue;
        }
        taken.push(range);
        let bytes = &mut truth.0[range.offset() as usize..range.end() as usize];
        match &op {
            Op::Write(_, stamp) | Op::Compress(_, stamp) => bytes.copy_from_slice(&pattern(range, *stamp)),
            Op::Zero(..) => bytes.fill(0),
            Op::Discard(_) => {} // Settled by reading: see `settle_discards`.
        }
        ops.push(op);
    }
    ops
}

/// A discarded byte is zero or as before; take over what the disk decided.
async fn settle_discards(ops: &[Op], disk: &DiskHandle, truth: &mut Truth) {
    for op in ops {
        if let Op::Discard(range) = op {
            let now = disk.read(range.offset(), Buf::new(range.len() as usize)).await.expect("read");
            for (i, byte) in now.iter().enumerate() {
                let at = range.offset() as usize + i;
                let was = &mut truth.0[at];
                assert!(*byte == 0 || byte == was, "discarded byte {at:#x} is neither zero nor old");
                *was = *byte;
            }
        }
    }
}

/// Another size, within twice the first one.
fn resize(rng: &mut fastrand::Rng, geometry: &mut Geometry, truth: &mut Truth, chain: &Chain, seed: u64) {
    let old = geometry.options.size;
    let new = match rng.u8(..3) {
        0 => rng.u64(1..=old / 512) * 512,
        _ => old + rng.u64(..=old.min(4 << 20) / 512) * 512,
    };
    let how = [Preallocation::Off, Preallocation::Metadata, Preallocation::Falloc, Preallocation::Full][rng.usize(..4)];
    let how = if new > old { how } else { Preallocation::Off };
    if std::env::var_os("HIGHWATER_SEED").is_some() {
        eprintln!("resize {old} to {new}, {how:?}");
    }
    run(seed, chain.resize_with(new, how)).expect("resize");
    geometry.options.size = new;
    truth.0.resize(new as usize, 0);
}

fn assert_same(now: &[u8], truth: &[u8], offset: u64) {
    if let Some(at) = now.iter().zip(truth).position(|(a, b)| a != b) {
        panic!("byte {:#x} is {:#x}, expected {:#x}", offset + at as u64, now[at], truth[at]);
    }
    assert_eq!(now.len(), truth.len());
}

fn qemu_img(dir: &Path, args: &[&str]) -> (bool, String) {
    let output = Command::new("qemu-img").current_dir(dir).args(args).output().expect("qemu-img is installed");
    let text = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    (output.status.success(), text)
}

fn judge(files: &Files, truth: &Truth) {
    let dir = tempfile::tempdir().expect("temporary directory");
    files.image.write_to(&dir.path().join("image.qcow2")).expect("image");
    if let Some(data) = &files.data {
        data.write_to(&dir.path().join("data")).expect("data");
    }
    if let Some(parent) = &files.parent {
        parent.write_to(&dir.path().join("parent.raw")).expect("parent");
    }
    std::fs::write(dir.path().join("truth"), &truth.0).expect("truth");
    let (clean, text) = qemu_img(dir.path(), &["check", "-f", "qcow2", "image.qcow2"]);
    assert!(clean, "qemu-img check: {text}");
    let (same, text) = qemu_img(dir.path(), &["compare", "-f", "qcow2", "-F", "raw", "image.qcow2", "truth"]);
    assert!(same, "qemu-img compare: {text}");
}

fn one_image(seed: u64) {
    let mut rng = fastrand::Rng::with_seed(seed);
    let mut geometry = geometry(&mut rng);
    let size = geometry.options.size;
    let alignment = geometry.alignment;
    let storage = |yields: u64| MemoryStorage::new(0).aligned(alignment).yielding(yields);
    let files = Files {
        image: storage(seed),
        data: geometry.options.data_file.as_ref().map(|_| storage(seed + 1)),
        parent: geometry.parent.map(|len| {
            let parent = MemoryStorage::new(len);
            parent.tamper(|bytes| {
                for at in (0..len).step_by(512).filter(|_| rng.bool()) {
                    bytes.write(at, &pattern(ByteRange::new(at, 512), 0x5a));
                }
            });
            parent
        }),
    };
    if std::env::var_os("HIGHWATER_SEED").is_some() {
        eprintln!("{geometry:?}");
    }
    let mut truth = Truth(vec![0; size as usize]);
    if let Some(parent) = &files.parent {
        let bytes = parent.to_vec();
        let len = bytes.len().min(truth.0.len());
        truth.0[..len].copy_from_slice(&bytes[..len]);
    }
    run(seed, async {
        let data = files.data.as_ref().map(MemoryStorage::handle);
        qcow2::create(&files.image.handle(), data.as_ref(), &geometry.options).await.expect("create");
    });
    for life in 0..rng.u64(1..4) {
        let (disk, chain) = run(seed + life, files.open());
        for round in 0..rng.u64(1..16) {
            if rng.u8(..8) == 0 {
                resize(&mut rng, &mut geometry, &mut truth, &chain, seed ^ round);
            }
            let ops = batch(&mut rng, &geometry, &mut truth, &chain);
            if std::env::var_os("HIGHWATER_SEED").is_some() {
                eprintln!("life {life} round {round}: {ops:x?}");
            }
            let mut running: Vec<disk::LocalFuture<'_, ()>> = Vec::new();
            for op in ops.clone() {
                running.push(Box::pin(apply(disk.clone(), Rc::clone(&chain), op, geometry.options.compression)));
            }
            if rng.u8(..4) == 0 {
                let disk = disk.clone();
                running.push(Box::pin(async move { disk.flush().await.expect("flush") }));
            }
            run_all(seed ^ round, running);
            run(seed, async {
                settle_discards(&ops, &disk, &mut truth).await;
                for op in &ops {
                    if let Op::Write(range, _) | Op::Zero(range, _) = op {
                        let now = disk.read(range.offset(), Buf::new(range.len() as usize)).await.expect("read");
                        assert_same(&now, &truth.0[range.offset() as usize..range.end() as usize], range.offset());
                    }
                }
            });
        }
        run(seed, async {
            let now = disk.read(0, Buf::new(truth.0.len())).await.expect("read");
            assert_same(&now, &truth.0, 0);
            Disk::close(&*chain).await.expect("close");
        });
        judge(&files, &truth);
    }
}

#[test]
fn random_operations_judged_by_qemu_img() {
    seeds::each(80, one_image);
}
