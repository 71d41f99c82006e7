//! Files and block devices on both backends, through the page cache and around it.

use dataplane::{Backend, block_on};
use disk::{Buf, ByteRange, ErrorKind, StorageHandle, ZeroMode};
use std::future::Future;
use std::path::Path;
use storage::{CacheMode, FileStorage, OpenOptions};

const UNMAP: ZeroMode = ZeroMode { unmap: true, fast_only: false };
const KEEP: ZeroMode = ZeroMode { unmap: false, fast_only: false };

fn run<T>(backend: Backend, future: impl Future<Output = T>) -> T {
    block_on(backend, future).expect("the backend works here")
}

/// Calls `test` with a new file of `size` bytes, for each backend and cache mode.
fn each<F: Future<Output = ()>>(size: u64, test: impl Fn(std::path::PathBuf, FileStorage, StorageHandle) -> F) {
    for backend in [Backend::Uring, Backend::Threads] {
        for cache in [CacheMode::None, CacheMode::Writeback, CacheMode::Unsafe] {
            // Not under /tmp, which may lack direct I/O.
            let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a directory");
            let path = dir.path().join("disk");
            let options = OpenOptions { cache, ..OpenOptions::create_new(size) };
            let storage = FileStorage::open(&path, &options).expect("create");
            let handle = StorageHandle::new(storage.clone());
            run(backend, test(path, storage, handle));
        }
    }
}

fn pattern(seed: usize, len: usize) -> Vec<u8> {
    (0..len).map(|i| (seed * 131 + i * 7 + i / 509 + 1) as u8).collect()
}

#[test]
fn reads_and_writes_of_any_alignment() {
    each(0, |path, _, handle| async move {
        let mut model = vec![0; 300_000];
        for (seed, (offset, len)) in
            [(0, 1), (4095, 2), (100_000, 70_000), (511, 1025), (65_536, 4096), (299_000, 1000)].into_iter().enumerate()
        {
            let bytes = pattern(seed, len);
            model[offset..offset + len].copy_from_slice(&bytes);
            handle.write(offset as u64, Buf::copy_of(&bytes)).await.expect("write");
        }
        handle.sync().await.expect("sync");
        for (offset, len) in [(0, 300_000), (1, 511), (99_999, 3), (4096, 8192), (299_999, 1)] {
            let read = handle.read_new(offset, len).await.expect("read");
            assert!(read[..] == model[offset as usize..][..len], "{offset}+{len}");
        }
        assert!(handle.size() >= 300_000);
        let file = std::fs::read(path).expect("the file itself");
        assert!(file[..300_000] == model[..] && file[300_000..].iter().all(|byte| *byte == 0));
        let beyond = handle.read_new(1 << 40, 5000).await.expect("beyond the end");
        assert!(beyond.iter().all(|byte| *byte == 0));
        let across = handle.read_new(299_990, 1000).await.expect("across the end");
        assert_eq!(across[..10], model[299_990..]);
        assert!(across[10..].iter().all(|byte| *byte == 0));
    });
}

#[test]
fn a_ragged_end_keeps_its_size() {
    each(10_000, |path, storage, handle| async move {
        handle.write(9_000, Buf::copy_of(&pattern(1, 900))).await.expect("write");
        let tail = handle.read_new(9_000, 1_000).await.expect("read");
        assert_eq!(tail[..900], pattern(1, 900)[..]);
        drop((storage, handle));
        assert_eq!(std::fs::metadata(&path).expect("metadata").len(), 10_000);
        assert_eq!(std::fs::read(&path).expect("read")[9_000..9_900], pattern(1, 900)[..]);
    });
    each(10_000, |path, storage, handle| async move {
        handle.write(9_000, Buf::copy_of(&pattern(1, 2_000))).await.expect("write that grows");
        drop((storage, handle));
        let file = std::fs::read(&path).expect("read");
        assert_eq!(file[9_000..11_000], pattern(1, 2_000)[..]);
    });
}

#[test]
fn a_ragged_end_that_was_restored_is_restored_again() {
    each(10_000, |path, storage, handle| async move {
        let size = || std::fs::metadata(&path).expect("metadata").len();
        for round in 0..3 {
            handle.write(9_000, Buf::copy_of(&pattern(round, 900))).await.expect("write");
            storage.restore_ragged_size().expect("restore");
            assert_eq!(size(), 10_000);
        }
        handle.write(9_000, Buf::copy_of(&pattern(9, 900))).await.expect("write");
        drop((storage, handle));
        assert_eq!(size(), 10_000);
    });
}

#[test]
fn zeroes_holes_and_space() {
    use std::os::unix::fs::MetadataExt;
    each(0, |path, _, handle| async move {
        let whole = ByteRange::new(0, 1 << 20);
        handle.write(0, Buf::copy_of(&pattern(3, 1 << 20))).await.expect("write");
        handle.write_zeroes(ByteRange::new(65_536, 131_072), UNMAP).await.expect("unmap");
        handle.write_zeroes(ByteRange::new(524_288, 65_536), KEEP).await.expect("zero");
        handle.write_zeroes(ByteRange::new(700_001, 9_999), UNMAP).await.expect("unaligned");
        handle.discard(ByteRange::new(917_504, 65_536)).await.expect("discard");
        let mut model = pattern(3, 1 << 20);
        for (at, len) in [(65_536, 131_072), (524_288, 65_536), (700_001, 9_999), (917_504, 65_536)] {
            model[at..at + len].fill(0);
        }
        assert!(handle.read_new(0, 1 << 20).await.expect("read")[..] == model[..]);
        let first = handle.extent(whole).await.expect("extent");
        assert_eq!((first.range, first.hole), (ByteRange::new(0, 65_536), false));
        let second = handle.extent(ByteRange::new(65_536, 1 << 19)).await.expect("extent");
        assert_eq!((second.range, second.hole), (ByteRange::new(65_536, 131_072), true));
        // Growing.
        handle.write_zeroes(ByteRange::new(2 << 20, 65_536), UNMAP).await.expect("grows");
        assert_eq!(
            (handle.size(), std::fs::metadata(&path).expect("metadata").len()),
            ((2 << 20) + 65_536, (2 << 20) + 65_536)
        );
        handle.write_zeroes(ByteRange::new(3 << 20, 65_536), KEEP).await.expect("grows");
        assert_eq!(std::fs::metadata(&path).expect("metadata").len(), (3 << 20) + 65_536);
        handle.discard(ByteRange::new(3 << 20, 10 << 20)).await.expect("discard across the end");
        assert_eq!(std::fs::metadata(&path).expect("metadata").len(), (3 << 20) + 65_536, "a discard never grows");
        let beyond = handle.extent(ByteRange::new(100 << 20, 1 << 20)).await.expect("extent");
        assert_eq!((beyond.range, beyond.hole), (ByteRange::new(100 << 20, 1 << 20), true));
        handle.allocate(ByteRange::new(4 << 20, 1 << 20)).await.expect("allocate");
        let metadata = std::fs::metadata(&path).expect("metadata");
        assert_eq!(metadata.len(), 5 << 20);
        assert!(metadata.blocks() * 512 >= 1 << 20);
        handle.set_size(1234).await.expect("shrink");
        assert_eq!((handle.size(), std::fs::metadata(&path).expect("metadata").len()), (1234, 1234));
        handle.set_size(8192).await.expect("grow");
        let grown = handle.read_new(0, 8192).await.expect("read");
        assert!(grown[..1234] == model[..1234] && grown[1234..].iter().all(|byte| *byte == 0));
    });
}

#[test]
fn growth_from_outside() {
    each(4096, |path, storage, handle| async move {
        std::fs::OpenOptions::new().write(true).open(&path).expect("open").set_len(1 << 20).expect("grow");
        assert_eq!(handle.size(), 4096);
        assert_eq!(storage.refresh().expect("refresh"), 1 << 20);
        assert_eq!(handle.size(), 1 << 20);
    });
}

#[test]
fn concurrent_growth_loses_nothing() {
    each(0, |_, _, handle| async move {
        let tasks: Vec<_> = (0..64u64)
            .map(|i| {
                let handle = handle.clone();
                dataplane::spawn_local(async move {
                    let offset = (i * 37 % 64) * 8192;
                    if i % 2 == 0 {
                        handle.write(offset, Buf::copy_of(&pattern(i as usize, 8192))).await.map(drop)
                    } else {
                        handle.write_zeroes(ByteRange::new(offset, 8192), UNMAP).await
                    }
                })
            })
            .collect();
        for task in tasks {
            task.await.expect("write");
        }
        assert_eq!(handle.size(), 64 * 8192);
        for i in 0..64u64 {
            let read = handle.read_new((i * 37 % 64) * 8192, 8192).await.expect("read");
            let expected = if i % 2 == 0 { pattern(i as usize, 8192) } else { vec![0; 8192] };
            assert!(read[..] == expected[..], "piece {i}");
        }
    });
}

fn kind(path: impl AsRef<Path>, options: OpenOptions) -> (ErrorKind, String) {
    let error = FileStorage::open(path, &options).expect_err("refused");
    (error.kind(), error.to_string())
}

#[test]
fn refusals_say_why() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("disk");
    assert_eq!(kind(&path, OpenOptions::default()).0, ErrorKind::NotFound);
    std::fs::write(&path, "x").expect("a file");
    let (_, text) = kind(&path, OpenOptions::create_new(10));
    assert!(text.contains("exists already"), "{text}");
    let (found, text) = kind(dir.path(), OpenOptions::read_only());
    assert!(found == ErrorKind::Unsupported && text.contains("directory"), "{text}");
    let pipe = dir.path().join("pipe");
    assert!(std::process::Command::new("mkfifo").arg(&pipe).status().expect("mkfifo").success());
    let (found, text) = kind(&pipe, OpenOptions::read_only()); // Nobody opens its other end.
    assert!(found == ErrorKind::Unsupported && text.contains("neither a regular file"), "{text}");
    let (found, text) = kind("/proc/cpuinfo", OpenOptions { cache: CacheMode::None, ..OpenOptions::read_only() });
    assert!(found == ErrorKind::Unsupported && text.contains("--cache writeback"), "{text}");
    let read_only = StorageHandle::new(FileStorage::open(&path, &OpenOptions::read_only()).expect("open"));
    let refused = run(Backend::Threads, read_only.write(0, Buf::new(1))).expect_err("read-only");
    assert_eq!(refused.kind(), ErrorKind::ReadOnly);
}

#[test]
fn a_full_device_says_so() {
    for backend in [Backend::Uring, Backend::Threads] {
        // Files cannot reach beyond this; the limit of a file system shows in the same way.
        let file = tempfile::tempfile().expect("a file");
        let storage = FileStorage::from_file(file, "huge", &OpenOptions::default()).expect("open");
        let handle = StorageHandle::new(storage);
        let error = run(backend, handle.write(i64::MAX as u64 - 4096, Buf::new(4096))).expect_err("too far");
        assert_eq!(error.kind(), ErrorKind::NoSpace, "{error:?}");
    }
}
