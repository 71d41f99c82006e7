//! What a request on the hot path takes from the allocator.
#![allow(unsafe_code)] // A counting allocator; argued at the block.

use chain::{Chain, LayerInfo};
use disk::{Buf, DiskHandle, LayerHandle, WriteFlags};
use formats::Format;
use formats::raw::{OpenOptions, RawLayer};
use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::path::PathBuf;
use std::rc::Rc;
use testkit::{MemoryLayer, MemoryLayerOptions, MemoryStorage, executor};

thread_local! {
    static TAKEN: Cell<u64> = const { Cell::new(0) };
}

struct Counting;

// SAFETY: hands every call on to the system's allocator with the same arguments.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let _ = TAKEN.try_with(|taken| taken.set(taken.get() + 1));
        // SAFETY: the caller keeps `alloc`'s rules.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: the caller keeps `dealloc`'s rules, and `at` came from the system's allocator.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Two, one for each handle that the request passes: the disk's and the storage's boxed future.
const PER_REQUEST: u64 = 2;

async fn taken<T>(request: impl Future<Output = T>) -> (T, u64) {
    let before = TAKEN.get();
    let result = request.await;
    (result, TAKEN.get() - before)
}

fn layer(depth: usize, handle: LayerHandle) -> LayerInfo {
    LayerInfo { path: PathBuf::from(depth.to_string()), format: Format::Raw, handle }
}

#[test]
fn mapped_requests_take_two_boxes() {
    executor::run(0, async {
        let storage = MemoryStorage::new(1 << 20);
        let raw = || LayerHandle::new(RawLayer::open(storage.handle(), OpenOptions::default()));
        let empty = Rc::new(MemoryLayer::new(1 << 20, MemoryLayerOptions::default()));
        let none = WriteFlags::default();
        let alone = DiskHandle::new(Chain::new(vec![layer(0, raw())]));
        alone.write(0, Buf::copy_of(&[1; 64 << 10]), none).await.unwrap();
        drop(Buf::new(4096)); // The pool of buffers has seen this size.
        let (buf, boxes) = taken(alone.read(8192, Buf::new(4096))).await;
        let buf = buf.unwrap();
        assert_eq!((buf[0], boxes), (1, PER_REQUEST));
        let (result, boxes) = taken(alone.write(8192, buf, none)).await;
        result.unwrap();
        assert_eq!(boxes, PER_REQUEST);
        let over_parent = DiskHandle::new(Chain::new(vec![layer(0, empty.handle()), layer(1, raw())]));
        let _held = empty.handle().guard(); // The memory layer's own list of guards has its entry.
        let (buf, boxes) = taken(over_parent.read(8192, Buf::new(4096))).await;
        assert_eq!((buf.unwrap()[0], boxes), (1, PER_REQUEST), "also through an absent layer");
    });
}
