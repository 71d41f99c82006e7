//! A map from granules to values, kept as runs.

use std::collections::BTreeMap;

/// Runs of granules with one value each; runs do not overlap, and neighbours of one value are one run.
#[derive(Clone, Debug)]
pub(crate) struct RunMap<V> {
    /// Start → (end, value).
    runs: BTreeMap<u64, (u64, V)>,
    /// Granules in all runs.
    total: u64,
}

impl<V> Default for RunMap<V> {
    fn default() -> Self {
        Self { runs: BTreeMap::new(), total: 0 }
    }
}

impl<V: Copy + PartialEq> RunMap<V> {
    /// How many runs.
    pub(crate) fn len(&self) -> usize {
        self.runs.len()
    }

    /// How many granules.
    pub(crate) fn total(&self) -> u64 {
        self.total
    }

    pub(crate) fn clear(&mut self) {
        self.runs.clear();
        self.total = 0;
    }

    /// The run that holds the granule: its end and value.
    pub(crate) fn get(&self, at: u64) -> Option<(u64, V)> {
        let (_, (end, value)) = self.runs.range(..=at).next_back()?;
        (*end > at).then_some((*end, *value))
    }

    /// The first run that begins behind `at`.
    pub(crate) fn next_start(&self, at: u64) -> Option<u64> {
        self.runs.range(at + 1..).next().map(|(start, _)| *start)
    }

    /// The runs' parts within `start..end`, in order.
    pub(crate) fn within(&self, start: u64, end: u64) -> impl Iterator<Item = (u64, u64, V)> + '_ {
        let first = self.runs.range(..=start).next_back().map_or(start, |(s, _)| *s);
        self.runs
            .range(first..end.max(first))
            .map(move |(s, (e, v))| ((*s).max(start), (*e).min(end), *v))
            .filter(|(s, e, _)| s < e)
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (u64, u64, V)> + '_ {
        self.runs.iter().map(|(s, (e, v))| (*s, *e, *v))
    }

    /// Takes `start..end` out.
    pub(crate) fn remove(&mut self, start: u64, end: u64) {
        if start >= end || self.runs.is_empty() {
            return;
        }
        let overlapping: Vec<(u64, u64, V)> = {
            let first = self.runs.range(..=start).next_back().map_or(start, |(s, _)| *s);
            self.runs.range(first..end).map(|(s, (e, v))| (*s, *e, *v)).filter(|(_, e, _)| *e > start).collect()
        };
        for (s, e, v) in overlapping {
            self.runs.remove(&s);
            self.total -= e - s;
            if s < start {
                self.runs.insert(s, (start, v));
                self.total += start - s;
            }
            if e > end {
                self.runs.insert(end, (e, v));
                self.total += e - end;
            }
        }
    }

    /// Gives `start..end` this value.
    pub(crate) fn insert(&mut self, start: u64, end: u64, value: V) {
        if start >= end {
            return;
        }
        self.remove(start, end);
        let (mut start, mut end) = (start, end);
        if let Some((s, (e, v))) = self.runs.range(..start).next_back()
            && *e == start
            && *v == value
        {
            let s = *s;
            self.total -= start - s;
            self.runs.remove(&s);
            start = s;
        }
        if let Some((e, v)) = self.runs.get(&end).copied()
            && v == value
        {
            self.runs.remove(&end);
            self.total -= e - end;
            end = e;
        }
        self.runs.insert(start, (end, value));
        self.total += end - start;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use testkit::seeds;

    #[test]
    fn is_what_an_array_is() {
        seeds::each(200, |seed| {
            let mut random = fastrand::Rng::with_seed(seed);
            let mut map: RunMap<u8> = RunMap::default();
            let mut array = [None::<u8>; 64];
            for _ in 0..60 {
                let (a, b) = (random.u64(0..64), random.u64(0..=64));
                let (start, end) = (a.min(b), a.max(b));
                let value = random.bool().then(|| random.u8(0..3));
                match value {
                    Some(value) => map.insert(start, end, value),
                    None => map.remove(start, end),
                }
                array[start as usize..end as usize].fill(value);
                let shown: Vec<Option<u8>> = (0..64).map(|at| map.get(at).map(|(_, v)| v)).collect();
                assert_eq!(shown, array);
                assert_eq!(map.total(), array.iter().flatten().count() as u64);
                let mut last: Option<(u64, u8)> = None;
                for (s, e, v) in map.iter() {
                    assert!(s < e && last.is_none_or(|(end, value)| end < s || value != v));
                    last = Some((e, v));
                }
                let parts: u64 = map.within(start, end).map(|(s, e, _)| e - s).sum();
                assert_eq!(parts, array[start as usize..end as usize].iter().flatten().count() as u64);
            }
        });
    }
}
