//! Layers vanish into the one above them.

use super::*;
use disk::Disk;
use std::ops::Range;
use testkit::seeds;

fn some_vanishing(random: &mut fastrand::Rng, depth: usize) -> Range<usize> {
    let start = random.usize(1..depth);
    start..random.usize(start + 1..=depth)
}

fn without<T: Clone>(all: &[T], gone: &Range<usize>) -> Vec<T> {
    all.iter().enumerate().filter(|(at, _)| !gone.contains(at)).map(|(_, one)| one.clone()).collect()
}

/// Guests go on all the time, on the layer that takes up or above it. With and without the layers that vanish the chain
/// shows the same.
fn under_load(seed: u64, stored: bool) {
    executor::run(seed, async {
        let mut random = fastrand::Rng::with_seed(seed);
        let depth = random.usize(2..6);
        let setup = Setup::new(&mut random, depth, stored).await;
        let (chain, model) = (setup.chain(), setup.model.clone());
        let disk = DiskHandle::from_rc(Rc::clone(&chain));
        let habits = Habits {
            alignment: if stored { 512 } else { 1 },
            span: random.bool().then_some(64 << 10),
            ..Habits::default()
        };
        let guests = Guests::start(&disk, &model, &mut random, 5, habits);
        pause(&mut random, 200).await;
        let vanishing = some_vanishing(&mut random, depth);
        let mut infill = chain.begin_infill(vanishing.clone()).await.unwrap();
        assert_eq!((infill.child() + 1, infill.vanishing()), (vanishing.start, vanishing.clone()));
        for _ in 0..random.u32(..3) {
            // Stopped half-way, it goes on where it was, or is begun anew.
            let pace = Pace::new(&mut random).stopping_after(random.u32(..8));
            if let Err(error) = chain.infill(&infill, some_pass(&mut random), &pace).await {
                assert_eq!(error.kind(), STOPPED, "{error:?}");
            }
            if random.bool() {
                assert!(chain.end_infill(&infill).await);
                pause(&mut random, 200).await;
                infill = chain.begin_infill(vanishing.clone()).await.unwrap();
            }
        }
        let pace = Pace::new(&mut random);
        let moved = chain.infill(&infill, some_pass(&mut random), &pace).await.unwrap();
        assert_eq!((moved.read, moved), (moved.written, pace.told.get()));
        pause(&mut random, 1500).await;
        let refused = chain.switch(async |old| Ok::<_, DiskError>(old.to_vec())).await.unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::InUse, "{refused:?}");
        chain
            .switch_after_infill(&infill, async |old| {
                let new = without(&old, &vanishing);
                assert_equal(&shown(&new).await, &shown(&old).await, "without the layers that vanish");
                Ok::<_, DiskError>(new)
            })
            .await
            .unwrap();
        pause(&mut random, 500).await;
        guests.stop().await;
        assert_eq!(chain.layers().len(), depth - vanishing.len());
        let truth = bytes_of(&disk).await;
        disk.close().await.unwrap();
        if stored {
            judge(&without(&setup.images, &vanishing), &truth);
        }
    });
}

#[test]
fn memory_layers_vanish_under_load() {
    seeds::each(250, |seed| under_load(seed, false));
}

#[test]
fn qcow2_images_vanish_under_load() {
    seeds::each(60, |seed| under_load(seed, true));
}

/// The top grows and shrinks while it takes up what is below it; what a longer layer that stays has there does not show.
#[test]
fn the_size_changes_during_an_infill() {
    seeds::each(150, |seed| {
        executor::run(seed, async {
            let mut random = fastrand::Rng::with_seed(seed);
            let stored = seed % 3 == 0;
            let setup = Setup::new(&mut random, 3, stored).await;
            let (chain, model) = (setup.chain(), setup.model.clone());
            let disk = DiskHandle::from_rc(Rc::clone(&chain));
            let infill = chain.begin_infill(1..2).await.unwrap();
            let pass = some_pass(&mut random);
            for _ in 0..3 {
                let habits = Habits { alignment: if stored { 512 } else { 1 }, ..Habits::default() };
                let guests = Guests::start(&disk, &model, &mut random, 4, habits);
                let pace = Pace::new(&mut random).stopping_after(random.u32(..40));
                if let Err(error) = chain.infill(&infill, pass, &pace).await {
                    assert_eq!(error.kind(), STOPPED, "{error:?}");
                }
                guests.stop().await;
                let size = random.u64(60..1500) * 512;
                disk.resize(size).await.unwrap();
                model.set_size(size);
                assert!(infill.position() <= size);
            }
            let finish = async || {
                chain
                    .switch_after_infill(&infill, async |old| {
                        let new = vec![old[0].clone(), old[2].clone()];
                        assert_equal(&shown(&new).await, &shown(&old).await, "without the middle");
                        Ok::<_, DiskError>(new)
                    })
                    .await
            };
            if infill.position() < model.size() {
                let error = finish().await.unwrap_err();
                assert!(error.kind() == ErrorKind::Invalid && error.to_string().contains("not brought up"), "{error}");
                chain.infill(&infill, pass, &Pace::new(&mut random)).await.unwrap();
            }
            finish().await.unwrap();
            model.check_equal(&disk).await.unwrap();
        });
    });
}

/// What the child has is not copied, nor what nobody holds, nor a zero over nothing.
#[test]
fn only_what_is_missing_is_moved() {
    executor::run(1, async {
        let mut random = fastrand::Rng::with_seed(1);
        let size = 32 << 20;
        let options = MemoryLayerOptions { unit: 65536, ..Default::default() };
        let images = [(); 3].map(|()| Made::Memory(Rc::new(MemoryLayer::new(size, options))));
        let [top, mid, base] = &images;
        let mut layers = vec![base.open().await];
        let disk_of = |layers: &[LayerInfo]| DiskHandle::new(Chain::new(layers.to_vec()));
        let (mib, unmap) = (1 << 20, ZeroMode { unmap: true, fast_only: false });
        disk_of(&layers).write(0, Buf::copy_of(&[1; 8 << 20]), NONE).await.unwrap();
        layers.insert(0, mid.open().await);
        // Four of data, two of zero over data, two of zero over nothing.
        let filled = disk_of(&layers);
        filled.write(2 * mib, Buf::copy_of(&[2; 4 << 20]), NONE).await.unwrap();
        filled.write_zeroes(ByteRange::new(6 * mib, 4 * mib), unmap, NONE).await.unwrap();
        layers.insert(0, top.open().await);
        // One of the four is the child's own.
        disk_of(&layers).write(3 * mib, Buf::copy_of(&[3; 1 << 20]), NONE).await.unwrap();
        let chain = Chain::new(layers);
        let infill = chain.begin_infill(1..2).await.unwrap();
        let moved = chain.infill(&infill, CopyPass::default(), &Pace::new(&mut random)).await.unwrap();
        assert_eq!((moved.read, moved.written, moved.zeroed), (3 * mib, 3 * mib, 2 * mib));
        let again = chain.infill(&infill, CopyPass::default(), &Pace::new(&mut random)).await.unwrap();
        assert_eq!(again, CopyStats::default());
    });
}

#[test]
fn what_is_refused() {
    executor::run(1, async {
        let layer = |read_only| {
            let options = MemoryLayerOptions { read_only, ..Default::default() };
            let handle = Rc::new(MemoryLayer::new(1 << 20, options)).handle();
            LayerInfo { path: PathBuf::from("memory"), format: Format::Raw, handle }
        };
        let chain = Chain::new(vec![layer(false), layer(true), layer(true)]);
        for (vanishing, kind) in [
            (0..1, ErrorKind::Invalid),
            (1..1, ErrorKind::Invalid),
            (2..4, ErrorKind::Invalid),
            (2..3, ErrorKind::ReadOnly),
        ] {
            let error = chain.begin_infill(vanishing.clone()).await.map(drop).unwrap_err();
            assert_eq!(error.kind(), kind, "{vanishing:?}: {error}");
        }
        let infill = chain.begin_infill(1..3).await.unwrap();
        assert_eq!(chain.begin_infill(1..2).await.map(drop).unwrap_err().kind(), ErrorKind::InUse);
        let early = chain.switch_after_infill(&infill, async |old| Ok::<_, DiskError>(old.to_vec())).await;
        assert_eq!(early.unwrap_err().kind(), ErrorKind::Invalid);
        assert!(chain.end_infill(&infill).await && !chain.end_infill(&infill).await);
        let pace = Pace::default();
        let error = chain.infill(&infill, CopyPass::default(), &pace).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Closed);
        Disk::close(&chain).await.unwrap();
        assert_eq!(chain.begin_infill(1..2).await.map(drop).unwrap_err().kind(), ErrorKind::Closed);
    });
}
