//! Header extensions: what stands between the header's fields and the backing file's name.
//! Specification: "Header extensions".

use super::{AUTOCLEAR_HISTORY, AUTOCLEAR_IDENTITY, Corruption};

/// Ends the area.
pub(super) const END: u32 = 0;
/// Name of the backing file's format.
pub(super) const BACKING_FORMAT: u32 = 0xe279_2aca;
/// Names of feature bits.
pub(super) const FEATURE_NAMES: u32 = 0x6803_f857;
/// Where the persistent bitmaps are.
pub(super) const BITMAPS: u32 = 0x2385_2875;
/// Where the encryption header is.
pub(super) const ENCRYPTION: u32 = 0x0537_be77;
/// Name of the external data file.
pub(super) const DATA_FILE: u32 = 0x4441_5441;
/// `HWHI`: which history is kept beside the image. Ours; see `history.rs`.
pub(super) const HISTORY: u32 = 0x4857_4849;
/// `HWLI`: which content the image holds, and over which content of its parent. Ours; see `identity.rs`.
pub(super) const IDENTITY: u32 = 0x4857_4c49;

/// The types whose meaning is known here.
const UNDERSTOOD: [u32; 7] = [BACKING_FORMAT, FEATURE_NAMES, BITMAPS, ENCRYPTION, DATA_FILE, HISTORY, IDENTITY];

/// Most header extensions of an image; a bound of ours, as seven types are known.
pub(super) const MAX_EXTENSIONS: usize = 256;

/// One header extension, byte by byte.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Extension {
    /// Its type.
    pub kind: u32,
    /// Its data, without padding.
    pub data: Vec<u8>,
}

/// The bitmaps extension: where the bitmap directory is. Specification: "Bitmaps extension".
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BitmapsExtension {
    /// Number of bitmaps, 1..=65535.
    pub count: u32,
    /// Bytes of the directory.
    pub directory_size: u64,
    /// Where the directory begins; a multiple of the cluster size.
    pub directory_offset: u64,
}

impl BitmapsExtension {
    /// Bytes of the extension's data.
    pub(super) const LEN: usize = 24;

    pub(super) fn parse(data: &[u8]) -> Result<Self, Corruption> {
        if data.len() != Self::LEN {
            return Err(Corruption::ExtensionLength { kind: BITMAPS, len: data.len() as u64 });
        }
        let found = Self { count: be32(data, 0), directory_size: be64(data, 8), directory_offset: be64(data, 16) };
        if be32(data, 4) != 0 {
            return Err(found.invalid());
        }
        Ok(found)
    }

    pub(super) fn invalid(&self) -> Corruption {
        Corruption::BitmapsExtension { count: self.count, size: self.directory_size, offset: self.directory_offset }
    }

    pub(super) fn encode(&self) -> Vec<u8> {
        let mut data = Vec::with_capacity(Self::LEN);
        data.extend(self.count.to_be_bytes());
        data.extend([0; 4]);
        data.extend(self.directory_size.to_be_bytes());
        data.extend(self.directory_offset.to_be_bytes());
        data
    }
}

/// What [`parse`] found.
pub(super) enum Parsed {
    /// All extensions up to the end mark or the area's end.
    All(Area),
    /// An extension lies behind `area` but before `limit`: more bytes are needed.
    NeedMore,
}

/// The extensions, and where they stand.
#[derive(Debug, Default)]
pub(super) struct Area {
    pub(super) extensions: Vec<Extension>,
    /// Where each begins, with its type and length.
    pub(super) starts: Vec<usize>,
    /// Where the end mark stands, or the next extension would.
    pub(super) end: usize,
    /// There is an end mark; without one the area has no room for another type and length.
    pub(super) has_end_mark: bool,
}

/// Parses the extensions from `start` on. `area` holds the file's bytes from offset 0; the extensions must
/// lie before `limit` (the backing file's name or the first cluster's end).
///
/// Memory: at most the area's own size.
pub(super) fn parse(area: &[u8], start: usize, limit: usize) -> Result<Parsed, Corruption> {
    let mut found = Area::default();
    let mut seen = [false; UNDERSTOOD.len()];
    let mut at = start;
    // An area without room for another type and length needs no end mark.
    while at + 8 <= limit {
        if at + 8 > area.len() {
            return Ok(Parsed::NeedMore);
        }
        let (kind, len) = (be32(area, at), be32(area, at + 4) as usize);
        if kind == END {
            found.has_end_mark = true;
            break;
        }
        let data = at + 8;
        if len > limit - data {
            return Err(Corruption::ExtensionBeyondArea { kind, offset: at as u64, len: len as u64 });
        }
        if data + len > area.len() {
            return Ok(Parsed::NeedMore);
        }
        if found.extensions.len() == MAX_EXTENSIONS {
            return Err(Corruption::TooManyExtensions);
        }
        // Unknown types may repeat: their rules are not ours to judge.
        if let Some(known) = UNDERSTOOD.iter().position(|k| *k == kind) {
            if seen[known] {
                return Err(Corruption::ExtensionTwice { kind });
            }
            seen[known] = true;
        }
        found.starts.push(at);
        found.extensions.push(Extension { kind, data: area[data..data + len].to_vec() });
        at = data + len.next_multiple_of(8);
    }
    found.end = at;
    Ok(Parsed::All(found))
}

/// Appends one extension with its padding.
pub(super) fn append(out: &mut Vec<u8>, kind: u32, data: &[u8]) {
    out.extend(kind.to_be_bytes());
    out.extend((data.len() as u32).to_be_bytes());
    out.extend(data);
    out.resize(out.len().next_multiple_of(8), 0);
}

/// The three sets of feature bits, as the feature name table numbers them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FeatureSet {
    /// An image with an unknown bit must not be opened.
    Incompatible = 0,
    /// Unknown bits may be ignored.
    Compatible = 1,
    /// Unknown bits must be cleared before a write.
    Autoclear = 2,
}

/// Bytes of one entry of the feature name table.
const NAME_ENTRY: usize = 48;

/// The bits that the format defines today, whose names are what QEMU prints, and the two that are ours.
const KNOWN: [(FeatureSet, u8, &str); 10] = [
    (FeatureSet::Incompatible, 0, "dirty bit"),
    (FeatureSet::Incompatible, 1, "corrupt bit"),
    (FeatureSet::Incompatible, 2, "external data file"),
    (FeatureSet::Incompatible, 3, "compression type"),
    (FeatureSet::Incompatible, 4, "extended L2 entries"),
    (FeatureSet::Compatible, 0, "lazy refcounts"),
    (FeatureSet::Autoclear, 0, "bitmaps"),
    (FeatureSet::Autoclear, 1, "raw external data"),
    (FeatureSet::Autoclear, AUTOCLEAR_HISTORY.trailing_zeros() as u8, "history kept by highwater"),
    (FeatureSet::Autoclear, AUTOCLEAR_IDENTITY.trailing_zeros() as u8, "identity kept by highwater"),
];

/// The feature name table for a new image.
pub(super) fn feature_names() -> Vec<u8> {
    let mut table = Vec::with_capacity(KNOWN.len() * NAME_ENTRY);
    for (set, bit, name) in KNOWN {
        let start = table.len();
        table.extend([set as u8, bit]);
        table.extend(name.as_bytes());
        table.resize(start + NAME_ENTRY, 0);
    }
    table
}

/// What the image's table calls a bit; printable characters only, as the table is not to be trusted.
pub(super) fn feature_name(table: &[u8], set: FeatureSet, bit: u8) -> Option<String> {
    let entry = table.chunks_exact(NAME_ENTRY).find(|e| e[0] == set as u8 && e[1] == bit)?;
    let name = entry[2..].split(|b| *b == 0).next()?;
    let name: String = String::from_utf8_lossy(name).chars().filter(|c| !c.is_control()).collect();
    (!name.is_empty()).then_some(name)
}

pub(super) fn be16(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([bytes[at], bytes[at + 1]])
}

pub(super) fn be32(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

pub(super) fn be64(bytes: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}
