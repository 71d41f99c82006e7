//! Another image takes the place of the history's, cut off at every step.

use crate::answers::{all_changes, judge};
use crate::crashes::{GRANULE, Truths, client, marker};
use crate::host::{TestHost, named, raw, tracked};
use crate::parking::{TestLot, park};
use chain::Chain;
use disk::{Buf, Disk, ErrorKind, LocalFuture, Operation, WriteFlags};
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::future::poll_fn;
use std::pin::pin;
use std::rc::Rc;
use testkit::executor::{self, Executor, yield_now};
use testkit::{CrashStorage, MemoryStorage, seeds};
use tracking::{CreateOptions, Distrust, History, ImageFacts, ImageMark, Tracked};

/// How far a switch is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Phase {
    None,
    Marking,
    Holding,
    Naming,
    /// The heir is at the image's place, and a power cut may take that back.
    Renamed,
    Lasting,
    Succeeding,
    Forgetting,
}

/// What stands at the image's place: the host tells of it. All images show the same bytes, those of one storage.
struct Place {
    host: Rc<TestHost>,
    /// The image that stood here, until a power cut cannot bring it back.
    before: Cell<Option<(ImageFacts, Option<ImageMark>)>>,
    lots: RefCell<BTreeMap<u64, Rc<TestLot>>>,
    phase: Cell<Phase>,
    switches: Cell<u64>,
}

impl Place {
    fn new(host: &Rc<TestHost>) -> Rc<Self> {
        Rc::new(Self {
            host: Rc::clone(host),
            before: Cell::default(),
            lots: RefCell::default(),
            phase: Cell::new(Phase::None),
            switches: Cell::default(),
        })
    }

    /// The lot of the image that stands here.
    fn lot(&self) -> Rc<TestLot> {
        Rc::clone(self.lots.borrow_mut().entry(self.host.facts.get().inode).or_default())
    }

    /// What a killed process has left parked for the image that stands here; nothing may be parked for any other.
    fn left(&self) -> Vec<(u64, Vec<u8>)> {
        let here = self.host.facts.get().inode;
        let mut lots = std::mem::take(&mut *self.lots.borrow_mut());
        let left = lots.remove(&here).map(|lot| lot.left()).unwrap_or_default();
        assert!(lots.values().all(|lot| lot.left().is_empty()), "an answered write is parked for another image");
        left
    }

    fn power_cut(&self, undone: bool) {
        if let Some((facts, mark)) = self.before.take()
            && undone
        {
            self.host.facts.set(facts);
            self.host.mark.set(mark);
        }
        self.lots.borrow_mut().clear();
        self.host.restart();
    }
}

/// Exchanges the image once, as the engine does.
async fn switch(disk: &Rc<Tracked<Chain>>, place: &Place, heir_bears: bool, happens: bool, early: bool) {
    let (history, host) = (disk.history(), &place.host);
    place.phase.set(Phase::Marking);
    let mark = history.mark_for_heir().await.expect("no faults").filter(|_| heir_bears);
    place.phase.set(Phase::Holding);
    let still = disk.hold_still().await;
    still.wait_for_parked().await.expect("no faults");
    let mut still = Some(still);
    let parks = disk.is_parking();
    disk.inner().flush().await.expect("no faults");
    disk.leave_lot().expect("stands still");
    let now = host.facts.get();
    let modified = host.clock.get() as i64 * 1_000_000;
    let facts = ImageFacts { inode: now.inode + 1, modified, others: now.others ^ 5, size: now.size + 1, ..now };
    place.phase.set(Phase::Naming);
    history.name_heir(facts, mark).await.expect("no faults");
    if !happens {
        place.phase.set(Phase::Forgetting);
        history.forget_heir().await.expect("no faults");
    } else {
        place.before.set(Some((now, host.mark.get())));
        host.facts.set(facts);
        host.mark.set(mark);
        host.bears.set(heir_bears);
        place.phase.set(Phase::Renamed);
        yield_now().await;
        place.before.set(None);
        place.phase.set(Phase::Lasting);
        yield_now().await;
        place.phase.set(Phase::Succeeding);
        let mut taking = pin!(history.heir_takes_place());
        poll_fn(|cx| {
            let polled = taking.as_mut().poll(cx);
            if early {
                still.take(); // The guest goes on meanwhile.
            }
            polled
        })
        .await
        .expect("no faults");
    }
    if parks {
        park(disk, &place.lot());
    }
    place.phase.set(Phase::None);
    place.switches.set(place.switches.get() + 1);
}

async fn switcher(disk: Rc<Tracked<Chain>>, place: Rc<Place>, seed: u64) {
    let mut random = fastrand::Rng::with_seed(seed);
    loop {
        for _ in 0..random.u32(..30) {
            yield_now().await;
        }
        switch(&disk, &place, random.u8(..4) > 0, random.u8(..4) > 0, random.bool()).await;
    }
}

fn rounds(seed: u64, power: bool, seen: &mut BTreeMap<Phase, u64>, switches: &mut u64) {
    let mut random = fastrand::Rng::with_seed(seed);
    let size = random.u64(20..200) << 10;
    let host = TestHost::new(seed);
    host.bears.set(random.bool());
    let place = Place::new(&host);
    let (mut image, mut sidecar) = (MemoryStorage::new(size), MemoryStorage::new(0));
    let truths = Truths::default();
    let parks = random.bool();
    executor::run(seed, async {
        let options = CreateOptions { granule: GRANULE, size };
        History::create(sidecar.handle(), host.clone(), options).await.expect("no faults");
    });
    for round in 0..4 {
        let (disk_storage, history_storage) = (CrashStorage::of(image), CrashStorage::of(sidecar));
        let (disk_storage, history_storage) =
            (disk_storage.yielding(seed + round), history_storage.yielding(seed ^ round));
        let mut executor = Executor::new(seed * 7 + round);
        let client_seed = random.u64(..);
        {
            let (place, truths) = (Rc::clone(&place), Rc::clone(&truths));
            let (image, sidecar) = (disk_storage.clone(), history_storage.clone());
            executor.spawn(async move {
                let disk = tracked(image.handle(), sidecar.handle(), &place.host).await;
                let history = Rc::clone(disk.history());
                if parks {
                    disk.put_back(place.left()).await.expect("no faults");
                    park(&disk, &place.lot());
                }
                let mut tasks = vec![executor::spawn(async move { history.tend(yield_now).await })];
                for n in 0..2 {
                    let work = client(Rc::clone(&disk), Rc::clone(&truths), n, client_seed.wrapping_add(n), size);
                    tasks.push(executor::spawn(work));
                }
                let work = marker(Rc::clone(&disk), truths, image.memory().clone(), client_seed, round);
                tasks.push(executor::spawn(work));
                tasks.push(executor::spawn(switcher(disk, place, client_seed)));
                for task in tasks {
                    task.await;
                }
            });
        }
        executor.run_steps(random.u64(..6000));
        drop(executor);
        *seen.entry(place.phase.replace(Phase::None)).or_default() += 1;
        *switches += place.switches.take();
        if power {
            (image, sidecar) = (disk_storage.crash(random.u64(..)), history_storage.crash(random.u64(..)));
            place.power_cut(random.bool());
        } else {
            image = MemoryStorage::of(disk_storage.memory().snapshot());
            sidecar = MemoryStorage::of(history_storage.memory().snapshot());
            place.before.set(None);
        }
        let reader = MemoryStorage::of(sidecar.snapshot());
        let reader = if random.bool() { reader.read_only() } else { reader };
        executor::run(seed, async {
            let (history, distrust) = History::open(reader.handle(), host.clone()).await.expect("readable");
            assert_eq!(distrust, None);
            let now = image.to_vec();
            let known: Vec<String> = history.points().into_iter().map(|point| point.name).collect();
            let mut list = std::mem::take(&mut truths.borrow_mut().truths);
            list.retain(|truth| {
                assert!(!truth.committed || known.contains(&truth.name), "point {} is gone", truth.name);
                known.contains(&truth.name)
            });
            for truth in &mut list {
                truth.committed = true;
                let changes = all_changes(&history, &truth.name, None, 50).await;
                judge(&truth.content, &now, &changes, &format!("since {}", truth.name));
            }
            truths.borrow_mut().truths = list;
        });
    }
}

fn torture(power: bool, count: u64) {
    let (mut seen, mut switches) = (BTreeMap::new(), 0);
    seeds::each(count, |seed| rounds(seed, power, &mut seen, &mut switches));
    println!("{switches} switches; crashed while {seen:?}");
    if std::env::var_os("HIGHWATER_SEED").is_none() {
        for phase in [Phase::Holding, Phase::Naming, Phase::Succeeding] {
            assert!(seen.contains_key(&phase), "no crash while {phase:?}");
        }
    }
}

#[test]
fn power_cuts_around_switches_miss_nothing() {
    torture(true, 80);
}

#[test]
fn kills_around_switches_miss_nothing() {
    torture(false, 40);
}

/// A disk with a point, written to since; and then one switch, of which so many steps are done.
struct Cut {
    image: MemoryStorage,
    sidecar: MemoryStorage,
    host: Rc<TestHost>,
    place: Rc<Place>,
    old: (ImageFacts, Option<ImageMark>),
    then: Vec<u8>,
    done: bool,
}

fn cut_after(steps: u64, bears: bool, heir_bears: bool, happens: bool, power: bool, undone: bool) -> Cut {
    const SIZE: u64 = 16 * GRANULE;
    let host = TestHost::new(3);
    host.bears.set(bears);
    let (image, sidecar) = (MemoryStorage::new(SIZE), MemoryStorage::new(0));
    let then = executor::run(1, async {
        let options = CreateOptions { granule: GRANULE, size: SIZE };
        History::create(sidecar.handle(), host.clone(), options).await.expect("no faults");
        let disk = tracked(image.handle(), sidecar.handle(), &host).await;
        disk.write(0, Buf::copy_of(&[1; 512]), WriteFlags::default()).await.expect("no faults");
        disk.mark(named("p")).await.expect("no faults");
        let then = image.to_vec();
        disk.write(5 * GRANULE, Buf::copy_of(&[2; 512]), WriteFlags::default()).await.expect("no faults");
        disk.close().await.expect("no faults");
        then
    });
    let old = Rc::new(Cell::new((host.facts.get(), host.mark.get())));
    let place = Place::new(&host);
    let (image, sidecar) = (CrashStorage::of(image), CrashStorage::of(sidecar));
    let mut executor = Executor::new(steps);
    let work: LocalFuture<'static, ()> = {
        let (image, sidecar, place, old) =
            (image.clone(), sidecar.clone().yielding(1), Rc::clone(&place), Rc::clone(&old));
        Box::pin(async move {
            let disk = tracked(image.handle(), sidecar.handle(), &place.host).await;
            let keep_old = async {
                while place.phase.get() < Phase::Renamed {
                    old.set((place.host.facts.get(), place.host.mark.get()));
                    yield_now().await;
                }
            };
            futures_util::join!(switch(&disk, &place, heir_bears, happens, false), keep_old);
            disk.write(9 * GRANULE, Buf::copy_of(&[3; 512]), WriteFlags::default()).await.expect("no faults");
            disk.mark(named("q")).await.expect("no faults");
        })
    };
    executor.spawn(work);
    executor.run_steps(steps);
    let done = executor.unfinished() == 0;
    drop(executor);
    let (image, sidecar) = match power {
        true => {
            place.power_cut(undone);
            (image.crash(steps), sidecar.crash(steps + 1))
        }
        false => (MemoryStorage::of(image.memory().snapshot()), MemoryStorage::of(sidecar.memory().snapshot())),
    };
    Cut { image, sidecar, host, place, old: old.get(), then, done }
}

#[test]
fn every_step_of_a_switch_and_what_follows() {
    let mut phases = BTreeMap::new();
    for (bears, heir_bears, happens) in
        [(true, true, true), (false, true, true), (true, false, true), (false, false, true), (true, true, false)]
    {
        for (power, undone) in [(false, false), (true, false), (true, true)] {
            for steps in 0.. {
                let cut = cut_after(steps, bears, heir_bears, happens, power, undone);
                *phases.entry(cut.place.phase.get()).or_insert(0) += 1;
                let what =
                    format!("step {steps}, {bears}, {heir_bears}, {happens}, power {power}, {:?}", cut.place.phase);
                executor::run(1, async {
                    // The next session: what it finds, what it writes, and that the one after it trusts it as well.
                    cut.host.bears.set(cut.host.mark.get().is_some());
                    let (history, distrust) =
                        History::open(cut.sidecar.handle(), cut.host.clone()).await.expect("readable");
                    assert_eq!(distrust, None, "{what}");
                    let changes = all_changes(&history, "p", None, 50).await;
                    judge(&cut.then, &cut.image.to_vec(), &changes, &what);
                    let disk = Tracked::new(raw(cut.image.handle()), Rc::new(history)).await.expect("no faults");
                    disk.write(12 * GRANULE, Buf::copy_of(&[4; 512]), WriteFlags::default()).await.expect("no faults");
                    disk.close().await.expect("no faults");
                    let disk = tracked(cut.image.handle(), cut.sidecar.handle(), &cut.host).await;
                    let changes = all_changes(disk.history(), "p", None, 50).await;
                    judge(&cut.then, &cut.image.to_vec(), &changes, &what);
                });
                if cut.done {
                    break;
                }
            }
        }
    }
    println!("{phases:?}");
    assert_eq!(phases.len(), 7, "{phases:?}");
}

#[test]
fn who_brings_the_old_image_back_is_refused() {
    let (mut trusted, mut refused) = (0, 0);
    for steps in 0.. {
        let cut = cut_after(steps, true, true, true, false, false);
        if cut.place.phase.get() > Phase::Renamed || cut.done {
            executor::run(1, async {
                let (facts, mark) = cut.old;
                cut.host.facts.set(facts);
                cut.host.mark.set(mark);
                let (history, distrust) =
                    History::open(cut.sidecar.handle(), cut.host.clone()).await.expect("readable");
                match distrust {
                    None => {
                        trusted += 1;
                        assert!(history.point("q").is_err(), "no point of the heir's");
                    }
                    Some(distrust) => {
                        refused += 1;
                        assert_eq!(distrust, Distrust::OtherMoment);
                        assert!(history.point("p").expect("there").refused.is_some());
                    }
                }
            });
        }
        if cut.done {
            break;
        }
    }
    assert!(trusted > 0 && refused > 0, "{trusted} {refused}");
}

/// A sidecar that fails at a switch gives the history up, and does not stand in the switch's way; unless it cannot be
/// given up.
#[test]
fn a_sidecar_that_fails_is_given_up() {
    const SIZE: u64 = 8 * GRANULE;
    for (at, removable) in [(0, true), (1, true), (0, false), (1, false)] {
        executor::run(1, async {
            let (image, sidecar, host) = (MemoryStorage::new(SIZE), MemoryStorage::new(0), TestHost::new(1));
            let options = CreateOptions { granule: GRANULE, size: SIZE };
            History::create(sidecar.handle(), host.clone(), options).await.expect("no faults");
            let disk = tracked(image.handle(), sidecar.handle(), &host).await;
            disk.mark(named("p")).await.expect("no faults");
            let history = disk.history();
            let mark = history.mark_for_heir().await.expect("no faults");
            host.removable.set(removable);
            sidecar.fail_from(Some(Operation::Flush), at, ErrorKind::Io);
            let heir = ImageFacts { inode: 5, ..ImageFacts::default() };
            let named = history.name_heir(heir, mark).await;
            let taken = match &named {
                Ok(()) => history.heir_takes_place().await,
                Err(_) => history.forget_heir().await,
            };
            assert_eq!(named.is_ok(), removable || at == 1);
            assert_eq!(taken.is_ok(), removable);
            assert_eq!(host.removed.get(), removable);
            let write = disk.write(0, Buf::copy_of(&[1]), WriteFlags::default()).await;
            assert_eq!(write.is_ok(), removable, "nothing is written that is neither recorded nor given up");
            if removable {
                assert!(history.info().stopped.is_some());
                assert_eq!(history.mark_for_heir().await.expect("it has stopped"), None);
                history.name_heir(heir, None).await.expect("it has stopped");
                history.heir_takes_place().await.expect("it has stopped");
            }
        });
    }
}

/// While the images below change, none of their states is a sign of somebody else; once they rest, and after a close, each
/// other one is. Who comes too late, when the disk is closed, changes nothing.
#[test]
fn images_below_may_change_until_they_rest() {
    const SIZE: u64 = 8 * GRANULE;
    executor::run(1, async {
        let (image, sidecar, host) = (MemoryStorage::new(SIZE), MemoryStorage::new(0), TestHost::new(1));
        let options = CreateOptions { granule: GRANULE, size: SIZE };
        History::create(sidecar.handle(), host.clone(), options).await.expect("no faults");
        let found = async |others: u64| {
            let then = host.facts.replace(ImageFacts { others, ..host.facts.get() });
            let after_a_kill = MemoryStorage::of(sidecar.snapshot());
            let (_, distrust) = History::open(after_a_kill.handle(), host.clone()).await.expect("no faults");
            host.facts.set(then);
            distrust
        };
        let disk = tracked(image.handle(), sidecar.handle(), &host).await;
        disk.history().others_change().await.expect("no faults");
        assert_eq!(found(5).await, None);
        assert_eq!(found(7).await, None);
        disk.history().others_rest(7).await.expect("no faults");
        assert_eq!(found(5).await, Some(Distrust::OtherFiles));
        assert_eq!(found(7).await, None);
        disk.history().others_change().await.expect("no faults");
        host.facts.set(ImageFacts { others: 9, ..host.facts.get() });
        disk.close().await.expect("no faults");
        disk.history().others_rest(7).await.expect("nothing is to be done");
        assert_eq!(disk.history().others_change().await.expect_err("too late").kind(), ErrorKind::Closed);
        assert_eq!(found(7).await, Some(Distrust::OtherFiles));
        assert_eq!(found(9).await, None);
    });
}

/// Of an image that was not written to in this session another size is a sign of somebody else, unless it was said before that
/// we write to it.
#[test]
fn the_image_may_be_changed_once_that_was_said() {
    const SIZE: u64 = 8 * GRANULE;
    executor::run(1, async {
        let (image, sidecar, host) = (MemoryStorage::new(SIZE), MemoryStorage::new(0), TestHost::new(1));
        let options = CreateOptions { granule: GRANULE, size: SIZE };
        History::create(sidecar.handle(), host.clone(), options).await.expect("no faults");
        let grown_and_killed = async || {
            let then = host.facts.get();
            host.facts.set(ImageFacts { size: then.size + 1, ..then });
            let after_a_kill = MemoryStorage::of(sidecar.snapshot());
            let (_, distrust) = History::open(after_a_kill.handle(), host.clone()).await.expect("no faults");
            host.facts.set(then);
            distrust
        };
        let disk = tracked(image.handle(), sidecar.handle(), &host).await;
        assert!(matches!(grown_and_killed().await, Some(Distrust::Size { .. })));
        disk.history().image_changes().await.expect("no faults");
        assert_eq!(grown_and_killed().await, None);
        disk.close().await.expect("no faults");
        assert_eq!(disk.history().image_changes().await.expect_err("too late").kind(), ErrorKind::Closed);
    });
}
