//! Power cuts and kills at any moment: no change is missed.

use crate::answers::{all_changes, judge};
use crate::host::{TestHost, raw};
use crate::parking::{TestLot, park};
use chain::Chain;
use disk::{Buf, ByteRange, Disk, WriteFlags, ZeroMode};
use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::rc::Rc;
use testkit::executor::{self, Executor, yield_now};
use testkit::{CrashStorage, MemoryStorage, seeds};
use tracking::{ChangeKind, Consistency, CreateOptions, History, Id, NewPoint, Tracked};

pub(crate) const GRANULE: u64 = 4096;
/// Granules that may be declared ahead.
const OPEN: u64 = 8;

/// What the test knows of a point.
pub(crate) struct Truth {
    pub(crate) name: String,
    pub(crate) content: Vec<u8>,
    pub(crate) committed: bool,
    /// Granules that somebody set out to change since.
    touched: BTreeSet<u64>,
    crashes: u64,
}

#[derive(Default)]
pub(crate) struct Told {
    pub(crate) truths: Vec<Truth>,
    /// What each client has asked for last. It may be carried out after a point that is taken meanwhile.
    last: BTreeMap<u64, ByteRange>,
}

pub(crate) type Truths = Rc<RefCell<Told>>;

fn granules(range: ByteRange) -> Range<u64> {
    range.offset() / GRANULE..range.end().div_ceil(GRANULE)
}

fn touch(truths: &Truths, client: u64, range: ByteRange) {
    let mut told = truths.borrow_mut();
    told.last.insert(client, range);
    for truth in &mut told.truths {
        truth.touched.extend(granules(range));
    }
}

/// One client: random requests for ever, some of them in sequence.
pub(crate) async fn client(disk: Rc<Tracked<Chain>>, truths: Truths, id: u64, seed: u64, size: u64) {
    let mut random = fastrand::Rng::with_seed(seed);
    let sequential = random.u8(..4) == 0;
    let mut at = random.u64(0..size);
    loop {
        let len = random.u64(1..3 * GRANULE).min(size);
        let offset = if sequential { at } else { random.u64(0..=size - len) };
        let len = len.min(size - offset);
        at = (offset + len) % size;
        if len == 0 {
            continue;
        }
        let range = ByteRange::new(offset, len);
        let flags = WriteFlags { fua: random.u8(..8) == 0 };
        match random.u8(..16) {
            0 => disk.flush().await.expect("no faults"),
            1 | 2 => {
                let range = if random.bool() { range.align_in(GRANULE) } else { range };
                if !range.is_empty() {
                    touch(&truths, id, range);
                    let mode = ZeroMode { unmap: random.bool(), fast_only: false };
                    disk.write_zeroes(range, mode, flags).await.expect("no faults");
                }
            }
            3 | 4 => {
                let range = range.align_out(GRANULE).intersect(ByteRange::new(0, size));
                touch(&truths, id, range);
                disk.discard(range, flags).await.expect("no faults");
            }
            _ => {
                touch(&truths, id, range);
                let byte = random.u8(1..);
                disk.write(offset, Buf::copy_of(&vec![byte; len as usize]), flags).await.expect("no faults");
            }
        }
    }
}

/// Takes points for ever.
pub(crate) async fn marker(disk: Rc<Tracked<Chain>>, truths: Truths, image: MemoryStorage, seed: u64, round: u64) {
    let mut random = fastrand::Rng::with_seed(seed);
    for n in 0.. {
        for _ in 0..random.u32(1..400) {
            yield_now().await;
        }
        let name = format!("{round}.{n}");
        let held = disk.hold(&name).await.expect("no faults");
        let content = image.to_vec();
        {
            let mut told = truths.borrow_mut();
            let touched = told.last.values().flat_map(|range| granules(*range)).collect();
            told.truths.push(Truth { name: name.clone(), content, committed: false, touched, crashes: 0 });
        }
        let new = NewPoint { name: name.clone(), set: Id::NONE };
        held.cut(new).commit(Consistency::Crash).await.expect("no faults");
        let mut told = truths.borrow_mut();
        told.truths.iter_mut().find(|t| t.name == name).expect("entered above").committed = true;
    }
}

struct Seen {
    points: u64,
    over: u64,
    most_over: u64,
    zeroes: u64,
}

fn rounds(seed: u64, power: bool, seen: &mut Seen) {
    let mut random = fastrand::Rng::with_seed(seed);
    let size = if random.u8(..8) == 0 { 5 << 20 } else { random.u64(20..300) << 10 };
    let host = TestHost::new(seed);
    host.bears.set(random.bool());
    let mut image = MemoryStorage::new(size);
    let mut sidecar = MemoryStorage::new(0);
    let truths = Truths::default();
    // Half of the disks answer first writes early; the lot outlives a kill, and not a power cut.
    let mut lot = random.bool().then(|| Rc::new(TestLot::default()));
    executor::run(seed, async {
        let options = CreateOptions { granule: GRANULE, size };
        History::create(sidecar.handle(), host.clone(), options).await.expect("no faults");
    });
    for round in 0..4 {
        let (disk_storage, history_storage) = (CrashStorage::of(image), CrashStorage::of(sidecar));
        let (disk_storage, history_storage) =
            (disk_storage.yielding(seed + round), history_storage.yielding(seed ^ round));
        let mut executor = Executor::new(seed * 7 + round);
        let clients = random.u64(1..5);
        let client_seed = random.u64(..);
        let closes = random.u8(..6) == 0;
        {
            let (host, truths, lot) = (host.clone(), Rc::clone(&truths), lot.clone());
            let (image, sidecar) = (disk_storage.clone(), history_storage.clone());
            executor.spawn(async move {
                let (history, distrust) = History::open(sidecar.handle(), host).await.expect("readable");
                assert_eq!(distrust, None);
                history.set_open_limit(OPEN * GRANULE);
                let history = Rc::new(history);
                let disk = Tracked::new(raw(image.handle()), Rc::clone(&history)).await.expect("no faults");
                if let Some(lot) = lot {
                    disk.put_back(lot.left()).await.expect("no faults");
                    park(&disk, &lot);
                }
                if closes {
                    // A short session that ends well: whoever comes next needs no journal.
                    touch(&truths, 0, ByteRange::new(0, 1));
                    disk.write(0, Buf::copy_of(&[9]), WriteFlags::default()).await.expect("no faults");
                    disk.close().await.expect("no faults");
                    return;
                }
                let mut tasks = vec![executor::spawn(async move { history.tend(yield_now).await })];
                for n in 0..clients {
                    let work = client(Rc::clone(&disk), Rc::clone(&truths), n, client_seed.wrapping_add(n), size);
                    tasks.push(executor::spawn(work));
                }
                let work = marker(disk, truths, image.memory().clone(), client_seed, round);
                tasks.push(executor::spawn(work));
                for task in tasks {
                    task.await;
                }
            });
        }
        executor.run_steps(random.u64(..6000));
        drop(executor);
        if power {
            (image, sidecar) = (disk_storage.crash(random.u64(..)), history_storage.crash(random.u64(..)));
            host.restart();
            lot = lot.map(|_| Rc::default());
        } else {
            image = MemoryStorage::of(disk_storage.memory().snapshot());
            sidecar = MemoryStorage::of(history_storage.memory().snapshot());
        }
        truths.borrow_mut().truths.iter_mut().for_each(|truth| truth.crashes += 1);
        // Looked at without writing, half the time.
        let reader = MemoryStorage::of(sidecar.snapshot());
        let reader = if random.bool() { reader.read_only() } else { reader };
        executor::run(seed, async {
            let (history, distrust) = History::open(reader.handle(), host.clone()).await.expect("readable");
            assert_eq!(distrust, None);
            let now = image.to_vec();
            let known: Vec<String> = history.points().into_iter().map(|point| point.name).collect();
            let mut list = std::mem::take(&mut truths.borrow_mut().truths);
            for truth in &list {
                assert!(!truth.committed || known.contains(&truth.name), "point {} is gone", truth.name);
            }
            // A point whose committing was cut off may be there or not.
            list.retain(|truth| known.contains(&truth.name));
            for truth in &mut list {
                truth.committed = true;
                let changes = all_changes(&history, &truth.name, None, random.usize(1..9)).await;
                judge(&truth.content, &now, &changes, &format!("since {}", truth.name));
                let told = changes.iter().flat_map(|change| granules(change.range));
                let over = told.filter(|g| !truth.touched.contains(g)).count() as u64;
                assert!(over <= truth.crashes * OPEN, "{over} granules too many since {}", truth.name);
                seen.points += 1;
                seen.over += over;
                seen.most_over = seen.most_over.max(over);
                seen.zeroes += changes.iter().filter(|c| c.kind != ChangeKind::Data).count() as u64;
            }
            for pair in list.windows(2) {
                let changes = all_changes(&history, &pair[0].name, Some(&pair[1].name), 100).await;
                judge(&pair[0].content, &pair[1].content, &changes, "between");
            }
            truths.borrow_mut().truths = list;
        });
    }
}

fn torture(power: bool, count: u64) {
    let mut seen = Seen { points: 0, over: 0, most_over: 0, zeroes: 0 };
    seeds::each(count, |seed| rounds(seed, power, &mut seen));
    println!(
        "{} crashes, {} points asked after them; reported though not touched: {} granules in all, {} at most; {} ranges of zeroes",
        count * 4,
        seen.points,
        seen.over,
        seen.most_over,
        seen.zeroes
    );
    if std::env::var_os("HIGHWATER_SEED").is_none() {
        assert!(seen.points > count && seen.zeroes > 0 && seen.most_over > 0, "the test reaches what it is about");
    }
}

#[test]
fn power_cuts_miss_nothing() {
    torture(true, 120);
}

#[test]
fn kills_miss_nothing() {
    torture(false, 40);
}
