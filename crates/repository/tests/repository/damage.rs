//! Objects that are flipped, cut or gone: detected, named, and contained. No damage gives wrong content, and points that do not need what is damaged
//! are restored.

use crate::seeds::restored;
use crate::sessions::{back_up, noise, options, plan};
use crate::simulation::{LEAF, SimulatedHost, SimulatedStore, fresh, key};
use repository::{Backup, DamageReason, Id, PruneOptions, Repository, Unlock, VerifyOptions};
use std::collections::BTreeSet;
use std::sync::Arc;

struct Case {
    host: Arc<SimulatedHost>,
    store: Arc<SimulatedStore>,
    unlock: Unlock,
    points: Vec<(Id, Vec<u8>)>,
}

/// Three points: a full one, one that builds upon it, and one of another disk.
fn case(encrypted: bool) -> Case {
    let (host, store, repository) = fresh(9, encrypted);
    let mut content = noise(1, 20);
    content[..LEAF * 4].fill(9);
    let (full, _) = back_up(&repository, &host, None, &content, 0..20);
    let mut points = vec![(full.id, content.clone())];
    content[LEAF * 5..LEAF * 7].copy_from_slice(&noise(2, 2));
    points.push((back_up(&repository, &host, Some(&full), &content, 5..7).0.id, content));
    let other = noise(3, 10);
    points.push((back_up(&repository, &host, None, &other, 0..10).0.id, other));
    let unlock = if encrypted { key() } else { Unlock::Open };
    Case { host, store, unlock, points }
}

impl Case {
    fn open(&self) -> Option<Repository> {
        Repository::open(self.store.clone(), self.host.clone(), &self.unlock).ok()
    }

    /// Which points are restored. None has other content than it had.
    fn healthy(&self, repository: &Repository) -> BTreeSet<usize> {
        let mut random = fastrand::Rng::with_seed(1);
        let restored = self.points.iter().enumerate().filter(|(_, (id, content))| {
            let found = repository.point(*id).and_then(|point| restored(repository, &point, &mut random));
            found.is_ok_and(|found| {
                assert!(found[0].1 == *content, "wrong content without an error");
                true
            })
        });
        restored.map(|(n, _)| n).collect()
    }

    /// Points that `verify` names.
    fn named(&self, repository: &Repository) -> BTreeSet<usize> {
        let report = repository.verify(VerifyOptions::default()).unwrap();
        let hit = |id: &Id| report.findings.iter().any(|f| f.point == Some(*id));
        self.points.iter().enumerate().filter(|(_, (id, _))| hit(id)).map(|(n, _)| n).collect()
    }
}

#[test]
fn any_flipped_bit_is_found_and_hits_only_who_needs_it() {
    for encrypted in [true, false] {
        let case = case(encrypted);
        let all: BTreeSet<usize> = (0..3).collect();
        let mut random = fastrand::Rng::with_seed(2);
        let mut contained = 0;
        for name in case.store.names("") {
            let good = case.store.content(&name);
            case.store.replace(&name, None);
            let without = case.open().map_or(BTreeSet::new(), |repository| case.healthy(&repository));
            for round in 0..12 {
                let mut bad = good.clone();
                let at = match round {
                    0 => 0,
                    1 => bad.len() - 1,
                    _ => random.usize(..bad.len()),
                };
                match random.u8(..4) {
                    0 => bad.truncate(at),
                    _ => bad[at] ^= 1 << random.u8(..8),
                }
                case.store.replace(&name, Some(bad));
                let Some(repository) = case.open() else {
                    assert!(name == "config" || name.starts_with("keys/"), "{name}");
                    continue;
                };
                let healthy = case.healthy(&repository);
                assert!(healthy.is_superset(&without), "{name}: hits more than who needs it");
                let named = case.named(&repository);
                assert_eq!(named, all.difference(&healthy).copied().collect(), "{name}");
                contained += usize::from(!healthy.is_empty() && healthy != all);
                // Nothing is deleted on the word of what is damaged, and backups go on.
                case.host.pass(1);
                let lenient = PruneOptions { grace_ms: 0, young_ms: 0, ..PruneOptions::default() };
                let copy = case.store.copy();
                let on_copy = Repository::open(copy.clone(), case.host.clone(), &case.unlock).unwrap();
                for _ in 0..3 {
                    let _ = on_copy.prune(&lenient);
                }
                let after = Case {
                    store: copy,
                    host: case.host.clone(),
                    unlock: case.unlock.clone(),
                    points: case.points.clone(),
                };
                assert!(after.healthy(&on_copy).is_superset(&healthy), "{name}: prune took what is needed");
                back_up(&on_copy, &case.host, None, &noise(8, 3), 0..3);
            }
            case.store.replace(&name, Some(good));
        }
        assert!(contained > 10, "{contained}");
        assert_eq!(case.healthy(&case.open().unwrap()), all);
    }
}

#[test]
fn what_is_gone_or_cut_is_named() {
    let case = case(true);
    let repository = case.open().unwrap();
    for name in case.store.names("packs/") {
        let good = case.store.content(&name);
        for (bad, reasons) in [
            (None, vec![DamageReason::Missing]),
            (Some(good[..good.len() - 1].to_vec()), vec![DamageReason::Trailer, DamageReason::Checksum]),
            (Some(good[..good.len() / 2].to_vec()), vec![DamageReason::Trailer]),
            (Some(Vec::new()), vec![DamageReason::Trailer]),
        ] {
            case.store.replace(&name, bad);
            let repository = case.open().unwrap();
            let report = repository.check().unwrap();
            let found: Vec<_> =
                report.findings.iter().filter_map(|f| f.error.damage()).filter(|d| d.object == name).collect();
            assert!(!found.is_empty(), "{name}: {:?}", report.findings);
            assert!(found.iter().any(|d| reasons.contains(&d.reason) || d.reason == DamageReason::Short), "{found:?}");
        }
        case.store.replace(&name, Some(good));
    }
    assert!(repository.check().unwrap().findings.is_empty());
}

#[test]
fn verify_tells_the_range_for_every_point() {
    let case = case(true);
    let pack = case.store.names("packs/").into_iter().max_by_key(|name| case.store.content(name).len()).unwrap();
    let mut bad = case.store.content(&pack);
    let middle = bad.len() / 3;
    bad[middle] ^= 1;
    case.store.replace(&pack, Some(bad));
    let report = case.open().unwrap().verify(VerifyOptions::default()).unwrap();
    assert!(!report.findings.is_empty());
    for finding in &report.findings {
        assert_eq!(finding.disk.as_deref(), Some("a"));
        assert_eq!((finding.range.start % LEAF as u64, finding.range.end - finding.range.start), (0, LEAF as u64));
        assert_eq!(
            finding.error.damage().map(|d| (d.object.clone(), d.reason)),
            Some((pack.clone(), DamageReason::Tag))
        );
    }
}

#[test]
fn another_pack_or_frame_in_its_place_is_refused() {
    let case = case(true);
    let packs = case.store.names("packs/");
    let (a, b) = (case.store.content(&packs[0]), case.store.content(&packs[1]));
    case.store.replace(&packs[0], Some(b));
    case.store.replace(&packs[1], Some(a));
    let repository = case.open().unwrap();
    assert!(case.healthy(&repository).len() < 3);
    // Points too: each is bound to its name.
    let points = case.store.names("points/");
    let (a, b) = (case.store.content(&points[0]), case.store.content(&points[1]));
    case.store.replace(&points[0], Some(b));
    case.store.replace(&points[1], Some(a));
    assert!(repository.points().unwrap()[..2].iter().all(|(_, point)| point.is_err()));
}

#[test]
fn a_damaged_index_costs_room_and_never_content() {
    let (host, _, repository) = fresh(11, true);
    let folder = tempfile::tempdir().unwrap();
    let content = noise(4, 200);
    let search = repository::BackupOptions { cache: Some(folder.path().into()), ..options(None) };
    let mut random = fastrand::Rng::with_seed(5);
    for round in 0..30 {
        let mut backup = Backup::begin(&repository, &search, plan(&content, false)).unwrap();
        for n in 0..200 {
            backup.put_leaf(0, n, &content[n as usize * LEAF..][..LEAF]).unwrap();
        }
        let (point, counts) = backup.finish(crate::seeds::facts(&host)).unwrap();
        assert!(restored(&repository, &point, &mut random).unwrap()[0].1 == content);
        assert!(round == 0 || counts.known > 0, "{counts:?}");
        let files: Vec<_> = std::fs::read_dir(folder.path())
            .unwrap()
            .map(|e| e.unwrap().path())
            .filter(|p| !p.ends_with("lock"))
            .collect();
        let file = &files[random.usize(..files.len())];
        let mut bytes = std::fs::read(file).unwrap();
        let at = random.usize(..bytes.len());
        if random.bool() {
            bytes[at] ^= 1 << random.u8(..8)
        } else {
            bytes.truncate(at)
        }
        std::fs::write(file, bytes).unwrap();
    }
}
