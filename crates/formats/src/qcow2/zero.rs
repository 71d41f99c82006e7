//! Zeroes and discards: changes of the mapping alone.
//!
//! Crash: an entry on the storage is the old or the new one. Freed clusters keep their bytes until the new
//! entry is durable (`flush.rs`).

use super::entry::{COPIED, L2Entry, SUBCLUSTERS, State, ZERO, bits};
use super::image::Image;
use super::slices::Slice;
use disk::{Below, ByteRange, DiskError, ErrorKind, Operation, Result, ZeroMode};
use std::rc::Rc;

/// What units become.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Become {
    /// Zero; space that is set aside stays so.
    ZeroKeeping,
    /// Zero without space.
    ZeroFreeing,
    /// Absent without space.
    Absent,
}

/// What is done where only some subclusters of a compressed cluster are to change, which takes written bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum PartOfCompressed {
    /// They stay as they are.
    Kept,
    /// The request fails as `Unsupported`.
    Refused,
}

impl Image {
    /// Makes whole units read as zero.
    pub(super) async fn zero_units(&self, range: ByteRange, below: Below, mode: ZeroMode) -> Result<()> {
        self.prepare_for_writing().await?;
        let version = self.header.borrow().version;
        let to = match (version, below) {
            (2, Below::Zeroes) => Become::Absent,
            (2, Below::Parent) => {
                return Err(DiskError::new(ErrorKind::Unsupported, Operation::WriteZeroes)
                    .at(range)
                    .because("qcow2 version 2 cannot hide a parent without writing bytes"));
            }
            _ if mode.unmap => Become::ZeroFreeing,
            _ => Become::ZeroKeeping,
        };
        self.zero_raw_data(range, Some(mode)).await?;
        self.for_each_slice(range, to, below, PartOfCompressed::Refused).await
    }

    /// Gives back whole units.
    pub(super) async fn discard_units(&self, range: ByteRange, below: Below) -> Result<()> {
        self.prepare_for_writing().await?;
        let version = self.header.borrow().version;
        let to = match (version, below) {
            (_, Below::Zeroes) => Become::Absent,
            (2, Below::Parent) => return Ok(()), // The parent's old bytes would show.
            _ => Become::ZeroFreeing,
        };
        self.zero_raw_data(range, None).await?;
        self.for_each_slice(range, to, below, PartOfCompressed::Kept).await
    }

    /// A data file that is a raw image in its own right must show the same bytes; any other may give the space back.
    async fn zero_raw_data(&self, range: ByteRange, mode: Option<ZeroMode>) -> Result<()> {
        let Some(data) = &self.data_file else { return Ok(()) };
        let unmap = ZeroMode { unmap: true, fast_only: false };
        if self.is_raw_data() {
            data.write_zeroes(range, mode.unwrap_or(unmap)).await
        } else if mode.is_none_or(|mode| mode.unmap) && data.limits().grows_zeroed {
            let present = range.intersect(ByteRange::between(0, data.size()));
            data.discard(present).await
        } else {
            Ok(())
        }
    }

    async fn for_each_slice(
        &self,
        range: ByteRange,
        to: Become,
        below: Below,
        part_of: PartOfCompressed,
    ) -> Result<()> {
        let geometry = self.slices.geometry;
        let mut rest = range;
        while !rest.is_empty() {
            let index = geometry.slice_of(rest.offset());
            // Where there is no L2 table and nothing below, all is zero already: pass over the whole table.
            if below == Below::Zeroes && self.l2_table(index)?.is_none() {
                let next_table = ((geometry.l1_of(index) as u64) + 1) << geometry.slices_bits;
                rest = rest.skip(geometry.guest_of(next_table) - rest.offset());
                continue;
            }
            let part = rest.prefix(geometry.guest_of(index + 1) - rest.offset());
            rest = rest.skip(part.len());
            let slice = self.writable_slice(index).await?;
            let first = part.offset() >> self.cluster_bits;
            let count = ((part.end() - 1) >> self.cluster_bits) - first + 1;
            let _lock = self.lock_clusters(first, count).await;
            for cluster in first..first + count {
                let bounds = ByteRange::new(cluster << self.cluster_bits, self.cluster_size());
                self.change(&slice, cluster, bounds.intersect(part), to, below, part_of)?;
            }
        }
        Ok(())
    }

    fn change(
        &self,
        slice: &Rc<Slice>,
        cluster: u64,
        part: ByteRange,
        to: Become,
        below: Below,
        part_of: PartOfCompressed,
    ) -> Result<()> {
        let guest = cluster << self.cluster_bits;
        let old = slice.get(self.slices.geometry.entry_of(guest));
        self.check_entry(guest, old)?;
        let whole =
            part.len() == self.cluster_size() || part.end() == self.geometry.get().size && part.offset() == guest;
        let new = if self.extended {
            match self.changed_extended(old, part, whole, to, below) {
                Some(new) => new,
                None if part_of == PartOfCompressed::Kept => old,
                None => {
                    return Err(DiskError::new(ErrorKind::Unsupported, Operation::WriteZeroes)
                        .at(part)
                        .because("part of a compressed cluster can only be zeroed by writing bytes"));
                }
            }
        } else {
            let keeps = to == Become::ZeroKeeping && old.has_host() && old.is_copied();
            match (old.state(false, 0), to) {
                (State::Absent | State::ZeroPlain, Become::Absent) => L2Entry::ABSENT,
                (State::Absent, _) if below == Below::Zeroes => old,
                _ if keeps => L2Entry { descriptor: old.host() | COPIED | ZERO, bitmap: 0 },
                (_, Become::Absent) => L2Entry::ABSENT,
                _ => L2Entry { descriptor: ZERO, bitmap: 0 },
            }
        };
        self.link(slice, cluster, new);
        Ok(())
    }

    /// The entry with some subclusters changed; `None` when that takes written bytes.
    fn changed_extended(
        &self,
        old: L2Entry,
        part: ByteRange,
        whole: bool,
        to: Become,
        below: Below,
    ) -> Option<L2Entry> {
        let all_zero = u64::from(u32::MAX) << 32;
        if whole {
            let keeps = to == Become::ZeroKeeping && old.has_host() && old.is_copied();
            return Some(match to {
                _ if keeps => L2Entry { descriptor: old.host() | COPIED, bitmap: all_zero },
                Become::Absent => L2Entry::ABSENT,
                _ if below == Below::Zeroes && old == L2Entry::ABSENT => old,
                _ => L2Entry { descriptor: 0, bitmap: all_zero },
            });
        }
        let unit_bits = self.cluster_bits - 5;
        let first = (part.offset() >> unit_bits) as u32 % SUBCLUSTERS;
        // The end may be cut by the disk's end, inside a subcluster.
        let count = (part.len().div_ceil(1 << unit_bits)) as u32;
        let mask = u64::from(bits(first, count));
        if old.is_compressed() {
            return None; // Only the whole cluster can change its form.
        }
        let zero = if to == Become::Absent { old.bitmap & !(mask << 32) } else { old.bitmap | mask << 32 };
        let bitmap = zero & !mask;
        // The cluster goes with its last subcluster.
        let keeps = to == Become::ZeroKeeping || bitmap as u32 != 0;
        Some(L2Entry { descriptor: if keeps { old.descriptor } else { 0 }, bitmap })
    }
}
