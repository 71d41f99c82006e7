//! A disk whose table has several groups, of which a checkpoint writes some.

use crate::answers::all_changes;
use crate::host::{TestHost, named};
use disk::{
    Buf, ByteRange, Disk, DiskError, DiskExtent, DiskGeometry, ErrorKind, Operation, Result, WriteFlags, ZeroMode,
};
use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;
use testkit::executor::{self, Executor, yield_now};
use testkit::{CrashStorage, MemoryStorage, seeds};
use tracking::{Change, ChangeKind, Consistency, CreateOptions, History, HistoryError, PendingRun, Tracked};

const GRANULE: u64 = 4096;
/// Granules of a group.
const GROUP: u64 = 128 * 1024;
const GROUPS: u64 = 4;
const SIZE: u64 = GROUPS * GROUP * GRANULE - 3 * GRANULE - 512;

/// A disk without bytes.
struct NullDisk(Touched);

impl NullDisk {
    /// A write reaches the disk: from now on its change must be told.
    fn issued(&self, granule: u64) {
        self.0.borrow_mut().points.iter_mut().for_each(|point| point.issued.extend([granule]));
    }
}

impl Disk for NullDisk {
    fn geometry(&self) -> DiskGeometry {
        DiskGeometry { size: SIZE, preferred_alignment: 1, unit: 1, read_only: false }
    }
    async fn read(&self, _offset: u64, buf: Buf) -> Result<Buf> {
        Ok(buf)
    }
    async fn write(&self, offset: u64, _buf: Buf, _flags: WriteFlags) -> Result<()> {
        self.issued(offset / GRANULE);
        yield_now().await;
        Ok(())
    }
    async fn write_zeroes(&self, _range: ByteRange, _mode: ZeroMode, _flags: WriteFlags) -> Result<()> {
        Ok(())
    }
    async fn discard(&self, range: ByteRange, _flags: WriteFlags) -> Result<()> {
        self.issued(range.offset() / GRANULE);
        Ok(())
    }
    async fn flush(&self) -> Result<()> {
        Ok(())
    }
    async fn map(&self, range: ByteRange) -> Result<DiskExtent> {
        Ok(DiskExtent { range, allocated: true, zero: false, compressed: false, depth: Some(0), source: None })
    }
    async fn resize(&self, _size: u64) -> Result<()> {
        Err(DiskError::new(ErrorKind::Unsupported, Operation::Resize))
    }
    async fn close(&self) -> Result<()> {
        Ok(())
    }
}

#[derive(Clone)]
struct Truth {
    name: String,
    /// Granules that somebody set out to write to since.
    touched: BTreeSet<u64>,
    /// Those to which a write has reached the disk.
    issued: BTreeSet<u64>,
}

impl Truth {
    fn of(name: &str, touched: BTreeSet<u64>) -> Self {
        Self { name: name.to_owned(), touched, issued: BTreeSet::new() }
    }
}

#[derive(Default)]
struct Told {
    points: Vec<Truth>,
    /// What each writer has asked for last. It may be carried out after a point that is taken meanwhile.
    last: BTreeMap<u64, u64>,
}

type Touched = Rc<RefCell<Told>>;

async fn writer(disk: Rc<Tracked<NullDisk>>, touched: Touched, id: u64, seed: u64) {
    let mut random = fastrand::Rng::with_seed(seed);
    let group = random.u64(..GROUPS);
    loop {
        let near = random.u64(..3) * 1024 + random.u64(..4);
        let granule = (group * GROUP + near).min(SIZE / GRANULE);
        {
            let mut told = touched.borrow_mut();
            told.last.insert(id, granule);
            told.points.iter_mut().for_each(|point| point.touched.extend([granule]));
        }
        if random.u8(..8) == 0 {
            let range = ByteRange::new(granule * GRANULE, GRANULE).intersect(ByteRange::new(0, SIZE));
            disk.discard(range, WriteFlags::default()).await.expect("no faults");
        } else {
            disk.write(granule * GRANULE, Buf::copy_of(&[1]), WriteFlags::default()).await.expect("no faults");
        }
        if random.u8(..8) == 0 {
            disk.history().set_pending("first", Vec::new()).await.expect("no faults");
        }
    }
}

async fn granules_since(history: &History, point: &str) -> BTreeSet<u64> {
    let changes = all_changes(history, point, None, 1000).await;
    let granules = |change: Change| change.range.offset() / GRANULE..change.range.end().div_ceil(GRANULE);
    changes.into_iter().flat_map(granules).collect()
}

#[test]
fn crashes_between_groups() {
    let (mut crashes, mut asked) = (0, 0);
    seeds::each(25, |seed| {
        let mut random = fastrand::Rng::with_seed(seed);
        let host = TestHost::new(seed);
        let mut sidecar = MemoryStorage::new(0);
        let touched = Touched::default();
        executor::run(seed, async {
            let options = CreateOptions { granule: GRANULE, size: SIZE };
            let history = Rc::new(History::create(sidecar.handle(), host.clone(), options).await.unwrap());
            let disk = Tracked::new(Rc::new(NullDisk(Rc::clone(&touched))), history).await.unwrap();
            disk.mark(named("first")).await.unwrap();
        });
        touched.borrow_mut().points.push(Truth::of("first", BTreeSet::new()));
        for round in 0..6 {
            let storage = CrashStorage::of(sidecar).yielding(seed + round);
            let mut executor = Executor::new(seed + round);
            let (handle, host_here, touched_here) = (storage.handle(), host.clone(), Rc::clone(&touched));
            let (writers, marks, writers_seed) = (random.u64(1..3), random.bool(), random.u64(..));
            executor.spawn(async move {
                let (history, distrust) = History::open(handle, host_here).await.expect("readable");
                assert_eq!(distrust, None);
                history.set_open_limit(0);
                let disk = Tracked::new(Rc::new(NullDisk(Rc::clone(&touched_here))), Rc::new(history)).await.unwrap();
                let tasks: Vec<_> = (0..writers)
                    .map(|n| executor::spawn(writer(Rc::clone(&disk), Rc::clone(&touched_here), n, writers_seed ^ n)))
                    .collect();
                if marks {
                    let name = round.to_string();
                    let held = disk.hold(&name).await.expect("no faults");
                    let last = touched_here.borrow().last.values().copied().collect();
                    touched_here.borrow_mut().points.push(Truth::of(&name, last));
                    held.cut(named(&name)).commit(Consistency::Crash).await.expect("no faults");
                }
                for task in tasks {
                    task.await;
                }
            });
            executor.run_steps(random.u64(20..2000));
            drop(executor);
            sidecar = storage.crash(random.u64(..));
            host.restart();
            crashes += 1;
            executor::run(seed, async {
                let reader = sidecar.read_only();
                let (history, distrust) = History::open(reader.handle(), host.clone()).await.expect("readable");
                assert_eq!(distrust, None);
                // A point whose committing was cut off may be there or not.
                touched.borrow_mut().points.retain(|point| history.point(&point.name).is_ok());
                let points = touched.borrow().points.clone();
                for Truth { name, touched, issued } in points {
                    let told = granules_since(&history, &name).await;
                    assert!(issued.is_subset(&told), "since {name}: {:?} was missed", issued.difference(&told).next());
                    // Nothing was declared ahead.
                    assert!(
                        told.is_subset(&touched),
                        "since {name}: {:?} was not touched",
                        told.difference(&touched).next()
                    );
                    asked += 1;
                }
            });
        }
    });
    println!("{crashes} crashes, {asked} points asked after them");
}

/// An unfinished checkpoint leaves the index block of one group in the slot that does not count. The next session's
/// checkpoints, of another group, reach its generation.
#[test]
fn what_an_unfinished_checkpoint_left_never_counts() {
    executor::run(1, async {
        let (sidecar, host) = (MemoryStorage::new(0), TestHost::new(1));
        let options = CreateOptions { granule: GRANULE, size: SIZE };
        let open = async |sidecar: &MemoryStorage| {
            let (history, distrust) = History::open(sidecar.handle(), host.clone()).await.expect("readable");
            assert_eq!(distrust, None);
            Tracked::new(Rc::new(NullDisk(Touched::default())), Rc::new(history)).await.unwrap()
        };
        let write = async |disk: &Rc<Tracked<NullDisk>>, granule: u64| {
            let done = disk.write(granule * GRANULE, Buf::copy_of(&[1]), WriteFlags::default()).await;
            done.expect("no faults");
        };
        History::create(sidecar.handle(), host.clone(), options).await.unwrap();
        let disk = open(&sidecar).await;
        disk.mark(named("p")).await.unwrap();
        write(&disk, 5).await;
        disk.mark(named("q")).await.unwrap();
        // The change of granule 7 reaches page and index block, but not the superblock: the points do not fit.
        write(&disk, 7).await;
        let many = (0..400_000).map(|n| PendingRun { start: n * 2, end: n * 2 + 1, kind: ChangeKind::Data });
        let refused = disk.history().set_pending("p", many.collect()).await;
        assert!(matches!(refused, Err(HistoryError::TooManyPoints)));
        drop(disk);
        // Closed without the journal's help, the next session changes another group only.
        let disk = open(&sidecar).await;
        disk.close().await.unwrap();
        let disk = open(&sidecar).await;
        for n in 0..3 {
            write(&disk, 2 * GROUP + n).await;
            disk.history().set_pending("p", Vec::new()).await.unwrap();
            let killed = open(&MemoryStorage::of(sidecar.snapshot())).await;
            let told = granules_since(killed.history(), "q").await;
            let expected = [7].into_iter().chain((0..=n).map(|n| 2 * GROUP + n)).collect::<BTreeSet<u64>>();
            assert_eq!(told, expected);
        }
    });
}
