//! Which content is in the repository already, and where: found by content id, with bounded memory.
//!
//! The truth is in the packs' tables; this is a copy that may be lost at any time. In the directory that the caller gives:
//!
//! ```text
//! state        names of the packs whose tables are in, and the runs
//! run-<n>      entries sorted by content id, in blocks of 4 KiB; behind them fences (first id of each block) and a filter
//! lock         held by the session that uses the directory
//! ```
//! Blocks, tails and the state carry tags under a key of the repository. What does not fit is not believed: it is dropped, and built again
//! from the packs.
//!
//! Memory: 8 bytes per block of 92 entries and at most 16 MiB of filter per run, 17 bytes per pack, and 65,536 entries that are not
//! in a run yet. The calculation for 16 TiB is in `docs/repository.md`.

use crate::error::{RepositoryError, Result};
use crate::fields::Fields;
use crate::id::{ContentId, Id};
use crate::node::Reference;
use crate::pack::{Frame, FrameKind, Location, possible, read_table};
use crate::repository::Inner;
use std::collections::{HashMap, HashSet};
use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

const BLOCK: usize = 4096;
const BLOCK_HEAD: usize = 32;
const ENTRY: usize = 44;
const PER_BLOCK: usize = (BLOCK - BLOCK_HEAD) / ENTRY;
/// Entries in memory before they go into a run.
const SPILL: usize = 1 << 16;
/// Entries in memory where there is no directory; what comes later is not found again.
const MAX_WITHOUT_DIRECTORY: usize = 1 << 20;
const MAX_FILTER_BYTES: u64 = 16 << 20;
const MAX_STATE: u64 = 256 << 20;

#[derive(Clone, Copy)]
struct Entry {
    id: ContentId,
    pack: u32,
    offset: u32,
    length: u32,
}

/// What may be said of a pack.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Standing {
    Usable,
    /// Named by a tombstone: nothing may be referenced in it.
    Dying,
    Gone,
}

struct Run {
    number: u64,
    file: File,
    entries: u64,
    fences: Vec<u64>,
    filter: Vec<u8>,
}

/// The index of one session.
pub(crate) struct Index {
    directory: Option<PathBuf>,
    key: [u8; 32],
    packs: Vec<(Id, Standing)>,
    numbers: HashMap<Id, u32>,
    recent: HashMap<ContentId, Entry>,
    runs: Vec<Run>,
    next_run: u64,
    /// The lock on the directory. Two sessions in one would only remove each other's runs.
    _held: Option<File>,
}

fn cached(path: &Path) -> impl FnOnce(io::Error) -> RepositoryError {
    let path = path.display().to_string();
    move |source| RepositoryError::Cache { path, source }
}

/// Locks a directory for one session; `None` if another has it.
fn hold(directory: &Path) -> Result<Option<File>> {
    let path = directory.join("lock");
    let file = File::options().write(true).create(true).truncate(false).open(&path).map_err(cached(&path))?;
    match rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(Some(file)),
        Err(rustix::io::Errno::WOULDBLOCK) => Ok(None),
        Err(e) => Err(cached(&path)(e.into())),
    }
}

fn tag(key: &[u8; 32], what: u64, place: u64, bytes: &[u8]) -> [u8; 16] {
    let mut hasher = blake3::Hasher::new_keyed(key);
    hasher.update(&what.to_le_bytes()).update(&place.to_le_bytes()).update(bytes);
    let mut out = [0; 16];
    out.copy_from_slice(&hasher.finalize().as_bytes()[..16]);
    out
}

fn prefix(id: &ContentId) -> u64 {
    let mut first = [0; 8];
    first.copy_from_slice(&id.0[..8]);
    u64::from_be_bytes(first)
}

fn filter_bit(id: &ContentId, bytes: usize) -> (usize, u8) {
    let mut second = [0; 8];
    second.copy_from_slice(&id.0[8..16]);
    let bit = u64::from_le_bytes(second) % (bytes as u64 * 8).max(1);
    ((bit / 8) as usize, 1 << (bit % 8))
}

impl Run {
    /// One block's entries, if it is what was written.
    fn block(&self, key: &[u8; 32], block: u64) -> Option<Vec<Entry>> {
        let mut bytes = vec![0; BLOCK];
        self.file.read_exact_at(&mut bytes, block * BLOCK as u64).ok()?;
        let (sum, rest) = bytes.split_at(16);
        if sum != tag(key, self.number, block, rest) {
            return None;
        }
        let mut fields = Fields::of(&rest[BLOCK_HEAD - 16..]);
        let count = (u64::from(u16::from_le_bytes([rest[0], rest[1]]))).min(PER_BLOCK as u64);
        let mut entries = Vec::with_capacity(count as usize);
        for _ in 0..count {
            let id = ContentId(fields.array().ok()?);
            entries.push(Entry {
                id,
                pack: fields.u32().ok()?,
                offset: fields.u32().ok()?,
                length: fields.u32().ok()?,
            });
        }
        Some(entries)
    }

    fn find(&self, key: &[u8; 32], id: &ContentId, mut take: impl FnMut(&Entry) -> bool) -> Option<Entry> {
        let (byte, bit) = filter_bit(id, self.filter.len());
        if self.filter.get(byte).is_some_and(|b| b & bit == 0) {
            return None;
        }
        let want = prefix(id);
        let mut block = self.fences.partition_point(|fence| *fence < want).saturating_sub(1);
        while block < self.fences.len() && self.fences[block] <= want {
            // A block that has gone bad knows nothing, which costs room and never content.
            let found =
                self.block(key, block as u64).and_then(|entries| entries.into_iter().find(|e| e.id == *id && take(e)));
            if found.is_some() {
                return found;
            }
            block += 1;
        }
        None
    }

    fn open(directory: &Path, [number, entries, filter_bytes]: [u64; 3], key: &[u8; 32]) -> Option<Run> {
        let file = File::open(directory.join(format!("run-{number}"))).ok()?;
        let blocks = entries.div_ceil(PER_BLOCK as u64);
        if filter_bytes > MAX_FILTER_BYTES {
            return None;
        }
        let from = blocks.checked_mul(BLOCK as u64)?;
        let length = blocks.checked_mul(8)?.checked_add(filter_bytes)?;
        if file.metadata().ok()?.len() != from.checked_add(length)?.checked_add(16)? {
            return None;
        }
        let mut tail = vec![0; length as usize + 16];
        file.read_exact_at(&mut tail, from).ok()?;
        let (content, sum) = tail.split_at(length as usize);
        if sum != tag(key, number, u64::MAX, content) {
            return None;
        }
        let (fences, filter) = content.split_at(blocks as usize * 8);
        let fences = fences.as_chunks().0.iter().map(|b| u64::from_le_bytes(*b)).collect();
        Some(Run { number, file, entries, fences, filter: filter.to_vec() })
    }

    /// Writes a run of entries that come in order.
    fn write(
        directory: &Path,
        number: u64,
        expected: u64,
        key: &[u8; 32],
        entries: impl Iterator<Item = Entry>,
    ) -> io::Result<Run> {
        let path = directory.join(format!("run-{number}"));
        let file = File::options().read(true).write(true).create_new(true).open(&path)?;
        let mut out = BufWriter::with_capacity(1 << 20, &file);
        let mut fences: Vec<u64> = Vec::new();
        let mut filter = vec![0_u8; expected.min(MAX_FILTER_BYTES) as usize];
        let (mut block, mut count, mut total) = (Vec::with_capacity(BLOCK), 0_u16, 0_u64);
        let mut finish = |block: &mut Vec<u8>, count: &mut u16, place: u64| -> io::Result<()> {
            let mut whole = vec![0; 16];
            whole.extend(count.to_le_bytes());
            whole.resize(BLOCK_HEAD, 0);
            whole.append(block);
            whole.resize(BLOCK, 0);
            let sum = tag(key, number, place, &whole[16..]);
            whole[..16].copy_from_slice(&sum);
            *count = 0;
            out.write_all(&whole)
        };
        for entry in entries {
            if count == 0 {
                fences.push(prefix(&entry.id));
            }
            block.extend(entry.id.0);
            block.extend(entry.pack.to_le_bytes());
            block.extend(entry.offset.to_le_bytes());
            block.extend(entry.length.to_le_bytes());
            count += 1;
            total += 1;
            let (byte, bit) = filter_bit(&entry.id, filter.len());
            filter[byte] |= bit;
            if count as usize == PER_BLOCK {
                finish(&mut block, &mut count, fences.len() as u64 - 1)?;
            }
        }
        if count > 0 {
            finish(&mut block, &mut count, fences.len() as u64 - 1)?;
        }
        let mut tail: Vec<u8> = fences.iter().flat_map(|f| f.to_le_bytes()).collect();
        tail.extend(&filter);
        let sum = tag(key, number, u64::MAX, &tail);
        tail.extend(sum);
        out.write_all(&tail)?;
        out.flush()?;
        drop(out);
        Ok(Run { number, file, entries: total, fences, filter })
    }
}

/// Reads a run from its first entry to its last.
struct Stream<'a> {
    run: &'a Run,
    key: &'a [u8; 32],
    block: u64,
    entries: std::vec::IntoIter<Entry>,
}

impl Iterator for Stream<'_> {
    type Item = Entry;

    fn next(&mut self) -> Option<Entry> {
        loop {
            if let Some(entry) = self.entries.next() {
                return Some(entry);
            }
            if self.block >= self.run.fences.len() as u64 {
                return None;
            }
            self.entries = self.run.block(self.key, self.block).unwrap_or_default().into_iter();
            self.block += 1;
        }
    }
}

/// Two runs in order, as one.
struct Merged<A: Iterator<Item = Entry>, B: Iterator<Item = Entry>>(std::iter::Peekable<A>, std::iter::Peekable<B>);

impl<A: Iterator<Item = Entry>, B: Iterator<Item = Entry>> Iterator for Merged<A, B> {
    type Item = Entry;

    fn next(&mut self) -> Option<Entry> {
        match (self.0.peek(), self.1.peek()) {
            (Some(a), Some(b)) if a.id <= b.id => self.0.next(),
            (Some(_), None) => self.0.next(),
            _ => self.1.next(),
        }
    }
}

impl Index {
    /// Opens what the directory has; an empty index if there is none, or none that is to be believed.
    pub(crate) fn open(inner: &Inner, directory: Option<&Path>) -> Result<Index> {
        let key = blake3::derive_key("highwater repository v1 index", inner.secret.master());
        // Runs of two sessions never have the same name: entries name packs by numbers that only their own session's state explains.
        let drawn = Id::random(&*inner.host)?;
        let next_run = drawn.0.iter().take(8).fold(0, |all, byte| all << 8 | u64::from(*byte)) >> 1;
        let mut directory = directory.map(Path::to_path_buf);
        let mut held = None;
        if let Some(path) = &directory {
            fs::create_dir_all(path).map_err(cached(path))?;
            held = hold(path)?;
            if held.is_none() {
                directory = None; // Another session has it: this one keeps its index in memory.
            }
        }
        let mut index = Index {
            directory,
            key,
            packs: Vec::new(),
            numbers: HashMap::new(),
            recent: HashMap::new(),
            runs: Vec::new(),
            next_run,
            _held: held,
        };
        if let Some(directory) = index.directory.clone() {
            if index.load(&directory).is_none() {
                (index.packs, index.numbers, index.runs) = Default::default();
            }
            index.remove_other_runs(&directory);
        }
        Ok(index)
    }

    fn load(&mut self, directory: &Path) -> Option<()> {
        let path = directory.join("state");
        if fs::metadata(&path).ok()?.len() > MAX_STATE {
            return None;
        }
        let bytes = fs::read(path).ok()?;
        let (sum, content) = bytes.split_first_chunk::<16>()?;
        if *sum != tag(&self.key, u64::MAX, 1, content) {
            return None;
        }
        let mut fields = Fields::of(content);
        for _ in 0..fields.count(24).ok()? {
            let run = [fields.u64().ok()?, fields.u64().ok()?, fields.u64().ok()?];
            self.runs.push(Run::open(directory, run, &self.key)?);
        }
        for _ in 0..fields.count(16).ok()? {
            self.number(Id(fields.array().ok()?));
        }
        fields.end().ok()
    }

    fn remove_other_runs(&self, directory: &Path) {
        let ours: HashSet<String> = self.runs.iter().map(|r| format!("run-{}", r.number)).collect();
        let entries = fs::read_dir(directory).into_iter().flatten().flatten();
        for entry in
            entries.filter(|e| e.file_name().to_str().is_some_and(|n| n.starts_with("run-") && !ours.contains(n)))
        {
            let _ = fs::remove_file(entry.path()); // Room alone is lost if it stays.
        }
    }

    fn number(&mut self, pack: Id) -> u32 {
        let next = self.packs.len() as u32;
        let number = *self.numbers.entry(pack).or_insert(next);
        if number == next {
            self.packs.push((pack, Standing::Gone));
        }
        number
    }

    /// Brings the index to the packs that are there. Nothing in `dying` packs will be found. Packs whose tables are damaged are left out,
    /// and counted.
    pub(crate) fn refresh(&mut self, inner: &Inner, dying: &HashSet<Id>) -> Result<usize> {
        let mut there = Vec::new();
        let name = |name: &str| name.rsplit('/').next().and_then(Id::parse);
        inner
            .store
            .list("packs/", &mut |object| there.extend(name(&object.name)))
            .map_err(RepositoryError::store("packs/", "list"))?;
        self.packs.iter_mut().for_each(|(_, standing)| *standing = Standing::Gone);
        let mut left_out = 0;
        for pack in there {
            let known = self.numbers.contains_key(&pack);
            if !known {
                if dying.contains(&pack) {
                    continue; // Its table is not needed.
                }
                match read_table(&*inner.store, &inner.secret, pack) {
                    Ok(frames) => self.insert(pack, &frames)?,
                    Err(e) if e.damage().is_some() => {
                        left_out += 1;
                        continue;
                    }
                    Err(e) => return Err(e),
                }
            }
            let number = self.number(pack) as usize;
            self.packs[number].1 = if dying.contains(&pack) { Standing::Dying } else { Standing::Usable };
        }
        Ok(left_out)
    }

    /// Enters a pack that is stored.
    pub(crate) fn insert(&mut self, pack: Id, frames: &[Frame]) -> Result<()> {
        let number = self.number(pack);
        self.packs[number as usize].1 = Standing::Usable;
        for frame in frames.iter().filter(|f| f.kind == FrameKind::Leaf) {
            if self.directory.is_none() && self.recent.len() >= MAX_WITHOUT_DIRECTORY {
                break;
            }
            self.recent
                .insert(frame.id, Entry { id: frame.id, pack: number, offset: frame.offset, length: frame.length });
        }
        if self.recent.len() >= SPILL && self.directory.is_some() {
            self.spill()?;
        }
        Ok(())
    }

    /// Where this content stands, in a pack that may be referenced.
    pub(crate) fn find(&self, id: &ContentId) -> Option<Reference> {
        let usable = |e: &Entry| self.packs.get(e.pack as usize).is_some_and(|(_, s)| *s == Standing::Usable);
        let recent = self.recent.get(id).copied().filter(usable);
        let entry = recent.or_else(|| self.runs.iter().rev().find_map(|run| run.find(&self.key, id, usable)))?;
        let location = Location { pack: self.packs[entry.pack as usize].0, offset: entry.offset, length: entry.length };
        possible(location.offset, location.length).then_some(Reference { id: *id, location })
    }

    fn spill(&mut self) -> Result<()> {
        let Some(directory) = self.directory.clone() else { return Ok(()) };
        let failed = || cached(&directory);
        let mut entries: Vec<Entry> = self.recent.drain().map(|(_, entry)| entry).collect();
        entries.sort_unstable_by_key(|e| e.id);
        let run = Run::write(&directory, self.next_run, entries.len() as u64, &self.key, entries.into_iter())
            .map_err(failed())?;
        self.next_run += 1;
        self.runs.push(run);
        // A run is at least twice as long as the one after it: their number grows with the logarithm of the entries.
        while let [.., a, b] = self.runs.as_slice()
            && a.entries < b.entries.saturating_mul(2)
        {
            let stream = |run| Stream { run, key: &self.key, block: 0, entries: Vec::new().into_iter() };
            let there = |e: &Entry| self.packs.get(e.pack as usize).is_some_and(|(_, s)| *s != Standing::Gone);
            let merged = Merged(stream(a).peekable(), stream(b).peekable()).filter(there);
            let run =
                Run::write(&directory, self.next_run, a.entries + b.entries, &self.key, merged).map_err(failed())?;
            self.next_run += 1;
            self.runs.truncate(self.runs.len() - 2);
            self.runs.push(run);
        }
        Ok(())
    }

    /// Puts what is known into the directory. Crash: `state` is renamed into place; it names runs that were written before it, and a run that
    /// is not whole has no fitting tail.
    pub(crate) fn save(&mut self) -> Result<()> {
        let Some(directory) = self.directory.clone() else { return Ok(()) };
        if !self.recent.is_empty() {
            self.spill()?;
        }
        let mut content = (self.runs.len() as u32).to_le_bytes().to_vec();
        for run in &self.runs {
            content.extend(run.number.to_le_bytes());
            content.extend(run.entries.to_le_bytes());
            content.extend((run.filter.len() as u64).to_le_bytes());
        }
        content.extend((self.packs.len() as u32).to_le_bytes());
        self.packs.iter().for_each(|(id, _)| content.extend(id.0));
        let mut bytes = tag(&self.key, u64::MAX, 1, &content).to_vec();
        bytes.extend(content);
        let (temporary, path) = (directory.join("state.new"), directory.join("state"));
        fs::write(&temporary, bytes).and_then(|()| fs::rename(&temporary, &path)).map_err(cached(&path))?;
        self.remove_other_runs(&directory);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{LocalStore, Repository, Settings, Stretch, SystemHost, Unlock};
    use std::sync::Arc;

    fn id(n: u64) -> ContentId {
        ContentId(*blake3::hash(&n.to_le_bytes()).as_bytes())
    }

    #[test]
    fn all_that_was_entered_is_found_across_spills_and_merges() {
        let folder = tempfile::tempdir().unwrap();
        let store = Arc::new(LocalStore::open(folder.path().join("store")).unwrap());
        let settings = Settings { encrypted: false, ..Settings::default() };
        let made = Repository::init(store, Arc::new(SystemHost), settings, &Unlock::Open, Stretch::default(), "");
        let inner = made.unwrap().inner;
        let directory = folder.path().join("index");
        let mut index = Index::open(&inner, Some(&directory)).unwrap();
        const PACKS: u64 = 600;
        for pack in 0..PACKS {
            let frame = |n: u64| Frame {
                kind: FrameKind::Leaf,
                offset: 32 + n as u32 * 100,
                length: 100,
                id: id(pack << 16 | n),
            };
            let frames: Vec<Frame> = (0..500).map(frame).collect();
            index.insert(Id(u128::from(pack).to_le_bytes()), &frames).unwrap();
        }
        index.spill().unwrap();
        // 300,000 entries in runs of which each is at least twice as long as the next.
        assert!(index.runs.len() <= 5 && index.runs.iter().map(|r| r.entries).sum::<u64>() == 500 * PACKS);
        for pack in (0..PACKS).step_by(7) {
            for n in (0..500).step_by(3) {
                let found = index.find(&id(pack << 16 | n)).unwrap();
                let location =
                    Location { pack: Id(u128::from(pack).to_le_bytes()), offset: 32 + n as u32 * 100, length: 100 };
                assert_eq!(found.location, location);
            }
            assert!(index.find(&id(pack << 16 | 501)).is_none());
        }
        // A second session has no directory while this one lasts.
        assert!(Index::open(&inner, Some(&directory)).unwrap().directory.is_none());
        index.save().unwrap();
        drop(index);
        // Opened again: all is there, and nothing is found in packs that are not.
        let mut index = Index::open(&inner, Some(&directory)).unwrap();
        assert!(index.find(&id(0)).is_none());
        index.packs[0].1 = Standing::Usable;
        assert_eq!(index.find(&id(0)).unwrap().location.offset, 32);
        index.refresh(&inner, &HashSet::new()).unwrap();
        assert!(index.find(&id(0)).is_none());
    }
}
