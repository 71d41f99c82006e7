//! qcow2 passes the suites that every layer and disk owes.

use chain::{Chain, LayerInfo};
use disk::{DiskHandle, LayerHandle};
use formats::Format;
use formats::qcow2::{self, Compression, CreateOptions, Image, OpenOptions};
use std::path::PathBuf;
use testkit::conformance::{self, LayerCaps};
use testkit::{MemoryStorage, executor, seeds};

/// One geometry: version, cluster size, subclusters.
type Geometry = (u32, u64, bool);

async fn image(size: u64, (version, cluster_size, extended_l2): Geometry, seed: u64) -> LayerHandle {
    let storage = MemoryStorage::new(0).yielding(seed).handle();
    let options = CreateOptions { version, cluster_size, extended_l2, ..CreateOptions::new(size) };
    qcow2::create(&storage, None, &options).await.expect("create");
    LayerHandle::from_rc(Image::open(storage, None, OpenOptions::default()).await.expect("open"))
}

/// Bytes that do not get shorter are of no use here: the suite's are regular.
fn deflated(cluster: &[u8]) -> Vec<u8> {
    qcow2::encode_cluster(Compression::Zlib, cluster).expect("regular bytes get shorter")
}

fn suites(geometry: Geometry) {
    // Sizes are tested through the chain: a qcow2 layer alone that shrinks to a size inside a cluster and grows
    // again shows the old rest of that cluster.
    let caps = LayerCaps { parent: true, resizes: false, encode: Some(deflated) };
    seeds::each(2, |seed| {
        executor::run(seed, conformance::layer(|size| image(size, geometry, seed), caps));
        let disk = |size| async move {
            let handle = image(size, geometry, seed).await;
            let layer = LayerInfo { path: PathBuf::from("disk.qcow2"), format: Format::Qcow2, handle };
            DiskHandle::new(Chain::new(vec![layer]))
        };
        executor::run(seed, conformance::disk(disk, true));
    });
}

#[test]
fn version_3() {
    suites((3, 65_536, false));
}

#[test]
fn small_clusters() {
    suites((3, 4096, false));
}

#[test]
fn version_2() {
    suites((2, 65_536, false));
}

#[test]
fn subclusters() {
    suites((3, 65_536, true));
}
