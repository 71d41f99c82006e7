//! The power fails at any moment of a job and of its switch: the disk, made of the images that count then, has every byte
//! that was durable, every image is sound, and the job can be done again.

use super::*;
use chain::Mirror;
use disk::Disk;
use formats::qcow2::check::check;
use std::ops::Range;
use testkit::executor::Executor;
use testkit::seeds;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Job {
    Mirror,
    Infill,
    Commit,
    /// The top, which is written to, is merged into its parent.
    Merge,
}

/// One way to do a job. The disk is made of `images[i]` for each `i` of `place`; at the switch that changes at one stroke,
/// as a rename does.
struct Way {
    job: Job,
    /// Layers that vanish or are committed.
    gone: Range<usize>,
    /// The image that takes the place of all.
    target: usize,
    pass: CopyPass,
}

impl Way {
    /// Does it all; the switch is where the place changes.
    async fn go(&self, chain: &Rc<Chain>, target: &LayerInfo, place: &RefCell<Vec<usize>>, random: &mut fastrand::Rng) {
        let pace = Pace::new(random);
        let without = async |old: Rc<[LayerInfo]>| {
            let new: Vec<_> = [&old[..self.gone.start], &old[self.gone.end..]].concat();
            yield_now().await;
            place.borrow_mut().drain(self.gone.clone());
            Ok::<_, DiskError>(new)
        };
        match self.job {
            Job::Mirror => {
                let mirror = Mirror::new(DiskHandle::new(Chain::new(vec![target.clone()])), []);
                chain.attach_mirror(&mirror).await.expect("attach");
                chain.copy_to_mirror(&mirror, self.pass, &pace).await.expect("copy");
                mirror.flush().await.expect("flush");
                chain
                    .switch_to_mirror(&mirror, async |_| {
                        yield_now().await;
                        place.replace(vec![self.target]);
                        Ok::<_, DiskError>(vec![target.clone()])
                    })
                    .await
                    .expect("switch");
            }
            Job::Merge => {
                let size = chain.geometry().size;
                let parent = Rc::new(Chain::new(chain.layers()[1..].to_vec()));
                chain
                    .switch(async |old| {
                        if parent.geometry().size != size {
                            parent.resize(size).await?;
                        }
                        Ok::<_, DiskError>(old.to_vec())
                    })
                    .await
                    .expect("resize");
                let mirror = Mirror::into_parent(DiskHandle::from_rc(parent), 1);
                chain.attach_mirror(&mirror).await.expect("attach");
                let mirror = if random.bool() {
                    // Given up half-way, and begun anew after a while.
                    let stopping = Pace::new(random).stopping_after(random.u32(..10));
                    let _stopped = chain.copy_to_mirror(&mirror, self.pass, &stopping).await;
                    pause(random, 200).await;
                    assert!(chain.detach_mirror(&mirror).await);
                    pause(random, 500).await;
                    let again = Mirror::into_parent(mirror.target().clone(), 1);
                    chain.attach_mirror(&again).await.expect("attach");
                    again
                } else {
                    mirror
                };
                chain.copy_to_mirror(&mirror, self.pass, &pace).await.expect("copy");
                chain.switch_to_mirror(&mirror, without).await.expect("switch");
            }
            Job::Infill => {
                let infill = chain.begin_infill(self.gone.clone()).await.expect("begin");
                chain.infill(&infill, self.pass, &pace).await.expect("infill");
                chain.switch_after_infill(&infill, without).await.expect("switch");
            }
            Job::Commit => {
                let layers = chain.layers().to_vec();
                let parent = DiskHandle::new(Chain::new(layers[self.gone.end..].to_vec()));
                let size = layers[self.gone.start].handle.geometry().size;
                chain
                    .switch(async |old| {
                        if size > parent.geometry().size {
                            parent.resize(size).await?;
                        }
                        Ok::<_, DiskError>(old.to_vec())
                    })
                    .await
                    .expect("resize");
                self.pass.commit(&layers, self.gone.clone(), &parent, 0, &pace).await.expect("commit");
                parent.flush().await.expect("flush");
                chain
                    .switch(async |old| {
                        parent.flush().await?;
                        without(old).await
                    })
                    .await
                    .expect("switch");
            }
        }
    }
}

/// Opens the images that make up the disk.
async fn reopen(images: &[(Format, MemoryStorage)], place: &[usize]) -> Rc<Chain> {
    let mut layers = Vec::new();
    for &at in place {
        let (format, storage) = &images[at];
        layers.push(open_stored(*format, storage.handle(), &format!("image-{at}")).await);
    }
    Rc::new(Chain::new(layers))
}

/// Whether the switch had come before the power failed.
fn one_loss(seed: u64, job: Job) -> bool {
    let mut random = fastrand::Rng::with_seed(seed);
    let depth = random.usize(3..5);
    let (mut setup, target) = executor::run(seed, async {
        let setup = Setup::new(&mut random, depth, true).await;
        let size = setup.model.size();
        let target = match random.u8(..3) {
            0 => Made::raw(&mut random, "target".into(), size),
            _ => Made::qcow2(&mut random, "target".into(), size, None).await,
        };
        let info = target.open().await;
        for layer in setup.layers.iter().chain([&info]) {
            layer.handle.flush().await.expect("flush");
        }
        (setup, (target, info))
    });
    let (target, info) = target;
    setup.images.push(target);
    let start = if job == Job::Commit { random.usize(1..depth - 1) } else { random.usize(1..depth) };
    let most = if job == Job::Commit { depth - 1 } else { depth };
    let gone = if job == Job::Merge { 0..1 } else { start..random.usize(start + 1..=most) };
    let way = Way { job, gone, target: depth, pass: some_pass(&mut random) };
    let place = RefCell::new((0..depth).collect::<Vec<_>>());
    let chain = setup.chain();
    let disk = DiskHandle::from_rc(Rc::clone(&chain));
    let ended = Cell::new(false);
    let (mut theirs, model) = (random.fork(), setup.model.clone());
    let mut executor = Executor::new(seed);
    executor.spawn(async {
        let guests = Guests::start(&disk, &model, &mut theirs, 3, Habits::default());
        way.go(&chain, &info, &place, &mut theirs).await;
        ended.set(true);
        pause(&mut theirs, 300).await;
        guests.stop().await;
    });
    let steps = 1u64 << random.u32(6..15);
    executor.run_steps(random.u64(..steps));
    let left: Vec<(Format, MemoryStorage)> = setup
        .images
        .iter()
        .map(|image| {
            let Made::Stored(format, storage, _) = image else { unreachable!("all are stored") };
            (*format, storage.crash(random.u64(..)))
        })
        .collect();
    drop(executor);
    let switched = place.borrow().len() < depth;
    executor::run(seed, async {
        for (_, storage) in left.iter().filter(|(format, _)| *format == Format::Qcow2) {
            let report = check(&storage.handle(), None, &mut |_, _| {}).await.expect("check");
            if !report.dirty {
                assert_eq!((report.corruptions, report.check_errors), (0, 0), "{:#?}", report.findings);
            }
        }
        let present = place.borrow().clone();
        let chain = reopen(&left, &present).await;
        let disk = DiskHandle::from_rc(Rc::clone(&chain));
        let model = setup.model.check_after_crash(&disk).await.expect("read");
        if !switched {
            let (format, storage) = &left[way.target];
            let target = open_stored(*format, storage.handle(), "target").await;
            let guests = Guests::start(&disk, &model, &mut random, 2, Habits::default());
            way.go(&chain, &target, &place, &mut random).await;
            guests.stop().await;
        }
        disk.close().await.expect("close");
    });
    switched
}

fn losses(job: Job, count: u64) {
    let (mut before, mut after) = (0, 0);
    seeds::each(count, |seed| match one_loss(seed, job) {
        true => after += 1,
        false => before += 1,
    });
    eprintln!("{job:?}: the power failed {before} times before the switch and {after} times after it");
    assert!(before > count / 10 && after > count / 20 || std::env::var_os("HIGHWATER_SEED").is_some());
}

#[test]
fn loss_of_power_during_a_mirror() {
    losses(Job::Mirror, 300);
}

#[test]
fn loss_of_power_during_an_infill() {
    losses(Job::Infill, 300);
}

#[test]
fn loss_of_power_during_a_commit() {
    losses(Job::Commit, 300);
}

#[test]
fn loss_of_power_during_a_merge_of_the_top() {
    losses(Job::Merge, 300);
}
