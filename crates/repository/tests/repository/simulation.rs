//! A store in memory that fails as it is told to, a clock that is set, and randomness from a seed.

use repository::{Host, Object, Repository, Settings, Store, StoreError, StoreErrorKind, Stretch, Unlock};
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

/// The smallest that a repository may have, so that small disks have many.
pub(crate) const LEAF: usize = 16 << 10;

pub(crate) struct SimulatedHost {
    now: AtomicU64,
    random: Mutex<fastrand::Rng>,
}

impl SimulatedHost {
    pub(crate) fn new(seed: u64) -> Arc<SimulatedHost> {
        let random = Mutex::new(fastrand::Rng::with_seed(seed ^ 0x5eed));
        Arc::new(SimulatedHost { now: AtomicU64::new(1_700_000_000_000), random })
    }

    pub(crate) fn pass(&self, ms: u64) {
        self.now.fetch_add(ms, Ordering::Relaxed);
    }

    pub(crate) fn set(&self, ms: u64) {
        self.now.store(ms, Ordering::Relaxed);
    }
}

impl Host for SimulatedHost {
    fn now_ms(&self) -> u64 {
        self.now.load(Ordering::Relaxed)
    }

    fn random(&self, bytes: &mut [u8]) -> bool {
        self.random.lock().unwrap().fill(bytes);
        true
    }
}

struct Kept {
    content: Arc<Vec<u8>>,
    put_ms: u64,
    /// When there was first an object of this name: replacing one does not take it out of lists.
    since_ms: u64,
    /// Deleted then, and perhaps listed still.
    deleted_ms: Option<u64>,
}

type Interruption = (u64, Box<dyn FnOnce() + Send>);

pub(crate) struct SimulatedStore {
    host: Arc<SimulatedHost>,
    objects: Mutex<BTreeMap<String, Kept>>,
    /// How late lists may be, in milliseconds.
    pub(crate) late_ms: AtomicU64,
    /// What no list shows.
    pub(crate) hidden: Mutex<Vec<String>>,
    calls: AtomicU64,
    random: Mutex<fastrand::Rng>,
    /// From this call on nothing works; the call itself may have happened.
    crash_at: AtomicU64,
    /// This call fails, and may have happened.
    fail_at: AtomicU64,
    interruption: Mutex<Option<Interruption>>,
}

impl SimulatedStore {
    pub(crate) fn new(seed: u64, host: Arc<SimulatedHost>) -> Arc<SimulatedStore> {
        Arc::new(SimulatedStore {
            host,
            objects: Mutex::default(),
            late_ms: AtomicU64::new(0),
            hidden: Mutex::default(),
            calls: AtomicU64::new(0),
            random: Mutex::new(fastrand::Rng::with_seed(seed ^ 0x570e)),
            crash_at: AtomicU64::new(u64::MAX),
            fail_at: AtomicU64::new(u64::MAX),
            interruption: Mutex::default(),
        })
    }

    pub(crate) fn crash_after(&self, calls: u64) {
        self.crash_at.store(self.calls.load(Ordering::Relaxed) + calls, Ordering::Relaxed);
    }

    pub(crate) fn fail_after(&self, calls: u64) {
        self.fail_at.store(self.calls.load(Ordering::Relaxed) + calls, Ordering::Relaxed);
    }

    /// Before the call after so many others, `what` is done: as if another process had come between.
    pub(crate) fn interrupt_after(&self, calls: u64, what: impl FnOnce() + Send + 'static) {
        *self.interruption.lock().unwrap() = Some((self.calls.load(Ordering::Relaxed) + calls, Box::new(what)));
    }

    /// Whether there was a crash; from now on all works again.
    pub(crate) fn revive(&self) -> bool {
        *self.interruption.lock().unwrap() = None;
        self.fail_at.store(u64::MAX, Ordering::Relaxed);
        self.crash_at.swap(u64::MAX, Ordering::Relaxed) <= self.calls.load(Ordering::Relaxed)
    }

    pub(crate) fn names(&self, prefix: &str) -> Vec<String> {
        let objects = self.objects.lock().unwrap();
        objects
            .iter()
            .filter(|(name, o)| name.starts_with(prefix) && o.deleted_ms.is_none())
            .map(|(name, _)| name.clone())
            .collect()
    }

    pub(crate) fn content(&self, name: &str) -> Vec<u8> {
        self.objects.lock().unwrap()[name].content.to_vec()
    }

    /// Puts back what was, or something else, behind the repository's back.
    pub(crate) fn replace(&self, name: &str, content: Option<Vec<u8>>) {
        let mut objects = self.objects.lock().unwrap();
        match content {
            None => drop(objects.remove(name)),
            Some(content) => {
                let put_ms = objects.get(name).map_or(0, |o| o.put_ms);
                objects.insert(
                    name.to_owned(),
                    Kept { content: Arc::new(content), put_ms, since_ms: put_ms, deleted_ms: None },
                );
            }
        }
    }

    /// Another store with the same objects.
    pub(crate) fn copy(&self) -> Arc<SimulatedStore> {
        let other = SimulatedStore::new(1, self.host.clone());
        for (name, kept) in &*self.objects.lock().unwrap() {
            let copied = Kept {
                content: kept.content.clone(),
                put_ms: kept.put_ms,
                since_ms: kept.since_ms,
                deleted_ms: kept.deleted_ms,
            };
            other.objects.lock().unwrap().insert(name.clone(), copied);
        }
        other
    }

    /// Counts a call; tells whether it happens, and how it ends.
    fn call<T>(&self, name: &str, happen: impl FnOnce() -> Result<T, StoreError>) -> Result<T, StoreError> {
        let call = self.calls.fetch_add(1, Ordering::Relaxed);
        let due = {
            let mut interruption = self.interruption.lock().unwrap();
            if interruption.as_ref().is_some_and(|(at, _)| call >= *at) { interruption.take() } else { None }
        };
        if let Some((_, what)) = due {
            what();
        }
        let failed = || StoreError::new(StoreErrorKind::Other, format!("{name}: the simulation failed this call"));
        let crash_at = self.crash_at.load(Ordering::Relaxed);
        let fails = call == self.fail_at.load(Ordering::Relaxed) || call >= crash_at;
        if fails {
            if call <= crash_at && self.random.lock().unwrap().bool() {
                let _ = happen();
            }
            return Err(failed());
        }
        happen()
    }

    fn find(&self, name: &str) -> Result<(Arc<Vec<u8>>, u64), StoreError> {
        let objects = self.objects.lock().unwrap();
        let kept = objects.get(name).filter(|o| o.deleted_ms.is_none());
        kept.map(|o| (o.content.clone(), o.put_ms))
            .ok_or_else(|| StoreError::new(StoreErrorKind::Missing, format!("{name}: none")))
    }

    fn enter(&self, name: &str, content: &[u8]) {
        assert!(repository::check_name(name), "{name}");
        let mut objects = self.objects.lock().unwrap();
        let put_ms = self.host.now_ms();
        let since_ms = objects.get(name).filter(|o| o.deleted_ms.is_none()).map_or(put_ms, |o| o.since_ms);
        let kept = Kept { content: Arc::new(content.to_vec()), put_ms, since_ms, deleted_ms: None };
        objects.insert(name.to_owned(), kept);
    }
}

impl Store for SimulatedStore {
    fn read(&self, name: &str, range: Range<u64>) -> Result<Vec<u8>, StoreError> {
        self.call(name, || {
            let content = self.find(name)?.0;
            let end = range.end.min(content.len() as u64);
            Ok(content[range.start.min(end) as usize..end as usize].to_vec())
        })
    }

    fn read_all(&self, name: &str, limit: u64) -> Result<Vec<u8>, StoreError> {
        self.call(name, || {
            let content = self.find(name)?.0;
            if content.len() as u64 > limit {
                return Err(StoreError::new(StoreErrorKind::TooLarge, format!("{name}: too large")));
            }
            Ok(content.to_vec())
        })
    }

    fn look(&self, name: &str) -> Result<Object, StoreError> {
        self.call(name, || {
            let (content, put_ms) = self.find(name)?;
            Ok(Object { name: name.to_owned(), length: content.len() as u64, put_ms })
        })
    }

    fn put_new(&self, name: &str, content: &[u8]) -> Result<(), StoreError> {
        self.call(name, || {
            if self.find(name).is_ok() {
                return Err(StoreError::new(StoreErrorKind::Exists, format!("{name}: there already")));
            }
            self.enter(name, content);
            Ok(())
        })
    }

    fn put(&self, name: &str, content: &[u8]) -> Result<(), StoreError> {
        self.call(name, || {
            self.enter(name, content);
            Ok(())
        })
    }

    fn list(&self, prefix: &str, each: &mut dyn FnMut(Object)) -> Result<(), StoreError> {
        let listed = self.call(prefix, || {
            let (now, late) = (self.host.now_ms(), self.late_ms.load(Ordering::Relaxed));
            let mut random = self.random.lock().unwrap();
            let mut listed = Vec::new();
            for (name, kept) in &*self.objects.lock().unwrap() {
                let recent = |ms: u64| late > 0 && now.saturating_sub(ms) < late;
                let shown = match kept.deleted_ms {
                    Some(ms) => recent(ms) && random.bool(),
                    None => !recent(kept.since_ms) || random.bool(),
                };
                if shown && name.starts_with(prefix) && !self.hidden.lock().unwrap().contains(name) {
                    let length = kept.content.len() as u64;
                    listed.push(Object { name: name.clone(), length, put_ms: kept.put_ms });
                }
            }
            Ok(listed)
        })?;
        listed.into_iter().for_each(each);
        Ok(())
    }

    fn delete(&self, name: &str) -> Result<(), StoreError> {
        self.call(name, || {
            let now = self.host.now_ms();
            if let Some(kept) = self.objects.lock().unwrap().get_mut(name) {
                kept.deleted_ms.get_or_insert(now);
            }
            Ok(())
        })
    }

    fn retain(&self, name: &str, _: u64) -> Result<(), StoreError> {
        Err(StoreError::new(StoreErrorKind::Unsupported, name))
    }
}

pub(crate) fn key() -> Unlock {
    Unlock::KeyFile(format!("highwater-key-1:{}", "07".repeat(32)))
}

pub(crate) fn settings(encrypted: bool) -> Settings {
    Settings { leaf_bytes: LEAF as u32, pack_bytes: 128 << 10, encrypted }
}

/// A new repository in a new simulated store.
pub(crate) fn fresh(seed: u64, encrypted: bool) -> (Arc<SimulatedHost>, Arc<SimulatedStore>, Repository) {
    let host = SimulatedHost::new(seed);
    let store = SimulatedStore::new(seed, host.clone());
    let key = if encrypted { key() } else { Unlock::Open };
    let made = Repository::init(store.clone(), host.clone(), settings(encrypted), &key, Stretch::default(), "first");
    (host, store, made.unwrap())
}

/// Content of one leaf: mostly of few values, sometimes random, sometimes one that others have too.
pub(crate) fn leaf(random: &mut fastrand::Rng) -> Vec<u8> {
    let mut leaf = vec![0; LEAF];
    match random.u8(..8) {
        0 => random.fill(&mut leaf),
        1 => leaf.fill(random.u8(1..4)),
        2 => {}
        _ => {
            let seed = random.u64(..);
            let mut values = fastrand::Rng::with_seed(seed);
            leaf.chunks_mut(64).for_each(|chunk| chunk.fill(values.u8(..)));
        }
    }
    leaf
}
