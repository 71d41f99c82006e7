//! A storage in memory, with yields, faults and counters.

use crate::SparseBytes;
use crate::executor::yield_now;
use disk::{
    Buf, ByteRange, DiskError, ErrorKind, Operation, Result, Storage, StorageExtent, StorageHandle, StorageLimits,
    ZeroMode,
};
use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

/// What a [`MemoryStorage`] has been asked for so far, failed requests included.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Reads.
    pub reads: u64,
    /// Bytes read.
    pub bytes_read: u64,
    /// Writes.
    pub writes: u64,
    /// Bytes written.
    pub bytes_written: u64,
    /// Zeroings.
    pub zeroes: u64,
    /// Discards.
    pub discards: u64,
    /// Syncs.
    pub syncs: u64,
    /// Size changes.
    pub resizes: u64,
    /// Questions for extents.
    pub extents: u64,
    /// Requests whose future was dropped before they had ended.
    pub abandoned: u64,
}

/// A storage in memory. Clones are the same storage, so a test keeps one and gives the other away.
///
/// It panics when a request breaks what [`StorageHandle`] promises to implementations.
#[derive(Clone)]
pub struct MemoryStorage(Arc<Shared>);

struct Shared {
    name: String,
    limits: StorageLimits,
    state: Mutex<State>,
    fast_zeroes: AtomicBool,
}

struct State {
    bytes: SparseBytes,
    counters: Counters,
    faults: Vec<Fault>,
    full_at: u64,
    yields: Option<fastrand::Rng>,
    split_writes: bool,
}

struct Fault {
    operation: Option<Operation>,
    /// How many matching requests still pass.
    pass: u64,
    /// How many then fail.
    fail: u64,
    kind: ErrorKind,
}

/// A request that waits; counted as abandoned when it is dropped.
struct UnderWay<'a>(&'a MemoryStorage);

impl Drop for UnderWay<'_> {
    fn drop(&mut self) {
        self.0.state().counters.abandoned += 1;
    }
}

impl MemoryStorage {
    /// A storage of `size` zero bytes that takes requests of any alignment.
    pub fn new(size: u64) -> Self {
        Self::of(SparseBytes::new(size))
    }

    /// A storage with these contents.
    pub fn of(bytes: SparseBytes) -> Self {
        Self::build("memory", bytes, StorageLimits { alignment: 1, read_only: false, grows_zeroed: true })
    }

    /// A storage with the contents of a file.
    ///
    /// # Errors
    /// What reading the file reports.
    pub fn from_file(path: &Path) -> io::Result<Self> {
        Ok(Self::of(SparseBytes::from_file(path)?))
    }

    fn build(name: &str, bytes: SparseBytes, limits: StorageLimits) -> Self {
        assert!(limits.alignment.is_power_of_two() && u64::from(limits.alignment) <= 4096);
        Self(Arc::new(Shared {
            name: name.to_owned(),
            limits,
            fast_zeroes: AtomicBool::new(true),
            state: Mutex::new(State {
                bytes,
                counters: Counters::default(),
                faults: Vec::new(),
                full_at: u64::MAX,
                yields: None,
                split_writes: false,
            }),
        }))
    }

    fn rebuild(&self, name: &str, limits: StorageLimits) -> Self {
        Self::build(name, self.state().bytes.clone(), limits)
    }

    /// A copy that demands this alignment (a power of two up to 4096).
    #[must_use]
    pub fn aligned(&self, alignment: u32) -> Self {
        self.rebuild(&self.0.name, StorageLimits { alignment, ..self.0.limits })
    }

    /// A copy that refuses writes.
    #[must_use]
    pub fn read_only(&self) -> Self {
        self.rebuild(&self.0.name, StorageLimits { read_only: true, ..self.0.limits })
    }

    /// A copy under another name.
    #[must_use]
    pub fn named(&self, name: &str) -> Self {
        self.rebuild(name, self.0.limits)
    }

    /// From now on requests wait a random number of turns before they take effect, and large writes take
    /// effect in two pieces, so that requests under way interleave.
    #[must_use]
    pub fn yielding(self, seed: u64) -> Self {
        self.yield_before(seed);
        self.state().split_writes = true;
        self
    }

    /// From now on requests wait a random number of turns, and then take effect at once.
    pub(crate) fn yield_before(&self, seed: u64) {
        self.state().yields = Some(fastrand::Rng::with_seed(seed));
    }

    /// The handle that everybody but the test holds.
    pub fn handle(&self) -> StorageHandle {
        StorageHandle::new(self.clone())
    }

    /// Lets `pass` more requests of this operation (`None`: of any) through, then fails one.
    /// A sync is [`Operation::Flush`], a question for extents [`Operation::Map`].
    pub fn fail_once(&self, operation: Option<Operation>, pass: u64, kind: ErrorKind) {
        self.state().faults.push(Fault { operation, pass, fail: 1, kind });
    }

    /// Lets `pass` more requests of this operation (`None`: of any) through, then fails all.
    pub fn fail_from(&self, operation: Option<Operation>, pass: u64, kind: ErrorKind) {
        self.state().faults.push(Fault { operation, pass, fail: u64::MAX, kind });
    }

    /// Forgets all faults.
    pub fn heal(&self) {
        self.state().faults.clear();
    }

    /// Growth beyond this size fails with [`ErrorKind::NoSpace`].
    pub fn full_at(&self, size: u64) {
        self.state().full_at = size;
    }

    /// Whether zeroing is fast; if not, [`ZeroMode::fast_only`] fails.
    pub fn set_fast_zeroes(&self, fast: bool) {
        self.0.fast_zeroes.store(fast, Ordering::Relaxed);
    }

    /// What was asked for so far.
    pub fn counters(&self) -> Counters {
        self.state().counters
    }

    /// A copy of the contents as they are now.
    pub fn snapshot(&self) -> SparseBytes {
        self.state().bytes.clone()
    }

    /// The contents in one piece.
    pub fn to_vec(&self) -> Vec<u8> {
        self.state().bytes.to_vec()
    }

    /// Writes the contents to a sparse file, for judges that need one.
    ///
    /// # Errors
    /// What writing the file reports.
    pub fn write_to(&self, path: &Path) -> io::Result<()> {
        self.state().bytes.write_to(path)
    }

    /// Changes the contents behind the back of whoever uses the storage.
    pub fn tamper(&self, change: impl FnOnce(&mut SparseBytes)) {
        change(&mut self.state().bytes);
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().expect("no panic while the storage is locked")
    }

    /// Counts the request, waits its turns, and fails it if a fault says so.
    async fn enter(&self, operation: Operation, count: impl FnOnce(&mut Counters)) -> Result<()> {
        let turns = {
            let mut state = self.state();
            count(&mut state.counters);
            let mut failure = None;
            for fault in &mut state.faults {
                if fault.operation.is_some_and(|o| o != operation) || fault.fail == 0 {
                    continue;
                }
                if fault.pass > 0 {
                    fault.pass -= 1;
                } else if failure.is_none() {
                    fault.fail -= 1;
                    failure = Some(fault.kind);
                }
            }
            if let Some(kind) = failure {
                return Err(DiskError::new(kind, operation).because("a fault that the test injected"));
            }
            state.yields.as_mut().map_or(0, |random| random.u32(0..4))
        };
        let under_way = UnderWay(self);
        for _ in 0..turns {
            yield_now().await;
        }
        std::mem::forget(under_way);
        Ok(())
    }

    fn promise(&self, range: ByteRange, address: Option<&Buf>) {
        let alignment = u64::from(self.0.limits.alignment);
        assert!(!range.is_empty() && range.end() <= i64::MAX as u64, "the handle validates ranges: {range}");
        assert!(range.is_aligned(alignment), "the handle aligns requests to {alignment}: {range}");
        assert!(address.is_none_or(|buf| buf.is_aligned(alignment as usize)), "the handle aligns memory");
    }

    fn promise_write(&self, range: ByteRange, address: Option<&Buf>, operation: Operation) -> Result<()> {
        assert!(!self.0.limits.read_only, "the handle refuses writes to a read-only storage");
        self.promise(range, address);
        self.room(range.end(), operation)
    }

    fn room(&self, end: u64, operation: Operation) -> Result<()> {
        let state = self.state();
        if end > state.full_at.max(state.bytes.size()) {
            return Err(DiskError::new(ErrorKind::NoSpace, operation));
        }
        Ok(())
    }
}

impl Storage for MemoryStorage {
    fn name(&self) -> &str {
        &self.0.name
    }

    fn limits(&self) -> StorageLimits {
        self.0.limits
    }

    fn size(&self) -> u64 {
        self.state().bytes.size()
    }

    async fn read(&self, offset: u64, mut buf: Buf) -> Result<Buf> {
        let len = buf.len() as u64;
        self.promise(ByteRange::new(offset, len), Some(&buf));
        self.enter(Operation::Read, |c| {
            c.reads += 1;
            c.bytes_read += len;
        })
        .await?;
        self.state().bytes.read(offset, &mut buf);
        Ok(buf)
    }

    async fn write(&self, offset: u64, buf: Buf) -> Result<Buf> {
        let len = buf.len() as u64;
        self.promise_write(ByteRange::new(offset, len), Some(&buf), Operation::Write)?;
        self.enter(Operation::Write, |c| {
            c.writes += 1;
            c.bytes_written += len;
        })
        .await?;
        let cut = {
            let mut state = self.state();
            let split = state.split_writes && len >= 1024;
            match &mut state.yields {
                // At a sector: those reach a disk whole or not at all.
                Some(random) if split => (((offset + random.u64(512..len)) & !511) - offset) as usize,
                _ => 0,
            }
        };
        if cut > 0 {
            self.state().bytes.write(offset, &buf[..cut]);
            let under_way = UnderWay(self);
            yield_now().await;
            std::mem::forget(under_way);
        }
        self.state().bytes.write(offset + cut as u64, &buf[cut..]);
        Ok(buf)
    }

    async fn write_zeroes(&self, range: ByteRange, mode: ZeroMode) -> Result<()> {
        self.promise_write(range, None, Operation::WriteZeroes)?;
        self.enter(Operation::WriteZeroes, |c| c.zeroes += 1).await?;
        if mode.fast_only && !self.0.fast_zeroes.load(Ordering::Relaxed) {
            return Err(DiskError::new(ErrorKind::NotFast, Operation::WriteZeroes));
        }
        self.state().bytes.zero(range, mode.unmap);
        Ok(())
    }

    async fn discard(&self, range: ByteRange) -> Result<()> {
        assert!(!self.0.limits.read_only, "the handle refuses writes to a read-only storage");
        self.promise(range, None);
        self.enter(Operation::Discard, |c| c.discards += 1).await?;
        let mut state = self.state();
        let inside = ByteRange::between(range.offset(), range.end().min(state.bytes.size()));
        if !inside.is_empty() {
            state.bytes.zero(inside, true);
        }
        Ok(())
    }

    async fn allocate(&self, range: ByteRange) -> Result<()> {
        assert!(!self.0.limits.read_only, "the handle refuses writes to a read-only storage");
        self.room(range.end(), Operation::Write)?;
        self.enter(Operation::Write, |_| ()).await?;
        self.state().bytes.allocate(range);
        Ok(())
    }

    async fn sync(&self) -> Result<()> {
        self.enter(Operation::Flush, |c| c.syncs += 1).await
    }

    async fn set_size(&self, size: u64) -> Result<()> {
        assert!(!self.0.limits.read_only, "the handle refuses writes to a read-only storage");
        self.room(size, Operation::Resize)?;
        self.enter(Operation::Resize, |c| c.resizes += 1).await?;
        self.state().bytes.set_size(size);
        Ok(())
    }

    async fn extent(&self, range: ByteRange) -> Result<StorageExtent> {
        assert!(!range.is_empty(), "the handle validates ranges");
        self.enter(Operation::Map, |c| c.extents += 1).await?;
        let (range, hole) = self.state().bytes.extent(range);
        Ok(StorageExtent { range, hole })
    }
}
