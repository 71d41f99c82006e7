//! Many backups, by several writers at once, with forgetting, pruning, crashes and late lists between; every point that is kept is what it was.

use crate::simulation::{LEAF, SimulatedHost, SimulatedStore, fresh, key, leaf};
use repository::{
    Backup, BackupOptions, Consistency, DiskPlan, Host, Id, Made, Point, PointFacts, PruneOptions, Repository,
    RepositoryError, Unlock,
};
use std::collections::{BTreeMap, HashSet};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

type Disks = Vec<(String, Vec<u8>)>;

struct Writer {
    backup: Backup,
    target: Disks,
    /// Disk, leaf: in any order.
    left: Vec<(usize, u64)>,
}

#[derive(Default)]
struct Truth {
    points: BTreeMap<Id, Disks>,
    /// Contents of points that may or may not have been made.
    possible: Vec<Disks>,
    forgotten: HashSet<Id>,
}

pub(crate) struct World {
    random: fastrand::Rng,
    host: Arc<SimulatedHost>,
    store: Arc<SimulatedStore>,
    repository: Repository,
    unlock: Unlock,
    truth: Arc<Mutex<Truth>>,
    writers: Vec<Writer>,
    cache: tempfile::TempDir,
    prune: PruneOptions,
}

pub(crate) fn facts(host: &SimulatedHost) -> PointFacts {
    PointFacts {
        machine: "m".into(),
        created_ms: host.now_ms(),
        consistency: Consistency::Crash,
        attachments: vec![("configuration".into(), b"cpus = 2".to_vec())],
        note: String::new(),
    }
}

/// Other content from this, and which leaves differ.
fn change(random: &mut fastrand::Rng, before: Option<&Vec<u8>>) -> Vec<u8> {
    let size = |random: &mut fastrand::Rng| match random.u8(..12) {
        0 => random.usize(..LEAF * 2),
        1 => random.usize(LEAF * 250..LEAF * 300),
        _ => random.usize(LEAF..LEAF * 24),
    };
    let mut content = before.cloned().unwrap_or_default();
    if before.is_none() || random.u8(..6) == 0 {
        content.resize(size(random), 0);
    }
    let leaves = content.len().div_ceil(LEAF);
    let writes = if before.is_none() { leaves } else { random.usize(..8) };
    for n in 0..writes {
        if leaves == 0 {
            break;
        }
        let at = if before.is_none() { n } else { random.usize(..leaves) } * LEAF;
        let new = leaf(random);
        let end = content.len().min(at + LEAF);
        // Sometimes a part of a leaf alone.
        let from = if before.is_some() && random.bool() { at + random.usize(..end - at) } else { at };
        content[from..end].copy_from_slice(&new[..end - from]);
    }
    content
}

fn slice(content: &[u8], index: u64) -> &[u8] {
    let from = index as usize * LEAF;
    &content[from..content.len().min(from + LEAF)]
}

/// Begins a session whose point will have other content than its predecessor.
fn begin(
    random: &mut fastrand::Rng,
    repository: &Repository,
    cache: Option<std::path::PathBuf>,
    before: Option<(Id, Disks)>,
) -> Result<Writer, RepositoryError> {
    let (predecessor, old) = before.map_or((None, Vec::new()), |(id, disks)| (Some(id), disks));
    let mut names: Vec<String> = old.iter().map(|(name, _)| name.clone()).collect();
    if names.is_empty() || random.u8(..10) == 0 {
        names.push(format!("disk{}", names.len()));
    }
    let (mut plans, mut target, mut left) = (Vec::new(), Vec::new(), Vec::new());
    for (n, name) in names.into_iter().enumerate() {
        let base = old.iter().find(|(other, _)| *other == name).map(|(_, content)| content);
        let content = change(random, base);
        let made = match base {
            None => Made::Full,
            Some(_) if random.u8(..4) == 0 => Made::Compared,
            Some(_) => Made::Incremental,
        };
        for index in 0..content.len().div_ceil(LEAF) as u64 {
            let from = index as usize * LEAF;
            let same = base.is_some_and(|base| {
                let mut old = base.get(from..).unwrap_or_default().to_vec();
                old.resize(content.len() - from, 0);
                old[..slice(&content, index).len()] == *slice(&content, index)
            });
            if made != Made::Incremental || !same || random.u8(..20) == 0 {
                left.push((n, index));
            }
        }
        let size = content.len() as u64;
        plans.push(DiskPlan {
            name: name.clone(),
            size,
            inherit: base.is_some(),
            made,
            identity: vec![("mark".into(), "7".into())],
        });
        target.push((name, content));
    }
    if random.u8(..3) == 0 {
        random.shuffle(&mut left);
    }
    let options = BackupOptions { predecessor, threads: 0, search: random.u8(..4) > 0, cache };
    let backup = Backup::begin(repository, &options, plans)?;
    Ok(Writer { backup, target, left })
}

impl Writer {
    fn put(&mut self, random: &mut fastrand::Rng, most: usize) -> Result<(), RepositoryError> {
        for _ in 0..most.min(self.left.len()) {
            let (disk, index) = self.left.remove(0);
            let bytes = slice(&self.target[disk].1, index);
            if bytes.iter().all(|b| *b == 0) && random.bool() {
                // Other leaves of the range that are zero too may be named, put or not.
                let content = &self.target[disk].1;
                let last = content.len().div_ceil(LEAF) as u64;
                let end = (index + 1..last).find(|n| slice(content, *n).iter().any(|b| *b != 0)).unwrap_or(last + 9);
                self.backup.zero(disk, index..end)?;
            } else {
                if random.u8(..10) == 0 {
                    // What is put twice is what was put last.
                    let other = vec![random.u8(..); bytes.len()];
                    self.backup.put_leaf(disk, index, &other)?;
                }
                self.backup.put_leaf(disk, index, bytes)?;
            }
        }
        Ok(())
    }

    fn finish(
        mut self,
        random: &mut fastrand::Rng,
        host: &SimulatedHost,
        truth: &Mutex<Truth>,
    ) -> Result<(), RepositoryError> {
        self.put(random, usize::MAX)?;
        match self.backup.finish(facts(host)) {
            Ok((point, _)) => drop(truth.lock().unwrap().points.insert(point.id, self.target)),
            Err(e) => {
                truth.lock().unwrap().possible.push(self.target);
                return Err(e);
            }
        }
        Ok(())
    }
}

pub(crate) fn restored(
    repository: &Repository,
    point: &Point,
    random: &mut fastrand::Rng,
) -> Result<Disks, RepositoryError> {
    let mut disks = Vec::new();
    for disk in &point.disks {
        let reader = repository.disk(disk, random.usize(..8) * LEAF);
        let mut content = vec![0xEE; disk.size as usize];
        let mut at = 0;
        while at < content.len() {
            let end = content.len().min(at + random.usize(1..LEAF * 9));
            reader.read(at as u64, &mut content[at..end])?;
            at = end;
        }
        disks.push((disk.name.clone(), content));
    }
    Ok(disks)
}

impl World {
    fn new(seed: u64) -> World {
        let mut random = fastrand::Rng::with_seed(seed);
        let encrypted = random.u8(..4) > 0;
        let (host, store, repository) = fresh(seed, encrypted);
        let late = [0, 0, 1000][random.usize(..3)];
        host.pass(1000); // So that lists have the key.
        store.late_ms.store(late, Ordering::Relaxed);
        let prune = PruneOptions {
            grace_ms: if late > 0 { 2000 } else { [0, 2000][random.usize(..2)] },
            expiry_ms: 100_000,
            young_ms: [0, 5000][random.usize(..2)],
            repack_percent: [50, 90][random.usize(..2)],
            repack_bytes: 1 << 20,
        };
        let unlock = if encrypted { key() } else { Unlock::Open };
        let truth = Arc::default();
        World {
            random,
            host,
            store,
            repository,
            unlock,
            truth,
            writers: Vec::new(),
            cache: tempfile::tempdir().unwrap(),
            prune,
        }
    }

    fn some_point(&mut self) -> Option<(Id, Disks)> {
        let truth = self.truth.lock().unwrap();
        let kept: Vec<_> = truth.points.iter().filter(|(id, _)| !truth.forgotten.contains(id)).collect();
        let newest = kept.len().saturating_sub(self.random.usize(1..4));
        kept.get(newest).map(|(id, disks)| (**id, (*disks).clone()))
    }

    fn cache(&mut self) -> Option<std::path::PathBuf> {
        (self.random.u8(..3) > 0).then(|| self.cache.path().join("index"))
    }

    /// What another process does between two calls of this one.
    fn interrupt(&mut self) {
        let calls = self.random.u64(1..40);
        let (host, store, truth, prune) = (self.host.clone(), self.store.clone(), self.truth.clone(), self.prune);
        let (unlock, seed) = (self.unlock.clone(), self.random.u64(..));
        let before = self.some_point();
        let what = self.random.u8(..3);
        self.store.interrupt_after(calls, move || {
            let mut random = fastrand::Rng::with_seed(seed);
            let Ok(repository) = Repository::open(store, host.clone(), &unlock) else { return };
            match (what, before) {
                (0, Some((id, _))) => {
                    if repository.forget(id).is_ok() {
                        truth.lock().unwrap().forgotten.insert(id);
                    }
                }
                (1, _) => drop(repository.prune(&prune)),
                (_, before) => {
                    if let Ok(writer) = begin(&mut random, &repository, None, before) {
                        drop(writer.finish(&mut random, &host, &truth));
                    }
                }
            }
        });
    }

    fn step(&mut self) {
        self.host.pass(self.random.u64(..3000));
        let mut disturbed = true;
        match self.random.u8(..10) {
            0 => self.store.crash_after(self.random.u64(1..40)),
            1 => self.store.fail_after(self.random.u64(1..40)),
            2..5 => self.interrupt(),
            _ => disturbed = false,
        }
        let result = self.act();
        if self.store.revive() {
            // The process is gone, and all that it knew.
            self.repository = Repository::open(self.store.clone(), self.host.clone(), &self.unlock).unwrap();
        } else if let Err(e) = result {
            let another = matches!(e, RepositoryError::Busy { .. } | RepositoryError::NoPoint { .. });
            assert!(disturbed || another, "{e:?}");
        }
    }

    fn act(&mut self) -> Result<(), RepositoryError> {
        match self.random.u8(..12) {
            0..4 if self.writers.len() < 3 => {
                let before = if self.random.u8(..5) == 0 { None } else { self.some_point() };
                let cache = self.cache();
                let writer = begin(&mut self.random, &self.repository, cache, before)?;
                self.writers.push(writer);
            }
            4..6 if !self.writers.is_empty() => {
                let n = self.random.usize(..self.writers.len());
                let mut writer = self.writers.swap_remove(n);
                writer.put(&mut self.random, 10)?;
                self.writers.push(writer);
            }
            6..8 if !self.writers.is_empty() => {
                let n = self.random.usize(..self.writers.len());
                self.writers.swap_remove(n).finish(&mut self.random, &self.host, &self.truth)?;
            }
            8 if !self.writers.is_empty() && self.random.bool() => {
                let n = self.random.usize(..self.writers.len());
                self.writers.swap_remove(n).backup.abandon()?;
            }
            8 | 9 => {
                if let Some((id, _)) = self.some_point() {
                    // Tried is as good as done: the mark may have come to the store.
                    self.truth.lock().unwrap().forgotten.insert(id);
                    self.repository.forget(id)?;
                }
            }
            10 if self.random.u8(..3) == 0 => {
                drop(std::fs::remove_dir_all(self.cache.path().join("index")));
            }
            _ => drop(self.repository.prune(&self.prune)?),
        }
        Ok(())
    }

    /// Every point that is kept, and every one that is listed, is what it was.
    fn compare(&mut self) {
        self.host.pass(1000);
        let truth = self.truth.lock().unwrap();
        let listed: HashSet<Id> = self.repository.point_ids().unwrap().into_iter().collect();
        for (id, disks) in truth.points.iter().filter(|(id, _)| !truth.forgotten.contains(id)) {
            assert!(listed.contains(id), "point {id} is gone");
            let point = self.repository.point(*id).unwrap();
            let found =
                restored(&self.repository, &point, &mut self.random).unwrap_or_else(|e| panic!("point {id}: {e}"));
            assert!(found == *disks, "point {id} has other content");
        }
        for id in listed.iter().filter(|id| !truth.points.contains_key(id)) {
            let point = self.repository.point(*id).unwrap();
            let found = restored(&self.repository, &point, &mut self.random).unwrap();
            assert!(truth.possible.contains(&found), "point {id} is nobody's");
        }
    }
}

#[test]
fn every_kept_point_is_what_it_was() {
    testkit::seeds::each(200, |seed| {
        let mut world = World::new(seed);
        for n in 0..40 {
            world.step();
            if n % 13 == 12 {
                world.compare();
            }
        }
        world.compare();
        let report = world.repository.check().unwrap();
        assert!(report.findings.is_empty(), "{:?}", report.findings);
        let report = world.repository.verify(repository::VerifyOptions::default()).unwrap();
        assert!(report.findings.is_empty(), "{:?}", report.findings);
    });
}

#[test]
fn all_space_comes_back() {
    testkit::seeds::each(40, |seed| {
        let mut world = World::new(seed);
        for _ in 0..25 {
            world.step();
        }
        world.writers.clear();
        world.compare();
        for id in world.repository.point_ids().unwrap() {
            world.repository.forget(id).unwrap();
        }
        for _ in 0..8 {
            world.host.pass(400_001);
            world.repository.prune(&world.prune).unwrap();
        }
        for folder in ["packs/", "points/", "forgotten/", "tombstones/", "relocations/"] {
            assert_eq!(world.store.names(folder), [""; 0], "left behind");
        }
        assert_eq!(world.store.names("leases/").len(), 1, "the last prune's own");
    });
}
