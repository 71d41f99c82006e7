//! The superblock: what the history is, and which state of it counts.

use crate::fields::{Reader, Writer, is_sealed, seal};
use crate::kind::LAST_EPOCH;
use crate::layout::{BLOCK, GRANULE_BITS, JOURNAL_BLOCKS, MAX_GRANULES, POINTS_CAPACITY};
use crate::{Damage, Id, ImageFacts};

pub(crate) const MAGIC: [u8; 8] = *b"HWHISTRY";
const VERSION: u32 = 1;
const SUM_AT: usize = 12;
/// Longest reason that is kept, in bytes.
const REASON: usize = 1024;

/// Where an heir stands in the block: behind the longest reason.
const HEIR_AT: usize = 2048;

/// In which state the history was left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum State {
    /// Nobody has written to the image since `facts` were taken.
    Closed,
    /// Somebody writes to the image, or did when the machine or the process stopped.
    InUse,
    /// Changes were not recorded; `reason` says why.
    Lost,
}

/// The image that is about to take the place of the history's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Heir {
    /// The mark that it bears; none when it cannot bear one.
    pub(crate) moment: Id,
    pub(crate) facts: ImageFacts,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Superblock {
    /// Raised by each writing; its lowest bit is the slot.
    pub(crate) sequence: u64,
    pub(crate) lineage: Id,
    pub(crate) granule_bits: u8,
    pub(crate) state: State,
    /// Flushes of the image were ignored in this run of the machine: what its restart leaves is unknown, after a clean close too.
    pub(crate) flushes_void: bool,
    /// Bytes of the guest's disk that the table speaks of.
    pub(crate) size: u64,
    /// The present epoch; at least 1.
    pub(crate) epoch: u32,
    /// Index blocks of a later generation do not count.
    pub(crate) generation: u64,
    /// The journal's blocks bear this name.
    pub(crate) journal: Id,
    /// The first journal block that counts.
    pub(crate) journal_start: u64,
    pub(crate) points_slot: u8,
    pub(crate) points_len: u32,
    pub(crate) points_sum: u32,
    /// Of the generations of the index blocks that count.
    pub(crate) index_sum: u32,
    /// When this was written, in milliseconds since 1970.
    pub(crate) time: u64,
    /// The run of the machine in which it was written.
    pub(crate) boot: Id,
    /// The mark that the image bears; none when it cannot bear one.
    pub(crate) moment: Id,
    /// The mark that it may bear already.
    pub(crate) next_moment: Id,
    pub(crate) facts: ImageFacts,
    /// Why changes were lost.
    pub(crate) reason: String,
    /// The image may be this one already.
    pub(crate) heir: Option<Heir>,
}

fn write_facts(w: &mut Writer, facts: &ImageFacts) {
    w.u64(facts.device);
    w.u64(facts.inode);
    w.u64(facts.size);
    w.u64(facts.modified as u64);
    w.u64(facts.others);
    w.u8(facts.block_device.into());
    w.u8(facts.sectors_written.is_some().into());
    w.u64(facts.sectors_written.unwrap_or(0));
}

fn read_facts(r: &mut Reader<'_>) -> Option<ImageFacts> {
    let (device, inode, size) = (r.u64()?, r.u64()?, r.u64()?);
    let modified = r.u64()? as i64;
    let others = r.u64()?;
    let block_device = r.u8()? != 0;
    let counted = r.u8()? != 0;
    let sectors = r.u64()?;
    let sectors_written = counted.then_some(sectors);
    Some(ImageFacts { device, inode, size, modified, block_device, sectors_written, others })
}

impl Superblock {
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut w = Writer::default();
        w.bytes(&MAGIC);
        w.u32(VERSION);
        w.u32(0);
        w.u64(self.sequence);
        w.bytes(&self.lineage.0);
        w.u8(self.granule_bits);
        w.u8(match self.state {
            State::Closed => 0,
            State::InUse => 1,
            State::Lost => 2,
        });
        w.u8(self.flushes_void.into());
        w.u8(self.points_slot);
        w.u32(self.epoch);
        w.u64(self.size);
        w.u64(self.generation);
        w.bytes(&self.journal.0);
        w.u64(self.journal_start);
        w.u32(self.points_len);
        w.u32(self.points_sum);
        w.u32(self.index_sum);
        w.u32(0);
        w.u64(self.time);
        w.bytes(&self.boot.0);
        w.bytes(&self.moment.0);
        w.bytes(&self.next_moment.0);
        write_facts(&mut w, &self.facts);
        let mut end = self.reason.len().min(REASON);
        while !self.reason.is_char_boundary(end) {
            end -= 1;
        }
        w.text(&self.reason[..end]);
        if let Some(heir) = &self.heir {
            w.0.resize(HEIR_AT, 0);
            w.u8(1);
            w.bytes(&heir.moment.0);
            write_facts(&mut w, &heir.facts);
        }
        let mut block = w.0;
        block.resize(BLOCK as usize, 0);
        seal(&mut block, SUM_AT);
        block
    }

    /// The superblock, `None` when the block holds none.
    ///
    /// # Errors
    /// When it holds one with which nothing can be done.
    pub(crate) fn decode(block: &[u8]) -> Result<Option<Self>, Damage> {
        if block.len() != BLOCK as usize || block[..8] != MAGIC || !is_sealed(block, SUM_AT) {
            return Ok(None);
        }
        let mut r = Reader(&block[8..]);
        let version = r.u32().unwrap_or(0);
        if version != VERSION {
            return Err(Damage::Version { found: version });
        }
        let mut found = Self::fields(&mut r).ok_or(Damage::Superblock { field: "state" })?;
        // Zeroes where no heir is named, as in a block of before there were any.
        let mut r = Reader(&block[HEIR_AT..]);
        if r.u8() == Some(1) {
            let heir = || Some(Heir { moment: Id(r.array()?), facts: read_facts(&mut r)? });
            found.heir = Some({ heir }().ok_or(Damage::Superblock { field: "heir" })?);
        }
        let bad = |field| Err(Damage::Superblock { field });
        if !GRANULE_BITS.contains(&found.granule_bits) {
            return bad("granule");
        }
        if found.size.div_ceil(1 << found.granule_bits) > MAX_GRANULES {
            return bad("size");
        }
        if found.epoch == 0 || found.epoch > LAST_EPOCH {
            return bad("epoch");
        }
        if found.points_slot > 1 || u64::from(found.points_len) > POINTS_CAPACITY {
            return bad("points");
        }
        if found.journal_start > u64::MAX / 2 || found.generation > u64::MAX / 2 || found.sequence > u64::MAX / 2 {
            return bad("sequence");
        }
        Ok(Some(found))
    }

    fn fields(r: &mut Reader<'_>) -> Option<Self> {
        r.u32()?; // the checksum
        let sequence = r.u64()?;
        let lineage = Id(r.array()?);
        let granule_bits = r.u8()?;
        let state = match r.u8()? {
            0 => State::Closed,
            1 => State::InUse,
            2 => State::Lost,
            _ => return None,
        };
        let flushes_void = r.u8()? != 0;
        let points_slot = r.u8()?;
        let epoch = r.u32()?;
        let size = r.u64()?;
        let generation = r.u64()?;
        let journal = Id(r.array()?);
        let journal_start = r.u64()?;
        let points_len = r.u32()?;
        let points_sum = r.u32()?;
        let index_sum = r.u32()?;
        r.u32()?;
        let time = r.u64()?;
        let boot = Id(r.array()?);
        let moment = Id(r.array()?);
        let next_moment = Id(r.array()?);
        let facts = read_facts(r)?;
        let reason = r.printable()?;
        Some(Self {
            sequence,
            lineage,
            granule_bits,
            state,
            flushes_void,
            size,
            epoch,
            generation,
            journal,
            journal_start,
            points_slot,
            points_len,
            points_sum,
            index_sum,
            time,
            boot,
            moment,
            next_moment,
            facts,
            reason,
            heir: None,
        })
    }

    /// What is recorded if the heir has taken the image's place.
    pub(crate) fn of_heir(&self) -> Option<Self> {
        let Heir { moment, facts } = self.heir?;
        Some(Self { moment, facts, next_moment: Id::NONE, heir: None, ..self.clone() })
    }

    pub(crate) fn granule(&self) -> u64 {
        1 << self.granule_bits
    }
}

const _: () = assert!(JOURNAL_BLOCKS > 16);
const _: () = assert!(210 + 2 + REASON <= HEIR_AT);

#[cfg(test)]
mod tests {
    use super::*;

    fn example() -> Superblock {
        Superblock {
            sequence: 3,
            lineage: Id([1; 16]),
            granule_bits: 16,
            state: State::InUse,
            flushes_void: true,
            size: 1 << 40,
            epoch: 7,
            generation: 5,
            journal: Id([2; 16]),
            journal_start: 9,
            points_slot: 1,
            points_len: 77,
            points_sum: 0xdead_beef,
            index_sum: 0xfeed_f00d,
            time: 1_700_000_000_000,
            boot: Id([3; 16]),
            moment: Id([4; 16]),
            next_moment: Id([5; 16]),
            facts: ImageFacts {
                device: 1,
                inode: 2,
                size: 3,
                modified: -4,
                block_device: false,
                sectors_written: Some(6),
                others: 8,
            },
            reason: "größe".repeat(400),
            heir: None,
        }
    }

    fn heir() -> Heir {
        let facts = ImageFacts { device: 9, inode: 8, size: 7, modified: i64::MAX, others: 6, ..ImageFacts::default() };
        Heir { moment: Id([6; 16]), facts }
    }

    #[test]
    fn text_and_back() {
        let mut wanted = example();
        let found = Superblock::decode(&wanted.encode()).unwrap().unwrap();
        assert!(wanted.reason.starts_with(&found.reason) && found.reason.len() > REASON - 4);
        wanted.reason.clone_from(&found.reason);
        assert_eq!(found, wanted);
        let wanted = Superblock { heir: Some(heir()), ..wanted };
        let bytes = wanted.encode();
        assert_eq!(Superblock::decode(&bytes), Ok(Some(wanted)));
        assert_eq!(bytes[HEIR_AT], 1, "where docs/history.md says");
    }

    #[test]
    fn who_knows_no_heirs_overlooks_them() {
        let (plain, named) = (example().encode(), Superblock { heir: Some(heir()), ..example() }.encode());
        assert_eq!(plain[..SUM_AT], named[..SUM_AT]);
        assert_eq!(plain[SUM_AT + 4..HEIR_AT], named[SUM_AT + 4..HEIR_AT]);
        assert!(plain[HEIR_AT..].iter().all(|byte| *byte == 0));
    }

    #[test]
    fn what_is_wrong_is_named() {
        assert_eq!(Superblock::decode(&[0; 4096]), Ok(None));
        let mut block = example().encode();
        block[100] ^= 1;
        assert_eq!(Superblock::decode(&block), Ok(None), "the checksum is wrong");
        let mut later = example().encode();
        later[8] = 2;
        seal(&mut later, SUM_AT);
        assert_eq!(Superblock::decode(&later), Err(Damage::Version { found: 2 }));
        for (change, field) in [
            ((|s| s.granule_bits = 30) as fn(&mut Superblock), "granule"),
            (|s| s.size = u64::MAX, "size"),
            (|s| s.epoch = 0, "epoch"),
            (|s| s.points_slot = 2, "points"),
            (|s| s.generation = u64::MAX, "sequence"),
        ] {
            let mut bad = example();
            change(&mut bad);
            assert_eq!(Superblock::decode(&bad.encode()), Err(Damage::Superblock { field }));
        }
    }
}
