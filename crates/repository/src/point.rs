//! Restore points: the objects that name the trees of a machine's disks at one instant.

use crate::error::{Damage, DamageReason, Result};
use crate::fields::{Fields, put_bytes};
use crate::id::{ContentId, Id};
use crate::node::Reference;
use crate::pack::{Location, possible};

/// The most bytes that a disk may have: 2^56.
pub const MAX_DISK: u64 = 1 << 56;
const MAX_TEXT: usize = 4096;
const MAX_ATTACHMENT: usize = 16 << 20;

/// How consistent the disks are with each other and for the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Consistency {
    /// As after a power cut.
    Crash = 0,
    /// The guest's file systems were frozen.
    FileSystem = 1,
    /// Nothing was running.
    Off = 2,
}

/// How a disk's tree came to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Made {
    /// From all of the disk, without a predecessor.
    Full = 0,
    /// From what tracking says has changed.
    Incremental = 1,
    /// From all of the disk, compared with the predecessor's hashes.
    Compared = 2,
}

/// One disk in a restore point.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PointDisk {
    /// Its name within the machine.
    pub name: String,
    /// Its size in bytes.
    pub size: u64,
    /// How its tree came to be.
    pub made: Made,
    /// What the caller wants to find again: lineage, mark, format and so on, as names and values.
    pub identity: Vec<(String, String)>,
    pub(crate) root: Option<Reference>,
}

impl PointDisk {
    /// The hash of the disk's content: equal for equal content of equal depth in one repository. All zero for an empty disk.
    #[must_use]
    pub fn content(&self) -> ContentId {
        crate::node::id_of(self.root.as_ref())
    }
}

/// A restore point.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Point {
    /// Its name; sorts by time.
    pub id: Id,
    /// When it was taken, in milliseconds since 1970, as the caller says.
    pub created_ms: u64,
    /// Name of the machine.
    pub machine: String,
    /// Its disks.
    pub disks: Vec<PointDisk>,
    /// How consistent they are.
    pub consistency: Consistency,
    /// Names and contents of what belongs to the machine besides: its configuration.
    pub attachments: Vec<(String, Vec<u8>)>,
    /// The point on which this one builds, and the hash of that one's record.
    pub predecessor: Option<(Id, ContentId)>,
    /// Free text.
    pub note: String,
}

pub(crate) fn name_of(id: Id) -> String {
    format!("points/{id}")
}

pub(crate) fn put_reference(out: &mut Vec<u8>, root: Option<&Reference>) {
    out.push(u8::from(root.is_some()));
    if let Some(root) = root {
        out.extend(root.id.0);
        out.extend(root.location.pack.0);
        out.extend(root.location.offset.to_le_bytes());
        out.extend(root.location.length.to_le_bytes());
    }
}

pub(crate) fn take_reference(fields: &mut Fields<'_>) -> Result<Option<Reference>, DamageReason> {
    match fields.u8()? {
        0 => Ok(None),
        1 => {
            let id = ContentId(fields.array()?);
            let location = Location { pack: Id(fields.array()?), offset: fields.u32()?, length: fields.u32()? };
            if !possible(location.offset, location.length) {
                return Err(DamageReason::Reference);
            }
            Ok(Some(Reference { id, location }))
        }
        _ => Err(DamageReason::Field),
    }
}

impl Point {
    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        let mut out = 1_u32.to_le_bytes().to_vec();
        out.extend(self.id.0);
        out.extend(self.created_ms.to_le_bytes());
        out.push(self.consistency as u8);
        out.push(u8::from(self.predecessor.is_some()));
        if let Some((id, digest)) = self.predecessor {
            out.extend(id.0);
            out.extend(digest.0);
        }
        put_bytes(&mut out, self.machine.as_bytes());
        put_bytes(&mut out, self.note.as_bytes());
        out.extend((self.disks.len() as u32).to_le_bytes());
        for disk in &self.disks {
            put_bytes(&mut out, disk.name.as_bytes());
            out.extend(disk.size.to_le_bytes());
            out.push(disk.made as u8);
            put_reference(&mut out, disk.root.as_ref());
            out.extend((disk.identity.len() as u32).to_le_bytes());
            for (name, value) in &disk.identity {
                put_bytes(&mut out, name.as_bytes());
                put_bytes(&mut out, value.as_bytes());
            }
        }
        out.extend((self.attachments.len() as u32).to_le_bytes());
        for (name, content) in &self.attachments {
            put_bytes(&mut out, name.as_bytes());
            put_bytes(&mut out, content);
        }
        out
    }

    pub(crate) fn parse(id: Id, bytes: &[u8]) -> Result<Point> {
        let parse = || {
            let mut fields = Fields::of(bytes);
            if fields.u32()? != 1 {
                return Err(DamageReason::Version);
            }
            if fields.array()? != id.0 {
                return Err(DamageReason::Identity);
            }
            let created_ms = fields.u64()?;
            let consistency = match fields.u8()? {
                0 => Consistency::Crash,
                1 => Consistency::FileSystem,
                2 => Consistency::Off,
                _ => return Err(DamageReason::Field),
            };
            let predecessor = match fields.u8()? {
                0 => None,
                1 => Some((Id(fields.array()?), ContentId(fields.array()?))),
                _ => return Err(DamageReason::Field),
            };
            let (machine, note) = (fields.text(MAX_TEXT)?, fields.text(MAX_TEXT)?);
            let mut disks = Vec::new();
            for _ in 0..fields.count(18)? {
                let name = fields.text(MAX_TEXT)?;
                let size = fields.u64()?;
                let made = match fields.u8()? {
                    0 => Made::Full,
                    1 => Made::Incremental,
                    2 => Made::Compared,
                    _ => return Err(DamageReason::Field),
                };
                if size > MAX_DISK {
                    return Err(DamageReason::Field);
                }
                let root = take_reference(&mut fields)?;
                let mut identity = Vec::new();
                for _ in 0..fields.count(8)? {
                    identity.push((fields.text(MAX_TEXT)?, fields.text(MAX_TEXT)?));
                }
                disks.push(PointDisk { name, size, made, identity, root });
            }
            let mut attachments = Vec::new();
            for _ in 0..fields.count(8)? {
                attachments.push((fields.text(MAX_TEXT)?, fields.bytes(MAX_ATTACHMENT)?));
            }
            fields.end()?;
            Ok(Point { id, created_ms, machine, disks, consistency, attachments, predecessor, note })
        };
        parse().map_err(|reason| Damage::new(name_of(id), 0, reason).into())
    }

    /// Whether the texts and attachments are ones that `parse` takes.
    pub(crate) fn fits(&self) -> bool {
        let texts = self.disks.iter().flat_map(|d| d.identity.iter().flat_map(|(a, b)| [a, b]).chain([&d.name]));
        texts
            .chain([&self.machine, &self.note])
            .chain(self.attachments.iter().map(|(n, _)| n))
            .all(|t| t.len() <= MAX_TEXT)
            && self.attachments.iter().all(|(_, c)| c.len() <= MAX_ATTACHMENT)
            && self.disks.iter().all(|d| d.size <= MAX_DISK)
    }

    /// The disk of this name.
    #[must_use]
    pub fn disk(&self, name: &str) -> Option<&PointDisk> {
        self.disks.iter().find(|d| d.name == name)
    }
}
