//! One disk into a session: what is to be looked at is read leaf by leaf, and told.

use super::session::Session;
use crate::EngineError;
use crate::history::report::{ChangedRange, KindOfChange};
use crate::images::Progress;
use crate::images::stack::Stack;
use crate::promotion::JobControl;
use chain::Control;
use disk::{Buf, ByteRange, DiskHandle};
use std::collections::VecDeque;
use std::ops::Range;

/// Bytes that are read and told at a time.
const STEP: u64 = 1 << 20;
/// Changes that one question to the history brings.
const CHANGES: usize = 4096;

/// A disk as it is read.
pub(super) struct Source<'a> {
    /// Its bytes at the instant.
    pub(super) disk: DiskHandle,
    /// Its history.
    pub(super) stack: &'a Stack,
    /// Bytes of the disk at the instant.
    pub(super) size: u64,
    /// The marks between which it changed; all of it is read when absent.
    pub(super) changed: Option<Between>,
}

/// Two marks.
#[derive(Clone, Debug)]
pub(super) struct Between {
    pub(super) since: String,
    pub(super) until: String,
}

/// What a run of leaves is to be.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Run {
    Read(Range<u64>),
    Zero(Range<u64>),
}

/// Tells the session of a disk, its `n`-th; returns how many bytes were read.
pub(super) async fn run(
    source: &Source<'_>,
    session: &Session,
    n: usize,
    control: &JobControl,
    progress: &Progress,
) -> Result<u64, EngineError> {
    set_total(source, progress).await?;
    let mut runs = Runs::new(session.leaf_bytes(), source.size);
    let mut read = 0;
    let mut from = Some(0);
    while let Some(at) = from.filter(|at| *at < source.size) {
        control.pace(0).await?;
        from = match &source.changed {
            Some(Between { since, until }) => {
                let changes = source.stack.changes("", since, Some(until), at, CHANGES).await?;
                changes.ranges.iter().for_each(|change| runs.change(change));
                changes.next
            }
            None => {
                let extent = source.disk.map(ByteRange::between(at, source.size)).await?;
                match extent.zero {
                    true => runs.zero(extent.range),
                    false => runs.data(extent.range.prefix(STEP)),
                }
                Some(if extent.zero { extent.range.end() } else { extent.range.prefix(STEP).end() })
            }
        };
        if from.is_none_or(|from| from >= source.size) {
            runs.flush();
        }
        while let Some(next) = runs.take() {
            match next {
                Run::Zero(leaves) => session.zero(n, leaves).await?,
                Run::Read(leaves) => read += copy(source, session, n, leaves, control, progress).await?,
            }
        }
        if source.changed.is_none() {
            progress.advance(from.unwrap_or(source.size).min(source.size) - at);
        }
    }
    Ok(read)
}

/// What is to be looked at is added to what the work is.
async fn set_total(source: &Source<'_>, progress: &Progress) -> Result<(), EngineError> {
    let mut total = source.size;
    if let Some(Between { since, until }) = &source.changed {
        total = 0;
        let mut from = Some(0);
        while let Some(at) = from {
            let changes = source.stack.changes("", since, Some(until), at, CHANGES).await?;
            let data = changes.ranges.iter().filter(|range| range.kind == KindOfChange::Data);
            total += data.map(|range| range.length).sum::<u64>();
            from = changes.next;
        }
    }
    progress.set_total(progress.now().1 + total);
    Ok(())
}

/// Reads leaves and gives them to the session: the next step is read while the last one is told.
async fn copy(
    source: &Source<'_>,
    session: &Session,
    n: usize,
    leaves: Range<u64>,
    control: &JobControl,
    progress: &Progress,
) -> Result<u64, EngineError> {
    let leaf = session.leaf_bytes();
    let at_once = (STEP / leaf).max(1);
    let mut told: Option<(u64, Buf)> = None;
    let mut total = 0;
    let mut next = leaves.start;
    loop {
        let step = next..(next + at_once).min(leaves.end);
        let reading = async {
            if step.is_empty() {
                return Ok(None);
            }
            let range = ByteRange::between(step.start * leaf, (step.end * leaf).min(source.size));
            control.pace(range.len()).await?;
            let bytes = source.disk.read(range.offset(), Buf::new(range.len() as usize)).await?;
            if source.changed.is_some() {
                progress.advance(range.len());
            }
            Ok::<_, EngineError>(Some((step.start, bytes)))
        };
        let telling = async {
            match told.take() {
                Some((first, bytes)) => session.put(n, first, bytes).await,
                None => Ok(()),
            }
        };
        let (read, put) = futures_util::future::join(reading, telling).await;
        put?;
        told = read?;
        match &told {
            Some((_, bytes)) => total += bytes.len() as u64,
            None => return Ok(total),
        }
        next = step.end;
    }
}

/// Makes runs of whole leaves of ranges that come in order; each leaf is in one run.
struct Runs {
    leaf: u64,
    size: u64,
    /// Leaves before it are in a run already.
    next: u64,
    ready: VecDeque<Run>,
    /// The last run, which may still grow.
    open: Option<Run>,
}

impl Runs {
    fn new(leaf: u64, size: u64) -> Self {
        Self { leaf, size, next: 0, ready: VecDeque::new(), open: None }
    }

    fn change(&mut self, change: &ChangedRange) {
        let range = ByteRange::new(change.start, change.length).intersect(ByteRange::new(0, self.size));
        match change.kind {
            _ if range.is_empty() => {}
            KindOfChange::Data => self.data(range),
            KindOfChange::Zero | KindOfChange::Discarded => self.zero(range),
        }
    }

    /// Every leaf that the range touches is read.
    fn data(&mut self, range: ByteRange) {
        self.add(range.offset() / self.leaf..range.end().div_ceil(self.leaf), false);
    }

    /// Leaves that lie in the range are zero; what it touches of others is read.
    fn zero(&mut self, range: ByteRange) {
        let whole = range.offset().div_ceil(self.leaf)..if range.end() >= self.size {
            self.size.div_ceil(self.leaf)
        } else {
            range.end() / self.leaf
        };
        if whole.start >= whole.end {
            return self.data(range);
        }
        self.add(range.offset() / self.leaf..whole.start, false);
        self.add(whole.clone(), true);
        self.add(whole.end..range.end().div_ceil(self.leaf), false);
    }

    fn add(&mut self, leaves: Range<u64>, zero: bool) {
        let leaves = leaves.start.max(self.next)..leaves.end;
        if leaves.is_empty() {
            return;
        }
        self.next = leaves.end;
        match (&mut self.open, zero) {
            (Some(Run::Read(open)), false) | (Some(Run::Zero(open)), true) if open.end == leaves.start => {
                open.end = leaves.end;
            }
            _ => {
                self.flush();
                self.open = Some(if zero { Run::Zero(leaves) } else { Run::Read(leaves) });
            }
        }
    }

    /// Nothing comes that could belong to the last run.
    fn flush(&mut self) {
        self.ready.extend(self.open.take());
    }

    fn take(&mut self) -> Option<Run> {
        self.ready.pop_front()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn runs(size: u64, ranges: &[(u64, u64, KindOfChange)]) -> Vec<Run> {
        let mut runs = Runs::new(100, size);
        for (start, end, kind) in ranges {
            runs.change(&ChangedRange { start: *start, length: end - start, kind: *kind });
        }
        runs.flush();
        runs.ready.into()
    }

    #[test]
    fn each_leaf_is_in_one_run() {
        use KindOfChange::{Data, Discarded, Zero};
        assert_eq!(runs(1000, &[(10, 20, Data), (30, 40, Data), (90, 110, Data)]), [Run::Read(0..2)]);
        // A leaf of which a part became zero is read; whole ones are not.
        assert_eq!(runs(1000, &[(50, 250, Zero)]), [Run::Read(0..1), Run::Zero(1..2), Run::Read(2..3)]);
        assert_eq!(runs(1000, &[(50, 60, Zero), (60, 70, Data)]), [Run::Read(0..1)]);
        assert_eq!(runs(1000, &[(100, 200, Zero), (200, 400, Discarded)]), [Run::Zero(1..4)]);
        // A change that reaches into a leaf that is zero before it: that leaf was read as a whole.
        assert_eq!(runs(1000, &[(100, 250, Zero), (250, 260, Data)]), [Run::Zero(1..2), Run::Read(2..3)]);
        // The last leaf is shorter.
        assert_eq!(runs(950, &[(900, 950, Zero)]), [Run::Zero(9..10)]);
        assert_eq!(runs(950, &[(900, 1200, Data)]), [Run::Read(9..10)]);
        assert_eq!(runs(950, &[(960, 1200, Data)]), []);
    }
}
