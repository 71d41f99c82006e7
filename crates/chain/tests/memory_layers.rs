//! Chains of memory layers against the model.

use chain::{Chain, LayerInfo};
use disk::{Buf, ByteRange, Disk, DiskHandle, ErrorKind, LayerHandle, Operation, Preallocation, WriteFlags, ZeroMode};
use formats::Format;
use std::path::PathBuf;
use std::rc::Rc;
use testkit::conformance::{self, LayerDisk, Workload, workload};
use testkit::{MemoryLayer, MemoryLayerOptions, ModelDisk, executor, seeds};

const NONE: WriteFlags = WriteFlags { fua: false };

fn info(depth: usize, handle: LayerHandle) -> LayerInfo {
    LayerInfo { path: PathBuf::from(format!("layer-{depth}")), format: Format::Raw, handle }
}

/// Layers of random sizes and units with random contents; the chain over them, and what it must read as.
async fn random_stack(seed: u64, top_size: Option<u64>) -> (Chain, Vec<Rc<MemoryLayer>>, ModelDisk) {
    let mut random = fastrand::Rng::with_seed(seed);
    let depth = random.usize(1..5);
    let mut layers: Vec<Rc<MemoryLayer>> = Vec::new();
    let mut visible: Vec<u8> = Vec::new();
    for below in (0..depth).rev() {
        let size = match (below, top_size) {
            (0, Some(size)) => size,
            _ => random.u64(100..1200) * 512,
        };
        let options = MemoryLayerOptions {
            unit: 1 << random.u32(9..17),
            zero_over_parent: random.u8(..3) > 0,
            erratic: (random.u8(..4) > 0).then(|| random.u64(..)),
            ..Default::default()
        };
        let layer = Rc::new(MemoryLayer::new(size, options));
        layers.insert(0, Rc::clone(&layer));
        visible.resize(size as usize, 0);
        // Each layer is filled through a chain that has it on top, and then left alone.
        let stack = Chain::new(layers.iter().enumerate().map(|(d, l)| info(d, l.handle())).collect());
        let disk = DiskHandle::new(stack);
        let model = ModelDisk::of(&visible);
        let requests = random.u32(0..15);
        let w = Workload { seed: random.u64(..), requests, longest: 200 << 10, ..Workload::default() };
        workload(&disk, &model, w).await.expect("fill a layer");
        if random.bool() {
            let at = random.u64(..size / options.unit + 1) * options.unit;
            let range = ByteRange::between(at, (at + options.unit).min(size));
            if !range.is_empty() {
                let bytes = vec![random.u8(1..); range.len() as usize];
                layer.handle().write_encoded(range, &MemoryLayer::encode(&bytes)).await.expect("encode");
            }
        }
        visible = disk.read(0, Buf::new(size as usize)).await.expect("read").to_vec();
    }
    let chain = Chain::new(layers.iter().enumerate().map(|(d, l)| info(d, l.handle())).collect());
    (chain, layers, ModelDisk::of(&visible))
}

#[test]
fn disk_suite_over_empty_layers() {
    for unit in [512, 4096, 65_536] {
        seeds::each(2, |seed| {
            let make = |size: u64| async move {
                let erratic = (seed > 0).then_some(seed);
                let layer = |depth: usize, size: u64| {
                    let options = MemoryLayerOptions { unit, erratic, ..Default::default() };
                    info(depth, Rc::new(MemoryLayer::new(size, options)).handle())
                };
                let layers = vec![layer(0, size), layer(1, size / 2), layer(2, size * 2)];
                DiskHandle::new(Chain::new(layers))
            };
            executor::run(seed, conformance::disk(make, true));
        });
    }
}

#[test]
fn random_stacks_read_as_the_model_says() {
    seeds::each(60, |seed| {
        executor::run(seed, async {
            let (chain, layers, model) = random_stack(seed, None).await;
            let disk = DiskHandle::new(chain);
            model.check_equal(&disk).await.unwrap();
            let w = Workload { seed, requests: 60, ..Workload::default() };
            workload(&disk, &model, w).await.unwrap();
            model.check_equal(&disk).await.unwrap();
            assert_eq!(layers[0].open_tickets(), 0);
            disk.close().await.unwrap();
        });
    });
}

#[test]
fn requests_at_the_same_time() {
    seeds::each(60, |seed| {
        executor::run(seed, async {
            let (chain, layers, model) = random_stack(seed, None).await;
            let disk = DiskHandle::new(chain);
            let span = seed.is_multiple_of(2).then_some(128 << 10);
            let w = Workload { seed, requests: 15, workers: 8, span, ..Workload::default() };
            workload(&disk, &model, w).await.unwrap();
            model.check_equal(&disk).await.unwrap();
            assert_eq!(layers[0].open_tickets(), 0);
        });
    });
}

/// The chain and the plainest disk over the same layers give the same answers.
#[test]
fn agrees_with_the_plainest_disk() {
    seeds::each(20, |seed| {
        executor::run(seed, async {
            let (chain, layers, _) = random_stack(seed, None).await;
            let size = chain.geometry().size;
            let chain = DiskHandle::new(chain);
            let through_chain = chain.read(0, Buf::new(size as usize)).await.unwrap();
            // Only the layers below the top, as the plain disk's parent.
            let mut parent = testkit::SparseBytes::new(0);
            if layers.len() > 1 {
                let below = layers[1..].iter().enumerate().map(|(d, l)| info(d, l.handle())).collect();
                let below = DiskHandle::new(Chain::new(below));
                parent.write(0, &below.read(0, Buf::new(below.geometry().size as usize)).await.unwrap());
            }
            let plain = DiskHandle::new(LayerDisk::new(layers[0].handle(), Some(parent)));
            let through_plain = plain.read(0, Buf::new(size as usize)).await.unwrap();
            assert!(through_chain[..] == through_plain[..], "seed {seed}");
        });
    });
}

#[test]
fn map_tells_depth_and_zero_as_they_are_read() {
    seeds::each(40, |seed| {
        executor::run(seed, async {
            let (chain, layers, model) = random_stack(seed, None).await;
            let disk = DiskHandle::new(chain);
            let mut rest = ByteRange::new(0, disk.geometry().size);
            while !rest.is_empty() {
                let extent = disk.map(rest).await.unwrap();
                let bytes = disk.read(extent.range.offset(), Buf::new(extent.range.len() as usize)).await.unwrap();
                model.check(extent.range.offset(), &bytes);
                if extent.zero {
                    assert!(bytes.iter().all(|b| *b == 0), "{extent:?}");
                }
                if let (Some(source), Some(depth)) = (extent.source, extent.depth) {
                    let storage = layers[depth as usize].handle().storage(source.storage).clone();
                    let stored = storage.read_new(source.offset, bytes.len()).await.unwrap();
                    assert!(stored[..] == bytes[..], "the bytes stand where the map says: {extent:?}");
                }
                assert!(extent.depth.is_some() || extent.zero && !extent.allocated, "{extent:?}");
                rest = rest.skip(extent.range.len());
            }
        });
    });
}

fn plain_layer(size: u64) -> Rc<MemoryLayer> {
    Rc::new(MemoryLayer::new(size, MemoryLayerOptions::default()))
}

fn chain_of(layers: &[&Rc<MemoryLayer>]) -> DiskHandle {
    DiskHandle::new(Chain::new(layers.iter().enumerate().map(|(d, l)| info(d, l.handle())).collect()))
}

#[test]
fn a_mapped_read_is_one_storage_read_of_the_callers_buffer() {
    executor::run(0, async {
        let (top, base) = (plain_layer(1 << 20), plain_layer(1 << 20));
        chain_of(&[&base]).write(0, Buf::copy_of(&[1; 64 << 10]), NONE).await.unwrap();
        let disk = chain_of(&[&top, &base]);
        disk.write(0, Buf::copy_of(&[2; 32 << 10]), NONE).await.unwrap();
        let before = (top.memory().counters(), base.memory().counters());
        let buf = Buf::new(8192);
        let at = buf.as_ptr();
        let buf = disk.read(4096, buf).await.unwrap();
        assert_eq!((buf.as_ptr(), buf[0]), (at, 2));
        let buf = disk.read(40 << 10, buf).await.unwrap();
        assert_eq!((buf.as_ptr(), buf[0]), (at, 1));
        let after = (top.memory().counters(), base.memory().counters());
        assert_eq!(after.0.reads - before.0.reads, 1);
        assert_eq!(after.1.reads - before.1.reads, 1);
        // Over the border between both: one read each, and no copy either.
        let buf = disk.read(28 << 10, buf).await.unwrap();
        assert_eq!((buf.as_ptr(), buf[0], buf[8191]), (at, 2, 1));
    });
}

#[test]
fn a_write_in_place_is_one_storage_write() {
    executor::run(0, async {
        let top = plain_layer(1 << 20);
        let disk = chain_of(&[&top]);
        disk.write(0, Buf::copy_of(&[2; 32 << 10]), NONE).await.unwrap();
        let before = top.memory().counters();
        disk.write(5000, Buf::copy_of(&[3; 3000]), NONE).await.unwrap();
        let after = top.memory().counters();
        assert_eq!((after.writes - before.writes, after.bytes_written - before.bytes_written), (1, 3000));
        assert_eq!((after.reads, after.syncs), (before.reads, before.syncs));
        disk.write(5000, Buf::copy_of(&[3; 3000]), WriteFlags { fua: true }).await.unwrap();
        assert_eq!(top.memory().counters().syncs, after.syncs + 1, "FUA is a write and a flush");
    });
}

#[test]
fn a_failed_read_of_the_parent_rolls_the_write_back() {
    executor::run(0, async {
        let (top, base) = (plain_layer(1 << 20), plain_layer(1 << 20));
        chain_of(&[&base]).write(0, Buf::copy_of(&[1; 64 << 10]), NONE).await.unwrap();
        let disk = chain_of(&[&top, &base]);
        base.memory().fail_once(Some(Operation::Read), 0, ErrorKind::Io);
        let error = disk.write(100, Buf::copy_of(&[9; 100]), NONE).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Io);
        assert_eq!(top.open_tickets(), 0, "rolled back");
        let bytes = disk.read(0, Buf::new(8192)).await.unwrap();
        assert!(bytes.iter().all(|b| *b == 1), "nothing of the write is visible");
        disk.write(100, Buf::copy_of(&[9; 100]), NONE).await.unwrap();
        assert_eq!(disk.read(99, Buf::new(3)).await.unwrap()[..], [1, 9, 9]);
    });
}

#[test]
fn failures_at_any_request_leave_no_ticket_and_no_wrong_byte() {
    seeds::each(150, |seed| {
        executor::run(seed, async {
            let (chain, layers, model) = random_stack(seed, None).await;
            let disk = DiskHandle::new(chain);
            let mut random = fastrand::Rng::with_seed(seed ^ 0xfau64);
            let victim = &layers[random.usize(..layers.len())];
            let kind = if random.bool() { ErrorKind::Io } else { ErrorKind::NoSpace };
            let operation = [Some(Operation::Read), Some(Operation::Write), None][random.usize(..3)];
            let w = Workload { seed, requests: 10, workers: 4, flush: false, ..Workload::default() };
            victim.memory().fail_once(operation, random.u64(..20), kind);
            let mut ended = workload(&disk, &model, w).await.map_err(|e| e.kind());
            victim.memory().heal();
            assert!(ended == Ok(()) || ended == Err(kind), "{ended:?}");
            assert_eq!(layers[0].open_tickets(), 0);
            model.check_equal(&disk).await.unwrap();
            ended = workload(&disk, &model, w).await.map_err(|e| e.kind());
            assert_eq!(ended, Ok(()), "all is well again");
            let abandoned: u64 = layers.iter().map(|l| l.memory().counters().abandoned).sum();
            assert_eq!(abandoned, 0, "what was begun is awaited, also after a failure");
            model.check_equal(&disk).await.unwrap();
        });
    });
}

#[test]
fn growing_does_not_show_a_longer_parent() {
    seeds::each(20, |seed| {
        executor::run(seed, async {
            let small = (100 + seed) * 512;
            let (chain, _, model) = random_stack(seed, Some(small)).await;
            let chain = Rc::new(chain);
            let disk = DiskHandle::from_rc(Rc::clone(&chain));
            for size in [small + 512, small + 100 * 512, small / 2 / 512 * 512, 2 << 20] {
                chain.resize_with(size, Preallocation::Off).await.unwrap();
                model.set_size(size);
                model.check_equal(&disk).await.unwrap();
            }
        });
    });
}

#[test]
fn a_resize_waits_for_requests_and_holds_new_ones_off() {
    seeds::each(30, |seed| {
        executor::run(seed, async {
            let options = MemoryLayerOptions { erratic: Some(seed), ..Default::default() };
            let (top, base) = (Rc::new(MemoryLayer::new(64 << 10, options)), plain_layer(1 << 20));
            chain_of(&[&base]).write(0, Buf::copy_of(&[1; 1 << 20]), NONE).await.unwrap();
            let disk = chain_of(&[&top, &base]);
            let writes = (0..8_u64).map(|n| {
                let disk = disk.clone();
                executor::spawn(async move { disk.write(n * 8000, Buf::copy_of(&[9; 8000]), NONE).await })
            });
            let writes: Vec<_> = writes.collect();
            let grow = executor::spawn({
                let disk = disk.clone();
                async move { disk.resize(512 << 10).await }
            });
            // From the moment that the new size is seen, the new bytes are zero.
            while disk.geometry().size == 64 << 10 {
                executor::yield_now().await;
            }
            let grown = disk.read(64 << 10, Buf::new(448 << 10)).await.unwrap();
            assert!(grown.iter().all(|b| *b == 0), "the parent shows through");
            grow.await.unwrap();
            for write in writes {
                write.await.unwrap();
            }
            let old = disk.read(0, Buf::new(64 << 10)).await.unwrap();
            assert!(old[..64_000].iter().all(|b| *b == 9) && old[64_000..].iter().all(|b| *b == 1));
        });
    });
}

#[test]
fn zeroes_and_discards_where_the_layer_cannot() {
    executor::run(0, async {
        let options = MemoryLayerOptions { zero_over_parent: false, ..Default::default() };
        let (top, base) = (Rc::new(MemoryLayer::new(1 << 20, options)), plain_layer(1 << 20));
        chain_of(&[&base]).write(0, Buf::copy_of(&[1; 1 << 20]), NONE).await.unwrap();
        let disk = chain_of(&[&top, &base]);
        let fast = ZeroMode { unmap: true, fast_only: true };
        let range = ByteRange::new(5000, 50_000);
        let error = disk.write_zeroes(range, fast, NONE).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NotFast);
        let all = disk.read(0, Buf::new(1 << 20)).await.unwrap();
        assert!(all.iter().all(|b| *b == 1), "nothing was changed");
        disk.write_zeroes(range, ZeroMode { unmap: true, fast_only: false }, NONE).await.unwrap();
        let all = disk.read(0, Buf::new(1 << 20)).await.unwrap();
        assert!(all[5000..55_000].iter().all(|b| *b == 0) && all[4999] == 1 && all[55_000] == 1);
        disk.discard(ByteRange::new(100_000, 50_000), NONE).await.unwrap();
    });
}

#[test]
fn edges_of_a_discard_are_left_alone() {
    executor::run(0, async {
        let top = plain_layer(10 * 512);
        let disk = chain_of(&[&top]);
        disk.write(0, Buf::copy_of(&[1; 10 * 512]), NONE).await.unwrap();
        disk.discard(ByteRange::new(4000, 1120), NONE).await.unwrap();
        let all = disk.read(0, Buf::new(10 * 512)).await.unwrap();
        assert!(all[..4096].iter().all(|b| *b == 1), "a unit that is covered in part");
        assert!(all[4096..].iter().all(|b| *b == 0), "the last unit counts as whole at the disk's end");
    });
}

#[test]
fn large_units_are_filled_by_the_storage() {
    executor::run(0, async {
        let options = MemoryLayerOptions { unit: 2 << 20, encodes: false, ..Default::default() };
        let top = Rc::new(MemoryLayer::new(8 << 20, options));
        let disk = chain_of(&[&top]);
        disk.write(3 << 20, Buf::copy_of(&[1; 4096]), NONE).await.unwrap();
        let counters = top.memory().counters();
        assert_eq!((counters.bytes_written, counters.zeroes), (4096, 2), "no 2 MiB are copied for 4 KiB");
        let all = disk.read(2 << 20, Buf::new(2 << 20)).await.unwrap();
        assert_eq!(all.iter().map(|b| u64::from(*b)).sum::<u64>(), 4096);
    });
}
