//! Compressed clusters: reading them, and packing new ones one behind the other.

use super::codec::decode_cluster;
use super::entry::{CompressedAt, L2Entry};
use super::fault::Fault;
use super::image::Image;
use disk::{Buf, ByteRange, DiskError, Result};
use futures_util::stream::{FuturesOrdered, StreamExt};
use std::collections::VecDeque;
use std::rc::Rc;

/// Decompressed clusters kept, so that small reads one behind the other decompress once.
const DECODED_MAX: usize = 4;

/// Bytes that are decompressed in one go by one worker.
const PORTION: u64 = 256 << 10;
/// Up to this many bytes are decompressed where they are asked for: a fraction of a millisecond, about what it takes to
/// hand them to a worker and to be woken.
const IN_PLACE: u64 = 64 << 10;

/// Compressed bytes in a row in the image.
struct Stored {
    offset: u64,
    end: u64,
}

/// A compressed cluster and where it is decompressed to.
struct Encoded {
    /// Its place among those read together.
    number: usize,
    guest: u64,
    /// Where its stored bytes stand, and how many there are at most.
    offset: u64,
    len: u64,
    /// Which row they are in.
    run: usize,
    /// Where in the cluster `out` begins.
    within: usize,
    out: Buf,
}

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
        let range = ByteRange::new(offset, buf.len() as u64);
        let cluster_size = self.cluster_size();
        if range.align_out(cluster_size).len() == cluster_size && range.len() < cluster_size {
            // Likely one of several small reads.
            let mut buf = buf;
            let within = (offset & (cluster_size - 1)) as usize;
            let bytes = self.decoded_cluster(offset).await?;
            buf.copy_from_slice(&bytes[within..within + range.len() as usize]);
            return Ok(buf);
        }
        // Portions are decompressed at the same time. After a failure those that were begun are awaited.
        let portion = PORTION.max(cluster_size);
        let mut portions = FuturesOrdered::new();
        let (mut rest, mut bytes) = (range, buf);
        while !rest.is_empty() {
            let part = rest.prefix((rest.offset() / portion + 1) * portion - rest.offset());
            portions.push_back(self.read_portion(part, bytes.split_to(part.len() as usize)));
            rest = rest.skip(part.len());
        }
        let mut whole: Option<Buf> = None;
        let mut failure = None;
        while let Some(read) = portions.next().await {
            match (read, whole.take()) {
                (Ok(bytes), Some(front)) => whole = Some(front.join(bytes)),
                (Ok(bytes), None) => whole = Some(bytes),
                (Err(error), front) => {
                    whole = front;
                    failure = failure.or(Some(error));
                }
            }
        }
        match (failure, whole) {
            (Some(error), _) => Err(error),
            (None, whole) => Ok(whole.unwrap_or(bytes)),
        }
    }

    /// Fills `buf` from some neighbouring clusters: their stored bytes, which mostly stand in a row, are read together,
    /// and decompressed in one go.
    async fn read_portion(&self, range: ByteRange, buf: Buf) -> Result<Buf> {
        let cluster_size = self.cluster_size();
        let mut stored: Vec<Stored> = Vec::new();
        let mut pieces: Vec<Encoded> = Vec::new();
        let (mut rest, mut buf) = (range, buf);
        let mut done: Vec<(usize, Buf)> = Vec::new();
        let mut count = 0;
        while !rest.is_empty() {
            let guest = rest.offset();
            let within = (guest & (cluster_size - 1)) as usize;
            let part = rest.prefix(cluster_size - within as u64);
            let mut out = buf.split_to(part.len() as usize);
            rest = rest.skip(part.len());
            let number = count;
            count += 1;
            match self.stored_cluster(guest).await? {
                Some((offset, len)) => {
                    let end = offset + len;
                    match stored.last_mut() {
                        // The last sector of one cluster's bytes is the first of the next one's.
                        Some(run) if (run.offset..=run.end).contains(&offset) && end - run.offset <= 2 * PORTION => {
                            run.end = run.end.max(end);
                        }
                        _ => stored.push(Stored { offset, end }),
                    }
                    pieces.push(Encoded { number, guest, offset, len, run: stored.len() - 1, within, out });
                }
                None => {
                    // Rewritten meanwhile.
                    let bytes = self.decoded_cluster(guest).await?;
                    let len = out.len();
                    out.copy_from_slice(&bytes[within..within + len]);
                    done.push((number, out));
                }
            }
        }
        let mut runs = Vec::with_capacity(stored.len());
        for run in stored {
            runs.push((run.offset, self.storage.read_new(run.offset, (run.end - run.offset) as usize).await?));
        }
        let compression = self.header.borrow().compression;
        let work = move || {
            let mut outs = Vec::with_capacity(pieces.len());
            for Encoded { number, guest, offset, len, run, within, mut out } in pieces {
                let (start, bytes) = &runs[run];
                let from = (offset - start) as usize;
                let encoded = &bytes[from..from + len as usize];
                let decoded = if out.len() as u64 == cluster_size {
                    decode_cluster(compression, encoded, &mut out)
                } else {
                    let mut cluster = vec![0; cluster_size as usize];
                    let decoded = decode_cluster(compression, encoded, &mut cluster);
                    let len = out.len();
                    out.copy_from_slice(&cluster[within..within + len]);
                    decoded
                };
                decoded.ok_or(Fault::Compressed { guest, offset })?;
                outs.push((number, out));
            }
            Ok::<_, Fault>(outs)
        };
        let decoded = if range.len() > IN_PLACE { self.workers.run(work).await } else { work() };
        done.extend(decoded.map_err(|fault| DiskError::from(fault).on(self.storage.name()))?);
        done.sort_by_key(|(number, _)| *number);
        Ok(done.into_iter().map(|(_, piece)| piece).reduce(Buf::join).unwrap_or(buf))
    }

    /// Where the compressed bytes of a guest's cluster stand, and how many there are at most; `None` when it is not
    /// compressed any more.
    async fn stored_cluster(&self, guest: u64) -> Result<Option<(u64, u64)>> {
        let fault = |offset| DiskError::from(Fault::Compressed { guest, offset }).on(self.storage.name());
        let slice = self.slice(self.slices.geometry.slice_of(guest)).await?.ok_or_else(|| fault(0))?;
        let entry = slice.get(self.slices.geometry.entry_of(guest));
        if !entry.is_compressed() {
            return Ok(None);
        }
        let CompressedAt { offset, len } = CompressedAt::decode(entry.descriptor, self.cluster_bits);
        if len > 2 * self.cluster_size() || self.data_file.is_some() {
            return Err(fault(offset));
        }
        Ok(Some((offset, len)))
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
        let compression = self.header.borrow().compression;
        let cluster_size = self.cluster_size();
        let work = move || {
            let mut bytes = vec![0; cluster_size as usize];
            decode_cluster(compression, &encoded, &mut bytes).map(|()| bytes)
        };
        let bytes = if cluster_size > IN_PLACE { self.workers.run(work).await } else { work() };
        let bytes: Rc<[u8]> = bytes.ok_or_else(|| fault(offset))?.into();
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
        if let Err(error) = self.storage.write(offset, Buf::copy_of(encoded)).await {
            // The references that the piece took are given back at the close, and nothing is packed behind it.
            let clusters = (offset >> self.cluster_bits)..=((offset + len - 1) >> self.cluster_bits);
            self.forget_packing(clusters.clone());
            self.allocator()?.given_up.borrow_mut().extend(clusters);
            return Err(error);
        }
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
