//! What is known in memory of one epoch's changes.

use crate::ChangeKind;
use crate::kind::Counter;
use crate::layout::PAGE_GRANULES;
use crate::page_set::PageSet;
use crate::run_map::RunMap;

const WORDS: usize = PAGE_GRANULES as usize / 64;
/// Bytes of a page's bits with what the allocator adds.
const PAGE_BYTES: usize = WORDS * 8 + 16;
/// Bytes of a run in a map, about.
const RUN_BYTES: usize = 48;

/// A granule's state that is not "its change is durable, write at will".
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Run {
    /// Its change is on its way into the journal, with this ticket.
    Intended(u64),
    /// Its change is durable, or about to be, and of this kind. A write to a granule that is not `Data` must be journalled anew.
    Kind(ChangeKind),
    /// Its change is durable as `Data`; the operation of that number will say what it really is.
    Zeroing(u64),
}

/// The changes of one epoch: a bit for granules that may be written at will, runs for the others.
///
/// A bit is set only when the granule's change, as `Data`, is durable. So the write path looks at bits alone.
#[derive(Debug)]
pub(crate) struct EpochMarks {
    pub(crate) epoch: u32,
    pages: Vec<Option<Box<[u64; WORDS]>>>,
    resident: usize,
    pub(crate) runs: RunMap<Run>,
    /// Pages that know more than the table.
    pub(crate) dirty: PageSet,
}

fn page_of(granule: u64) -> usize {
    (granule / PAGE_GRANULES) as usize
}

impl EpochMarks {
    pub(crate) fn new(epoch: u32, pages: usize) -> Self {
        Self {
            epoch,
            pages: std::iter::repeat_with(|| None).take(pages).collect(),
            resident: 0,
            runs: RunMap::default(),
            dirty: PageSet::default(),
        }
    }

    pub(crate) fn grow(&mut self, pages: usize) {
        if pages > self.pages.len() {
            self.pages.resize_with(pages, || None);
        }
    }

    /// Bytes of memory, about.
    pub(crate) fn bytes(&self) -> usize {
        self.pages.len() * 8 + self.resident * PAGE_BYTES + self.runs.len() * RUN_BYTES
    }

    /// Whether the granule's bit is set.
    pub(crate) fn is_marked(&self, granule: u64) -> bool {
        let within = (granule % PAGE_GRANULES) as usize;
        match self.pages.get(page_of(granule)) {
            Some(Some(words)) => words[within / 64] & 1 << (within % 64) != 0,
            _ => false,
        }
    }

    /// Whether the bits of `start..end` are set. The write path's question.
    pub(crate) fn all_marked(&self, start: u64, end: u64) -> bool {
        if end - start == 1 {
            return self.is_marked(start);
        }
        (start..end).all(|granule| self.is_marked(granule))
    }

    /// Sets the bits: the changes are durable as `Data`.
    pub(crate) fn mark(&mut self, start: u64, end: u64) {
        self.runs.remove(start, end);
        self.touch(start, end);
        for granule in start..end {
            let within = (granule % PAGE_GRANULES) as usize;
            let page = &mut self.pages[page_of(granule)];
            if page.is_none() {
                self.resident += 1;
            }
            page.get_or_insert_with(|| Box::new([0; WORDS]))[within / 64] |= 1 << (within % 64);
        }
    }

    /// Puts granules into that state, and takes their bits away.
    pub(crate) fn set_run(&mut self, start: u64, end: u64, run: Run) {
        self.runs.insert(start, end, run);
        self.touch(start, end);
        let mut at = start;
        while at < end {
            let page = page_of(at);
            let page_end = ((page as u64 + 1) * PAGE_GRANULES).min(end);
            if let Some(Some(words)) = self.pages.get_mut(page) {
                for granule in at..page_end {
                    let within = (granule % PAGE_GRANULES) as usize;
                    words[within / 64] &= !(1 << (within % 64));
                }
            }
            at = page_end;
        }
    }

    fn touch(&mut self, start: u64, end: u64) {
        if start < end {
            (page_of(start)..=page_of(end - 1)).for_each(|page| self.dirty.insert(page));
        }
    }

    /// Whether anything is known of the page.
    pub(crate) fn speaks_of(&self, page: usize) -> bool {
        let start = page as u64 * PAGE_GRANULES;
        matches!(self.pages.get(page), Some(Some(_))) || self.runs.within(start, start + PAGE_GRANULES).next().is_some()
    }

    /// Puts this epoch's changes over a page's counters.
    pub(crate) fn overlay(&self, page: usize, counters: &mut [Counter]) {
        let start = page as u64 * PAGE_GRANULES;
        for (from, to, run) in self.runs.within(start, start + PAGE_GRANULES) {
            let kind = match run {
                Run::Kind(kind) => kind,
                Run::Intended(_) | Run::Zeroing(_) => ChangeKind::Data,
            };
            counters[(from - start) as usize..(to - start) as usize].fill(Counter::new(self.epoch, kind));
        }
        if let Some(Some(words)) = self.pages.get(page) {
            for (n, counter) in counters.iter_mut().enumerate() {
                if words[n / 64] & 1 << (n % 64) != 0 {
                    *counter = Counter::new(self.epoch, ChangeKind::Data);
                }
            }
        }
    }

    /// The granules of `start..end` that the zeroing of that number still speaks for.
    pub(crate) fn left_to_zeroing(&self, number: u64, start: u64, end: u64) -> Vec<(u64, u64)> {
        let ours = self.runs.within(start, end).filter(|(_, _, run)| *run == Run::Zeroing(number));
        ours.map(|(start, end, _)| (start, end)).collect()
    }

    /// Forgets what the table knows as well, until memory is below `limit` bytes or nothing more can go. Granules that
    /// are forgotten are journalled again when they are written.
    pub(crate) fn shed(&mut self, limit: usize) {
        if self.bytes() <= limit {
            return;
        }
        let settled: Vec<(u64, u64)> = self
            .runs
            .iter()
            .filter(|(start, end, run)| {
                matches!(run, Run::Kind(_)) && (page_of(*start)..=page_of(end - 1)).all(|p| !self.dirty.contains(p))
            })
            .map(|(start, end, _)| (start, end))
            .collect();
        for (start, end) in settled {
            self.runs.remove(start, end);
        }
        for page in 0..self.pages.len() {
            if self.bytes() <= limit {
                break;
            }
            if !self.dirty.contains(page) && self.pages[page].take().is_some() {
                self.resident -= 1;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_and_runs_exclude_each_other() {
        let mut marks = EpochMarks::new(5, 2);
        marks.set_run(0, 2000, Run::Kind(ChangeKind::Zero));
        marks.mark(1000, 1030);
        assert!(marks.all_marked(1000, 1030) && !marks.is_marked(999) && !marks.is_marked(1030));
        let mut counters = [Counter::NEVER; 1024];
        marks.overlay(0, &mut counters);
        assert_eq!(counters[999], Counter::new(5, ChangeKind::Zero));
        assert_eq!(counters[1000], Counter::new(5, ChangeKind::Data));
        marks.set_run(1010, 1011, Run::Zeroing(1));
        assert!(!marks.is_marked(1010) && marks.is_marked(1011));
        assert_eq!(marks.dirty.iter().collect::<Vec<_>>(), [0, 1]);
    }

    #[test]
    fn what_is_dirty_is_not_shed() {
        let mut marks = EpochMarks::new(1, 4);
        marks.mark(0, 4096);
        marks.dirty = PageSet::default();
        marks.mark(1024, 1025);
        marks.set_run(3000, 3001, Run::Zeroing(4));
        marks.shed(0);
        assert!(marks.is_marked(1024) && !marks.is_marked(0));
        assert_eq!(marks.runs.get(3000), Some((3001, Run::Zeroing(4))));
    }
}
