//! The mirror and the pass that brings it up to date.

use super::*;
use chain::Mirror;
use disk::Disk;
use event_listener::Event;
use testkit::seeds;

/// A target of that size; with old bytes if it is `used`.
async fn target(random: &mut fastrand::Rng, size: u64, stored: bool) -> (Made, LayerInfo, DiskHandle) {
    let made = match (stored, random.u8(..3)) {
        (false, _) => Made::memory(random, size),
        (true, 0) => Made::raw(random, "target".into(), size),
        (true, _) => Made::qcow2(random, "target".into(), size, None).await,
    };
    let info = made.open().await;
    let disk = DiskHandle::new(Chain::new(vec![info.clone()]));
    if random.bool() {
        for _ in 0..4 {
            let range = some_range(random, size, Habits { longest: 200 << 10, ..Habits::default() });
            disk.write(range.offset(), Buf::copy_of(&vec![0xee; range.len() as usize]), NONE).await.expect("write");
        }
    }
    (made, info, disk)
}

fn habits(random: &mut fastrand::Rng, stored: bool) -> Habits {
    Habits {
        alignment: if stored { 512 } else { 1 },
        // Half of them meet each other all the time.
        span: random.bool().then_some(32 << 10),
        ..Habits::default()
    }
}

/// Guests write, zero and discard all through attach, copy and switch. At the switch both disks are equal to the last byte,
/// and afterwards the target is the disk.
fn equal_at_the_switch(seed: u64, stored: bool) {
    executor::run(seed, async {
        let mut random = fastrand::Rng::with_seed(seed);
        let depth = random.usize(1..4);
        let setup = Setup::new(&mut random, depth, stored).await;
        let (chain, model) = (setup.chain(), setup.model.clone());
        let disk = DiskHandle::from_rc(Rc::clone(&chain));
        let (made, info, target) = target(&mut random, model.size(), stored).await;
        let habits = habits(&mut random, stored);
        let guests = Guests::start(&disk, &model, &mut random, 6, habits);
        pause(&mut random, 300).await;
        let mirror = Mirror::new(target, []);
        chain.attach_mirror(&mirror).await.unwrap();
        // What was under way at the attaching may still be.
        if random.bool() {
            pause(&mut random, 300).await;
        }
        let pace = Pace::new(&mut random);
        if random.bool() {
            // Stopped half-way, it goes on where it was; meanwhile an overlay is put on the source.
            let pace = Pace::new(&mut random).stopping_after(random.u32(..10));
            let stopped = chain.copy_to_mirror(&mirror, some_pass(&mut random), &pace);
            if let Err(error) = stopped.await {
                assert_eq!(error.kind(), STOPPED, "{error:?}");
            }
            let overlay = Made::memory(&mut random, model.size()).open().await;
            chain
                .switch(async |old| Ok::<_, DiskError>([overlay].into_iter().chain(old.iter().cloned()).collect()))
                .await
                .unwrap();
        }
        let moved = chain.copy_to_mirror(&mirror, some_pass(&mut random), &pace).await.unwrap();
        assert_eq!(moved, pace.told.get());
        pause(&mut random, 2000).await;
        assert_eq!(mirror.position(), model.size(), "it stays equal");
        chain
            .switch_to_mirror(&mirror, async |old| {
                let (source, copy) = (shown(&old).await, shown(std::slice::from_ref(&info)).await);
                assert_equal(&copy, &source, "target");
                Ok::<_, DiskError>(vec![info.clone()])
            })
            .await
            .unwrap();
        pause(&mut random, 1000).await;
        guests.stop().await;
        assert_eq!(chain.layers().len(), 1);
        let truth = bytes_of(&disk).await;
        assert!(!chain.detach_mirror(&mirror).await, "it is over");
        disk.close().await.unwrap();
        if stored && matches!(made, Made::Stored(Format::Qcow2, ..)) {
            judge(&[made], &truth);
        }
    });
}

#[test]
fn memory_layers_are_equal_at_the_switch() {
    seeds::each(150, |seed| equal_at_the_switch(seed, false));
}

#[test]
fn qcow2_and_raw_are_equal_at_the_switch() {
    seeds::each(40, |seed| equal_at_the_switch(seed, true));
}

/// The target fails at any request: no guest's request does, the job gets to know why, and another target does as well as
/// if nothing had been.
#[test]
fn a_target_that_fails_harms_nobody() {
    let mut met = 0;
    seeds::each(150, |seed| {
        executor::run(seed, async {
            let mut random = fastrand::Rng::with_seed(seed);
            let setup = Setup::new(&mut random, 2, false).await;
            let (chain, model) = (setup.chain(), setup.model.clone());
            let disk = DiskHandle::from_rc(Rc::clone(&chain));
            let (made, _, first) = target(&mut random, model.size(), false).await;
            let habits = habits(&mut random, false);
            let guests = Guests::start(&disk, &model, &mut random, 5, habits);
            let mirror = Mirror::new(first, []);
            chain.attach_mirror(&mirror).await.unwrap();
            let kind = if random.bool() { ErrorKind::Io } else { ErrorKind::NoSpace };
            let operation = [Some(Operation::Write), Some(Operation::Flush), None][random.usize(..3)];
            made.storage().fail_once(operation, random.u64(..60), kind);
            let pass = some_pass(&mut random);
            let copied = chain.copy_to_mirror(&mirror, pass, &Pace::new(&mut random)).await;
            pause(&mut random, 500).await;
            let ended = match copied {
                Err(error) => Err(error),
                Ok(_) => {
                    let kept = chain.layers().to_vec();
                    chain.switch_to_mirror(&mirror, async |_| Ok::<_, DiskError>(kept)).await
                }
            };
            if let Err(error) = &ended {
                assert_eq!(error.kind(), kind, "{error:?}");
                assert!(mirror.has_failed());
                met += 1;
                pause(&mut random, 500).await;
            } else {
                assert!(!mirror.has_failed());
            }
            made.storage().heal();
            let (_, info, second) = target(&mut random, model.size(), false).await;
            let mirror = Mirror::new(second, []);
            chain.attach_mirror(&mirror).await.expect("the place is free again");
            chain.copy_to_mirror(&mirror, pass, &Pace::new(&mut random)).await.unwrap();
            chain.switch_to_mirror(&mirror, async |_| Ok::<_, DiskError>(vec![info])).await.unwrap();
            guests.stop().await;
        });
    });
    assert!(met > 50 || std::env::var_os("HIGHWATER_SEED").is_some(), "only {met} failures were met");
}

/// Guests' requests fail on the source half-way, at any place: what is left there is what the target gets.
#[test]
fn a_source_that_fails_stays_equal() {
    seeds::each(150, |seed| {
        executor::run(seed, async {
            let mut random = fastrand::Rng::with_seed(seed);
            let setup = Setup::new(&mut random, 2, false).await;
            let (chain, model) = (setup.chain(), setup.model.clone());
            let disk = DiskHandle::from_rc(Rc::clone(&chain));
            let (_, info, copy) = target(&mut random, model.size(), false).await;
            let habits = Habits { tolerant: true, ..habits(&mut random, false) };
            let guests = Guests::start(&disk, &model, &mut random, 5, habits);
            let mirror = Mirror::new(copy, []);
            chain.attach_mirror(&mirror).await.unwrap();
            let pass = some_pass(&mut random);
            for _ in 0..20 {
                let image = &setup.images[random.usize(..2)];
                let operation = [Operation::Write, Operation::Read, Operation::WriteZeroes][random.usize(..3)];
                let kind = if random.bool() { ErrorKind::NoSpace } else { ErrorKind::Io };
                image.storage().fail_once(Some(operation), random.u64(..20), kind);
                if let Err(error) = chain.copy_to_mirror(&mirror, pass, &Pace::new(&mut random)).await {
                    assert_eq!(error.kind(), kind, "{error:?}");
                }
                pause(&mut random, 300).await;
            }
            setup.images.iter().for_each(|image| image.storage().heal());
            loop {
                chain.copy_to_mirror(&mirror, pass, &Pace::new(&mut random)).await.unwrap();
                let switched = chain.switch_to_mirror(&mirror, async |old| {
                    let (source, copy) = (shown(&old).await, shown(std::slice::from_ref(&info)).await);
                    assert_equal(&copy, &source, "target");
                    Ok::<_, DiskError>(vec![info.clone()])
                });
                match switched.await {
                    Ok(()) => break,
                    // Something has to be copied again.
                    Err(error) => assert_eq!(error.kind(), ErrorKind::Invalid, "{error:?}"),
                }
            }
            guests.stop().await;
        });
    });
}

/// The size changes while a mirror is attached: the target's goes with it, what is added is zero on both.
#[test]
fn the_size_changes_with_a_mirror() {
    seeds::each(100, |seed| {
        executor::run(seed, async {
            let mut random = fastrand::Rng::with_seed(seed);
            let stored = seed % 3 == 0;
            let setup = Setup::new(&mut random, 3, stored).await;
            let (chain, model) = (setup.chain(), setup.model.clone());
            let disk = DiskHandle::from_rc(Rc::clone(&chain));
            let (_, info, copy) = target(&mut random, model.size(), stored).await;
            let mirror = Mirror::new(copy, []);
            chain.attach_mirror(&mirror).await.unwrap();
            let pass = some_pass(&mut random);
            for _ in 0..4 {
                let habits = habits(&mut random, stored);
                let guests = Guests::start(&disk, &model, &mut random, 4, habits);
                let calls = random.u32(..40);
                let pace = Pace::new(&mut random).stopping_after(calls);
                if let Err(error) = chain.copy_to_mirror(&mirror, pass, &pace).await {
                    assert_eq!(error.kind(), STOPPED, "{error:?}");
                }
                guests.stop().await;
                let size = random.u64(60..1500) * 512;
                disk.resize(size).await.unwrap();
                model.set_size(size);
                assert_eq!(mirror.target().geometry().size, size);
                assert!(mirror.position() <= size);
            }
            let early = chain.switch_to_mirror(&mirror, async |_| Ok::<_, DiskError>(vec![info.clone()])).await;
            if mirror.position() < model.size() {
                let error = early.unwrap_err();
                assert!(error.kind() == ErrorKind::Invalid && error.to_string().contains("copy the rest"), "{error}");
                chain.copy_to_mirror(&mirror, pass, &Pace::new(&mut random)).await.unwrap();
                chain.switch_to_mirror(&mirror, async |_| Ok::<_, DiskError>(vec![info.clone()])).await.unwrap();
            }
            model.check_equal(&disk).await.unwrap();
        });
    });
}

/// Waits at a gate before each piece.
#[derive(Default)]
struct Gate {
    open: Cell<bool>,
    opened: Event,
    waiting: Cell<bool>,
}

impl Control for Gate {
    type Error = DiskError;

    async fn pace(&self, _bytes: u64) -> disk::Result<()> {
        while !self.open.get() {
            self.waiting.set(true);
            self.opened.listen().await;
        }
        Ok(())
    }

    fn progress(&self, _position: u64, _done: CopyStats) {}
}

/// A job that is paused holds nothing: guests write everywhere, the size changes, layers are switched.
#[test]
fn a_paused_job_holds_nothing() {
    seeds::each(20, |seed| {
        executor::run(seed, async {
            let mut random = fastrand::Rng::with_seed(seed);
            let setup = Setup::new(&mut random, 2, false).await;
            let (chain, model) = (setup.chain(), setup.model.clone());
            let disk = DiskHandle::from_rc(Rc::clone(&chain));
            let (_, info, copy) = target(&mut random, model.size(), false).await;
            let mirror = Mirror::new(copy, []);
            chain.attach_mirror(&mirror).await.unwrap();
            let gate: Rc<Gate> = Rc::default();
            gate.open.set(random.bool());
            let job = {
                let (chain, mirror, gate) = (Rc::clone(&chain), Rc::clone(&mirror), Rc::clone(&gate));
                let pass = CopyPass { chunk: 4096, at_once: 3 };
                executor::spawn(async move { chain.copy_to_mirror(&mirror, pass, &gate).await })
            };
            pause(&mut random, 40).await;
            gate.open.set(false);
            for _ in 0..300 {
                yield_now().await;
            }
            assert!(gate.waiting.get() || mirror.position() == model.size());
            let size = model.size();
            model.write(&disk, 0, Buf::copy_of(&vec![3; size as usize]), NONE).await.unwrap();
            disk.resize(size + 4096).await.unwrap();
            model.set_size(size + 4096);
            chain.switch(async |old| Ok::<_, DiskError>(old.to_vec())).await.unwrap();
            gate.open.set(true);
            gate.opened.notify(usize::MAX);
            job.await.unwrap();
            if mirror.position() < size + 4096 {
                // It had come to its end before.
                chain.copy_to_mirror(&mirror, CopyPass::default(), &gate).await.unwrap();
            }
            chain.switch_to_mirror(&mirror, async |_| Ok::<_, DiskError>(vec![info])).await.unwrap();
            model.check_equal(&disk).await.unwrap();
        });
    });
}

/// As many bytes are moved as there are data, whatever the guest writes meanwhile to what is copied.
#[test]
fn every_byte_is_moved_once() {
    executor::run(1, async {
        let mut random = fastrand::Rng::with_seed(1);
        let size = 64 << 20;
        let options = MemoryLayerOptions { unit: 65536, ..Default::default() };
        let [source, copy] = [(); 2].map(|()| Made::Memory(Rc::new(MemoryLayer::new(size, options))));
        let chain = Rc::new(Chain::new(vec![source.open().await]));
        let disk = DiskHandle::from_rc(Rc::clone(&chain));
        for at in [0, 3, 9, 30] {
            disk.write(at << 20, Buf::copy_of(&[7; 1 << 20]), NONE).await.unwrap();
        }
        let mirror = Mirror::new(DiskHandle::new(Chain::new(vec![copy.open().await])), []);
        chain.attach_mirror(&mirror).await.unwrap();
        let pace = Pace::new(&mut random);
        let moved = chain.copy_to_mirror(&mirror, CopyPass::default(), &pace).await.unwrap();
        let data = 4 << 20;
        assert_eq!(moved, CopyStats { read: data, written: data, zeroed: 0, skipped: size - data });
        assert_eq!((pace.paced.get(), pace.position.get()), (data, size));
        assert!(pace.calls.get() < 40, "long zeroes are passed over in one go: {} calls", pace.calls.get());
        disk.write(5 << 20, Buf::copy_of(&[8; 4096]), NONE).await.unwrap();
        assert_eq!(mirror.mirrored(), 4096);
        let again = chain.copy_to_mirror(&mirror, CopyPass::default(), &pace).await.unwrap();
        assert_eq!(again, CopyStats::default(), "nothing is left to do");
    });
}

/// Zeroing that must be fast is refused by a raw image on a storage that writes zeroes: that moves no bytes, however often it
/// is tried, and both disks stay equal.
#[test]
fn refused_zeroing_moves_nothing() {
    executor::run(1, async {
        let mut random = fastrand::Rng::with_seed(1);
        let size = 8 << 20;
        let storage = MemoryStorage::new(size).aligned(4096);
        storage.set_fast_zeroes(false);
        let source = Made::Stored(Format::Raw, CrashStorage::of(storage), "source".into());
        let chain = Rc::new(Chain::new(vec![source.open().await]));
        let disk = DiskHandle::from_rc(Rc::clone(&chain));
        disk.write(0, Buf::copy_of(&vec![9; size as usize]), NONE).await.unwrap();
        let copy = Made::memory(&mut random, size).open().await;
        let mirror = Mirror::new(DiskHandle::new(Chain::new(vec![copy.clone()])), []);
        chain.attach_mirror(&mirror).await.unwrap();
        chain.copy_to_mirror(&mirror, CopyPass::default(), &Pace::new(&mut random)).await.unwrap();
        let mode = ZeroMode { unmap: true, fast_only: true };
        for _ in 0..10 {
            // Both ends are within a block, which is zeroed before the rest is refused.
            let refused = disk.write_zeroes(ByteRange::new(1000, size - 2000), mode, NONE).await;
            assert_eq!(refused.unwrap_err().kind(), ErrorKind::NotFast);
        }
        assert_eq!(mirror.position(), size);
        assert!(mirror.mirrored() < 100 << 10, "{} bytes", mirror.mirrored());
        assert_equal(&shown(&[copy]).await, &bytes_of(&disk).await, "target");
    });
}

/// A write that began before the mirror was attached is on the target as well.
#[test]
fn a_write_under_way_at_the_attaching() {
    seeds::each(200, |seed| {
        executor::run(seed, async {
            let mut random = fastrand::Rng::with_seed(seed);
            let size = 64 << 10;
            // Takes long, as it is planned unit by unit.
            let options = MemoryLayerOptions { unit: 512, erratic: Some(seed), ..Default::default() };
            let source = Made::Memory(Rc::new(MemoryLayer::new(size, options)));
            let chain = Rc::new(Chain::new(vec![source.open().await]));
            let disk = DiskHandle::from_rc(Rc::clone(&chain));
            let options = MemoryLayerOptions::default();
            let copy = Made::Memory(Rc::new(MemoryLayer::new(size, options))).open().await;
            let mirror = Mirror::new(DiskHandle::new(Chain::new(vec![copy.clone()])), []);
            let writes: Vec<_> = (0..4)
                .map(|at| {
                    let disk = disk.clone();
                    executor::spawn(async move { disk.write(at << 14, Buf::copy_of(&[7; 16 << 10]), NONE).await })
                })
                .collect();
            pause(&mut random, 100).await;
            chain.attach_mirror(&mirror).await.unwrap();
            chain.copy_to_mirror(&mirror, some_pass(&mut random), &Pace::new(&mut random)).await.unwrap();
            for write in writes {
                write.await.unwrap();
            }
            assert_equal(&shown(&[copy]).await, &bytes_of(&disk).await, "target");
        });
    });
}

/// A discard that is none leaves more than a guest's request can wait for: the copier comes back to it.
#[test]
fn what_takes_long_is_copied_again() {
    executor::run(1, async {
        let mut random = fastrand::Rng::with_seed(1);
        let size = 8 << 20;
        // Such a layer cannot hide its parent, and leaves everything as it is.
        let options = MemoryLayerOptions { zero_over_parent: false, ..Default::default() };
        let [top, base, copy] = [(); 3].map(|()| Made::Memory(Rc::new(MemoryLayer::new(size, options))));
        let base = base.open().await;
        let bytes = vec![9; size as usize];
        DiskHandle::new(Chain::new(vec![base.clone()])).write(0, Buf::copy_of(&bytes), NONE).await.unwrap();
        let chain = Rc::new(Chain::new(vec![top.open().await, base]));
        let disk = DiskHandle::from_rc(Rc::clone(&chain));
        let info = copy.open().await;
        let mirror = Mirror::new(DiskHandle::new(Chain::new(vec![info.clone()])), []);
        chain.attach_mirror(&mirror).await.unwrap();
        let pace = Pace::new(&mut random);
        chain.copy_to_mirror(&mirror, CopyPass::default(), &pace).await.unwrap();
        disk.discard(ByteRange::new(0, 64 << 10), NONE).await.unwrap();
        assert_eq!((mirror.position(), mirror.mirrored()), (size, 64 << 10), "a short one is settled at once");
        disk.discard(ByteRange::new(0, size), NONE).await.unwrap();
        assert_eq!(mirror.position(), 0);
        let moved = chain.copy_to_mirror(&mirror, CopyPass::default(), &pace).await.unwrap();
        assert_eq!((moved.written, mirror.position()), (size, size));
        chain.switch_to_mirror(&mirror, async |_| Ok::<_, DiskError>(vec![info])).await.unwrap();
        assert_equal(&bytes_of(&disk).await, &bytes, "the target");
    });
}

/// A job that goes on after a restart copies only what is not known to be equal.
#[test]
fn a_resumed_job_copies_the_rest() {
    executor::run(1, async {
        let mut random = fastrand::Rng::with_seed(1);
        let setup = Setup::new(&mut random, 1, false).await;
        let (chain, model) = (setup.chain(), setup.model.clone());
        let disk = DiskHandle::from_rc(Rc::clone(&chain));
        let size = model.size();
        model.write(&disk, 0, Buf::copy_of(&vec![5; size as usize]), NONE).await.unwrap();
        let (_, info, copy) = target(&mut random, size, false).await;
        copy.write(0, Buf::copy_of(&vec![5; size as usize]), NONE).await.unwrap();
        model.write(&disk, 8192, Buf::copy_of(&[6; 4096]), NONE).await.unwrap();
        let equal = [ByteRange::new(0, 8192), ByteRange::between(12288, size - 1024)];
        let mirror = Mirror::new(copy, equal);
        assert_eq!(mirror.position(), 8192);
        chain.attach_mirror(&mirror).await.unwrap();
        let pass = CopyPass { chunk: 4096, at_once: 2 };
        let moved = chain.copy_to_mirror(&mirror, pass, &Pace::new(&mut random)).await.unwrap();
        assert_eq!((moved.written, mirror.flush().await.unwrap()), (4096 + 1024, size));
        chain.switch_to_mirror(&mirror, async |_| Ok::<_, DiskError>(vec![info])).await.unwrap();
        model.check_equal(&disk).await.unwrap();
    });
}

#[test]
fn what_is_refused() {
    executor::run(1, async {
        let mut random = fastrand::Rng::with_seed(1);
        let setup = Setup::new(&mut random, 2, false).await;
        let chain = setup.chain();
        let size = Disk::geometry(&*chain).size;
        let disk_of = async |made: Made| DiskHandle::new(Chain::new(vec![made.open().await]));
        let other_size = disk_of(Made::memory(&mut random, size + 512)).await;
        let error = chain.attach_mirror(&Mirror::new(other_size, [])).await.unwrap_err();
        assert!(error.kind() == ErrorKind::Invalid && error.to_string().contains("make them equal"), "{error}");
        let [first, second] = [
            Mirror::new(disk_of(Made::memory(&mut random, size)).await, []),
            Mirror::new(disk_of(Made::memory(&mut random, size)).await, []),
        ];
        let pace = Pace::new(&mut random);
        let error = chain.copy_to_mirror(&first, CopyPass::default(), &pace).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Closed, "not attached: {error}");
        chain.attach_mirror(&first).await.unwrap();
        assert_eq!(chain.attach_mirror(&second).await.unwrap_err().kind(), ErrorKind::InUse);
        assert_eq!(chain.begin_infill(1..2).await.map(drop).unwrap_err().kind(), ErrorKind::InUse);
        let error = chain.switch_to_mirror(&second, async |old| Ok::<_, DiskError>(old.to_vec())).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Closed, "{error}");
        let failed =
            chain.switch_to_mirror(&first, async |_| Err(DiskError::new(ErrorKind::Io, Operation::Create))).await;
        assert_eq!(failed.unwrap_err().kind(), ErrorKind::Invalid, "nothing is copied yet");
        chain.copy_to_mirror(&first, CopyPass::default(), &pace).await.unwrap();
        let failed =
            chain.switch_to_mirror(&first, async |_| Err(DiskError::new(ErrorKind::Io, Operation::Create))).await;
        assert_eq!(failed.unwrap_err().kind(), ErrorKind::Io);
        Disk::write(&*chain, 0, Buf::copy_of(&[1; 512]), NONE).await.unwrap();
        assert_eq!(first.mirrored(), 512, "it goes on after a switch that failed");
        assert!(chain.detach_mirror(&first).await && !chain.detach_mirror(&first).await);
        let error = chain.attach_mirror(&first).await.unwrap_err();
        assert!(error.to_string().contains("attached once"), "{error}");
        chain.attach_mirror(&second).await.unwrap();
        Disk::close(&*chain).await.unwrap();
        let error = chain.copy_to_mirror(&second, CopyPass::default(), &pace).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Closed);
    });
}
