//! Changing the size of the guest's disk.

use super::entry::OFFSET_MASK;
use super::image::Image;
use super::{Invalidate, header};
use disk::{Below, Buf, ByteRange, DiskError, ErrorKind, Operation, Preallocation, Result, ZeroMode};

/// Guest bytes prepared at a time.
const PREALLOCATE_STEP: u64 = 64 << 20;

impl Image {
    /// Grows or shrinks the disk.
    ///
    /// Crash, growing: a larger L1 table is written, counted and synced before the header's first sector switches
    /// to it together with its length; the new size is written after that. Shrinking: what is cut
    /// off is discarded and flushed before the size is written, so a crash between leaves the old size, with zeroes in
    /// what was to be cut off.
    pub(super) async fn change_size(&self, size: u64, preallocation: Preallocation) -> Result<()> {
        let refuse =
            |kind, why: String| Err(DiskError::new(kind, Operation::Resize).on(self.storage.name()).because(why));
        let header = self.header();
        let old = header.size;
        if size > i64::MAX as u64 {
            return refuse(ErrorKind::OutOfRange, format!("{size} bytes are more than a file can hold"));
        }
        if size % 512 != 0 {
            return refuse(ErrorKind::Invalid, format!("the new size {size} is not a multiple of 512 bytes"));
        }
        if header.snapshot_count > 0 && (size < old || header.version < 3) {
            return refuse(
                ErrorKind::Unsupported,
                "the image has internal snapshots that do not know another size; delete them first".to_owned(),
            );
        }
        let entries = header.l1_entries_for(size);
        if entries > header::MAX_L1_BYTES / 8 {
            return refuse(ErrorKind::OutOfRange, format!("{size} bytes need an L1 table of more than 32 MiB"));
        }
        if size == old {
            return Ok(());
        }
        self.prepare_for_writing().await?;
        let invalidated = self.invalidate_bitmaps(Invalidate::All).await;
        self.poison_on_error(invalidated)?;
        if size < old {
            if preallocation != Preallocation::Off {
                return refuse(ErrorKind::Invalid, "space can only be set aside when the disk grows".to_owned());
            }
            self.cut_off(size, old).await?;
        } else if entries > self.l1.borrow().len() as u64 {
            let grown = self.grow_l1(entries as usize).await;
            self.poison_on_error(grown)?;
        }
        self.flush_all().await?;
        let written = self.write_size(size).await;
        self.poison_on_error(written)?;
        if size > old && preallocation != Preallocation::Off {
            self.preallocate(ByteRange::between(old, size), preallocation).await?;
        }
        Ok(())
    }

    /// Header bytes 24–31, durable.
    async fn write_size(&self, size: u64) -> Result<()> {
        self.storage.write(24, Buf::copy_of(&size.to_be_bytes())).await?;
        self.storage.sync().await?;
        self.header.borrow_mut().size = size;
        let mut geometry = self.geometry.get();
        geometry.size = size;
        self.geometry.set(geometry);
        if self.is_raw_data()
            && let Some(data) = &self.data_file
        {
            data.set_size(size).await?;
        }
        Ok(())
    }

    /// Unlinks what lies wholly beyond the new size, L2 tables included.
    async fn cut_off(&self, size: u64, old: u64) -> Result<()> {
        let start = size.next_multiple_of(self.cluster_size());
        if start < old {
            // Nothing below shows: what is cut off is out of reach.
            self.discard_units(ByteRange::between(start, old), Below::Zeroes).await?;
        }
        let first = self.header.borrow().l1_entries_for(size) as usize;
        let last = self.l1.borrow().len();
        // The slices are written once more, empty, before their tables go.
        self.flush_all().await?;
        let _one = self.making_table.lock().await;
        for index in first..last {
            let entry = self.l1.borrow()[index];
            if entry & OFFSET_MASK != 0 {
                let cluster = (entry & OFFSET_MASK) >> self.cluster_bits;
                self.set_l1(index, 0);
                self.slices.forget_table(index);
                self.allocator()?.metadata.borrow_mut().remove(&cluster);
                self.unlinked.borrow_mut().push(cluster);
            }
        }
        Ok(())
    }

    /// Moves the L1 table to a larger place.
    async fn grow_l1(&self, entries: usize) -> Result<()> {
        let allocator = self.allocator()?;
        let clusters = (entries as u64 * 8).div_ceil(self.cluster_size());
        let first = allocator.allocate_table(clusters).await?;
        // Everything that the old table refers to is on the storage; then nobody changes it until the switch.
        let _one = self.making_table.lock().await;
        self.flush_all().await?;
        let mut table = Buf::zeroed((clusters * self.cluster_size()) as usize);
        {
            let l1 = self.l1.borrow();
            for (bytes, entry) in table.as_chunks_mut::<8>().0.iter_mut().zip(l1.iter()) {
                *bytes = entry.to_be_bytes();
            }
        }
        let offset = first << self.cluster_bits;
        self.storage.write(offset, table).await?;
        self.storage.sync().await?;
        // Header bytes 36–47: l1_size, l1_table_offset.
        let mut fields = Vec::with_capacity(12);
        fields.extend_from_slice(&(entries as u32).to_be_bytes());
        fields.extend_from_slice(&offset.to_be_bytes());
        self.storage.write(36, Buf::copy_of(&fields)).await?;
        self.storage.sync().await?;
        let (old_offset, old_clusters) = {
            let mut header = self.header.borrow_mut();
            let old = (header.l1_offset, header.l1_bytes().div_ceil(self.cluster_size()));
            header.l1_offset = offset;
            header.l1_entries = entries as u32;
            old
        };
        self.l1.borrow_mut().resize(entries, 0);
        self.slices.resize(entries);
        let old_first = old_offset >> self.cluster_bits;
        for cluster in old_first..old_first + old_clusters {
            allocator.metadata.borrow_mut().remove(&cluster);
            allocator.release(cluster).await?;
        }
        Ok(())
    }

    /// Sets tables, and as asked space, aside for a range that nobody wrote to yet.
    async fn preallocate(&self, range: ByteRange, preallocation: Preallocation) -> Result<()> {
        let mut rest = range;
        while !rest.is_empty() {
            let plan = self.plan_write(rest.prefix(PREALLOCATE_STEP), Below::Zeroes).await?;
            let storage = self.data_storage().1;
            let host = ByteRange::new(plan.offset, plan.range.len());
            match preallocation {
                Preallocation::Falloc => storage.allocate(host).await?,
                Preallocation::Full => write_zero_bytes(storage, host).await?,
                Preallocation::Off | Preallocation::Metadata => {
                    if plan.ticket.is_some() {
                        storage.write_zeroes(host, ZeroMode { unmap: true, fast_only: false }).await?;
                    }
                }
            }
            if let Some(ticket) = plan.ticket {
                if preallocation == Preallocation::Falloc {
                    storage.write_zeroes(host, ZeroMode::default()).await?;
                }
                self.commit(ticket.id)?;
            }
            rest = rest.skip(plan.range.len());
        }
        self.flush_all().await
    }
}

async fn write_zero_bytes(storage: &disk::StorageHandle, range: ByteRange) -> Result<()> {
    let mut rest = range;
    while !rest.is_empty() {
        let part = rest.prefix(1 << 20);
        storage.write(part.offset(), Buf::zeroed(part.len() as usize)).await?;
        rest = rest.skip(part.len());
    }
    Ok(())
}
