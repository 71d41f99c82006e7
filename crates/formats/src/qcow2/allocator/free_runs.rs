//! Sets of free clusters.

use std::collections::BTreeMap;

/// Free clusters by their number, joined to runs.
#[derive(Debug, Default)]
pub(super) struct FreeRuns(BTreeMap<u64, u64>);

impl FreeRuns {
    /// Takes clusters in that are in no run yet.
    pub(super) fn add(&mut self, first: u64, count: u64) {
        let (mut first, mut count) = (first, count);
        if let Some((&before, &len)) = self.0.range(..first).next_back()
            && before + len == first
        {
            self.0.remove(&before);
            (first, count) = (before, count + len);
        }
        if let Some(len) = self.0.remove(&(first + count)) {
            count += len;
        }
        self.0.insert(first, count);
    }

    /// Up to `max` clusters in a row, the lowest first.
    pub(super) fn take(&mut self, max: u64) -> Option<(u64, u64)> {
        let (first, len) = self.0.pop_first()?;
        let count = len.min(max);
        if count < len {
            self.0.insert(first + count, len - count);
        }
        Some((first, count))
    }

    /// The lowest free cluster.
    pub(super) fn first(&self) -> Option<u64> {
        self.0.first_key_value().map(|(first, _)| *first)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn free_runs_join() {
        let mut runs = FreeRuns::default();
        runs.add(5, 1);
        runs.add(7, 2);
        runs.add(6, 1);
        assert_eq!(runs.0.len(), 1);
        assert_eq!(runs.take(3), Some((5, 3)));
        assert_eq!(runs.take(3), Some((8, 1)));
        assert_eq!(runs.take(3), None);
    }
}
