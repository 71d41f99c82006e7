//! The kit passes its own suites.

use std::rc::Rc;
use testkit::conformance::{self, LayerCaps};
use testkit::{CrashStorage, MemoryLayer, MemoryLayerOptions, MemoryStorage, executor, seeds};

#[test]
fn memory_storage() {
    for alignment in [1, 512, 4096] {
        seeds::each(2, |seed| {
            executor::run(
                seed,
                conformance::storage(|size| async move {
                    MemoryStorage::new(size).aligned(alignment).yielding(seed).handle()
                }),
            );
        });
    }
}

#[test]
fn crash_storage() {
    seeds::each(2, |seed| {
        executor::run(
            seed,
            conformance::storage(|size| async move { CrashStorage::new(size).yielding(seed).handle() }),
        );
    });
}

#[test]
fn memory_layer() {
    let caps = LayerCaps { parent: true, resizes: true, encode: Some(MemoryLayer::encode) };
    for unit in [512, 4096, 65_536] {
        for zero_over_parent in [true, false] {
            seeds::each(2, |seed| {
                let erratic = (seed > 0).then_some(seed);
                let options = MemoryLayerOptions { unit, zero_over_parent, erratic, ..Default::default() };
                executor::run(
                    seed,
                    conformance::layer(|size| async move { Rc::new(MemoryLayer::new(size, options)).handle() }, caps),
                );
            });
        }
    }
}
