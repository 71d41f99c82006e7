//! What zeroes and discards leave behind, and when that counts.

use crate::answers::{all_changes, judge, letters};
use crate::host::{TestHost, created, named, tracked};
use chain::Chain;
use disk::{Buf, ByteRange, Disk, ErrorKind, LocalFuture, Operation, WriteFlags, ZeroMode};
use std::rc::Rc;
use testkit::{CrashStorage, MemoryStorage, executor, seeds};
use tracking::{History, Tracked};

const GRANULE: u64 = 16 << 10;
const SIZE: u64 = 8 * GRANULE;
const PLAIN: WriteFlags = WriteFlags { fua: false };
const FUA: WriteFlags = WriteFlags { fua: true };
const UNMAP: ZeroMode = ZeroMode { unmap: true, fast_only: false };

type TestDisk = Rc<Tracked<Chain>>;

/// In parts of a granule: quarters.
fn quarters(from: u64, to: u64) -> ByteRange {
    ByteRange::between(from * GRANULE / 4, to * GRANULE / 4)
}

async fn write(disk: &TestDisk, range: ByteRange) {
    disk.write(range.offset(), Buf::copy_of(&vec![7; range.len() as usize]), PLAIN).await.expect("no faults");
}

/// All is written and durable, and there is a point `p`.
async fn full(disk: &TestDisk) {
    write(disk, ByteRange::new(0, SIZE)).await;
    disk.mark(named("p")).await.expect("no faults");
}

async fn since_p(disk: &TestDisk) -> String {
    letters(disk.history(), "p", None, GRANULE, SIZE).await
}

#[test]
fn whole_granules_are_typed_behind_a_flush() {
    executor::run(1, async {
        let (image, sidecar, host) = (MemoryStorage::new(SIZE), MemoryStorage::new(0), TestHost::new(1));
        let disk = created(image.handle(), sidecar.handle(), &host, GRANULE).await;
        full(&disk).await;
        disk.discard(quarters(0, 8), PLAIN).await.unwrap();
        disk.write_zeroes(quarters(8, 12), UNMAP, PLAIN).await.unwrap();
        disk.write_zeroes(quarters(12, 16), ZeroMode::default(), PLAIN).await.unwrap();
        assert_eq!(since_p(&disk).await, "dddd....");
        disk.flush().await.unwrap();
        assert_eq!(since_p(&disk).await, "xxzz....");
        write(&disk, quarters(1, 2)).await;
        write(&disk, quarters(12, 13)).await;
        assert_eq!(since_p(&disk).await, "dxzd....");
        disk.mark(named("q")).await.unwrap();
        assert_eq!(letters(disk.history(), "p", Some("q"), GRANULE, SIZE).await, "dxzd....");
        write(&disk, quarters(4, 5)).await;
        assert_eq!(
            letters(disk.history(), "p", Some("q"), GRANULE, SIZE).await,
            "ddzd....",
            "it was something else then"
        );
        disk.close().await.unwrap();
        let disk = tracked(image.handle(), sidecar.handle(), &host).await;
        assert_eq!(since_p(&disk).await, "ddzd....");
    });
}

#[test]
fn what_reads_as_zero_already_does_not_change() {
    executor::run(1, async {
        let (image, sidecar, host) = (MemoryStorage::new(SIZE), MemoryStorage::new(0), TestHost::new(1));
        let disk = created(image.handle(), sidecar.handle(), &host, GRANULE).await;
        write(&disk, quarters(0, 4)).await;
        disk.mark(named("p")).await.unwrap();
        disk.close().await.unwrap();
        let disk = tracked(image.handle(), sidecar.handle(), &host).await;
        disk.discard(quarters(4, 32), PLAIN).await.unwrap();
        disk.write_zeroes(quarters(6, 20), UNMAP, PLAIN).await.unwrap();
        disk.flush().await.unwrap();
        assert_eq!(since_p(&disk).await, "........");
        // The image's time of modification changes nevertheless, and that is no other program's doing.
        let mut facts = host.facts.get();
        facts.modified = host.clock.get() as i64 * 1_000_000;
        host.facts.set(facts);
        let killed = MemoryStorage::of(sidecar.snapshot());
        let (_, distrust) = History::open(killed.handle(), host.clone()).await.unwrap();
        assert_eq!(distrust, None, "after a kill");
        disk.close().await.unwrap();
        let (history, distrust) = History::open(sidecar.handle(), host.clone()).await.unwrap();
        assert_eq!(distrust, None, "after a close");
        assert_eq!(letters(&history, "p", None, GRANULE, SIZE).await, "........");
    });
}

#[test]
fn edges() {
    executor::run(1, async {
        let (image, sidecar, host) = (MemoryStorage::new(SIZE), MemoryStorage::new(0), TestHost::new(1));
        let disk = created(image.handle(), sidecar.handle(), &host, GRANULE).await;
        full(&disk).await;
        disk.write_zeroes(quarters(1, 14), UNMAP, PLAIN).await.unwrap();
        disk.discard(quarters(17, 22), PLAIN).await.unwrap();
        disk.flush().await.unwrap();
        assert_eq!(since_p(&disk).await, "dzzddd..", "data stands beside them");
        disk.write_zeroes(quarters(14, 17), UNMAP, PLAIN).await.unwrap();
        disk.discard(quarters(0, 1), PLAIN).await.unwrap();
        disk.flush().await.unwrap();
        assert_eq!(since_p(&disk).await, "xzzzzd..", "the rest is zero already");
    });
}

#[test]
fn fua_vouches_for_its_own_bytes() {
    executor::run(1, async {
        let (image, sidecar, host) = (MemoryStorage::new(SIZE), MemoryStorage::new(0), TestHost::new(1));
        let disk = created(image.handle(), sidecar.handle(), &host, GRANULE).await;
        full(&disk).await;
        disk.write_zeroes(quarters(0, 2), UNMAP, PLAIN).await.unwrap();
        disk.write_zeroes(quarters(2, 10), UNMAP, FUA).await.unwrap();
        disk.discard(quarters(16, 20), FUA).await.unwrap();
        assert_eq!(since_p(&disk).await, "dzd.d...", "beside and discards: not for certain");
        disk.flush().await.unwrap();
        assert_eq!(since_p(&disk).await, "zzd.x...");
    });
}

/// A zeroing that a power cut takes back is not called zero, though the table was written meanwhile.
#[test]
fn nothing_is_zero_before_it_is_durable() {
    let mut returned = 0;
    seeds::each(12, |seed| {
        let (image, sidecar, host) = (CrashStorage::new(SIZE), CrashStorage::new(0), TestHost::new(1));
        let before = vec![7; SIZE as usize];
        executor::run(seed, async {
            let disk = created(image.handle(), sidecar.handle(), &host, GRANULE).await;
            full(&disk).await;
            disk.write_zeroes(quarters(0, 8), UNMAP, PLAIN).await.unwrap();
            disk.discard(quarters(8, 16), PLAIN).await.unwrap();
            // Not even when a flush was tried.
            image.memory().fail_once(Some(Operation::Flush), 0, ErrorKind::Io);
            disk.flush().await.expect_err("the fault");
            disk.history().set_pending("p", Vec::new()).await.expect("the sidecar has no faults");
        });
        let (image, sidecar) = (image.crash(seed), sidecar.crash(seed));
        host.restart();
        executor::run(seed, async {
            let now = image.to_vec();
            let disk = tracked(image.handle(), sidecar.handle(), &host).await;
            judge(&before, &now, &all_changes(disk.history(), "p", None, 9).await, "after the crash");
            returned += u32::from(now == before);
        });
    });
    assert!(returned > 0 || std::env::var_os("HIGHWATER_SEED").is_some(), "some crashes bring all bytes back");
}

/// Whatever overlaps: what is called zero is zero.
#[test]
fn overlapping_requests() {
    seeds::each(60, |seed| {
        let (image, sidecar) = (MemoryStorage::new(SIZE).yielding(seed), MemoryStorage::new(0).yielding(seed + 1));
        let host = TestHost::new(seed);
        executor::run(seed, async {
            let mut random = fastrand::Rng::with_seed(seed);
            let disk = created(image.handle(), sidecar.handle(), &host, GRANULE).await;
            full(&disk).await;
            let before = image.to_vec();
            for round in 0..6 {
                let requests = (0..random.usize(2..6))
                    .map(|_| {
                        let (a, b) = (random.u64(0..32), random.u64(0..32));
                        let (range, kind, disk) = (quarters(a.min(b), a.max(b) + 1), random.u8(..7), Rc::clone(&disk));
                        let flags = WriteFlags { fua: random.bool() };
                        Box::pin(async move {
                            match kind {
                                0 | 1 => disk.write_zeroes(range, UNMAP, flags).await.unwrap(),
                                2 | 3 => disk.discard(range, flags).await.unwrap(),
                                4 => disk.flush().await.unwrap(),
                                _ => write(&disk, range.prefix(4096)).await,
                            }
                        }) as LocalFuture<'_, ()>
                    })
                    .collect();
                executor::run_all(seed * 9 + round, requests);
                judge(&before, &image.to_vec(), &all_changes(disk.history(), "p", None, 9).await, "overlapping");
            }
            disk.flush().await.unwrap();
            judge(&before, &image.to_vec(), &all_changes(disk.history(), "p", None, 9).await, "flushed");
        });
    });
}
