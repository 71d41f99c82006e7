//! A raw disk on a storage that loses what was not synced.

use chain::{Chain, LayerInfo};
use disk::{DiskHandle, LayerHandle};
use formats::Format;
use formats::raw::{OpenOptions, RawLayer};
use std::path::PathBuf;
use testkit::conformance::{self, LayerCaps, Workload, workload};
use testkit::executor::{self, Executor};
use testkit::{CrashStorage, MemoryStorage, ModelDisk, seeds};

fn raw_chain(storage: disk::StorageHandle) -> Chain {
    let handle = LayerHandle::new(RawLayer::open(storage, OpenOptions::default()));
    Chain::new(vec![LayerInfo { path: PathBuf::from("disk.raw"), format: Format::Raw, handle }])
}

#[test]
fn raw_passes_the_suites() {
    let caps = LayerCaps { parent: false, resizes: true, encode: None };
    for alignment in [1, 4096] {
        seeds::each(2, |seed| {
            let storage = move |size| MemoryStorage::new(size).aligned(alignment).yielding(seed).handle();
            let layer = |size| async move { LayerHandle::new(RawLayer::open(storage(size), OpenOptions::default())) };
            executor::run(seed, conformance::layer(layer, caps));
            executor::run(
                seed,
                conformance::disk(|size| async move { DiskHandle::new(raw_chain(storage(size))) }, true),
            );
        });
    }
}

#[test]
fn every_sector_is_old_or_new_after_a_crash() {
    const SIZE: u64 = 256 << 10;
    seeds::each(400, |seed| {
        let mut random = fastrand::Rng::with_seed(seed);
        let mut model = ModelDisk::new(SIZE);
        let mut memory = MemoryStorage::new(SIZE);
        // Several crashes in a row: what one left is where the next begins.
        for round in 0..3 {
            let storage = CrashStorage::of(memory).yielding(seed);
            let disk = DiskHandle::new(raw_chain(storage.handle()));
            let mut executor = Executor::new(seed);
            let w = Workload {
                seed: seed * 3 + round,
                requests: 20,
                workers: 4,
                alignment: 512,
                longest: 16 << 10,
                ..Workload::default()
            };
            let (theirs, watched) = (disk.clone(), model.clone());
            executor.spawn(async move { workload(&theirs, &watched, w).await.expect("no faults here") });
            executor.run_steps(random.u64(..600));
            drop(executor);
            memory = storage.crash(seed);
            let reopened = DiskHandle::new(raw_chain(memory.handle()));
            model = executor::run(seed, async { model.check_after_crash(&reopened).await.expect("read") });
        }
    });
}

/// The crash test notices a disk that calls a write durable without a sync.
#[test]
#[should_panic(expected = "after a crash")]
fn a_lying_flush_is_noticed() {
    for seed in 0..50 {
        let model = ModelDisk::new(4096);
        let storage = CrashStorage::new(4096);
        let disk = DiskHandle::new(raw_chain(storage.handle()));
        executor::run(seed, async {
            let bytes = disk::Buf::copy_of(&[1; 4096]);
            model.write(&disk, 0, bytes, disk::WriteFlags::default()).await.expect("write");
        });
        model.end_flush(model.issue_flush());
        let reopened = DiskHandle::new(raw_chain(storage.crash(seed).handle()));
        executor::run(seed, async { model.check_after_crash(&reopened).await.expect("read") });
    }
}

#[test]
fn a_failed_sync_poisons() {
    use disk::{Buf, ErrorKind, Operation, WriteFlags};
    executor::run(0, async {
        let memory = MemoryStorage::new(1 << 20);
        let disk = DiskHandle::new(raw_chain(memory.handle()));
        let none = WriteFlags::default();
        disk.write(0, Buf::copy_of(&[1; 512]), none).await.unwrap();
        memory.fail_once(Some(Operation::Flush), 0, ErrorKind::Io);
        assert_eq!(disk.flush().await.unwrap_err().kind(), ErrorKind::Io);
        assert_eq!(disk.read(0, Buf::new(1)).await.unwrap()[0], 1, "reading goes on");
        let after = [
            disk.flush().await.unwrap_err().kind(),
            disk.write(0, Buf::copy_of(&[1; 512]), none).await.unwrap_err().kind(),
            disk.close().await.unwrap_err().kind(),
        ];
        assert_eq!(after, [ErrorKind::Poisoned; 3], "a later sync would succeed, and lie");
    });
}
