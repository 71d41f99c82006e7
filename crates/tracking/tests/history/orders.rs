//! Small programs in every order of their steps with at most one preemption (two with `HIGHWATER_ROUNDS` set, which takes
//! minutes), cut off after every step.

use crate::host::{TestHost, raw};
use crate::parking::{TestLot, park};
use disk::{
    Buf, ByteRange, Disk, LocalFuture, Result, Storage, StorageExtent, StorageHandle, StorageLimits, WriteFlags,
    ZeroMode,
};
use std::cell::RefCell;
use std::rc::Rc;
use testkit::executor::{self, Executor, every_order, yield_now};
use testkit::{CrashStorage, MemoryStorage};
use tracking::{ChangeKind, Consistency, CreateOptions, History, Id, NewPoint, Tracked};

const GRANULE: u64 = 4096;
const SIZE: u64 = 2 * GRANULE;

/// A storage whose requests take one turn, always.
struct OneTurn(CrashStorage);

impl Storage for OneTurn {
    fn name(&self) -> &str {
        self.0.name()
    }
    fn limits(&self) -> StorageLimits {
        self.0.limits()
    }
    fn size(&self) -> u64 {
        self.0.size()
    }
    async fn read(&self, offset: u64, buf: Buf) -> Result<Buf> {
        self.0.read(offset, buf).await
    }
    async fn write(&self, offset: u64, buf: Buf) -> Result<Buf> {
        yield_now().await;
        self.0.write(offset, buf).await
    }
    async fn write_zeroes(&self, range: ByteRange, mode: ZeroMode) -> Result<()> {
        yield_now().await;
        self.0.write_zeroes(range, mode).await
    }
    async fn discard(&self, range: ByteRange) -> Result<()> {
        yield_now().await;
        self.0.discard(range).await
    }
    async fn allocate(&self, range: ByteRange) -> Result<()> {
        self.0.allocate(range).await
    }
    async fn sync(&self) -> Result<()> {
        yield_now().await;
        self.0.sync().await
    }
    async fn set_size(&self, size: u64) -> Result<()> {
        self.0.set_size(size).await
    }
    async fn extent(&self, range: ByteRange) -> Result<StorageExtent> {
        self.0.extent(range).await
    }
}

/// What one client does.
#[derive(Clone, Copy, Debug)]
enum Does {
    Write(u64, u8),
    Zero(u64),
    Discard(u64),
    Flush,
    Mark,
}

fn client(
    disk: Rc<Tracked<chain::Chain>>,
    image: MemoryStorage,
    truths: Truths,
    id: usize,
    program: &'static [Does],
) -> LocalFuture<'static, ()> {
    Box::pin(async move {
        let none = WriteFlags::default();
        let granule = |n: u64| ByteRange::new(n * GRANULE, GRANULE);
        for (step, does) in program.iter().enumerate() {
            match *does {
                Does::Write(n, byte) => disk.write(n * GRANULE, Buf::copy_of(&[byte; 512]), none).await.unwrap(),
                Does::Zero(n) => disk.write_zeroes(granule(n), ZeroMode::default(), none).await.unwrap(),
                Does::Discard(n) => disk.discard(granule(n), none).await.unwrap(),
                Does::Flush => disk.flush().await.unwrap(),
                Does::Mark => {
                    let name = format!("{id}.{step}");
                    let held = disk.hold(&name).await.unwrap();
                    truths.borrow_mut().push((name.clone(), image.to_vec()));
                    held.cut(NewPoint { name, set: Id::NONE }).commit(Consistency::Crash).await.unwrap();
                }
            }
        }
    })
}

type Truths = Rc<RefCell<Vec<(String, Vec<u8>)>>>;

/// Whatever is left of image and sidecar, the history hides no change.
fn judge(image: &MemoryStorage, sidecar: &MemoryStorage, host: &Rc<TestHost>, truths: &Truths, what: &str) {
    executor::run(0, async {
        let (history, distrust) = History::open(sidecar.read_only().handle(), host.clone()).await.unwrap();
        assert_eq!(distrust, None);
        let now = image.to_vec();
        for point in history.points() {
            let query = history.changes(&point.name, None).unwrap();
            let changes = history.next_changes(&query, 0, 100).await.unwrap().changes;
            let truths = truths.borrow();
            let (_, then) = truths.iter().find(|(name, _)| *name == point.name).expect("a point that was cut");
            for (at, byte) in now.iter().enumerate() {
                let told = changes.iter().find(|c| c.range.contains(ByteRange::new(at as u64, 1))).map(|c| c.kind);
                assert!(told.is_some() || then[at] == *byte, "{what}: byte {at} was missed since {}", point.name);
                let zero = matches!(told, Some(ChangeKind::Zero | ChangeKind::Discarded));
                assert!(!zero || *byte == 0, "{what}: byte {at} is called zero since {}", point.name);
            }
        }
    });
}

fn explore(programs: &'static [&'static [Does]], parks: bool) -> (u64, u64) {
    let mut cuts = 0;
    // What all begin with: a disk with data, and a point.
    let host = TestHost::new(1);
    let (image, sidecar) = (MemoryStorage::new(SIZE), MemoryStorage::new(0));
    executor::run(0, async {
        let options = CreateOptions { granule: GRANULE, size: SIZE };
        let history = History::create(sidecar.handle(), host.clone(), options).await.unwrap();
        let disk = Tracked::new(raw(image.handle()), Rc::new(history)).await.unwrap();
        disk.write(0, Buf::copy_of(&[9; SIZE as usize]), WriteFlags::default()).await.unwrap();
        disk.close().await.unwrap();
    });
    let preemptions = if std::env::var_os("HIGHWATER_ROUNDS").is_some() { 2 } else { 1 };
    let orders = every_order(preemptions, 200_000, |guide| {
        let image = CrashStorage::of(MemoryStorage::of(image.snapshot()));
        let sidecar = CrashStorage::of(MemoryStorage::of(sidecar.snapshot()));
        let host = TestHost::new(1);
        let truths = Truths::default();
        let disk = executor::run(0, async {
            let (history, _) = History::open(sidecar.handle(), host.clone()).await.unwrap();
            drop(history);
            let storage = StorageHandle::new(OneTurn(sidecar.clone()));
            let (history, _) = History::open(storage, host.clone()).await.unwrap();
            let storage = StorageHandle::new(OneTurn(image.clone()));
            Tracked::new(raw(storage), Rc::new(history)).await.unwrap()
        });
        if parks {
            park(&disk, &Rc::new(TestLot::default()));
        }
        let mut executor = Executor::guided(guide);
        for (id, program) in programs.iter().enumerate() {
            executor.spawn(client(Rc::clone(&disk), image.memory().clone(), Rc::clone(&truths), id, program));
        }
        drop(disk);
        let mut step = 0;
        while executor.unfinished() > 0 {
            assert!(executor.step(), "deadlock");
            step += 1;
            if guide.is_known() {
                continue; // Judged in an earlier order.
            }
            cuts += 1;
            let (then, host) = (host.boot.get(), &host);
            let killed = (MemoryStorage::of(image.memory().snapshot()), MemoryStorage::of(sidecar.memory().snapshot()));
            judge(&killed.0, &killed.1, host, &truths, &format!("killed after step {step}"));
            for seed in [0, 3 * step].into_iter().take(preemptions) {
                host.boot.set(tracking::Boot { id: Id([7; 16]), began: u64::MAX });
                judge(&image.crash(seed), &sidecar.crash(seed + 1), host, &truths, &format!("cut after step {step}"));
            }
            host.boot.set(then);
        }
    });
    (orders, cuts)
}

#[test]
fn no_order_hides_a_change() {
    use Does::{Discard, Flush, Mark, Write, Zero};
    const PROGRAMS: [&[&[Does]]; 4] = [
        &[&[Write(0, 1)], &[Mark], &[Write(0, 2)]],
        &[&[Write(0, 1), Flush], &[Mark], &[Discard(0)]],
        &[&[Zero(0), Flush], &[Write(0, 3)], &[Mark]],
        &[&[Mark, Mark], &[Write(1, 1), Write(1, 2)]],
    ];
    for (n, programs) in PROGRAMS.into_iter().enumerate() {
        for parks in [false, true] {
            let (orders, cuts) = explore(programs, parks);
            println!("program {n}, first writes parked: {parks}: {orders} orders, {cuts} moments");
            assert!(orders > 5);
        }
    }
}
