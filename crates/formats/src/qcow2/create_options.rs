//! What a new image is to be like, and `qemu-img`'s words for it.

use super::header::{
    AUTOCLEAR_RAW_DATA, COMPATIBLE_LAZY_REFCOUNTS, INCOMPATIBLE_COMPRESSION, INCOMPATIBLE_DATA_FILE,
    INCOMPATIBLE_EXTENDED_L2,
};
use super::header::{
    BackingRef, Compression, Header, MAX_BACKING_NAME, MAX_CLUSTER_BITS, MAX_L1_BYTES, MIN_CLUSTER_BITS,
    MIN_EXTENDED_L2_CLUSTER_BITS,
};
use disk::{DiskError, ErrorKind, Operation, Preallocation, Result};

/// What a new image is to be like. [`CreateOptions::new`] has `qemu-img`'s defaults.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CreateOptions {
    /// Size of the guest's disk in bytes.
    pub size: u64,
    /// 2 (`compat=0.10`) or 3 (`compat=1.1`).
    pub version: u32,
    /// Bytes of a cluster: a power of two, 512 to 2 MiB.
    pub cluster_size: u64,
    /// Width of a reference count in bits: 1, 2, 4, 8, 16, 32 or 64; 16 in version 2.
    pub refcount_bits: u32,
    /// L2 entries of 16 bytes with 32 subclusters per cluster.
    pub extended_l2: bool,
    /// How clusters are compressed.
    pub compression: Compression,
    /// Whether writers may write reference counts late.
    pub lazy_refcounts: bool,
    /// The backing file.
    pub backing: Option<BackingRef>,
    /// Name of the external data file.
    pub data_file: Option<String>,
    /// Whether the external data file is to be a raw image in its own right.
    pub data_file_raw: bool,
    /// How much to set aside.
    pub preallocation: Preallocation,
}

/// The options that [`CreateOptions::set`] knows.
const KNOWN: [&str; 12] = [
    "size",
    "compat",
    "cluster_size",
    "preallocation",
    "lazy_refcounts",
    "refcount_bits",
    "compression_type",
    "extended_l2",
    "data_file",
    "data_file_raw",
    "backing_file",
    "backing_fmt",
];

impl CreateOptions {
    /// Version 3, clusters of 64 KiB, reference counts of 16 bits, nothing set aside.
    pub fn new(size: u64) -> Self {
        Self {
            size,
            version: 3,
            cluster_size: 64 << 10,
            refcount_bits: 16,
            extended_l2: false,
            compression: Compression::Zlib,
            lazy_refcounts: false,
            backing: None,
            data_file: None,
            data_file_raw: false,
            preallocation: Preallocation::Off,
        }
    }

    /// The defaults, changed by `qemu-img`-style options; sizes are rounded up to 512 bytes as there.
    ///
    /// # Errors
    /// `Invalid` for an unknown option or a value out of range.
    pub fn parse<'a>(size: u64, options: impl IntoIterator<Item = (&'a str, &'a str)>) -> Result<Self> {
        let mut parsed = Self::new(size);
        for (name, value) in options {
            parsed.set(name, value)?;
        }
        parsed.size = parsed.size.checked_next_multiple_of(512).ok_or_else(|| invalid("the size is too large"))?;
        parsed.validate()?;
        Ok(parsed)
    }

    /// Sets one option by `qemu-img`'s name for it.
    ///
    /// # Errors
    /// `Invalid` for an unknown option (the message lists the known ones) or a value that cannot be read.
    pub fn set(&mut self, name: &str, value: &str) -> Result<()> {
        match name {
            "size" => self.size = parse_size(name, value)?,
            "compat" => {
                self.version = match value {
                    "0.10" | "v2" => 2,
                    "1.1" | "v3" => 3,
                    _ => return Err(wrong(name, value, "0.10 (version 2) or 1.1 (version 3)")),
                }
            }
            "cluster_size" => self.cluster_size = parse_size(name, value)?,
            "preallocation" => {
                self.preallocation = match value {
                    "off" => Preallocation::Off,
                    "metadata" => Preallocation::Metadata,
                    "falloc" => Preallocation::Falloc,
                    "full" => Preallocation::Full,
                    _ => return Err(wrong(name, value, "off, metadata, falloc or full")),
                }
            }
            "lazy_refcounts" => self.lazy_refcounts = parse_switch(name, value)?,
            "refcount_bits" => {
                self.refcount_bits = value.parse().map_err(|_| wrong(name, value, "1, 2, 4, 8, 16, 32 or 64"))?;
            }
            "compression_type" => {
                self.compression = match value {
                    "zlib" => Compression::Zlib,
                    "zstd" => Compression::Zstd,
                    _ => return Err(wrong(name, value, "zlib or zstd")),
                }
            }
            "extended_l2" => self.extended_l2 = parse_switch(name, value)?,
            "data_file" => self.data_file = Some(value.to_owned()),
            "data_file_raw" => self.data_file_raw = parse_switch(name, value)?,
            "backing_file" => self.backing_mut().name = value.to_owned(),
            "backing_fmt" => self.backing_mut().format = Some(value.to_owned()),
            _ if name == "encryption" || name.starts_with("encrypt.") => {
                return Err(DiskError::new(ErrorKind::Unsupported, Operation::Create)
                    .because(format!("option {name} asks for encryption, which is not supported")));
            }
            _ => {
                return Err(invalid(format!("unknown qcow2 option {name:?}, expected one of {}", KNOWN.join(", "))));
            }
        }
        Ok(())
    }

    fn backing_mut(&mut self) -> &mut BackingRef {
        self.backing.get_or_insert_with(|| BackingRef { name: String::new(), format: None })
    }

    /// Checks the options against the format and each other.
    ///
    /// # Errors
    /// `Invalid` with the rule that is broken.
    pub fn validate(&self) -> Result<()> {
        let cluster_bits = self.cluster_size.trailing_zeros();
        if !self.cluster_size.is_power_of_two() || !(MIN_CLUSTER_BITS..=MAX_CLUSTER_BITS).contains(&cluster_bits) {
            let found = self.cluster_size;
            return Err(invalid(format!("the cluster size is {found}, expected a power of two from 512 to 2M")));
        }
        if !self.refcount_bits.is_power_of_two() || self.refcount_bits > 64 {
            let found = self.refcount_bits;
            return Err(invalid(format!("refcount_bits is {found}, expected 1, 2, 4, 8, 16, 32 or 64")));
        }
        if !(2..=3).contains(&self.version) {
            return Err(invalid(format!("the version is {}, expected 2 or 3", self.version)));
        }
        if self.version == 2 {
            let needs_v3 = [
                (self.refcount_bits != 16, "refcount_bits other than 16"),
                (self.lazy_refcounts, "lazy_refcounts"),
                (self.extended_l2, "extended_l2"),
                (self.compression != Compression::Zlib, "compression_type other than zlib"),
                (self.data_file.is_some(), "data_file"),
            ];
            if let Some((_, what)) = needs_v3.iter().find(|(asked, _)| *asked) {
                return Err(invalid(format!("{what} needs version 3, use compat=1.1")));
            }
        }
        if self.extended_l2 && cluster_bits < MIN_EXTENDED_L2_CLUSTER_BITS {
            return Err(invalid("extended_l2 needs clusters of at least 16k"));
        }
        if self.data_file_raw && self.data_file.is_none() {
            return Err(invalid("data_file_raw needs data_file"));
        }
        if let Some(backing) = &self.backing {
            if backing.name.is_empty() || backing.name.len() as u64 > MAX_BACKING_NAME {
                return Err(invalid("the backing file's name must have 1 to 1023 bytes"));
            }
            if backing.format.is_none() {
                return Err(invalid("a backing file needs its format, which is never guessed; give backing_fmt"));
            }
            if self.data_file_raw {
                return Err(invalid("a backing file and data_file_raw exclude each other"));
            }
            if self.preallocation != Preallocation::Off && !self.extended_l2 {
                return Err(invalid("a backing file and preallocation go together only with extended_l2"));
            }
        }
        let header = self.header();
        if self.size > i64::MAX as u64 || header.l1_entries_for(self.size) > MAX_L1_BYTES / 8 {
            return Err(invalid(format!(
                "a disk of {} bytes is too large for clusters of {} bytes; use larger clusters",
                self.size, self.cluster_size
            )));
        }
        Ok(())
    }

    /// The preallocation that is done: a raw external data file needs all tables, so that an old L2 entry never
    /// says otherwise than the file.
    pub(super) fn effective_preallocation(&self) -> Preallocation {
        match self.preallocation {
            Preallocation::Off if self.data_file_raw => Preallocation::Metadata,
            other => other,
        }
    }

    /// The header without the places of tables. The options are valid.
    pub(super) fn header(&self) -> Header {
        let cluster_bits = self.cluster_size.trailing_zeros();
        let mut header = Header::empty(self.version, cluster_bits, self.refcount_bits.trailing_zeros());
        header.size = self.size;
        header.compression = self.compression;
        header.backing = self.backing.clone();
        header.data_file = self.data_file.clone();
        for (asked, bit) in [
            (self.data_file.is_some(), INCOMPATIBLE_DATA_FILE),
            (self.compression != Compression::Zlib, INCOMPATIBLE_COMPRESSION),
            (self.extended_l2, INCOMPATIBLE_EXTENDED_L2),
        ] {
            header.incompatible |= if asked { bit } else { 0 };
        }
        header.compatible |= if self.lazy_refcounts { COMPATIBLE_LAZY_REFCOUNTS } else { 0 };
        header.autoclear |= if self.data_file_raw { AUTOCLEAR_RAW_DATA } else { 0 };
        // Small clusters have better use for the space; QEMU draws the line at the same place.
        if self.version >= 3 && self.cluster_size >= 4096 {
            header.add_feature_names();
        }
        header
    }
}

/// `on`/`off` and their synonyms.
fn parse_switch(name: &str, value: &str) -> Result<bool> {
    match value {
        "on" | "yes" | "true" | "y" => Ok(true),
        "off" | "no" | "false" | "n" => Ok(false),
        _ => Err(wrong(name, value, "on or off")),
    }
}

/// A size in bytes with an optional suffix b, k, M, G, T, P or E (powers of 1024) and an optional fraction.
fn parse_size(name: &str, value: &str) -> Result<u64> {
    let error = || wrong(name, value, "a number with an optional suffix k, M, G, T, P or E");
    let digits_end = value.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(value.len());
    let (number, suffix) = value.split_at(digits_end);
    let shift = match suffix {
        "" | "b" | "B" => 0,
        "k" | "K" => 10,
        "M" | "m" => 20,
        "G" | "g" => 30,
        "T" | "t" => 40,
        "P" | "p" => 50,
        "E" | "e" => 60,
        _ => return Err(error()),
    };
    let unit = 1u64 << shift;
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if whole.is_empty() || (number.contains('.') && (fraction.is_empty() || shift == 0 || fraction.len() > 9)) {
        return Err(error());
    }
    let whole: u64 = whole.parse().map_err(|_| error())?;
    let part = if fraction.is_empty() {
        0
    } else {
        let digits: u128 = fraction.parse().map_err(|_| error())?;
        (u128::from(unit) * digits / 10u128.pow(fraction.len() as u32)) as u64
    };
    whole.checked_mul(unit).and_then(|w| w.checked_add(part)).ok_or_else(error)
}

fn wrong(name: &str, value: &str, expected: &str) -> DiskError {
    invalid(format!("option {name} is {value:?}, expected {expected}"))
}

pub(super) fn invalid(detail: impl Into<String>) -> DiskError {
    DiskError::new(ErrorKind::Invalid, Operation::Create).because(detail)
}
