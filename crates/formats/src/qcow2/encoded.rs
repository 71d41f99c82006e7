//! Compressed clusters: reading them, and packing new ones one behind the other.

use super::codec::decode_cluster;
use super::entry::{CompressedAt, L2Entry};
use super::fault::Fault;
use super::image::Image;
use disk::{Buf, ByteRange, DiskError, Result};
use std::collections::VecDeque;
use std::rc::Rc;

/// Decompressed clusters kept, so that small reads one behind the other decompress once.
const DECODED_MAX: usize = 4;

/// Clusters decompressed lately, by descriptor. Cleared whenever compressed bytes are written or unlinked, so a
/// descriptor means the same bytes as long as it is here.
#[derive(Debug, Default)]
pub(super) struct Decoded(VecDeque<(u64, Rc<[u8]>)>);

impl Decoded {
    fn get(&self, descriptor: u64) -> Option<Rc<[u8]>> {
        self.0.iter().find(|(held, _)| *held == descriptor).map(|(_, bytes)| Rc::clone(bytes))
    }

    fn put(&mut self, descriptor: u64, bytes: Rc<[u8]>) {
        if self.0.len() == DECODED_MAX {
            self.0.pop_front();
        }
        self.0.push_back((descriptor, bytes));
    }

    pub(super) fn clear(&mut self) {
        self.0.clear();
    }
}

/// Where the next compressed bytes go: `next..end` is the rest of the last cluster taken for such. Forgotten as
/// soon as bytes in that cluster are unlinked, because the cluster may then be freed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Packing {
    next: u64,
    end: u64,
}

impl Image {
    /// Fills `buf` with the guest's bytes from `offset`, which stand in compressed clusters.
    pub(super) async fn read_compressed(&self, offset: u64, buf: Buf) -> Result<Buf> {
        let mut buf = buf;
        let range = ByteRange::new(offset, buf.len() as u64);
        let mut rest = range;
        while !rest.is_empty() {
            let cluster_size = self.cluster_size();
            let within = (rest.offset() & (cluster_size - 1)) as usize;
            let part = rest.prefix(cluster_size - within as u64);
            let bytes = self.decoded_cluster(rest.offset()).await?;
            let at = (rest.offset() - offset) as usize;
            buf[at..at + part.len() as usize].copy_from_slice(&bytes[within..within + part.len() as usize]);
            rest = rest.skip(part.len());
        }
        Ok(buf)
    }

    async fn decoded_cluster(&self, guest: u64) -> Result<Rc<[u8]>> {
        let fault = |offset| DiskError::from(Fault::Compressed { guest, offset }).on(self.storage.name());
        let slice = self.slice(self.slices.geometry.slice_of(guest)).await?.ok_or_else(|| fault(0))?;
        let entry = slice.get(self.slices.geometry.entry_of(guest));
        let CompressedAt { offset, len } = CompressedAt::decode(entry.descriptor, self.cluster_bits);
        if !entry.is_compressed() {
            // The cluster was rewritten between the caller's `map` and now: the guest wrote and read the same
            // bytes at the same time, and the new ones will do.
            let host = entry.host();
            if entry.has_host() {
                let bytes = self.data_storage().1.read_new(host, self.cluster_size() as usize).await?;
                return Ok(bytes.to_vec().into());
            }
            return Ok(vec![0; self.cluster_size() as usize].into());
        }
        if let Some(bytes) = self.decoded.borrow().get(entry.descriptor) {
            return Ok(bytes);
        }
        if len > 2 * self.cluster_size() || self.data_file.is_some() {
            return Err(fault(offset));
        }
        let encoded = self.storage.read_new(offset, len as usize).await?;
        let mut bytes = vec![0; self.cluster_size() as usize];
        let compression = self.header.borrow().compression;
        decode_cluster(compression, &encoded, &mut bytes).ok_or_else(|| fault(offset))?;
        let bytes: Rc<[u8]> = bytes.into();
        // Only if it still means the same.
        if slice.get(self.slices.geometry.entry_of(guest)) == entry {
            self.decoded.borrow_mut().put(entry.descriptor, Rc::clone(&bytes));
        }
        Ok(bytes)
    }

    /// Stores one cluster in compressed form.
    ///
    /// Crash: as for other new clusters: the bytes are written before the entry is linked in memory, and synced
    /// before it is on the storage.
    pub(super) async fn write_compressed(&self, range: ByteRange, encoded: &[u8]) -> Result<()> {
        self.prepare_for_writing().await?;
        let slice = self.writable_slice(self.slices.geometry.slice_of(range.offset())).await?;
        let cluster = range.offset() >> self.cluster_bits;
        let _lock = self.lock_clusters(cluster, 1).await;
        let len = encoded.len() as u64;
        let offset = self.pack(len).await?;
        let descriptor = CompressedAt::encode(offset, len, self.cluster_bits)
            .ok_or_else(|| DiskError::from(Fault::Compressed { guest: range.offset(), offset }))?;
        self.storage.write(offset, Buf::copy_of(encoded)).await?;
        self.decoded.borrow_mut().clear();
        self.link(&slice, cluster, L2Entry { descriptor, bitmap: 0 });
        self.refuse_if_poisoned()
    }

    /// Space for so many bytes; every cluster that it touches counts one reference more.
    async fn pack(&self, len: u64) -> Result<u64> {
        let allocator = self.allocator()?;
        let _one = self.packing_one.lock().await;
        if let Some(offset) = self.pack_into_open(len, None).await? {
            return Ok(offset);
        }
        if allocator.refcounts.needs_flush() {
            self.flush_all().await?;
        }
        let first = allocator.allocate(1, &self.epochs).await?.first;
        if let Some(offset) = self.pack_into_open(len, Some(first)).await? {
            return Ok(offset);
        }
        let next = first << self.cluster_bits;
        self.packing.set(Packing { next: next + len, end: next + self.cluster_size() });
        Ok(next)
    }

    /// Space in the open cluster, going on into `more` where that follows it. `None` when there is no room.
    async fn pack_into_open(&self, len: u64, more: Option<u64>) -> Result<Option<u64>> {
        let refcounts = &self.allocator()?.refcounts;
        let open = self.packing.get().end >> self.cluster_bits;
        if open == 0 {
            return Ok(None);
        }
        let page = refcounts.page(open - 1).await?;
        // No waiting from here on, so that the cluster cannot be unlinked between the look and the reference.
        let Packing { next, end } = self.packing.get();
        let added = if more == Some(open) { self.cluster_size() } else { 0 };
        let (Some(page), true) = (page, end >> self.cluster_bits == open && next < end && len <= end - next + added)
        else {
            return Ok(None);
        };
        let count = refcounts.get(&page, open - 1);
        // A cluster whose count is at its greatest value takes no further bytes.
        if count == 0 || count == refcounts.max() {
            return Ok(None);
        }
        refcounts.set(&page, open - 1, count + 1);
        self.packing.set(Packing { next: next + len, end: end + added });
        Ok(Some(next))
    }

    /// Compressed bytes in these clusters were unlinked.
    pub(super) fn forget_packing(&self, clusters: std::ops::RangeInclusive<u64>) {
        if clusters.contains(&((self.packing.get().end >> self.cluster_bits).wrapping_sub(1))) {
            self.packing.set(Packing::default());
        }
    }
}
