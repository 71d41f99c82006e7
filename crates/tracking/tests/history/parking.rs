//! Writes that are answered before their intents are durable.

use crate::host::{TestHost, raw};
use chain::Chain;
use disk::{Buf, Disk, DiskHandle, ErrorKind, LocalFuture, Operation, WriteFlags};
use futures_util::future::select;
use std::cell::{Cell, RefCell};
use std::pin::pin;
use std::rc::Rc;
use testkit::conformance::{Workload, workload};
use testkit::executor::{self, Executor};
use testkit::{MemoryStorage, ModelDisk, seeds};
use tracking::{Consistency, CreateOptions, History, Id, NewPoint, ParkingLot, Tracked};

const GRANULE: u64 = 4096;

type Parked = (u64, Vec<u8>);

/// A lot that outlives a kill.
#[derive(Default)]
pub(crate) struct TestLot {
    slots: RefCell<[Option<Parked>; 8]>,
    pub(crate) used: Cell<u64>,
}

impl ParkingLot for TestLot {
    fn slots(&self) -> usize {
        8
    }
    fn slot_bytes(&self) -> usize {
        8192
    }
    fn put(&self, slot: usize, offset: u64, bytes: &[u8]) -> bool {
        let before = self.slots.borrow_mut()[slot].replace((offset, bytes.to_vec()));
        assert!(before.is_none(), "a slot is used once");
        self.used.set(self.used.get() + 1);
        true
    }
    fn get(&self, slot: usize) -> Option<Vec<u8>> {
        self.slots.borrow()[slot].as_ref().map(|(_, bytes)| bytes.clone())
    }
    fn clear(&self, slot: usize) -> bool {
        self.slots.borrow_mut()[slot].take().is_some()
    }
}

impl TestLot {
    /// What a killed process has left; the lot is empty afterwards.
    pub(crate) fn left(&self) -> Vec<(u64, Vec<u8>)> {
        self.slots.borrow_mut().iter_mut().filter_map(Option::take).collect()
    }
}

pub(crate) fn park(disk: &Rc<Tracked<Chain>>, lot: &Rc<TestLot>) {
    let pause = || Box::pin(executor::yield_now()) as LocalFuture<'static, ()>;
    disk.park_in(Rc::clone(lot) as Rc<dyn ParkingLot>, Rc::new(|task| drop(executor::spawn(task))), Rc::new(pause));
}

async fn open(
    image: &MemoryStorage,
    sidecar: &MemoryStorage,
    host: &Rc<TestHost>,
    lot: &Rc<TestLot>,
) -> Rc<Tracked<Chain>> {
    let (history, distrust) = History::open(sidecar.handle(), host.clone()).await.unwrap();
    assert_eq!(distrust, None);
    let disk = Tracked::new(raw(image.handle()), Rc::new(history)).await.unwrap();
    disk.put_back(lot.left()).await.unwrap();
    park(&disk, lot);
    disk
}

async fn create(sidecar: &MemoryStorage, host: &Rc<TestHost>, size: u64) {
    let options = CreateOptions { granule: GRANULE, size };
    History::create(sidecar.handle(), host.clone(), options).await.unwrap();
}

#[test]
fn what_was_answered_outlives_a_kill() {
    let mut parked = 0;
    seeds::each(200, |seed| {
        let mut random = fastrand::Rng::with_seed(seed);
        let size = random.u64(10..100) * 512;
        let host = TestHost::new(seed);
        let (mut image, mut sidecar) = (MemoryStorage::new(size), MemoryStorage::new(0));
        let lot = Rc::new(TestLot::default());
        executor::run(seed, create(&sidecar, &host, size));
        let mut model = ModelDisk::new(size);
        for round in 0..4 {
            let (here, history) = (image.yielding(seed + round), sidecar.yielding(seed * 3 + round));
            let mut executor = Executor::new(seed * 7 + round);
            let w = Workload { seed: seed * 9 + round, requests: 40, workers: 4, longest: 6000, ..Workload::default() };
            {
                let (image, sidecar, host) = (here.clone(), history.clone(), host.clone());
                let (model, lot) = (model.clone(), Rc::clone(&lot));
                executor.spawn(async move {
                    let disk = open(&image, &sidecar, &host, &lot).await;
                    let handle = DiskHandle::from_rc(Rc::clone(&disk));
                    let marker = executor::spawn(async move {
                        for n in 0..6 {
                            disk.mark(NewPoint { name: format!("{round}.{n}"), set: Id::NONE }).await.unwrap();
                        }
                    });
                    workload(&handle, &model, w).await.unwrap();
                    marker.await;
                    handle.flush().await.unwrap();
                    model.check_equal(&handle).await.unwrap();
                });
            }
            executor.run_steps(random.u64(..4000));
            drop(executor);
            image = MemoryStorage::of(here.snapshot());
            sidecar = MemoryStorage::of(history.snapshot());
            // The machine goes on, the process does not. What was under way may or may not have happened.
            model = executor::run(seed, async {
                let disk = open(&image, &sidecar, &host, &lot).await;
                let handle = DiskHandle::from_rc(disk);
                let found = handle.read(0, Buf::new(size as usize)).await.unwrap();
                model.check(0, &found);
                ModelDisk::of(&found)
            });
        }
        parked += lot.used.get();
    });
    println!("{parked} writes were parked");
    assert!(parked > 0 || std::env::var_os("HIGHWATER_SEED").is_some());
}

#[test]
fn a_full_disk_is_told_by_the_flush_and_nothing_is_lost() {
    seeds::each(20, |seed| {
        executor::run(seed, async move {
            let host = TestHost::new(seed);
            let (image, sidecar) = (MemoryStorage::new(1 << 20), MemoryStorage::new(0));
            let lot = Rc::new(TestLot::default());
            create(&sidecar, &host, 1 << 20).await;
            let disk = open(&image, &sidecar, &host, &lot).await;
            let none = WriteFlags::default();
            disk.write(0, Buf::copy_of(&[1; 512]), none).await.unwrap();
            disk.flush().await.unwrap();
            image.fail_from(Some(Operation::Write), 0, ErrorKind::NoSpace);
            disk.write(8192, Buf::copy_of(&[2; 512]), none).await.unwrap();
            assert_eq!(disk.flush().await.unwrap_err().kind(), ErrorKind::NoSpace);
            assert_eq!(disk.read(8192, Buf::new(1)).await.unwrap_err().kind(), ErrorKind::NoSpace);
            assert_eq!(disk.write(12288, Buf::copy_of(&[3]), none).await.unwrap_err().kind(), ErrorKind::NoSpace);
            assert_eq!(disk.read(0, Buf::new(1)).await.unwrap()[0], 1, "other places are as they were");
            image.heal();
            assert_eq!(disk.read(8192, Buf::new(1)).await.unwrap()[0], 2);
            disk.flush().await.unwrap();
            // A disk that is closed with it leaves it to the next opening.
            image.fail_from(Some(Operation::Write), 0, ErrorKind::NoSpace);
            disk.write(16384, Buf::copy_of(&[4; 512]), none).await.unwrap();
            assert!(disk.close().await.is_err());
            image.heal();
            let again =
                open(&MemoryStorage::of(image.snapshot()), &MemoryStorage::of(sidecar.snapshot()), &host, &lot).await;
            assert_eq!(again.read(16384, Buf::new(1)).await.unwrap()[0], 4);
        });
    });
}

#[test]
fn what_is_tried_again_is_on_one_side_of_a_mark() {
    let mut later = 0;
    seeds::each(300, |seed| {
        later += u32::from(executor::run(seed, async move {
            let host = TestHost::new(seed);
            let (image, sidecar) = (MemoryStorage::new(1 << 20).yielding(seed), MemoryStorage::new(0));
            let lot = Rc::new(TestLot::default());
            create(&sidecar, &host, 1 << 20).await;
            let disk = open(&image, &sidecar, &host, &lot).await;
            image.fail_from(Some(Operation::Write), 0, ErrorKind::NoSpace);
            disk.write(8192, Buf::copy_of(&[2; 512]), WriteFlags::default()).await.unwrap();
            disk.flush().await.unwrap_err();
            image.heal();
            let again = Rc::clone(&disk);
            let flush = executor::spawn(async move { again.flush().await });
            for _ in 0..seed % 40 {
                executor::yield_now().await;
            }
            let held = disk.hold("m").await.unwrap();
            let then = image.to_vec()[8192];
            let _point =
                held.cut(NewPoint { name: "m".to_owned(), set: Id::NONE }).commit(Consistency::Crash).await.unwrap();
            flush.await.unwrap();
            let now = image.to_vec()[8192];
            assert_eq!(now, 2);
            let changed = !crate::answers::all_changes(disk.history(), "m", None, 64).await.is_empty();
            assert!(changed || then == now, "a change is missed");
            then != now
        }));
    });
    println!("{later} came after the mark");
}

#[test]
fn a_hold_may_be_given_up_at_any_moment() {
    seeds::each(60, |seed| {
        executor::run(seed, async move {
            let host = TestHost::new(seed);
            let (image, sidecar) = (MemoryStorage::new(1 << 20).yielding(seed), MemoryStorage::new(0));
            let lot = Rc::new(TestLot::default());
            create(&sidecar, &host, 1 << 20).await;
            let disk = open(&image, &sidecar, &host, &lot).await;
            image.fail_from(Some(Operation::Write), 0, ErrorKind::NoSpace);
            disk.write(8192, Buf::copy_of(&[2; 512]), WriteFlags::default()).await.unwrap();
            disk.flush().await.unwrap_err();
            image.heal();
            let busy = Rc::clone(&disk);
            let write =
                executor::spawn(async move { busy.write(0, Buf::copy_of(&[1; 512]), WriteFlags::default()).await });
            let given_up = async {
                for _ in 0..seed % 12 {
                    executor::yield_now().await;
                }
            };
            // As one with a time limit does.
            drop(select(pin!(disk.hold_still()), pin!(given_up)).await);
            write.await.unwrap();
            assert_eq!(disk.read(8192, Buf::new(1)).await.unwrap()[0], 2);
            disk.flush().await.unwrap();
            assert_eq!(image.to_vec()[8192], 2);
        });
    });
}

/// With a pause that never ends, writes stay parked until somebody waits for one of them, or half of the lot is taken.
#[test]
fn parked_writes_wait_for_company_unless_somebody_waits_for_them() {
    executor::run(1, async {
        let host = TestHost::new(1);
        let (image, sidecar) = (MemoryStorage::new(1 << 20), MemoryStorage::new(0));
        let lot = Rc::new(TestLot::default());
        create(&sidecar, &host, 1 << 20).await;
        let disk = open(&image, &sidecar, &host, &lot).await;
        let pause = || Box::pin(std::future::pending()) as LocalFuture<'static, ()>;
        let spawn = |task| drop(executor::spawn(task));
        disk.park_in(Rc::clone(&lot) as Rc<dyn ParkingLot>, Rc::new(spawn), Rc::new(pause));
        let write = async |granule: u64| {
            disk.write(granule * GRANULE, Buf::copy_of(&[7; 512]), WriteFlags::default()).await.unwrap();
            for _ in 0..50 {
                executor::yield_now().await;
            }
        };
        let is_there = |granule: u64| image.to_vec()[(granule * GRANULE) as usize] == 7;
        let syncs = || sidecar.counters().syncs;
        write(0).await;
        assert!(!is_there(0));
        assert_eq!(disk.read(0, Buf::new(1)).await.unwrap()[0], 7);
        assert!(is_there(0));

        write(1).await;
        assert_eq!(disk.read(9 * GRANULE, Buf::new(1)).await.unwrap()[0], 0);
        assert!(!is_there(1), "who reads elsewhere does not wait");
        disk.flush().await.unwrap();
        assert!(is_there(1));

        write(2).await;
        disk.write(2 * GRANULE + 256, Buf::copy_of(&[8; 512]), WriteFlags::default()).await.unwrap();
        assert!(is_there(2));

        write(3).await;
        disk.mark(NewPoint { name: "m".to_owned(), set: Id::NONE }).await.unwrap();
        assert!(is_there(3));

        let before = syncs();
        for granule in 20..23 {
            write(granule).await;
        }
        assert!((20..23).all(|granule| !is_there(granule)));
        assert_eq!(syncs(), before);
        write(23).await;
        assert!((20..24).all(is_there), "half of the lot");
        assert_eq!(syncs(), before + 1, "one sync for all");

        write(5).await;
        disk.hold_still().await.wait_for_parked().await.unwrap();
        assert!(is_there(5));
        write(6).await;
        disk.close().await.unwrap();
        assert!(is_there(6));
    });
}
