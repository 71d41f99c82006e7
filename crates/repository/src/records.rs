//! The small records by which backups and prunes keep out of each other's way: leases, tombstones, marks of forgotten points,
//! relocations. Why they suffice is proven in `docs/repository.md`.

use crate::error::{Damage, DamageReason, RepositoryError, Result};
use crate::fields::{Fields, put_bytes};
use crate::host::Host;
use crate::id::Id;
use crate::node::Reference;
use crate::pack::{Location, possible};
use crate::point::{put_reference, take_reference};
use crate::sealed;
use crate::secret::Secret;
use crate::store::Store;

/// Who works here, and what it relies upon.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Lease {
    pub(crate) id: Id,
    pub(crate) prunes: bool,
    pub(crate) done: bool,
    /// Whether `roots` and `seen` are filled. Until then the lease stops every deletion.
    pub(crate) settled: bool,
    /// Raised by each renewal.
    pub(crate) counter: u64,
    pub(crate) renewed_ms: u64,
    /// The point that was made, when done.
    pub(crate) point: Option<Id>,
    /// Trees that are inherited from, with their depth: live as long as the lease.
    pub(crate) roots: Vec<(u8, Reference)>,
    /// Tombstones that were known before anything was referenced: nothing of theirs will be.
    pub(crate) seen: Vec<Id>,
}

/// Packs that were dead when it was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Tombstone {
    pub(crate) id: Id,
    pub(crate) created_ms: u64,
    /// When its packs were deleted; 0: not yet.
    pub(crate) processed_ms: u64,
    pub(crate) packs: Vec<Id>,
    /// Leases at work when it was written, with their counters.
    pub(crate) leases: Vec<(Id, u64)>,
}

/// Where the frames of a pack that goes have gone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Relocation {
    pub(crate) pack: Id,
    /// By offset in the old pack, ascending.
    pub(crate) frames: Vec<(u32, Location)>,
}

pub(crate) fn lease_name(id: Id) -> String {
    format!("leases/{id}")
}

pub(crate) fn expired_name(id: Id) -> String {
    format!("expired/{id}")
}

pub(crate) fn tombstone_name(id: Id) -> String {
    format!("tombstones/{id}")
}

pub(crate) fn forgotten_name(id: Id) -> String {
    format!("forgotten/{id}")
}

pub(crate) fn relocation_name(id: Id) -> String {
    format!("relocations/{id}")
}

impl Lease {
    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        let mut out = 1_u32.to_le_bytes().to_vec();
        out.extend(self.id.0);
        out.extend([
            u8::from(self.prunes),
            u8::from(self.done),
            u8::from(self.settled),
            u8::from(self.point.is_some()),
        ]);
        out.extend(self.counter.to_le_bytes());
        out.extend(self.renewed_ms.to_le_bytes());
        out.extend(self.point.unwrap_or(Id([0; 16])).0);
        out.extend((self.roots.len() as u32).to_le_bytes());
        for (depth, root) in &self.roots {
            out.push(*depth);
            put_reference(&mut out, Some(root));
        }
        out.extend((self.seen.len() as u32).to_le_bytes());
        self.seen.iter().for_each(|id| out.extend(id.0));
        out
    }

    pub(crate) fn parse(id: Id, bytes: &[u8]) -> Result<Lease, DamageReason> {
        let mut fields = Fields::of(bytes);
        head(&mut fields, id)?;
        let [prunes, done, settled, has_point] = fields.array()?.map(|flag: u8| flag == 1);
        let (counter, renewed_ms, point) = (fields.u64()?, fields.u64()?, Id(fields.array()?));
        let mut roots = Vec::new();
        for _ in 0..fields.count(2)? {
            let depth = fields.u8()?;
            roots.extend(take_reference(&mut fields)?.map(|root| (depth, root)));
        }
        let mut seen = Vec::new();
        for _ in 0..fields.count(16)? {
            seen.push(Id(fields.array()?));
        }
        fields.end()?;
        Ok(Lease { id, prunes, done, settled, counter, renewed_ms, point: has_point.then_some(point), roots, seen })
    }
}

fn head(fields: &mut Fields<'_>, id: Id) -> Result<(), DamageReason> {
    if fields.u32()? != 1 {
        return Err(DamageReason::Version);
    }
    if fields.array()? != id.0 { Err(DamageReason::Identity) } else { Ok(()) }
}

impl Tombstone {
    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        let mut out = 1_u32.to_le_bytes().to_vec();
        out.extend(self.id.0);
        out.extend(self.created_ms.to_le_bytes());
        out.extend(self.processed_ms.to_le_bytes());
        out.extend((self.packs.len() as u32).to_le_bytes());
        self.packs.iter().for_each(|id| out.extend(id.0));
        out.extend((self.leases.len() as u32).to_le_bytes());
        for (id, counter) in &self.leases {
            out.extend(id.0);
            out.extend(counter.to_le_bytes());
        }
        out
    }

    pub(crate) fn parse(id: Id, bytes: &[u8]) -> Result<Tombstone, DamageReason> {
        let mut fields = Fields::of(bytes);
        head(&mut fields, id)?;
        let (created_ms, processed_ms) = (fields.u64()?, fields.u64()?);
        let mut packs = Vec::new();
        for _ in 0..fields.count(16)? {
            packs.push(Id(fields.array()?));
        }
        let mut leases = Vec::new();
        for _ in 0..fields.count(24)? {
            leases.push((Id(fields.array()?), fields.u64()?));
        }
        fields.end()?;
        Ok(Tombstone { id, created_ms, processed_ms, packs, leases })
    }
}

impl Relocation {
    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        let mut out = 1_u32.to_le_bytes().to_vec();
        out.extend(self.pack.0);
        out.extend((self.frames.len() as u32).to_le_bytes());
        for (offset, to) in &self.frames {
            out.extend(offset.to_le_bytes());
            out.extend(to.pack.0);
            out.extend(to.offset.to_le_bytes());
            out.extend(to.length.to_le_bytes());
        }
        out
    }

    pub(crate) fn parse(id: Id, bytes: &[u8]) -> Result<Relocation, DamageReason> {
        let mut fields = Fields::of(bytes);
        head(&mut fields, id)?;
        let mut frames: Vec<(u32, Location)> = Vec::new();
        for _ in 0..fields.count(28)? {
            let from = fields.u32()?;
            let to = Location { pack: Id(fields.array()?), offset: fields.u32()?, length: fields.u32()? };
            if !possible(to.offset, to.length) || to.pack == id || frames.last().is_some_and(|(last, _)| *last >= from)
            {
                return Err(DamageReason::Reference);
            }
            frames.push((from, to));
        }
        fields.end()?;
        Ok(Relocation { pack: id, frames })
    }

    pub(crate) fn find(&self, offset: u32) -> Option<Location> {
        self.frames.binary_search_by_key(&offset, |(from, _)| *from).ok().map(|n| self.frames[n].1)
    }
}

/// The record that a point is forgotten: when.
pub(crate) fn forgotten_bytes(id: Id, ms: u64) -> Vec<u8> {
    let mut out = 1_u32.to_le_bytes().to_vec();
    out.extend(id.0);
    out.extend(ms.to_le_bytes());
    put_bytes(&mut out, b"");
    out
}

pub(crate) fn parse_forgotten(id: Id, bytes: &[u8]) -> Result<u64, DamageReason> {
    let mut fields = Fields::of(bytes);
    head(&mut fields, id)?;
    let ms = fields.u64()?;
    fields.bytes(4096)?;
    fields.end()?;
    Ok(ms)
}

/// The ids of all objects below a folder, ascending.
pub(crate) fn ids(store: &dyn Store, folder: &str) -> Result<Vec<Id>> {
    let mut ids = Vec::new();
    store
        .list(folder, &mut |object| ids.extend(object.name.strip_prefix(folder).and_then(Id::parse)))
        .map_err(RepositoryError::store(folder, "list"))?;
    ids.sort_unstable();
    ids.dedup();
    Ok(ids)
}

/// Reads one record; `None` if it is not there (any more).
pub(crate) fn read<T>(
    store: &dyn Store,
    secret: &Secret,
    name: &str,
    id: Id,
    parse: impl FnOnce(Id, &[u8]) -> Result<T, DamageReason>,
) -> Result<Option<T>> {
    let Some(plain) = sealed::read(store, secret, name)? else { return Ok(None) };
    parse(id, &plain).map(Some).map_err(|reason| Damage::new(name, 0, reason).into())
}

/// Puts one record, replacing its earlier version.
pub(crate) fn put(store: &dyn Store, host: &dyn Host, secret: &Secret, name: &str, plain: Vec<u8>) -> Result<()> {
    let bytes = sealed::seal(secret, host, name, plain)?;
    store.put(name, &bytes).map_err(RepositoryError::store(name, "put"))
}

/// Puts one record that must be new.
pub(crate) fn put_new(store: &dyn Store, host: &dyn Host, secret: &Secret, name: &str, plain: Vec<u8>) -> Result<()> {
    let bytes = sealed::seal(secret, host, name, plain)?;
    sealed::put_own(store, name, &bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::id::ContentId;
    use crate::point::{Consistency, Made, Point, PointDisk};

    /// Parses what `bytes` became by a change, a cut or an addition. Whatever they say, nothing panics, and what is longer or shorter is refused.
    fn mistreat<T>(bytes: &[u8], parse: impl Fn(&[u8]) -> Option<T>) {
        let mut random = fastrand::Rng::with_seed(bytes.len() as u64);
        assert!(parse(bytes).is_some());
        for cut in 0..bytes.len() {
            assert!(parse(&bytes[..cut]).is_none());
        }
        assert!(parse(&[bytes, &[0]].concat()).is_none());
        for _ in 0..2000 {
            let mut other = bytes.to_vec();
            for _ in 0..random.usize(1..4) {
                let at = random.usize(..other.len());
                other[at] = if random.bool() { 0xff } else { random.u8(..) };
            }
            let _ = parse(&other);
        }
    }

    #[test]
    fn records_come_back_and_nothing_else_is_taken() {
        let id = Id([3; 16]);
        let location = Location { pack: Id([5; 16]), offset: 32, length: 99 };
        let root = Reference { id: ContentId([7; 32]), location };
        let lease = Lease {
            id,
            prunes: false,
            done: true,
            settled: true,
            counter: 9,
            renewed_ms: 10,
            point: Some(Id([1; 16])),
            roots: vec![(2, root)],
            seen: vec![Id([2; 16])],
        };
        assert_eq!(Lease::parse(id, &lease.to_bytes()), Ok(lease.clone()));
        mistreat(&lease.to_bytes(), |b| Lease::parse(id, b).ok());
        let packs = vec![Id([8; 16]); 2];
        let tombstone = Tombstone { id, created_ms: 1, processed_ms: 2, packs, leases: vec![(id, 4)] };
        assert_eq!(Tombstone::parse(id, &tombstone.to_bytes()), Ok(tombstone.clone()));
        mistreat(&tombstone.to_bytes(), |b| Tombstone::parse(id, b).ok());
        let relocation = Relocation { pack: id, frames: vec![(32, location), (131, location)] };
        assert_eq!(Relocation::parse(id, &relocation.to_bytes()), Ok(relocation.clone()));
        mistreat(&relocation.to_bytes(), |b| Relocation::parse(id, b).ok());
        mistreat(&forgotten_bytes(id, 77), |b| parse_forgotten(id, b).ok());
        let disk = PointDisk {
            name: "a".into(),
            size: 1 << 30,
            made: Made::Compared,
            identity: vec![("lineage".into(), "1".into())],
            root: Some(root),
        };
        let point = Point {
            id,
            created_ms: 5,
            machine: "m".into(),
            disks: vec![disk],
            consistency: Consistency::Off,
            attachments: vec![("x".into(), vec![1, 2])],
            predecessor: Some((Id([4; 16]), ContentId([6; 32]))),
            note: "n".into(),
        };
        assert_eq!(Point::parse(id, &point.to_bytes()).unwrap(), point);
        mistreat(&point.to_bytes(), |b| Point::parse(id, b).ok());
    }
}
