//! A block of the journal: granules that may change from now on.

use crate::Id;
use crate::fields::{Reader, begin_block, finish_block, open_block};
use crate::layout::BLOCK;

const MAGIC: u32 = 0x4c4a_5748; // "HWJL"
const HEAD: usize = 64;
const ENTRY: usize = 12;
/// Runs that one block holds.
pub(crate) const ENTRIES: usize = (BLOCK as usize - HEAD) / ENTRY;

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct JournalBlock {
    pub(crate) journal: Id,
    pub(crate) sequence: u64,
    /// The first block that was written together with it: those before were durable by then.
    pub(crate) batch: u64,
    pub(crate) epoch: u32,
    /// When it was written, in milliseconds since 1970.
    pub(crate) time: u64,
    /// Start and end of runs of granules; a run has at most `u32::MAX` of them.
    pub(crate) runs: Vec<(u64, u64)>,
}

impl JournalBlock {
    pub(crate) fn encode(&self) -> Vec<u8> {
        debug_assert!(self.runs.len() <= ENTRIES);
        let mut w = begin_block(MAGIC);
        w.bytes(&self.journal.0);
        w.u64(self.sequence);
        w.u64(self.time);
        w.u32(self.epoch);
        w.u16(self.runs.len() as u16);
        w.u16(0);
        w.u64(self.batch);
        w.0.resize(HEAD, 0);
        for (start, end) in &self.runs {
            w.u64(*start);
            w.u32((end - start) as u32);
        }
        finish_block(w)
    }

    /// The block, if these bytes are one of this journal.
    pub(crate) fn decode(bytes: &[u8], journal: Id) -> Option<Self> {
        let mut r = open_block(bytes, MAGIC)?;
        let mut found = Self {
            journal: Id(r.array()?),
            sequence: r.u64()?,
            time: r.u64()?,
            epoch: r.u32()?,
            batch: 0,
            runs: Vec::new(),
        };
        let count = usize::from(r.u16()?);
        r.u16()?;
        found.batch = r.u64()?;
        if found.journal != journal {
            return None;
        }
        if count > ENTRIES {
            return None;
        }
        let mut r = Reader(&bytes[HEAD..]);
        let mut runs = Vec::with_capacity(count);
        for _ in 0..count {
            let (start, len) = (r.u64()?, u64::from(r.u32()?));
            runs.push((start, start.checked_add(len)?));
        }
        Some(Self { runs, ..found })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_and_back() {
        let block = JournalBlock {
            journal: Id([7; 16]),
            sequence: 12,
            batch: 10,
            epoch: 3,
            time: 99,
            runs: (0..ENTRIES as u64).map(|n| (n * 10, n * 10 + 1 + n % 3)).collect(),
        };
        let bytes = block.encode();
        assert_eq!(bytes.len(), 4096);
        assert_eq!(JournalBlock::decode(&bytes, block.journal).as_ref(), Some(&block));
        assert_eq!(JournalBlock::decode(&bytes, Id([8; 16])), None);
        let mut torn = bytes;
        torn[3000] ^= 4;
        assert_eq!(JournalBlock::decode(&torn, block.journal), None);
    }
}
