//! Sessions: what they send, what they find again, and what becomes of them when leases end and clocks jump.

use crate::seeds::{facts, restored};
use crate::simulation::{LEAF, SimulatedHost, fresh};
use repository::{
    Backup, BackupOptions, Counts, DiskPlan, LocalStore, Made, Point, PruneOptions, Repository, RepositoryError,
    Settings, Stretch, SystemHost, Unlock,
};
use std::sync::Arc;

const DAY: u64 = 86_400_000;

pub(crate) fn plan(content: &[u8], inherit: bool) -> Vec<DiskPlan> {
    let made = if inherit { Made::Incremental } else { Made::Full };
    vec![DiskPlan { name: "a".into(), size: content.len() as u64, inherit, made, identity: Vec::new() }]
}

pub(crate) fn options(predecessor: Option<&Point>) -> BackupOptions {
    BackupOptions { predecessor: predecessor.map(|p| p.id), threads: 0, search: true, cache: None }
}

/// Backs up some leaves of a disk's content.
pub(crate) fn back_up(
    repository: &Repository,
    host: &SimulatedHost,
    before: Option<&Point>,
    content: &[u8],
    leaves: impl IntoIterator<Item = usize>,
) -> (Point, Counts) {
    let mut backup = Backup::begin(repository, &options(before), plan(content, before.is_some())).unwrap();
    for n in leaves {
        backup.put_leaf(0, n as u64, &content[n * LEAF..content.len().min((n + 1) * LEAF)]).unwrap();
    }
    host.pass(1000);
    backup.finish(facts(host)).unwrap()
}

pub(crate) fn noise(seed: u64, leaves: usize) -> Vec<u8> {
    let mut content = vec![0; leaves * LEAF];
    fastrand::Rng::with_seed(seed).fill(&mut content);
    content
}

fn holds(repository: &Repository, point: &Point, content: &[u8]) -> bool {
    restored(repository, point, &mut fastrand::Rng::with_seed(1)).unwrap()[0].1 == content
}

#[test]
fn an_increment_costs_its_changes() {
    let (host, store, repository) = fresh(1, true);
    let mut content = noise(1, 300);
    let (full, counts) = back_up(&repository, &host, None, &content, 0..300);
    assert_eq!((counts.leaves, counts.stored), (300, 300));
    content[LEAF * 7..LEAF * 9].fill(1);
    content[LEAF * 20..LEAF * 280].fill(0);
    let mut backup = Backup::begin(&repository, &options(Some(&full)), plan(&content, true)).unwrap();
    backup.put_leaf(0, 7, &content[LEAF * 7..LEAF * 8]).unwrap();
    backup.put_leaf(0, 8, &content[LEAF * 8..LEAF * 9]).unwrap();
    backup.put_leaf(0, 9, &content[LEAF * 9..LEAF * 10]).unwrap(); // Not changed.
    backup.zero(0, 20..280).unwrap();
    let before = store.names("packs/").len();
    let (point, counts) = backup.finish(facts(&host)).unwrap();
    // Two equal leaves, of few bytes, and two nodes of level 1 with one above: one pack.
    assert_eq!((counts.leaves, counts.stored, counts.known, counts.unchanged, counts.packs), (3, 1, 1, 1, 1));
    assert!(counts.pack_bytes < 30 << 10, "{}", counts.pack_bytes);
    assert_eq!(store.names("packs/").len(), before + 1);
    assert!(holds(&repository, &point, &content));
    assert_eq!(point.predecessor.map(|p| p.0), Some(full.id));
    // The same content again: no pack at all, and the same tree.
    let (same, counts) = back_up(&repository, &host, Some(&point), &content, 0..300);
    assert_eq!((counts.packs, same.disks[0].content()), (0, point.disks[0].content()));
}

#[test]
fn what_an_interrupted_session_stored_is_not_sent_again() {
    let (host, store, repository) = fresh(2, true);
    let content = noise(2, 300);
    let mut backup = Backup::begin(&repository, &options(None), plan(&content, false)).unwrap();
    for n in 0..290 {
        backup.put_leaf(0, n, &content[n as usize * LEAF..][..LEAF]).unwrap();
    }
    // Killed: the last pack and the batch are lost.
    store.crash_after(0);
    drop(backup);
    assert!(store.revive());
    let (point, counts) = back_up(&repository, &host, None, &content, 0..300);
    assert!(counts.known >= 240 && counts.stored == 300 - counts.known, "{counts:?}");
    assert!(holds(&repository, &point, &content));
}

#[test]
fn a_disk_that_shrank_and_grew_shows_no_old_bytes() {
    let (host, _, repository) = fresh(3, true);
    let content = noise(3, 300);
    let (mut point, _) = back_up(&repository, &host, None, &content, 0..300);
    let mut model = content;
    for size in [LEAF * 257 + 5, LEAF * 100 + 77, LEAF * 99, LEAF * 99 + 1, LEAF * 600 + 3, 10, 0, LEAF * 2] {
        model.resize(size, 0);
        point = back_up(&repository, &host, Some(&point), &model, []).0;
        assert!(holds(&repository, &point, &model), "{size} bytes");
    }
}

#[test]
fn threads_and_a_directory_do_the_same() {
    testkit::seeds::each(4, |seed| {
        let folder = tempfile::tempdir().unwrap();
        let open = || Arc::new(LocalStore::open(folder.path().join("store")).unwrap());
        let settings = Settings { leaf_bytes: LEAF as u32, pack_bytes: 1 << 20, encrypted: seed % 2 == 0 };
        let key = if seed % 2 == 0 { Unlock::Passphrase("x".into()) } else { Unlock::Open };
        let quick = Stretch { memory_kib: 64, passes: 1 };
        let repository = Repository::init(open(), Arc::new(SystemHost), settings, &key, quick, "").unwrap();
        let mut random = fastrand::Rng::with_seed(seed);
        let (mut content, mut point): (Vec<u8>, Option<Point>) = (noise(seed, 700), None);
        for _ in 0..4 {
            let options =
                BackupOptions { threads: 3, cache: Some(folder.path().join("cache")), ..options(point.as_ref()) };
            let mut backup = Backup::begin(&repository, &options, plan(&content, point.is_some())).unwrap();
            let mut changed: Vec<usize> = (0..700).collect();
            if point.is_some() {
                changed = (0..99).map(|_| random.usize(..700)).collect();
                for n in &changed {
                    let new = if random.bool() { random.u8(..) } else { 0 };
                    content[n * LEAF..][..LEAF].fill(new);
                }
            }
            for n in changed {
                let leaf = &content[n * LEAF..][..LEAF];
                // The order of the calls counts, also where threads come later.
                backup.put_leaf(0, n as u64, &[7; LEAF]).unwrap();
                if leaf[0] == 0 && leaf[1] == 0 {
                    backup.zero(0, n as u64..n as u64 + 1).unwrap();
                } else {
                    backup.put_leaf(0, n as u64, leaf).unwrap();
                }
            }
            point = Some(backup.finish(facts(&SimulatedHost::new(1))).unwrap().0);
            let again = Repository::open(open(), Arc::new(SystemHost), &key).unwrap();
            assert!(holds(&again, point.as_ref().unwrap(), &content));
        }
        assert!(repository.check().unwrap().findings.is_empty());
        repository.prune(&PruneOptions::default()).unwrap();
    });
}

#[test]
fn a_lease_that_a_jumping_clock_ended_makes_no_point() {
    let (host, _, repository) = fresh(4, true);
    let content = noise(4, 20);
    let (kept, _) = back_up(&repository, &host, None, &content, 0..20);
    let quick = PruneOptions { grace_ms: 1000, young_ms: 0, ..PruneOptions::default() };
    let mut backup = Backup::begin(&repository, &options(None), plan(&[0; LEAF * 200], false)).unwrap();
    let other = noise(5, 200);
    for n in 0..200 {
        backup.put_leaf(0, n, &other[n as usize * LEAF..][..LEAF]).unwrap();
    }
    // A prune sees the lease; the clock jumps by ten years; another takes it for dead, and what it stored for nobody's.
    let first = repository.prune(&quick).unwrap();
    assert!(first.expired.is_empty() && first.tombstoned > 0);
    host.pass(3650 * DAY);
    let second = repository.prune(&quick).unwrap();
    assert_eq!((second.expired.len(), second.packs), (1, first.tombstoned));
    let error = backup.finish(facts(&host)).err().unwrap();
    assert!(matches!(error, RepositoryError::LeaseLost { .. }), "{error}");
    assert_eq!(repository.point_ids().unwrap(), [kept.id]);
    assert!(holds(&repository, &kept, &content));
}

#[test]
fn a_jump_alone_ends_no_lease_and_a_clock_that_goes_back_deletes_nothing() {
    let (host, store, repository) = fresh(5, true);
    let content = noise(6, 200);
    let mut backup = Backup::begin(&repository, &options(None), plan(&content, false)).unwrap();
    for n in 0..200 {
        backup.put_leaf(0, n, &content[n as usize * LEAF..][..LEAF]).unwrap();
    }
    // No prune has seen the lease before the jump.
    host.pass(3650 * DAY);
    let all = PruneOptions { grace_ms: 0, young_ms: 0, ..PruneOptions::default() };
    let pruned = repository.prune(&all).unwrap();
    assert!(pruned.expired.is_empty() && pruned.packs == 0);
    host.pass(1000);
    let pruned = repository.prune(&all).unwrap();
    assert!(pruned.packs == 0 && pruned.waiting_for.len() == 1, "{pruned:?}");
    host.set(1_000_000);
    let packs = store.names("packs/").len();
    for _ in 0..3 {
        assert_eq!(repository.prune(&PruneOptions::default()).unwrap().packs, 0);
    }
    assert_eq!(store.names("packs/").len(), packs);
    let (point, _) = backup.finish(facts(&host)).unwrap();
    assert!(holds(&repository, &point, &content));
}

#[test]
fn a_second_prune_is_refused_and_a_dead_one_is_not_waited_for_for_ever() {
    let (host, store, repository) = fresh(6, true);
    back_up(&repository, &host, None, &noise(7, 9), 0..9);
    let again = repository.clone();
    let (said, heard) = std::sync::mpsc::channel();
    store.interrupt_after(6, move || said.send(again.prune(&PruneOptions::default()).err()).unwrap());
    repository.prune(&PruneOptions::default()).unwrap();
    assert!(matches!(heard.recv().unwrap(), Some(RepositoryError::Busy { .. })));
    store.crash_after(6);
    repository.prune(&PruneOptions::default()).unwrap_err();
    store.revive();
    assert!(matches!(repository.prune(&PruneOptions::default()), Err(RepositoryError::Busy { .. })));
    host.pass(4 * DAY);
    repository.prune(&PruneOptions::default()).unwrap();
}

/// A point that is forgotten, whose packs a tombstone names that is old enough: the next prune deletes them.
fn about_to_go(host: &SimulatedHost, repository: &Repository, content: &[u8], options: &PruneOptions) -> Point {
    let (point, _) = back_up(repository, host, None, content, 0..content.len() / LEAF);
    repository.forget(point.id).unwrap();
    host.pass(options.grace_ms);
    let pruned = repository.prune(options).unwrap();
    assert!(pruned.points == 1 && pruned.tombstoned > 0);
    point
}

const QUICK: PruneOptions =
    PruneOptions { grace_ms: 5000, expiry_ms: DAY, young_ms: 0, repack_percent: 50, repack_bytes: 1 << 30 };

#[test]
fn a_session_that_has_seen_a_tombstone_does_not_keep_its_packs() {
    let (host, store, repository) = fresh(7, true);
    let content = noise(1, 30);
    about_to_go(&host, &repository, &content, &QUICK);
    let mut backup = Backup::begin(&repository, &options(None), plan(&content, false)).unwrap();
    host.pass(6000);
    let pruned = repository.prune(&QUICK).unwrap();
    assert!(pruned.packs > 0 && pruned.waiting_for.is_empty(), "{pruned:?}");
    assert_eq!(store.names("packs/").len(), 0);
    // And it stores anew what it could have found there.
    for n in 0..30 {
        backup.put_leaf(0, n, &content[n as usize * LEAF..][..LEAF]).unwrap();
    }
    let (point, counts) = backup.finish(facts(&host)).unwrap();
    assert_eq!((counts.known, counts.stored), (0, 30));
    assert!(holds(&repository, &point, &content));
}

#[test]
fn a_session_that_has_not_seen_a_tombstone_keeps_its_packs_and_so_does_its_point() {
    for done in [false, true] {
        let (host, store, repository) = fresh(8, true);
        let content = noise(1, 30);
        let (first, _) = back_up(&repository, &host, None, &content, 0..30);
        let mut backup = Backup::begin(&repository, &options(None), plan(&content, false)).unwrap();
        repository.forget(first.id).unwrap();
        repository.prune(&QUICK).unwrap();
        host.pass(6000);
        for n in 0..30 {
            backup.put_leaf(0, n, &content[n as usize * LEAF..][..LEAF]).unwrap();
        }
        let point = if done {
            let (point, counts) = backup.finish(facts(&host)).unwrap();
            assert_eq!(counts.known, 30);
            // The list of points is late: the lease, which is done, leads to it.
            store.hidden.lock().unwrap().push(format!("points/{}", point.id));
            assert_eq!(repository.prune(&QUICK).unwrap().packs, 0);
            point
        } else {
            let pruned = repository.prune(&QUICK).unwrap();
            assert_eq!((pruned.points, pruned.packs, pruned.waiting_for.len()), (1, 0, 1));
            backup.finish(facts(&host)).unwrap().0
        };
        store.hidden.lock().unwrap().clear();
        host.pass(6000);
        assert_eq!(repository.prune(&QUICK).unwrap().packs, 0);
        assert!(holds(&repository, &point, &content));
    }
}

#[test]
fn a_tombstone_waits_for_the_grace_because_lists_are_late() {
    let (host, store, repository) = fresh(9, true);
    let content = noise(1, 30);
    about_to_go(&host, &repository, &content, &QUICK);
    // A session that the lists show nothing, and that they do not show.
    *store.hidden.lock().unwrap() = store.names("tombstones/");
    let mut backup = Backup::begin(&repository, &options(None), plan(&content, false)).unwrap();
    *store.hidden.lock().unwrap() = store.names("leases/");
    host.pass(1000);
    assert_eq!(repository.prune(&QUICK).unwrap().packs, 0);
    store.hidden.lock().unwrap().clear();
    for n in 0..30 {
        backup.put_leaf(0, n, &content[n as usize * LEAF..][..LEAF]).unwrap();
    }
    let (point, counts) = backup.finish(facts(&host)).unwrap();
    assert_eq!(counts.known, 30);
    host.pass(6000);
    repository.prune(&QUICK).unwrap();
    assert!(holds(&repository, &point, &content));
}

#[test]
fn a_point_that_a_fast_clock_forgot_is_whole_until_it_goes() {
    let (host, _, repository) = fresh(10, true);
    let content = noise(1, 30);
    let (point, _) = back_up(&repository, &host, None, &content, 0..30);
    host.pass(DAY);
    repository.forget(point.id).unwrap();
    host.set(1_700_000_100_000);
    assert!(repository.point_ids().unwrap().is_empty());
    // By this clock the mark is of tomorrow, and the tombstone gets old before it.
    for _ in 0..5 {
        repository.prune(&QUICK).unwrap();
        host.pass(6000);
        assert!(holds(&repository, &repository.point(point.id).unwrap(), &content));
    }
    host.pass(2 * DAY);
    repository.prune(&QUICK).unwrap();
    assert!(matches!(repository.point(point.id), Err(RepositoryError::NoPoint { .. })));
}

#[test]
fn whenever_a_lease_is_taken_for_dead_no_point_is_left_that_lacks_a_pack() {
    let mut lost = 0;
    for calls in 0..40 {
        let (host, store, repository) = fresh(11, true);
        let content = noise(1, 200);
        let mut backup = Backup::begin(&repository, &options(None), plan(&content, false)).unwrap();
        for n in 0..200 {
            backup.put_leaf(0, n, &content[n as usize * LEAF..][..LEAF]).unwrap();
        }
        backup.keep_alive().unwrap();
        let (other, clock) = (repository.clone(), host.clone());
        // Between two calls of the session: a prune sees the lease, ten years pass, another takes it for dead.
        store.interrupt_after(calls, move || {
            other.prune(&QUICK).unwrap();
            clock.pass(3650 * DAY);
            other.prune(&QUICK).unwrap();
        });
        match backup.finish(facts(&host)) {
            Ok((point, _)) => assert!(holds(&repository, &point, &content), "{calls}"),
            Err(e) => {
                assert!(matches!(e, RepositoryError::LeaseLost { .. }), "{e}");
                lost += 1;
            }
        }
        for (_, point) in repository.points().unwrap() {
            assert!(holds(&repository, &point.unwrap(), &content), "{calls}");
        }
    }
    assert!(lost > 0);
}
