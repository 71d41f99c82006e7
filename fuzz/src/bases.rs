//! Sound images of many geometries, for inputs that change some bytes of one.

use chain::{Chain, LayerInfo};
use disk::{Buf, ByteRange, Disk, LayerHandle, WriteFlags, ZeroMode};
use formats::Format;
use formats::qcow2::{self, CreateOptions, Image, OpenOptions, encode_cluster};
use std::sync::OnceLock;
use testkit::{MemoryStorage, SparseBytes};

/// A sound image.
#[derive(Clone)]
pub struct Base {
    pub image: SparseBytes,
    pub data: Option<SparseBytes>,
    pub cluster_bits: u32,
}

/// Made by qemu-img 10 with internal snapshots, bitmaps and compressed clusters; clusters of 512 bytes and 4 KiB.
const BY_QEMU: [(&[u8], u32); 2] = [
    (include_bytes!("../seeds/base/snapshot-bitmap-512.qcow2"), 9),
    (include_bytes!("../seeds/base/snapshot-extended-16k.qcow2"), 14),
];

/// All of them, made once.
pub fn bases() -> &'static [Base] {
    static BASES: OnceLock<Vec<Base>> = OnceLock::new();
    BASES.get_or_init(|| {
        let mut all: Vec<Base> = [
            "cluster_size=512",
            "cluster_size=512,compat=0.10",
            "cluster_size=4096,refcount_bits=1",
            "cluster_size=16384,extended_l2=on,compression_type=zstd",
            "lazy_refcounts=on",
            "cluster_size=512,refcount_bits=64,compression_type=zstd",
            "cluster_size=512,data_file=data",
            "cluster_size=16384,extended_l2=on,data_file=data,data_file_raw=on",
            "cluster_size=2097152,refcount_bits=8",
            "cluster_size=1024,refcount_bits=2,preallocation=metadata",
        ]
        .into_iter()
        .map(made)
        .collect();
        all.extend(BY_QEMU.map(|(bytes, cluster_bits)| {
            let mut image = SparseBytes::new(0);
            image.write(0, bytes);
            Base { image, data: None, cluster_bits }
        }));
        all
    })
}

/// An image with data, zeroes, compressed clusters and freed space.
fn made(words: &str) -> Base {
    let pairs = words.split(',').map(|pair| pair.split_once('=').expect("an option"));
    let options = CreateOptions::parse(200 * 1024, pairs).expect("valid options");
    let image = MemoryStorage::new(0);
    let data = options.data_file.is_some().then(|| MemoryStorage::new(0));
    testkit::executor::run(1, async {
        let (storage, data_storage) = (image.handle(), data.as_ref().map(MemoryStorage::handle));
        let header = qcow2::create(&storage, data_storage.as_ref(), &options).await.expect("create");
        let layer = Image::open(storage, data_storage, OpenOptions::default()).await.expect("open");
        let handle = LayerHandle::from_rc(layer);
        let chain = Chain::new(vec![LayerInfo { path: "image".into(), format: Format::Qcow2, handle: handle.clone() }]);
        let write = |offset, len, byte| chain.write(offset, Buf::copy_of(&vec![byte; len]), WriteFlags::default());
        write(0, 20_000, 1).await.expect("write");
        write(50_000, 3000, 2).await.expect("write");
        let unit = header.cluster_size();
        if handle.geometry().encoded_unit.is_some() && unit <= 16384 {
            for (at, byte) in [(4, 3), (5, 4)] {
                let encoded = encode_cluster(options.compression, &vec![byte; unit as usize]).expect("compresses");
                handle.write_encoded(ByteRange::new(at * unit, unit), &encoded).await.expect("write compressed");
            }
        }
        let zero = ByteRange::new(0, 4096);
        chain.write_zeroes(zero, ZeroMode::default(), WriteFlags::default()).await.expect("zero");
        chain.discard(ByteRange::new(8192, 4096), WriteFlags::default()).await.expect("discard");
        Disk::close(&chain).await.expect("close");
    });
    let cluster_bits = options.cluster_size.trailing_zeros();
    Base { image: image.snapshot(), data: data.map(|data| data.snapshot()), cluster_bits }
}
