//! Zeroes and discards: what they leave behind costs nobody bytes, if it is known for certain.
//!
//! A zeroing is declared as `Data`, like any change. What it really left is known when it is done, and counts when it is
//! durable: before that a power cut could bring the old bytes back, while the history said "zero".

use super::Tracked;
use super::requests::Request;
use crate::ChangeKind;
use crate::epoch_marks::Run;
use disk::{ByteRange, Disk, Result, WriteFlags};

/// Parts of one zeroing that are told apart. What is left after so many counts as one.
const PARTS: usize = 64;
/// Questions to the disk about what one zeroing has left.
const QUESTIONS: usize = 256;
/// Zeroings that wait for a flush. What is above stays `Data`.
const WAITING: usize = 4096;

/// A zeroing that is done, and waits for the flush that makes it durable.
pub(super) struct Settled {
    pub(super) number: u64,
    /// Granules and what they hold.
    pub(super) parts: Vec<(u64, u64, ChangeKind)>,
}

/// A zeroing under way.
pub(super) struct Zeroing(u64);

impl<D: Disk> Tracked<D> {
    /// Zeroes with `issue`, which asks the disk below for what leaves that kind of change.
    pub(super) async fn zero_with<F: Future<Output = Result<()>>>(
        &self,
        range: ByteRange,
        kind: ChangeKind,
        flags: WriteFlags,
        issue: impl FnOnce() -> F,
    ) -> Result<()> {
        let request = self.enter(range).await;
        Box::pin(self.wait_for_parked(range)).await?;
        if self.views.any() {
            Box::pin(self.preserve(range)).await;
        }
        let zeroing = Box::pin(self.begin_zeroing(&request, range)).await?;
        self.parking.sign();
        let result = issue().await;
        self.parking.sign();
        Box::pin(self.end_zeroing(zeroing, range, kind, result.is_ok(), flags)).await;
        result
    }

    /// Declares a zeroing. `None`: all of the range reads as zero already, so that nothing changes.
    async fn begin_zeroing(&self, request: &Request<'_>, range: ByteRange) -> Result<Option<Zeroing>> {
        let history = &self.history;
        if history.is_stopped() {
            return Ok(None);
        }
        // No byte may change, but the image's time of modification does, and perhaps its size.
        history.wake().await?;
        history.wrote.set(true);
        let parts = self.parts_not_zero(range).await;
        if parts.is_empty() {
            return Ok(None);
        }
        history.declare_all(&parts, false).await?;
        if history.is_stopped() {
            return Ok(None);
        }
        // No waiting from here up to the request's start: whoever comes later finds the bits gone.
        let number = self.zeroings.get() + 1;
        self.zeroings.set(number);
        let under_way = self.under_way.borrow();
        let mut known = history.state.borrow_mut();
        for part in parts {
            let (start, end) = history.granules(part);
            let mut free = crate::run_map::RunMap::default();
            free.insert(start, end, ());
            for (_, other) in under_way.iter().filter(|(key, other)| *key != request.key() && !other.is_empty()) {
                let (start, end) = history.granules(*other);
                free.remove(start, end); // It may end after the zeroing, and stays `Data`.
            }
            for (start, end, ()) in free.iter() {
                known.current.set_run(start, end, Run::Zeroing(number));
            }
        }
        Ok(Some(Zeroing(number)))
    }

    /// Takes down what a zeroing has left.
    async fn end_zeroing(
        &self,
        zeroing: Option<Zeroing>,
        range: ByteRange,
        kind: ChangeKind,
        done: bool,
        flags: WriteFlags,
    ) {
        let Some(Zeroing(number)) = zeroing else { return };
        let zero = if done { self.granules_left_zero(range, kind).await } else { Vec::new() };
        let (start, end) = self.history.granules(range);
        let mut parts = Vec::new();
        {
            let mut known = self.history.state.borrow_mut();
            for (start, end) in known.current.left_to_zeroing(number, start, end) {
                let mut rest = start;
                for (from, to) in &zero {
                    let (from, to) = ((*from).max(start), (*to).min(end));
                    if from < to {
                        if rest < from {
                            known.current.mark(rest, from);
                        }
                        parts.push((from, to, kind));
                        rest = to;
                    }
                }
                if rest < end {
                    known.current.mark(rest, end);
                }
            }
        }
        if flags.fua && kind == ChangeKind::Zero {
            // Durable is what this request has zeroed. What stands beside it in the same granules may be zero by another
            // one's work, and so may what a discard has left as it was.
            let first = range.offset().div_ceil(1 << self.history.granule_bits);
            let at_end = range.end() == self.inner.geometry().size;
            let end = if at_end { end } else { range.end() >> self.history.granule_bits };
            let durable: Vec<_> = parts
                .iter()
                .map(|(from, to, kind)| ((*from).max(first), (*to).min(end), *kind))
                .filter(|(from, to, _)| from < to)
                .collect();
            self.settle(vec![Settled { number, parts: durable }]);
        }
        if parts.is_empty() {
            return;
        }
        let settled = Settled { number, parts };
        let mut waiting = self.settled.borrow_mut();
        if waiting.len() < WAITING {
            waiting.push(settled);
        }
    }

    /// The parts of a range that are not known to read as zero.
    async fn parts_not_zero(&self, range: ByteRange) -> Vec<ByteRange> {
        let mut parts: Vec<ByteRange> = Vec::new();
        let mut rest = range;
        for _ in 0..QUESTIONS {
            if rest.is_empty() || parts.len() == PARTS {
                break;
            }
            let Ok(extent) = self.inner.map(rest).await else { break };
            if !extent.zero {
                match parts.last_mut() {
                    Some(last) if last.end() == extent.range.offset() => {
                        *last = ByteRange::between(last.offset(), extent.range.end());
                    }
                    _ => parts.push(extent.range),
                }
            }
            rest = rest.skip(extent.range.len());
        }
        if !rest.is_empty() {
            parts.push(rest);
        }
        parts
    }

    /// The granules of which all bytes read as zero after a zeroing of that range.
    async fn granules_left_zero(&self, range: ByteRange, kind: ChangeKind) -> Vec<(u64, u64)> {
        let granule = 1u64 << self.history.granule_bits;
        let size = self.inner.geometry().size;
        let touched = range.align_out(granule).intersect(ByteRange::new(0, size));
        let mut zero: Vec<ByteRange> = Vec::new();
        let mut add = |part: ByteRange| match zero.last_mut() {
            Some(last) if last.end() >= part.offset() => *last = ByteRange::between(last.offset(), part.end()),
            _ if part.is_empty() => {}
            _ => zero.push(part),
        };
        if kind == ChangeKind::Zero {
            // Zeroes are certain; only at the edges there are bytes of others in the same granules.
            for part in self.zero_extents(ByteRange::between(touched.offset(), range.offset())).await {
                add(part);
            }
            add(range);
            for part in self.zero_extents(ByteRange::between(range.end(), touched.end())).await {
                add(part);
            }
        } else {
            // A discard leaves zeroes or the old bytes.
            for part in self.zero_extents(touched).await {
                add(part);
            }
        }
        zero.into_iter()
            .map(|part| {
                let end = if part.end() == size { part.end().div_ceil(granule) } else { part.end() / granule };
                (part.offset().div_ceil(granule), end)
            })
            .filter(|(start, end)| start < end)
            .collect()
    }

    async fn zero_extents(&self, range: ByteRange) -> Vec<ByteRange> {
        let mut zero = Vec::new();
        let mut rest = range;
        for _ in 0..QUESTIONS {
            if rest.is_empty() {
                break;
            }
            let Ok(extent) = self.inner.map(rest).await else { break };
            if extent.zero {
                zero.push(extent.range);
            }
            rest = rest.skip(extent.range.len());
        }
        zero
    }
}
