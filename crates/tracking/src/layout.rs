//! Where things stand in the sidecar. All numbers are little-endian.
//!
//! ```text
//! 0        superblock, slots A and B (4 KiB each; the valid one with the higher sequence counts)
//! 8 KiB    heartbeat (4 KiB)
//! 64 KiB   journal: a ring of blocks of 4 KiB
//! 4 MiB    points, slots A and B (6 MiB each)
//! 16 MiB   groups: index block in two slots, then 128 table pages in two slots each
//! ```
//!
//! The file is sparse: what was never written takes no space.

/// Bytes of a superblock, journal block, index block and table page.
pub(crate) const BLOCK: u64 = 4096;
/// Where the superblock's slots are.
pub(crate) const SUPERBLOCKS: [u64; 2] = [0, BLOCK];
/// Where the heartbeat is.
pub(crate) const HEARTBEAT: u64 = 2 * BLOCK;
/// Where the journal begins.
pub(crate) const JOURNAL: u64 = 64 << 10;
/// Blocks of the journal's ring.
pub(crate) const JOURNAL_BLOCKS: u64 = 512;
/// Where the points' slots are.
pub(crate) const POINTS: [u64; 2] = [4 << 20, 10 << 20];
/// Bytes of a slot of points.
pub(crate) const POINTS_CAPACITY: u64 = 6 << 20;
/// Where the groups begin.
pub(crate) const GROUPS: u64 = 16 << 20;

/// Counters in a page.
pub(crate) const PAGE_GRANULES: u64 = 1024;
/// Pages in a group.
pub(crate) const GROUP_PAGES: u64 = 128;
/// Bytes of a group: its index block and its pages, everything twice.
const GROUP_BYTES: u64 = 2 * BLOCK + GROUP_PAGES * 2 * BLOCK;

/// Where an index block's slot is.
pub(crate) const fn index_block(group: u64, slot: u8) -> u64 {
    GROUPS + group * GROUP_BYTES + slot as u64 * BLOCK
}

/// Where a table page's slot is.
pub(crate) const fn page(page: u64, slot: u8) -> u64 {
    let (group, within) = (page / GROUP_PAGES, page % GROUP_PAGES);
    GROUPS + group * GROUP_BYTES + 2 * BLOCK + (within * 2 + slot as u64) * BLOCK
}

/// Where a journal block is.
pub(crate) const fn journal_block(sequence: u64) -> u64 {
    JOURNAL + sequence % JOURNAL_BLOCKS * BLOCK
}

const _: () = assert!(JOURNAL + JOURNAL_BLOCKS * BLOCK <= POINTS[0]);
const _: () = assert!(POINTS[0] + POINTS_CAPACITY <= POINTS[1] && POINTS[1] + POINTS_CAPACITY <= GROUPS);

/// Smallest and largest logarithm of a granule's bytes: 4 KiB to 1 MiB.
pub(crate) const GRANULE_BITS: std::ops::RangeInclusive<u8> = 12..=20;
/// Largest disk that is tracked: 2^32 granules need 32 GiB of counters.
pub(crate) const MAX_GRANULES: u64 = 1 << 32;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_do_not_meet() {
        assert_eq!(index_block(0, 1) + BLOCK, page(0, 0));
        assert_eq!(page(0, 1) + BLOCK, page(1, 0));
        assert_eq!(page(GROUP_PAGES - 1, 1) + BLOCK, index_block(1, 0));
    }
}
