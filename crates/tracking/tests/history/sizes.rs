//! Disks that grow and shrink.

use crate::answers::{all_changes, judge, letters};
use crate::host::{TestHost, created, named, tracked};
use chain::Chain;
use disk::{Buf, Disk, ErrorKind, Operation, WriteFlags};
use std::rc::Rc;
use testkit::executor::{self, Executor};
use testkit::{CrashStorage, MemoryStorage, seeds};
use tracking::Tracked;

const GRANULE: u64 = 4096;

async fn write(disk: &Rc<Tracked<Chain>>, offset: u64, byte: u8) {
    disk.write(offset, Buf::copy_of(&[byte; 512]), WriteFlags::default()).await.expect("no faults");
}

#[test]
fn grow_shrink_grow() {
    executor::run(1, async {
        let (image, sidecar, host) = (MemoryStorage::new(6 * GRANULE), MemoryStorage::new(0), TestHost::new(1));
        let mut disk = created(image.handle(), sidecar.handle(), &host, GRANULE).await;
        for granule in 0..6 {
            write(&disk, granule * GRANULE, 5).await;
        }
        disk.mark(named("p")).await.unwrap();
        let old = image.to_vec();
        let ask = async |disk: &Rc<Tracked<Chain>>, size| letters(disk.history(), "p", None, GRANULE, size).await;
        disk.resize(4 * GRANULE + 512).await.unwrap();
        assert_eq!(ask(&disk, 5 * GRANULE).await, ".....", "less is no change");
        disk.resize(8 * GRANULE).await.unwrap();
        assert_eq!(ask(&disk, 8 * GRANULE).await, "....dzzz", "the old end's granule, and zeroes");
        write(&disk, 6 * GRANULE, 1).await;
        assert_eq!(ask(&disk, 8 * GRANULE).await, "....dzdz");
        for size in [GRANULE, 300 << 20, 8 * GRANULE] {
            disk.resize(size).await.unwrap();
            disk.close().await.unwrap();
            disk = tracked(image.handle(), sidecar.handle(), &host).await;
        }
        assert_eq!(ask(&disk, 8 * GRANULE).await, ".zzzzzzz");
        let mut longer = old;
        longer.resize(8 * GRANULE as usize, 0);
        judge(&longer, &image.to_vec(), &all_changes(disk.history(), "p", None, 9).await, "since p");
    });
}

/// A full sidecar refuses a growth, or does not know of a shrink: nothing is missed afterwards.
#[test]
fn sizes_that_could_not_be_recorded() {
    executor::run(1, async {
        let size = 6 * GRANULE - 1024;
        let (image, sidecar, host) = (MemoryStorage::new(size), MemoryStorage::new(0), TestHost::new(1));
        let disk = created(image.handle(), sidecar.handle(), &host, GRANULE).await;
        for granule in 0..6 {
            write(&disk, granule * GRANULE, 5).await;
        }
        disk.mark(named("p")).await.unwrap();
        sidecar.fail_once(Some(Operation::Write), 0, ErrorKind::NoSpace);
        disk.resize(size + 4096).await.expect_err("not recorded");
        assert_eq!(disk.geometry().size, size);
        write(&disk, 5 * GRANULE, 6).await;
        let killed = MemoryStorage::of(sidecar.snapshot());
        let reopened = tracked(image.handle(), killed.handle(), &host).await;
        assert_eq!(letters(reopened.history(), "p", None, GRANULE, size).await, ".....d");
        // A shrink that is not recorded, and the same size again.
        sidecar.fail_once(Some(Operation::Write), 0, ErrorKind::NoSpace);
        let _ = disk.resize(GRANULE).await;
        assert_eq!(disk.geometry().size, GRANULE);
        disk.resize(size).await.unwrap();
        assert_eq!(letters(disk.history(), "p", None, GRANULE, size).await, ".zzzzz");
        let killed = MemoryStorage::of(sidecar.snapshot());
        let reopened = tracked(image.handle(), killed.handle(), &host).await;
        assert_eq!(letters(reopened.history(), "p", None, GRANULE, size).await, ".ddddd");
    });
}

/// Power cuts between changes of size: whatever bytes come back, none is missed.
#[test]
fn power_cuts() {
    seeds::each(120, |seed| {
        let mut random = fastrand::Rng::with_seed(seed);
        let size = random.u64(2..40) * 512;
        let (image, sidecar) = (CrashStorage::new(size).yielding(seed), CrashStorage::new(0).yielding(seed + 1));
        let host = TestHost::new(seed);
        let disk = executor::run(seed, async {
            let disk = created(image.handle(), sidecar.handle(), &host, GRANULE).await;
            for at in (0..size).step_by(512) {
                write(&disk, at, 9).await;
            }
            disk.mark(named("p")).await.unwrap();
            disk
        });
        let before = image.memory().to_vec();
        let mut executor = Executor::new(seed);
        executor.spawn(async {
            for _ in 0..6 {
                disk.resize(random.u64(1..40) * 512).await.expect("no faults");
                let now = disk.geometry().size;
                match random.u8(..3) {
                    0 => write(&disk, random.u64(..now / 512) * 512, 3).await,
                    1 => disk.flush().await.expect("no faults"),
                    _ => disk.history().set_pending("p", Vec::new()).await.expect("no faults"),
                }
            }
        });
        executor.run_steps(seed * 7 % 400);
        drop(executor);
        let (image, sidecar) = (image.crash(seed), sidecar.crash(seed + 1));
        host.restart();
        executor::run(seed, async {
            let disk = tracked(image.handle(), sidecar.handle(), &host).await;
            let mut now = image.to_vec();
            now.resize(disk.geometry().size as usize, 0);
            let mut before = before;
            before.resize(now.len(), 0);
            let mut changes = all_changes(disk.history(), "p", None, 9).await;
            changes.retain(|change| change.range.offset() < now.len() as u64);
            judge(&before, &now, &changes, "after the crash");
        });
    });
}
