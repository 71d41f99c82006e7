//! The single-pass copier under all jobs that move a disk's bytes: it goes over the disk once, with a bounded number of
//! chunks under way, and waits for whoever governs its pace between them.

use crate::LayerInfo;
use crate::stack::{Held, Stack};
use disk::{Buf, ByteRange, DiskError, DiskHandle, ErrorKind, Operation, Result, WriteFlags, ZeroMode};
use futures_util::future::{Either, select};
use futures_util::stream::{FuturesUnordered, StreamExt};
use std::cell::{Cell, RefCell};
use std::ops::Range;
use std::pin::pin;
use std::rc::Rc;

/// Zeroes that are looked at, or passed over, in one go.
const ZERO_RUN: u64 = 64 << 20;

/// Who governs a copy: its pace, and whether it goes on at all.
pub trait Control {
    /// What the job fails with.
    type Error: From<DiskError>;

    /// Called before so many bytes are moved (0: only zeroes, or nothing); waits as long as the job is paused or ahead of
    /// its rate. No lock is held and no request of the disk is registered meanwhile; chunks that were begun go on.
    ///
    /// # Errors
    /// When the job is to stop: chunks that were begun are finished, and the copy ends with this error.
    fn pace(&self, bytes: u64) -> impl Future<Output = std::result::Result<(), Self::Error>>;

    /// Called after each chunk: everything below `position` (in bytes of the disk) is done, though not durable; `done`
    /// is what this pass has done in all. The position may go back, when something has to be done again.
    fn progress(&self, position: u64, done: CopyStats);
}

impl<C: Control> Control for Rc<C> {
    type Error = C::Error;

    async fn pace(&self, bytes: u64) -> std::result::Result<(), Self::Error> {
        (**self).pace(bytes).await
    }

    fn progress(&self, position: u64, done: CopyStats) {
        (**self).progress(position, done);
    }
}

/// What a copy has done so far, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CopyStats {
    /// Read.
    pub read: u64,
    /// Written as data.
    pub written: u64,
    /// Written as zeroes.
    pub zeroed: u64,
    /// Left alone, as the target shows them already, or the source does not hold them.
    pub skipped: u64,
}

impl CopyStats {
    pub(crate) fn add(&mut self, more: Self) {
        self.read += more.read;
        self.written += more.written;
        self.zeroed += more.zeroed;
        self.skipped += more.skipped;
    }
}

/// How much is under way at a time: `chunk * at_once` bytes of memory at most.
///
/// A pass is stopped by its [`Control`]. Its future is polled to the end: dropped half-way, it would leave writes on their
/// way to the target.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CopyPass {
    /// Bytes of a chunk: a power of two from 4 KiB on. A guest's write to a chunk under copy waits until it is copied.
    pub chunk: u64,
    /// Chunks that are copied at the same time, 1 at least.
    pub at_once: usize,
}

impl Default for CopyPass {
    fn default() -> Self {
        Self { chunk: 256 << 10, at_once: 4 }
    }
}

impl CopyPass {
    /// Chunk's size, at least one unit.
    pub(crate) fn chunk_of(self, unit: u64) -> u64 {
        self.chunk.clamp(4 << 10, 32 << 20).next_power_of_two().max(unit)
    }

    /// Copies what some neighbouring layers of a chain hold into the disk below them: `held` are their places in `layers`
    /// (top first), and what they leave absent is skipped; zeroes are written as zeroes. What lies behind the end of a
    /// layer is zero for those above it, so it is written as zero, too: everything up to the end of `target`. Begins at
    /// `from`, a position that an earlier pass has reached and that was made durable; the target is not flushed.
    ///
    /// The layers do not change meanwhile, and stay where they are as long as the pass runs. For a chain in use, `target` is
    /// made of the very handles that stand below in the chain: an image that is open twice would show old tables on
    /// the other side. The guest sees none of it: what is written, the layers above hide.
    ///
    /// Crash: at any moment the chain from the first of these layers on shows the same bytes as before.
    ///
    /// # Errors
    /// `Invalid` when the target is shorter than the first of the layers: resize it before (with no request of the guest
    /// under way: [`crate::Chain::switch`]). Else what layers, target, and `control` report.
    pub async fn commit<C: Control>(
        self,
        layers: &[LayerInfo],
        held: Range<usize>,
        target: &DiskHandle,
        from: u64,
        control: &C,
    ) -> std::result::Result<CopyStats, C::Error> {
        let invalid = |why: String| DiskError::new(ErrorKind::Invalid, Operation::Write).because(why);
        if held.is_empty() || held.end > layers.len() {
            return Err(invalid(format!("there are no layers {held:?} among {}", layers.len())).into());
        }
        let size = target.geometry().size;
        let first = layers[held.start].handle.geometry().size;
        if first > size {
            let path = layers[held.start].path.display();
            return Err(
                invalid(format!("{path} has {first} bytes and its parent {size}; resize the parent first")).into()
            );
        }
        let mut done = crate::coverage::Coverage::default();
        done.insert(ByteRange::between(0, from.min(size)));
        let work = CommitWork {
            stack: Stack::new(&layers[held.start..]),
            held: held.len(),
            target,
            size,
            chunk: self.chunk_of(1),
            cursor: Cell::new(from.min(size)),
            done: RefCell::new(done),
        };
        drive(&work, self.at_once, control).await
    }
}

/// A chunk, or a longer run that takes no moving of bytes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Piece {
    pub(crate) range: ByteRange,
    /// How many bytes will be moved, as far as is known.
    pub(crate) bytes: u64,
}

/// What a pass does.
pub(crate) trait Work {
    /// The next piece that is neither done nor under way; `None` when there is none up to the end.
    async fn next(&self) -> Result<Option<Piece>>;
    /// Does a piece, or the first part of it.
    async fn carry_out(&self, range: ByteRange) -> Result<CopyStats>;
    /// Whether all is done, when no piece is under way. If not, begins again with what is left.
    fn is_done(&self) -> bool;
    /// Everything below is done.
    fn position(&self) -> u64;
}

/// Does the work, piece by piece. Pieces that were begun are always finished, also after a failure: a chunk's lock is held
/// no longer than it takes.
pub(crate) async fn drive<W: Work, C: Control>(
    work: &W,
    at_once: usize,
    control: &C,
) -> std::result::Result<CopyStats, C::Error> {
    let mut running = FuturesUnordered::new();
    let mut total = CopyStats::default();
    let mut failure: Option<C::Error> = None;
    let mut account = |done: Result<CopyStats>| -> std::result::Result<(), C::Error> {
        total.add(done?);
        control.progress(work.position(), total);
        Ok(())
    };
    while failure.is_none() {
        // What is passed over takes no waiting; others on this thread have their turn all the same.
        yield_once().await;
        let next = {
            let mut next = pin!(async {
                let piece = work.next().await?;
                control.pace(piece.map_or(0, |piece| piece.bytes)).await?;
                Ok::<_, C::Error>(piece)
            });
            loop {
                if running.is_empty() {
                    break next.await;
                }
                match select(next.as_mut(), running.next()).await {
                    Either::Left((next, _)) => break next,
                    Either::Right((done, _)) => {
                        if let Err(error) = done.map_or(Ok(()), &mut account) {
                            break Err(error);
                        }
                    }
                }
            }
        };
        match next {
            Ok(Some(piece)) => running.push(work.carry_out(piece.range)),
            Ok(None) => {
                while let Some(done) = running.next().await {
                    // The first one tells why; what follows may be its consequence.
                    let failed = account(done).err();
                    failure = failure.or(failed);
                }
                if failure.is_none() && work.is_done() {
                    return Ok(total);
                }
            }
            Err(error) => failure = Some(error),
        }
        while failure.is_none() && running.len() >= at_once.max(1) {
            failure = running.next().await.and_then(|done| account(done).err());
        }
    }
    while running.next().await.is_some() {}
    Err(failure.expect("the loop ends with a failure only"))
}

/// Lets other tasks of the thread go first, once.
pub(crate) async fn yield_once() {
    let mut yielded = false;
    std::future::poll_fn(|context| {
        if std::mem::replace(&mut yielded, true) {
            return std::task::Poll::Ready(());
        }
        context.waker().wake_by_ref();
        std::task::Poll::Pending
    })
    .await;
}

/// The piece at the beginning of `rest`, of which the first `zeroes` bytes are zero: a long run of zeroes is one piece,
/// everything else a chunk.
pub(crate) fn piece_of(rest: ByteRange, zeroes: u64, chunk: u64) -> ByteRange {
    let first = rest.prefix(chunk - rest.offset() % chunk);
    if zeroes <= first.len() {
        return first;
    }
    let run = rest.prefix(zeroes.min(ZERO_RUN));
    // Ends where a chunk does, so that later pieces are whole chunks.
    let end = if run.end() == rest.end() { run.end() } else { run.end() / chunk * chunk };
    ByteRange::between(rest.offset(), end.max(first.end()))
}

/// The longest run that is looked for at once.
pub(crate) fn window(rest: ByteRange) -> ByteRange {
    rest.prefix(ZERO_RUN)
}

/// Writes bytes to the target.
pub(crate) async fn write_to(target: &DiskHandle, offset: u64, buf: Buf) -> Result<()> {
    target.write(offset, buf, WriteFlags::default()).await
}

/// Has the target read as zero; what it calls zero already is left alone.
pub(crate) async fn zero_in(target: &DiskHandle, range: ByteRange) -> Result<CopyStats> {
    let mut stats = CopyStats::default();
    let mut rest = range;
    while !rest.is_empty() {
        let extent = target.map(rest).await?;
        let len = extent.range.len();
        if extent.zero {
            stats.skipped += len;
        } else {
            let mode = ZeroMode { unmap: true, fast_only: false };
            target.write_zeroes(extent.range, mode, WriteFlags::default()).await?;
            stats.zeroed += len;
        }
        rest = rest.skip(len);
    }
    Ok(stats)
}

struct CommitWork<'a> {
    /// From the first of the layers that are copied on.
    stack: Stack<'a>,
    /// How many layers are copied.
    held: usize,
    target: &'a DiskHandle,
    size: u64,
    chunk: u64,
    cursor: Cell<u64>,
    done: RefCell<crate::coverage::Coverage>,
}

impl CommitWork<'_> {
    /// The range in runs that are held in one way.
    async fn runs(&self, range: ByteRange) -> Result<Vec<(ByteRange, Held)>> {
        let mut runs: Vec<(ByteRange, Held)> = Vec::new();
        let mut rest = range;
        while !rest.is_empty() {
            let (found, held) = self.stack.held(0..self.held, rest).await?;
            match runs.last_mut() {
                Some((run, how)) if *how == held => *run = ByteRange::between(run.offset(), found.end()),
                _ => runs.push((found, held)),
            }
            rest = rest.skip(found.len());
        }
        Ok(runs)
    }
}

impl Work for CommitWork<'_> {
    async fn next(&self) -> Result<Option<Piece>> {
        loop {
            let rest = ByteRange::between(self.cursor.get(), self.size);
            if rest.is_empty() {
                return Ok(None);
            }
            let (found, held) = self.stack.held(0..self.held, window(rest)).await?;
            if held == Held::Absent {
                self.done.borrow_mut().insert(found);
                self.cursor.set(found.end());
                yield_once().await;
                continue;
            }
            let zeroes = if held == Held::Zero { found.len() } else { 0 };
            let range = piece_of(rest, zeroes, self.chunk);
            let mut bytes = 0;
            if zeroes < range.len() {
                let runs = self.runs(range).await?;
                bytes = runs.iter().filter(|(_, held)| *held == Held::Data).map(|(run, _)| run.len()).sum();
            }
            self.cursor.set(range.end());
            return Ok(Some(Piece { range, bytes }));
        }
    }

    async fn carry_out(&self, range: ByteRange) -> Result<CopyStats> {
        let mut stats = CopyStats::default();
        for (run, held) in self.runs(range).await? {
            match held {
                Held::Absent => stats.skipped += run.len(),
                Held::Zero => stats.add(zero_in(self.target, run).await?),
                Held::Data => {
                    let buf = self.stack.read_layers(0, run.offset(), Buf::new(run.len() as usize)).await?;
                    write_to(self.target, run.offset(), buf).await?;
                    stats.read += run.len();
                    stats.written += run.len();
                }
            }
        }
        self.done.borrow_mut().insert(range);
        Ok(stats)
    }

    fn is_done(&self) -> bool {
        debug_assert_eq!(self.position(), self.size);
        true
    }

    fn position(&self) -> u64 {
        self.done.borrow().frontier()
    }
}
