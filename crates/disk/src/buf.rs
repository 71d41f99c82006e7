//! Owned, aligned I/O buffers that can be cut into disjoint pieces.
#![allow(unsafe_code)] // Hands out disjoint mutable pieces of one allocation; argued at each block.

use std::alloc::{Layout, alloc, dealloc, handle_alloc_error};
use std::cell::RefCell;
use std::fmt;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::sync::Arc;

/// Alignment of every buffer's first byte: enough for direct I/O on any sector size in use.
pub const BUF_ALIGNMENT: usize = 4096;

/// Allocations of up to this many bytes are kept for reuse.
const POOLED_MAX: usize = 1 << 20;
/// Size classes: 4 KiB, 8 KiB, … 1 MiB.
const CLASSES: usize = 9;
/// Bytes kept per size class and thread: 4 MiB, i.e. 1,024 of the smallest and 4 of the largest.
const POOLED_BYTES: usize = 4 << 20;

/// An owned buffer for one I/O request.
///
/// A `Buf` is the only owner of its bytes, so a request can hold it while the kernel works on it. It can
/// be cut into disjoint pieces ([`Buf::split_off`]) for requests that run at the same time, and be put
/// together again ([`Buf::join`]).
///
/// New buffers hold unspecified bytes unless made by [`Buf::zeroed`] or [`Buf::copy_of`]: whoever hands a
/// buffer on has filled it all.
pub struct Buf {
    memory: Arc<Allocation>,
    start: usize,
    len: usize,
}

struct Allocation {
    base: NonNull<u8>,
    capacity: usize,
}

// SAFETY: an `Allocation` is plain memory without interior references; only `Buf`s reach into it, each
// into bytes that no other `Buf` covers.
unsafe impl Send for Allocation {}
// SAFETY: as above; `&Allocation` gives access to nothing but its address and capacity.
unsafe impl Sync for Allocation {}

thread_local! {
    /// Free memory by size class. Per thread, so that taking and giving back costs no atomic.
    static POOL: RefCell<Pool> = const { RefCell::new(Pool([const { Vec::new() }; CLASSES])) };
}

struct Pool([Vec<NonNull<u8>>; CLASSES]);

impl Drop for Pool {
    fn drop(&mut self) {
        for (class, list) in self.0.iter_mut().enumerate() {
            for base in list.drain(..) {
                // SAFETY: what is in the pool was allocated with its class's layout and is nobody's now.
                unsafe { dealloc(base.as_ptr(), layout(BUF_ALIGNMENT << class)) };
            }
        }
    }
}

/// The size class that holds `len` bytes, or `None` when such buffers are not pooled.
fn class_of(len: usize) -> Option<usize> {
    (len <= POOLED_MAX).then(|| {
        let pages = len.div_ceil(BUF_ALIGNMENT).next_power_of_two();
        pages.trailing_zeros() as usize
    })
}

fn layout(capacity: usize) -> Layout {
    // Cannot fail: the alignment is a power of two, and `Allocation::new` bounds the capacity.
    Layout::from_size_align(capacity, BUF_ALIGNMENT).expect("buffer capacity is bounded")
}

impl Allocation {
    fn new(len: usize) -> Self {
        let capacity = match class_of(len) {
            Some(class) => BUF_ALIGNMENT << class,
            None => len.div_ceil(BUF_ALIGNMENT) * BUF_ALIGNMENT,
        };
        let pooled = class_of(len).and_then(|class| POOL.try_with(|p| p.borrow_mut().0[class].pop()).ok().flatten());
        let base = pooled.unwrap_or_else(|| {
            let layout = layout(capacity);
            // SAFETY: the layout's size is not zero, as every capacity is at least one page.
            NonNull::new(unsafe { alloc(layout) }).unwrap_or_else(|| handle_alloc_error(layout))
        });
        // Memory comes back from the allocator uninitialised; make it initialised once, at birth, so that
        // `&[u8]` to it is sound. Pooled memory has been through here.
        if pooled.is_none() {
            // SAFETY: `base` points to `capacity` bytes that nobody else knows yet.
            unsafe { base.as_ptr().write_bytes(0, capacity) };
        }
        Self { base, capacity }
    }
}

impl Drop for Allocation {
    fn drop(&mut self) {
        let keep = class_of(self.capacity).is_some_and(|class| {
            POOL.try_with(|pool| {
                let list = &mut pool.borrow_mut().0[class];
                let room = list.len() < POOLED_BYTES / self.capacity;
                if room {
                    list.push(self.base);
                }
                room
            })
            .unwrap_or(false)
        });
        if !keep {
            // SAFETY: allocated in `new` with this layout; the last `Buf` is gone and the pool refused it.
            unsafe { dealloc(self.base.as_ptr(), layout(self.capacity)) };
        }
    }
}

impl Buf {
    /// A buffer of `len` bytes with unspecified contents (never uninitialised memory, but perhaps bytes of
    /// an earlier request).
    pub fn new(len: usize) -> Self {
        Self { memory: Arc::new(Allocation::new(len.max(1))), start: 0, len }
    }

    /// A buffer of `len` zero bytes.
    pub fn zeroed(len: usize) -> Self {
        let mut buf = Self::new(len);
        buf.fill(0);
        buf
    }

    /// A buffer that holds a copy of `bytes`.
    pub fn copy_of(bytes: &[u8]) -> Self {
        let mut buf = Self::new(bytes.len());
        buf.copy_from_slice(bytes);
        buf
    }

    /// Keeps the first `at` bytes and returns the rest as a buffer of its own.
    ///
    /// # Panics
    /// When `at` exceeds the length.
    #[must_use]
    pub fn split_off(&mut self, at: usize) -> Self {
        assert!(at <= self.len, "split beyond the buffer's end");
        let tail = Self { memory: Arc::clone(&self.memory), start: self.start + at, len: self.len - at };
        self.len = at;
        tail
    }

    /// Keeps what is behind the first `at` bytes and returns those as a buffer of its own.
    ///
    /// # Panics
    /// When `at` exceeds the length.
    #[must_use]
    pub fn split_to(&mut self, at: usize) -> Self {
        let tail = self.split_off(at);
        std::mem::replace(self, tail)
    }

    /// Puts `tail` behind this buffer again; without a copy when it was cut from there, by copying
    /// otherwise.
    #[must_use]
    pub fn join(mut self, tail: Self) -> Self {
        if Arc::ptr_eq(&self.memory, &tail.memory) && self.start + self.len == tail.start {
            self.len += tail.len;
            return self;
        }
        let mut whole = Self::new(self.len + tail.len);
        whole[..self.len].copy_from_slice(&self);
        whole[self.len..].copy_from_slice(&tail);
        whole
    }

    /// Shortens to `len` bytes; longer buffers are left as they are.
    pub fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
    }

    /// Whether the first byte lies on a multiple of `alignment` (a power of two) in memory.
    pub fn is_aligned(&self, alignment: usize) -> bool {
        (self.as_ptr() as usize) & (alignment - 1) == 0
    }
}

impl Deref for Buf {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        // SAFETY: `start..start + len` lies inside the allocation (constructors and the splits keep it so),
        // is initialised, and is covered by this `Buf` alone, so nobody writes to it meanwhile.
        unsafe { std::slice::from_raw_parts(self.memory.base.as_ptr().add(self.start), self.len) }
    }
}

impl DerefMut for Buf {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `deref`; `&mut self` makes this the only reference.
        unsafe { std::slice::from_raw_parts_mut(self.memory.base.as_ptr().add(self.start), self.len) }
    }
}

impl AsRef<[u8]> for Buf {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl fmt::Debug for Buf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Buf({} bytes)", self.len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cut_and_join() {
        let mut a = Buf::copy_of(&(0..=255).collect::<Vec<u8>>());
        assert!(a.is_aligned(BUF_ALIGNMENT));
        let mut b = a.split_off(100);
        let c = b.split_off(50);
        b.fill(7);
        assert_eq!((a.len(), b.len(), c.len()), (100, 50, 106));
        let at = a.as_ptr();
        let whole = a.join(b).join(c);
        assert_eq!(whole.as_ptr(), at, "pieces of one buffer join without a copy");
        assert_eq!((whole[99], whole[100], whole[149], whole[150]), (99, 7, 7, 150));
    }

    #[test]
    fn join_of_strangers_copies() {
        let whole = Buf::copy_of(b"ab").join(Buf::copy_of(b"cd"));
        assert_eq!(&whole[..], b"abcd");
    }

    #[test]
    fn memory_is_reused() {
        let first = Buf::new(5000);
        let at = first.as_ptr();
        drop(first);
        assert_eq!(Buf::new(8000).as_ptr(), at);
        assert!(Buf::zeroed(8000).iter().all(|b| *b == 0));
    }

    #[test]
    fn large_and_empty() {
        assert_eq!(Buf::zeroed(3 << 20).len(), 3 << 20);
        assert!(Buf::new(0).is_empty());
    }
}
