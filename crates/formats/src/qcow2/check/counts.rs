//! Numbers for each cluster of a file, in memory that grows with the clusters in use.

use disk::{DiskError, ErrorKind, Operation, Result};
use std::collections::HashMap;

/// Clusters per page.
pub(super) const PAGE: u64 = 4096;
/// Most memory for one [`Bytes`]: 512 MiB, for as many clusters in use (32 TiB of data with default geometry).
const MAX_BYTES: u64 = 512 << 20;
/// Most clusters of a file (QEMU's bound).
pub(super) const MAX_CLUSTERS: u64 = i32::MAX as u64;

fn no_memory() -> DiskError {
    DiskError::new(ErrorKind::NoMemory, Operation::Check)
        .because("the image has too many clusters in use to be checked in 512 MiB of memory")
}

/// A byte for each cluster, 0 at first.
pub(super) struct Bytes {
    pages: Vec<Option<Box<[u8; PAGE as usize]>>>,
    used: u64,
}

impl Bytes {
    /// For clusters up to, not including, `clusters`.
    pub(super) fn new(clusters: u64) -> Result<Self> {
        if clusters > MAX_CLUSTERS {
            return Err(DiskError::new(ErrorKind::NoMemory, Operation::Check)
                .because(format!("the file has {clusters} clusters, more than the bound of {MAX_CLUSTERS}")));
        }
        Ok(Self { pages: std::iter::repeat_with(|| None).take(clusters.div_ceil(PAGE) as usize).collect(), used: 0 })
    }

    pub(super) fn get(&self, cluster: u64) -> u8 {
        match self.pages.get((cluster / PAGE) as usize) {
            Some(Some(page)) => page[(cluster % PAGE) as usize],
            _ => 0,
        }
    }

    /// The byte of a cluster, or `None` beyond the end.
    fn get_mut(&mut self, cluster: u64) -> Result<Option<&mut u8>> {
        let Some(slot) = self.pages.get_mut((cluster / PAGE) as usize) else { return Ok(None) };
        if slot.is_none() {
            self.used += PAGE;
            if self.used > MAX_BYTES {
                return Err(no_memory());
            }
            *slot = Some(Box::new([0; PAGE as usize]));
        }
        Ok(slot.as_mut().map(|page| &mut page[(cluster % PAGE) as usize]))
    }

    pub(super) fn set(&mut self, cluster: u64, to: u8) -> Result<()> {
        if let Some(byte) = self.get_mut(cluster)? {
            *byte = to;
        }
        Ok(())
    }

    /// Whether all clusters of the page that holds `cluster` have 0.
    pub(super) fn page_is_empty(&self, cluster: u64) -> bool {
        !matches!(self.pages.get((cluster / PAGE) as usize), Some(Some(_)))
    }
}

/// References to each cluster, as counted.
pub(super) struct Counts {
    small: Bytes,
    /// Counts of 255 and more, whose small byte is 255.
    large: HashMap<u64, u64>,
    clusters: u64,
    max: u64,
}

/// In `small`: look into `large`.
const LARGE: u8 = u8::MAX;
/// Most entries of `large`.
const MAX_LARGE: usize = 8 << 20;

impl Counts {
    /// For clusters up to, not including, `clusters`; counts end at `max`.
    pub(super) fn new(clusters: u64, max: u64) -> Result<Self> {
        Ok(Self { small: Bytes::new(clusters)?, large: HashMap::new(), clusters, max })
    }

    pub(super) fn clusters(&self) -> u64 {
        self.clusters
    }

    pub(super) fn get(&self, cluster: u64) -> u64 {
        match self.small.get(cluster) {
            LARGE => self.large[&cluster],
            small => u64::from(small),
        }
    }

    /// Adds references; returns how many do not fit.
    pub(super) fn add(&mut self, cluster: u64, references: u64) -> Result<u64> {
        let present = self.get(cluster);
        let wanted = present.saturating_add(references);
        let to = wanted.min(self.max);
        if to >= u64::from(LARGE) {
            self.large.insert(cluster, to);
            if self.large.len() > MAX_LARGE {
                return Err(no_memory());
            }
        }
        self.small.set(cluster, to.min(u64::from(LARGE)) as u8)?;
        Ok(wanted - to)
    }

    /// Whether no cluster of the page that holds `cluster` has a reference.
    pub(super) fn page_is_empty(&self, cluster: u64) -> bool {
        self.small.page_is_empty(cluster)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_small_and_large() {
        let mut counts = Counts::new(10_000, 70_000).expect("small");
        assert!(counts.page_is_empty(9_999));
        assert_eq!(counts.add(9_999, 254).expect("room"), 0);
        assert_eq!(counts.get(9_999), 254);
        assert_eq!(counts.add(9_999, 1).expect("room"), 0);
        assert_eq!(counts.get(9_999), 255);
        assert_eq!(counts.add(9_999, 69_800).expect("room"), 55);
        assert_eq!((counts.get(9_999), counts.get(9_998), counts.get(1 << 60)), (70_000, 0, 0));
        assert!(!counts.page_is_empty(9_999) && counts.page_is_empty(0));
    }

    #[test]
    fn memory_is_bounded() {
        assert!(Counts::new(MAX_CLUSTERS + 1, 1).is_err());
        let mut counts = Counts::new(MAX_CLUSTERS, 1).expect("nothing is set aside yet");
        let refused = (0..MAX_CLUSTERS).step_by(PAGE as usize).find(|c| counts.add(*c, 1).is_err());
        assert_eq!(refused, Some(MAX_BYTES));
    }
}
