//! The guest's changes are held for an instant, while requests and changes of size run.

use chain::{Chain, LayerInfo};
use disk::{Buf, Disk, DiskHandle, Preallocation};
use formats::Format;
use futures_util::future::join3;
use std::path::PathBuf;
use std::rc::Rc;
use testkit::conformance::{Workload, workload};
use testkit::executor::{self, yield_now};
use testkit::{MemoryLayer, MemoryLayerOptions, ModelDisk, seeds};

async fn content(disk: &DiskHandle) -> Vec<u8> {
    disk.read(0, Buf::new(disk.geometry().size as usize)).await.unwrap().to_vec()
}

#[test]
fn neither_a_byte_nor_the_size_changes_while_held() {
    seeds::each(150, |seed| {
        executor::run(seed, async {
            let mut random = fastrand::Rng::with_seed(seed);
            let (mut pauses, size) = (random.fork(), random.u64(100..1200) * 512);
            let options = MemoryLayerOptions { erratic: Some(seed), ..Default::default() };
            let layer = Rc::new(MemoryLayer::new(size, options));
            let info = LayerInfo { path: PathBuf::from("memory"), format: Format::Raw, handle: layer.handle() };
            let chain = Rc::new(Chain::new(vec![info]));
            let disk = DiskHandle::from_rc(Rc::clone(&chain));
            let model = ModelDisk::new(size);
            let w = Workload { seed, requests: 40, workers: 4, ..Workload::default() };
            let holding = async {
                for _ in 0..4 {
                    for _ in 0..random.u32(..60) {
                        yield_now().await;
                    }
                    let held = chain.hold_writes().await.unwrap();
                    let before = content(&disk).await;
                    for _ in 0..random.u32(..60) {
                        yield_now().await;
                    }
                    assert!(content(&disk).await == before, "the disk changed while it was held");
                    drop(held);
                }
            };
            // Only larger, and back: what the workload touches stays.
            let resizing = async {
                for n in 0..6 {
                    for _ in 0..pauses.u32(..30) {
                        yield_now().await;
                    }
                    let to = if n % 2 == 0 { size + 4096 } else { size };
                    chain.resize_with(to, Preallocation::Off).await.unwrap();
                }
            };
            let (worked, (), ()) = join3(workload(&disk, &model, w), holding, resizing).await;
            worked.unwrap();
            assert_eq!(chain.geometry().size, size);
            model.check_equal(&disk).await.unwrap();
            disk.close().await.unwrap();
        });
    });
}
