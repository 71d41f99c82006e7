//! A disk with a history is a disk.

use crate::host::{TestHost, created};
use disk::DiskHandle;
use testkit::{CrashStorage, MemoryStorage, conformance, executor, seeds};

#[test]
fn the_suite() {
    seeds::each(3, |seed| {
        let make = |size| async move {
            let image = CrashStorage::new(size).yielding(seed);
            let sidecar = MemoryStorage::new(0).yielding(seed);
            DiskHandle::from_rc(created(image.handle(), sidecar.handle(), &TestHost::new(seed), 16 << 10).await)
        };
        executor::run(seed, conformance::disk(make, true));
    });
}
