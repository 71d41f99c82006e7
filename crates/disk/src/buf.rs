//! Owned, aligned I/O buffers that can be cut into disjoint pieces.
#![allow(unsafe_code)] // Hands out disjoint mutable pieces of one allocation; argued at each block.

use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous, munmap};
use std::alloc::{Layout, alloc, dealloc, handle_alloc_error};
use std::cell::RefCell;
use std::fmt;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::sync::Arc;

/// Alignment of every buffer's first byte: enough for direct I/O on any sector size in use.
pub const BUF_ALIGNMENT: usize = 4096;

/// Size classes: 4 KiB, 8 KiB, … 32 MiB, the longest request there is. Longer buffers are not pooled.
const CLASSES: usize = 14;
/// Bytes kept for reuse by each thread: enough for what a few busy connections have under way.
const POOLED_BYTES: usize = 32 << 20;
/// From this many bytes on memory comes from the kernel page by page as it is touched: a long buffer that is never filled
/// costs nothing, and nobody has to clear it.
const MAPPED_MIN: usize = 256 << 10;

/// An owned buffer for one I/O request.
///
/// A `Buf` is the only owner of its bytes, so a request can hold it while the kernel works on it. It can
/// be cut into disjoint pieces ([`Buf::split_off`]) for requests that run at the same time, and be put
/// together again ([`Buf::join`]).
///
/// New buffers hold unspecified bytes unless made by [`Buf::zeroed`] or [`Buf::copy_of`]: whoever hands a
/// buffer on has filled it all.
pub struct Buf {
    /// `None` for a buffer that was made without bytes.
    memory: Option<Arc<Allocation>>,
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
    static POOL: RefCell<Pool> = const { RefCell::new(Pool { classes: [const { Vec::new() }; CLASSES], bytes: 0 }) };
}

struct Pool {
    classes: [Vec<NonNull<u8>>; CLASSES],
    /// In all classes together.
    bytes: usize,
}

impl Pool {
    fn take(&mut self, class: usize) -> Option<NonNull<u8>> {
        let base = self.classes[class].pop()?;
        self.bytes -= BUF_ALIGNMENT << class;
        Some(base)
    }

    /// Whether the memory was taken.
    fn keep(&mut self, class: usize, base: NonNull<u8>) -> bool {
        let capacity = BUF_ALIGNMENT << class;
        if self.bytes + capacity > POOLED_BYTES {
            return false;
        }
        self.bytes += capacity;
        self.classes[class].push(base);
        true
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        for (class, list) in self.classes.iter_mut().enumerate() {
            for base in list.drain(..) {
                // SAFETY: what is in the pool was allocated with its class's capacity and is nobody's now.
                unsafe { give_back(base, BUF_ALIGNMENT << class) };
            }
        }
    }
}

/// The size class that holds `len` bytes, or `None` when such buffers are not pooled.
fn class_of(len: usize) -> Option<usize> {
    let class = len.div_ceil(BUF_ALIGNMENT).next_power_of_two().trailing_zeros() as usize;
    (class < CLASSES).then_some(class)
}

fn layout(capacity: usize) -> Layout {
    // Cannot fail: the alignment is a power of two, and `Allocation::new` bounds the capacity.
    Layout::from_size_align(capacity, BUF_ALIGNMENT).expect("buffer capacity is bounded")
}

/// New memory of zeroes, aligned to pages.
fn obtain(capacity: usize) -> NonNull<u8> {
    let layout = layout(capacity);
    if capacity >= MAPPED_MIN {
        let (protection, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE);
        // SAFETY: a new mapping at an address of the kernel's choice touches no memory in use.
        let mapped = unsafe { mmap_anonymous(std::ptr::null_mut(), capacity, protection, flags) };
        return mapped.ok().and_then(|base| NonNull::new(base.cast())).unwrap_or_else(|| handle_alloc_error(layout));
    }
    // SAFETY: the layout's size is not zero, as every capacity is at least one page.
    let base = NonNull::new(unsafe { alloc(layout) }).unwrap_or_else(|| handle_alloc_error(layout));
    // Memory comes from the allocator uninitialised; made initialised once, at birth, so that `&[u8]` to it is sound.
    // SAFETY: `base` points to `capacity` bytes that nobody else knows yet.
    unsafe { base.as_ptr().write_bytes(0, capacity) };
    base
}

/// Frees what `obtain` returned for this capacity.
///
/// # Safety
/// `base` comes from `obtain(capacity)`, and nobody uses it any more.
unsafe fn give_back(base: NonNull<u8>, capacity: usize) {
    if capacity >= MAPPED_MIN {
        // SAFETY: mapped in `obtain` with this length; the caller's promise covers the rest.
        let unmapped = unsafe { munmap(base.as_ptr().cast(), capacity) };
        debug_assert!(unmapped.is_ok(), "what was mapped can be unmapped");
    } else {
        // SAFETY: allocated in `obtain` with this layout; the caller's promise covers the rest.
        unsafe { dealloc(base.as_ptr(), layout(capacity)) };
    }
}

impl Allocation {
    fn new(len: usize) -> Self {
        let capacity = match class_of(len) {
            Some(class) => BUF_ALIGNMENT << class,
            None => len.div_ceil(BUF_ALIGNMENT) * BUF_ALIGNMENT,
        };
        let pooled = class_of(len).and_then(|class| POOL.try_with(|pool| pool.borrow_mut().take(class)).ok().flatten());
        Self { base: pooled.unwrap_or_else(|| obtain(capacity)), capacity }
    }
}

impl Drop for Allocation {
    fn drop(&mut self) {
        let kept = class_of(self.capacity)
            .is_some_and(|class| POOL.try_with(|pool| pool.borrow_mut().keep(class, self.base)).unwrap_or(false));
        if !kept {
            // SAFETY: comes from `obtain` in `new`; the last `Buf` is gone and the pool refused it.
            unsafe { give_back(self.base, self.capacity) };
        }
    }
}

impl Buf {
    /// A buffer of `len` bytes with unspecified contents (never uninitialised memory, but perhaps bytes of
    /// an earlier request).
    pub fn new(len: usize) -> Self {
        Self { memory: (len > 0).then(|| Arc::new(Allocation::new(len))), start: 0, len }
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
        let tail = Self { memory: self.memory.clone(), start: self.start + at, len: self.len - at };
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
        if tail.is_empty() {
            return self;
        }
        if let (Some(memory), Some(of_tail)) = (&self.memory, &tail.memory)
            && Arc::ptr_eq(memory, of_tail)
            && self.start + self.len == tail.start
        {
            self.len += tail.len;
            return self;
        }
        if self.is_empty() {
            return tail;
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
        let Some(memory) = &self.memory else { return &[] };
        // SAFETY: `start..start + len` lies inside the allocation (constructors and the splits keep it so),
        // is initialised, and is covered by this `Buf` alone, so nobody writes to it meanwhile.
        unsafe { std::slice::from_raw_parts(memory.base.as_ptr().add(self.start), self.len) }
    }
}

impl DerefMut for Buf {
    fn deref_mut(&mut self) -> &mut [u8] {
        let Some(memory) = &self.memory else { return &mut [] };
        // SAFETY: as in `deref`; `&mut self` makes this the only reference.
        unsafe { std::slice::from_raw_parts_mut(memory.base.as_ptr().add(self.start), self.len) }
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
        let mut a = Buf::copy_of(b"ab");
        let b = a.split_off(2);
        assert_eq!(&a.join(b)[..], b"ab");
        assert_eq!(&Buf::new(0).join(Buf::copy_of(b"cd"))[..], b"cd");
    }
}
