//! The image's header: the fixed fields, the extensions, and the backing file's name.
//! Specification: "Header".

use super::extensions::{self, Extension, FeatureSet, Parsed, be32, be64};
use super::{BitmapsExtension, Corruption, Table};
use disk::{Buf, DiskError, ErrorKind, Operation, Result, StorageHandle};

/// `QFI\xfb`.
pub const MAGIC: u32 = 0x5146_49fb;
/// Smallest `cluster_bits`: 512 bytes.
pub const MIN_CLUSTER_BITS: u32 = 9;
/// Largest `cluster_bits`: 2 MiB. The format sets no bound; QEMU has this one.
pub const MAX_CLUSTER_BITS: u32 = 21;
/// Largest L1 table in bytes (QEMU's bound).
pub const MAX_L1_BYTES: u64 = 32 << 20;
/// Largest refcount table in bytes (QEMU's bound).
pub const MAX_REFCOUNT_TABLE_BYTES: u64 = 8 << 20;
/// Most snapshots (QEMU's bound).
pub const MAX_SNAPSHOTS: u32 = 65536;
/// Longest backing file name in bytes.
pub const MAX_BACKING_NAME: u64 = 1023;
/// Smallest `cluster_bits` with extended L2 entries.
pub const MIN_EXTENDED_L2_CLUSTER_BITS: u32 = 14;

/// Incompatible feature: the reference counts may be wrong.
pub const INCOMPATIBLE_DIRTY: u64 = 1 << 0;
/// Incompatible feature: any structure may be wrong; do not write.
pub const INCOMPATIBLE_CORRUPT: u64 = 1 << 1;
/// Incompatible feature: guest data is in another file.
pub const INCOMPATIBLE_DATA_FILE: u64 = 1 << 2;
/// Incompatible feature: clusters are compressed with something else than deflate.
pub const INCOMPATIBLE_COMPRESSION: u64 = 1 << 3;
/// Incompatible feature: L2 entries of 16 bytes with subcluster bitmaps.
pub const INCOMPATIBLE_EXTENDED_L2: u64 = 1 << 4;
/// All incompatible features that are understood.
pub const INCOMPATIBLE_KNOWN: u64 = INCOMPATIBLE_DIRTY
    | INCOMPATIBLE_CORRUPT
    | INCOMPATIBLE_DATA_FILE
    | INCOMPATIBLE_COMPRESSION
    | INCOMPATIBLE_EXTENDED_L2;
/// Compatible feature: reference counts may be written late, under the dirty bit.
pub const COMPATIBLE_LAZY_REFCOUNTS: u64 = 1 << 0;
/// Autoclear feature: the bitmaps extension is consistent.
pub const AUTOCLEAR_BITMAPS: u64 = 1 << 0;
/// Autoclear feature: the external data file is a raw image in its own right.
pub const AUTOCLEAR_RAW_DATA: u64 = 1 << 1;
/// Autoclear feature of ours, not of the specification: the history that Highwater keeps beside the image knows of all
/// writes; the header extension of type `HWHI` says which history. Who does not know the bit clears it before writing,
/// as the specification demands.
pub const AUTOCLEAR_HISTORY: u64 = 1 << 42;
/// Autoclear feature of ours, not of the specification: the id of the image's content in the header extension of type
/// `HWLI` holds.
pub const AUTOCLEAR_IDENTITY: u64 = 1 << 43;
/// All autoclear features that are understood.
pub const AUTOCLEAR_KNOWN: u64 = AUTOCLEAR_BITMAPS | AUTOCLEAR_RAW_DATA | AUTOCLEAR_HISTORY | AUTOCLEAR_IDENTITY;

/// Header length of version 2.
const V2_LENGTH: usize = 72;
/// Least header length of version 3.
const V3_LENGTH: usize = 104;
/// Header length that this implementation writes for version 3: up to the compression type and its padding.
const V3_WRITTEN: usize = 112;
/// Bytes that reach the disk whole or not at all.
const SECTOR: usize = 512;
/// Bytes read at first; most headers need no more.
pub(super) const FIRST_READ: usize = 64 << 10;

/// How clusters are compressed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Compression {
    /// Deflate without a zlib header, window of 4 KiB.
    #[default]
    Zlib,
    /// Zstandard.
    Zstd,
}

/// The reference to the backing file, as the image holds it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackingRef {
    /// Its name; relative names are relative to the image's directory.
    pub name: String,
    /// Its format, when the image says it.
    pub format: Option<String>,
}

/// A parsed header. [`Header::read`] has checked it; whoever changes a field keeps it valid.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// 2 or 3.
    pub version: u32,
    /// Size of the guest's disk in bytes.
    pub size: u64,
    /// Logarithm of the cluster size, 9..=21.
    pub cluster_bits: u32,
    /// Logarithm of the reference counts' width in bits, 0..=6; 4 in version 2.
    pub refcount_order: u32,
    /// Where the active L1 table begins; a multiple of the cluster size.
    pub l1_offset: u64,
    /// Entries of the active L1 table.
    pub l1_entries: u32,
    /// Where the refcount table begins; a multiple of the cluster size.
    pub refcount_table_offset: u64,
    /// Clusters of the refcount table.
    pub refcount_table_clusters: u32,
    /// Number of internal snapshots.
    pub snapshot_count: u32,
    /// Where the snapshot table begins; a multiple of the cluster size; without meaning without snapshots.
    pub snapshots_offset: u64,
    /// Incompatible features (`INCOMPATIBLE_*`); 0 in version 2.
    pub incompatible: u64,
    /// Compatible features (`COMPATIBLE_*`); 0 in version 2.
    pub compatible: u64,
    /// Autoclear features (`AUTOCLEAR_*`); 0 in version 2.
    pub autoclear: u64,
    /// Bytes of the fixed fields, 72 in version 2, at least 104 in version 3.
    pub header_length: u32,
    /// How clusters are compressed.
    pub compression: Compression,
    /// The backing file, if there is one.
    pub backing: Option<BackingRef>,
    /// Name of the external data file, if the image says it. Whether there is one: [`Header::has_data_file`].
    pub data_file: Option<String>,
    /// Where the persistent bitmaps are.
    pub bitmaps: Option<BitmapsExtension>,
    /// All other extensions, the feature name table among them.
    pub unknown_extensions: Vec<Extension>,
    /// Fixed fields that are not known here, from byte 105 on.
    unknown_fields: Vec<u8>,
    /// Types of the extensions in the order in which they stand, so that a header is written back as it was.
    pub(super) order: Vec<u32>,
    /// Where the backing file's name stands, for the same reason.
    pub(super) backing_offset: u64,
}

/// How strict to be at reading.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Purpose {
    Use,
    Check,
}

impl Header {
    /// A header without tables, backing file or features for a new image. Fields are set by the caller.
    pub(super) fn empty(version: u32, cluster_bits: u32, refcount_order: u32) -> Self {
        Self {
            version,
            size: 0,
            cluster_bits,
            refcount_order,
            l1_offset: 0,
            l1_entries: 0,
            refcount_table_offset: 0,
            refcount_table_clusters: 0,
            snapshot_count: 0,
            snapshots_offset: 0,
            incompatible: 0,
            compatible: 0,
            autoclear: 0,
            header_length: if version == 2 { V2_LENGTH } else { V3_WRITTEN } as u32,
            compression: Compression::Zlib,
            backing: None,
            data_file: None,
            bitmaps: None,
            unknown_extensions: Vec::new(),
            unknown_fields: Vec::new(),
            order: Vec::new(),
            backing_offset: 0,
        }
    }

    /// Reads and checks the header of an image that is to be used.
    ///
    /// # Errors
    /// `Corrupt` with a [`Corruption`] as its source; `Unsupported` for encryption, unknown versions, unknown
    /// incompatible features and compression types, by name.
    pub async fn read(storage: &StorageHandle) -> Result<Self> {
        Self::read_for(storage, Purpose::Use).await
    }

    /// Reads the header of an image that is to be checked or repaired: tables may lie beyond the file's end,
    /// and the refcount table may be missing.
    ///
    /// # Errors
    /// As [`Header::read`].
    pub async fn read_for_check(storage: &StorageHandle) -> Result<Self> {
        Self::read_for(storage, Purpose::Check).await
    }

    async fn read_for(storage: &StorageHandle, purpose: Purpose) -> Result<Self> {
        let file_size = storage.size();
        let header = async {
            let first = file_size.min(FIRST_READ as u64) as usize;
            let bytes = storage.read_new(0, first).await?;
            match Self::parse(&bytes, file_size)? {
                Some(header) => Ok(header),
                None => {
                    // At most 2 MiB: `parse` has checked the cluster size before it asks for more.
                    let whole = file_size.min(1 << be32(&bytes, 20)) as usize;
                    let bytes = storage.read_new(0, whole).await?;
                    Self::parse(&bytes, file_size)?.ok_or_else(|| {
                        DiskError::from(Corruption::HeaderTruncated { needed: whole as u64 + 8, size: file_size })
                    })
                }
            }
        };
        let header = header.await.map_err(|e| e.on(storage.name()))?;
        header.validate(file_size, purpose).map_err(|e| e.on(storage.name()))?;
        Ok(header)
    }

    /// Parses the first bytes of a file of `file_size` bytes. `None`: the header reaches beyond `bytes`.
    fn parse(bytes: &[u8], file_size: u64) -> Result<Option<Self>> {
        let truncated = |needed: usize| Corruption::HeaderTruncated { needed: needed as u64, size: file_size };
        if bytes.len() < 8 {
            return Err(truncated(V2_LENGTH).into());
        }
        if be32(bytes, 0) != MAGIC {
            return Err(Corruption::Magic { found: be32(bytes, 0) }.into());
        }
        let version = be32(bytes, 4);
        let fixed = match version {
            2 => V2_LENGTH,
            3 => V3_LENGTH,
            _ => {
                return Err(unsupported(format!("qcow2 version {version} is unknown, expected version 2 or 3")));
            }
        };
        if bytes.len() < fixed {
            return Err(truncated(fixed).into());
        }
        let cluster_bits = be32(bytes, 20);
        if !(MIN_CLUSTER_BITS..=MAX_CLUSTER_BITS).contains(&cluster_bits) {
            return Err(Corruption::ClusterBits { found: cluster_bits }.into());
        }
        let cluster_size = 1usize << cluster_bits;
        let mut header = Self {
            size: be64(bytes, 24),
            l1_entries: be32(bytes, 36),
            l1_offset: be64(bytes, 40),
            refcount_table_offset: be64(bytes, 48),
            refcount_table_clusters: be32(bytes, 56),
            snapshot_count: be32(bytes, 60),
            snapshots_offset: be64(bytes, 64),
            ..Self::empty(version, cluster_bits, 4)
        };
        let mut compression_type = 0;
        if version >= 3 {
            header.incompatible = be64(bytes, 72);
            header.compatible = be64(bytes, 80);
            header.autoclear = be64(bytes, 88);
            header.refcount_order = be32(bytes, 96);
            header.header_length = be32(bytes, 100);
            let length = header.header_length as usize;
            if length < V3_LENGTH || length > cluster_size || !length.is_multiple_of(8) {
                return Err(Corruption::HeaderLength { found: header.header_length }.into());
            }
            if length > bytes.len() {
                return if bytes.len() as u64 == file_size { Err(truncated(length).into()) } else { Ok(None) };
            }
            if length > V3_LENGTH {
                compression_type = bytes[V3_LENGTH];
                header.unknown_fields = bytes[V3_LENGTH + 1..length].to_vec();
            }
        }
        let backing_offset = be64(bytes, 8);
        let backing_len = u64::from(be32(bytes, 16));
        let limit = if backing_offset == 0 { cluster_size as u64 } else { backing_offset };
        if limit > cluster_size as u64 || limit < u64::from(header.header_length) {
            return Err(Corruption::BackingName { offset: backing_offset, len: backing_len }.into());
        }
        // An area that ends with the file needs no end mark.
        let limit = limit.min(file_size) as usize;
        let found = match extensions::parse(bytes, header.header_length as usize, limit)? {
            Parsed::All(area) => area.extensions,
            Parsed::NeedMore => return Ok(None),
        };
        // Before anything else is understood, so that an unknown feature is named rather than stumbled over.
        header.refuse_unknown_features(&found)?;
        header.refuse_encryption(be32(bytes, 32), &found)?;
        header.take_compression(compression_type)?;
        let mut backing_format = None;
        for extension in found {
            header.order.push(extension.kind);
            match extension.kind {
                extensions::BACKING_FORMAT => backing_format = Some(text(&extension.data, "backing file's format")?),
                extensions::DATA_FILE => header.data_file = Some(text(&extension.data, "external data file's name")?),
                extensions::BITMAPS => header.bitmaps = Some(BitmapsExtension::parse(&extension.data)?),
                _ => header.unknown_extensions.push(extension),
            }
        }
        if backing_offset != 0 {
            let invalid = Corruption::BackingName { offset: backing_offset, len: backing_len };
            if backing_len > MAX_BACKING_NAME || backing_offset + backing_len > cluster_size as u64 {
                return Err(invalid.into());
            }
            let (start, end) = (backing_offset as usize, (backing_offset + backing_len) as usize);
            if end > bytes.len() {
                return if bytes.len() as u64 == file_size { Err(invalid.into()) } else { Ok(None) };
            }
            // QEMU takes an empty name for no backing file.
            if backing_len > 0 {
                let name = text(&bytes[start..end], "backing file's name")?;
                header.backing = Some(BackingRef { name, format: backing_format });
                header.backing_offset = backing_offset;
            }
        }
        Ok(Some(header))
    }

    fn refuse_unknown_features(&self, found: &[Extension]) -> Result<()> {
        let unknown = self.incompatible & !INCOMPATIBLE_KNOWN;
        if unknown == 0 {
            return Ok(());
        }
        let table = found.iter().find(|e| e.kind == extensions::FEATURE_NAMES).map_or(&[][..], |e| &e.data);
        let names: Vec<String> = (0..64u8)
            .filter(|bit| unknown & (1 << bit) != 0)
            .map(|bit| match extensions::feature_name(table, FeatureSet::Incompatible, bit) {
                Some(name) => format!("{name:?} (bit {bit})"),
                None => format!("bit {bit}"),
            })
            .collect();
        Err(unsupported(format!(
            "the image needs incompatible features that are unknown here: {}; open it with the program that made it",
            names.join(", ")
        )))
    }

    fn refuse_encryption(&self, method: u32, found: &[Extension]) -> Result<()> {
        let name = match method {
            0 if !found.iter().any(|e| e.kind == extensions::ENCRYPTION) => return Ok(()),
            0 => "an unknown method (an encryption header without a method)".to_owned(),
            1 => "AES".to_owned(),
            2 => "LUKS".to_owned(),
            other => format!("unknown method {other}"),
        };
        Err(unsupported(format!(
            "the image is encrypted with {name}, which is not supported; convert it to a plain image first"
        )))
    }

    fn take_compression(&mut self, field: u8) -> Result<()> {
        let bit = self.incompatible & INCOMPATIBLE_COMPRESSION != 0;
        self.compression = match (field, bit) {
            (0, false) => Compression::Zlib,
            (1, true) => Compression::Zstd,
            (0, true) | (1, false) => return Err(Corruption::CompressionBit { field, bit }.into()),
            _ => {
                return Err(unsupported(format!("compression type {field} is unknown, expected 0 (zlib) or 1 (zstd)")));
            }
        };
        Ok(())
    }

    /// Checks the fields against each other and against the file.
    fn validate(&self, file_size: u64, purpose: Purpose) -> Result<()> {
        if self.refcount_order > 6 {
            return Err(Corruption::RefcountOrder { found: self.refcount_order }.into());
        }
        if self.extended_l2() && self.cluster_bits < MIN_EXTENDED_L2_CLUSTER_BITS {
            return Err(Corruption::ExtendedL2ClusterSize { cluster_size: self.cluster_size() }.into());
        }
        if self.autoclear & AUTOCLEAR_RAW_DATA != 0 && !self.has_data_file() {
            return Err(Corruption::RawDataWithoutFile.into());
        }
        let strict = purpose == Purpose::Use;
        let table = |table, offset: u64, size: u64, max: u64| {
            if size > max {
                return Err(Corruption::TableTooLarge { table, size, max });
            }
            if offset & (self.cluster_size() - 1) != 0 {
                return Err(Corruption::TableUnaligned { table, offset });
            }
            let beyond = Corruption::TableBeyondEnd { table, offset, size, end: file_size };
            let end = offset.checked_add(size).filter(|end| *end <= i64::MAX as u64).ok_or(beyond.clone())?;
            // What is behind the end reads as zeroes, as long as it is in the file's last cluster.
            if strict && size > 0 && end.div_ceil(self.cluster_size()) > file_size.div_ceil(self.cluster_size()) {
                return Err(beyond);
            }
            if strict && size > 0 && offset == 0 {
                return Err(Corruption::TableInHeader { table });
            }
            Ok(())
        };
        let refcount_table = u64::from(self.refcount_table_clusters) << self.cluster_bits;
        table(Table::RefcountTable, self.refcount_table_offset, refcount_table, MAX_REFCOUNT_TABLE_BYTES)?;
        if strict && self.refcount_table_clusters == 0 {
            return Err(Corruption::NoRefcountTable.into());
        }
        if self.snapshot_count > MAX_SNAPSHOTS {
            return Err(Corruption::TooManySnapshots { found: self.snapshot_count }.into());
        }
        if self.snapshot_count > 0 {
            table(Table::Snapshots, self.snapshots_offset, 40 * u64::from(self.snapshot_count), u64::MAX)?;
        }
        table(Table::L1, self.l1_offset, self.l1_bytes(), MAX_L1_BYTES)?;
        let needed = self.l1_entries_for(self.size);
        if needed > MAX_L1_BYTES / 8 {
            return Err(Corruption::DiskTooLarge { size: self.size }.into());
        }
        if needed > u64::from(self.l1_entries) {
            return Err(Corruption::L1TooSmall { entries: u64::from(self.l1_entries), needed }.into());
        }
        if let Some(bitmaps) = &self.bitmaps
            && strict
            && self.autoclear & AUTOCLEAR_BITMAPS != 0
        {
            super::bitmap_directory::validate_extension(bitmaps, self.cluster_size())?;
        }
        Ok(())
    }

    /// Fails when the image must not be written to.
    ///
    /// # Errors
    /// `Corrupt` when the corrupt bit is set.
    pub fn require_writable(&self) -> Result<()> {
        if self.is_corrupt() {
            return Err(DiskError::new(ErrorKind::Corrupt, Operation::Open)
                .because("the image is marked as corrupt and can only be read; repair it first"));
        }
        Ok(())
    }

    /// The header as it is to be written from offset 0: fields, extensions, backing file's name; a multiple of
    /// 512 bytes. What stands behind in the first cluster has no meaning.
    ///
    /// An unchanged header comes out as it was read: extensions keep their order, and the name its place.
    ///
    /// # Errors
    /// `Invalid` with [`Corruption::HeaderTooLarge`] or [`Corruption::BackingName`] as its source when it does not
    /// fit into the first cluster.
    pub fn encode(&self) -> Result<Vec<u8>> {
        let mut out = self.encode_fields();
        for kind in self.extension_order() {
            match kind {
                extensions::BACKING_FORMAT => {
                    if let Some(format) = self.backing.as_ref().and_then(|b| b.format.as_deref()) {
                        extensions::append(&mut out, kind, format.as_bytes());
                    }
                }
                extensions::DATA_FILE => {
                    if let Some(name) = &self.data_file {
                        extensions::append(&mut out, kind, name.as_bytes());
                    }
                }
                extensions::BITMAPS => {
                    if let Some(bitmaps) = &self.bitmaps {
                        extensions::append(&mut out, kind, &bitmaps.encode());
                    }
                }
                _ => {}
            }
            // Several unknown ones of a type stand one behind the other.
            for extension in self.unknown_extensions.iter().filter(|e| e.kind == kind) {
                extensions::append(&mut out, kind, &extension.data);
            }
        }
        let cluster_size = self.cluster_size();
        let invalid = |what: Corruption| DiskError::new(ErrorKind::Invalid, Operation::Write).caused_by(what);
        // An area that fills the cluster to less than 8 bytes needs no end mark.
        if out.len() as u64 + 8 <= cluster_size {
            extensions::append(&mut out, extensions::END, &[]);
        }
        if let Some(backing) = &self.backing {
            let name = backing.name.as_bytes();
            if name.len() as u64 > MAX_BACKING_NAME {
                return Err(invalid(Corruption::BackingName { offset: out.len() as u64, len: name.len() as u64 }));
            }
            let kept = self.backing_offset as usize;
            if kept >= out.len() && kept + name.len() <= cluster_size as usize {
                out.resize(kept, 0);
            }
            let at = out.len() as u64;
            out[8..16].copy_from_slice(&at.to_be_bytes());
            out[16..20].copy_from_slice(&(name.len() as u32).to_be_bytes());
            out.extend(name);
        }
        if out.len() as u64 > cluster_size {
            return Err(invalid(Corruption::HeaderTooLarge { needed: out.len() as u64, cluster_size }));
        }
        out.resize(out.len().next_multiple_of(SECTOR), 0);
        Ok(out)
    }

    fn encode_fields(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(SECTOR);
        out.extend(MAGIC.to_be_bytes());
        out.extend(self.version.to_be_bytes());
        out.extend([0; 12]); // The backing file's name is entered when its place is known.
        out.extend(self.cluster_bits.to_be_bytes());
        out.extend(self.size.to_be_bytes());
        out.extend([0; 4]); // No encryption.
        out.extend(self.l1_entries.to_be_bytes());
        out.extend(self.l1_offset.to_be_bytes());
        out.extend(self.refcount_table_offset.to_be_bytes());
        out.extend(self.refcount_table_clusters.to_be_bytes());
        out.extend(self.snapshot_count.to_be_bytes());
        out.extend(self.snapshots_offset.to_be_bytes());
        if self.version >= 3 {
            out.extend(self.incompatible.to_be_bytes());
            out.extend(self.compatible.to_be_bytes());
            out.extend(self.autoclear.to_be_bytes());
            out.extend(self.refcount_order.to_be_bytes());
            out.extend(self.header_length.to_be_bytes());
            if self.header_length as usize > V3_LENGTH {
                out.push(match self.compression {
                    Compression::Zlib => 0,
                    Compression::Zstd => 1,
                });
                out.extend(&self.unknown_fields);
                out.resize(self.header_length as usize, 0);
            }
        }
        out
    }

    /// The order in which extensions are written: as they were read; new ones in front, so that what may change
    /// is in the first sector.
    fn extension_order(&self) -> Vec<u32> {
        let mut order = Vec::new();
        let new = [extensions::BACKING_FORMAT, extensions::DATA_FILE, extensions::BITMAPS];
        let kept = &self.order;
        let others = self.unknown_extensions.iter().map(|e| e.kind);
        for kind in new.into_iter().filter(|k| !kept.contains(k)).chain(kept.iter().copied()).chain(others) {
            if !order.contains(&kind) {
                order.push(kind);
            }
        }
        order
    }

    /// Writes the header over the present one. Not durable before the next sync.
    ///
    /// Crash: all fixed fields, and in images of usual shape every extension but perhaps a feature name table,
    /// stand in the first 512 bytes, which reach the disk whole or not at all. When only they differ, one
    /// sector is written, so a crash leaves the old or the new header. When more differs (extensions or the
    /// backing file's name of another length, or behind the first sector: never while a disk is in use), the
    /// extensions end before those that lie behind the first sector; then the part behind is written; then the first
    /// sector: each durable before the next. A crash between leaves the old fields without some extensions, which are
    /// those that an image can do without. (If it cannot, as its data file is named there, the first step is left
    /// out, and a crash may leave extensions that are unreadable. A changed name of the backing file is old, new or torn.)
    ///
    /// # Errors
    /// As [`Header::encode`], and those of the storage.
    pub async fn write(&self, storage: &StorageHandle) -> Result<()> {
        let mut new = Buf::copy_of(&self.encode()?);
        let old = storage.read_new(0, new.len()).await?;
        if old[SECTOR..] != new[SECTOR..] {
            if let Some(at) = self.end_before_sector(&old) {
                // Crash: 8 bytes of one sector; without meaning is what stands behind an end mark.
                storage.write(at as u64, Buf::zeroed(8)).await?;
                storage.sync().await?;
            }
            let behind = new.split_off(SECTOR);
            storage.write(SECTOR as u64, behind).await?;
            storage.sync().await?;
        }
        new.truncate(SECTOR);
        storage.write(0, new).await.map(drop)
    }

    /// Where an end mark keeps the extensions that reach out of the first sector from being read, if there are any
    /// and the image can do without them. `first` is the first sector as it is on the storage.
    fn end_before_sector(&self, first: &[u8]) -> Option<usize> {
        let mut at = self.header_length as usize;
        let mut before = 0;
        while at + 8 <= SECTOR && be32(first, at) != extensions::END {
            let end = at + 8 + (be32(first, at + 4) as usize).checked_next_multiple_of(8)?;
            if end + 8 > SECTOR {
                let needed = |kind: &u32| match *kind {
                    extensions::BACKING_FORMAT => self.backing.is_some(),
                    extensions::DATA_FILE => self.data_file.is_some(),
                    extensions::BITMAPS => self.bitmaps.is_some(),
                    _ => false,
                };
                return (!self.order.iter().skip(before).any(needed)).then_some(at);
            }
            at = end;
            before += 1;
        }
        None
    }

    /// Adds the table of feature names that new images have.
    pub(super) fn add_feature_names(&mut self) {
        let kind = extensions::FEATURE_NAMES;
        self.unknown_extensions.push(Extension { kind, data: extensions::feature_names() });
    }

    /// Bytes of a cluster, 512 to 2 MiB.
    pub fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Whether L2 entries have 16 bytes and subclusters.
    pub fn extended_l2(&self) -> bool {
        self.incompatible & INCOMPATIBLE_EXTENDED_L2 != 0
    }

    /// Bytes of an L2 entry: 8, or 16 when extended.
    pub fn l2_entry_size(&self) -> u64 {
        if self.extended_l2() { 16 } else { 8 }
    }

    /// Logarithm of [`Header::l2_entries`].
    pub fn l2_bits(&self) -> u32 {
        self.cluster_bits - if self.extended_l2() { 4 } else { 3 }
    }

    /// Entries of an L2 table.
    pub fn l2_entries(&self) -> u64 {
        1 << self.l2_bits()
    }

    /// Subclusters of a cluster: 32, or 1 without extended L2 entries.
    pub fn subclusters(&self) -> u64 {
        if self.extended_l2() { 32 } else { 1 }
    }

    /// Bytes of a subcluster.
    pub fn subcluster_size(&self) -> u64 {
        self.cluster_size() / self.subclusters()
    }

    /// Logarithm of the guest bytes that one L1 entry covers; at most 39.
    pub fn l1_entry_bits(&self) -> u32 {
        self.cluster_bits + self.l2_bits()
    }

    /// L1 entries that a guest's disk of `size` bytes needs.
    pub fn l1_entries_for(&self, size: u64) -> u64 {
        size.div_ceil(1 << self.l1_entry_bits())
    }

    /// Bytes of the active L1 table.
    pub fn l1_bytes(&self) -> u64 {
        8 * u64::from(self.l1_entries)
    }

    /// Width of a reference count in bits: 1 to 64.
    pub fn refcount_bits(&self) -> u32 {
        1 << self.refcount_order
    }

    /// The largest reference count.
    pub fn refcount_max(&self) -> u64 {
        u64::MAX >> (64 - self.refcount_bits())
    }

    /// Logarithm of [`Header::refcounts_per_block`].
    pub fn refcount_block_bits(&self) -> u32 {
        self.cluster_bits + 3 - self.refcount_order
    }

    /// Reference counts in a refcount block.
    pub fn refcounts_per_block(&self) -> u64 {
        1 << self.refcount_block_bits()
    }

    /// Entries of the refcount table.
    pub fn refcount_table_entries(&self) -> u64 {
        u64::from(self.refcount_table_clusters) << (self.cluster_bits - 3)
    }

    /// Position of the sector count in a compressed cluster's descriptor; below is the offset.
    pub fn compressed_sectors_shift(&self) -> u32 {
        62 - (self.cluster_bits - 8)
    }

    /// Whether guest data is in an external data file.
    pub fn has_data_file(&self) -> bool {
        self.incompatible & INCOMPATIBLE_DATA_FILE != 0
    }

    /// Whether the external data file is to be a raw image in its own right.
    pub fn raw_data_file(&self) -> bool {
        self.autoclear & AUTOCLEAR_RAW_DATA != 0
    }

    /// Whether the reference counts may be wrong.
    pub fn is_dirty(&self) -> bool {
        self.incompatible & INCOMPATIBLE_DIRTY != 0
    }

    /// Whether the image is marked as corrupt.
    pub fn is_corrupt(&self) -> bool {
        self.incompatible & INCOMPATIBLE_CORRUPT != 0
    }

    /// Whether reference counts may be written late.
    pub fn lazy_refcounts(&self) -> bool {
        self.compatible & COMPATIBLE_LAZY_REFCOUNTS != 0
    }
}

/// A name from the image. QEMU ends names at a zero byte.
fn text(bytes: &[u8], what: &str) -> Result<String> {
    let bytes = bytes.split(|b| *b == 0).next().unwrap_or_default();
    String::from_utf8(bytes.to_vec()).map_err(|e| {
        unsupported(format!("the {what} is not valid UTF-8: {}", String::from_utf8_lossy(e.as_bytes()).escape_debug()))
    })
}

fn unsupported(detail: String) -> DiskError {
    DiskError::new(ErrorKind::Unsupported, Operation::Open).because(detail)
}
