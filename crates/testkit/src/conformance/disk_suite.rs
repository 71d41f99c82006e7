//! What every disk must do.

use super::{Workload, workload};
use crate::ModelDisk;
use disk::{Buf, ByteRange, DiskHandle, ErrorKind, WriteFlags, ZeroMode};
use std::future::Future;

/// Runs the suite on disks that `make` makes: of that many bytes, all zero, writable, nobody else's.
/// `resizes`: whether they can change their size.
///
/// # Panics
/// At the first breach of the contract.
pub async fn disk<F: Future<Output = DiskHandle>>(make: impl Fn(u64) -> F, resizes: bool) {
    let size = 1 << 20;
    bounds(make(size).await).await;
    for seed in 0..3 {
        let d = make(size).await;
        let model = ModelDisk::new(size);
        run(&d, &model, Workload { seed, requests: 150, ..Workload::default() }).await;
        map_agrees(&d, &model).await;
        close(d).await;
    }
    for seed in 0..3 {
        let d = make(size).await;
        let model = ModelDisk::new(size);
        run(&d, &model, Workload { seed, requests: 30, workers: 8, ..Workload::default() }).await;
        map_agrees(&d, &model).await;
        close(d).await;
    }
    // A last unit that is cut by the disk's end.
    let d = make(777 * 512).await;
    let model = ModelDisk::new(777 * 512);
    run(&d, &model, Workload { seed: 9, requests: 150, ..Workload::default() }).await;
    close(d).await;
    if resizes {
        sizes(make(300 << 10).await).await;
    }
}

async fn run(d: &DiskHandle, model: &ModelDisk, w: Workload) {
    workload(d, model, w).await.unwrap_or_else(|error| panic!("{w:?}: {error:?}"));
    model.check_equal(d).await.expect("read");
}

async fn close(d: DiskHandle) {
    d.close().await.expect("close");
}

async fn bounds(d: DiskHandle) {
    let size = d.geometry().size;
    let none = WriteFlags::default();
    let beyond = ByteRange::new(size - 1, 2);
    let kinds = [
        d.read(size - 1, Buf::new(2)).await.expect_err("beyond the end").kind(),
        d.read(u64::MAX, Buf::new(2)).await.expect_err("beyond all numbers").kind(),
        d.write(size - 1, Buf::new(2), none).await.expect_err("beyond the end").kind(),
        d.write_zeroes(beyond, ZeroMode::default(), none).await.expect_err("beyond the end").kind(),
        d.discard(beyond, none).await.expect_err("beyond the end").kind(),
        d.map(beyond).await.expect_err("beyond the end").kind(),
    ];
    assert_eq!(kinds, [ErrorKind::OutOfRange; 6]);
    let model = ModelDisk::new(size);
    model.check_equal(&d).await.expect("read");
    model.write(&d, size - 1, Buf::copy_of(&[1]), none).await.expect("the last byte");
    model.write(&d, 0, Buf::copy_of(&[2]), none).await.expect("the first byte");
    let all = ByteRange::new(0, size);
    model.check_equal(&d).await.expect("read");
    model.discard(&d, all, none).await.expect("discard all");
    model.check_equal(&d).await.expect("read");
    model.write_zeroes(&d, all, ZeroMode { unmap: true, fast_only: false }, none).await.expect("zero all");
    model.check_equal(&d).await.expect("read");
    model.flush(&d).await.expect("flush");
    close(d).await;
}

/// Extents cover the disk, and what they call zero reads as zero.
async fn map_agrees(d: &DiskHandle, model: &ModelDisk) {
    let mut rest = ByteRange::new(0, d.geometry().size);
    while !rest.is_empty() {
        let extent = d.map(rest).await.expect("map");
        assert!(!extent.range.is_empty() && rest.contains(extent.range) && extent.range.offset() == rest.offset());
        if extent.zero {
            model.check(extent.range.offset(), &vec![0; extent.range.len() as usize]);
        }
        rest = rest.skip(extent.range.len());
    }
}

async fn sizes(d: DiskHandle) {
    let model = ModelDisk::new(d.geometry().size);
    for (step, size) in [700_000, 100_000, 100_512, 1 << 20, 65_536, 2 << 20, 512].into_iter().enumerate() {
        // Sizes of disks are whole sectors, as formats demand it.
        let size = size / 512 * 512;
        d.resize(size).await.expect("resize");
        model.set_size(size);
        assert_eq!(d.geometry().size, size);
        model.check_equal(&d).await.expect("read");
        let all = Buf::copy_of(&vec![step as u8 + 1; size as usize]);
        model.write(&d, 0, all, WriteFlags::default()).await.expect("write");
        run(&d, &model, Workload { seed: step as u64, requests: 20, ..Workload::default() }).await;
    }
    close(d).await;
}
