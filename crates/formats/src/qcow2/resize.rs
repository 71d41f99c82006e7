//! Changing the size of the guest's disk.

use super::entry::OFFSET_MASK;
use super::image::Image;
use super::{Invalidate, header};
use disk::{Below, Buf, ByteRange, DiskError, ErrorKind, Operation, Preallocation, Result, ZeroMode};

/// Guest bytes prepared at a time.
const PREALLOCATE_STEP: u64 = 64 << 20;

impl Image {
    /// Shows a larger size, which the header gets to know by `change_size` only.
    ///
    /// Crash: the old size. A larger L1 table is written, counted and synced before the header's first sector
    /// switches to it together with its length; what tables say behind the old size is out of reach.
    pub(super) async fn show_size(&self, size: u64) -> Result<()> {
        let durable = self.header.borrow().size;
        if size < durable {
            return Err(DiskError::new(ErrorKind::Invalid, Operation::Resize)
                .on(self.storage.name())
                .because(format!("{size} bytes cut off some of the disk's {durable}")));
        }
        if size > durable {
            self.prepare_growth(size).await?;
        }
        self.set_geometry(size);
        Ok(())
    }

    /// What is due before anything is put behind the disk's end.
    async fn prepare_growth(&self, size: u64) -> Result<()> {
        let entries = self.judge_size(size)?;
        self.prepare_for_writing().await?;
        let invalidated = self.invalidate_bitmaps(Invalidate::All).await;
        self.poison_on_error(invalidated)?;
        if entries > self.l1.borrow().len() as u64 {
            let grown = self.grow_l1(entries as usize).await;
            self.poison_on_error(grown)?;
        }
        Ok(())
    }

    /// Grows or shrinks the disk.
    ///
    /// Crash, growing: the old size (see `show_size`) until the header has the new one; an external data file is
    /// made as long before. Shrinking: what is cut off is discarded and flushed before the size is written, so a crash
    /// between leaves the old size, and in what was to be cut off zeroes or, over a parent, the parent's bytes.
    pub(super) async fn change_size(&self, size: u64, preallocation: Preallocation) -> Result<()> {
        let old = self.header.borrow().size;
        if size == old {
            self.judge_size(size)?;
            return Ok(());
        }
        if size > old {
            self.prepare_growth(size).await?;
            if let Some(data) = self.data_file.as_ref().filter(|data| data.size() < size && data.limits().grows_zeroed)
            {
                data.set_size(size).await?;
            }
        } else {
            self.judge_size(size)?;
            if preallocation != Preallocation::Off {
                return Err(DiskError::new(ErrorKind::Invalid, Operation::Resize)
                    .on(self.storage.name())
                    .because("space can only be set aside when the disk grows"));
            }
            self.prepare_for_writing().await?;
            let invalidated = self.invalidate_bitmaps(Invalidate::All).await;
            self.poison_on_error(invalidated)?;
            self.cut_off(size, old).await?;
        }
        self.flush_all().await?;
        let written = self.write_size(size).await;
        self.poison_on_error(written)?;
        if size > old && preallocation != Preallocation::Off {
            // Whole new clusters: a first part of one belongs to what the guest wrote before.
            let start = old.next_multiple_of(self.cluster_size()).min(size);
            self.preallocate(ByteRange::between(start, size), preallocation).await?;
        }
        Ok(())
    }

    /// Refuses sizes that the image cannot have; returns the number of L1 entries that the size needs.
    fn judge_size(&self, size: u64) -> Result<u64> {
        let refuse =
            |kind, why: String| Err(DiskError::new(kind, Operation::Resize).on(self.storage.name()).because(why));
        let header = self.header();
        let old = header.size;
        if size > i64::MAX as u64 {
            return refuse(ErrorKind::OutOfRange, format!("{size} bytes are more than a file can hold"));
        }
        if !size.is_multiple_of(512) {
            return refuse(ErrorKind::Invalid, format!("the new size {size} is not a multiple of 512 bytes"));
        }
        if header.snapshot_count > 0 && size != old && (size < old || header.version < 3) {
            return refuse(
                ErrorKind::Unsupported,
                "the image has internal snapshots, of which the format keeps no other size; delete them first \
                 (qemu-img snapshot -d NAME FILE), or convert to a new image"
                    .to_owned(),
            );
        }
        let entries = header.l1_entries_for(size);
        if entries > header::MAX_L1_BYTES / 8 {
            return refuse(ErrorKind::OutOfRange, format!("{size} bytes need an L1 table of more than 32 MiB"));
        }
        Ok(entries)
    }

    fn set_geometry(&self, size: u64) {
        let mut geometry = self.geometry.get();
        geometry.size = size;
        self.geometry.set(geometry);
    }

    /// Header bytes 24–31, durable.
    async fn write_size(&self, size: u64) -> Result<()> {
        self.storage.write(24, Buf::copy_of(&size.to_be_bytes())).await?;
        self.storage.sync().await?;
        self.header.borrow_mut().size = size;
        self.set_geometry(size);
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
        if let Err(error) = self.flush_all().await {
            allocator.give_up_table(first, clusters);
            return Err(error);
        }
        let mut table = Buf::zeroed((clusters * self.cluster_size()) as usize);
        {
            let l1 = self.l1.borrow();
            for (bytes, entry) in table.as_chunks_mut::<8>().0.iter_mut().zip(l1.iter()) {
                *bytes = entry.to_be_bytes();
            }
        }
        let offset = first << self.cluster_bits;
        if let Err(error) = self.switch_l1(entries as u32, offset, table).await {
            if error.kind() == ErrorKind::NoSpace {
                allocator.give_up_table(first, clusters);
            }
            return Err(error);
        }
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

    /// Writes an L1 table to its place and has the header lead there.
    async fn switch_l1(&self, entries: u32, offset: u64, table: Buf) -> Result<()> {
        let allocator = self.allocator()?;
        self.storage.write(offset, table).await?;
        allocator.sync().await?;
        // Header bytes 36–47: l1_size, l1_table_offset.
        let mut fields = Vec::with_capacity(12);
        fields.extend_from_slice(&entries.to_be_bytes());
        fields.extend_from_slice(&offset.to_be_bytes());
        self.storage.write(36, Buf::copy_of(&fields)).await?;
        allocator.sync().await
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
