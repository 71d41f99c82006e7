//! Reading the mapping: where the guest's bytes are.

use super::entry::{CompressedAt, State};
use super::image::Image;
use super::slices::Slice;
use disk::{ByteRange, LayerExtent, Presence, Result};

impl Image {
    /// The first extent of the range, when its slice is in memory and sound.
    #[inline]
    pub(super) fn map_in_memory(&self, range: ByteRange) -> Option<LayerExtent> {
        if self.suspicious.get() {
            return None;
        }
        self.slices.with(self.slices.geometry.slice_of(range.offset()), |slice| self.extent_in(slice, range))
    }

    /// The first extent of the range.
    pub(super) async fn map_loading(&self, range: ByteRange) -> Result<LayerExtent> {
        let index = self.slices.geometry.slice_of(range.offset());
        match self.slice(index).await? {
            Some(slice) => {
                if self.suspicious.get() {
                    // One cluster at a time, each checked.
                    let cluster = ByteRange::new(range.offset() & !(self.cluster_size() - 1), self.cluster_size());
                    self.check_entry(range.offset(), slice.get(self.slices.geometry.entry_of(range.offset())))?;
                    return Ok(self.extent_in(&slice, range.intersect(cluster)));
                }
                Ok(self.extent_in(&slice, range))
            }
            // No L2 table: absent up to the end of what this L1 entry covers.
            None => {
                let geometry = self.slices.geometry;
                let next_table = ((geometry.l1_of(index) as u64) + 1) << geometry.slices_bits;
                let end = geometry.guest_of(next_table);
                Ok(LayerExtent { range: range.prefix(end - range.offset()), presence: Presence::Absent })
            }
        }
    }

    /// The first extent of the range, cut at the end of the slice.
    fn extent_in(&self, slice: &Slice, range: ByteRange) -> LayerExtent {
        let geometry = self.slices.geometry;
        let cluster_size = self.cluster_size();
        let unit_bits = if self.extended { self.cluster_bits - 5 } else { self.cluster_bits };
        let within = range.offset() & (cluster_size - 1);
        let mut at = geometry.entry_of(range.offset());
        let mut sub = (within >> unit_bits) as u32;
        let first = slice.get(at);
        let state = first.state(self.extended, sub);
        let presence = match state {
            State::Data => Presence::Data { storage: self.data_storage().0, offset: first.host() + within },
            State::ZeroPlain => Presence::Zero { allocated: false },
            State::ZeroAllocated => Presence::Zero { allocated: true },
            State::Absent | State::AbsentAllocated => Presence::Absent,
            State::Compressed => {
                let offset = CompressedAt::decode(first.descriptor, self.cluster_bits).offset;
                // The whole run, so that its clusters are read and decompressed together.
                let run = (at + 1..slice.entries()).take_while(|at| slice.get(*at).is_compressed()).count() as u64;
                let range = range.prefix(((run + 1) << self.cluster_bits) - within);
                return LayerExtent { range, presence: Presence::Encoded { offset } };
            }
        };
        // Follow the run of equal units, for data as long as the host offsets go on in a row.
        let mut end = ((range.offset() >> unit_bits) + 1) << unit_bits;
        let mut host = first.host();
        while end < range.end() {
            sub += 1;
            if !self.extended || sub == super::entry::SUBCLUSTERS {
                sub = 0;
                at += 1;
                host += cluster_size;
                if at == slice.entries() {
                    break;
                }
            }
            let entry = slice.get(at);
            let next = entry.state(self.extended, sub);
            let continues = match (state, next) {
                (State::Data, State::Data) => entry.host() == host,
                (State::Absent | State::AbsentAllocated, State::Absent | State::AbsentAllocated) => true,
                _ => next == state,
            };
            if !continues {
                break;
            }
            end += 1 << unit_bits;
        }
        LayerExtent { range: range.prefix(end - range.offset()), presence }
    }
}
