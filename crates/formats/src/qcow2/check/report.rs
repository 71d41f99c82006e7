//! What a check says.

use crate::qcow2::Corruption;

/// Most findings that a report lists; the counters count all.
pub const MAX_FINDINGS: usize = 1000;

/// How bad a finding is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Severity {
    /// Data is in danger.
    Corruption,
    /// Space is lost, nothing else.
    Leak,
    /// Something could not be checked.
    Error,
}

/// One finding.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// How bad it is.
    pub severity: Severity,
    /// What it is.
    pub what: Corruption,
}

/// What a check found; after a repair, what is left, and what was mended.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CheckReport {
    /// Contradictions that endanger data.
    pub corruptions: u64,
    /// Clusters whose space is lost.
    pub leaks: u64,
    /// Things that could not be checked.
    pub check_errors: u64,
    /// Contradictions that the repair removed.
    pub corruptions_fixed: u64,
    /// Leaks that the repair removed.
    pub leaks_fixed: u64,
    /// Where the last cluster in use ends, in bytes.
    pub image_end_offset: u64,
    /// Clusters of the guest's disk.
    pub total_clusters: u64,
    /// Those that the image holds.
    pub allocated_clusters: u64,
    /// Those of them that do not follow their neighbour in the file.
    pub fragmented_clusters: u64,
    /// Those of them that are compressed.
    pub compressed_clusters: u64,
    /// The header's dirty bit is set.
    pub dirty: bool,
    /// The header's corrupt bit is set.
    pub marked_corrupt: bool,
    /// The first [`MAX_FINDINGS`] findings.
    pub findings: Vec<Finding>,
    /// How many more there were.
    pub findings_omitted: u64,
}

impl CheckReport {
    /// Whether there is nothing to complain about.
    pub fn is_clean(&self) -> bool {
        self.corruptions == 0 && self.leaks == 0 && self.check_errors == 0
    }

    pub(super) fn corruption(&mut self, times: u64, what: Corruption) {
        self.corruptions = self.corruptions.saturating_add(times);
        self.list(Severity::Corruption, what);
    }

    pub(super) fn leak(&mut self, what: Corruption) {
        self.leaks += 1;
        self.list(Severity::Leak, what);
    }

    pub(super) fn error(&mut self, times: u64, what: Corruption) {
        self.check_errors = self.check_errors.saturating_add(times);
        self.list(Severity::Error, what);
    }

    /// Lists a finding that another one has counted.
    pub(super) fn list(&mut self, severity: Severity, what: Corruption) {
        if self.findings.len() < MAX_FINDINGS {
            self.findings.push(Finding { severity, what });
        } else {
            self.findings_omitted += 1;
        }
    }
}

/// How far a check or repair is: `done` of `total` steps, both in L2 tables over all passes so far known.
pub type Progress<'a> = &'a mut dyn FnMut(u64, u64);
