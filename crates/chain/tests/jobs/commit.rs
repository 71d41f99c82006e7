//! Layers are committed into the one below them.

use super::*;
use chain::Mirror;
use std::ops::Range;
use testkit::seeds;

/// The places of the layers that are committed into the one behind them.
fn some_held(random: &mut fastrand::Rng, depth: usize, from: usize) -> Range<usize> {
    let parent = random.usize(from + 1..depth);
    random.usize(from..parent)..parent
}

fn parent_of(layers: &[LayerInfo], held: &Range<usize>) -> DiskHandle {
    DiskHandle::new(Chain::new(layers[held.end..].to_vec()))
}

/// Guests go on on the top while layers below it are committed into their parent, which may be shorter or longer.
fn under_load(seed: u64, stored: bool) {
    executor::run(seed, async {
        let mut random = fastrand::Rng::with_seed(seed);
        let depth = random.usize(3..6);
        let setup = Setup::new(&mut random, depth, stored).await;
        let (chain, model) = (setup.chain(), setup.model.clone());
        let disk = DiskHandle::from_rc(Rc::clone(&chain));
        let habits = Habits { alignment: if stored { 512 } else { 1 }, ..Habits::default() };
        let guests = Guests::start(&disk, &model, &mut random, 5, habits);
        pause(&mut random, 200).await;
        let held = some_held(&mut random, depth, 1);
        let layers = chain.layers().to_vec();
        let parent = parent_of(&layers, &held);
        let size = layers[held.start].handle.geometry().size;
        if size > parent.geometry().size {
            let error = some_pass(&mut random).commit(&layers, held.clone(), &parent, 0, &Pace::default()).await;
            let error = error.unwrap_err();
            assert!(error.kind() == ErrorKind::Invalid && error.to_string().contains("resize the parent"), "{error}");
            // With nobody reading: for a moment a longer layer below shows through.
            chain
                .switch(async |old| {
                    parent.resize(size).await?;
                    Ok::<_, DiskError>(old.to_vec())
                })
                .await
                .unwrap();
        }
        let mut from = 0;
        for _ in 0..random.u32(..3) {
            let pace = Pace::new(&mut random).stopping_after(random.u32(..8));
            let stopped = some_pass(&mut random).commit(&layers, held.clone(), &parent, from, &pace).await;
            if let Err(error) = stopped {
                assert_eq!(error.kind(), STOPPED, "{error:?}");
            }
            assert!(pace.position.get() == 0 || pace.position.get() >= from);
            from = from.max(pace.position.get());
        }
        let pace = Pace::new(&mut random);
        let moved = some_pass(&mut random).commit(&layers, held.clone(), &parent, from, &pace).await.unwrap();
        assert_eq!(moved.read, moved.written);
        assert!(pace.paced.get() == moved.written, "{} were announced, {} moved", pace.paced.get(), moved.written);
        chain
            .switch(async |old| {
                parent.flush().await?;
                let new: Vec<_> = [&old[..held.start], &old[held.end..]].concat();
                assert_equal(&shown(&new).await, &shown(&old).await, "without what was committed");
                Ok::<_, DiskError>(new)
            })
            .await
            .unwrap();
        pause(&mut random, 500).await;
        guests.stop().await;
        let truth = bytes_of(&disk).await;
        disk.close().await.unwrap();
        if stored {
            judge(&[&setup.images[..held.start], &setup.images[held.end..]].concat(), &truth);
        }
    });
}

#[test]
fn memory_layers_are_committed_under_load() {
    seeds::each(250, |seed| under_load(seed, false));
}

#[test]
fn qcow2_images_are_committed_under_load() {
    seeds::each(60, |seed| under_load(seed, true));
}

/// The guest writes to the very layer that goes down into its parent.
fn the_top_under_load(seed: u64, stored: bool) {
    executor::run(seed, async {
        let mut random = fastrand::Rng::with_seed(seed);
        let depth = random.usize(2..5);
        let setup = Setup::new(&mut random, depth, stored).await;
        let (chain, model) = (setup.chain(), setup.model.clone());
        let disk = DiskHandle::from_rc(Rc::clone(&chain));
        let held = 0..random.usize(1..depth);
        let parent = parent_of(&setup.layers, &held);
        if parent.geometry().size != model.size() {
            parent.resize(model.size()).await.unwrap();
        }
        let habits = Habits {
            alignment: if stored { 512 } else { 1 },
            span: random.bool().then_some(32 << 10),
            ..Habits::default()
        };
        let guests = Guests::start(&disk, &model, &mut random, 5, habits);
        pause(&mut random, 300).await;
        let mirror = Mirror::into_parent(parent.clone(), held.len());
        chain.attach_mirror(&mirror).await.unwrap();
        let pace = Pace::new(&mut random).stopping_after(random.u32(..8));
        if let Err(error) = chain.copy_to_mirror(&mirror, some_pass(&mut random), &pace).await {
            assert_eq!(error.kind(), STOPPED, "{error:?}");
        }
        let pace = Pace::new(&mut random);
        let moved = chain.copy_to_mirror(&mirror, some_pass(&mut random), &pace).await.unwrap();
        assert_eq!(moved.read, moved.written);
        chain
            .switch_to_mirror(&mirror, async |old| {
                let new = old[held.end..].to_vec();
                assert_equal(&shown(&new).await, &shown(&old).await, "without the layers that went down");
                Ok::<_, DiskError>(new)
            })
            .await
            .unwrap();
        pause(&mut random, 500).await;
        guests.stop().await;
        let truth = bytes_of(&disk).await;
        disk.close().await.unwrap();
        if stored {
            judge(&setup.images[held.end..], &truth);
        }
    });
}

#[test]
fn memory_tops_are_merged_under_load() {
    seeds::each(150, |seed| the_top_under_load(seed, false));
}

#[test]
fn qcow2_tops_are_merged_under_load() {
    seeds::each(40, |seed| the_top_under_load(seed, true));
}

/// What the top does not hold is not moved: as many bytes as it holds, whatever is below.
#[test]
fn a_merge_of_the_top_moves_what_it_holds() {
    executor::run(1, async {
        let mut random = fastrand::Rng::with_seed(1);
        let options = MemoryLayerOptions { unit: 65536, ..Default::default() };
        let images = [(); 2].map(|()| Made::Memory(Rc::new(MemoryLayer::new(32 << 20, options))));
        let below = vec![images[1].open().await];
        let parent = DiskHandle::new(Chain::new(below.clone()));
        parent.write(0, Buf::copy_of(&vec![1; 16 << 20]), NONE).await.unwrap();
        let chain = Rc::new(Chain::new(vec![images[0].open().await, below[0].clone()]));
        let disk = DiskHandle::from_rc(Rc::clone(&chain));
        disk.write(2 << 20, Buf::copy_of(&vec![2; 3 << 20]), NONE).await.unwrap();
        let mirror = Mirror::into_parent(parent, 1);
        chain.attach_mirror(&mirror).await.unwrap();
        let moved = chain.copy_to_mirror(&mirror, CopyPass::default(), &Pace::new(&mut random)).await.unwrap();
        assert_eq!((moved.written, moved.zeroed, moved.skipped), (3 << 20, 0, 29 << 20));
    });
}

/// Without a guest the top itself is committed: the parent's disk then shows what the whole chain showed.
#[test]
fn the_top_is_committed() {
    seeds::each(100, |seed| {
        executor::run(seed, async {
            let mut random = fastrand::Rng::with_seed(seed);
            let setup = Setup::new(&mut random, 3, seed % 2 == 0).await;
            let held = some_held(&mut random, 3, 0);
            let held = 0..held.end;
            let parent = parent_of(&setup.layers, &held);
            if parent.geometry().size != setup.model.size() {
                parent.resize(setup.model.size()).await.unwrap();
            }
            let pass = some_pass(&mut random);
            pass.commit(&setup.layers, held, &parent, 0, &Pace::new(&mut random)).await.unwrap();
            setup.model.check_equal(&parent).await.unwrap();
        });
    });
}

/// As many bytes are moved as the delta holds; a zero over zeroes is none.
#[test]
fn as_many_bytes_as_the_delta_has() {
    executor::run(1, async {
        let mut random = fastrand::Rng::with_seed(1);
        let size = 32 << 20;
        let options = MemoryLayerOptions { unit: 65536, ..Default::default() };
        let images = [(); 2].map(|()| Made::Memory(Rc::new(MemoryLayer::new(size, options))));
        let (mib, unmap) = (1u64 << 20, ZeroMode { unmap: true, fast_only: false });
        let mut layers = vec![images[1].open().await];
        let parent = DiskHandle::new(Chain::new(layers.clone()));
        parent.write(0, Buf::copy_of(&vec![1; 16 << 20]), NONE).await.unwrap();
        layers.insert(0, images[0].open().await);
        let delta = DiskHandle::new(Chain::new(layers.clone()));
        delta.write(2 * mib, Buf::copy_of(&vec![2; 3 << 20]), NONE).await.unwrap();
        delta.write(20 * mib, Buf::copy_of(&[3; 4096]), NONE).await.unwrap();
        delta.write_zeroes(ByteRange::new(15 * mib, 2 * mib), unmap, NONE).await.unwrap();
        let pace = Pace::new(&mut random);
        let moved = CopyPass::default().commit(&layers, 0..1, &parent, 0, &pace).await.unwrap();
        assert_eq!((moved.read, moved.written, moved.zeroed), (3 * mib + 65536, 3 * mib + 65536, mib));
        assert_eq!((pace.paced.get(), pace.position.get()), (moved.written, size));
        assert!(pace.calls.get() < 40, "{} calls", pace.calls.get());
    });
}
