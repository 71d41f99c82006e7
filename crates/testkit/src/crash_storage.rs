//! A storage that can lose what was not synced.

use crate::{MemoryStorage, SparseBytes};
use disk::{Buf, ByteRange, Result, Storage, StorageExtent, StorageHandle, StorageLimits, ZeroMode};
use std::sync::{Arc, Mutex, MutexGuard};

/// Bytes that reach a disk whole or not at all.
const SECTOR: u64 = 512;

/// A storage in memory that remembers what a crash may still undo. Clones are the same storage.
///
/// Every change is noted before it begins. A sync makes those durable that had ended before it began. At a
/// crash each other change (ended or under way) is lost, kept, or torn at sectors; changes that were under
/// way at the same time take effect in any order.
#[derive(Clone)]
pub struct CrashStorage {
    memory: MemoryStorage,
    log: Arc<Mutex<Log>>,
}

struct Log {
    /// What certainly survives.
    durable: SparseBytes,
    /// What may survive, in the order of issue.
    pending: Vec<Entry>,
    clock: u64,
}

struct Entry {
    issued: u64,
    ended: Option<u64>,
    failed: bool,
    change: Change,
}

#[derive(Clone)]
enum Change {
    Write(u64, Arc<[u8]>),
    Zero { range: ByteRange, unmap: bool },
    Discard(ByteRange),
    Allocate(ByteRange),
    SetSize(u64),
}

impl Change {
    fn apply(&self, bytes: &mut SparseBytes) {
        match self {
            Self::Write(offset, data) => bytes.write(*offset, data),
            Self::Zero { range, unmap } => bytes.zero(*range, *unmap),
            Self::Discard(range) => {
                let inside = range.intersect(ByteRange::new(0, bytes.size()));
                if !inside.is_empty() {
                    bytes.zero(inside, true);
                }
            }
            Self::Allocate(range) => bytes.allocate(*range),
            Self::SetSize(size) => bytes.set_size(*size),
        }
    }

    /// The part of the change that falls into one sector, for each of its sectors.
    fn sectors(&self) -> Vec<Self> {
        let cut = |range: ByteRange| {
            let mut rest = range;
            std::iter::from_fn(move || {
                let piece = rest.prefix(SECTOR - rest.offset() % SECTOR);
                rest = rest.skip(piece.len());
                (!piece.is_empty()).then_some(piece)
            })
        };
        match self {
            Self::Write(offset, data) => cut(ByteRange::new(*offset, data.len() as u64))
                .map(|p| {
                    let at = (p.offset() - offset) as usize;
                    Self::Write(p.offset(), data[at..at + p.len() as usize].into())
                })
                .collect(),
            // Long zeroings are torn at coarser steps, as their sectors would be too many.
            Self::Zero { range, unmap } if range.len() <= 1 << 20 => {
                cut(*range).map(|range| Self::Zero { range, unmap: *unmap }).collect()
            }
            Self::Discard(range) if range.len() <= 1 << 20 => cut(*range).map(Self::Discard).collect(),
            Self::Zero { .. } | Self::Discard(_) | Self::Allocate(_) | Self::SetSize(_) => vec![self.clone()],
        }
    }
}

impl CrashStorage {
    /// A storage of `size` durable zero bytes.
    pub fn new(size: u64) -> Self {
        Self::of(MemoryStorage::new(size))
    }

    /// A storage that durably holds what `memory` holds now, under its name and limits.
    pub fn of(memory: MemoryStorage) -> Self {
        let durable = memory.snapshot();
        Self { memory, log: Arc::new(Mutex::new(Log { durable, pending: Vec::new(), clock: 0 })) }
    }

    /// From now on requests wait a random number of turns before they take effect.
    #[must_use]
    pub fn yielding(self, seed: u64) -> Self {
        self.memory.yield_before(seed);
        self
    }

    /// The volatile side: counters, faults, and the contents as readers see them.
    pub fn memory(&self) -> &MemoryStorage {
        &self.memory
    }

    /// The handle that everybody but the test holds.
    pub fn handle(&self) -> StorageHandle {
        StorageHandle::new(self.clone())
    }

    /// What a crash at this moment leaves, as the seed decides. The storage itself goes on.
    pub fn crash(&self, seed: u64) -> MemoryStorage {
        let mut random = fastrand::Rng::with_seed(seed);
        let log = self.log();
        let mut survivors: Vec<(u64, u64, &Change)> = log
            .pending
            .iter()
            .map(|e| (random.u64(e.issued..=e.ended.unwrap_or(log.clock)), random.u64(..), &e.change))
            .collect();
        survivors.sort_by_key(|(moment, tie, _)| (*moment, *tie));
        let mut bytes = log.durable.clone();
        // Some crashes lose nearly everything, some nearly nothing.
        let kept = [0.0, 0.1, 0.5, 0.9, 1.0][random.usize(..5)];
        for (_, _, change) in survivors {
            if random.u8(..3) > 0 {
                if random.f64() < kept {
                    change.apply(&mut bytes);
                }
                continue;
            }
            for sector in change.sectors() {
                if random.f64() < kept {
                    sector.apply(&mut bytes);
                }
            }
        }
        MemoryStorage::of(bytes).aligned(self.memory.limits().alignment).named(self.memory.name())
    }

    /// How many changes a crash may undo now.
    pub fn pending(&self) -> usize {
        self.log().pending.len()
    }

    fn log(&self) -> MutexGuard<'_, Log> {
        self.log.lock().expect("no panic while the log is locked")
    }

    fn issue(&self, change: Change) -> u64 {
        let mut log = self.log();
        log.clock += 1;
        let issued = log.clock;
        log.pending.push(Entry { issued, ended: None, failed: false, change });
        issued
    }

    fn end<T>(&self, issued: u64, result: &Result<T>) {
        let mut log = self.log();
        log.clock += 1;
        let now = log.clock;
        let entry = log.pending.iter_mut().find(|e| e.issued == issued).expect("issued before");
        entry.ended = Some(now);
        entry.failed = result.is_err();
    }
}

impl Storage for CrashStorage {
    fn name(&self) -> &str {
        self.memory.name()
    }

    fn limits(&self) -> StorageLimits {
        self.memory.limits()
    }

    fn size(&self) -> u64 {
        self.memory.size()
    }

    async fn read(&self, offset: u64, buf: Buf) -> Result<Buf> {
        self.memory.read(offset, buf).await
    }

    async fn write(&self, offset: u64, buf: Buf) -> Result<Buf> {
        let issued = self.issue(Change::Write(offset, buf[..].into()));
        let result = self.memory.write(offset, buf).await;
        self.end(issued, &result);
        result
    }

    async fn write_zeroes(&self, range: ByteRange, mode: ZeroMode) -> Result<()> {
        let issued = self.issue(Change::Zero { range, unmap: mode.unmap });
        let result = self.memory.write_zeroes(range, mode).await;
        self.end(issued, &result);
        result
    }

    async fn discard(&self, range: ByteRange) -> Result<()> {
        let issued = self.issue(Change::Discard(range));
        let result = self.memory.discard(range).await;
        self.end(issued, &result);
        result
    }

    async fn allocate(&self, range: ByteRange) -> Result<()> {
        let issued = self.issue(Change::Allocate(range));
        let result = self.memory.allocate(range).await;
        self.end(issued, &result);
        result
    }

    async fn sync(&self) -> Result<()> {
        let began = self.log().clock;
        self.memory.sync().await?;
        let mut log = self.log();
        let (mut covered, pending): (Vec<Entry>, Vec<Entry>) =
            log.pending.drain(..).partition(|e| e.ended.is_some_and(|ended| ended <= began));
        log.pending = pending;
        covered.sort_by_key(|e| e.ended); // Changes take effect when they end.
        for entry in covered {
            if !entry.failed {
                entry.change.apply(&mut log.durable);
            }
        }
        Ok(())
    }

    async fn set_size(&self, size: u64) -> Result<()> {
        let issued = self.issue(Change::SetSize(size));
        let result = self.memory.set_size(size).await;
        self.end(issued, &result);
        result
    }

    async fn extent(&self, range: ByteRange) -> Result<StorageExtent> {
        self.memory.extent(range).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::executor::{Executor, run};

    #[test]
    fn synced_bytes_survive_and_others_may_not() {
        let storage = CrashStorage::new(0).yielding(1);
        let handle = storage.handle();
        run(1, async {
            handle.write(0, Buf::copy_of(&[1; 1024])).await.unwrap();
            handle.sync().await.unwrap();
            handle.write(512, Buf::copy_of(&[2; 1024])).await.unwrap();
        });
        let mut sizes = std::collections::BTreeSet::new();
        let mut seconds = std::collections::BTreeSet::new();
        for seed in 0..200 {
            let left = storage.crash(seed).to_vec();
            assert!(left[..512].iter().all(|b| *b == 1), "synced");
            assert!(left[512..1024].iter().all(|b| *b == left[512]), "sectors are whole");
            assert!(left[512] == 1 || left[512] == 2);
            seconds.insert(left[512]);
            sizes.insert(left.len());
        }
        assert_eq!(seconds.len(), 2, "some crashes keep the second write, some lose it");
        assert_eq!(sizes, [1024, 1536].into(), "growth is lost like anything else");
        run(2, async { handle.sync().await.unwrap() });
        assert_eq!(storage.pending(), 0);
        assert_eq!(storage.crash(7).to_vec(), storage.memory().to_vec());
    }

    #[test]
    fn a_request_under_way_is_not_covered_by_a_sync() {
        let mut outcomes = std::collections::BTreeSet::new();
        for seed in 0..100 {
            let storage = CrashStorage::new(512).yielding(seed);
            let handle = storage.handle();
            let mut executor = Executor::new(seed);
            executor.spawn(async {
                handle.write(0, Buf::copy_of(&[3; 512])).await.unwrap();
            });
            executor.spawn(async { handle.sync().await.unwrap() });
            executor.run_steps(seed % 8);
            drop(executor);
            outcomes.insert(storage.crash(seed).to_vec()[0]);
        }
        assert_eq!(outcomes, [0, 3].into());
    }
}
