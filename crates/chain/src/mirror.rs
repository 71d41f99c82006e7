//! A mirror: another disk that is brought to the same bytes while the guest goes on, so that it can take this one's place.
//!
//! What is *copied* is equal on both disks, and every change of the guest's there goes to both, at the same time, and is
//! answered when both have it. Elsewhere it goes to the source alone; the copier will come there. So the copier passes over
//! the disk once, however much the guest writes.
//!
//! The two stay equal because changes that overlap run one behind the other while a mirror is attached: on one disk two
//! writes that overlap may end in either order, byte by byte, but two disks could end differently. Each change locks its
//! range, as the copier locks its chunk, and what is copied changes under that lock alone.
//!
//! The target can never harm the guest: when it fails, the mirror is over, and the guest's change is answered as the source
//! has it.

use crate::background::Background;
use crate::copy_pass::{Piece, Work, drive, piece_of, window, write_to, yield_once, zero_in};
use crate::coverage::Coverage;
use crate::locks::RangeLocks;
use crate::stack::{Held, Stack};
use crate::zero::whole_units;
use crate::{Chain, Control, CopyPass, CopyStats, LayerInfo};
use disk::{Buf, ByteRange, DiskError, DiskHandle, ErrorKind, Operation, Result, WriteFlags, ZeroMode};
use futures_util::future::{join, join_all};
use std::cell::{Cell, RefCell};
use std::rc::Rc;

/// So many bytes are read back and written to the target within a guest's request, where it is not known what a change has
/// left on the source (a discard that is no hole, a write that failed); the rest is copied again.
const READ_BACK_MAX: u64 = 1 << 20;

/// The largest block that a storage takes whole, in bytes.
const BLOCK_MAX: u64 = disk::BUF_ALIGNMENT as u64;

/// What a target failed with, to be told as often as somebody asks.
struct Failure {
    kind: ErrorKind,
    operation: Operation,
    text: String,
}

impl Failure {
    fn of(error: &DiskError) -> Self {
        Self { kind: error.kind(), operation: error.operation(), text: error.to_string() }
    }

    fn told(&self) -> DiskError {
        DiskError::new(self.kind, self.operation).because(format!("the target of the copy failed: {}", self.text))
    }
}

/// A disk that takes part in the guest's changes.
pub struct Mirror {
    target: DiskHandle,
    /// So many layers of the source, from the top, stand on the target; all of the source does not when there are none.
    above: usize,
    copied: RefCell<Coverage>,
    locks: RangeLocks,
    /// What the target failed with.
    failure: RefCell<Option<Failure>>,
    /// It was attached once.
    used: Cell<bool>,
    /// Data that the guest's changes have moved to the target, in bytes.
    mirrored: Cell<u64>,
}

impl Mirror {
    /// A mirror to `target`, which has the size of the disk. `copied` are ranges that are equal on both: none for a new
    /// target; when a job is resumed, what was durably copied and has not changed since.
    pub fn new(target: DiskHandle, copied: impl IntoIterator<Item = ByteRange>) -> Rc<Self> {
        Self::with(target, 0, copied)
    }

    /// A mirror to the chain that the upper `above` layers of the disk stand on, made of the very handles that stand below
    /// in the disk, the first of them writable. What those layers leave absent is equal already, as it is read from there.
    ///
    /// Crash: what is written to the target the layers above hide, as it is what they hold; so the disk shows the same.
    pub fn into_parent(target: DiskHandle, above: usize) -> Rc<Self> {
        Self::with(target, above, [])
    }

    fn with(target: DiskHandle, above: usize, copied: impl IntoIterator<Item = ByteRange>) -> Rc<Self> {
        let mut equal = Coverage::default();
        copied.into_iter().for_each(|range| equal.insert(range));
        Rc::new(Self {
            target,
            above,
            copied: RefCell::new(equal),
            locks: RangeLocks::default(),
            failure: RefCell::default(),
            used: Cell::new(false),
            mirrored: Cell::new(0),
        })
    }

    /// Whether the target stands below in the disk itself.
    pub(crate) fn leads_into_parent(&self) -> bool {
        self.above > 0
    }

    /// Makes durable what stands below in the disk and was written to, so that the top may rely on what it shows.
    pub(crate) async fn release_parent(&self) -> Result<()> {
        match self.leads_into_parent() {
            true => self.target.flush().await,
            false => Ok(()),
        }
    }

    /// The disk that is written to.
    pub fn target(&self) -> &DiskHandle {
        &self.target
    }

    /// Everything below this, in bytes of the disk, is equal on both.
    pub fn position(&self) -> u64 {
        self.copied.borrow().frontier()
    }

    /// Data that the guest's changes have moved to the target, in bytes; zeroes are not counted.
    pub fn mirrored(&self) -> u64 {
        self.mirrored.get()
    }

    /// Whether the target has failed: the mirror is over, and the guest goes on with the source alone.
    pub fn has_failed(&self) -> bool {
        self.failure.borrow().is_some()
    }

    /// Makes durable on the target what was copied and mirrored until now; returns the position that this is true of. A
    /// job that is resumed from there copies nothing twice, but for what has changed since.
    ///
    /// # Errors
    /// The target's; the mirror is over then.
    pub async fn flush(&self) -> Result<u64> {
        self.alive()?;
        let position = self.position();
        match self.target.flush().await {
            Ok(()) => self.alive().map(|()| position),
            Err(error) => Err(self.fail(error)),
        }
    }

    fn alive(&self) -> Result<()> {
        match &*self.failure.borrow() {
            None => Ok(()),
            Some(failure) => Err(failure.told()),
        }
    }

    /// Ends the mirror; returns the first failure of the target, for whoever can tell of it.
    fn fail(&self, error: DiskError) -> DiskError {
        self.note(Err(error));
        self.alive().err().unwrap_or_else(not_attached)
    }

    /// Ends the mirror if the target failed; the failure is kept for the job.
    fn note(&self, result: Result<()>) {
        if let Err(error) = result
            && !self.has_failed()
        {
            tracing::warn!(%error, "the target of a copy failed; the guest goes on without it");
            self.failure.replace(Some(Failure::of(&error)));
        }
    }

    /// The parts of the range whose changes go to the target.
    fn copied_in(&self, range: ByteRange) -> Vec<ByteRange> {
        if self.has_failed() { Vec::new() } else { self.copied.borrow().within(range) }
    }

    /// The chain, as the guest's changes are to see it: of the layers that are the target as well, nothing is durable before
    /// the end, so the top must not rely on their zeroes.
    pub(crate) fn seen_by_guest<'a>(&self, stack: Stack<'a>) -> Stack<'a> {
        if self.above == 0 { stack } else { stack.with_changing(self.above) }
    }

    /// A guest's write.
    pub(crate) async fn write(&self, stack: Stack<'_>, offset: u64, buf: Buf, flags: WriteFlags) -> Result<()> {
        let range = ByteRange::new(offset, buf.len() as u64);
        let _lock = self.locks.lock(range).await;
        let parts = self.copied_in(range);
        let copies: Vec<_> = parts
            .iter()
            .map(|part| {
                let from = (part.offset() - offset) as usize;
                self.mirror(part.offset(), Buf::copy_of(&buf[from..from + part.len() as usize]))
            })
            .collect();
        let source = async {
            stack.write_top(offset, buf).await?;
            stack.finish_write(flags).await
        };
        let (source, target) = join(source, join_all(copies)).await;
        self.end(stack, range, &source, target).await;
        source
    }

    /// A guest's zeroing.
    pub(crate) async fn write_zeroes(
        &self,
        stack: Stack<'_>,
        range: ByteRange,
        mode: ZeroMode,
        flags: WriteFlags,
    ) -> Result<()> {
        let _lock = self.locks.lock(range).await;
        let parts = self.copied_in(range);
        let zeroes = || {
            let mode = ZeroMode { fast_only: false, ..mode };
            join_all(parts.iter().map(move |part| self.target.write_zeroes(*part, mode, WriteFlags::default())))
        };
        let source = async {
            stack.zero_top(range, mode).await?;
            stack.finish_write(flags).await
        };
        // What must be fast may be refused: the source is asked first then, and the target does as it did.
        let (source, target) = if mode.fast_only {
            let source = source.await;
            let target = if source.is_ok() { zeroes().await } else { Vec::new() };
            (source, target)
        } else {
            join(source, zeroes()).await
        };
        self.end(stack, range, &source, target).await;
        source
    }

    /// A guest's discard. It leaves zeroes or the old bytes, as the source likes; the target takes over what that is.
    pub(crate) async fn discard(&self, stack: Stack<'_>, range: ByteRange, flags: WriteFlags) -> Result<()> {
        let _lock = self.locks.lock(range).await;
        // The rest of the range stays as it is.
        let touched = whole_units(stack.top(), range);
        let discarded = stack.discard_top(range).await;
        let source = async {
            discarded?;
            stack.finish_write(flags).await
        };
        let (source, ()) = join(source, self.follow(stack, touched)).await;
        source
    }

    /// A write to the target that the guest has caused.
    async fn mirror(&self, offset: u64, buf: Buf) -> Result<()> {
        self.mirrored.set(self.mirrored.get() + buf.len() as u64);
        write_to(&self.target, offset, buf).await
    }

    /// A change has ended on both disks.
    async fn end(&self, stack: Stack<'_>, range: ByteRange, source: &Result<()>, target: Vec<Result<()>>) {
        target.into_iter().for_each(|done| self.note(done));
        match source {
            Ok(()) => {}
            Err(error) if error.kind() == ErrorKind::NotFast => self.follow_refusal(stack, range).await,
            // Nobody knows what it left there.
            Err(_) => self.follow(stack, range).await,
        }
    }

    /// Brings the target to what the source shows now in the copied parts of a range whose lock is held. What would take
    /// long, or cannot be read, is not copied any more: the copier comes back to it.
    async fn follow(&self, stack: Stack<'_>, range: ByteRange) {
        self.follow_reading(stack, range, Some(READ_BACK_MAX)).await;
    }

    /// As [`Mirror::follow`], after a zeroing that could not be done fast. Such a one has changed nothing, or has come to
    /// its refusal half-way: what it has zeroed is known to be zero, but for the blocks that a storage takes whole, at
    /// both ends. A guest may try this often, and over long ranges, so the rest is not looked at.
    async fn follow_refusal(&self, stack: Stack<'_>, range: ByteRange) {
        let whole = range.align_in(BLOCK_MAX);
        if whole.is_empty() {
            return self.follow(stack, range).await;
        }
        self.follow(stack, ByteRange::between(range.offset(), whole.offset())).await;
        self.follow_reading(stack, whole, None).await;
        self.follow(stack, ByteRange::between(whole.end(), range.end())).await;
    }

    /// `left`: how many bytes may be read back; `None`: none, and what is not known to be zero is as it was.
    async fn follow_reading(&self, stack: Stack<'_>, range: ByteRange, mut left: Option<u64>) {
        for part in self.copied_in(range) {
            let mut rest = part;
            while !rest.is_empty() && !self.has_failed() {
                let now = window(rest);
                self.follow_part(stack, now, left.as_mut()).await;
                rest = rest.skip(now.len());
                yield_once().await;
            }
        }
    }

    async fn follow_part(&self, stack: Stack<'_>, part: ByteRange, mut left: Option<&mut u64>) {
        let Ok(runs) = stack.runs(part).await else {
            self.copied.borrow_mut().remove(part);
            return;
        };
        for (run, zero) in runs {
            if zero {
                self.note(zero_in(&self.target, run).await.map(drop));
                continue;
            }
            let Some(left) = left.as_deref_mut() else { continue };
            if run.len() > *left {
                self.copied.borrow_mut().remove(run);
            } else {
                *left -= run.len();
                match stack.read_through(run.offset(), Buf::new(run.len() as usize)).await {
                    Ok(buf) => self.note(self.mirror(run.offset(), buf).await),
                    Err(_) => self.copied.borrow_mut().remove(run),
                }
            }
        }
    }

    /// The source has another size; no request is under way. What is added counts as not copied.
    pub(crate) async fn follow_size(&self, size: u64) {
        if self.has_failed() {
            return;
        }
        self.copied.borrow_mut().remove(ByteRange::between(size, u64::MAX));
        self.note(self.target.resize(size).await);
    }
}

impl Chain {
    /// Attaches a mirror: from here on it takes part in the guest's changes. Waits for the requests under way.
    ///
    /// While it is attached the layers may be switched, and the size may change: the target's changes with it.
    ///
    /// # Errors
    /// `InUse` when a mirror or an infill is attached already, `Invalid` when the target has another size, `Closed`.
    pub async fn attach_mirror(&self, mirror: &Rc<Mirror>) -> Result<()> {
        self.attach(Background::Mirror(Rc::clone(mirror)), |layers| {
            let invalid = |why| Err(DiskError::new(ErrorKind::Invalid, Operation::Write).because(why));
            let (size, there) = (layers[0].handle.geometry().size, mirror.target.geometry().size);
            if size != there {
                let path = layers[0].path.display();
                return invalid(format!(
                    "the disk {path} has {size} bytes, and the target of the copy {there}; make them equal"
                ));
            }
            // What the guest has changed since it was detached is not known.
            if mirror.used.replace(true) {
                return invalid("a mirror is attached once; make a new one, of what is known to be equal".to_owned());
            }
            Ok(())
        })
        .await
    }

    /// Detaches a mirror; when this returns, no request of the guest's writes to its target any more. `false`: it was not
    /// attached.
    ///
    /// A target that stands below in the disk is made durable first, as from then on the top may rely on what it shows. If
    /// that fails, the mirror goes on to keep the top from that.
    pub async fn detach_mirror(&self, mirror: &Rc<Mirror>) -> bool {
        let job = Background::Mirror(Rc::clone(mirror));
        let _exclusive = self.requests.exclude().await;
        let attached = self.has_background(&job);
        if attached {
            match mirror.release_parent().await {
                Ok(()) => drop(self.background.replace(None)),
                Err(error) => mirror.note(Err(error)),
            }
        }
        attached
    }

    /// Copies to the mirror's target what is not copied yet, until both disks are equal.
    ///
    /// # Errors
    /// The target's first failure, which may have been met by a guest's change; `Closed` when the mirror is not attached
    /// (any more); what the source and `control` report. After any error but the target's the pass can be run again, and
    /// goes on where it was.
    pub async fn copy_to_mirror<C: Control>(
        &self,
        mirror: &Rc<Mirror>,
        pass: CopyPass,
        control: &C,
    ) -> std::result::Result<CopyStats, C::Error> {
        let job = Background::Mirror(Rc::clone(mirror));
        let work = MirrorWork { chain: self, mirror, job, chunk: pass.chunk_of(1), cursor: Cell::new(0) };
        drive(&work, pass.at_once, control).await
    }

    /// Has the mirror's target take the disk's place: with no request under way, and when both are equal and the target is
    /// durable, `change` says which layers follow (those of the target, that is), and the mirror is detached. See
    /// [`Chain::switch`] for what `change` may do; what makes the new place known (a rename, a catalogue) is its last step.
    ///
    /// Crash: before that step the source is the disk, and has all; after it the target is, and has all that was durable
    /// or was merely written until then.
    ///
    /// # Errors
    /// As [`Chain::switch`]; the target's failure; `Invalid` when the two are not equal (yet): run
    /// [`Chain::copy_to_mirror`] again. After an error the source is the disk as before, and the mirror stays attached
    /// unless its target failed.
    pub async fn switch_to_mirror<E: From<DiskError>>(
        &self,
        mirror: &Rc<Mirror>,
        change: impl AsyncFnOnce(Rc<[LayerInfo]>) -> std::result::Result<Vec<LayerInfo>, E>,
    ) -> std::result::Result<(), E> {
        // Most of it before the guest is held.
        mirror.flush().await?;
        let _exclusive = self.requests.exclude().await;
        mirror.alive()?;
        if !self.is_attached(&Background::Mirror(Rc::clone(mirror))) {
            return Err(not_attached().into());
        }
        let size = self.top().geometry().size;
        if mirror.position() < size {
            return Err(DiskError::new(ErrorKind::Invalid, Operation::Write)
                .because(format!(
                    "{} bytes were to be copied to the target, and {} are; copy the rest",
                    size,
                    mirror.position()
                ))
                .into());
        }
        mirror.flush().await?;
        self.switch_excluded(change).await?;
        self.background.replace(None);
        Ok(())
    }
}

fn not_attached() -> DiskError {
    DiskError::new(ErrorKind::Closed, Operation::Write).because("the mirror is not attached to the disk")
}

struct MirrorWork<'a> {
    chain: &'a Chain,
    mirror: &'a Mirror,
    job: Background,
    chunk: u64,
    cursor: Cell<u64>,
}

impl MirrorWork<'_> {
    fn attached(&self) -> Result<()> {
        self.mirror.alive()?;
        if self.chain.is_attached(&self.job) { Ok(()) } else { Err(not_attached()) }
    }

    fn size(&self) -> u64 {
        self.chain.top().geometry().size
    }

    /// What there is to be done about the beginning of the range: nothing where the source reads it from the target.
    async fn first(&self, stack: Stack<'_>, range: ByteRange) -> Result<(ByteRange, Held)> {
        if self.mirror.above > 0 {
            return stack.held(0..self.mirror.above, range).await;
        }
        let extent = stack.map_merged(range).await?;
        Ok((extent.range, if extent.zero { Held::Zero } else { Held::Data }))
    }
}

impl Work for MirrorWork<'_> {
    async fn next(&self) -> Result<Option<Piece>> {
        let _request = self.chain.requests.enter(Operation::Read).await?;
        self.attached()?;
        let rest = ByteRange::between(self.cursor.get(), self.size());
        let Some(gap) = self.mirror.copied.borrow().first_gap(rest) else { return Ok(None) };
        // Without its lock this is a guess of how long the piece should be, and of what it will cost.
        let layers = self.chain.layers();
        let stack = Stack::new(&layers);
        let (first, holds) = self.first(stack, window(gap)).await?;
        let free = if holds == Held::Data { 0 } else { first.len() };
        let range = piece_of(gap, free, self.chunk);
        let mut bytes = 0;
        let mut rest = range.skip(free.min(range.len()));
        while !rest.is_empty() {
            let (run, holds) = self.first(stack, rest).await?;
            bytes += if holds == Held::Data { run.len() } else { 0 };
            rest = rest.skip(run.len());
        }
        self.cursor.set(range.end());
        Ok(Some(Piece { range, bytes }))
    }

    /// Crash: the source is the disk, and is only read here.
    async fn carry_out(&self, range: ByteRange) -> Result<CopyStats> {
        let mut stats = CopyStats::default();
        // A request of the disk first, then the lock: the guest's changes do it in the same order.
        let _request = self.chain.requests.enter(Operation::Read).await?;
        let _lock = self.mirror.locks.lock(range).await;
        self.attached()?;
        let range = range.intersect(ByteRange::new(0, self.size()));
        let layers = self.chain.layers();
        let stack = Stack::new(&layers);
        let mut room = self.chunk;
        let mut rest = range;
        while !rest.is_empty() {
            let (run, holds) = self.first(stack, rest).await?;
            // What was zero when the piece was chosen may be data now, and be too long for one chunk.
            let run = if holds == Held::Data { run.prefix(room) } else { run };
            if run.is_empty() {
                break;
            }
            let copied = match holds {
                Held::Absent => Ok(CopyStats { skipped: run.len(), ..CopyStats::default() }),
                Held::Zero => zero_in(&self.mirror.target, run).await,
                Held::Data => {
                    room -= run.len();
                    let buf = stack.read_through(run.offset(), Buf::new(run.len() as usize)).await?;
                    let moved = CopyStats { read: run.len(), written: run.len(), ..CopyStats::default() };
                    write_to(&self.mirror.target, run.offset(), buf).await.map(|()| moved)
                }
            };
            stats.add(copied.map_err(|error| self.mirror.fail(error))?);
            self.mirror.copied.borrow_mut().insert(run);
            rest = rest.skip(run.len());
        }
        Ok(stats)
    }

    fn is_done(&self) -> bool {
        self.cursor.set(0);
        self.mirror.position() >= self.size()
    }

    fn position(&self) -> u64 {
        self.mirror.position()
    }
}
