//! Infill: a layer takes up what the layers right below it hold, so that these can vanish from the chain.
//!
//! Only what the layer does not hold itself is brought up. For the top layer the guest goes on writing meanwhile: a chunk
//! is looked at and filled under a lock that the guest's changes respect, so what the guest writes is never written over
//! with something older.
//!
//! A zero counts like data: where a vanishing layer says "zero" over something that would show once it is gone, or ends
//! before its child does, the child gets a zero of its own.

use crate::background::Background;
use crate::copy_pass::{Piece, Work, drive, window, yield_once};
use crate::coverage::Coverage;
use crate::locks::{RangeLock, RangeLocks};
use crate::stack::{Held, Stack};
use crate::zero::whole_units;
use crate::{Chain, Control, CopyPass, CopyStats, LayerInfo};
use disk::{Buf, ByteRange, DiskError, ErrorKind, Operation, Result, ZeroMode};
use std::cell::{Cell, RefCell};
use std::ops::Range;
use std::rc::Rc;

/// Layers that are about to vanish, and the one above them that takes up what they hold.
pub struct Infill {
    /// The place of the layer in the chain, 0 for the top.
    child: usize,
    /// The place of the first layer that stays.
    stays: usize,
    locks: RangeLocks,
    done: RefCell<Coverage>,
}

impl Infill {
    /// Everything below this, in bytes of the disk, has been brought up.
    pub fn position(&self) -> u64 {
        self.done.borrow().frontier()
    }

    /// The place of the layer that takes up, 0 for the top.
    pub fn child(&self) -> usize {
        self.child
    }

    /// The places of the layers that are about to vanish.
    pub fn vanishing(&self) -> Range<usize> {
        self.child + 1..self.stays
    }

    /// The chain, as the guest's changes are to see it: what the top leaves absent must read the same when the vanishing
    /// layers have gone.
    pub(crate) fn seen_by_guest<'a>(&self, stack: Stack<'a>) -> Stack<'a> {
        if self.child == 0 { stack.with_vanishing(self.stays) } else { stack }
    }

    /// For a change of the guest's. It never changes a layer below the top, and nothing waits there.
    pub(crate) async fn lock_for_guest(&self, range: ByteRange) -> Option<RangeLock<'_>> {
        if self.child == 0 { Some(self.locks.lock(range).await) } else { None }
    }

    /// The disk has another size. What is added has to be looked at.
    pub(crate) fn follow_size(&self, size: u64) {
        if self.child == 0 {
            self.done.borrow_mut().remove(ByteRange::between(size, u64::MAX));
        }
    }

    /// The size of the layer that takes up.
    fn size(&self, layers: &[LayerInfo]) -> u64 {
        layers[self.child].handle.geometry().size
    }
}

impl Chain {
    /// Begins to bring what the `vanishing` layers (their places, top first) hold up into the layer right above them, which
    /// is writable: the top, or another one that the caller has opened for writing and put in place with
    /// [`Chain::switch`]. From here on the guest's changes respect it. [`Chain::infill`] does the work.
    ///
    /// An infill that was interrupted, by a crash too, is begun anew: what is there already is passed over.
    ///
    /// # Errors
    /// `InUse` when a mirror or an infill is attached already, `Invalid` when there are no such layers, `ReadOnly`,
    /// `Closed`.
    pub async fn begin_infill(&self, vanishing: Range<usize>) -> Result<Rc<Infill>> {
        let asked = vanishing.clone();
        let infill = Rc::new(Infill {
            child: vanishing.start.saturating_sub(1),
            stays: vanishing.end,
            locks: RangeLocks::default(),
            done: RefCell::default(),
        });
        self.attach(Background::Infill(Rc::clone(&infill)), |layers| {
            let error = |kind| DiskError::new(kind, Operation::Write).on(layers[0].path.display().to_string());
            if asked.start == 0 || asked.is_empty() || asked.end > layers.len() {
                let why = format!("of {} layers, {asked:?} cannot vanish into one above them", layers.len());
                return Err(error(ErrorKind::Invalid).because(why));
            }
            let child = &layers[asked.start - 1];
            if child.handle.geometry().read_only {
                let why = format!("{} takes up what is below it; open it for writing", child.path.display());
                return Err(error(ErrorKind::ReadOnly).because(why));
            }
            Ok(())
        })
        .await?;
        Ok(infill)
    }

    /// Gives an infill up; what was brought up stays, and shows the same. `false`: it was not attached.
    pub async fn end_infill(&self, infill: &Rc<Infill>) -> bool {
        self.detach(&Background::Infill(Rc::clone(infill))).await
    }

    /// Brings up what has not been brought up yet. After a change of the size it is called again, for what was added.
    ///
    /// Crash: the chain shows the same bytes at any moment; what was brought up and not flushed may be lost, so an infill
    /// that is begun anew begins at the start.
    ///
    /// # Errors
    /// `Closed` when the infill is not attached (any more); what layers and `control` report. It can be called again and
    /// goes on where it was.
    pub async fn infill<C: Control>(
        &self,
        infill: &Rc<Infill>,
        pass: CopyPass,
        control: &C,
    ) -> std::result::Result<CopyStats, C::Error> {
        let unit = self.layers().get(infill.child).map_or(1, |child| child.handle.geometry().unit);
        let job = Background::Infill(Rc::clone(infill));
        let work = InfillWork { chain: self, infill, job, chunk: pass.chunk_of(unit), cursor: Cell::new(0) };
        drive(&work, pass.at_once, control).await
    }

    /// Has the layers vanish: with no request under way, when all was brought up and is durable, `change` says which layers
    /// follow (those without the vanishing ones, that is; the child's record of its parent is what it changes), and the
    /// infill is over. See [`Chain::switch`] for what `change` may do.
    ///
    /// Crash: before the child's record changes the vanishing layers are still there, and hide nothing; after it they are
    /// not needed.
    ///
    /// # Errors
    /// As [`Chain::switch`]; `Invalid` when something was not brought up (the disk has grown): call [`Chain::infill`] again.
    /// After an error the layers are those from before, and the infill stays attached.
    pub async fn switch_after_infill<E: From<DiskError>>(
        &self,
        infill: &Rc<Infill>,
        change: impl AsyncFnOnce(Rc<[LayerInfo]>) -> std::result::Result<Vec<LayerInfo>, E>,
    ) -> std::result::Result<(), E> {
        let job = Background::Infill(Rc::clone(infill));
        let child = async || {
            if !self.is_attached(&job) {
                return Err(not_attached());
            }
            let layers = self.layers();
            if infill.position() < infill.size(&layers) {
                return Err(DiskError::new(ErrorKind::Invalid, Operation::Write)
                    .on(layers[infill.child].path.display().to_string())
                    .because("something was not brought up yet; go on with it"));
            }
            layers[infill.child].handle.flush().await
        };
        {
            // Most of it before the guest is held.
            let _request = self.requests.enter(Operation::Flush).await?;
            child().await?;
        }
        let _exclusive = self.requests.exclude().await;
        child().await?;
        self.switch_excluded(change).await?;
        self.background.replace(None);
        Ok(())
    }
}

fn not_attached() -> DiskError {
    DiskError::new(ErrorKind::Closed, Operation::Write).because("the infill is not attached to the disk")
}

/// What a part of the child needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Lacks {
    /// The bytes that are below it.
    Data,
    /// Zeroes of its own; the part is whole units.
    Zeroes,
}

struct InfillWork<'a> {
    chain: &'a Chain,
    infill: &'a Infill,
    job: Background,
    /// A multiple of the child's unit.
    chunk: u64,
    cursor: Cell<u64>,
}

impl InfillWork<'_> {
    /// The child's layers, as of now: the child on top, then those that vanish, then those that stay.
    fn stack<'b>(&self, layers: &'b [LayerInfo]) -> Result<Stack<'b>> {
        if !self.chain.is_attached(&self.job) {
            return Err(not_attached());
        }
        let Infill { child, stays, .. } = *self.infill;
        Ok(Stack::new(&layers[child..]).with_vanishing(stays - child))
    }

    /// What the range lacks, in order; the first part of that only, if `first` says so. The range begins at a unit of the
    /// child, and parts are whole units.
    async fn lacking(&self, stack: Stack<'_>, range: ByteRange, first: bool) -> Result<Vec<(ByteRange, Lacks)>> {
        let child = stack.top();
        let geometry = child.geometry();
        let vanishing = 1..self.infill.stays - self.infill.child;
        let below = stack.from(0).layers().get(vanishing.end..).filter(|layers| !layers.is_empty()).map(Stack::new);
        let mut lacking: Vec<(ByteRange, Lacks)> = Vec::new();
        let mut rest = range;
        while !rest.is_empty() && (!first || lacking.is_empty()) {
            let own = child.map(rest).await?;
            if !own.is_absent() {
                rest = rest.skip(own.range.len());
                continue;
            }
            let (found, held) = stack.held(vanishing.clone(), own.range).await?;
            let (part, lacks) = match held {
                Held::Absent => (found, None),
                Held::Data => (found, Some(Lacks::Data)),
                Held::Zero => match below {
                    // Absent is zero where nothing else shows.
                    None => (found, None),
                    Some(below) => {
                        let shows = below.map_merged(found).await?;
                        (shows.range, (!shows.zero).then_some(Lacks::Zeroes))
                    }
                },
            };
            let Some(lacks) = lacks else {
                rest = rest.skip(part.len());
                continue;
            };
            let whole = whole_units(child, part);
            let (part, lacks) = if lacks == Lacks::Zeroes && !whole.is_empty() && whole.offset() == part.offset() {
                (whole, Lacks::Zeroes)
            } else if lacks == Lacks::Zeroes {
                // A part of a unit: its bytes, with what else the unit shows.
                (part.prefix(1).align_out(geometry.unit), Lacks::Data)
            } else {
                (part.align_out(geometry.unit), lacks)
            };
            let part = part.intersect(ByteRange::new(0, geometry.size));
            match lacking.last_mut() {
                Some((last, what)) if *what == lacks && last.end() == part.offset() => {
                    *last = ByteRange::between(last.offset(), part.end());
                }
                _ => lacking.push((part, lacks)),
            }
            rest = ByteRange::between(part.end(), range.end());
        }
        Ok(lacking)
    }

    /// What is left to look at from the cursor on, up to some bound.
    fn rest(&self, layers: &[LayerInfo]) -> Option<ByteRange> {
        let rest = ByteRange::between(self.cursor.get(), self.infill.size(layers));
        let gap = self.infill.done.borrow().first_gap(rest)?;
        // What a shrink has left begins anywhere.
        Some(window(ByteRange::between(gap.offset() / self.chunk * self.chunk, gap.end())))
    }
}

impl Work for InfillWork<'_> {
    async fn next(&self) -> Result<Option<Piece>> {
        loop {
            let request = self.chain.requests.enter(Operation::Read).await?;
            let layers = self.chain.layers();
            let stack = self.stack(&layers)?;
            let Some(rest) = self.rest(&layers) else { return Ok(None) };
            // Without the lock, but sound for what lacks nothing: what the child holds it may lose to a discard only where
            // it reads as zero without the vanishing layers, too; and what no vanishing layer holds stays so.
            let lacking = self.lacking(stack, rest, true).await?;
            let at = lacking.first().map_or(rest.end(), |(part, _)| part.offset() / self.chunk * self.chunk);
            let passed = ByteRange::between(rest.offset(), at);
            self.infill.done.borrow_mut().insert(passed);
            self.cursor.set(passed.end().max(self.cursor.get()));
            if lacking.is_empty() {
                drop(request);
                yield_once().await;
                continue;
            }
            let range = ByteRange::new(at, self.chunk).intersect(ByteRange::new(0, self.infill.size(&layers)));
            let lacking = self.lacking(stack, range, false).await?;
            let bytes = lacking.iter().filter(|(_, lacks)| *lacks == Lacks::Data).map(|(part, _)| part.len()).sum();
            self.cursor.set(range.end());
            return Ok(Some(Piece { range, bytes }));
        }
    }

    /// Crash: the child's new units hold what showed there before, so it does not matter which of them are there.
    async fn carry_out(&self, range: ByteRange) -> Result<CopyStats> {
        let mut stats = CopyStats::default();
        // A request of the disk first, then the lock: the guest's changes do it in the same order.
        let _request = self.chain.requests.enter(Operation::Read).await?;
        let _lock = self.infill.locks.lock(range).await;
        let layers = self.chain.layers();
        let stack = self.stack(&layers)?;
        let range = range.intersect(ByteRange::new(0, self.infill.size(&layers)));
        // Nobody but the holder of the lock changes the child here, so this holds until the end.
        for (part, lacks) in self.lacking(stack, range, false).await? {
            if lacks == Lacks::Zeroes {
                stack.zero_top(part, ZeroMode::default()).await?;
                stats.zeroed += part.len();
            } else {
                let buf = stack.read_layers(1, part.offset(), Buf::new(part.len() as usize)).await?;
                stack.write_top(part.offset(), buf).await?;
                stats.read += part.len();
                stats.written += part.len();
            }
        }
        stats.skipped = range.len() - stats.zeroed - stats.written;
        self.infill.done.borrow_mut().insert(range);
        Ok(stats)
    }

    fn is_done(&self) -> bool {
        self.cursor.set(0);
        self.infill.position() >= self.infill.size(&self.chain.layers())
    }

    fn position(&self) -> u64 {
        self.infill.position()
    }
}
