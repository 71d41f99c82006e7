//! Byte ranges.

use std::fmt;

/// `len` bytes from `offset`; an offset in a guest's disk or in a storage, as the context says.
///
/// `offset + len` never overflows: the constructors see to it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ByteRange {
    offset: u64,
    len: u64,
}

impl ByteRange {
    /// The empty range at 0.
    pub const EMPTY: Self = Self { offset: 0, len: 0 };

    /// `len` bytes from `offset`.
    ///
    /// # Panics
    /// When `offset + len` overflows. For numbers that come from outside use [`ByteRange::checked`].
    pub const fn new(offset: u64, len: u64) -> Self {
        assert!(offset.checked_add(len).is_some(), "byte range overflows");
        Self { offset, len }
    }

    /// `len` bytes from `offset`, or `None` when the end overflows.
    pub const fn checked(offset: u64, len: u64) -> Option<Self> {
        match offset.checked_add(len) {
            Some(_) => Some(Self { offset, len }),
            None => None,
        }
    }

    /// From `start` up to, not including, `end`; empty when `end <= start`.
    pub const fn between(start: u64, end: u64) -> Self {
        Self { offset: start, len: end.saturating_sub(start) }
    }

    /// First byte.
    pub const fn offset(self) -> u64 {
        self.offset
    }

    /// Length in bytes.
    pub const fn len(self) -> u64 {
        self.len
    }

    /// One past the last byte.
    pub const fn end(self) -> u64 {
        self.offset + self.len
    }

    /// Whether it holds no byte.
    pub const fn is_empty(self) -> bool {
        self.len == 0
    }

    /// Whether `other` lies wholly inside.
    pub const fn contains(self, other: Self) -> bool {
        other.offset >= self.offset && other.end() <= self.end()
    }

    /// Whether both share a byte.
    pub const fn overlaps(self, other: Self) -> bool {
        self.offset < other.end() && other.offset < self.end() && self.len > 0 && other.len > 0
    }

    /// The bytes that both share; empty when there are none.
    pub fn intersect(self, other: Self) -> Self {
        Self::between(self.offset.max(other.offset), self.end().min(other.end()))
    }

    /// The first `len` bytes, or all when there are fewer.
    pub fn prefix(self, len: u64) -> Self {
        Self { offset: self.offset, len: self.len.min(len) }
    }

    /// What remains behind the first `len` bytes.
    pub fn skip(self, len: u64) -> Self {
        let n = self.len.min(len);
        Self { offset: self.offset + n, len: self.len - n }
    }

    /// The smallest range of whole blocks of `block` bytes (a power of two) around this one.
    pub fn align_out(self, block: u64) -> Self {
        debug_assert!(block.is_power_of_two());
        if self.is_empty() {
            return Self { offset: self.offset & !(block - 1), len: 0 };
        }
        let start = self.offset & !(block - 1);
        let end = (self.end() - 1) | (block - 1);
        Self { offset: start, len: end - start + 1 }
    }

    /// The largest range of whole blocks of `block` bytes (a power of two) inside this one.
    pub fn align_in(self, block: u64) -> Self {
        debug_assert!(block.is_power_of_two());
        let end = self.end() & !(block - 1);
        let start = match self.offset.checked_add(block - 1) {
            Some(up) => up & !(block - 1),
            None => return Self { offset: end, len: 0 },
        };
        if start >= end { Self { offset: start.min(self.end()), len: 0 } } else { Self::between(start, end) }
    }

    /// Whether offset and length are multiples of `block` (a power of two).
    pub const fn is_aligned(self, block: u64) -> bool {
        (self.offset | self.len) & (block - 1) == 0
    }
}

impl fmt::Display for ByteRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}+{:#x}", self.offset, self.len)
    }
}

impl fmt::Debug for ByteRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn alignment() {
        let r = ByteRange::new(5, 10);
        assert_eq!(r.align_out(4), ByteRange::new(4, 12));
        assert_eq!(r.align_in(4), ByteRange::new(8, 4));
        assert!(ByteRange::new(5, 2).align_in(4).is_empty());
        assert!(ByteRange::new(u64::MAX - 2, 2).align_in(4096).is_empty());
        assert!(ByteRange::checked(u64::MAX, 1).is_none());
    }

    #[test]
    fn set_operations() {
        let a = ByteRange::new(10, 10);
        assert!(a.overlaps(ByteRange::new(19, 1)) && !a.overlaps(ByteRange::new(20, 1)));
        assert!(!a.overlaps(ByteRange::new(12, 0)));
        assert_eq!(a.intersect(ByteRange::new(15, 100)), ByteRange::new(15, 5));
        assert!(a.intersect(ByteRange::new(0, 3)).is_empty());
        assert_eq!(a.skip(4), ByteRange::new(14, 6));
        assert_eq!(a.prefix(4), ByteRange::new(10, 4));
    }
}
