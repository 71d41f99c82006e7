//! The table of internal snapshots. Specification: "Snapshots".

use super::extensions::{be16, be32, be64};
use super::{Corruption, Header, Table};
use disk::{DiskError, ErrorKind, Operation, Result, StorageHandle};
use std::borrow::Cow;

/// Largest snapshot table in bytes (QEMU's bound).
const MAX_SNAPSHOT_TABLE_BYTES: u64 = 64 << 20;
/// Most extra data of an entry in bytes (QEMU's bound).
const MAX_SNAPSHOT_EXTRA: u32 = 1024;
/// Extra data that version 3 demands: state size and disk size.
const V3_EXTRA: u32 = 16;
/// Bytes of an entry's fixed part.
const FIXED: usize = 40;
/// Largest entry: fixed part, extra data, ID and name, padding.
const MAX_ENTRY: usize = FIXED + MAX_SNAPSHOT_EXTRA as usize + 2 * 0xffff + 8;
/// Bytes read at a time.
const CHUNK: usize = 256 << 10;

/// One internal snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// Where its L1 table begins; a multiple of the cluster size.
    pub l1_offset: u64,
    /// Entries of its L1 table.
    pub l1_entries: u32,
    /// Unique ID as stored, at most 65535 bytes.
    pub id: Vec<u8>,
    /// Name as stored, at most 65535 bytes.
    pub name: Vec<u8>,
    /// When it was taken, in seconds since the epoch.
    pub date_seconds: u32,
    /// Rest of that time in nanoseconds.
    pub date_nanoseconds: u32,
    /// How long the guest had been running, in nanoseconds.
    pub vm_clock_nanoseconds: u64,
    /// Bytes of the saved machine state; 0 when there is none.
    pub vm_state_size: u64,
    /// Size of the guest's disk in bytes; not stored in old images, where it is the present size.
    pub disk_size: Option<u64>,
    /// Instruction count of record/replay.
    pub icount: Option<u64>,
    /// Extra data as stored; the fields above that stand in it win at encoding.
    pub extra: Vec<u8>,
}

impl Snapshot {
    /// The ID for people.
    pub fn id_text(&self) -> Cow<'_, str> {
        String::from_utf8_lossy(&self.id)
    }

    /// The name for people.
    pub fn name_text(&self) -> Cow<'_, str> {
        String::from_utf8_lossy(&self.name)
    }

    /// Size of the guest's disk in bytes in this snapshot.
    pub fn disk_size_or(&self, present: u64) -> u64 {
        self.disk_size.unwrap_or(present)
    }

    /// Checks the disk's size at the snapshot, before somebody shows a disk of it.
    ///
    /// # Errors
    /// A size that no L1 table of the format can map.
    pub fn validate_size(&self, header: &Header) -> std::result::Result<(), Corruption> {
        let size = self.disk_size_or(header.size);
        let needed = header.l1_entries_for(size).saturating_mul(8);
        if needed > super::MAX_L1_BYTES {
            return Err(Corruption::TableTooLarge { table: Table::SnapshotL1, size: needed, max: super::MAX_L1_BYTES });
        }
        Ok(())
    }

    /// Checks the place and size of the L1 table, before somebody reads it.
    ///
    /// # Errors
    /// A table that is unaligned, too large, or outside of a file of `file_size` bytes.
    pub fn validate_l1(&self, header: &Header, file_size: u64) -> std::result::Result<(), Corruption> {
        let (table, offset, size) = (Table::SnapshotL1, self.l1_offset, 8 * u64::from(self.l1_entries));
        if size > super::MAX_L1_BYTES {
            return Err(Corruption::TableTooLarge { table, size, max: super::MAX_L1_BYTES });
        }
        if offset & (header.cluster_size() - 1) != 0 {
            return Err(Corruption::TableUnaligned { table, offset });
        }
        if size > 0 && offset == 0 {
            return Err(Corruption::TableInHeader { table });
        }
        match offset.checked_add(size) {
            Some(end) if end.div_ceil(header.cluster_size()) <= file_size.div_ceil(header.cluster_size()) => Ok(()),
            _ => Err(Corruption::TableBeyondEnd { table, offset, size, end: file_size }),
        }
    }

    /// Appends the entry as it is stored.
    fn encode(&self, out: &mut Vec<u8>) -> Result<()> {
        let length = |bytes: &[u8], what: &str| {
            u16::try_from(bytes.len()).map_err(|_| {
                DiskError::new(ErrorKind::Invalid, Operation::Write)
                    .because(format!("a snapshot's {what} has {} bytes, expected at most 65535", bytes.len()))
            })
        };
        let (id_len, name_len) = (length(&self.id, "id")?, length(&self.name, "name")?);
        let mut extra = self.extra.clone();
        let fields = [Some(self.vm_state_size), self.disk_size, self.icount];
        for (index, field) in fields.into_iter().enumerate() {
            // A state size that the short field holds needs no extra data.
            let needed = if index == 0 { self.vm_state_size > u64::from(u32::MAX) } else { field.is_some() };
            let at = 8 * index;
            if needed && extra.len() < at + 8 {
                extra.resize(at + 8, 0);
            }
            if let Some(value) = field
                && extra.len() >= at + 8
            {
                extra[at..at + 8].copy_from_slice(&value.to_be_bytes());
            }
        }
        out.extend(self.l1_offset.to_be_bytes());
        out.extend(self.l1_entries.to_be_bytes());
        out.extend(id_len.to_be_bytes());
        out.extend(name_len.to_be_bytes());
        out.extend(self.date_seconds.to_be_bytes());
        out.extend(self.date_nanoseconds.to_be_bytes());
        out.extend(self.vm_clock_nanoseconds.to_be_bytes());
        // Too large for the short field: readers of the long one ignore it, others must not see a wrong size.
        out.extend(u32::try_from(self.vm_state_size).unwrap_or(0).to_be_bytes());
        out.extend((extra.len() as u32).to_be_bytes());
        out.extend(extra);
        out.extend(&self.id);
        out.extend(&self.name);
        out.resize(out.len().next_multiple_of(8), 0);
        Ok(())
    }

    /// Parses the entry at the beginning of `bytes`; `None` when it reaches beyond. Returns its length without
    /// the padding.
    fn parse(bytes: &[u8], index: u32) -> std::result::Result<Option<(Self, usize)>, Corruption> {
        if bytes.len() < FIXED {
            return Ok(None);
        }
        let (id_len, name_len) = (usize::from(be16(bytes, 12)), usize::from(be16(bytes, 14)));
        let extra_len = be32(bytes, 36);
        if extra_len > MAX_SNAPSHOT_EXTRA {
            return Err(Corruption::SnapshotExtraTooLarge { index, size: extra_len });
        }
        let id_at = FIXED + extra_len as usize;
        let end = id_at + id_len + name_len;
        if bytes.len() < end {
            return Ok(None);
        }
        let extra = &bytes[FIXED..id_at];
        let field = |at: usize| (extra.len() >= at + 8).then(|| be64(extra, at));
        let snapshot = Self {
            l1_offset: be64(bytes, 0),
            l1_entries: be32(bytes, 8),
            id: bytes[id_at..id_at + id_len].to_vec(),
            name: bytes[id_at + id_len..end].to_vec(),
            date_seconds: be32(bytes, 16),
            date_nanoseconds: be32(bytes, 20),
            vm_clock_nanoseconds: be64(bytes, 24),
            vm_state_size: field(0).unwrap_or_else(|| u64::from(be32(bytes, 32))),
            disk_size: field(8),
            icount: field(16),
            extra: extra.to_vec(),
        };
        Ok(Some((snapshot, end)))
    }
}

/// All internal snapshots of an image, in the order of the table.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SnapshotTable {
    /// The snapshots.
    pub snapshots: Vec<Snapshot>,
    /// Bytes that the table takes in the file.
    pub size: u64,
}

impl SnapshotTable {
    /// Reads the table that the header names. Memory is bounded by 64 MiB and the entries' own size.
    ///
    /// # Errors
    /// `Corrupt` when an entry reaches beyond the end of the file or a bound.
    pub async fn read(storage: &StorageHandle, header: &Header) -> Result<Self> {
        let mut table = Self::default();
        let file_size = storage.size();
        let start = header.snapshots_offset;
        let end = file_size.min(start.saturating_add(MAX_SNAPSHOT_TABLE_BYTES));
        let mut window: Vec<u8> = Vec::new(); // The file's bytes from `at` on.
        let mut at = start;
        for index in 0..header.snapshot_count {
            let (snapshot, len) = loop {
                match Snapshot::parse(&window, index).map_err(|e| DiskError::from(e).on(storage.name()))? {
                    Some(found) => break found,
                    None => {
                        let have = at.saturating_add(window.len() as u64);
                        let more = end.saturating_sub(have).min(CHUNK as u64) as usize;
                        if more == 0 {
                            let error = Corruption::SnapshotEntryBeyondEnd { index };
                            return Err(DiskError::from(error).on(storage.name()));
                        }
                        window.extend_from_slice(&storage.read_new(have, more).await?);
                        debug_assert!(window.len() <= MAX_ENTRY + CHUNK);
                    }
                }
            };
            let padded = len.next_multiple_of(8);
            window.drain(..padded.min(window.len()));
            at += padded as u64;
            table.size = at - start;
            table.snapshots.push(snapshot);
        }
        Ok(table)
    }

    /// The table as it is stored.
    ///
    /// # Errors
    /// `Invalid` when a name, the number of snapshots or the table is too large.
    pub fn encode(&self) -> Result<Vec<u8>> {
        let mut out = Vec::new();
        for snapshot in &self.snapshots {
            snapshot.encode(&mut out)?;
        }
        if out.len() as u64 > MAX_SNAPSHOT_TABLE_BYTES || self.snapshots.len() > super::MAX_SNAPSHOTS as usize {
            return Err(DiskError::new(ErrorKind::Invalid, Operation::Write).because(format!(
                "{} snapshots in a table of {} bytes are more than the bounds of 65536 and 64 MiB",
                self.snapshots.len(),
                out.len()
            )));
        }
        Ok(out)
    }

    /// The entries of a version 3 image that lack the extra data which the format demands.
    pub(super) fn incomplete_entries(&self) -> impl Iterator<Item = Corruption> {
        let lacking = self.snapshots.iter().enumerate().filter(|(_, s)| s.extra.len() < V3_EXTRA as usize);
        lacking.map(|(index, s)| Corruption::SnapshotExtraTooSmall { index: index as u32, size: s.extra.len() as u32 })
    }

    /// Gives every entry the extra data that version 3 demands.
    pub(super) fn complete_entries(&mut self, disk_size: u64) {
        for snapshot in self.snapshots.iter_mut().filter(|s| s.extra.len() < V3_EXTRA as usize) {
            snapshot.disk_size.get_or_insert(disk_size);
            snapshot.extra.resize(V3_EXTRA as usize, 0);
        }
    }

    /// Finds a snapshot by its ID, else by its name.
    pub fn find(&self, id_or_name: &str) -> Option<&Snapshot> {
        let wanted = id_or_name.as_bytes();
        self.snapshots.iter().find(|s| s.id == wanted).or_else(|| self.snapshots.iter().find(|s| s.name == wanted))
    }
}
