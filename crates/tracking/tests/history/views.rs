//! Views of an instant while the guest writes on.

use crate::host::{TestHost, raw};
use disk::{Buf, ByteRange, Disk, DiskHandle, ErrorKind, WriteFlags, ZeroMode};
use std::cell::Cell;
use std::rc::Rc;
use testkit::executor::{self, Executor};
use testkit::{MemoryStorage, seeds};
use tracking::{Consistency, CreateOptions, History, Id, NewPoint, Tracked};

const GRANULE: u64 = 4096;

async fn tracked(image: &MemoryStorage, seed: u64) -> Rc<Tracked<chain::Chain>> {
    let sidecar = MemoryStorage::new(0).yielding(seed);
    let options = CreateOptions { granule: GRANULE, size: image.snapshot().size() };
    let history = History::create(sidecar.handle(), TestHost::new(seed), options).await.unwrap();
    Tracked::new(raw(image.handle()), Rc::new(history)).await.unwrap()
}

async fn change(disk: &DiskHandle, random: &mut fastrand::Rng, size: u64) {
    let len = random.u64(1..4 * GRANULE);
    let offset = random.u64(0..size - len);
    let range = ByteRange::new(offset, len);
    let none = WriteFlags::default();
    match random.u8(..4) {
        0 => disk.write_zeroes(range, ZeroMode { unmap: random.bool(), fast_only: false }, none).await.unwrap(),
        1 => disk.discard(range, none).await.unwrap(),
        _ => disk.write(offset, Buf::copy_of(&vec![random.u8(1..); len as usize]), none).await.unwrap(),
    }
}

#[test]
fn readers_see_the_instant_whatever_the_guest_does() {
    seeds::each(150, |seed| {
        let mut random = fastrand::Rng::with_seed(seed);
        let size = random.u64(20..120) << 10;
        let image = MemoryStorage::new(size).yielding(seed);
        let store = MemoryStorage::new(0).yielding(seed + 1);
        let compared = Rc::new(Cell::new(0));
        let mut executor = Executor::new(seed);
        let told = Rc::clone(&compared);
        executor.spawn(async move {
            let disk = tracked(&image, seed).await;
            let handle = DiskHandle::from_rc(Rc::clone(&disk));
            for _ in 0..random.u32(0..20) {
                change(&handle, &mut random, size).await;
            }
            let mut guests = Vec::new();
            for n in 0..3 {
                let (handle, mut random) = (handle.clone(), fastrand::Rng::with_seed(seed * 3 + n));
                guests.push(executor::spawn(async move {
                    for _ in 0..60 {
                        change(&handle, &mut random, size).await;
                    }
                }));
            }
            let held = disk.hold("m").await.unwrap();
            let truth = image.to_vec();
            let view = DiskHandle::from(held.view(store.handle(), u64::MAX));
            let point = held.cut(NewPoint { name: "m".into(), set: Id::NONE });
            point.commit(Consistency::Crash).await.unwrap();
            for _ in 0..40 {
                let len = random.u64(1..=size);
                let offset = random.u64(0..=size - len);
                let found = view.read(offset, Buf::new(len as usize)).await.unwrap();
                assert_eq!(found[..], truth[offset as usize..(offset + len) as usize]);
                let extent = view.map(ByteRange::new(offset, len)).await.unwrap();
                let bytes = &truth[offset as usize..extent.range.end() as usize];
                assert!(!extent.zero || bytes.iter().all(|b| *b == 0));
                told.set(told.get() + 1);
            }
            for guest in guests {
                guest.await;
            }
            let all = view.read(0, Buf::new(size as usize)).await.unwrap();
            assert_eq!(all[..], truth[..], "when all has changed");
            assert_eq!(
                view.write(0, Buf::zeroed(1), WriteFlags::default()).await.unwrap_err().kind(),
                ErrorKind::ReadOnly
            );
        });
        executor.run();
        assert_eq!(compared.get(), 40);
    });
}

#[test]
fn a_full_store_ends_the_view_and_not_the_guest() {
    executor::run(1, async {
        let image = MemoryStorage::new(64 << 10);
        let disk = tracked(&image, 1).await;
        let none = WriteFlags::default();
        disk.write(0, Buf::copy_of(&[1; 64 << 10]), none).await.unwrap();
        let held = disk.hold("m").await.unwrap();
        let view = held.view(MemoryStorage::new(0).handle(), 3 * GRANULE);
        held.cut(NewPoint { name: "m".into(), set: Id::NONE }).commit(Consistency::Crash).await.unwrap();
        for n in 0..3 {
            disk.write(n * GRANULE, Buf::copy_of(&[2]), none).await.unwrap();
            assert_eq!(view.read(n * GRANULE, Buf::new(2)).await.unwrap()[..], [1, 1]);
        }
        assert_eq!((view.ended(), view.stored()), (None, 3 * GRANULE));
        disk.write(3 * GRANULE, Buf::copy_of(&[2]), none).await.unwrap();
        let error = view.read(0, Buf::new(1)).await.unwrap_err();
        assert!(error.to_string().contains("store of 12288 bytes is full"), "{error}");
        assert_eq!(disk.read(3 * GRANULE, Buf::new(1)).await.unwrap()[0], 2);
        assert_eq!(disk.history().points().len(), 1, "the point has nothing to do with it");
    });
}

#[test]
fn a_failing_store_or_a_closed_disk_ends_the_view() {
    executor::run(1, async {
        let image = MemoryStorage::new(64 << 10);
        let disk = tracked(&image, 1).await;
        let none = WriteFlags::default();
        disk.write(0, Buf::copy_of(&[1; 64 << 10]), none).await.unwrap();
        let store = MemoryStorage::new(0);
        let held = disk.hold("m").await.unwrap();
        let (first, second) =
            (held.view(store.handle(), u64::MAX), held.view(MemoryStorage::new(0).handle(), u64::MAX));
        drop(held);
        store.fail_from(None, 0, ErrorKind::NoSpace);
        disk.write(5, Buf::copy_of(&[2]), none).await.unwrap();
        assert!(first.ended().is_some_and(|reason| reason.contains("could not be saved")), "{:?}", first.ended());
        assert_eq!(second.read(5, Buf::new(1)).await.unwrap()[0], 1);
        disk.close().await.unwrap();
        assert!(second.read(5, Buf::new(1)).await.is_err());
    });
}
