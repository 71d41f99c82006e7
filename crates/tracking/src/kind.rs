//! What happened to a granule, and when: one 32-bit counter.

use std::fmt;

/// What a change left behind.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ChangeKind {
    /// Bytes that must be read to know them.
    Data,
    /// Zeroes, all of the granule.
    Zero,
    /// Given back by the guest, all of the granule; reads as zero.
    Discarded,
}

impl ChangeKind {
    /// The word that reports use.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Data => "data",
            Self::Zero => "zero",
            Self::Discarded => "discarded",
        }
    }

    pub(crate) const fn code(self) -> u32 {
        match self {
            Self::Data => 0,
            Self::Zero => 1,
            Self::Discarded => 2,
        }
    }

    /// The kind of that code. What is not known means bytes that must be read, which is never wrong.
    pub(crate) const fn of_code(code: u32) -> Self {
        match code & 3 {
            1 => Self::Zero,
            2 => Self::Discarded,
            _ => Self::Data,
        }
    }
}

impl fmt::Display for ChangeKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.word())
    }
}

/// The last epoch that a counter can hold: a mark every second for 34 years.
pub(crate) const LAST_EPOCH: u32 = (1 << 30) - 1;

/// A granule's counter: the epoch of its last change (bits 2–31) and of which kind that was (bits 0–1). 0: not changed
/// since the history began.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub(crate) struct Counter(pub(crate) u32);

impl Counter {
    pub(crate) const NEVER: Self = Self(0);

    pub(crate) const fn new(epoch: u32, kind: ChangeKind) -> Self {
        debug_assert!(epoch > 0 && epoch <= LAST_EPOCH);
        Self(epoch << 2 | kind.code())
    }

    pub(crate) const fn epoch(self) -> u32 {
        self.0 >> 2
    }

    pub(crate) const fn kind(self) -> ChangeKind {
        ChangeKind::of_code(self.0)
    }
}
