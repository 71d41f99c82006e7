//! What changed since a point.

use crate::history::History;
use crate::kind::Counter;
use crate::layout::PAGE_GRANULES;
use crate::{ChangeKind, HistoryError, PendingRun, Point};
use disk::ByteRange;
use std::rc::Rc;

/// A range that changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Change {
    /// Bytes of the guest's disk; whole granules, but for the disk's end.
    pub range: ByteRange,
    /// What it holds now.
    pub kind: ChangeKind,
}

/// A part of an answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Span {
    /// In order, without overlaps; neighbours of one kind are one.
    pub changes: Vec<Change>,
    /// Where to ask on, if not all was looked at.
    pub next: Option<u64>,
}

/// A question, with its points found and trusted.
#[derive(Clone, Debug)]
pub struct ChangesQuery {
    /// After which instant.
    pub since: Point,
    /// Up to which; now, when absent.
    ///
    /// A counter holds the last change alone. What changed again after this instant is part of the answer, as `Data`,
    /// whether it had changed before or not: an answer may say too much, and never too little.
    pub until: Option<Point>,
    /// Bytes that the answer speaks of.
    pub size: u64,
    pending: Rc<[PendingRun]>,
}

impl ChangesQuery {
    /// The same question, of the bytes before `end`.
    #[must_use]
    pub fn up_to(self, end: u64) -> Self {
        Self { size: self.size.min(end), ..self }
    }
}

impl History {
    /// Finds the points of a question.
    ///
    /// # Errors
    /// When there is no such point, it is not to be trusted, or they are in the wrong order.
    pub fn changes(&self, since: &str, until: Option<&str>) -> Result<ChangesQuery, HistoryError> {
        let trusted = |name: &str| {
            let point = self.point(name)?;
            match &point.refused {
                None => Ok(point),
                Some(refusal) => Err(HistoryError::Refused { name: point.name, reason: refusal.reason.clone() }),
            }
        };
        let since = trusted(since)?;
        let until = until.map(trusted).transpose()?;
        if let Some(until) = &until
            && until.epoch < since.epoch
        {
            return Err(HistoryError::Order { since: since.name, until: until.name.clone() });
        }
        let now = self.state.borrow().superblock.size;
        let size = until.as_ref().map_or(now, |point| point.size);
        let pending = since.pending.clone().into();
        Ok(ChangesQuery { since, until, size, pending })
    }

    /// Answers a question from byte `from` on, with at most about `most` changes.
    ///
    /// Memory is bounded by `most`. Between two parts of one answer the guest may go on writing.
    ///
    /// # Errors
    /// When the sidecar cannot be read or is damaged, or tracking has stopped.
    pub async fn next_changes(&self, query: &ChangesQuery, from: u64, most: usize) -> Result<Span, HistoryError> {
        // A question may have been found before tracking stopped.
        self.refuse_if_stopped()?;
        let granule = 1u64 << self.granule_bits;
        // A point may speak of a longer disk; what is beyond the table does not exist any more.
        let in_table = self.state.borrow().index.len() as u64 * PAGE_GRANULES;
        let end = query.size.div_ceil(granule).min(in_table);
        let mut runs = Runs { changes: Vec::new(), granule, size: query.size };
        let mut at = from >> self.granule_bits;
        while at < end {
            if runs.changes.len() >= most.max(1) {
                return Ok(Span { changes: runs.changes, next: Some(at << self.granule_bits) });
            }
            let page = (at / PAGE_GRANULES) as usize;
            let page_end = ((page as u64 + 1) * PAGE_GRANULES).min(end);
            self.add_page(query, page, at, page_end, &mut runs).await?;
            at = page_end;
        }
        Ok(Span { changes: runs.changes, next: None })
    }

    /// Adds the changes of granules `at..end`, all of one page.
    async fn add_page(
        &self,
        query: &ChangesQuery,
        page: usize,
        at: u64,
        end: u64,
        runs: &mut Runs,
    ) -> Result<(), HistoryError> {
        let since = query.since.epoch;
        let first = query.pending.partition_point(|run| run.end <= at);
        let mut pending = query.pending[first..].iter().take_while(|run| run.start < end).peekable();
        let entry = self.state.borrow().index[page];
        if !self.memory_speaks_of(page) && pending.peek().is_none() {
            if entry.high <= since {
                return Ok(());
            }
            if entry.is_all_data_since(since) {
                runs.add(at, end, ChangeKind::Data);
                return Ok(());
            }
        }
        let counters = self.page(page).await?;
        let until = query.until.as_ref().map_or(u32::MAX, |point| point.epoch);
        let first = page as u64 * PAGE_GRANULES;
        for granule in at..end {
            let counter: Counter = counters[(granule - first) as usize];
            if counter.epoch() > since {
                let kind = if counter.epoch() > until { ChangeKind::Data } else { counter.kind() };
                runs.add(granule, granule + 1, kind);
            } else {
                while pending.next_if(|run| run.end <= granule).is_some() {}
                if let Some(run) = pending.peek().filter(|run| run.start <= granule) {
                    runs.add(granule, granule + 1, run.kind);
                }
            }
        }
        Ok(())
    }
}

/// Joins granules to changes.
struct Runs {
    changes: Vec<Change>,
    granule: u64,
    size: u64,
}

impl Runs {
    fn add(&mut self, start: u64, end: u64, kind: ChangeKind) {
        let range = ByteRange::between(start * self.granule, (end * self.granule).min(self.size));
        match self.changes.last_mut() {
            Some(last) if last.kind == kind && last.range.end() == range.offset() => {
                last.range = ByteRange::between(last.range.offset(), range.end());
            }
            _ => self.changes.push(Change { range, kind }),
        }
    }
}
