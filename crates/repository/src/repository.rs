//! An open repository: its settings, its secret, and reading of frames and points.

use crate::error::{Damage, DamageReason, RepositoryError, Result};
use crate::fields::Fields;
use crate::host::Host;
use crate::id::{ContentId, Id};
use crate::keys::{self, KeyInfo, Stretch, Unlock};
use crate::node::{MAX_NODE, Node, Reference};
use crate::pack::{FrameKind, Location, OVERHEAD, open_frame};
use crate::point::{Point, name_of};
use crate::records::{self, Relocation};
use crate::sealed;
use crate::secret::Secret;
use crate::store::{Store, StoreErrorKind};
use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

const CONFIG: &str = "config";
const MAGIC: &[u8; 8] = b"HWRCONF1";
/// Nodes kept in memory: 512 of about 16 KiB.
const CACHED_NODES: usize = 512;
/// Relocations kept in memory.
const CACHED_RELOCATIONS: usize = 256;
/// The most that one read of neighbouring frames asks for.
const MAX_READ: u64 = 4 << 20;
/// How often a frame may have been moved.
const MAX_HOPS: u32 = 32;

/// What is decided when a repository is made, and never again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Settings {
    /// Bytes of a leaf: a power of two, 16 KiB to 1 MiB.
    pub leaf_bytes: u32,
    /// Bytes at which a pack is full: 16 to 64 MiB (1 MiB and less for tests).
    pub pack_bytes: u32,
    /// Whether packs and objects are encrypted, or only authenticated.
    pub encrypted: bool,
}

impl Default for Settings {
    fn default() -> Settings {
        Settings { leaf_bytes: 64 << 10, pack_bytes: 32 << 20, encrypted: true }
    }
}

/// A repository that is open. Clones share it.
#[derive(Clone)]
pub struct Repository {
    pub(crate) inner: Arc<Inner>,
}

pub(crate) struct Inner {
    pub(crate) store: Arc<dyn Store>,
    pub(crate) host: Arc<dyn Host>,
    pub(crate) secret: Secret,
    pub(crate) settings: Settings,
    id: Id,
    nodes: Mutex<NodeCache>,
    relocations: Mutex<HashMap<Id, Option<Arc<Relocation>>>>,
}

#[derive(Default)]
struct NodeCache {
    nodes: HashMap<Reference, Arc<Node>>,
    order: VecDeque<Reference>,
}

/// A lock whose holder cannot leave what it protects half changed, so that a panic elsewhere does no harm.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn config_bytes(settings: &Settings, id: Id, created_ms: u64) -> Vec<u8> {
    let mut out = MAGIC.to_vec();
    out.extend(1_u32.to_le_bytes());
    out.extend(u32::from(settings.encrypted).to_le_bytes());
    out.extend(settings.leaf_bytes.to_le_bytes());
    out.extend(settings.pack_bytes.to_le_bytes());
    out.extend(id.0);
    out.extend(created_ms.to_le_bytes());
    out
}

fn read_config(store: &dyn Store) -> Result<Vec<u8>> {
    match store.read_all(CONFIG, 4096) {
        Err(e) if e.kind == StoreErrorKind::Missing => Err(RepositoryError::NoRepository { object: CONFIG.to_owned() }),
        read => read.map_err(RepositoryError::store(CONFIG, "read")),
    }
}

fn config_tag(master: &[u8; 32], config: &[u8]) -> [u8; 32] {
    *blake3::keyed_hash(&blake3::derive_key("highwater repository v1 config", master), config).as_bytes()
}

impl Repository {
    /// Makes a repository in a store that has none, with its first key.
    ///
    /// Crash: the key is put first, then `config` by `put_new`, which makes the repository exist. A key left behind by a crash before
    /// that wraps another secret, which `open` recognises by `config`'s tag and passes over.
    pub fn init(
        store: Arc<dyn Store>,
        host: Arc<dyn Host>,
        settings: Settings,
        key: &Unlock,
        stretch: Stretch,
        label: &str,
    ) -> Result<Repository> {
        let Settings { leaf_bytes, pack_bytes, encrypted } = settings;
        if !leaf_bytes.is_power_of_two() || !(16 << 10..=1 << 20).contains(&leaf_bytes) {
            let text =
                format!("a leaf has 16 KiB to 1 MiB, a power of two, found {leaf_bytes} bytes; choose another size");
            return Err(RepositoryError::Invalid(text));
        }
        if !(64 << 10..=64 << 20).contains(&pack_bytes) {
            let text =
                format!("a pack has at most 64 MiB and at least 64 KiB, found {pack_bytes} bytes; choose another size");
            return Err(RepositoryError::Invalid(text));
        }
        match store.look(CONFIG) {
            Err(e) if e.kind == StoreErrorKind::Missing => {}
            Err(e) => return Err(RepositoryError::store(CONFIG, "look at")(e)),
            Ok(_) => return Err(RepositoryError::Exists { object: CONFIG.to_owned() }),
        }
        let mut master = [0; 32];
        if !host.random(&mut master) {
            return Err(RepositoryError::Invalid(
                "this machine gives no randomness, so there can be no key".to_owned(),
            ));
        }
        let id = Id::random(&*host)?;
        let secret = Secret::new(master, encrypted);
        keys::add(&*store, &*host, &secret, key, stretch, label)?;
        let mut config = config_bytes(&settings, id, host.now_ms());
        let tag = config_tag(&master, &config);
        config.extend(tag);
        match store.put_new(CONFIG, &config) {
            Err(e) if e.kind == StoreErrorKind::Exists => {
                return Err(RepositoryError::Exists { object: CONFIG.to_owned() });
            }
            other => other.map_err(RepositoryError::store(CONFIG, "put"))?,
        }
        Ok(Repository::with(store, host, secret, settings, id))
    }

    /// Its name and what was decided when it was made, before any key is at hand: not proven yet.
    pub fn look(store: &dyn Store) -> Result<(Id, Settings)> {
        let config = read_config(store)?;
        let content = &config[..config.len().saturating_sub(32)];
        let (settings, id) = parse_config(content).map_err(|reason| Damage::new(CONFIG, 0, reason))?;
        Ok((id, settings))
    }

    /// Opens a repository with one of its keys.
    pub fn open(store: Arc<dyn Store>, host: Arc<dyn Host>, key: &Unlock) -> Result<Repository> {
        let config = read_config(&*store)?;
        let damaged = |reason| Damage::new(CONFIG, 0, reason);
        let (content, tag) =
            config.split_at_checked(config.len().saturating_sub(32)).ok_or(damaged(DamageReason::Short))?;
        let (settings, id) = parse_config(content).map_err(damaged)?;
        let key = if settings.encrypted { key } else { &Unlock::Open };
        let master = keys::unlock(&*store, key, |master| config_tag(master, content) == tag)?;
        Ok(Repository::with(store, host, Secret::new(master, settings.encrypted), settings, id))
    }

    fn with(store: Arc<dyn Store>, host: Arc<dyn Host>, secret: Secret, settings: Settings, id: Id) -> Repository {
        let (nodes, relocations) = Default::default();
        Repository { inner: Arc::new(Inner { store, host, secret, settings, id, nodes, relocations }) }
    }

    /// Its random name: two stores with the same one are copies of each other.
    #[must_use]
    pub fn id(&self) -> Id {
        self.inner.id
    }

    /// What was decided when it was made.
    #[must_use]
    pub fn settings(&self) -> Settings {
        self.inner.settings
    }

    /// Its keys; those that are damaged are errors among them.
    pub fn keys(&self) -> Result<Vec<Result<KeyInfo>>> {
        keys::list(&*self.inner.store)
    }

    /// Adds a key beside the others.
    pub fn add_key(&self, key: &Unlock, stretch: Stretch, label: &str) -> Result<KeyInfo> {
        keys::add(&*self.inner.store, &*self.inner.host, &self.inner.secret, key, stretch, label)
    }

    /// Removes a key, but never the last one. The master secret stays: who has copied it keeps it.
    pub fn revoke_key(&self, id: Id) -> Result<()> {
        keys::revoke(&*self.inner.store, id)
    }

    /// Puts a new key, opens the repository with it, and only then removes the old one.
    pub fn rotate_key(&self, old: Id, key: &Unlock, stretch: Stretch, label: &str) -> Result<KeyInfo> {
        let info = self.add_key(key, stretch, label)?;
        Repository::open(self.inner.store.clone(), self.inner.host.clone(), key)?;
        self.revoke_key(old)?;
        Ok(info)
    }

    /// The names of all points that are not forgotten, by time.
    pub fn point_ids(&self) -> Result<Vec<Id>> {
        let store = &*self.inner.store;
        // The marks after the points: a point forgotten between is left out.
        let ids = records::ids(store, "points/")?;
        let forgotten: HashSet<Id> = records::ids(store, "forgotten/")?.into_iter().collect();
        Ok(ids.into_iter().filter(|id| !forgotten.contains(id)).collect())
    }

    /// All points that are not forgotten, by time; those that cannot be read are errors beside their names.
    pub fn points(&self) -> Result<Vec<(Id, Result<Point>)>> {
        Ok(self.point_ids()?.into_iter().map(|id| (id, self.point(id))).collect())
    }

    /// Reads one point, forgotten or not.
    pub fn point(&self, id: Id) -> Result<Point> {
        self.inner.point(id)?.ok_or_else(|| RepositoryError::NoPoint { name: id.to_string() })
    }
}

fn parse_config(content: &[u8]) -> Result<(Settings, Id), DamageReason> {
    let mut fields = Fields::of(content);
    if fields.array()? != *MAGIC {
        return Err(DamageReason::Magic);
    }
    if fields.u32()? != 1 {
        return Err(DamageReason::Version);
    }
    let encrypted = match fields.u32()? {
        0 => false,
        1 => true,
        _ => return Err(DamageReason::Field),
    };
    let (leaf_bytes, pack_bytes) = (fields.u32()?, fields.u32()?);
    let id = Id(fields.array()?);
    fields.u64()?;
    fields.end()?;
    if !leaf_bytes.is_power_of_two() || !(16 << 10..=1 << 20).contains(&leaf_bytes) || pack_bytes > 64 << 20 {
        return Err(DamageReason::Field);
    }
    Ok((Settings { leaf_bytes, pack_bytes, encrypted }, id))
}

impl Inner {
    pub(crate) fn leaf_bytes(&self) -> u64 {
        u64::from(self.settings.leaf_bytes)
    }

    pub(crate) fn point(&self, id: Id) -> Result<Option<Point>> {
        let name = name_of(id);
        let plain = sealed::read(&*self.store, &self.secret, &name)?;
        plain.map(|plain| Point::parse(id, &plain)).transpose()
    }

    /// The hash of a point's record, by which its successor is bound to it.
    pub(crate) fn digest(&self, point: &Point) -> ContentId {
        self.secret.node_id(0xff, [self.secret.leaf_id(&point.to_bytes())].into_iter())
    }

    /// Where the frames of a pack have gone that is not there any more.
    pub(crate) fn relocation(&self, pack: Id) -> Result<Option<Arc<Relocation>>> {
        if let Some(found) = lock(&self.relocations).get(&pack) {
            return Ok(found.clone());
        }
        let name = records::relocation_name(pack);
        let found = records::read(&*self.store, &self.secret, &name, pack, Relocation::parse)?.map(Arc::new);
        if found.is_some() {
            let mut cache = lock(&self.relocations);
            if cache.len() >= CACHED_RELOCATIONS {
                cache.clear();
            }
            cache.insert(pack, found.clone());
        }
        Ok(found)
    }

    /// Reads `locations`, which stand one behind the other in one pack.
    fn read_run(&self, run: &[Location]) -> Result<Vec<u8>> {
        let (Some(first), Some(last)) = (run.first(), run.last()) else { return Ok(Vec::new()) };
        let name = first.pack.pack_name();
        let range = u64::from(first.offset)..u64::from(last.offset) + u64::from(last.length);
        match self.store.read(&name, range) {
            Ok(bytes) => Ok(bytes),
            Err(e) if e.kind == StoreErrorKind::Missing => Err(Damage::new(name, 0, DamageReason::Missing).into()),
            Err(e) => Err(RepositoryError::store(&name, "read")(e)),
        }
    }

    /// The plain bytes of frames, each proven by its tag; neighbours in a pack are read together. The caller proves the content's id.
    pub(crate) fn fetch(&self, locations: &[Location], kind: FrameKind, limit: usize) -> Vec<Result<Vec<u8>>> {
        let mut out = Vec::with_capacity(locations.len());
        let mut rest = locations;
        while let Some(first) = rest.first() {
            let mut end = u64::from(first.offset);
            let adjoining = rest.iter().take_while(|l| {
                let next = l.pack == first.pack && u64::from(l.offset) == end;
                end += u64::from(l.length);
                next && (end - u64::from(first.offset) <= MAX_READ)
            });
            let count = adjoining.count().max(1);
            let (run, behind) = rest.split_at(count);
            rest = behind;
            match self.read_run(run) {
                Ok(bytes) => {
                    let cipher = self.secret.pack_cipher(first.pack);
                    for at in run {
                        let from = (at.offset - first.offset) as usize;
                        let stored = bytes.get(from..from + at.length as usize).map(<[u8]>::to_vec).unwrap_or_default();
                        let opened = open_frame(&cipher, *at, kind, stored, limit);
                        out.push(opened.map_err(|r| Damage::new(at.pack.pack_name(), at.offset.into(), r).into()));
                    }
                }
                Err(error) => {
                    let missing = error.damage().is_some_and(|d| d.reason == DamageReason::Missing);
                    out.extend(run.iter().map(|at| {
                        if missing { self.fetch_moved(*at, kind, limit) } else { self.fetch_alone(*at, kind, limit) }
                    }));
                }
            }
        }
        out
    }

    fn fetch_alone(&self, at: Location, kind: FrameKind, limit: usize) -> Result<Vec<u8>> {
        let stored = self.read_run(&[at])?;
        open_frame(&self.secret.pack_cipher(at.pack), at, kind, stored, limit)
            .map_err(|r| Damage::new(at.pack.pack_name(), at.offset.into(), r).into())
    }

    /// A frame whose pack is not there: where its relocation says, or damage.
    fn fetch_moved(&self, mut at: Location, kind: FrameKind, limit: usize) -> Result<Vec<u8>> {
        let missing = Damage::new(at.pack.pack_name(), 0, DamageReason::Missing);
        for _ in 0..MAX_HOPS {
            match self.relocation(at.pack)?.and_then(|moved| moved.find(at.offset)) {
                Some(next) => at = next,
                None => break,
            }
            match self.fetch_alone(at, kind, limit) {
                Err(e) if e.damage().is_some_and(|d| d.reason == DamageReason::Missing) => {}
                other => return other,
            }
        }
        Err(missing.into())
    }

    /// A node, proven by its tag and its id.
    pub(crate) fn node(&self, at: &Reference, level: u8) -> Result<Arc<Node>> {
        if let Some(node) = lock(&self.nodes).nodes.get(at)
            && node.level == level
        {
            return Ok(node.clone());
        }
        let plain = self.fetch(&[at.location], FrameKind::Node, MAX_NODE).swap_remove(0)?;
        let node = self.parse_node(at, level, &plain)?;
        let mut cache = lock(&self.nodes);
        if cache.nodes.insert(*at, node.clone()).is_none() {
            cache.order.push_back(*at);
        }
        if cache.order.len() > CACHED_NODES
            && let Some(oldest) = cache.order.pop_front()
        {
            cache.nodes.remove(&oldest);
        }
        Ok(node)
    }

    pub(crate) fn parse_node(&self, at: &Reference, level: u8, plain: &[u8]) -> Result<Arc<Node>> {
        let damaged = |reason| Damage::new(at.location.pack.pack_name(), at.location.offset.into(), reason);
        let node = Node::parse(plain, level).map_err(damaged)?;
        if node.id(&self.secret) != at.id {
            return Err(damaged(DamageReason::Identity).into());
        }
        Ok(Arc::new(node))
    }

    /// Leaves, each proven by its tag and its id.
    pub(crate) fn leaves(&self, at: &[Reference]) -> Vec<Result<Vec<u8>>> {
        let size = self.settings.leaf_bytes as usize;
        let locations: Vec<Location> = at.iter().map(|r| r.location).collect();
        let plain = self.fetch(&locations, FrameKind::Leaf, size);
        let proven = plain.into_iter().zip(at).map(|(plain, at)| {
            let plain = plain?;
            let reason = if plain.len() != size {
                DamageReason::Field
            } else if self.secret.leaf_id(&plain) != at.id {
                DamageReason::Identity
            } else {
                return Ok(plain);
            };
            Err(Damage::new(at.location.pack.pack_name(), at.location.offset.into(), reason).into())
        });
        proven.collect()
    }

    /// The most bytes that a stored leaf may have.
    pub(crate) fn max_stored_leaf(&self) -> usize {
        self.settings.leaf_bytes as usize + OVERHEAD
    }
}
