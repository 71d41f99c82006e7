//! What every storage must do.

use super::workload::some_range;
use crate::SparseBytes;
use disk::{Buf, ByteRange, ErrorKind, StorageHandle, ZeroMode};
use futures_util::future::join_all;
use std::future::Future;

/// Runs the suite on storages that `make` makes: of that many bytes, all zero, writable, nobody else's.
///
/// What [`disk::StorageLimits::grows_zeroed`] excludes is left out.
///
/// # Panics
/// At the first breach of the contract.
pub async fn storage<F: Future<Output = StorageHandle>>(make: impl Fn(u64) -> F) {
    basics(make(1 << 20).await).await;
    odd_places(make(1 << 20).await).await;
    neighbours(make(1 << 20).await).await;
    large(make(16 << 20).await).await;
    refusals(make(1 << 20).await).await;
    for seed in 0..4 {
        random(make(256 << 10).await, seed).await;
    }
    if make(4096).await.limits().grows_zeroed {
        sizes(make(10_000).await).await;
    }
}

async fn expect(storage: &StorageHandle, offset: u64, bytes: &[u8], why: &str) {
    let found = storage.read_new(offset, bytes.len()).await.expect("read");
    if let Some(at) = (0..bytes.len()).find(|at| found[*at] != bytes[*at]) {
        panic!("{why}: byte {} is {:#x}, expected {:#x}", offset + at as u64, found[at], bytes[at]);
    }
}

async fn basics(s: StorageHandle) {
    assert_eq!(s.size(), 1 << 20, "size as asked for");
    expect(&s, 0, &[0; 8192], "new").await;
    let back = s.write(4096, Buf::copy_of(&[7; 4096])).await.expect("write");
    assert_eq!(&back[..], &[7; 4096], "the buffer comes back as it was");
    expect(&s, 4096, &[7; 4096], "written").await;
    expect(&s, 0, &[0; 4096], "before").await;
    expect(&s, 8192, &[0; 4096], "behind").await;
    s.sync().await.expect("sync");
    expect(&s, 4096, &[7; 4096], "after sync").await;
    s.allocate(ByteRange::new(0, 64 << 10)).await.expect("allocate");
    expect(&s, 4096, &[7; 4096], "allocate changes nothing").await;
    expect(&s, 8192, &[0; 4096], "allocate changes nothing").await;
    for unmap in [false, true] {
        s.write(64 << 10, Buf::copy_of(&vec![9; 128 << 10])).await.expect("write");
        s.write_zeroes(ByteRange::new(64 << 10, 64 << 10), ZeroMode { unmap, fast_only: false }).await.expect("zero");
        expect(&s, 64 << 10, &vec![0; 64 << 10], "zeroed").await;
        expect(&s, 128 << 10, &vec![9; 64 << 10], "beside zeroes").await;
    }
    let range = ByteRange::new(64 << 10, 64 << 10);
    match s.write_zeroes(range, ZeroMode { unmap: true, fast_only: true }).await {
        Ok(()) => expect(&s, range.offset(), &vec![0; 64 << 10], "zeroed fast").await,
        Err(error) => assert_eq!(error.kind(), ErrorKind::NotFast),
    }
    s.discard(ByteRange::new(128 << 10, 64 << 10)).await.expect("discard");
    if s.limits().grows_zeroed {
        expect(&s, 128 << 10, &vec![0; 64 << 10], "discarded").await;
    }
    assert_eq!(s.size(), 1 << 20, "nothing here changes the size");
}

/// Requests that are aligned to nothing.
async fn odd_places(s: StorageHandle) {
    let mut model = vec![0; 1 << 20];
    for (offset, len) in [(1, 1), (511, 2), (4095, 2), (4097, 4094), (100, 10_000), (65_535, 65_538), (1_048_575, 1)] {
        let bytes: Vec<u8> = (0..len).map(|n| (n % 251) as u8 + 1).collect();
        model[offset..offset + len].copy_from_slice(&bytes);
        s.write(offset as u64, Buf::copy_of(&bytes)).await.expect("write");
        expect(&s, offset as u64, &bytes, "unaligned").await;
    }
    // A buffer whose memory is aligned to nothing either.
    let mut buf = Buf::copy_of(&[5; 8192]);
    let tail = buf.split_off(3);
    model[12_288..12_288 + 8189].fill(5);
    s.write(12_288, tail).await.expect("write");
    s.write_zeroes(ByteRange::new(13_000, 5_000), ZeroMode { unmap: true, fast_only: false }).await.expect("zero");
    model[13_000..18_000].fill(0);
    expect(&s, 0, &model, "all").await;
}

/// Requests at the same time that touch the same blocks, but not the same bytes.
async fn neighbours(s: StorageHandle) {
    let writes = (0..200_u64).map(|n| {
        let s = s.clone();
        async move { s.write(n * 100, Buf::copy_of(&[n as u8 + 1; 100])).await.expect("write") }
    });
    join_all(writes).await;
    for n in 0..200_u64 {
        expect(&s, n * 100, &[n as u8 + 1; 100], "one of many").await;
    }
}

async fn large(s: StorageHandle) {
    let bytes: Vec<u8> = (0..9 << 20).map(|n| (n / 4096) as u8).collect();
    s.write(1 << 20, Buf::copy_of(&bytes)).await.expect("write");
    expect(&s, 1 << 20, &bytes, "9 MiB at once").await;
    s.write_zeroes(ByteRange::new(2 << 20, 4 << 20), ZeroMode::default()).await.expect("zero");
    expect(&s, 2 << 20, &vec![0; 4 << 20], "4 MiB of zeroes").await;
    expect(&s, 6 << 20, &bytes[5 << 20..], "behind the zeroes").await;
}

async fn refusals(s: StorageHandle) {
    for offset in [u64::MAX, u64::MAX - 5, i64::MAX as u64 - 5] {
        let error = s.read_new(offset, 10).await.expect_err("beyond all files");
        assert_eq!(error.kind(), ErrorKind::OutOfRange);
        let error = s.write(offset, Buf::new(10)).await.expect_err("beyond all files");
        assert_eq!(error.kind(), ErrorKind::OutOfRange);
    }
    assert!(s.read_new(5, 0).await.expect("nothing").is_empty());
    s.write(5, Buf::new(0)).await.expect("nothing");
    s.write_zeroes(ByteRange::EMPTY, ZeroMode::default()).await.expect("nothing");
    s.discard(ByteRange::EMPTY).await.expect("nothing");
}

async fn sizes(s: StorageHandle) {
    s.write(0, Buf::copy_of(&[1; 10_000])).await.expect("write");
    let mut beyond = vec![1; 10_000];
    beyond.resize(20_000, 0);
    expect(&s, 0, &beyond, "beyond the end").await;
    s.set_size(5_000).await.expect("shrink");
    assert_eq!(s.size(), 5_000);
    s.set_size(50_000).await.expect("grow");
    assert_eq!(s.size(), 50_000);
    expect(&s, 5_000, &[0; 45_000], "shrinking forgets").await;
    s.write(99_000, Buf::copy_of(&[2; 1_000])).await.expect("write behind the end");
    assert!(s.size() >= 100_000, "a write grows");
    expect(&s, 50_000, &[0; 49_000], "the gap").await;
    expect(&s, 99_000, &[2; 1_000], "behind the gap").await;
    let size = s.size();
    s.discard(ByteRange::new(size, 1 << 20)).await.expect("discard behind the end");
    assert_eq!(s.size(), size, "a discard never grows");
    s.set_size(0).await.expect("empty");
    s.write_zeroes(ByteRange::new(0, 8192), ZeroMode { unmap: true, fast_only: false }).await.expect("zero");
    assert_eq!(s.size(), 8192, "zeroing grows");
    s.allocate(ByteRange::new(0, 16_384)).await.expect("allocate");
    assert_eq!(s.size(), 16_384, "allocating grows");
    expect(&s, 0, &[0; 16_384], "all new").await;
}

async fn random(s: StorageHandle, seed: u64) {
    let mut random = fastrand::Rng::with_seed(seed);
    let size = s.size();
    let mut model = SparseBytes::new(size);
    let zeroed = s.limits().grows_zeroed;
    for step in 0..150 {
        let range = some_range(&mut random, size, 1, 100_000);
        match random.u8(..10) {
            0..4 => {
                let mut buf = Buf::new(range.len() as usize);
                random.fill(&mut buf);
                model.write(range.offset(), &buf);
                s.write(range.offset(), buf).await.expect("write");
            }
            4..6 => {
                model.zero(range, true);
                s.write_zeroes(range, ZeroMode { unmap: random.bool(), fast_only: false }).await.expect("zero");
            }
            6 if zeroed => {
                let whole = range.align_in(u64::from(s.limits().alignment));
                if !whole.is_empty() {
                    model.zero(whole, true);
                }
                s.discard(range).await.expect("discard");
            }
            7 => s.sync().await.expect("sync"),
            8 => {
                let extent = s.extent(range).await.expect("extent");
                if extent.hole {
                    let mut bytes = vec![1; extent.range.len() as usize];
                    model.read(extent.range.offset(), &mut bytes);
                    assert!(bytes.iter().all(|b| *b == 0), "a hole reads as zero (seed {seed}, step {step})");
                }
            }
            _ => {
                let mut bytes = vec![0; range.len() as usize];
                model.read(range.offset(), &mut bytes);
                expect(&s, range.offset(), &bytes, &format!("seed {seed}, step {step}")).await;
            }
        }
    }
    expect(&s, 0, &model.to_vec(), &format!("seed {seed}, at the end")).await;
    assert_eq!(s.size(), size);
    // Extents cover the storage without gaps.
    let mut rest = ByteRange::new(0, size);
    while !rest.is_empty() {
        let extent = s.extent(rest).await.expect("extent");
        assert_eq!(extent.range.offset(), rest.offset());
        assert!(!extent.range.is_empty());
        rest = rest.skip(extent.range.len());
    }
}
