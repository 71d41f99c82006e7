//! Points: names, order, pending runs, refusal, and instants of several disks.

use crate::answers::{all_changes, judge, letters};
use crate::host::{TestHost, created, named, tracked};
use chain::Chain;
use disk::{Buf, Disk, LocalFuture, WriteFlags};
use std::cell::Cell;
use std::rc::Rc;
use testkit::executor::{self, yield_now};
use testkit::{MemoryStorage, seeds};
use tracking::{ChangeKind, Consistency, Distrust, History, HistoryError, Id, MAX_NAME, NewPoint, PendingRun, Tracked};

const GRANULE: u64 = 4096;
const SIZE: u64 = 8 * GRANULE;

async fn write(disk: &Rc<Tracked<Chain>>, granule: u64, byte: u8) {
    let bytes = Buf::copy_of(&[byte; GRANULE as usize]);
    disk.write(granule * GRANULE, bytes, WriteFlags::default()).await.expect("no faults");
}

async fn new_disk(seed: u64) -> (Rc<Tracked<Chain>>, MemoryStorage, MemoryStorage, Rc<TestHost>) {
    let (image, sidecar, host) = (MemoryStorage::new(SIZE), MemoryStorage::new(0), TestHost::new(seed));
    let disk = created(image.handle(), sidecar.handle(), &host, GRANULE).await;
    (disk, image, sidecar, host)
}

#[test]
fn names() {
    executor::run(1, async {
        let (disk, ..) = new_disk(1).await;
        let long = "n".repeat(MAX_NAME);
        for good in ["a", "größe 1", &long] {
            let point = disk.mark(named(good)).await.unwrap();
            assert_eq!(disk.history().point(good).unwrap(), point);
            assert!(matches!(disk.mark(named(good)).await, Err(HistoryError::PointExists { .. })));
        }
        for bad in ["", "a\nb", "\u{7f}", &"n".repeat(MAX_NAME + 1)] {
            assert!(matches!(disk.mark(named(bad)).await, Err(HistoryError::BadName { .. })), "{bad:?}");
        }
        let (first, epoch) = (disk.history().point("a").unwrap(), disk.history().info().epoch);
        disk.history().delete_point("a").await.unwrap();
        assert!(matches!(disk.history().point("a"), Err(HistoryError::NoSuchPoint { .. })));
        assert!(matches!(disk.history().changes("a", None), Err(HistoryError::NoSuchPoint { .. })));
        assert!(matches!(disk.history().delete_point("a").await, Err(HistoryError::NoSuchPoint { .. })));
        let second = disk.mark(named("a")).await.unwrap();
        assert_ne!(first.id, second.id, "the name may be given again, the id is not");
        assert!(first.epoch < second.epoch && second.epoch == epoch);
        let order: Vec<String> = disk.history().points().into_iter().map(|p| p.name).collect();
        assert_eq!(order, ["größe 1", &long, "a"]);
    });
}

#[test]
fn thousands() {
    executor::run(1, async {
        let (disk, image, sidecar, host) = new_disk(1).await;
        for n in 0..2000 {
            write(&disk, n % 8, n as u8).await;
            disk.mark(named(&n.to_string())).await.unwrap();
        }
        disk.close().await.unwrap();
        let disk = tracked(image.handle(), sidecar.handle(), &host).await;
        let history = disk.history();
        assert_eq!(history.points().len(), 2000);
        for n in [0, 1, 999, 1991, 1998] {
            let expected: String = (0..8).map(|g| if (n + 1..2000).any(|w| w % 8 == g) { 'd' } else { '.' }).collect();
            assert_eq!(letters(history, &n.to_string(), None, GRANULE, SIZE).await, expected, "since {n}");
        }
        assert_eq!(letters(history, "1995", Some("1997"), GRANULE, SIZE).await, "....dddd");
    });
}

#[test]
fn until_and_order() {
    executor::run(1, async {
        let (disk, ..) = new_disk(1).await;
        for n in 0..4 {
            write(&disk, n, 1).await;
            disk.mark(named(&format!("p{n}"))).await.unwrap();
        }
        let history = disk.history();
        let ask = async |since: &str, until| letters(history, since, until, GRANULE, SIZE).await;
        assert_eq!(ask("p0", Some("p2")).await, ".ddd....", "what changed after it is told as well");
        assert_eq!(ask("p0", None).await, ".ddd....");
        assert_eq!(ask("p1", Some("p3")).await, "..dd....");
        assert_eq!(ask("p3", Some("p3")).await, "........");
        assert!(matches!(history.changes("p2", Some("p1")), Err(HistoryError::Order { .. })));
    });
}

#[test]
fn pending_runs_count_as_changed() {
    executor::run(1, async {
        let (disk, image, sidecar, host) = new_disk(1).await;
        disk.mark(named("p")).await.unwrap();
        write(&disk, 2, 1).await;
        let run = |start, end, kind| PendingRun { start, end, kind };
        // Out of order, overlapping, empty, and beyond the disk.
        let pending = vec![
            run(5, 7, ChangeKind::Zero),
            run(6, 8, ChangeKind::Data),
            run(4, 4, ChangeKind::Data),
            run(0, 1, ChangeKind::Discarded),
            run(1 << 40, 1 << 41, ChangeKind::Data),
        ];
        disk.history().set_pending("p", pending).await.unwrap();
        assert_eq!(letters(disk.history(), "p", None, GRANULE, SIZE).await, "x.d..zdd");
        disk.mark(named("q")).await.unwrap();
        assert_eq!(letters(disk.history(), "q", None, GRANULE, SIZE).await, "........");
        write(&disk, 5, 1).await;
        drop(disk);
        let disk = tracked(image.handle(), sidecar.handle(), &host).await;
        assert_eq!(letters(disk.history(), "p", None, GRANULE, SIZE).await, "x.d..ddd");
        disk.history().set_pending("p", Vec::new()).await.unwrap();
        assert_eq!(letters(disk.history(), "p", None, GRANULE, SIZE).await, "..d..d..");
        let long = vec![run(0, 1, ChangeKind::Data); 1];
        let many = (0..400_000).map(|n| run(n * 2, n * 2 + 1, ChangeKind::Data)).collect();
        assert!(matches!(disk.history().set_pending("p", many).await, Err(HistoryError::TooManyPoints)));
        disk.history().set_pending("p", long).await.expect("what does not fit changes nothing");
    });
}

#[test]
fn a_changed_image_refuses_points_until_it_is_trusted() {
    executor::run(1, async {
        let (disk, image, sidecar, host) = new_disk(1).await;
        write(&disk, 1, 1).await;
        disk.mark(named("p")).await.unwrap();
        let lineage = disk.history().info().lineage;
        disk.close().await.unwrap();
        let mut facts = host.facts.get();
        facts.modified += 5_000_000_000;
        host.facts.set(facts);
        for _ in 0..2 {
            let reader = sidecar.read_only();
            let (history, distrust) = History::open(reader.handle(), host.clone()).await.unwrap();
            assert!(matches!(distrust, Some(Distrust::Modified { .. })));
            assert!(matches!(history.changes("p", None), Err(HistoryError::Refused { .. })));
        }
        let (_, distrust) = History::open(sidecar.handle(), host.clone()).await.unwrap();
        assert!(distrust.is_some());
        // It goes on under another name, and the refusal is durable.
        let disk = tracked(image.handle(), sidecar.handle(), &host).await;
        let history = disk.history();
        assert_ne!(history.info().lineage, lineage);
        let refused = match history.changes("p", None) {
            Err(HistoryError::Refused { reason, .. }) => reason,
            other => panic!("{other:?}"),
        };
        assert!(refused.contains("5 s after"), "{refused}");
        disk.mark(named("q")).await.unwrap();
        assert!(history.changes("q", None).is_ok(), "newer points are trusted");
        assert!(matches!(history.changes("p", Some("q")), Err(HistoryError::Refused { .. })));
        write(&disk, 3, 1).await;
        history.trust().await.unwrap();
        assert_eq!(letters(history, "p", None, GRANULE, SIZE).await, "...d....");
        disk.close().await.unwrap();
        let disk = tracked(image.handle(), sidecar.handle(), &host).await;
        assert_eq!(letters(disk.history(), "p", None, GRANULE, SIZE).await, "...d....");
    });
}

#[test]
fn marks_that_could_not_be_put_into_the_image() {
    executor::run(1, async {
        let (disk, image, sidecar, host) = new_disk(1).await;
        host.bears.set(true);
        write(&disk, 1, 1).await;
        disk.close().await.unwrap();
        assert!(host.mark.get().is_some());
        // A new history; the image bears the old one's mark.
        let disk = created(image.handle(), sidecar.handle(), &host, GRANULE).await;
        disk.mark(named("p")).await.unwrap();
        let refused = async |disk: &Rc<Tracked<Chain>>, lands| {
            host.mark_fails.set(Some(lands));
            let bytes = Buf::copy_of(&[3]);
            disk.write(0, bytes, WriteFlags::default()).await.expect_err("not before the image is marked");
            host.mark_fails.set(None);
        };
        refused(&disk, false).await;
        for _ in 0..2 {
            // Killed, opened, and closed without a write.
            let disk = tracked(image.handle(), sidecar.handle(), &host).await;
            disk.close().await.unwrap();
        }
        let disk = tracked(image.handle(), sidecar.handle(), &host).await;
        write(&disk, 2, 2).await;
        disk.close().await.unwrap();
        // The failure may have come after the mark.
        let disk = tracked(image.handle(), sidecar.handle(), &host).await;
        refused(&disk, true).await;
        refused(&disk, false).await;
        let disk = tracked(image.handle(), sidecar.handle(), &host).await;
        write(&disk, 2, 1).await;
        disk.close().await.unwrap();
        let disk = tracked(image.handle(), sidecar.handle(), &host).await;
        assert_eq!(letters(disk.history(), "p", None, GRANULE, SIZE).await, "..d.....");
    });
}

/// Of a history that is open for reading, nothing is changed, and nothing harms it.
#[test]
fn open_for_reading() {
    executor::run(1, async {
        let (disk, _, sidecar, host) = new_disk(1).await;
        disk.mark(named("p")).await.unwrap();
        write(&disk, 4, 1).await;
        drop(disk); // Killed: the write is in the journal.
        let reader = sidecar.read_only();
        let (history, distrust) = History::open(reader.handle(), host.clone()).await.unwrap();
        assert_eq!(distrust, None);
        assert_eq!(letters(&history, "p", None, GRANULE, SIZE).await, "....d...");
        history.delete_point("p").await.expect_err("read-only");
        history.trust().await.expect_err("read-only");
        assert!(!host.removed.get() && history.info().stopped.is_none());
        assert_eq!(letters(&history, "p", None, GRANULE, SIZE).await, "....d...");
    });
}

/// Two disks, written to in step: no point of theirs has one write without the other that came before it.
#[test]
fn several_disks_at_one_instant() {
    seeds::each(25, |seed| {
        executor::run(seed, async {
            let mut random = fastrand::Rng::with_seed(seed);
            let (a_image, b_image) =
                (MemoryStorage::new(SIZE).yielding(seed), MemoryStorage::new(SIZE).yielding(seed + 1));
            let (a_side, b_side) = (MemoryStorage::new(0).yielding(seed + 2), MemoryStorage::new(0).yielding(seed + 3));
            let a = created(a_image.handle(), a_side.handle(), &TestHost::new(seed), GRANULE).await;
            let b = created(b_image.handle(), b_side.handle(), &TestHost::new(seed), GRANULE).await;
            let done = Rc::new(Cell::new(false));
            let writer = executor::spawn({
                let (a, b, done) = (Rc::clone(&a), Rc::clone(&b), Rc::clone(&done));
                async move {
                    let mut n = 0;
                    while !done.get() {
                        n += 1;
                        write(&a, 0, n).await;
                        write(&b, 0, n).await;
                        write(&a, 1, n).await;
                    }
                }
            });
            for n in 0..4 {
                for _ in 0..random.u32(..60) {
                    yield_now().await;
                }
                let set = Id([n + 1; 16]);
                let new = || NewPoint { name: n.to_string(), set };
                let held = (a.hold(&new().name).await.unwrap(), b.hold(&new().name).await.unwrap());
                let (a_bytes, b_bytes) = (a_image.to_vec(), b_image.to_vec());
                let cut = (held.0.cut(new()), held.1.cut(new()));
                let (first, second, third) = (a_bytes[0], b_bytes[0], a_bytes[GRANULE as usize]);
                assert!(first >= second && second >= third && first - third <= 1, "{first} {second} {third}");
                let a_point = cut.0.commit(Consistency::Crash).await.unwrap();
                let b_point = cut.1.commit(Consistency::Application { frozen_ms: 3 }).await.unwrap();
                assert_eq!((a_point.set, b_point.set), (set, set));
                let now = a_image.to_vec();
                judge(&a_bytes, &now, &all_changes(a.history(), &n.to_string(), None, 9).await, "a");
                judge(&b_bytes, &b_image.to_vec(), &all_changes(b.history(), &n.to_string(), None, 9).await, "b");
            }
            done.set(true);
            writer.await;
        });
    });
}

/// A point, and what the disk held.
type Instant = (String, Vec<u8>);

/// Marks that come while another one is being committed wait for their turn, and each has its own instant.
#[test]
fn marks_in_quick_succession() {
    seeds::each(40, |seed| {
        let (image, sidecar) = (MemoryStorage::new(SIZE).yielding(seed), MemoryStorage::new(0).yielding(seed + 1));
        let host = TestHost::new(seed);
        let disk = executor::run(seed, created(image.handle(), sidecar.handle(), &host, GRANULE));
        let mut tasks: Vec<LocalFuture<'_, Option<Instant>>> = Vec::new();
        for n in 0..6 {
            let (disk, image) = (Rc::clone(&disk), image.clone());
            tasks.push(Box::pin(async move {
                let name = n.to_string();
                let held = disk.hold(&name).await.unwrap();
                let content = image.to_vec();
                if n == 5 {
                    drop(held.cut(named(&name))); // Given up.
                    return None;
                }
                held.cut(named(&name)).commit(Consistency::Crash).await.unwrap();
                Some((name, content))
            }));
        }
        for n in 0..4 {
            let disk = Rc::clone(&disk);
            tasks.push(Box::pin(async move {
                for round in 1..10 {
                    write(&disk, (n * 3 + u64::from(round)) % 8, round).await;
                }
                None
            }));
        }
        let points: Vec<Instant> = executor::run_all(seed, tasks).into_iter().flatten().collect();
        assert_eq!(points.len(), 5);
        let killed = MemoryStorage::of(sidecar.snapshot());
        executor::run(seed, async {
            let reopened = tracked(image.handle(), killed.handle(), &host).await;
            let now = image.to_vec();
            for history in [disk.history(), reopened.history()] {
                assert!(matches!(history.point("5"), Err(HistoryError::NoSuchPoint { .. })));
                for (name, content) in &points {
                    judge(content, &now, &all_changes(history, name, None, 9).await, name);
                }
            }
        });
    });
}
