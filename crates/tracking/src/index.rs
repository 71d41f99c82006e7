//! The index: which slot of each table page counts, and what is in it.

use crate::fields::{Reader, begin_block, finish_block, open_block};
use crate::kind::Counter;
use crate::layout::GROUP_PAGES;

const MAGIC: u32 = 0x5849_5748; // "HWIX"
const HEAD: usize = 64;

/// What the index knows of a page of counters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PageEntry {
    /// The least epoch of its counters.
    pub(crate) low: u32,
    /// The greatest.
    pub(crate) high: u32,
    pub(crate) body: PageBody,
}

/// Where a page's counters are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PageBody {
    /// All are this one; nothing is stored.
    Uniform(Counter),
    /// In the slot, with this checksum.
    Stored { slot: u8, sum: u32, all_data: bool },
}

impl PageEntry {
    pub(crate) const NEVER: Self = Self { low: 0, high: 0, body: PageBody::Uniform(Counter::NEVER) };

    /// The slot that does not count, or the first where none does.
    pub(crate) fn other_slot(&self) -> u8 {
        match self.body {
            PageBody::Uniform(_) => 0,
            PageBody::Stored { slot, .. } => 1 - slot,
        }
    }
}

/// What the superblock remembers of the generations of all groups' index blocks, so that an older one is not taken for one
/// that went bad.
pub(crate) fn sum_of(generations: impl Iterator<Item = u64>) -> u32 {
    generations.fold(0, |sum, generation| crc32c::crc32c_append(sum, &generation.to_le_bytes()))
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct IndexBlock {
    pub(crate) group: u64,
    pub(crate) generation: u64,
    pub(crate) entries: Vec<PageEntry>,
}

impl IndexBlock {
    pub(crate) fn encode(&self) -> Vec<u8> {
        debug_assert_eq!(self.entries.len(), GROUP_PAGES as usize);
        let mut w = begin_block(MAGIC);
        w.u64(self.group);
        w.u64(self.generation);
        w.0.resize(HEAD, 0);
        for entry in &self.entries {
            w.u32(entry.low);
            w.u32(entry.high);
            match entry.body {
                PageBody::Uniform(counter) => {
                    w.u32(counter.0);
                    w.u32(0);
                }
                PageBody::Stored { slot, sum, all_data } => {
                    w.u32(sum);
                    w.u32(1 | u32::from(slot) << 1 | u32::from(all_data) << 2);
                }
            }
        }
        finish_block(w)
    }

    /// The index block, if these bytes are the group's.
    pub(crate) fn decode(bytes: &[u8], group: u64) -> Option<Self> {
        let mut r = open_block(bytes, MAGIC)?;
        let (found, generation) = (r.u64()?, r.u64()?);
        if found != group {
            return None;
        }
        let mut r = Reader(&bytes[HEAD..]);
        let mut entries = Vec::with_capacity(GROUP_PAGES as usize);
        for _ in 0..GROUP_PAGES {
            let (low, high, word, flags) = (r.u32()?, r.u32()?, r.u32()?, r.u32()?);
            let body = match flags & 1 {
                0 => PageBody::Uniform(Counter(word)),
                _ => PageBody::Stored { slot: (flags >> 1 & 1) as u8, sum: word, all_data: flags & 4 != 0 },
            };
            entries.push(PageEntry { low, high, body });
        }
        Some(Self { group, generation, entries })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ChangeKind;

    #[test]
    fn text_and_back() {
        let entries: Vec<PageEntry> = (0..GROUP_PAGES as u32)
            .map(|n| PageEntry {
                low: n,
                high: n + 1,
                body: match n % 3 {
                    0 => PageBody::Uniform(Counter::new(n + 1, ChangeKind::Discarded)),
                    k => PageBody::Stored { slot: (k - 1) as u8, sum: n * 7, all_data: n % 2 == 0 },
                },
            })
            .collect();
        let block = IndexBlock { group: 5, generation: 9, entries };
        let bytes = block.encode();
        assert_eq!(IndexBlock::decode(&bytes, 5), Some(block));
        assert_eq!(IndexBlock::decode(&bytes, 6), None);
        assert_eq!(IndexBlock::decode(&[0; 4096], 0), None);
    }
}
