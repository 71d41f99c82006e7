//! A sidecar that fails: the guest does not notice, and no point says what it does not know.

use crate::answers::{all_changes, judge};
use crate::host::{TestHost, created, named, raw, tracked};
use disk::{Buf, Disk, DiskError, DiskHandle, ErrorKind, LocalFuture, Operation, WriteFlags};
use futures_util::future::select;
use std::cell::RefCell;
use std::rc::Rc;
use testkit::conformance::{Workload, workload};
use testkit::executor::{self, Executor, yield_now};
use testkit::{CrashStorage, MemoryStorage, ModelDisk, seeds};
use tracking::{Distrust, History, HistoryError, Tracked};

const GRANULE: u64 = 4096;
const SIZE: u64 = 256 << 10;

/// What a test sees of one session with faults.
struct After {
    image: CrashStorage,
    sidecar: CrashStorage,
    host: Rc<TestHost>,
    content: Vec<u8>,
    stopped: Option<String>,
}

/// A session in which `fault` is put into the sidecar behind the first point, `p`.
fn session(seed: u64, fault: impl FnOnce(&MemoryStorage)) -> After {
    let (image, sidecar) = (CrashStorage::new(SIZE).yielding(seed), CrashStorage::new(0).yielding(seed + 1));
    let host = TestHost::new(seed);
    let told = Rc::new(RefCell::new(None));
    let mut executor = Executor::new(seed);
    executor.spawn(async {
        let disk = created(image.handle(), sidecar.handle(), &host, GRANULE).await;
        disk.history().set_open_limit(8 * GRANULE);
        let model = ModelDisk::new(SIZE);
        let handle = DiskHandle::from_rc(Rc::clone(&disk));
        let some = Workload { seed, requests: 15, workers: 2, longest: 20 << 10, ..Workload::default() };
        workload(&handle, &model, some).await.expect("no faults yet");
        disk.mark(named("p")).await.expect("no faults yet");
        let content = image.memory().to_vec();
        fault(sidecar.memory());
        let tender = {
            let disk = Rc::clone(&disk);
            executor::spawn(async move {
                let tend = Box::pin(disk.history().tend(yield_now));
                if !seed.is_multiple_of(5) {
                    return tend.await;
                }
                // Dropped in the middle of its work.
                let soon = async {
                    for _ in 0..seed * 3 {
                        yield_now().await;
                    }
                };
                select(tend, Box::pin(soon)).await;
            })
        };
        let points = {
            let disk = Rc::clone(&disk);
            executor::spawn(async move {
                for n in 0..4 {
                    let _ = disk.mark(named(&n.to_string())).await;
                    let _ = disk.history().set_pending("p", Vec::new()).await;
                }
            })
        };
        workload(&handle, &model, Workload { requests: 25, seed: seed + 9, ..some })
            .await
            .expect("the guest sees nothing");
        points.await;
        model.check_equal(&handle).await.expect("the guest sees nothing");
        let stopped = disk.history().info().stopped;
        if stopped.is_some() {
            assert!(matches!(disk.mark(named("late")).await, Err(HistoryError::Stopped { .. })));
            assert!(matches!(disk.history().changes("p", None), Err(HistoryError::Refused { .. })));
        }
        if seed.is_multiple_of(3) {
            handle.close().await.expect("the guest sees nothing");
            tender.await;
        }
        // The close may have met the fault, too.
        *told.borrow_mut() = Some((content, disk.history().info().stopped));
    });
    while told.borrow().is_none() {
        assert!(executor.step(), "deadlock");
    }
    drop(executor);
    let (content, stopped) = told.take().expect("seen above");
    sidecar.memory().heal();
    sidecar.memory().full_at(u64::MAX);
    After { image, sidecar, host, content, stopped }
}

/// Opens what was left, and judges what it says since `p`; returns whether it says anything.
fn judge_after(seed: u64, after: &After) -> bool {
    let After { host, content, stopped, .. } = after;
    if host.removed.get() {
        assert!(stopped.is_some());
        return false;
    }
    let (image, sidecar) = match seed.is_multiple_of(2) {
        true => {
            host.restart();
            (after.image.crash(seed), after.sidecar.crash(seed + 1))
        }
        false => {
            let copy = |storage: &CrashStorage| MemoryStorage::of(storage.memory().snapshot());
            (copy(&after.image), copy(&after.sidecar))
        }
    };
    executor::run(seed, async {
        let (history, distrust) = History::open(sidecar.handle(), host.clone()).await.expect("readable");
        match (stopped, distrust) {
            (Some(reason), Some(Distrust::Lost(found))) => assert!(reason.starts_with(&found), "{reason} {found}"),
            (None, None) => {}
            other => panic!("{other:?}"),
        }
        match history.changes("p", None) {
            Err(HistoryError::Refused { .. }) => assert!(stopped.is_some()),
            Err(error) => panic!("{error}"),
            Ok(_) => {
                assert!(stopped.is_none());
                judge(content, &image.to_vec(), &all_changes(&history, "p", None, 9).await, "since p");
            }
        }
        stopped.is_none()
    })
}

#[test]
fn failures_at_any_moment() {
    let (mut said, mut lost) = (0, 0);
    seeds::each(150, |seed| {
        let mut random = fastrand::Rng::with_seed(seed);
        let operation = [Some(Operation::Write), Some(Operation::Flush), None][random.usize(..3)];
        let kind = if random.bool() { ErrorKind::Io } else { ErrorKind::NoSpace };
        let pass = random.u64(..60);
        let after = session(seed, |sidecar| match random.u8(..4) {
            0 => sidecar.fail_from(operation, pass, kind),
            1 => sidecar.full_at(sidecar.to_vec().len() as u64),
            _ => sidecar.fail_once(operation, pass, kind),
        });
        match judge_after(seed, &after) {
            true => said += 1,
            false => lost += 1,
        }
    });
    println!("{said} histories went on, {lost} were lost");
    assert!(std::env::var_os("HIGHWATER_SEED").is_some() || said > 10 && lost > 10);
}

/// A sidecar that can neither be written nor removed: no write is issued, and none later that is not recorded.
#[test]
fn nothing_is_written_that_can_neither_be_recorded_nor_given_up() {
    executor::run(1, async {
        let (image, sidecar, host) = (MemoryStorage::new(SIZE), MemoryStorage::new(0).yielding(3), TestHost::new(1));
        let disk = created(image.handle(), sidecar.handle(), &host, GRANULE).await;
        let write = async |granule: u64| disk.write(granule * GRANULE, Buf::copy_of(&[1]), WriteFlags::default()).await;
        write(0).await.unwrap();
        disk.mark(named("p")).await.unwrap();
        let before = image.to_vec();
        host.removable.set(false);
        sidecar.fail_from(Some(Operation::Flush), 0, ErrorKind::Io);
        // Those that wait for one failure, and those that come later.
        let write = &write;
        let at_once = (3..7).map(|granule| {
            Box::pin(async move { write(granule).await.expect_err("not recorded") }) as LocalFuture<'_, DiskError>
        });
        executor::run_all(2, at_once.collect());
        for granule in [1, 1, 2, 0, 1] {
            write(granule).await.expect_err("not recorded");
        }
        assert!(disk.history().info().stopped.is_none() && image.to_vec() == before);
        // The sidecar works again: it is not gone on with, as nobody knows what it holds.
        sidecar.heal();
        write(1).await.unwrap();
        assert!(disk.history().info().stopped.is_some() && !host.removed.get());
        let (_, distrust) = History::open(sidecar.handle(), host.clone()).await.unwrap();
        assert!(matches!(distrust, Some(Distrust::Lost(_))));
    });
}

/// A first write and a change of the points at the same time, with a journal that does not begin at 0.
fn first_write_beside_points(seed: u64, fault: impl FnOnce(&MemoryStorage)) {
    let (image, sidecar) = (MemoryStorage::new(SIZE).yielding(seed), MemoryStorage::new(0).yielding(seed + 1));
    let host = TestHost::new(seed);
    let (stopped, before) = executor::run(seed, async {
        let disk = created(image.handle(), sidecar.handle(), &host, GRANULE).await;
        for n in 0..5 {
            disk.write(n * 2 * GRANULE, Buf::copy_of(&[1]), WriteFlags::default()).await.unwrap();
        }
        disk.mark(named("p")).await.unwrap();
        disk.mark(named("q")).await.unwrap();
        disk.close().await.unwrap();
        let disk = tracked(image.handle(), sidecar.handle(), &host).await;
        let before = image.to_vec();
        fault(&sidecar);
        let tasks: Vec<LocalFuture<'_, ()>> = vec![
            Box::pin(async {
                let _ = disk.history().delete_point("q").await;
            }),
            Box::pin(async {
                for n in 0..5 {
                    disk.write(n * 3 * GRANULE, Buf::copy_of(&[2]), WriteFlags::default()).await.unwrap();
                }
            }),
        ];
        executor::run_all(seed, tasks);
        (disk.history().info().stopped, before)
    });
    sidecar.heal();
    if host.removed.get() {
        return;
    }
    let killed = MemoryStorage::of(sidecar.snapshot());
    executor::run(seed, async {
        let (history, distrust) = History::open(killed.handle(), host.clone()).await.unwrap();
        assert_eq!(stopped.is_some(), matches!(distrust, Some(Distrust::Lost(_))), "{stopped:?} {distrust:?}");
        if stopped.is_none() {
            judge(&before, &image.to_vec(), &all_changes(&history, "p", None, 9).await, "since p");
        }
    });
}

#[test]
fn a_first_write_while_points_change() {
    seeds::each(60, |seed| first_write_beside_points(seed, |_| ()));
    seeds::each(120, |seed| {
        first_write_beside_points(seed, |sidecar| {
            let operation = if seed.is_multiple_of(2) { Operation::Write } else { Operation::Flush };
            sidecar.fail_once(Some(operation), seed / 2 % 6, ErrorKind::Io);
        });
    });
}

#[test]
fn an_opening_that_cannot_be_written_is_tried_again() {
    executor::run(1, async {
        let (image, sidecar, host) = (MemoryStorage::new(SIZE), MemoryStorage::new(0), TestHost::new(1));
        let disk = created(image.handle(), sidecar.handle(), &host, GRANULE).await;
        disk.mark(named("p")).await.unwrap();
        let before = image.to_vec();
        disk.write(0, Buf::copy_of(&[1]), WriteFlags::default()).await.unwrap();
        drop(disk);
        for pass in 0..2 {
            sidecar.fail_once(Some(Operation::Write), pass, ErrorKind::NoSpace);
            assert!(History::open(sidecar.handle(), host.clone()).await.is_err());
        }
        let (history, distrust) = History::open(sidecar.handle(), host.clone()).await.unwrap();
        assert_eq!(distrust, None);
        judge(&before, &image.to_vec(), &all_changes(&history, "p", None, 9).await, "since p");
        let disk = Tracked::new(raw(image.handle()), Rc::new(history)).await.unwrap();
        disk.close().await.unwrap();
    });
}

/// Whoever drops the tender in the middle of a checkpoint loses the history, perhaps, but misses nothing.
#[test]
fn a_tender_that_is_dropped() {
    for steps in 0..80 {
        let (image, sidecar) = (MemoryStorage::new(SIZE), MemoryStorage::new(0).yielding(steps));
        let host = TestHost::new(1);
        executor::run(steps, async {
            let disk = created(image.handle(), sidecar.handle(), &host, GRANULE).await;
            disk.mark(named("p")).await.unwrap();
            let before = image.to_vec();
            for granule in 0..3 {
                disk.write(granule * GRANULE, Buf::copy_of(&[1]), WriteFlags::default()).await.unwrap();
            }
            let soon = async {
                for _ in 0..steps {
                    yield_now().await;
                }
            };
            drop(select(Box::pin(disk.history().tend(yield_now)), Box::pin(soon)).await);
            disk.close().await.unwrap();
            let (history, distrust) = History::open(sidecar.handle(), host.clone()).await.unwrap();
            if distrust.is_none() {
                judge(&before, &image.to_vec(), &all_changes(&history, "p", None, 9).await, "since p");
            }
        });
    }
}
