//! Entries of the L1 and L2 tables (specification: "Cluster mapping").

/// The cluster is referenced once, so it may be written in place (bit 63 of L1 and L2 entries).
pub(super) const COPIED: u64 = 1 << 63;
/// The cluster is compressed (bit 62 of L2 entries).
pub(super) const COMPRESSED: u64 = 1 << 62;
/// The cluster reads as zero (bit 0 of L2 entries; version 3 without extended L2).
pub(super) const ZERO: u64 = 1;
/// The host cluster offset (bits 9–55).
pub(super) const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;

/// Subclusters per cluster in images with extended L2 entries.
pub(super) const SUBCLUSTERS: u32 = 32;

/// One L2 entry: the descriptor, and for extended entries the subcluster bitmap (low half: allocated,
/// high half: reads as zero).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub(super) struct L2Entry {
    pub(super) descriptor: u64,
    pub(super) bitmap: u64,
}

/// What an L2 entry says of one subcluster (of the whole cluster where there are none).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    /// Nothing here: the parent shows.
    Absent,
    /// Zero without host cluster.
    ZeroPlain,
    /// Zero with a host cluster set aside.
    ZeroAllocated,
    /// Absent (the parent shows), but the host cluster exists because other subclusters are there.
    AbsentAllocated,
    /// Bytes at the host cluster.
    Data,
    /// Compressed.
    Compressed,
}

impl L2Entry {
    pub(super) const ABSENT: Self = Self { descriptor: 0, bitmap: 0 };

    /// A data cluster of which nobody else holds a reference; `bitmap` is all ones where there are subclusters.
    pub(super) const fn data(host: u64, bitmap: u64) -> Self {
        Self { descriptor: host | COPIED, bitmap }
    }

    /// Host cluster offset, 0 when there is none. Meaningless for compressed entries.
    pub(super) const fn host(self) -> u64 {
        self.descriptor & OFFSET_MASK
    }

    pub(super) const fn is_compressed(self) -> bool {
        self.descriptor & COMPRESSED != 0
    }

    pub(super) const fn is_copied(self) -> bool {
        self.descriptor & COPIED != 0
    }

    /// Whether a host cluster stands behind it. With an external data file offset 0 is a valid cluster, told by
    /// COPIED.
    pub(super) const fn has_host(self) -> bool {
        !self.is_compressed() && (self.host() != 0 || self.is_copied())
    }

    /// State of one subcluster; `extended` says whether the image has them (else `sub` is 0).
    pub(super) const fn state(self, extended: bool, sub: u32) -> State {
        if self.is_compressed() {
            return State::Compressed;
        }
        if !extended {
            return match (self.descriptor & ZERO != 0, self.has_host()) {
                (true, true) => State::ZeroAllocated,
                (true, false) => State::ZeroPlain,
                (false, true) => State::Data,
                (false, false) => State::Absent,
            };
        }
        let allocated = self.bitmap >> sub & 1 != 0;
        let zero = self.bitmap >> (32 + sub) & 1 != 0;
        match (allocated, zero, self.has_host()) {
            (_, true, true) => State::ZeroAllocated,
            (_, true, false) => State::ZeroPlain,
            (true, false, true) => State::Data,
            (false, false, true) => State::AbsentAllocated,
            (_, false, false) => State::Absent,
        }
    }

    /// Whether any subcluster has both its bits set, or claims bytes without a host cluster.
    pub(super) const fn bitmap_is_invalid(self) -> bool {
        if self.is_compressed() {
            return self.bitmap != 0;
        }
        let allocated = self.bitmap as u32;
        let zero = (self.bitmap >> 32) as u32;
        allocated & zero != 0 || (!self.has_host() && allocated != 0)
    }
}

/// Bits `first..first + count` set.
pub(super) const fn bits(first: u32, count: u32) -> u32 {
    if count >= 32 { u32::MAX << first } else { ((1u32 << count) - 1) << first }
}

/// Where a compressed cluster's bytes stand (specification: "Compressed Clusters Descriptor").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct CompressedAt {
    /// Offset of the first byte; need not be aligned.
    pub(super) offset: u64,
    /// Upper bound of the length in bytes: up to the end of the last 512-byte sector.
    pub(super) len: u64,
}

impl CompressedAt {
    pub(super) const fn decode(descriptor: u64, cluster_bits: u32) -> Self {
        let shift = 62 - (cluster_bits - 8);
        let offset = descriptor & ((1 << shift) - 1);
        let more_sectors = (descriptor & (COMPRESSED - 1)) >> shift;
        let end = (offset & !511) + (more_sectors + 1) * 512;
        Self { offset, len: end - offset }
    }

    /// The descriptor, or `None` when the offset does not fit.
    pub(super) const fn encode(offset: u64, len: u64, cluster_bits: u32) -> Option<u64> {
        let shift = 62 - (cluster_bits - 8);
        if offset >> shift != 0 || len == 0 {
            return None;
        }
        let more_sectors = (offset + len - 1) / 512 - offset / 512;
        Some(COMPRESSED | more_sectors << shift | offset)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn compressed_descriptor() {
        for (offset, len) in [(0x10000, 1), (0x101ff, 2), (0x12345, 65535), (0x10000, 512)] {
            let d = CompressedAt::encode(offset, len, 16).expect("fits");
            let at = CompressedAt::decode(d, 16);
            assert_eq!(at.offset, offset);
            assert!(at.len >= len && at.len < len + 512);
        }
        assert_eq!(CompressedAt::encode(1 << 54, 1, 16), None);
    }

    #[test]
    fn subcluster_states() {
        let e = L2Entry { descriptor: 0x50000 | COPIED, bitmap: 0b01 | 0b10 << 32 };
        assert_eq!(e.state(true, 0), State::Data);
        assert_eq!(e.state(true, 1), State::ZeroAllocated);
        assert_eq!(e.state(true, 2), State::AbsentAllocated);
        assert!(!e.bitmap_is_invalid());
        assert!(L2Entry { descriptor: 0x50000, bitmap: 1 | 1 << 32 }.bitmap_is_invalid());
        assert_eq!(bits(0, 32), u32::MAX);
        assert_eq!(bits(4, 2), 0b110000);
    }
}
