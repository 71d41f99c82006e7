//! Prune: packs that no point needs go, without a lock that stops backups.
//!
//! A pack goes in two steps, by two prunes: the first names it in a **tombstone**, the second deletes it when the tombstone is old enough,
//! every lease at work has seen it, and marking anew finds it dead still. The proof is in `docs/repository.md`; the order of the reads in
//! [`Repository::prune`] is part of it.

use crate::care::each_node;
use crate::error::{RepositoryError, Result};
use crate::id::Id;
use crate::lease::Held;
use crate::node::{Reference, Shape};
use crate::pack::{FrameKind, Location, PackBuilder, read_table};
use crate::records::{
    self, Lease, Relocation, Tombstone, expired_name, forgotten_name, lease_name, relocation_name, tombstone_name,
};
use crate::repository::{Inner, Repository};
use crate::sealed::put_own;
use crate::store::StoreErrorKind;
use std::collections::{HashMap, HashSet};

/// How a prune works. Times are in milliseconds.
#[derive(Debug, Clone, Copy)]
pub struct PruneOptions {
    /// How long a tombstone, a mark of a forgotten point or a lease that has ended stays before something is done about it. Longer than the store's listing is
    /// late.
    pub grace_ms: u64,
    /// How long a lease may stay without renewal, between two prunes and by its own time, before it is taken for a dead session's.
    pub expiry_ms: u64,
    /// Packs younger than this are not named: those of sessions that broke off, which the next one uses.
    pub young_ms: u64,
    /// Packs of which less than this share (0 to 100) is needed are packed anew.
    pub repack_percent: u8,
    /// The most bytes of packs that one prune packs anew.
    pub repack_bytes: u64,
}

impl Default for PruneOptions {
    /// A day of grace, a day for packs, three days for leases, half a pack, 4 GiB.
    fn default() -> PruneOptions {
        const DAY: u64 = 86_400_000;
        PruneOptions { grace_ms: DAY, expiry_ms: 3 * DAY, young_ms: DAY, repack_percent: 50, repack_bytes: 4 << 30 }
    }
}

/// What a prune did.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Pruned {
    /// Forgotten points whose objects were deleted.
    pub points: u64,
    /// Packs deleted.
    pub packs: u64,
    /// Packs named by a new tombstone: a later prune deletes them.
    pub tombstoned: u64,
    /// Packs packed anew: named by a later prune.
    pub repacked: u64,
    /// Leases taken for dead sessions'.
    pub expired: Vec<Id>,
    /// Leases at work that have not seen a tombstone, and so keep its packs.
    pub waiting_for: Vec<Id>,
}

/// The records of all that goes on.
pub(crate) struct State {
    pub(crate) leases: Vec<Lease>,
    pub(crate) tombstones: Vec<Tombstone>,
}

/// Reads tombstones and leases, in this order.
pub(crate) fn read_state(inner: &Inner) -> Result<State> {
    let tombstones = all(inner, "tombstones/", tombstone_name, Tombstone::parse)?;
    let leases = all(inner, "leases/", lease_name, Lease::parse)?;
    Ok(State { leases, tombstones })
}

fn all<T>(
    inner: &Inner,
    folder: &str,
    name: fn(Id) -> String,
    parse: fn(Id, &[u8]) -> Result<T, crate::DamageReason>,
) -> Result<Vec<T>> {
    let read = |id| records::read(&*inner.store, &inner.secret, &name(id), id, parse).transpose();
    records::ids(&*inner.store, folder)?.into_iter().filter_map(read).collect()
}

/// What is needed of a pack. 128 bytes of bits, one for each frame by its place's hash: a clear bit means that no frame with it is needed; a
/// set one may be another frame's, so that a little too much is kept.
struct Need {
    bits: [u64; 16],
    /// Stored bytes of the frames that set a bit first: about what is needed.
    bytes: u64,
    /// Needed by a point that is not forgotten, or by a lease.
    kept: bool,
}

#[derive(Default)]
struct Needs {
    packs: HashMap<Id, Need>,
}

fn bit_of(offset: u32) -> (usize, u64) {
    let mixed = u64::from(offset).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 54;
    ((mixed / 64) as usize, 1 << (mixed % 64))
}

impl Need {
    /// About how many stored bytes are needed: corrected for frames that share a bit, and `whole` where too many bits are set to tell.
    fn estimate(&self, whole: u64) -> u64 {
        let share = f64::from(self.bits.iter().map(|word| word.count_ones()).sum::<u32>()) / 1024.0;
        if share == 0.0 {
            return 0;
        }
        if share > 0.95 { whole } else { (self.bytes as f64 * -(1.0 - share).ln() / share) as u64 }
    }
}

impl Needs {
    fn add(&mut self, at: &Location, kept: bool) -> bool {
        let need = self.packs.entry(at.pack).or_insert(Need { bits: [0; 16], bytes: 0, kept: false });
        let (word, bit) = bit_of(at.offset);
        let new = need.bits[word] & bit == 0;
        if new {
            need.bits[word] |= bit;
            need.bytes += u64::from(at.length);
        }
        let changed = new || (kept && !need.kept);
        need.kept |= kept;
        changed
    }

    fn has(&self, pack: Id, offset: u32) -> bool {
        let (word, bit) = bit_of(offset);
        self.packs.get(&pack).is_some_and(|need| need.bits[word] & bit != 0)
    }

    /// Marks all that a tree needs.
    fn mark(
        &mut self,
        inner: &Inner,
        root: Reference,
        depth: u8,
        kept: bool,
        visited: &mut HashSet<u128>,
    ) -> Result<()> {
        let mut failure = None;
        each_node(inner, root, depth, visited, &mut |at, level, _, node| match node {
            Err(e) => drop(failure.get_or_insert(e)),
            Ok(node) => {
                self.add(&at.location, kept);
                if level == 1 {
                    for child in node.children.iter().flatten() {
                        self.add(&child.location, kept);
                    }
                }
            }
        });
        failure.map_or(Ok(()), Err)
    }
}

impl Repository {
    /// Deletes what earlier prunes named and nothing needs, names what nothing needs now, and packs anew what is little needed. May run at any time beside
    /// backups; a second prune is refused while one works.
    ///
    /// Crash: every step leaves the repository whole, and the next prune goes on from what it finds.
    pub fn prune(&self, options: &PruneOptions) -> Result<Pruned> {
        let mut own = Held::take(self.inner.clone(), true)?;
        let pruned = self.prune_with(&mut own, options)?;
        own.end()?;
        Ok(pruned)
    }

    fn prune_with(&self, own: &mut Held, options: &PruneOptions) -> Result<Pruned> {
        let inner = &*self.inner;
        let (store, secret) = (&*inner.store, &inner.secret);
        let now = inner.host.now_ms();
        let old = |ms: u64, by: u64| now.saturating_sub(ms) >= by && now >= ms;
        let delete = |name: &str| store.delete(name).map_err(RepositoryError::store(name, "delete"));
        let mut pruned = Pruned::default();
        refuse_second(inner, own.lease.id, options)?;

        // 1. Points forgotten long ago go. Whoever builds upon one began before its mark was seen, so its lease, or its point, is found below.
        // Crash between the two deletions: a mark without a point, removed by the next prune.
        let mut forgotten = HashSet::new();
        for id in records::ids(store, "forgotten/")? {
            let mark = forgotten_name(id);
            let since = records::read(store, secret, &mark, id, records::parse_forgotten)?;
            if since.is_some_and(|since| old(since, options.grace_ms)) {
                delete(&crate::point::name_of(id))?;
                delete(&mark)?;
                pruned.points += 1;
            } else {
                forgotten.insert(id);
            }
        }

        // 2. Tombstones, then leases, then points: in this order (docs/repository.md, "Why nothing that is needed goes").
        let State { leases, tombstones } = read_state(inner)?;
        let mut working = Vec::new();
        let mut points: HashSet<Id> = HashSet::new();
        let mut roots: Vec<(u8, Reference)> = Vec::new();
        for lease in leases.into_iter().filter(|l| l.id != own.lease.id) {
            if lease.prunes || lease.done {
                points.extend(lease.point);
                let after = if lease.done { options.grace_ms } else { options.expiry_ms };
                if old(lease.renewed_ms, after) {
                    delete(&lease_name(lease.id))?;
                }
                continue;
            }
            if self.is_dead(&lease, &tombstones, options, now)? {
                pruned.expired.push(lease.id);
                // What says so stays for ever, 100 bytes for each session that died: one that wakes up between two calls may put its lease once more, and
                // must still find what became of it.
                if old(lease.renewed_ms, options.expiry_ms.saturating_mul(4)) {
                    delete(&lease_name(lease.id))?;
                }
                points.extend(lease.point); // It may have been put in the last moment.
                continue;
            }
            points.extend(lease.point);
            roots.extend(lease.roots.iter().copied());
            working.push(lease);
        }
        points.extend(records::ids(store, "points/")?);
        // A mark that was put since the first list only makes less be kept by `kept`, never by what is marked.
        let mut needs = Needs::default();
        let mut visited = HashSet::new();
        for (depth, root) in &roots {
            needs.mark(inner, *root, *depth, true, &mut visited)?;
        }
        // Those that are not forgotten first, so that all they share counts as theirs.
        let mut later = Vec::new();
        for id in points {
            if forgotten.contains(&id) { later.push(id) } else { self.mark_point(id, true, &mut needs, &mut visited)? }
        }
        for id in later {
            match self.mark_point(id, false, &mut needs, &mut visited) {
                // It was forgotten because it is damaged, perhaps. Nobody can read what is lost.
                Err(e) if e.damage().is_some() => {}
                other => other?,
            }
        }
        drop(visited);
        let relocations = self.follow_relocations(&mut needs)?;
        own.renew_if_due()?;

        // 3. What earlier prunes named goes, if every lease at work has seen it named, and nothing needs it still.
        let mut packs: HashMap<Id, (u64, u64)> = HashMap::new();
        let named = |name: &str| name.rsplit('/').next().and_then(Id::parse);
        store
            .list("packs/", &mut |o| packs.extend(named(&o.name).map(|id| (id, (o.length, o.put_ms)))))
            .map_err(RepositoryError::store("packs/", "list"))?;
        let mut named_already = HashSet::new();
        for mut tombstone in tombstones {
            if tombstone.processed_ms > 0 {
                if old(tombstone.processed_ms, options.grace_ms) {
                    delete(&tombstone_name(tombstone.id))?;
                } else {
                    named_already.extend(tombstone.packs);
                }
                continue;
            }
            let blocking: Vec<Id> = working.iter().filter(|l| !l.seen.contains(&tombstone.id)).map(|l| l.id).collect();
            named_already.extend(tombstone.packs.iter().copied());
            if !old(tombstone.created_ms, options.grace_ms) || !blocking.is_empty() {
                pruned.waiting_for.extend(blocking);
                continue;
            }
            for pack in &tombstone.packs {
                if needs.packs.contains_key(pack) && !self.is_moved(*pack, &needs, &relocations)? {
                    continue; // Somebody who had not seen the tombstone needs it: it lives on.
                }
                delete(&pack.pack_name())?;
                if packs.remove(pack).is_some() {
                    pruned.packs += 1;
                }
                own.renew_if_due()?;
            }
            tombstone.processed_ms = now.max(1);
            records::put(store, &*inner.host, secret, &tombstone_name(tombstone.id), tombstone.to_bytes())?;
        }
        pruned.waiting_for.sort_unstable();
        pruned.waiting_for.dedup();
        // Relocations of packs that have gone and that nothing refers to any more.
        if working.iter().all(|l| l.settled) {
            for pack in relocations.iter().filter(|p| !packs.contains_key(p) && !needs.packs.contains_key(p)) {
                delete(&relocation_name(*pack))?;
            }
        }

        // 4. What nothing needs now is named.
        let mut dead = Vec::new();
        for (pack, (_, put_ms)) in &packs {
            let needed = needs.packs.get(pack).is_some_and(|need| need.kept);
            let moved = needed && relocations.contains(pack) && self.is_moved(*pack, &needs, &relocations)?;
            if (!needed || moved) && !named_already.contains(pack) && old(*put_ms, options.young_ms) {
                dead.push(*pack);
            }
        }
        dead.sort_unstable();
        if !dead.is_empty() {
            pruned.tombstoned = dead.len() as u64;
            named_already.extend(dead.iter().copied());
            let at_work = working.iter().map(|l| (l.id, l.counter)).collect();
            let tombstone = Tombstone {
                id: Id::random(&*inner.host)?,
                created_ms: now,
                processed_ms: 0,
                packs: dead,
                leases: at_work,
            };
            let name = tombstone_name(tombstone.id);
            records::put_new(store, &*inner.host, secret, &name, tombstone.to_bytes())?;
        } else if !working.is_empty() {
            // Leases of dead sessions are told by two prunes that saw the same one: an empty tombstone says that this one has.
            self.witness(&working, now)?;
        }

        // 5. What is little needed is packed anew.
        let mut room = options.repack_bytes;
        let mut candidates: Vec<(Id, u64)> = Vec::new();
        for (pack, (length, put_ms)) in &packs {
            let Some(need) = needs.packs.get(pack) else { continue };
            let little =
                need.estimate(*length).saturating_mul(100) < length.saturating_mul(u64::from(options.repack_percent));
            if little
                && need.kept
                && old(*put_ms, options.young_ms)
                && !named_already.contains(pack)
                && !relocations.contains(pack)
            {
                candidates.push((*pack, *length));
            }
        }
        // Those first from which most is gained.
        candidates
            .sort_by_key(|(pack, length)| needs.packs[pack].estimate(*length).saturating_mul(1000) / length.max(&1));
        candidates.retain(|(_, length)| {
            let fits = *length <= room;
            room -= if fits { *length } else { 0 };
            fits
        });
        // One small pack alone would be written again and again.
        if candidates.len() > 1 || candidates.iter().any(|(_, length)| *length >= u64::from(inner.settings.pack_bytes))
        {
            pruned.repacked = self.repack(candidates.iter().map(|(pack, _)| *pack), &needs, own)?;
        }
        Ok(pruned)
    }

    fn mark_point(&self, id: Id, kept: bool, needs: &mut Needs, visited: &mut HashSet<u128>) -> Result<()> {
        // One that has gone, or was never made, needs nothing.
        let Some(point) = self.inner.point(id)? else { return Ok(()) };
        for disk in &point.disks {
            let shape = Shape::of(disk.size, self.inner.leaf_bytes());
            disk.root.map_or(Ok(()), |root| needs.mark(&self.inner, root, shape.depth, kept, visited))?;
        }
        Ok(())
    }

    /// Whether a lease is a dead session's: an earlier prune saw it as it is now, long ago. Says so in the store before anything is decided by it.
    fn is_dead(&self, lease: &Lease, tombstones: &[Tombstone], options: &PruneOptions, now: u64) -> Result<bool> {
        let inner = &*self.inner;
        let name = expired_name(lease.id);
        match inner.store.look(&name) {
            Ok(_) => return Ok(true),
            Err(e) if e.kind == StoreErrorKind::Missing => {}
            Err(e) => return Err(RepositoryError::store(&name, "look at")(e)),
        }
        let old = |ms: u64| now >= ms && now - ms >= options.expiry_ms;
        let seen = tombstones.iter().any(|t| old(t.created_ms) && t.leases.contains(&(lease.id, lease.counter)));
        if !seen || !old(lease.renewed_ms) {
            return Ok(false);
        }
        let mark = records::forgotten_bytes(lease.id, now);
        records::put_new(&*inner.store, &*inner.host, &inner.secret, &name, mark)?;
        Ok(true)
    }

    /// Puts a tombstone without packs that tells which leases are at work, unless there is one that tells the same.
    fn witness(&self, working: &[Lease], now: u64) -> Result<()> {
        let inner = &*self.inner;
        let tombstones = all(inner, "tombstones/", tombstone_name, Tombstone::parse)?;
        let told = |l: &Lease| tombstones.iter().any(|t| t.leases.contains(&(l.id, l.counter)));
        if working.iter().all(told) {
            return Ok(());
        }
        let leases = working.iter().map(|l| (l.id, l.counter)).collect();
        let witness =
            Tombstone { id: Id::random(&*inner.host)?, created_ms: now, processed_ms: 0, packs: Vec::new(), leases };
        records::put_new(&*inner.store, &*inner.host, &inner.secret, &tombstone_name(witness.id), witness.to_bytes())
    }

    /// Marks the frames to which needed ones have moved, however often. Gives the packs that have a relocation.
    fn follow_relocations(&self, needs: &mut Needs) -> Result<HashSet<Id>> {
        let inner = &*self.inner;
        let ids = records::ids(&*inner.store, "relocations/")?;
        loop {
            let mut changed = false;
            for id in &ids {
                let Some(kept) = needs.packs.get(id).map(|need| need.kept) else { continue };
                let Some(moved) = inner.relocation(*id)? else { continue };
                for (offset, to) in &moved.frames {
                    if needs.has(*id, *offset) {
                        changed |= needs.add(to, kept);
                    }
                }
            }
            if !changed {
                return Ok(ids.into_iter().collect());
            }
        }
    }

    /// Whether all that is needed of a pack stands elsewhere too.
    fn is_moved(&self, pack: Id, needs: &Needs, relocations: &HashSet<Id>) -> Result<bool> {
        let inner = &*self.inner;
        if !relocations.contains(&pack) {
            return Ok(false);
        }
        let Some(moved) = inner.relocation(pack)? else { return Ok(false) };
        let frames = match read_table(&*inner.store, &inner.secret, pack) {
            Ok(frames) => frames,
            Err(e) if e.damage().is_some() => return Ok(false),
            Err(e) => return Err(e),
        };
        Ok(frames.iter().filter(|f| needs.has(pack, f.offset)).all(|f| moved.find(f.offset).is_some()))
    }

    /// Copies the needed frames of packs into new ones.
    ///
    /// Crash: new packs that nothing names; or a relocation whose old pack is still there, and whose new one is complete. The old pack is read until a later
    /// prune deletes it, by the way of every dead pack.
    fn repack(&self, packs: impl Iterator<Item = Id>, needs: &Needs, own: &mut Held) -> Result<u64> {
        let inner = &*self.inner;
        let (store, secret) = (&*inner.store, &inner.secret);
        let capacity = inner.settings.pack_bytes as usize;
        let mut open: Option<PackBuilder> = None;
        // Relocations wait for the packs into which their frames went.
        let mut waiting: Vec<Relocation> = Vec::new();
        let mut count = 0;
        let put = |open: &mut Option<PackBuilder>, waiting: &mut Vec<Relocation>| -> Result<u64> {
            if let Some(pack) = open.take() {
                let (id, bytes, _) = pack.seal();
                put_own(store, &id.pack_name(), &bytes)?;
            }
            let mut count = 0;
            for moved in waiting.drain(..) {
                let name = relocation_name(moved.pack);
                match records::put_new(store, &*inner.host, secret, &name, moved.to_bytes()) {
                    // An earlier prune has moved it, and the list of relocations was late. Its word stands.
                    Err(RepositoryError::Store { source, .. }) if source.kind == StoreErrorKind::Exists => continue,
                    other => other?,
                }
                count += 1;
            }
            Ok(count)
        };
        for pack in packs {
            own.renew_if_due()?;
            let frames = match read_table(store, secret, pack) {
                Ok(frames) => frames,
                Err(e) if e.damage().is_some() => continue, // `check` names it.
                Err(e) => return Err(e),
            };
            let mut moved = Relocation { pack, frames: Vec::new() };
            let mut whole = true;
            let mut compressor = crate::pack::Compressor::new();
            for frame in frames.iter().filter(|f| needs.has(pack, f.offset)) {
                let at = Location { pack, offset: frame.offset, length: frame.length };
                let plain = inner.fetch(&[at], frame.kind, crate::pack::MAX_PLAIN).swap_remove(0);
                // Copied with its id unproven, a bad leaf would stay as bad as it is; but what its tag refuses stays where it is.
                let Ok(plain) = plain else {
                    whole = false;
                    break;
                };
                if frame.kind == FrameKind::Leaf && secret.leaf_id(&plain) != frame.id {
                    whole = false;
                    break;
                }
                if open.is_none() {
                    open = Some(PackBuilder::new(
                        secret,
                        Id::random(&*inner.host)?,
                        Vec::with_capacity(capacity + inner.max_stored_leaf()),
                    ));
                }
                let Some(builder) = &mut open else { unreachable!("it has just been made") };
                moved.frames.push((frame.offset, builder.push(frame.kind, frame.id, &plain, &mut compressor)));
                if builder.len() >= capacity {
                    // This pack's own relocation is not complete yet: it waits for its last frame.
                    count += put(&mut open, &mut waiting)?;
                }
            }
            if whole && !moved.frames.is_empty() {
                waiting.push(moved);
            }
        }
        count += put(&mut open, &mut waiting)?;
        Ok(count)
    }
}

fn refuse_second(inner: &Inner, own: Id, options: &PruneOptions) -> Result<()> {
    let now = inner.host.now_ms();
    for lease in all(inner, "leases/", lease_name, Lease::parse)? {
        let fresh = now < lease.renewed_ms || now - lease.renewed_ms < options.expiry_ms;
        if lease.prunes && !lease.done && lease.id != own && fresh {
            return Err(RepositoryError::Busy { object: lease_name(lease.id), since_ms: lease.renewed_ms });
        }
    }
    Ok(())
}
