//! Which ranges of a disk a job has done.

use disk::ByteRange;
use std::collections::BTreeMap;

/// A set of bytes, as ranges that do not touch each other.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Coverage {
    /// End by start.
    runs: BTreeMap<u64, u64>,
}

impl Coverage {
    pub(crate) fn insert(&mut self, range: ByteRange) {
        if range.is_empty() {
            return;
        }
        let (mut start, mut end) = (range.offset(), range.end());
        // Everything that overlaps or touches becomes one run.
        while let Some((&before, &before_end)) = self.runs.range(..=end).next_back()
            && before_end >= start
        {
            self.runs.remove(&before);
            start = start.min(before);
            end = end.max(before_end);
        }
        self.runs.insert(start, end);
    }

    pub(crate) fn remove(&mut self, range: ByteRange) {
        if range.is_empty() {
            return;
        }
        while let Some((&start, &end)) = self.runs.range(..range.end()).next_back()
            && end > range.offset()
        {
            self.runs.remove(&start);
            if start < range.offset() {
                self.runs.insert(start, range.offset());
            }
            if end > range.end() {
                self.runs.insert(range.end(), end);
            }
        }
    }

    /// The parts of the range that are in the set, in order.
    pub(crate) fn within(&self, range: ByteRange) -> Vec<ByteRange> {
        let first = self.runs.range(..=range.offset()).next_back().map_or(range.offset(), |(start, _)| *start);
        let runs = self.runs.range(first..range.end());
        runs.map(|(&start, &end)| ByteRange::between(start, end).intersect(range)).filter(|r| !r.is_empty()).collect()
    }

    /// The first part of the range that is not in the set.
    pub(crate) fn first_gap(&self, range: ByteRange) -> Option<ByteRange> {
        let mut start = range.offset();
        if let Some((_, &end)) = self.runs.range(..=start).next_back() {
            start = start.max(end);
        }
        let end = self.runs.range(start..).next().map_or(range.end(), |(next, _)| (*next).min(range.end()));
        (start < end).then(|| ByteRange::between(start, end))
    }

    /// Everything below this is in the set.
    pub(crate) fn frontier(&self) -> u64 {
        self.runs.get(&0).copied().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn agrees_with_single_bytes() {
        let mut random = fastrand::Rng::with_seed(3);
        for _ in 0..200 {
            let (mut set, mut bytes) = (Coverage::default(), [false; 64]);
            for _ in 0..40 {
                let range = {
                    let (a, b) = (random.u64(..=64), random.u64(..=64));
                    ByteRange::between(a.min(b), a.max(b))
                };
                let inserts = random.bool();
                if inserts {
                    set.insert(range)
                } else {
                    set.remove(range)
                }
                bytes[range.offset() as usize..range.end() as usize].fill(inserts);
                let runs: Vec<_> = set.runs.iter().collect();
                assert!(runs.iter().all(|(start, end)| start < end) && runs.windows(2).all(|w| w[0].1 < w[1].0));
                let asked = ByteRange::between(random.u64(..32), random.u64(32..=64));
                let inside = |at: u64| set.within(asked).iter().any(|r| r.contains(ByteRange::new(at, 1)));
                assert!((asked.offset()..asked.end()).all(|at| inside(at) == bytes[at as usize]));
                let gap = (asked.offset()..asked.end()).find(|at| !bytes[*at as usize]);
                assert_eq!(set.first_gap(asked).map(ByteRange::offset), gap);
                if let Some(gap) = set.first_gap(asked) {
                    assert!((gap.offset()..gap.end()).all(|at| !bytes[at as usize]));
                    assert!(gap.end() == asked.end() || bytes[gap.end() as usize]);
                }
                assert_eq!(set.frontier(), bytes.iter().take_while(|b| **b).count() as u64);
            }
        }
    }
}
